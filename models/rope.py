"""Rotary positions (Su et al., arXiv 2104.09864): queries and keys are rotated by angles that depend on the patch's position.

Three kinds, as the published models compute them (values of the key `rope`; d is the width of a head, base ** (-4 j / d) the
frequency of j = 0 .. d/4 - 1):
  dinov3   DINOv3 (arXiv 2508.10104): base 100, times 2 pi; centers of the patches in (-1, 1), scaled separately on each axis; a
           pair is a number of the first half of a head and its counterpart in the second half.
  eva      EVA-02 (arXiv 2303.11331): base 10,000; indices scaled to the grid of the pre-training; pairs are neighbors.
  pe       Perception Encoder (arXiv 2504.13181): as eva, but columns before rows, and indices start from 1 with a cls token.
The tables are computed in float64 and stored in float32 (DINOv3's files store periods in bfloat16, which differ by up to 4e-3).

Shapes: B images, H heads, N tokens, d width of a head, (h, w) grid.
"""

import math

import torch
from torch import Tensor, nn

ROPES = ("dinov3", "eva", "pe")


class Rope(nn.Module):
    """Rotates the patches, the last h * w tokens, and leaves those before them unchanged. It has no parameters.

    reference: patches per side of the grid that indices are scaled to ("eva", "pe"). has_cls: whether there is a cls token.
    """

    def __init__(self, kind: str, head_width: int, grid: tuple[int, int], prefix_tokens: int, reference: int, has_cls: bool):
        super().__init__()
        self.kind, self.grid, self.prefix_tokens = kind, tuple(grid), prefix_tokens
        self.reference, self.offset, self.quarter = reference, int(kind == "pe" and has_cls), head_width // 4
        # Computed even if parameters are on the meta device, because files have no tables to load.
        cos, sin = self._tables(torch.device("cpu"), torch.float32)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """queries or keys (B, H, N, d) -> (B, H, N, d), in the same type; computed in float32 or wider"""
        if self.kind == "dinov3":
            first, second = x.chunk(2, dim=-1)
            other = torch.cat([second, first], dim=-1)
        else:
            pairs = x.unflatten(-1, (-1, 2))
            other = torch.stack([pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)      # flip(-1) takes half as long again
        return torch.addcmul(x * self.cos, other, self.sin).to(x.dtype)

    def _tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin (N, d); sin includes the sign with which the other number of a pair is added."""
        base = 100.0 if self.kind == "dinov3" else 10_000.0
        frequencies = base ** (-torch.arange(self.quarter, dtype=torch.float64, device="cpu") / self.quarter)
        rows, columns = (self._angles(side, frequencies) for side in self.grid)
        h, w = self.grid
        parts = [rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)]
        angles = torch.cat(parts[::-1] if self.kind == "pe" else parts, dim=-1).flatten(0, 1)            # (h * w, d / 2)
        angles = torch.cat([angles.new_zeros(self.prefix_tokens, angles.shape[1]), angles])
        cos, sin = angles.cos(), angles.sin()
        if self.kind == "dinov3":
            cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        else:
            cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(1)
        return cos.to(device, dtype), sin.to(device, dtype)

    def _angles(self, side: int, frequencies: Tensor) -> Tensor:
        """Return the angles of the patches along one axis, (side, d / 4)."""
        index = torch.arange(side, dtype=torch.float64, device="cpu")
        if self.kind == "dinov3":
            return 2 * math.pi * (2 * (index + 0.5) / side - 1)[:, None] * frequencies
        return ((index + self.offset) * self.reference / side)[:, None] * frequencies

    def _apply(self, fn, recurse: bool = True) -> "Rope":
        """Recompute the tables after a move to another device or type: at least in float32, whatever the weights' type."""
        super()._apply(fn, recurse)
        if not self.cos.is_meta:
            self.cos, self.sin = self._tables(self.cos.device, torch.promote_types(self.cos.dtype, torch.float32))
        return self

    def extra_repr(self) -> str:
        return f"{self.kind}, grid {self.grid[0]} x {self.grid[1]}"
