"""This process and its launcher: requests to stop, one-line errors, exit codes, restarts, output, garbage collection.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP are requests to stop: the step is finished, the run is saved, the process ends. A
second signal ends it at once. torchrun returns code 1 for every failure and kills processes that have not ended 30 s after a
signal; train.sh therefore does not pass signals to it, and exchanges files with the processes (utils/launch.py).
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
EXIT_PREEMPTED = 143           # the code that a shell returns for a process that SIGTERM ended
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Batch systems signal the script, the launcher and the processes, and the launcher passes its signal on: signals within this
# many seconds of the first one are the same request.
ONE_REQUEST = 2.0
# An error that all processes have is reported by the first one of the node. Another process waits this many seconds before it
# reports its error, because it may be the only one that has it.
SILENCE_S = 2.0
# If there is nothing to save, a thread handles a request that the main thread has not handled after this many seconds: that may
# be waiting in C code, for another process or a disk.
UNHANDLED_S = 1.0
PR_SET_PDEATHSIG = 1
# Control characters except tabs and line ends, and those that reverse the direction of text.
CONTROLS = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
          for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
LONGEST_WORD = 400             # characters of a word in an error message; longer ones are shortened
COLOR = re.compile(r"\x1b\[[0-9;]*m")                 # in the lines of other packages (wandb's)
OWN_MODULES = ("configs", "models", "utils")         # a missing one of these is a bug

_ends_at_once = _nodes_know = False
_stop_requested_at = float("inf")


class Program:
    """The value of the context `program`; its block may set `exit_code`."""

    def __init__(self, name: str):
        self.name, self.exit_code = name, 0
        self.stop = StopSignal(name)


@contextlib.contextmanager
def program(name: str, signals: bool = True, single_process: bool = True) -> Iterator[Program]:
    """Context for everything a program does: handles signals, reports user errors in one line, and determines the exit code.

    A user error is a ValueError with the class attribute `exit_code`, or an OSError about a file; anything else is a bug and
    keeps its traceback. Afterwards, `exit_code` is the code for the process to end with. signals: whether to handle signals
    (StopSignal). single_process: this is the only process, whatever RANK and WORLD_SIZE are set for. Exits at once if no
    program can work in this environment.
    """
    if single_process:
        launch.drop_place()
    if launch.below_launcher():
        die_with_parent()
    current = Program(name)
    with current.stop if signals else contextlib.nullcontext():
        try:
            temporary.check()
            launch.place()
        except ValueError as error:             # exits here, because a context manager cannot skip its block
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
            if launch.is_first_of_node():       # each node has its own train.sh
                launch.post_exit_code(current.exit_code)
            current.exit_code = _exit_status(current.exit_code)


@contextlib.contextmanager
def imports(name: str) -> Iterator[None]:
    """Context for the imports at the top of a program, before `program`: reports a missing package in one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        message, code = classify_error(error)
        if message is None:
            raise
        sys.exit(report_error(name, message, code))


def end_at_once_on_error() -> None:
    """From now on, end this process on an error without Python's teardown, which would wait for lost processes, or abort."""
    global _ends_at_once
    _ends_at_once = True


def nodes_know() -> None:
    """Record that the processes of the other nodes know the exit code of this one."""
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
        return (f"the package {error.name} is not installed in this Python. Use .venv/bin/python instead (bash train.sh makes "
                "it), or install what requirements.txt lists"), EXIT_BAD_INPUT
    return None, EXIT_BUG


def report_error(name: str, message: str, code: int) -> int:
    """Print the line of an error, once per node, and post its code -> the exit code of this process"""
    if launch.launch_file("") is not None and not launch.is_first_of_node():
        deadline = time.monotonic() + SILENCE_S
        while launch.posted_exit_code() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    if launch.post_exit_code(code) is not False:
        sys.stdout.flush()                      # so that earlier output is before the error in a pipe, too
        words = (word if len(word) <= LONGEST_WORD else f"{word[:60]}...{word[-60:]}" for word in message.split())
        print(f"{name}: error: {printable(' '.join(words))}", file=sys.stderr, flush=True)
    return _exit_status(code)


def printable(text: str) -> str:
    """Replace control characters by escapes such as \\x1b: the names of files and classes may contain anything."""
    return text if text.isascii() and text.isprintable() else text.translate(CONTROLS)


def _exit_status(code: int) -> int:
    """Return the exit code of this process when the run ends with `code`.

    For any exit code but 0, torchrun prints a report and restarts all processes (MAX_RESTARTS). Below train.sh, processes
    therefore post their code for it and exit with 0, unless a process was lost, or other nodes do not know the code.
    """
    if not launch.below_launcher():
        return code
    cause = launch.posted_exit_code()
    if (code if cause is None else cause) == EXIT_PEER_LOST:
        return EXIT_PEER_LOST
    known = cause is not None and (launch.one_node() or _nodes_know)
    return 0 if code in (0, EXIT_PREEMPTED) or known else code


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run main(arguments) as this process's program and exit with the code that it returns."""
    gc.disable()                # imports make a million permanent objects; collecting them takes a third of the start
    sys.stdout, sys.stderr = ResilientStream(sys.stdout), ResilientStream(sys.stderr)
    try:
        code = main(sys.argv[1:])
    finally:
        gc.unfreeze()           # otherwise packages that check for their objects at the exit (nanobind) report leaks
    sys.exit(code)


def collect_garbage() -> None:
    """Turn the garbage collector on for objects made from now on; existing ones are permanent."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


class ResilientStream:
    """An output that may be closed (`| head`, a closed terminal): later writes are dropped without an error.

    Characters that its encoding lacks (PYTHONIOENCODING=ascii, a locale other than UTF-8) and control characters are written as
    escapes such as \\xfc; color codes are removed.
    """

    def __init__(self, stream: TextIO | None):
        """stream: None if it was closed before Python started."""
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
    """Handles signals inside a `with` block; `requested()` is whether this process was asked to stop.

    `saves`: whether there is a run that can be saved. If not, a request ends the process at once, with the message `kept`.
    """

    def __init__(self, name: str = "train.py"):
        self.saves, self.kept = False, "stopped before the first step; nothing to save"
        self._name, self._process = name, os.getpid()
        self._before: dict = {}
        self._requested_at: float | None = None
        self._wakeup: tuple[int, int] | None = None        # the descriptors of signal.set_wakeup_fd before, and in this block

    def __enter__(self) -> "StopSignal":
        for number in REQUESTS:
            # Signals that are ignored already (by nohup, by a script that starts a background job) stay ignored.
            if signal.getsignal(number) is not signal.SIG_IGN or number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._handle)
        self._listen()
        if (file := launch.launch_file(f"pid-{os.environ.get('RANK', 0)}")) is not None:
            files.write_file(file, f"{os.getpid()}\n")
            if launch.is_asked_to_stop():                 # before the file existed, train.sh could not signal this process
                _leave()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        before, writer = self._wakeup
        signal.set_wakeup_fd(before)
        os.close(writer)                           # ends the thread
        global _stop_requested_at
        _stop_requested_at = float("inf")

    def requested(self) -> bool:
        return self._requested_at is not None

    def _handle(self, number: int, _frame) -> None:
        if os.getpid() != self._process:           # a forked child that has not set its own handlers yet
            return
        now = time.monotonic()
        if not self.saves:
            self._leave_unsaved(number)
        elif self._requested_at is None:
            global _stop_requested_at
            self._requested_at = _stop_requested_at = now
        elif now - self._requested_at > (ONE_REQUEST if launch.below_launcher() else 0.0):
            self._print(number, "stopped at once")
            launch.post_exit_code(EXIT_PREEMPTED)
            os._exit(EXIT_PREEMPTED)

    def _listen(self) -> None:
        """Start a thread that handles signals while the main thread is in C code and cannot handle them."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False), writer

        def leave_if_unhandled() -> None:
            while numbers := os.read(reader, 64):
                for number in set(numbers) & set(self._before):
                    time.sleep(UNHANDLED_S)
                    if not self.saves and self._requested_at is None:
                        self._leave_unsaved(number)
            os.close(reader)

        threading.Thread(target=leave_if_unhandled, name="handle signals", daemon=True).start()

    def _leave_unsaved(self, number: int) -> None:
        if launch.is_first_of_node():
            self._print(number, self.kept)
        _leave()

    def _print(self, number: int, words: str) -> None:
        with contextlib.suppress(OSError):
            request = "asked to stop" if launch.launch_file("") and number == signal.SIGUSR1 else signal.Signals(number).name
            os.write(2, f"{self._name}: {request}: {words}\n".encode())          # train.sh sends SIGUSR1 for every request


# A signal to a forked child must not wake the thread of its parent.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def _leave() -> None:
    """End this process without saving. Exits with 0 below torchrun, which would restart a process with another code."""
    known = launch.post_exit_code(EXIT_PREEMPTED) is not None
    os._exit(0 if known and launch.below_launcher() else EXIT_PREEMPTED)


def requested_at() -> float:
    """Return when this process was asked to stop, by time.monotonic(); infinity if it was not."""
    return _stop_requested_at


def die_with_parent() -> None:
    """On Linux, have this process killed when its parent ends, so that no processes remain after a launcher."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:                 # the parent ended before prctl took effect
            os._exit(EXIT_BUG)


def ignore_signals() -> None:
    """Ignore signals in loader workers: the main process ends them after the current step."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Delay signals until after the block, so that a child forked inside gets none before it calls `ignore_signals`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
