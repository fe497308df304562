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
        self._copy: dict[str, object] = {}
        self._failures, self._reason = 0, ""
        _savers.add(self)

    @property
    def failed(self) -> bool:
        """As many saves in a row have failed as may: the run should end, by `close`."""
        return self._failures >= self._max_failures

    def save(self, paths: Sequence[Path], state: RunState) -> None:
        """Returns when `state` is copied; then it may change. Waits for an earlier write first.

        A write that fails is one line to `say`. Raises NonFiniteError, and then writes nothing.
        """
        self.wait()
        checkpoint.check_finite(state.model)
        checkpoint.check_finite(state.ema)
        self._copy = copied(vars(state), self._copy)
        self._writing = self._writer.submit(self._write, list(paths), RunState(**self._copy))

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Waits. Raises StorageError if the last save failed: the end of a run has to be on the disk."""
        self.wait()
        self._writer.shutdown()
        if self._failures:
            kept = checkpoint.step_files(self._folder)[:1] if self._folder.is_dir() else []
            raise StorageError(f"{self._reason}, {self._failures} failed save(s) in a row; the last checkpoint on the disk is "
                               f"{kept[0] if kept else 'none'}: make room or mend the disk, then go on from there "
                               "(RESUME_PATH), into another --output_dir if need be")

    def _write(self, paths: list[Path], state: RunState) -> None:
        try:
            if not self._folder.is_dir():
                run_folder.make_anew(self._folder)
                self._tell(f"warning: {self._folder} had vanished and is made anew: config.json, best.pt and the earlier "
                           "checkpoints are gone from it")
            sync_log(self._folder)
            for path in paths:
                checkpoint.save(path, state)
        except (StorageError, OSError, RuntimeError, MemoryError, run_folder.FolderError) as error:
            self._failures += 1
            self._reason = " ".join(str(error).split())[:300] or type(error).__name__
            self._tell(f"warning: {self._reason}; earlier checkpoints are kept, training goes on (failed save "
                       f"{self._failures} of {self._max_failures} in a row that end the run)")
            return
        if self._failures:
            self._tell(f"{paths[-1]} is saved: saving works again")
            self._failures = 0
        try:
            checkpoint.retain(self._folder, self._keep)
        except OSError as error:
            self._tell(f"warning: cannot delete old checkpoints in {self._folder} ({error.strerror})")

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
