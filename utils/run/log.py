"""log.jsonl: the events of a run, one JSON object on each line, appended while it trains; curves and summaries read it."""

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

from utils.files import atomic_write, fsync_path, naming

LOG_FILE = "log.jsonl"


class Log:
    """Appends to the log of the run in `folder`. A line that cannot be written is lost; the first one causes a warning."""

    def __init__(self, folder: Path, warn: Callable[[str], None]):
        """`warn` takes one line. Raises OSError if the file cannot be opened."""
        self._path, self._warn, self._warned = folder / LOG_FILE, warn, False
        self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, event: dict) -> None:
        try:
            self._append(json.dumps(event).encode() + b"\n")
        except OSError as error:
            if not self._warned:
                self._warn(f"warning: cannot write {self._path} ({error.strerror}); events are missing from it until that "
                           "works; training continues")
            self._warned = True

    def _append(self, line: bytes) -> None:
        """Write the whole line or nothing."""
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def close(self) -> None:
        """Raise OSError: some disks report a failed write only here."""
        with naming(self._path):
            os.close(self._file)


def sync_log(folder: Path) -> None:
    """Flush the lines so far to the disk. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        fsync_path(folder / LOG_FILE)


def read_log(folder: Path) -> list[dict]:
    """Return the events of a log without unreadable lines; [] if there is no log."""
    return scan_log(folder)[0]


def scan_log(folder: Path) -> tuple[list[dict], int]:
    """-> (events, number of unreadable lines). A last line that a crash cut off does not count."""
    try:
        *lines, last = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return [], 0
    events = [_event(line) for line in lines if line.strip()]
    return [event for event in [*events, _event(last)] if event is not None], events.count(None)


def _event(line: str) -> dict | None:
    """Return a JSON object with the name of its event, and for an evaluation of its split; None for any other line."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):          # also for numbers and nesting that are too large for Python
        return None
    names = ("event", "split") if isinstance(event, dict) and event.get("event") == "eval" else ("event",)
    return event if isinstance(event, dict) and all(isinstance(event.get(name), str) for name in names) else None


def events_until(folder: Path, step: int) -> list[dict]:
    """Return the events up to a step: each training step once and in order, even if lines are damaged or repeated."""
    kept, last = [], 0
    for event in read_log(folder):
        at, is_step = event.get("step"), event.get("event") == "train"
        if isinstance(at, int) and at <= step and not (is_step and at <= last):
            last = at if is_step else last
            kept.append(event)
    return kept


def write_log(folder: Path, events: list[dict]) -> None:
    """Replace the whole log. Raises StorageError."""
    text = "".join(json.dumps(event) + "\n" for event in events)
    atomic_write(folder / LOG_FILE, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
