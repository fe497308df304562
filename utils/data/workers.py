"""Processes that load batches, and may die or hang without the run losing anything.

What a worker makes of a batch's keys depends on nothing else, so that where workers are lost all of them are started
anew at the batch that is waited for. PyTorch's DataLoader moves the batches; what it lacks is added here:

* its SIGCHLD handler, which raises wherever the main process happens to be (in an optimizer's step, in a save), is
  taken away; a death is noticed when the next batch is asked for;
* a batch is put into shared memory where an error can be told (in the queue's own thread it would be lost, and waited
  for without end);
* a worker that ignores signals must be killed: DataLoader's SIGTERM would not end it, and the exit would wait for it.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from utils import process as stopping

MAX_REBUILDS = 20            # in a loader's life
POLL_S = 1.0                 # between looks at whether the workers live
GRACE_S = 2.0                # for workers to end by themselves: one that is killed may leave a file in /dev/shm
ADVICE = ("is memory or shared memory short (free -h, df -h /dev/shm)? --num_workers with fewer takes less, 0 loads in the "
          "main process; python train.py --check_data finds a file that kills its reader")


class WorkerError(ValueError):
    """The data workers are lost again and again, or cannot be started."""

    code = 5


class _Lost(Exception):
    """What happened to the workers of one run."""


class _NoMemory:
    """Comes in place of a batch that found no room in shared memory."""

    def __init__(self, reason: str):
        self.reason = reason


class Loading:
    """Iterates over collate([dataset[key] for key in batches[i]]), i = 0, 1, ..., loaded by `num_workers` processes; over
    collate(dataset.__getitems__(batches[i])) where the dataset has that.

    batches is asked for its members by number. Without a batch for `timeout_s` seconds (0: for ever) the workers count as
    hanging. `say` gets one line for each time that they are started anew; raises WorkerError after MAX_REBUILDS of them.
    The tuples that collate returns hold tensors and small things.
    """

    def __init__(self, dataset: Dataset, batches: Sequence, num_workers: int, collate: Callable, pin_memory: bool,
                 timeout_s: float, say: Callable[[str], None]):
        self.dataset, self.batches, self.num_workers, self.collate = dataset, batches, num_workers, collate
        self.pin_memory, self.timeout_s, self.say = pin_memory, timeout_s, say
        self.rebuilds = 0
        self._running: set[_Workers] = set()

    def __iter__(self) -> Iterator:
        done, workers = 0, None
        try:
            while done < len(self.batches):
                try:
                    if workers is None:
                        workers = self._start(done)
                    batch = workers.next(self.timeout_s)
                except _Lost as lost:
                    self._close(workers)
                    workers = None
                    self._count(str(lost), done)
                    continue
                done += 1
                yield batch
        finally:
            self._close(workers)

    def close(self) -> None:
        """Ends the workers of every iteration under way. An exit without it waits for them."""
        for workers in list(self._running):
            self._close(workers)

    def _start(self, done: int) -> "_Workers":
        # A generator of its own, since DataLoader draws from it: a new start must not move the global one.
        loader = DataLoader(self.dataset, batch_sampler=_From(self.batches, done), num_workers=self.num_workers,
                            collate_fn=_Shared(self.collate), pin_memory=self.pin_memory, persistent_workers=False,
                            timeout=POLL_S if self.num_workers else 0, worker_init_fn=_settle, generator=torch.Generator())
        try:
            workers = _Workers(loader)
        except OSError as error:
            raise WorkerError(f"{self.num_workers} data workers cannot be started ({error}): {ADVICE}") from error
        self._running.add(workers)
        return workers

    def _close(self, workers: "_Workers | None") -> None:
        if workers is not None:
            self._running.discard(workers)
            workers.close()

    def _count(self, what: str, done: int) -> None:
        self.rebuilds += 1
        if self.rebuilds > MAX_REBUILDS:
            raise WorkerError(f"data workers were lost {self.rebuilds} times, at last: {what}; {ADVICE}")
        self.say(f"warning: {what}; all are started anew at the same batch (number {done} of this start), nothing is lost "
                 f"({self.rebuilds} of {MAX_REBUILDS})")


class _From:
    """batches[first], batches[first + 1], ..."""

    def __init__(self, batches: Sequence, first: int):
        self.batches, self.first = batches, first

    def __len__(self) -> int:
        return len(self.batches) - self.first

    def __iter__(self) -> Iterator:
        return (self.batches[number] for number in range(self.first, len(self.batches)))


class _Shared:
    """collate, with the tensors in shared memory where a worker does it."""

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, samples: list):
        batch = self.collate(samples)
        if get_worker_info() is not None and isinstance(batch, tuple):
            try:
                for value in batch:
                    if isinstance(value, Tensor):
                        value.share_memory_()
            except RuntimeError as error:
                return _NoMemory(str(error).splitlines()[0])
        return batch


def _settle(worker: int) -> None:
    stopping.die_with_parent()
    stopping.ignore_signals()


class _Workers:
    """One start of a DataLoader's workers, and a thread that kills them when a batch does not come in time."""

    def __init__(self, loader: DataLoader):
        self.owner, self.late, self.deadline = os.getpid(), False, float("inf")
        in_main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            self.iterator = iter(loader)
        finally:
            if in_main and signal.getsignal(signal.SIGCHLD) is not handler:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
        # DataLoader has no public name for its processes.
        self.processes = list(getattr(self.iterator, "_workers", ()))
        self.closed = threading.Event()
        if self.processes:
            _OPEN.add(self)
            threading.Thread(target=self._watch, name="watch data workers", daemon=True).start()

    def next(self, timeout_s: float):
        """The next batch. Raises _Lost where the workers are at fault."""
        if not self.processes:
            return next(self.iterator)
        self.deadline = time.monotonic() + timeout_s if timeout_s else float("inf")
        try:
            while True:
                try:
                    batch = next(self.iterator)
                    break
                except Exception as error:
                    if not str(error).startswith("DataLoader timed out"):
                        self._tell(error)
                        raise
        finally:
            self.deadline = float("inf")
        if isinstance(batch, _NoMemory):
            raise _Lost(f"a data worker found no room in shared memory ({batch.reason})")
        return batch

    def _tell(self, error: Exception) -> None:
        """Raises _Lost if it was a worker's death that led to the error."""
        until = time.monotonic() + POLL_S          # a connection may break a little before the process is gone
        broken = isinstance(error, (OSError, EOFError))
        while broken and time.monotonic() < until and all(process.is_alive() for process in self.processes):
            time.sleep(0.01)
        dead = [process for process in self.processes if not process.is_alive()]
        if self.late:
            raise _Lost(f"the data workers (pid {', '.join(str(process.pid) for process in self.processes)}) gave no batch in "
                        "time and were killed") from error
        if dead:
            raise _Lost("; ".join(f"data worker {process.pid} {ending(process.exitcode)}" for process in dead)) from error
        if isinstance(error, RuntimeError) and str(error).startswith("Too many open files"):
            raise WorkerError("too many open files: raise their number with `ulimit -n`, or give fewer --num_workers") from error

    def close(self) -> None:
        if os.getpid() != self.owner:               # in a process forked from theirs
            return
        if self.processes and not self.closed.is_set():
            self.deadline = time.monotonic() + GRACE_S
            with contextlib.suppress(OSError, RuntimeError, AssertionError):
                self.iterator._shutdown_workers()
            self._kill()
            for process in self.processes:
                process.join()
                _sweep(process.pid)
                process.close()
            self.closed.set()
            _OPEN.discard(self)
        self.iterator = None

    def _watch(self) -> None:
        while not self.closed.wait(POLL_S / 4):
            if time.monotonic() > self.deadline:
                self.late = True
                self._kill()
                return

    def _kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ValueError, OSError):        # closed, or gone
                process.kill()


def _sweep(worker: int) -> None:
    """Removes what a killed worker may have left in shared memory: PyTorch takes a file's name away after it has filled it."""
    for file in Path("/dev/shm").glob(f"torch_{worker}_*"):
        with contextlib.suppress(OSError):
            file.unlink()


def ending(code: int | None) -> str:
    """A process's exit code in words."""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_OPEN: "weakref.WeakSet[_Workers]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # Before multiprocessing waits for them: it sends SIGTERM, which they ignore.
    for workers in list(_OPEN):
        workers._kill()
