"""Reads and writes .npz archives without trusting them.

`numpy.load` believes what a file says of itself: a header may ask for terabytes, a deflated member may unpack to
gigabytes, a pickled object may run code. Here the archive's directory and every array's header are checked against
each other before an array is read, and members are read one by one, only those that are asked for.
"""

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

MAX_MEMBERS = 16_384
MAX_RATIO = 100          # unpacked / packed; weights hardly shrink, and the largest measured here is below 10
RATIO_FREE_BYTES = 1 << 24   # arrays of zeros (a head) shrink a lot: below this size a member may
MAX_HEADER = 4096
# numpy has no bfloat16: JAX's arrays of it are saved as two bytes of nothing in particular.
BFLOAT16 = np.dtype("V2")


# What zipfile and numpy raise on damaged archives.
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, RuntimeError, NotImplementedError)


class NpzError(ValueError):
    """An archive that cannot be read safely: one line."""


class NpzFile:
    """`names`, `shape(name)`, `read(name)` of an archive of plain numeric arrays. Raises NpzError."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._zip = zipfile.ZipFile(self.path)
        except DAMAGE as error:
            raise NpzError(f"{path}: not a readable .npz archive ({error})") from error
        self._headers: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self._members: dict[str, zipfile.ZipInfo] = {}
        infos = self._zip.infolist()
        if len(infos) > MAX_MEMBERS:
            raise NpzError(f"{path}: {len(infos)} members, more than any checkpoint has")
        if sum(info.compress_size for info in infos) > self.path.stat().st_size:
            names = ", ".join(repr(info.filename.removesuffix(".npy")) for info in infos[:3])
            raise NpzError(f"{path}: its members ({names}, ...) claim more bytes than the file has")
        for info in infos:
            self._add(info)

    def _add(self, info: zipfile.ZipInfo) -> None:
        if not info.filename.endswith(".npy"):
            raise NpzError(f"{self.path}: member {info.filename!r} is not an array")
        name = info.filename[: -len(".npy")]
        if name in self._members:
            raise NpzError(f"{self.path}: member {name!r} stands twice in the archive")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise NpzError(f"{self.path}: member {name!r} is encrypted or packed in a way that numpy does not write")
        if info.file_size > max(RATIO_FREE_BYTES, MAX_RATIO * info.compress_size):
            raise NpzError(f"{self.path}: member {name!r} claims {info.file_size} bytes from {info.compress_size}")
        self._members[name] = info

    @property
    def names(self) -> list[str]:
        return list(self._members)

    def shape(self, name: str) -> tuple[int, ...]:
        """Read from the array's header; the data stay on disk."""
        return self._header(name)[0]

    def _header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        if name not in self._headers:
            try:
                with self._zip.open(self._members[name]) as stream:
                    shape, _, dtype, offset = self._parse_header(stream, name)
            except NpzError:
                raise
            except DAMAGE as error:
                raise NpzError(f"{self.path}: member {name!r} is damaged ({error})") from error
            size = offset + math.prod(shape) * dtype.itemsize
            if size != self._members[name].file_size:
                raise NpzError(f"{self.path}: member {name!r} says {shape} {dtype}, which does not fit its size")
            self._headers[name] = shape, dtype
        return self._headers[name]

    def _parse_header(self, stream, name: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
        try:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version}")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(stream, max_header_size=MAX_HEADER)
        except (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
            reason = " ".join(str(error).split())[:200]
            raise NpzError(f"{self.path}: member {name!r} has no readable array header ({reason})") from error
        if (dtype.kind not in "fiu" and dtype != BFLOAT16) or dtype.hasobject:
            raise NpzError(f"{self.path}: member {name!r} holds {dtype}, not plain numbers")
        if any(side < 0 for side in shape):
            raise NpzError(f"{self.path}: member {name!r} has the impossible shape {shape}")
        return shape, fortran_order, dtype, stream.tell()

    def read(self, name: str) -> np.ndarray:
        """The array, in the dtype and order of the file, bfloat16 as float32. The archive's CRC of the member is verified."""
        shape, dtype = self._header(name)
        try:
            with self._zip.open(self._members[name]) as stream:
                _, fortran_order, _, _ = self._parse_header(stream, name)
                data = stream.read()             # to the end of the member: only that verifies the CRC
        except NpzError:
            raise
        except DAMAGE as error:
            raise NpzError(f"{self.path}: member {name!r} is damaged ({error})") from error
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise NpzError(f"{self.path}: member {name!r} is cut off")
        array = np.frombuffer(data, "<u2" if dtype == BFLOAT16 else dtype)
        if dtype == BFLOAT16:                    # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array.reshape(shape, order="F" if fortran_order else "C")

    def close(self) -> None:
        self._zip.close()

    def __enter__(self) -> "NpzFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()
