"""Chooses the images of each step: a pure function of (seed, step), whatever the number of processes, workers or restarts.

Step t has the positions t * G to (t + 1) * G - 1 of an endless stream of shuffled epochs (G images per step). They are cut into
micro-batches, of which each rank gets a contiguous block. Steps may span two epochs, so there is no smaller last batch.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from utils.randomness import derive_seed


class SampleIndex(NamedTuple):
    """One sample: `index` in its split, in pass `epoch` over it; for micro-batch `micro` of step `step` (from 0)."""

    step: int
    micro: int
    epoch: int
    index: int


class SampleIndices(Sequence):
    """The SampleIndex of every sample of a micro-batch, stored as two arrays (B,) int64, which are fast to make and to send."""

    def __init__(self, step: int, micro: int, epochs: np.ndarray, indices: np.ndarray):
        self.step, self.micro, self.epochs, self.indices = step, micro, epochs, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> SampleIndex:
        return SampleIndex(self.step, self.micro, int(self.epochs[number]), int(self.indices[number]))

    def __iter__(self) -> Iterator[SampleIndex]:
        pairs = zip(self.epochs.tolist(), self.indices.tolist())
        return (SampleIndex(self.step, self.micro, epoch, index) for epoch, index in pairs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class StepSampler(Sequence):
    """This rank's micro-batches (SampleIndices) of the steps start to stop - 1, in order."""

    def __init__(self, images: int, batch_size: int, micro_batches: int, rank: int, world_size: int, seed: int,
                 start: int, stop: int):
        """micro_batches: per step, over all ranks. batch_size is a multiple of it, and it is a multiple of world_size."""
        assert batch_size % micro_batches == 0 and micro_batches % world_size == 0
        self.images, self.batch_size, self.seed, self.start, self.stop = images, batch_size, seed, start, stop
        self.micro_batches, self.micro_size = micro_batches, batch_size // micro_batches
        count = micro_batches // world_size
        self.own = range(rank * count, (rank + 1) * count)

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.own)

    def __getitem__(self, number: int) -> SampleIndices:
        if not 0 <= number < len(self):
            raise IndexError(number)
        steps, own = divmod(number, len(self.own))
        return self._micro_batch(self.start + steps, self.own[own])

    def samples_of(self, step: int) -> list[SampleIndex]:
        """Return all samples of a step, for every rank."""
        return [sample for micro in range(self.micro_batches) for sample in self._micro_batch(step, micro)]

    def _micro_batch(self, step: int, micro: int) -> SampleIndices:
        first = step * self.batch_size + micro * self.micro_size
        epochs, offsets = np.divmod(np.arange(first, first + self.micro_size), self.images)
        indices = [_permutation(self.images, self.seed, epoch)[offsets[epochs == epoch]]
                   for epoch in range(epochs[0], epochs[-1] + 1)]
        return SampleIndices(step, micro, epochs, np.concatenate(indices))


@functools.lru_cache(2)                   # a micro-batch may span two epochs
def _permutation(images: int, seed: int, epoch: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(images, generator=generator).numpy()
