"""What every family stacks: patch embedding, MLP, encoder block; and resizing position tables to another grid.

Differences from the paper: none. From Google's code: none in the mathematics; LayerNorm eps is 1e-6 as there, unless the row
has another.
Shapes: B images, N tokens, D width, P patch side, (h, w) grid.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import cpu_bfloat16
from .attention import SelfAttention

NORM_EPS = 1e-6
# How the published models of a family resize their position tables. "bilinear": Google's code calls
# scipy.ndimage.zoom(order=1), which equals bilinear interpolation with aligned corners (to 3e-6); this form also takes
# grids that are not square. "bicubic": DeiT, CaiT and MAE; corners not aligned, no smoothing where the grid shrinks.
RESIZE_RULES = {"bilinear": {"mode": "bilinear", "align_corners": True}, "bicubic": {"mode": "bicubic", "align_corners": False}}


class PatchEmbed(nn.Module):
    """Cuts an image, or a ResNet's feature map, into P x P patches and projects each to D."""

    def __init__(self, patch_size: int, in_channels: int, dim: int, backbone: nn.Module | None = None):
        super().__init__()
        self.backbone = backbone
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, h * w, D), rows first"""
        if self.backbone is not None:
            images = self.backbone(images)
        return self.proj(images).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """D -> mlp_dim -> D with GELU. `gelu`: "tanh" as in Google's models, "erf" as in DeiT, CaiT, MAE and timm."""

    def __init__(self, dim: int, mlp_dim: int, gelu: str, dropout_rate: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.act = nn.GELU(approximate={"tanh": "tanh", "erf": "none"}[gelu])
        self.fc2 = nn.Linear(mlp_dim, dim)
        self.drop = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        hidden = cpu_bfloat16.linear_gelu(x, self.fc1, self.act)
        if hidden is None:
            hidden = self.act(self.fc1(x))
        return self.drop(self.fc2(self.drop(hidden)))


class StochasticDepth(nn.Module):
    """Stochastic depth (Huang et al., arXiv 1603.09382): in training the branch is dropped for each image with probability p,
    and divided by 1 - p where it is kept. The draws are those of torchvision's module, which takes longer to import than
    PyTorch."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, branch: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        if not self.training or not self.p:
            return branch
        kept = torch.empty(branch.shape[0], 1, 1, dtype=branch.dtype, device=branch.device).bernoulli_(1 - self.p)
        return branch * (kept / (1 - self.p) if self.p < 1 else kept)


class Block(nn.Module):
    """Pre-norm encoder block: x + attention(norm(x)), then x + mlp(norm(x)). `drop_path_rate`: of stochastic depth;
    `norm_eps`: of both norms."""

    attention: type[nn.Module] = SelfAttention

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, gelu: str, dropout_rate: float = 0.0,
                 attention_dropout_rate: float = 0.0, drop_path_rate: float = 0.0, norm_eps: float = NORM_EPS):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = self.attention(dim, num_heads, dropout_rate, attention_dropout_rate)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, mlp_dim, gelu, dropout_rate)
        self.drop_path = StochasticDepth(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def resize_positions(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], rule: str = "bilinear") -> Tensor:
    """(1, prefix + h * w, D) -> (1, prefix + h' * w', D); the prefix rows (cls, dist) are kept as they are.

    Compares grids, not token counts: 4 x 16 and 8 x 8 have as many tokens and still need resampling.
    Raises ValueError if the table is smaller than its grid.
    """
    prefix = table.shape[1] - old_grid[0] * old_grid[1]
    if prefix < 0:
        raise ValueError(f"a table of {table.shape[1]} positions cannot hold a {old_grid[0]} x {old_grid[1]} grid")
    if old_grid == new_grid:
        return table
    grid = table[:, prefix:].reshape(1, *old_grid, -1).permute(0, 3, 1, 2)                # (1, D, h, w)
    grid = F.interpolate(grid, size=new_grid, **RESIZE_RULES[rule])                       # (1, D, h', w')
    return torch.cat([table[:, :prefix], grid.flatten(2).transpose(1, 2)], dim=1)
