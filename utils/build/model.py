"""Config -> the model: its architecture, where its weights come from, its device and number type, compiled or not."""

import dataclasses
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

import configs
from models import create_model
from models.base import ImageTransformer
from models.checkpoints.hub import FREE
from models.checkpoints.load import checked_finite
from models.checkpoints.published import page_of_file
from models.checkpoints.run_fields import check_shapes
from models.create import resolve_row
from models.kinds import brief
from models.match import describe_row, model_name
from utils import distributed, launch
from utils.config import (
    SIZES,
    Config,
    ConfigError,
    Facts,
    describe_length,
    describe_memory,
    describe_view,
    length_warnings,
    model_overrides,
    scratch_warnings,
    view_notes,
    why_this_model,
)
from utils.config.records import CHECKPOINT, DEFAULT, START
from utils.data.classes import first_names
from utils.data.datasets import data_name
from utils.data.splits import Splits
from utils.data.transforms import normalize
from utils.device import describe_device
from utils.distributed import Ranks
from utils.training.precision import Precision, apply_matmul_precision, choose

from .find import Found, SavedRun
from .opened import Opened, given_by

LICENSE_TEXTS = {"cc-by-nc-4.0": "https://creativecommons.org/licenses/by-nc/4.0/",
                 "dinov3-license": "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"}


@dataclasses.dataclass(frozen=True)
class Built:
    """A model on its device, the number types that it computes with, and its teacher."""

    model: ImageTransformer
    precision: Precision
    teacher: Opened | None = None

    def normalize(self, images: Tensor) -> Tensor:
        """images (B, C, height, width) of 0..255 on the device -> the model's input"""
        return normalize(images, self.model.config.mean, self.model.config.std, self.precision.weights)


def build_model(config: Config, found: Found, saved: SavedRun | None, ranks: Ranks) -> Built:
    """Raise ConfigError on every rank."""
    with given_by("--pretrained_dir" if saved is None else "--resume_path", found.start):
        model = distributed.local_main_first(ranks, lambda: _create(config, found, saved))
    if found.start:
        found.start.close()                                  # the model has copied what it needs
    if saved is None and config.head == "keep":
        _check_classes(config, model, found)
    chosen_here = config.source("precision") == DEFAULT
    precision, why = choose("auto" if chosen_here else config.precision, config.fp16_opt_level, ranks.device)
    if config.source("precision") == CHECKPOINT:
        why = why.replace("requested", "as the run began")
    apply_matmul_precision(precision)
    if config.exact:
        from utils.training.exact import set_deterministic

        set_deterministic(ranks.device)
    elif saved and saved.state.threads and saved.state.world_size == ranks.size and ranks.device.type == "cpu":
        torch.set_num_threads(saved.state.threads)           # another number sums in another order
    model = model.to(ranks.device, precision.weights)
    if config.compile:
        compile_model(model, ranks.device)
    if ranks.is_main:
        _print_introduction(config, found, saved, ranks, model, f"{precision.name} ({why})")
    return Built(model, precision, found.teacher)


def _create(config: Config, found: Found, saved: SavedRun | None) -> ImageTransformer:
    torch.manual_seed(config.seed)
    classes = found.facts.num_classes
    if saved is None:
        return create_model(config.model_type, classes, config.img_size, found.start, config.head, **model_overrides(config))
    # On the meta device no memory is allocated before the weights of the file are known to have the sizes that it claims.
    with torch.device("meta"):
        model = create_model(configs.architecture(**saved.state.architecture), classes, config.img_size)
    for weights in (saved.state.model, saved.state.ema)[:1 + bool(saved.state.ema)]:
        check_shapes({name: value.shape for name, value in weights.items()}, model.state_dict(), saved.opened.path)
        for name, value in weights.items():
            checked_finite(value, name, saved.opened.path)
    model = model.to_empty(device="cpu")
    model.load_state_dict((saved.state.ema if config.eval_only else {}) or saved.state.model)
    return model


def _check_classes(config: Config, model: ImageTransformer, found: Found) -> None:
    known, own = list(model.load_report.classes), list(found.splits.classes)
    if config.dataset == "imagenet" and found.start.settings is None:
        return                              # other programs spell the 1,000 names differently, in the same order
    if known not in ([], own):
        raise ConfigError(f"--pretrained_dir {config.pretrained_dir}: its classes ({first_names(known)}) are not those of "
                          f"the data ({first_names(own)}): not the same task. Use other weights, or --head zero")


def compile_model(model: torch.nn.Module, device: torch.device) -> None:
    """Set the model to compile at its first call with each size. Raises ConfigError where PyTorch cannot compile."""
    on_gpu = device.type == "cuda"
    if not on_gpu:                          # PyTorch's builds for GPUs would warn that there is none
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        torch.compile(lambda numbers: numbers + 1)(torch.zeros(2, device=device))
    except Exception as error:              # Dynamo, Inductor and the compilers that they call raise many kinds
        inner = getattr(error, "inner_exception", error)
        reason = f"{type(inner).__name__}: {(str(inner).strip().splitlines() or [''])[0][:200]}"
        raise ConfigError(f"--compile: PyTorch cannot compile here ({reason}); it needs a C++ compiler such as g++"
                          f"{' and Triton' * on_gpu}. Install it, or omit --compile") from error
    model.compile(dynamic=False)


def _print_introduction(config: Config, found: Found, saved: SavedRun | None, ranks: Ranks, model: ImageTransformer,
                        precision: str) -> None:
    """Print the device, the data, the model, its weights and how images are seen."""
    splits, size = found.splits, "x".join(map(str, model.img_size))
    print(f"device: {ranks.size} x {describe_device(ranks.device)}\nprecision: {precision}")
    prepared = f" (prepared, the shorter side {splits.prepared} px at most)" if splits.prepared else ""
    print(f"data: {data_name(config.dataset, config.data_dir)}{prepared}, {describe_sizes(splits)}")
    for note in splits.notes:
        print(note)
    if config.eval_only and not (saved or found.facts.start_names_classes):
        print(describe_outputs(splits.classes))
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {describe_model(config, found.facts)} at {size} px, {count:,} parameters\n"
          f"weights: {_source_of_weights(config, saved, model)}", flush=True)
    if not saved and (why := why_this_model(config, found.facts)):
        print(why, flush=True)
    if line := describe_license(found.license, found.start and str(found.start.path)):
        print(line, flush=True)
    if not config.eval_only:
        new = [] if saved else [*scratch_warnings(config, found.facts), *describe_memory(config, found.facts)]
        print("\n".join([f"length: {describe_length(config, found.facts)}", *new, *length_warnings(config, found.facts)]),
              flush=True)
    print("\n".join([f"images: {describe_view(config, splits.can_flip)}", *view_notes(config, found.facts)]), flush=True)
    if found.seen:
        print(found.seen, flush=True)
    if 0 < splits.prepared < max(model.img_size):
        print(f"warning: the images were prepared for less than the model's {size} px: they are enlarged; prepare them with "
              f"{launch.command('dataset.py')} prepare --size {int(max(model.img_size) / 0.875)}", flush=True)


def describe_sizes(splits: Splits) -> str:
    """'10 classes, 1097 images to train on, 200 val, 500 test'"""
    classes, train = len(splits.classes), len(splits.train)
    parts = [f"{classes} class{'es' * (classes != 1)}", *[f"{train} image{'s' * (train != 1)} to train on"] * bool(train)]
    return ", ".join([*parts, *(f"{len(split)} {name}" for name, split in splits.held_out.items())])


def _other_than_configured(config: Config, architecture: dict) -> list[str]:
    """Return the keys in which the checkpoint's model differs from the settings and the row in configs.py: those that came with
    another program's weights."""
    if config.model_type not in configs.MODELS:
        return []
    row = resolve_row(config.model_type, model_overrides(config))
    own = resolve_row(configs.architecture(**architecture), {})
    return [f"{key} {brief(own[key])}" for key in row if key != "img_size" and own[key] != row[key]]


def describe_model(config: Config, facts: Facts) -> str:
    """Return the name of the model, and what differs in the start weights from their row of configs.py."""
    if facts.start_row and config.source("model_type") == START and "hidden_size" not in facts.start_row:
        own = {key: facts.start_row[key] for key in ("classifier", "registers") if key in facts.start_row}
        return f"{config.model_type}, as the file says ({describe_row(config.model_type, own, facts.start_row.get('img_size'))})"
    if config.model_type not in configs.MODELS:                  # of a resumed run whose row has gone
        return config.model_type
    pools = f" with classifier {config.classifier}" if facts.start_row and config.source("classifier") == START else ""
    return model_name(config.model_type, resolve_row(config.model_type, model_overrides(config))) + pools


def describe_license(license: str, path: str | None) -> str:
    """Return a line for published weights whose license is unknown, or is not Apache's, MIT's or BSD's; else ""."""
    page = page_of_file(path) if path else ""
    if FREE.match(license) or not (license or page):
        return ""
    where = page or LICENSE_TEXTS.get(license.lower(), "")
    return (f"licence: the start weights are under {license}{f' ({where})' if where else ''}: read what it allows for models "
            "made from them" if license else f"licence: that of the start weights is not known; see {page}")


def describe_outputs(classes: Sequence[str]) -> str:
    """Return a line on the classes that the outputs of a head without names are taken to be."""
    numbers = first_names([str(label) for label in range(len(classes))])
    return f"classes: the head does not name them; its outputs {numbers} are taken to be {first_names(classes)}"


def _source_of_weights(config: Config, saved: SavedRun | None, model: ImageTransformer) -> str:
    if saved:
        others = _other_than_configured(config, saved.state.architecture)
        return "from the checkpoint" + (f", whose model is not that of configs.py: {', '.join(others)}" if others else "")
    own_size = [f"--{key} {config.to_dict()[key]}" for key in SIZES if config.to_dict()[key] is not None]
    unpublished = f" (there are no published weights for {' '.join(own_size)})" if own_size else ""
    return str(model.load_report or f"from scratch{unpublished}")
