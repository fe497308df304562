"""The ResNet stem: 'SAME' padding, standardized weights, and Google's feature maps."""

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

from configs import architecture
from models import create_model
from models.base import stride
from models.resnet import STYLES, Bottleneck, ResNet, StdConv2d, pad_same


# TensorFlow's rule: ceil(side / stride) windows; the odd pixel of padding goes to the bottom and the right.
@pytest.mark.parametrize("side, kernel, step, before, after", [
    (224, 7, 2, 2, 3), (225, 7, 2, 3, 3), (112, 3, 2, 0, 1), (113, 3, 2, 1, 1), (56, 3, 1, 1, 1), (56, 1, 1, 0, 0),
    (56, 1, 2, 0, 0), (7, 3, 2, 1, 1), (8, 8, 8, 0, 0),
])
def test_same_padding(side, kernel, step, before, after):
    x = torch.ones(1, 1, side, side)
    padded = pad_same(x, kernel, step, value=-5.0)
    assert torch.equal(padded, F.pad(x, (before, after, before, after), value=-5.0))
    assert F.max_pool2d(padded, kernel, step).shape[-1] == -(-side // step)


@pytest.mark.parametrize("scale", [1.0, 5e-3, 1e-5])
def test_weights_are_standardized_with_eps_outside_the_square_root(scale):
    """At a deviation of 0.005, an eps of 1e-5 inside the square root would make them 0.85 times as large."""
    torch.manual_seed(0)
    conv = StdConv2d(8, 6, 3, style=STYLES["google"])
    nn.init.normal_(conv.weight, mean=0.3 * scale, std=scale)
    weight = conv.weight.double()
    centred = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
    std = centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    x = torch.randn(2, 8, 5, 5)
    want = F.conv2d(x.double(), centred / (std + 1e-5), padding=1).float()
    torch.testing.assert_close(conv(x), want, atol=2e-5, rtol=1e-5)


def test_weights_are_standardized_in_float32_under_autocast():
    torch.manual_seed(0)
    conv, x = StdConv2d(64, 32, 1, style=STYLES["google"]), torch.randn(2, 64, 6, 6)
    with torch.no_grad():
        conv.weight.mul_(1e-3).add_(1)          # in bfloat16 all of these weights are 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = conv(x)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), conv(x), atol=0.3, rtol=0.02)


@pytest.mark.parametrize("stride_of_unit, project", [(2, True), (1, True), (1, False)])
def test_bottleneck(stride_of_unit, project):
    """conv, norm, relu; the stride is in the 3x3; the last relu is after the sum; the shortcut has no relu."""
    torch.manual_seed(0)
    unit, x = Bottleneck(128, 32, stride_of_unit, project), torch.randn(2, 128, 7, 7)
    for norm in (module for module in unit.modules() if isinstance(module, nn.GroupNorm)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)

    def norm(module, value):
        return F.group_norm(value, 32, module.weight, module.bias, eps=1e-6)

    y = F.relu(norm(unit.norm1, unit.conv1(x)))
    y = F.relu(norm(unit.norm2, unit.conv2(y)))
    assert y.shape[-1] == (7 if stride_of_unit == 1 else 4)
    y = norm(unit.norm3, unit.conv3(y))
    shortcut = norm(unit.downsample.norm, unit.downsample.conv(x)) if project else x
    torch.testing.assert_close(unit(x), F.relu(y + shortcut))


def test_eps_and_groups_of_every_norm():
    """At activations of 1e-3, an eps of 1e-5 would shrink them to a third."""
    norms = [module for module in ResNet((2, 1), 32, 3).modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 1 + 3 * 3 + 2
    for norm in norms:
        x = 1e-3 * torch.randn(2, norm.num_channels, 4, 4)
        groups = x.view(2, 32, -1)
        var, mean = torch.var_mean(groups, dim=-1, correction=0, keepdim=True)
        want = ((groups - mean) / (var + 1e-6).sqrt()).view_as(x)
        torch.testing.assert_close(norm(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers, reduction, channels", [((), 4, 32), ((1,), 4, 128), ((2, 1), 8, 256), ((1, 1, 1), 16, 512)])
def test_reduction_and_channels(layers, reduction, channels):
    """The model computes its grid and its patch embedding from these."""
    resnet = ResNet(layers, 32, 3)
    assert stride(architecture(2, 32, 64, 2, 1, resnet_layers=layers, resnet_width=32)) == 2 * reduction
    assert resnet.out_channels == channels
    assert resnet(torch.randn(1, 3, 32, 48)).shape == (1, channels, 32 // reduction, 48 // reduction)


@pytest.mark.parametrize("case", ["g_r50b", "g_r26s32"])
@torch.inference_mode()
def test_features_are_google_s(case):
    """After the stem's norm, the first stage and the last, for the first image."""
    expected = reference.expected(case)
    resnet = create_model(reference.ROWS[case], pretrained=reference.weights(case), head="keep").patch_embed.backbone
    image = reference.images(reference.ROWS[case].img_size)[:1]
    features = {
        "resnet_gn_root_img0_ch0to7": resnet.stem.norm(resnet.stem.conv(image)),
        "resnet_block1_img0_ch0to7": resnet.stages[0](resnet.stem(image)),
        "resnet_out_img0": resnet(image),
    }
    for name, value in features.items():
        want = expected[name].permute(2, 0, 1)                                # (h, w, C) -> (C, h, w)
        assert (value[0, : len(want)] - want).abs().max() < 3e-5, name
