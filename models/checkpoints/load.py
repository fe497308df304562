"""Loads a checkpoint of any known kind into a model, and rebuilds the models of our own runs.

Every array of the file is used or reported as left out on purpose; every parameter of the model is loaded or reported as newly
initialized. Anything else raises an error with the names. The content of a file, not its name, determines its kind, layout and
grid. All shapes are compared before any array is read.
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

MAX_THREADS = 4          # reading threads: more would only wait for the memory
PATCH_KERNEL, PATCH_BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"


def load_pretrained(model: ImageTransformer, path: Source, head: str = "zero") -> LoadReport:
    """Load the weights of a file, or of an opened one, into `model`.

    head="zero": for a new task. The model's heads are set to zero; the file's heads and `pre_logits` layer are not used.
    head="keep": for the same task. The file's heads are loaded too, and its number of classes must be the model's.
    Raises ModelError (one line, with names) if the file is missing or damaged, or its kind or sizes do not fit the model.
    """
    if head not in ("zero", "keep"):
        raise ModelError(f"head={head!r}: must be 'zero' or 'keep'")
    if head == "zero" and model.config.representation_size:
        raise ModelError("head='zero': a new task starts without a pre_logits layer, but the model has one. Use head='keep'")
    with opened(path) as checkpoint:
        return _fill(model, checkpoint, head)


def load_run(path: Source, build: Callable[[dict, int, int | tuple[int, int]], ImageTransformer]) -> ImageTransformer:
    """Load the model of a checkpoint of one of our runs, in eval mode; `classes` holds its class names.

    build(architecture, number of classes, img_size) makes an empty model. Loads the averaged weights if the run kept them.
    Raises ModelError.
    """
    with opened(path) as checkpoint:
        model = check_own_weights(checkpoint, build)
        model.load_report = _fill(model, checkpoint, "keep")
        model.classes = list(checkpoint.file.run["classes"])
    return model.eval()


def check_own_weights(checkpoint: OpenedCheckpoint, build: Callable) -> ImageTransformer:
    """Return the model of a run on the meta device, so that false claims of a file allocate no memory.

    Raises WeightsError if its weights do not fit its architecture.
    """
    model, file = _build_without_memory(checkpoint, build), checkpoint.file
    check_shapes({name: file.shape(name) for name in file.names}, model.state_dict(), checkpoint.path)
    return model


def _build_without_memory(checkpoint: OpenedCheckpoint, build: Callable) -> ImageTransformer:
    run = checkpoint.file.run
    if run is None:
        raise WeightsError(f"{checkpoint.path}: not a checkpoint of train.py. For other files, use create_model(NAME, "
                           "pretrained=...)")
    size = run["config"].get("img_size")
    try:
        with torch.device("meta"):
            return build(run["architecture"], len(run["classes"]), tuple(size) if isinstance(size, list) else size)
    except ModelError:
        raise
    except Exception as error:               # a false architecture can raise anything
        raise WeightsError(f"{checkpoint.path}: this version of the program cannot build its architecture "
                           f"({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error


def check_fits(model: ImageTransformer, checkpoint: OpenedCheckpoint) -> None:
    """Raise WeightsError if the names and shapes of the file do not fit the model for a new task. Reads no array."""
    _plan(model, checkpoint, "zero")


def _plan(model: ImageTransformer, checkpoint: OpenedCheckpoint, head: str) -> tuple[LoadReport, list[Row], dict[str, Callable]]:
    """Compare the file with the model -> (the report so far, the rows to read, {parameter: function that reads it})."""
    # Shapes show the number of heads only in .npz files; our own files and config.json state it.
    file, layout = checkpoint.file, checkpoint.layout
    heads = (file.run["architecture"] if file.run else file.described.row).get("num_heads")
    if heads not in (None, model.config.num_heads):
        raise WeightsError(f"{file.path}: its model has {heads} attention heads, but the model here has "
                           f"{model.config.num_heads}; {OF_A_RUN if file.run else f'use --num_heads {heads}'}")
    check_pooling(checkpoint, model.config, head == "keep")
    report = LoadReport(str(file.path), fresh=fresh_parameters(layout, model, head), classes=checkpoint.class_names or [],
                        notes=[*file.notes, *file.described.notes, *layout.notes])
    rows = [row for row in layout.rows(model) if row.parameter not in report.fresh]
    check_names(layout, rows, model, report, head)
    return report, rows, {row.parameter: _plan_read(layout, row, model, report) for row in rows}


def _fill(model: ImageTransformer, checkpoint: OpenedCheckpoint, head: str) -> LoadReport:
    file, layout = checkpoint.file, checkpoint.layout
    report, rows, reads = _plan(model, checkpoint, head)
    # Several threads: one reads or computes a checksum while another waits for the disk.
    with ThreadPoolExecutor(min(MAX_THREADS, torch.get_num_threads())) as pool:
        state = dict(zip(reads, pool.map(lambda read: read(), reads.values())))
    left = layout.all - {source for row in rows for source in row.sources}
    old_head, pre_training = left & layout.heads(), list(map(layout.called, layout.pre_training))
    report.replaces_head, report.unused = bool(old_head), sorted(map(layout.called, left - old_head)) + pre_training
    report.left_out = sorted(map(layout.called, left)) + pre_training + layout.others + file.left_out
    if state[PATCH_KERNEL].shape[1] != model.patch_embed.proj.in_channels:
        _fold_channels(state, model, file.path)
        report.notes.append("patch kernel summed over the channels")
    state |= {name: _initial_value(name, model) for name in report.fresh}
    empty = next(model.parameters()).is_meta                    # then the model keeps these tensors, uncopied
    state = {name: value.contiguous() for name, value in state.items()}          # fused optimizers need that order in memory
    model.load_state_dict(state, assign=empty)
    if head == "keep" and not any(model.get_parameter(name).any() for name in model.head_names() if name.endswith("weight")):
        report.notes.append("the file's head is all zero, as in some published ImageNet-21k files: its predictions mean nothing")
    return report


def _fold_channels(state: dict[str, Tensor], model: ImageTransformer, path: object) -> None:
    """Convert a patch kernel for colors to one for grey images, in place of `state`. Raises WeightsError if it has no bias."""
    config = model.config
    if PATCH_BIAS not in state and (len(set(config.channel_mean)) > 1 or config.patch_norm == "around"):
        raise WeightsError(f"{path}: its patch kernel cannot be converted to grey images, because it has no bias to absorb the "
                           "means of its colors. Use 3 channels")
    bias = state.get(PATCH_BIAS, state[PATCH_KERNEL].new_zeros(len(state[PATCH_KERNEL])))
    state[PATCH_KERNEL], bias = fold_channels(state[PATCH_KERNEL], bias, config)
    if PATCH_BIAS in state:
        state[PATCH_BIAS] = bias


def _initial_value(name: str, model: ImageTransformer) -> Tensor:
    """Return the initial value of a parameter that the file lacks.

    Heads and biases are zero, norms are the identity; the query and the matrices of pooling by attention are as SigLIP's.
    """
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
    """Compare the shapes of one row of the table, and return the function that reads its arrays and converts them.

    That function returns new memory. Raises WeightsError if a shape does not fit.
    """
    ours, sources, conversion = row
    if conversion == "position":
        return _plan_positions(layout, row, model, report)
    if conversion == "sincos":
        report.notes.append("positions computed from sines and cosines, as its program does")
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
    """Return the value. Raises WeightsError with its name if it holds NaN or infinity, which training would not report."""
    if not value.sum().isfinite() and not (finite := value.isfinite()).all():      # a sum is faster, and may overflow
        raise WeightsError(f"{path}: {int((~finite).sum())} of the {value.numel()} numbers of {name} are not finite (NaN or "
                           "infinity): its run diverged. Use an earlier checkpoint")
    return value


def check_finite(checkpoint: OpenedCheckpoint) -> None:
    """Read every array of the file, one by one. Raises WeightsError for the first one that is not finite or is damaged."""
    for name in checkpoint.file.names:
        checked_finite(checkpoint.file.read(name), name, checkpoint.path)


def _shapes_in_file(parameter: Tensor, conversion: str, model: ImageTransformer) -> list[tuple[int, ...]]:
    blank, parts = torch.empty_like(parameter, device="meta"), PARTS.get(conversion, 1)
    return [tuple(CONVERSIONS[conversion].to_file(blank, model, part).shape) for part in range(parts)]


# The number of arrays in a file that make up one parameter; 1 for other conversions.
PARTS = {"qkv": 3, "qkv_bias": 3, "join": 3, "halves": 2, "kv": 2, "kv_bias": 2}


def _advise_on_shape(ours: str, layout: Layout, model: ImageTransformer, report: LoadReport) -> str:
    if ours == PATCH_KERNEL and layout.kernel()[1] == 1 != model.config.in_channels:
        return "it belongs to a model for grey images: use --in_channels 1"
    if model.config.in_channels == 1 and ours.endswith("stem.conv.weight"):
        return ("a hybrid's first kernel cannot be summed over the channels, because its weights are standardized: "
                "use a model without a ResNet, or 3 channels")
    return advise(layout, model, report)


def _plan_positions(layout: Layout, row: Row, model: ImageTransformer, report: LoadReport) -> Callable[[], Tensor]:
    """Return the function that reads the position table, (1, prefix + h * w, D), resized to the model's grid."""
    (source,), run = row.sources, layout.file.run
    shape, folded = layout.shape(source), int(layout.folded)
    prefix = model.pos_embed.shape[1] - math.prod(model.grid)
    patches = shape[1] - folded - prefix if len(shape) == 3 else 0
    grid = (_grid_of_run(run, patches) if run else
            _grid_of_config(layout.file.described.row, model, patches) or _square_grid(patches))
    if grid is None and not run and patches == math.prod(model.grid):          # not square, but it fits the requested img_size
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
        if bare:                                              # the tokens before the patches have no position
            table = torch.cat([table.new_zeros(1, prefix, shape[2]), table], dim=1)
        return resize_positions(table[:, folded:], grid, model.grid, model.config.position_resize)

    return read


def _plan_fold(layout: Layout, row: Row, model: ImageTransformer, report: LoadReport) -> Callable[[], Tensor]:
    """Return the function that reads the cls token and adds the first row of the position table to it."""
    shapes, size = [layout.shape(source) for source in row.sources], tuple(model.cls_token.shape)
    if shapes[0] != size or len(shapes[1]) != 3 or shapes[1][2] != size[2]:
        raise WeightsError(f"{layout.file.path}: {row.sources[0]} {shapes[0]} and {row.sources[1]} {shapes[1]} do not fit the "
                           f"model's {row.parameter} {size}; {advise(layout, model, report)}")
    report.used.append(row.parameter)
    report.notes.append("the cls token includes its position")

    def read() -> Tensor:
        token, table = (checked_finite(layout.read_view(source).clone(), source, layout.file.path) for source in row.sources)
        return token + table[:, :1]

    return read


def _square_grid(patches: int) -> tuple[int, int] | None:
    """Return the square grid of so many patches, or None if their number is not a square."""
    side = math.isqrt(max(patches, 0))
    return (side, side) if side > 0 and side * side == patches else None


def _grid_of_config(row: dict, model: ImageTransformer, patches: int) -> tuple[int, int] | None:
    """Return the grid for the image size of the file's config.json, or None if it does not give so many patches."""
    size = row.get("img_size", 0)
    height, width = (size, size) if isinstance(size, int) else size
    grid = height // stride(model.config), width // stride(model.config)
    return grid if grid[0] * grid[1] == patches > 0 else None


def _grid_of_run(run: dict, patches: int) -> tuple[int, int] | None:
    """Return the grid for the image size of one of our own checkpoints, or None if it does not give so many patches."""
    try:
        size, step = run["config"]["img_size"], stride(SimpleNamespace(**run["architecture"]))
        height, width = (size, size) if isinstance(size, int) else size
        grid = height // step, width // step
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return None
    return grid if grid[0] * grid[1] == patches else None
