"""A data set in lists: CSV files that name images and their labels."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from . import overlap
from .classes import Classes, check_wanted
from .image_files import existing_images
from .layouts import BY_DEFAULT, Reading
from .splits import DataError, Splits

MAX_LINE_BYTES = 1 << 16          # of a list of images
HEADER = ({"path", "image", "file", "filename", "image_path", "file_path"}, {"label", "class"})


def csv_lists(data_dir: str, reading: Reading = BY_DEFAULT) -> Splits:
    """DATA_DIR/train.csv, val.csv and, if it is there, test.csv: rows of path,label; paths count from DATA_DIR.

    The labels of train.csv are the classes, in the order of classes.py. Raises DataError with file and line.
    """
    files = {split: Path(data_dir) / f"{split}.csv" for split in ("train", "val", "test")}
    if not (files["train"].is_file() and files["val"].is_file()):
        gone = files["val"] if files["train"].is_file() else files["train"]
        raise DataError(f"no such file: {gone} (--data_dir {data_dir} must hold train.csv and val.csv, and may hold test.csv)")
    if not files["test"].exists():
        del files["test"]
    rows = {split: _csv_rows(file) for split, file in files.items()}
    found = {label for _, _, label in rows["train"]}
    classes = Classes(reading.classes, found)
    check_wanted(reading.classes, classes, found, data_dir)
    images = {}
    for split, file in files.items():
        for number, _, label in rows[split]:
            if classes.label(label) is None:
                raise DataError(f"{file}:{number}: the label {label!r}{classes.hint(label)} does not occur in "
                                f"{files['train'].name}")
        samples = [(os.path.join(data_dir, path), classes.label(label)) for _, path, label in rows[split]]
        images[split] = existing_images(samples, data_dir, lambda row, split=split, file=file: f"{file}:{rows[split][row][0]}")
    val = images["val"]
    paths = {split: [os.path.normpath(path) for path, _ in own.samples] for split, own in images.items()}
    notes = (*classes.notes, *overlap.shared_files(images, paths, classes.names))
    return Splits(images["train"], val, images.get("test", val), "val" if "test" in images else "test", classes.names,
                  notes=notes)


def _csv_rows(file: Path) -> list[tuple[int, str, str]]:
    """(line, path, label)"""
    rows, shape = [], 'a row is path,label (with double quotes around what holds a comma: "a,b.png",cat)'
    for position, (number, line) in enumerate(text_lines(file)):
        try:
            cells = [cell.strip() for cell in next(csv.reader([line], strict=True))]
        except csv.Error as error:
            raise DataError(f"{file}:{number}: {error}; {shape}") from error
        if len(cells) != 2:
            raise DataError(f"{file}:{number}: {'no comma' if len(cells) == 1 else f'{len(cells)} columns'}; {shape}")
        if position == 0 and all(cell.lower() in words for cell, words in zip(cells, HEADER)):
            continue
        if not all(cells):
            raise DataError(f"{file}:{number}: empty {'label' if cells[0] else 'path'}; {shape}")
        rows.append((number, *cells))
    if not rows:
        raise DataError(f"{file}: no rows; {shape}")
    return rows


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Read the lines that are not blank -> (number, from 1; line). Raises DataError unless it is UTF-8 text of a sane size."""
    if not file.is_file():
        raise DataError(f"no such file: {file}")
    with open(file, "rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES), b""), 1):
            if len(line) == MAX_LINE_BYTES:
                raise DataError(f"{file}:{number}: the line is longer than {MAX_LINE_BYTES:,} bytes: not a list of images")
            if b"\0" in line:
                raise DataError(f"{file}:{number}: NUL bytes: not plain text; save it as UTF-8")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{file}:{number}: not UTF-8 text ({error.reason} in column {error.start + 1})") from error
            if text:
                yield number, text
