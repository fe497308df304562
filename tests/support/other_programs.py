"""The state dict of one of our models with the names of other programs, written independently of the product's key maps."""

import re

from torch import Tensor

VIT_PYTORCH = {
    "patch_embed.proj": "transformer.embeddings.patch_embeddings", "cls_token": "transformer.embeddings.cls_token",
    "pos_embed": "transformer.embeddings.position_embeddings", "norm": "transformer.encoder.encoder_norm", "head": "head",
    "patch_embed.backbone.stem.conv": "transformer.embeddings.hybrid_model.root.conv",
    "patch_embed.backbone.stem.norm": "transformer.embeddings.hybrid_model.root.gn"}
TORCHVISION = {"patch_embed.proj": "conv_proj", "cls_token": "class_token", "pos_embed": "encoder.pos_embedding",
               "norm": "encoder.ln", "head": "heads.head"}
PRETRAINED_VIT = {"patch_embed.proj": "patch_embedding", "cls_token": "class_token",
                  "pos_embed": "positional_embedding.pos_embedding", "norm": "norm", "head": "fc"}
# for blocks: what is before their number, the names of their layers, and the parts of qkv (() if it is packed)
BLOCKS = {
    "vit_pytorch": ("transformer.encoder.layer.", {
        "norm1": "attention_norm", "attn.proj": "attn.out", "norm2": "ffn_norm", "mlp.fc1": "ffn.fc1", "mlp.fc2": "ffn.fc2"},
        ("attn.query", "attn.key", "attn.value")),
    "torchvision": ("encoder.layers.encoder_layer_", {
        "norm1": "ln_1", "attn.proj": "self_attention.out_proj", "norm2": "ln_2", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}, ()),
    "pretrained_vit": ("transformer.blocks.", {
        "norm1": "norm1", "attn.proj": "proj", "norm2": "norm2", "mlp.fc1": "pwff.fc1", "mlp.fc2": "pwff.fc2"},
        ("attn.proj_q", "attn.proj_k", "attn.proj_v")),
}
OUTSIDE = {"vit_pytorch": VIT_PYTORCH, "torchvision": TORCHVISION, "pretrained_vit": PRETRAINED_VIT}


def renamed(state: dict[str, Tensor], program: str) -> dict[str, Tensor]:
    found, (before, layers, parts) = {}, BLOCKS[program]
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.*)", layer)
        unit = re.fullmatch(r"patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.(.*)", layer)
        if unit:
            inner = {"downsample.conv": "downsample", "downsample.norm": "gn_proj"}.get(unit[3], unit[3].replace("norm", "gn"))
            found["transformer.embeddings.hybrid_model.body."
                  f"block{int(unit[1]) + 1}.unit{int(unit[2]) + 1}.{inner}.{kind}"] = value
        elif block and block[2] == "attn.qkv" and parts:
            for part, third in zip(parts, value.chunk(3)):
                found[f"{before}{block[1]}.{part}.{kind}"] = third.clone()
        elif block and block[2] == "attn.qkv":
            found[f"{before}{block[1]}.self_attention.in_proj_{kind}"] = value
        elif block:
            found[f"{before}{block[1]}.{layers[block[2]]}.{kind}"] = value
        else:
            found[OUTSIDE[program][name] if not layer else f"{OUTSIDE[program][layer]}.{kind}"] = value
    return found


def transformers_names(state: dict, prefix: str, later: bool = False) -> dict:
    """Convert timm's names to those of the files on the hub or, if `later`, of a model's state dict since transformers 5."""
    block = [("attn.proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense")]
    if later:
        block = [("attn.proj", "attention.o_proj")]
    outside = [("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("cls_token", "embeddings.cls_token"),
               ("dist_token", "embeddings.distillation_token"), ("pos_embed", "embeddings.position_embeddings"),
               ("norm", "layernorm")]
    renamed = {}
    for name, value in state.items():
        if name.startswith("head"):
            distilled = "dist_token" in state
            new = {"head": "cls_classifier" if distilled else "classifier", "head_dist": "distillation_classifier"}
            renamed[".".join([new[name.split(".")[0]], name.split(".")[1]])] = value
        elif name.startswith("blocks."):
            i, rest = re.fullmatch(r"blocks\.(\d+)\.(.*)", name).groups()
            rest = rest.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
            for ours, theirs in block:
                rest = rest.replace(ours, theirs)
            layer = f"{prefix}layers.{i}." if later else f"{prefix}encoder.layer.{i}."
            if rest.startswith("attn.qkv"):
                parts = ["q_proj", "k_proj", "v_proj"] if later else ["attention.query", "attention.key", "attention.value"]
                for part, third in zip(parts, value.chunk(3)):
                    renamed[f"{layer}attention.{part}.{rest.split('.')[-1]}"] = third.clone()
            else:
                renamed[layer + rest] = value
        else:
            ours, theirs = next(pair for pair in outside if name.startswith(pair[0]))
            renamed[prefix + name.replace(ours, theirs)] = value
    return renamed
