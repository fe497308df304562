"""The ResNet stem of the hybrids: BiT's ResNet-v2-like units, in the form that Google's ViT code uses.

Kolesnikov et al., "Big Transfer" (arXiv 1912.11370). As in Google's vit_jax/models_resnet.py and unlike the BiT
paper: units are post-activation (conv, norm, relu; the last relu after the sum). Details that a checkpoint needs:
- weights are standardized as (w - mean) / (std + 1e-5): the eps is outside the square root;
- GroupNorm has 32 groups and eps 1e-6 everywhere, including the projection's norm;
- padding is TensorFlow's 'SAME': the odd pixel goes to the bottom and the right; max-pooling pads with -inf.
Two other programs compute differently with the same parameters (STYLES), so files of theirs need their style.

The state dict has timm's names (stem, stages.S.blocks.U, downsample).
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 32


class Style(NamedTuple):
    """The differences between the programs."""

    standardize_eps: float
    eps_inside_root: bool          # (w - mean) / sqrt(var + eps), and not (w - mean) / (std + eps)
    norm_eps: float
    same_padding: bool             # False: the same number of pixels on all sides, and none before max-pooling
    projection_groups: int         # of the norm in a shortcut; 0: one for each channel
    projection_eps: float


STYLES = {
    "google": Style(1e-5, False, 1e-6, True, GROUPS, 1e-6),
    "timm": Style(1e-8, True, 1e-5, True, GROUPS, 1e-5),                 # timm/models/vision_transformer_hybrid.py
    "vit-pytorch": Style(1e-5, True, 1e-6, False, 0, 1e-5),              # jeonsworld/ViT-pytorch, models/modeling_resnet.py
}


def pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Pad (B, C, h, w) so that windows of `kernel` at every `stride` give ceil(h / stride) x ceil(w / stride)."""
    totals = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
    (top, bottom), (left, right) = [(total // 2, total - total // 2) for total in totals]
    return F.pad(x, (left, right, top, bottom), value=value) if any(totals) else x


class StdConv2d(nn.Conv2d):
    """Convolution with standardized weights. `padding` 0 is 'SAME'.

    It takes the arguments of nn.Conv2d, since libraries for adapters (peft) create theirs as type(layer)(...). Without a style,
    weights are not standardized: those of an adapter start at zero, and standardizing would make steps of any size of them.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
                 stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0, groups: int = 1, bias: bool = False,
                 style: Style | None = None):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.style is None else self._standardized(self.style)
        padded = x if any(self.padding) else pad_same(x, self.kernel_size[0], self.stride[0])
        return self._conv_forward(padded, weight, self.bias)

    def _standardized(self, style: Style) -> Tensor:
        # In float32 also under autocast: the variance of a kernel loses too much in half precision.
        with torch.autocast(self.weight.device.type, enabled=False):
            weight = self.weight.float()
            std, mean = torch.std_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
            eps = style.standardize_eps
            std = (std.square() + eps).sqrt() if style.eps_inside_root else std + eps
            return ((weight - mean) / std).to(self.weight.dtype)


def std_conv(in_channels: int, out_channels: int, kernel: int, style: Style, stride: int = 1) -> StdConv2d:
    """Return a convolution without bias, standardized and padded in this style."""
    return StdConv2d(in_channels, out_channels, kernel, stride, 0 if style.same_padding else kernel // 2, style=style)


def group_norm(channels: int, style: Style) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=style.norm_eps)


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 (with the stride), and 1x1 to four times the width.

    `downsample`, in the first unit of every stage, is the shortcut when width or resolution change.
    """

    def __init__(self, in_channels: int, width: int, stride: int, project: bool, style: Style = STYLES["google"]):
        super().__init__()
        self.downsample = None
        if project:
            norm = nn.GroupNorm(style.projection_groups or 4 * width, 4 * width, eps=style.projection_eps)
            self.downsample = nn.Sequential(OrderedDict(conv=std_conv(in_channels, 4 * width, 1, style, stride), norm=norm))
        self.conv1, self.norm1 = std_conv(in_channels, width, 1, style), group_norm(width, style)
        self.conv2, self.norm2 = std_conv(width, width, 3, style, stride), group_norm(width, style)
        self.conv3, self.norm3 = std_conv(width, 4 * width, 1, style), group_norm(4 * width, style)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return F.relu(self.norm3(self.conv3(x)) + shortcut)


class Stem(nn.Module):
    """7x7 convolution with stride 2, norm, relu, 3x3 max-pooling with stride 2."""

    def __init__(self, in_channels: int, width: int, style: Style):
        super().__init__()
        self.same_padding = style.same_padding
        self.conv = std_conv(in_channels, width, 7, style, 2)
        self.norm = group_norm(width, style)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        if not self.same_padding:
            return F.max_pool2d(x, 3, 2)
        return F.max_pool2d(pad_same(x, 3, 2, value=float("-inf")), 3, 2)


def stage(in_channels: int, width: int, units: int, stride: int, style: Style) -> nn.Module:
    """Return `units` bottlenecks, the first with the stride."""
    blocks = [Bottleneck(in_channels, width, stride, True, style)]
    blocks += [Bottleneck(4 * width, width, 1, False, style) for _ in range(units - 1)]
    return nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks)))


class ResNet(nn.Module):
    """(B, in_channels, height, width) -> (B, out_channels, height / r, width / r); r is 4, doubled by each later stage"""

    def __init__(self, layers: tuple[int, ...], width: int, in_channels: int, style: str = "google"):
        super().__init__()
        self.stem = Stem(in_channels, width, STYLES[style])
        outputs = [width] + [4 * width * 2 ** i for i in range(len(layers))]
        self.stages = nn.Sequential(*[
            stage(outputs[i], width * 2 ** i, units, 2 if i else 1, STYLES[style]) for i, units in enumerate(layers)])
        self.out_channels = outputs[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))
