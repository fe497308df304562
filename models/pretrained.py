"""Fills a model from a published checkpoint, and writes one in Google's layout.

Every array of the file is used, or reported as left out on purpose; every parameter of the model is filled, or
reported as freshly initialised. Anything else is an error with the names in it. The file tells its own dialect
and its own grid; its name is not trusted. Reading executes nothing (npz.py).
"""

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .npz import NpzError, NpzFile
from .position import resize_positions
from .vit import ModelError, VisionTransformer
from .weight_names import (
    GOOGLE_BLOCKS,
    GOOGLE_EMBEDDING,
    GOOGLE_HEAD,
    GOOGLE_PROJECTION,
    GOOGLE_STEM,
    GOOGLE_UNIT,
    TRAIN_STATE_PREFIX,
    TRAIN_STATE_ROOT,
)


@dataclasses.dataclass
class LoadReport:
    """What happened to every array of the file and every parameter of the model (our names; `left_out`: the file's)."""

    path: str
    used: list[str] = dataclasses.field(default_factory=list)
    resized: dict[str, str] = dataclasses.field(default_factory=dict)     # name: "14x14 -> 24x24"
    fresh: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.used)} parameters from {self.path}"]
        parts += [f"{name} resized {how}" for name, how in self.resized.items()]
        if self.fresh:
            parts.append(f"fresh: {', '.join(self.fresh)}")
        if self.left_out:
            shown = ", ".join(self.left_out[:4]) + (f" and {len(self.left_out) - 4} more" if len(self.left_out) > 4 else "")
            parts.append(f"left out of the file: {shown}")
        return "; ".join(parts + self.notes)


def load_pretrained(model: VisionTransformer, path: str | Path, head: str = "zero") -> LoadReport:
    """Fills `model` from a Google .npz checkpoint.

    head="zero": a new task. The file's head and its `pre_logits` layer are left out, the model's head is set to
    zero. head="keep": the same task. Both are taken, and the class count must agree.
    Raises ModelError (one line, with names) if the file is missing, damaged, of another kind or another size.
    """
    if head not in ("zero", "keep"):
        raise ModelError(f"head={head!r}: must be 'zero' or 'keep'")
    if head == "zero" and model.config.representation_size:
        raise ModelError("a model with pre_logits can only be filled with head='keep': a new task starts without that layer")
    with open_checkpoint(path) as file:
        names = _Names(file)
        rows = _expand(names.block_rows(), model)
        if head == "zero":
            rows = [row for row in rows if not row[0].startswith(("head.", "pre_logits."))]
        _check_names(names, rows, model, head)
        report = LoadReport(str(path))
        state = {ours: _convert(names, sources, rule, ours, model, report) for ours, sources, rule in rows}
        report.left_out = sorted(names.all - {source for _, sources, _ in rows for source in sources}) + names.train_state
    missing, unexpected = model.load_state_dict(state, strict=False)
    expected_missing = {"head.weight", "head.bias"} if head == "zero" else set()
    assert set(missing) == expected_missing and not unexpected, (missing, unexpected)
    if head == "zero":
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        report.fresh = sorted(expected_missing)
    elif not model.head.weight.any():
        report.notes.append("the file's head is all zero, as in some published ImageNet-21k files: its logits say nothing")
    return report


def checkpoint_head(path: str | Path) -> tuple[int, int]:
    """(classes, width of pre_logits or 0) of a Google .npz file, from its headers alone. Raises ModelError."""
    with open_checkpoint(path) as file:
        names = _Names(file)
        if not {"head/kernel", "head/bias"} <= names.all:
            raise ModelError(f"{path}: holds no head to keep")
        representation = names.outputs("pre_logits") if "pre_logits/bias" in names.all else 0
        return names.outputs("head"), representation


def open_checkpoint(path: str | Path) -> NpzFile:
    """Raises ModelError if there is no such file or it is no archive of arrays."""
    if not Path(path).is_file():
        raise ModelError(f"no checkpoint at {path}: give a .npz file or a published name such as imagenet21k/ViT-B_16")
    try:
        return NpzFile(path)
    except NpzError as error:
        hint = ("a PyTorch checkpoint; a run goes on by --resume_path" if "data.pkl" in str(error)
                else "Google's checkpoints are .npz files: download it again if it was cut off")
        raise ModelError(f"{error}; {hint}") from error


class _Names:
    """The members of a file under the names of the tables, without the prefix of a train state."""

    def __init__(self, file: NpzFile):
        self.file = file
        self.prefix = TRAIN_STATE_PREFIX if any(name.startswith(TRAIN_STATE_PREFIX) for name in file.names) else ""
        self.all = {name[len(self.prefix):] for name in file.names if name.startswith(self.prefix)}
        self.train_state = sorted(name for name in file.names if not name.startswith(self.prefix))
        foreign = [name for name in self.train_state if not name.startswith(TRAIN_STATE_ROOT)]
        if foreign:
            raise ModelError(f"{file.path}: unknown members beside the train state: {_some(foreign)}")

    def shape(self, name: str) -> tuple[int, ...]:
        try:
            return self.file.shape(self.prefix + name)
        except NpzError as error:
            raise ModelError(str(error)) from error

    def outputs(self, layer: str) -> int:
        """Width of a dense layer, if its kernel and bias agree about it."""
        bias = self.shape(f"{layer}/bias")
        kernel = self.shape(f"{layer}/kernel") if f"{layer}/kernel" in self.all else ()
        if len(bias) != 1 or kernel[1:] != bias:
            raise ModelError(f"{self.file.path}: {layer}/kernel {kernel} does not fit {layer}/bias {bias}")
        return bias[0]

    def read(self, name: str) -> Tensor:
        try:
            array = self.file.read(self.prefix + name)
        except NpzError as error:
            raise ModelError(str(error)) from error
        return torch.from_numpy(np.array(array, dtype=np.float32))       # a copy: the buffer read is read-only

    def block_rows(self) -> tuple:
        for mark, rows in GOOGLE_BLOCKS.items():
            if any(f"encoderblock_0/{mark}/" in name for name in self.all):
                return rows
        raise ModelError(f"{self.file.path}: not a Vision Transformer in Google's layout (its arrays: {_some(self.all)})")


def _expand(block_rows: tuple, model: VisionTransformer) -> list[tuple[str, tuple[str, ...], str]]:
    """The rows of the tables, one for each parameter that the model has."""
    config = model.config
    rows = list(GOOGLE_EMBEDDING) + list(GOOGLE_HEAD)
    rows += [_fill(row, i=i) for i in range(config.num_layers) for row in block_rows]
    if config.resnet_layers is not None:
        rows += GOOGLE_STEM
        for s, units in enumerate(config.resnet_layers):
            for u in range(units):
                unit_rows = GOOGLE_UNIT + (GOOGLE_PROJECTION if u == 0 else ())
                rows += [_fill(row, s=s, u=u, S=s + 1, U=u + 1) for row in unit_rows]
    parameters = model.state_dict().keys()
    rows = [row for row in rows if row[0] in parameters]      # no cls token, no pre_logits: as the model is
    assert {row[0] for row in rows} == set(parameters), set(parameters) - {row[0] for row in rows}
    return rows


def _fill(row: tuple, **numbers: int) -> tuple[str, tuple[str, ...], str]:
    return row[0].format(**numbers), tuple(source.format(**numbers) for source in row[1]), row[2]


def _check_names(names: _Names, rows: list, model: VisionTransformer, head: str) -> None:
    path = names.file.path
    sources = {source for _, row_sources, _ in rows for source in row_sources}
    missing = sources - names.all
    if missing:
        raise ModelError(f"{path}: the model needs arrays that the file lacks: {_some(missing)}; is --model_type right?")
    left = {"head/kernel", "head/bias", "pre_logits/kernel", "pre_logits/bias"} if head == "zero" else set()
    unknown = names.all - sources - left
    if unknown:
        raise ModelError(f"{path}: the file has arrays that the model lacks: {_some(unknown)}; is --model_type right?")
    if head == "keep" and names.outputs("head") != model.num_classes:
        raise ModelError(f"{path}: its head has {names.outputs('head')} classes, the model {model.num_classes}; "
                         "head='keep' needs the same number, head='zero' starts a new head")


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ----------------------------------------------------------------------------------- rules, file -> model


def _convert(names: _Names, sources: tuple[str, ...], rule: str, ours: str, model: VisionTransformer,
             report: LoadReport) -> Tensor:
    """Reads the arrays of one row and applies its rule. Shapes are compared from the headers before anything is read."""
    parameter = model.get_parameter(ours)
    shapes = [names.shape(source) for source in sources]
    if rule == "position":
        grid = _grid_of(shapes[0], model)
        misfits = [0] if grid is None else []
    else:
        blank = torch.empty_like(parameter, device="meta")
        wanted = [_TO_FILE[rule](blank, model, part).shape for part in range(len(sources))]
        misfits = [part for part, shape in enumerate(shapes) if shape != wanted[part]]
    if misfits:
        raise ModelError(f"{names.file.path}: {sources[misfits[0]]} has shape {shapes[misfits[0]]}, which does not fit the "
                         f"model's {ours} {tuple(parameter.shape)}; is --model_type right?")
    arrays = [names.read(source) for source in sources]
    report.used.append(ours)
    if rule != "position":
        return _FROM_FILE[rule](arrays)
    if grid != model.grid:
        report.resized[ours] = f"{grid[0]}x{grid[1]} -> {model.grid[0]}x{model.grid[1]}"
    return resize_positions(arrays[0], grid, model.grid)


def _grid_of(shape: tuple[int, ...], model: VisionTransformer) -> tuple[int, int] | None:
    """The grid of a position table, which is square in every published file; None if the table is not the model's kind."""
    if len(shape) != 3 or shape[0] != 1 or shape[2] != model.config.hidden_size:
        return None
    patches = shape[1] - model.num_prefix_tokens
    side = math.isqrt(max(patches, 0))
    return (side, side) if side > 0 and side * side == patches else None


_FROM_FILE = {
    "copy": lambda arrays: arrays[0],
    "vector": lambda arrays: arrays[0].flatten(),
    "dense": lambda arrays: arrays[0].t(),
    "conv": lambda arrays: arrays[0].permute(3, 2, 0, 1),
    "qkv": lambda arrays: torch.cat([array.flatten(1).t() for array in arrays]),     # (D, H, d) -> (H * d, D)
    "qkv_bias": lambda arrays: torch.cat([array.flatten() for array in arrays]),
    "out": lambda arrays: arrays[0].flatten(0, 1).t(),                               # (H, d, D) -> (D, H * d)
}

# ----------------------------------------------------------------------------------- rules, model -> file


def _heads(model: VisionTransformer) -> tuple[int, int]:
    return model.config.num_heads, model.config.hidden_size // model.config.num_heads


# rule: (parameter, model, which of the row's arrays) -> that array
_TO_FILE = {
    "copy": lambda value, model, part: value,
    "position": lambda value, model, part: value,
    "vector": lambda value, model, part: value.view(1, 1, 1, -1),
    "dense": lambda value, model, part: value.t(),
    "conv": lambda value, model, part: value.permute(2, 3, 1, 0),
    "qkv": lambda value, model, part: value.chunk(3)[part].t().reshape(-1, *_heads(model)),
    "qkv_bias": lambda value, model, part: value.chunk(3)[part].reshape(_heads(model)),
    "out": lambda value, model, part: value.t().reshape(*_heads(model), -1),
}


def save_npz(model: VisionTransformer, path: str | Path) -> None:
    """Writes the model in Google's layout (pre-linen names, float32, not compressed), whole or not at all.

    Raises ModelError for a grid that is not square: the layout does not say which grid a table belongs to.
    """
    if model.grid[0] != model.grid[1]:
        raise ModelError(f"a position table of {model.grid[0]} x {model.grid[1]} patches cannot be told from a square one in a "
                         ".npz file: take a square img_size")
    rows = _expand(GOOGLE_BLOCKS["MultiHeadDotProductAttention_1"], model)
    arrays = {}
    for ours, sources, rule in rows:
        value = model.get_parameter(ours).detach().float().cpu()
        for part, source in enumerate(sources):
            arrays[source] = np.ascontiguousarray(_TO_FILE[rule](value, model, part).numpy())
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as stream:
            np.savez(stream, **arrays)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
