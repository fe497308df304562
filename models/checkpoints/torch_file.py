"""Reads files of torch.save that cannot be trusted: weights of others, and the checkpoints of our own runs.

`torch.load(weights_only=True)` runs no code, but it believes sizes, lets the pickle build what it likes, and compares no
check sum (pytorch issue 126952). So the archive's directory is checked first, then the SHA-256 that our own files end
with, or else the CRC of every member, then the pickle, step by step, without building anything of it: it may make plain
values and tensors, and every storage must be exactly as large as its member. What is left for PyTorch to read takes no
more memory than the file has bytes, and what pickles describe, at most half a GB more. The older format, a row of
pickles and arrays, carries no check sums: there the structure is checked alike, but nothing tells whether a number was
changed.
"""

import hashlib
import io
import mmap
import os
import pickle
import struct
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from models.errors import ModelError

from .pickle_scan import LEGACY_NUMBER, PickleError, Scan, Storage
from .zip_archive import ZipError, one_line, open_archive, shown

CHUNK = 1 << 20
SEAL = b"sha256:"               # and its 64 digits, over all that is before them: the comment of an archive of ours
SEAL_LENGTH = len(SEAL) + 64
MAX_PICKLE = 1 << 24            # bytes; a ViT-H with an optimizer takes 1 MB
MAX_VALUES = 10_000_000         # of all that is in the file, what it names twice counted twice
MAX_DEPTH = 100
# How the files begin that torch.save wrote until 2020: with a magic number, pickled.
LEGACY_MAGIC = pickle.dumps(LEGACY_NUMBER, protocol=2)
LEGACY_PICKLES = 5              # magic number, version, machine, content, keys of the storages that follow
AGAIN = "download it again"
VALUES = (str, int, float, complex, bool, types.NoneType, torch.dtype, torch.device)


def is_sealed(stream: BinaryIO) -> bool | None:
    """Whether every bit of the file is as our own program wrote it; None: it is of another, or was cut off."""
    left = os.fstat(stream.fileno()).st_size - SEAL_LENGTH
    if left <= 0:
        return None
    stream.seek(left)
    seal, digest = stream.read(), hashlib.sha256()
    if not seal.startswith(SEAL):
        return None
    stream.seek(0)
    while left > 0 and (chunk := stream.read(min(CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    return seal == SEAL + digest.hexdigest().encode()


def read(path: Path, globals: Sequence[type] = (), mapped: bool = False, verified: bool = False) -> object:
    """What was saved, tensors on the CPU. `globals` are classes that may stand in it beside tensors and plain values.

    verified=True: the caller has just asked `is_sealed`, which is not done again.
    mapped=True leaves the tensors of a zip on the disk until they are used: the file must then stay as it is, and it is
    for what is read once. Raises ModelError (one line) for anything but a whole file of torch.save, before memory is
    taken for it.
    """
    path = Path(path)
    if not path.is_file():                  # a pipe would be waited for without end
        raise ModelError(f"no such file: {path}")
    try:
        with open(path, "rb") as stream:
            start = stream.read(len(LEGACY_MAGIC))
            if start[:2] == b"PK":
                _check_zip(stream, globals, verified)
            elif start == LEGACY_MAGIC:
                mapped = False
                _check_legacy(stream, globals)
            else:
                raise PickleError("a pickle that PyTorch did not write: nothing of it was run; take a file of torch.save, or a "
                                  ".safetensors file" if start[:1] == b"\x80" else f"not of torch.save, or damaged; {AGAIN}")
            # A path that ends in .safetensors torch.load would give to another reader.
            mapped = mapped and path.suffix != ".safetensors"
            stream.seek(0)
            with torch.serialization.safe_globals(list(globals)):
                content = torch.load(path if mapped else stream, map_location="cpu", weights_only=True, mmap=mapped)
            _check_values(content, globals)
            return content
    except PickleError as error:
        raise ModelError(f"{path}: {error}") from error
    except ZipError as error:
        raise ModelError(f"{path}: damaged or cut off ({error}); {AGAIN}") from error
    except MemoryError as error:
        raise ModelError(f"{path}: not enough memory to read it") from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    except Exception as error:              # what is raised depends on where the file is damaged
        raise ModelError(f"{path}: damaged or cut off ({one_line(error)}); {AGAIN}") from error


# ------------------------------------------------------------------------------------------------------ zip files


def _check_zip(stream: BinaryIO, globals: Sequence[type], verified: bool) -> None:
    """PyTorch packs nothing, so that no member can be larger than the file; and its check sums must agree."""
    sealed = verified or is_sealed(stream)
    if sealed is False:
        raise PickleError(f"damaged (its SHA-256 does not match); {AGAIN}")
    size = os.fstat(stream.fileno()).st_size
    with open_archive(stream) as archive:
        members = {info.filename: info for info in archive.infolist()}
        folder = next(iter(members), "").partition("/")[0]
        for info in members.values():
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise PickleError(f"member {info.filename!r} is packed or encrypted, which PyTorch does not write")
            if not info.filename.startswith(f"{folder}/"):
                raise PickleError(f"member {info.filename!r} is not in the folder of the others; damaged")
        if sum(info.file_size for info in members.values()) > size:
            raise PickleError(f"its members claim more bytes than the file has; {AGAIN}")
        main = members.get(f"{folder}/data.pkl")
        if main is None or main.file_size > MAX_PICKLE:
            raise PickleError("holds no data.pkl" if main is None else f"a description of {main.file_size} bytes")
        # The seal says more than they do; and torch.serialization.set_crc32_options(False) leaves them out.
        unchecked = sealed or not any(info.CRC for info in members.values())
        for info in members.values():
            if unchecked:
                del info.CRC                # else zipfile compares it
                continue
            with archive.open(info) as member:
                while member.read(CHUNK):
                    pass
        scan = Scan(globals)
        scan.run(archive.read(main))
        for key, storage in scan.storages.items():
            member = members.get(f"{folder}/data/{key}")
            if member is None or member.file_size != storage.nbytes:
                there = "is not there" if member is None else f"has {member.file_size}"
                raise PickleError(f"damaged: speaks of {storage.nbytes} bytes of an array whose member {there}; {AGAIN}")


# ----------------------------------------------------------------------------------------------- the older format


def _check_legacy(stream: BinaryIO, globals: Sequence[type]) -> None:
    """Five pickles, then for every key of the last one 8 bytes, how many numbers follow, and the numbers: to the end."""
    size = os.fstat(stream.fileno()).st_size
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        storages: dict[str, Storage] = {}
        place = 0
        for _ in range(LEGACY_PICKLES):
            scan, part = Scan(globals, legacy=True), io.BytesIO(content[place:place + MAX_PICKLE])
            scan.run(part)
            place += part.tell()
            storages = scan.storages or storages
        keys = scan.result
        if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys) and len(set(keys)) == len(keys)
                and set(keys) == storages.keys()):
            raise PickleError(f"damaged: its arrays are not those that it names; {AGAIN}")
        for key in keys:
            if place + 8 > size or struct.unpack_from("<q", content, place)[0] != storages[key].numel:
                raise PickleError(f"damaged or cut off: speaks of {storages[key].numel} numbers that are not there; {AGAIN}")
            place += 8 + storages[key].nbytes
        if place != size:
            raise PickleError(f"damaged or cut off: {size} bytes, its arrays end at {place}; {AGAIN}")


# --------------------------------------------------------------------------------------------------- what came of it


def _check_values(content: object, globals: Sequence[type]) -> None:
    """Plain values and dense tensors, nothing inside itself: whoever walks through it or prints it comes to an end."""
    known: dict[int, tuple[int, int]] = {}          # of what the file names more than once: how many values, how deep
    classes = {*globals}

    def weigh(value: object, name: str, depth: int) -> tuple[int, int]:
        if isinstance(value, Tensor):
            _check_tensor(value, name)
            return 1, 0
        if type(value) in VALUES:
            return 1, 0
        if id(value) not in known:
            known[id(value)] = 0, MAX_DEPTH         # met again before it is weighed: it is inside itself
            count, height = 1, 0
            for inner_name, inner in _inside(value, classes):
                more, below = weigh(inner, name if inner_name is None else shown(inner_name), depth + 1)
                count, height = count + more, max(height, below + 1)
                if count > MAX_VALUES or depth + height > MAX_DEPTH:
                    raise PickleError("lists within lists without end: no file of weights")
            known[id(value)] = count, height
        return known[id(value)]

    weigh(content, "the content", 0)


def _inside(value: object, classes: set[type]) -> Iterator[tuple[object, object]]:
    """(name if it has one, value)"""
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, inner in dict.items(value):        # an OrderedDict of a file may bring an `items` of its own
            yield None, key
            yield key if isinstance(key, (str, int)) else None, inner
        if kind is not dict and vars(value).keys() - {"_metadata"}:
            raise PickleError("a dictionary with attributes: no file of weights")
    elif kind in (list, tuple, torch.Size):
        for inner in value:
            yield None, inner
    elif kind not in classes:
        raise PickleError(f"holds a {kind.__name__}, which no file of weights needs")
    if hasattr(value, "__dict__"):
        yield from vars(value).items()


def _check_tensor(value: Tensor, name: str) -> None:
    """A dense array whose numbers are all in the file: a few bytes must not stand for a large array."""
    if (type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.device.type != "cpu"
            or value.is_complex() or value.is_quantized or value._backward_hooks
            or value.numel() * value.element_size() > value.untyped_storage().nbytes()):
        raise PickleError(f"{name} is no plain array of numbers")
