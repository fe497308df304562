"""RunState and its files: written whole or not at all, and verified when they are opened; only the newest few are kept.

A checkpoint is a zip file as torch.save writes it, with the SHA-256 of everything before it in the zip comment:
torch.load does not notice a flipped bit. The members' own check sums (CRC-32) are omitted, as torch.serialization
allows: they would detect less and cost as much time again. The file holds tensors and plain values only and is read by
models.checkpoints.torch_file, which runs no code.
"""

import dataclasses
import hashlib
import typing
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoints import first_look, torch_file
from models.checkpoints.run_fields import FORMAT, check_run, lacking
from utils.files import atomic_write

from .names import BEST_FILE, STEP_FILE, checkpoint_files, step_files, step_path

__all__ = ["BEST_FILE", "STEP_FILE", "checkpoint_files", "step_files", "step_path"]

RULES = 4                        # of this code, for runs that it begins; see RunState.rules
CHUNK = 1 << 20
WEIGHTS = {"model": {}, "optimizer": {}, "scaler": {}, "ema": {}, "first": {}}        # fields that a header lacks


class CheckpointError(ValueError):
    """Raised for a checkpoint that is missing, damaged or of another run."""

    exit_code = 2


class NonFiniteError(CheckpointError):
    """Raised instead of saving weights that are NaN or infinite."""

    exit_code = 4


@dataclasses.dataclass
class RunState:
    """Everything that a run needs to resume exactly. No generator state: see randomness.py.

    models/checkpoints/run_fields.py defines what a file may hold in each field, and which fields older files lack.
    """

    step: int                       # batches consumed
    updates: int                    # of them, those that changed the weights
    skips: int                      # trailing batches that did not
    model: dict
    optimizer: dict
    scaler: dict
    best: dict                      # {"step", "accuracy"} of the best evaluation, {} before the first
    # Before training: {"accuracy", "split"} of an evaluation, if there was one; {"edits", "attention"} with --attention_edits.
    first: dict
    config: dict                    # the resolved configuration
    architecture: dict              # the row of configs.MODELS as used
    classes: list[str]
    train_images: int               # in the data set: with another number the order of the samples differs
    seconds: float                  # spent so far, over all sessions of the run
    ema: dict = dataclasses.field(default_factory=dict)      # the averaged weights, {} without --ema_decay
    format: str = FORMAT
    world_size: int = 1             # processes of the session that wrote it
    threads: int = 0                # PyTorch's within an operation, which change the last bits; 0: not known
    data: str = ""                  # splits.fingerprint of the training data; "": not known
    cached: bool | None = None      # whether the training images are cached on the device; None: not known
    # Of the code that began the run. 2: with fewer than 10 steps the last one learns too (lr_multiplier); 3: a difference of one
    # image does not decide which evaluation is the best (Run.is_best); 4: the only held-out split has the name that the data give
    # it, not always "test" (build.find.open_data).
    rules: int = 1
    license: str = ""               # of the start weights, which also binds those trained from them; "": not known


@dataclasses.dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint file that was opened and verified. Pass it on instead of its path, so that it is hashed only once."""

    path: Path
    header: RunState                # without what is in WEIGHTS
    skipped: Mapping[Path, str] = dataclasses.field(default_factory=dict)      # newer files of the folder, and why not used
    lacking: tuple[str, ...] = ()   # fields that the earlier version which wrote it did not have

    def state(self) -> RunState:
        """Return the whole state, with tensors on the CPU. Raises CheckpointError."""
        state = RunState(**_read(self.path, mapped=False))
        if state.step != self.header.step:
            raise CheckpointError(f"{self.path} was replaced while it was being read. Start again.")
        return state


def open_run_checkpoint(path: Path) -> RunCheckpoint:
    """Open a file after checking that it is what `save` wrote, bit for bit, at the step in its name. Raises CheckpointError."""
    try:
        first_look.check_seal(path)
        with open(path, "rb") as stream:
            sealed = first_look.is_sealed(stream)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not sealed:
        raise CheckpointError(f"{path}: damaged (its SHA-256 does not match)")
    content, named = _read(path, mapped=True), STEP_FILE.fullmatch(path.name)
    if named and content["step"] != int(named[1]):
        raise CheckpointError(f"{path}: contains step {content['step']}; it was renamed or replaced by another file")
    return RunCheckpoint(path, _header(content), lacking=tuple(lacking(content)))


def read_header(path: Path) -> RunState:
    """Return the state without the fields of WEIGHTS: step, best, config, ... Verifies nothing. Raises CheckpointError."""
    return _header(_read(path, mapped=True))


def _header(content: dict) -> RunState:
    return RunState(**content | WEIGHTS)


def _read(path: Path, mapped: bool) -> dict:
    """Return the fields of a RunState, with their types checked. Does not verify the SHA-256. `mapped`: numbers stay in the
    file until they are used."""
    try:
        content = torch_file.read(path, mapped=mapped, verified=True)
        check_run(content, path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return content


# ------------------------------------------------------------------------------------------------------------ writing


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError if a weight is NaN or infinite. Takes each tensor's minimum and maximum, without a copy."""
    floats = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point() and tensor.numel()}
    ends = [end.isfinite() for tensor in floats.values() for end in torch.aminmax(tensor.detach())]
    finite = torch.stack(ends).tolist() if ends else []                        # one transfer from a GPU
    for name, low, high in zip(floats, finite[::2], finite[1::2]):
        if not (low and high):
            raise NonFiniteError(f"the weights are not finite any more ({name} is the first) and are not saved")


def save(path: Path, state: RunState) -> None:
    """Write a checkpoint atomically. Call `check_finite` before. Raises StorageError."""
    atomic_write(path, lambda unfinished: _write(unfinished, dict(vars(state))))


def _write(path: Path, content: object) -> None:
    crc = torch.serialization.get_crc32_options()
    with open(path, "wb") as stream:
        sealed = _Sealed(stream)
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(content, sealed)
        finally:
            torch.serialization.set_crc32_options(crc)
        sealed.close()


class _Sealed:
    """Writes what torch.save writes, and its digest into the archive's comment, without reading the file again.

    The archive ends with the length of its comment, 0, in two bytes. They are withheld until the end is known.
    """

    def __init__(self, stream: typing.BinaryIO):
        self._stream, self._digest, self._withheld, self._error = stream, hashlib.sha256(), b"", None

    def write(self, data) -> int:
        """Never raises: torch's writer would hide the error and finish the archive. `close` raises it."""
        view = memoryview(data)
        try:
            if self._error is None:
                ends = self._withheld + bytes(view[-2:])
                self._put(memoryview(ends[:-2]))
                self._put(view[:-2])
                self._withheld = ends[-2:]
        except OSError as error:
            self._error = error
        return len(view)

    def _put(self, view: memoryview) -> None:
        for start in range(0, len(view), CHUNK):
            chunk = view[start:start + CHUNK]
            self._stream.write(chunk)
            self._digest.update(chunk)

    def flush(self) -> None:
        pass                                          # torch.save calls it; the file is flushed when it is whole

    def close(self) -> None:
        """Raise the OSError of the first write that failed."""
        if self._error is not None:
            raise self._error
        assert self._withheld == b"\0\0", "torch.save no longer ends its archive with the length of an empty comment"
        self._put(memoryview(first_look.SEAL_LENGTH.to_bytes(2, "little")))
        self._stream.write(first_look.SEAL + self._digest.hexdigest().encode())


# ------------------------------------------------------------------------------------------------------------- folders


def open_newest(folder: Path, verify: bool = True) -> RunCheckpoint:
    """Open the newest intact checkpoint of a run; without `verify` the newest that can be read. Raises CheckpointError."""
    skipped = {}
    for path in checkpoint_files(folder):
        try:
            opened = open_run_checkpoint(path) if verify else RunCheckpoint(path, read_header(path))
            return dataclasses.replace(opened, skipped=skipped)
        except CheckpointError as error:
            skipped[path] = str(error)
    reason = f" ({'; '.join(each.replace(f'{folder}/', '') for each in skipped.values())})" if skipped else ""
    raise CheckpointError(f"{first_look.not_a_run(folder)}{reason}")


def retain(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` step checkpoints. Call it after the new one is saved."""
    for path in step_files(folder)[keep:]:
        path.unlink(missing_ok=True)
