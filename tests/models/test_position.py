"""Resizing position tables: the numbers of Google's code and of DeiT's and MAE's, scipy's, other grids, other rows."""

import numpy as np
import pytest
import reference
import torch

from models.position import resize_positions

POSEMB = reference.arrays(reference.FIXTURES / "posemb.npz")
GOOGLE = sorted(name for name in POSEMB if "/google" in name)
BICUBIC = sorted(name for name in POSEMB if name.endswith("/deit_mae_bicubic"))


def grids(case: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """'14to12x20' -> (14, 14), (12, 20); 'distilled7to12' -> (7, 7), (12, 12)"""
    old, new = case.removeprefix("distilled").split("to")
    height, _, width = new.partition("x")
    return (int(old), int(old)), (int(height), int(width or height))


@pytest.mark.parametrize("name", GOOGLE)
def test_resized_as_google_does(name):
    case = name.split("/")[0]
    resized = resize_positions(torch.from_numpy(POSEMB[f"{case}/in"]), *grids(case))
    assert (resized - torch.from_numpy(POSEMB[name])).abs().max() < 2e-5


@pytest.mark.parametrize("name", BICUBIC)
def test_resized_as_deit_and_mae_do(name):
    case = name.split("/")[0]
    resized = resize_positions(torch.from_numpy(POSEMB[f"{case}/in"]), *grids(case), rule="bicubic")
    assert (resized - torch.from_numpy(POSEMB[name])).abs().max() < 2e-5


def test_the_rules_differ():
    """By far more than the tolerance: a rule taken for the other would show."""
    table = torch.from_numpy(POSEMB["14to24x24/in"])
    bilinear, bicubic = (resize_positions(table, (14, 14), (24, 24), rule) for rule in ("bilinear", "bicubic"))
    assert (bilinear - bicubic).abs().max() > 0.1 and torch.equal(bilinear, resize_positions(table, (14, 14), (24, 24)))


def test_the_fixtures_hold_square_and_other_grids():
    assert len(BICUBIC) == 10 and "distilled7to12/deit_mae_bicubic" in BICUBIC
    assert sum(name.endswith("/google") for name in GOOGLE) == 5
    assert sum(name.endswith("/google_zoom_nonsquare") for name in GOOGLE) == 4


# Not every pair of sizes: some versions of scipy zero the last row and column, for 24 -> 22 among others.
@pytest.mark.parametrize("old, new", [((7, 7), (12, 12)), ((14, 14), (24, 24)), ((12, 12), (7, 7)), ((6, 9), (8, 5))])
def test_resized_as_scipy_does(old, new):
    ndimage = pytest.importorskip("scipy.ndimage")
    grid = np.random.default_rng(0).standard_normal((*old, 6)).astype(np.float32)
    zoomed = ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)
    resized = resize_positions(torch.from_numpy(grid).view(1, -1, 6), old, new)
    assert (resized - torch.from_numpy(zoomed).view(1, -1, 6)).abs().max() < 2e-5


@pytest.mark.parametrize("rule", ["bilinear", "bicubic"])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_rows_before_the_grid_are_kept(prefix, rule):
    """None for mean pooling and CaiT, one for the cls token, two with a distillation token."""
    table = torch.randn(1, prefix + 16, 5)
    resized = resize_positions(table, (4, 4), (6, 3), rule)
    assert resized.shape == (1, prefix + 18, 5)
    assert torch.equal(resized[:, :prefix], table[:, :prefix])
    assert torch.equal(resized[:, prefix:], resize_positions(table[:, prefix:], (4, 4), (6, 3), rule))


def test_as_many_tokens_in_another_grid_are_resampled():
    rows = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1)               # each position holds its row
    flat = resize_positions(rows, (4, 4), (2, 8))
    assert flat.shape == rows.shape
    torch.testing.assert_close(flat.view(2, 8), torch.tensor([[0.0] * 8, [3.0] * 8]))


def test_the_same_grid_changes_nothing():
    table = torch.randn(1, 17, 5)
    assert all(torch.equal(resize_positions(table, (4, 4), (4, 4), rule), table) for rule in ("bilinear", "bicubic"))


def test_corners_stay_and_the_rest_lies_between():
    table = torch.tensor([0.0, 1.0, 2.0, 5.0]).view(1, 4, 1)
    resized = resize_positions(table, (2, 2), (3, 3)).view(3, 3)
    torch.testing.assert_close(resized, torch.tensor([[0.0, 0.5, 1.0], [1.0, 2.0, 3.0], [2.0, 3.5, 5.0]]))


def test_a_table_smaller_than_its_grid_is_refused():
    with pytest.raises(ValueError, match="15 positions cannot hold a 4 x 4 grid"):
        resize_positions(torch.zeros(1, 15, 5), (4, 4), (6, 6))


def test_there_is_no_third_rule():
    with pytest.raises(KeyError):
        resize_positions(torch.zeros(1, 16, 5), (4, 4), (6, 6), "nearest")
