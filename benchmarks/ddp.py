"""Two processes with one thread each, compared with one process with two threads: train.py at the same global batch.

python -m benchmarks.ddp --models ViT-S_16 --batch 16
"""

import sys
import tempfile

from . import harness, runs
from .harness import Contender

ONE, TWO = "1 process x 2 threads", "2 processes x 1 thread"


def main(argv: list[str] | None = None) -> None:
    options = harness.options(__doc__, argv, models="ViT-S_16", batch="16", size=224, precision="auto", device="cpu", steps=8,
                              rounds=3)
    runs.shrink_if_quick(options)
    with tempfile.TemporaryDirectory() as folder, harness.worker_pool(options.quick) as pool:
        for model in options.models.split(","):
            given = {"flags": runs.flags(options, model, runs.arrays(folder))}
            group = [Contender(ONE, "benchmarks.runs:training", given | {"processes": 1, "threads": 2}, "ours"),
                     Contender(TWO, "benchmarks.runs:training", given | {"processes": 2, "threads": 1}, "ours")]
            costs = harness.measure(group, pool, rounds=options.rounds, fresh=True)
            harness.report(harness.record(
                f"ddp {model} {options.size} {options.device}", group, costs, baseline=f"{ONE}, step", unit="seconds a step",
                settings={"batch": options.batch, "precision": options.precision, "steps": options.steps,
                          "rounds": options.rounds}), options.json)


if __name__ == "__main__":
    sys.exit(main())
