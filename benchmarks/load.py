"""From Google's npz file to a model that is ready to train: construction and loading, with the file in the page cache.

python -m benchmarks.load --models ViT-B_16
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import harness
from .harness import OURS, Contender


def timm(row: dict, path: str) -> Callable[[], None]:
    """Return a step: timm's construction and loading."""
    from .peers import MODELS

    def step() -> None:
        MODELS["timm"](row).load_pretrained(path)

    return step


def main(argv: list[str] | None = None) -> None:
    from models import create_model, save_npz

    from .ours import row_of

    options = harness.options(__doc__, argv, models="ViT-B_16", contenders="", rounds=7)
    models = "ViT-Nano_2" if options.quick else options.models
    with tempfile.TemporaryDirectory() as folder, harness.worker_pool(options.quick) as pool:
        for model in models.split(","):
            row, path = row_of(model, None), Path(folder, f"{model}.npz")
            save_npz(create_model(model, 1000), path)
            given = {"row": row, "path": str(path)}
            group = harness.choose_contenders([Contender("timm", "benchmarks.load:timm", given),
                                    Contender(OURS, "benchmarks.ours:load", given, "ours")], options.contenders)
            costs = harness.measure(group, pool, rounds=options.rounds)
            harness.report(harness.record(f"load {model}", group, costs, baseline="timm", unit="seconds", settings={
                "file": f"{path.stat().st_size / 1e6:.0f} MB", "rounds": options.rounds}), options.json)
            path.unlink()


if __name__ == "__main__":
    sys.exit(main())
