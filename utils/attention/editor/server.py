"""The editor of attention as a web application: the addresses, the refusals, and the server.

The page is page/; a `Session` (session.py) answers its requests. All of them pass `Guard`, because any page that the user
has open may send requests to a port of this machine: only requests for this host from the editor's own page are answered. This
also prevents DNS rebinding, where the Host header names the foreign page's host.

    GET  /, and the files of the page
    GET  /api/state                                         facts about all images, and the progress
    GET  /api/find?filter=edited&start=17&step=1            the next image of a filter
    GET  /api/images/{number}                               image, edit, revision, maps, prediction
    GET  /api/images/{number}/pixels.png                    the part of the image that the model sees, in its own pixels
    PUT  /api/images/{number}/edit                          {"image": name, "revision": "...", "values": rows of 0..1 or null,
                                                             "checksum": of the picture that was painted on; optional}
"""

import contextlib
import errno
import io
import ipaddress
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from utils.attention.edits import EditError, parse_values
from utils.data.splits import ImageError

from .session import FILTERS, Session

PAGE = Path(__file__).parent / "page"
FILES = {"/": ("index.html", "text/html"), "/editor.css": ("editor.css", "text/css"), "/icon.svg": ("icon.svg", "image/svg+xml"),
         **{f"/{name}": (name, "text/javascript") for name in ("editor.js", "saving.js", "drawing.js")}}
LOOPBACK, EVERYWHERE = ("127.0.0.1", "localhost", "::1"), ("0.0.0.0", "::")
HEADERS = {"Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
           "X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
           "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
           "Cache-Control": "no-store"}


class Refusal(Exception):
    """A request that is answered with an error: status and one line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class SentEdit(NamedTuple):
    """An edit as the page sends it."""

    image: str
    checksum: str           # of the picture that was painted on, or ""
    revision: str
    values: np.ndarray      # (h, w) float32
    edited: np.ndarray      # (h, w) bool


class ServerError(ValueError):
    """Raised when the server cannot be started."""

    exit_code = 2


# ------------------------------------------------------------------------------------------------- application


def application(session: Session, host: str = "127.0.0.1") -> "Guard":
    """Return the ASGI application. `host` is the address at which it is served; requests may be for this host."""
    routes = [Route(address, partial(_file, *file)) for address, file in FILES.items()]
    routes += [Route("/api/state", lambda request: JSONResponse(session.state())), Route("/api/find", partial(_find, session)),
               Route("/api/images/{number}", partial(_image, session)),
               Route("/api/images/{number}/pixels.png", partial(_pixels, session)),
               Route("/api/images/{number}/edit", partial(_edit, session), methods=["PUT"])]
    handlers = dict.fromkeys((Refusal, ImageError, EditError, OSError), _failed)
    return Guard(Starlette(routes=routes, exception_handlers=handlers), host)


def _failed(request: Request, error: Exception) -> Response:
    """After an error of the disk (507) the page tries again: there may be room later."""
    if isinstance(error, OSError):
        return JSONResponse({"error": f"{error.filename or 'the disk'}: {error.strerror or error}"}, 507)
    status = 422 if isinstance(error, ImageError) else 507 if isinstance(error, EditError) else error.status
    return JSONResponse({"error": str(error)}, status)


def _file(name: str, kind: str, request: Request) -> Response:
    return Response((PAGE / name).read_bytes(), media_type=kind)


def _index(session: Session, request: Request) -> int:
    number, count = request.path_params["number"], len(session.gallery.labels)
    if not re.fullmatch("[0-9]{1,12}", number) or int(number) >= count:
        raise Refusal(404, f"no such image: there are 0 to {count - 1}")
    return int(number)


def _find(session: Session, request: Request) -> Response:
    kind, *numbers = (request.query_params.get(name, "") for name in ("filter", "start", "step"))
    if kind not in FILTERS or not all(re.fullmatch("-?[0-9]{1,12}", number) for number in numbers):
        raise Refusal(400, f"find needs filter ({', '.join(FILTERS)}), start and step")
    start, step = map(int, numbers)
    return JSONResponse(session.find(kind, start, max(-1, min(step, 1))))


def _image(session: Session, request: Request) -> Response:
    index, checksum = _index(session, request), ""
    with contextlib.suppress(ImageError):
        checksum = session.gallery.checksum(index)
    return JSONResponse(session.image(index) | {"checksum": checksum})


def _pixels(session: Session, request: Request) -> Response:
    stream = io.BytesIO()
    session.gallery.picture(_index(session, request)).save(stream, "PNG", compress_level=1)
    return Response(stream.getvalue(), media_type="image/png")


async def _edit(session: Session, request: Request) -> Response:
    index = _index(session, request)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "an edit is sent as application/json")
    h, w = session.gallery.grid
    try:
        body = await _body(request, 8192 + 64 * h * w)
    except ClientDisconnect:
        return Response(status_code=400)
    sent = read_edit(body, (h, w))
    if sent.image != session.gallery.name(index):
        raise Refusal(422, f"image {index} is {session.gallery.name(index)} here: the page shows other images. Reload it")
    return await run_in_threadpool(_saved, session, index, sent)


def _saved(session: Session, index: int, sent: SentEdit) -> Response:
    """Save the edit to the disk before it answers."""
    with contextlib.suppress(ImageError):
        if sent.checksum and sent.checksum != session.gallery.checksum(index):
            raise Refusal(422, "the picture was replaced after it was shown. Reload the page; your next stroke saves everything")
    saved = session.save(index, sent.revision, sent.values, sent.edited)
    if saved is None:
        return JSONResponse({"error": "the edit was changed elsewhere"} | session.image(index), 409)
    return JSONResponse(saved | session.outcome(index, sent.values, sent.edited))


async def _body(request: Request, limit: int) -> bytes:
    """Read at most `limit` bytes, whatever Content-Length claims. Raises Refusal."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise Refusal(413, f"an edit of this model is at most {limit} bytes")
    return bytes(body)


def read_edit(body: bytes, grid: tuple[int, int]) -> SentEdit:
    """Raise Refusal."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the edit is not JSON") from error
    texts = {name: content.pop(name, "" if name == "checksum" else None) for name in ("image", "checksum", "revision")
             } if isinstance(content, dict) else {}
    if not texts or content.keys() != {"values"} or not all(isinstance(text, str) for text in texts.values()):
        raise Refusal(400, 'an edit is {"image": text, "revision": text, "values": rows}')
    try:
        values, edited = parse_values(content["values"], *grid)
    except ValueError as error:
        raise Refusal(400, str(error)) from error
    return SentEdit(**texts, values=values, edited=edited)


class Guard:
    """Refuses requests for another host or from other pages; adds the headers to every answer."""

    def __init__(self, app, host: str):
        self.app, self.host = app, host.lower()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return

        async def with_headers(message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self.refusal(scope["method"], Headers(scope=scope))
        app = JSONResponse({"error": refusal[1]}, refusal[0]) if refusal else self.app
        await app(scope, receive, with_headers)

    def refusal(self, method: str, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self.serves(re.sub(r":\d+$", "", host).strip("[]").lower()):
            return 400, "this server is not for that host"
        # A link from another page to this one is harmless; what other pages load or send is not.
        site, origin = headers.get("sec-fetch-site", "same-origin"), headers.get("origin", f"http://{host}")
        followed = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if not followed and (site not in ("same-origin", "none") or origin.lower() != f"http://{host}".lower()):
            return 403, "only the editor's own page may ask for this"
        return None

    def serves(self, host: str) -> bool:
        if host in LOOPBACK or host == self.host:
            return True
        if self.host not in EVERYWHERE:
            return False
        # The server listens on every address. An address cannot be rebound to another machine; a name can, except our own.
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(host))
        name = socket.gethostname().lower()
        return host in (name, f"{name.partition('.')[0]}.local")          # .local: what the local network calls it (mDNS)


# ------------------------------------------------------------------------------------------------------ server


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0: any free port. Raises ServerError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except (OSError, UnicodeError, OverflowError) as error:
        reason, code = getattr(error, "strerror", None) or error, getattr(error, "errno", None)
        advice = "--host 127.0.0.1 is for this machine only, --host 0.0.0.0 for all its addresses"
        if code in (errno.EADDRINUSE, errno.EACCES):
            advice = "Use --port 0 for any free port"
        raise ServerError(f"--host {host} --port {port}: cannot listen there: {reason}. {advice}") from error


def announce(listening: socket.socket) -> str:
    """Return the addresses of the page, this machine's first; warn if other machines can reach it."""
    host, port = listening.getsockname()[:2]
    hosts = [host]
    if host in EVERYWHERE:
        hosts = ["::1" if ":" in host else "127.0.0.1", socket.gethostname()]
        # Finds the address from which this machine reaches others; nothing is sent. RFC 5737 and RFC 3849 reserve the addresses.
        with contextlib.suppress(OSError), socket.socket(listening.family, socket.SOCK_DGRAM) as probe:
            probe.connect(("2001:db8::1" if ":" in host else "192.0.2.1", 9))
            hosts.append(probe.getsockname()[0])
    if host not in LOOPBACK:
        print(f"warning: --host {host}: everyone who can reach this machine can see these images and change their edits",
              file=sys.stderr)
    return " or ".join(f"http://{f'[{name}]' if ':' in name else name}:{port}/" for name in hosts)


def server(session: Session, host: str) -> uvicorn.Server:
    """Return the server. It uses h11, which is plain Python: fast enough for one person, and installs everywhere."""
    return uvicorn.Server(uvicorn.Config(
        application(session, host), log_level="warning", access_log=False, server_header=False, ws="none", lifespan="off",
        http="h11", limit_concurrency=64, timeout_graceful_shutdown=3))


def serve(session: Session, listening: socket.socket, host: str) -> None:
    """Serve until Ctrl-C."""
    with searching(session), contextlib.suppress(KeyboardInterrupt):
        server(session, host).run(sockets=[listening])


@contextlib.contextmanager
def searching(session: Session) -> Iterator[None]:
    """Search for misclassified images in a thread during the block."""
    stop = threading.Event()
    thread = threading.Thread(target=session.search, args=(stop,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(5)
