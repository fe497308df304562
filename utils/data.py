"""The order of the samples, and the loaders.

The order is stateless: which images make up step t is a pure function of (seed, t), whatever the number of
processes, workers or restarts. Step t holds the positions t * G .. (t + 1) * G - 1 of an endless stream of
shuffled epochs (G images a step), cut into micro-batches that are dealt to the ranks in contiguous blocks. Steps
straddle epochs, so there is no ragged last batch.

A transform is a function of one image: PIL RGB -> uint8 (C, height, width). What it draws from torch's global CPU
generator is seeded here. Edits of attention (edits.py) go through it with their images.

Since the order is stateless, an image that cannot be read is replaced by a neighbour without moving any other, and lost
workers (loader_workers.py) cost nothing but time.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .augment import with_edit
from .edits import Edit
from .loader_workers import Loading, warn
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
    bad: tuple[tuple[int, str], ...] = ()     # (index, why) of images that another one stands for; `keys` keep the index


class StepOrder(Sequence):
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

    def __getitem__(self, number: int) -> list[Key]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        steps, own = divmod(number, len(self.own))
        step, micro = self.start + steps, self.own[own]
        first = step * self.batch_size + micro * self.micro_size
        return [self.key(step, micro, position) for position in range(first, first + self.micro_size)]

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


REPLACEMENTS = 100          # images after an unreadable one that are tried in its place


class _Keyed(Dataset):
    """A split as a loader reads it: Key -> (uint8 image, label, Key, why it is another one or None[, edit]). Errors travel
    as values, so that the main process can tell them in one line instead of a worker's traceback."""

    def __init__(self, split: Dataset, transform: Transform, seed: int | None, edits: dict[int, Edit] | None = None,
                 grid: tuple[int, int] | None = None, skip: bool = False):
        self.split, self.transform, self.seed, self.edits, self.grid = split, transform, seed, edits, grid
        self.tries = 1 + REPLACEMENTS if skip else 1

    def __getitem__(self, key: Key) -> tuple | ImageError:
        first = None
        for ahead in range(min(self.tries, len(self.split))):
            index = (key.index + ahead) % len(self.split)
            try:
                image, label = self.split[index]
            except ImageError as error:
                first = first or error
                continue
            return self._sample(image, label, key, index, first and getattr(first, "plain", str(first)))
        return first

    def _sample(self, image: Image.Image, label: int, key: Key, index: int, why: str | None) -> tuple:
        if self.seed is None:
            return self.transform(image), label, key, why
        with seeded(self.seed, "augment", key.epoch, index):
            if self.edits is None:
                return self.transform(image), label, key, why
            if index not in self.edits:
                return self.transform(image), label, key, why, torch.zeros(2, *self.grid)
            image, edit = with_edit(self.transform, image, self.edits[index], self.grid)
            return image, label, key, why, edit


def _collate(samples: list) -> Batch | ImageError:
    """-> Batch, its keys as a tensor (B, 4): a message of a worker that is killed is whole or not there if it is small."""
    for sample in samples:
        if isinstance(sample, ImageError):
            return sample
    images, labels, keys, reasons, *edits = zip(*samples)
    bad = tuple((key.index, why) for key, why in zip(keys, reasons) if why is not None)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(keys), torch.stack(edits[0]) if edits else None, bad)


class Loader:
    """Iterates over Batches. Raises ImageError for an image that cannot be read, WorkerError (loader_workers.py)."""

    def __init__(self, dataset: _Keyed, batches: Sequence[list[Key]], num_workers: int, pin_memory: bool, timeout_s: float,
                 say: Callable[[str], None]):
        self._loading = Loading(dataset, batches, num_workers, _collate, pin_memory, timeout_s, say)

    def __len__(self) -> int:
        return len(self._loading.batches)

    def __iter__(self) -> Iterator[Batch]:
        with contextlib.closing(iter(self._loading)) as batches:
            for batch in batches:
                if isinstance(batch, ImageError):
                    raise batch
                yield batch._replace(keys=[Key(*key) for key in batch.keys.tolist()])

    def close(self) -> None:
        """Ends the workers of an iteration under way; before the process ends, which would wait for them."""
        self._loading.close()


def train_loader(split: Dataset, order: StepOrder, *, transform: Transform, seed: int, num_workers: int,
                 pin_memory: bool, edits: dict[int, Edit] | None = None, grid: tuple[int, int] | None = None,
                 bad_images: str = "stop", timeout_s: float = 300.0, say: Callable[[str], None] = warn) -> Loader:
    """One loader for the whole run: the micro-batches of `order`. `transform` draws by (seed, epoch, image).

    edits, by index of the image, {} included, give every Batch edits on the model's grid (h, w), cropped and mirrored as
    its images; images without one, unedited ones. The images are the same with and without.

    bad_images "skip": in place of an image that cannot be read comes the next of the split that can (the first after the
    last; ImageError after REPLACEMENTS tries), with its own label, edit and draws; Batch.bad tells it. "stop": ImageError.

    timeout_s without a batch, or a worker's death: all workers are started anew, `say` gets a line. 0 waits for ever.
    """
    assert edits is None or grid is not None
    assert bad_images in ("stop", "skip")
    return Loader(_Keyed(split, transform, seed, edits, grid, bad_images == "skip"), order, num_workers, pin_memory, timeout_s,
                  say)


def eval_loader(split: Dataset, *, transform: Transform, batch_size: int, rank: int, world_size: int, num_workers: int,
                pin_memory: bool, timeout_s: float = 300.0, say: Callable[[str], None] = warn) -> Loader:
    """This rank's share of the split, every image once over all ranks, in batches of at most `batch_size`."""
    own = [Key(0, 0, 0, index) for index in range(rank, len(split), world_size)]
    batches = [own[first:first + batch_size] for first in range(0, len(own), batch_size)]
    return Loader(_Keyed(split, transform, None), batches, num_workers, pin_memory, timeout_s, say)


def default_workers(dataset: str, local_world_size: int) -> int:
    """None for digits (decoding them is free); elsewhere up to 4, as far as there are cores."""
    if dataset == "digits":
        return 0
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(0, min(4, cores // local_world_size - 1))
