"""RunState and its files: saved whole or not at all, verified before use, kept in small number.

A checkpoint is a zip file as torch.save writes it, with the SHA-256 of everything before it in the zip comment:
torch.load alone does not notice a flipped bit. The members' own check sums (CRC-32) are left out, as torch.serialization
allows it: they would say less, and cost as much time again. It holds tensors and plain values only and is read by
models.torch_file, which runs no code and takes no more memory than the file's size warrants, whatever the file says.
"""

import contextlib
import dataclasses
import hashlib
import os
import pickletools
import re
import threading
import typing
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

FORMAT = "vit-run-1"
STEP_FILE = re.compile(r"step-(\d{8,})\.pt")
BEST_FILE = "best.pt"
CHUNK = 1 << 20
LATER = {"ema", "world_size", "threads", "data"}      # fields that older files of this format lack


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another run: one line."""


class NonFiniteError(CheckpointError):
    """Weights that are no numbers any more: not worth a checkpoint."""

    code = 4


class StorageError(ValueError):
    """What cannot be written: no space, no permission, a folder that is gone. One line."""

    code = 3


@dataclasses.dataclass
class RunState:
    """Everything a run needs to go on as if it had never stopped. No generator state: see randomness.py."""

    step: int                       # batches consumed
    updates: int                    # of them, those that changed the weights
    skips: int                      # trailing batches that did not
    model: dict
    optimizer: dict
    scaler: dict
    best: dict                      # {"step", "accuracy"} of the best evaluation, {} before the first
    # Before training: {"accuracy", "split"}, where something was evaluated then; {"edits", "attention"} with --attention_edits.
    first: dict
    config: dict                    # the resolved configuration
    architecture: dict              # the row of configs.MODELS as used
    classes: list[str]
    train_images: int               # of the data set: with another number the order of the samples would be another
    seconds: float                  # spent so far, over all sessions of the run
    ema: dict = dataclasses.field(default_factory=dict)      # the averaged weights, {} without --ema_decay
    format: str = FORMAT
    world_size: int = 1             # processes of the session that wrote it
    threads: int = 0                # PyTorch's within an operation, which change the last bits; 0: not known
    data: str = ""                  # splits.fingerprint of the training data; "": not known


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raises NonFiniteError if a weight is NaN or infinite. The smallest and the largest of a tensor tell, without a copy."""
    floats = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point() and tensor.numel()}
    if not floats:
        return
    ends = torch.stack([end.double() for tensor in floats.values() for end in torch.aminmax(tensor.detach())])
    for name, finite in zip(floats, ends.isfinite().view(-1, 2).all(dim=1).tolist()):
        if not finite:
            raise NonFiniteError(f"the weights are not finite any more ({name} is the first): they are not saved")


def save(path: Path, state: RunState) -> None:
    """After this returns the file is on the disk; before, the old one (or none) is there, never half of one.

    `check_finite` is for the caller, who can still say so to the other processes. Raises StorageError, and then leaves
    nothing behind.
    """
    replace(path, lambda unfinished: _write(unfinished, dict(vars(state))))


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """`write` makes a file of another name; when it is on the disk, it takes the name `path`. Raises StorageError."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        write(unfinished)
        sync(unfinished)
        os.replace(unfinished, path)
        sync(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path} ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):            # it would hide the error that matters
            unfinished.unlink(missing_ok=True)


def _write(path: Path, content: object) -> None:
    with open(path, "wb") as stream, _without_crc():
        sealed = _Sealed(stream)
        torch.save(content, sealed)
        sealed.close()


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """The setting is of the whole process, or of the thread, as the release of PyTorch has it: one at a time changes it."""
    with _crc:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            yield
        finally:
            torch.serialization.set_crc32_options(before)


_crc = threading.Lock()


class _Sealed:
    """Passes on what torch.save writes, and puts the digest of it into the archive's comment, without a second look.

    The archive ends with the length of its comment, 0, in two bytes: these are held back until the end is known.
    """

    def __init__(self, stream):
        self._stream, self._digest, self._held, self._error = stream, hashlib.sha256(), b"", None

    def write(self, data) -> int:
        """Never raises: torch's writer would finish the archive all the same, and tell of that. `close` raises."""
        view = memoryview(data)
        try:
            if self._error is None and len(view) < 2:
                joined = self._held + bytes(view)
                self._put(memoryview(joined[:-2]))
                self._held = joined[-2:]
            elif self._error is None:
                self._put(memoryview(self._held))
                self._put(view[:-2])
                self._held = bytes(view[-2:])
        except OSError as error:
            self._error = error
        return len(view)

    def _put(self, view: memoryview) -> None:
        for start in range(0, len(view), CHUNK):
            chunk = view[start:start + CHUNK]
            self._stream.write(chunk)
            self._digest.update(chunk)

    def flush(self) -> None:
        pass                                          # asked for by torch.save; the file is flushed when it is whole

    def close(self) -> None:
        """Raises the OSError of the first write that failed."""
        from models.checkpoints import torch_file  # as in `load`

        if self._error is not None:
            raise self._error
        assert self._held == b"\0\0", "torch.save no longer ends its archive with the length of an empty comment"
        self._put(memoryview(torch_file.SEAL_LENGTH.to_bytes(2, "little")))
        self._stream.write(torch_file.SEAL + self._digest.hexdigest().encode())


def sync(path: Path) -> None:
    """A file or a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(path: Path) -> None:
    """Raises CheckpointError unless the file is what `save` wrote, bit for bit, and of the step that its name tells."""
    from models.checkpoints import torch_file  # as in `load`

    try:
        with open(path, "rb") as stream:
            sealed = torch_file.is_sealed(stream)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if sealed is None:
        kind = "" if zipfile.is_zipfile(path) else "not a zip archive, "
        raise CheckpointError(f"{path}: not a checkpoint of this program ({kind}no SHA-256 at its end), or it was cut off")
    if not sealed:
        raise CheckpointError(f"{path}: damaged (its SHA-256 does not match)")
    named = STEP_FILE.fullmatch(path.name)
    if named and (held := step_in(path)) != int(named[1]):
        raise CheckpointError(f"{path}: holds step {held}: it was renamed, or put in the place of another")


def step_in(path: Path) -> int | None:
    """The step of a saved RunState, its first entry, from the start of its pickle; nothing is built."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            del member.CRC                           # which is not there: else zipfile compares it
            with archive.open(member) as stream:
                start = stream.read(1 << 10)
        found = ((opcode.name, value) for opcode, value, _ in pickletools.genops(start))
        next(value for name, value in found if name == "BINUNICODE" and value == "step")
        return next(value for name, value in found if name.startswith(("BININT", "LONG")))
    except (StopIteration, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError):
        return None


def load(path: Path) -> RunState:
    """Verified; tensors on the CPU. Raises CheckpointError."""
    # Here, because models brings torchvision: what only looks for checkpoints does without. It is the one module of
    # models that is known here, since no file of tensors may be read but by the reader that bounds what it costs.
    from models.checkpoints import torch_file

    verify(path)
    try:
        content = torch_file.read(path, verified=True)
    except torch_file.ModelError as error:
        raise CheckpointError(str(error)) from error
    fields = {field.name: typing.get_origin(field.type) or field.type for field in dataclasses.fields(RunState)}
    if (not isinstance(content, dict) or content.get("format") != FORMAT or not fields.keys() - LATER <= content.keys()
            or not content.keys() <= fields.keys()):
        raise CheckpointError(f"{path}: not a checkpoint of this version of the program (format {FORMAT})")
    for name, value in content.items():
        if not isinstance(value, (int, float) if fields[name] is float else fields[name]):
            raise CheckpointError(f"{path}: not a checkpoint of this program (its {name} is of type {type(value).__name__})")
    return RunState(**content)


def step_files(folder: Path) -> list[Path]:
    """Newest first."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := STEP_FILE.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_intact(folder: Path) -> tuple[Path, list[str]]:
    """-> (the newest step checkpoint that verifies, what is wrong with newer ones). Raises CheckpointError.

    best.pt serves where there is no other: a run that ended between its first evaluation and its first checkpoint.
    """
    complaints = []
    best = folder / BEST_FILE
    for path in [*step_files(folder), *([best] if best.exists() else [])]:
        try:
            verify(path)
            return path, complaints
        except CheckpointError as error:
            complaints.append(str(error))
    reason = f" ({'; '.join(complaints)})" if complaints else ""
    raise CheckpointError(f"{folder} holds no intact checkpoint{reason}")


def retain(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` step checkpoints. Call it after the new one is saved."""
    for path in step_files(folder)[keep:]:
        path.unlink(missing_ok=True)
