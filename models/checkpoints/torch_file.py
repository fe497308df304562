"""Reads files of torch.save, our own checkpoints and those of others. Nothing that a file names is imported or called.

A pickle may name any function. An allow-list here gives it torch's rebuild functions, containers, dtypes and numpy's arrays;
every other name becomes a Placeholder, which is dropped with everything made from it. So this also reads files that
`torch.load(weights_only=True)` refuses: with a path of Lightning, an argparse.Namespace, numpy's numbers.

torch.load compares no checksums (pytorch issue 126952). This reader compares the SHA-256 at the end of our own files, or else the
CRC-32 of every array. The format before 2020, a sequence of pickles and arrays, has no checksums.
"""

import functools
import io
import math
import os
import pickle
import pickletools
import re
import types
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.errors import ModelError, WeightsError

from .first_look import FOREIGN_PICKLE, LEGACY_MAGIC, again, is_sealed
from .mapping import MappedFile
from .zip_archive import Archive, one_line


def read(path: str | Path, *, mapped: bool | list[MappedFile] = False, verified: bool = False) -> object:
    """Return the content of a file: tensors on the CPU, numpy arrays, plain values, and Placeholders for everything else.

    mapped=True: the tensors of a zip stay on the disk until they are used, so the file must not change meanwhile. A list instead
    of True also gets the mapping appended, whose pages can be released.
    verified=True: the caller has just called `is_sealed`, so it is not called again.
    Raises WeightsError (one line) for anything but a complete file of torch.save.
    """
    path = Path(path)
    if not path.is_file():                  # reading a pipe could wait forever
        raise WeightsError(f"no such file: {path}")
    try:
        with open(path, "rb") as stream:
            start = stream.read(len(LEGACY_MAGIC))
            if start[:2] == b"PK":
                return _read_zip(stream, mapped, verified)
            if start == LEGACY_MAGIC:
                return _read_legacy(stream)
        raise WeightsError(FOREIGN_PICKLE if start[:1] == b"\x80" else f"not a file of torch.save, or damaged; {again(path)}")
    except ModelError as error:
        raise WeightsError(f"{path}: {error}") from error
    except MemoryError as error:
        raise WeightsError(f"{path}: not enough memory to read it") from error
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    except Exception as error:              # a damaged file can raise anything
        raise WeightsError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {one_line(error)}); it is damaged "
                           f"or cut off: {again(path)}") from error


def _read_zip(stream: BinaryIO, mapped: bool | list[MappedFile], verified: bool) -> object:
    sealed = verified or is_sealed(stream)
    if sealed is False:
        raise WeightsError(f"damaged (its SHA-256 does not match); {again(stream.name)}")
    archive = Archive(stream)
    main = next((info for name, info in archive.members.items() if name.rpartition("/")[2] == "data.pkl"), None)
    if main is None:
        raise WeightsError("holds no data.pkl")
    folder = main.filename.removesuffix("data.pkl")
    # CRC-32s are compared only without a seal, which covers more; torch.serialization.set_crc32_options(False) writes none.
    verify = not sealed and any(info.CRC for info in archive.members.values())
    pages = None if mapped is False else MappedFile(stream)
    if isinstance(mapped, list):
        mapped.append(pages)

    def read_storage(key: str, size: int) -> Tensor:
        info = archive.members.get(f"{folder}data/{key}")
        if info is None or info.file_size != size:
            found = "is missing" if info is None else f"has {info.file_size} bytes"
            raise WeightsError(f"damaged: the member of an array of {size} bytes {found}; {again(stream.name)}")
        start = archive.start(info)
        if pages is None or not size:
            memory = _allocate(size)
            archive.read_into(info, memoryview(memory.numpy()), verify)
            return memory
        if verify and zlib.crc32(pages.memory_at(start, size)) != info.CRC:
            raise ValueError(f"the CRC-32 of member {info.filename!r} does not match")
        pages.release(start, size)
        return pages.bytes_at(start, size)

    archive.start(main)                     # raises if its size is impossible
    description = bytearray(main.file_size)
    archive.read_into(main, memoryview(description), verify)
    return _unpickle(io.BytesIO(description), len(description), read_storage)


def _read_legacy(stream: BinaryIO) -> object:
    """Read pickles of magic number, version, machine, content and storage keys; then, per key, a count in 8 bytes and numbers."""
    size, storages = os.fstat(stream.fileno()).st_size, {}

    def make_storage(key: str, length: int) -> Tensor:
        if length > size - sum(map(len, storages.values())):
            raise WeightsError(f"damaged or cut off: its arrays need more than the {size} bytes of the file; "
                               f"{again(stream.name)}")
        storages[key] = _allocate(length)
        return storages[key]

    stream.seek(0)
    *_, content, keys = [_unpickle(stream, size, make_storage) for _ in range(5)]
    missing = 0
    for key in keys:
        memory = storages.pop(key)
        stream.seek(8, os.SEEK_CUR)         # the count, which the content has already given
        missing += len(memory) - stream.readinto(memoryview(memory.numpy()))
    if missing or storages or stream.read(1):
        raise WeightsError(f"damaged or cut off: its arrays do not end at the end of the file; {again(stream.name)}")
    return content


def _allocate(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:           # PyTorch raises this instead of a MemoryError
        raise MemoryError(str(error)) from error


# ------------------------------------------------------------------------------------------------------- the pickle


def _unpickle(stream: BinaryIO, size: int, read_storage: Callable[[str, int], Tensor]) -> object:
    """Read one pickle. read_storage(key, bytes) returns the memory of a storage, uint8.

    Raises ValueError for a pickle that would need far more memory than its `size` bytes: Python's reader allocates 16 bytes for
    every memo index up to the largest.
    """
    start = stream.tell()
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name in ("PUT", "LONG_BINPUT") and argument > size:
            raise ValueError(f"a pickle of {size} bytes with a memo index {argument}")
    stream.seek(start)
    return _Unpickler(stream, read_storage).load()


class Placeholder:
    """Replaces an object whose name is not in ALLOWED. Accepts and ignores everything that a pickle does with it."""

    of = "unknown object"                   # its full name, such as "pathlib.PosixPath"

    def __new__(cls, *_, **__) -> "Placeholder":
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    def __call__(self, *_, **__) -> "Placeholder":
        return self

    __setstate__ = __setitem__ = append = extend = add = __call__

    def __repr__(self) -> str:
        return f"<{self.of}>"


class _Storage(NamedTuple):
    memory: Tensor                          # uint8
    dtype: torch.dtype


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: BinaryIO, read_storage: Callable[[str, int], Tensor]):
        super().__init__(stream, encoding="utf-8")
        self._read_storage, self._memory = read_storage, {}

    def find_class(self, module: str, name: str) -> object:
        full = f"{module}.{name}"
        if full not in ALLOWED:
            return type("Placeholder", (Placeholder,), {"of": full})
        found = ALLOWED[full]               # functions are wrapped, as a pickle may set attributes of what it gets
        return functools.partial(found) if isinstance(found, types.FunctionType) else found

    def persistent_load(self, pid: tuple) -> "_Storage | Placeholder":
        """Return the storage of ("storage", dtype, key, device, count), with a view or None appended in the older format.

        That format also has ("module", class, source files).
        """
        if pid[0] == "module":
            return pid[1]
        _, dtype, key, _, count, *view = pid
        if not isinstance(dtype, torch.dtype):
            return Placeholder()
        if any(view) or count < 0:
            raise ValueError("a view of a storage")
        size = count * dtype.itemsize
        if key not in self._memory:
            self._memory[key] = self._read_storage(key, size)
        if len(self._memory[key]) != size:
            raise ValueError(f"storage {key} has two sizes")
        return _Storage(self._memory[key], dtype)


def _rebuild_tensor(storage, offset: int, size: tuple, stride: tuple, requires_grad=False, *_) -> Tensor | Placeholder:
    """Replace torch._utils._rebuild_tensor_v2, which would enlarge a storage that is too small. Raises WeightsError for one."""
    if not isinstance(storage, _Storage):
        return Placeholder()
    numel, stored = math.prod(size), len(storage.memory) // storage.dtype.itemsize
    last = offset + sum((side - 1) * step for side, step in zip(size, stride)) if numel else offset - 1
    if min((offset, *size, *stride)) < 0 or len(size) != len(stride) or numel > stored or last >= stored:
        shape = " x ".join(map(str, size))[:100]
        raise WeightsError(f"an array of {shape} numbers, of which {stored} are stored: not contiguous, or damaged")
    tensor = torch.empty(0, dtype=storage.dtype).set_(storage.memory.untyped_storage(), offset, size, stride)
    return tensor.requires_grad_() if requires_grad else tensor


def _rebuild_parameter(data, requires_grad=True, *_) -> Tensor | Placeholder:
    return torch.nn.Parameter(data, requires_grad) if isinstance(data, Tensor) else Placeholder()


def _rebuild_bytes(text: str = "", *_) -> bytes:
    """Replace _codecs.encode, by which pickles of protocol 2 write bytes, and `bytes`, by which they write empty ones."""
    return text.encode("latin1")


class _Dtype:
    """Replaces numpy.dtype: `plain` is a dtype of numbers, or None for any other."""

    def __init__(self, code: str, *_):
        self.plain = np.dtype(code) if re.fullmatch("[<>|=]?[biufc][0-9]{1,2}", code) else None

    def __setstate__(self, state: tuple) -> None:
        if self.plain is not None and state[1] in ("<", ">"):
            self.plain = self.plain.newbyteorder(state[1])


class _Array(np.ndarray):
    """Replaces numpy.ndarray: an array of numbers. One of objects, whose pointers a pickle could set, stays empty."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, data = state
        if dtype.plain is not None:
            super().__setstate__((1, shape, dtype.plain, fortran_order, data))


def _rebuild_array(*_) -> _Array:
    """Replace numpy's _reconstruct: return the empty array that the pickle fills next."""
    return _Array((0,), "V1")


def _rebuild_number(dtype: _Dtype, data: bytes = b"") -> object:
    return np.frombuffer(data, dtype.plain, 1)[0].item() if dtype.plain is not None else Placeholder()


NUMBERS = {"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
           "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
           "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}
ALLOWED = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.storage.UntypedStorage": torch.uint8,
    **{f"torch.{name}Storage": dtype for name, dtype in NUMBERS.items()},
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _rebuild_bytes, "builtins.bytes": _rebuild_bytes, "__builtin__.bytes": _rebuild_bytes,
    "numpy.dtype": _Dtype,
    **{f"numpy.{core}.multiarray.{name}": rebuild for core in ("core", "_core")
       for name, rebuild in (("_reconstruct", _rebuild_array), ("scalar", _rebuild_number))},
}
