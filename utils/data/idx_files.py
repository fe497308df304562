"""MNIST (LeCun et al.) and Fashion-MNIST (arXiv 1708.07747): the published idx files, as torchvision, Kaggle and people unpack
and name them, or Kaggle's csv of pixels. No size or count in them is trusted."""

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

MAX_IDX_BYTES = 1 << 30          # unpacked; the largest of the MNIST family is half of it
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
SIDE = 28                        # of the images in Kaggle's csv


def mnist(name: str, data_dir: str, can_flip: bool) -> Splits:
    """The four idx files, packed or not, in DATA_DIR/MNIST/raw (as torchvision; or FashionMNIST), in DATA_DIR/raw, DATA_DIR/MNIST
    or DATA_DIR; else Kaggle's csv in one of the last two; else they are downloaded. Raises DataError."""
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
        download(kind, data_dir, f"fetch {names} from {kind.mirrors[0]} on another machine and put them into {places[0]}")
        files = _idx_files(places[0])
    arrays = []
    for part, (images_file, labels_file) in (("train", files[:2]), ("test", files[2:])):
        images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
        if len(images) != len(labels):
            raise DataError(f"{images_file} has {len(images)} images, {labels_file} {len(labels)} labels: not of one data set")
        arrays.append(ArrayImages(images, labels, part))
    return Splits(arrays[0], arrays[1], arrays[1], "test", classes, can_flip)


def _idx_files(place: Path) -> list[Path]:
    """Images and labels to train, images and labels to test on; [] if there are none. Packed files first: they alone have a
    checksum. Raises DataError if some are missing."""
    found = {}
    for name in IDX_FILES:
        dotted = ".idx".join(name.rsplit("-idx", 1))                                  # as old programs for Windows unpack it
        for known in (f"{name}.gz", f"{dotted}.gz", name, dotted):
            file = next((file for file in (place / known, place / known / known, place / known.removesuffix(".gz") / known)
                         if file.is_file()), None)                                    # Kaggle unpacks into a folder of the name
            if file is not None:
                found.setdefault(name, file)
    if found and len(found) < 4:
        raise DataError(f"{place} lacks {abbreviate(set(IDX_FILES) - set(found))} (.gz or unpacked): put them there too")
    return list(found.values())


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Read an idx file (LeCun's format: 0, 0, type, dimensions, big-endian sides, data) -> uint8 array. Raises DataError.

    It is packed if it begins so, whatever its name is. No more is read or unpacked than the header claims, and that must fit
    the file.
    """
    size, header = file.stat().st_size, 4 + 4 * dimensions
    try:
        with open(file, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(file, "rb") as stream:
            start = stream.read(header)
            if len(start) < header or start[:4] != bytes((0, 0, 8, dimensions)):
                raise DataError(f"{file}: not an idx file of bytes in {dimensions} dimensions: damaged or cut off; delete it to "
                                "have it downloaded again")
            shape = struct.unpack(f">{dimensions}I", start[4:])
            count = math.prod(shape)
            # Deflate packs to no less than 1/1032 (zlib's documentation).
            possible = count <= size * 1032 if packed else header + count == size
            claim = f"{file}: damaged or cut off: its header claims {' x '.join(map(str, shape))} bytes"
            if not 0 < count <= MAX_IDX_BYTES or not possible:
                raise DataError(f"{claim}, which does not fit its {size:,} bytes; delete it to have it downloaded again")
            data = stream.read(count + 1)         # one more, so that gzip compares its checksum at the end
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: damaged or cut off ({error}); delete it to have it downloaded again") from error
    if len(data) != count:
        raise DataError(f"{claim}, but it holds {'more' if len(data) > count else 'fewer'}; delete it to have it "
                        "downloaded again")
    return np.frombuffer(data, np.uint8).reshape(shape)


# ------------------------------------------------------------------------------------------- Kaggle's csv of pixels


def _from_tables(place: Path, classes: tuple[str, ...], can_flip: bool) -> Splits:
    """Lists of label,pixel,pixel,...: one to train and one to test on, such as mnist_train.csv and mnist_test.csv. One without
    labels (Kaggle's competition) is not used."""
    files = lists_in(str(place))
    arrays, notes = {}, ["images and labels from " + ", ".join(str(path) for path in files.values())]
    for part, file in files.items():
        images, labels = read_pixels(file)
        if labels is not None:
            arrays[part] = ArrayImages(images, labels, part)
        elif part == "train":
            raise DataError(f"{file}: {SIDE * SIDE} columns, pixels without a label: not a list to train on")
        else:
            notes.append(f"{file} has no labels: it is not used")
    val = arrays.get("val", arrays.get("test", ArrayImages(np.empty((0, SIDE, SIDE), np.uint8), [])))
    return Splits(arrays["train"], val, arrays.get("test", val), "val" if "val" in arrays else "test", classes, can_flip,
                  notes=tuple(notes))


def read_pixels(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows of a label and 784 pixels, or of the pixels alone, below a header or not -> uint8 (n, 28, 28), labels or None.

    Raises DataError.
    """
    try:
        if file.stat().st_size > MAX_LIST_BYTES:
            raise DataError(f"{file}: {file.stat().st_size:,} bytes, more than {MAX_LIST_BYTES:,}: not images of 28 x 28")
        with open(file, encoding="utf-8-sig") as stream:
            first = stream.readline(1 << 16).split(",")
        if len(first) not in (SIDE * SIDE, SIDE * SIDE + 1):
            raise DataError(f"{file}: {len(first)} columns, not a label and {SIDE * SIDE} pixels, as Kaggle's csv of it "
                            "has them; lists of paths and labels are read by --dataset csv")
        header = not all(cell.strip().isdecimal() for cell in first)
        rows = np.loadtxt(file, np.int32, delimiter=",", skiprows=int(header), ndmin=2, encoding="utf-8-sig")
    except (ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: damaged or cut off ({' '.join(str(error).split())}); fetch it again") from error
    if not len(rows) or rows.min() < 0 or rows.max() > 255:
        raise DataError(f"{file}: pixels and labels should be numbers from 0 to 255, a row each: damaged; fetch it again")
    images = rows[:, -SIDE * SIDE:].astype(np.uint8).reshape(-1, SIDE, SIDE)
    return images, rows[:, 0] if len(first) > SIDE * SIDE else None
