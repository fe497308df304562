"""Saving weights and momentum: how long training waits, and how long it takes until they are on the disk.

python -m benchmarks.checkpoint --models ViT-B_16

torch.save returns when it has written: training waits for all of it. Ours is utils/run/saver.py as train.py uses it, with its
checks, its digest and its fsync. (torch.save does none of these.)
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import harness
from .harness import OURS, Contender


def torch_save(row: dict, folder: str) -> Callable[[], None]:
    """Return a step: torch.save of the state dicts."""
    import torch

    from .ours import trained

    model, optimizer = trained(row)
    path = Path(folder, "peer.pt")

    def step() -> None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)

    return step


def main(argv: list[str] | None = None) -> None:
    from .ours import row_of

    options = harness.options(__doc__, argv, models="ViT-B_16", contenders="", rounds=5)
    models = "ViT-Nano_2" if options.quick else options.models
    with tempfile.TemporaryDirectory() as folder, harness.worker_pool(options.quick) as pool:
        for model in models.split(","):
            given = {"row": row_of(model, None), "folder": folder}
            group = harness.choose_contenders([
                Contender("torch.save", "benchmarks.checkpoint:torch_save", given),
                Contender(OURS, "benchmarks.ours:save", given, "ours")], options.contenders)
            costs = harness.measure(group, pool, rounds=options.rounds)
            harness.report(harness.record(f"checkpoint {model}", group, costs, baseline="torch.save", unit="seconds",
                                        settings={"rounds": options.rounds}), options.json)


if __name__ == "__main__":
    sys.exit(main())
