"""Whole runs of train.py on small images in memory, resized to 224 px: seconds a step, and how much of them waits for data.

python -m benchmarks.end_to_end --models ViT-Ti_16 --batch 32 --files 200

--files N makes N JPEG files of 500 x 375 pixels, and adds two runs of ours: from the files, and from the prepared files.
The peer is the loop of tutorials: DataLoader, PIL, RandomResizedCrop, flip, ToTensor, Normalize, timm's model, torch's SGD. Its
loader has as many workers as train.py uses for images that are not in memory. Both use their default precision.
"""

import sys
import tempfile
import time
from collections.abc import Callable

from . import harness, runs
from .harness import OURS, Contender


def tutorial(row: dict, batch: int, device: str, steps: int) -> Callable[[], float]:
    """Return a step that trains and returns the seconds a step, not counting the start of the workers."""
    import torch
    from torch.utils.data import DataLoader

    from utils.data.loader import default_workers

    from . import peers
    from .input import Arrays

    model = peers.MODELS["timm"](row).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    workers = default_workers("fashion_mnist", 1, device)
    loader = DataLoader(Arrays(batch * (steps + runs.SETTLING), row["size"], grey=True), batch, shuffle=True, num_workers=workers,
                        persistent_workers=workers > 0, pin_memory=device == "cuda")

    def step() -> float:
        taken = []
        for pixels, labels in loader:
            logits = model(pixels.to(device, non_blocking=True))
            loss = torch.nn.functional.cross_entropy(logits, labels.to(device, non_blocking=True))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()                                    # tutorials print it
            taken.append(time.perf_counter())
        return (taken[-1] - taken[runs.SETTLING - 1]) / steps

    return step


def main(argv: list[str] | None = None) -> None:
    from .ours import row_of

    options = harness.options(__doc__, argv, models="ViT-Ti_16", batch="32", size=224, precision="auto", device="cpu", steps=8,
                              files=0, contenders="", rounds=3)
    runs.shrink_if_quick(options)
    with tempfile.TemporaryDirectory() as folder, harness.worker_pool(options.quick) as pool:
        for model in options.models.split(","):
            data = {OURS: runs.arrays(folder)}
            if options.files:
                data |= {f"{OURS} ({name})": flags for name, flags in runs.files(folder, options.files).items()}
            peer = {"row": row_of(model, options.size), "batch": int(options.batch), "device": options.device,
                    "steps": options.steps}
            settings = {"batch": options.batch, "precision": options.precision, "steps": options.steps, "rounds": options.rounds}
            settings |= {"files": options.files} if options.files else {}
            title = f"end to end {model} {options.size} {options.device}"
            group = harness.choose_contenders([
                Contender("timm, tutorial loop", "benchmarks.end_to_end:tutorial", peer),
                *(Contender(name, "benchmarks.runs:training", {"flags": runs.flags(options, model, flags), "processes": 1,
                                                               "threads": 0}, "ours") for name, flags in data.items()),
            ], options.contenders)
            costs = harness.measure(group, pool, rounds=options.rounds, fresh=True)
            harness.report(harness.record(title, group, costs, baseline=group[0].name, unit="seconds a step", settings=settings),
                         options.json)


if __name__ == "__main__":
    sys.exit(main())
