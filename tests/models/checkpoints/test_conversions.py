"""The rules between arrays of a file and parameters of a model."""

import pytest
import torch
from torch.nn import functional as F

from configs import META, architecture
from models import ModelError, create_model
from models.checkpoints.conversions import FROM_FILE, TO_FILE, fold_channels


@pytest.mark.parametrize("rule", FROM_FILE)
def test_rules_are_inverse(rule):
    """model -> file -> model gives the same numbers, and file -> model has the parameter's shape."""
    model = create_model(architecture(2, 12, 20, 3, 1, img_size=4), 5)
    shape, parts = {
        "copy": ((7,), 1), "vector": ((7,), 1), "dense": ((5, 7), 1), "conv": ((6, 3, 2, 4), 1),
        "qkv": ((36, 12), 3), "qkv_bias": ((36,), 3), "out": ((12, 12), 1),
        "join": ((36, 12), 3)}[rule]
    value = torch.randn(shape)
    arrays = [TO_FILE[rule](value, model, part) for part in range(parts)]
    assert torch.equal(torch.cat([FROM_FILE[rule](array) for array in arrays]), value)


# ------------------------------------------------------------------------------------------------ grey images

GOOGLE = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.mark.parametrize("colour", [GOOGLE, {"mean": META["mean"], "std": META["std"]}], ids=["google", "meta"])
@pytest.mark.parametrize("grey", [{"mean": (0.5,), "std": (0.5,)}, {"mean": (0.1307,), "std": (0.3081,)}], ids=["half", "mnist"])
@torch.inference_mode()
def test_a_grey_image_gives_what_its_three_equal_channels_gave(colour, grey):
    """The same patches, to float32's rounding, whatever the statistics before and after."""
    torch.manual_seed(0)
    weight, bias, image = 0.2 * torch.randn(8, 3, 4, 4), torch.randn(8), torch.rand(2, 1, 12, 12)
    mean, std = (torch.tensor(colour[name]).view(3, 1, 1) for name in ("mean", "std"))
    before = F.conv2d((image.expand(-1, 3, -1, -1) - mean) / std, weight, bias, stride=4)
    row = architecture(4, 8, 8, 1, 1, in_channels=1, channel_mean=colour["mean"], channel_std=colour["std"], **grey)
    one, new_bias = fold_channels(weight, bias, row)
    assert one.shape == (8, 1, 4, 4) and one.dtype == new_bias.dtype == torch.float32
    after = F.conv2d((image - grey["mean"][0]) / grey["std"][0], one, new_bias, stride=4)
    assert (after - before).abs().max() < 1e-5
    plain_sum = F.conv2d((image - grey["mean"][0]) / grey["std"][0], weight.sum(dim=1, keepdim=True), bias, stride=4)
    assert (plain_sum - before).abs().max() > 0.05 or (colour, grey["mean"]) == (GOOGLE, (0.5,))


def test_without_statistics_of_the_channels_they_are_the_grey_ones():
    """Then it is the plain sum, and the bias stays."""
    weight, bias = torch.randn(8, 3, 4, 4), torch.randn(8)
    one, new_bias = fold_channels(weight, bias, architecture(4, 8, 8, 1, 1, in_channels=1, mean=(0.3,), std=(0.2,)))
    assert (one - weight.sum(dim=1, keepdim=True)).abs().max() < 1e-5 and (new_bias - bias).abs().max() < 1e-6


def test_other_counts_of_channels_cannot_be_summed():
    with pytest.raises(ModelError, match="a patch kernel of 4 channels cannot be summed for grey images, one of 3 can"):
        fold_channels(torch.randn(8, 4, 4, 4), torch.randn(8), architecture(4, 8, 8, 1, 1, in_channels=1))
