"""Image transforms: sizes, types, the effect of each kind and each flag; normalize."""

import pickle
import resource

import numpy as np
import pytest
import torch
from pictures import picture, plain
from PIL import Image
from torchvision import transforms as v1

from utils.data.transforms import eval_region, eval_transform, normalize, train_transform
from utils.randomness import seeded

KINDS = [("crop_flip", True), ("crop_flip", False), ("crop", True), ("pad_flip", True), ("pad_flip", False), ("pad", True),
         ("none", True)]
EVERYTHING = {"rotation": 10.0, "color_jitter": 0.4, "randaugment_ops": 2, "random_erasing": 0.5, "interpolation": "bicubic"}


def draws(transform, count=24, image=None) -> list[torch.Tensor]:
    outputs = []
    for number in range(count):
        with seeded(0, number):
            outputs.append(transform(image or picture()))
    return outputs


def is_mirrored(image: torch.Tensor) -> bool:
    """The second channel of `picture` grows from left to right."""
    margin = image.shape[2] // 4            # padding may have made it black
    return bool(image[1, :, margin].float().mean() > image[1, :, -1 - margin].float().mean())


@pytest.mark.parametrize(("kind", "flip"), KINDS)
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (70, 9)])
def test_output_is_uint8_of_the_requested_size(kind, flip, size):
    for channels in (1, 3):
        for transform in (train_transform(kind, size, flip=flip, channels=channels),
                          train_transform(kind, size, flip=flip, channels=channels, **EVERYTHING),
                          eval_transform(size, channels=channels), eval_transform(size, channels=channels, crop=0.8)):
            with seeded(0):
                image = transform(picture())
            assert image.dtype == torch.uint8 and image.shape == (channels, *size)
            assert image.float().std() > 5      # a picture, not a constant


@pytest.mark.parametrize("kind", ["crop_flip", "pad"])
def test_every_draw_comes_from_the_seeded_generator(kind):
    transform = train_transform(kind, (16, 16), **EVERYTHING)
    copied = pickle.loads(pickle.dumps(transform))          # as in the loader's workers
    assert all(torch.equal(a, b) for a, b in zip(draws(transform), draws(copied)))
    pickle.dumps(eval_transform((16, 16), crop=0.9))


# ------------------------------------------------------------------------------------------- crops and flips


def test_only_images_that_may_be_flipped_are_mirrored():
    mirrored = {(kind, flip): sum(map(is_mirrored, draws(train_transform(kind, (32, 32), flip=flip, crop_padding=2))))
                for kind, flip in KINDS}
    assert 4 <= mirrored.pop(("crop_flip", True)) <= 20       # about half of 24
    assert 4 <= mirrored.pop(("pad_flip", True)) <= 20
    assert set(mirrored.values()) == {0}


def test_crop_is_the_same_with_and_without_flips():
    with_flip, without = (draws(train_transform("crop_flip", (16, 16), flip=flip)) for flip in (True, False))
    for a, b in zip(with_flip, without):
        assert torch.equal(a.flip(-1) if is_mirrored(a) else a, b)


@pytest.mark.parametrize(("scale", "low", "high"), [({}, 0, 100), ({"crop_scale": 0.6}, 195, 225)])
def test_crops_have_areas_down_to_the_crop_scale(scale, low, high):
    """The default is the ViT paper's scale (0.05, 1). The range of the first channel shows the height of a crop."""
    outputs = draws(train_transform("crop", (16, 16), flip=False, **scale), 60)
    heights = [int(image[0].max()) - int(image[0].min()) for image in outputs]
    assert low < min(heights) < high and max(heights) > 230


@pytest.mark.parametrize("padding", [2, 4])
def test_pad_shifts_the_resized_image_over_black(padding):
    whole = np.pad(eval_transform((16, 20))(picture()).numpy(), ((0, 0), (padding, padding), (padding, padding)))
    places = []
    for image in draws(train_transform("pad", (16, 20), crop_padding=padding), 60):
        found = [(top, left) for top in range(2 * padding + 1) for left in range(2 * padding + 1)
                 if np.array_equal(whole[:, top:top + 16, left:left + 20], image.numpy())]
        assert found
        places.append(found[0])
    assert len(set(places)) > 12 and {0, 2 * padding} <= {side for place in places for side in place}


# ------------------------------------------------------------------------------------------------ appearance


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_interpolation_equals_pillows(name):
    expected = np.asarray(picture().resize((20, 12), getattr(Image.Resampling, name.upper()))).transpose(2, 0, 1)
    assert np.array_equal(eval_transform((12, 20), interpolation=name)(picture()), expected)
    assert np.array_equal(train_transform("none", (12, 20), interpolation=name)(picture()), expected)


def test_rotation_is_in_both_directions_up_to_its_limit():
    angles = []
    for image in draws(train_transform("none", (64, 64), rotation=20.0), 40, picture(64, 64)):
        down, right = np.gradient(image[1, 20:44, 20:44].float().numpy())         # the second channel grows to the right
        angles.append(np.degrees(np.arctan2(down.mean(), right.mean())))
    assert -21 < min(angles) < -10 and 10 < max(angles) < 21


def test_color_jitter_changes_brightness_contrast_and_saturation():
    """For dark gray, light gray and a color: their mean only depends on the brightness, their distances on the others."""
    bands = Image.fromarray(np.array([[[60] * 3, [140] * 3, [130, 90, 90]]], np.uint8)).resize((24, 24), Image.Resampling.NEAREST)
    transform = train_transform("none", (24, 24), color_jitter=0.5)
    outputs = [image[:, 0, [0, 12, 23]].float() for image in draws(transform, 60, bands)]
    brightness = [(image[:, :2].mean() / 100).item() for image in outputs]
    contrast = [((image[0, 1] - image[0, 0]) / 80).item() / bright for image, bright in zip(outputs, brightness)]
    saturation = [((image[0, 2] - image[1, 2]) / (image[0, 1] - image[0, 0]) * 2).item() for image in outputs]
    for factors in (brightness, contrast, saturation):
        assert 0.47 < min(factors) < 0.7 and 1.3 < max(factors) < 1.53


@pytest.mark.parametrize(("magnitude", "expected"), [
    # brightness 100 (1 - 0.09 m) and 100 (1 + 0.09 m); 8 - m / 2.5 bits; inverted above 255 (1 - m / 10); or unchanged
    (9, {19, 181, 96, 155, 100}), (10, {10, 190, 96, 155, 100}), (4, {64, 136, 100}), (0, {100})])
def test_randaugment_has_the_magnitudes_of_the_paper(magnitude, expected):
    outputs = draws(train_transform("none", (24, 24), randaugment_ops=1, randaugment_magnitude=magnitude), 250, plain(100))
    assert {image[0, 12, 12].item() for image in outputs} == expected
    if magnitude == 9:                       # each of two operations may darken or brighten
        twice = draws(train_transform("none", (24, 24), randaugment_ops=2, randaugment_magnitude=9), 250, plain(100))
        assert len({image[0, 12, 12].item() for image in twice}) > len(expected)


def test_random_erasing_fills_a_rectangle_with_noise():
    areas, ratios, pixels = [], [], []
    for image in draws(train_transform("none", (100, 100), random_erasing=1.0), 40, plain(100)):
        changed = (image != 100).any(dim=0).numpy()
        rows, columns = (np.flatnonzero(changed.any(axis=axis)) for axis in (1, 0))
        hole = image[:, rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
        areas.append(hole[0].numel() / 10_000)
        ratios.append(hole.shape[1] / hole.shape[2])
        pixels.append(hole.float().flatten())
        assert (hole != 100).float().mean() > 0.97
    assert 0.019 < min(areas) < 0.06 and 0.25 < max(areas) < 0.34
    assert 0.29 < min(ratios) < 0.6 and 1.8 < max(ratios) < 3.4
    pixels = torch.cat(pixels)
    noise = (127.5 + 57.375 * torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))).round().clamp(0, 255)
    assert pixels.mean().item() == pytest.approx(noise.mean().item(), abs=0.5)
    assert pixels.std().item() == pytest.approx(noise.std().item(), abs=0.5)


# ---------------------------------------------------------------------------------------------------- channels


def test_one_channel_is_the_luma():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for transform in (train_transform("none", (16, 16), channels=1), eval_transform((16, 16), channels=1),
                      eval_transform((16, 16), channels=1, crop=1.0)):
        assert np.array_equal(transform(Image.fromarray(gray).convert("RGB")), gray[None])
        luma = 0.299 * 200 + 0.587 * 90 + 0.114 * 30                       # ITU-R BT.601
        assert transform(plain(200, 90, 30)).unique().tolist() == [pytest.approx(luma, abs=0.6)]


# -------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("shape", [(50, 83), (83, 50), (300, 47), (20, 20)])
@pytest.mark.parametrize(("side", "crop", "resized"), [(28, 0.875, 32), (30, 1.0, 30), (48, 0.9, 53), (24, 0.9, 26)])
def test_crop_equals_the_evaluation_of_deit(shape, side, crop, resized):
    """Its published code resizes the shorter side to int(side / crop) and cuts out the center."""
    theirs = v1.Compose([v1.Resize(resized, interpolation=v1.InterpolationMode.BICUBIC), v1.CenterCrop(side), v1.PILToTensor()])
    ours = eval_transform((side, side), interpolation="bicubic", crop=crop)
    assert torch.equal(ours(picture(*shape)), theirs(picture(*shape)))


@pytest.mark.parametrize("crop", [0.0, 0.5, 0.875, 1.0])
@pytest.mark.parametrize("shape", [(400, 600), (500, 500), (900, 320)])
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_eval_region_is_what_evaluation_shows(size, shape, crop):
    region = eval_region(shape, size, crop)
    shown = eval_transform(size, crop=crop)(picture(*shape)).permute(1, 2, 0).numpy().astype(int)
    top, left, bottom, right = (ratio * side for ratio, side in zip(region, (*shape, *shape)))
    expected = picture(*shape).resize(size[::-1], Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    assert np.abs(shown - np.asarray(expected)).max() <= 3
    assert crop or region == (0, 0, 1, 1)


# ----------------------------------------------------------------------------------------------- strips


def strip(*shape: int) -> np.ndarray:
    """Return an image that is black except for its middle."""
    pixels = np.zeros((*shape, 3), np.uint8)
    long = pixels if shape[0] > shape[1] else pixels.swapaxes(0, 1)
    middle, reach = len(long) // 2, min(shape)
    long[middle - reach:middle + reach] = 200
    return pixels


@pytest.mark.parametrize("shape", [(1, 65_000), (65_000, 1), (1, 3_000_001), (3_000_001, 1), (3, 40_000)])
def test_strip_needs_no_more_memory_than_other_images(shape):
    """Evaluation with a crop would resize 1 x 65,000 px to 256 x 16,640,000, which is 13 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels, size = strip(*shape), (224, 224)
    transforms = [eval_transform(size, crop=0.875), eval_transform(size), train_transform("crop_flip", size),
                  train_transform("pad", size), train_transform("none", size)]
    for image in (Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)):
        for number, transform in enumerate(transforms):
            with seeded(0, number):
                made = transform(image)
            assert made.shape == (3, *size)
        middle = transforms[0](image)
        assert (middle[:, 110:114, 110:114] > 197).all(), "the middle of the image is in the middle"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000, "kB"


def test_long_images_below_the_limit_are_cropped_after_the_resize():
    image = picture().resize((30, 1500))                    # 1 : 50
    expected = v1.Compose([v1.Resize(32), v1.CenterCrop((28, 28)), v1.PILToTensor()])(image)
    assert torch.equal(eval_transform((28, 28), crop=0.875)(image), expected)
    longer = picture().resize((30, 3000))                   # 1 : 100
    expected = v1.Compose([v1.Resize(32), v1.CenterCrop((28, 28)), v1.PILToTensor()])(longer)
    assert (eval_transform((28, 28), crop=0.875)(longer).int() - expected.int()).abs().max() <= 2


# ----------------------------------------------------------------------------------------------- normalize


def test_normalize_to_plus_minus_one():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    got = normalize(images, (0.5,) * 3, (0.5,) * 3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, images.float() / 127.5 - 1, rtol=0, atol=1e-6)
    assert got.min() == -1 and got.max() == 1
    assert torch.equal(normalize(images.double(), (0.5,) * 3, (0.5,) * 3), got)


def test_normalize_by_channel_and_type():
    images = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)                     # 0.2
    got = normalize(images, (0.1, 0.2, 0.4), (0.1, 0.5, 0.4), torch.float16)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got[0, :, 0, 0].float(), torch.tensor([1.0, 0.0, -0.5]), rtol=0, atol=1e-3)
    halfway = normalize(torch.full((1, 1, 2, 2), 127.5), (0.25,), (0.5,))          # as mixing may produce
    torch.testing.assert_close(halfway, torch.full((1, 1, 2, 2), 0.5), rtol=0, atol=1e-6)
