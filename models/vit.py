"""The Vision Transformer, its ResNet hybrids, and encoders that differ from it in some parts (models/layers.py).

Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929). As in Google's vit_jax/models_vit.py: GELU in the tanh
form, LayerNorm eps 1e-6, an optional tanh layer `pre_logits` before the head, `classifier` "token" or "gap" (mean over the tokens
after the last norm). Differences: any image size whose sides are multiples of the stride is possible, square or not; the head
starts at zero, as in Google's fine-tuning code.

The same class is used for DeiT without its second token (arXiv 2012.12877), for the encoder of MAE (He et al., "Masked
Autoencoders Are Scalable Vision Learners", arXiv 2111.06377), whose fine-tuning pools with `classifier` "patch_mean", and for
DeiT III, DINOv2, DINOv3, SigLIP, CLIP, EVA-02 and others: their rows in configs.py set what differs.

Shapes: B images, N tokens, D width, C classes. The state dict has timm's names.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from .base import ImageTransformer, has_class_token
from .layers import Block, norm_of
from .pooling import AttentionPool
from .rope import Rope


class VisionTransformer(ImageTransformer):
    """The plain encoder: one stack of blocks over all tokens, and one head."""

    def build(self) -> None:
        config, dim, norm = self.config, self.config.hidden_size, norm_of(self.config)
        tokens = self.prefix_tokens
        for name, rows in tokens.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(1, rows, dim)))
        self.num_prefix_tokens = sum(tokens.values())
        positions = self.num_prefix_positions + math.prod(self.grid)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, dim)) if config.positions != "none" else None
        self.pos_drop = nn.Dropout(config.dropout_rate)
        self.norm_pre = norm(dim) if config.pre_norm else None
        rope = Rope(config.rope, dim // config.num_heads, self.grid, self.num_prefix_tokens, config.rope_grid,
                    has_class_token(config)) if config.rope else None
        self.blocks = nn.Sequential(*[
            Block(dim, config.num_heads, config.mlp_dim, config.gelu, config.dropout_rate, config.attention_dropout_rate,
                  config.drop_path_rate * i / max(config.num_layers - 1, 1), norm=norm, mlp=config.mlp, mlp_norm=config.mlp_norm,
                  mlp_bias=config.mlp_bias, layer_scale=config.layer_scale, qkv_bias=config.qkv_bias, proj_bias=config.proj_bias,
                  qk_norm=config.qk_norm, scaled=config.attention_norm, rope=rope)
            for i in range(config.num_layers)])
        if config.classifier == "patch_mean":
            self.norm, self.fc_norm = nn.Identity(), norm(dim)
        else:
            self.norm = norm(dim) if config.final_norm else nn.Identity()
        if config.classifier == "attention":
            self.attn_pool = AttentionPool(dim, config.pool_heads or config.num_heads, config.pool_mlp_dim or config.mlp_dim,
                                           config.gelu, norm(dim))
        width = 2 * dim if config.classifier == "token_mean" else dim
        if config.representation_size:
            fc = nn.Linear(width, config.representation_size)
            self.pre_logits = nn.Sequential(OrderedDict(fc=fc, act=nn.Tanh()))
        self.head = nn.Linear(config.representation_size or width, self.num_classes)

    @property
    def prefix_tokens(self) -> dict[str, int]:
        """{parameter: number of tokens} of the tokens before the patches, in this order."""
        config = self.config
        tokens = {"cls_token": has_class_token(config), "dist_token": config.distilled, "reg_token": config.registers}
        return {name: int(rows) for name, rows in tokens.items() if rows}

    def embed(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, N, D), the tokens that enter the first block"""
        x = self.embed_patches(images)
        if self.config.positions == "patches":
            x = x + self.pos_embed
        if self.num_prefix_tokens:
            x = torch.cat([getattr(self, name).expand(x.shape[0], -1, -1) for name in self.prefix_tokens] + [x], dim=1)
        x = self.pos_drop(x + self.pos_embed if self.config.positions == "all" else x)
        return x if self.norm_pre is None else self.norm_pre(x)

    def forward_blocks(self, tokens: Tensor, first: int = 0) -> Tensor:
        """(B, N, D) -> (B, N, D), the tokens after the last norm, or without one, as for "patch_mean", after the last block"""
        blocks = self.blocks[first:] if first else self.blocks
        return self.norm(blocks(tokens))

    def forward_head(self, features: Tensor) -> Tensor:
        """(B, N, D) -> logits (B, C)"""
        x = self.pool(features)
        if self.config.representation_size:
            x = self.pre_logits(x)
        return self.head(x)

    def pool(self, features: Tensor) -> Tensor:
        """(B, N, D) -> the input of the head, (B, D), or (B, 2 D) for token_mean"""
        classifier = self.config.classifier
        if classifier == "attention":
            return self.attn_pool(features)
        if classifier == "token":
            return features[:, 0]
        mean = features[:, self.num_prefix_tokens:].mean(dim=1)
        if classifier == "token_mean":
            return torch.cat([features[:, 0], mean], dim=-1)
        return self.fc_norm(mean) if classifier == "patch_mean" else mean
