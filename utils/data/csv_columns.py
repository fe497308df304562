"""Finds the columns of a list that hold the paths, the labels and the split: by flag, by name, by which files exist."""

import dataclasses
import re
from collections.abc import Sequence

from .csv_tables import SHAPE, Table
from .image_files import IMAGE_EXTENSIONS, shown
from .layouts import ROLE
from .listed_files import IS_URL, FileFinder, is_url
from .splits import DataError

# A first row of two such cells is always a header, whatever files exist.
PLAIN_HEADER = ({"path", "image", "file", "filename", "image_path", "file_path"}, {"label", "class"})
# Column names of paths, without spaces, dots, hyphens and underscores, from the likeliest on.
PATH_WORDS = ("path", "imagepath", "filepath", "imgpath", "filename", "file", "imagefile", "imagefilename", "imagename",
              "imgname", "image", "img", "picture", "photo", "imageid", "imgid", "idcode", "isicid", "id", "name")
UNLIKELY = (len(PATH_WORDS), True)      # _path_rank of a column with neither such a name nor the extension of an image
LABEL_WORDS = {"label", "labels", "class", "classes", "classname", "classid", "classlabel", "labelname", "labelid"}
MORE_LABEL_WORDS = {"category", "categories", "categoryname", "categoryid", "target", "targets", "emotion", "emotions",
                    "expression", "species", "breed", "variety", "diagnosis", "dx", "finding", "disease", "level", "y", "tag",
                    "genre"}
SPLIT_WORDS = {"split", "set", "subset", "partition", "usage", "dataset", "phase", "fold"}
INDEX_WORDS = {"", "unnamed0", "index"}
PARTS = {**ROLE, "publictest": "val", "privatetest": "test"}
# is_train, is_valid, is_training_image, ... whose values are yes and no.
IS_PART = re.compile(rf"is({'|'.join(ROLE)})(image|img|set|data|sample)?")
YES, NO = ("true", "1", "1.0", "yes", "y", "t"), ("false", "0", "0.0", "no", "n", "f")
PIXELS = re.compile(r"(pixel|px)_?[0-9]+|[0-9]{1,2}x[0-9]{1,2}")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Positions of columns. folders: what the paths are relative to ([]: no folder was found that contains any of them)."""

    path: int
    label: int
    folders: list[str]
    split: int | None = None
    unclear: str = ""             # a warning about a column that looks like a split but is not used as one
    code: int | None = None       # the column that has a number for each label (label_id next to label)


def word_of(name: str) -> str:
    """Return the name of a column in lower case, without separators."""
    return re.sub(r"[\s._\-:#]+", "", name).lower()


def is_plain_header(cells: Sequence[str]) -> bool:
    return len(cells) == 2 and all(cell.lower() in known for cell, known in zip(cells, PLAIN_HEADER))


def with_header(table: Table, path_column: str | None, label_column: str | None, finder: FileFinder, part: str,
                header_wanted: tuple[str, ...] = ()) -> Table:
    """Return the table with its first row as the header, if it is one.

    It is one if the flags or `header_wanted` (the header of the training list) name its cells, if it is the plain path,label,
    or if it names no file although other rows do, or although one of its cells is a usual column name.
    """
    first, rest = table.rows[0], table.rows[1:]
    cells = [cell.lower() for cell in first]
    typed = {name.lower() for name in (path_column, label_column) if name and not name.isdecimal()}
    wanted = [cell.lower() for cell in header_wanted]
    is_header = is_plain_header(cells) or bool(typed & set(cells)) or cells == wanted
    if not is_header and not any(cell.endswith(IMAGE_EXTENSIONS) for cell in cells):
        words = [word_of(cell) for cell in first]
        located = _columns_of_files(dataclasses.replace(table, rows=rest[:200]), words, finder, part)
        known = set(words) & {*PATH_WORDS, *LABEL_WORDS, *MORE_LABEL_WORDS} or any(map(PIXELS.fullmatch, cells))
        names_file = any(finder.folders_of([first[position]], part) for position in located or range(len(first)))
        is_header = not names_file and bool(located or known)
    if not is_header:
        return table
    if not rest:
        raise DataError(f"{table.file}: no rows. {SHAPE}")
    return dataclasses.replace(table, header=tuple(first), rows=rest, lines=table.lines[1:])


def find_columns(table: Table, path_column: str | None, label_column: str | None,
                 finder: FileFinder, part: str) -> Columns:
    """Find the columns of paths, labels and split. Raises DataError, which lists the columns, if one cannot be decided."""
    if any(PIXELS.fullmatch(name.lower()) for name in table.header) or "pixels" in map(str.lower, table.header):
        raise DataError(f"{table.file} contains pixels (columns {table.titles()}), not paths of images. Kaggle's csv files of "
                        "MNIST and Fashion-MNIST (label, then 784 pixels) are read with --dataset mnist and fashion_mnist; "
                        "convert others to image files")
    if table.width < 2:
        raise DataError(f"{table.place(0)}: no comma, semicolon, tab or | between columns. {SHAPE}")
    label = _position(table, label_column, "--label_column") if label_column else None
    path = _position(table, path_column, "--path_column") if path_column else _find_path(table, label, finder, part)
    others = [position for position in range(table.width) if position not in (path, label)]
    split, unclear = _find_split(table, others)
    code = None
    if label is None:
        label, code = _find_label(table, [position for position in others if position != split])
    if label == path:
        raise DataError(f"{table.file}: --path_column and --label_column are the same column. The columns are {table.titles()}")
    return Columns(path, label, finder.folders_of(table.column(path), part), split, "" if label == split else unclear, code)


def find_path_column(table: Table, path_column: str | None, finder: FileFinder, part: str) -> int:
    """Return the position of the paths in a list whose labels are not needed. Raises DataError."""
    if path_column:
        return _position(table, path_column, "--path_column")
    return 0 if table.width == 1 else _find_path(table, None, finder, part)


def _position(table: Table, wanted: str, flag: str) -> int:
    """Return the position of the column with this name or, if there is none, with this number, from 1. Raises DataError."""
    for names, name in ((table.header, wanted), (tuple(map(str.lower, table.header)), wanted.lower())):
        if names.count(name) == 1:
            return names.index(name)
    if wanted.isdecimal() and 1 <= int(wanted) <= table.width and wanted not in table.header:
        return int(wanted) - 1
    there = (f"The columns are {table.titles()}" if table.header else
             f"It has {table.width} columns without names: give a number from 1")
    raise DataError(f"{flag} {wanted}: no such column, or more than one, in {table.file}. {there}")


def _find_path(table: Table, label: int | None, finder: FileFinder, part: str) -> int:
    words = [word_of(name) for name in table.header]
    found = [position for position in _columns_of_files(table, words, finder, part) if position != label]
    if found:
        ranks = [_path_rank(table, words, position) for position in found]
        if len(found) == 1 or table.width == 2 or ranks[0] < ranks[1]:
            return found[0]
        raise DataError(f"{table.file}: the columns {table.titles(found)} all name files. Add --path_column with the right one")
    likeliest = min((position for position in range(table.width) if position != label),
                    key=lambda position: (_path_rank(table, words, position), position))
    if _path_rank(table, words, likeliest) != UNLIKELY or (table.width == 2 and label is None):
        return likeliest                                        # the images that do not exist are reported later
    for number, row in enumerate(table.rows[:2]):               # the first row may be a header that was not recognized
        if url := next(filter(is_url, row), None):
            raise DataError(f"{table.place(number)}: {shown(url)} {IS_URL}")
    raise DataError(f"{table.file}: no column names files in {table.file.parent}. Add --path_column with the column of the image "
                    f"paths, and --image_dir if the images are elsewhere (columns: {table.titles()})")


def _name_rank(words: list[str], position: int) -> int:
    """Return the place of the column's name in PATH_WORDS."""
    word = words[position] if words else ""
    word = word if word in PATH_WORDS else word.removesuffix("s")
    return PATH_WORDS.index(word) if word in PATH_WORDS else len(PATH_WORDS)


def _columns_of_files(table: Table, words: list[str], finder: FileFinder, part: str) -> list[int]:
    """Return the columns that name files, the likeliest first: by column name, then by extension, then by position.

    Searches folders other than DATA_DIR only if no column names files there.
    """
    ranks = {}
    for position in range(table.width if table.rows else 0):
        if not words or words[position] not in LABEL_WORDS | MORE_LABEL_WORDS | INDEX_WORDS:
            ranks[position] = (_path_rank(table, words, position), position)
    likely = [position for position, (rank, _) in ranks.items() if rank != UNLIKELY]
    for positions, everywhere in ((list(ranks), False), (likely or list(ranks), True)):
        found = [position for position in positions if finder.folders_of(table.column(position), part, everywhere)]
        if found:
            return sorted(found, key=ranks.get)
    return []


def _path_rank(table: Table, words: list[str], position: int) -> tuple[int, bool]:
    """Rank a column by how likely it holds paths, the likeliest first: by its name, then by whether cells end as images do."""
    return _name_rank(words, position), not table.rows[0][position].lower().endswith(IMAGE_EXTENSIONS)


def parts_of(table: Table, position: int) -> dict[str, str]:
    """Return the part ("train", "val" or "test") that each value of a split column means, by lower-case value."""
    match = IS_PART.fullmatch(word_of(table.header[position])) if table.header else None
    if match is None:
        return PARTS
    part = ROLE[match[1]]
    return dict.fromkeys(YES, part) | dict.fromkeys(NO, "val" if part == "train" else "train")


def _find_split(table: Table, others: list[int]) -> tuple[int | None, str]:
    """-> (the column whose values mean train, val and test, at least two of them, or None; a warning or "")"""
    found, unclear = [], ""
    for position in others:
        values, parts = {value.lower() for value in table.column(position)}, parts_of(table, position)
        named = bool(table.header) and (parts is not PARTS or word_of(table.header[position]) in SPLIT_WORDS)
        if values <= parts.keys() and (len({parts[value] for value in values}) > 1 or (named and parts is PARTS)):
            found.append(position)
        elif named and 1 < len(values) <= 20:
            wanted = "train, val and test" if parts is PARTS else "true and false"
            unclear = (f"warning: {table.file}: column {table.title(position)} is not used as the split: its values "
                       f"{', '.join(map(shown, sorted(values)[:5]))} are not {wanted}")
    if len(found) > 1:
        raise DataError(f"{table.file}: the columns {table.titles(found)} both name the split. Remove one")
    return (found[0] if found else None), unclear


def _find_label(table: Table, others: list[int]) -> tuple[int, int | None]:
    """-> (the column of the labels, the column of their numeric codes or None). Raises DataError."""
    words = {position: word_of(table.header[position]) for position in others} if table.header else {}
    for known in (LABEL_WORDS, MORE_LABEL_WORDS):
        found = [position for position, word in words.items() if word in known]
        if len(found) == 1:
            return found[0], None
        if len(found) == 2 and (pair := _label_and_code(table, found)):
            return pair
        if found:
            raise DataError(f"{table.file}: {' and '.join(map(table.title, found))} may both be the labels. Add --label_column "
                            f"with the right one (columns: {table.titles()})")
    left = [position for position in others if words.get(position, "-") not in INDEX_WORDS]
    if len(left) > 1:
        left = [position for position in left if not _is_index(table.column(position))]
    if len(left) == 1:
        return left[0], None
    if table.header and len(left) > 1 and _one_hot(table, left):
        raise DataError(f"{table.file}: the columns {table.titles(left)} are one-hot labels, which are not supported. Write the "
                        "name of the class into a single column called label")
    raise DataError(f"{table.file}: the column of the labels is unclear. Add --label_column with "
                    f"{'its name' if table.header else 'its number, from 1'} (columns: {table.titles()})")


def _label_and_code(table: Table, found: list[int]) -> tuple[int, int] | None:
    """Return the columns of a label and its code (label and label_id, class_name and class_id) if the two match one to one."""
    for label, code in (found, found[::-1]):
        stem, of_code = (word_of(table.header[position]) for position in (label, code))
        pairs = set(zip(table.column(label), table.column(code)))
        if of_code in (f"{stem}id", f"{stem.removesuffix('name')}id") and (
                len(pairs) == len(set(table.column(label))) == len(set(table.column(code)))):
            return label, code
    return None


def _one_hot(table: Table, positions: list[int]) -> bool:
    values = [[row[position] for position in positions] for row in table.rows]
    return all(set(row) <= {"0", "1", "0.0", "1.0"} and sum(map(float, row)) == 1 for row in values)


def _is_index(values: list[str]) -> bool:
    """Whether the values count from 0 or 1, as the index that pandas writes: not labels."""
    start = int(values[0]) if values[0] in ("0", "1") else None
    return start is not None and len(values) > 2 and values == list(map(str, range(start, len(values) + start)))
