"""Published checkpoints by name: found in ./checkpoint, or downloaded into it.

Google's files stand at https://storage.googleapis.com/vit_models/FOLDER/FILE.npz (google-research/vision_transformer,
README). MODEL_ZOO.md lists them with sizes and accuracies. VIT_CHECKPOINT_URL names another server with the same
tree (a mirror), VIT_CHECKPOINT_DIR another folder than ./checkpoint.
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
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

from .vit import ModelError

SERVER = "https://storage.googleapis.com/vit_models"
VIT_2020 = ["ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-B_8", "R50+ViT-B_16"]
PUBLISHED = {
    "imagenet21k": [*VIT_2020, "ViT-H_14", "R26+ViT-B_32", "R50+ViT-L_32"],
    "imagenet21k+imagenet2012": [*VIT_2020, "ViT-B_16-224", "ViT-L_16-224"],
    "sam": ["ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-S_16"],
}
# AugReg has over 50,000 files; their names hold the settings they were trained with.
AUGREG = re.compile(r"(Ti_16|S_32|S_16|B_32|B_16|B_8|L_16|R_Ti_16|R26_S_32|R50_L_32)-[a-zA-Z0-9._-]+")
TIMEOUT_S = 30
CHUNK = 1 << 20


def published_name(name: str) -> str | None:
    """'ViT-B_16' -> 'imagenet21k/ViT-B_16'; None for what is no published name.

    Our spelling of a hybrid (R50-ViT-B_16) is accepted beside the file's (R50+ViT-B_16).
    """
    folder, _, file = name.removesuffix(".npz").rpartition("/")
    file = re.sub(r"^(R\d+)-(?=ViT)", r"\1+", file)
    if folder == "augreg" and AUGREG.fullmatch(file):
        return f"augreg/{file}"
    folder = folder or "imagenet21k"
    return f"{folder}/{file}" if file in PUBLISHED.get(folder, []) else None


def url_of(name: str) -> str:
    server = os.environ.get("VIT_CHECKPOINT_URL", SERVER).rstrip("/")
    return f"{server}/{urllib.parse.quote(name)}.npz"          # quotes the plus, which is a space in some servers


def find_checkpoint(name_or_path: str | Path) -> Path:
    """The local file for a path or a published name, downloading it if need be. Raises ModelError.

    An existing path always wins. Without a folder the name means imagenet21k.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    name = published_name(str(name_or_path))
    if name is None:
        raise ModelError(
            f"no checkpoint at {name_or_path}, and it is no published name: those are FOLDER/FILE with FOLDER one of "
            f"{', '.join(PUBLISHED)}, augreg (MODEL_ZOO.md lists them)")
    checkpoints = Path(os.environ.get("VIT_CHECKPOINT_DIR", "checkpoint"))
    own_place = checkpoints / f"{name}.npz"
    # A file put there by hand, as the ViT-pytorch scripts have it, can only mean the folder-less name.
    by_hand = checkpoints / f"{Path(name).name}.npz"
    for path in (own_place, by_hand) if name.startswith("imagenet21k/") else (own_place,):
        if path.is_file():
            return path
    with _one_at_a_time(own_place):
        if not own_place.is_file():              # another process may have fetched it while this one waited
            download(url_of(name), own_place)
    return own_place


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Two runs that miss the same file must not write into the same unfinished one."""
    lock = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(lock, "w")
    except OSError as error:
        raise ModelError(f"could not download {url_of(f'{path.parent.name}/{path.stem}')} (cannot write {path.parent}: "
                         f"{error.strerror}); fetch it on another machine and put it at {path}") from error
    with stream:
        fcntl.lockf(stream, fcntl.LOCK_EX)       # given back when the stream closes, or the process ends
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def download(url: str, path: Path) -> None:
    """Fetches an .npz file to `path`: with a progress bar, going on where an earlier try broke off, whole or not at all.

    What has arrived waits in PATH.part, and the server's mark of that version in PATH.part.etag, so that pieces of
    two versions are never joined. Raises ModelError with the URL and the place to put the file by hand.
    """
    part, mark = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.etag")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open(url, part, mark) as response:
            have = part.stat().st_size if response.status == 206 else 0
            if response.headers.get("ETag"):
                mark.write_text(response.headers["ETag"])
            total = _receive(response, part, have, path.name)
            if total is not None and part.stat().st_size != total:
                raise OSError(f"the connection broke off at {part.stat().st_size} of {total} bytes; run again to go on")
            _verify(part, response.headers)
        os.replace(part, path)
    except (OSError, HTTPException, ValueError) as error:     # no network, full disk, not HTTP, not a URL
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise ModelError(f"could not download {url} ({reason}); fetch it on another machine and put it at {path}") from error
    mark.unlink(missing_ok=True)


def _open(url: str, part: Path, mark: Path):
    """The response to a request for the whole file, or (status 206) for what `part` lacks of it."""
    have = part.stat().st_size if part.exists() and mark.exists() else 0
    if have:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "If-Range": mark.read_text()})
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code != 416:                             # 416: nothing follows what is here
                raise
        else:
            if response.status != 206 or response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                return response
            response.close()                                  # a part, but not the one that was asked for
        part.unlink()
    return urllib.request.urlopen(url, timeout=TIMEOUT_S)


def _receive(response, part: Path, have: int, title: str) -> int | None:
    """Appends the body to `part`; returns the length of the whole file if the server told it."""
    from tqdm import tqdm

    length = response.headers.get("Content-Length")
    total = have + int(length) if length else None
    with open(part, "ab" if have else "wb") as stream, tqdm(
            total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024, desc=f"downloading {title}") as bar:
        while chunk := response.read(CHUNK):
            stream.write(chunk)
            bar.update(len(chunk))
        stream.flush()
        os.fsync(stream.fileno())
    return total


def _verify(part: Path, headers) -> None:
    """As the MD5 says that Google's storage sends in `x-goog-hash`, and an archive, no sign-in page. Raises OSError."""
    with open(part, "rb") as stream:
        start = stream.read(2)
        digest = hashlib.md5(start)
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    sent = [word.strip() for line in headers.get_all("x-goog-hash") or [] for word in line.split(",")]
    md5 = next((word.removeprefix("md5=") for word in sent if word.startswith("md5=")), None)
    if md5 not in (None, base64.b64encode(digest.digest()).decode()):
        part.unlink()
        raise OSError("what arrived does not match the server's MD5; run again to fetch it anew")
    if start != b"PK":
        part.unlink()
        raise OSError("what arrived is no .npz archive; a sign-in page of the network, perhaps")
