"""Attention, forward and backward: torch's fused kernel, the two products written out, and the choice of models/attention.py.

python -m benchmarks.attention --models ViT-B_16 --size 224 --precision fp32,bf16
"""

import sys
from collections.abc import Callable

import torch
from torch.nn import functional as F

from . import harness
from .conditions import AUTOCAST, arrange
from .harness import OURS, Contender

FUSED = "fused kernel"


def attend(way: str, row: dict, batch: int, precision: str, device: str, threads: int) -> Callable[[], None]:
    """Return a step: attention forward and backward, computed in this way."""
    from .ours import attention, keep_memory

    arrange(device, threads, precision)
    if device == "cpu":
        keep_memory()               # as in training; otherwise half of the time is page faults
    tokens, width = (row["size"] // row["patch_size"]) ** 2 + 1, row["hidden_size"] // row["num_heads"]
    shape = batch, row["num_heads"], tokens, width
    q, k, v = (torch.randn(shape, device=device, dtype=AUTOCAST.get(precision, torch.float32), requires_grad=True)
               for _ in range(3))
    forward = {FUSED: F.scaled_dot_product_attention, "written out": _written_out, OURS: attention()}[way]
    gradient = torch.randn_like(q)

    def step() -> None:
        torch.autograd.grad(forward(q, k, v), (q, k, v), gradient)

    return step


def _written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def main(argv: list[str] | None = None) -> None:
    from .ours import row_of

    options = harness.options(__doc__, argv, models="ViT-B_16", batch="8", size=224, precision="fp32,bf16", device="cpu",
                              threads=0, contenders="", rounds=7)
    if options.quick:
        options.models, options.size, options.batch, options.threads = "ViT-Nano_2", 8, "2", 1
    with harness.worker_pool(options.quick) as pool:
        for model in options.models.split(","):
            row = row_of(model, options.size)
            for precision in options.precision.split(","):
                given = {"row": row, "batch": int(options.batch), "precision": precision, "device": options.device,
                         "threads": options.threads}
                group = harness.choose_contenders([
                    Contender(way, "benchmarks.attention:attend", given | {"way": way}, "ours" if way == OURS else "peer")
                    for way in (FUSED, "written out", OURS)], options.contenders)
                costs = harness.measure(group, pool, rounds=options.rounds)
                harness.report(harness.record(
                    f"attention {model} {row['size']} {precision} {options.device}", group, costs, baseline=FUSED, unit="seconds",
                    settings={"batch": options.batch, "threads": options.threads or "all", "rounds": options.rounds}),
                    options.json)


if __name__ == "__main__":
    sys.exit(main())
