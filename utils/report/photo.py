"""The part of an image that a model saw, in the pixels of the image: a small model's own are too few to recognize anything."""

from typing import Any

import numpy as np
from PIL import Image

LARGEST = 384                       # pixels of the longer side


def photo_of(subject: Any, image: Image.Image, seen: np.ndarray) -> np.ndarray:
    """Return what `subject` (views.Subject) sees of the image, in the shape of `seen`, uint8 (height, width, 3), but with more
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
