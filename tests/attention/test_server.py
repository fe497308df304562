"""The editor's server, over real sockets: its answers, and the requests that it refuses."""

import http.client
import io
import json
import socket

import numpy as np
import pytest
from galleries import gallery, serving, values_of
from PIL import Image

pytest.importorskip("starlette", reason="needs requirements-annotate.txt")
pytest.importorskip("uvicorn", reason="needs requirements-annotate.txt")

from utils.attention.editor import server
from utils.attention.editor.session import Session

ROWS = [[None, 0, 0.5, 1]] + [[None] * 4] * 3


class Client:
    def __init__(self, port: int, folder):
        self.port, self.folder, self.host = port, folder, f"127.0.0.1:{port}"

    def ask(self, method: str, path: str, body=None, **headers: str):
        """Send a request. Return (status, content, headers). Underscores in names of headers mean hyphens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            content = answer.read()
            kind = answer.headers.get("content-type", "")
            return answer.status, json.loads(content) if kind == "application/json" else content, answer.headers
        finally:
            connection.close()

    def put(self, content, index=2, **headers: str):
        body = json.dumps(content) if isinstance(content, dict) else content
        return self.ask("PUT", f"/api/images/{index}/edit", body, **{"Content_Type": "application/json"} | headers)

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())


def edit(rows=ROWS, revision="", image="train/2.png") -> dict:
    return {"image": image, "revision": revision, "values": rows}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One server for all that is refused: nothing is written."""
    folder = tmp_path_factory.mktemp("shared") / "edits"
    with serving(Session(gallery(unreadable=(9,)), folder)) as port:
        yield Client(port, folder)


@pytest.fixture
def client(tmp_path):
    with serving(Session(gallery(unreadable=(9,)), tmp_path / "edits")) as port:
        yield Client(port, tmp_path / "edits")


def test_the_page_and_its_parts(shared):
    for path, kind, word in (("/", "text/html", b"<canvas"), ("/editor.js", "text/javascript", b"import"),
                             ("/saving.js", "text/javascript", b"Saver"), ("/drawing.js", "text/javascript", b"Board"),
                             ("/editor.css", "text/css", b"@media"), ("/icon.svg", "image/svg+xml", b"<svg")):
        status, content, headers = shared.ask("GET", path)
        assert status == 200 and headers["content-type"].startswith(kind) and word in content, path
        assert b"http://" not in content.replace(b"http://www.w3.org/2000/svg", b"") and b"https://" not in content, path


def test_every_answer_carries_the_headers(shared):
    for path in ("/", "/api/state", "/api/images/0", "/api/images/0/pixels.png", "/nowhere", "/api/images/99"):
        headers = shared.ask("GET", path)[2]
        assert headers["content-security-policy"].startswith("default-src 'self'") and headers["x-frame-options"] == "DENY"
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        assert "server" not in headers and "access-control-allow-origin" not in headers


def test_an_edit_is_saved_before_it_is_answered(client):
    status, answer, _ = client.put(edit())
    assert status == 200 and values_of(client.folder / "train/2.png.json") == ROWS
    assert client.files() == ["train/2.png.json"], "no temporary file is left"
    before, now = (client.ask("GET", "/api/images/2")[1][which] for which in ("own", "now"))
    assert answer["now"] == now != before == answer["own"] and answer["counts"]["edited"] == 1
    assert client.ask("GET", "/api/find?filter=edited&start=0&step=1")[1] == {"index": 2, "position": 0, "total": 1}


def test_an_old_revision_gets_the_current_state(client):
    revision = client.put(edit())[1]["revision"]
    status, answer, _ = client.put(edit([[1] * 4] * 4))
    assert status == 409 and answer["revision"] == revision and answer["values"] == ROWS
    assert values_of(client.folder / "train/2.png.json") == ROWS
    assert client.put(edit([[1] * 4] * 4, revision))[0] == 200


def test_pixels_are_those_that_the_model_sees(client):
    content = client.ask("GET", "/api/images/4/pixels.png")[1]
    assert (np.asarray(Image.open(io.BytesIO(content))) == np.asarray(gallery().picture(4))).all()
    assert client.ask("GET", "/api/images/9/pixels.png")[0] == 422
    assert "cut off" in client.ask("GET", "/api/images/9")[1]["unreadable"]
    assert client.put(edit(image="train/9.png"), 9)[0] == 422


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(("status", "hosts"), [
    (400, ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil", "", "192.168.1.7:{port}", "[::2]",
           "::1", "127.0.0.1:x"]),
    (200, ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST", "[::1]:{port}"])])
def test_only_requests_for_this_machine_are_served(shared, status, hosts):
    for host in hosts:
        for method, path in (("GET", "/api/state"), *([] if status == 200 else [("GET", "/"), ("PUT", "/api/images/2/edit")])):
            assert shared.ask(method, path, Host=host.format(port=shared.port))[0] == status, (host, path)


@pytest.mark.parametrize("headers", [
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}, {"Origin": "https://{host}"},
    {"Origin": "http://{host}.evil.example"}, {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"},
    {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}], ids=str)
def test_changes_by_other_pages_are_refused(shared, headers):
    given = {name: value.format(host=shared.host) for name, value in headers.items()}
    assert shared.put(edit(), **given)[0] == 403 and shared.files() == []
    if "Sec_Fetch_Mode" not in headers:
        assert shared.ask("GET", "/api/images/0/pixels.png", **given)[0] == 403


def test_the_own_page_and_links_to_it_are_served(client):
    own = {"Origin": f"http://{client.host}", "Sec_Fetch_Site": "same-origin"}
    assert client.put(edit(), **own)[0] == 200
    assert client.ask("GET", "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200
    assert client.ask("GET", "/", Sec_Fetch_Site="none", Sec_Fetch_Mode="navigate")[0] == 200


def test_other_content_types_are_refused(shared):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonx"):
        assert shared.put(edit(), Content_Type=kind)[0] == 415 and shared.files() == [], kind


@pytest.mark.parametrize("body", [
    b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"{}", b"[" * 5000, b'{"values": []}', b"1" * 5000,
    json.dumps(edit(revision=3)), json.dumps(edit(image=None)), json.dumps(edit() | {"checksum": None}),
    json.dumps(edit() | {"path": "/etc"}),
    *(json.dumps(edit(rows)) for rows in (
        None, [], {}, "rows", [[None] * 4] * 3, [[None] * 4] * 5, [[None] * 3] * 4, [[[None]] * 4] * 4, ["none"] * 4,
        *([[value] + [None] * 3] + [[None] * 4] * 3 for value in (
            1.5, -0.1, "0.5", True, [], {}, float("nan"), float("inf"), 10 ** 400)))),
    json.dumps(edit()).replace("0.5", "1e999")], ids=lambda body: str(body)[-60:])
def test_anything_but_an_edit_is_refused(shared, body):
    status, answer, _ = shared.put(body)
    assert status == 400 and "\n" not in answer["error"] and shared.files() == []


def test_an_edit_of_a_picture_that_was_replaced_is_refused(client):
    seen = client.ask("GET", "/api/images/2")[1]["checksum"]
    status, answer, _ = client.put(edit() | {"checksum": "sha256:0"})
    assert status == 422 and "replaced" in answer["error"] and client.files() == []
    assert client.put(edit() | {"checksum": seen})[0] == 200
    assert client.put(edit(image="val/3.png"), 3)[0] == 422                # the page of a server with other images


def test_other_addresses_and_methods_are_refused(shared):
    for number in ("12", "-1", "x", "1e0", "9" * 5000, "%2e%2e", "..%2f..%2fetc%2fpasswd", "%D9%A3", "1%20"):
        assert shared.ask("GET", f"/api/images/{number}")[0] == shared.ask("GET", f"/api/images/{number}/pixels.png")[0] == 404
        assert shared.put(edit(), number)[0] == 404 and shared.files() == []
    for path in ("/../editor.py", "/..%2feditor.py", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/page/index.html"):
        assert shared.ask("GET", path)[0] == 404, path
    for query in ("", "filter=all", "filter=x&start=0&step=1", "filter=all&start=a&step=1", "filter=all&start=0&step=1.5",
                  "filter=all&start=" + "9" * 50 + "&step=1"):
        assert shared.ask("GET", f"/api/find?{query}")[0] == 400, query
    for method, path in (("POST", "/api/images/2/edit"), ("DELETE", "/api/images/2/edit"), ("PUT", "/")):
        assert shared.ask(method, path)[0] == 405


@pytest.mark.parametrize("length, body", [
    ("Content-Length: 20000", b" " * 9_300),
    ("Content-Length: 999999999999", b" " * 9_300),                                   # announced but never sent
    ("Transfer-Encoding: chunked", b"4e20\r\n" + b" " * 9_300 + b"\r\n")], ids=["whole", "announced", "chunked"])
def test_oversized_bodies_are_refused(shared, length, body):
    """Before they have been read completely, so that nobody can fill the memory."""
    with socket.create_connection(("127.0.0.1", shared.port), timeout=10) as stream:
        stream.sendall(f"PUT /api/images/2/edit HTTP/1.1\r\nHost: {shared.host}\r\nContent-Type: application/json\r\n"
                       f"{length}\r\n\r\n".encode() + body)
        assert stream.recv(100).startswith(b"HTTP/1.1 413")
    assert shared.ask("GET", "/api/state")[0] == 200 and shared.files() == []


def test_an_incomplete_body_is_not_saved(shared, capfd):
    with socket.create_connection(("127.0.0.1", shared.port), timeout=10) as stream:
        stream.sendall(f"PUT /api/images/2/edit HTTP/1.1\r\nHost: {shared.host}\r\nContent-Type: application/json\r\n"
                       "Content-Length: 500\r\n\r\n".encode() + b'{"image":')
    assert shared.ask("GET", "/api/state")[0] == 200 and shared.files() == []
    assert "Traceback" not in capfd.readouterr().err


def test_an_error_of_the_disk_is_reported_and_can_be_retried(client):
    client.folder.mkdir()
    (client.folder / "train").write_text("in the way")
    status, answer, _ = client.put(edit())
    assert status == 507 and "train" in answer["error"]
    (client.folder / "train").unlink()
    assert client.put(edit())[0] == 200


# ----------------------------------------------------------------------------------------------------- server


def test_a_server_on_all_addresses_refuses_names_of_other_hosts(tmp_path):
    with serving(Session(gallery(), tmp_path), host="0.0.0.0") as port:
        client = Client(port, tmp_path)
        for host, status in (("192.168.1.7:80", 200), ("[fe80::1]:80", 200), (socket.gethostname(), 200),
                             (f"{socket.gethostname()}.local:80", 200), ("evil.local", 400), ("evil.example", 400)):
            assert client.ask("GET", "/api/state", Host=host)[0] == status, host


def test_a_port_in_use_is_reported_in_one_line():
    with server.listen("127.0.0.1", 0) as listening, pytest.raises(server.ServerError, match="Use --port 0 for any free port"):
        server.listen("127.0.0.1", listening.getsockname()[1])
    for host in ("no.such.host.invalid", "203.0.113.1"):                         # an unknown name; not an address of this machine
        with pytest.raises(server.ServerError, match=r"--host 0\.0\.0\.0 for all its addresses") as caught:
            server.listen(host, 0)
        assert host in str(caught.value) and "--port 0 for" not in str(caught.value)


def test_the_addresses_that_are_announced_are_served(tmp_path, capsys):
    with server.listen("127.0.0.1", 0) as listening:
        assert server.announce(listening) == f"http://127.0.0.1:{listening.getsockname()[1]}/"
    assert not capsys.readouterr().err
    with server.listen("0.0.0.0", 0) as listening:
        announced = server.announce(listening).split(" or ")
    assert "warning" in capsys.readouterr().err and announced[0].startswith("http://127.0.0.1:")
    guard = server.Guard(None, "0.0.0.0")
    for address in announced:
        assert guard.refusal("GET", server.Headers({"host": address.removeprefix("http://").rstrip("/")})) is None, address
