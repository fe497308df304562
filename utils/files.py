"""The one way to write a file: it is complete or absent, and errors of the disk are one line. Tables. Locks of folders."""

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
    """A file cannot be written: no space, no permission, a missing folder."""

    exit_code = 3


class InUseError(ValueError):
    """Another process works in the folder."""

    exit_code = 7


def where_looked(path: str | Path) -> str:
    """Why nothing is there, for the end of a message: ' (...)'; '' where something is. A relative path was looked for in the
    current folder, which may not be the one that the script was called in; a link may lead nowhere."""
    path = Path(path)
    if path.exists():
        return ""
    why = [dead_link(path)]
    if not path.is_absolute():
        here, called = Path.cwd(), os.environ.get("VIT_CALLED_FROM")
        there = Path(called or here, path)
        what = f"{there} is there" if there.exists() else dead_link(there) if there != here / path else ""
        why.append(f"looked for in {here}" + (what and f", since relative paths are meant from the script's folder: {what}"))
    return f" ({'; '.join(filter(None, why))})" if any(why) else ""


def dead_link(path: str | Path) -> str:
    """Which link on the way to the path leads to what is not there, for a message; '' if there is none."""
    parts = (part for part in (Path(path), *Path(path).parents) if part.is_symlink() and not part.exists())
    return next((f"{part} is a link to {os.readlink(part)}, which is not there" for part in parts), "")


def no_folder(path: str | Path) -> str:
    """What is wrong with a path that is no folder, and what to do, for the end of a message."""
    if Path(path).exists():
        is_packed = str(path).lower().endswith(ARCHIVES)
        return "an archive, not a folder: unpack it, and give the folder" if is_packed else "a file, not a folder"
    return f"no such folder{where_looked(path)}"


def is_stream(path: str | Path) -> bool:
    """Whether it is there and neither a file nor a folder: a device, such as /dev/null, or a pipe with a name."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def image_folder(image_dir: str, data_dir: str | Path) -> str | None:
    """The folder that --image_dir means: seen from data_dir or, if there is none, from the current folder."""
    return next((place for place in (os.path.join(data_dir, image_dir), image_dir) if os.path.isdir(place)), None)


def no_image_folder(image_dir: str, data_dir: str | Path) -> str:
    """The message where there is none."""
    there = next((place for place in (os.path.join(data_dir, image_dir), image_dir) if os.path.exists(place)), None)
    found = f"{there} is {no_folder(there)}" if there else dead_link(os.path.join(data_dir, image_dir)) or dead_link(image_dir)
    return f"--image_dir {image_dir}: {found or f'no such folder in {data_dir}, nor in {os.getcwd()}'}"


def located(path: str | Path) -> str:
    """The path for a message, with why nothing is there if that is so."""
    return f"{path}{where_looked(path)}"


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary name beside `path`, flushes the file to the disk and renames it to `path`.

    When this returns, the file is on the disk. Until then, and after an error, the previous file (or none) is there. The
    temporary name ends in .tmp, so that what a killed process leaves can be recognized; several processes may write the
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
        with contextlib.suppress(OSError):            # it would hide the first error
            unfinished.unlink(missing_ok=True)


def atomic_folder(path: str | Path, write: Callable[[Path], object]) -> None:
    """The same for a folder of files: `write` fills an empty one beside `path`, which then gets that name. Raises StorageError,
    also where something has the name already."""
    path = Path(path)
    unfinished = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        unfinished.mkdir()
        write(unfinished)
        for file in (*unfinished.iterdir(), unfinished):
            fsync_path(file)
        if os.path.lexists(path):                     # an empty folder would be replaced
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
    """An OSError of a file that is open, in writing, flushing or closing it, does not say which file that is: here it is given
    this name, which `classify_error` and str(error) tell."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_file(path: str | Path, text: str, encoding: str = "utf-8", errors: str = "strict") -> None:
    """For small files of which nothing is lost with a half. Raises OSError that names the file."""
    with naming(path):
        Path(path).write_text(text, encoding=encoding, errors=errors)


def fsync_path(path: str | Path) -> None:
    """Flushes a file or a folder to the disk. Raises OSError."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------- tables

# What a spreadsheet takes for a formula, or moves to another cell, and an apostrophe keeps it from; a number it may have.
FORMULA, NUMBER = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"), re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


def csv_table(rows: Iterable[Sequence[object]], line_end: str = "\r\n") -> str:
    """Text of a csv file. A cell of text that a spreadsheet would run, such as =1+1, begins with an apostrophe."""
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator=line_end).writerows([_as_cell(cell) for cell in row] for row in rows)
    return stream.getvalue()


def read_csv_table(text: str) -> list[list[str]]:
    """The cells of `csv_table`, text as it was given."""
    return [[plain_cell(cell) for cell in row] for row in csv.reader(io.StringIO(text, newline=""))]


def plain_cell(cell: str) -> str:
    """Without the apostrophe that `csv_table` sets before a formula."""
    return cell[1:] if FORMULA.match(cell, 1) and cell[0] == "'" else cell


def encoded(text: str) -> bytes:
    """UTF-8; names of files that are no UTF-8 become the bytes that they are."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:                           # surrogates that are of no file's name
        return text.encode("utf-8", "backslashreplace")


def _as_cell(cell: object) -> object:
    is_formula = isinstance(cell, str) and FORMULA.match(cell) and not NUMBER.fullmatch(cell)
    return f"'{cell}" if is_formula else cell


class FileLock:
    """Reserves a folder for this process, by a POSIX record lock on its .lock file.

    It lasts until `release` or the end of the process, however that ends; forked children do not inherit it. The file
    holds "process PID on HOST", for the message of those who are refused.
    """

    def __init__(self, folder: str | Path, advice: str = "Wait for it, or stop it."):
        """`advice` ends the message of InUseError."""
        self._folder, self._path, self._advice = Path(folder), Path(folder) / LOCK_FILE, advice
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Raises InUseError if another process holds the lock, OSError if the file cannot be written or locked."""
        descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            in_use = self._in_use(descriptor) if isinstance(error, REFUSED) else None
            os.close(descriptor)
            raise in_use or error from error
        _acquired[descriptor], self._descriptor = os.getpid(), descriptor
        owner = f"process {os.getpid()} on {platform.node()}".encode()
        with contextlib.suppress(OSError):             # a full disk: the lock counts all the same
            os.pwrite(descriptor, owner, 0)            # over the previous owner's name, so that the file is never empty
            os.ftruncate(descriptor, len(owner))

    def release(self) -> None:
        if self._descriptor is not None:
            del _acquired[self._descriptor]
            os.close(self._descriptor)
            self._descriptor = None

    def check(self) -> None:
        """Raises InUseError if another process holds the lock. Creates and locks nothing."""
        with contextlib.suppress(OSError):             # no lock, or not readable: `acquire` reports that
            # Closing any descriptor of a file releases the locks that this process has on it: skip its own.
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
    """The owner as the file names it. A new owner may not have replaced the name of a process that has ended: wait for it."""
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
