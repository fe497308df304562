"""log.jsonl: the events of a run, one JSON object a line, appended while it trains and read by everything that draws or sums up.

No line is lost or torn while the run lives: on a disk that is full or gone, lines wait in memory until it works again.
"""

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from .checkpoint import replace

LOG_FILE = "log.jsonl"
RETRY_SECONDS = 1.0        # between attempts on a disk that fails: one for every step would cost time


class LogError(ValueError):
    """A log that cannot be read: one line."""


class Log:
    """Appends to the log of the run in `folder`. Once it is open, nothing that happens to the disk is an error."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        """`say` takes one line, of trouble and of its end. Raises OSError if the file cannot be opened."""
        self._path, self._say = folder / LOG_FILE, say
        self._waiting: list[bytes] = []
        self._retry_at: float | None = None            # None: all is well
        self._file = self._open()

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, event: dict) -> None:
        self._waiting.append(json.dumps(event).encode() + b"\n")
        if self._retry_at is None or time.monotonic() >= self._retry_at:
            self._flush()

    def close(self) -> None:
        self._flush()
        if self._waiting:
            self._say(f"warning: {len(self._waiting)} events are not in {self._path}: it cannot be written")
        os.close(self._file)

    def _flush(self) -> None:
        try:
            self._return_if_gone()
            self._append(b"".join(self._waiting))
        except OSError as error:
            if self._retry_at is None:
                self._say(f"warning: cannot write {self._path} ({error.strerror}); its lines wait in memory, training goes on")
            self._retry_at = time.monotonic() + RETRY_SECONDS
            return
        if self._retry_at is not None:
            self._say(f"{self._path} is written again, with the {len(self._waiting)} lines that waited")
        self._waiting, self._retry_at = [], None

    def _append(self, lines: bytes) -> None:
        """All of them or none."""
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def _return_if_gone(self) -> None:
        """Where the file was deleted, perhaps with its folder: it is still ours to read, and its lines begin the new one."""
        try:
            if os.path.samestat(os.stat(self._path), os.fstat(self._file)):
                return
        except FileNotFoundError:
            pass
        fresh = self._open()
        with contextlib.suppress(OSError):             # on a network the deleted file may be out of reach
            if os.fstat(fresh).st_size == 0:
                self._waiting.insert(0, os.pread(self._file, os.fstat(self._file).st_size, 0))
        os.close(self._file)
        self._file = fresh


def sync_log(folder: Path) -> None:
    """After this the lines so far are on the disk, whatever happens to the machine. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), open(folder / LOG_FILE, "rb") as stream:
        os.fsync(stream.fileno())


def read_log(folder: Path) -> list[dict]:
    """Its events, without those lines that are none; [] where there is no log."""
    return scan_log(folder)[0]


def scan_log(folder: Path) -> tuple[list[dict], int]:
    """-> (events, number of lines that are none). A last line that was cut off by a crash does not count."""
    try:
        *lines, last = (folder / LOG_FILE).read_text(errors="replace").split("\n")
    except FileNotFoundError:
        return [], 0
    events = [_event(line) for line in lines if line.strip()]
    return [event for event in [*events, _event(last)] if event is not None], events.count(None)


def _event(line: str) -> dict | None:
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) else None


def events_until(folder: Path, step: int) -> list[dict]:
    """Those that a run goes on after: each step once and in order, whatever a disk has spoilt or doubled. Raises LogError."""
    try:
        events = read_log(folder)
    except (ValueError, RecursionError) as error:          # numbers and nesting beyond what Python reads
        raise LogError(f"{folder / LOG_FILE}: {error}: take the damaged line out") from error
    kept, last = [], 0
    for event in events:
        at, trains = event.get("step"), event.get("event") == "train"
        if isinstance(at, int) and at <= step and not (trains and at <= last):
            last = at if trains else last
            kept.append(event)
    return kept


def write_log(folder: Path, events: list[dict]) -> None:
    """Replaces it in one go. Raises StorageError."""
    text = "".join(json.dumps(event) + "\n" for event in events)
    replace(folder / LOG_FILE, lambda unfinished: unfinished.write_text(text))
