"""The conversions between arrays of a file and parameters of a model; test_load.py folds channels of real models."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from configs import architecture
from models import ModelError, create_model
from models.checkpoints.conversions import CONVERSIONS, fold_channels, patch_sizes, sincos_positions


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions_are_inverse(conversion):
    """model -> file -> model gives the same numbers, and file -> model has the parameter's shape."""
    model = create_model(architecture(2, 12, 20, 3, 1, img_size=4), 5)
    shape, parts = {
        "copy": ((7,), 1), "position": ((1, 5, 12), 1), "vector": ((7,), 1), "dense": ((5, 7), 1), "conv": ((6, 3, 2, 4), 1),
        "qkv": ((36, 12), 3), "qkv_bias": ((36,), 3), "out": ((12, 12), 1),
        "join": ((36, 12), 3), "halves": ((40, 12), 2), "fold": ((1, 1, 12), 1), "q_of_qkv": ((12,), 1), "v_of_qkv": ((12,), 1),
        "kv_of_qkv": ((24, 12), 1), "query": ((12, 12), 1), "query_bias": ((12,), 1), "kv": ((24, 12), 2), "kv_bias": ((24,), 2),
        "patches": ((12, 3, 4, 4), 1), "patches_dense": ((12, 1, 4, 4), 1), "sincos": ((1, 4, 12), 1)}[conversion]
    value = torch.randn(shape)
    arrays = [CONVERSIONS[conversion].to_file(value, model, part) for part in range(parts)]
    assert torch.equal(torch.cat([CONVERSIONS[conversion].from_file(array) for array in arrays]), value)


def test_parts_of_a_packed_array_are_read():
    packed = torch.arange(6.0)
    for part, expected in (("q", [0, 1]), ("v", [4, 5]), ("kv", [2, 3, 4, 5])):
        assert CONVERSIONS[f"{part}_of_qkv"].from_file(packed).tolist() == expected


def test_the_pixels_of_a_patch_are_in_row_order_with_channels_last():
    """A linear layer over them and the convolution made from it compute the same."""
    linear, images = torch.randn(5, 2 * 2 * 3), torch.randn(4, 3, 2, 2)
    kernel = CONVERSIONS["patches"].from_file(linear)
    assert torch.allclose(F.conv2d(images, kernel).flatten(1), images.permute(0, 2, 3, 1).flatten(1) @ linear.t(), atol=1e-5)
    assert torch.equal(CONVERSIONS["patches_dense"].from_file(linear.t()), kernel)


@pytest.mark.parametrize("numbers, sizes", [
    (588, (3, 14)), (768, (3, 16)), (192, (3, 8)), (256, (1, 16)), (7, (7, 1)), (0, (0, 1))])
def test_the_side_of_a_patch_follows_from_its_number_of_pixels(numbers, sizes):
    assert patch_sizes(numbers) == sizes


def test_sines_and_cosines_of_columns_and_rows():
    table = sincos_positions((2, 3), 8)[0]
    assert table.shape == (6, 8) and torch.equal(table[0], torch.tensor([0, 0, 1, 1, 0, 0, 1, 1.]))
    for row, column in itertools.product(range(2), range(3)):                         # frequencies 1 and 1e-4
        expected = [f(n * frequency) for n in (column, row) for f in (math.sin, math.cos) for frequency in (1, 1e-4)]
        assert torch.allclose(table[3 * row + column], torch.tensor(expected))
    with pytest.raises(ModelError, match="a multiple of 4 and at least 8, not 10"):
        sincos_positions((2, 3), 10)


def test_channel_statistics_default_to_the_grey_ones():
    """Then kernels are simply summed, and the bias does not change."""
    weight, bias = torch.randn(8, 3, 4, 4), torch.randn(8)
    one, new_bias = fold_channels(weight, bias, architecture(4, 8, 8, 1, 1, in_channels=1, mean=(0.3,), std=(0.2,)))
    assert (one - weight.sum(dim=1, keepdim=True)).abs().max() < 1e-5 and (new_bias - bias).abs().max() < 1e-6


def test_other_counts_of_channels_cannot_be_summed():
    with pytest.raises(ModelError, match="a patch kernel of 4 channels cannot be converted to grey images"):
        fold_channels(torch.randn(8, 4, 4, 4), torch.randn(8), architecture(4, 8, 8, 1, 1, in_channels=1))
