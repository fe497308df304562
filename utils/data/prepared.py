"""A prepared data set: its images decoded and made smaller once (prepare.py), so that training reads pixels, not JPEG files.

    FOLDER/
      prepared.json      what was prepared, how, the digests; at the end the SHA-256 of all the rest of it
      train.index        a row of ROW for every image, little-endian; then the images' names in UTF-8, a zero byte after each
      train.pixels       height x width x 3 bytes an image, RGB, at the place that its row tells
      test.index, test.pixels; val.index, val.pixels if `val` is another split than `test`
      bad_images.txt     the images that were skipped, if any

Pixels are read, not mapped: that takes as long, and where a mapped file is cut off or its disk fails the process is killed,
while a read returns an error. The digests are of single images. To compare millions of them at each start would take
minutes, so a start checks the index and the sizes, and `python dataset.py check` every pixel.
"""

import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .decode import MAX_PIXELS
from .image_files import shown
from .splits import DataError, ImageError, Splits

FILE, FORMAT = "prepared.json", "vit-prepared-1"
ROW = np.dtype([("place", "<u8"), ("height", "<u4"), ("width", "<u4"), ("label", "<u4"), ("sha256", "u1", 32)])
AGAIN = "delete the folder and prepare the data set again"
MAX_JSON_BYTES = 1 << 26          # a class takes a hundred
MAX_ROW = ROW.itemsize + 4100     # and its name, a path


class PreparedImages(Dataset):
    """Images of a pixel file. Their names show that they are prepared: the names are in a run's fingerprint, so that no run
    changes from files to prepared images, or back, unnoticed."""

    def __init__(self, file: Path, rows: np.ndarray, names: bytes, size: int):
        self.file, self.rows, self.size = file, rows, size
        self.targets = rows["label"].astype(np.int64)
        self._names, self._ends = names, np.flatnonzero(np.frombuffer(names, np.uint8) == 0)
        self._descriptor: int | None = None

    def __getstate__(self) -> dict:
        return vars(self) | {"_descriptor": None}             # for a process that is not forked

    def __del__(self):
        if getattr(self, "_descriptor", None) is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pixels(index)), int(self.targets[index])

    def source(self, index: int) -> tuple[Tensor, int]:
        """uint8 (3, height, width), channels last in memory: torch resizes that 1.5 times as fast as planes."""
        return torch.from_numpy(self._pixels(index)).permute(2, 0, 1), int(self.targets[index])

    def name(self, index: int) -> str:
        start = self._ends[index - 1] + 1 if index else 0
        return f"prepared-{self.size}/" + self._names[start:self._ends[index]].decode("utf-8", "surrogateescape")

    def content(self, index: int) -> bytes:
        """The pixels, compared with their SHA-256."""
        pixels = self._pixels(index).tobytes()
        if hashlib.sha256(pixels).digest() != self.rows["sha256"][index].tobytes():
            raise self._error(index, "are damaged (their SHA-256 does not match)")
        return pixels

    def _pixels(self, index: int) -> np.ndarray:
        """(height, width, 3) uint8"""
        row = self.rows[index]
        pixels = np.empty((int(row["height"]), int(row["width"]), 3), np.uint8)
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.file, os.O_RDONLY)
            whole = _read(self._descriptor, pixels, int(row["place"]))
        except OSError as error:
            raise self._error(index, f"cannot be read ({error.strerror})") from error
        if not whole:
            raise self._error(index, "are cut off")
        return pixels

    def _error(self, index: int, what: str) -> ImageError:
        plain = f"{self.file}: the pixels of {shown(self.name(index))} {what}"
        error = ImageError(f"{plain}; {AGAIN}")
        error.plain = plain
        return error


def _read(descriptor: int, pixels: np.ndarray, place: int) -> bool:
    """Fill the array -> False if the file ends before."""
    view = memoryview(pixels).cast("B")
    while view:
        count = os.preadv(descriptor, [view], place)
        if not count:
            return False
        view, place = view[count:], place + count
    return True


def is_prepared(folder: str | Path) -> bool:
    return Path(folder, FILE).is_file()


def load(folder: str | Path, dataset: str) -> Splits:
    """Open what was prepared there from `dataset` ("folder" stands for any). Reads no pixels. Raises DataError."""
    folder = Path(folder)
    facts = _facts(folder / FILE)
    if dataset not in (facts["dataset"], "folder"):
        raise DataError(f"{folder} was prepared from {facts['dataset']}: give --dataset {facts['dataset']}, not {dataset}")
    classes = tuple(facts["classes"])
    images = {name: _split(folder / name, own, len(classes), facts["size"]) for name, own in facts["splits"].items()}
    return Splits(images["train"], images.get("val", images["test"]), images["test"], facts["val_name"], classes,
                  facts["can_flip"], facts["size"])


def _facts(file: Path) -> dict:
    """Read and verify what `describe` wrote."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise DataError(f"{file}: more than {MAX_JSON_BYTES:,} bytes: not made by this program")
        facts = json.loads(file.read_bytes())
        format, seal = facts.get("format"), facts.pop("sha256", None)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: damaged (no JSON object); {AGAIN}") from error
    if format != FORMAT and str(format).startswith(FORMAT.rstrip("0123456789")):
        raise DataError(f"{file}: of another version of this program ({ascii(format)[:40]}, not {FORMAT}): {AGAIN}")
    if format != FORMAT or seal != _seal(facts):
        raise DataError(f"{file}: damaged (its SHA-256 does not match); {AGAIN}")
    kinds = {"format": str, "dataset": str, "size": int, "classes": list, "can_flip": bool, "val_name": str, "splits": dict}
    splits = facts.get("splits")
    if ({name: type(value) for name, value in facts.items()} != kinds or not all(type(name) is str for name in facts["classes"])
            or set(splits) not in ({"train", "test"}, {"train", "val", "test"}) or not all(
                type(own) is dict and [type(own.get(key)) for key in ("images", "bytes", "sha256")] == [int, int, str]
                for own in splits.values())):
        raise DataError(f"{file}: not made by this program; {AGAIN}")
    return facts


def describe(facts: dict) -> str:
    """The content of prepared.json."""
    return json.dumps(facts | {"sha256": _seal(facts)}, indent=1) + "\n"


def _seal(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _split(stem: Path, facts: dict, classes: int, size: int) -> PreparedImages:
    """Open a split: verify its index, and the size of its pixel file."""
    index, file = stem.with_suffix(".index"), stem.with_suffix(".pixels")
    try:
        for place in (index, file):
            if not place.is_file():                          # a pipe would be waited for without end
                raise FileNotFoundError(errno.ENOENT, "no such file", str(place))
        if index.stat().st_size > max(facts["images"], 0) * MAX_ROW:
            raise DataError(f"{index}: larger than an index of {facts['images']:,} images; {AGAIN}")
        content, held = index.read_bytes(), file.stat().st_size
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); {AGAIN}") from error
    count = facts["images"]
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise DataError(f"{index}: damaged or of another data set (its SHA-256 does not match); {AGAIN}")
    if held != facts["bytes"]:
        raise DataError(f"{file}: has {held:,} bytes, not {facts['bytes']:,}: cut off or of another data set; {AGAIN}")
    names = content[max(count, 0) * ROW.itemsize:]
    sound = 0 <= count * ROW.itemsize <= len(content) and names.count(b"\0") == count and names[-1:] == b"\0" * bool(count)
    rows = np.frombuffer(content, ROW, count) if sound and count else np.empty(0, ROW)
    pixels, place = rows["height"].astype(np.uint64) * rows["width"], rows["place"]
    sound = sound and (pixels > 0).all() and (pixels <= MAX_PIXELS).all() and (rows["label"] < classes).all()
    sound = sound and (place <= held).all() and (place + pixels * 3 <= np.append(place[1:], np.uint64(held))).all()
    if not sound:
        raise DataError(f"{index}: does not fit itself or {file.name}: not made by this program; {AGAIN}")
    return PreparedImages(file, rows, names, size)
