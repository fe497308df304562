"""A prepared data set: its images were decoded and made smaller once (prepare.py), so training reads pixels, not JPEG files.

    FOLDER/
      prepared.json      what was prepared, how, the digests; finally the SHA-256 of the rest of this file
      train.index        one ROW for every image, little-endian; then the names of the images in UTF-8, each with a zero byte
      train.pixels       height x width x 3 bytes per image, RGB, at the offset in its row
      test.index, test.pixels; val.index, val.pixels if `val` is another split than `test`
      bad_images.txt     the images that were skipped, if any

Pixels are read, not mapped. That takes as long, and if a mapped file is truncated or its disk fails, the process is killed,
while a read returns an error. There is a digest of every image. Comparing millions of them at each start would take minutes,
so a start only checks the index and the file sizes; `python dataset.py check` checks every pixel.
"""

import hashlib
import json
import os
import weakref
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .image_files import shown
from .reading import AS_STORED, FIND, Reading, to_text
from .splits import DataError, ImageError, Splits

FILE, FORMAT = "prepared.json", "vit-prepared-1"
ROW = np.dtype([("place", "<u8"), ("height", "<u4"), ("width", "<u4"), ("label", "<u4"), ("sha256", "u1", 32)])
AGAIN = "delete the folder and prepare the data set again"


class PreparedImages(Dataset):
    """Images of a pixel file. Their names show that they are prepared. Names are part of a run's fingerprint, so a run cannot
    change from files to prepared images, or back, without an error."""

    def __init__(self, file: Path, rows: np.ndarray, names: bytes, size: int):
        self.file, self.rows, self.size = file, rows, size
        self.targets = rows["label"].astype(np.int64)
        self._names, self._ends = names, np.flatnonzero(np.frombuffer(names, np.uint8) == 0)
        self._descriptor: int | None = None

    def __getstate__(self) -> dict:
        return vars(self) | {"_descriptor": None}             # for a process that is not forked

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pixels(index)), int(self.targets[index])

    def source(self, index: int) -> tuple[Tensor, int]:
        """Return uint8 (3, height, width), channels last in memory, which torch resizes 1.5 times as fast as channels first."""
        return torch.from_numpy(self._pixels(index)).permute(2, 0, 1), int(self.targets[index])

    def name(self, index: int) -> str:
        start = self._ends[index - 1] + 1 if index else 0
        return f"prepared-{self.size}/" + self._names[start:self._ends[index]].decode("utf-8", "surrogateescape")

    def content(self, index: int) -> bytes:
        """Return the pixels. Raises ImageError if they do not match their SHA-256."""
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
                weakref.finalize(self, os.close, self._descriptor)
            count = os.preadv(self._descriptor, [pixels], int(row["place"]))
        except OSError as error:
            raise self._error(index, f"cannot be read ({error.strerror})") from error
        if count != pixels.nbytes:
            raise self._error(index, "are incomplete")
        return pixels

    def _error(self, index: int, what: str) -> ImageError:
        return ImageError(f"{self.file}: the pixels of {shown(self.name(index))} {what}", AGAIN)


def is_prepared(folder: str | Path) -> bool:
    return Path(folder, FILE).is_file()


def load(folder: str | Path, dataset: str, reading: Reading = FIND) -> Splits:
    """Open a folder that was prepared from `dataset` ("folder" means any). Reads no pixels. Raises DataError, also if the images
    were not decoded as `reading` requires."""
    folder = Path(folder)
    facts = _facts(folder / FILE)
    if dataset not in (facts["dataset"], "folder"):
        raise DataError(f"{folder} was prepared from {facts['dataset']}. Set --dataset {facts['dataset']} instead of {dataset}")
    as_prepared = Reading.of(facts["reading"]) if "reading" in facts else AS_STORED         # of an earlier version
    for name in sorted(set(vars(reading)) - reading.unknown):
        there, wanted = (to_text(getattr(each, name)) for each in (as_prepared, reading))
        if there != wanted:
            raise DataError(f"{folder} was prepared with --{name}={there}, not {wanted}. Omit --{name}, or prepare the data set "
                            f"again with --{name}={wanted}")
    images = {name: _split(folder / name, own, facts["size"]) for name, own in facts["splits"].items()}
    return Splits(images["train"], images.get("val", images["test"]), images["test"], facts["val_name"],
                  tuple(facts["classes"]), facts["can_flip"], facts["size"], as_prepared)


def _facts(file: Path) -> dict:
    """Read and verify what `describe` wrote. Raises DataError."""
    try:
        facts = json.loads(file.read_bytes())
        sound = facts["format"] == FORMAT and facts.pop("sha256") == _seal(facts)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, LookupError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise DataError(f"{file}: damaged, or made by another version of this program; {AGAIN}")
    return facts


def describe(facts: dict) -> str:
    """Return the text of prepared.json: the facts and their SHA-256."""
    return json.dumps(facts | {"sha256": _seal(facts)}, indent=1) + "\n"


def _seal(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _split(stem: Path, facts: dict, size: int) -> PreparedImages:
    """Open a split. Raises DataError unless its index and the size of its pixel file are right."""
    index, file = stem.with_suffix(".index"), stem.with_suffix(".pixels")
    try:
        content, bytes_there = index.read_bytes(), file.stat().st_size
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); {AGAIN}") from error
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise DataError(f"{index}: damaged, or from another data set (its SHA-256 does not match); {AGAIN}")
    if bytes_there != facts["bytes"]:
        raise DataError(f"{file}: incomplete, or from another data set ({bytes_there:,} bytes, not {facts['bytes']:,}); {AGAIN}")
    count = facts["images"]
    rows = np.frombuffer(content, ROW, count) if count else np.empty(0, ROW)
    return PreparedImages(file, rows, content[count * ROW.itemsize:], size)
