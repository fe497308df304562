"""Downloads one file over HTTP: with a progress bar, resuming where an earlier try was cut off, whole or not at all.

What arrives is checked before it gets its name: against the server's own checksum where it sends one, against the digits of
the checksum that the publisher names, and for its kind, since a network may answer with a sign-in page.
"""

import base64
import contextlib
import fcntl
import hashlib
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from models.errors import WeightsError

TIMEOUT_S = 30
CHUNK = 1 << 20
# suffix: (what the file is, whether this can be its beginning)
KINDS = {
    ".npz": ("an .npz archive", lambda start: start.startswith(b"PK")),
    ".pth": ("a file of PyTorch", lambda start: start.startswith((b"PK", b"\x80"))),
    ".bin": ("a file of PyTorch", lambda start: start.startswith((b"PK", b"\x80"))),
    ".safetensors": ("a file of safetensors", lambda start: start[4:9] == b"\0\0\0\0{"),
    ".json": ("JSON", lambda start: start.lstrip().startswith(b"{")),
    ".csv": ("AugReg's table", lambda start: {b"ds", b"final_val", b"filename"} <= set(start.splitlines()[0].split(b","))),
}

NO_HEADERS: Mapping[str, str] = {}


class DownloadError(WeightsError):
    """A file that is not here cannot be downloaded either."""

    reason = ""
    status = 0                          # of HTTP, where the server refused
    code = ""                           # the hub's own word for it, such as GatedRepo


def check_reachable(url: str, path: Path, headers: Mapping = NO_HEADERS) -> int:
    """Asks for the head of `url` unless its file is at `path`: where nothing answers, that is known before other work is done.
    Raises DownloadError, as `download` does; what a server refuses is left to that, and its status is returned (0: nothing)."""
    if path.is_file():
        return 0
    try:
        with _ask(url, headers, "HEAD"):
            return 0
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, HTTPException, ValueError) as error:
        raise _failed(url, path, error) from error


def _failed(url: str, path: Path, error: Exception) -> DownloadError:
    cause = getattr(error, "reason", None) or error
    reason = " ".join(str(getattr(cause, "strerror", None) or cause).split())
    table = ", and then the file that it names for the size" if path.suffix == ".csv" else ""
    failed = DownloadError(f"could not download {url} ({reason}); download it on another machine and put it at {path}{table}")
    failed.reason = reason
    if isinstance(error, urllib.error.HTTPError):
        failed.status, failed.code = error.code, error.headers.get("X-Error-Code") or ""
    return failed


def download(url: str, path: Path, checksum: str = "", headers: Mapping = NO_HEADERS) -> Path:
    """Downloads `url` to `path`, whose suffix is one of KINDS, unless it is there, and returns it. Of several processes one does.

    What has arrived is kept in PATH.part, and the server's mark of that version in PATH.part.etag, so that parts of
    two versions are never joined. checksum: "sha256:..." or "md5:...", with as many of its first digits as are known. headers: of
    the request; an Authorization among them goes to no other server, wherever this one sends us.
    Raises DownloadError with the URL and the path to put the file at by hand, or WeightsError for a fault of the disk.
    """
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock")
        with open(lock, "w", encoding="utf-8") as stream:
            fcntl.lockf(stream, fcntl.LOCK_EX)       # released when the stream closes, or the process ends
            if not path.is_file():
                _download(url, path, checksum, headers)
            lock.unlink(missing_ok=True)             # not after an error: others may wait for this file, a new one would be free
    except WeightsError:                                      # of the disk
        raise
    except (OSError, HTTPException, ValueError) as error:     # no network, not HTTP, not a URL, no folder
        raise _failed(url, path, error) from error
    return path


def _download(url: str, path: Path, checksum: str, headers: Mapping) -> None:
    part, mark = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.etag")
    with _open(url, part, mark, headers) as response:
        have = part.stat().st_size if response.status == 206 else 0
        if response.headers.get("ETag"):
            mark.write_text(response.headers["ETag"], encoding="utf-8")
        total = _receive(response, part, have, path.name)
        if total is not None and part.stat().st_size != total:
            raise OSError(f"the connection was cut off at {part.stat().st_size} of {total} bytes; run again to resume")
        fault = _find_fault(part, path.suffix, response, checksum)
    if fault:
        part.unlink()
        raise OSError(fault)
    os.replace(part, path)
    mark.unlink(missing_ok=True)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows them, a token to no other server; `linked` is the mark of the file that the hub sends with the first answer."""

    linked = None

    def redirect_request(self, request, stream, code, message, headers, url):
        self.linked = self.linked or headers.get("X-Linked-Etag")
        then = super().redirect_request(request, stream, code, message, headers, url)
        if then is not None and urllib.parse.urlsplit(url)[:2] != urllib.parse.urlsplit(request.full_url)[:2]:
            then.remove_header("Authorization")
        return then


def _ask(url: str, headers: Mapping, method: str = "GET") -> HTTPResponse:
    redirects = _Redirects()
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    response = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT_S)
    response.linked = redirects.linked or response.headers.get("X-Linked-Etag")
    return response


def _open(url: str, part: Path, mark: Path, headers: Mapping) -> HTTPResponse:
    """The response to a request for the whole file, or (status 206) for what `part` lacks of it."""
    have = part.stat().st_size if part.exists() and mark.exists() else 0
    if have:
        rest = {"Range": f"bytes={have}-", "If-Range": mark.read_text(encoding="utf-8")}
        try:
            response = _ask(url, {**headers, **rest})
        except urllib.error.HTTPError as error:
            if error.code != 416:                             # 416: nothing follows what is here
                raise
        else:
            if response.status != 206 or response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                return response
            response.close()                                  # a part, but not the one that was asked for
        part.unlink()
    return _ask(url, headers)


def _receive(response: HTTPResponse, part: Path, have: int, title: str) -> int | None:
    """Appends the body to `part`; returns the length of the whole file if the server sent it."""
    from tqdm import tqdm

    length = response.headers.get("Content-Length")
    total = have + int(length) if length else None
    with open(part, "ab" if have else "wb") as stream, tqdm(
            total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024, desc=f"downloading {title}") as bar:
        while chunk := response.read(CHUNK):
            with _naming(part):
                stream.write(chunk)
            bar.update(len(chunk))
        with _naming(part):
            stream.flush()
            os.fsync(stream.fileno())
    return total


@contextlib.contextmanager
def _naming(part: Path) -> Iterator[None]:
    """An error of the disk is not one of the network: what has arrived is there, and the same command continues."""
    try:
        yield
    except OSError as error:
        raise WeightsError(f"cannot write {part} ({error.strerror}); make room, and run again to resume") from error


def _find_fault(part: Path, suffix: str, response: HTTPResponse, checksum: str) -> str | None:
    """What is wrong with a downloaded file, or None. Google's storage sends an MD5 in `x-goog-hash`, the hub the SHA-256 of a
    large file as its mark."""
    digests = {"md5": hashlib.md5(), "sha256": hashlib.sha256()}
    with open(part, "rb") as stream:
        start = stream.read(4096)
        stream.seek(0)
        while chunk := stream.read(CHUNK):
            for digest in digests.values():
                digest.update(chunk)
    sent = [word.strip() for line in response.headers.get_all("x-goog-hash") or [] for word in line.split(",")]
    md5 = next((word.removeprefix("md5=") for word in sent if word.startswith("md5=")), None)
    if md5 not in (None, base64.b64encode(digests["md5"].digest()).decode()):
        return "what arrived does not match the server's MD5; run again to download it again"
    linked = (response.linked or "").strip('W/"')
    if re.fullmatch("[0-9a-f]{64}", linked) and linked != digests["sha256"].hexdigest():
        return "what arrived does not match the server's SHA-256; run again to download it again"
    kind, fits = KINDS[suffix]
    if not start or not fits(start):
        return f"what arrived is not {kind}; perhaps a sign-in page of the network"
    algorithm, _, digits = checksum.partition(":")
    if digits and not digests[algorithm].hexdigest().startswith(digits):
        return f"what arrived does not match the publisher's {algorithm.upper()} ({digits}...); run again to download it again"
    return None
