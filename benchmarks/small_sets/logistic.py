"""Fit a logistic regression on frozen features of the start weights: nothing is fine-tuned.

python -m benchmarks.small_sets.logistic --data SPLIT --start FILE --model "FLAGS OF OURS" --seed 1 --json FILE

Images are shown whole, squeezed to a square, or with their shape kept and the middle cut out (crop 0.875), bicubic as in `auto`.
Each is used with its mirror image: in training, and in evaluation with the mean of both probabilities. Cross-validation on the
training images chooses the view and C.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from utils.data.transforms import eval_transform

from .start import our_model, row_of

VIEWS = {"squeezed": 0.0, "shape kept, crop 0.875": 0.875}
PENALTIES = [10.0 ** power for power in range(-5, 3)]            # C
FOLDS = 5


@torch.inference_mode()
def features(model: torch.nn.Module, row: dict, folder: Path, crop: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of the images and their mirror images (2, images, D), and the labels (images,)."""
    transform = eval_transform((row["img_size"],) * 2, interpolation="bicubic", crop=crop)
    mean, std = (torch.tensor(row[name]).view(1, -1, 1, 1) * 255 for name in ("mean", "std"))
    found, labels = [], []
    for label, name in enumerate(sorted(path.name for path in folder.iterdir())):
        for path in sorted((folder / name).iterdir()):
            with Image.open(path) as image:
                pixels = transform(image.convert("RGB"))[None]
            both = torch.cat([pixels, pixels.flip(-1)])
            found.append(model.forward_features((both - mean) / std)[:, 0])
            labels.append(label)
    return torch.stack(found, dim=1).numpy(), np.array(labels)


def search(values: np.ndarray, labels: np.ndarray, seed: int) -> GridSearchCV:
    """Return a fitted search for the C with the lowest cross-entropy on held-out folds.

    values: (2, images, D). An image and its mirror image are in the same fold.
    """
    count = len(labels)
    folds = [tuple(np.concatenate([part, part + count]) for part in parts) for parts in StratifiedKFold(
        min(FOLDS, int(np.bincount(labels).min())), shuffle=True, random_state=seed).split(labels, labels)]
    values, labels = np.concatenate(values), np.concatenate([labels, labels])
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return GridSearchCV(pipeline, {"logisticregression__C": PENALTIES}, scoring="neg_log_loss", cv=folds).fit(values, labels)


def evaluate(options: argparse.Namespace) -> dict:
    """Return accuracy, C and cross-validated loss of each view, and the view with the lowest loss."""
    row = row_of(options.model)
    model, views = our_model(options.start, row, 2).eval(), {}
    for name, crop in VIEWS.items():
        fitted = search(*features(model, row, options.data / "train", crop), options.seed)
        held_out, labels = features(model, row, options.data / "val", crop)
        predicted = sum(fitted.predict_proba(view) for view in held_out).argmax(axis=1)
        accuracy = float(np.mean(predicted == labels))
        views[name] = {"accuracy": accuracy, "C": fitted.best_params_["logisticregression__C"], "loss": -fitted.best_score_}
    return {"view": min(views, key=lambda name: views[name]["loss"]), "views": views}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("data", "start", "json"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args(argv)
    options.json.write_text(json.dumps(evaluate(options)), encoding="utf-8")


if __name__ == "__main__":
    main()
