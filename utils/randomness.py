"""Seeds as a function of (run seed, purpose, position), so that no generator state has to be saved.

A run that is resumed, or uses other numbers of ranks or workers, draws the same numbers: the seed of a draw is a hash of its
purpose and position, not a position in a stream.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed for (run seed, purpose, ...). It is a hash, because generators with adjacent seeds are correlated."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


@contextlib.contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seed torch's global CPU generator from `parts`, and restore it afterwards.

    torchvision's transforms take no generator and draw from the global one. `torch.manual_seed` would seed every device's
    generator, which costs a hundred times as much as `default_generator.manual_seed`.
    """
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(derive_seed(*parts))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def raw_draws(seeds: Sequence[int], count: int) -> np.ndarray:
    """Return the first 32-bit numbers that torch's CPU generator draws from each seed: (seeds, count) int64.

    torch's generator is the Mersenne Twister, seeded with the low 32 bits. numpy has the same generator and draws many numbers
    at once, which is ten times as fast.
    """
    twister = np.random.MT19937()
    state, numbers = np.random.RandomState(twister), np.empty((len(seeds), count), dtype=np.int64)
    for row, seed in zip(numbers, seeds):
        state.seed(seed & 0xFFFFFFFF)
        row[:] = twister.random_raw(count)
    return numbers


def seed_device(device: torch.device, *parts: int | str) -> None:
    """Seed the global generators that a model on `device` draws from (dropout)."""
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
