"""Builds models: with initial values, with the weights of a file, or from a checkpoint of train.py."""

import contextlib
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict

from configs import MODELS, architecture

from .base import ImageTransformer
from .cait import CaiT
from .checkpoints.description import COMPUTED
from .checkpoints.fit import may_read_either
from .checkpoints.hub import did_you_mean, published_file
from .checkpoints.infer import SIZES
from .checkpoints.load import check_fits, check_own_weights, load_pretrained, load_run
from .checkpoints.opened import OpenedCheckpoint
from .checkpoints.published import find_checkpoint
from .deit import DistilledVisionTransformer
from .errors import ModelError
from .kinds import brief
from .match import AmbiguousError, match_row
from .sigmoid_attention import use_sigmoid_attention
from .vit import VisionTransformer

# Keys of a row that flags set: where the caller names the row, the caller's values count, not those found in the file.
FLAG_KEYS = (*SIZES, "num_heads", "classifier", "in_channels", "img_size")


def create_model(name_or_config: str | ConfigDict | None = None, num_classes: int | None = None,
                 img_size: int | tuple[int, int] | None = None, pretrained: str | Path | OpenedCheckpoint | None = None,
                 head: str = "zero", initialise: bool = True, **overrides) -> ImageTransformer:
    """Build a model in training mode. `model(images)` returns logits (B, num_classes).

    name_or_config: a name from list_models(); the name of a published file, such as one of timm's, which selects its model; a
                    row of configs.MODELS, or one made with configs.architecture; None: the model and image size of `pretrained`.
    num_classes:    default 1000; with head="keep", the number of classes of the file's head.
    img_size:       side or (height, width) in pixels; default: the row's.
    pretrained:     a checkpoint file, a folder saved by timm or transformers, an OpenedCheckpoint, or a published name, which
                    is looked for in ./checkpoint and downloaded if it is not there.
    head:           "zero" starts a new task with a head of zeros; "keep" loads the file's head (and its pre_logits layer).
    initialise:     False leaves the parameters uninitialized, for a caller who loads all of them (load_state_dict).
    overrides:      other values for keys of the row, such as dropout_rate=0.1. For GELU, eps, mean and std: an override wins over
                    what the file's program computes, which wins over the row.

    model.load_report lists the parameters that were loaded, resized or newly initialized, and the arrays that were not used
    (None without `pretrained`). Raises ModelError if a model or file does not exist or the parts do not fit each other.
    """
    _check_arguments(name_or_config, pretrained, head)
    if pretrained is not None and not isinstance(pretrained, OpenedCheckpoint):
        resolve_row("ViT-B_16" if name_or_config is None else name_or_config, overrides)       # before a file is downloaded
        with OpenedCheckpoint(find_checkpoint(pretrained)) as opened:
            return create_model(name_or_config, num_classes, img_size, opened, head, initialise, **overrides)
    own = {}
    if name_or_config is None:
        name_or_config, own, img_size = _row_of_file(pretrained, img_size, overrides)
    plain = resolve_row(name_or_config, overrides)
    config = plain
    if pretrained is not None:                              # its GELU, eps, mean and std are part of the weights
        if not own:
            pretrained.expect(config.img_size if img_size is None else img_size, config.positions)
        own = own or _parts_of_file(pretrained, name_or_config, head)
        config = resolve_row(name_or_config, own | pretrained.computed | overrides)
    if head == "keep":
        if not isinstance(name_or_config, ConfigDict) and "classifier" not in overrides and may_read_either(pretrained, config):
            raise ModelError(f"{pretrained.path}: it does not say whether its head reads the cls token or the mean of the "
                             "patches. Add --classifier token or --classifier mean, or name the file or its folder after timm's "
                             "architecture, such as vit_small_patch16_dinov3")
        num_classes = pretrained.head_classes if num_classes is None else num_classes
        config.representation_size = pretrained.representation_size
    num_classes, size = _plain(num_classes), _plain(config.img_size if img_size is None else img_size)
    size = (size, size) if isinstance(size, int) else tuple(size)
    family = CaiT if config.class_layers else DistilledVisionTransformer if config.distilled else VisionTransformer
    # Drawing initial values takes longer than reading the file that would replace them.
    with contextlib.nullcontext() if initialise and pretrained is None else torch.device("meta"):
        model = family(config, 1000 if num_classes is None else num_classes, size)
    use_sigmoid_attention(model, config.sigmoid_attention)
    model.load_report = load_pretrained(model, pretrained, head) if pretrained is not None else None
    changed = [f"{key} {config[key]}" for key in COMPUTED if config[key] != plain[key]]
    if changed:
        model.load_report.notes.append(f"settings of the program that wrote the file: {', '.join(changed)}")
    return model if initialise or pretrained is not None else model.to_empty(device="cpu")


def _check_arguments(name_or_config: object, pretrained: object, head: str) -> None:
    """Raise ModelError for values that create_model does not take."""
    if isinstance(pretrained, bool):
        raise ModelError(f"pretrained={pretrained}: must be a file, a folder or a published name, such as "
                         f"pretrained='vit_small_patch14_dinov2', or None")
    if head not in ("zero", "keep"):
        raise ModelError(f"head={head!r}: must be 'zero' or 'keep'")
    if name_or_config is None and pretrained is None:
        raise ModelError("create_model needs the name of a model, or pretrained=..., the file of one")
    if head == "keep" and pretrained is None:
        raise ModelError("head='keep' needs pretrained=..., the file whose head is kept")


def _row_of_file(file: OpenedCheckpoint, img_size: int | tuple[int, int] | None, overrides: dict
                 ) -> tuple[str | ConfigDict, dict, int | tuple[int, int] | None]:
    """Return (the row of a file or its name, the keys that differ from it, the image size).

    Raises ModelError if the file leaves something open that a model needs.
    """
    if file.file.run:
        size = file.settings.get("img_size")
        return architecture(**file.file.run["architecture"]), {}, img_size or (tuple(size) if isinstance(size, list) else size)
    name, keys = match_row(file, num_heads=overrides.get("num_heads"))
    if "hidden_size" in keys and not {"num_heads"} & (keys.keys() | overrides.keys()):
        heads = max(1, keys["hidden_size"] // 64)
        raise ModelError(f"{file.path}: no known model has its sizes ({file.layout.describe()}), and it does not say how many "
                         "attention heads it has. Most models have one for 64 columns of the width: add "
                         f"num_heads={heads} (--num_heads), if that is so here")
    return name, keys, img_size or file.row.get("img_size")


def _parts_of_file(file: OpenedCheckpoint, name_or_config: str | ConfigDict, head: str) -> dict:
    """Return the keys in which the file differs from the row that the caller named, as far as no flag sets them.

    {} if the file belongs to another row. Sizes and classifier are the caller's, except that a kept head reads what its
    config.json says.
    """
    if file.file.run or not isinstance(name_or_config, str):
        return {}
    try:
        name, keys = match_row(file, name_or_config)
    except AmbiguousError:                                  # between other rows than the named one
        return {}
    if name != name_or_config:
        return {}
    from_file = {"classifier"} if head == "keep" and file.file.described.pool else set()
    return {key: value for key, value in keys.items() if key not in FLAG_KEYS or key in from_file}


def load_run_model(path: str | Path | OpenedCheckpoint) -> ImageTransformer:
    """Load the model of a run of train.py (output/NAME/best.pt), in eval mode; `classes` holds its class names.

    Loads the averaged weights if the run kept them (--ema_decay). Raises ModelError.
    """
    return load_run(path, _build_of_run)


def check_weights(opened: OpenedCheckpoint, row: ConfigDict, img_size: int | tuple[int, int]) -> None:
    """Raise WeightsError if the file's weights do not fit a model of this row. Allocates no parameters."""
    with torch.device("meta"):
        check_fits(create_model(row, img_size=img_size), opened)


def check_weights_of_run(opened: OpenedCheckpoint) -> None:
    """Raise WeightsError if the weights of a run's checkpoint do not fit its architecture. Allocates no parameters."""
    check_own_weights(opened, _build_of_run)


def _build_of_run(row: dict, classes: int, img_size: int | tuple[int, int]) -> ImageTransformer:
    return create_model(architecture(**row), classes, img_size)


def _plain(value: object) -> object:
    """Convert NumPy scalars, which computed values often are, to Python's: rows and files hold only those."""
    if isinstance(value, (tuple, list)):
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def resolve_row(name_or_config: str | ConfigDict, overrides: dict) -> ConfigDict:
    """Return a copy of the row with the overrides applied; for one channel, `mean` and `std` are averaged over the colors.

    Raises ModelError for an unknown name or key, or a value of another type.
    """
    if isinstance(name_or_config, str):
        known = None if name_or_config in MODELS else published_file(name_or_config)
        if name_or_config not in MODELS and not (known and known.model):
            raise ModelError(f"unknown model {name_or_config!r}.{did_you_mean(name_or_config)} list_models() returns all names; "
                             "MODEL_ZOO.md lists those of published files too")
        name_or_config = MODELS[known.model if known else name_or_config]
        overrides = {"img_size": known.pixels} | overrides if known else overrides
    config = name_or_config.copy_and_resolve_references()
    with config.ignore_type():                               # the row may hold NumPy scalars
        config.update({key: _plain(value) for key, value in config.items()})
    unknown = set(overrides) - set(config)
    if unknown:
        raise ModelError(f"unknown keys {', '.join(sorted(unknown))}; a model's row has {', '.join(sorted(config))}")
    for key, value in overrides.items():
        try:
            config[key] = _plain(value)
        except TypeError as error:
            raise ModelError(f"{key}={brief(value)}: must have the type of the row's value, {config[key]!r}") from error
    if config.in_channels == 1 and len(config.mean) == 3:
        config.channel_mean, config.channel_std = config.mean, config.std
        config.mean, config.std = (sum(config.mean) / 3,), (sum(config.std) / 3,)
    return config
