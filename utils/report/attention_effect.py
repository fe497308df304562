"""What edits of attention did: the attention before training, the edit, and the attention after it, side by side.

Shows images whose edits were learned, and held-out images, those with edits first.
"""

import dataclasses
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
IMAGES_PER_KIND = 4           # learned from, and held out


@dataclasses.dataclass(frozen=True)
class ShownImage:
    kind: str                 # "taught", or the name of the held-out split
    split: Dataset
    index: int
    edit: Edit | None


def choose_images(train: Dataset, edits: Mapping[int, Edit], held_out: Dataset, held_out_name: str,
                  held_out_edits: Mapping[int, Edit]) -> list[ShownImage]:
    supervised, quarters = sorted(edits), range(IMAGES_PER_KIND)
    supervised = dict.fromkeys(supervised[number * len(supervised) // IMAGES_PER_KIND] for number in quarters)
    others = dict.fromkeys([*sorted(held_out_edits), *(number * len(held_out) // IMAGES_PER_KIND for number in quarters)])
    return ([ShownImage("taught", train, index, edits[index]) for index in supervised]
            + [ShownImage(held_out_name, held_out, index, held_out_edits.get(index)) for index in list(others)[:IMAGES_PER_KIND]])


def predict_with_attention(shown: Sequence[ShownImage], model: nn.Module, transform: Callable,
                           normalize: Callable[[Tensor], Tensor], precision: Precision, device: torch.device) -> dict:
    """-> names, pixels (n, C, height, width) uint8, probabilities (n, classes), the last sigmoid attention (n, h, w)"""
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
    """Writes attention.png: of each image the attention before, the edit, the attention after, and what was predicted."""
    if before is None or before["names"] != after["names"]:
        (folder / ATTENTION_FILE).unlink(missing_ok=True)
        print("attention: other held-out images have edits now than when the run began: no picture of before and after")
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
