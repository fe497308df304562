"""A data set in CSV lists of images and their labels."""

import dataclasses
import functools
import os
import re
from pathlib import Path

from utils.files import dead_link

from .classes import INTEGER, Classes
from .csv_columns import PARTS, Columns, find_columns, is_plain_header, parts_of, with_header
from .csv_tables import SEPARATORS, SHAPE, Table, read_table
from .image_files import FileImages, describe_broken_links, entries, shown, splits_in_files
from .layouts import BY_DEFAULT, HELD_OUT, HOLD_OUT, TRAIN, Request, chosen_on_test
from .listed_files import IS_URL, FileFinder, is_absolute, is_url
from .overlap import shared_images
from .splits import DataError, Splits, abbreviate

ENDINGS = (".csv", ".tsv")
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
MANY_LABELS = 12        # with fewer different ones, labels are not checked for being something else
MISSING = {"nan", "na", "none", "null", "<na>", "n/a", "#n/a", "nat"}         # what spreadsheets and pandas write for no value


@dataclasses.dataclass(frozen=True)
class _List:
    """The rows of a list that belong to one part of the data set: "train", "val" or "test"."""

    table: Table
    columns: Columns
    rows: list[int]

    @functools.cached_property
    def names(self) -> list[str]:
        return [self.table.rows[row][self.columns.path] for row in self.rows]

    @functools.cached_property
    def labels(self) -> list[str]:
        return [self.table.rows[row][self.columns.label] for row in self.rows]

    def place(self, number: int) -> str:
        return self.table.place(self.rows[number])


def csv_lists(data_dir: str, request: Request = BY_DEFAULT) -> Splits:
    """Load DATA_DIR/train.csv, and val.csv or test.csv or both if they exist; or one list with a column that names the split.

    A list has rows of path,label, with paths relative to DATA_DIR. Other forms are recognized and reported in `notes`: other
    columns (csv_columns.py), separators and encodings (csv_tables.py), folders and names without an extension
    (listed_files.py). The labels of the training list are the classes, in the order of classes.py.

    A single list is all `train`, with empty `val` and `test`; or all held out, for an evaluation that draws no split.
    Raises DataError with file and line.
    """
    files, finder = lists_in(data_dir, request.need), FileFinder(data_dir, request.image_dir)
    lists, notes = _read_lists(files, request.path_column, request.label_column, finder)
    single = lists.keys() == {"train"} and not request.draws
    if single and request.need == HELD_OUT:
        lists, notes = {"val": lists["train"]}, [*notes, f"using: all images of {lists['train'].table.file} to evaluate"]
    elif any(path.stem != part for part, path in files.items()):
        notes.insert(0, "lists: " + ", ".join(f"{part} from {path}" for part, path in files.items()))
    if single and request.need == TRAIN:
        raise DataError(_nothing_held_out(lists["train"], data_dir, notes))
    trained = [lists["train"]] if "train" in lists else list(lists.values())
    found = {label for own in trained for label in own.labels}
    _check_filled(lists)
    classes = Classes(request.classes, found)
    classes.check(data_dir)
    notes += _check_for_classes(trained[0]) if not request.classes.wanted else []
    images = {part: _images(own, classes, trained[0].table.file.name, finder) for part, own in lists.items()}
    notes += [*classes.notes, *_missing_labels(trained), *shared_images(
        images, classes.names, lambda part, number: f"{shown(lists[part].names[number])} at {lists[part].place(number)}")]
    if images.keys() == {"train", "test"} and request.need == TRAIN and not request.draws:
        test = lists["test"]
        test_set = (f"the {len(test.rows):,} test row{'s' * (len(test.rows) != 1)} of {test.table.file.name} (column "
                    f"{test.table.title(test.columns.split)})"
                    if test.table is lists["train"].table else test.table.file)
        notes.append(chosen_on_test(test_set))
    return splits_in_files(images, data_dir, classes.names, notes)


def _nothing_held_out(train: _List, data_dir: str, notes: list[str]) -> str:
    seen = "".join(f"; {note}" for note in notes)
    return (f"{data_dir} contains {train.table.file.name} ({len(train.rows):,} labeled images), but nothing to validate or test "
            f"on. Add {HOLD_OUT}; or add a val.csv{seen}")


def _check_for_classes(own: _List) -> list[str]:
    """Return a warning if nearly every row has a different label. Raises DataError if the labels are fractional numbers."""
    different = set(own.labels)
    if len(different) < MANY_LABELS or 2 * len(different) < len(own.rows):
        return []
    column = f"{own.table.file}: the labels in column {own.table.title(own.columns.label)}"
    number = f"{len(different):,} different ones in {len(own.rows):,} rows, for example {shown(own.labels[0])}"
    if all(map(NUMBER.fullmatch, different)) and not all(map(INTEGER.fullmatch, different)):
        raise DataError(f"{column} look like measurements, not classes ({number}). Add --label_column with the column of the "
                        "classes, or divide the measurements into a few ranges first")
    if 10 * len(different) < 9 * len(own.rows):
        return []
    return [f"warning: {column} do not look like classes ({number}). To use another column, add --label_column"]


# ------------------------------------------------------------------------------------------------- which files


def lists_in(data_dir: str, need: str = TRAIN) -> dict[str, Path]:
    """Find the list of each part by the words in the file names; a single list is "train". The result always has "train", except
    for an evaluation (need=HELD_OUT). Raises DataError."""
    root = Path(data_dir)
    found = sorted(path for path in _entries(root) if path.suffix.lower() in ENDINGS and not path.name.startswith("."))
    files = {part: path for part in ("train", "val", "test") if (path := _only(part, found, data_dir))}
    if "train" in files or (files and need == HELD_OUT):
        return files
    if len(found) == 1:
        return {"train": found[0]}
    if found:
        raise DataError(f"{data_dir} contains {abbreviate(path.name for path in found)}, but no train.csv. Rename the list to "
                        "train on to train.csv, and move files that are not lists of images elsewhere")
    deeper = [str(path) for folder in _entries(root) if folder.is_dir() for path in _entries(folder)
              if path.suffix.lower() in ENDINGS]
    if deeper:
        raise DataError(f"{data_dir} contains no csv file itself, but there {'is' if len(deeper) == 1 else 'are'} "
                        f"{abbreviate(deeper)}. Set --data_dir {Path(min(deeper)).parent}, or move the list to {data_dir}")
    there = abbreviate(path.name + "/" * path.is_dir() for path in _entries(root))
    raise DataError(f"{data_dir} contains no csv file{there and f', only {there}'}. It must contain train.csv and val.csv, or "
                    f"one list together with VAL_FRACTION=0.2 (--val_fraction 0.2). {SHAPE}")


def _entries(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in entries(folder) if not entry.name.startswith(".")]


def _only(part: str, files: list[Path], data_dir: str) -> Path | None:
    """Return the list of the part: the one named exactly so (val.csv, Valid.csv), else the one with the word in its name
    (train_labels.csv). Raises DataError if there are several."""
    exact = [path for path in files if PARTS.get(path.stem.lower()) == part]
    chosen = exact or [path for path in files if {PARTS[word] for word in _words(path.stem) if word in PARTS} == {part}]
    if len(chosen) > 1:
        raise DataError(f"{data_dir}: {abbreviate(path.name for path in chosen)} may each be the list for {part}. Keep only one "
                        "of them")
    return chosen[0] if chosen else None


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+|[0-9]+", name)]


# ------------------------------------------------------------------------------------------------- which rows


def _read_lists(files: dict[str, Path], path_column: str | None, label_column: str | None,
                finder: FileFinder) -> tuple[dict[str, _List], list[str]]:
    """-> (the list of each part, notes on how they were read)"""
    first, *others = files
    table = with_header(read_table(files[first]), path_column, label_column, finder, first)
    columns = find_columns(table, path_column, label_column, finder, first)
    lists = {first: _List(table, columns, list(range(len(table.rows))))}
    notes = [columns.unclear] if columns.unclear else []
    for part in others:
        own = _read_like(files[part], part, lists[first], finder)
        if own is None:
            notes.append(f"{files[part]} has no labels and is not used")
        else:
            lists[part] = own
    alike: dict[str, list[str]] = {}
    for own in lists.values():
        alike.setdefault(_describe_reading(own, finder), []).append(own.table.file.name)
    notes[:0] = [f"{', '.join(names)}: {text}" for text, names in alike.items() if text]
    if columns.split is not None and first == "train":
        lists = _divide(lists)
        if len(files) == 1:
            counts = {part: len(own.rows) for part, own in lists.items()}
            notes.append(f"{table.file.name}: split by column {table.title(columns.split)}: "
                         + ", ".join(f"{count:,} row{'s' * (count != 1)} for {part}" for part, count in counts.items()))
    return lists, notes


def _read_like(file: Path, part: str, first: _List, finder: FileFinder) -> _List | None:
    """Read a list with the columns of the training list -> None if it is a test list without labels. Raises DataError."""
    table = with_header(read_table(file), None, None, finder, part, first.table.header)
    wanted = [str(first.columns.path + 1), str(first.columns.label + 1)]
    if table.header and first.table.header:
        wanted = [first.table.header[int(number) - 1] or number for number in wanted]
        lacks = [name for name in wanted if name.lower() not in map(str.lower, table.header) and not name.isdecimal()]
        if part == "test" and lacks == wanted[1:]:
            return None
        if lacks:
            raise DataError(f"{file}: no column {' or '.join(map(shown, lacks))} as in {first.table.file.name}. The columns are "
                            f"{table.titles()}")
    elif part == "test" and table.width == 1:
        return None
    elif table.width != first.table.width:
        raise DataError(f"{table.place(0)}: {table.width} columns, but {first.table.width} in {first.table.file.name}. {SHAPE}")
    columns = find_columns(table, *wanted, finder, part)
    if first.columns.code is not None and (code := first.table.header[first.columns.code]) in table.header:
        columns = dataclasses.replace(columns, code=table.header.index(code))
    return _List(table, columns, list(range(len(table.rows))))


def _divide(lists: dict[str, _List]) -> dict[str, _List]:
    """Divide a list by its split column. Raises DataError if that contradicts the other lists."""
    first = lists["train"]
    parts = parts_of(first.table, first.columns.split)
    values = [parts[value.lower()] for value in first.table.column(first.columns.split)]
    divided = {part: dataclasses.replace(first, rows=[row for row, value in enumerate(values) if value == part])
               for part in ("train", "val", "test") if part in values}
    column = f"column {first.table.title(first.columns.split)} of {first.table.file}"
    if len(lists) > 1 and divided.keys() != {"train"}:
        other = next(own.table.file.name for part, own in lists.items() if part != "train")
        raise DataError(f"{column} names the split, but there is also {other}. Remove one of the two")
    if "train" not in divided:
        raise DataError(f"{column} has no rows for train")
    return lists if len(lists) > 1 else divided


def _describe_reading(own: _List, finder: FileFinder) -> str:
    """Describe how the list differs from rows of path,label in UTF-8 with paths relative to DATA_DIR; "" if it does not."""
    table, columns, found = own.table, own.columns, []
    if not (table.width == 2 and columns.path == 0 and (not table.header or is_plain_header(table.header))):
        code = f" ({table.title(columns.code)} is a numeric code for it)" if columns.code is not None else ""
        found.append(f"paths from column {table.title(columns.path)}, labels from column {table.title(columns.label)}{code}")
    if table.separator != ",":
        found.append(f"separated by {SEPARATORS[table.separator]}")
    if table.encoding != "utf-8":
        found.append(f"in {table.encoding.upper()}")
    if columns.folders not in ([], [finder.data_dir]):
        found.append(f"images in {' and '.join(map(shown, columns.folders))}")
    first = own.names[0]
    if columns.folders and is_absolute(first) and (path := finder.find(first, columns.folders)) not in (first, None):
        found.append(f"absolute paths of another machine, found by their last parts: {shown(first)} as {shown(path)}")
    return "; ".join(found)


# ---------------------------------------------------------------------------------------------- rows to images


def _check_filled(lists: dict[str, _List]) -> None:
    for own in lists.values():
        for what, values in (("path", own.names), ("label", own.labels)):
            if empty := [number for number, value in enumerate(values) if not value]:
                raise DataError(f"{own.place(empty[0])}: empty {what}{_and_more(own, empty)}. Fill it in or remove the row. "
                                f"{SHAPE}")


def _images(own: _List, classes: Classes, train_name: str, finder: FileFinder) -> FileImages:
    names, labels = own.names, own.labels
    index = {label: classes.label(label) for label in set(labels)}
    unknown = [number for number, label in enumerate(labels) if index[label] is None]
    if unknown:
        raise DataError(f"{own.place(unknown[0])}: the label {classes.describe([labels[unknown[0]]])} does not occur in "
                        f"{train_name}{_and_more(own, unknown)}")
    folders, samples, absent = own.columns.folders or [finder.given or finder.data_dir], [], []
    for number, (name, label) in enumerate(zip(names, labels)):
        try:
            path = finder.find(name, folders)
        except DataError as error:
            raise DataError(f"{own.place(number)}: {error}") from error
        if path is None:
            absent.append(number)
        samples.append((path, index[label]))
    if absent:
        if is_url(names[absent[0]]):
            raise DataError(f"{own.place(absent[0])}: {shown(names[absent[0]])} {IS_URL}")
        path = os.path.join(folders[0], names[absent[0]])
        if dead_link(path):
            gone = [path for path in (os.path.join(folders[0], names[number]) for number in absent) if dead_link(path)]
            raise DataError(f"{own.place(absent[0])}: {describe_broken_links(gone)}")
        others = f" ({len(absent)} missing in all)" if len(absent) > 1 else ""
        other = finder.other_case(names[absent[0]], folders[0])
        advice = (f"; {shown(other)} does: upper and lower case differ" if other else "" if own.columns.folders else
                  ", nor does any other of this list. Add --image_dir with the folder that the paths are relative to")
        raise DataError(f"{own.place(absent[0])}: the image {shown(path)} does not exist{others}{advice}")
    return FileImages(samples, finder.data_dir)


def _and_more(own: _List, numbers: list[int]) -> str:
    lines = [str(own.table.lines[own.rows[number]]) for number in numbers[1:6]]
    more = f" and {len(numbers) - 6} more" if len(numbers) > 6 else ""
    return f" (and in line{'s' * (len(numbers) > 2)} {', '.join(lines)}{more})" if lines else ""


def _missing_labels(lists: list[_List]) -> list[str]:
    """Return warnings, with line numbers, of labels such as NaN that programs write for a missing one. A class may have such a
    name, so these labels count as missing only if they are fewer than half of what the other classes have on average."""
    notes = []
    for own in lists:
        numbers = [number for number, label in enumerate(own.labels) if label.casefold() in MISSING]
        others = len(set(own.labels) - {own.labels[number] for number in numbers})
        if numbers and 2 * len(numbers) * others < len(own.labels) - len(numbers):
            rows = "row" if len(numbers) == 1 else "rows"
            notes.append(f"warning: {own.place(numbers[0])}: the label {shown(own.labels[numbers[0]])} is what spreadsheets and "
                         f"pandas write for a missing one{_and_more(own, numbers)}. Remove the {rows}, unless it is a class")
    return notes
