"""From the command to the last label: predict.py and timm's inference.py, on photographs of 500 x 375 px.

python -m benchmarks.predict --timm_inference timm/inference.py --counts 20,2000

Both label the same files with the same weights, resized and cropped in the same way (bicubic, 0.875), in float32, with the batch
and the workers of their defaults. Both write a csv file of the two most probable classes. The start of the program counts.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import harness, pictures
from .harness import OURS, ROOT, Contender

SIZE, DISTINCT, CLASSES = (500, 375), 200, 100
PEER = "timm's inference.py"
SMALL = "small"           # 32 px in patches of 4: reading is most of the work, as it is on a GPU
# Arguments of the model here, and flags of timm's script for it.
MODELS = {
    "DeiT-Ti_16": ({"name_or_config": "DeiT-Ti_16"}, ["--model", "deit_tiny_patch16_224"]),
    "DeiT-S_16": ({"name_or_config": "DeiT-S_16"}, ["--model", "deit_small_patch16_224"]),
    "DeiT-B_16": ({"name_or_config": "DeiT-B_16"}, ["--model", "deit_base_patch16_224"]),
    SMALL: ({"name_or_config": "DeiT-Ti_16", "img_size": 32, "patch_size": 4, "hidden_size": 128, "num_layers": 6, "num_heads": 4,
             "mlp_dim": 512},
            ["--model", "vit_tiny_patch16_224", "--img-size", "32", "--model-kwargs", "img_size=32", "patch_size=4",
             "embed_dim=128", "depth=6", "num_heads=4"]),
}


def photographs(root: Path, count: int) -> Path:
    """Write root/x/n.jpg and return root. More than DISTINCT images are the first ones again, under other names."""
    (root / "x").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        file = root / "x" / f"{number:05d}.jpg"
        if number < DISTINCT:
            pictures.photograph(generator, *SIZE).save(file, quality=90)
        else:
            os.link(root / "x" / f"{number % DISTINCT:05d}.jpg", file)
    return root


def command(words: list[str], output: str) -> Callable[[], float]:
    """Return a step that runs the command and returns its seconds, or raises RuntimeError if it fails or writes no file."""
    def step() -> float:
        Path(output).unlink(missing_ok=True)
        started = time.perf_counter()
        done = subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              text=True, env={name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"})
        elapsed = time.perf_counter() - started
        if done.returncode or not Path(output).exists():
            raise RuntimeError(f"{' '.join(words)} ended with code {done.returncode}: {done.stderr[-2000:]}")
        return elapsed

    return step


def contenders(folder: Path, weights: Path, photos: Path, model: str, script: Path | None, device: str) -> list[Contender]:
    """Return ours, and timm's if its script is given."""
    ours, theirs = folder / "ours.csv", folder / "timm.csv"
    words = [sys.executable, "predict.py", str(weights), str(photos), "--output", str(ours), "--interpolation", "bicubic",
             "--eval_crop", "0.875", "--device", device, *(["--num_heads", "4", "--img_size", "32"] if model == SMALL else [])]
    group = [Contender(OURS, "benchmarks.predict:command", {"words": words, "output": str(ours)}, "ours")]
    if script is None:
        return group
    mean, std = (["0.485", "0.456", "0.406"], ["0.229", "0.224", "0.225"])
    words = [sys.executable, str(script.resolve()), "--data-dir", str(photos), *MODELS[model][1],
             "--checkpoint", str(weights), "--num-classes", str(CLASSES), "--crop-pct", "0.875", "--interpolation", "bicubic",
             "--mean", *mean, "--std", *std, "--topk", "2", "--include-index", "--label-type", "none", "--fullname",
             "--no-console-results", "--results-dir", str(folder), "--results-file", theirs.stem, "--device", device]
    return [Contender(PEER, "benchmarks.predict:command", {"words": words, "output": str(theirs)}), *group]


def main(argv: list[str] | None = None) -> None:
    import torch

    from models import create_model, save_timm

    options = harness.options(__doc__, argv, models=f"DeiT-Ti_16,{SMALL}", counts="20,2000", timm_inference=None, device="cpu",
                              contenders="", rounds=3)
    if options.quick:
        options.counts = "3"
    with tempfile.TemporaryDirectory() as place, harness.worker_pool(options.quick) as pool:
        folder = Path(place)
        for model in options.models.split(","):
            torch.manual_seed(0)
            made, weights = create_model(num_classes=CLASSES, **MODELS[model][0]), folder / f"{model}.pth"
            torch.nn.init.normal_(made.head.weight, std=0.1)
            save_timm(made, weights)
            for count in map(int, options.counts.split(",")):
                photos = folder / f"photographs-{count}"
                if not photos.exists():
                    photographs(photos, count)
                known = contenders(folder, weights, photos, model, options.timm_inference, options.device)
                group = harness.choose_contenders(known, options.contenders)
                costs = harness.measure(group, pool, rounds=options.rounds)
                for contender in group:
                    pool.discard(contender)                      # the next question has another command with the same name
                harness.report(harness.record(
                    f"predict {model} {count} photographs", group, costs, baseline=group[0].name, unit="seconds",
                    settings={"size": "{} x {}".format(*SIZE), "device": options.device, "rounds": options.rounds}), options.json)


if __name__ == "__main__":
    sys.exit(main())
