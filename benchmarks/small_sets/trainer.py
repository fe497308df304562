"""Run transformers' Trainer on a split, as its image-classification example does: PIL, torchvision's transforms, one process.

python -m benchmarks.small_sets.trainer --data SPLIT --start FILE --model "FLAGS OF OURS" --settings same --passes 30 --seed 1
    --out FOLDER --json FILE

--settings same: our recipe (SGD 0.03, batch 32, cosine, a tenth of warm-up, crops of half the area and more, a head of zeros).
own: TrainingArguments' defaults (AdamW 5e-5, linear decay, batch 8, no warm-up), the example's RandomResizedCrop, and the head
that the model draws. Both evaluate as the example does: Resize of the shorter side and CenterCrop.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torchvision import transforms as t

from .start import row_of, transformers_model

SETTINGS = {
    "same": {"per_device_train_batch_size": 32, "learning_rate": 0.03, "lr_scheduler_type": "cosine", "warmup_steps": 0.1},
    "own": {"per_device_train_batch_size": 8},
}


class Images(torch.utils.data.Dataset):
    """The images of class folders, which are read again in every pass."""

    def __init__(self, folder: Path, transform: t.Compose):
        classes = sorted(path.name for path in folder.iterdir())
        self.files = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).iterdir())]
        self.transform, self.classes = transform, classes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        path, label = self.files[index]
        with Image.open(path) as image:
            return {"pixel_values": self.transform(image.convert("RGB")), "labels": label}


def views(settings: str, row: dict) -> tuple[t.Compose, t.Compose]:
    """Return the transforms for training and for evaluation."""
    side = row["img_size"]
    last = [t.ToTensor(), t.Normalize(row["mean"], row["std"])]
    scale = (0.5, 1.0) if settings == "same" else (0.08, 1.0)
    return (t.Compose([t.RandomResizedCrop(side, scale=scale), t.RandomHorizontalFlip(), *last]),
            t.Compose([t.Resize(side), t.CenterCrop(side), *last]))


def train(options: argparse.Namespace) -> dict:
    """Train, and return steps, passes, evaluations and losses."""
    row = row_of(options.model)
    transformers.set_seed(options.seed)
    training, evaluation = views(options.settings, row)
    train_set, held_out = Images(options.data / "train", training), Images(options.data / "val", evaluation)
    model, optimizer = transformers_model(options.start, row, len(train_set.classes)), None
    settings = SETTINGS[options.settings]
    if options.settings == "same":
        torch.nn.init.zeros_(model.classifier.weight)
        torch.nn.init.zeros_(model.classifier.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=settings["learning_rate"], momentum=0.9)
    steps = math.ceil(options.passes * math.ceil(len(train_set) / settings["per_device_train_batch_size"]))
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(
            str(options.out), num_train_epochs=options.passes, per_device_eval_batch_size=64, seed=options.seed, use_cpu=True,
            eval_strategy="steps", eval_steps=max(1, math.ceil(steps / 8)), save_strategy="no", report_to="none",
            disable_tqdm=True, **settings),
        train_dataset=train_set, eval_dataset=held_out, optimizers=(optimizer, None),
        compute_metrics=lambda made: {"accuracy": float(np.mean(made.predictions.argmax(-1) == made.label_ids))})
    trainer.train()
    evaluations = evaluations_of(trainer.state.log_history)
    if trainer.state.global_step not in dict(evaluations):
        trainer.evaluate()
        evaluations = evaluations_of(trainer.state.log_history)
    return {"steps": trainer.state.global_step, "passes": options.passes, "evaluations": evaluations,
            "losses": [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]}


def evaluations_of(log_history: list[dict]) -> list[tuple[int, float]]:
    """Return (step, accuracy from 0 to 1) of each evaluation in the Trainer's log."""
    return [(entry["step"], entry["eval_accuracy"]) for entry in log_history if "eval_accuracy" in entry]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("data", "start", "out", "json"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--settings", choices=SETTINGS, required=True)
    parser.add_argument("--passes", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args(argv)
    options.json.write_text(json.dumps(train(options)), encoding="utf-8")


if __name__ == "__main__":
    main()
