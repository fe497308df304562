"""From the command to the first training step of the embedded default, with files in the page cache, and `import torch`.

python -m benchmarks.startup
"""

import sys

from . import harness
from .harness import OURS, Contender

SHORT = ["--num_steps", "1"]


def main(argv: list[str] | None = None) -> None:
    options = harness.options(__doc__, argv, contenders="", rounds=4)
    group = harness.choose_contenders([
        Contender("import torch", "benchmarks.runs:bare", {"command": [sys.executable, "-c", "import torch"]}, "limit"),
        Contender(f"{OURS} (train.py)", "benchmarks.runs:first_step", {"command": [sys.executable, "train.py", *SHORT]}, "ours"),
        Contender(f"{OURS} (train.sh)", "benchmarks.runs:first_step", {"command": ["bash", "train.sh", *SHORT]}, "ours"),
    ], options.contenders)
    with harness.worker_pool(options.quick) as pool:
        costs = harness.measure(group, pool, rounds=options.rounds)
    harness.report(harness.record("startup", group, costs, baseline="import torch", unit="seconds",
                                settings={"rounds": options.rounds}), options.json)


if __name__ == "__main__":
    sys.exit(main())
