"""Downloading published checkpoints from a server on this machine: whole, checked, or not at all."""

import hashlib
import io
import os

import file_server
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
def folder(tmp_path, monkeypatch):
    """An empty checkpoint folder, in an empty working directory, with no server to ask."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIT_CHECKPOINT_DIR", str(tmp_path / "weights"))
    monkeypatch.setenv("VIT_CHECKPOINT_URL", file_server.nobody())
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "weights"


@pytest.fixture
def server(folder, monkeypatch):
    with file_server.running() as server:
        server.content = CONTENT
        monkeypatch.setenv("VIT_CHECKPOINT_URL", f"http://127.0.0.1:{server.server_port}/vit_models")
        yield server


def put(path, content: bytes = b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def fails(folder, message: str) -> str:
    """One line with the URL and the place to put the file by hand; and no file that looks finished."""
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
def test_download(server, folder, md5, chunked, etag):
    server.md5, server.chunked, server.etag = md5, chunked, etag
    arrives(folder)
    assert server.requests == [("/vit_models/imagenet21k/R50%2BViT-B_16.npz", None, None)]
    find_checkpoint(NAME)
    assert len(server.requests) == 1                                        # it is here now


def test_the_name_alone_makes_a_model(server, folder):
    server.content = reference.weights("g_p32").read_bytes()
    model = create_model(reference.ROWS["g_p32"], pretrained="sam/ViT-B_32", head="keep")
    assert model.num_classes == 5 and model.load_report.path == str(folder / "sam" / "ViT-B_32.npz")


def test_a_download_that_was_cut_goes_on(server, folder):
    """The next call asks for the rest, of the same version."""
    server.cut_after = 100_000
    fails(folder, f"the connection was cut off at 100000 of {SIZE} bytes; run again to resume")
    assert part(folder) == CONTENT[:100_000]
    fails(folder, f"cut off at 200000 of {SIZE}")
    server.cut_after = None
    arrives(folder)
    assert [request[1:] for request in server.requests] == [
        (None, None), ("bytes=100000-", '"one"'), ("bytes=200000-", '"one"')]
    assert server.answers == [200, 206, 206]


def test_another_version_starts_anew(server, folder):
    """Pieces of two versions are never joined."""
    server.cut_after, server.content = 100_000, bytes(SIZE)
    fails(folder, "cut off")
    server.cut_after, server.content, server.etag = None, CONTENT, '"two"'
    arrives(folder)
    assert server.requests[1][1:] == ("bytes=100000-", '"one"') and server.answers == [200, 200]


def test_a_server_without_ranges_sends_all_again(server, folder):
    server.cut_after, server.ranges = 100_000, False
    fails(folder, "cut off")
    server.cut_after = None
    arrives(folder)
    assert server.answers == [200, 200]


def test_without_a_mark_of_the_version_nothing_is_joined(server, folder):
    server.cut_after, server.etag, server.content = 100_000, None, bytes(SIZE)
    fails(folder, "cut off")
    server.cut_after, server.content = None, CONTENT
    arrives(folder)
    assert server.requests[1][1:] == (None, None)


def test_a_part_that_is_complete_or_too_long(server, folder):
    """The process ended before the last step: the server says 416, and all is fetched again."""
    for length in (SIZE, SIZE + 1000):
        put(folder / f"{FILE}.part", bytes(length))
        put(folder / f"{FILE}.part.etag", b'"one"')
        arrives(folder)
        os.remove(folder / FILE)
    assert server.answers == [416, 200, 416, 200]


def test_what_does_not_match_the_checksum_is_thrown_away(server, folder):
    server.md5 = hashlib.md5(b"another").digest()
    fails(folder, "does not match the server's MD5; run again")
    assert part(folder) is None
    server.md5 = hashlib.md5(CONTENT).digest()
    arrives(folder)


def test_the_checksum_is_of_the_whole_file_also_after_going_on(server, folder):
    server.md5, server.cut_after = hashlib.md5(CONTENT).digest(), 100_000
    fails(folder, "cut off")
    path = folder / f"{FILE}.part"
    path.write_bytes(bytes(100_000))                                        # damaged in the meantime
    server.cut_after = None
    fails(folder, "does not match the server's MD5")
    arrives(folder)


def test_nothing_looks_finished_before_it_is(server, folder, monkeypatch):
    """The final name appears by renaming, after the checksum."""
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (seen.append((os.path.getsize(old), new.exists())), replace(old, new)))
    arrives(folder)
    assert seen == [(SIZE, False)]


@pytest.mark.parametrize("status, message", [(404, "Not Found"), (403, "Forbidden"), (503, "Service Unavailable")])
def test_a_server_that_refuses(server, folder, status, message):
    server.status = status
    fails(folder, message)
    assert part(folder) is None


def test_a_part_outlives_a_server_that_refuses(server, folder):
    server.cut_after = 100_000
    fails(folder, "cut off")
    server.cut_after, server.status = None, 503
    fails(folder, "Service Unavailable")
    server.status = None
    arrives(folder)
    assert server.answers == [200, 503, 206]


def test_offline(folder):
    fails(folder, "refused")


@pytest.mark.parametrize("greeting", [b"220 mail.example ESMTP\r\n", b"HTTP/1.1 twohundred OK\r\n\r\n", b"\0"])
def test_what_speaks_no_http(server, folder, greeting):
    server.greeting = greeting
    fails(folder, "could not download")


def test_a_cut_without_a_length(server, folder):
    """Told by chunks, the end is missing: what came is no whole file."""
    server.chunked, server.cut_after = True, 100_000
    fails(folder, "could not download")
    server.chunked, server.cut_after = False, None
    arrives(folder)


@pytest.mark.parametrize("mirror", ["storage.example/vit", "http://[broken", "http://bad host/"])
def test_a_mirror_that_is_no_url(folder, monkeypatch, mirror):
    monkeypatch.setenv("VIT_CHECKPOINT_URL", mirror)
    fails(folder, "could not download")


def test_a_folder_that_cannot_be_made(folder):
    put(folder, b"a file stands in the way")
    fails(folder, "could not download")


def test_a_web_page_instead_of_the_file(server, folder):
    """A sign-in page answers 200 to everything: it must not stay under the checkpoint's name."""
    server.content = b"<!DOCTYPE html><html>sign in</html>"
    with pytest.raises(ModelError):
        create_model(reference.ROWS["g_p32"], pretrained=NAME)
    server.content = CONTENT
    arrives(folder)


def test_a_rest_that_begins_elsewhere_is_not_joined(server, folder):
    """206 with all of the file, where the rest was asked for, and no checksum to tell."""
    server.cut_after = 100_000
    fails(folder, "cut off")
    server.cut_after, server.whole = None, True
    try:
        find_checkpoint(NAME)
    except ModelError:
        assert not (folder / FILE).exists()
    else:
        assert (folder / FILE).read_bytes() == CONTENT


# ------------------------------------------------------------------------------------- what arrives is looked at

KIND = {".npz": CONTENT, ".pth": b"PK\x03\x04", ".csv": b"name,ds,final_val,filename\nS/16,i21k,0.5,x\n"}
PAGES = [b"<!DOCTYPE html>", b"\n\n<html>", b"{}", b""]


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("page", PAGES)
def test_a_file_is_of_its_kind(server, tmp_path, suffix, page):
    path = tmp_path / f"x{suffix}"
    server.content = page
    with pytest.raises(ModelError, match=f"what arrived is not {KINDS[suffix][0]}; perhaps a sign-in page"):
        download(f"http://127.0.0.1:{server.server_port}/x", path)
    assert not path.exists() and not path.with_name(path.name + ".part").exists()
    server.content = KIND[suffix]
    download(f"http://127.0.0.1:{server.server_port}/x", path)
    assert path.read_bytes() == KIND[suffix]


def test_an_older_file_of_pytorch_is_one(server, tmp_path):
    server.content = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    download(f"http://127.0.0.1:{server.server_port}/x", tmp_path / "x.pth")
    with pytest.raises(ModelError, match=r"not an \.npz archive"):
        download(f"http://127.0.0.1:{server.server_port}/x", tmp_path / "x.npz")


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_the_publisher_s_digits(server, tmp_path, algorithm):
    url, path = f"http://127.0.0.1:{server.server_port}/x", tmp_path / "x.npz"
    digits = hashlib.new(algorithm, CONTENT).hexdigest()
    with pytest.raises(ModelError, match=f"does not match the publisher's {algorithm.upper()} .zz{digits[:6]}.*run again"):
        download(url, path, f"{algorithm}:zz{digits[:6]}")
    assert not path.exists() and not path.with_name("x.npz.part").exists()
    download(url, path, f"{algorithm}:{digits[:8]}")
    assert path.read_bytes() == CONTENT
