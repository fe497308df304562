"""What a file of weights is, from its first and last bytes, without PyTorch: a wrong file is refused before that is loaded."""

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
# How the files begin that torch.save wrote until 2020: with a magic number, pickled.
LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
FOREIGN_PICKLE = "a pickle that PyTorch did not write; save it with torch.save, or as .safetensors"
# Members of what torch.export.save writes, and of what it wrote once.
PROGRAMS = ("archive_format", "serialized_exported_program.json")
PROGRAM = ("a program (of torch.export, or ONNX), which holds no weights by name; give its run, or what export.py --to folder "
           "wrote")
IMAGES = b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*"        # and WEBP
SEAL = b"sha256:"               # and its 64 digits, over all that is before them: the comment of an archive of ours
SEAL_LENGTH = len(SEAL) + 64
FOLDERS = (*PUBLISHED, "augreg", *META_FILES)
SWEEP_FILE, FINAL_RUN = "sweep.json", "final"           # what the folder of a sweep has


def again(path: str | Path) -> str:
    """What to do about a file that is damaged: only one that is called as a published file was surely downloaded."""
    name = Path(path).name
    published = name.endswith((".npz", ".pth")) and any(published_name(f"{folder}/{name}") for folder in FOLDERS)
    return "download it again" if published else "write or copy it again"


@contextlib.contextmanager
def report_damage(path: str | Path, what: str, errors: type[Exception] | tuple[type[Exception], ...] = DAMAGE) -> Iterator[None]:
    """Raises WeightsError, "PATH: WHAT (the reason); " and what to do, where one of `errors` is raised inside."""
    try:
        yield
    except WeightsError:
        raise
    except errors as error:
        raise WeightsError(f"{path}: {what} ({one_line(error)}); {again(path)}") from error


def kind_of(path: str | Path) -> str:
    """NPZ, SAFETENSORS or TORCH, whatever the file is called. Raises WeightsError for one that is none of them or is cut off."""
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
        return "a web page instead of weights, perhaps of a sign-in; download the file itself"
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
    """Raises WeightsError where what is meant is no file of weights by its first bytes, no folder of weights or of a run, and no
    published name."""
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
        raise WeightsError(f"{not_a_run(path)}: it is no run folder, and has no model.safetensors of timm or transformers. Other "
                           "files of weights are given themselves, not their folder")


def require_run(path: str | Path) -> None:
    """Raises WeightsError for a file that is no checkpoint of a run of ours by its last bytes, and for a folder without any."""
    if Path(path).is_file():
        check_seal(path)
    elif not any(Path(path).glob("*.pt")):
        raise WeightsError(not_a_run(path))


def is_sweep(folder: str | Path) -> bool:
    return (Path(folder) / SWEEP_FILE).exists()


def not_a_run(folder: str | Path) -> str:
    """What is said of a folder in which there is no checkpoint: a sweep's has them in the folders of its runs."""
    final = Path(folder) / FINAL_RUN
    if not is_sweep(folder):
        return f"{folder} holds no intact checkpoint"
    return f"{folder} is a sweep: " + (f"give its final run, {final}" if final.exists() else
                                       "its final run is still to come; start the sweep again, and it goes on")


def is_sealed(stream: BinaryIO) -> bool | None:
    """Whether every bit of the file is as our own program wrote it; None: it is of another program, or was cut off."""
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
    """-> (how many bytes are before it, the seal at the end of the file)"""
    left = os.fstat(stream.fileno()).st_size - SEAL_LENGTH
    if left <= 0:
        return 0, None
    stream.seek(left)
    seal = stream.read()
    return left, seal if seal.startswith(SEAL) else None


def check_seal(path: str | Path) -> None:
    """Raises WeightsError for a file that does not end as a checkpoint of one of our runs does, else OSError. The digest is not
    compared."""
    with open(path, "rb") as stream:
        sealed = _seal(stream)[1] is not None
    if not sealed:
        kind = "" if zipfile.is_zipfile(path) else "not a zip archive, "
        raise WeightsError(f"{path}: not a checkpoint of this program ({kind}no SHA-256 at its end), or it was cut off")
