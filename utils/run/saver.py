"""Checkpoints written in the background: training waits for a copy in memory, and a thread writes it.

The design of CheckFreq (Mohan et al., FAST 2021): snapshot, then persist; here one write at a time. A save that fails
causes a warning; several failures in a row end the run.
"""

import concurrent.futures
import contextlib
import dataclasses
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from utils import distributed, launch
from utils.files import InUseError, StorageError

from . import checkpoint
from .checkpoint import RunState
from .folder import lock
from .log import sync_log

MAX_FAILURES = 3          # in a row; then the run ends


class Saver:
    """Saves RunStates of the run in `folder` and keeps the newest `keep` step checkpoints there. For rank 0.

    A process that forks (to start loader workers) waits until the write has ended: a child forked during the write would have
    the writer's locks and its half-written file. The memory of the copy is reused for the next one; `reserve` allocates it
    in advance.
    """

    def __init__(self, folder: Path, keep: int, best: dict | None = None, warn: Callable[[str], None] = print):
        """`best`: that of the best.pt in the folder. `warn` takes one line; the writing thread calls it too."""
        self._folder, self._keep, self._warn = folder, keep, warn
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: concurrent.futures.Future | None = None
        self._memory: Memory | None = None                     # of the copy
        self._saved: dict[Path, tuple] = {}                    # of the last save: file -> its content
        self._best = best or {}
        self._failures, self._reason = 0, ""
        _savers.add(self)

    @property
    def best(self) -> dict:
        """Return {"step", "accuracy"} of the best.pt on the disk, {} without one. Waits for a current write.

        After a failed save it is that of the older file, so that a later evaluation may become the best.
        """
        self.wait()
        return self._best_on_disk()

    def _best_on_disk(self) -> dict:
        return self._best if os.path.exists(self._folder / checkpoint.BEST_FILE) else {}

    @property
    def failed(self) -> bool:
        """Return whether too many saves in a row have failed; `raise_if_failed` also waits for the current one."""
        return self._failures >= MAX_FAILURES

    def reserve(self, state: RunState) -> None:
        """Allocate, in the thread, the memory for copies of states such as this one: memory that no process has touched yet
        costs several times what copying does, and the first save would wait for it. Call it once there is optimizer state."""
        self.wait()
        self._writing = self._writer.submit(self._reserve, size_of(vars(state)), on_gpu(vars(state)))

    def _reserve(self, size: int, pinned: bool) -> None:
        with contextlib.suppress(MemoryError):                 # `save` raises it
            self._memory = Memory(size, pinned)
            np.frombuffer(self._memory.block, dtype=np.uint8).fill(0)

    def save(self, paths: Sequence[Path], state: RunState) -> None:
        """Wait for an earlier write, copy `state` and return; then the state may change.

        A write that fails causes a warning. The field `best` of a step checkpoint is that of the best.pt on the disk. A state
        that is on the disk already (of a run stopped right after a save) is not written again. Raises MemoryError, and
        NonFiniteError before anything is written.
        """
        self.wait()
        if not self._failures and all(self._saved.get(path) == _content(state) and path.exists() for path in paths):
            return
        checkpoint.check_finite(state.model)
        checkpoint.check_finite(state.ema)
        size = size_of(vars(state))
        if self._memory is None or self._memory.size < size:
            self._memory = None                                # free the old block before the new one is allocated
            self._memory = Memory(size, on_gpu(vars(state)))
        self._writing = self._writer.submit(self._write, paths, RunState(**copied(vars(state), self._memory)))

    def wait(self) -> None:
        """Wait until nothing is being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            while concurrent.futures.wait([writing], timeout=1).not_done:
                launch.show_life()
            writing.result()

    def raise_if_failed(self, failures: int = MAX_FAILURES) -> None:
        """Raise StorageError if so many saves in a row have failed, including the current one."""
        self.wait()
        if self._failures < failures:
            return
        kept = checkpoint.checkpoint_files(self._folder) if self._folder.is_dir() else []
        advice = (f"The last checkpoint on the disk is {kept[0]}: make room or repair the disk, then resume it (RESUME_PATH), "
                  "if needed in another --output_dir." if kept else
                  "No checkpoint was written: make room or choose another --output_dir, and start again.")
        raise StorageError(f"{self._reason}, {self._failures} failed save(s) in a row. {advice}")

    def close(self) -> None:
        """Wait for the current write. Raises StorageError if the last save failed: the end of a run must be on the disk."""
        self._writer.shutdown()
        self._memory = None
        self.raise_if_failed(1)

    # ---------------------------------------------------------------------------------------------- in the thread

    def _write(self, paths: Sequence[Path], state: RunState) -> None:
        """Try each file, even if another one failed."""
        self._saved.clear()
        paths = sorted(paths, key=lambda path: path.name != checkpoint.BEST_FILE)          # first: the others name it
        reasons = list(filter(None, [self._write_one(path, state) for path in paths]))
        if reasons:
            self._failures, self._reason = self._failures + 1, reasons[0]
            self._warn(f"warning: {reasons[0]}; earlier checkpoints are kept, training continues (failed save {self._failures} "
                       f"of {MAX_FAILURES} in a row that end the run)")
        elif self._failures:
            self._warn(f"{paths[-1]} is saved: saving works again")
            self._failures = 0
        if len(reasons) < len(paths):
            try:
                checkpoint.retain(self._folder, self._keep)
            except OSError as error:
                self._warn(f"warning: cannot delete old checkpoints in {self._folder} ({error.strerror})")

    def _write_one(self, path: Path, state: RunState) -> str:
        """Return the reason of a failure in one line, or an empty string."""
        try:
            lock(self._folder).check()                # the folder may have been deleted and taken by another run
            sync_log(self._folder)                    # a checkpoint never is ahead of the log
            is_best = path.name == checkpoint.BEST_FILE
            checkpoint.save(path, state if is_best else dataclasses.replace(state, best=self._best_on_disk()))
        except (StorageError, InUseError, OSError, RuntimeError, MemoryError) as error:   # RuntimeError: torch's writer
            if isinstance(error, OSError) and error.filename is not None:               # the log's, or the folder's
                return f"cannot write {error.filename} ({error.strerror})"
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            return reason if isinstance(error, (StorageError, InUseError)) else f"cannot write {path} ({reason})"
        self._saved[path] = _content(state)
        if is_best:
            self._best = state.best
        return ""


def _content(state: RunState) -> tuple:
    """Return what distinguishes the states of one run."""
    return state.step, state.updates, dict(state.best)


class Memory:
    """One block of memory for the copies of many tensors.

    It is a shared mapping, with large pages if the system has them: after a fork (for the workers of an evaluation) each page
    of private memory would cost a page fault at its next use, together ten times the cost of the copy. For tensors of a GPU it
    is pinned, for a fast transfer, if the system allows so much, and freed with this object: PyTorch's own pinned memory is
    rounded up to a power of two and never freed. Raises MemoryError.
    """

    ALIGNMENT = 64                  # bytes of a cache line of the processor
    PORTABLE = 1                    # cudaHostRegisterPortable: for all threads and GPUs of the process

    def __init__(self, size: int, pinned: bool = False):
        self.size = size
        try:
            self.block = mmap.mmap(-1, max(1, size))
        except OSError as error:
            raise MemoryError(f"not enough memory for a copy of {size / 1e6:,.0f} MB") from error
        with contextlib.suppress(AttributeError, OSError):                     # of another system
            self.block.madvise(mmap.MADV_HUGEPAGE)
        if pinned:
            self._pin()

    def _pin(self) -> None:
        cuda, place = torch.cuda.cudart(), torch.frombuffer(self.block, dtype=torch.uint8).data_ptr()
        if int(cuda.cudaHostRegister(place, len(self.block), self.PORTABLE)) == 0:
            weakref.finalize(self, cuda.cudaHostUnregister, place).atexit = False
        else:
            with contextlib.suppress(RuntimeError, AssertionError):            # else the next kernel reports that failure
                torch.zeros(1, device="cuda")

    def tensor(self, like: torch.Tensor, offset: int) -> torch.Tensor:
        """Return an uninitialized CPU tensor at this byte of the block, with a separate storage, as torch.save needs it."""
        if not like.numel():
            return torch.empty(like.shape, dtype=like.dtype)
        flat = torch.frombuffer(self.block, dtype=like.dtype, count=like.numel(), offset=offset)
        return flat.as_strided(like.shape, torch.empty_like(like, device="meta").stride())      # dense, in the same order


def _map_tensors(function: Callable[[torch.Tensor], object], value: object) -> object:
    """Return `value` with each tensor in its dicts, lists and tuples replaced by function(tensor)."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(function, item) for item in value)
    return value


def _tensors(value: object) -> list[torch.Tensor]:
    found = []
    _map_tensors(found.append, value)
    return found


def _aligned_size(tensor: torch.Tensor) -> int:
    """Return its bytes, rounded up to a cache line."""
    return -(-tensor.numel() * tensor.element_size() // Memory.ALIGNMENT) * Memory.ALIGNMENT


def size_of(value: object) -> int:
    """Return the bytes of a copy of the tensors in it."""
    return sum(map(_aligned_size, _tensors(value)))


def on_gpu(value: object) -> bool:
    return any(tensor.is_cuda for tensor in _tensors(value))


def copied(value: object, memory: Memory) -> object:
    """Copy tensors in dicts, lists and tuples into `memory`, which is overwritten; other values are returned unchanged."""
    offset = 0

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal offset
        taken = memory.tensor(tensor, offset).copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        offset += _aligned_size(tensor)
        return taken

    result = _map_tensors(copy, value)
    if on_gpu(value):
        torch.cuda.synchronize()                      # the transfers above are asynchronous
    return result


_savers: "weakref.WeakSet[Saver]" = weakref.WeakSet()


def _finish_writes() -> None:
    concurrent.futures.wait([saver._writing for saver in _savers if saver._writing is not None])


os.register_at_fork(before=_finish_writes)
distributed.before_end.append(_finish_writes)
