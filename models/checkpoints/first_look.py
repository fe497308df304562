"""Determines the kind of a file of weights from its first and last bytes, so that a wrong file fails before PyTorch loads."""

import contextlib
import hashlib
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from models.errors import WeightsError

from .described import is_weights_folder, weights_in
from .published import META_FILES, PUBLISHED, published_name, require_published
from .zip_archive import DAMAGE, Archive, one_line

CHUNK = 1 << 20
NPZ, SAFETENSORS, TORCH = "npz", "safetensors", "torch"
# The beginning of files that torch.save wrote until 2020: a pickled magic number.
LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
FOREIGN_PICKLE = "a pickle that PyTorch did not write; save it with torch.save, or as .safetensors"
# Members of archives that torch.export.save writes, and of those that it used to write.
PROGRAMS = ("archive_format", "serialized_exported_program.json")
PROGRAM = ("an exported program (torch.export or ONNX), which holds no weights by name. Use the run it was exported from, or "
           "what export.py --to folder writes")
IMAGES = b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*"        # and WEBP
SEAL = b"sha256:"               # then 64 digits, the digest of all bytes before: the comment of our own archives
SEAL_LENGTH = len(SEAL) + 64
FOLDERS = (*PUBLISHED, "augreg", *META_FILES)
SWEEP_FILE, FINAL_RUN = "sweep.json", "final"           # in the folder of a sweep


def again(path: str | Path) -> str:
    """Return what to do about a damaged file: to download it again if it has the name of a published file, else to write it."""
    name = Path(path).name
    published = name.endswith((".npz", ".pth")) and any(published_name(f"{folder}/{name}") for folder in FOLDERS)
    return "download it again" if published else "write or copy it again"


@contextlib.contextmanager
def report_damage(path: str | Path, what: str, errors: type[Exception] | tuple[type[Exception], ...] = DAMAGE) -> Iterator[None]:
    """Turn `errors` raised inside into WeightsError: "PATH: WHAT (the reason); " and what to do."""
    try:
        yield
    except WeightsError:
        raise
    except errors as error:
        raise WeightsError(f"{path}: {what} ({one_line(error)}); {again(path)}") from error


def kind_of(path: str | Path) -> str:
    """Return NPZ, SAFETENSORS or TORCH by the content of a file. Raises WeightsError for any other file, or one cut off."""
    with report_damage(path, "damaged or cut off"), open(path, "rb") as stream:
        start = stream.read(512)
        if start[:2] == b"PK":
            members = Archive(stream).members
            if any(name.endswith(PROGRAMS) for name in members):
                raise WeightsError(f"{path}: {PROGRAM}")
            return TORCH if any(name.endswith("data.pkl") for name in members) else NPZ
    if start[4:9] == b"\0\0\0\0{":                 # the length of the header in 8 bytes, then its JSON
        return SAFETENSORS
    if start.startswith(LEGACY_MAGIC):
        return TORCH
    raise WeightsError(f"{path}: {_describe_start(start, path)}")


def _describe_start(start: bytes, path: str | Path) -> str:
    if not start:
        return f"the file is empty; {again(path)}"
    if start.lstrip()[:1] == b"<":
        return "a web page instead of weights, perhaps a sign-in page; download the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS instead of weights; fetch the file itself (git lfs pull)"
    if start[:1] == b"\x08" and str(path).endswith(".onnx"):
        return PROGRAM
    if start.startswith(IMAGES) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP"):
        return "an image, not weights"
    if start[:1] == b"\x80":
        return FOREIGN_PICKLE
    return f"not a file of weights (.npz, PyTorch or .safetensors), or damaged; {again(path)} if it should be one"


def require_weights(name_or_path: str | Path) -> None:
    """Raise WeightsError unless the text is a file of weights by its first bytes, a folder with some, or a published name."""
    path = Path(name_or_path)
    if not path.exists():
        require_published(name_or_path)
    elif path.is_file():
        kind_of(path)
    elif is_weights_folder(path):
        kind_of(weights_in(path))
    elif not any(path.glob("*.pt")):
        if is_sweep(path):
            raise WeightsError(not_a_run(path))
        raise WeightsError(f"{not_a_run(path)}: it is not a run folder, and has no model.safetensors of timm or transformers. "
                           "Use the path of another file of weights itself, not that of its folder")


def require_run(path: str | Path) -> None:
    """Raise WeightsError unless the path is a checkpoint of a run by its last bytes, or a folder with checkpoints."""
    if Path(path).is_file():
        check_seal(path)
    elif not any(Path(path).glob("*.pt")):
        raise WeightsError(not_a_run(path))


def is_sweep(folder: str | Path) -> bool:
    return (Path(folder) / SWEEP_FILE).exists()


def not_a_run(folder: str | Path) -> str:
    """Return the message for a folder without checkpoints; those of a sweep are in the folders of its runs."""
    final = Path(folder) / FINAL_RUN
    if not is_sweep(folder):
        return f"{folder} holds no intact checkpoint"
    return f"{folder} is a sweep: " + (f"give its final run, {final}" if final.exists() else
                                       "its final run is still to come; start the sweep again to continue it")


def is_sealed(stream: BinaryIO) -> bool | None:
    """Whether the SHA-256 at the end of one of our files matches it; None for a file of another program or one cut off."""
    left, seal = _seal(stream)
    if seal is None:
        return None
    digest = hashlib.sha256()
    stream.seek(0)
    while left > 0 and (chunk := stream.read(min(CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    return seal == SEAL + digest.hexdigest().encode()


def _seal(stream: BinaryIO) -> tuple[int, bytes | None]:
    """Return (number of bytes before the seal, the seal at the end of the file or None)."""
    left = os.fstat(stream.fileno()).st_size - SEAL_LENGTH
    if left <= 0:
        return 0, None
    stream.seek(left)
    seal = stream.read()
    return left, seal if seal.startswith(SEAL) else None


def check_seal(path: str | Path) -> None:
    """Raise WeightsError for a file without the seal of our checkpoints at its end. Does not compare the digest.

    Raises OSError if it cannot be read.
    """
    with open(path, "rb") as stream:
        sealed = _seal(stream)[1] is not None
    if not sealed:
        kind = "" if zipfile.is_zipfile(path) else "not a zip archive, "
        raise WeightsError(f"{path}: not a checkpoint of this program ({kind}no SHA-256 at its end), or it was cut off")
