"""Images in files: decoding, and the two ways to name them, a tree of class folders or lists in CSV.

A file may hold anything: whatever is wrong with it raises an ImageError, before memory is allocated for its pixels.
"""

import contextlib
import csv
import functools
import hashlib
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from .decode import IMAGE_FORMATS, MAX_PIXELS, opened_image, to_rgb, undecoded
from .splits import DataError, ImageError, Splits, abbreviate

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MAX_IMAGE_BYTES = 8 * MAX_PIXELS  # what 16 bits and four channels take unpacked
MAX_REASON = 200                  # characters of Pillow's complaint
MAX_LINE_BYTES = 1 << 16          # of a list of images
HEADER = ({"path", "image", "file", "filename", "image_path", "file_path"}, {"label", "class"})

# Pillow warns of what is reported here anyway (large images) or does not matter (damaged EXIF).
warnings.filterwarnings("ignore", module=r"PIL\.")

# ------------------------------------------------------------------------------------------------- decoding


class FileImages(Dataset):
    """Images in files, decoded when they are asked for. Their names are paths from `root`, the folder of the data set."""

    def __init__(self, samples: list[tuple[str, int]], root: str | Path = "."):
        self.samples, self.root = samples, Path(root)
        self.targets = np.array([label for _, label in samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        with _reading(path) as stream:
            return to_rgb(opened_image(stream)), label

    def source(self, index: int) -> tuple[Image.Image, int]:
        """As [index], but a JPEG is opened and not decoded (decode.py): transforms.py decodes what a crop needs. A failure
        there raises the same ImageError."""
        path, label = self.samples[index]
        with _reading(path) as stream:
            return undecoded(stream, functools.partial(_image_error, path)), label

    def dimensions(self, index: int) -> tuple[int, int]:
        """Width and height, from the header. Raises ImageError."""
        with _reading(self.samples[index][0]) as stream:
            return opened_image(stream).size

    def name(self, index: int) -> str:
        path = Path(self.samples[index][0])
        try:
            path = path.relative_to(self.root)
        except ValueError:
            if ".." not in path.parts:          # a list may name files by absolute paths
                path = Path(os.path.relpath(path, self.root))
        if ".." in path.parts or path.is_absolute():
            # Outside, or beyond a link that only the file system can follow: the path's digest keeps it apart.
            return f"outside/{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}/{path.name}"
        return path.as_posix()

    def content(self, index: int) -> bytes:
        with _reading(self.samples[index][0], "cannot be read") as stream:
            return stream.read()


@contextlib.contextmanager
def _reading(path: str, what: str = "cannot be read as an image") -> Iterator[BinaryIO]:
    """Open the file. Every error while it is read becomes an ImageError: of a damaged file Pillow lets out many kinds."""
    try:
        with _opened(path) as stream:
            yield stream
    except Exception as error:
        raise _image_error(path, error, what) from error


def _image_error(path: str, error: Exception, what: str = "cannot be read as an image") -> ImageError:
    advice = "make it readable" if isinstance(error, PermissionError) else "remove or replace it"
    return ImageError(f"{shown(path)}: {what} ({_reason(error)})", advice)


def _opened(path: str) -> BinaryIO:
    """Open a regular file of a reasonable size. Raises ValueError for others, such as a pipe, which would block."""
    stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY))
    status = os.fstat(stream.fileno())
    regular, size = stat.S_ISREG(status.st_mode), status.st_size
    if regular and 0 < size <= MAX_IMAGE_BYTES:
        return stream
    stream.close()
    raise ValueError("it is no regular file" if not regular else f"{size:,} bytes, more than {MAX_IMAGE_BYTES:,}" if size
                     else "it is empty")


def _reason(error: Exception) -> str:
    """The reason of an error in one line, without the path and cut to MAX_REASON characters."""
    known = {FileNotFoundError: "no such file", Image.DecompressionBombError: f"more than {MAX_PIXELS:,} px",
             UnidentifiedImageError: f"of none of the formats {', '.join(IMAGE_FORMATS)}, or damaged from its beginning"}
    text = known.get(type(error)) or (error.strerror if isinstance(error, OSError) else None) or str(error)
    text = re.sub("^[A-Z](?=[a-z])", lambda first: first[0].lower(), text)              # but not of SOI, PNG
    return shown(text or type(error).__name__)[:MAX_REASON]


def shown(text: str) -> str:
    """Escape what a terminal cannot show: names of files may hold line breaks, control characters, undecodable bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


# --------------------------------------------------------------------------------------------------- folders


def folder(data_dir: str, classes_wanted: int | None = None) -> Splits:
    """DATA_DIR/train/CLASS/... and DATA_DIR/val/CLASS/...: the folders of train are the classes, none of them empty. In val
    a class may be missing or empty; another one there is refused, since one of the two is named wrongly.

    With class folders in DATA_DIR/test too that is the test set, and `val` is what is chosen on. (ImageNet's test/ has none,
    nor labels.) DATA_DIR/CLASS/... alone, without train/ and val/, gives everything as `train` and an empty `test`.
    """
    roots = {split: Path(data_dir) / split for split in ("train", "val")}
    if all(root.is_dir() for root in roots.values()) and classes_wanted is None and class_folders(Path(data_dir) / "test"):
        roots["test"] = Path(data_dir) / "test"
    whole = classes_wanted is None and not any(root.is_dir() for root in roots.values()) and bool(class_folders(Path(data_dir)))
    roots = {"train": Path(data_dir)} if whole else roots
    classes = {split: _class_folders(root, data_dir) for split, root in roots.items()}
    names = classes["train"]
    for other in classes:
        if set(classes[other]) - set(names):
            only = [f"only in {one}: {abbreviate(set(classes[one]) - set(classes[two]))}"
                    for one, two in (("train", other), (other, "train")) if set(classes[one]) - set(classes[two])]
            raise DataError(f"{data_dir}: train and {other} have different classes ({'; '.join(only)})")
    if classes_wanted not in (None, len(names)):
        raise DataError(f"{data_dir} has {len(names)} classes, not {classes_wanted}: for other images take --dataset folder")
    images = {}
    for split, root in roots.items():
        samples = [(path, label) for label, name in enumerate(names) for path in _images_below(root / name)]
        images[split] = FileImages(samples, data_dir)
        counts = np.bincount(images[split].targets, minlength=len(names))
        if not (counts.all() if split == "train" else counts.any()):
            empty = abbreviate(names[label] for label in np.flatnonzero(counts == 0))
            other = " (DATA_DIR has neither train/ nor val/, so that its folders are taken for classes)" if whole else ""
            raise DataError(f"{root}: no images ({', '.join(IMAGE_EXTENSIONS)}) of class {empty}{other}")
    val = images.get("val", FileImages([]))
    return Splits(images["train"], val, images.get("test", val), "val" if "test" in images else "test", tuple(names))


def _class_folders(root: Path, data_dir: str) -> list[str]:
    if not root.is_dir():
        raise DataError(f"no such folder: {root} (--data_dir {data_dir} must hold train/ and val/, with one folder a class)")
    names = class_folders(root)
    if not names and any(entry.suffix.lower() in IMAGE_EXTENSIONS for entry in root.iterdir()):
        raise DataError(f"{root} holds images but no class folders: sort them into one folder a class first "
                        "(ImageNet's validation images are published unsorted, with their labels in a list)")
    if not names:
        raise DataError(f"{root} holds no class folders (one folder a class, with its images inside)")
    return names


def class_folders(root: Path) -> list[str]:
    entries = root.iterdir() if root.is_dir() else ()
    return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _images_below(top: Path) -> list[str]:
    """Image files at any depth, folder by folder. Hidden ones (.ipynb_checkpoints, and the ._NAME.jpg that macOS writes
    beside a file) are skipped, which torchvision takes."""
    return [os.path.join(root, name) for root, names in sorted(files_below(top)) for name in sorted(names)
            if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")]


def files_below(top: str | Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files), every folder once: by its own path, else by the first link to it in alphabetical order,
    or links among folders would multiply the files. Hidden folders, and links to an enclosing folder, are skipped."""
    seen, starts = set(), [str(top)]
    while starts:
        links = []
        for root, folders, names in (step for start in starts for step in os.walk(start)):
            real = os.path.realpath(root)
            folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]
            if real not in seen:
                seen.add(real)
                yield root, names
            inside = [os.path.join(place, "") for place in (os.path.realpath(top), real)]
            links += [path for name in folders if os.path.islink(path := os.path.join(root, name)) and not any(
                place.startswith(os.path.join(os.path.realpath(path), "")) for place in inside)]
        starts = sorted(links)


# ------------------------------------------------------------------------------------------------------ lists


def csv_lists(data_dir: str) -> Splits:
    """DATA_DIR/train.csv, val.csv and, if it is there, test.csv: rows of path,label; paths count from DATA_DIR.

    The labels of train.csv are the classes: in numerical order if all are integers, so that 0 .. C-1 stay what they
    are, else by name. Raises DataError with file and line.
    """
    files = {split: Path(data_dir) / f"{split}.csv" for split in ("train", "val", "test")}
    if not (files["train"].is_file() and files["val"].is_file()):
        gone = files["val"] if files["train"].is_file() else files["train"]
        raise DataError(f"no such file: {gone} (--data_dir {data_dir} must hold train.csv and val.csv, and may hold test.csv)")
    if not files["test"].exists():
        del files["test"]
    rows = {split: _csv_rows(file) for split, file in files.items()}
    names = {label for _, _, label in rows["train"]}
    integers = all(re.fullmatch("0|[1-9][0-9]{0,8}", name) for name in names)
    names = sorted(names, key=int if integers else None)
    index = {name: label for label, name in enumerate(names)}
    images = {}
    for split, file in files.items():
        for number, _, label in rows[split]:
            if label not in index:
                raise DataError(f"{file}:{number}: the label {label!r} does not occur in {files['train'].name}")
        samples = [(os.path.join(data_dir, path), index[label]) for _, path, label in rows[split]]
        images[split] = existing_images(samples, data_dir, lambda row, split=split, file=file: f"{file}:{rows[split][row][0]}")
    val = images["val"]
    return Splits(images["train"], val, images.get("test", val), "val" if "test" in images else "test", tuple(names))


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


def existing_images(samples: list[tuple[str, int]], root: str | Path, named_by: Callable[[int], str]) -> FileImages:
    """Raise DataError if a file does not exist; named_by(position of the sample) is the place that names it."""
    absent = [position for position, (path, _) in enumerate(samples) if not os.path.isfile(path)]
    if absent:
        others = f", nor {len(absent) - 1} more" if len(absent) > 1 else ""
        raise DataError(f"{named_by(absent[0])}: the image {samples[absent[0]][0]} does not exist{others}")
    return FileImages(samples, root)


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
