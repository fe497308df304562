"""Tiny models of today's families, their state dicts with the names of timm's classes and of the original code, written
independently of the product's tables; and weight files in memory.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from configs import MODELS, architecture
from models.checkpoints.formats import WeightFile
from models.checkpoints.opened import OpenedCheckpoint

LAYERS, WIDTH, HEADS, SIDE = 1, 48, 3, 32


def tiny(name: str, **more):
    """Return the row of a published model with width 48, one block, 4 x 4 patches of 8 px."""
    row = MODELS[name].to_dict()
    sizes = {"patch_size": 8, "hidden_size": WIDTH, "mlp_dim": 96 if row["mlp"] == "plain" else 64, "num_heads": HEADS,
             "num_layers": LAYERS, "img_size": SIDE, "rope_grid": 4 if row["rope_grid"] else 0,
             "pool_heads": 2 if row["pool_heads"] else 0, "pool_mlp_dim": 80 if row["pool_mlp_dim"] else 0}
    return architecture(**row | sizes | more)


class Kind(NamedTuple):
    """The files of one kind of model: its row, how its state dict is named, and other content of the file, which is skipped."""

    row: object
    names: object = dict                     # state dict -> arrays of the file
    beside: tuple[str, ...] = ()


def renamed(state: dict[str, Tensor], *changes: tuple[str, str]) -> dict[str, Tensor]:
    """Rename arrays. changes: patterns and their replacements, applied in this order"""
    found = {}
    for name, value in state.items():
        for old, new in changes:
            name = re.sub(old, new, name)
        found[name] = value
    return found


def apart(state: dict[str, Tensor], layer: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """Split the arrays of a packed layer into several names."""
    found = {}
    for name, value in state.items():
        match = re.fullmatch(rf"(.*\b){re.escape(layer)}\.(weight|bias)", name)
        if match:
            found |= {f"{match[1]}{part}.{match[2]}": piece.clone() for part, piece in zip(parts, value.chunk(len(parts)))}
        else:
            found[name] = value
    return found


GATES = ("mlp.fc1_g", "mlp.fc1_x")
QKV = ("attn.q_proj", "attn.k_proj", "attn.v_proj")


def eva(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of timm's Eva for layer scale and the biases of queries and values."""
    return renamed(state, (r"ls(\d)\.gamma", r"gamma_\1"), (r"attn\.qkv\.([qv])_bias", r"attn.\1_bias"))


def eva_gates(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return eva(apart(state, "mlp.fc1", GATES))


def eva_apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(apart(eva_gates(state), "attn.qkv", QKV), (r"attn\.([qv])_bias", r"attn.\1_proj.bias"))


def gates(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of timm's VisionTransformer with SwiGLU in two layers (AIMv2)."""
    return apart(state, "mlp.fc1", GATES)


def eva02(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(eva_apart(state), (r"attn\.([qv])_proj\.bias", r"attn.\1_bias"), (r"mlp\.norm", "mlp.ffn_ln"),
                   (r"attn\.norm", "attn.inner_attn_ln"), (r"fc1_g", "w1"), (r"fc1_x", "w2"), (r"fc2", "w3")) | {
        "rope.freqs_cos": torch.ones(16, 16), "blocks.0.attn.rope.freqs_sin": torch.ones(16, 16)}


def dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of DINOv2's code: blocks in chunks, SwiGLU's names, and the head of its linear classifiers."""
    return renamed(state, (r"^blocks\.(\d+)", r"blocks.0.\1"), (r"^head\.", "linear_head."), (r"mlp\.fc1", "mlp.w12"),
                   (r"mlp\.fc2", "mlp.w3")) | {"mask_token": torch.ones(1, WIDTH)}


def dinov2_registers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The position embeddings have a row for the cls token, which is subtracted from the token."""
    position = torch.full((1, 1, WIDTH), 0.25)
    folded = {"cls_token": state["cls_token"] - position, "pos_embed": torch.cat([position, state["pos_embed"]], dim=1)}
    return renamed(state | folded, ("^reg_token", "register_tokens")) | {"mask_token": torch.ones(1, WIDTH)}


def tips(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(dinov2_registers(state), ("^", "vision_encoder.")) | {"text_encoder.embedding": torch.ones(3, 4)}


def dinov3(state: dict[str, Tensor], key_bias: float = 0.5, mask: bool = True) -> dict[str, Tensor]:
    """One packed bias, in which the part of the keys is masked."""
    found = renamed(state, ("^reg_token", "storage_tokens"), (r"fc1_g", "w1"), (r"fc1_x", "w2"), (r"fc2", "w3"))
    for name in [name for name in found if name.endswith("q_bias")]:
        layer = name.removesuffix(".q_bias")
        q, v = found.pop(name), found.pop(f"{layer}.v_bias")
        found[f"{layer}.bias"] = torch.cat([q, torch.full_like(q, key_bias), v])
        if mask:
            found[f"{layer}.bias_mask"] = torch.cat([torch.ones_like(q), torch.zeros_like(q), torch.ones_like(q)])
    return found | {"mask_token": torch.ones(1, WIDTH), "rope_embed.periods": torch.ones(4).bfloat16(),
                    "local_cls_norm.weight": torch.ones(WIDTH)}


def dinov3_gates(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(dinov3(gates(state)), ("mlp.fc2", "mlp.w3"))


def deit3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(state, (r"ls(\d)\.gamma", r"gamma_\1"))


PE = ((r"^patch_embed\.proj", "conv1"), ("^cls_token", "class_embedding"), ("^pos_embed", "positional_embedding"),
      ("^norm_pre", "ln_pre"), ("^norm", "ln_post"), (r"^blocks\.(\d+)\.norm", r"transformer.resblocks.\1.ln_"),
      (r"^blocks", "transformer.resblocks"), (r"attn\.qkv\.", "attn.in_proj_"), (r"(resblocks.*attn)\.proj", r"\1.out_proj"),
      (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"), (r"ls(\d)", r"ls_\1"),
      (r"attn_pool\.latent", "attn_pool.probe"), (r"attn_pool\.proj", "attn_pool.attn.out_proj"),
      (r"attn_pool\.norm", "attn_pool.layernorm"))


def pe(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's Perception Encoder."""
    found = {}
    for name, value in renamed(state, *PE).items():
        if name.startswith("attn_pool.q."):
            kind = name.rpartition(".")[2]
            found[f"visual.attn_pool.attn.in_proj_{kind}"] = torch.cat([value, state[f"attn_pool.kv.{kind}"]])
        elif not name.startswith("attn_pool.kv."):
            flat = {"class_embedding": 2, "positional_embedding": 1}.get(name, 0)
            found[f"visual.{name}"] = value[(0,) * flat].clone() if flat else value
    return found | {"visual.proj": torch.ones(WIDTH, 5), "text_projection": torch.ones(2, 2), "logit_scale": torch.ones(())}


def aimv2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(gates(state), (r"^patch_embed", "preprocessor.patchifier"), ("^pos_embed", "preprocessor.pos_embed"),
                   (r"^norm", "trunk.post_trunk_norm"), (r"\.norm(\d)", r".norm_\1"), (r"^blocks", "trunk.blocks"),
                   ("fc1_g", "fc1"), ("fc1_x", "fc3"))


def ijepa(state: dict[str, Tensor]) -> dict:
    inside = {f"module.{name}": value for name, value in state.items()}
    return {"encoder": inside, "predictor": {"module.predictor_norm.weight": torch.ones(3)},
            "target_encoder": {name: value + 1 for name, value in inside.items()}, "epoch": 300}


NO_HEAD = ("dinov3", "dinov3_gates", "pe", "pe_spatial", "pe_gigantic", "aimv2", "ijepa", "tips")
KINDS = {
    # timm's VisionTransformer
    "timm_dinov2": Kind(tiny("DINOv2-S_14")),
    "timm_dinov2_reg": Kind(tiny("DINOv2-S_14-reg")),
    "timm_dinov2_giant": Kind(tiny("DINOv2-g_14")),
    "timm_siglip": Kind(tiny("SigLIP-B_16")),
    "timm_siglip_gap": Kind(tiny("SigLIP-B_16", classifier="gap")),
    "timm_clip": Kind(tiny("OpenCLIP-B_16")),
    "timm_reg4_gap": Kind(tiny("ViT-Betwixt_16-reg4")),
    "timm_so150m": Kind(tiny("ViT-SO150M_16-reg4")),
    "timm_radio": Kind(tiny("C-RADIOv3-B_16", classifier="mean")),
    "timm_beit3": Kind(tiny("BEiT3-B_16")),
    "timm_aimv2": Kind(tiny("AIMv2-L_14"), gates),
    # timm's Eva
    "timm_eva": Kind(tiny("EVA-g_14"), eva),
    "timm_eva02_small": Kind(tiny("EVA02-S_14"), eva),
    "timm_eva02": Kind(tiny("EVA02-B_14"), eva_apart),
    "timm_eva02_clip": Kind(tiny("EVA02-B_16-clip"), eva_apart),
    "timm_dinov3": Kind(tiny("DINOv3-S_16"), eva),
    "timm_dinov3_plus": Kind(tiny("DINOv3-S+_16-qkvb"), eva_gates),
    "timm_pe": Kind(tiny("PE-core-B_16"), eva),
    "timm_rope": Kind(tiny("ViT-M_16-rope-reg1"), eva),
    # originals
    "dinov2": Kind(tiny("DINOv2-g_14", classifier="token_mean"), dinov2, ("mask_token",)),
    "dinov2_reg": Kind(tiny("DINOv2-S_14-reg"), dinov2_registers, ("mask_token",)),
    "tips": Kind(tiny("TIPSv2-B_14"), tips, ("mask_token", "text_encoder.embedding")),
    "dinov3": Kind(tiny("DINOv3-S_16-qkvb"), dinov3, ("blocks.0.attn.qkv.bias_mask", "local_cls_norm.weight", "mask_token",
                                                    "rope_embed.periods")),
    "dinov3_gates": Kind(tiny("DINOv3-H+_16"), dinov3_gates, ("local_cls_norm.weight", "mask_token", "rope_embed.periods")),
    "deit3": Kind(tiny("DeiT3-S_16"), deit3),
    "eva02": Kind(tiny("EVA02-B_14"), eva02, ("blocks.0.attn.rope.freqs_sin", "rope.freqs_cos")),
    "eva02_clip": Kind(tiny("EVA02-B_16-clip"), eva02, ("blocks.0.attn.rope.freqs_sin", "rope.freqs_cos")),
    "pe": Kind(tiny("PE-core-B_16"), pe, ("logit_scale", "proj", "text_projection")),
    "pe_gigantic": Kind(tiny("PE-core-G_14"), pe, ("logit_scale", "proj", "text_projection")),
    "pe_spatial": Kind(tiny("PE-spatial-G_14"), pe, ("logit_scale", "proj", "text_projection")),
    "aimv2": Kind(tiny("AIMv2-L_14"), aimv2),
    "ijepa": Kind(tiny("IJEPA-H_14", classifier="gap"), ijepa, ("epoch", "predictor", "target_encoder")),
}


def arrays_of(case: str, model) -> dict:
    """Return the content of a file of this kind."""
    state = {name: value for name, value in model.state_dict().items() if case not in NO_HEAD or not name.startswith("head.")}
    return KINDS[case].names(state)


class Arrays(WeightFile):
    """A weight file in memory."""

    def __init__(self, arrays: dict[str, Tensor]):
        super().__init__(Path("x.pth"))
        self._arrays, self.names = arrays, list(arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._arrays[name].shape)

    def read(self, name: str) -> Tensor:
        return self._arrays[name].float()


def in_memory(arrays: dict[str, Tensor]) -> OpenedCheckpoint:
    """Return an opened checkpoint with these arrays."""
    checkpoint = OpenedCheckpoint.__new__(OpenedCheckpoint)
    checkpoint.file = Arrays(arrays)
    checkpoint.path = checkpoint.file.path
    return checkpoint
