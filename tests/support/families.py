"""A tiny model of every family, and a run of it as train.py writes it."""

from pathlib import Path

import torch

import models
from utils import config
from utils.run import checkpoint
from utils.run import folder as run_folder

SMALL = {"patch_size": 4, "hidden_size": 12, "mlp_dim": 16, "num_heads": 2, "num_layers": 2}
# name: (row, changed keys, image size)
FAMILIES = {
    "vit": ("ViT-Ti_16", {}, (16, 24)),
    "distilled": ("DeiT-Ti_16-distilled", {}, 16),
    "cait": ("CaiT-XXS24", {}, (16, 24)),
    "mae": ("MAE-B_16", {}, (24, 16)),
    "gap": ("ViT-Ti_16", {"classifier": "gap"}, 16),
    "grey": ("ViT-Ti_16", {"in_channels": 1}, (16, 24)),
    "hybrid": ("R-ViT-Ti_16", {"patch_size": 2}, 16),
}
# Tiny rows of today's families, one for each mechanism as its family uses it.
MECHANISMS = {
    "DINOv2": ("DINOv2-S_14-reg", {"registers": 2}, (16, 24)),
    "DINOv3": ("DINOv3-S+_16-qkvb", {"hidden_size": 16}, (16, 24)),
    "SigLIP": ("SigLIP-B_16", {}, 16),
    "CLIP": ("CLIP-B_32", {}, 16),
    "EVA-02": ("EVA02-B_16-clip", {"hidden_size": 16, "rope_grid": 3}, (24, 16)),
    "PE": ("PE-core-B_16", {"hidden_size": 16, "pool_heads": 4, "pool_mlp_dim": 20, "rope_grid": 3}, 16),
    "AIMv2": ("AIMv2-L_14", {}, (16, 24)),
}
# Tiny rows of later families: registers, rotary positions and layer scale; the cls token concatenated with the mean; attention
# pooling without and with a cls token; the mean without a cls token. Their width is divisible by 2 and 3 heads.
DINO = {"registers": 2, "positions": "none", "rope": "dinov3", "layer_scale": 0.1, "mlp": "swiglu", "qkv_bias": "qv"}
LATER_FAMILIES = {name: ("ViT-Ti_16", {"hidden_size": 24} | keys, size) for name, keys, size in (
    ("dino", DINO, (16, 24)),
    ("dino_mean", DINO | {"classifier": "token_mean", "positions": "patches", "rope": ""}, (24, 16)),
    ("siglip", {"class_token": False, "classifier": "attention", "pool_heads": 3, "pool_mlp_dim": 20}, (16, 24)),
    ("pe", {"classifier": "attention", "pool_heads": 1, "rope": "pe", "rope_grid": 4, "pre_norm": True, "registers": 1}, 16),
    ("mean", {"class_token": False, "classifier": "mean", "registers": 2, "norm": "rms", "qk_norm": True, "rope": "eva",
              "rope_grid": 3, "attention_norm": True, "mlp_norm": True}, 16))}
LAYERS = {name: 4 if name == "cait" else 2 for name in FAMILIES} | {
    name: 2 + (keys.get("classifier") == "attention") for name, (_, keys, _) in LATER_FAMILIES.items()}
CLASSES = list("0123456789")


def family_model(family: str, classes: int = 10, **own) -> "models.ImageTransformer":
    """Return an untrained model with random weights, in training mode."""
    kind, keys, size = (FAMILIES | LATER_FAMILIES | MECHANISMS)[family]
    torch.manual_seed(0)
    model = models.create_model(kind, classes, size, **SMALL | keys | own)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def save_run(folder: Path, family: str = "vit", own: dict | None = None, stored: dict | None = None, **settings) -> Path:
    """Write a run of such a model with ten classes. own: keys of its row; settings: flags of the run; stored: settings as other
    data would have set them."""
    kind, _, size = (FAMILIES | LATER_FAMILIES | MECHANISMS)[family]
    model = family_model(family, **own or {})
    folder.mkdir(parents=True)
    run = config.resolve({"dataset": "digits", "model_type": kind, "img_size": size, "name": folder.name,
                          "pretrained_dir": "none", **settings}, config.Facts(1097, 10))
    averaged = {name: value + 0.1 for name, value in model.state_dict().items()} if run.ema_decay else {}
    checkpoint.save(folder / "best.pt", checkpoint.RunState(
        7, 7, 0, model.state_dict(), {}, {}, {}, {}, run.to_dict() | (stored or {}), model.config.to_dict(), CLASSES, 1097, 1.0,
        averaged))
    run_folder.write_log(folder, [{"event": "train", "step": step, "loss": 2 / step, "lr": 0.1} for step in (1, 2, 3)])
    return folder
