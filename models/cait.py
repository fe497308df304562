"""CaiT: in the first layers the patches attend to each other, in the last ones only the cls token attends to them.

Touvron et al., "Going deeper with Image Transformers" (arXiv 2103.17239). As in the published code: talking-heads attention over
the patches; class attention in the last layers; every branch is multiplied by a learned factor for each channel (LayerScale) that
starts small; stochastic depth with the same rate in all talking-heads layers; neither it nor dropout in the class-attention
layers. Differences: the head starts at zero, and any image size is possible.

Shapes: B images, N patches, D width, C classes. The state dict has the published names.
"""

import math

import torch
from torch import Tensor, nn

from .attention import ClassAttention, TalkingHeadsAttention
from .base import ImageTransformer
from .layers import Block, norm_of


class LayerScaleBlock(Block):
    """x + gamma_1 * attention(norm(x)), then x + gamma_2 * mlp(norm(x)), with talking heads."""

    attention = TalkingHeadsAttention

    def __init__(self, layer_scale: float, dim: int, *more: int | str | float, **named: object):
        super().__init__(dim, *more, **named)
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class ClassBlock(LayerScaleBlock):
    """The same for the cls token only, which attends to itself and the patches."""

    attention = ClassAttention

    def forward(self, cls: Tensor, patches: Tensor) -> Tensor:
        """(B, 1, D), (B, N, D) -> (B, 1, D)"""
        cls = cls + self.drop_path(self.gamma_1 * self.attn(self.norm1(torch.cat([cls, patches], dim=1))))
        return cls + self.drop_path(self.gamma_2 * self.mlp(self.norm2(cls)))


class CaiT(ImageTransformer):
    """The cls token has no position: it joins the patches in the class-attention layers."""

    num_prefix_tokens = 0
    query_rows = slice(0, 1)            # the only query of class-attention layers

    def build(self) -> None:
        config, dim, norm = self.config, self.config.hidden_size, norm_of(self.config)
        sizes = (config.layer_scale, dim, config.num_heads, config.mlp_dim, config.gelu)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid), dim))
        self.pos_drop = nn.Dropout(config.dropout_rate)
        self.blocks = nn.Sequential(*[
            LayerScaleBlock(*sizes, config.dropout_rate, config.attention_dropout_rate, config.drop_path_rate, norm=norm)
            for _ in range(config.num_layers)])
        self.blocks_token_only = nn.ModuleList([
            ClassBlock(*sizes, norm=norm) for _ in range(config.class_layers)])
        self.norm = norm(dim)
        self.head = nn.Linear(dim, self.num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, N, D), the patches that enter the first block"""
        return self.pos_drop(self.embed_patches(images) + self.pos_embed)

    def forward_blocks(self, tokens: Tensor, first: int = 0) -> Tensor:
        """(B, N, D) -> (B, 1 + N, D), the cls token and the patches after the last norm"""
        blocks = self.blocks[first:] if first else self.blocks
        patches = blocks(tokens)
        # A copy: FLOP counters fail if a module gets a view of a parameter while gradients are off.
        cls = self.cls_token.expand(patches.shape[0], -1, -1).clone()
        for block in self.blocks_token_only:
            cls = block(cls, patches)
        return self.norm(torch.cat([cls, patches], dim=1))

    def forward_head(self, features: Tensor) -> Tensor:
        """(B, 1 + N, D) -> logits (B, C)"""
        return self.head(features[:, 0])
