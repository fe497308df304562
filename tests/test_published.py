"""Published checkpoints by name, and downloading them from a server on this machine."""

import base64
import hashlib
import http.server
import io
import os
import re
import socket
import threading

import numpy as np
import pytest
import reference

from configs import MODELS
from models import ModelError, create_model, find_checkpoint
from models.published import PUBLISHED, published_name, url_of

AUGREG = "augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224"

# ------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name, canonical", [
    ("ViT-B_16", "imagenet21k/ViT-B_16"),
    ("ViT-B_16.npz", "imagenet21k/ViT-B_16"),
    ("imagenet21k/ViT-H_14", "imagenet21k/ViT-H_14"),
    ("imagenet21k/ViT-H_14.npz", "imagenet21k/ViT-H_14"),
    ("R50+ViT-B_16", "imagenet21k/R50+ViT-B_16"),
    ("R50-ViT-B_16", "imagenet21k/R50+ViT-B_16"),
    ("R26-ViT-B_32", "imagenet21k/R26+ViT-B_32"),
    ("imagenet21k+imagenet2012/R50-ViT-B_16", "imagenet21k+imagenet2012/R50+ViT-B_16"),
    ("imagenet21k+imagenet2012/ViT-B_16-224", "imagenet21k+imagenet2012/ViT-B_16-224"),
    ("sam/ViT-S_16", "sam/ViT-S_16"),
    (AUGREG, AUGREG),
    ("augreg/R_Ti_16-i1k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz",
     "augreg/R_Ti_16-i1k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"),
    ("augreg/B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0",
     "augreg/B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0"),
    ("ViT-Ti_16", None),                                      # these sizes are in augreg alone
    ("ViT-B_16-224", None),
    ("imagenet21k+imagenet2012/ViT-H_14", None),
    ("sam/R50+ViT-B_16", None),
    ("elsewhere/ViT-B_16", None),
    ("imagenet21k/../ViT-B_16", None),
    ("augreg/../ViT-B_16", None),
    ("augreg/S_16", None),
    ("augreg/X_16-i21k", None),
    ("S_16-i21k-300ep", None),
    ("vit-b_16", None),
    ("", None),
    (".npz", None),
])
def test_names(name, canonical):
    assert published_name(name) == canonical


@pytest.mark.parametrize("name", [f"{folder}/{file}" for folder, files in PUBLISHED.items() for file in files])
def test_every_name_of_the_table_is_its_own_canonical_name_and_has_a_model(name):
    assert published_name(name) == name
    model = name.split("/")[1].replace("+", "-").removesuffix("-224")
    assert model in MODELS


@pytest.mark.parametrize("name, url", [
    ("imagenet21k/ViT-B_16", "https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz"),
    ("imagenet21k/R50+ViT-B_16", "https://storage.googleapis.com/vit_models/imagenet21k/R50%2BViT-B_16.npz"),
    ("imagenet21k+imagenet2012/R50+ViT-B_16",
     "https://storage.googleapis.com/vit_models/imagenet21k%2Bimagenet2012/R50%2BViT-B_16.npz"),
    (AUGREG, f"https://storage.googleapis.com/vit_models/{AUGREG}.npz"),
])
def test_urls(name, url, monkeypatch):
    monkeypatch.delenv("VIT_CHECKPOINT_URL", raising=False)
    assert url_of(name) == url


@pytest.mark.parametrize("mirror", ["http://mirror/vit", "http://mirror/vit/"])
def test_a_mirror_has_the_same_tree(mirror, monkeypatch):
    monkeypatch.setenv("VIT_CHECKPOINT_URL", mirror)
    assert url_of("imagenet21k/R50+ViT-B_16") == "http://mirror/vit/imagenet21k/R50%2BViT-B_16.npz"


# ------------------------------------------------------------------------------------------------- what is here


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty checkpoint folder, in an empty working directory, with no server to ask."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIT_CHECKPOINT_DIR", str(tmp_path / "weights"))
    monkeypatch.setenv("VIT_CHECKPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "weights"


def put(path, content: bytes = b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name, present, found", [
    ("imagenet21k/ViT-B_16", ["weights/imagenet21k/ViT-B_16.npz", "weights/ViT-B_16.npz"], 0),
    ("imagenet21k/ViT-B_16", ["weights/ViT-B_16.npz"], 0),                    # put there by hand
    ("ViT-B_16", ["weights/ViT-B_16.npz", "weights/sam/ViT-B_16.npz"], 0),
    ("ViT-B_16", ["ViT-B_16", "weights/imagenet21k/ViT-B_16.npz"], 0),        # an existing path wins
    ("ViT-B_16.npz", ["ViT-B_16.npz", "weights/imagenet21k/ViT-B_16.npz"], 0),
    ("R50-ViT-B_16", ["weights/imagenet21k/R50+ViT-B_16.npz"], 0),
    ("sam/ViT-B_16", ["weights/ViT-B_16.npz", "weights/sam/ViT-B_16.npz"], 1),
    ("some/where.bin", ["some/where.bin"], 0),
])
def test_what_is_here_is_not_downloaded(folder, tmp_path, name, present, found):
    paths = [put(tmp_path / path) for path in present]
    assert find_checkpoint(name).resolve() == paths[found]


def test_a_hand_made_file_can_only_mean_the_name_without_a_folder(folder):
    put(folder / "ViT-B_16.npz")
    with pytest.raises(ModelError, match=r"could not download .*/sam/ViT-B_16\.npz"):
        find_checkpoint("sam/ViT-B_16")


def test_the_usual_folder_is_checkpoint(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("VIT_CHECKPOINT_DIR")
    path = put(tmp_path / "checkpoint" / "imagenet21k" / "ViT-B_16.npz")
    assert find_checkpoint("ViT-B_16").resolve() == path


@pytest.mark.parametrize("name", ["weights/mine.npz", "ViT-B_17", "imagenet21k/ViT-S_16"])
def test_neither_a_file_nor_a_name(folder, name):
    with pytest.raises(ModelError, match=f"no checkpoint at {name}, and it is no published name.*augreg") as error:
        find_checkpoint(name)
    assert "\n" not in str(error.value) and not folder.exists()


# --------------------------------------------------------------------------------------------------- downloads

def some_archive() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, array=np.frombuffer(np.random.default_rng(0).bytes(300_000), np.uint8))
    return stream.getvalue()


CONTENT = some_archive()
SIZE = len(CONTENT)
NAME, FILE = "imagenet21k/R50+ViT-B_16", "imagenet21k/R50+ViT-B_16.npz"


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` for every path; its other attributes say in which way it misbehaves."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.md5 = CONTENT, '"one"', None
        self.status = None             # answer with this status and nothing else
        self.ranges = True             # understands the Range header
        self.whole = False             # answers it with 206 and the whole file
        self.cut_after = None          # closes the connection after so many bytes of the body
        self.chunked = False           # tells no length
        self.greeting = None           # speaks another protocol
        self.requests = []             # (path, Range, If-Range)
        self.answers = []              # statuses


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server: Server = self.server
        self.close_connection = True
        server.requests.append((self.path, self.headers["Range"], self.headers["If-Range"]))
        if server.greeting:
            self.wfile.write(server.greeting)
            return
        status, body = server.status or 200, server.content
        start = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if start and server.ranges and not server.status and self.headers["If-Range"] in (None, server.etag):
            start = int(start[1])
            start = 0 if server.whole else start
            status, body = (206, body[start:]) if start < len(body) else (416, b"")
        server.answers.append(status)
        if status not in (200, 206):
            body = b""
        self.send_response(status)
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.md5:
            self.send_header("x-goog-hash", "crc32c=AAAAAA==")
            self.send_header("x-goog-hash", f"md5={base64.b64encode(server.md5).decode()}")
        self.end_headers()
        sent = body if server.cut_after is None else body[: server.cut_after]
        if server.chunked:
            self.wfile.write(b"%x\r\n" % len(body) + sent)
            if sent == body:
                self.wfile.write(b"\r\n0\r\n\r\n")
        else:
            self.wfile.write(sent)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder, monkeypatch):
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("VIT_CHECKPOINT_URL", f"http://127.0.0.1:{server.server_port}/vit_models")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


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
    fails(folder, f"the connection broke off at 100000 of {SIZE} bytes; run again to go on")
    assert part(folder) == CONTENT[:100_000]
    fails(folder, f"broke off at 200000 of {SIZE}")
    server.cut_after = None
    arrives(folder)
    assert [request[1:] for request in server.requests] == [
        (None, None), ("bytes=100000-", '"one"'), ("bytes=200000-", '"one"')]
    assert server.answers == [200, 206, 206]


def test_another_version_starts_anew(server, folder):
    """Pieces of two versions are never joined."""
    server.cut_after, server.content = 100_000, bytes(SIZE)
    fails(folder, "broke off")
    server.cut_after, server.content, server.etag = None, CONTENT, '"two"'
    arrives(folder)
    assert server.requests[1][1:] == ("bytes=100000-", '"one"') and server.answers == [200, 200]


def test_a_server_without_ranges_sends_all_again(server, folder):
    server.cut_after, server.ranges = 100_000, False
    fails(folder, "broke off")
    server.cut_after = None
    arrives(folder)
    assert server.answers == [200, 200]


def test_without_a_mark_of_the_version_nothing_is_joined(server, folder):
    server.cut_after, server.etag, server.content = 100_000, None, bytes(SIZE)
    fails(folder, "broke off")
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
    fails(folder, "broke off")
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
    fails(folder, "broke off")
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
    fails(folder, "broke off")
    server.cut_after, server.whole = None, True
    try:
        find_checkpoint(NAME)
    except ModelError:
        assert not (folder / FILE).exists()
    else:
        assert (folder / FILE).read_bytes() == CONTENT
