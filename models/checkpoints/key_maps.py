"""Data: our parameter names, the names in published files, and the conversions between the two.

A row is (our name, names in the file, conversion). {i} counts the encoder blocks, {s} and {u} the ResNet's stages and
units. Conversions are the entries of CONVERSIONS in conversions.py:
  copy     same array                       dense    (in, out) -> (out, in)
  conv     HWIO -> OIHW                     vector   (1, 1, 1, C) -> (C)
  qkv      three (D, H, d) -> (3D, D)       qkv_bias three (H, d) -> (3D)
  out      (H, d, D) -> (D, D)              join     three arrays, one below the other      halves   two
  query, query_bias: as qkv of one array     kv, kv_bias: of two
  q_of_qkv, v_of_qkv, kv_of_qkv: the part of one array (3D, ...)          fold: of two, a row of positions added to the token
  patches  (D, P * P * C) -> OIHW           patches_dense (P * P * C, D) -> OIHW
  position (1, N, D), resized to the model's grid

The layouts are those of Google, transformers (Hugging Face) and three more programs. Our parameters have timm's names, which
DeiT, CaiT, MAE and DINO use too; the exceptions are in timm_names.py.
"""

# ------------------------------------------------------------------------------------------------------ Google

# Google's files name the parts of the encoder block in two ways. "pre-linen" are all files published in 2020 and 2021
# (ImageNet-21k, SAM, AugReg); "linen" are the automatic names of Flax's linen modules, in checkpoints of later versions of
# Google's code and of big_vision. The first numbers all sub-modules of a block together, the second those of each kind.
def _layer(ours: str, theirs: str, weight: str, conversion: str, bias: str = "copy") -> tuple:
    """Return the rows of a layer's weight, whose name in the file is `weight`, and of its bias."""
    return (f"{ours}.weight", (f"{theirs}/{weight}",), conversion), (f"{ours}.bias", (f"{theirs}/bias",), bias)


GOOGLE_EMBEDDING = (
    *_layer("patch_embed.proj", "embedding", "kernel", "conv"),
    ("cls_token", ("cls",), "copy"),
    ("pos_embed", ("Transformer/posembed_input/pos_embedding",), "position"),
    *_layer("norm", "Transformer/encoder_norm", "scale", "copy"),
)
GOOGLE_HEAD = (
    *_layer("pre_logits.fc", "pre_logits", "kernel", "dense"),
    *_layer("head", "head", "kernel", "dense"),
)


def _google_block(norm1: str, attention: str, norm2: str, mlp: str) -> tuple:
    block = "Transformer/encoderblock_{i}/"
    qkv = [f"{block}{attention}/{part}" for part in ("query", "key", "value")]
    return (
        *_layer("blocks.{i}.norm1", f"{block}{norm1}", "scale", "copy"),
        ("blocks.{i}.attn.qkv.weight", tuple(f"{part}/kernel" for part in qkv), "qkv"),
        ("blocks.{i}.attn.qkv.bias", tuple(f"{part}/bias" for part in qkv), "qkv_bias"),
        *_layer("blocks.{i}.attn.proj", f"{block}{attention}/out", "kernel", "out"),
        *_layer("blocks.{i}.norm2", f"{block}{norm2}", "scale", "copy"),
        *_layer("blocks.{i}.mlp.fc1", f"{block}{mlp}/Dense_0", "kernel", "dense"),
        *_layer("blocks.{i}.mlp.fc2", f"{block}{mlp}/Dense_1", "kernel", "dense"),
    )


# The variants of the encoder block, by the member that distinguishes them.
GOOGLE_BLOCKS = {
    # pre-linen
    "MultiHeadDotProductAttention_1": _google_block("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"),
    # linen
    "MultiHeadDotProductAttention_0": _google_block("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
}

_STEM = "patch_embed.backbone.stem."
_UNIT, _THEIR_UNIT = "patch_embed.backbone.stages.{s}.blocks.{u}.", "block{S}/unit{U}/"
GOOGLE_STEM = (
    (f"{_STEM}conv.weight", ("conv_root/kernel",), "conv"),
    *_layer(f"{_STEM}norm", "gn_root", "scale", "vector", bias="vector"),
)
# The file counts blocks and units from 1: {S} = s + 1, {U} = u + 1.
GOOGLE_UNIT = tuple(row for n in (1, 2, 3) for row in (
    (f"{_UNIT}conv{n}.weight", (f"{_THEIR_UNIT}conv{n}/kernel",), "conv"),
    *_layer(f"{_UNIT}norm{n}", f"{_THEIR_UNIT}gn{n}", "scale", "vector", bias="vector"),
))
GOOGLE_PROJECTION = (
    (f"{_UNIT}downsample.conv.weight", (f"{_THEIR_UNIT}conv_proj/kernel",), "conv"),
    *_layer(f"{_UNIT}downsample.norm", f"{_THEIR_UNIT}gn_proj", "scale", "vector", bias="vector"),
)

# big_vision (google-research/big_vision, models/vit.py) has another name for the position table. It adds positions before it
# prepends the cls token, so the table has no row for it; files converted from older ones may have one.
BIG_VISION_POSITIONS = ("pos_embedding", "Transformer/pos_embedding")
# It may also stack the arrays of all blocks, with the block as first dimension (models built with scan=True).
STACKED_BLOCKS, BLOCK_OF_STACK = "Transformer/encoderblock/", "Transformer/encoderblock_{i}/"
# Its pooling by attention (SigLIP). Older files lack the name of the module.
_ATTENTION, POOLING = "MultiHeadDotProductAttention_0", "MAPHead_0/"
GOOGLE_POOLING = (
    ("attn_pool.latent", (f"{POOLING}probe",), "copy"),
    *_layer("attn_pool.q", f"{POOLING}{_ATTENTION}/query", "kernel", "query", bias="query_bias"),
    ("attn_pool.kv.weight", tuple(f"{POOLING}{_ATTENTION}/{part}/kernel" for part in ("key", "value")), "kv"),
    ("attn_pool.kv.bias", tuple(f"{POOLING}{_ATTENTION}/{part}/bias" for part in ("key", "value")), "kv_bias"),
    *_layer("attn_pool.proj", f"{POOLING}{_ATTENTION}/out", "kernel", "out"),
    *_layer("attn_pool.norm", f"{POOLING}LayerNorm_0", "scale", "copy"),
    *_layer("attn_pool.mlp.fc1", f"{POOLING}MlpBlock_0/Dense_0", "kernel", "dense"),
    *_layer("attn_pool.mlp.fc2", f"{POOLING}MlpBlock_0/Dense_1", "kernel", "dense"),
)
OLDER_POOLING = {part: POOLING + part for part in ("probe", f"{_ATTENTION}/", "LayerNorm_0/", "MlpBlock_0/")}

# Weights under a prefix: the prefix, and how the names of other members may begin, which are left out.
GOOGLE_PREFIXES = (
    ("opt/target/", ("opt/",)),                                        # a whole train state, such as SAM's ViT-S_16
    ("params/img/", ("params/", "opt/", "extra/", "chrono/", "states/")),      # the image encoder of a model of images and text
    ("params/", ("opt/", "extra/", "chrono/", "states/")),             # big_vision
)

# ------------------------------------------------------------------------------------------------ transformers

TRANSFORMERS_PREFIXES = ("vit.", "deit.", "ijepa.")


def _both(ours: str, *theirs: str, conversion: str = "copy") -> tuple:
    """Return the rows of a layer's weight and bias, which have these kinds in the file too."""
    return tuple((f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), conversion) for kind in ("weight", "bias"))


TRANSFORMERS_EMBEDDING = (
    *_both("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("cls_token", ("embeddings.cls_token",), "copy"),
    ("dist_token", ("embeddings.distillation_token",), "copy"),
    ("pos_embed", ("embeddings.position_embeddings",), "position"),
    *_both("norm", "layernorm"),
)
TRANSFORMERS_HEAD = (*_both("head", "classifier"), *_both("head_dist", "distillation_classifier"))


def transformers_outside(one_head: bool) -> tuple:
    """Return the rows outside the blocks. DeiT with one head (DeiTForImageClassification) uses its second token as a register."""
    second = {"dist_token": "reg_token"} if one_head else {}
    return tuple((second.get(ours, ours), *row) for ours, *row in (*TRANSFORMERS_EMBEDDING, *TRANSFORMERS_HEAD))


# The distilled DeiT has another name for the first of its heads.
TRANSFORMERS_SPELLINGS = {"cls_classifier.": "classifier."}


def _transformers_block(block: str, qkv: tuple[str, ...], out: str, fc1: str, fc2: str) -> tuple:
    return (
        *_both("blocks.{i}.norm1", f"{block}layernorm_before"),
        *_both("blocks.{i}.attn.qkv", *(f"{block}{part}" for part in qkv), conversion="join"),
        *_both("blocks.{i}.attn.proj", f"{block}{out}"),
        *_both("blocks.{i}.norm2", f"{block}layernorm_after"),
        *_both("blocks.{i}.mlp.fc1", f"{block}{fc1}"),
        *_both("blocks.{i}.mlp.fc2", f"{block}{fc2}"),
    )


# The variants, by the member that distinguishes them: the names in files on the hub, which later versions still write, and the
# names in the state dict of a model since transformers 5.
TRANSFORMERS_BLOCKS = {
    "attention.attention.query": _transformers_block(
        "encoder.layer.{i}.", tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
        "attention.output.dense", "intermediate.dense", "output.dense"),
    "attention.q_proj": _transformers_block(
        "layers.{i}.", tuple(f"attention.{part}_proj" for part in "qkv"), "attention.o_proj", "mlp.fc1", "mlp.fc2"),
}
# The pooling layer of its pre-training, and the decoders of its masked autoencoders.
TRANSFORMERS_LEFT_OUT = ("pooler.", "decoder.", "embeddings.mask_token")

# -------------------------------------------------------------------------------------------- three more programs

# jeonsworld/ViT-pytorch (and rentainhe/ViT.pytorch, which has its model)
VIT_PYTORCH = (
    *_both("patch_embed.proj", "transformer.embeddings.patch_embeddings"),
    ("cls_token", ("transformer.embeddings.cls_token",), "copy"),
    ("pos_embed", ("transformer.embeddings.position_embeddings",), "position"),
    *_both("norm", "transformer.encoder.encoder_norm"),
    *_both("head", "head"),
)
_LAYER = "transformer.encoder.layer.{i}."
VIT_PYTORCH_BLOCK = (
    *_both("blocks.{i}.norm1", f"{_LAYER}attention_norm"),
    *_both("blocks.{i}.attn.qkv", *(f"{_LAYER}attn.{part}" for part in ("query", "key", "value")), conversion="join"),
    *_both("blocks.{i}.attn.proj", f"{_LAYER}attn.out"),
    *_both("blocks.{i}.norm2", f"{_LAYER}ffn_norm"),
    *_both("blocks.{i}.mlp.fc1", f"{_LAYER}ffn.fc1"),
    *_both("blocks.{i}.mlp.fc2", f"{_LAYER}ffn.fc2"),
)

_HYBRID = "transformer.embeddings.hybrid_model."
_THEIR_UNIT = f"{_HYBRID}body.block{{S}}.unit{{U}}."
VIT_PYTORCH_STEM = ((f"{_STEM}conv.weight", (f"{_HYBRID}root.conv.weight",), "copy"), *_both(f"{_STEM}norm", f"{_HYBRID}root.gn"))
VIT_PYTORCH_UNIT = tuple(row for n in (1, 2, 3) for row in (
    (f"{_UNIT}conv{n}.weight", (f"{_THEIR_UNIT}conv{n}.weight",), "copy"), *_both(f"{_UNIT}norm{n}", f"{_THEIR_UNIT}gn{n}")))
VIT_PYTORCH_PROJECTION = (
    (f"{_UNIT}downsample.conv.weight", (f"{_THEIR_UNIT}downsample.weight",), "copy"),
    *_both(f"{_UNIT}downsample.norm", f"{_THEIR_UNIT}gn_proj"),
)

# torchvision (vit_b_16, ...). Files from before 2022 name the MLP's layers differently.
TORCHVISION = (
    *_both("patch_embed.proj", "conv_proj"),
    ("cls_token", ("class_token",), "copy"),
    ("pos_embed", ("encoder.pos_embedding",), "position"),
    *_both("norm", "encoder.ln"),
    *_both("pre_logits.fc", "heads.pre_logits"),
    *_both("head", "heads.head"),
)
_LAYER = "encoder.layers.encoder_layer_{i}."
TORCHVISION_BLOCK = (
    *_both("blocks.{i}.norm1", f"{_LAYER}ln_1"),
    *((f"blocks.{{i}}.attn.qkv.{kind}", (f"{_LAYER}self_attention.in_proj_{kind}",), "copy") for kind in ("weight", "bias")),
    *_both("blocks.{i}.attn.proj", f"{_LAYER}self_attention.out_proj"),
    *_both("blocks.{i}.norm2", f"{_LAYER}ln_2"),
    *_both("blocks.{i}.mlp.fc1", f"{_LAYER}mlp.0"),
    *_both("blocks.{i}.mlp.fc2", f"{_LAYER}mlp.3"),
)
TORCHVISION_INSIDE = {".mlp.linear_1.": ".mlp.0.", ".mlp.linear_2.": ".mlp.3."}

# lukemelas/PyTorch-Pretrained-ViT. Its own model does not use pre_logits by default.
PRETRAINED_VIT = (
    *_both("patch_embed.proj", "patch_embedding"),
    ("cls_token", ("class_token",), "copy"),
    ("pos_embed", ("positional_embedding.pos_embedding",), "position"),
    *_both("norm", "norm"),
    *_both("head", "fc"),
)
_LAYER = "transformer.blocks.{i}."
PRETRAINED_VIT_BLOCK = (
    *_both("blocks.{i}.norm1", f"{_LAYER}norm1"),
    *_both("blocks.{i}.attn.qkv", *(f"{_LAYER}attn.proj_{part}" for part in "qkv"), conversion="join"),
    *_both("blocks.{i}.attn.proj", f"{_LAYER}proj"),
    *_both("blocks.{i}.norm2", f"{_LAYER}norm2"),
    *_both("blocks.{i}.mlp.fc1", f"{_LAYER}pwff.fc1"),
    *_both("blocks.{i}.mlp.fc2", f"{_LAYER}pwff.fc2"),
)
PRETRAINED_VIT_LEFT_OUT = ("pre_logits.",)

# ------------------------------------------------------------------------------------------- PyTorch's wrappers

# The entries in which files of PyTorch hold their weights; the first that exists counts. Without any, the file is the weights.
CONTAINERS = ("model", "state_dict", "model_state_dict", "model_ema", "state_dict_ema", "ema", "teacher", "student", "encoder")
# The entry of averaged weights, which the program evaluates, and that of the last step's (timm's training checkpoints).
AVERAGED_FIRST = {"state_dict_ema": "state_dict"}
# DINO's files hold two networks; DINO evaluates the first of these.
SELF_DISTILLED = ("teacher", "student")
# Prefixes that wrappers add to names: DistributedDataParallel (in CaiT's files), Lightning, detectors, torch.compile.
WRAPPER_PREFIXES = ("module.", "model.", "backbone.", "_orig_mod.")

# -------------------------------------------------------------------------------------- files of unsupported models

# (pattern of an array's name, what such a file is, for the message "it is ..."); the first that matches counts.
UNSUPPORTED = (
    (r"lora_[AB]|\.base_layer\.", "a LoRA adapter, or a model with one: merge it into its base model with peft "
                                  "(merge_and_unload), save the result, and use that"),
    (r"^(.*\.)?rope\.freqs$", "a model with learned rotary frequencies (timm's rope_mixed), which no model here supports"),
    (r"\.attn\.lambda_q1$", "a model with differential attention, which no model here supports"),
    (r"\.attn\.w[qkv]\.weight$", "a Sapiens2, whose keys and values have fewer heads, which no model here supports"),
    (r"^radio_model\.", "an original file of C-RADIO, whose names of tokens and patches are not known here; use timm's "
                        "(timm/vit_base_patch16_radio_v3.c_radio and others)"),
    (r"(^|\.)visual\.layer1\.", "the ResNet of a CLIP, but models here are Vision Transformers"),
    (r"relative_position_bias|encoder\.layer\.\d+\.lambda_1$",
     "a model with relative positions (Swin, BEiT), which no model here supports"),
)
# The same for files without an image encoder.
TEXT = (
    (r"(^|\.)token_embedding\.weight$", "only the text tower of a model like CLIP or SigLIP; use a file with its image tower"),
    (r"(^|\.)word_embeddings\.weight$|(^|\.)embed_tokens\.weight$", "a model for text, not for images"),
)
