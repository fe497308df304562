"""The fields of a checkpoint of one of our runs, and the kind of value of each.

A seal shows that a file is unchanged, not who wrote it. So every checkpoint is compared with this table before anything in it is
used. Values that depend on the model or on a setting are checked by `check_shapes` here, utils/training/saved_optimizer.py and
utils/config/saved.py.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.base import PARTS, ROW
from models.errors import WeightsError
from models.kinds import (
    FRACTION,
    NAME,
    PLAIN,
    SWITCH,
    TEXT,
    Each,
    Kind,
    Record,
    brief,
    is_number,
    maybe,
    named,
    number,
    one_of,
    whole,
)

OWN_FORMAT, FORMAT = "vit-run-", "vit-run-1"
AGAIN = "Use an earlier checkpoint"
# The fields that later versions added to this format, in order: an older file lacks all fields of a version and those after it.
LATER_FIELDS = (("ema",), ("world_size", "threads", "data"), ("cached",), ("rules",), ("license",))
LATER_KEYS = (("drop_path_rate", "distilled", "class_layers", "layer_scale", "position_resize", "channel_mean", "channel_std"),
              ("sigmoid_attention",), ("norm_eps", "resnet_style"), (*PARTS, "interpolation", "eval_crop"))
SAVED_TYPES = (torch.float32, torch.float16)                                       # weights: see utils/training/precision.py

_WEIGHT = Kind("an array of float32 or float16",
               lambda value: isinstance(value, Tensor) and value.dtype in SAVED_TYPES and value.layout == torch.strided)
_WEIGHTS = Each(_WEIGHT, keys=NAME)
_TENSOR = Kind("an array", lambda value: isinstance(value, Tensor) and not value.is_complex() and value.layout == torch.strided)
_SLOT = Kind("an array, a number or None", lambda value: value is None or is_number(value) or _TENSOR.holds(value))
_COUNT = Kind("a number", lambda value: is_number(value) or (_TENSOR.holds(value) and value.dim() == 0))
_STEP = whole(0)
FIELDS = {
    "format": one_of(FORMAT),
    "step": _STEP, "updates": _STEP, "skips": whole(0, 1 << 20),
    "model": _WEIGHTS, "ema": _WEIGHTS,
    "optimizer": Record({"state": Each(Each(_SLOT, keys=NAME), keys=whole(0)),
                         "param_groups": Each(Each(PLAIN, keys=NAME, special={"step": _COUNT}))},           # LAMB's
                        optional={"state", "param_groups"}),
    "scaler": Record({"scale": number(1e-30, 1e38, words="above 0, and finite in float32"), "growth_factor": one_of(2.0),
                      "backoff_factor": one_of(0.5), "growth_interval": one_of(2000),
                      "_growth_tracker": whole(0, 1999)}),
    "best": Record({"step": _STEP, "accuracy": FRACTION}),
    "first": Record({"accuracy": FRACTION, "split": NAME, "edits": TEXT, "attention": Record(
        {"names": Each(TEXT), "pixels": _TENSOR, "probabilities": _TENSOR, "attention": _TENSOR})},
        optional={"accuracy", "split", "edits", "attention"}),
    "config": Each(PLAIN, keys=NAME),
    "architecture": Record(ROW, optional=sum(LATER_KEYS, ())),
    "classes": Each(TEXT),
    "train_images": _STEP, "seconds": number(0, words="0 or more"),
    "world_size": whole(1, 1 << 20), "threads": whole(0, 4096), "data": TEXT, "cached": maybe(SWITCH),
    "rules": one_of(1, 2, 3, 4),
    "license": TEXT,
}
NEEDED = {"format", "model", "architecture", "classes", "config"}           # needed to load the weights
OF_WEIGHTS = NEEDED | {"ema", "step", "train_images", "data", "license"}               # read with the weights, if present
EMPTY = {"optimizer", "scaler", "best"}           # may be {}: before the first step, without loss scaling, before an evaluation


def is_run(content: Mapping) -> bool:
    """Whether one of our runs wrote the file, perhaps in another version of the format."""
    claimed = content.get("format")
    return (isinstance(claimed, str) and claimed.startswith(OWN_FORMAT)) or 2 * len(FIELDS.keys() & content.keys()) > len(FIELDS)


def check_run(content: object, path: str | Path, weights_alone: bool = False) -> None:
    """Raise WeightsError unless all fields are there, are of their kind and agree with each other.

    weights_alone: only the fields in NEEDED must be there, since people remove the optimizer's state before they share a file;
    fields outside OF_WEIGHTS may be anything, as only a resumed run reads them.
    """
    if not isinstance(content, dict) or not FIELDS["format"].holds(content.get("format")):
        raise WeightsError(f"{path}: not a checkpoint of this version of the program (format {FORMAT})")
    fields = {name: value for name, value in content.items() if not (name in EMPTY and isinstance(value, dict) and not value)}
    optional = {*sum(LATER_FIELDS, ()), *content.keys() - fields.keys()}
    if weights_alone:
        fields, optional = {name: fields[name] for name in OF_WEIGHTS if name in fields}, FIELDS.keys() - NEEDED
    fault = Record(FIELDS, optional).fault("the file", fields) or _disagreement(content) or (
        "" if weights_alone else _contradiction(content))
    if fault:
        raise WeightsError(f"{path}: {fault.removeprefix('the file.')}. {AGAIN}")


def _disagreement(content: Mapping) -> str:
    """Return how the weights, the settings and the architecture contradict each other, or ''. Each must be of its kind."""
    if missing := _missing(content["architecture"], LATER_KEYS):
        return f"architecture lacks {missing}"
    averaged, decay = bool(content.get("ema")), content["config"].get("ema_decay")
    if averaged != bool(decay):
        return f"the file has {'' if averaged else 'no '}averaged weights, but ema_decay is {brief(decay)}"
    return "" if content["classes"] else "the file has no classes"


def _contradiction(content: Mapping) -> str:
    """Return how the other fields contradict each other, or ''."""
    if missing := _missing(content, LATER_FIELDS):
        return f"the file lacks {missing}"
    step, updates, skips, before = *(content[name] for name in ("step", "updates", "skips")), content["first"].get("attention")
    if updates + skips > step or (updates == 0 and skips < step):
        return f"{updates} updates and {skips} skipped steps do not make {step} steps"
    if content["scaler"] and content["scaler"]["_growth_tracker"] > updates:
        return f"scaler has counted {content['scaler']['_growth_tracker']} updates of {updates}"
    if content["best"] and content["best"]["step"] > step:
        return f"best is from step {content['best']['step']}, but the file from step {step}"
    if before is not None and not _shows_images(before, len(content["classes"])):
        return "the arrays of first.attention do not fit its names and the classes"
    return ""


def _missing(present: Mapping, versions: tuple) -> str:
    """Return a missing key, if another key of its version or of a later one is present; or ''."""
    last = max((number for number, keys in enumerate(versions) if any(key in present for key in keys)), default=-1)
    return next((key for keys in versions[:last + 1] for key in keys if key not in present), "")


def _shows_images(before: Mapping, classes: int) -> bool:
    images = len(before["names"])
    return (before["probabilities"].shape == (images, classes)
            and all(before[key].dim() == axes and len(before[key]) == images for key, axes in (("pixels", 4), ("attention", 3))))


def lacking(content: Mapping) -> list[str]:
    """Return the fields and keys that the version which wrote the file did not have."""
    return [key for present, versions in ((content, LATER_FIELDS), (content["architecture"], LATER_KEYS))
            for key in sum(versions, ()) if key not in present]


def check_shapes(shapes: Mapping[str, tuple], model: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise WeightsError unless names and shapes are those of the model's state dict."""
    missing, unknown = model.keys() - shapes.keys(), shapes.keys() - model.keys()
    if missing or unknown:
        which, names = ("lack", missing) if missing else ("have", unknown)
        raise WeightsError(f"{path}: its weights {which} {named(min(names))}: they do not fit its architecture. {AGAIN}")
    for name, parameter in model.items():
        if tuple(shapes[name]) != tuple(parameter.shape):
            raise WeightsError(f"{path}: {name} has shape {brief(tuple(shapes[name]))}, but its architecture needs "
                               f"{brief(tuple(parameter.shape))}. {AGAIN}")
