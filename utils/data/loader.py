"""The order of the samples, and the loaders.

The order is stateless: which images make up step t is a pure function of (seed, t), whatever the number of
processes, workers or restarts. Step t holds the positions t * G .. (t + 1) * G - 1 of an endless stream of
shuffled epochs (G images a step), cut into micro-batches that are dealt to the ranks in contiguous blocks. Steps
straddle epochs, so there is no ragged last batch.

A transform is a function of one image: what split.source gives (splits.py) -> uint8 (C, height, width). What it draws
from torch's global CPU generator is seeded here. Edits of attention (edits.py) go through it with their images. Small
data sets are held on the device (held.py): the loader then carries the draws alone, and makes the same images of them there.

Since the order is stateless, an image that cannot be read is replaced by a neighbour without moving any other, and lost
workers (loader_workers.py) cost nothing but time.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from utils.attention.edits import Edit
from utils.randomness import derive_seed, seeded

from .device_cache import Geometry, Held, hold
from .splits import ImageError
from .transforms import with_edit
from .workers import Loading, warn

Transform = Callable[[Image.Image | Tensor], Tensor]

# ----------------------------------------------------------------------------------------------------- order


class Key(NamedTuple):
    """Which sample: `index` in its split, in pass `epoch` over it; for micro-batch `micro` of step `step` (from 0)."""

    step: int
    micro: int
    epoch: int
    index: int


class Keys(Sequence):
    """The Keys of a micro-batch, as two arrays (B,) int64: a thousand of them are made and sent as fast as one."""

    def __init__(self, step: int, micro: int, epochs: np.ndarray, indices: np.ndarray):
        self.step, self.micro, self.epochs, self.indices = step, micro, epochs, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Key:
        return Key(self.step, self.micro, int(self.epochs[number]), int(self.indices[number]))

    def __iter__(self) -> Iterator[Key]:
        pairs = zip(self.epochs.tolist(), self.indices.tolist())
        return (Key(self.step, self.micro, epoch, index) for epoch, index in pairs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None

    def __repr__(self) -> str:
        return repr(list(self))


class Batch(NamedTuple):
    images: Tensor                  # (B, C, height, width) uint8; of a held data set on the device already
    targets: Tensor                 # (B,) int64
    keys: Sequence[Key]
    edits: Tensor | None = None     # (B, 2, h, w) float32: values and edited shares; of a loader with edits
    bad: tuple[tuple[int, str], ...] = ()     # (index, why) of images that another one stands for; `keys` keep the index


class StepOrder(Sequence):
    """This rank's micro-batches of steps start..stop-1, the Keys of each."""

    def __init__(self, images: int, batch_size: int, micro_batches: int, rank: int, world_size: int, seed: int,
                 start: int, stop: int):
        """`micro_batches` is the count per step over all ranks; batch_size is a multiple of it, it of world_size."""
        assert batch_size % micro_batches == 0 and micro_batches % world_size == 0
        self.images, self.batch_size, self.seed, self.start, self.stop = images, batch_size, seed, start, stop
        self.micro_batches, self.micro_size = micro_batches, batch_size // micro_batches
        share = micro_batches // world_size
        self.own = range(rank * share, (rank + 1) * share)
        self._permutations: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.own)

    def __getitem__(self, number: int) -> Keys:
        if not 0 <= number < len(self):
            raise IndexError(number)
        steps, own = divmod(number, len(self.own))
        return self._keys(self.start + steps, self.own[own])

    def keys_of(self, step: int) -> list[Key]:
        """All samples of a step, of every rank."""
        return [key for micro in range(self.micro_batches) for key in self._keys(step, micro)]

    def _keys(self, step: int, micro: int) -> Keys:
        first = step * self.batch_size + micro * self.micro_size
        epochs, offsets = np.divmod(np.arange(first, first + self.micro_size), self.images)
        passes = [self._permutation(epoch)[offsets[epochs == epoch]] for epoch in range(epochs[0], epochs[-1] + 1)]
        return Keys(step, micro, epochs, np.concatenate(passes))

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            # Two epochs are kept: a micro-batch may straddle them.
            self._permutations = {old: kept for old, kept in self._permutations.items() if old == epoch - 1}
            self._permutations[epoch] = torch.randperm(self.images, generator=generator).numpy()
        return self._permutations[epoch]


# ------------------------------------------------------------------------------------------------ one image at a time

REPLACEMENTS = 100          # images after an unreadable one that are tried in its place


class _Keyed(Dataset):
    """A split as a loader reads it: Key -> (uint8 image, label, (its index, why another one stands for it) or None[, edit]).
    Errors travel as values, so that the main process can tell them in one line instead of a worker's traceback."""

    def __init__(self, split: Dataset, transform: Transform, seed: int | None, edits: dict[int, Edit] | None = None,
                 grid: tuple[int, int] | None = None, skip: bool = False):
        self.split, self.transform, self.seed, self.edits, self.grid = split, transform, seed, edits, grid
        self.tries = 1 + REPLACEMENTS if skip else 1

    def __getitem__(self, key: Key) -> tuple | ImageError:
        first = None
        for ahead in range(min(self.tries, len(self.split))):
            index = (key.index + ahead) % len(self.split)
            bad = first and (key.index, getattr(first, "plain", str(first)))
            try:
                return self._sample(*self.split.source(index), key.epoch, index, bad)
            except ImageError as error:              # of the transform too: it may be what decodes
                first = first or error
        return first

    def _sample(self, image: Image.Image | Tensor, label: int, epoch: int, index: int, bad: tuple[int, str] | None) -> tuple:
        if self.seed is None:
            return self.transform(image), label, bad
        with seeded(self.seed, "augment", epoch, index):
            if self.edits is None:
                return self.transform(image), label, bad
            if index not in self.edits:
                return self.transform(image), label, bad, torch.zeros(2, *self.grid)
            image, edit = with_edit(self.transform, image, self.edits[index], self.grid)
            return image, label, bad, edit


def _collate(samples: list) -> Batch | ImageError:
    """-> Batch without its keys, which the main process knows: a killed worker's message is whole or not there if it is small."""
    for sample in samples:
        if isinstance(sample, ImageError):
            return sample
    images, labels, bad, *edits = zip(*samples)
    return Batch(torch.stack(images), torch.tensor(labels), (), torch.stack(edits[0]) if edits else None,
                 tuple(filter(None, bad)))


def _whole(batch: Batch) -> Batch:
    return batch


class _Planned(Dataset):
    """A split that is held (held.py) as a loader reads it: Keys -> a Batch whose images are still a plan."""

    def __init__(self, labels: np.ndarray, rows: np.ndarray, geometry: Geometry, seed: int | None):
        self.labels, self.rows, self.geometry, self.seed = labels, rows, geometry, seed

    def __getitems__(self, keys: Keys) -> Batch:
        seeds = None if self.seed is None else [
            derive_seed(self.seed, "augment", *of) for of in zip(keys.epochs.tolist(), keys.indices.tolist())]
        plan = self.geometry.plan(self.rows[keys.indices], seeds)
        return Batch(plan, torch.from_numpy(self.labels[keys.indices]), ())


# --------------------------------------------------------------------------------------------------- loaders


class Loader:
    """Iterates over Batches. Raises ImageError for an image that cannot be read, WorkerError (loader_workers.py)."""

    def __init__(self, dataset: _Keyed, batches: Sequence[Keys], held: Held | str, num_workers: int, held_workers: int | None,
                 pin_memory: bool, timeout_s: float, say: Callable[[str], None]):
        self.not_held = held if isinstance(held, str) else ""            # why, in words; "" where the images are held
        self._held = None if self.not_held else held
        if self._held:
            num_workers = num_workers if held_workers is None else held_workers
            dataset = _Planned(dataset.split.targets, held.rows, held.geometry, dataset.seed)
        self._loading = Loading(dataset, batches, num_workers, _whole if self._held else _collate, pin_memory, timeout_s, say)
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self._loading.batches)

    def __iter__(self) -> Iterator[Batch]:
        with contextlib.closing(iter(self._loading)) as batches:
            for number, batch in enumerate(batches):
                if isinstance(batch, ImageError):
                    raise batch
                images = self._held.make(batch.images) if self._held else batch.images
                yield batch._replace(images=images, keys=self._loading.batches[number])

    def close(self) -> None:
        """Ends the workers of an iteration under way; before the process ends, which would wait for them."""
        self._loading.close()


def train_loader(split: Dataset, order: StepOrder, *, transform: Transform, seed: int, num_workers: int,
                 pin_memory: bool, edits: dict[int, Edit] | None = None, grid: tuple[int, int] | None = None,
                 bad_images: str = "stop", timeout_s: float = 300.0, say: Callable[[str], None] = warn,
                 device: torch.device | None = None, held_workers: int | None = None) -> Loader:
    """One loader for the whole run: the micro-batches of `order`. `transform` draws by (seed, epoch, image).

    edits, by index of the image, {} included, give every Batch edits on the model's grid (h, w), cropped and mirrored as
    its images; images without one, unedited ones. The images are the same with and without.

    bad_images "skip": in place of an image that cannot be read comes the next of the split that can (the first after the
    last; ImageError after REPLACEMENTS tries), with its own label, edit and draws; Batch.bad tells it. "stop": ImageError.

    timeout_s without a batch, or a worker's death: all workers are started anew, `say` gets a line. 0 waits for ever.

    device: where the images are held if they can be (held.py), with `held_workers` in place of `num_workers` unless it is None;
    Loader.not_held tells why not. None: nowhere.
    """
    assert edits is None or grid is not None
    assert bad_images in ("stop", "skip")
    dataset = _Keyed(split, transform, seed, edits, grid, bad_images == "skip")
    held = _held(dataset, device) if edits is None else "edits of attention go with the images"
    return Loader(dataset, order, held, num_workers, held_workers, pin_memory, timeout_s, say)


def eval_loader(split: Dataset, *, transform: Transform, batch_size: int, rank: int, world_size: int, num_workers: int,
                pin_memory: bool, timeout_s: float = 300.0, say: Callable[[str], None] = warn,
                device: torch.device | None = None, held_workers: int | None = None) -> Loader:
    """This rank's share of the split, every image once over all ranks, in batches of `batch_size`. The rest: as there."""
    own = np.arange(rank, len(split), world_size)
    batches = [Keys(0, 0, np.zeros_like(part), part)
               for part in (own[first:first + batch_size] for first in range(0, len(own), batch_size))]
    dataset = _Keyed(split, transform, None)
    return Loader(dataset, batches, _held(dataset, device), num_workers, held_workers, pin_memory, timeout_s, say)


def _held(dataset: _Keyed, device: torch.device | None) -> Held | str:
    return "nobody asked for it" if device is None else hold(dataset.split, dataset.transform, device)


def default_workers(dataset: str, local_world_size: int, device_type: str = "cpu") -> int:
    """For this process. Beside a GPU all its cores but one, up to 16: it takes thousands of images a second, a core decodes
    hundreds. On a CPU a quarter of them, one at least and up to 4, which load while the others train. None where there is one
    core, and for digits: decoding them is free."""
    if dataset == "digits":
        return 0
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    own = cores // local_world_size
    return max(0, min(16, own - 1) if device_type == "cuda" else min(4, max(1, own // 4), own - 1))
