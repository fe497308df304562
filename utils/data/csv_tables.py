"""Reads a list: a text file -> rows of cells, whatever its encoding, separator and comments are.

csv_columns.py decides what each column is, and whether the first row is a header.
"""

import codecs
import csv
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .image_files import IMAGE_EXTENSIONS, shown
from .splits import DataError

MAX_LINE_BYTES = 1 << 16          # in a list of images
MAX_LIST_BYTES = 1 << 30
SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "|"}
SAMPLE = 100                      # lines used to find the separator
SHAPE = 'Each row must be path,label (with double quotes around a value that contains a comma: "a,b.png",cat)'


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of a list, all with the same number of cells, without surrounding white space."""

    file: Path
    rows: list[list[str]]
    lines: list[int]                  # the line of each row, from 1
    separator: str
    encoding: str                     # "utf-8" or "utf-16"
    header: tuple[str, ...] = ()      # the names of the columns; () if the first row is no header

    @property
    def width(self) -> int:
        return len(self.header or self.rows[0])

    def column(self, position: int) -> list[str]:
        return [row[position] for row in self.rows]

    def title(self, position: int) -> str:
        """Return what a message calls a column: its name, or its number from 1."""
        return shown(self.header[position]) if self.header and self.header[position] else str(position + 1)

    def titles(self, positions: list[int] | range | None = None) -> str:
        """Return the titles of the columns (default: all), abbreviated."""
        names = [self.title(position) for position in (range(self.width) if positions is None else positions)]
        return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")

    def place(self, row: int) -> str:
        return f"{self.file}:{self.lines[row]}"


def read_table(file: Path, head: int | None = None) -> Table:
    """Read a list. head: read only about so many bytes. Raises DataError, with the line, unless it is text whose rows have the
    same number of cells."""
    lines, encoding = _read_lines(file, head)
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line and not line.isspace()]
    separator = _find_separator([line for _, line in lines[:2 * SAMPLE] if not line.startswith("#")][:SAMPLE])
    rows, numbers, position = [], [], 0
    while position < len(lines):
        number, line = lines[position]
        position += 1
        if '"' in line:
            cells, more = _quoted_cells(file, lines, position - 1, separator)
            position += more
        else:
            cells = line.split(separator)
        cells = [cell.strip() for cell in cells]
        if line.startswith("#") and not (len(cells) > 1 and cells[0].lower().endswith(IMAGE_EXTENSIONS)):
            continue                                             # a comment, unless it is the name of a file
        if any(cells):                                           # spreadsheets may end with rows of separators only
            rows.append(cells)
            numbers.append(number)
    if not rows:
        raise DataError(f"{file}: no rows. {SHAPE}")
    _make_rectangular(file, rows, numbers, separator)
    return Table(file, rows, numbers, separator, encoding)


def _quoted_cells(file: Path, lines: list[tuple[int, str]], position: int, separator: str) -> tuple[list[str], int]:
    """Split a line with double quotes, inside which it may continue on the next lines -> (cells, how many more lines it used)"""
    text, more = lines[position][1], 0
    while True:
        try:
            return next(csv.reader([text], delimiter=separator, strict=True)), more
        except csv.Error as error:
            more += 1
            if "unexpected end" not in str(error) or position + more >= len(lines) or len(text) > MAX_LINE_BYTES:
                raise DataError(f"{file}:{lines[position][0]}: {error}. {SHAPE}") from error
            text += " " + lines[position + more][1]


def _find_separator(lines: list[str]) -> str:
    """Return the separator that gives the lines the same number of cells (two or more); of several, the one with names of images
    among its cells, then the one with more cells."""
    def rate(separator: str) -> tuple:
        rows = [_cells_for_a_guess(line, separator) for line in lines]
        widths = Counter(max(_filled(row), min(len(row), 2)) for row in rows)           # an empty label counts
        width, count = widths.most_common(1)[0] if widths else (1, 0)
        images = sum(any(cell.strip().lower().endswith(IMAGE_EXTENSIONS) for cell in row) for row in rows)
        return width > 1, count, images, width, separator == ","

    return max(SEPARATORS, key=rate)


def _cells_for_a_guess(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator))
    except csv.Error:
        return line.split(separator)


def _filled(cells: list[str]) -> int:
    """Count the cells without the empty ones at the end."""
    count = len(cells)
    while count and not cells[count - 1].strip():
        count -= 1
    return count


def _make_rectangular(file: Path, rows: list[list[str]], lines: list[int], separator: str) -> None:
    """Remove the empty cells that trailing separators make. Raises DataError for a row of another length."""
    filled, most = list(map(_filled, rows)), len(rows[0])
    width = min(max(filled), most)
    for number, row, count in zip(lines, rows, filled):
        if len(row) < width or count > most:
            found = f"no {SEPARATORS[separator].removeprefix('a ')}" if len(row) == 1 else f"{max(count, 1)} columns"
            raise DataError(f"{file}:{number}: {found}, but {width} in other rows. {SHAPE}")
        del row[width:]


# ------------------------------------------------------------------------------------------------------------- text


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank -> (number from 1, line). Raises DataError unless it is text of a plausible size."""
    for number, line in enumerate(_read_lines(file)[0], 1):
        if text := line.strip():
            yield number, text


def _read_lines(file: Path, head: int | None = None) -> tuple[list[str], str]:
    """-> (lines, encoding). Reads UTF-8, with or without a byte order mark, and UTF-16 with one; guesses nothing else."""
    if not file.is_file():
        raise DataError(f"no such file: {file}")
    size = file.stat().st_size
    if size > MAX_LIST_BYTES and head is None:
        raise DataError(f"{file}: {size:,} bytes are too large for a list of images (at most {MAX_LIST_BYTES:,})")
    with open(file, "rb") as stream:
        content = stream.read(head)
        if head is not None and head < size:
            is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))        # readline cannot find its lines
            content += stream.read() if is_utf16 else stream.readline(MAX_LINE_BYTES)
    text, encoding = _decode(file, content)
    lines = text.split("\n") if "\n" in text else text.split("\r")
    for number, line in enumerate(lines, 1):
        if len(line) >= MAX_LINE_BYTES:
            raise DataError(f"{file}:{number}: the line is longer than {MAX_LINE_BYTES:,} bytes; this is not a list of images")
    return lines, encoding


def _decode(file: Path, content: bytes) -> tuple[str, str]:
    """-> (text, encoding)"""
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    try:
        text = content.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-16":
            raise DataError(f"{file}: damaged UTF-16 text ({error.reason}). Save it as UTF-8") from error
        text = error.object[:error.start].decode()
        if "\0" not in text:
            raise DataError(_not_utf8(file, error)) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{file}:{line}: not plain text (NUL bytes). Save it as UTF-8")
    return text, encoding


def _not_utf8(file: Path, error: UnicodeDecodeError) -> str:
    content = error.object
    start = content.rfind(b"\n", 0, error.start) + 1
    line = content[start:].partition(b"\n")[0][:200].strip()
    column = len(content[start:error.start].decode()) + 1
    number = content.count(b"\n", 0, start) + 1
    where = f"{file}:{number}: not UTF-8 text ({error.reason} in column {column})"
    if b"\0" in content or re.search(rb"[\x01-\x08\x0e-\x1f]", line):
        return f"{where}; this is not a list of images"
    return (f"{where}. Read as Windows-1252 (Western Europe; Excel's plain CSV) the line is "
            f"{shown(line.decode('cp1252', 'replace'))!r}. If that is right, convert the file (iconv -f WINDOWS-1252 -t "
            f"UTF-8 {shown(file.name)} > utf8.csv) and replace it; or save it again as \"CSV UTF-8\" in the program that made it")
