"""Evaluation: the forward pass without gradients, on one thread. Ours is metrics.evaluate, which also computes its metrics.

python -m benchmarks.evaluation --models ViT-B_16 --precision fp32,bf16
"""

import sys

from . import harness, step


def main(argv: list[str] | None = None) -> None:
    options = harness.options(__doc__, argv, flags=["compile"], models="ViT-B_16", batch="4", size=224, precision="fp32,bf16",
                              device="cpu", threads=1, rounds=5, contenders="")
    step.shrink_if_quick(options)
    step.measure_models("evaluation", "evaluation", 1 / 3, options)      # backward takes as much as 2 forward


if __name__ == "__main__":
    sys.exit(main())
