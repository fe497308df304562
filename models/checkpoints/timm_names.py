"""Translates timm's names, and those of similar original files, into one set of names for layouts.py.

timm's VisionTransformer has our names. Its Eva names LayerScale gamma_1 and gamma_2, biases of queries and values q_bias and
v_bias, and may have separate arrays of queries, keys and values, or of gate and value of SwiGLU. The original files of DINOv2,
DINOv3 (and LingBot, EUPE), DeiT III, EVA-02 and TIPSv2 differ from one of the two in few names, those of AIMv2 and Meta's
Perception Encoder in more.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.errors import WeightsError

from .layout import spelled

# Outside the blocks: beginnings of names -> ours.
OUTSIDE = {
    "register_tokens": "reg_token", "storage_tokens": "reg_token", "linear_head.": "head.",
    "preprocessor.patchifier.proj.": "patch_embed.proj.", "preprocessor.patchifier.norm.": "patch_embed.norm.",     # AIMv2
    "preprocessor.pos_embed": "pos_embed", "trunk.post_trunk_norm.": "norm.", "trunk.blocks.": "blocks.",
}
# timm has no module `stem` in a ResNet that is only a stem (R+Ti/16): its names -> ours.
STEM_ALONE = {"patch_embed.backbone.conv.": "patch_embed.backbone.stem.conv.",
              "patch_embed.backbone.norm.": "patch_embed.backbone.stem.norm."}
# Inside a block, after its number: beginnings of names -> ours.
INSIDE = {
    "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "attn.q_proj.bias": "attn.q_bias", "attn.v_proj.bias": "attn.v_bias",
    "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2.",                 # transformers' TIPSv2
    "attn.inner_attn_ln.": "attn.norm.", "mlp.ffn_ln.": "mlp.norm.", "mlp.w12.": "mlp.fc1.", "mlp.w1.": "mlp.fc1_g.",
    "mlp.w2.": "mlp.fc1_x.", "mlp.w3.": "mlp.fc2.",
}
AIMV2_INSIDE = {"norm_1.": "norm1.", "norm_2.": "norm2.", "mlp.fc1.": "mlp.fc1_g.", "mlp.fc3.": "mlp.fc1_x."}
# Meta's Perception Encoder and OpenAI's CLIP, outside and inside the residual blocks.
PE_OUTSIDE = {
    "conv1.": "patch_embed.proj.", "class_embedding": "cls_token", "positional_embedding": "pos_embed", "ln_pre.": "norm_pre.",
    "ln_post.": "norm.", "transformer.resblocks.": "blocks.", "attn_pool.probe": "attn_pool.latent",
    "attn_pool.attn.in_proj_": "attn_pool.qkv.", "attn_pool.attn.out_proj.": "attn_pool.proj.",
    "attn_pool.layernorm.": "attn_pool.norm.", "attn_pool.mlp.c_fc.": "attn_pool.mlp.fc1.",
    "attn_pool.mlp.c_proj.": "attn_pool.mlp.fc2.",
}
PE_INSIDE = {"ln_1.": "norm1.", "ln_2.": "norm2.", "attn.in_proj_": "attn.qkv.", "attn.out_proj.": "attn.proj.",
             "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2.", "ls_1.": "ls1.", "ls_2.": "ls2."}
PE_FLAT = ("cls_token", "pos_embed")                       # (D) and (n, D)
# Arrays that only pre-training uses, and tables that are computed here.
LEFT_OUT = re.compile(r"decoder_|mask_token$|head\.mlp\.|head\.last_layer\.|lm_head\.|projectors\.|local_cls_norm\.|proj$"
                      r"|.*\bbias_mask$|(.*\.)?rope\.freqs_(cos|sin)$|rope_embed\.periods$|rope\.periods$")
BLOCK = re.compile(r"blocks\.(\d+)\.(?:(\d+)\.)?")          # the second number: DINOv2's blocks in chunks, counted together

_BLOCK = "blocks.{i}."
FIXED_ROWS = (("pos_embed", ("pos_embed",), "position"),)
QKV_SPLIT = tuple((f"{_BLOCK}attn.qkv.{kind}", tuple(f"{_BLOCK}attn.{part}_proj.{kind}" for part in "qkv"), "join")
                  for kind in ("weight", "bias"))
QV_BIAS = tuple((f"{_BLOCK}attn.qkv.{part}_bias", (f"{_BLOCK}attn.{part}_bias",), "copy") for part in "qv")
MASKED_BIAS = tuple((f"{_BLOCK}attn.qkv.{part}_bias", (f"{_BLOCK}attn.qkv.bias",), f"{part}_of_qkv") for part in "qv")
GATE_SPLIT = tuple((f"{_BLOCK}mlp.fc1.{kind}", (f"{_BLOCK}mlp.fc1_g.{kind}", f"{_BLOCK}mlp.fc1_x.{kind}"), "halves")
                   for kind in ("weight", "bias"))
POOL_PACKED = tuple((f"attn_pool.{part}.{kind}", (f"attn_pool.qkv.{kind}",), f"{part}_of_qkv")
                    for part in ("q", "kv") for kind in ("weight", "bias"))


class Resolved(NamedTuple):
    """The arrays under one set of names, and the rows that convert them to parameters."""

    names: dict[str, str]                   # {name here: name in the file}
    left_out: tuple[str, ...]               # the `names` that are not part of the model
    fixed_rows: tuple
    block_rows: tuple
    folded: bool                            # see Layout
    flat: tuple[str, ...]                   # see Layout


def resolve(path: object, names: dict[str, str], rename: Callable, read: Callable[[str], Tensor]) -> Resolved:
    """Translate the names of a file of timm or of a similar program.

    names: {name without prefixes: name in the file}; rename(names, function) returns new ones; read(name in the file) returns an
    array. Raises WeightsError for biases that no model here supports.
    """
    found = {name: name for name in names}
    meta = "transformer.resblocks.0.ln_1.weight" in found
    outside = PE_OUTSIDE if meta else OUTSIDE | STEM_ALONE
    inside = PE_INSIDE if meta else AIMV2_INSIDE if "trunk.blocks.0.norm_1.weight" in found else INSIDE
    if any(name.startswith("blocks_token_only.") for name in found):                # CaiT has its own names
        inside = {}
    spelled = rename(names, lambda name: _spelled(name, outside, inside))
    if "lm_head.weight" in spelled and "fc_norm.weight" not in spelled:             # EVA-02's pre-training: timm moves it too
        spelled = rename(spelled, lambda name: re.sub(r"^norm\.", "fc_norm.", name))
    first = {name.removeprefix("blocks.0.") for name in spelled if name.startswith("blocks.0.")}
    blocks = ()
    if "attn.q_proj.weight" in first:
        blocks += QKV_SPLIT
    if "attn.q_bias" in first:
        blocks += QV_BIAS
    elif "storage_tokens" in found and "attn.qkv.bias" in first:
        _check_masked(path, spelled, read)
        blocks += MASKED_BIAS
    if "mlp.fc1_g.weight" in first:
        blocks += GATE_SPLIT
    fixed = FIXED_ROWS + (POOL_PACKED if "attn_pool.qkv.weight" in spelled else ())
    left = tuple(name for name in spelled if LEFT_OUT.match(name))
    return Resolved(spelled, left, fixed, blocks, "register_tokens" in found, PE_FLAT if meta else ())


def _spelled(name: str, outside: dict[str, str], inside: dict[str, str]) -> str:
    name = spelled(name, outside)
    block = BLOCK.match(name)
    if not block:
        return name
    return f"blocks.{block[2] or block[1]}.{spelled(name[block.end():], inside)}"


def _check_masked(path: object, names: dict[str, str], read: Callable[[str], Tensor]) -> None:
    """Raise WeightsError unless the keys' part of every qkv.bias is masked or zero, because models here would ignore it."""
    for name, source in names.items():
        if not re.fullmatch(r"blocks\.\d+\.attn\.qkv\.bias", name):
            continue
        bias = read(source)
        mask = read(names[f"{name}_mask"]) if f"{name}_mask" in names else torch.ones_like(bias)
        fits = bias.dim() == 1 and mask.shape == bias.shape and len(bias) % 3 == 0
        if not fits or not (mask.view(3, -1)[::2] == 1).all() or (bias * mask).chunk(3)[1].any():
            raise WeightsError(f"{path}: {source} has a bias for keys, or its bias_mask is not that of DINOv3 (1 for queries and "
                               "values, 0 for keys), which no model here supports")
