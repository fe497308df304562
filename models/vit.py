"""Vision Transformer and its ResNet hybrids.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929). As Google's vit_jax/models_vit.py: GELU in
the tanh form, LayerNorm eps 1e-6, optional tanh layer `pre_logits` before the head, `classifier` "token" or "gap"
(mean over the tokens after the last norm). Differs from it: any image size whose sides are multiples of the
stride, square or not, is taken; the head starts at zero as in its fine-tuning code.

The same class is DeiT without its second token (arXiv 2012.12877) and the encoder of MAE (He et al., "Masked
Autoencoders Are Scalable Vision Learners", arXiv 2111.06377), whose fine-tuning pools with `classifier` "patch_mean".

Shapes: B images, N tokens, D width, C classes. The state dict has timm's names.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from .base import ImageTransformer
from .layers import Block


class VisionTransformer(ImageTransformer):
    """The plain encoder: one stack of blocks over all tokens, and one head."""

    prefix_tokens: tuple[str, ...] = ("cls_token",)      # the parameters before the patches, in this order

    def build(self) -> None:
        config, dim = self.config, self.config.hidden_size
        if config.classifier == "gap":
            self.prefix_tokens = ()
        for name in self.prefix_tokens:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, dim)))
        self.num_prefix_tokens = len(self.prefix_tokens)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix_tokens + math.prod(self.grid), dim))
        self.pos_drop = nn.Dropout(config.dropout_rate)
        self.blocks = nn.Sequential(*[
            Block(dim, config.num_heads, config.mlp_dim, config.gelu, config.dropout_rate, config.attention_dropout_rate,
                  config.drop_path_rate * i / max(config.num_layers - 1, 1), config.norm_eps)
            for i in range(config.num_layers)])
        if config.classifier == "patch_mean":
            self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(dim, eps=config.norm_eps)
        else:
            self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        if config.representation_size:
            fc = nn.Linear(dim, config.representation_size)
            self.pre_logits = nn.Sequential(OrderedDict(fc=fc, act=nn.Tanh()))
        self.head = nn.Linear(config.representation_size or dim, self.num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, N, D), the tokens that enter the first block"""
        x = self.embed_patches(images)
        if self.prefix_tokens:
            x = torch.cat([getattr(self, name).expand(x.shape[0], -1, -1) for name in self.prefix_tokens] + [x], dim=1)
        return self.pos_drop(x + self.pos_embed)

    def forward_blocks(self, tokens: Tensor, first: int = 0) -> Tensor:
        """(B, N, D) -> (B, N, D), the tokens after the last norm ("patch_mean": after the last block)"""
        blocks = self.blocks[first:] if first else self.blocks
        return self.norm(blocks(tokens))

    def forward_head(self, features: Tensor) -> Tensor:
        """(B, N, D) -> logits (B, C)"""
        if self.config.classifier == "token":
            x = features[:, 0]
        elif self.config.classifier == "gap":
            x = features.mean(dim=1)
        else:
            x = self.fc_norm(features[:, self.num_prefix_tokens:].mean(dim=1))
        if self.config.representation_size:
            x = self.pre_logits(x)
        return self.head(x)
