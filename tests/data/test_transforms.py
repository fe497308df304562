"""Image transforms: sizes, types, what each kind and each knob does; normalising."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1

from utils.attention.edits import Edit
from utils.data.transforms import eval_region, eval_transform, normalise, train_transform, with_edit
from utils.randomness import seeded

KINDS = [("crop_flip", True), ("crop_flip", False), ("crop", True), ("pad_flip", True), ("pad_flip", False), ("pad", True),
         ("none", True)]
EVERYTHING = {"rotation": 10.0, "color_jitter": 0.4, "randaugment_ops": 2, "random_erasing": 0.5, "interpolation": "bicubic"}


def picture(height=40, width=60) -> Image.Image:
    """Smooth, and different in every corner."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [rows * 255 / (height - 1), columns * 255 / (width - 1), (rows + columns) * 255 / (height + width - 2)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def plain(*colour: int, size=24) -> Image.Image:
    return Image.new("RGB", (size, size), colour if len(colour) == 3 else colour * 3)


def draws(transform, count=24, image=None) -> list[torch.Tensor]:
    outputs = []
    for number in range(count):
        with seeded(0, number):
            outputs.append(transform(image or picture()))
    return outputs


def is_mirrored(image: torch.Tensor) -> bool:
    """The second channel of `picture` grows from left to right."""
    margin = image.shape[2] // 4            # what padding may have blackened
    return bool(image[1, :, margin].float().mean() > image[1, :, -1 - margin].float().mean())


@pytest.mark.parametrize(("kind", "flip"), KINDS)
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (70, 9)])
def test_output_is_uint8_of_the_size_asked_for(kind, flip, size):
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
    copied = pickle.loads(pickle.dumps(transform))          # as it reaches the loader's workers
    assert all(torch.equal(a, b) for a, b in zip(draws(transform), draws(copied)))
    pickle.dumps(eval_transform((16, 16), crop=0.9))


def test_unknown_kind():
    with pytest.raises(AssertionError):
        train_transform("none_flip", (8, 8))


# ------------------------------------------------------------------------------------------- crops and flips


def test_kinds_differ():
    outputs = {(kind, flip): draws(train_transform(kind, (16, 16), flip=flip)) for kind, flip in KINDS}
    whole = eval_transform((16, 16))(picture())
    assert all(torch.equal(image, whole) for image in outputs["none", True])
    assert not any(torch.equal(image, whole) for image in outputs["crop", True])
    for kind in ("crop", "pad"):
        same = [torch.equal(a, b) for a, b in zip(outputs[f"{kind}_flip", True], outputs[kind, True])]
        assert any(same) and not all(same)


def test_only_flips_of_data_that_may_be_flipped_mirror():
    mirrored = {(kind, flip): sum(map(is_mirrored, draws(train_transform(kind, (32, 32), flip=flip, crop_padding=2))))
                for kind, flip in KINDS}
    assert 4 <= mirrored.pop(("crop_flip", True)) <= 20       # about half of 24
    assert 4 <= mirrored.pop(("pad_flip", True)) <= 20
    assert set(mirrored.values()) == {0}


def test_the_crop_stays_where_it_is_when_flips_are_off():
    with_flip, without = (draws(train_transform("crop_flip", (16, 16), flip=flip)) for flip in (True, False))
    for a, b in zip(with_flip, without):
        assert torch.equal(a.flip(-1) if is_mirrored(a) else a, b)


@pytest.mark.parametrize(("scale", "low", "high"), [({}, 0, 100), ({"crop_scale": 0.6}, 195, 225)])
def test_crops_reach_areas_as_small_as_asked_for(scale, low, high):
    """The ViT paper's scale (0.05, 1) by default: a crop's range of the first channel shows its height."""
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
def test_interpolation_is_pillow_s(name):
    expected = np.asarray(picture().resize((20, 12), getattr(Image.Resampling, name.upper()))).transpose(2, 0, 1)
    assert np.array_equal(eval_transform((12, 20), interpolation=name)(picture()), expected)
    assert np.array_equal(train_transform("none", (12, 20), interpolation=name)(picture()), expected)


@pytest.mark.parametrize("kind", ["crop", "pad"])
def test_interpolation_of_crops(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8))
    linear, cubic = (draws(train_transform(kind, (16, 16), interpolation=name), 8, noise) for name in ("bilinear", "bicubic"))
    assert not any(torch.equal(a, b) for a, b in zip(linear, cubic))


def test_rotation_turns_both_ways_and_no_further():
    angles = []
    for image in draws(train_transform("none", (64, 64), rotation=20.0), 40, picture(64, 64)):
        down, right = np.gradient(image[1, 20:44, 20:44].float().numpy())         # the second channel grows to the right
        angles.append(np.degrees(np.arctan2(down.mean(), right.mean())))
    assert -21 < min(angles) < -10 and 10 < max(angles) < 21


def test_color_jitter_changes_brightness_contrast_and_saturation():
    """Dark grey, light grey and a colour: their mean follows the brightness alone, their distances show the others."""
    bands = Image.fromarray(np.array([[[60] * 3, [140] * 3, [130, 90, 90]]], np.uint8)).resize((24, 24), Image.Resampling.NEAREST)
    transform = train_transform("none", (24, 24), color_jitter=0.5)
    outputs = [image[:, 0, [0, 12, 23]].float() for image in draws(transform, 60, bands)]
    brightness = [(image[:, :2].mean() / 100).item() for image in outputs]
    contrast = [((image[0, 1] - image[0, 0]) / 80).item() / bright for image, bright in zip(outputs, brightness)]
    saturation = [((image[0, 2] - image[1, 2]) / (image[0, 1] - image[0, 0]) * 2).item() for image in outputs]
    for factors in (brightness, contrast, saturation):
        assert 0.47 < min(factors) < 0.7 and 1.3 < max(factors) < 1.53


@pytest.mark.parametrize(("magnitude", "expected"), [
    # brightness 100 (1 - 0.09 m) and 100 (1 + 0.09 m); 8 - m / 2.5 bits; inverted above 255 (1 - m / 10); or as it was
    (9, {19, 181, 96, 155, 100}), (10, {10, 190, 96, 155, 100}), (4, {64, 136, 100}), (0, {100})])
def test_randaugment_has_the_paper_s_magnitudes(magnitude, expected):
    outputs = draws(train_transform("none", (24, 24), randaugment_ops=1, randaugment_magnitude=magnitude), 250, plain(100))
    assert {image[0, 12, 12].item() for image in outputs} == expected


def test_randaugment_applies_as_many_operations_as_asked_for():
    """Of 14 operations one keeps the picture, others may: the share of kept pictures falls with their number."""
    whole = train_transform("none", (24, 24))(picture())
    kept = [sum(torch.equal(image, whole) for image in draws(train_transform("none", (24, 24), randaugment_ops=number), 150))
            for number in (0, 1, 3)]
    assert kept[0] == 150 > kept[1] > kept[2]


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


def test_random_erasing_has_its_probability():
    outputs = draws(train_transform("none", (24, 24), random_erasing=0.25), 200, plain(100))
    assert 30 <= sum(image.unique().numel() > 1 for image in outputs) <= 70


# ---------------------------------------------------------------------------------------------------- channels


def test_one_channel_of_a_grey_image_is_the_image():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for transform in (train_transform("none", (16, 16), channels=1), eval_transform((16, 16), channels=1),
                      eval_transform((16, 16), channels=1, crop=1.0)):
        assert np.array_equal(transform(Image.fromarray(grey).convert("RGB")), grey[None])


def test_one_channel_of_a_colour_image_is_its_luma():
    """ITU-R BT.601"""
    colour = (200, 90, 30)
    expected = 0.299 * 200 + 0.587 * 90 + 0.114 * 30
    for transform in (train_transform("pad", (8, 8), channels=1, crop_padding=0), eval_transform((8, 8), channels=1)):
        assert transform(plain(*colour)).unique().tolist() == [pytest.approx(expected, abs=0.6)]


# -------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("crop", [0.0, 0.8])
def test_evaluation_draws_nothing(crop):
    before = torch.get_rng_state()
    eval_transform((20, 30), crop=crop)(picture(40, 60))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_resizes_the_whole_image():
    image = eval_transform((20, 30))(picture(40, 60)).float()
    assert image[0, 0].mean() < 10 and image[0, -1].mean() > 245 and image[1, :, 0].mean() < 10 and image[1, :, -1].mean() > 245


@pytest.mark.parametrize("shape", [(50, 83), (83, 50), (61, 61), (300, 47), (20, 20)])
@pytest.mark.parametrize(("side", "crop", "resized"), [(28, 0.875, 32), (30, 1.0, 30), (48, 0.9, 53), (24, 0.9, 26)])
def test_crop_is_deit_s_evaluation(shape, side, crop, resized):
    """The shorter side resized to int(side / crop), then the middle; by the transforms of its published code."""
    theirs = v1.Compose([v1.Resize(resized, interpolation=v1.InterpolationMode.BICUBIC), v1.CenterCrop(side), v1.PILToTensor()])
    ours = eval_transform((side, side), interpolation="bicubic", crop=crop)
    assert torch.equal(ours(picture(*shape)), theirs(picture(*shape)))


@pytest.mark.parametrize(("shape", "size", "crop", "resized"), [
    ((40, 60), (16, 32), 0.8, (26, 40)), ((60, 40), (16, 32), 0.8, (60, 40)), ((100, 100), (30, 10), 1.0, (30, 30)),
    ((40, 200), (30, 10), 0.5, (60, 300))])
def test_crop_to_other_shapes_keeps_the_image_s_shape(shape, size, crop, resized):
    top, left = round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2)
    whole = np.asarray(picture(*shape).resize(resized[::-1], Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    expected = whole[:, top:top + size[0], left:left + size[1]]
    assert np.array_equal(eval_transform(size, crop=crop)(picture(*shape)), expected)


# ----------------------------------------------------------------------------------------------- normalising


def test_normalise_to_plus_minus_one():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    got = normalise(images, (0.5,) * 3, (0.5,) * 3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, images.float() / 127.5 - 1, rtol=0, atol=1e-6)
    assert got.min() == -1 and got.max() == 1
    assert torch.equal(normalise(images.double(), (0.5,) * 3, (0.5,) * 3), got)


def test_normalise_by_channel_and_type():
    images = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)                     # 0.2
    got = normalise(images, (0.1, 0.2, 0.4), (0.1, 0.5, 0.4), torch.float16)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got[0, :, 0, 0].float(), torch.tensor([1.0, 0.0, -0.5]), rtol=0, atol=1e-3)
    halfway = normalise(torch.full((1, 1, 2, 2), 127.5), (0.25,), (0.5,))          # what mixing makes
    torch.testing.assert_close(halfway, torch.full((1, 1, 2, 2), 0.5), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------- edits of attention


def an_edit(grid, region=(0, 0, 1, 1), share=0.6, seed=0) -> Edit:
    random = np.random.default_rng(seed)
    values = (random.integers(0, 201, grid) / 200).astype(np.float32)
    return Edit("train/0", "", values, random.random(grid) < share, region)


def painted(edit, patch=4) -> Image.Image:
    """Where it is edited the image is 55 + 200 * value, elsewhere black, like what is padded."""
    shades = np.where(edit.edited, 55 + np.round(200 * edit.values), 0).astype(np.uint8)
    return Image.fromarray(shades.repeat(patch, 0).repeat(patch, 1)).convert("RGB")


def read_off(image, grid) -> tuple[np.ndarray, np.ndarray]:
    """What a `painted` image says, transformed: values and edited shares (h, w), by the patches' pixels."""
    pixels = image[0].numpy().astype(float)
    patches = pixels.reshape(grid[0], pixels.shape[0] // grid[0], grid[1], -1).transpose(0, 2, 1, 3).reshape(*grid, -1)
    sums = np.where(patches > 0, (patches - 55) / 200, 0).sum(axis=-1)
    return sums / np.maximum((patches > 0).sum(axis=-1), 1), (patches > 0).mean(axis=-1)


def values_and_edited(edit: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    assert edit.dtype == torch.float32 and (edit[0][edit[1] == 0] == 0).all()
    return edit[0].numpy(), edit[1].numpy()


RIDES = [("crop_flip", {}), ("crop", {"crop_scale": 0.5}), ("pad_flip", {}), ("pad", {"crop_padding": 9}), ("none", {})]
KNOBS = {"rotation": {"rotation": 25.0}, "jitter": {"color_jitter": 0.4}, "erasing": {"random_erasing": 0.7},
         "all": {"rotation": 10.0, "color_jitter": 0.4, "random_erasing": 0.5, "interpolation": "bicubic"}}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize(("kind", "settings"), RIDES)
def test_an_edit_that_rides_along_changes_no_bit_of_the_image(kind, settings, knobs, channels):
    transform = train_transform(kind, (16, 24), channels=channels, **settings, **KNOBS[knobs])
    for index in range(12):
        with seeded(3, "augment", 0, index):
            alone, drawn = transform(picture()), torch.rand(2)
        with seeded(3, "augment", 0, index), warnings.catch_warnings():
            warnings.simplefilter("error")
            image, edit = with_edit(transform, picture(), an_edit((5, 7), (0, 0.125, 1, 0.875)), (4, 6))
            assert torch.equal(torch.rand(2), drawn)
        assert type(image) is type(edit) is torch.Tensor and torch.equal(image, alone) and image.dtype == torch.uint8
        assert edit.shape == (2, 4, 6) and edit.dtype == torch.float32


@pytest.mark.parametrize(("kind", "settings"), RIDES)
@pytest.mark.parametrize("stored", [(7, 7), (8, 4), (5, 9), (1, 1)])
def test_an_edit_lands_where_its_pixels_land(kind, settings, stored):
    """The image shows the edit in its own colours: what Pillow makes of them is where the edit must be."""
    edit = an_edit(stored)
    transform = train_transform(kind, (32, 64), interpolation="nearest", **settings)
    seen = set()
    for index in range(30):
        with seeded(0, index):
            image, moved = with_edit(transform, painted(edit), edit, (4, 8))
        values, edited = values_and_edited(moved)
        expected = read_off(image, (4, 8))
        np.testing.assert_allclose(edited, expected[1], rtol=0, atol=1e-6)
        np.testing.assert_allclose(values, expected[0], rtol=0, atol=1e-6)
        seen.add(values.tobytes())
    assert kind == "none" or stored == (1, 1) or len(seen) > 10


def test_a_rotated_edit_lands_where_its_pixels_land():
    """What is rotated in is black and not edited. The rotations of images and masks round a few pixels differently."""
    edit = an_edit((6, 6), share=0.9)
    transform = train_transform("none", (96, 96), interpolation="nearest", rotation=45.0)
    corners = []
    for index in range(12):
        with seeded(0, index):
            image, moved = with_edit(transform, painted(edit), edit, (6, 6))
        values, edited = values_and_edited(moved)
        expected = read_off(image, (6, 6))
        np.testing.assert_allclose(edited, expected[1], rtol=0, atol=0.03)
        np.testing.assert_allclose(values * edited, expected[0] * expected[1], rtol=0, atol=0.06)
        corners.append(edited[[0, 0, -1, -1], [0, -1, 0, -1]].sum())
    assert min(corners) < 0.5            # of the four corners in all


@pytest.mark.parametrize("size", [(40, 60), (8, 8), (3, 5), (14, 14), (223, 411)])
def test_a_plain_resize_keeps_the_map(size):
    """However few pixels the stored image has, even fewer than patches."""
    edit = an_edit((8, 16))
    image = Image.new("RGB", size[::-1])
    values, edited = values_and_edited(with_edit(train_transform("none", (32, 64)), image, edit, (8, 16))[1])
    assert np.array_equal(edited, edit.edited) and np.array_equal(values, np.where(edit.edited, edit.values, 0))


def test_a_flip_mirrors_the_map():
    edit = an_edit((4, 5))
    transform = train_transform("pad_flip", (16, 20), crop_padding=0)
    mirrored = 0
    for index in range(20):
        with seeded(0, index):
            image, moved = with_edit(transform, picture(), edit, (4, 5))
        values, edited = values_and_edited(moved.flip(-1) if is_mirrored(image) else moved)
        assert np.array_equal(edited, edit.edited) and np.array_equal(values, np.where(edit.edited, edit.values, 0))
        mirrored += is_mirrored(image)
    assert 4 <= mirrored <= 16


@pytest.mark.parametrize(("top", "left"), [(0, 0), (0, 30), (20, 0), (20, 30)])
def test_a_crop_of_a_quarter_enlarges_the_map(top, left, monkeypatch):
    edit, box = an_edit((6, 4)), {"top": top, "left": left, "height": 20, "width": 30}
    transform = train_transform("crop", (24, 24))
    monkeypatch.setattr(transform.transforms[0], "make_params", lambda flat: box)
    values, edited = values_and_edited(with_edit(transform, picture(40, 60), edit, (6, 4))[1])
    rows, columns = slice(3 * (top > 0), 3 * (top > 0) + 3), slice(2 * (left > 0), 2 * (left > 0) + 2)
    assert np.array_equal(edited, edit.edited[rows, columns].repeat(2, 0).repeat(2, 1))
    assert np.array_equal(values, np.where(edit.edited, edit.values, 0)[rows, columns].repeat(2, 0).repeat(2, 1))


def test_an_edit_of_a_region_stays_in_its_region():
    """Its grid of 3 x 2 covers the lower three quarters of the left half."""
    edit = an_edit((3, 2), (0.25, 0, 1, 0.5), share=1.1)
    values, edited = values_and_edited(with_edit(train_transform("none", (32, 32)), picture(), edit, (4, 4))[1])
    expected = np.zeros((4, 4), np.float32)
    expected[1:, :2] = edit.values
    assert np.array_equal(values, expected) and np.array_equal(edited, [[False] * 4, *[[True, True, False, False]] * 3])


@pytest.mark.parametrize("covered", [0.01, 0.49, 0.5, 1.0])
def test_a_patch_counts_with_the_share_that_is_edited(covered):
    """However small: an edit of one patch is not lost where the model's patches lie otherwise."""
    edit = Edit("a", "", np.full((1, 1), 0.7, np.float32), np.ones((1, 1), bool), (0, 0, 1, covered))
    moved = with_edit(train_transform("none", (100, 100)), picture(), edit, (1, 1))[1]
    assert moved.flatten().tolist() == pytest.approx([0.7, covered], abs=1e-6)


def test_a_patch_of_another_crop_is_spread_and_not_lost():
    """Painted on the middle 87.5 %, as papers evaluate, taught on the whole image: the same area, on up to four patches."""
    for place in range(0, 196, 13):
        edited = np.zeros(196, bool)
        edited[place] = True
        edit = Edit("a", "", np.full((14, 14), 0.9, np.float32), edited.reshape(14, 14), (0.0625, 0.0625, 0.9375, 0.9375))
        values, shares = values_and_edited(with_edit(train_transform("none", (224, 224)), plain(0, size=256), edit, (14, 14))[1])
        assert shares.sum() == pytest.approx(0.875 ** 2, rel=0.15) and (shares > 0).sum() <= 4
        np.testing.assert_allclose(values[shares > 0], 0.9, rtol=1e-6)


def test_a_coarser_grid_gets_the_mean_of_what_is_edited():
    values = np.array([[0.2, 0.4], [0.9, 0.5]], np.float32)
    edit = Edit("a", "", values, np.array([[True, True], [False, True]]))
    moved = with_edit(train_transform("none", (16, 16)), picture(), edit, (1, 1))[1]
    assert moved.flatten().tolist() == pytest.approx([(0.2 + 0.4 + 0.5) / 3, 0.75])


def test_what_is_not_edited_has_no_value():
    """Whatever the array holds there, such as NaN"""
    edit = Edit("a", "", np.array([[0.5, np.nan]], np.float32), np.array([[True, False]]))
    moved = with_edit(train_transform("crop", (16, 16)), picture(), edit, (4, 4))[1]
    assert moved.isfinite().all()


def test_what_is_erased_is_not_taught():
    edit, gone = an_edit((10, 10), share=1.1), 0
    transform = train_transform("none", (100, 100), random_erasing=1.0)
    for index in range(10):
        with seeded(0, index):
            image, moved = with_edit(transform, plain(100), edit, (10, 10))
        changed = (image != 100).any(dim=0).numpy()
        rows, columns = (np.flatnonzero(changed.any(axis=axis)) for axis in (1, 0))
        kept = np.ones((100, 100))
        kept[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1] = 0
        expected = kept.reshape(10, 10, 10, 10).mean(axis=(1, 3))
        values, edited = values_and_edited(moved)
        np.testing.assert_allclose(edited, expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(values, edit.values * (expected > 0), rtol=0, atol=1e-6)
        gone += (edited == 0).sum()
    assert gone > 20


def test_randaugment_and_edits_do_not_go_together():
    with pytest.raises(AssertionError, match="RandAugment"):
        with_edit(train_transform("none", (16, 16), randaugment_ops=1), picture(), an_edit((2, 2)), (2, 2))


@pytest.mark.parametrize("crop", [0.0, 0.5, 0.875, 1.0])
@pytest.mark.parametrize("shape", [(400, 600), (600, 400), (500, 500), (320, 900)])
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_the_region_that_evaluation_shows(size, shape, crop):
    region = eval_region(shape, size, crop)
    shown = eval_transform(size, crop=crop)(picture(*shape)).permute(1, 2, 0).numpy().astype(int)
    top, left, bottom, right = (share * side for share, side in zip(region, (*shape, *shape)))
    expected = picture(*shape).resize(size[::-1], Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    assert np.abs(shown - np.asarray(expected)).max() <= 3
    assert crop or region == (0, 0, 1, 1)
