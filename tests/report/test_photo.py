"""The photograph under a map: the part that the model saw, in the photograph's own pixels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from utils.data.transforms import eval_region, eval_transform
from utils.report.photo import LARGEST, photo_of


def subject(size, crop=0.0, channels=3):
    return SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(in_channels=channels)),
                           region=lambda image_size: eval_region(image_size, size, crop))


def scene(height, width) -> Image.Image:
    """Return a smooth photograph, which is nearly the same after it is enlarged and reduced again."""
    rough = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def seen_by(image, size, crop) -> np.ndarray:
    return eval_transform(size, crop=crop)(image).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("size", "image_size", "crop", "expected"), [
    ((32, 32), (600, 900), 0.0, (384, 384)), ((32, 32), (600, 900), 0.875, (384, 384)), ((24, 48), (600, 900), 1.0, (192, 384)),
    ((32, 32), (100, 80), 0.0, (80, 80)), ((32, 32), (100, 80), 0.5, (40, 40)), ((224, 224), (300, 240), 0.0, (240, 240))])
def test_the_part_that_the_model_saw_in_more_pixels(size, image_size, crop, expected):
    """Up to 384 pixels, and not more than the image has."""
    image = scene(*image_size)
    seen = seen_by(image, size, crop)
    photo = photo_of(subject(size, crop), image, seen)
    assert photo.shape == (*expected, 3) and photo.dtype == np.uint8 and max(photo.shape) <= LARGEST
    again = np.asarray(Image.fromarray(photo).resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(again - seen).mean() < 3, "the same part of the image"


def test_an_image_without_more_pixels_is_what_the_model_saw():
    for size in ((8, 8), (5, 60)):
        image = scene(*size)
        seen = seen_by(image, (8, 8), 0.0)
        assert photo_of(subject((8, 8)), image, seen) is seen


def test_a_gray_model_has_a_gray_photograph():
    image = scene(90, 90)
    seen = torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
    photo = photo_of(subject((32, 32), channels=1), image, seen)
    assert photo.shape == (90, 90, 3) and np.array_equal(photo[..., 0], photo[..., 2])
