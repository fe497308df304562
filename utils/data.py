"""The order of the samples, and the loaders.

The order is stateless: which images make up step t is a pure function of (seed, t), whatever the number of
processes, workers or restarts. Step t holds the positions t * G .. (t + 1) * G - 1 of an endless stream of
shuffled epochs (G images a step), cut into micro-batches that are dealt to the ranks in contiguous blocks. Steps
straddle epochs, so there is no ragged last batch.

A transform is a function of one image: PIL RGB -> uint8 (C, height, width). What it draws from torch's global CPU
generator is seeded here. Edits of attention (edits.py) go through it with their images.
"""

import os
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .augment import with_edit
from .edits import Edit
from .randomness import derive_seed, seeded
from .splits import ImageError

Transform = Callable[[Image.Image], Tensor]

# ----------------------------------------------------------------------------------------------------- order


class Key(NamedTuple):
    """Which sample: `index` in its split, in pass `epoch` over it; for micro-batch `micro` of step `step` (from 0)."""

    step: int
    micro: int
    epoch: int
    index: int


class Batch(NamedTuple):
    images: Tensor                  # (B, C, height, width) uint8
    targets: Tensor                 # (B,) int64
    keys: list[Key]
    edits: Tensor | None = None     # (B, 2, h, w) float32: values and edited shares; of a loader with edits


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
    """A split as a loader reads it: Key -> (uint8 image, label, Key[, edit]). Errors travel as values, so that the main
    process can tell them in one line instead of a worker's traceback."""

    def __init__(self, split: Dataset, transform: Transform, seed: int | None, edits: dict[int, Edit] | None = None,
                 grid: tuple[int, int] | None = None):
        self.split, self.transform, self.seed, self.edits, self.grid = split, transform, seed, edits, grid

    def __getitem__(self, key: Key):
        try:
            image, label = self.split[key.index]
        except ImageError as error:
            return error
        if self.seed is None:
            return self.transform(image), label, key
        with seeded(self.seed, "augment", key.epoch, key.index):
            if self.edits is None:
                return self.transform(image), label, key
            if key.index not in self.edits:
                return self.transform(image), label, key, torch.zeros(2, *self.grid)
            image, edit = with_edit(self.transform, image, self.edits[key.index], self.grid)
            return image, label, key, edit


def _collate(samples: list) -> Batch | ImageError:
    for sample in samples:
        if isinstance(sample, ImageError):
            return sample
    images, labels, keys, *edits = zip(*samples)
    return Batch(torch.stack(images), torch.tensor(labels), list(keys), *map(torch.stack, edits))


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


def train_loader(split: Dataset, order: StepOrder, *, transform: Transform, seed: int, num_workers: int,
                 pin_memory: bool, edits: dict[int, Edit] | None = None, grid: tuple[int, int] | None = None) -> Loader:
    """One loader for the whole run: the micro-batches of `order`. `transform` draws by (seed, epoch, image).

    edits, by index of the image, {} included, give every Batch edits on the model's grid (h, w), cropped and mirrored as
    its images; images without one, unedited ones. The images are the same with and without.
    """
    assert edits is None or grid is not None
    return Loader(_Keyed(split, transform, seed, edits, grid), order, num_workers, pin_memory)


def eval_loader(split: Dataset, *, transform: Transform, batch_size: int, rank: int, world_size: int, num_workers: int,
                pin_memory: bool) -> Loader:
    """This rank's share of the split, every image once over all ranks, in batches of at most `batch_size`."""
    own = [Key(0, 0, 0, index) for index in range(rank, len(split), world_size)]
    batches = [own[first:first + batch_size] for first in range(0, len(own), batch_size)]
    return Loader(_Keyed(split, transform, None), batches, num_workers, pin_memory)


def default_workers(dataset: str, local_world_size: int) -> int:
    """None for digits (decoding them is free); elsewhere up to 4, as far as there are cores."""
    if dataset == "digits":
        return 0
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(0, min(4, cores // local_world_size - 1))
