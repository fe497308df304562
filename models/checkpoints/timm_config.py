"""timm's config.json of a model: which of timm's models computes what it computes, and how it sees images.

Checked with timm 1.0.31 (create_model, _builder.py, vision_transformer.py, vision_transformer_hybrid.py, deit.py, cait.py).
transformers opens the same file by its TimmWrapper, which passes `model_args` to timm.
"""

import torch
from torch.nn import functional as F

from models.base import ImageTransformer
from models.errors import ModelError

from . import timm_models
from .described import OWN_ENTRY, PLAIN_EPS

# timm's names by patch, width and blocks. A model of other sizes takes the family's first: its model_args name them all.
DISTILLED = {(16, 768, 12): "deit_base_distilled_patch16_224", (16, 192, 12): "deit_tiny_distilled_patch16_224",
             (16, 384, 12): "deit_small_distilled_patch16_224"}
CAIT = {(16, 384, 24): "cait_s24_224", (16, 192, 24): "cait_xxs24_224", (16, 192, 36): "cait_xxs36_224",
        (16, 288, 24): "cait_xs24_384", (16, 384, 36): "cait_s36_384", (16, 768, 36): "cait_m36_384",
        (16, 768, 48): "cait_m48_448"}
# Of a hybrid the name alone decides the ResNet: by the units of its stages, then the width.
HYBRIDS = {(): {192: "vit_tiny_r_s16_p8_224"}, (2, 2, 2, 2): {384: "vit_small_r26_s32_224", 768: "vit_base_r26_s32_224"},
           (3, 4, 9): {768: "vit_base_r50_s16_224"}, (3, 4, 6, 3): {1024: "vit_large_r50_s32_224"}}
RESNET_WIDTH = 64


def timm_config(model: ImageTransformer, classes: list[str], view: dict, own: dict) -> dict:
    """config.json as timm writes it. view: `interpolation` and `eval_crop`; own: what this project reads back (OWN_ENTRY).

    Raises ModelError with the name of what no model of timm has.
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
    """Raises ModelError, one line, for a model or a view of images that timm cannot hold."""
    config = model.config
    units = None if config.resnet_layers is None else tuple(config.resnet_layers)
    height, width = model.img_size
    faults = {
        f"sigmoid_attention {config.sigmoid_attention!r}: timm has no attention that a person may edit": config.sigmoid_attention,
        f"representation_size {config.representation_size}: timm's models have no layer pre_logits": config.representation_size,
        f"resnet_layers {units}: timm's hybrids have {', '.join(map(str, HYBRIDS))}": units is not None and units not in HYBRIDS,
        f"resnet_width {config.resnet_width}: timm's hybrids have {RESNET_WIDTH}":
            units is not None and config.resnet_width != RESNET_WIDTH,
        f"resnet_style {config.resnet_style!r}: timm pads and normalizes in another way":
            units is not None and config.resnet_style == "vit-pytorch",
        f"gelu {config.gelu!r}: timm's CaiT takes the exact GELU alone": config.class_layers and config.gelu != "erf",
        f"eval_crop {view['eval_crop']:g} at {height} x {width} pixels: timm resizes for a crop that is not square to another "
        "size, by up to a pixel": view["eval_crop"] and height != width,
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
    """model_args: all that timm's architecture may have otherwise. (Not num_classes, which transformers adds.) whole: see
    timm_models.arguments_of."""
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


# ------------------------------------------------------------------------------------------- what timm computes otherwise


def computed_otherwise(model: ImageTransformer) -> dict:
    """Keys of the model's row that timm's model has otherwise, with timm's values: its eps, which no config.json can name."""
    config = model.config
    otherwise = {}
    if config.resnet_layers is not None and config.resnet_style != "timm":
        otherwise["resnet_style"] = "timm"
    eps = getattr(timm_models.kind_of(config), "eps", PLAIN_EPS)
    if config.norm_eps != eps:
        otherwise["norm_eps"] = eps
    return otherwise


@torch.inference_mode()
def largest_difference(model: ImageTransformer, otherwise: dict) -> float:
    """Between a logit of the model and of one whose row has these values, over four images of noise, coarse and fine."""
    row = model.config.copy_and_resolve_references()
    row.update(otherwise)
    with torch.device("meta"):
        other = type(model)(row, model.num_classes, model.img_size)
    other.load_state_dict(model.state_dict(), assign=True)
    generator = torch.Generator().manual_seed(0)
    shape = 4, model.config.in_channels, *model.img_size
    coarse = torch.randn(*shape[:2], 8, 8, generator=generator)
    images = F.interpolate(coarse, model.img_size, mode="bilinear") + 0.3 * torch.randn(shape, generator=generator)
    images = images.to(next(model.parameters()))
    return (model.eval()(images) - other.eval()(images)).abs().max().item()
