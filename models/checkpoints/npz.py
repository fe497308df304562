"""Reads .npz archives of plain numeric arrays.

`numpy.load` runs the code of pickled objects and trusts the size in a header. Here memory is allocated for an array only if its
header agrees with the directory of the archive; members are read one by one, on request.
"""

import contextlib
import math
import threading
import tokenize
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from models.errors import WeightsError

from .first_look import report_damage
from .zip_archive import DAMAGE, Archive

MAX_RATIO = 100          # unpacked / packed; weights hardly shrink, and the largest measured here is below 10
RATIO_FREE_BYTES = 1 << 24   # no limit for smaller members: arrays of zeros (a head) shrink a lot
MAX_HEADER = 4096
HEADER_DAMAGE = (*DAMAGE, TypeError, SyntaxError, tokenize.TokenError, MemoryError)      # numpy's parser raises these too
# numpy has no bfloat16: JAX's arrays of that type are saved as two bytes of void.
BFLOAT16 = np.dtype("V2")


class Header(NamedTuple):
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    offset: int          # of the data in the member, in bytes


class NpzFile:
    """An open archive: `names`, `shape(name)`, `read_array(name)`; safe for several threads. Raises WeightsError (one line)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._buffers = threading.local()
        self._headers: dict[str, Header] = {}
        self._parsing = threading.Lock()             # Python 3.11 may raise SystemError if several threads parse at once
        with contextlib.ExitStack() as opened, report_damage(path, "not a readable .npz archive"):
            self._archive = Archive(opened.enter_context(open(self.path, "rb")))
            if not self._archive.members:                # an empty archive, or its end was overwritten by another's
                raise ValueError("no members")
            self._members = {name.removesuffix(".npy"): info for name, info in self._archive.members.items()}
            for name, info in self._archive.members.items():
                if not name.endswith(".npy"):
                    raise WeightsError(f"{path}: member {name!r} is not an array")
                if info.file_size > max(RATIO_FREE_BYTES, MAX_RATIO * info.compress_size):
                    raise WeightsError(f"{path}: member {name!r} claims {info.file_size} bytes from {info.compress_size}")
            self.names, self.close = list(self._members), opened.pop_all().close

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array from its header; the data stay on the disk."""
        return self._header(name).shape

    def _header(self, name: str) -> Header:
        if name not in self._headers:
            with (report_damage(self.path, f"member {name!r} has no readable array header", HEADER_DAMAGE), self._parsing,
                  self._archive.open(self._members[name]) as stream):
                header = self._parse_header(stream, name)
            if header.offset + math.prod(header.shape) * header.dtype.itemsize != self._members[name].file_size:
                raise WeightsError(f"{self.path}: {name!r} claims {header.shape} {header.dtype}, which does not fit its size")
            self._headers[name] = header
        return self._headers[name]

    def _parse_header(self, stream: BinaryIO, name: str) -> Header:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(stream, max_header_size=MAX_HEADER)
        if (dtype.kind not in "fiu" and dtype != BFLOAT16) or dtype.hasobject:
            raise WeightsError(f"{self.path}: member {name!r} holds {dtype}, not plain numbers")
        if any(side < 0 for side in shape):
            raise WeightsError(f"{self.path}: member {name!r} has the impossible shape {shape}")
        return Header(shape, fortran_order, dtype, stream.tell())

    def read_array(self, name: str, reuse: bool = False) -> np.ndarray:
        """Return the array, in the dtype and order of the file, bfloat16 as float32; its CRC-32 is compared.

        reuse=True: return memory that this thread's next such call overwrites, for a caller who copies it immediately. Filling
        fresh memory takes longer than reading the file.
        """
        header, info = self._header(name), self._members[name]
        try:
            if reuse and info.file_size > len(getattr(self._buffers, "memory", ())):
                self._buffers.memory = np.empty(info.file_size, np.uint8)
            data = self._buffers.memory[:info.file_size] if reuse else np.empty(info.file_size, np.uint8)
            with report_damage(self.path, f"member {name!r} is damaged"):
                self._archive.read_into(info, memoryview(data))
        except MemoryError as error:
            raise WeightsError(f"{self.path}: not enough memory to read {name!r}") from error
        array = data[header.offset:].view("<u2" if header.dtype == BFLOAT16 else header.dtype)
        if header.dtype == BFLOAT16:             # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        if not array.flags.aligned:              # not written by numpy, whose headers end on a multiple of 64
            array = array.copy()
        return array.reshape(header.shape, order="F" if header.fortran_order else "C")
