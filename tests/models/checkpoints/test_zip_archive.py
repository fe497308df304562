"""Archives whose directory two readers would understand in two ways, or that is larger than any."""

import io
import struct
import time
import zipfile
from pathlib import Path

import pytest

from models.checkpoints.zip_archive import DAMAGE, ZipError, open_archive, stored_start


def archive(members: dict[str, bytes], comment: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.comment = comment
        for name, data in members.items():
            file.writestr(name, data)
    return stream.getvalue()


def opened(tmp_path: Path, content: bytes) -> dict[str, bytes]:
    (tmp_path / "x").write_bytes(content)
    with open(tmp_path / "x", "rb") as stream, open_archive(stream) as file:
        return {name: file.read(name) for name in file.namelist()}


def patched(content: bytes, offset: int, layout: str, value: int) -> bytes:
    """With another value in the first entry of the directory."""
    data = bytearray(content)
    struct.pack_into(layout, data, data.index(b"PK\x01\x02") + offset, value)
    return bytes(data)


PLAIN = archive({"a": b"one", "b": b"two"})


@pytest.mark.parametrize("content", [PLAIN, archive({"a": b"one", "b": b"two"}, comment=b"x" * 65535)])
def test_what_zipfile_writes_is_opened(tmp_path, content):
    assert opened(tmp_path, content) == {"a": b"one", "b": b"two"}


def test_a_long_directory_with_64_bit_numbers_is_opened(tmp_path, monkeypatch):
    """zipfile and PyTorch write such an end record."""
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    content = archive({"a": b"one", "b": b"two"})
    assert b"PK\x06\x06" in content and opened(tmp_path, content) == {"a": b"one", "b": b"two"}
    data = bytearray(content)
    struct.pack_into("<Q", data, data.index(b"PK\x06\x07") + 8, 0)              # where the 64-bit record should be
    with pytest.raises(ZipError, match="says two things"):
        opened(tmp_path, bytes(data))


REFUSED = {
    "nothing": (b"", "without a directory"),
    "no_zip": (b"PK\x03\x04" + bytes(300), "without a directory"),
    "cut_off": (PLAIN[:-1], "not at its end"),
    "something_behind": (PLAIN + b"\0", "not at its end"),
    "something_in_front": (b"#!/bin/sh\n" + PLAIN, "not where its end says"),
    "two_archives": (PLAIN + archive({"a": b"another"}), "not where its end says"),
    "an_end_in_the_comment": (archive({"a": b"x"}, comment=b"PK\x05\x06" + bytes(18) + b"tail"), "not at its end"),
    "in_capitals_too": (archive({"data/a": b"x", "DATA/A": b"y"}), "'DATA/A' stands twice"),
    "one_too_few": (PLAIN.replace(b"\x02\x00\x02\x00", b"\x02\x00\x01\x00"), "2 members, its end says 1"),
    "accented": (archive({"a": b"", "d\u00e4ta": b""}), "not printable ASCII"),
    "no_utf_8": (PLAIN.replace(b"b", b"\xe9"), "not printable ASCII"),
    "control_character": (archive({"a\x1b[1m": b""}), "not printable ASCII"),
    "name_that_ends_early": (archive({"a?b": b""}).replace(b"a?b", b"a\0b"), "not printable ASCII"),
    "folder": (archive({"a/": b""}), "calls itself a folder"),
    "folder_by_attribute": (patched(PLAIN, 38, "<I", 0x10), "'a' calls itself a folder"),
    "encrypted": (patched(PLAIN, 8, "<H", 1), "'a' is encrypted"),
    "more_than_there_is": (patched(PLAIN, 20, "<I", 1 << 30), "claim more bytes than the file has"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    content, message = REFUSED[case]
    with pytest.raises(ZipError, match=message):
        opened(tmp_path, content)


def test_a_directory_of_a_million_members_is_not_even_read(tmp_path):
    """zipfile would make a million objects, 1 GB of them, before it can be asked how many."""
    entry = PLAIN[PLAIN.index(b"PK\x01\x02"):][:47]
    directory = entry * 1_000_000
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 65535, 65535, len(directory), 0, 0)
    started = time.perf_counter()
    with pytest.raises(ZipError, match="a directory of 47000000 bytes"):
        opened(tmp_path, directory + end)
    assert time.perf_counter() - started < 2


def test_more_members_than_any_checkpoint_has(tmp_path, monkeypatch):
    monkeypatch.setattr("models.checkpoints.zip_archive.MAX_MEMBERS", 1)
    with pytest.raises(ZipError, match="2 members"):
        opened(tmp_path, PLAIN)


def test_damage_inside_the_directory_is_one_of_the_errors_named(tmp_path):
    with pytest.raises(DAMAGE):
        opened(tmp_path, PLAIN.replace(b"PK\x01\x02", b"PK\x01\x03"))


# --------------------------------------------------------------------------------------- where a stored member lies


def located(tmp_path: Path, content: bytes) -> dict[str, bytes]:
    (tmp_path / "x").write_bytes(content)
    with open(tmp_path / "x", "rb") as stream, open_archive(stream) as file:
        starts = {info.filename: (stored_start(stream, file, info), info.file_size) for info in file.infolist()}
    return {name: content[start:start + size] for name, (start, size) in starts.items()}


def changed(content: bytes, place: int, layout: str, value: object) -> bytes:
    data = bytearray(content)
    struct.pack_into(layout, data, place, value)
    return bytes(data)


def test_where_stored_members_lie(tmp_path):
    members = {"a": b"first", "folder/b": b"", "c": bytes(range(256))}
    assert located(tmp_path, archive(members)) == members


@pytest.mark.parametrize("place, layout, value, message", [
    (0, "4s", b"PK\3\5", "differ"),                        # no header of a member
    (6, "<H", 0x800, "differ"), (8, "<H", 8, "differ"),      # other flags; packed
    (26, "<H", 3, "differ"), (30, "1s", b"x", "differ"),     # another name, shorter or of other letters
    (28, "<H", 60_000, "does not lie before"),               # what stands between reaches beyond the data
])
def test_a_header_that_differs_from_the_directory(tmp_path, place, layout, value, message):
    with pytest.raises(ZipError, match=message):
        located(tmp_path, changed(archive({"name": b"content"}), place, layout, value))


def test_a_directory_whose_sizes_of_a_stored_member_differ(tmp_path):
    content = archive({"name": b"content"})
    with pytest.raises(ZipError, match="'name' does not lie before the directory"):
        located(tmp_path, changed(content, content.index(b"PK\x01\x02") + 24, "<I", 6))
