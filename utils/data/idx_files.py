"""MNIST (LeCun et al.) and Fashion-MNIST (arXiv 1708.07747): the published idx files, in the folders and with the names that
torchvision, Kaggle and other programs give them, or Kaggle's csv of pixels. No size or count in them is trusted."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from .csv_lists import ENDINGS, lists_in
from .csv_tables import MAX_LIST_BYTES
from .downloads import download, torchvision_dataset
from .splits import ArrayImages, DataError, Splits, abbreviate

MAX_IDX_BYTES = 1 << 30          # unpacked; the largest of the MNIST family has half of that
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
SIDE = 28                        # of the images in Kaggle's csv


def mnist(name: str, data_dir: str, can_flip: bool) -> Splits:
    """Load the four idx files, packed or not, from DATA_DIR/MNIST/raw (as torchvision; or FashionMNIST), DATA_DIR/raw,
    DATA_DIR/MNIST or DATA_DIR; without them Kaggle's csv files from one of the last two; without those, download them.
    Raises DataError."""
    kind = torchvision_dataset(name)
    root = Path(data_dir)
    places = (root / kind.__name__ / "raw", root, root / "raw", root / kind.__name__)
    classes = tuple(name.partition(" - ")[0] for name in kind.classes)                # "7 - seven" of MNIST
    files = next(filter(None, map(_idx_files, places)), [])
    tables = [place for place in (root, root / kind.__name__) if place.is_dir() and any(
        path.suffix.lower() in ENDINGS for path in place.iterdir())]
    if not files and tables:
        return _from_tables(tables[0], classes, can_flip)
    if not files:
        names = ", ".join(name for name, _ in kind.resources)
        download(kind, data_dir, f"download {names} from {kind.mirrors[0]} on another machine and copy them to {places[0]}")
        files = _idx_files(places[0])
    arrays = []
    for part, (images_file, labels_file) in (("train", files[:2]), ("test", files[2:])):
        images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
        if len(images) != len(labels):
            raise DataError(f"{images_file} has {len(images)} images, but {labels_file} {len(labels)} labels. Replace them by a "
                            "pair from the same data set")
        arrays.append(ArrayImages(images, labels, part))
    return Splits(arrays[0], arrays[1], arrays[1], "test", classes, can_flip)


def _idx_files(place: Path) -> list[Path]:
    """Return the files of training images and labels, test images and labels; [] if there are none. Packed files come first,
    because only they have a checksum. Raises DataError if some are missing."""
    found = {}
    for name in IDX_FILES:
        dotted = ".idx".join(name.rsplit("-idx", 1))                                  # the name that old Windows programs give it
        for known in (f"{name}.gz", f"{dotted}.gz", name, dotted):
            file = next((file for file in (place / known, place / known / known, place / known.removesuffix(".gz") / known)
                         if file.is_file()), None)                                    # Kaggle unpacks into a folder of that name
            if file is not None:
                found.setdefault(name, file)
    if found and len(found) < 4:
        raise DataError(f"{place}: {abbreviate(set(IDX_FILES) - set(found))} missing (.gz or unpacked). Copy all four there")
    return list(found.values())


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Read an idx file (LeCun's format: 0, 0, type, dimensions, big-endian sides, data) -> uint8 array. Raises DataError.

    Whether it is packed is decided by its first bytes, not by its name. No more is read or unpacked than the header claims, and
    that must fit the size of the file.
    """
    size, header = file.stat().st_size, 4 + 4 * dimensions
    try:
        with open(file, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(file, "rb") as stream:
            start = stream.read(header)
            if len(start) < header or start[:4] != bytes((0, 0, 8, dimensions)):
                raise DataError(f"{file}: damaged or incomplete (not an idx file of bytes in {dimensions} dimensions). Delete it "
                                "to have it downloaded again")
            shape = struct.unpack(f">{dimensions}I", start[4:])
            count = math.prod(shape)
            # Deflate cannot pack to less than 1/1032 of the size (zlib's documentation).
            possible = count <= size * 1032 if packed else header + count == size
            claim = f"{file}: damaged or incomplete: its header claims {' x '.join(map(str, shape))} bytes"
            if not 0 < count <= MAX_IDX_BYTES or not possible:
                raise DataError(f"{claim}, which does not fit its {size:,} bytes. Delete it to have it downloaded again")
            data = stream.read(count + 1)         # one more, so that gzip reaches the end and compares its checksum
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: damaged or incomplete ({error}). Delete it to have it downloaded again") from error
    if len(data) != count:
        raise DataError(f"{claim}, but it has {'more' if len(data) > count else 'fewer'}. Delete it to have it downloaded again")
    return np.frombuffer(data, np.uint8).reshape(shape)


# ------------------------------------------------------------------------------------------- Kaggle's csv of pixels


def _from_tables(place: Path, classes: tuple[str, ...], can_flip: bool) -> Splits:
    """Load lists of label,pixel,pixel,...: one to train and one to test on, such as mnist_train.csv and mnist_test.csv. A test
    list without labels (as in Kaggle's competition) is not used. Raises DataError."""
    files = lists_in(str(place))
    arrays, notes = {}, ["images and labels from " + ", ".join(str(path) for path in files.values())]
    for part, file in files.items():
        images, labels = read_pixels(file)
        if labels is not None:
            arrays[part] = ArrayImages(images, labels, part)
        elif part == "train":
            raise DataError(f"{file}: pixels without labels ({SIDE * SIDE} columns) cannot be trained on. Use the file that has "
                            "a label before the pixels")
        else:
            notes.append(f"{file} has no labels and is not used")
    val = arrays.get("val", arrays.get("test", ArrayImages(np.empty((0, SIDE, SIDE), np.uint8), [])))
    return Splits(arrays["train"], val, arrays.get("test", val), "val" if "val" in arrays else "test", classes, can_flip,
                  notes=tuple(notes))


def read_pixels(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read rows of a label and 784 pixels, or only the pixels, with or without a header -> uint8 (n, 28, 28), labels or None.

    Raises DataError.
    """
    try:
        if file.stat().st_size > MAX_LIST_BYTES:
            raise DataError(f"{file}: {file.stat().st_size:,} bytes are too large for images of 28 x 28 px (at most "
                            f"{MAX_LIST_BYTES:,})")
        with open(file, encoding="utf-8-sig") as stream:
            first = stream.readline(1 << 16).split(",")
        if len(first) not in (SIDE * SIDE, SIDE * SIDE + 1):
            raise DataError(f"{file}: {len(first)} columns, but Kaggle's csv of this data set has a label and {SIDE * SIDE} "
                            "pixels. Lists of paths and labels are read with --dataset csv")
        header = not all(cell.strip().isdecimal() for cell in first)
        rows = np.loadtxt(file, np.int32, delimiter=",", skiprows=int(header), ndmin=2, encoding="utf-8-sig")
    except (ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: damaged or incomplete ({' '.join(str(error).split())}). Download it again") from error
    if not len(rows) or rows.min() < 0 or rows.max() > 255:
        raise DataError(f"{file}: damaged (pixels and labels must be numbers from 0 to 255). Download it again")
    images = rows[:, -SIDE * SIDE:].astype(np.uint8).reshape(-1, SIDE, SIDE)
    return images, rows[:, 0] if len(first) > SIDE * SIDE else None
