"""The state dict of one of our models with the names of transformers and of lucidrains' vit-pytorch, written independently of the
product's key maps."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]
QKV, LATER_QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value"), tuple(
    f"attention.{part}_proj" for part in "qkv")


def renamed(state: State, names: dict[str, str], block: str, inside: dict[str, str]) -> State:
    """Rename arrays. names, inside: our prefixes and theirs, outside of the blocks and inside a block; block: their prefix of a
    block, with {} for its number."""
    found = {}
    for name, value in state.items():
        number = re.match(r"blocks\.(\d+)\.", name)
        rest = name.removeprefix(number[0]) if number else name
        table = inside if number else names
        ours = max((ours for ours in table if rest == ours or rest.startswith(f"{ours}.")), key=len)
        found[(block.format(number[1]) if number else "") + table[ours] + rest.removeprefix(ours)] = value
    return found


def apart(state: State, of: str, parts: tuple[str, ...]) -> State:
    """Split arrays whose names contain `of` into several, along their first axis."""
    found = {}
    for name, value in state.items():
        if f"{of}." in name:
            found |= {name.replace(of, part): piece.clone() for part, piece in zip(parts, value.chunk(len(parts)))}
        else:
            found[name] = value
    return found


def dinov2(state: State, later: bool = False) -> State:
    """With registers, their position embeddings also have a row for the cls token, which our token includes."""
    scales = {f"ls{n}.gamma": f"layer_scale{n}.lambda1" for n in (1, 2)}
    gated = state["blocks.0.mlp.fc1.bias"].numel() == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
    fc = ("mlp.weights_in", "mlp.weights_out") if gated else ("mlp.fc1", "mlp.fc2")
    found = renamed(state, {
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens", "pos_embed": "embeddings.position_embeddings", "norm": "layernorm",
        "head": "classifier"}, "encoder.layer.{}.", {
        "norm1": "norm1", "norm2": "norm2", "attn.qkv": "QKV", "mlp.fc1": fc[0], "mlp.fc2": fc[1],
        "attn.proj": "attention.o_proj" if later else "attention.output.dense", **scales})
    if gated and later:
        found = apart({name.replace("weights_out", "down_proj"): value for name, value in found.items()}, "weights_in",
                      ("gate_proj", "up_proj"))
    if "reg_token" in state:
        first = torch.full_like(state["cls_token"], 0.25)
        found["embeddings.cls_token"] = state["cls_token"] - first
        found["embeddings.position_embeddings"] = torch.cat([first, state["pos_embed"]], dim=1)
    return apart(found, "QKV", LATER_QKV if later else QKV) | {"embeddings.mask_token": torch.ones(1, 24)}


def dinov3(state: State, later: bool = False) -> State:
    gated = state["blocks.0.mlp.fc1.bias"].numel() == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
    found = renamed({name: value for name, value in state.items() if not name.startswith("head")}, {
        "patch_embed.proj": "embeddings.patch_embeddings", "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens", "norm": "norm"}, "model.layer.{}." if later else "layer.{}.", {
        "norm1": "norm1", "norm2": "norm2", "attn.qkv.weight": "QKV.weight", "attn.qkv.q_bias": "attention.q_proj.bias",
        "attn.qkv.v_bias": "attention.v_proj.bias", "attn.proj": "attention.o_proj", "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1", "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"})
    if gated:
        found = apart(found, "up_proj", ("gate_proj", "up_proj"))
    return apart(found, "QKV", LATER_QKV) | {"embeddings.mask_token": torch.ones(1, 1, 24)}


def vision_tower(state: State) -> State:
    """Names of CLIP's and SigLIP's vision towers."""
    found = renamed(state, {
        "patch_embed.proj": "embeddings.patch_embedding", "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding.weight", "norm_pre": "pre_layrnorm", "norm": "post_layernorm",
        "head": "classifier", "attn_pool.latent": "head.probe", "attn_pool.q": "head.q", "attn_pool.kv": "head.kv",
        "attn_pool.proj": "head.attention.out_proj", "attn_pool.norm": "head.layernorm", "attn_pool.mlp": "head.mlp"},
        "encoder.layers.{}.", {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "QKV", "mlp": "mlp",
                               "attn.proj": "self_attn.out_proj"})
    found["embeddings.position_embedding.weight"] = found["embeddings.position_embedding.weight"][0]
    if "cls_token" in state:
        found["embeddings.class_embedding"] = found["embeddings.class_embedding"].flatten()
    for kind in ("weight", "bias") if "head.probe" in found else ():
        found[f"head.attention.in_proj_{kind}"] = torch.cat([found.pop(f"head.{part}.{kind}") for part in ("q", "kv")])
    return apart(found, "QKV", tuple(f"self_attn.{part}_proj" for part in "qkv"))


def both_towers(state: State) -> State:
    """Names of a file that also has a text tower."""
    own = {name if name.startswith("classifier") else f"vision_model.{name}": value
           for name, value in vision_tower(state).items()}
    text = {"text_model.embeddings.token_embedding.weight": torch.ones(3, 2),
            "text_model.encoder.layers.0.mlp.fc1.bias": torch.ones(2), "text_projection.weight": torch.ones(2, 2),
            "visual_projection.weight": torch.ones(2, 24), "logit_scale": torch.ones(()), "logit_bias": torch.ones(1),
            "vision_model.embeddings.position_ids": torch.arange(17)[None]}                    # in older files
    return own | text


def of_any_shape(state: State) -> State:
    """Names of SigLIP 2 with a linear patch embedding: the pixels of a patch, rows first and channels last."""
    found = vision_tower(state)
    kernel = found["embeddings.patch_embedding.weight"]
    return found | {"embeddings.patch_embedding.weight": kernel.permute(0, 2, 3, 1).flatten(1)}


def aimv2(state: State) -> State:
    found = renamed({name: value for name, value in state.items() if not name.startswith("head")}, {
        "patch_embed.proj": "embeddings.patch_embed", "patch_embed.norm": "embeddings.rms_norm", "norm": "rms_norm",
        "pos_embed": "embeddings.position_embedding.weight"}, "encoder.layers.{}.", {
        "norm1": "rms_norm1", "norm2": "rms_norm2", "attn.qkv": "QKV", "attn.proj": "attention.out_proj", "mlp.fc1": "ffn.fc1",
        "mlp.fc2": "ffn.down_proj"})
    found["embeddings.position_embedding.weight"] = found["embeddings.position_embedding.weight"][0]
    return apart(apart(found, "QKV", LATER_QKV), "ffn.fc1", ("ffn.gate_proj", "ffn.up_proj")) | {
        "head.cls_token": torch.ones(1, 1, 24), "head.k_proj.weight": torch.ones(24, 24)}


def lucidrains(state: State, kind: str = "vit") -> State:
    """kind: "vit" or "simple" of today; "2021": without norms around the patches, and with one in the head."""
    old, simple = kind == "2021", kind == "simple"
    fn = "fn." if old else ""
    found = renamed(state, {
        "patch_embed.norm_in": "to_patch_embedding.1", "patch_embed.proj": f"to_patch_embedding.{1 if old else 2}",
        "patch_embed.norm": "to_patch_embedding.3", "cls_token": "cls_token", "pos_embed": "pos_embedding",
        "norm": "mlp_head.0" if old else "transformer.norm",
        "head": "mlp_head.1" if old else "linear_head" if simple else "mlp_head"}, "transformer.layers.{}.", {
        "norm1": "0.norm", "attn.qkv": f"0.{fn}to_qkv", "attn.proj": f"0.{fn}to_out{'' if simple else '.0'}",
        "norm2": "1.norm" if old else "1.net.0", "mlp.fc1": "1.fn.net.0" if old else "1.net.1",
        "mlp.fc2": "1.fn.net.3" if old else "1.net.3" if simple else "1.net.4"})
    kernel = next(name for name, value in found.items() if value.dim() == 4)
    found[kernel] = found[kernel].permute(0, 2, 3, 1).flatten(1)
    if simple:
        del found["pos_embedding"]
    elif not old:
        found["pos_embedding"] = found["pos_embedding"][0]
        found["cls_token"] = found["cls_token"][0] if "cls_token" in found else torch.empty(0, 24)
    return found


def openai(state: State, prefix: str = "visual.") -> State:
    """Names of OpenAI's CLIP and Meta's PE, with the text tower at the top level."""
    found = renamed({name: value for name, value in state.items() if not name.startswith("head")}, {
        "patch_embed.proj": "conv1", "cls_token": "class_embedding", "pos_embed": "positional_embedding", "norm_pre": "ln_pre",
        "norm": "ln_post", "attn_pool.latent": "attn_pool.probe", "attn_pool.q": "attn_pool.q", "attn_pool.kv": "attn_pool.kv",
        "attn_pool.proj": "attn_pool.attn.out_proj", "attn_pool.norm": "attn_pool.layernorm",
        "attn_pool.mlp.fc1": "attn_pool.mlp.c_fc", "attn_pool.mlp.fc2": "attn_pool.mlp.c_proj"}, "transformer.resblocks.{}.", {
        "norm1": "ln_1", "norm2": "ln_2", "attn.qkv.weight": "attn.in_proj_weight", "attn.qkv.bias": "attn.in_proj_bias",
        "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"})
    found["class_embedding"] = found["class_embedding"].flatten()
    found["positional_embedding"] = found["positional_embedding"][0]
    for kind in ("weight", "bias") if "attn_pool.probe" in found else ():
        found[f"attn_pool.attn.in_proj_{kind}"] = torch.cat([found.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv")])
    text = ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.ln_1.weight", "ln_final.weight",
            "logit_scale")
    text = {f"{prefix.removesuffix('visual.')}{name}": torch.ones(2) for name in text}
    return {prefix + name: value for name, value in (found | {"proj": torch.ones(24, 8)}).items()} | text


def later(names: Callable[..., State]) -> Callable[[State], State]:
    return lambda state: names(state, later=True)
