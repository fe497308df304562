"""RunState and its files: saved whole or not at all, verified before use, kept in small number.

A checkpoint is a zip file as torch.save writes it, with the SHA-256 of everything before it in the zip comment:
torch.load alone does not notice a flipped bit. It holds tensors and plain values only and is read with
weights_only=True, which runs no code.
"""

import dataclasses
import hashlib
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch

FORMAT = "vit-run-1"
STEP_FILE = re.compile(r"step-(\d{8,})\.pt")
BEST_FILE = "best.pt"
COMMENT = b"sha256:"
COMMENT_LENGTH = len(COMMENT) + 64
CHUNK = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another run: one line."""


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


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def save(path: Path, state: RunState) -> None:
    """After this returns the file is on the disk; before, the old one (or none) is there, never half of one."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        torch.save(dict(vars(state)), unfinished)
        _seal(unfinished)
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _seal(path: Path) -> None:
    """Puts the digest into the archive's comment: its length into the last two bytes, then the text."""
    with open(path, "r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        stream.write(COMMENT_LENGTH.to_bytes(2, "little"))
        stream.seek(0)
        digest = _digest(stream, path.stat().st_size)
        stream.write(COMMENT + digest.encode())
        stream.flush()
        os.fsync(stream.fileno())


def _digest(stream, length: int) -> str:
    digest = hashlib.sha256()
    while length > 0:
        chunk = stream.read(min(CHUNK, length))
        if not chunk:
            break
        digest.update(chunk)
        length -= len(chunk)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(path: Path) -> None:
    """Raises CheckpointError unless the file is what `save` wrote, bit for bit."""
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size <= COMMENT_LENGTH:
                raise CheckpointError(f"{path}: not a checkpoint of this program (only {size} bytes)")
            digest = _digest(stream, size - COMMENT_LENGTH)
            comment = stream.read()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not comment.startswith(COMMENT):
        kind = "" if zipfile.is_zipfile(path) else "not a zip archive, "
        raise CheckpointError(f"{path}: not a checkpoint of this program ({kind}no SHA-256 at its end), or it was cut off")
    if comment[len(COMMENT):].decode("ascii", "replace") != digest:
        raise CheckpointError(f"{path}: damaged (its SHA-256 does not match)")


def load(path: Path) -> RunState:
    """Verified; tensors on the CPU. Raises CheckpointError."""
    verify(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    fields = {field.name for field in dataclasses.fields(RunState)}
    later = {"ema"}                 # fields that older files of this format lack
    if not isinstance(content, dict) or content.get("format") != FORMAT or not fields - later <= content.keys() <= fields:
        raise CheckpointError(f"{path}: not a checkpoint of this version of the program (format {FORMAT})")
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
        path.unlink()
