"""Fills a model from a checkpoint of any known kind, and rebuilds the models of our own runs.

Every array of the file is used, or reported as left out on purpose; every parameter of the model is filled, or reported as
freshly initialized. Anything else is an error with the names in it. The content of a file decides its kind, layout and grid;
its name is not trusted. Nothing is read whose shape does not fit.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch
from torch import Tensor

from models.base import ImageTransformer, stride
from models.errors import ModelError, WeightsError
from models.layers import resize_positions

from .conversions import CONVERSIONS, Row, fold_channels, sincos_positions
from .fit import OF_A_RUN, POOL, LoadReport, advise, check_names, check_pooling, fresh_parameters
from .layout import Layout
from .opened import OpenedCheckpoint, Source, opened
from .run_fields import check_shapes

MAX_THREADS = 4          # that read: a few are faster than the memory
PATCH_KERNEL, PATCH_BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"


def load_pretrained(model: ImageTransformer, path: Source, head: str = "zero") -> LoadReport:
    """Fills `model` from a file, or from an opened one.

    head="zero": a new task. The file's heads and its `pre_logits` layer are left out, the model's heads are set to
    zero. head="keep": the same task. All are taken, and the class count must agree.
    Raises ModelError (one line, with names) if the file is missing, damaged, of another kind or another size.
    """
    if head not in ("zero", "keep"):
        raise ModelError(f"head={head!r}: must be 'zero' or 'keep'")
    if head == "zero" and model.config.representation_size:
        raise ModelError("a model with pre_logits can only be filled with head='keep': a new task starts without that layer")
    with opened(path) as checkpoint:
        return _fill(model, checkpoint, head)


def load_run(path: Source, build: Callable[[dict, int, int | tuple[int, int]], ImageTransformer]) -> ImageTransformer:
    """The model of a checkpoint of one of our runs, in eval mode, with `classes`, the names of its classes.

    build(architecture, number of classes, img_size) makes an empty model. The averaged weights are taken where the
    run kept them. Raises ModelError.
    """
    with opened(path) as checkpoint:
        model = check_own_weights(checkpoint, build)
        model.load_report = _fill(model, checkpoint, "keep")
        model.classes = list(checkpoint.file.run["classes"])
    return model.eval()


def check_own_weights(checkpoint: OpenedCheckpoint, build: Callable) -> ImageTransformer:
    """The model of a run, on the meta device: a file's claims about itself take no memory. Raises WeightsError."""
    model, file = _build_without_memory(checkpoint, build), checkpoint.file
    check_shapes({name: file.shape(name) for name in file.names}, model.state_dict(), checkpoint.path)
    return model


def _build_without_memory(checkpoint: OpenedCheckpoint, build: Callable) -> ImageTransformer:
    run = checkpoint.file.run
    if run is None:
        raise WeightsError(f"{checkpoint.path}: no checkpoint of a run of train.py; use create_model(NAME, pretrained=...) for "
                           "other files")
    size = run["config"].get("img_size")
    try:
        with torch.device("meta"):
            return build(run["architecture"], len(run["classes"]), tuple(size) if isinstance(size, list) else size)
    except ModelError:
        raise
    except Exception as error:               # what is raised depends on what the file claims
        raise WeightsError(f"{checkpoint.path}: this version of the program cannot build its architecture "
                           f"({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error


def check_fits(model: ImageTransformer, checkpoint: OpenedCheckpoint) -> None:
    """Raises WeightsError where the file cannot fill the model for a new task, by its names and shapes. Reads no array."""
    _plan(model, checkpoint, "zero")


def _plan(model: ImageTransformer, checkpoint: OpenedCheckpoint, head: str) -> tuple[LoadReport, list[Row], dict[str, Callable]]:
    """-> (the report so far, the rows that are read, {parameter: what reads it})."""
    # The shapes of an .npz file fix the number of heads, those of others do not; but our own files and config.json name it.
    file, layout = checkpoint.file, checkpoint.layout
    heads = (file.run["architecture"] if file.run else file.described.row).get("num_heads")
    if heads not in (None, model.config.num_heads):
        raise WeightsError(f"{file.path}: its model has {heads} attention heads, the model here {model.config.num_heads}; "
                           f"{OF_A_RUN if file.run else f'use --num_heads {heads}'}")
    check_pooling(checkpoint, model.config, head == "keep")
    report = LoadReport(str(file.path), fresh=fresh_parameters(layout, model, head), classes=checkpoint.class_names or [],
                        notes=[*file.notes, *file.described.notes, *layout.notes])
    rows = [row for row in layout.rows(model) if row.parameter not in report.fresh]
    check_names(layout, rows, model, report, head)
    return report, rows, {row.parameter: _plan_read(layout, row, model, report) for row in rows}


def _fill(model: ImageTransformer, checkpoint: OpenedCheckpoint, head: str) -> LoadReport:
    file, layout = checkpoint.file, checkpoint.layout
    report, rows, reads = _plan(model, checkpoint, head)
    # By several threads: reading, check sums and copies wait for the disk and the memory, not for each other.
    with ThreadPoolExecutor(min(MAX_THREADS, torch.get_num_threads())) as pool:
        state = dict(zip(reads, pool.map(lambda read: read(), reads.values())))
    left = layout.all - {source for row in rows for source in row.sources}
    old_head, before = left & layout.heads(), list(map(layout.called, layout.pre_training))
    report.replaces_head, report.unused = bool(old_head), sorted(map(layout.called, left - old_head)) + before
    report.left_out = sorted(map(layout.called, left)) + before + layout.beside + file.left_out
    if state[PATCH_KERNEL].shape[1] != model.patch_embed.proj.in_channels:
        _fold_channels(state, model, file.path)
        report.notes.append("patch kernel summed over the channels")
    state |= {name: _initial(name, model) for name in report.fresh}
    empty = next(model.parameters()).is_meta                    # it takes what was read in place of a copy
    state = {name: value.contiguous() for name, value in state.items()}          # fused optimizers know no other order
    model.load_state_dict(state, assign=empty)
    if head == "keep" and not any(model.get_parameter(name).any() for name in model.head_names() if name.endswith("weight")):
        report.notes.append("the file's head is all zero, as in some published ImageNet-21k files: its logits carry "
                            "no information")
    return report


def _fold_channels(state: dict[str, Tensor], model: ImageTransformer, path: object) -> None:
    """The patch kernel of colors for grey images."""
    config = model.config
    if PATCH_BIAS not in state and (len(set(config.channel_mean)) > 1 or config.patch_norm == "around"):
        raise WeightsError(f"{path}: its patch kernel has no bias, which would take up the means of its colors: use 3 channels")
    bias = state.get(PATCH_BIAS, state[PATCH_KERNEL].new_zeros(len(state[PATCH_KERNEL])))
    state[PATCH_KERNEL], bias = fold_channels(state[PATCH_KERNEL], bias, config)
    if PATCH_BIAS in state:
        state[PATCH_BIAS] = bias


def _initial(name: str, model: ImageTransformer) -> Tensor:
    """The initial values of a parameter that a new task brings: zero heads and biases, norms that change nothing, and the query
    and the matrices of pooling by attention as SigLIP's."""
    value = torch.zeros(model.get_parameter(name).shape)
    if name.endswith("norm.weight"):
        return value.fill_(1.0)
    if not name.startswith(f"{POOL}.") or value.dim() < 2:
        return value
    for part in value.chunk(2) if name == f"{POOL}.kv.weight" else [value.flatten(0, -2)]:     # keys and values are two layers
        torch.nn.init.xavier_uniform_(part)
    return value


# ---------------------------------------------------------------------------------------------- shapes, then arrays


def _plan_read(layout: Layout, row: Row, model: ImageTransformer, report: LoadReport) -> Callable[[], Tensor]:
    """-> what reads the arrays of one row and converts them, to memory of its own. Shapes are compared here, from the
    headers: those of all rows before anything is read."""
    ours, sources, conversion = row
    if conversion == "position":
        return _plan_positions(layout, row, model, report)
    if conversion == "sincos":
        report.notes.append("positions computed, as its program does: sines and cosines")
        return lambda: sincos_positions(model.grid, model.config.hidden_size)
    if conversion == "fold":
        return _plan_fold(layout, row, model, report)
    parameter, shapes = model.get_parameter(ours), [layout.shape(source) for source in sources]
    expected = _shapes_in_file(parameter, conversion, model)
    misfits = [part for part, shape in enumerate(shapes) if shape != expected[part]]
    if misfits and ours == PATCH_KERNEL and model.config.in_channels == 1 and parameter.shape[1] == 1:
        color = torch.empty_like(parameter, device="meta").repeat_interleave(3, dim=1)
        misfits = [0] if shapes != _shapes_in_file(color, conversion, model) else []
    if misfits:
        raise WeightsError(f"{layout.file.path}: {sources[misfits[0]]} has shape {shapes[misfits[0]]}, which does not fit the "
                           f"model's {ours} {tuple(parameter.shape)}; {_advise_on_shape(ours, layout, model, report)}")
    report.used.append(ours)
    size = parameter.shape if ours != PATCH_KERNEL else (len(parameter), layout.kernel()[1], *parameter.shape[2:])

    def read() -> Tensor:
        value = torch.empty(size)
        for part, source in zip(value.chunk(len(sources)), sources):
            part.copy_(CONVERSIONS[conversion].from_file(layout.read_view(source)))
            layout.release(source)
        return checked_finite(value, ", ".join(sources), layout.file.path)

    return read


def checked_finite(value: Tensor, name: str, path: object) -> Tensor:
    """The value. Raises WeightsError with the name of an array that holds NaN or infinity: it would be trained on in silence."""
    if not value.sum().isfinite() and not (finite := value.isfinite()).all():      # a sum is faster, and may overflow
        raise WeightsError(f"{path}: {int((~finite).sum())} of the {value.numel()} numbers of {name} are not finite (NaN or "
                           "infinity): its run diverged. Use an earlier checkpoint")
    return value


def check_finite(checkpoint: OpenedCheckpoint) -> None:
    """Reads every array of the file, one by one. Raises WeightsError for the first that is not finite, or is damaged."""
    for name in checkpoint.file.names:
        checked_finite(checkpoint.file.read(name), name, checkpoint.path)


def _shapes_in_file(parameter: Tensor, conversion: str, model: ImageTransformer) -> list[tuple[int, ...]]:
    blank, parts = torch.empty_like(parameter, device="meta"), PARTS.get(conversion, 1)
    return [tuple(CONVERSIONS[conversion].to_file(blank, model, part).shape) for part in range(parts)]


# Arrays of a file that are one parameter, where it is not one.
PARTS = {"qkv": 3, "qkv_bias": 3, "join": 3, "halves": 2, "kv": 2, "kv_bias": 2}


def _advise_on_shape(ours: str, layout: Layout, model: ImageTransformer, report: LoadReport) -> str:
    if ours == PATCH_KERNEL and layout.kernel()[1] == 1 != model.config.in_channels:
        return "it is of a model of grey images: use --in_channels 1"
    if model.config.in_channels == 1 and ours.endswith("stem.conv.weight"):
        return ("a hybrid's first kernel cannot be summed over the channels, because its weights are standardized: "
                "use a model without a ResNet, or 3 channels")
    return advise(layout, model, report)


def _plan_positions(layout: Layout, row: Row, model: ImageTransformer, report: LoadReport) -> Callable[[], Tensor]:
    """-> what reads them: (1, prefix + h * w, D) of the model's own grid"""
    (source,), run = row.sources, layout.file.run
    shape, folded = layout.shape(source), int(layout.folded)
    prefix = model.pos_embed.shape[1] - math.prod(model.grid)
    patches = shape[1] - folded - prefix if len(shape) == 3 else 0
    grid = _grid_of_run(run, patches) if run else _said_grid(layout.file.described.row, model, patches) or _square_grid(patches)
    if grid is None and not run and patches == math.prod(model.grid):          # of the images that whoever names the model names
        grid = model.grid
    bare = grid is None and layout.bare_positions and len(shape) == 3
    if bare:
        grid = _square_grid(shape[1])
    if len(shape) != 3 or shape[0] != 1 or shape[2] != model.config.hidden_size or grid is None:
        raise WeightsError(f"{layout.file.path}: {source} has shape {shape}, which does not fit the model's "
                           f"{row.parameter} {tuple(model.pos_embed.shape)}; {advise(layout, model, report)}")
    report.used.append(row.parameter)
    if grid != model.grid:
        report.resized[row.parameter] = f"{grid[0]}x{grid[1]} -> {model.grid[0]}x{model.grid[1]}"

    def read() -> Tensor:
        table = checked_finite(layout.read_view(source).clone(), source, layout.file.path)
        if bare:                                              # the tokens before the patches get no position
            table = torch.cat([table.new_zeros(1, prefix, shape[2]), table], dim=1)
        return resize_positions(table[:, folded:], grid, model.grid, model.config.position_resize)

    return read


def _plan_fold(layout: Layout, row: Row, model: ImageTransformer, report: LoadReport) -> Callable[[], Tensor]:
    """-> what reads the cls token, and adds the first row of the table of positions"""
    shapes, size = [layout.shape(source) for source in row.sources], tuple(model.cls_token.shape)
    if shapes[0] != size or len(shapes[1]) != 3 or shapes[1][2] != size[2]:
        raise WeightsError(f"{layout.file.path}: {row.sources[0]} {shapes[0]} and {row.sources[1]} {shapes[1]} do not fit the "
                           f"model's {row.parameter} {size}; {advise(layout, model, report)}")
    report.used.append(row.parameter)
    report.notes.append("the position of the cls token added to it")

    def read() -> Tensor:
        token, table = (checked_finite(layout.read_view(source).clone(), source, layout.file.path) for source in row.sources)
        return token + table[:, :1]

    return read


def _square_grid(patches: int) -> tuple[int, int] | None:
    """The grid of every file that does not name its own."""
    side = math.isqrt(max(patches, 0))
    return (side, side) if side > 0 and side * side == patches else None


def _said_grid(row: dict, model: ImageTransformer, patches: int) -> tuple[int, int] | None:
    """The grid of a file beside which a config.json names the size of the images."""
    size = row.get("img_size", 0)
    height, width = (size, size) if isinstance(size, int) else size
    grid = height // stride(model.config), width // stride(model.config)
    return grid if grid[0] * grid[1] == patches > 0 else None


def _grid_of_run(run: dict, patches: int) -> tuple[int, int] | None:
    """The grid of one of our own checkpoints, from its image size."""
    try:
        size, step = run["config"]["img_size"], stride(SimpleNamespace(**run["architecture"]))
        height, width = (size, size) if isinstance(size, int) else size
        grid = height // step, width // step
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return None
    return grid if grid[0] * grid[1] == patches else None
