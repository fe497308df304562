"""The images to label, in order, from files, folders, lists, csv and standard input.

Sources are read as images are needed: a million paths take no more memory than a thousand, except in a single folder, whose names
have to be sorted.
"""

import codecs
import contextlib
import csv
import dataclasses
import itertools
import os
import select
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from utils.data.class_folders import describe_skipped
from utils.data.csv_columns import find_path_column, with_header
from utils.data.csv_lists import ENDINGS
from utils.data.csv_tables import read_table
from utils.data.image_files import IMAGE_EXTENSIONS, entries
from utils.data.layouts import is_hidden
from utils.data.listed_files import FileFinder
from utils.data.splits import DataError
from utils.files import no_folder, plain_cell, where_looked

STANDARD_INPUT, LIST_ENDING = "-", ".txt"
HEAD_BYTES = 1 << 20            # of a csv, in which the columns are found
PAUSE_S = 0.05                  # seconds without a line on standard input


class Item(NamedTuple):
    """An image: its name in the output, and its file."""

    name: str
    path: str


@dataclasses.dataclass
class Remarks:
    """Collects what else is worth a note while the sources are read."""

    others: Counter = dataclasses.field(default_factory=Counter)           # files of folders that are no images, by extension
    lists: list[str] = dataclasses.field(default_factory=list)             # notes on lists none of whose paths exists

    @property
    def skipped(self) -> list[str]:
        return list(describe_skipped(self.others, IMAGE_EXTENSIONS))


class Batches:
    """Iterates over batches of at most `size` keys. answered(batch) marks one as answered.

    None among the keys means that no key is available now: then a smaller batch follows, and empty batches as long as some keys
    wait for their answers, because loaders return a batch when they get the next one. After an error of the source the keys
    before it follow, and `error` is that error.
    """

    def __init__(self, keys: Iterable, size: int):
        self.keys, self.size, self.owed = keys, size, 0
        self.error: Exception | None = None
        self._batches = self._cut()

    def __iter__(self) -> Iterator[list]:
        return self._batches

    def __next__(self) -> list:
        return next(self._batches)

    def answered(self, batch: Sequence) -> None:
        self.owed -= len(batch)

    def _cut(self) -> Iterator[list]:
        batch = []
        for key in self._keys():
            batch += [key] if key is not None else []
            if len(batch) == self.size or (key is None and (batch or self.owed)):
                self.owed += len(batch)
                yield batch
                batch = []
        if batch:
            yield batch

    def _keys(self) -> Iterator:
        try:
            yield from self.keys
        except (ValueError, OSError) as error:
            self.error = error


def first_of(keys: Iterator[Item | None], count: int, pauses: bool) -> tuple[list[Item], bool]:
    """Return (the first `count` keys, or with `pauses` those before the first pause; whether these are all)."""
    first = []
    for key in keys:
        if key is not None:
            first.append(key)
        if len(first) == count or (key is None and first and pauses):
            return first, False
    return first, True


def open_sources(inputs: Iterable[str], path_column: str | None = None, image_dir: str | None = None,
                 remarks: Remarks | None = None) -> Iterator[Item | None]:
    """Return the images of all inputs, one input after the other; None where standard input has no line now. Fills `remarks`.

    Raises DataError, where possible before the first image is read.
    """
    remarks = remarks or Remarks()
    return itertools.chain.from_iterable([_open_source(given, path_column, image_dir, remarks) for given in inputs])


def _open_source(given: str, path_column: str | None, image_dir: str | None, remarks: Remarks) -> Iterable[Item]:
    if given == STANDARD_INPUT:
        if sys.stdin is None:
            raise DataError("INPUT -: standard input is closed")
        return _listed(_lines(sys.stdin.buffer), "standard input", remarks)
    if os.path.isdir(given):
        if next(pictures_below(given), None) is None:
            raise DataError(f"{given}: no images ({', '.join(IMAGE_EXTENSIONS)}) in this folder")
        return (Item(path, path) for path in pictures_below(given, others=remarks.others))
    if not os.path.exists(given):
        raise DataError(f"{given}: no such file or folder{where_looked(given)}")
    if given.lower().endswith(ENDINGS):
        return _csv(Path(given), path_column, image_dir)
    if given.lower().endswith(LIST_ENDING):
        return _listed(open(given, "rb"), given, remarks, os.path.dirname(given))
    if given.lower().endswith((".zip", ".tar", ".tgz", ".gz")):
        raise DataError(f"{given} is {no_folder(given)}")
    return [Item(given, given)]


def pictures_below(top: str, seen: set[str] | None = None, others: Counter | None = None) -> Iterator[str]:
    """Yield the image files at any depth in the order of their paths, without hidden ones. Each folder is visited once, however
    many links lead to it, and the folders around `top` never. others: counts the other files. Raises DataError."""
    real, is_first = os.path.realpath(top), seen is None
    seen = set(map(str, Path(real).parents)) if is_first else seen
    if real in seen:
        return
    seen.add(real)
    try:
        found = entries(top)
    except DataError:
        if is_first:
            raise
        yield top                   # its row gives the reason
        return
    for name, is_folder in sorted((entry.name, entry.is_dir()) for entry in found):
        path = os.path.join(top, name)
        if is_folder and not is_hidden(name):
            yield from pictures_below(path, seen, others)
        elif not is_folder and not name.startswith("."):
            if name.lower().endswith(IMAGE_EXTENSIONS):
                yield path
            elif others is not None:
                others[os.path.splitext(name)[1].lower()] += 1


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Yield the lines as they come; None where none comes for PAUSE_S."""
    try:
        descriptor = stream.fileno()
    except OSError:                             # a stream in memory
        yield from stream
        return
    rest = b""
    while True:
        if not select.select([descriptor], [], [], PAUSE_S)[0]:
            yield None
        elif piece := os.read(descriptor, 1 << 16):
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
        else:
            break
    if rest:
        yield rest


def _listed(lines: Iterable[bytes | None], called: str, remarks: Remarks, folder: str = "") -> Iterator[Item | None]:
    """Yield the path of each line, relative to the current folder or else to `folder`, that of the list.

    Adds a remark if none of the paths exists: the file may be something else than a list.
    """
    with contextlib.closing(lines):
        number, paths, exist = 0, 0, False
        for line in lines:
            if line is None:
                yield None
                continue
            number += 1
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(f"{called}: UTF-16 text. Save it as UTF-8")
            if b"\0" in line:
                raise DataError(f"{called}:{number}: NUL bytes: a list has one path a line")
            if name := os.fsdecode(line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")):
                inside = os.path.join(folder, name)
                path = inside if folder and not os.path.exists(name) and os.path.exists(inside) else name
                paths, exist = paths + 1, exist or os.path.exists(path)
                yield Item(name, path)
    if paths and not exist:
        remarks.lists.append(f"note: {called} is read as a list of {f'{paths:,} paths' if paths > 1 else '1 path'}, one a line, "
                             f"and no such file{'s exist' if paths > 1 else ' exists'}")


def _csv(file: Path, path_column: str | None, image_dir: str | None) -> Iterator[Item]:
    """Yield the column of paths, found as that of a data set (docs/csv.md). Raises DataError before the first one is
    requested."""
    finder = FileFinder(str(file.parent), image_dir)
    table = with_header(read_table(file, HEAD_BYTES), path_column, None, finder, "test")
    column = find_path_column(table, path_column, finder, "test")
    folders = finder.folders_of(table.column(column), "test") or [finder.given or finder.data_dir]

    def place(name: str) -> str | None:
        path = next((path for path in (os.path.join(folder, name) for folder in folders) if os.path.isfile(path)), None)
        return path or finder.find(name, folders)

    def find(name: str) -> Item:
        if plain_cell(name) != name and not place(name):           # a table that this project wrote
            name = plain_cell(name)
        return Item(name, place(name) or os.path.join(folders[0], name))

    encoding = "utf-8-sig" if table.encoding == "utf-8" else table.encoding
    rows = itertools.islice(_rows(file, encoding, table.separator), int(bool(table.header)), None)
    return (find(row[column] if column < len(row) else "") for row in rows)


def _rows(file: Path, encoding: str, separator: str) -> Iterator[list[str]]:
    """Yield the rows as read_table returns them, without comments and blank rows."""
    with open(file, encoding=encoding, errors="surrogateescape", newline="") as stream:
        rows = csv.reader(stream, delimiter=separator)
        try:
            for row in rows:
                cells = [cell.strip() for cell in row]
                is_comment = row and row[0].startswith("#") and not (
                    len(cells) > 1 and cells[0].lower().endswith(IMAGE_EXTENSIONS))
                if any(cells) and not is_comment:
                    yield cells
        except (csv.Error, UnicodeError) as error:
            raise DataError(f"{file}:{rows.line_num}: cannot be read as a list ({error})") from error
