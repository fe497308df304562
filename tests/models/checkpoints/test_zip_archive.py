"""Members of zip archives: read by position, compared with their checksums; damage raises an error of DAMAGE."""

import io
import os
import struct
import zipfile
from pathlib import Path

import pytest
from weight_files import archive

from models.checkpoints.zip_archive import DAMAGE, Archive

MEMBERS = {"a": b"first", "folder/b": b"", "c": bytes(range(256)) * 3000, "\u00e4.npy": b"x"}


def read_all(path: Path, verify: bool = True) -> dict[str, bytes]:
    contents = {}
    with open(path, "rb") as stream:
        opened = Archive(stream)
        for name, info in opened.members.items():
            contents[name] = bytearray(info.file_size)
            opened.read_into(info, memoryview(contents[name]), verify)
    return contents


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_read_exactly(tmp_path, method):
    assert read_all(archive(tmp_path / "x", MEMBERS, compression=method)) == MEMBERS


def test_archives_with_64_bit_numbers_and_a_comment(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    path = archive(tmp_path / "x", MEMBERS)
    with zipfile.ZipFile(path, "a") as file:
        file.comment = b"x" * 65535
    assert b"PK\x06\x06" in path.read_bytes() and read_all(path) == MEMBERS


def changed(content: bytes, offset: int, layout: str, value: object) -> bytes:
    data = bytearray(content)
    struct.pack_into(layout, data, offset, value)
    return bytes(data)


PLAIN = io.BytesIO()
with zipfile.ZipFile(PLAIN, "w") as file:
    file.writestr("name", b"content")
PLAIN = PLAIN.getvalue()
DIRECTORY = PLAIN.index(b"PK\x01\x02")


@pytest.mark.parametrize("content, message", [
    (b"", "not a zip"), (b"PK\x03\x04" + bytes(300), "not a zip"), (PLAIN[:-1], "not a zip"),
    (changed(PLAIN, 0, "4s", b"PK\3\5"), "differ"), (changed(PLAIN, 6, "<H", 0x800), "differ"),
    (changed(PLAIN, 8, "<H", 8), "differ"), (changed(PLAIN, 26, "<H", 3), "differ"), (changed(PLAIN, 30, "1s", b"x"), "differ"),
    (changed(PLAIN, 28, "<H", 60_000), "cut off"), (changed(PLAIN, 34, "1s", b"C"), "CRC-32"),
    (changed(PLAIN, DIRECTORY + 24, "<I", 6), "packed or encrypted"),
    (changed(PLAIN, DIRECTORY + 20, "<I", 1 << 30), "claim more bytes than the file has"),
    (changed(changed(PLAIN, 6, "<H", 1), DIRECTORY + 8, "<H", 1), "packed or encrypted"),
], ids=range(13))
def test_damage_is_an_error(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DAMAGE, match=message):
        read_all(tmp_path / "x")


def test_checksums_are_compared_on_request(tmp_path):
    path = archive(tmp_path / "x", {"name": b"content"})
    path.write_bytes(changed(path.read_bytes(), 34, "1s", b"C"))
    assert read_all(path, verify=False) == {"name": b"Content"}


def test_a_file_cut_off_while_it_is_read_is_an_error(tmp_path):
    """A mapping of the file would crash the process."""
    path = archive(tmp_path / "x", MEMBERS)
    with open(path, "rb") as stream:
        opened = Archive(stream)
        os.truncate(path, 1 << 12)
        with pytest.raises(ValueError, match="cut off"):
            opened.read_into(opened.members["c"], memoryview(bytearray(768_000)))
