"""The conversions between arrays of a file and parameters of a model; test_load.py shows the fold of real models."""

import pytest
import torch

from configs import architecture
from models import ModelError, create_model
from models.checkpoints.conversions import CONVERSIONS, fold_channels


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions_are_inverse(conversion):
    """model -> file -> model gives the same numbers, and file -> model has the parameter's shape."""
    model = create_model(architecture(2, 12, 20, 3, 1, img_size=4), 5)
    shape, parts = {
        "copy": ((7,), 1), "position": ((1, 5, 12), 1), "vector": ((7,), 1), "dense": ((5, 7), 1), "conv": ((6, 3, 2, 4), 1),
        "qkv": ((36, 12), 3), "qkv_bias": ((36,), 3), "out": ((12, 12), 1),
        "join": ((36, 12), 3), "halves": ((40, 12), 2), "fold": ((1, 1, 12), 1), "q_of_qkv": ((12,), 1), "v_of_qkv": ((12,), 1),
        "kv_of_qkv": ((24, 12), 1)}[conversion]
    value = torch.randn(shape)
    arrays = [CONVERSIONS[conversion].to_file(value, model, part) for part in range(parts)]
    assert torch.equal(torch.cat([CONVERSIONS[conversion].from_file(array) for array in arrays]), value)


def test_the_parts_of_a_packed_array():
    packed = torch.arange(6.0)
    assert [CONVERSIONS[f"{part}_of_qkv"].from_file(packed).tolist() for part in ("q", "v", "kv")] == [[0, 1], [4, 5], [2, 3, 4, 5]]


def test_without_statistics_of_the_channels_they_are_the_grey_ones():
    """Then it is the plain sum, and the bias stays."""
    weight, bias = torch.randn(8, 3, 4, 4), torch.randn(8)
    one, new_bias = fold_channels(weight, bias, architecture(4, 8, 8, 1, 1, in_channels=1, mean=(0.3,), std=(0.2,)))
    assert (one - weight.sum(dim=1, keepdim=True)).abs().max() < 1e-5 and (new_bias - bias).abs().max() < 1e-6


def test_other_counts_of_channels_cannot_be_summed():
    with pytest.raises(ModelError, match="a patch kernel of 4 channels cannot be summed for grey images, one of 3 can"):
        fold_channels(torch.randn(8, 4, 4, 4), torch.randn(8), architecture(4, 8, 8, 1, 1, in_channels=1))
