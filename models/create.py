"""Building models: an empty one, one filled from a file, one of our own runs."""

import contextlib
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict

from configs import MODELS, architecture

from .base import ImageTransformer
from .cait import CaiT
from .checkpoints.described import COMPUTED
from .checkpoints.hub import published_file
from .checkpoints.load import check_own_weights, load_pretrained, load_run
from .checkpoints.opened import OpenedCheckpoint
from .checkpoints.published import find_checkpoint
from .deit import DistilledVisionTransformer
from .errors import ModelError
from .families import KEYS
from .kinds import brief
from .sigmoid_attention import use_sigmoid_attention
from .vit import VisionTransformer


def create_model(name_or_config: str | ConfigDict, num_classes: int | None = None, img_size: int | tuple[int, int] | None = None,
                 pretrained: str | Path | OpenedCheckpoint | None = None, head: str = "zero", initialise: bool = True,
                 **overrides) -> ImageTransformer:
    """Builds a model of the class that the row asks for, in training mode. `model(images)` gives logits (B, num_classes).

    name_or_config: a name of list_models(), or of a published file, such as timm's, for the model that it is of; or a row of
                    configs.MODELS (or one made with configs.architecture).
    num_classes:    default 1000; with head="keep" the file's own count.
    img_size:       side or (height, width) in pixels; default the row's.
    pretrained:     a checkpoint file, an OpenedCheckpoint, or a published name, which is looked up in ./checkpoint and else
                    downloaded.
    head:           "zero" starts a new task; "keep" takes the file's head (and its pre_logits layer).
    initialise:     False leaves the parameters uninitialized, for a caller who loads all of them (load_state_dict).
    overrides:      other values for keys of the row, such as dropout_rate=0.1. Those of GELU, eps, mean and std win over what
                    the file's program computes, which wins over the row.
    model.load_report lists what was used, resized, fresh and left out (None without `pretrained`).
    Raises ModelError for anything that does not exist or does not fit.
    """
    plain = resolve_row(name_or_config, overrides)
    config = plain
    if isinstance(pretrained, OpenedCheckpoint):            # its GELU, eps, mean and std are part of the weights
        config = resolve_row(name_or_config, pretrained.computed | overrides)
    if head not in ("zero", "keep"):
        raise ModelError(f"head={head!r}: must be 'zero' or 'keep'")
    if head == "keep" and pretrained is None:
        raise ModelError("head='keep' needs pretrained=..., the file whose head is kept")
    if pretrained is not None and not isinstance(pretrained, OpenedCheckpoint):
        with OpenedCheckpoint(find_checkpoint(pretrained)) as opened:
            return create_model(name_or_config, num_classes, img_size, opened, head, initialise, **overrides)
    if head == "keep":
        num_classes = pretrained.head_classes if num_classes is None else num_classes
        config.representation_size = pretrained.representation_size
    num_classes, size = _plain(num_classes), _plain(config.img_size if img_size is None else img_size)
    size = (size, size) if isinstance(size, int) else tuple(size)
    family = CaiT if config.class_layers else DistilledVisionTransformer if config.distilled else VisionTransformer
    # Initial values that a file replaces are not drawn, which would take longer than to read it.
    with contextlib.nullcontext() if initialise and pretrained is None else torch.device("meta"):
        model = family(config, 1000 if num_classes is None else num_classes, size)
    use_sigmoid_attention(model, config.sigmoid_attention)
    model.load_report = load_pretrained(model, pretrained, head) if pretrained is not None else None
    others = [f"{key} {config[key]}" for key in COMPUTED if config[key] != plain[key]]
    if others:
        model.load_report.notes.append(f"computed as by the program that wrote it: {', '.join(others)}")
    return model if initialise or pretrained is not None else model.to_empty(device="cpu")


def load_model(path: str | Path | OpenedCheckpoint) -> ImageTransformer:
    """Loads the model of a run of train.py (output/NAME/best.pt), in eval mode; `classes` holds its class names.

    Loads the averaged weights where the run kept them (--ema_decay). Raises ModelError.
    """
    return load_run(path, _build_of_run)


def check_weights_of_run(opened: OpenedCheckpoint) -> None:
    """Raises WeightsError where the weights of a run's checkpoint are not those of its architecture. Takes no memory."""
    check_own_weights(opened, _build_of_run)


def _build_of_run(row: dict, classes: int, img_size: int | tuple[int, int]) -> ImageTransformer:
    return create_model(architecture(**row), classes, img_size)


# What a row of another size must share with a file to be its family; and then what must agree for it to be the file's model.
FAMILY = ("distilled", "class_layers", "resnet_layers", "resnet_width", "class_token", "registers", "positions", "rope", "mlp",
          "norm", "pre_norm", "patch_norm", "final_norm", "attention_norm", "mlp_norm", "qk_norm", "qkv_bias", "proj_bias",
          "mlp_bias", "patch_bias")
SIZES = ("patch_size", "hidden_size", "mlp_dim", "num_layers")


def match_row(file: OpenedCheckpoint, preferred: str = "", num_heads: int | None = None) -> tuple[str, dict]:
    """-> (the name of the row that the file is of, the keys that it sets otherwise), from its names, shapes and config.json.

    preferred: rows whose names begin so come before others of the same sizes. num_heads: where the file does not tell it; it is
    missing in the keys where nothing tells it and no row is of the file's sizes. Raises ModelError for a family that has no row.
    """
    if file.own_row:
        return _match_own(file)
    found = file.row
    heads = num_heads or found.get("num_heads")
    family = {name: row for name, row in MODELS.items() if all(found.get(key, KEYS[key]) == row[key] for key in FAMILY)
              and bool(found.get("layer_scale")) == bool(row.layer_scale and not row.class_layers)}
    if not family:
        raise ModelError(f"{file.path}: no model of configs.py has its ResNet, of {found['resnet_layers']} units")
    same = [name for name, row in family.items() if all(found.get(key) == row[key] for key in SIZES)
            and heads in (None, row.num_heads)]
    kept = {key: found[key] for key in ("in_channels", "classifier") if key in found}

    def rank(name: str) -> tuple[bool, ...]:
        row = family[name]
        return (row.classifier != found.get("classifier", row.classifier), row.mean != file.computed.get("mean", row.mean),
                not name.startswith(preferred), row.classifier != "token")

    if same:
        name = min(same, key=rank)
        return name, {key: value for key, value in kept.items() if value != MODELS[name][key]}
    name = next((name for name in family if name.startswith(preferred)), next(iter(family)))
    return name, kept | {key: found[key] for key in SIZES if key in found} | ({"num_heads": heads} if heads else {})


def _match_own(file: OpenedCheckpoint) -> tuple[str, dict]:
    """match_row of an export of ours, which says all: the row that it was made of, as its card says, or the one that has the most
    of its keys."""
    said = {key: value for key, value in file.own_row.items() if key not in (*COMPUTED, "img_size")}
    if unknown := set(said) - set(KEYS) - {*SIZES, "num_heads"}:
        raise ModelError(f"{file.path}: its model has {brief(min(unknown))}, which this version does not know: a newer one has "
                         "written it")

    def others(name: str) -> dict:
        return {key: value for key, value in said.items() if value != MODELS[name][key]}

    card = (file.file.described.card or {}).get("model", {}).get("architecture")
    name = card if card in MODELS else min(MODELS, key=lambda name: len(others(name)))
    keys = others(name)
    return name, keys | ({"num_heads": said["num_heads"]} if "hidden_size" in keys and "num_heads" in said else {})


def _plain(value: object) -> object:
    """NumPy's scalars as Python's: what a program computes is often one, and a row and a file hold Python's alone."""
    if isinstance(value, (tuple, list)):
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def resolve_row(name_or_config: str | ConfigDict, overrides: dict) -> ConfigDict:
    """A copy of the row with the overrides, and of one channel with the mean of the channels' values. Raises ModelError."""
    if isinstance(name_or_config, str):
        known = None if name_or_config in MODELS else published_file(name_or_config)
        if name_or_config not in MODELS and not (known and known.model):
            raise ModelError(f"unknown model {name_or_config!r}; known are {', '.join(MODELS)}, and the published names of their "
                             "files (MODEL_ZOO.md)")
        name_or_config = MODELS[known.model if known else name_or_config]
        overrides = {"img_size": known.pixels} | overrides if known else overrides
    config = name_or_config.copy_and_resolve_references()
    with config.ignore_type():                               # NumPy's, where the row was made with it
        config.update({key: _plain(value) for key, value in config.items()})
    unknown = set(overrides) - set(config)
    if unknown:
        raise ModelError(f"unknown keys {', '.join(sorted(unknown))}; a model has {', '.join(sorted(config))}")
    for key, value in overrides.items():
        try:
            config[key] = _plain(value)
        except TypeError as error:
            raise ModelError(f"{key}={value!r}: must be of the type of the row's {config[key]!r}") from error
    if config.in_channels == 1 and len(config.mean) == 3:
        config.channel_mean, config.channel_std = config.mean, config.std
        config.mean, config.std = (sum(config.mean) / 3,), (sum(config.std) / 3,)
    return config
