"""Vision Transformer and its ResNet hybrids.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929). As Google's vit_jax/models_vit.py: GELU in
the tanh form, LayerNorm eps 1e-6, optional tanh layer `pre_logits` before the head, `classifier` "token" or "gap"
(mean over the tokens after the last norm). Differs from it: any image size whose sides are multiples of the
stride, square or not, is taken; the head starts at zero as in its fine-tuning code.

Shapes: B images, N tokens, D width, C classes, (h, w) grid. The state dict has timm's names.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from .layers import NORM_EPS, Block, PatchEmbed
from .resnet import ResNet


class ModelError(ValueError):
    """A model that cannot be built or filled: one line that says what is wrong and what to do."""


class VisionTransformer(nn.Module):
    """`config` is a row of configs.MODELS (any object with its attributes); img_size (height, width) in pixels."""

    def __init__(self, config, num_classes: int, img_size: tuple[int, int]):
        super().__init__()
        check(config, num_classes, img_size)
        dim = config.hidden_size
        backbone, channels = None, config.in_channels
        if config.resnet_layers is not None:
            backbone = ResNet(tuple(config.resnet_layers), config.resnet_width, config.in_channels)
            channels = backbone.out_channels
        self.config, self.num_classes, self.img_size = config, num_classes, tuple(img_size)
        self.grid = tuple(side // stride(config) for side in img_size)                     # (h, w)
        self.patch_embed = PatchEmbed(config.patch_size, channels, dim, backbone)
        self.num_prefix_tokens = 1 if config.classifier == "token" else 0
        if self.num_prefix_tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix_tokens + math.prod(self.grid), dim))
        self.pos_drop = nn.Dropout(config.dropout_rate)
        self.blocks = nn.Sequential(*[
            Block(dim, config.num_heads, config.mlp_dim, config.gelu, config.dropout_rate, config.attention_dropout_rate)
            for _ in range(config.num_layers)])
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        if config.representation_size:
            fc = nn.Linear(dim, config.representation_size)
            self.pre_logits = nn.Sequential(OrderedDict(fc=fc, act=nn.Tanh()))
        self.head = nn.Linear(config.representation_size or dim, num_classes)
        self.initialise()

    def initialise(self) -> None:
        """Google's initial values: Glorot for dense layers, LeCun for convolutions, 0.02 for positions, zero head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.prod(module.weight.shape[1:]) ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            # q, k and v are three layers in Google's code: Glorot's fan-out is D, not 3D.
            for part in block.attn.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(part)
            for layer in (block.mlp.fc1, block.mlp.fc2):
                nn.init.normal_(layer.bias, std=1e-6)
        nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, N, D), the tokens after the last norm"""
        if images.dim() != 4 or tuple(images.shape[-2:]) != self.img_size or images.shape[1] != self.config.in_channels:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: this model takes (B, {self.config.in_channels}, "
                f"{self.img_size[0]}, {self.img_size[1]}); build it with another img_size for another size")
        x = self.patch_embed(images)
        if self.num_prefix_tokens:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        return self.norm(self.blocks(x))

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width), normalised with config.mean and config.std -> logits (B, C)"""
        x = self.forward_features(images)
        x = x[:, 0] if self.num_prefix_tokens else x.mean(dim=1)
        if self.config.representation_size:
            x = self.pre_logits(x)
        return self.head(x)


def stride(config) -> int:
    """Pixels from one token to the next."""
    if config.resnet_layers is None:
        return config.patch_size
    return config.patch_size * 4 * 2 ** max(len(config.resnet_layers) - 1, 0)


def check(config, num_classes: int, img_size: tuple[int, int]) -> None:
    """Raises ModelError unless the sizes fit each other."""
    for name in ("patch_size", "hidden_size", "mlp_dim", "num_heads", "num_layers"):
        if config[name] < 1:
            raise ModelError(f"{name} {config[name]}: must be 1 or more")
    if len(img_size) != 2 or not all(isinstance(side, int) for side in img_size):
        raise ModelError(f"img_size {img_size}: must be a side or (height, width), in whole pixels")
    if config.hidden_size % config.num_heads:
        raise ModelError(f"hidden_size {config.hidden_size} is not divisible by num_heads {config.num_heads}")
    if config.classifier not in ("token", "gap"):
        raise ModelError(f"classifier {config.classifier!r}: must be 'token' or 'gap'")
    if config.gelu not in ("tanh", "erf"):
        raise ModelError(f"gelu {config.gelu!r}: must be 'tanh' or 'erf'")
    if num_classes < 1:
        raise ModelError(f"num_classes {num_classes}: must be 1 or more")
    step = stride(config)
    for side in img_size:
        if side < step or side % step:
            near = sorted({max(side // step, 1) * step, (side // step + 1) * step})
            raise ModelError(
                f"img_size {img_size[0]}x{img_size[1]}: {side} is not a multiple of {step}, the model's patch stride; "
                f"take {' or '.join(map(str, near))}")
