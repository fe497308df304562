"""An edit of attention under the crop, flip and resize of its image."""

import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from pictures import picture, plain
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from utils.attention.edit_transform import transform_with_edit, transform_with_edits
from utils.attention.edits import Edit
from utils.data import loader as data
from utils.data.sampler import StepSampler
from utils.data.splits import ArrayImages
from utils.data.transforms import train_transform
from utils.randomness import seeded


def an_edit(grid, region=(0, 0, 1, 1), share=0.6, seed=0) -> Edit:
    random = np.random.default_rng(seed)
    values = (random.integers(0, 201, grid) / 200).astype(np.float32)
    return Edit("train/0", "", values, random.random(grid) < share, region)


def painted(edit, patch=4) -> Image.Image:
    """Return an image that is 55 + 200 * value where it is edited, and black elsewhere, like padding."""
    shades = np.where(edit.edited, 55 + np.round(200 * edit.values), 0).astype(np.uint8)
    return Image.fromarray(shades.repeat(patch, 0).repeat(patch, 1)).convert("RGB")


def read_off(image, grid) -> tuple[np.ndarray, np.ndarray]:
    """Return values and edited ratios (h, w) of a transformed `painted` image, from the pixels of the patches."""
    pixels = image[0].numpy().astype(float)
    patches = pixels.reshape(grid[0], pixels.shape[0] // grid[0], grid[1], -1).transpose(0, 2, 1, 3).reshape(*grid, -1)
    sums = np.where(patches > 0, (patches - 55) / 200, 0).sum(axis=-1)
    return sums / np.maximum((patches > 0).sum(axis=-1), 1), (patches > 0).mean(axis=-1)


def values_and_edited(edit: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    assert edit.dtype == torch.float32 and (edit[0][edit[1] == 0] == 0).all()
    return edit[0].numpy(), edit[1].numpy()


KINDS = [("crop_flip", {}), ("crop", {"crop_scale": 0.5}), ("pad_flip", {}), ("pad", {"crop_padding": 9}), ("none", {})]
SETTINGS = {"rotation": {"rotation": 25.0}, "jitter": {"color_jitter": 0.4}, "erasing": {"random_erasing": 0.7},
         "all": {"rotation": 10.0, "color_jitter": 0.4, "random_erasing": 0.5, "interpolation": "bicubic"}}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("extra", SETTINGS)
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_an_edit_changes_no_bit_of_its_image(kind, settings, extra, channels):
    transform = train_transform(kind, (16, 24), channels=channels, **settings, **SETTINGS[extra])
    for index in range(12):
        with seeded(3, "augment", 0, index):
            unedited, drawn = transform(picture()), torch.rand(2)
        with seeded(3, "augment", 0, index), warnings.catch_warnings():
            warnings.simplefilter("error")
            image, edit = transform_with_edit(transform, picture(), an_edit((5, 7), (0, 0.125, 1, 0.875)), (4, 6))
            assert torch.equal(torch.rand(2), drawn)
        assert type(image) is type(edit) is torch.Tensor and torch.equal(image, unedited) and image.dtype == torch.uint8
        assert edit.shape == (2, 4, 6) and edit.dtype == torch.float32


@pytest.mark.parametrize(("kind", "settings"), KINDS)
@pytest.mark.parametrize("stored", [(7, 7), (8, 4), (1, 1)])
def test_an_edit_lands_where_its_pixels_land(kind, settings, stored):
    """The image shows the edit in its colors: Pillow's result shows where the edit must be."""
    edit = an_edit(stored)
    transform = train_transform(kind, (32, 64), interpolation="nearest", **settings)
    seen = set()
    for index in range(30):
        with seeded(0, index):
            image, moved = transform_with_edit(transform, painted(edit), edit, (4, 8))
        values, edited = values_and_edited(moved)
        expected = read_off(image, (4, 8))
        np.testing.assert_allclose(edited, expected[1], rtol=0, atol=1e-6)
        np.testing.assert_allclose(values, expected[0], rtol=0, atol=1e-6)
        seen.add(values.tobytes())
    assert kind == "none" or stored == (1, 1) or len(seen) > 10


def test_a_rotated_edit_lands_where_its_pixels_land():
    """Corners that the rotation leaves empty are black and not edited. Rotations of images and of masks round a few pixels
    differently."""
    edit = an_edit((6, 6), share=0.9)
    transform = train_transform("none", (96, 96), interpolation="nearest", rotation=45.0)
    corners = []
    for index in range(12):
        with seeded(0, index):
            image, moved = transform_with_edit(transform, painted(edit), edit, (6, 6))
        values, edited = values_and_edited(moved)
        expected = read_off(image, (6, 6))
        np.testing.assert_allclose(edited, expected[1], rtol=0, atol=0.03)
        np.testing.assert_allclose(values * edited, expected[0] * expected[1], rtol=0, atol=0.06)
        corners.append(edited[[0, 0, -1, -1], [0, -1, 0, -1]].sum())
    assert min(corners) < 0.5            # of the four corners in all


@pytest.mark.parametrize("size", [(40, 60), (3, 5), (223, 411)])
def test_a_plain_resize_keeps_the_map(size):
    """Even if the stored image has fewer pixels than patches."""
    edit = an_edit((8, 16))
    image = Image.new("RGB", size[::-1])
    values, edited = values_and_edited(transform_with_edit(train_transform("none", (32, 64)), image, edit, (8, 16))[1])
    assert np.array_equal(edited, edit.edited) and np.array_equal(values, np.where(edit.edited, edit.values, 0))


def test_an_edit_of_a_region_stays_in_its_region():
    """Its grid of 3 x 2 covers the lower three quarters of the left half."""
    edit = an_edit((3, 2), (0.25, 0, 1, 0.5), share=1.1)
    expected = np.zeros((4, 4), np.float32)
    expected[1:, :2] = edit.values
    for image in (picture(), pil_to_tensor(picture())):                   # prepared images are tensors
        values, edited = values_and_edited(transform_with_edit(train_transform("none", (32, 32)), image, edit, (4, 4))[1])
        assert np.array_equal(values, expected) and np.array_equal(edited, [[False] * 4, *[[True, True, False, False]] * 3])
    with pytest.raises(AssertionError, match="RandAugment does not move"):
        transform_with_edit(train_transform("none", (32, 32), randaugment_ops=1), picture(), edit, (4, 4))


@pytest.mark.parametrize("covered", [0.01, 0.49, 0.5, 1.0])
def test_a_patch_counts_with_the_share_that_is_edited(covered):
    """A small edit of one patch is not lost if the model has other patches."""
    edit = Edit("a", "", np.full((1, 1), 0.7, np.float32), np.ones((1, 1), bool), (0, 0, 1, covered))
    moved = transform_with_edit(train_transform("none", (100, 100)), picture(), edit, (1, 1))[1]
    assert moved.flatten().tolist() == pytest.approx([0.7, covered], abs=1e-6)


def test_a_coarser_grid_gets_the_mean_of_what_is_edited():
    values = np.array([[0.2, 0.4], [np.nan, 0.5]], np.float32)          # what is not edited has no value
    edit = Edit("a", "", values, np.array([[True, True], [False, True]]))
    moved = transform_with_edit(train_transform("none", (16, 16)), picture(), edit, (1, 1))[1]
    assert moved.flatten().tolist() == pytest.approx([(0.2 + 0.4 + 0.5) / 3, 0.75])


def test_what_is_erased_is_not_edited():
    edit, gone = an_edit((10, 10), share=1.1), 0
    transform = train_transform("none", (100, 100), random_erasing=1.0)
    for index in range(10):
        with seeded(0, index):
            image, moved = transform_with_edit(transform, plain(100), edit, (10, 10))
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


def pictures(count=11) -> ArrayImages:
    random = np.random.default_rng(1)
    return ArrayImages(random.integers(0, 256, (count, 14, 10, 3), dtype=np.uint8), random.integers(0, 3, count))


def loaded(edits, workers=0, micro=1) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """Return {(epoch, index): (image, edit or None)} of the training loader."""
    edit_transform = None if edits is None else pickle.loads(pickle.dumps(partial(transform_with_edits, edits, (2, 3))))
    loader = data.train_loader(pictures(), StepSampler(11, 4, micro, 0, 1, 0, 0, 6), seed=5,
                               transform=train_transform("crop_flip", (8, 12)), num_workers=workers, pin_memory=False,
                               edit_transform=edit_transform)
    found = {}
    for batch in loader:
        assert (batch.edits is None) if edits is None else (
            batch.edits.shape == (len(batch.keys), 2, 2, 3) and batch.edits.dtype == torch.float32)
        edited = [None] * len(batch.keys) if edits is None else batch.edits
        found |= {(key.epoch, key.index): pair for key, pair in zip(batch.keys, zip(batch.images, edited))}
    return found


@pytest.mark.parametrize(("workers", "micro"), [(0, 1), (2, 2)])
def test_batches_carry_the_edits_of_their_images(workers, micro):
    """It moves with the random draws of the image, which is the same as without edits."""
    random = np.random.default_rng(2)
    edits = {index: Edit("", "", random.random((7, 5), np.float32), random.random((7, 5)) < 0.7) for index in (1, 4, 9)}
    without, found = loaded(None), loaded(edits, workers, micro)
    assert found.keys() == without.keys() and len(found) == 24
    for (epoch, index), (image, edit) in found.items():
        assert torch.equal(image, without[epoch, index][0])
        if index not in edits:
            assert not edit.any()
            continue
        with seeded(5, "augment", epoch, index):
            expected = transform_with_edit(train_transform("crop_flip", (8, 12)), pictures()[index][0], edits[index], (2, 3))[1]
        assert torch.equal(edit, expected)
    assert sum(edit.any() for _, edit in found.values()) >= 4
    assert not torch.equal(found[0, 4][1], found[1, 4][1])
    assert not any(edit.any() for _, edit in loaded({}).values())
