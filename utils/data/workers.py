"""Processes that load batches. If a worker dies or hangs, the run ends with a one-line error, and resuming it loses nothing. (A
worker that hangs before it has started is started again: see _start.)

PyTorch's DataLoader transports the batches. It is extended here:

* Its SIGCHLD handler, which raises wherever the main process happens to be (in an optimizer step, in a save), is removed; a
  death is noticed when the next batch is needed.
* A batch is moved to shared memory where an error can be reported (in the thread of the queue the error would be lost, and the
  main process would wait forever).
* Workers ignore signals, so they must be killed: DataLoader's SIGTERM would not end them, and the exit would wait for them.
"""

import atexit
import collections
import contextlib
import functools
import itertools
import mmap
import os
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Listener
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from utils import launch, process, temporary

TIMEOUT_S = 300.0            # without a batch: the workers count as hanging
START_LIMITS_S = 10.0, 30.0  # for workers to start, in the first attempts; the last attempt has TIMEOUT_S
STOP_TIMEOUT_S = 30.0        # replaces TIMEOUT_S after a request to stop, which waits for the step
POLL_S = 1.0                 # between checks that the workers are alive
END = object()               # comes after the last batch
GRACE_S = 2.0                # for workers to exit by themselves: a killed one may leave a file in /dev/shm
ADVICE = ("check free memory and shared memory (free -h, df -h /dev/shm). A smaller --num_workers needs less, 0 loads in the "
          f"main process; {launch.command('dataset.py')} check finds files that kill the process that reads them")


class WorkerError(ValueError):
    """Raised when data workers die or hang, or cannot be started."""

    exit_code = 5


class Stream:
    """Batches of keys that are read on demand: only those that the workers are loading are in memory.

    `taken` has those, in order; a new iteration, after workers hung at their start, begins with them. `wait` is set while the
    source, such as standard input, has no batch: the workers then do not count as hanging.
    """

    def __init__(self, batches: Iterable[Sequence]):
        self._batches, self.taken, self.wait = iter(batches), collections.deque(), False

    def __iter__(self) -> Iterator[Sequence]:
        yield from list(self.taken)
        while True:
            self.wait = True
            batch = next(self._batches, END)
            self.wait = False
            if batch is END:
                return
            self.taken.append(batch)
            yield batch


class WorkerPool:
    """Iterates over collate([dataset[key] for key in batches[i]]), i = 0, 1, ..., loaded by `num_workers` processes; or over
    collate(dataset.__getitems__(batches[i])) if the dataset has that method.

    The tuples that collate returns contain tensors and small objects. Raises WorkerError if a worker dies, finds no shared
    memory, or returns no batch for `timeout_s` seconds.
    """

    def __init__(self, dataset: Dataset, batches: Sequence | Stream, num_workers: int, collate: Callable, pin_memory: bool,
                 timeout_s: float = TIMEOUT_S):
        self.dataset, self.batches, self.num_workers, self.collate = dataset, batches, num_workers, collate
        self.pin_memory, self.timeout_s = pin_memory, timeout_s
        self._running: set[_Workers] = set()

    def __iter__(self) -> Iterator:
        begun = mmap.mmap(-1, max(1, self.num_workers))             # one byte per worker, shared with it
        # DataLoader draws from its generator; by default that is the global one, whose state a start must not change.
        loader = DataLoader(self.dataset, batch_sampler=self.batches, num_workers=self.num_workers,
                            collate_fn=functools.partial(_shared_memory_collate, self.collate), pin_memory=self.pin_memory,
                            multiprocessing_context="fork" if self.num_workers else None,
                            timeout=POLL_S if self.num_workers else 0, worker_init_fn=functools.partial(_worker_init, begun),
                            generator=torch.Generator())
        try:
            workers = _start(loader, self.timeout_s, begun)
        except OSError as error:
            raise WorkerError(f"{self.num_workers} data workers cannot be started ({error}); {ADVICE}") from error
        self._running.add(workers)
        try:
            for _ in itertools.count() if isinstance(self.batches, Stream) else range(len(self.batches)):
                batch = workers.next()
                if batch is END:
                    return
                yield batch
        finally:
            self._running.discard(workers)
            workers.close()

    def close(self) -> None:
        """End the workers of every running iteration. Without it, an exit waits for them."""
        for workers in list(self._running):
            workers.close()


class _NotSent(str):
    """The reason why a batch cannot be sent, sent in its place."""


def _shared_memory_collate(collate: Callable, samples: list) -> object:
    """Return collate(samples); in a worker, with the tensors in shared memory."""
    batch = collate(samples)
    if get_worker_info() is not None and isinstance(batch, tuple):
        try:
            _open_socket()
            for value in batch:
                if isinstance(value, Tensor):
                    value.share_memory_()
        except RuntimeError as error:
            return _NotSent(f"found no room in shared memory ({str(error).splitlines()[0]}); {ADVICE}")
        except OSError as error:
            return _NotSent(f"cannot make a socket in a folder for temporary files ({error}). Set TMPDIR to another folder")
    return batch


@functools.cache
def _open_socket() -> None:
    """Tries, once per worker, what the thread of the queue needs to send a batch: multiprocessing's folder and a socket in it."""
    tempfile.tempdir = temporary.socket_folder()
    Listener().close()


def _worker_init(begun: mmap.mmap, worker: int) -> None:
    process.die_with_parent()
    process.ignore_signals()
    sys.excepthook = _report_if_alive
    begun[worker] = 1


def _report_if_alive(*error: object) -> None:
    """Replace sys.excepthook, which the thread that sends batches calls. If the main process has just been killed, its pipes are
    closed a moment before this process is killed too, and there is nothing to report."""
    time.sleep(POLL_S)
    sys.__excepthook__(*error)


def _start(loader: DataLoader, timeout_s: float, begun: mmap.mmap) -> "_Workers":
    """Start the workers of one iteration, and start them again if one hangs before its first line.

    A forked child may wait forever for a lock of CPython that another thread of the parent held at the fork (seen in 3.10 and
    3.11, in _PyThreadState_DeleteExcept).
    """
    for limit_s in START_LIMITS_S:
        workers = _Workers(loader, timeout_s)
        until = time.monotonic() + limit_s
        while any(worker.is_alive() and not begun[number] for number, worker in enumerate(workers.processes)):
            if time.monotonic() > until:
                break
            time.sleep(0.001)
        else:
            return workers
        workers.kill()
        workers.close()
        begun[:] = bytes(len(begun))
    return _Workers(loader, timeout_s)


class _Workers:
    """The workers of one iteration over a DataLoader, and a thread that kills them if a batch does not arrive in time."""

    def __init__(self, loader: DataLoader, timeout_s: float):
        self.timeout_s, self.owner, self.late = timeout_s, os.getpid(), False
        self.begun, self.deadline, self.waited, self.batches = 0.0, float("inf"), 0.0, loader.batch_sampler
        handler = signal.getsignal(signal.SIGCHLD)
        with process.signals_blocked():             # until the workers ignore them
            try:
                self.iterator = iter(loader)
            finally:
                if signal.getsignal(signal.SIGCHLD) is not handler:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
        # DataLoader has no public name for its processes.
        self.processes = list(getattr(self.iterator, "_workers", ()))
        self.closed = threading.Event()
        if self.processes:
            _OPEN.add(self)
            threading.Thread(target=self._watch, name="watch data workers", daemon=True).start()

    def next(self):
        """Return the next batch; END after the last one of a Stream. Raises WorkerError if the workers failed."""
        self.begun = time.monotonic()
        self.deadline = self.begun + self.timeout_s
        batch = None
        while batch is None:
            try:
                batch = next(self.iterator, END)
            except Exception as error:
                if not str(error).startswith("DataLoader timed out"):
                    if reason := self._lost(error):
                        raise WorkerError(f"{reason}; {ADVICE}") from error
                    raise
                self.deadline = min(self.deadline, max(self.begun, process.requested_at()) + STOP_TIMEOUT_S)
        self.deadline = float("inf")
        if isinstance(batch, _NotSent):
            raise WorkerError(f"a data worker {batch}")
        return batch

    def _lost(self, error: Exception) -> str:
        """Describe what happened to the workers, if that caused the error; else an empty string."""
        until = time.monotonic() + POLL_S          # a connection may break shortly before the process has ended
        broken = isinstance(error, (OSError, EOFError))
        while broken and time.monotonic() < until and all(worker.is_alive() for worker in self.processes):
            time.sleep(0.01)
        if self.late:
            return (f"the data workers (pid {', '.join(str(worker.pid) for worker in self.processes)}) returned no batch for "
                    f"{round(self.deadline - self.begun, 1):g} s and were killed")
        if dead := [f"data worker {worker.pid} {ending(worker.exitcode)}" for worker in self.processes if not worker.is_alive()]:
            return "; ".join(dead)
        if isinstance(error, RuntimeError) and str(error).startswith("Too many open files"):
            return "too many open files (`ulimit -n` raises the limit)"
        return ""

    def close(self) -> None:
        if os.getpid() != self.owner:               # in a forked child
            return
        if self.processes and not self.closed.is_set():
            self.deadline = time.monotonic() + GRACE_S
            with contextlib.suppress(OSError, RuntimeError, AssertionError):
                self.iterator._shutdown_workers()
            self.kill()
            for worker in self.processes:
                worker.join()
                for file in Path("/dev/shm").glob(f"torch_{worker.pid}_*"):     # PyTorch removes a name after it filled the file
                    file.unlink(missing_ok=True)
                worker.close()
            self.closed.set()
            _OPEN.discard(self)
        self.iterator = None

    def _watch(self) -> None:
        while not self.closed.wait(POLL_S / 4):
            if isinstance(self.batches, Stream) and self.batches.wait:
                self.waited = time.monotonic()
            elif time.monotonic() > max(self.deadline, self.waited + self.timeout_s):
                self.late = True
                self.kill()
                return

    def kill(self) -> None:
        for worker in self.processes:
            with contextlib.suppress(ValueError, OSError):        # closed, or already ended
                worker.kill()


def ending(code: int | None) -> str:
    """Describe the exit code of a process; None: not known yet."""
    return f"was killed by {signal.Signals(-code).name}" if (code or 0) < 0 else f"ended with exit code {code}"


_OPEN: "weakref.WeakSet[_Workers]" = weakref.WeakSet()


@atexit.register
def _kill_all() -> None:
    # Before multiprocessing waits for them: it sends SIGTERM, which they ignore.
    for workers in list(_OPEN):
        workers.kill()
