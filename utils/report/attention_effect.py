"""What edits of attention did: the attention before training, the edit, and the attention after it, side by side.

The images shown are some whose edits were learned, and held-out ones, those with edits first.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from utils.attention.editor.session import fitted
from utils.attention.edits import Edit
from utils.data.transforms import eval_region
from utils.training.precision import Precision

from . import pictures, plots

ATTENTION_FILE = "attention.png"
IMAGES_PER_KIND = 4           # of those that were learned, and of the held-out ones


@dataclasses.dataclass(frozen=True)
class ShownImage:
    kind: str                 # "taught", or the name of the held-out split
    split: Dataset
    index: int
    edit: Edit | None


def choose_images(train: Dataset, edits: Mapping[int, Edit], held_out: Dataset, held_out_name: str,
                  held_out_edits: Mapping[int, Edit], names: Sequence[str] = ()) -> list[ShownImage]:
    """Choose IMAGES_PER_KIND images with edits that are learned, and as many held-out ones, those with edits first; each of
    another class where there are as many.

    names: of the images that the run began with, which are kept if all of them are there.
    """
    if names and (kept := _find(names, train, edits, held_out, held_out_name, held_out_edits)):
        return kept
    supervised = _spread(sorted(edits), train.targets)[:IMAGES_PER_KIND]
    others = [*_spread(sorted(held_out_edits), held_out.targets),
              *_spread(range(len(held_out)), held_out.targets)[:IMAGES_PER_KIND]]
    return ([ShownImage("taught", train, index, edits[index]) for index in sorted(supervised)]
            + [ShownImage(held_out_name, held_out, index, held_out_edits.get(index))
               for index in list(dict.fromkeys(others))[:IMAGES_PER_KIND]])


def _spread(indices: Sequence[int], targets: Sequence[int]) -> list[int]:
    """Return the indices in an order whose first ones are of a class each, of classes far apart."""
    by_class: dict[int, list[int]] = {}
    for index in indices:
        by_class.setdefault(int(targets[index]), []).append(index)
    labels = list(by_class)
    first = [labels[part * len(labels) // IMAGES_PER_KIND] for part in range(IMAGES_PER_KIND)] if labels else []
    rounds = itertools.zip_longest(*(by_class[label] for label in dict.fromkeys([*first, *labels])))
    return [index for each in rounds for index in each if index is not None]


def _find(names: Sequence[str], train: Dataset, edits: Mapping[int, Edit], held_out: Dataset, held_out_name: str,
          held_out_edits: Mapping[int, Edit]) -> list[ShownImage] | None:
    """Return the images of these names, as predict_with_attention writes them; None unless all are there."""
    taught = {f"taught: {train.name(index)}": ShownImage("taught", train, index, edit) for index, edit in edits.items()}
    wanted = {name.removeprefix(f"{held_out_name}: ") for name in names}
    others = {f"{held_out_name}: {name}": ShownImage(held_out_name, held_out, index, held_out_edits.get(index))
              for index in range(len(held_out)) if (name := held_out.name(index)) in wanted}
    found = taught | others
    return [found[name] for name in names] if all(name in found for name in names) else None


def attention_loss_line(losses: Sequence[float], recent: int) -> list[str]:
    """Return the line of a run's summary: means over the first and over the last steps, up to `recent` of each, none of both."""
    if not losses:
        return []
    window, square = min(recent, len(losses) // 2), "mean square of attention - edit"
    if not window:
        return [f"attention loss {losses[0]:.4f} in the one step: {square}"]
    first, last = (sum(part) / window for part in (losses[:window], losses[-window:]))
    steps = f"{window} steps" if window > 1 else "step"
    return [f"attention loss {first:.4f} in the first {steps}, {last:.4f} in the last{f' {window}' * (window > 1)}: {square}"]


def predict_with_attention(shown: Sequence[ShownImage], model: nn.Module, transform: Callable,
                           normalize: Callable[[Tensor], Tensor], precision: Precision, device: torch.device) -> dict:
    """Return names, pixels (n, C, height, width) uint8, probabilities (n, classes), the last sigmoid attention (n, h, w)."""
    was_training = model.training
    model.eval()
    pixels = torch.stack([transform(image.split[image.index][0]) for image in shown])
    with torch.no_grad(), precision.autocast(device), model.recording_patch_logits() as logits:
        probabilities = model(normalize(pixels.to(device))).float().softmax(dim=1)
    model.train(was_training)
    attention = logits[-1].sigmoid().mean(dim=(1, 2)).unflatten(-1, model.grid)
    return {"names": [f"{image.kind}: {image.split.name(image.index)}" for image in shown], "pixels": pixels,
            "probabilities": probabilities.cpu(), "attention": attention.cpu()}


def draw(folder: Path, title: str, model: nn.Module, eval_crop: float, classes: Sequence[str], shown: Sequence[ShownImage],
         before: dict | None, after: dict) -> None:
    """Write attention.png: for each image the attention before, the edit, the attention after, and the predictions."""
    if before is None or before["names"] != after["names"]:
        (folder / ATTENTION_FILE).unlink(missing_ok=True)
        print("attention: images that the run began with are missing or have no edits now: no picture of before and after")
        return

    def seen(side: dict, number: int, label: int) -> tuple:
        probabilities = side["probabilities"][number]
        return side["attention"][number].numpy(), classes[int(probabilities.argmax())], float(probabilities[label])

    rows = []
    for number, image in enumerate(shown):
        label, pixels = int(image.split.targets[image.index]), after["pixels"][number].permute(1, 2, 0).numpy()
        marked = None
        if image.edit is not None:                   # perhaps made on another crop or grid
            region = eval_region(image.split[image.index][0].size[::-1], model.img_size, eval_crop)
            edit = fitted(image.edit, model.grid, region)
            marked = np.where(edit.edited, edit.values, np.nan)
        rows.append(pictures.BeforeAfter(image.kind, pixels, classes[label], seen(before, number, label),
                                         seen(after, number, label), marked))
    plots.save(pictures.before_and_after(rows, title), folder / ATTENTION_FILE)
