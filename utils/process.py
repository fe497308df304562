"""How a run is asked to stop, and what a launch leaves for the script that made it.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP are requests: the step is finished, the run is saved, the process ends. A second
one ends it at once. torchrun kills what has not ended 30 s after a signal and answers any end with code 1; train.sh
therefore keeps signals from it, and makes a folder for every launch, named by VIT_LAUNCH:

  pid-R      process R, which train.sh signals itself
  asked      made by train.sh when it was asked to stop, for processes that come later
  code-000   the exit code of the launch (code-001 after torchrun's first restart, ...): the first that knows it writes it
  folder     the folder of the run, where the processes go on after a restart
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

PREEMPTED = 143                # as a shell has it for a process that SIGTERM ended
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Batch systems signal the script, the launcher and the processes alike, and the launcher passes its signal on: what comes
# within so many seconds of the first signal is the same request.
ONE_REQUEST = 2.0
PR_SET_PDEATHSIG = 1


class Stop:
    """Takes the signals inside a `with` block, and tells whether this process was asked to stop.

    `saves`: a run is under way that can be saved; without it a request ends the process at once, with the words of `kept`.
    """

    def __init__(self):
        self.saves, self.kept = False, "stopped before the first step: nothing to save"
        self._asked: float | None = None
        self._window = ONE_REQUEST if "LOCAL_RANK" in os.environ else 0.0
        self._before: dict = {}
        self._process = os.getpid()

    def __enter__(self) -> "Stop":
        for number in REQUESTS:
            # What is ignored (by nohup, by a script that starts a job in its background) stays so.
            if signal.getsignal(number) is not signal.SIG_IGN or number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._heed)
        if (file := launch_file(f"pid-{os.environ.get('RANK', 0)}")) is not None:
            file.write_text(f"{os.getpid()}\n")
            if launch_file("asked").exists():      # while torchrun started the processes: nobody was there to be signalled
                _leave()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        return self._asked is not None

    def _heed(self, number: int, _frame) -> None:
        if os.getpid() != self._process:           # a child of this process that has not taken its own signals yet
            return
        now = time.monotonic()
        if self.saves and self._asked is None:
            self._asked = now
        elif not self.saves:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                _say(f"train.py: {signal.Signals(number).name}: {self.kept}")
            _leave()
        elif now - self._asked > self._window:
            _say(f"train.py: {signal.Signals(number).name}: left at once")
            leave_code(PREEMPTED)
            os._exit(PREEMPTED)


def _leave() -> None:
    """Ends this process, with nothing to save. torchrun would start anew what ends with a code of its own."""
    known = leave_code(PREEMPTED) is not None
    os._exit(0 if known and "LOCAL_RANK" in os.environ else PREEMPTED)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def launch_file(name: str) -> Path | None:
    """A file of this launch; None where train.sh made none."""
    folder = os.environ.get("VIT_LAUNCH")
    return Path(folder, name) if folder else None


def restarts() -> int:
    """How often torchrun has started the processes of this launch anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def leave_code(code: int) -> bool | None:
    """Leaves the exit code for train.sh. -> whether this process is the first to, which knows the cause; None: no train.sh"""
    file = launch_file(f"code-{restarts():03d}")
    if file is None:
        return None
    try:
        with open(file, "x") as stream:
            stream.write(str(code))
    except FileExistsError:
        return False
    except OSError:                                # the folder is gone: nobody waits for the code any more
        return None
    return True


def die_with_parent() -> None:
    """Linux: this process is killed when the one that started it ends, so that a launcher's end leaves none behind."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:                 # it ended before it could be tied to this one
            os._exit(1)


def ignore_signals() -> None:
    """For loader workers: the process that they work for stops them, after the step that is under way."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
