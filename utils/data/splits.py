"""The splits of a data set: images in memory, subsets and concatenations of others, and held-out shares.

A held-out share is drawn class by class and depends only on the split's seed and the images, so that runs with other training
seeds, on any number of processes, hold out the same images.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from utils.randomness import derive_seed

from .reading import AS_STORED, Reading

Strata = Callable[[np.ndarray], np.ndarray]         # targets of all images -> labels whose proportions a share keeps

SKIPPED = 0.01               # the default of --max_bad_images
FINGERPRINT_NAMES = 1000


class DataError(ValueError):
    """Raised for data that are missing, damaged or do not fit; the message is one line that starts with the file or folder."""

    exit_code = 2


class ImageError(DataError):
    """Raised for an image that cannot be read, only in the process that reads it; all processes raise any other DataError."""

    def __init__(self, plain: str, advice: str = ""):
        super().__init__(f"{plain}; {advice}" if advice else plain)
        self.plain, self.advice = plain, advice


def flags_to_skip(bad: int, images: int) -> str:
    """Return the flags with which a run replaces `bad` unreadable training images by others."""
    thousandths = -(-1000 * bad // images)
    thousandths += thousandths / 1000 * images < bad                # as the run compares them
    return "--bad_images skip" + f" --max_bad_images {thousandths / 1000:g}" * (bad > SKIPPED * images)


@dataclasses.dataclass(frozen=True)
class Splits:
    """Each split is a sequence of (PIL RGB image, target) with `.targets`, int64 (n,), for which no image is decoded.

    split.source(index): the same pair with as little work as possible, for a transform to do the rest: the image may be a
    PIL image that is not decoded yet (ImageError may then be raised as late as in the transform) or a uint8 tensor (C,
    height, width). split.name(index): a relative path with slashes, unique in the data set whatever split the image is
    drawn into; split.content(index): the stored bytes.

    `val` chooses the best checkpoint; `test` only reports. Where a data set has no third split they are the same object, and
    `val_name` is what the data call it.
    """

    train: Dataset
    val: Dataset
    test: Dataset                   # empty where only a drawn share (draw_test) can be one
    val_name: str                   # "val" or "test": what the data, and so the log, call `val`
    classes: tuple[str, ...]        # names, by label
    can_flip: bool = True           # whether a mirrored image keeps its label
    prepared: int = 0               # shorter side in pixels to which larger images were reduced (prepared.py); 0: not prepared
    reading: Reading = AS_STORED    # how its image files are read
    notes: tuple[str, ...] = ()     # to print when a run starts: what was taken as what; a fault begins with "warning: "
    val_is_drawn: bool = False      # `val` is a share of the training images

    @property
    def val_is_test(self) -> bool:
        """Whether the data set's only held-out images, whatever it calls them, both choose and report."""
        return self.val is self.test and not self.val_is_drawn

    @property
    def held_out(self) -> dict[str, Dataset]:
        """Return the held-out splits by name; one if val and test are the same."""
        return {self.val_name: self.val} if self.val is self.test else {self.val_name: self.val, "test": self.test}

    def replace(self, *notes: str, **values: object) -> "Splits":
        """Return a copy with other values and more notes."""
        return dataclasses.replace(self, **values, notes=(*self.notes, *notes))

    def changed(self, change: Callable[[Dataset], Dataset]) -> "Splits":
        """Return a copy whose splits are change(split), called once for each: splits that were one object stay one."""
        made = {id(split): split for split in (self.train, self.val, self.test)}
        made = {key: change(split) for key, split in made.items()}
        return self.replace(train=made[id(self.train)], val=made[id(self.val)], test=made[id(self.test)])


class ArrayImages(Dataset):
    """uint8 images (n, height, width[, 3]) in memory. `part`: the published part that they come from, such as "train"."""

    def __init__(self, images: np.ndarray, targets: Sequence[int] | np.ndarray, part: str = "images"):
        self.images, self.targets, self.part = images, np.asarray(targets, dtype=np.int64), part

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.targets[index])

    def source(self, index: int) -> tuple[Image.Image, int]:
        return self[index]

    def name(self, index: int) -> str:
        return f"{self.part}/{index}"

    def content(self, index: int) -> bytes:
        return self.images[index].tobytes()


class View(Dataset):
    """Images of other splits; `_locate(index)` -> (the split of an image, its index there)."""

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        split, own = self._locate(index)
        return split[own]

    def source(self, index: int) -> tuple[Image.Image | Tensor, int]:
        split, own = self._locate(index)
        return split.source(own)

    def name(self, index: int) -> str:
        split, own = self._locate(index)
        return split.name(own)

    def content(self, index: int) -> bytes:
        split, own = self._locate(index)
        return split.content(own)


class Subset(View):
    """The images of `split` at `indices`, in that order."""

    def __init__(self, split: Dataset, indices: Iterable[int]):
        self.split, self.indices = split, np.asarray(indices, dtype=np.int64)
        self.targets = split.targets[self.indices]

    def _locate(self, index: int) -> tuple[Dataset, int]:
        return self.split, int(self.indices[index])


class Concat(View):
    """The images of several splits, one after the other."""

    def __init__(self, splits: list[Dataset]):
        self.splits = splits
        self.targets = np.concatenate([split.targets for split in splits])
        self._ends = np.cumsum([len(split) for split in splits])

    def _locate(self, index: int) -> tuple[Dataset, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        split = self.splits[number]
        return split, int(index - self._ends[number] + len(split))


# -------------------------------------------------------------------------------------------------- held-out shares


def stratified_share(strata: np.ndarray, fraction: float, seed: int, purpose: str) -> np.ndarray:
    """Draw a random share: round(fraction * n) of a stratum's n images, at least 1 of 2 or more, never all.

    strata (n,) int64 -> indices, ascending. A smaller share of the same seed is part of a larger one.
    """
    order = np.argsort(strata, kind="stable")
    present, starts = np.unique(strata[order], return_index=True)
    chosen = [np.empty(0, dtype=np.int64)]
    for label, own in zip(present.tolist(), np.split(order, starts[1:])):
        count = min(max(round(fraction * len(own)), 1), len(own) - 1)
        generator = torch.Generator().manual_seed(derive_seed(seed, purpose, label))
        chosen.append(own[torch.randperm(len(own), generator=generator).numpy()[:count]])
    return np.sort(np.concatenate(chosen))


def by_class(targets: np.ndarray) -> np.ndarray:
    """The strata of single labels: a share keeps the proportions of the classes."""
    return targets


def hold_out(splits: Splits, fraction: float, seed: int, strata: Strata = by_class) -> Splits:
    """Make a share of the training images `val`; `test` stays or, where there is none, is that share too.

    Raises DataError if there already is a validation split next to a test set.
    """
    if splits.val is not splits.test:
        images = f"{len(splits.val)} image{'s' * (len(splits.val) != 1)}"
        raise DataError(f"--val_fraction: the data set already has a validation split ({images}). Omit --val_fraction")
    train, val = _divide(splits.train, fraction, seed, "val", strata)
    test = splits.test if len(splits.test) else val
    images = f"{len(test):,} image{'s' * (len(test) != 1)}"
    notes = [f"test: the {images} of val, since --val_fraction draws another val from train"] if splits.val_name == "val" else []
    return splits.replace(*notes * (test is not val), train=train, val=val, test=test, val_name="val", val_is_drawn=True)


def draw_test(splits: Splits, fraction: float, seed: int, strata: Strata = by_class) -> Splits:
    """Pool all images and draw a share of them as the test set, as papers on data sets without a usual split do."""
    train, test = _divide(Concat([splits.train, *splits.held_out.values()]), fraction, seed, "test", strata)
    return splits.replace(train=train, val=test, test=test, val_name="test", val_is_drawn=False)


def _divide(split: Dataset, fraction: float, seed: int, purpose: str, strata: Strata) -> tuple[Subset, Subset]:
    """-> (the remaining images, the share)"""
    chosen = stratified_share(strata(split.targets), fraction, seed, purpose)
    if not len(chosen):
        raise DataError(f"--{purpose}_fraction {fraction}: no class has two images, so none can be held out")
    return Subset(split, np.setdiff1d(np.arange(len(split)), chosen)), Subset(split, chosen)


# ----------------------------------------------------------------------------------------------------------- checks


def check(splits: Splits, location: str, trains: bool = True, kept: bool = False) -> None:
    """Raise DataError unless every label has a class and every class has training images.

    trains: a model is trained on them, for more than one class. kept: the classes are those of a checkpoint.
    """
    count = len(splits.classes)
    if len(set(splits.classes)) != count:
        twice = sorted(name for name in set(splits.classes) if splits.classes.count(name) > 1)
        raise DataError(f"{location}: two classes are called {abbreviate(twice)}")
    if trains and count == 1 and not kept:
        raise DataError(f"{location}: there is only one class, {splits.classes[0]}, so there is nothing to learn. Add images "
                        "of a second class, or give the folder that holds the class folders")
    for name, split in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        if not len(split) and (trains or name != "train"):
            raise DataError(f"{location}: no images in {name}")
        wrong = split.targets[(split.targets < 0) | (split.targets >= count)]
        if len(wrong):
            raise DataError(f"{location}: {name} has the label {wrong[0]}, but there are {count} classes: the files are damaged")
    without = np.flatnonzero(np.bincount(splits.train.targets, minlength=count) == 0)
    if trains and len(without):
        raise DataError(f"{location}: no training images of class {abbreviate(splits.classes[label] for label in without)}: "
                        "the files are damaged")


def fingerprint(split: Dataset) -> str:
    """Hash all targets and the names of up to 1,000 images spread evenly over the split -> 16 hexadecimal digits.

    It changes where images are added, removed, renamed or labeled differently, and not with the folder of the data.
    """
    digest = hashlib.sha256(np.ascontiguousarray(split.targets, dtype="<i8").tobytes())
    count = len(split)
    for number in range(min(count, FINGERPRINT_NAMES)):
        index = number * count // min(count, FINGERPRINT_NAMES)
        digest.update(b"\0" + split.name(index).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def abbreviate(names: Iterable[str]) -> str:
    """Return the first five names in alphabetical order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
