"""The public functions and classes of this package: create_model, load_model, list_models, load_pretrained and others.

A name is imported from its module when it is first used (PEP 562): loading PyTorch takes a second, and the lists of names and
the errors do not need it.

Shape legend, used in every file: B images, N tokens, D width, H heads, d = D / H, C classes, P patch side, (h, w) grid.
"""

import importlib

from .errors import ModelError, WeightsError  # noqa: F401

MODULES = {
    "attention": ["record_attention"],
    "base": ["ImageTransformer"],
    "cait": ["CaiT"],
    "checkpoints.export": ["save_npz", "save_timm"],
    "checkpoints.load": ["LoadReport", "load_pretrained"],
    "checkpoints.opened": ["checkpoint_head", "run_settings"],
    "checkpoints.published": ["find_checkpoint"],
    "create": ["create_model"],
    "deit": ["DistilledVisionTransformer"],
    "sigmoid_attention": ["edit_attention", "record_patch_logits", "use_sigmoid_attention"],
    "vit": ["VisionTransformer"],
}
# Users look for it here, but it needs utils, which imports models: utils reads, resizes and labels images.
ABOVE = {"utils.build.loaded": ["load_model"]}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in MODULES.items() for name in names} | {
    name: module for module, names in ABOVE.items() for name in names}
__all__ = ["ModelError", "list_models", *_MODULE_OF]


def list_models() -> list[str]:
    """Return the names of the models that create_model builds."""
    return list(importlib.import_module("configs").MODELS)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
