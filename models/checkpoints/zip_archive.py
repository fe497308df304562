"""Opens zip archives whose directory is small, whole and the only one.

Python's zipfile makes an object of everything that a directory lists before it can be asked how much that is, takes the
last of two members of one name, and looks past bytes at either end; another reader of the same file may do otherwise, and
then what was checked is not what is read. Format: PKWARE's APPNOTE.TXT, 4.3.6 to 4.3.16.
"""

import os
import struct
import zipfile
import zlib
from typing import BinaryIO

MAX_MEMBERS = 16_384
MAX_DIRECTORY = 1 << 22         # bytes; 250 a member
MEMBER, END, END_64, LOCATOR_64 = b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
MEMBER_BYTES, END_BYTES, END_64_BYTES, LOCATOR_BYTES = 30, 22, 56, 20
MAX_COMMENT = 0xFFFF
FLAGS = 0x8 | 0x800             # sizes behind the data too; names in UTF-8. Any other: encrypted, patched, not of use here
DOS_FOLDER = 0x10               # of a member with it PyTorch reads nothing and hands out memory as it finds it
# What zipfile raises on damaged archives.
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, OverflowError, RuntimeError,
          NotImplementedError)


class ZipError(ValueError):
    """What is wrong with an archive; without its path."""


def open_archive(stream: BinaryIO) -> zipfile.ZipFile:
    """Every reader finds the same members in it: one directory, at the end of the file; no name twice, in capitals or not;
    no folders, nothing encrypted, no name that readers may decode in several ways (all printable ASCII); no more packed
    bytes than the file has. Raises ZipError, or one of DAMAGE."""
    size = os.fstat(stream.fileno()).st_size
    count = _check_end(stream, size)
    stream.seek(0)
    archive = zipfile.ZipFile(stream)
    members = archive.infolist()
    if len(members) != count:
        raise ZipError(f"{len(members)} members, its end says {count}")
    if len(members) > MAX_MEMBERS:
        raise ZipError(f"{len(members)} members, more than any checkpoint has")
    names = set()
    for info in members:
        if not (info.filename.isascii() and info.filename.isprintable() and info.filename == info.orig_filename):
            raise ZipError(f"member {ascii(info.orig_filename)[:200]} has a name that is not printable ASCII")
        if info.filename.lower() in names:
            raise ZipError(f"member {info.filename!r} stands twice in the archive")
        names.add(info.filename.lower())
        if info.flag_bits & ~FLAGS:
            raise ZipError(f"member {info.filename!r} is encrypted, or packed as weights never are")
        if info.external_attr & DOS_FOLDER or info.filename.endswith("/"):
            raise ZipError(f"member {info.filename!r} calls itself a folder")
    if sum(info.compress_size for info in members) > size:
        shown = ", ".join(repr(info.filename) for info in members[:3])
        raise ZipError(f"its members ({shown}, ...) claim more bytes than the file has")
    return archive


def _check_end(stream: BinaryIO, size: int) -> int:
    """The end record is the last thing in the file, and the directory stands right before it -> how many members it has."""
    stream.seek(max(0, size - MAX_COMMENT - END_BYTES - LOCATOR_BYTES - END_64_BYTES))
    tail = stream.read()
    start = size - len(tail)
    at = tail.rfind(END)
    if at < 0:
        raise ZipError("without a directory, as if it was cut off")
    *_, count, length, offset, comment = struct.unpack("<HHHHIIH", tail[at + 4:at + END_BYTES].ljust(END_BYTES - 4, b"\0"))
    if at + END_BYTES + comment != len(tail):
        raise ZipError("its directory is not at its end")
    end = at - LOCATOR_BYTES
    if end >= END_64_BYTES and tail[end:end + 4] == LOCATOR_64:
        _, where, _ = struct.unpack_from("<IQI", tail, end + 4)
        at = end - END_64_BYTES
        if where != start + at or tail[at:at + 4] != END_64:
            raise ZipError("its end says two things about its directory")
        count, length, offset = struct.unpack_from("<QQQ", tail, at + 32)
    if offset + length != start + at:
        raise ZipError("its directory is not where its end says")
    if length > MAX_DIRECTORY:
        raise ZipError(f"a directory of {length} bytes, more than any checkpoint has")
    return count


def stored_start(stream: BinaryIO, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Where in the file the bytes of a member lie that is not packed, all before the directory. The header before them says
    what the directory says. Raises ZipError, or one of DAMAGE; may be called by several threads."""
    name = info.filename.encode()
    header = os.pread(stream.fileno(), MEMBER_BYTES + len(name), info.header_offset)
    mark, flags, method, length, extra = struct.unpack_from("<4s2xHH16xHH", header)
    if (mark, flags, method, length, header[MEMBER_BYTES:]) != (MEMBER, info.flag_bits, zipfile.ZIP_STORED, len(name), name):
        raise ZipError(f"the directory and the header of member {info.filename!r} differ")
    start = info.header_offset + MEMBER_BYTES + length + extra
    if info.file_size != info.compress_size or start + info.file_size > archive.start_dir:
        raise ZipError(f"member {info.filename!r} does not lie before the directory")
    return start


# ------------------------------------------------------------------------------------------ words of a file in messages


def one_line(error: Exception) -> str:
    return shown(" ".join(str(error).split())[:200]) or type(error).__name__


def shown(name: object) -> str:
    """For a message of one line, whatever a file calls itself and its arrays."""
    text = str(name)[:100] if not isinstance(name, str) else name[:200]
    return text if text.isprintable() else ascii(text)[1:-1]
