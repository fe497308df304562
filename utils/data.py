"""Data sets as a table, the order of the samples, and the loaders.

The order is stateless: which images make up step t is a pure function of (seed, t), whatever the number of
processes, workers or restarts. Step t holds the positions t * G .. (t + 1) * G - 1 of an endless stream of
shuffled epochs (G images a step), cut into micro-batches that are dealt to the ranks in contiguous blocks. Steps
straddle epochs, so there is no ragged last batch.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from .augment import eval_transform, train_transform
from .randomness import derive_seed, seeded

IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")      # what a data set holds; Pillow reads stranger things
DIGITS_FILE = Path(__file__).parent.parent / "assets" / "digits.npz"


class DataError(ValueError):
    """Data that are missing, damaged or do not fit: one line that names the place."""


class ImageError(DataError):
    """One image that cannot be read. Only the process that reads it knows; every other DataError all of them share."""


# ------------------------------------------------------------------------------------------------ data sets


@dataclasses.dataclass(frozen=True)
class Splits:
    """Each split is a sequence of (PIL RGB image, label). `val` chooses the best checkpoint; `test` only reports."""

    train: Dataset
    val: Dataset
    test: Dataset
    val_name: str                   # what the numbers of `val` are called: "test" where it is the test set
    classes: tuple[str, ...]        # names, by label
    can_flip: bool = True           # whether a mirrored image keeps its label


class ArrayImages(Dataset):
    """uint8 images (n, height, width[, 3]) held in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])


class FileImages(Dataset):
    """Images in files, decoded when they are asked for."""

    def __init__(self, samples: list[tuple[str, int]]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        try:
            with open(path, "rb") as stream:
                image = Image.open(stream, formats=IMAGE_FORMATS)
                if image.mode.startswith("I;16"):          # Pillow would clip 16 bits to 8: nearly all white
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return image.convert("RGB"), label
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ImageError(f"{path}: cannot be read as an image ({error}); remove or replace it") from error


def digits(data_dir: str) -> Splits:
    """1,797 digits of 8 x 8 px shipped with the code (assets/README.md). Split by order, which keeps writers apart."""
    with np.load(DIGITS_FILE, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    images = np.round(images * (255 / 16)).astype(np.uint8)       # stored as 0..16
    train, val, test = (ArrayImages(images[part], labels[part])
                        for part in (slice(0, 1097), slice(1097, 1297), slice(1297, None)))
    return Splits(train, val, test, "val", tuple("0123456789"), can_flip=False)


def cifar(kind: type[datasets.CIFAR10], data_dir: str) -> Splits:
    try:
        train, test = (kind(data_dir, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{kind.__name__} is not in {data_dir} and cannot be downloaded ({getattr(error, 'reason', error)}); "
                        f"fetch {kind.url} on another machine and put it at {Path(data_dir) / kind.filename}") from error
    arrays = [ArrayImages(split.data, np.array(split.targets)) for split in (train, test)]
    return Splits(arrays[0], arrays[1], arrays[1], "test", tuple(train.classes))


def folder(data_dir: str, classes_wanted: int | None = None) -> Splits:
    """DATA_DIR/train/CLASS/... and DATA_DIR/val/CLASS/...: the class folders of both must be the same, none empty."""
    roots = {split: Path(data_dir) / split for split in ("train", "val")}
    classes = {}
    for split, root in roots.items():
        if not root.is_dir():
            raise DataError(f"no such folder: {root} (--data_dir {data_dir} must hold train/ and val/, with one folder a class)")
        classes[split] = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not classes[split]:
            raise DataError(f"{root} holds no class folders (one folder a class, with its images inside)")
    if classes["train"] != classes["val"]:
        only = [f"only in {split}: {_listed(set(classes[split]) - set(classes[other]))}"
                for split, other in (("train", "val"), ("val", "train")) if set(classes[split]) - set(classes[other])]
        raise DataError(f"{data_dir}: train and val have different classes ({'; '.join(only)})")
    names = classes["train"]
    if classes_wanted not in (None, len(names)):
        raise DataError(f"{data_dir} has {len(names)} classes, not {classes_wanted}: for other images take --dataset folder")
    index = {name: label for label, name in enumerate(names)}
    images = {}
    for split, root in roots.items():
        samples = make_dataset(str(root), index, extensions=IMG_EXTENSIONS, allow_empty=True)
        counts = np.bincount([label for _, label in samples], minlength=len(names))
        if not counts.all():
            empty = _listed(names[label] for label in np.flatnonzero(counts == 0))
            raise DataError(f"{root}: no images ({', '.join(IMG_EXTENSIONS)}) of class {empty}")
        images[split] = FileImages(samples)
    return Splits(images["train"], images["val"], images["val"], "test", tuple(names))


def _listed(names) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# A data set is a row here and a function above; configs.FLAGS offers the same names.
DATASETS: dict[str, Callable[[str], Splits]] = {
    "digits": digits,
    "cifar10": lambda data_dir: cifar(datasets.CIFAR10, data_dir),
    "cifar100": lambda data_dir: cifar(datasets.CIFAR100, data_dir),
    "imagenet": lambda data_dir: folder(data_dir, classes_wanted=1000),
    "folder": folder,
}


def load_splits(dataset: str, data_dir: str) -> Splits:
    """Raises DataError if the data set is not there or its folders do not fit each other."""
    return DATASETS[dataset](data_dir)


# ----------------------------------------------------------------------------------------------------- order


class Key(NamedTuple):
    """Which sample: `index` in its split, in pass `epoch` over it; for micro-batch `micro` of step `step` (from 0)."""

    step: int
    micro: int
    epoch: int
    index: int


class Batch(NamedTuple):
    images: Tensor                  # (B, 3, height, width) uint8
    targets: Tensor                 # (B,) int64
    keys: list[Key]


class StepOrder(Sampler):
    """This rank's micro-batches of steps start..stop-1, each a list of Keys."""

    def __init__(self, images: int, batch_size: int, micro_batches: int, rank: int, world_size: int, seed: int,
                 start: int, stop: int):
        """`micro_batches` is the count per step over all ranks; batch_size is a multiple of it, it of world_size."""
        assert batch_size % micro_batches == 0 and micro_batches % world_size == 0
        self.images, self.batch_size, self.seed, self.start, self.stop = images, batch_size, seed, start, stop
        self.micro_size = batch_size // micro_batches
        share = micro_batches // world_size
        self.own = range(rank * share, (rank + 1) * share)
        self._permutations: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.own)

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start, self.stop):
            for micro in self.own:
                first = step * self.batch_size + micro * self.micro_size
                yield [self.key(step, micro, position) for position in range(first, first + self.micro_size)]

    def keys_of(self, step: int) -> list[Key]:
        """All samples of a step, of every rank."""
        first = step * self.batch_size
        return [self.key(step, offset // self.micro_size, first + offset) for offset in range(self.batch_size)]

    def key(self, step: int, micro: int, position: int) -> Key:
        epoch, offset = divmod(position, self.images)
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            # Two epochs are kept: a micro-batch may straddle them.
            self._permutations = {old: kept for old, kept in self._permutations.items() if old == epoch - 1}
            self._permutations[epoch] = torch.randperm(self.images, generator=generator).tolist()
        return Key(step, micro, epoch, self._permutations[epoch][offset])


class _Keyed(Dataset):
    """A split as a loader reads it: Key -> (uint8 image, label, Key). Errors travel as values, so that the main
    process can tell them in one line instead of a worker's traceback."""

    def __init__(self, split: Dataset, transform: Callable, seed: int | None):
        self.split, self.transform, self.seed = split, transform, seed

    def __getitem__(self, key: Key):
        try:
            image, label = self.split[key.index]
        except ImageError as error:
            return error
        if self.seed is None:
            return self.transform(image), label, key
        with seeded(self.seed, "augment", key.epoch, key.index):
            return self.transform(image), label, key


def _collate(samples: list) -> Batch | ImageError:
    for sample in samples:
        if isinstance(sample, ImageError):
            return sample
    images, labels, keys = zip(*samples)
    return Batch(torch.stack(images), torch.tensor(labels), list(keys))


class Loader:
    """Iterates over Batches; raises ImageError for an image that cannot be read."""

    def __init__(self, dataset: _Keyed, batches, num_workers: int, pin_memory: bool):
        self._loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=_collate,
                                  pin_memory=pin_memory, persistent_workers=False)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, ImageError):
                raise batch
            yield batch


def train_loader(split: Dataset, order: StepOrder, *, img_size: tuple[int, int], augmentation: str, can_flip: bool,
                 seed: int, num_workers: int, pin_memory: bool) -> Loader:
    """One loader for the whole run: the micro-batches of `order`."""
    transform = train_transform(augmentation, img_size, can_flip)
    return Loader(_Keyed(split, transform, seed), order, num_workers, pin_memory)


def eval_loader(split: Dataset, *, batch_size: int, img_size: tuple[int, int], rank: int, world_size: int,
                num_workers: int, pin_memory: bool) -> Loader:
    """This rank's share of the split, every image once over all ranks, in batches of at most `batch_size`."""
    own = [Key(0, 0, 0, index) for index in range(rank, len(split), world_size)]
    batches = [own[first:first + batch_size] for first in range(0, len(own), batch_size)]
    return Loader(_Keyed(split, eval_transform(img_size), None), batches, num_workers, pin_memory)


def default_workers(dataset: str, local_world_size: int) -> int:
    """None for digits (decoding them is free); elsewhere up to 4, as far as there are cores."""
    if dataset == "digits":
        return 0
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(0, min(4, cores // local_world_size - 1))
