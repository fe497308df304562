"""Reads and writes .npz archives without trusting them.

`numpy.load` believes what a file says of itself: a header may ask for terabytes, a deflated member may unpack to
gigabytes, a pickled object may run code. Here the archive's directory and every array's header are checked against
each other before an array is read, and members are read one by one, only those that are asked for.
"""

import math
import os
import threading
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from .zip_archive import DAMAGE, ZipError, one_line, open_archive, stored_start

MAX_RATIO = 100          # unpacked / packed; weights hardly shrink, and the largest measured here is below 10
RATIO_FREE_BYTES = 1 << 24   # arrays of zeros (a head) shrink a lot: below this size a member may
MAX_GAIN = 1 << 29       # bytes that all members may have unpacked beyond those of the file
MAX_HEADER = 4096
CHUNK = 1 << 18          # bytes read at a time: still in the processor's cache when the check sum is taken
# numpy has no bfloat16: JAX's arrays of it are saved as two bytes of nothing in particular.
BFLOAT16 = np.dtype("V2")


class NpzError(ValueError):
    """An archive that cannot be read safely: one line."""


class NpzFile:
    """`names`, `shape(name)`, `read(name)` of an archive of plain numeric arrays, by any number of threads. Raises NpzError."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._stream, self._zip, self._lent = None, None, threading.local()
        try:
            self._stream = open(self.path, "rb")
            self._zip = open_archive(self._stream)
            self._headers: dict[str, tuple[tuple[int, ...], bool, np.dtype, int]] = {}
            self._members: dict[str, zipfile.ZipInfo] = {}
            for info in self._zip.infolist():
                self._add(info)
            unpacked, size = sum(info.file_size for info in self._members.values()), self.path.stat().st_size
            if unpacked > size + MAX_GAIN:
                raise NpzError(f"{path}: its members claim {unpacked} bytes, the file has {size}")
        except NpzError:
            self.close()
            raise
        except (ZipError, *DAMAGE) as error:
            self.close()
            raise NpzError(f"{path}: not a readable .npz archive ({one_line(error)})") from error

    def _add(self, info: zipfile.ZipInfo) -> None:
        if not info.filename.endswith(".npy"):
            raise NpzError(f"{self.path}: member {info.filename!r} is not an array")
        name = info.filename[: -len(".npy")]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise NpzError(f"{self.path}: member {name!r} is packed in a way that numpy does not write")
        if info.file_size > max(RATIO_FREE_BYTES, MAX_RATIO * info.compress_size):
            raise NpzError(f"{self.path}: member {name!r} claims {info.file_size} bytes from {info.compress_size}")
        self._members[name] = info

    @property
    def names(self) -> list[str]:
        return list(self._members)

    def shape(self, name: str) -> tuple[int, ...]:
        """Read from the array's header; the data stay on disk."""
        return self._header(name)[0]

    def _header(self, name: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
        """-> (shape, whether in Fortran's order, dtype, where in the member the data begin)"""
        if name not in self._headers:
            try:
                with self._zip.open(self._members[name]) as stream:
                    shape, _, dtype, offset = header = self._parse_header(stream, name)
            except NpzError:
                raise
            except DAMAGE as error:
                raise NpzError(f"{self.path}: member {name!r} is damaged ({one_line(error)})") from error
            size = offset + math.prod(shape) * dtype.itemsize
            if size != self._members[name].file_size:
                raise NpzError(f"{self.path}: member {name!r} says {shape} {dtype}, which does not fit its size")
            self._headers[name] = header
        return self._headers[name]

    def _parse_header(self, stream, name: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
        try:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version}")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(stream, max_header_size=MAX_HEADER)
        except (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
            raise NpzError(f"{self.path}: member {name!r} has no readable array header ({one_line(error)})") from error
        if (dtype.kind not in "fiu" and dtype != BFLOAT16) or dtype.hasobject:
            raise NpzError(f"{self.path}: member {name!r} holds {dtype}, not plain numbers")
        if any(side < 0 for side in shape):
            raise NpzError(f"{self.path}: member {name!r} has the impossible shape {shape}")
        return shape, fortran_order, dtype, stream.tell()

    def read(self, name: str, lend: bool = False) -> np.ndarray:
        """The array, in the dtype and order of the file, bfloat16 as float32. The archive's CRC of the member is verified.

        lend=True: in memory that the same thread's next `read` with it uses again, for a caller who copies at once. To fill
        fresh memory takes longer than to read the file.
        """
        shape, fortran_order, dtype, offset = self._header(name)
        info = self._members[name]
        try:
            data = self._memory(info.file_size, lend)
            (self._read_stored if info.compress_type == zipfile.ZIP_STORED else self._unpack)(info, memoryview(data))
        except NpzError:
            raise
        except MemoryError as error:
            raise NpzError(f"{self.path}: not enough memory to read {name!r}") from error
        except (ZipError, *DAMAGE) as error:
            raise NpzError(f"{self.path}: member {name!r} is damaged ({one_line(error)})") from error
        array = data[offset:].view("<u2" if dtype == BFLOAT16 else dtype)
        if dtype == BFLOAT16:                    # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        if not array.flags.aligned:              # numpy's own headers end on a multiple of 64
            array = array.copy()
        return array.reshape(shape, order="F" if fortran_order else "C")

    def _memory(self, size: int, lend: bool) -> np.ndarray:
        if not lend:
            return np.empty(size, np.uint8)
        if size > len(getattr(self._lent, "memory", ())):
            self._lent.memory = np.empty(size, np.uint8)
        return self._lent.memory[:size]

    def _read_stored(self, info: zipfile.ZipInfo, data: memoryview) -> None:
        """Not through a mapping of the file: if it were cut off meanwhile, that would end the process."""
        start, place, check = stored_start(self._stream, self._zip, info), 0, 0
        while place < len(data):
            count = os.preadv(self._stream.fileno(), [data[place:place + CHUNK]], start + place)
            if not count:
                raise ZipError("cut off")
            check = zlib.crc32(data[place:place + count], check)
            place += count
        if check != info.CRC:
            raise ZipError("its CRC-32 does not match")

    def _unpack(self, info: zipfile.ZipInfo, data: memoryview) -> None:
        place = 0
        with self._zip.open(info) as stream:
            while chunk := stream.read(CHUNK):           # to the end of the member: only that verifies the CRC
                data[place:place + len(chunk)] = chunk
                place += len(chunk)
        if place != len(data):
            raise ZipError("cut off")

    def close(self) -> None:
        for opened in (self._zip, self._stream):
            if opened is not None:
                opened.close()

    def __enter__(self) -> "NpzFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()
