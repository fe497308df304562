"""Checkpoints written beside training: it waits for a copy in memory, a thread does the rest.

The design of CheckFreq (Mohan et al., FAST 2021): snapshot, then persist; here one write at a time. A disk that is full
or gone costs a warning and not the run, until that has happened several times in a row.
"""

import concurrent.futures
import contextlib
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from . import checkpoint
from . import folder as run_folder
from .checkpoint import RunState, StorageError
from .log import sync_log


class Saver:
    """Saves RunStates of the run in `folder` and keeps the newest `keep` step checkpoints there. For one process of the group.

    A process that forks meanwhile (to start loader workers) waits until the write has ended: a child of a fork in the
    middle of it would hold the writer's locks and its half-written file. The copy's memory is kept for the next one, and
    `reserve` takes it beforehand.
    """

    def __init__(self, folder: Path, keep: int, max_failures: int = 3, say: Callable[[str], None] = print):
        """`say` takes one line; it is called from the writing thread too."""
        self._folder, self._keep, self._max_failures, self._say = folder, keep, max_failures, say
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: concurrent.futures.Future | None = None
        self._copy: RunState | None = None
        self._memory: Memory | None = None                     # of the copy
        self._paths: set[Path] = set()                         # that it was for
        self._unwritten: list[tuple[Path, RunState]] = []      # of the last save; a best.pt of an earlier one too
        self._claimed, self._best_is_lost = True, False
        self._failures, self._reason = 0, ""
        _savers.add(self)

    @property
    def failed(self) -> bool:
        """As many saves in a row have failed as may: ask `end_if_failed`, for one may be under way that succeeds."""
        return self._failures >= self._max_failures

    @property
    def best_is_saved(self) -> bool:
        """best.pt is on the disk, the newest that `save` was given; to be asked when nothing is being written."""
        return self._owed() is None and os.path.exists(self._folder / checkpoint.BEST_FILE)

    @property
    def best_is_lost(self) -> bool:
        """best.pt vanished with its folder, and `save` has been given no other since: the next evaluation is the best."""
        return self._best_is_lost

    def reserve(self, state: RunState) -> None:
        """Takes the memory for copies of states such as this one, in the thread: memory that no process has touched yet
        costs several times what copying does, and the first save would wait for it. Once, when there is optimizer state."""
        self.wait()
        size, pinned = size_of(vars(state)), on_gpu(vars(state))
        self._writing = self._writer.submit(self._reserve, size, pinned)

    def _reserve(self, size: int, pinned: bool) -> None:
        with contextlib.suppress(MemoryError):                 # the save will tell
            self._memory = Memory(size, pinned)
            self._memory.touch()

    def save(self, paths: Sequence[Path], state: RunState) -> None:
        """Returns when `state` is copied; then it may change. Waits for an earlier write first.

        A write that fails is one line to `say`. A best.pt that could not be written is owed: it is written with the next save,
        unless that brings a newer one. What is on the disk already (a run that is stopped right after a save) is not written
        again. Raises NonFiniteError, and then writes nothing.
        """
        self.wait()
        if self._is_saved(paths, state):
            return
        checkpoint.check_finite(state.model)
        checkpoint.check_finite(state.ema)
        owed, size = self._owed(), size_of(vars(state))
        if self._memory is None or self._memory.size < size or (owed is not None and owed is self._copy):
            self._memory = None                                # before the new one is taken, where nobody else holds it
            self._copy = None
            self._memory = Memory(size, on_gpu(vars(state)))
        self._copy, self._paths = RunState(**copied(vars(state), self._memory)), set(paths)
        files = [(path, self._copy) for path in paths]
        if any(path.name == checkpoint.BEST_FILE for path in paths):
            self._best_is_lost = False
        elif owed is not None:                        # first: a checkpoint after it would have it evaluated no more
            files.insert(0, (self._folder / checkpoint.BEST_FILE, owed))
        self._unwritten = files
        self._writing = self._writer.submit(self._write, list(files))

    def _is_saved(self, paths: Sequence[Path], state: RunState) -> bool:
        """By the last save, whatever seconds have passed since."""
        last = self._copy
        return (last is not None and not self._unwritten and self._paths.issuperset(paths)
                and (last.step, last.updates, last.best) == (state.step, state.updates, state.best)
                and all(path.exists() for path in paths))

    def _owed(self) -> RunState | None:
        """The content of the best.pt that is not on the disk yet."""
        return next((state for path, state in self._unwritten if path.name == checkpoint.BEST_FILE), None)

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def end_if_failed(self) -> None:
        """Waits, and tries once more if too many saves have failed. Raises StorageError, as `close`, or goes on."""
        self.wait()
        if self.failed:
            self._try_again()
            if self.failed:
                self._end()

    def close(self) -> None:
        """Waits, and tries once more what failed. Raises StorageError if it fails: the end of a run has to be on the disk."""
        self.wait()
        if self._failures:
            self._try_again()
        self._end()

    def _try_again(self) -> None:
        self._writing = self._writer.submit(self._write, list(self._unwritten), again=True)
        self.wait()

    def _end(self) -> None:
        self._writer.shutdown()
        if not self._failures:
            return
        kept = checkpoint.step_files(self._folder)[:1] if self._folder.is_dir() else []
        if not kept and os.path.exists(self._folder / checkpoint.BEST_FILE):
            kept = [self._folder / checkpoint.BEST_FILE]
        advice = (f"the last checkpoint on the disk is {kept[0]}: make room or mend the disk, then go on from there "
                  "(RESUME_PATH), into another --output_dir if need be") if kept else (
                  "no checkpoint was written: make room or give another --output_dir, and start again")
        raise StorageError(f"{self._reason}, {self._failures} failed save(s) in a row; {advice}")

    def _write(self, files: list[tuple[Path, RunState]], again: bool = False) -> None:
        """Each file is tried, whatever became of the others; `again`: it fails without another line."""
        reason = self._attempt(self._prepare)
        if not reason:
            reasons = [self._attempt(self._write_one, file) for file in files]
            reason = next(filter(None, reasons), "")
        if reason:
            self._reason = reason
            if not again:
                self._failures += 1
                self._tell(f"warning: {reason}; earlier checkpoints are kept, training goes on (failed save "
                           f"{self._failures} of {self._max_failures} in a row that end the run)")
        elif self._failures:
            self._tell(f"{files[-1][0]} is saved: saving works again")
            self._failures = 0
        try:
            if len(self._unwritten) < len(files):
                checkpoint.retain(self._folder, self._keep)
        except OSError as error:
            self._tell(f"warning: cannot delete old checkpoints in {self._folder} ({error.strerror})")

    def _attempt(self, act: Callable, *given) -> str:
        """-> what went wrong, in one line, or an empty string"""
        try:
            act(*given)
        except (StorageError, OSError, RuntimeError, MemoryError, run_folder.FolderError) as error:
            return " ".join(str(error).split())[:300] or type(error).__name__
        return ""

    def _prepare(self) -> None:
        if not (self._claimed and self._folder.is_dir()):
            self._claimed = False                     # and so it stays where another run has taken the place
            run_folder.make_anew(self._folder)
            self._claimed = True
            best = self._folder / checkpoint.BEST_FILE
            self._best_is_lost = self._owed() is None and not best.exists()
            self._tell(f"warning: {self._folder} had vanished and is made anew: config.json, best.pt and the earlier "
                       "checkpoints are gone from it")
        sync_log(self._folder)

    def _write_one(self, file: tuple[Path, RunState]) -> None:
        checkpoint.save(*file)
        self._unwritten = [other for other in self._unwritten if other is not file]

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):            # a terminal that is gone
            self._say(line)


class Memory:
    """One block for the copies of many tensors. Where they come from a GPU it is pinned, which the transfer is fast with, if the
    system lets so much be.

    Else it is a shared mapping, of large pages where the system has them: after a fork (the workers of an evaluation) a page
    of private memory would cost a fault at its next use, together ten times what the copy does. Raises MemoryError.
    """

    ALIGNMENT = 64                  # bytes: a line of the processor's cache

    def __init__(self, size: int, pinned: bool = False):
        self.size = size
        if pinned:
            with contextlib.suppress(RuntimeError):                            # a limit on what may be locked
                self._block = torch.empty(max(1, size), dtype=torch.uint8, pin_memory=True).numpy()
                return
        try:
            self._block = mmap.mmap(-1, max(1, size))
        except OSError as error:
            raise MemoryError(f"not enough memory for a copy of {size / 1e6:,.0f} MB") from error
        with contextlib.suppress(AttributeError, OSError):                     # of another system
            self._block.madvise(mmap.MADV_HUGEPAGE)

    def touch(self) -> None:
        np.frombuffer(self._block, dtype=np.uint8).fill(0)

    def take(self, like: torch.Tensor, place: int) -> torch.Tensor:
        """A tensor on the CPU at this byte of the block, with a storage of its own, as torch.save wants it."""
        if not like.numel():
            return torch.empty(like.shape, dtype=like.dtype)
        flat = torch.frombuffer(self._block, dtype=like.dtype, count=like.numel(), offset=place)
        return flat.as_strided(like.shape, torch.empty_like(like, device="meta").stride())      # dense, in the same order


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _room(tensor: torch.Tensor) -> int:
    """Its bytes, up to the next line of the cache"""
    return -(-tensor.numel() * tensor.element_size() // Memory.ALIGNMENT) * Memory.ALIGNMENT


def size_of(value: object) -> int:
    """Bytes that a copy of the tensors in it takes"""
    return sum(map(_room, _tensors(value)))


def on_gpu(value: object) -> bool:
    return any(tensor.is_cuda for tensor in _tensors(value))


def copied(value: object, memory: Memory) -> object:
    """Tensors in dicts, lists and tuples, in `memory`, over what was there before; plain values as they are."""
    place = 0

    def copy(value: object) -> object:
        nonlocal place
        if isinstance(value, torch.Tensor):
            taken = memory.take(value, place).copy_(value.detach(), non_blocking=True)
            place += _room(value)
            return taken
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(copy, value))
        return value

    result = copy(value)
    if on_gpu(value):
        torch.cuda.synchronize()                      # the transfers, none of which waited for the one before
    return result


_savers: "weakref.WeakSet[Saver]" = weakref.WeakSet()


def _finish_writes() -> None:
    concurrent.futures.wait([saver._writing for saver in _savers if saver._writing is not None])


os.register_at_fork(before=_finish_writes)
