"""Downloading published checkpoints from a local server: files are complete and checked, or do not appear."""

import hashlib
import io
import os

import numpy as np
import pytest
import reference

from models import ModelError, create_model, find_checkpoint
from models.checkpoints.download import KINDS, download


def some_archive() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, array=np.frombuffer(np.random.default_rng(0).bytes(300_000), np.uint8))
    return stream.getvalue()


CONTENT = some_archive()
SIZE = len(CONTENT)
NAME, FILE = "imagenet21k/R50+ViT-B_16", "imagenet21k/R50+ViT-B_16.npz"


@pytest.fixture
def server(server):
    server.content = CONTENT
    return server


def fails(folder, message: str) -> str:
    """Check for one line with the URL and the path to put the file at by hand, and that no file looks complete."""
    with pytest.raises(ModelError, match=message) as error:
        find_checkpoint(NAME)
    text = str(error.value)
    assert "\n" not in text and "/imagenet21k/R50%2BViT-B_16.npz" in text and f"put it at {folder / FILE}" in text
    assert not (folder / FILE).exists()
    return text


def part(folder) -> bytes | None:
    path = folder / f"{FILE}.part"
    return path.read_bytes() if path.exists() else None


def arrives(folder) -> None:
    assert find_checkpoint(NAME) == folder / FILE
    assert (folder / FILE).read_bytes() == CONTENT
    assert os.listdir(folder / "imagenet21k") == ["R50+ViT-B_16.npz"]


@pytest.mark.parametrize("md5", [None, hashlib.md5(CONTENT).digest()])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("etag", ['"one"', None])
def test_a_file_is_downloaded_once(server, folder, md5, chunked, etag):
    server.md5, server.chunked, server.etag = md5, chunked, etag
    arrives(folder)
    assert server.requests == [("/vit_models/imagenet21k/R50%2BViT-B_16.npz", None, None)]
    find_checkpoint(NAME)
    assert len(server.requests) == 1                                        # now it is here


def test_a_name_is_enough_for_a_model(server, folder):
    server.content = reference.weights("g_p32").read_bytes()
    model = create_model(reference.ROWS["g_p32"], pretrained="sam/ViT-B_32", head="keep")
    assert model.num_classes == 5 and model.load_report.path == str(folder / "sam" / "ViT-B_32.npz")


def test_a_download_that_was_cut_off_is_resumed(server, folder):
    """The next call requests only the rest of the same version."""
    server.cut_after = 100_000
    fails(folder, f"the connection was cut off at 100000 of {SIZE} bytes; run again to resume")
    assert part(folder) == CONTENT[:100_000]
    fails(folder, f"cut off at 200000 of {SIZE}")
    server.cut_after = None
    arrives(folder)
    assert [request[1:] for request in server.requests] == [
        (None, None), ("bytes=100000-", '"one"'), ("bytes=200000-", '"one"')]
    assert server.answers == [200, 206, 206]


def test_processes_wait_for_one_lock_after_a_failure_too(server, folder, put):
    """Another process waits with the lock file open: one that starts later must use the same file, or both would write."""
    lock = folder / f"{FILE}.lock"
    put(lock, b"")
    waiting = lock.stat()
    server.cut_after = 100_000
    fails(folder, "cut off")
    assert os.path.samestat(lock.stat(), waiting)
    server.cut_after = None
    arrives(folder)


@pytest.mark.parametrize("changes, range_asked, answer", [
    ({"etag": '"two"'}, "bytes=100000-", 200),                              # another version
    ({"ranges": False}, "bytes=100000-", 200),                              # a server without ranges
    ({"whole": True}, "bytes=100000-", 206),                                # 206 with all of the file
])
def test_parts_that_do_not_fit_are_not_joined(server, folder, changes, range_asked, answer):
    server.cut_after, server.content = 100_000, bytes(SIZE)
    fails(folder, "cut off")
    server.cut_after, server.content = None, CONTENT
    vars(server).update(changes)
    arrives(folder)
    assert server.requests[1][1:] == (range_asked, '"one"') and server.answers[:2] == [200, answer]


def test_without_an_etag_nothing_is_joined(server, folder):
    server.cut_after, server.etag, server.content = 100_000, None, bytes(SIZE)
    fails(folder, "cut off")
    server.cut_after, server.content = None, CONTENT
    arrives(folder)
    assert server.requests[1][1:] == (None, None)


def test_a_part_that_is_complete_or_too_long_is_downloaded_again(server, folder, put):
    """The process ended before the last step: the server answers 416, and the file is downloaded again."""
    for length in (SIZE, SIZE + 1000):
        put(folder / f"{FILE}.part", bytes(length))
        put(folder / f"{FILE}.part.etag", b'"one"')
        arrives(folder)
        os.remove(folder / FILE)
    assert server.answers == [416, 200, 416, 200]


def test_a_file_that_does_not_match_the_checksum_is_deleted(server, folder):
    server.md5 = hashlib.md5(b"another").digest()
    fails(folder, "does not match the server's MD5; run again")
    assert part(folder) is None
    server.md5 = hashlib.md5(CONTENT).digest()
    arrives(folder)


def test_the_checksum_covers_the_whole_file_of_a_resumed_download(server, folder):
    server.md5, server.cut_after = hashlib.md5(CONTENT).digest(), 100_000
    fails(folder, "cut off")
    path = folder / f"{FILE}.part"
    path.write_bytes(bytes(100_000))                                        # damaged in the meantime
    server.cut_after = None
    fails(folder, "does not match the server's MD5")
    arrives(folder)


@pytest.mark.parametrize("status, message", [(404, "Not Found"), (403, "Forbidden"), (503, "Service Unavailable")])
def test_a_part_is_kept_when_the_server_refuses(server, folder, status, message):
    server.cut_after = 100_000
    fails(folder, "cut off")
    server.cut_after, server.status = None, status
    fails(folder, message)
    server.status = None
    arrives(folder)
    assert server.answers == [200, status, 206]


def test_without_a_network_the_url_is_named(folder):
    fails(folder, "refused")


@pytest.mark.parametrize("greeting", [b"220 mail.example ESMTP\r\n", b"HTTP/1.1 twohundred OK\r\n\r\n", b"\0"])
def test_a_server_without_http_is_reported(server, folder, greeting):
    server.greeting = greeting
    fails(folder, "could not download")


def test_a_cut_is_noticed_without_a_length(server, folder):
    """The end of a chunked body is missing."""
    server.chunked, server.cut_after = True, 100_000
    fails(folder, "could not download")
    server.chunked, server.cut_after = False, None
    arrives(folder)


@pytest.mark.parametrize("mirror", ["storage.example/vit", "http://[broken", "http://bad host/"])
def test_a_mirror_that_is_no_url_is_reported(folder, monkeypatch, mirror):
    monkeypatch.setenv("VIT_CHECKPOINT_URL", mirror)
    fails(folder, "could not download")


def test_a_folder_that_cannot_be_created_is_reported(folder, put):
    put(folder, b"a file in its place")
    fails(folder, "could not download")


KIND = {".npz": CONTENT, ".pth": b"PK\x03\x04", ".bin": b"PK\x03\x04", ".json": b'\n{"a": 1}',
        ".safetensors": b"\x10\0\0\0\0\0\0\0{", ".csv": b"name,ds,final_val,filename\nS/16,i21k,0.5,x\n"}
PAGES = [b"<!DOCTYPE html>", b"\n\n<html>", b"[]", b""]


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("page", PAGES)
def test_a_file_of_another_kind_is_refused(server, tmp_path, suffix, page):
    path = tmp_path / f"x{suffix}"
    server.content = page
    with pytest.raises(ModelError, match=f"the downloaded file is not {KINDS[suffix][0]}; perhaps it is a sign-in page"):
        download(f"http://127.0.0.1:{server.server_port}/x", path)
    assert not path.exists() and not path.with_name(path.name + ".part").exists()
    server.content = KIND[suffix]
    download(f"http://127.0.0.1:{server.server_port}/x", path)
    assert path.read_bytes() == KIND[suffix]
    if suffix == ".pth":                                                    # an older file of PyTorch
        server.content = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
        path.unlink()
        download(f"http://127.0.0.1:{server.server_port}/x", path)
