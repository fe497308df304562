"""Folders of start weights, one for each mechanism of today's families: a tiny model with random weights, as timm or transformers
saves it. originals.py and tower_names.py write its names, independently of the product's tables.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import originals
import torch
import tower_names
from safetensors.torch import save_file

from models import create_model

SIZES = {"patch_size": 4, "num_layers": 2}                     # in addition to those of originals.tiny
TIMM = {"depth": 2, "embed_dim": originals.WIDTH, "num_heads": originals.HEADS, "patch_size": 4, "img_size": originals.SIDE}
TRANSFORMERS = {"hidden_size": originals.WIDTH, "num_hidden_layers": 2, "num_attention_heads": originals.HEADS, "patch_size": 4,
                "image_size": originals.SIDE}
SEEN = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "resample": 3, "size": {"height": 32, "width": 32}}


class Start(NamedTuple):
    """A folder of start weights, and what must be read from it."""

    row: str                                     # of configs.MODELS
    names: Callable                              # our state dict -> the arrays of the file
    config: dict                                 # config.json
    said: str                                    # of the file, in words
    own: dict = {}                               # keys of the row that differ in this file
    flags: tuple[str, ...] = ()                  # to type in addition to the folder
    reads: str = "token"                         # the classifier of the run


def timm(architecture: str, **arguments: object) -> dict:
    return {"architecture": architecture, "num_classes": 0, "model_args": TIMM | arguments, "pretrained_cfg": {
        "tag": "mine", "input_size": [3, originals.SIDE, originals.SIDE], "mean": SEEN["image_mean"], "std": SEEN["image_std"],
        "interpolation": "bicubic", "crop_pct": 0.9, "license": "apache-2.0"}}


def transformers(kind: str, model: str, **values: object) -> dict:
    return {"model_type": kind, "architectures": [model], **TRANSFORMERS, **values}


MECHANISMS = {
    "DINOv2 with registers": Start(
        "DINOv2-S_14-reg", tower_names.dinov2,
        transformers("dinov2_with_registers", "Dinov2WithRegistersModel", mlp_ratio=2, num_register_tokens=4),
        "DINOv2-reg (width 48, 2 blocks, patch 4), 4 registers, 32 px"),
    "DINOv2": Start("DINOv2-S_14", originals.deit3, timm("vit_small_patch14_dinov2", init_values=1e-5, mlp_ratio=2),
                    "DINOv2 (width 48, 2 blocks, patch 4), 32 px", flags=("--classifier", "token_mean"), reads="token_mean"),
    "DINOv3": Start("DINOv3-S+_16-qkvb", tower_names.dinov3,
                    transformers("dinov3_vit", "DINOv3ViTModel", intermediate_size=64, num_register_tokens=4, use_gated_mlp=True,
                                 hidden_act="silu", query_bias=True, key_bias=False, value_bias=True, layer_norm_eps=1e-5),
                    "DINOv3-qkvb (width 48, 2 blocks, patch 4), 4 registers, SwiGLU, 32 px"),
    "SigLIP": Start("SigLIP-B_16", tower_names.both_towers,
                    {"model_type": "siglip", "architectures": ["SiglipModel"], "vision_config": {
                        "model_type": "siglip_vision_model", **TRANSFORMERS, "intermediate_size": 96}},
                    "SigLIP (width 48, 2 blocks, patch 4), pooling by attention, 32 px", reads="attention"),
    "SigLIP by its mean": Start("SigLIP-B_16", dict, timm("vit_base_patch16_siglip_gap_224", class_token=False, mlp_ratio=2,
                                                          global_pool="avg", fc_norm=False),
                                "SigLIP (width 48, 2 blocks, patch 4), mean of the patches, 32 px", {"classifier": "mean"},
                                reads="mean"),
    "EVA-02": Start("EVA02-B_14", originals.eva_apart, timm("eva02_base_patch14_224", mlp_ratio=4 / 3, ref_feat_shape=[8, 8]),
                    "EVA02 (width 48, 2 blocks, patch 4), SwiGLU, mean of the patches, 32 px", {"rope_grid": 8},
                    reads="patch_mean"),
    "PE": Start("PE-core-B_16", originals.eva, timm("vit_pe_core_base_patch16_224", mlp_ratio=2, ref_feat_shape=[8, 8],
                                                    global_pool="map"),
                "PE-core (width 48, 2 blocks, patch 4), pooling by attention, 32 px",
                {"rope_grid": 8, "pool_heads": 8, "pool_mlp_dim": 192}, reads="attention"),
    "AIMv2": Start("AIMv2-L_14", tower_names.aimv2,
                   transformers("aimv2_vision_model", "Aimv2VisionModel", intermediate_size=64, hidden_act="silu",
                                rms_norm_eps=1e-5, qkv_bias=False, mlp_bias=False),
                   "AIMv2 (width 48, 2 blocks, patch 4), SwiGLU, mean of the patches, 32 px", reads="mean"),
    "CLIP": Start("CLIP-B_32", tower_names.vision_tower,
                  transformers("clip_vision_model", "CLIPVisionModel", intermediate_size=96, hidden_act="quick_gelu",
                               layer_norm_eps=1e-5),
                  "CLIP (width 48, 2 blocks, patch 4), 32 px"),
    "registers without a cls token": Start(
        "ViT-Betwixt_16-reg4", dict, timm("vit_betwixt_patch16_reg4_gap_256", init_values=1e-5, class_token=False, mlp_ratio=2,
                                          no_embed_class=True, reg_tokens=4, global_pool="avg"),
        "ViT-reg4 (width 48, 2 blocks, patch 4), 4 registers, mean of the patches, 32 px", reads="patch_mean"),
}


def start_model(name: str, classes: int = 3) -> torch.nn.Module:
    """Return a model with initial weights plus noise, so that none is zero."""
    start = MECHANISMS[name]
    torch.manual_seed(0)
    model = create_model(originals.tiny(start.row, **SIZES | start.own), classes)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def start_folder(path: Path, name: str) -> Path:
    start = MECHANISMS[name]
    state = {key: value for key, value in start_model(name).state_dict().items() if not key.startswith("head.")}
    arrays = start.names(state)
    path.mkdir(parents=True)
    save_file({key: value.clone().contiguous() for key, value in arrays.items()}, path / "model.safetensors",
              metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(start.config))
    if "model_type" in start.config:
        (path / "preprocessor_config.json").write_text(json.dumps(SEEN))
    return path
