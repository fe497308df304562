"""Checkpoints written beside training: it waits for a copy in memory, a thread does the rest.

The design of CheckFreq (Mohan et al., FAST 2021): snapshot, then persist; here one write at a time. A disk that is full
or gone costs a warning and not the run, until that has happened several times in a row.
"""

import concurrent.futures
import contextlib
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import checkpoint, run_folder
from .checkpoint import RunState, StorageError
from .run_log import sync_log


class Saver:
    """Saves RunStates of the run in `folder` and keeps the newest `keep` step checkpoints there. For one process of the group.

    A process that forks meanwhile (to start loader workers) waits until the write has ended: a child of a fork in the
    middle of it would hold the writer's locks and its half-written file. The copy's memory is kept for the next one.
    """

    def __init__(self, folder: Path, keep: int, max_failures: int = 3, say: Callable[[str], None] = print):
        """`say` takes one line; it is called from the writing thread too."""
        self._folder, self._keep, self._max_failures, self._say = folder, keep, max_failures, say
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: concurrent.futures.Future | None = None
        self._copy: RunState | None = None
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

    def save(self, paths: Sequence[Path], state: RunState) -> None:
        """Returns when `state` is copied; then it may change. Waits for an earlier write first.

        A write that fails is one line to `say`. A best.pt that could not be written is owed: it is written with the next save,
        unless that brings a newer one. Raises NonFiniteError, and then writes nothing.
        """
        self.wait()
        checkpoint.check_finite(state.model)
        checkpoint.check_finite(state.ema)
        owed = self._owed()
        reusable = self._copy is not None and self._copy is not owed
        self._copy = RunState(**copied(vars(state), vars(self._copy) if reusable else {}))
        files = [(path, self._copy) for path in paths]
        if any(path.name == checkpoint.BEST_FILE for path in paths):
            self._best_is_lost = False
        elif owed is not None:                        # first: a checkpoint after it would have it evaluated no more
            files.insert(0, (self._folder / checkpoint.BEST_FILE, owed))
        self._unwritten = files
        self._writing = self._writer.submit(self._write, list(files))

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


def copied(value: object, kept: object = None) -> object:
    """Tensors in dicts, lists and tuples, in the memory of the CPU and of nobody else; plain values as they are.

    `kept` is an earlier copy that is no longer needed: its tensors take the new numbers where they fit.
    """
    if isinstance(value, torch.Tensor):
        if isinstance(kept, torch.Tensor) and (kept.shape, kept.dtype) == (value.shape, value.dtype):
            return kept.copy_(value.detach())
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(item, kept.get(key) if isinstance(kept, dict) else None) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        before = kept if isinstance(kept, (list, tuple)) and len(kept) == len(value) else [None] * len(value)
        return type(value)(copied(item, old) for item, old in zip(value, before))
    return value


_savers: "weakref.WeakSet[Saver]" = weakref.WeakSet()


def _finish_writes() -> None:
    concurrent.futures.wait([saver._writing for saver in _savers if saver._writing is not None])


os.register_at_fork(before=_finish_writes)
