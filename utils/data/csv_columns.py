"""Which column of a list holds the paths, which the labels, which the split: by name, by what the files show, by flag."""

import dataclasses
import re
from collections.abc import Sequence

from .csv_tables import SHAPE, Table
from .image_files import IMAGE_EXTENSIONS, shown
from .layouts import ROLE
from .listed_files import IS_URL, FileFinder, is_url
from .splits import DataError

# A header of two columns that is one whatever files there are.
PLAIN_HEADER = ({"path", "image", "file", "filename", "image_path", "file_path"}, {"label", "class"})
# Words of headers, without spaces, dots, hyphens and underscores; the first that occurs wins.
PATH_WORDS = ("path", "imagepath", "filepath", "imgpath", "filename", "file", "imagefile", "imagefilename", "imagename",
              "imgname", "image", "img", "picture", "photo", "imageid", "imgid", "idcode", "isicid", "id", "name")
UNLIKELY = (len(PATH_WORDS), True)      # _likelihood of a column with neither such a word nor the ending of an image
LABEL_WORDS = {"label", "labels", "class", "classes", "classname", "classid", "classlabel", "labelname", "labelid"}
MORE_LABEL_WORDS = {"category", "categories", "categoryname", "categoryid", "target", "targets", "emotion", "emotions",
                    "expression", "species", "breed", "variety", "diagnosis", "dx", "finding", "disease", "level", "y", "tag",
                    "genre"}
SPLIT_WORDS = {"split", "set", "subset", "partition", "usage", "dataset", "phase", "fold"}
INDEX_WORDS = {"", "unnamed0", "index"}
PARTS = {**ROLE, "publictest": "val", "privatetest": "test"}
# is_train, is_valid, is_training_image, ... with yes and no.
IS_PART = re.compile(rf"is({'|'.join(ROLE)})(image|img|set|data|sample)?")
YES, NO = ("true", "1", "1.0", "yes", "y", "t"), ("false", "0", "0.0", "no", "n", "f")
PIXELS = re.compile(r"(pixel|px)_?[0-9]+|[0-9]{1,2}x[0-9]{1,2}")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Positions of columns; folders: what the paths count from ([]: none holds any of them)."""

    path: int
    label: int
    folders: list[str]
    split: int | None = None
    unclear: str = ""             # a warning about a column that looks like a split and is none
    code: int | None = None       # the column that has a number for each label (label_id beside label)


def word_of(name: str) -> str:
    return re.sub(r"[\s._\-:#]+", "", name).lower()


def is_plain_header(cells: Sequence[str]) -> bool:
    return len(cells) == 2 and all(cell.lower() in known for cell, known in zip(cells, PLAIN_HEADER))


def with_header(table: Table, path_column: str | None, label_column: str | None, finder: FileFinder, part: str,
                header_wanted: tuple[str, ...] = ()) -> Table:
    """The table with its first row as the header, where it is one.

    It is one where the flags or `header_wanted` (that of the list to train on) name its cells, where it is the plain
    path,label, or where it names no file and other rows, or words of headers, say that a file should stand there.
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
        raise DataError(f"{table.file}: no rows; {SHAPE}")
    return dataclasses.replace(table, header=tuple(first), rows=rest, lines=table.lines[1:])


def find_columns(table: Table, path_column: str | None, label_column: str | None,
                 finder: FileFinder, part: str) -> Columns:
    """Raises DataError, with the columns that there are, where it is not plain which one is meant."""
    if any(PIXELS.fullmatch(name.lower()) for name in table.header) or "pixels" in map(str.lower, table.header):
        raise DataError(f"{table.file} holds pixels (columns {table.titles()}), not paths of images. Kaggle's csv of MNIST and "
                        "Fashion-MNIST (label, then 784 pixels) is read by --dataset mnist and fashion_mnist; make image files "
                        "of any other")
    if table.width < 2:
        raise DataError(f"{table.place(0)}: no comma, semicolon, tab or | between columns; {SHAPE}")
    label = _position(table, label_column, "--label_column") if label_column else None
    path = _position(table, path_column, "--path_column") if path_column else _find_path(table, label, finder, part)
    others = [position for position in range(table.width) if position not in (path, label)]
    split, unclear = _find_split(table, others)
    code = None
    if label is None:
        label, code = _find_label(table, [position for position in others if position != split])
    if label == path:
        raise DataError(f"{table.file}: --path_column and --label_column name the same column. It has {table.titles()}")
    return Columns(path, label, finder.folders_of(table.column(path), part), split, "" if label == split else unclear, code)


def find_path_column(table: Table, path_column: str | None, finder: FileFinder, part: str) -> int:
    """The position of the paths alone, of a list whose labels do not matter. Raises DataError."""
    if path_column:
        return _position(table, path_column, "--path_column")
    return 0 if table.width == 1 else _find_path(table, None, finder, part)


def _position(table: Table, wanted: str, flag: str) -> int:
    """The column of this name or, where none is called so, of this number from 1."""
    for names, name in ((table.header, wanted), (tuple(map(str.lower, table.header)), wanted.lower())):
        if names.count(name) == 1:
            return names.index(name)
    if wanted.isdecimal() and 1 <= int(wanted) <= table.width and wanted not in table.header:
        return int(wanted) - 1
    there = f"the columns {table.titles()}" if table.header else f"{table.width} columns without names: give a number from 1"
    raise DataError(f"{flag} {wanted}: no such column in {table.file} (or two). It has {there}")


def _find_path(table: Table, label: int | None, finder: FileFinder, part: str) -> int:
    words = [word_of(name) for name in table.header]
    found = [position for position in _columns_of_files(table, words, finder, part) if position != label]
    if found:
        ranks = [_likelihood(table, words, position) for position in found]
        if len(found) == 1 or table.width == 2 or ranks[0] < ranks[1]:
            return found[0]
        raise DataError(f"{table.file}: the columns {table.titles(found)} hold names of files: add --path_column with the right "
                        "one")
    likeliest = min((position for position in range(table.width) if position != label),
                    key=lambda position: (_likelihood(table, words, position), position))
    if _likelihood(table, words, likeliest) != UNLIKELY or (table.width == 2 and label is None):
        return likeliest                                        # then the images that do not exist are reported
    for number, row in enumerate(table.rows[:2]):               # the first may be a header that is not known as one
        if url := next(filter(is_url, row), None):
            raise DataError(f"{table.place(number)}: {shown(url)} {IS_URL}")
    raise DataError(f"{table.file}: which column holds the paths of the images? None names files of {table.file.parent}. It has "
                    f"{table.titles()}: add --path_column, and --image_dir if the images are elsewhere")


def _rank(words: list[str], position: int) -> int:
    word = words[position] if words else ""
    word = word if word in PATH_WORDS else word.removesuffix("s")
    return PATH_WORDS.index(word) if word in PATH_WORDS else len(PATH_WORDS)


def _columns_of_files(table: Table, words: list[str], finder: FileFinder, part: str) -> list[int]:
    """The columns that name files, the likeliest first: by a word of headers, then names with an ending, then the first.

    Folders other than DATA_DIR are looked into where no column names files of that.
    """
    ranks = {}
    for position in range(table.width if table.rows else 0):
        if not words or words[position] not in LABEL_WORDS | MORE_LABEL_WORDS | INDEX_WORDS:
            ranks[position] = (_likelihood(table, words, position), position)
    likely = [position for position, (rank, _) in ranks.items() if rank != UNLIKELY]
    for positions, everywhere in ((list(ranks), False), (likely or list(ranks), True)):
        found = [position for position in positions if finder.folders_of(table.column(position), part, everywhere)]
        if found:
            return sorted(found, key=ranks.get)
    return []


def _likelihood(table: Table, words: list[str], position: int) -> tuple[int, bool]:
    """Of holding paths: the rank of its word, then whether it lacks the ending of an image; the smaller, the likelier."""
    return _rank(words, position), not table.rows[0][position].lower().endswith(IMAGE_EXTENSIONS)


def parts_of(table: Table, position: int) -> dict[str, str]:
    """What the values of a column that divides the images mean, in small letters."""
    match = IS_PART.fullmatch(word_of(table.header[position])) if table.header else None
    if match is None:
        return PARTS
    part = ROLE[match[1]]
    return dict.fromkeys(YES, part) | dict.fromkeys(NO, "val" if part == "train" else "train")


def _find_split(table: Table, others: list[int]) -> tuple[int | None, str]:
    """The column whose values are words for train, val and test, of two parts at least."""
    found, unclear = [], ""
    for position in others:
        values, parts = {value.lower() for value in table.column(position)}, parts_of(table, position)
        named = bool(table.header) and (parts is not PARTS or word_of(table.header[position]) in SPLIT_WORDS)
        if values <= parts.keys() and (len({parts[value] for value in values}) > 1 or (named and parts is PARTS)):
            found.append(position)
        elif named and 1 < len(values) <= 20:
            wanted = "train, val and test" if parts is PARTS else "true and false"
            unclear = (f"warning: {table.file}: column {table.title(position)} is not used to divide the images: its values "
                       f"{', '.join(map(shown, sorted(values)[:5]))} are not {wanted}")
    if len(found) > 1:
        raise DataError(f"{table.file}: the columns {table.titles(found)} both divide the images: remove one")
    return (found[0] if found else None), unclear


def _find_label(table: Table, others: list[int]) -> tuple[int, int | None]:
    """-> (the column of the labels, that of their codes)"""
    words = {position: word_of(table.header[position]) for position in others} if table.header else {}
    for known in (LABEL_WORDS, MORE_LABEL_WORDS):
        found = [position for position, word in words.items() if word in known]
        if len(found) == 1:
            return found[0], None
        if len(found) == 2 and (pair := _label_and_code(table, found)):
            return pair
        if found:
            raise DataError(f"{table.file}: {' and '.join(map(table.title, found))} may both be the labels: add --label_column "
                            f"with the right one (columns: {table.titles()})")
    left = [position for position in others if words.get(position, "-") not in INDEX_WORDS]
    if len(left) > 1:
        left = [position for position in left if not _counts(table.column(position))]
    if len(left) == 1:
        return left[0], None
    if table.header and len(left) > 1 and _one_hot(table, left):
        raise DataError(f"{table.file}: the columns {table.titles(left)} hold one 1 a row, for the class of the image. Write its "
                        "name into one column instead, called label")
    raise DataError(f"{table.file}: which column holds the labels? It has {table.titles()}: add --label_column with "
                    f"{'its name' if table.header else 'its number, from 1'}")


def _label_and_code(table: Table, found: list[int]) -> tuple[int, int] | None:
    """Of label and label_id, class_name and class_id: (the label's, its code's), if each label has one code and its own."""
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


def _counts(values: list[str]) -> bool:
    """The values are 0, 1, 2, ... (or begin at 1), as the index that pandas writes: no labels."""
    start = int(values[0]) if values[0] in ("0", "1") else None
    return start is not None and len(values) > 2 and values == list(map(str, range(start, len(values) + start)))
