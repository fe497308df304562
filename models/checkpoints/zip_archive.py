"""Reads members of zip archives by position and compares their checksums; also shortens text of a file for a one-line message.

Python's zipfile reads the directory. Stored members are read directly from the file, by any number of threads, and the CRC-32 is
computed while the bytes are in the processor's cache. Format: PKWARE's APPNOTE.TXT, 4.3.
"""

import os
import struct
import zipfile
import zlib
from typing import BinaryIO

CHUNK = 1 << 18                 # bytes read at a time
MEMBER, MEMBER_BYTES = b"PK\x03\x04", 30
# The errors that zipfile and this module raise for damaged archives.
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, OverflowError, RuntimeError,
          NotImplementedError)


class Archive:
    """An open archive with its `members` by name. Raises errors of DAMAGE, whose text does not contain the path."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._zip = zipfile.ZipFile(stream)
        self.members = {info.filename: info for info in self._zip.infolist()}
        if sum(info.compress_size for info in self.members.values()) > os.fstat(stream.fileno()).st_size:
            raise ValueError("its members claim more bytes than the file has")

    def open(self, info: zipfile.ZipInfo) -> BinaryIO:
        return self._zip.open(info)

    def start(self, info: zipfile.ZipInfo) -> int:
        """Return the position in the file of a stored member's bytes. Its own header must agree with the directory."""
        name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        header = os.pread(self._stream.fileno(), MEMBER_BYTES + len(name), info.header_offset)
        mark, flags, method, length, extra = struct.unpack_from("<4s2xHH16xHH", header)
        if (mark, flags, method, length, header[MEMBER_BYTES:]) != (MEMBER, info.flag_bits, info.compress_type, len(name), name):
            raise ValueError(f"the directory and the header of member {info.filename!r} differ")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or flags & 1:
            raise ValueError(f"member {info.filename!r} is packed or encrypted")
        start = info.header_offset + MEMBER_BYTES + length + extra
        if start + info.file_size > self._zip.start_dir:
            raise ValueError(f"member {info.filename!r} is cut off")
        return start

    def read_into(self, info: zipfile.ZipInfo, memory: memoryview, verify: bool = True) -> None:
        """Read a member into `memory`, of info.file_size bytes. verify=False: a stored member's CRC-32 is not compared."""
        if info.compress_type == zipfile.ZIP_STORED:
            self._read_stored(info, memory, verify)
            return
        filled = 0
        with self._zip.open(info) as stream:
            while chunk := stream.read(CHUNK):           # zipfile verifies the CRC only at the end of the member
                memory[filled:filled + len(chunk)] = chunk
                filled += len(chunk)
        if filled != len(memory):
            raise ValueError("cut off")

    def _read_stored(self, info: zipfile.ZipInfo, memory: memoryview, verify: bool) -> None:
        """Read a stored member without mapping the file, as a mapping would crash if the file were cut off meanwhile."""
        start, filled, crc = self.start(info), 0, 0
        while filled < len(memory):
            count = os.preadv(self._stream.fileno(), [memory[filled:filled + CHUNK]], start + filled)
            if not count:
                raise ValueError("cut off")
            crc = zlib.crc32(memory[filled:filled + count], crc) if verify else 0
            filled += count
        if verify and crc != info.CRC:
            raise ValueError(f"the CRC-32 of member {info.filename!r} does not match")


def one_line(error: Exception) -> str:
    """Return the text of an error as one short line; its class if it has none."""
    return shown(" ".join(str(error).split())[:200]) or type(error).__name__


def shown(name: object) -> str:
    """Return a name from a file as printable text of limited length, for a one-line message."""
    text = str(name)[:100] if not isinstance(name, str) else name[:200]
    return text if text.isprintable() else ascii(text)[1:-1]
