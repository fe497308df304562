"""Which rows of which maps are read, and how they are called. The command line's tests draw every family."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils.attention import maps
from utils.report import views


def model(rows: slice, prefix: int, class_layers: int = 0):
    """What utils.report.views uses of a model, with a grid of 2 x 3."""
    return SimpleNamespace(query_rows=rows, num_prefix_tokens=prefix, grid=(2, 3), img_size=(128, 192),
                           config=SimpleNamespace(class_layers=class_layers))


def constant(values) -> np.ndarray:
    """(1, 4 heads, Q, 6 + prefix) whose rows are constant: the value of a picture identifies the row."""
    return torch.tensor(values, dtype=torch.float32)[None, None, :, None].expand(1, 4, -1, -1)


@pytest.mark.parametrize(("rows", "prefix", "expected"), [
    (slice(0, 1), 1, {views.CLS: 10}),
    (slice(0, 2), 2, {views.CLS: 10, views.DIST: 11}),
    (slice(1, None), 1, {views.ALL: (11 + 12 + 13 + 14 + 15 + 16) / 6}),
    (slice(0, None), 0, {views.ALL: (10 + 11 + 12 + 13 + 14 + 15) / 6}),
])
def test_the_rows_that_the_head_reads(rows, prefix, expected):
    layer = constant(range(10, 16 + prefix)).expand(-1, -1, -1, 6 + prefix)
    found = views.read(model(rows, prefix), layer)
    assert list(found) == list(expected)
    for reader, value in expected.items():
        assert found[reader].shape == (4, 128, 192) and np.allclose(found[reader], value)


def test_the_two_kinds_of_layers_of_cait():
    cait = model(slice(0, 1), 0, class_layers=2)
    talking, asking = constant(range(6)).expand(-1, -1, -1, 6), constant([7]).expand(-1, -1, -1, 7)
    assert np.allclose(views.read(cait, talking)[views.ALL], 2.5) and np.allclose(views.read(cait, asking)[views.CLS], 7)
    joint = maps.rollout([talking, asking])
    assert list(views.read(cait, joint[:, None])) == [views.CLS]
    assert views.protected_columns(cait) == 1 and views.protected_columns(model(slice(0, 2), 2)) == 2


def test_columns_are_patches_row_by_row():
    layer = torch.zeros(1, 1, 7, 7)
    layer[0, 0, 0, 1 + 1 * 3 + 2] = 1                       # cls attends to row 1, column 2
    heat = views.read(model(slice(0, 1), 1), layer)[views.CLS][0]
    assert heat.shape == (128, 192) and np.unravel_index(heat.argmax(), heat.shape)[0] >= 64
    assert heat[96:, 160:].min() > 0.9 and heat[:32].max() == 0 and heat[:, :64].max() == 0


def test_small_images_have_smooth_maps():
    small = model(slice(0, 1), 1)
    small.img_size = (8, 12)
    assert views.enlarge(small, torch.rand(5, 2, 3)).shape == (5, 80, 120)
    small.grid = (8, 12)
    grids = torch.rand(1, 8, 12)
    smooth = np.unique(views.enlarge(small, grids))
    assert len(smooth) > 1000 and smooth.max() <= grids.max()


def test_a_coarse_grid_is_drawn_patch_by_patch():
    """Otherwise a bright corner of four patches would be where no patch is."""
    grids = torch.rand(1, 2, 3)
    np.testing.assert_array_equal(views.enlarge(model(slice(0, 1), 1), grids), grids.numpy().repeat(64, 1).repeat(64, 2))


def test_classes_by_name_and_number():
    assert views.class_index("bee", ("ant", "bee")) == views.class_index("1", ("ant", "bee")) == 1
    assert views.class_index("1", ("2", "1", "0")) == 1 and views.class_index("0", ("2", "1", "0")) == 2      # names first
    for wrong in ("cat", "2", "-1", ""):
        with pytest.raises(views.ViewError, match="no such class"):
            views.class_index(wrong, ("ant", "bee"))


def test_numbers_are_counted_from_one():
    assert views.check_range("--layer", 1, 3, "layers") == 1 and views.check_range("--layer", 3, 3, "layers") == 3
    for wrong in (0, 4, -1):
        with pytest.raises(views.ViewError, match="--layer"):
            views.check_range("--layer", wrong, 3, "layers")
