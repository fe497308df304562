"""Position tables: resizing to another grid.

Two rules, of the two families of published models:
- "bilinear": Google's code resizes with scipy.ndimage.zoom(order=1), which equals bilinear interpolation with aligned
  corners (to 3e-6) and is written that way here, because this form also takes non-square grids and runs everywhere.
- "bicubic": the code of DeiT and MAE; corners not aligned, no smoothing where the grid shrinks.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

RESIZE_RULES = {"bilinear": {"mode": "bilinear", "align_corners": True}, "bicubic": {"mode": "bicubic", "align_corners": False}}


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
