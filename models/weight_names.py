"""Data: our parameter names beside those of the published files, and the rule that turns one into the other.

A row is (our name, names in the file, rule). {i} counts the encoder blocks, {s} and {u} the ResNet's stages and
units. Rules are functions of the same name in pretrained.py:
  copy     same array                       dense    (in, out) -> (out, in)
  conv     HWIO -> OIHW                     vector   (1, 1, 1, C) -> (C)
  qkv      three (D, H, d) -> (3D, D)       qkv_bias three (H, d) -> (3D)
  out      (H, d, D) -> (D, D)              position (1, N, D), resized to the model's grid

Google's files come in two spellings of the encoder block. "pre-linen" is every file published in 2020 and 2021
(ImageNet-21k, SAM, AugReg); "linen" is what Flax's linen modules name by themselves, in checkpoints saved by later
versions of Google's code. Numbers count the sub-modules of a block: of all kinds together, or of each kind.
"""

GOOGLE_EMBEDDING = (
    ("patch_embed.proj.weight", ("embedding/kernel",), "conv"),
    ("patch_embed.proj.bias", ("embedding/bias",), "copy"),
    ("cls_token", ("cls",), "copy"),
    ("pos_embed", ("Transformer/posembed_input/pos_embedding",), "position"),
    ("norm.weight", ("Transformer/encoder_norm/scale",), "copy"),
    ("norm.bias", ("Transformer/encoder_norm/bias",), "copy"),
)
GOOGLE_HEAD = (
    ("pre_logits.fc.weight", ("pre_logits/kernel",), "dense"),
    ("pre_logits.fc.bias", ("pre_logits/bias",), "copy"),
    ("head.weight", ("head/kernel",), "dense"),
    ("head.bias", ("head/bias",), "copy"),
)


def _google_block(norm1: str, attention: str, norm2: str, mlp: str) -> tuple:
    block = "Transformer/encoderblock_{i}/"
    qkv = [f"{block}{attention}/{part}" for part in ("query", "key", "value")]
    return (
        ("blocks.{i}.norm1.weight", (f"{block}{norm1}/scale",), "copy"),
        ("blocks.{i}.norm1.bias", (f"{block}{norm1}/bias",), "copy"),
        ("blocks.{i}.attn.qkv.weight", tuple(f"{part}/kernel" for part in qkv), "qkv"),
        ("blocks.{i}.attn.qkv.bias", tuple(f"{part}/bias" for part in qkv), "qkv_bias"),
        ("blocks.{i}.attn.proj.weight", (f"{block}{attention}/out/kernel",), "out"),
        ("blocks.{i}.attn.proj.bias", (f"{block}{attention}/out/bias",), "copy"),
        ("blocks.{i}.norm2.weight", (f"{block}{norm2}/scale",), "copy"),
        ("blocks.{i}.norm2.bias", (f"{block}{norm2}/bias",), "copy"),
        ("blocks.{i}.mlp.fc1.weight", (f"{block}{mlp}/Dense_0/kernel",), "dense"),
        ("blocks.{i}.mlp.fc1.bias", (f"{block}{mlp}/Dense_0/bias",), "copy"),
        ("blocks.{i}.mlp.fc2.weight", (f"{block}{mlp}/Dense_1/kernel",), "dense"),
        ("blocks.{i}.mlp.fc2.bias", (f"{block}{mlp}/Dense_1/bias",), "copy"),
    )


# The dialects of the encoder block, by the member that tells them apart.
GOOGLE_BLOCKS = {
    "MultiHeadDotProductAttention_1": _google_block(
        "LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"),        # pre-linen
    "MultiHeadDotProductAttention_0": _google_block(
        "LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),        # linen
}

_STEM = "patch_embed.backbone.stem."
_UNIT = "patch_embed.backbone.stages.{s}.blocks.{u}."
GOOGLE_STEM = (
    (f"{_STEM}conv.weight", ("conv_root/kernel",), "conv"),
    (f"{_STEM}norm.weight", ("gn_root/scale",), "vector"),
    (f"{_STEM}norm.bias", ("gn_root/bias",), "vector"),
)
# The file counts blocks and units from 1: {S} = s + 1, {U} = u + 1.
GOOGLE_UNIT = tuple(
    row for n in (1, 2, 3) for row in (
        (f"{_UNIT}conv{n}.weight", (f"block{{S}}/unit{{U}}/conv{n}/kernel",), "conv"),
        (f"{_UNIT}norm{n}.weight", (f"block{{S}}/unit{{U}}/gn{n}/scale",), "vector"),
        (f"{_UNIT}norm{n}.bias", (f"block{{S}}/unit{{U}}/gn{n}/bias",), "vector"),
    )
)
GOOGLE_PROJECTION = (
    (f"{_UNIT}downsample.conv.weight", ("block{S}/unit{U}/conv_proj/kernel",), "conv"),
    (f"{_UNIT}downsample.norm.weight", ("block{S}/unit{U}/gn_proj/scale",), "vector"),
    (f"{_UNIT}downsample.norm.bias", ("block{S}/unit{U}/gn_proj/bias",), "vector"),
)

# A whole train state instead of weights (SAM's ViT-S_16): the weights stand under this prefix, and the optimizer's
# own entries under the same root are left out.
TRAIN_STATE_PREFIX, TRAIN_STATE_ROOT = "opt/target/", "opt/"
