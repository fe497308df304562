"""The layers of all families: patch embedding, MLPs, encoder block; and resizing position tables to another grid.

The mathematics is that of the paper and of Google's code; LayerNorm eps is 1e-6 as there, unless the row has another. A row may
add norms in other places, RMSNorm, SwiGLU and LayerScale.
Shapes: B images, N tokens, D width, P patch side, (h, w) grid.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import cpu_bfloat16
from .attention import SelfAttention

LAYER_NORM = functools.partial(nn.LayerNorm, eps=1e-6)            # as in Google's models
# How the published models of a family resize their position tables. "bilinear": Google's code calls
# scipy.ndimage.zoom(order=1), which equals bilinear interpolation with aligned corners (to 3e-6); interpolation also works for
# grids that are not square. "bicubic": DeiT, CaiT and MAE; corners not aligned, no smoothing when the grid shrinks.
# "_antialias": smoothed when the grid shrinks; "bilinear_unaligned": corners not aligned; "bilinear_cropped": the same, to a
# square, whose upper left part is used (C-RADIO).
RESIZE_RULES = {
    "bilinear": {"mode": "bilinear", "align_corners": True},
    "bilinear_unaligned": {"mode": "bilinear", "align_corners": False},
    "bilinear_antialias": {"mode": "bilinear", "align_corners": False, "antialias": True},
    "bilinear_cropped": {"mode": "bilinear", "align_corners": False},
    "bicubic": {"mode": "bicubic", "align_corners": False},
    "bicubic_antialias": {"mode": "bicubic", "align_corners": False, "antialias": True},
    "bicubic_offset": {"mode": "bicubic", "align_corners": False},
}
OFFSET = 0.1              # of a patch: "bicubic_offset" (DINOv2 without registers) scales by (new + OFFSET) / old


class RMSNorm(nn.RMSNorm):
    """PyTorch's RMSNorm, computed at least in the type of its weight.

    Autocast does that for LayerNorm, but not for RMSNorm: a bfloat16 input and a float32 weight are slow on a CPU and cause a
    warning.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype)))


def norm_of(config) -> Callable[[int], nn.Module]:
    """Return the function that creates a norm of the row's kind and eps for a width."""
    return functools.partial(RMSNorm if config.norm == "rms" else nn.LayerNorm, eps=config.norm_eps)


class PatchEmbed(nn.Module):
    """Cuts an image, or a ResNet's feature map, into P x P patches and projects each to D.

    norm: creates a norm for a width. norms: "none", "after" the projection, or "around" it; "around" first normalizes the
    P * P * C numbers of a patch, in row-major order with channels last (as in lucidrains' vit-pytorch).
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int, backbone: nn.Module | None = None, bias: bool = True,
                 norms: str = "none", norm: Callable[[int], nn.Module] = nn.LayerNorm):
        super().__init__()
        self.backbone = backbone
        self.norm_in = norm(patch_size ** 2 * in_channels) if norms == "around" else None
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size, bias=bias)
        self.norm = norm(dim) if norms != "none" else None

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, h * w, D), in row-major order"""
        if self.backbone is not None:
            images = self.backbone(images)
        if self.norm_in is not None:
            images = self._normalized(images)
        patches = self.proj(images).flatten(2).transpose(1, 2)
        return patches if self.norm is None else self.norm(patches)

    def _normalized(self, images: Tensor) -> Tensor:
        """(B, C, height, width) -> the same shape, each patch normalized as a whole"""
        side = self.proj.kernel_size[0]
        patches = images.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)      # (B, h, w, P, P, C)
        patches = self.norm_in(patches.flatten(3)).view(patches.shape)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), an approximation of GELU (Hendrycks and Gimpel, arXiv 1606.08415) that OpenAI's CLIP uses."""

    def forward(self, x: Tensor) -> Tensor:
        """(any shape) -> the same shape"""
        return x * torch.sigmoid(1.702 * x)


def gelu_of(kind: str) -> nn.Module:
    """Return a form of GELU: "tanh" as in Google's models, "erf" as in DeiT, CaiT, MAE and timm, "quick" as in OpenAI's CLIP."""
    return QuickGELU() if kind == "quick" else nn.GELU(approximate={"tanh": "tanh", "erf": "none"}[kind])


class Mlp(nn.Module):
    """D -> mlp_dim -> D with GELU (gelu_of). `norm` is applied before the second layer."""

    def __init__(self, dim: int, mlp_dim: int, gelu: str, dropout_rate: float = 0.0, bias: bool = True,
                 norm: nn.Module | None = None):
        super().__init__()
        self.fc1 = nn.Linear(dim, mlp_dim, bias=bias)
        self.act = gelu_of(gelu)
        self.norm = norm
        self.fc2 = nn.Linear(mlp_dim, dim, bias=bias)
        self.drop = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        hidden = cpu_bfloat16.linear_gelu(x, self.fc1, self.act)
        if hidden is None:
            hidden = self.act(self.fc1(x))
        hidden = self.drop(hidden)
        return self.drop(self.fc2(hidden if self.norm is None else self.norm(hidden)))


class SwiGlu(nn.Module):
    """D -> mlp_dim -> D: silu(gate) * value (Shazeer, arXiv 2002.05202), each mlp_dim wide.

    `fc1` computes both, the gate first; `norm` is applied before `fc2`.
    """

    def __init__(self, dim: int, mlp_dim: int, dropout_rate: float = 0.0, bias: bool = True, norm: nn.Module | None = None):
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * mlp_dim, bias=bias)
        self.norm = norm
        self.fc2 = nn.Linear(mlp_dim, dim, bias=bias)
        self.drop = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        hidden = self.drop(F.silu(gate) * value)
        return self.drop(self.fc2(hidden if self.norm is None else self.norm(hidden)))


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch (Touvron et al., arXiv 2103.17239), with a small initial value."""

    def __init__(self, dim: int, initial: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, branch: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        return branch * self.gamma


class StochasticDepth(nn.Module):
    """Stochastic depth (Huang et al., arXiv 1603.09382).

    In training, the branch is dropped for each image with probability p, and divided by 1 - p otherwise. The draws are those of
    torchvision's module, which takes longer to import than PyTorch.
    """

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
    """Pre-norm encoder block: x + attention(norm(x)), then x + mlp(norm(x)).

    drop_path_rate: of stochastic depth. norm: creates a norm for a width. mlp: "plain" or "swiglu". layer_scale: the initial
    value of LayerScale; 0: none. attention: further arguments of the attention, by name.
    """

    attention: type[nn.Module] = SelfAttention

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, gelu: str, dropout_rate: float = 0.0,
                 attention_dropout_rate: float = 0.0, drop_path_rate: float = 0.0, *,
                 norm: Callable[[int], nn.Module] = LAYER_NORM, mlp: str = "plain",
                 mlp_norm: bool = False, mlp_bias: bool = True, layer_scale: float = 0.0, **attention: object):
        super().__init__()
        self.norm1 = norm(dim)
        if attention:                                        # CaiT's attention takes no further arguments
            attention["norm"] = norm
        self.attn = self.attention(dim, num_heads, dropout_rate, attention_dropout_rate, **attention)
        self.norm2 = norm(dim)
        rest = {"dropout_rate": dropout_rate, "bias": mlp_bias, "norm": norm(mlp_dim) if mlp_norm else None}
        self.mlp = SwiGlu(dim, mlp_dim, **rest) if mlp == "swiglu" else Mlp(dim, mlp_dim, gelu, **rest)
        self.ls1, self.ls2 = (LayerScale(dim, layer_scale) if layer_scale else None for _ in range(2))
        self.drop_path = StochasticDepth(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        branch = self.attn(self.norm1(x))
        x = x + self.drop_path(branch if self.ls1 is None else self.ls1(branch))
        branch = self.mlp(self.norm2(x))
        return x + self.drop_path(branch if self.ls2 is None else self.ls2(branch))


def resize_positions(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], rule: str = "bilinear") -> Tensor:
    """Resize positions (1, prefix + h * w, D) to (1, prefix + h' * w', D); the prefix rows (cls, dist) do not change.

    It compares grids, not numbers of tokens: 4 x 16 and 8 x 8 have the same number and still need resampling. Raises ValueError
    if the table is smaller than its grid.
    """
    prefix = table.shape[1] - old_grid[0] * old_grid[1]
    if prefix < 0:
        raise ValueError(f"a table of {table.shape[1]} positions cannot hold a {old_grid[0]} x {old_grid[1]} grid")
    if old_grid == new_grid:
        return table
    grid = table[:, prefix:].reshape(1, *old_grid, -1).permute(0, 3, 1, 2)                # (1, D, h, w)
    scales = [(new + OFFSET) / old for new, old in zip(new_grid, old_grid)]
    square = (max(new_grid),) * 2 if rule == "bilinear_cropped" else new_grid
    size = {"scale_factor": scales} if rule == "bicubic_offset" else {"size": square}
    grid = F.interpolate(grid, **size, **RESIZE_RULES[rule])[..., :new_grid[0], :new_grid[1]]           # (1, D, h', w')
    return torch.cat([table[:, :prefix], grid.flatten(2).transpose(1, 2)], dim=1)
