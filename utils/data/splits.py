"""The splits of a data set: images in memory, parts of others, and how a share of every class is held out.

A share is drawn class by class (stratified) and is a function of the split's seed and the images alone, so that runs
with other training seeds, on any number of processes, hold out the same images.
"""

import dataclasses
import hashlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from utils.randomness import derive_seed


class DataError(ValueError):
    """Data that are missing, damaged or do not fit: one line that names the place."""


class ImageError(DataError):
    """One image that cannot be read. Only the process that reads it knows; every other DataError all of them share."""


@dataclasses.dataclass(frozen=True)
class Splits:
    """Each split is a sequence of (PIL RGB image, label) with `.labels`, int64 (n,), for which no image is decoded.

    split.source(index): the same pair as cheap as it comes, for a transform to make the rest: the image may be a PIL image
    that is not decoded yet (ImageError may then come as late as in the transform) or a uint8 tensor (C, height, width).
    split.name(index): what the image is called, a relative path with slashes, another one for every image of the data
    set whatever split it is drawn into; split.content(index): the bytes that are stored of it.

    `val` chooses the best checkpoint; `test` only reports. Where a data set has no third split they are the same object.
    """

    train: Dataset
    val: Dataset
    test: Dataset                   # empty where nothing but a drawn share (draw_test) can be one
    val_name: str                   # what the numbers of `val` are called: "test" where it is the test set
    classes: tuple[str, ...]        # names, by label
    can_flip: bool = True           # whether a mirrored image keeps its label
    prepared: int = 0               # pixels of the shorter side that larger images were made (prepared.py); 0: as published


class ArrayImages(Dataset):
    """uint8 images (n, height, width[, 3]) held in memory. `part`: of which published part ("train") they are."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, part: str = "images"):
        self.images, self.labels, self.part = images, np.asarray(labels, dtype=np.int64), part

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])

    def source(self, index: int) -> tuple[Image.Image, int]:
        return self[index]

    def name(self, index: int) -> str:
        return f"{self.part}/{index}"

    def content(self, index: int) -> bytes:
        return self.images[index].tobytes()


class Part(Dataset):
    """The images of `split` at `indices`, in that order."""

    def __init__(self, split: Dataset, indices):
        self.split, self.indices = split, np.asarray(indices, dtype=np.int64)
        self.labels = split.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.split[int(self.indices[index])]

    def source(self, index: int) -> tuple[Image.Image | Tensor, int]:
        return self.split.source(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.split.name(int(self.indices[index]))

    def content(self, index: int) -> bytes:
        return self.split.content(int(self.indices[index]))


class Joined(Dataset):
    """The images of several splits, one after the other."""

    def __init__(self, splits: list[Dataset]):
        self.splits = splits
        self.labels = np.concatenate([split.labels for split in splits])
        self._ends = np.cumsum([len(split) for split in splits])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        split, own = self._place(index)
        return split[own]

    def source(self, index: int) -> tuple[Image.Image | Tensor, int]:
        split, own = self._place(index)
        return split.source(own)

    def name(self, index: int) -> str:
        split, own = self._place(index)
        return split.name(own)

    def content(self, index: int) -> bytes:
        split, own = self._place(index)
        return split.content(own)

    def _place(self, index: int) -> tuple[Dataset, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        split = self.splits[number]
        return split, int(index - self._ends[number] + len(split))


def share_of_each_class(labels: np.ndarray, share: float, seed: int, purpose: str) -> np.ndarray:
    """Indices, ascending, of a random share: round(share * n) of a class's n images, at least 1 of 2 or more, never all.

    A smaller share of the same seed is part of a larger one.
    """
    assert 0 < share < 1
    by_class = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[by_class], return_index=True)
    chosen = [np.empty(0, dtype=np.int64)]
    for label, own in zip(present.tolist(), np.split(by_class, starts[1:])):
        count = min(max(round(share * len(own)), 1), len(own) - 1)
        generator = torch.Generator().manual_seed(derive_seed(seed, purpose, label))
        chosen.append(own[torch.randperm(len(own), generator=generator).numpy()[:count]])
    return np.sort(np.concatenate(chosen))


def hold_out(splits: Splits, share: float, seed: int) -> Splits:
    """A share of the training images becomes `val`; `test` stays. Raises DataError if there is a validation split already."""
    if splits.val is not splits.test:
        raise DataError(f"the data set has a validation split of its own ({len(splits.val)} images): leave --val_fraction out")
    train, val = _divided(splits.train, share, seed, "val", "--val_fraction")
    return dataclasses.replace(splits, train=train, val=val, val_name="val")


def draw_test(splits: Splits, share: float, seed: int) -> Splits:
    """All images put together and a share drawn as the test set, as papers on data sets without a usual split do."""
    published = [splits.train, splits.val, splits.test] if splits.val is not splits.test else [splits.train, splits.test]
    train, test = _divided(Joined(published), share, seed, "test", "--test_fraction")
    return dataclasses.replace(splits, train=train, val=test, test=test, val_name="test")


def _divided(split: Dataset, share: float, seed: int, purpose: str, flag: str) -> tuple[Part, Part]:
    """-> (what is left, the share)"""
    chosen = share_of_each_class(split.labels, share, seed, purpose)
    if not len(chosen):
        raise DataError(f"{flag} {share}: no class has two images, so that none can be taken from training")
    return Part(split, np.setdiff1d(np.arange(len(split)), chosen)), Part(split, chosen)


def check(splits: Splits, place: str) -> None:
    """Raises DataError unless every label has a class and every class has images to train on."""
    count = len(splits.classes)
    if len(set(splits.classes)) != count:
        twice = sorted(name for name in set(splits.classes) if splits.classes.count(name) > 1)
        raise DataError(f"{place}: two classes are called {listed(twice)}")
    for name, split in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        if not len(split):
            raise DataError(f"{place}: no images in {name}")
        wrong = split.labels[(split.labels < 0) | (split.labels >= count)]
        if len(wrong):
            raise DataError(f"{place}: {name} has the label {wrong[0]}, but there are {count} classes: the files are damaged")
    without = np.flatnonzero(np.bincount(splits.train.labels, minlength=count) == 0)
    if len(without):
        raise DataError(f"{place}: no training images of class {listed(splits.classes[label] for label in without)}: "
                        "the files are damaged")


FINGERPRINT_NAMES = 1000


def fingerprint(split: Dataset) -> str:
    """16 hexadecimal digits of all labels and of the names of up to 1,000 images spread evenly over the split: another
    value where images were added, removed, renamed or labelled otherwise, the same wherever the data lie."""
    digest = hashlib.sha256(np.ascontiguousarray(split.labels, dtype="<i8").tobytes())
    count = len(split)
    for number in range(min(count, FINGERPRINT_NAMES)):
        index = number * count // min(count, FINGERPRINT_NAMES)
        digest.update(b"\0" + split.name(index).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def listed(names) -> str:
    """The first five by name, and how many more."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
