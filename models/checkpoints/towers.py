"""Data: names of the arrays of image encoders in files of transformers and of lucidrains' vit-pytorch.

Rows are as in key_maps.py: (our name, names in the file, conversion). Here a parameter may have several rows, for the names that
versions of a program give it. A file has one of them; published files have the first.
"""

from typing import NamedTuple

from .described import HALF


class Tower(NamedTuple):
    """The files of one family in the names of one program. layouts.py makes a Program of it."""

    title: str                                 # for messages, "file of ..."
    anchor: str                                # a name that each of its files has once, perhaps after a prefix
    companion: str                             # a part of names that distinguishes it from others
    roots: tuple[str, ...]                     # the first words of its names
    outside: tuple                             # rows outside the blocks
    block: tuple                               # rows of a block
    row: dict                                  # keys of a model's row that the program fixes
    needs: tuple[str, ...]                     # optional parameters of a model that every such file has
    prefixes: tuple[str, ...] = ()             # prefixes that belong to some of its own names
    spellings: dict[str, str] = {}             # other beginnings of names -> these
    left_out: tuple[str, ...] = ()             # beginnings of names that are not part of the image encoder
    flat: tuple[str, ...] = ()                 # see Layout
    folded: bool = False                       # see Layout
    head_row: dict = {}                        # keys of the row if the file has a classifier
    unread: tuple[str, ...] = ()               # parts of our model that this classifier does not use
    linear_row: dict = {}                      # keys of the row if the patch embedding is a linear layer
    token_note: str = ""                       # a note for files with a cls token


Names = str | tuple[str, ...]                  # a layer in the file, or two or three that make up one layer here


def _layers(before: str, layers: dict[str, Names | list[Names]]) -> tuple:
    """Return rows of weights and biases. layers: {our name: theirs after `before`, or a list of those of several versions}."""
    rows = []
    for ours, versions in layers.items():
        for names in versions if isinstance(versions, list) else [versions]:
            names = (names,) if isinstance(names, str) else names
            how = ("copy", "halves", "join")[len(names) - 1]
            rows += [(f"{ours}.{kind}", tuple(f"{before}{name}.{kind}" for name in names), how) for kind in ("weight", "bias")]
    return tuple(rows)


def _arrays(before: str, arrays: dict[str, str]) -> tuple:
    """Return rows of arrays that are copied unchanged. arrays: {our name: theirs after `before`}."""
    return tuple((ours, (before + theirs,), "copy") for ours, theirs in arrays.items())


def _pooling(before: str, attention: str, layers: dict[str, str]) -> tuple:
    """Return rows of PyTorch's MultiheadAttention with one learned query, `probe`, and of the layers after it."""
    projections = {"attn_pool.proj": f"{attention}.out_proj"} | {f"attn_pool.{ours}": theirs for ours, theirs in layers.items()}
    return (
        ("attn_pool.latent", (f"{before}probe",), "copy"),
        *((f"attn_pool.{part}.{kind}", (f"{before}{attention}.in_proj_{kind}",), f"{part}_of_qkv")
          for part in ("q", "kv") for kind in ("weight", "bias")),
        *_layers(before, projections),
    )


CLIP_MEAN = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}

# ------------------------------------------------------------------------------------------------ transformers

_QKV = tuple(f"attention.{part}_proj" for part in "qkv")
_SCALES = {f"blocks.{{i}}.ls{n}.gamma": f"layer_scale{n}.lambda1" for n in (1, 2)}

_LAYER = "encoder.layer.{i}."
_DINOV2_OUTSIDE = (
    *_layers("", {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm", "head": "classifier"}),
    *_arrays("embeddings.", {"cls_token": "cls_token", "reg_token": "register_tokens"}),
    ("pos_embed", ("embeddings.position_embeddings",), "position"),
)
_DINOV2_BLOCK = (
    *_layers(_LAYER, {
        "blocks.{i}.norm1": "norm1", "blocks.{i}.norm2": "norm2",
        "blocks.{i}.attn.qkv": [tuple(f"attention.attention.{part}" for part in ("query", "key", "value")), _QKV],
        "blocks.{i}.attn.proj": ["attention.output.dense", "attention.o_proj"],
        "blocks.{i}.mlp.fc1": ["mlp.fc1", "mlp.weights_in", ("mlp.gate_proj", "mlp.up_proj")],
        "blocks.{i}.mlp.fc2": ["mlp.fc2", "mlp.weights_out", "mlp.down_proj"]}),
    *_arrays(_LAYER, _SCALES),
)
_ROOTS = ("embeddings", "encoder", "layernorm", "classifier")
_NEEDS = ("patch_embed.proj.bias", "cls_token")
DINOV2 = Tower(
    "DINOv2", "embeddings.patch_embeddings.projection.weight", "layer_scale1.lambda1", ("dinov2", *_ROOTS), _DINOV2_OUTSIDE,
    _DINOV2_BLOCK, {"gelu": "erf", "norm_eps": 1e-6, "position_resize": "bicubic"}, (*_NEEDS, "pos_embed"), ("dinov2.",),
    left_out=("embeddings.mask_token",))
DINOV2_REGISTERS = DINOV2._replace(
    title="DINOv2 with registers", anchor="embeddings.register_tokens", companion="encoder.layer.",
    roots=("dinov2_with_registers", *_ROOTS), row={"gelu": "erf", "norm_eps": 1e-6},      # also TIPSv2, with another resizing
    needs=(*DINOV2.needs, "reg_token"), prefixes=("dinov2_with_registers.", "vision_model."), folded=True)
# A file with this prefix belongs to that family, even if its registers are missing.
DINOV2_BY_PREFIX = DINOV2_REGISTERS._replace(anchor=DINOV2.anchor, companion="dinov2_with_registers.")

_LAYER = "layer.{i}."
DINOV3 = Tower(
    "DINOv3", "embeddings.patch_embeddings.weight", "layer_scale1.lambda1", ("dinov3_vit", "embeddings", "layer", "norm"), (
        *_layers("", {"patch_embed.proj": "embeddings.patch_embeddings", "norm": "norm", "head": "classifier"}),
        *_arrays("embeddings.", {"cls_token": "cls_token", "reg_token": "register_tokens"}),
    ), (
        *_layers(_LAYER, {
            "blocks.{i}.norm1": "norm1", "blocks.{i}.norm2": "norm2", "blocks.{i}.attn.qkv": _QKV,
            "blocks.{i}.attn.proj": "attention.o_proj", "blocks.{i}.mlp.fc1": [("mlp.gate_proj", "mlp.up_proj"), "mlp.up_proj"],
            "blocks.{i}.mlp.fc2": "mlp.down_proj"}),
        *_arrays(_LAYER, {f"blocks.{{i}}.attn.qkv.{part}_bias": f"attention.{part}_proj.bias" for part in "qv"} | _SCALES),
    ),
    {"gelu": "erf", "norm_eps": 1e-5, "rope": "dinov3"}, (*_NEEDS, "reg_token"), ("dinov3_vit.",), {"model.layer.": "layer."},
    left_out=("embeddings.mask_token", "rope_embeddings."))

# The image towers of CLIP, MetaCLIP and SigLIP, and the arrays that a file of both towers has in addition.
_BESIDE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias", "embeddings.position_ids")
_ROOTS = ("vision_model", "embeddings", "encoder", "pre_layrnorm", "post_layernorm", "rms_norm", "head", "classifier",
          *(name.rstrip(".") for name in _BESIDE[:-1]))
_FLAT = ("embeddings.class_embedding", "embeddings.position_embedding.weight")
_LAYER = "encoder.layers.{i}."
_CLIP_OUTSIDE = (
    *_layers("", {"patch_embed.proj": "embeddings.patch_embedding", "norm_pre": "pre_layrnorm", "norm": "post_layernorm",
                  "head": "classifier"}),
    ("cls_token", ("embeddings.class_embedding",), "copy"),
    ("pos_embed", ("embeddings.position_embedding.weight",), "position"),
)
_CLIP_BLOCK = _layers(_LAYER, {
    "blocks.{i}.norm1": "layer_norm1", "blocks.{i}.norm2": "layer_norm2",
    "blocks.{i}.attn.qkv": tuple(f"self_attn.{part}_proj" for part in "qkv"), "blocks.{i}.attn.proj": "self_attn.out_proj",
    "blocks.{i}.mlp.fc1": "mlp.fc1", "blocks.{i}.mlp.fc2": "mlp.fc2"})
# Only config.json says whether its GELU is OpenAI's quick form. Its classifier reads the patches after the last block. PE has the
# same arrays except for its pooling, and rotates queries and keys.
CLIP = Tower(
    "CLIP", "embeddings.patch_embedding.weight", "pre_layrnorm.", _ROOTS, _CLIP_OUTSIDE, _CLIP_BLOCK,
    {"norm_eps": 1e-5, "position_resize": "bicubic", "rope": "", **CLIP_MEAN}, ("cls_token", "pos_embed", "norm.weight"),
    ("vision_model.",), left_out=_BESIDE, flat=_FLAT, head_row={"classifier": "mean", "final_norm": False}, unread=("norm",))
_SIGLIP_POOLING = _pooling("head.", "attention", {"norm": "layernorm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"})
SIGLIP = Tower(
    "SigLIP", "embeddings.patch_embedding.weight", "post_layernorm.", _ROOTS, (*_CLIP_OUTSIDE, *_SIGLIP_POOLING), _CLIP_BLOCK,
    {"gelu": "tanh", "norm_eps": 1e-6, "position_resize": "bicubic", **HALF}, ("patch_embed.proj.bias", "pos_embed"),
    ("vision_model.",), left_out=_BESIDE, flat=_FLAT, head_row={"classifier": "mean"}, unread=("attn_pool",),
    linear_row={"position_resize": "bilinear_antialias"})             # NaFlex: SigLIP 2 for images of any shape
# Its own pooling, `head`, is not supported: it has no MLP, and no layer projects its query.
AIMV2 = Tower(
    "AIMv2 (for images of one size)", "embeddings.patch_embed.weight", "rms_norm1.", _ROOTS, (
        *_layers("", {"patch_embed.proj": "embeddings.patch_embed", "patch_embed.norm": "embeddings.rms_norm",
                      "norm": "rms_norm"}),
        ("pos_embed", ("embeddings.position_embedding.weight",), "position"),
    ), _layers(_LAYER, {
        "blocks.{i}.norm1": "rms_norm1", "blocks.{i}.norm2": "rms_norm2", "blocks.{i}.attn.qkv": _QKV,
        "blocks.{i}.attn.proj": "attention.out_proj", "blocks.{i}.mlp.fc1": ("ffn.gate_proj", "ffn.up_proj"),
        "blocks.{i}.mlp.fc2": "ffn.down_proj"}),
    {"norm_eps": 1e-5, **CLIP_MEAN}, ("patch_embed.proj.bias", "patch_embed.norm.weight", "norm.weight", "pos_embed"),
    ("vision_model.",), left_out=("head.", *_BESIDE), flat=_FLAT)

# ------------------------------------------------------------------------------------- lucidrains' vit-pytorch

_LAYER = "transformer.layers.{i}."
# Its current blocks, those of SimpleViT (no dropout between the layers of its MLP) and, with `fn`, those from before 2023.
_LUCIDRAINS_BLOCK = (
    *_layers(_LAYER, {
        "blocks.{i}.norm1": "0.norm", "blocks.{i}.norm2": ["1.net.0", "1.norm"],
        "blocks.{i}.attn.proj": ["0.to_out.0", "0.to_out", "0.fn.to_out.0"], "blocks.{i}.mlp.fc1": ["1.net.1", "1.fn.net.0"],
        "blocks.{i}.mlp.fc2": ["1.net.4", "1.net.3", "1.fn.net.3"]}),
    *_arrays(_LAYER, {"blocks.{i}.attn.qkv.weight": "0.to_qkv.weight"}),
    *_arrays(_LAYER, {"blocks.{i}.attn.qkv.weight": "0.fn.to_qkv.weight"}),
)


def _lucidrains(projection: int, companion: str = "transformer.layers.") -> Tower:
    """Return one variant. projection: the index of the linear layer in to_patch_embedding, with norms before and after at 2."""
    embedding, simple = "to_patch_embedding.", companion == "linear_head."
    norms = {"patch_embed.norm_in": f"{embedding}1", "patch_embed.norm": f"{embedding}3"} if projection == 2 else {}
    after = {"norm": "transformer.norm", "fc_norm": "linear_head.0", "head": ["linear_head", "linear_head.1"]} if simple else {
        "norm": ["transformer.norm", "mlp_head.0"], "head": ["mlp_head", "mlp_head.1"]}
    return Tower(
        "lucidrains' vit-pytorch", f"{embedding}{projection}.weight", companion,
        ("to_patch_embedding", "cls_token", "pos_embedding", "transformer", "mlp_head", "linear_head"), (
            *_layers("", {"patch_embed.proj": f"{embedding}{projection}", **norms, **after}),
            ("cls_token", ("cls_token",), "copy"),
            ("pos_embed", (), "sincos") if simple else ("pos_embed", ("pos_embedding",), "position"),
        ), _LUCIDRAINS_BLOCK, {"gelu": "erf", "norm_eps": 1e-5},
        ("patch_embed.proj.bias", *(("pos_embed", "norm.weight") if not simple else ())), flat=("cls_token", "pos_embedding"),
        token_note="" if simple else "its head reads the cls token if it was made with pool='cls', which the file does not say")


LUCIDRAINS, LUCIDRAINS_PLAIN_PATCHES = _lucidrains(2), _lucidrains(1)
SIMPLE_VIT, SIMPLE_VIT_PLAIN_PATCHES = _lucidrains(2, "linear_head."), _lucidrains(1, "linear_head.")

# In this order: the first whose anchor and companion a file has.
TOWERS = (DINOV2_REGISTERS, DINOV2_BY_PREFIX, DINOV2, DINOV3, CLIP, SIGLIP, AIMV2, SIMPLE_VIT, LUCIDRAINS,
          SIMPLE_VIT_PLAIN_PATCHES, LUCIDRAINS_PLAIN_PATCHES)
