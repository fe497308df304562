"""This process and its launcher: requests to stop, one-line errors, exit codes, restarts, output, garbage collection.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP are requests: the step is finished, the run is saved, the process ends. A second
one ends it at once. torchrun answers every failure with code 1 and kills what has not ended 30 s after a signal; train.sh
therefore keeps signals from it, and leaves and finds files in a folder for every launch (utils/launch.py).
"""

import contextlib
import ctypes
import gc
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn, TextIO

from utils import files, launch, temporary

EXIT_BUG, EXIT_BAD_INPUT, EXIT_PEER_LOST = 1, 2, 8
EXIT_PREEMPTED = 143           # as a shell has it for a process that SIGTERM ended
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Batch systems signal the script, the launcher and the processes alike, and the launcher passes its signal on: what comes
# within so many seconds of the first signal is the same request.
ONE_REQUEST = 2.0
# An error that all processes have is reported by the first of the node; another process reports its error after this many
# seconds of silence, because it may be the only one that has it.
SILENCE_S = 2.0
# A request is answered beside the main thread, if there is nothing to save and Python has not heard it for so long: it may wait
# in C code, for another process or a disk.
DEAF_S = 1.0
PR_SET_PDEATHSIG = 1
# Control characters but for tabs and ends of lines, and those that turn the order of letters around.
OBEYED = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
          for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
LONGEST_WORD = 400             # letters in the line of an error: longer ones are no path that anybody reads
COLOR = re.compile(r"\x1b\[[0-9;]*m")                 # in the lines of other packages (wandb's)
OWN_MODULES = ("configs", "models", "utils")         # one of these that is missing is a bug

_ends_at_once = _nodes_know = False
_asked_at = float("inf")


class Program:
    """What `program` gives to its block, which may set `exit_code`."""

    def __init__(self, name: str):
        self.name, self.exit_code = name, 0
        self.stop = StopSignal(name)


@contextlib.contextmanager
def program(name: str, signals: bool = True, alone: bool = True) -> Iterator[Program]:
    """Around all that a program does: takes signals, prints errors of the user as one line, and settles the exit code.

    Such an error is a ValueError with the class attribute `exit_code`, or an OSError about a file; anything else is a bug and
    keeps its traceback. Afterwards `exit_code` is what the process ends with. signals: whether to take signals (StopSignal).
    alone: it is one process, whatever RANK and WORLD_SIZE in the environment are meant for. An environment in which no program
    can work ends this one at once.
    """
    if alone:
        launch.drop_place()
    if launch.below_launcher():
        die_with_parent()
    current = Program(name)
    with current.stop if signals else contextlib.nullcontext():
        try:
            temporary.check()
            launch.place()
        except ValueError as error:             # before the block, which cannot be skipped
            sys.exit(report_error(name, *classify_error(error)))
        try:
            yield current
        except Exception as error:
            message, code = classify_error(error)
            if message is not None:
                current.exit_code = report_error(name, message, code)
            else:
                launch.post_exit_code(code)
                if not _ends_at_once:
                    raise
                traceback.print_exc()
                current.exit_code = code
            if _ends_at_once:
                sys.stdout.flush()
                os._exit(current.exit_code)
        else:
            if launch.is_first_of_node():       # each node has a train.sh of its own
                launch.post_exit_code(current.exit_code)
            current.exit_code = _exit_status(current.exit_code)


@contextlib.contextmanager
def imports(name: str) -> Iterator[None]:
    """Around the imports at the top of a program, before `program`: a package that this Python lacks is one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        message, code = classify_error(error)
        if message is None:
            raise
        sys.exit(report_error(name, message, code))


def end_at_once_on_error() -> None:
    """From now on an error ends this process without Python's teardown, which would wait for lost processes, or abort."""
    global _ends_at_once
    _ends_at_once = True


def nodes_know() -> None:
    """Says that the processes of the other nodes know the code with which this one ends."""
    global _nodes_know
    _nodes_know = True


def classify_error(error: Exception) -> tuple[str | None, int]:
    """-> (the message for the user, or None for a bug; the exit code)"""
    code = getattr(error, "exit_code", None)
    if isinstance(error, ValueError) and code is not None:
        return str(error), code
    if isinstance(error, OSError) and error.filename is not None:          # no such folder, no permission, disk full
        return f"{error.filename}: {error.strerror}", EXIT_BAD_INPUT
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in ("", *OWN_MODULES):
        return (f"this Python lacks {error.name}. Run .venv/bin/python instead (bash train.sh makes it), or install it "
                "(requirements.txt)"), EXIT_BAD_INPUT
    return None, EXIT_BUG


def report_error(name: str, message: str, code: int) -> int:
    """Prints the line of an error, once a node, and posts its code. -> what this process ends with"""
    if launch.launch_file("") is not None and not launch.is_first_of_node():
        deadline = time.monotonic() + SILENCE_S
        while launch.posted_exit_code() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    if launch.post_exit_code(code) is not False:
        sys.stdout.flush()                      # through a pipe, what was printed before stands before the error too
        words = (word if len(word) <= LONGEST_WORD else f"{word[:60]}...{word[-60:]}" for word in message.split())
        print(f"{name}: error: {printable(' '.join(words))}", file=sys.stderr, flush=True)
    return _exit_status(code)


def printable(text: str) -> str:
    """The text with escapes, such as \\x1b, for what a terminal would obey: the names of files and classes may hold anything."""
    return text if text.isascii() and text.isprintable() else text.translate(OBEYED)


def _exit_status(code: int) -> int:
    """What a process ends with, which has to end with `code`.

    torchrun takes anything but 0 for a failure, prints a report of its own and restarts all processes (MAX_RESTARTS). Started by
    train.sh, processes therefore leave the code to it and end with 0, unless a process was lost, or other nodes do not know the
    code.
    """
    if not launch.below_launcher():
        return code
    cause = launch.posted_exit_code()
    if (code if cause is None else cause) == EXIT_PEER_LOST:
        return EXIT_PEER_LOST
    known = cause is not None and (launch.one_node() or _nodes_know)
    return 0 if code in (0, EXIT_PREEMPTED) or known else code


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs main(arguments) as this process's program and exits with the code that it returns."""
    gc.disable()                # imports make a million objects that stay: looking through them takes a third of the start
    sys.stdout, sys.stderr = ResilientStream(sys.stdout), ResilientStream(sys.stderr)
    try:
        code = main(sys.argv[1:])
    finally:
        gc.unfreeze()           # or packages whose objects are looked for at the exit (nanobind's) report leaks
    sys.exit(code)


def collect_garbage() -> None:
    """Turns the garbage collector on; it leaves out what exists by now, which stays."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


class ResilientStream:
    """An output that may be closed (`| head`, a terminal that is gone): what is written then is dropped.

    Letters that its encoding lacks (PYTHONIOENCODING=ascii, another locale than UTF-8), and what a terminal would obey, are
    written as escapes such as \\xfc; colors are left out.
    """

    def __init__(self, stream: TextIO | None):
        """None: it was closed before Python started."""
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream
        self._stream.reconfigure(errors="backslashreplace", line_buffering=True)       # in a file both outputs keep their order

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, printable(COLOR.sub("", text) if "\x1b" in text else text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable, *arguments):
        try:
            return call(*arguments)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def bar_size() -> dict:
    """tqdm's arguments for a bar on standard error. In a terminal of 0 columns (some containers) tqdm would print nothing."""
    with contextlib.suppress(OSError, ValueError):
        if os.get_terminal_size(sys.stderr.fileno()).columns:
            return {"dynamic_ncols": True}
    typed = os.environ.get("COLUMNS", "")
    return {"ncols": int(typed) if typed.isdecimal() and int(typed) else 80, "nrows": 24}


class StopSignal:
    """Takes the signals inside a `with` block; `requested()` is whether this process was asked to stop.

    `saves`: a run is under way that can be saved; without it a request ends the process at once, with the words of `kept`.
    """

    def __init__(self, name: str = "train.py"):
        self.saves, self.kept = False, "stopped before the first step: nothing to save"
        self._name, self._process = name, os.getpid()
        self._before: dict = {}
        self._asked: float | None = None
        self._wakeup: tuple[int, int] | None = None        # the descriptors of signal.set_wakeup_fd before, and in this block

    def __enter__(self) -> "StopSignal":
        for number in REQUESTS:
            # What is ignored (by nohup, by a script that starts a job in its background) stays so.
            if signal.getsignal(number) is not signal.SIG_IGN or number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._handle)
        self._listen()
        if (file := launch.launch_file(f"pid-{os.environ.get('RANK', 0)}")) is not None:
            files.write_file(file, f"{os.getpid()}\n")
            if launch.is_asked_to_stop():                 # while torchrun started the processes: there was none to be signalled
                _leave()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        before, writer = self._wakeup
        signal.set_wakeup_fd(before)
        os.close(writer)                           # ends the thread
        global _asked_at
        _asked_at = float("inf")

    def requested(self) -> bool:
        return self._asked is not None

    def _handle(self, number: int, _frame) -> None:
        if os.getpid() != self._process:           # a child of this process that has not set its own handlers yet
            return
        now = time.monotonic()
        if not self.saves:
            self._leave_unsaved(number)
        elif self._asked is None:
            global _asked_at
            self._asked = _asked_at = now
        elif now - self._asked > (ONE_REQUEST if launch.below_launcher() else 0.0):
            self._print(number, "left at once")
            launch.post_exit_code(EXIT_PREEMPTED)
            os._exit(EXIT_PREEMPTED)

    def _listen(self) -> None:
        """Starts a thread that gets the signals while the main thread is in C code, where it would hear them afterwards."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False), writer

        def leave_if_deaf() -> None:
            while numbers := os.read(reader, 64):
                for number in set(numbers) & set(self._before):
                    time.sleep(DEAF_S)
                    if not self.saves and self._asked is None:
                        self._leave_unsaved(number)
            os.close(reader)

        threading.Thread(target=leave_if_deaf, name="hear requests", daemon=True).start()

    def _leave_unsaved(self, number: int) -> None:
        if launch.is_first_of_node():
            self._print(number, self.kept)
        _leave()

    def _print(self, number: int, words: str) -> None:
        with contextlib.suppress(OSError):
            asked = "asked to stop" if launch.launch_file("") and number == signal.SIGUSR1 else signal.Signals(number).name
            os.write(2, f"{self._name}: {asked}: {words}\n".encode())          # train.sh makes SIGUSR1 of every request


# A child that is signalled must not wake its parent's thread.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def _leave() -> None:
    """Ends this process, with nothing to save. torchrun would restart what ends with a code of its own."""
    known = launch.post_exit_code(EXIT_PREEMPTED) is not None
    os._exit(0 if known and launch.below_launcher() else EXIT_PREEMPTED)


def requested_at() -> float:
    """When this process was asked to stop, by time.monotonic(); infinity if it was not."""
    return _asked_at


def die_with_parent() -> None:
    """Linux: this process is killed when the one that started it ends, so that a launcher's end leaves none behind."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:                 # it ended before it could be tied to this one
            os._exit(EXIT_BUG)


def ignore_signals() -> None:
    """For loader workers: the process that they work for stops them, after the step that is under way."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Delivers requests after the block: a child that is forked inside never gets one before it calls `ignore_signals`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
