"""The conversions of arrays of a file into parameters of a model, and back; and the rows of the key maps for a model.

Shapes: D width, H heads, d = D / H, P patch side, C classes. `key_maps.py` names the conversion of each parameter.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.base import ImageTransformer
from models.errors import ModelError

from . import key_maps


class Row(NamedTuple):
    """One parameter of a model and where a file has it."""

    parameter: str
    sources: tuple[str, ...]         # names in the file
    conversion: str                  # a key of CONVERSIONS


class Conversion(NamedTuple):
    """Between one parameter and its array of a file, or where a row has several arrays one of them and its part of the rows."""

    from_file: Callable[[Tensor], Tensor]
    to_file: Callable[[Tensor, ImageTransformer, int], Tensor]        # (parameter, model, which of the row's arrays)


def _heads(model: ImageTransformer) -> tuple[int, int]:
    return model.config.num_heads, model.config.hidden_size // model.config.num_heads


CONVERSIONS = {name: Conversion(*both) for name, both in {
    "copy": (lambda array: array, lambda value, model, part: value),
    "position": (lambda array: array, lambda value, model, part: value),                  # load.py resizes them
    "vector": (lambda array: array.flatten(), lambda value, model, part: value.view(1, 1, 1, -1)),
    "dense": (lambda array: array.t(), lambda value, model, part: value.t()),
    "conv": (lambda array: array.permute(3, 2, 0, 1), lambda value, model, part: value.permute(2, 3, 1, 0)),
    # (D, H, d) <-> (H * d, D)
    "qkv": (lambda array: array.flatten(1).t(), lambda value, model, part: value.chunk(3)[part].t().reshape(-1, *_heads(model))),
    "qkv_bias": (lambda array: array.flatten(), lambda value, model, part: value.chunk(3)[part].reshape(_heads(model))),
    # (H, d, D) <-> (D, H * d)
    "out": (lambda array: array.flatten(0, 1).t(), lambda value, model, part: value.t().reshape(*_heads(model), -1)),
    "join": (lambda array: array, lambda value, model, part: value.chunk(3)[part]),
    "halves": (lambda array: array, lambda value, model, part: value.chunk(2)[part]),
    "fold": (lambda array: array, lambda value, model, part: value),                      # load.py adds them up
    # The part of one array (3 * D, ...) that holds queries, keys and values; back: an array of that shape.
    "q_of_qkv": (lambda array: array.chunk(3)[0], lambda value, model, part: torch.cat([value] * 3)),
    "v_of_qkv": (lambda array: array.chunk(3)[2], lambda value, model, part: torch.cat([value] * 3)),
    "kv_of_qkv": (lambda array: array[len(array) // 3:], lambda value, model, part: torch.cat([value.chunk(2)[0], value])),
}.items()}

# ------------------------------------------------------------------------------------------- rows of one model


def google_rows(model: ImageTransformer, block_rows: tuple) -> list[Row]:
    """A row for every parameter that Google's layout can name."""
    return (rows_of(model, key_maps.GOOGLE_EMBEDDING + key_maps.GOOGLE_HEAD, block_rows)
            + resnet_rows(model, key_maps.GOOGLE_STEM, key_maps.GOOGLE_UNIT, key_maps.GOOGLE_PROJECTION))


def resnet_rows(model: ImageTransformer, stem: tuple, unit: tuple, projection: tuple) -> list[Row]:
    """Of a hybrid's ResNet: its stem, every unit, and the projection in the first unit of each stage."""
    if model.config.resnet_layers is None:
        return []
    rows = _numbered(stem)
    for s, units in enumerate(model.config.resnet_layers):
        for u in range(units):
            rows += _numbered(unit + (projection if u == 0 else ()), s=s, u=u, S=s + 1, U=u + 1)
    return rows


def transformers_rows(model: ImageTransformer, block_rows: tuple) -> list[Row]:
    """A row for every parameter that transformers can name."""
    return rows_of(model, key_maps.TRANSFORMERS_EMBEDDING + key_maps.TRANSFORMERS_HEAD, block_rows)


def rows_of(model: ImageTransformer, outside: tuple, block_rows: tuple) -> list[Row]:
    """Of parameters outside the blocks and of every block, where the model has them (not all have a cls token, or pre_logits)."""
    rows, parameters = _numbered(outside), model.state_dict()
    for i in range(model.config.num_layers):
        rows += _numbered(block_rows, i=i)
    return [row for row in rows if row.parameter in parameters]


def _numbered(rows: tuple, **numbers: int) -> list[Row]:
    """With the numbers of a block, or of a stage and unit, in the names."""
    return [Row(ours.format(**numbers), tuple(source.format(**numbers) for source in sources), conversion)
            for ours, sources, conversion in rows]


# ------------------------------------------------------------------------------------------------ grey images


def fold_channels(weight: Tensor, bias: Tensor, config) -> tuple[Tensor, Tensor]:
    """Patch kernel (D, 3, P, P) and bias (D) of a model of color images -> (D, 1, P, P) and (D) for grey ones.

    The new model gives for a grey image, normalized with config.mean and config.std, what the old one gives for the
    image in three equal channels, normalized with config.channel_mean and config.channel_std (where the row has none:
    with the same mean and std in each channel). With w_c, m_c, s_c of channel c and the new m, s:
      w' = s * sum_c w_c / s_c        b' = b + sum over c and pixels of w_c * (m - m_c) / s_c
    """
    if weight.shape[1] != 3:
        raise ModelError(f"a patch kernel of {weight.shape[1]} channels cannot be summed for grey images, one of 3 can")
    mean, std = config.mean[0], config.std[0]
    means = torch.tensor(config.channel_mean or (mean,) * 3, dtype=torch.float64).view(1, 3, 1, 1)
    stds = torch.tensor(config.channel_std or (std,) * 3, dtype=torch.float64).view(1, 3, 1, 1)
    scaled = weight.double() / stds
    bias = bias.double() + (scaled * (mean - means)).sum(dim=(1, 2, 3))
    return (std * scaled.sum(dim=1, keepdim=True)).float(), bias.float()
