"""What a checkpoint of one of our runs holds: each field, and what it must be.

A seal tells that a file is as it was written, not who wrote it. Whoever opens one (to resume it, to start from it, to look at
it) therefore has everything compared with this table before anything is used; what belongs to the model or to a setting is
compared with that: `check_shapes` here, utils/training/saved_optimizer.py and utils/config/saved.py.
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
# What versions have added to this format, in their order: an older file lacks all of a version, and of those that came later.
LATER_FIELDS = (("ema",), ("world_size", "threads", "data"), ("cached",), ("rules",), ("license",))
LATER_KEYS = (("drop_path_rate", "distilled", "class_layers", "layer_scale", "position_resize", "channel_mean", "channel_std"),
              ("sigmoid_attention",), ("norm_eps", "resnet_style"), (*PARTS, "interpolation", "eval_crop"))
SAVED_TYPES = (torch.float32, torch.float16)                                       # of weights: utils/training/precision.py

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
NEEDED = {"format", "model", "architecture", "classes", "config"}           # by whoever wants the weights alone
OF_WEIGHTS = NEEDED | {"ema", "step", "train_images", "data", "license"}               # what they read, where it is there
EMPTY = {"optimizer", "scaler", "best"}           # may be {}: of a run before its first step, without loss scaling, not evaluated


def is_run(content: Mapping) -> bool:
    """Whether the file is of one of our runs, perhaps with a wrong format, and not of another program."""
    claimed = content.get("format")
    return (isinstance(claimed, str) and claimed.startswith(OWN_FORMAT)) or 2 * len(FIELDS.keys() & content.keys()) > len(FIELDS)


def check_run(content: object, path: str | Path, weights_alone: bool = False) -> None:
    """Raises WeightsError unless every field is there and of its kind, and they agree with each other.

    weights_alone: others than those of NEEDED may be missing, since people take the optimizer's state out of what they pass on,
    and those that are not of OF_WEIGHTS may be anything: only a resumed run reads them.
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
    """What the weights, the settings and the architecture do not agree on, or ''. Each is of its kind."""
    if missing := _missing(content["architecture"], LATER_KEYS):
        return f"architecture lacks {missing}"
    averaged, decay = bool(content.get("ema")), content["config"].get("ema_decay")
    if averaged != bool(decay):
        return f"the file has {'' if averaged else 'no '}averaged weights, ema_decay is {brief(decay)}"
    return "" if content["classes"] else "the file has no classes"


def _contradiction(content: Mapping) -> str:
    """What the other fields do not agree on, or ''."""
    if missing := _missing(content, LATER_FIELDS):
        return f"the file lacks {missing}"
    step, updates, skips, before = *(content[name] for name in ("step", "updates", "skips")), content["first"].get("attention")
    if updates + skips > step or (updates == 0 and skips < step):
        return f"{updates} updates and {skips} skipped steps do not make {step} steps"
    if content["scaler"] and content["scaler"]["_growth_tracker"] > updates:
        return f"scaler has counted {content['scaler']['_growth_tracker']} updates of {updates}"
    if content["best"] and content["best"]["step"] > step:
        return f"best is of step {content['best']['step']}, the file of step {step}"
    if before is not None and not _shows_images(before, len(content["classes"])):
        return "the arrays of first.attention do not fit its names and the classes"
    return ""


def _missing(there: Mapping, versions: tuple) -> str:
    """A key that is not there though another of its version, or of a later one, is; or ''."""
    last = max((number for number, keys in enumerate(versions) if any(key in there for key in keys)), default=-1)
    return next((key for keys in versions[:last + 1] for key in keys if key not in there), "")


def _shows_images(before: Mapping, classes: int) -> bool:
    images = len(before["names"])
    return (before["probabilities"].shape == (images, classes)
            and all(before[key].dim() == axes and len(before[key]) == images for key, axes in (("pixels", 4), ("attention", 3))))


def lacking(content: Mapping) -> list[str]:
    """The fields and keys that the file was written without, because the program did not have them then."""
    return [key for there, versions in ((content, LATER_FIELDS), (content["architecture"], LATER_KEYS))
            for key in sum(versions, ()) if key not in there]


def check_shapes(shapes: Mapping[str, tuple], model: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises WeightsError unless names and shapes are those of the model's state dict."""
    missing, unknown = model.keys() - shapes.keys(), shapes.keys() - model.keys()
    if missing or unknown:
        which, names = ("lack", missing) if missing else ("have", unknown)
        raise WeightsError(f"{path}: its weights {which} {named(min(names))}: they do not fit its architecture. {AGAIN}")
    for name, parameter in model.items():
        if tuple(shapes[name]) != tuple(parameter.shape):
            raise WeightsError(f"{path}: {name} has shape {brief(tuple(shapes[name]))}, in its architecture "
                               f"{brief(tuple(parameter.shape))}. {AGAIN}")
