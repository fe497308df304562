"""Predictions as rows of text, and the file or pipe that they are written to: only complete rows, even if writing fails."""

import contextlib
import errno
import fcntl
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from utils.files import REFUSED, InUseError, csv_table, encoded, fsync_path, is_stream, naming
from utils.process import printable

from .predictor import Answers

DIGITS = 6                      # decimals of probabilities and losses
PIECE = 4096                    # bytes that a pipe accepts completely or not at all (PIPE_BUF on Linux)

Row = list[str | float | None]


class Table:
    """Turns predictions into rows, and rows into text.

    truth: whether the true classes are known; then there are columns for them and for the loss.
    """

    def __init__(self, classes: Sequence[str], top_k: int, truth: bool):
        self.classes, self.truth = classes, truth
        tops = [name for number in range(2, top_k + 1) for name in (f"top{number}", f"probability{number}")]
        label = ["true", "predicted"] if truth else ["label"]
        self.columns = ["path", *label, "probability", *tops, *["loss"] * truth, "error"]

    def rows(self, names: Sequence[str], answers: Answers, true: Sequence[int] = ()) -> Iterator[Row]:
        """Yield a row for each image. true: the labels of all images, where they are known."""
        reasons, readable = dict(answers.bad), 0
        for position, name in enumerate(names):
            row: Row = [name, self.classes[true[position]]] if self.truth else [name]
            if position in reasons:
                row += [None] * (len(self.columns) - len(row) - 1)
                row.append(reasons[position])
            else:
                for label, probability in zip(answers.labels[readable], answers.probabilities[readable]):
                    row += [self.classes[label], round(float(probability), DIGITS)]
                row += [round(float(answers.losses[readable]), DIGITS)] * self.truth
                row.append(None)
                readable += 1
            yield row

    def texts(self, rows: Iterable[Row], kind: str, first: bool) -> list[str]:
        """Return a text for each row, after one for the header if these are the first rows. JSON ends with `end`."""
        if kind == "csv":
            cells = [[f"{cell:.{DIGITS}f}" if isinstance(cell, float) else "" if cell is None else cell for cell in row]
                     for row in rows]
            return [csv_table([row], line_end="\n") for row in [self.columns] * first + cells]
        objects = [json.dumps(dict(zip(self.columns, row))) for row in rows]
        if kind == "jsonl":
            return [f"{each}\n" for each in objects]
        return [("[\n" if first and not number else ",\n") + each for number, each in enumerate(objects)]

    @staticmethod
    def end(kind: str) -> str:
        return "\n]\n" if kind == "json" else ""


class Unfinished(ValueError):
    """Raised after an error that leaves complete rows in the output."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Output:
    """Standard output, a device or pipe, or a new file, which is called FILE.partial until it is complete.

    `closed`: the reader of a pipe has gone. Raises OSError, with the name, for a full disk, after half a row is removed, and
    InUseError where another process is writing the file.
    """

    def __init__(self, file: str | Path | None):
        self.file, self.closed, self._shown = file and Path(file), False, False
        self.name = "standard output" if file is None else str(file)
        self.partial: Path | None = None
        self._made: list[Path] = []             # folders, the innermost first
        if file is None:
            sys.stdout.flush()
            self._descriptor, self._shown = 1, sys.stdout.isatty()
        elif is_stream(file):
            self._descriptor = os.open(file, os.O_WRONLY)
        else:
            self.partial = Path(f"{file}.partial")
            self._made = [folder for folder in self.partial.parents if not folder.exists()]
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.partial, os.O_WRONLY | os.O_CREAT, 0o666)
            self._lock()
            os.ftruncate(self._descriptor, 0)

    def _lock(self) -> None:
        """Lock the file until the end of this process, or until it has its name."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            free = not isinstance(error, REFUSED)           # a file system without locks
        else:                                               # another process may have renamed it since it was opened
            free = self.partial.exists() and os.path.samestat(os.fstat(self._descriptor), os.stat(self.partial))
        if not free:
            os.close(self._descriptor)
            raise InUseError(f"{self.partial} is in use: another process writes {self.name}. Wait for it, or give another name")

    def write(self, rows: Iterable[str]) -> None:
        """Write as many rows at a time as fit into a PIECE; a longer row by itself."""
        piece = b""
        for row in rows:
            content = encoded(printable(row) if self._shown else row)
            if len(piece) + len(content) > PIECE:
                self._write(piece)
                piece = b""
            piece += content
        self._write(piece)

    def _write(self, piece: bytes) -> None:
        if self.closed:
            return
        done = 0
        with naming(self.name):
            try:
                while done < len(piece):
                    done += os.write(self._descriptor, piece[done:])
            except BrokenPipeError:
                self.closed = True
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._descriptor)
            except OSError:
                if done and stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                    os.ftruncate(self._descriptor, os.lseek(self._descriptor, -done, os.SEEK_CUR))
                raise

    def finish(self) -> None:
        """Flush the file to the disk and give it its name. Raises OSError where something else has that name now."""
        if self.partial is not None:
            with naming(self.name):
                os.fsync(self._descriptor)
                if os.path.lexists(self.file):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
                os.rename(self.partial, self.file)
                fsync_path(self.file.parent)
                os.close(self._descriptor)                  # releases the lock

    def leave(self) -> str:
        """After an error: return where the rows so far are. Without any, remove the file and the folders that were made for
        it."""
        if self.partial is None:
            return ""
        if os.fstat(self._descriptor).st_size:
            return f"the rows so far are in {self.partial}, and each is complete"
        with contextlib.suppress(OSError):
            self.partial.unlink(missing_ok=True)
            for folder in self._made:
                folder.rmdir()
        return ""
