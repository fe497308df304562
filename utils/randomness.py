"""Every random draw of a run is a function of what it is for, so that no generator state has to be saved.

A run that is resumed, or spread over other ranks or workers, draws the same numbers, because the seed of a draw is
a hash of (run seed, purpose, position) and not a position in a stream.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from (run seed, purpose, ...). Hashed, because generators with neighbouring seeds are related."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


@contextlib.contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Inside, torch's global CPU generator is the one of `parts`; afterwards it is as before.

    torchvision's transforms take no generator and draw from the global one. `default_generator.manual_seed` is
    used because `torch.manual_seed` visits every device's generator, which costs a hundred times as much.
    """
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(derive_seed(*parts))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def raw_draws(seeds: Sequence[int], count: int) -> np.ndarray:
    """The first 32-bit numbers that torch's CPU generator draws from each of the seeds: (seeds, count) int64.

    It is the Mersenne Twister seeded with the low 32 bits, as numpy's is, whose numbers come in bulk: ten times as fast.
    """
    twister = np.random.MT19937()
    state, numbers = np.random.RandomState(twister), np.empty((len(seeds), count), dtype=np.int64)
    for row, seed in zip(numbers, seeds):
        state.seed(seed & 0xFFFFFFFF)
        row[:] = twister.random_raw(count)
    return numbers


def seed_device(device: torch.device, *parts: int | str) -> None:
    """Seeds what the model draws from on `device` (dropout), for good."""
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
