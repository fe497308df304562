"""The peak memory of a training step: weights, gradients, momentum, activations, and what the allocator keeps.

python -m benchmarks.memory --models ViT-B_16 --precision fp32,bf16

On a CPU it is the largest resident set of a new process, minus what it had after importing everything and running a small model
once. On a GPU it is torch's max_memory_allocated.
"""

import gc
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from . import harness, step
from .harness import Contender

STEPS = 2            # momentum exists only from the second step on
SMALL = "ViT-Nano_2"


def peak(build: str, given: dict, small: dict) -> Callable[[], float]:
    """Return a step that returns MiB. small: the row of the model that runs once before."""
    import torch

    module, function = build.split(":")
    builder = getattr(importlib.import_module(module), function)
    builder(**given | {"row": small})()

    def measured() -> float:
        gc.collect()
        on_gpu = given["device"] == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else resident("VmRSS", forget=True)
        train = builder(**given)
        for _ in range(STEPS):
            train()
        after = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
        return max(after - before, 1 << 10) / 2**20

    return measured


def resident(field: str, forget: bool = False) -> int:
    """Return the bytes of this process, now (VmRSS) or at most (VmHWM), on Linux. forget: restart the count of VmHWM."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def main(argv: list[str] | None = None) -> None:
    from .ours import row_of

    options = harness.options(__doc__, argv, flags=["compile"], models="ViT-B_16", batch="8", size=224, precision="fp32,bf16",
                              device="cpu", threads=0, rounds=3, contenders="")
    step.shrink_if_quick(options)
    with harness.worker_pool(options.quick) as pool:
        for model in options.models.split(","):
            row, small = row_of(model, options.size or None), row_of(SMALL, None)
            for precision in options.precision.split(","):
                given = {"precision": precision, "device": options.device, "threads": options.threads,
                         "compiled": options.compile}
                stepping = step.contenders("training_step", row, int(options.batch), given, 0)
                group = [Contender(each.name, "benchmarks.memory:peak",
                                   {"build": each.build, "given": each.given, "small": small}, each.kind)
                         for each in stepping if each.kind != "limit"]
                group = harness.choose_contenders(group, options.contenders)
                costs = harness.measure(group, pool, rounds=options.rounds, fresh=True)
                title = f"memory {model} {row['size']} {precision} {options.device}{' compiled' if options.compile else ''}"
                harness.report(harness.record(title, group, costs, baseline="timm", unit="MiB",
                                            settings={"batch": options.batch, "rounds": options.rounds}), options.json)


if __name__ == "__main__":
    sys.exit(main())
