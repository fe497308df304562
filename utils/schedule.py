"""The learning rate as a closed form of the update: nothing to save, nothing to step."""

import math


def factor(update: int, warmup: int, total: int, decay: str) -> float:
    """Share of the peak learning rate at update 1..total.

    update / warmup in the warm-up; then half a cosine, or a line, that reaches 0 at `total`. These are the values
    that the ViT-pytorch scripts use (their scheduler steps before the optimizer, so update k has factor(k)).
    """
    if update < warmup:
        return update / warmup
    progress = (update - warmup) / max(1, total - warmup)
    if decay == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    if decay == "linear":
        return max(0.0, 1 - progress)
    raise ValueError(f"no decay is called {decay!r}: cosine or linear")


def is_time(step: int, every: int, total: int) -> bool:
    """After step 1..total: every `every` steps, and at the end."""
    return step % every == 0 or step == total
