"""Tensor mathematics on recorded attention (models.record_attention): leaves of the notebook and the pictures.

Shapes: B images, H heads, N tokens, (h, w) grid; maps are a list over layers of (B, H, N, N), rows summing to 1.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def rollout(maps: list[Tensor]) -> Tensor:
    """Joint attention -> (B, N, N), rows sum to 1.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (arXiv 2005.00928): heads are averaged, the
    residual connection is counted as the identity, rows are normalised again, layers are multiplied.
    """
    joint = None
    for layer in maps:
        mean = layer.mean(dim=1)                                             # (B, N, N)
        mean = mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        mean = mean / mean.sum(dim=-1, keepdim=True)
        joint = mean if joint is None else mean @ joint
    return joint


def attention_to_grid(attention: Tensor, grid: tuple[int, int], prefix_tokens: int) -> Tensor:
    """(B, N, N) -> (B, h, w): how much the output looks at each patch.

    With a cls token that is its row; a mean-pooled model (prefix_tokens 0) is the average of all rows.
    """
    rows = attention[:, 0, prefix_tokens:] if prefix_tokens else attention.mean(dim=1)
    return rows.reshape(len(rows), *grid)


def upsample(grids: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h, w) -> (B, height, width), bilinear, each map scaled to a maximum of 1."""
    large = F.interpolate(grids[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return large / large.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
