"""Downloads one file over HTTP, with a progress bar. A download that was cut off is resumed; a file gets its name when complete.

Before that, it is checked against the server's checksum, if it sends one, against the known digits of the publisher's checksum,
and for its kind, since a network may answer with a sign-in page.
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
# suffix: (kind of file, whether a file of this kind can begin with these bytes)
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
    """Raised when a missing file cannot be downloaded."""

    reason = ""
    status = 0                          # the HTTP status, if the server answered with an error
    code = ""                           # the hub's error code, such as GatedRepo


def check_reachable(url: str, path: Path, headers: Mapping = NO_HEADERS) -> int:
    """Send a HEAD request for `url` unless `path` exists, so that an unreachable server is found before other work is done.

    Returns the HTTP status of a refusal, else 0. Raises DownloadError if no server answers.
    """
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
    """Download `url` to `path`, whose suffix is one of KINDS, unless it exists; return `path`.

    If several processes ask for the file, one downloads it and the others wait. An incomplete file is kept in PATH.part, and the
    ETag of its version in PATH.part.etag, so that parts of two versions are never joined.

    checksum: "sha256:..." or "md5:...", with as many of its first digits as are known.
    headers: of the request; an Authorization header is not sent to another server after a redirect.
    Raises DownloadError with the URL and the path to put the file at by hand, or WeightsError if the disk fails.
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
            lock.unlink(missing_ok=True)             # not after an error: others may wait for this very lock
    except WeightsError:                                      # the disk failed
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
    """Follows redirects without sending the token to another server; `linked` is the ETag that the hub sends before the first."""

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
    """Request the whole file, or (status 206) only what `part` lacks of it; return the response."""
    have = part.stat().st_size if part.exists() and mark.exists() else 0
    if have:
        rest = {"Range": f"bytes={have}-", "If-Range": mark.read_text(encoding="utf-8")}
        try:
            response = _ask(url, {**headers, **rest})
        except urllib.error.HTTPError as error:
            if error.code != 416:                             # 416: the file has no bytes after those in `part`
                raise
        else:
            if response.status != 206 or response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                return response
            response.close()                                  # it begins at another byte than requested
        part.unlink()
    return _ask(url, headers)


def _receive(response: HTTPResponse, part: Path, have: int, title: str) -> int | None:
    """Append the body to `part`; return the length of the whole file if the server sent it, else None."""
    from tqdm import tqdm

    length = response.headers.get("Content-Length")
    total = have + int(length) if length else None
    with open(part, "ab" if have else "wb") as stream, tqdm(
            total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024, desc=f"downloading {title}") as bar:
        while chunk := response.read(CHUNK):
            with _report_disk_errors(part):
                stream.write(chunk)
            bar.update(len(chunk))
        with _report_disk_errors(part):
            stream.flush()
            os.fsync(stream.fileno())
    return total


@contextlib.contextmanager
def _report_disk_errors(part: Path) -> Iterator[None]:
    """Raise WeightsError, not DownloadError, if the disk fails: what has arrived is kept, and the same command resumes."""
    try:
        yield
    except OSError as error:
        raise WeightsError(f"cannot write {part} ({error.strerror}); free some space, and run again to resume") from error


def _find_fault(part: Path, suffix: str, response: HTTPResponse, checksum: str) -> str | None:
    """Return what is wrong with a downloaded file, or None.

    Google's storage sends an MD5 in `x-goog-hash`; the hub sends the SHA-256 of a large file as its ETag.
    """
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
        return "the downloaded file does not match the server's MD5; run again to download it again"
    linked = (response.linked or "").strip('W/"')
    if re.fullmatch("[0-9a-f]{64}", linked) and linked != digests["sha256"].hexdigest():
        return "the downloaded file does not match the server's SHA-256; run again to download it again"
    kind, fits = KINDS[suffix]
    if not start or not fits(start):
        return f"the downloaded file is not {kind}; perhaps it is a sign-in page of the network"
    algorithm, _, digits = checksum.partition(":")
    if digits and not digests[algorithm].hexdigest().startswith(digits):
        return (f"the downloaded file does not match the publisher's {algorithm.upper()} ({digits}...); run again to download "
                "it again")
    return None
