"""Writes timm's config.json for a model: which of timm's models computes the same, and how images are resized.

Checked with timm 1.0.31 (create_model, _builder.py, vision_transformer.py, vision_transformer_hybrid.py, deit.py, cait.py).
transformers opens the same file by its TimmWrapper, which passes `model_args` to timm.
"""

import torch
from torch.nn import functional as F

from models.base import ImageTransformer
from models.errors import ModelError

from . import timm_models
from .described import OWN_ENTRY, PLAIN_EPS

# timm's names by patch, width and blocks. A model of other sizes gets the first name of the family; model_args give the sizes.
DISTILLED = {(16, 768, 12): "deit_base_distilled_patch16_224", (16, 192, 12): "deit_tiny_distilled_patch16_224",
             (16, 384, 12): "deit_small_distilled_patch16_224"}
CAIT = {(16, 384, 24): "cait_s24_224", (16, 192, 24): "cait_xxs24_224", (16, 192, 36): "cait_xxs36_224",
        (16, 288, 24): "cait_xs24_384", (16, 384, 36): "cait_s36_384", (16, 768, 36): "cait_m36_384",
        (16, 768, 48): "cait_m48_448"}
# For a hybrid, only the name determines the ResNet: units of its stages -> {width: name}.
HYBRIDS = {(): {192: "vit_tiny_r_s16_p8_224"}, (2, 2, 2, 2): {384: "vit_small_r26_s32_224", 768: "vit_base_r26_s32_224"},
           (3, 4, 9): {768: "vit_base_r50_s16_224"}, (3, 4, 6, 3): {1024: "vit_large_r50_s32_224"}}
RESNET_WIDTH = 64


def timm_config(model: ImageTransformer, classes: list[str], view: dict, own: dict) -> dict:
    """Return a config.json in timm's format. view: `interpolation` and `eval_crop`; own: this project's entry (OWN_ENTRY).

    Raises ModelError, naming the part, if no model of timm has a part of this one.
    """
    check_timm(model, view)
    config, channels = model.config, model.config.in_channels
    row = own["card"].get("model", {}).get("architecture", "")
    name = timm_models.published_name_of(config, row, max(model.img_size))
    arguments = _arguments(model, bool(name))
    published = {
        "custom_load": False, "input_size": [channels, *model.img_size], "fixed_input_size": True,
        "interpolation": view["interpolation"], "crop_pct": view["eval_crop"] or 1.0,
        "crop_mode": "center" if view["eval_crop"] else "squash", "mean": list(config.mean), "std": list(config.std),
        "num_classes": model.num_classes, "pool_size": None, "first_conv": _first_conv(config),
        "classifier": ["head", "head_dist"] if config.distilled else "head"}
    return {"architecture": name or _architecture(config), "num_classes": model.num_classes, "num_features": config.hidden_size,
            "global_pool": arguments["global_pool"], "label_names": list(classes), "model_args": arguments,
            "pretrained_cfg": published, OWN_ENTRY: own}


def check_timm(model: ImageTransformer, view: dict) -> None:
    """Raise ModelError, one line, if timm has no such model or cannot resize images in this way."""
    config = model.config
    units = None if config.resnet_layers is None else tuple(config.resnet_layers)
    height, width = model.img_size
    faults = {
        f"sigmoid_attention {config.sigmoid_attention!r}: timm has no attention that people can edit": config.sigmoid_attention,
        f"representation_size {config.representation_size}: timm's models have no layer pre_logits": config.representation_size,
        f"resnet_layers {units}: timm's hybrids have {', '.join(map(str, HYBRIDS))}": units is not None and units not in HYBRIDS,
        f"resnet_width {config.resnet_width}: timm's hybrids have {RESNET_WIDTH}":
            units is not None and config.resnet_width != RESNET_WIDTH,
        f"resnet_style {config.resnet_style!r}: timm pads and normalizes in another way":
            units is not None and config.resnet_style == "vit-pytorch",
        f"gelu {config.gelu!r}: timm's CaiT has only the exact GELU": config.class_layers and config.gelu != "erf",
        f"eval_crop {view['eval_crop']:g} at {height} x {width} pixels: timm resizes to another size for a crop "
        "that is not square, by up to a pixel": view["eval_crop"] and height != width,
    }
    kind = timm_models.kind_of(config)
    fault = next((words for words, is_so in faults.items() if is_so), kind if isinstance(kind, str) else "")
    if fault:
        raise ModelError(f"{fault}. Export it to onnx or torch")


def _architecture(config) -> str:
    if config.resnet_layers is not None:
        names = HYBRIDS[tuple(config.resnet_layers)]
        return names.get(config.hidden_size, next(iter(names.values())))
    kind = timm_models.kind_of(config)
    if config.class_layers or config.distilled:
        kind = timm_models.Kind(CAIT if config.class_layers else DISTILLED)
    return timm_models.name_of(config, kind)


def _arguments(model: ImageTransformer, whole: bool) -> dict:
    """Return model_args: all settings that timm's architecture does not fix (except num_classes, which transformers adds).

    whole: see timm_models.arguments_of.
    """
    config, kind = model.config, timm_models.kind_of(model.config)
    ratio = timm_models.mlp_ratio_of(config, kind)
    arguments = {"img_size": list(model.img_size), "patch_size": config.patch_size, "in_chans": config.in_channels,
                 "embed_dim": config.hidden_size, "depth": config.num_layers, "num_heads": config.num_heads, "mlp_ratio": ratio,
                 "global_pool": timm_models.pool_of(config)}
    if config.class_layers:
        return arguments | {"depth_token_only": config.class_layers, "mlp_ratio_token_only": ratio}
    if config.distilled:
        return arguments | {"act_layer": timm_models.ACTS[config.gelu]}
    return arguments | timm_models.arguments_of(config, kind, whole)


def _first_conv(config) -> str:
    if config.resnet_layers is None:
        return "patch_embed.proj"
    return f"patch_embed.backbone{'.stem' if config.resnet_layers else ''}.conv"


# -------------------------------------------------------------------------------------- what timm computes differently


def computed_otherwise(model: ImageTransformer) -> dict:
    """Return the keys of the model's row for which timm's model has other values, with these values.

    They are its ResNet's style and its eps, which no config.json can set.
    """
    config = model.config
    changed = {}
    if config.resnet_layers is not None and config.resnet_style != "timm":
        changed["resnet_style"] = "timm"
    eps = getattr(timm_models.kind_of(config), "eps", PLAIN_EPS)
    if config.norm_eps != eps:
        changed["norm_eps"] = eps
    return changed


@torch.inference_mode()
def largest_difference(model: ImageTransformer, changed: dict) -> float:
    """Return the largest difference of a logit if the row has these values, over four images of coarse and fine noise."""
    row = model.config.copy_and_resolve_references()
    row.update(changed)
    with torch.device("meta"):
        other = type(model)(row, model.num_classes, model.img_size)
    other.load_state_dict(model.state_dict(), assign=True)
    generator = torch.Generator().manual_seed(0)
    shape = 4, model.config.in_channels, *model.img_size
    coarse = torch.randn(*shape[:2], 8, 8, generator=generator)
    images = F.interpolate(coarse, model.img_size, mode="bilinear") + 0.3 * torch.randn(shape, generator=generator)
    images = images.to(next(model.parameters()))
    return (model.eval()(images) - other.eval()(images)).abs().max().item()
