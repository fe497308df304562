"""The learning rate as a closed form of the update: nothing to save, nothing to step."""

import math
from collections.abc import Sequence


def factor(update: float, warmup: float, total: float, decay: str, *, floor: float = 0.0, start: float = 0.0,
           milestones: Sequence[int] = ()) -> float:
    """Share of the peak learning rate at update 1..total.

    In the warm-up a line from `start` (at update 0) to 1. Then `decay`, from 1 to `floor`: "cosine" (half of one) and
    "linear" reach it at `total`; "step" divides by 10 after each of the `milestones`, as BiT (arXiv 1912.11370);
    "constant" stays at 1.
    With start and floor 0 these are the values that the ViT-pytorch scripts use (their scheduler steps before the
    optimizer, so update k has factor(k)).
    """
    assert decay == "step" or not milestones, (decay, milestones)
    if update < warmup:
        return start + (1 - start) * (update / warmup)
    progress = (update - warmup) / max(1, total - warmup)
    if decay == "cosine":
        share = max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    elif decay == "linear":
        share = max(0.0, 1 - progress)
    elif decay == "constant":
        share = 1.0
    elif decay == "step":
        share = 10.0 ** -sum(update > milestone for milestone in milestones)
    else:
        raise ValueError(f"no decay is called {decay!r}: cosine, linear, step or constant")
    return floor + (1 - floor) * share


def is_time(step: int, every: int, total: int) -> bool:
    """After step 1..total: every `every` steps, and at the end."""
    return step % every == 0 or step == total
