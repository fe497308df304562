"""Converts arrays of a file into parameters of a model and back, and lists the rows of the key maps for a model.

Shapes: D width, H heads, d = D / H, P patch side, C classes. `key_maps.py` names the conversion of each parameter.
"""

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from models.base import ImageTransformer
from models.errors import ModelError

from . import key_maps


class Row(NamedTuple):
    """One parameter of a model, and the arrays of a file that hold it."""

    parameter: str
    sources: tuple[str, ...]         # names in the file
    conversion: str                  # a key of CONVERSIONS


class Conversion(NamedTuple):
    """Both directions between a parameter and an array of a file, or, if a row has several arrays, between a part and one."""

    from_file: Callable[[Tensor], Tensor]
    to_file: Callable[[Tensor, ImageTransformer, int], Tensor]        # (parameter, model, which of the row's arrays)


def _heads(model: ImageTransformer) -> tuple[int, int]:
    return model.config.num_heads, model.config.hidden_size // model.config.num_heads


def patch_kernel(array: Tensor) -> Tensor:
    """(D, P * P * C), the pixels of a patch in row-major order, channels last -> (D, C, P, P)"""
    channels, side = patch_sizes(array.shape[1])
    return array.unflatten(1, (side, side, channels)).permute(0, 3, 1, 2)


def patch_sizes(numbers: int) -> tuple[int, int]:
    """Return (channels, side) of a color or grey patch of so many numbers; (numbers, 1) if it is neither."""
    for channels in (3, 1):
        side = math.isqrt(numbers // channels)
        if side and side * side * channels == numbers:
            return channels, side
    return numbers, 1


CONVERSIONS = {name: Conversion(*both) for name, both in {
    "copy": (lambda array: array, lambda value, model, part: value),
    "position": (lambda array: array, lambda value, model, part: value),                  # load.py resizes them
    "vector": (lambda array: array.flatten(), lambda value, model, part: value.view(1, 1, 1, -1)),
    "dense": (lambda array: array.t(), lambda value, model, part: value.t()),
    "conv": (lambda array: array.permute(3, 2, 0, 1), lambda value, model, part: value.permute(2, 3, 1, 0)),
    # (D, H, d) <-> (H * d, D)
    "qkv": (lambda array: array.flatten(1).t(), lambda value, model, part: value.chunk(3)[part].t().reshape(-1, *_heads(model))),
    "qkv_bias": (lambda array: array.flatten(), lambda value, model, part: value.chunk(3)[part].reshape(_heads(model))),
    "query": (lambda array: array.flatten(1).t(), lambda value, model, part: value.t().reshape(-1, *_heads(model))),
    "query_bias": (lambda array: array.flatten(), lambda value, model, part: value.reshape(_heads(model))),
    "kv": (lambda array: array.flatten(1).t(), lambda value, model, part: value.chunk(2)[part].t().reshape(-1, *_heads(model))),
    "kv_bias": (lambda array: array.flatten(), lambda value, model, part: value.chunk(2)[part].reshape(_heads(model))),
    # (H, d, D) <-> (D, H * d)
    "out": (lambda array: array.flatten(0, 1).t(), lambda value, model, part: value.t().reshape(*_heads(model), -1)),
    "join": (lambda array: array, lambda value, model, part: value.chunk(3)[part]),
    "halves": (lambda array: array, lambda value, model, part: value.chunk(2)[part]),
    "sincos": (lambda array: array, lambda value, model, part: value),                    # without an array: load.py computes it
    "fold": (lambda array: array, lambda value, model, part: value),                      # load.py adds them up
    # A part of an array (3 * D, ...) of queries, keys and values; back: an array of that shape.
    "q_of_qkv": (lambda array: array.chunk(3)[0], lambda value, model, part: torch.cat([value] * 3)),
    "v_of_qkv": (lambda array: array.chunk(3)[2], lambda value, model, part: torch.cat([value] * 3)),
    "kv_of_qkv": (lambda array: array[len(array) // 3:], lambda value, model, part: torch.cat([value.chunk(2)[0], value])),
    # (D, P * P * C) <-> (D, C, P, P), and (P * P * C, D)
    "patches": (patch_kernel, lambda value, model, part: value.permute(0, 2, 3, 1).flatten(1)),
    "patches_dense": (lambda array: patch_kernel(array.t()), lambda value, model, part: value.permute(2, 3, 1, 0).flatten(0, 2)),
}.items()}

# ------------------------------------------------------------------------------------------- rows of one model


TRANSFORMERS_OUTSIDE = key_maps.TRANSFORMERS_EMBEDDING + key_maps.TRANSFORMERS_HEAD
GOOGLE_OUTSIDE = key_maps.GOOGLE_EMBEDDING + key_maps.GOOGLE_POOLING + key_maps.GOOGLE_HEAD


def google_rows(model: ImageTransformer, block_rows: tuple, outside: tuple = GOOGLE_OUTSIDE) -> list[Row]:
    """Return a row for every parameter that Google's layout can hold."""
    return (rows_of(model, outside, block_rows)
            + resnet_rows(model, key_maps.GOOGLE_STEM, key_maps.GOOGLE_UNIT, key_maps.GOOGLE_PROJECTION))


def resnet_rows(model: ImageTransformer, stem: tuple, unit: tuple, projection: tuple) -> list[Row]:
    """Return the rows of a hybrid's ResNet: its stem, every unit, and the projection in the first unit of each stage."""
    if model.config.resnet_layers is None:
        return []
    rows = _numbered(stem)
    for s, units in enumerate(model.config.resnet_layers):
        for u in range(units):
            rows += _numbered(unit + (projection if u == 0 else ()), s=s, u=u, S=s + 1, U=u + 1)
    return rows


def transformers_rows(model: ImageTransformer, block_rows: tuple, outside: tuple = TRANSFORMERS_OUTSIDE) -> list[Row]:
    """Return a row for every parameter that transformers' layout of ViT and DeiT can hold."""
    return rows_of(model, outside, block_rows)


def rows_of(model: ImageTransformer, outside: tuple, block_rows: tuple) -> list[Row]:
    """Return the rows of all parameters that the model has, outside the blocks and in every block."""
    rows, parameters = _numbered(outside), model.state_dict()
    for i in range(model.config.num_layers):
        rows += _numbered(block_rows, i=i)
    return [row for row in rows if row.parameter in parameters]


def _numbered(rows: tuple, **numbers: int) -> list[Row]:
    """Return the rows with the numbers of a block, or of a stage and unit, filled into the names."""
    return [Row(ours.format(**numbers), tuple(source.format(**numbers) for source in sources), conversion)
            for ours, sources, conversion in rows]


# ---------------------------------------------------------------------------------------- rows of one file's tables


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Return positions (1, h * w, D): sines and cosines of a patch's column, then of its row.

    They have D / 4 frequencies from 1 down to 1 / 10,000 (Beyer et al., "Better plain ViT baselines for ImageNet-1k", arXiv
    2205.01580). Raises ModelError unless D is a multiple of 4 and at least 8.
    """
    if dim % 4 or dim < 8:
        raise ModelError(f"positions from sines and cosines need a width that is a multiple of 4 and at least 8, not {dim}")
    frequencies = 10_000.0 ** -torch.linspace(0, 1, dim // 4, dtype=torch.float64)
    rows, columns = (torch.arange(side, dtype=torch.float64)[:, None] * frequencies for side in grid)
    h, w = grid
    angles = [columns[None].expand(h, w, -1), rows[:, None].expand(h, w, -1)]
    table = torch.cat([function(axis) for axis in angles for function in (torch.sin, torch.cos)], dim=-1)
    return table.float().flatten(0, 1)[None]


def of_version(rows: tuple, names: Collection[str]) -> tuple:
    """Return one row for each parameter: of several, the one with the most arrays in the file. The first block decides."""
    def present(row: tuple) -> float:
        return sum(source.format(i=0) in names for source in row[1]) / max(len(row[1]), 1)

    found: dict[str, tuple] = {}
    for row in rows:
        if row[0] not in found or present(row) > present(found[row[0]]):
            found[row[0]] = row
    return tuple(found.values())


def with_linear_patches(rows: tuple, shapes: dict[str, tuple[int, ...]]) -> tuple:
    """Return the rows with another conversion of the patch embedding, if it is a linear layer over the pixels of a patch."""
    linear = {"copy": "patches", "conv": "patches_dense"}
    return tuple((ours, sources, linear.get(conversion, conversion))
                 if ours == "patch_embed.proj.weight" and len(shapes.get(sources[0], ())) == 2 else (ours, sources, conversion)
                 for ours, sources, conversion in rows)


# ------------------------------------------------------------------------------------------------ grey images


def fold_channels(weight: Tensor, bias: Tensor, config) -> tuple[Tensor, Tensor]:
    """Convert the patch kernel (D, 3, P, P) and bias (D) of a model for color images to (D, 1, P, P) and (D) for grey images.

    For a grey image, normalized with config.mean and config.std, the new model computes what the old one computes for the image
    in three equal channels, normalized with config.channel_mean and config.channel_std (if the row has none, with the same mean
    and std in each channel). With w_c, m_c, s_c of channel c and the new m, s:
      w' = s * sum_c w_c / s_c        b' = b + sum over c and pixels of w_c * (m - m_c) / s_c
    """
    if weight.shape[1] != 3:
        raise ModelError(f"a patch kernel of {weight.shape[1]} channels cannot be converted to grey images; expected 3 channels")
    mean, std = config.mean[0], config.std[0]
    means = torch.tensor(config.channel_mean or (mean,) * 3, dtype=torch.float64).view(1, 3, 1, 1)
    stds = torch.tensor(config.channel_std or (std,) * 3, dtype=torch.float64).view(1, 3, 1, 1)
    scaled = weight.double() / stds
    bias = bias.double() + (scaled * (mean - means)).sum(dim=(1, 2, 3))
    return (std * scaled.sum(dim=1, keepdim=True)).float(), bias.float()
