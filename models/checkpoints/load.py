"""Fills a model from a checkpoint of any known kind, and rebuilds the models of our own runs.

Every array of the file is used, or reported as left out on purpose; every parameter of the model is filled, or
reported as freshly initialised. Anything else is an error with the names in it. The file tells its own kind, dialect
and grid; its name is not trusted. Reading executes nothing, and nothing is read whose shape does not fit.
"""

import dataclasses
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from models.base import ImageTransformer, stride
from models.errors import ModelError
from models.layers import resize_positions

from .conversions import FROM_FILE, TO_FILE, Row, fold_channels
from .formats import WeightFile, open_weights
from .layouts import Dialect, recognise, some

MAX_THREADS = 4          # that read: a few are faster than the memory
PATCH_KERNEL, PATCH_BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"


@dataclasses.dataclass
class LoadReport:
    """What happened to every array of the file and every parameter of the model (our names; `left_out`: the file's)."""

    path: str
    used: list[str] = dataclasses.field(default_factory=list)
    resized: dict[str, str] = dataclasses.field(default_factory=dict)     # name: "14x14 -> 24x24"
    fresh: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    classes: list[str] = dataclasses.field(default_factory=list)          # names, where the file is of a run of ours

    def __str__(self) -> str:
        parts = [f"{len(self.used)} parameters from {self.path}"]
        parts += [f"{name} resized {how}" for name, how in self.resized.items()]
        if self.fresh:
            parts.append(f"fresh: {', '.join(self.fresh)}")
        if self.left_out:
            shown = ", ".join(self.left_out[:4]) + (f" and {len(self.left_out) - 4} more" if len(self.left_out) > 4 else "")
            parts.append(f"left out of the file: {shown}")
        return "; ".join(parts + self.notes)


def load_pretrained(model: ImageTransformer, path: str | Path, head: str = "zero") -> LoadReport:
    """Fills `model` from a published checkpoint, a file of timm or transformers, or a checkpoint of one of our runs.

    head="zero": a new task. The file's heads and its `pre_logits` layer are left out, the model's heads are set to
    zero. head="keep": the same task. All are taken, and the class count must agree.
    Raises ModelError (one line, with names) if the file is missing, damaged, of another kind or another size.
    """
    if head not in ("zero", "keep"):
        raise ModelError(f"head={head!r}: must be 'zero' or 'keep'")
    if head == "zero" and model.config.representation_size:
        raise ModelError("a model with pre_logits can only be filled with head='keep': a new task starts without that layer")
    with open_weights(path) as file:
        return _fill(model, file, head)


def run_settings(path: str | Path) -> dict | None:
    """The configuration of the run that wrote a checkpoint; None for a file of another kind. Raises ModelError."""
    with open_weights(path) as file:
        return file.run["config"] if file.run else None


def _fill(model: ImageTransformer, file: WeightFile, head: str) -> LoadReport:
    # The shapes of a .npz file tell the number of heads, those of our own do not; but our own files say it.
    heads = file.run["architecture"].get("num_heads") if file.run else None
    if heads not in (None, model.config.num_heads):
        raise ModelError(f"{file.path}: its model has {heads} attention heads, the model here {model.config.num_heads}; "
                         f"take --num_heads {heads}")
    names = recognise(file)
    report = LoadReport(str(file.path), fresh=_fresh(names, model, head), notes=list(file.notes))
    report.classes = list(file.run["classes"]) if file.run else []
    rows = [row for row in names.rows(model) if row[0] not in report.fresh]
    _check_names(names, rows, model, report, head)
    state = _read_all({ours: _conversion(names, sources, rule, ours, model, report) for ours, sources, rule in rows})
    report.left_out = sorted(names.all - {source for _, sources, _ in rows for source in sources})
    report.left_out += names.pre_training + file.left_out
    if state[PATCH_KERNEL].shape[1] != model.patch_embed.proj.in_channels:
        state[PATCH_KERNEL], state[PATCH_BIAS] = fold_channels(state[PATCH_KERNEL], state[PATCH_BIAS], model.config)
        report.notes.append("patch kernel summed over the channels")
    for name in report.fresh:
        state[name] = torch.full(model.get_parameter(name).shape, 1.0 if name == "fc_norm.weight" else 0.0)
    empty = model.pos_embed.is_meta                    # it takes what was read in place of a copy
    state = {name: value.contiguous() for name, value in state.items()}          # fused optimizers know no other order
    model.load_state_dict(state, assign=empty)
    if head == "keep" and not any(model.get_parameter(name).any() for name in model.head_names() if name.endswith("weight")):
        report.notes.append("the file's head is all zero, as in some published ImageNet-21k files: its logits say nothing")
    return report


def checkpoint_head(path: str | Path) -> tuple[int, int]:
    """(classes, width of pre_logits or 0) of a file that load_pretrained reads, from shapes alone. Raises ModelError."""
    with open_weights(path) as file:
        names = recognise(file)
        if not (names.has("head.weight") and names.has("head.bias")):
            raise ModelError(f"{path}: holds no head to keep")
        return names.outputs("head"), names.outputs("pre_logits.fc") if names.has("pre_logits.fc.bias") else 0


def load_run(path: str | Path, build: Callable[[dict, int, int | tuple[int, int]], ImageTransformer]) -> ImageTransformer:
    """The model of a checkpoint of one of our runs, in eval mode, with `classes`, the names of its classes.

    build(architecture, number of classes, img_size) makes an empty model. The averaged weights are taken where the
    run kept them. Raises ModelError.
    """
    with open_weights(path) as file:
        model = _empty_model(file, build)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        if shapes != {name: file.shape(name) for name in file.names}:
            raise ModelError(f"{path}: the weights do not fit the architecture that it names; the file is damaged")
        model.load_report = _fill(model, file, "keep")
        model.classes = list(file.run["classes"])
    return model.eval()


def _empty_model(file: WeightFile, build: Callable) -> ImageTransformer:
    """Without memory: none is taken for what the file claims of itself."""
    if file.run is None:
        raise ModelError(f"{file.path}: no checkpoint of a run of train.py; create_model(NAME, pretrained=...) takes other files")
    architecture, size = file.run["architecture"], file.run["config"].get("img_size")
    stages = architecture.get("resnet_layers") or ()
    layers = [architecture.get("num_layers"), architecture.get("class_layers", 0),
              *(stages if isinstance(stages, (list, tuple)) else [stages])]
    if not all(isinstance(number, int) and number <= len(file.names) for number in layers):
        raise ModelError(f"{file.path}: {layers} layers do not fit {len(file.names)} arrays; the file is damaged")
    try:
        with torch.device("meta"):
            return build(architecture, len(file.run["classes"]), tuple(size) if isinstance(size, list) else size)
    except ModelError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{file.path}: this version of the program cannot build its architecture "
                         f"({' '.join(str(error).split())[:200]})") from error


# ------------------------------------------------------------------------------------------- names, before arrays


def _fresh(names: Dialect, model: ImageTransformer, head: str) -> list[str]:
    """Our names of what a new task starts anew: the heads, and MAE's norm behind the mean where the file has none."""
    if head == "keep":
        return []
    fresh = list(model.head_names())
    if hasattr(model, "fc_norm") and not names.has("fc_norm.weight"):
        fresh += ["fc_norm.weight", "fc_norm.bias"]
    return sorted(fresh)


def _check_names(names: Dialect, rows: list[Row], model: ImageTransformer, report: LoadReport, head: str) -> None:
    path, parameters = names.file.path, set(model.state_dict())
    sources = {source for _, row_sources, _ in rows for source in row_sources}
    missing = (sources - names.all) | (parameters - {row[0] for row in rows} - set(report.fresh))     # no name there
    if missing:
        raise ModelError(f"{path}: the model needs arrays that the file lacks: {some(missing)}; {_advice(names, model, report)}")
    left = names.heads() if head == "zero" else set()
    if "fc_norm.weight" in report.fresh:
        left |= {source for kind in ("weight", "bias") for source in names.row(f"norm.{kind}")[1]}
    unknown = names.all - sources - left
    if unknown:
        raise ModelError(f"{path}: the file has arrays that the model lacks: {some(unknown)}; {_advice(names, model, report)}")
    if head == "keep" and names.outputs("head") != model.num_classes:
        raise ModelError(f"{path}: its head has {names.outputs('head')} classes, the model {model.num_classes}; "
                         "head='keep' needs the same number, head='zero' starts a new head")


# parameter: what to do if the file has it and the model has not, and the reverse
ADVICE = {
    "blocks_token_only.0.gamma_1": ("it is a CaiT: take the --model_type CaiT-... of its size",
                                    "it is no CaiT: take another --model_type"),
    "dist_token": ("it is a distilled DeiT: take the --model_type of its size that ends in -distilled",
                   "it is not distilled: take the --model_type of its size that does not end in -distilled"),
    "fc_norm.weight": ("it pools the patches (fc_norm): take --classifier patch_mean",
                       "it pools with the cls token: take --classifier token"),
    "cls_token": ("it pools with the cls token: take --classifier token",
                  "it has no cls token: take --classifier gap"),
}


def _advice(names: Dialect, model: ImageTransformer, report: LoadReport) -> str:
    """The first difference in kind, or else the sizes."""
    if not names.has("pos_embed"):
        return "it stores no positions (big_vision's sincos2d computes them), as no model here"
    if names.has("fc_norm.weight") and not names.has("cls_token"):
        return "it has no cls token and a norm behind the mean (fc_norm), as no model here"
    parameters = set(model.state_dict()) - set(report.fresh)
    for name, (take_with, take_without) in ADVICE.items():
        if names.has(name) and name not in parameters:
            return take_with
        if name in parameters and not names.has(name):
            return take_without
    return f"is --model_type right? The file holds: {names.describe()}"


# ---------------------------------------------------------------------------------------------- shapes, then arrays


def _read_all(conversions: dict[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Calls them by several threads: reading, check sums and copies wait for the disk and the memory, not for each other."""
    with ThreadPoolExecutor(min(MAX_THREADS, torch.get_num_threads())) as pool:
        return dict(zip(conversions, pool.map(lambda convert: convert(), conversions.values())))


def _conversion(names: Dialect, sources: tuple[str, ...], rule: str, ours: str, model: ImageTransformer,
                report: LoadReport) -> Callable[[], Tensor]:
    """-> what reads the arrays of one row and applies its rule, to memory of its own. Shapes are compared here, from the
    headers: those of all rows before anything is read."""
    parameter, shapes = model.get_parameter(ours), [names.shape(source) for source in sources]
    if rule == "position":
        return _positions(names, sources[0], ours, model, report)
    wanted = _shapes_in_file(parameter, rule, model)
    misfits = [part for part, shape in enumerate(shapes) if shape != wanted[part]]
    if misfits and ours == PATCH_KERNEL and model.config.in_channels == 1 and parameter.shape[1] == 1:
        colour = torch.empty_like(parameter, device="meta").repeat_interleave(3, dim=1)
        misfits = [0] if shapes != _shapes_in_file(colour, rule, model) else []
    if misfits:
        raise ModelError(f"{names.file.path}: {sources[misfits[0]]} has shape {shapes[misfits[0]]}, which does not fit the "
                         f"model's {ours} {tuple(parameter.shape)}; {_advice_on_shape(ours, names, model, report)}")
    report.used.append(ours)
    size = parameter.shape if ours != PATCH_KERNEL else (len(parameter), names.kernel()[1], *parameter.shape[2:])

    def convert() -> Tensor:
        value = torch.empty(size)
        for place, source in zip(value.chunk(len(sources)), sources):
            place.copy_(FROM_FILE[rule](names.read_view(source)))
        return value

    return convert


def _shapes_in_file(parameter: Tensor, rule: str, model: ImageTransformer) -> list[tuple[int, ...]]:
    blank, parts = torch.empty_like(parameter, device="meta"), 3 if rule in ("qkv", "qkv_bias", "join") else 1
    return [tuple(TO_FILE[rule](blank, model, part).shape) for part in range(parts)]


def _advice_on_shape(ours: str, names: Dialect, model: ImageTransformer, report: LoadReport) -> str:
    if ours == PATCH_KERNEL and names.kernel()[1] == 1 != model.config.in_channels:
        return "it is of a model of grey images: take --in_channels 1"
    if model.config.in_channels == 1 and ours.endswith("stem.conv.weight"):
        return ("a hybrid's first kernel cannot be summed over the channels, because its weights are standardised: "
                "take a model without a ResNet, or 3 channels")
    return _advice(names, model, report)


def _positions(names: Dialect, source: str, ours: str, model: ImageTransformer,
               report: LoadReport) -> Callable[[], Tensor]:
    """-> what reads them: (1, prefix + h * w, D) of the model's own grid"""
    shape, prefix = names.shape(source), model.num_prefix_tokens
    patches = shape[1] - prefix if len(shape) == 3 else 0
    grid = _grid_of_run(names.file.run, patches) if names.file.run else _square(patches)
    bare = grid is None and names.bare_positions and len(shape) == 3
    if bare:
        grid = _square(shape[1])
    if len(shape) != 3 or shape[0] != 1 or shape[2] != model.config.hidden_size or grid is None:
        raise ModelError(f"{names.file.path}: {source} has shape {shape}, which does not fit the model's "
                         f"{ours} {tuple(model.pos_embed.shape)}; {_advice(names, model, report)}")
    report.used.append(ours)
    if grid != model.grid:
        report.resized[ours] = f"{grid[0]}x{grid[1]} -> {model.grid[0]}x{model.grid[1]}"

    def convert() -> Tensor:
        table = names.read_view(source).clone()
        if bare:                                              # what stands before the patches gets no position
            table = torch.cat([table.new_zeros(1, prefix, shape[2]), table], dim=1)
        return resize_positions(table, grid, model.grid, model.config.position_resize)

    return convert


def _square(patches: int) -> tuple[int, int] | None:
    """The grid of every file that does not tell its own."""
    side = math.isqrt(max(patches, 0))
    return (side, side) if side > 0 and side * side == patches else None


def _grid_of_run(run: dict, patches: int) -> tuple[int, int] | None:
    """The grid of one of our own checkpoints: it tells its image size."""
    try:
        size, step = run["config"]["img_size"], stride(SimpleNamespace(**run["architecture"]))
        height, width = (size, size) if isinstance(size, int) else size
        grid = height // step, width // step
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return None
    return grid if grid[0] * grid[1] == patches else None
