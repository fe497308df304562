"""Pooling by attention with one learned query over all tokens.

Zhai et al., "Scaling Vision Transformers", arXiv 2106.04560; SigLIP, arXiv 2303.15343.

Shapes: B images, N tokens, D width.
"""

import torch
from torch import Tensor, nn

from .attention import Attend, join_heads, split_heads
from .layers import Mlp


class AttentionPool(nn.Module):
    """y = proj(attention of the query), then y + mlp(norm(y)). It has timm's names: latent, q, kv, proj, norm, mlp."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, gelu: str, norm: nn.Module):
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.attend = Attend()
        self.proj = nn.Linear(dim, dim)
        self.norm = norm
        self.mlp = Mlp(dim, mlp_dim, gelu)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)"""
        query = self.latent.expand(tokens.shape[0], -1, -1).clone()      # see CaiT.forward_blocks for the copy
        q, k, v = (split_heads(part, self.num_heads) for part in (self.q(query), *self.kv(tokens).chunk(2, dim=-1)))
        y = self.proj(join_heads(self.attend(q, k, v)))
        return (y + self.mlp(self.norm(y)))[:, 0]
