"""Run any program, and measure what it uses; the accuracies that it reported."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOMENTS = 8         # of a run: only evaluations there count for its best
_running: set[int] = set()          # process numbers


class RunFailed(RuntimeError):
    """Raised when a program ends with another code than 0; the message has its last lines."""


@dataclasses.dataclass(frozen=True)
class Usage:
    wall: float           # seconds, from the start of the program to its end
    cpu: float            # seconds, with those of the processes it started
    memory: float         # MiB, of its largest process


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run reached.

    evaluations: (position, accuracy in percent), with positions above 0 up to 1, the end of training.
    """

    evaluations: tuple[tuple[float, float], ...]
    steps: int
    images_seen: int
    more: dict = dataclasses.field(default_factory=dict)

    @property
    def last(self) -> float:
        return self.evaluations[-1][1]

    @property
    def best(self) -> float:
        return max(accuracy for _, accuracy in at_moments(self.evaluations))


def at_moments(evaluations: Sequence[tuple[float, float]], count: int = MOMENTS) -> list[tuple[float, float]]:
    """Return the evaluations nearest to the moments 1/count, 2/count ... 1, so that more evaluations make no better best.

    They are fewer than `count` if the program evaluates less often. Raises ValueError if the end was not evaluated.
    """
    if not evaluations or evaluations[-1][0] != 1:
        raise ValueError(f"the end of training was not evaluated: {list(evaluations)[-1:]}")
    nearest = {min(evaluations, key=lambda one: abs(one[0] - moment / count)) for moment in range(1, count + 1)}
    return sorted(nearest)


def run(command: Sequence[str], folder: Path, threads: int) -> Usage:
    """Run a program in the root folder without a GPU, and write its output to folder/output.txt. Raises RunFailed."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads)) | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "output.txt"
    with open(output, "w", encoding="utf-8") as stream:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stream,
                                   stderr=subprocess.STDOUT)
        _running.add(process.pid)
        _, status, used = os.wait4(process.pid, 0)                 # of this process and those it waited for
        wall = time.perf_counter() - started
        _running.discard(process.pid)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RunFailed("\n".join([f"ended with code {process.returncode}", *said[-15:]]))
    return Usage(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def terminate_all() -> None:
    """Send SIGTERM to every running program."""
    for number in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGTERM)             # Popen.terminate() might take the exit code that os.wait4 waits for
