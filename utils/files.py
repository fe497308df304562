"""Writes files completely or not at all, reports disk errors in one line, writes CSV tables, and locks folders."""

import contextlib
import csv
import errno
import fcntl
import io
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

LOCK_FILE = ".lock"
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
OWNER_SECONDS = 2.0       # how long the owner of a lock may take to write its name into the file

REFUSED = (BlockingIOError, PermissionError)         # of a lock: EAGAIN, EACCES
_acquired: dict[int, int] = {}          # descriptors of acquired locks -> the process that acquired them


class StorageError(ValueError):
    """Raised when a file cannot be written: no space, no permission, a missing folder."""

    exit_code = 3


class InUseError(ValueError):
    """Raised when another process is using the folder."""

    exit_code = 7


def where_looked(path: str | Path) -> str:
    """Explain why the path does not exist, for the end of a message: ' (...)'; '' if it exists. A relative path is relative to
    the current folder, which may not be the one in which the script was called; a link may be broken."""
    path = Path(path)
    if path.exists():
        return ""
    why = [dead_link(path)]
    if not path.is_absolute():
        here, called = Path.cwd(), os.environ.get("VIT_CALLED_FROM")
        there = Path(called or here, path)
        what = f"{there} exists" if there.exists() else dead_link(there) if there != here / path else ""
        why.append(f"searched in {here}" + (what and f", because relative paths start at the script's folder; {what}"))
    return f" ({'; '.join(filter(None, why))})" if any(why) else ""


def dead_link(path: str | Path) -> str:
    """Describe the broken link on the way to the path, for a message; '' if there is none."""
    parts = (part for part in (Path(path), *Path(path).parents) if part.is_symlink() and not part.exists())
    return next((f"{part} is a link to {os.readlink(part)}, which does not exist" for part in parts), "")


def no_folder(path: str | Path) -> str:
    """Describe what is wrong with a path that is not a folder, and what to do, for the end of a message."""
    if Path(path).exists():
        is_packed = str(path).lower().endswith(ARCHIVES)
        return "an archive, not a folder. Unpack it and use the unpacked folder" if is_packed else "a file, not a folder"
    return f"no such folder{where_looked(path)}"


def is_stream(path: str | Path) -> bool:
    """Whether the path exists but is neither a file nor a folder: a device, such as /dev/null, or a named pipe."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def image_folder(image_dir: str, data_dir: str | Path) -> str | None:
    """Return the folder that --image_dir means: relative to data_dir or, if it does not exist there, to the current folder."""
    return next((place for place in (os.path.join(data_dir, image_dir), image_dir) if os.path.isdir(place)), None)


def no_image_folder(image_dir: str, data_dir: str | Path) -> str:
    """Return the message if there is no such folder."""
    there = next((place for place in (os.path.join(data_dir, image_dir), image_dir) if os.path.exists(place)), None)
    found = f"{there} is {no_folder(there)}" if there else dead_link(os.path.join(data_dir, image_dir)) or dead_link(image_dir)
    return f"--image_dir {image_dir}: {found or f'no such folder in {data_dir} or in {os.getcwd()}'}"


def located(path: str | Path) -> str:
    """Return the path for a message, with the reason if it does not exist."""
    return f"{path}{where_looked(path)}"


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name next to `path`, flush the file to the disk and rename it to `path`.

    When this returns, the file is on the disk. Until then, and after an error, the previous file (or none) is there. The
    temporary name ends in .tmp, so that the leftovers of a killed process can be recognized; several processes may write the
    same path. Raises StorageError.
    """
    path = Path(path)
    unfinished = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        write(unfinished)
        fsync_path(unfinished)
        os.replace(unfinished, path)
        fsync_path(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path} ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):            # a second error would hide the first
            unfinished.unlink(missing_ok=True)


def atomic_folder(path: str | Path, write: Callable[[Path], object]) -> None:
    """Like atomic_write for a folder of files: `write` fills an empty folder next to `path`, which is then renamed. Raises
    StorageError, also if `path` exists."""
    path = Path(path)
    unfinished = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        unfinished.mkdir()
        write(unfinished)
        for file in (*unfinished.iterdir(), unfinished):
            fsync_path(file)
        if os.path.lexists(path):                     # rename would replace an empty folder
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(unfinished, path)
        fsync_path(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def make_parents(path: str | Path) -> Iterator[None]:
    """Make the folders that the path is in. If the block raises, those that it made are removed again, unless they are in use."""
    path = Path(path)
    made = [folder for folder in path.parents if not folder.exists()]                     # the innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the file name to an OSError from writing, flushing or closing an open file, which does not have one; `classify_error`
    and str(error) then show it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_file(path: str | Path, text: str, encoding: str = "utf-8", errors: str = "strict") -> None:
    """Write a small file that may be left incomplete by an error. Raises OSError that names the file."""
    with naming(path):
        Path(path).write_text(text, encoding=encoding, errors=errors)


def fsync_path(path: str | Path) -> None:
    """Flush a file or a folder to the disk. Raises OSError."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------- tables

# FORMULA: text that a spreadsheet would run as a formula or move to another cell without an apostrophe. A NUMBER is safe.
FORMULA, NUMBER = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"), re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


def csv_table(rows: Iterable[Sequence[object]], line_end: str = "\r\n") -> str:
    """Return the text of a csv file. A text cell that a spreadsheet would run, such as =1+1, gets an apostrophe in front."""
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator=line_end).writerows([_as_cell(cell) for cell in row] for row in rows)
    return stream.getvalue()


def read_csv_table(text: str) -> list[list[str]]:
    """Return the cells of `csv_table` as they were before it added apostrophes."""
    return [[plain_cell(cell) for cell in row] for row in csv.reader(io.StringIO(text, newline=""))]


def plain_cell(cell: str) -> str:
    """Return the cell without the apostrophe that `csv_table` adds before a formula."""
    return cell[1:] if FORMULA.match(cell, 1) and cell[0] == "'" else cell


def encoded(text: str) -> bytes:
    """Encode as UTF-8; file names that are not UTF-8 become their original bytes."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:                           # surrogates that do not come from a file name
        return text.encode("utf-8", "backslashreplace")


def _as_cell(cell: object) -> object:
    is_formula = isinstance(cell, str) and FORMULA.match(cell) and not NUMBER.fullmatch(cell)
    return f"'{cell}" if is_formula else cell


class FileLock:
    """Reserves a folder for this process, with a POSIX record lock on its .lock file.

    The lock lasts until `release` or until the process ends in any way; forked children do not inherit it. The file contains
    "process PID on HOST", for the error message of other processes.
    """

    def __init__(self, folder: str | Path, advice: str = "Wait for it, or stop it."):
        """advice: the end of the message of InUseError."""
        self._folder, self._path, self._advice = Path(folder), Path(folder) / LOCK_FILE, advice
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Raise InUseError if another process holds the lock, OSError if the file cannot be written or locked."""
        descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            in_use = self._in_use(descriptor) if isinstance(error, REFUSED) else None
            os.close(descriptor)
            raise in_use or error from error
        _acquired[descriptor], self._descriptor = os.getpid(), descriptor
        owner = f"process {os.getpid()} on {platform.node()}".encode()
        with contextlib.suppress(OSError):             # on a full disk the lock is still valid
            os.pwrite(descriptor, owner, 0)            # overwrites the previous owner, so that the file is never empty
            os.ftruncate(descriptor, len(owner))

    def release(self) -> None:
        if self._descriptor is not None:
            del _acquired[self._descriptor]
            os.close(self._descriptor)
            self._descriptor = None

    def check(self) -> None:
        """Raise InUseError if another process holds the lock. Creates and locks nothing."""
        with contextlib.suppress(OSError):             # no lock file, or not readable: `acquire` reports that
            # Closing any descriptor of a file releases all locks of this process on it, so its own locks are not checked.
            if any(process == os.getpid() and os.path.samestat(os.fstat(own), os.stat(self._path))
                   for own, process in _acquired.items()):
                return
            descriptor = os.open(self._path, os.O_RDONLY)
            try:
                os.lockf(descriptor, os.F_TEST, 0)
            except REFUSED as error:
                raise self._in_use(descriptor) from error
            finally:
                os.close(descriptor)

    def _in_use(self, descriptor: int) -> InUseError:
        return InUseError(f"{self._folder} is in use by {_owner(descriptor)}. {self._advice}")


def _owner(descriptor: int) -> str:
    """Return the owner named in the file. Waits if that process has ended, because a new owner may still write its name."""
    deadline = time.monotonic() + OWNER_SECONDS
    while time.monotonic() < deadline:
        text = os.pread(descriptor, 200, 0).decode(errors="replace")
        found = re.fullmatch(r"process (\d+) on (.*)", text)
        if found and (found[2] != platform.node() or _is_alive(int(found[1]))):
            return text
        time.sleep(0.02)
    return "another process"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno == errno.EPERM              # it belongs to another user
    return True
