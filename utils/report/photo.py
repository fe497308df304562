"""What is drawn: a model and an image, and the part of the image that the model saw, in the pixels of the image, since a small
model's own are too few to recognize anything."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

LARGEST = 384                       # pixels of the longer side


class Subject(Protocol):
    """A model in eval mode with what is needed to use it, as utils/build/opened.py opens it."""

    model: nn.Module
    classes: tuple[str, ...]
    title: str
    settings: dict                  # flags of train.py
    transform: Callable             # PIL RGB -> uint8 (channels, height, width), that of the model's evaluation
    region: Callable                # (height, width) of an image -> the part that is shown: top, left, bottom, right in 0..1
    evaluate: Callable              # images of a split -> EvalMetrics with `confusion` and `answers`, as the run computes them


@dataclasses.dataclass(frozen=True)
class Example:
    """An image that is decoded when it is drawn, and its true class if that is known."""

    name: str
    split: Dataset
    index: int
    truth: str = ""


def photo_of(subject: Subject, image: Image.Image, seen: np.ndarray) -> np.ndarray:
    """Return what `subject` sees of the image, in the shape of `seen`, uint8 (height, width, 3), but with more
    pixels: up to LARGEST, and no more than the image has; `seen` if it has no more. Gray for a model of one channel."""
    top, left, bottom, right = subject.region((image.height, image.width))
    box = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    height, width = seen.shape[:2]
    times = min(LARGEST / max(height, width), (box[3] - box[1]) / height, (box[2] - box[0]) / width)
    if times <= 1:
        return seen
    mode = "L" if subject.model.config.in_channels == 1 else "RGB"
    size = (round(times * width), round(times * height))
    large = image.convert(mode).resize(size, Image.Resampling.BICUBIC, box, reducing_gap=2.0)
    return np.asarray(large.convert("RGB"))
