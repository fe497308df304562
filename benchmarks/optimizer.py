"""The optimizer on a model's parameters: clip the gradients and change the weights. Which way is the fastest?

python -m benchmarks.optimizer --models ViT-B_16

Ours is optim.update, which divides, clips and changes in one pass. "flat" has all parameters in one contiguous tensor, which many
scripts ask for. The limit is a bare copy of as many values.
"""

import sys
from collections.abc import Callable

import torch
from torch import nn

from . import harness
from .harness import OURS, Contender

WAYS = ("loop", "foreach", "clip, then fused", "flat", OURS)


def parameters(model: str) -> list[nn.Parameter]:
    """Return parameters with the model's shapes, with gradients."""
    from .ours import shapes

    made = [nn.Parameter(torch.randn(shape)) for shape in shapes(model)]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def update(way: str, model: str, threads: int) -> Callable[[], None]:
    """Return a step that clips and updates in this way."""
    if threads:
        torch.set_num_threads(threads)
    updated = parameters(model)
    if way == OURS:
        from .ours import optimizer_step
        return optimizer_step(updated)
    if way == "flat":
        flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in updated]))
        flat.grad, updated = torch.randn_like(flat), [flat]
    fused = way in ("clip, then fused", "flat")
    optimizer = torch.optim.SGD(updated, lr=1e-3, momentum=0.9, fused=fused or None, foreach=None if fused else way == "foreach")

    def step() -> None:
        nn.utils.clip_grad_norm_(updated, 1.0, foreach=way != "loop")
        optimizer.step()

    return step


def copy(model: str, threads: int) -> Callable[[], None]:
    """Return a step that copies as many values as the model has."""
    if threads:
        torch.set_num_threads(threads)
    source = torch.cat([parameter.detach().flatten() for parameter in parameters(model)])
    target = torch.empty_like(source)

    def step() -> None:
        target.copy_(source)

    return step


def main(argv: list[str] | None = None) -> None:
    options = harness.options(__doc__, argv, models="ViT-B_16", threads=0, contenders="", rounds=7)
    if options.quick:
        options.models, options.threads = "ViT-Nano_2", 1
    with harness.worker_pool(options.quick) as pool:
        for model in options.models.split(","):
            given = {"model": model, "threads": options.threads}
            group = [Contender(each, "benchmarks.optimizer:update", given | {"way": each}, "ours" if each == OURS else "peer")
                     for each in WAYS]
            group.append(Contender("bare copy", "benchmarks.optimizer:copy", given, "limit"))
            group = harness.choose_contenders(group, options.contenders)
            costs = harness.measure(group, pool, rounds=options.rounds)
            harness.report(harness.record(f"optimizer {model}", group, costs, baseline="foreach", unit="seconds", settings={
                "threads": options.threads or "all", "rounds": options.rounds}), options.json)


if __name__ == "__main__":
    sys.exit(main())
