"""Image transforms: sizes, types, what each kind does; normalising."""

import numpy as np
import pytest
import torch
from PIL import Image

from utils.augment import CROP_SCALE, eval_transform, normalise, train_transform
from utils.randomness import seeded

KINDS = [("crop_flip", True), ("crop_flip", False), ("crop", True), ("none", True)]


def picture(height=40, width=60) -> Image.Image:
    """Smooth, and different in every corner."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [rows * 255 / (height - 1), columns * 255 / (width - 1), (rows + columns) * 255 / (height + width - 2)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def draws(transform, count=24) -> list[torch.Tensor]:
    outputs = []
    for number in range(count):
        with seeded(0, number):
            outputs.append(transform(picture()))
    return outputs


def is_mirrored(image: torch.Tensor) -> bool:
    """The second channel of `picture` grows from left to right."""
    return bool(image[1, :, 0].float().mean() > image[1, :, -1].float().mean())


@pytest.mark.parametrize(("kind", "flip"), KINDS)
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (70, 9)])
def test_output_is_uint8_of_the_size_asked_for(kind, flip, size):
    for transform in (train_transform(kind, size, flip), eval_transform(size)):
        image = transform(picture())
        assert image.dtype == torch.uint8 and image.shape == (3, *size)
        assert image.float().std() > 10      # a picture, not a constant


def test_kinds_differ():
    outputs = {(kind, flip): draws(train_transform(kind, (16, 16), flip)) for kind, flip in KINDS}
    plain = eval_transform((16, 16))(picture())
    assert all(torch.equal(image, plain) for image in outputs["none", True])
    assert not any(torch.equal(image, plain) for image in outputs["crop", True])
    same = [torch.equal(a, b) for a, b in zip(outputs["crop_flip", True], outputs["crop", True])]
    assert any(same) and not all(same)


def test_only_crop_flip_of_data_that_may_be_flipped_is_mirrored():
    mirrored = {(kind, flip): sum(map(is_mirrored, draws(train_transform(kind, (16, 16), flip)))) for kind, flip in KINDS}
    assert 4 <= mirrored.pop(("crop_flip", True)) <= 20       # about half of 24
    assert set(mirrored.values()) == {0}


def test_the_crop_stays_where_it_is_when_flips_are_off():
    with_flip, without = (draws(train_transform("crop_flip", (16, 16), flip)) for flip in (True, False))
    for a, b in zip(with_flip, without):
        assert torch.equal(a.flip(-1) if is_mirrored(a) else a, b)


def test_crops_reach_small_areas():
    """The ViT paper's scale (0.05, 1): a crop's range of the first channel shows its height."""
    assert CROP_SCALE == (0.05, 1.0)
    heights = [int(image[0].max()) - int(image[0].min()) for image in draws(train_transform("crop", (16, 16), False), 60)]
    assert min(heights) < 100 and max(heights) > 200


def test_evaluation_resizes_the_whole_image_and_draws_nothing():
    before = torch.get_rng_state()
    image = eval_transform((20, 30))(picture(40, 60)).float()
    assert torch.equal(torch.get_rng_state(), before)
    assert image[0, 0].mean() < 10 and image[0, -1].mean() > 245 and image[1, :, 0].mean() < 10 and image[1, :, -1].mean() > 245


def test_normalise_to_plus_minus_one():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    got = normalise(images, (0.5,) * 3, (0.5,) * 3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, images.float() / 127.5 - 1, rtol=0, atol=1e-6)
    assert got.min() == -1 and got.max() == 1


def test_normalise_by_channel_and_type():
    images = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)                     # 0.2
    got = normalise(images, (0.1, 0.2, 0.4), (0.1, 0.5, 0.4), torch.float16)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got[0, :, 0, 0].float(), torch.tensor([1.0, 0.0, -0.5]), rtol=0, atol=1e-3)
