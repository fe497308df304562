"""Finds timm's model that computes what a model of ours does, with its arguments and its names of the arrays.

Checked with timm 1.0.31 (vision_transformer.py, eva.py). VisionTransformer has our names; Eva, which rotates queries and keys,
has others. model_args of a config.json can set every argument of the two except functions: only the name determines the eps of
norms, Eva's kind of norm and the class of a gated MLP (KINDS).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from models.base import has_class_token
from models.families import FAMILIES

from .hub import table


class Kind(NamedTuple):
    """What the name of a model determines in timm.

    names: by patch, width and blocks. A model of other sizes gets the first, and arguments for its sizes.
    """

    names: dict[tuple[int, int, int], str]
    norms: tuple[str, ...] = ("layer", "rms")       # possible values of `norm`
    eps: float = 1e-6
    mlps: tuple[str, ...] = ("plain",)              # possible values of `mlp`
    eva: bool = False                               # whether timm's class is Eva
    rope: str = ""                                  # rotary positions that arguments do not need to set
    scaled: bool = False                            # it has LayerScale, which no argument can remove


PLAIN = Kind({
    (16, 768, 12): "vit_base_patch16_224", (16, 192, 12): "vit_tiny_patch16_224", (16, 384, 12): "vit_small_patch16_224",
    (32, 384, 12): "vit_small_patch32_224", (8, 768, 12): "vit_base_patch8_224", (32, 768, 12): "vit_base_patch32_224",
    (16, 1024, 24): "vit_large_patch16_224", (32, 1024, 24): "vit_large_patch32_224", (14, 1280, 32): "vit_huge_patch14_224"})
PACKED = Kind({(14, 1536, 40): "vit_giant_patch14_dinov2"}, mlps=("swiglu",))
SPLIT = Kind({(14, 1024, 24): "aimv2_large_patch14_224", (14, 1536, 24): "aimv2_huge_patch14_224",
              (14, 2048, 24): "aimv2_1b_patch14_224", (14, 3072, 24): "aimv2_3b_patch14_224"}, ("rms",), 1e-5, ("swiglu",))
BOTH = ("plain", "swiglu")
KINDS = (
    PLAIN,
    Kind({(16, 768, 12): "vit_base_patch16_clip_224", (32, 768, 12): "vit_base_patch32_clip_224",
          (14, 1024, 24): "vit_large_patch14_clip_224", (14, 1280, 32): "vit_huge_patch14_clip_224",
          (14, 1408, 40): "vit_giant_patch14_clip_224", (14, 1664, 48): "vit_gigantic_patch14_clip_224"}, ("layer",), 1e-5),
    PACKED,
    SPLIT,
    Kind({(14, 192, 12): "eva02_tiny_patch14_224", (14, 384, 12): "eva02_small_patch14_224",
          (14, 768, 12): "eva02_base_patch14_224", (14, 1024, 24): "eva02_large_patch14_224",
          (16, 768, 12): "eva02_base_patch16_clip_224"}, ("layer",), 1e-6, BOTH, True, "eva"),
    Kind({(16, 384, 12): "vit_small_patch16_dinov3", (16, 768, 12): "vit_base_patch16_dinov3",
          (16, 1024, 24): "vit_large_patch16_dinov3", (16, 1280, 32): "vit_huge_plus_patch16_dinov3",
          (16, 4096, 40): "vit_7b_patch16_dinov3"}, ("layer",), 1e-5, BOTH, True, "dinov3", True),
    Kind({(16, 192, 12): "vit_pe_core_tiny_patch16_384", (16, 384, 12): "vit_pe_core_small_patch16_384",
          (16, 768, 12): "vit_pe_core_base_patch16_224", (14, 1024, 24): "vit_pe_core_large_patch14_336",
          (14, 1536, 50): "vit_pe_core_gigantic_patch14_448"}, ("layer",), 1e-5, BOTH, True, "pe"),
)
POOLS = {"token": "token", "attention": "map"}                       # timm's global_pool by `classifier`; else the mean
ACTS = {"erf": "gelu", "tanh": "gelu_tanh", "quick": "quick_gelu"}
# Our names in a block -> Eva's other names, and its several arrays for one of ours.
EVA = {"ls1.gamma": ("gamma_1",), "ls2.gamma": ("gamma_2",), "attn.qkv.q_bias": ("attn.q_bias",),
       "attn.qkv.v_bias": ("attn.v_bias",)}
QKV_SPLIT = {"attn.qkv.weight": tuple(f"attn.{part}_proj.weight" for part in "qkv"), "attn.qkv.q_bias": ("attn.q_proj.bias",),
             "attn.qkv.v_bias": ("attn.v_proj.bias",)}
GATE_SPLIT = {f"mlp.fc1.{kind}": (f"mlp.fc1_g.{kind}", f"mlp.fc1_x.{kind}") for kind in ("weight", "bias")}


# ----------------------------------------------------------------------------------------------------------- which


def kind_of(config) -> Kind | str:
    """Return the kind that can express the model, preferably with its eps; or say in words what no kind can."""
    if config.class_layers or config.distilled or config.resnet_layers is not None:
        return _whats_missing(config, PLAIN) or PLAIN
    fitting = [kind for kind in KINDS if not _whats_missing(config, kind)]
    if fitting:
        return min(fitting, key=lambda kind: (kind.eps != config.norm_eps, kind.eva, kind.rope != config.rope))
    rotates = bool(config.rope) or config.qkv_bias == "qv"
    faults = (_whats_missing(config, kind) for kind in KINDS if kind.eva == rotates and config.mlp in kind.mlps)
    return next(faults)


def name_of(config, kind: Kind) -> str:
    """Return timm's name of a model of that kind, the one for its sizes if there is one."""
    return kind.names.get((config.patch_size, config.hidden_size, config.num_layers), next(iter(kind.names.values())))


def published_name_of(config, row: str, pixels: int) -> str:
    """Return timm's name of the weights of a row of models/families.py, preferably of those for images of that side.

    "" if there are none, or if the model differs from what that name determines.
    """
    kind, published = kind_of(config), FAMILIES.get(row)
    if published is None or kind != kind_of(published):
        return ""
    if kind.eva and bool(config.layer_scale) != bool(published.layer_scale):           # no argument of timm removes LayerScale
        return ""
    files = [file for file in table() if file.model == row and "/" not in file.name]
    return min(files, key=lambda file: file.pixels != pixels).name.partition(".")[0] if files else ""


def _whats_missing(config, kind: Kind) -> str:
    """Say what timm's class has no argument for; "" if it can express the model."""
    faults = _faults_of_both(config) | (_faults_of_eva(config, kind) if kind.eva else _faults_of_plain(config, kind))
    return next((words for words, is_so in faults.items() if is_so), "")


def _faults_of_both(config) -> dict[str, bool]:
    return {
        "classifier 'token_mean': timm uses the cls token or the mean, not both together": config.classifier == "token_mean",
        "patch_norm 'around': timm has no norm of the pixels of a patch": config.patch_norm == "around",
        f"patch_bias {config.patch_bias}: timm's patch embedding has a bias if and only if no norm follows (pre_norm)":
            config.patch_bias == config.pre_norm,
    }


def _faults_of_plain(config, kind: Kind) -> dict[str, bool]:
    pools, gated = config.classifier == "attention", config.mlp == "swiglu"
    return {
        f"rope {config.rope!r}: timm's VisionTransformer has no rotary positions": config.rope,
        f"qkv_bias {config.qkv_bias!r}: timm's VisionTransformer has all biases of queries, keys and values, or none":
            config.qkv_bias == "qv",
        f"proj_bias {config.proj_bias}, mlp_bias {config.mlp_bias}: timm's VisionTransformer has both or neither":
            config.proj_bias != config.mlp_bias,
        f"pool_heads {config.pool_heads}: timm's VisionTransformer pools with the heads of its blocks":
            pools and config.pool_heads not in (0, config.num_heads),
        f"pool_mlp_dim {config.pool_mlp_dim}: timm's VisionTransformer pools with an MLP as wide as in its blocks":
            pools and config.pool_mlp_dim not in (0, config.mlp_dim),
        "classifier 'attention': with mlp 'swiglu' timm's VisionTransformer pools with another MLP": pools and gated,
        f"patch_norm {config.patch_norm!r}: with eps {config.norm_eps:g} timm has it only for AIMv2":
            config.patch_norm == "after" and kind.eps != 1e-6 and kind is not SPLIT,
        f"norm {config.norm!r}: timm has another": config.norm not in kind.norms,
        f"mlp {config.mlp!r}: timm has another": config.mlp not in kind.mlps,
    }


def _faults_of_eva(config, kind: Kind) -> dict[str, bool]:
    pools = config.classifier == "attention"
    return {
        f"gelu {config.gelu!r}: timm's Eva has only the exact GELU": config.gelu != "erf" and (pools or config.mlp == "plain"),
        f"norm {config.norm!r}: timm's Eva has LayerNorm": config.norm not in kind.norms,
        f"patch_norm {config.patch_norm!r}: timm's Eva has none": config.patch_norm != "none",
        f"proj_bias {config.proj_bias}, mlp_bias {config.mlp_bias}: timm's Eva has both":
            not (config.proj_bias and config.mlp_bias),
        "layer_scale 0.0: timm's model of that name has LayerScale": kind.scaled and not config.layer_scale,
    }


# ------------------------------------------------------------------------------------------------------- arguments


def arguments_of(config, kind: Kind, whole: bool) -> dict:
    """Return model_args besides the sizes: all that a name does not fix; for PLAIN, unless `whole`, only values that differ."""
    if kind.eva:
        return _eva_arguments(config)
    arguments = {"act_layer": "silu" if config.mlp == "swiglu" else ACTS[config.gelu], "class_token": has_class_token(config),
                 "reg_tokens": config.registers, "no_embed_class": config.positions == "patches", "pre_norm": config.pre_norm,
                 "final_norm": config.final_norm or config.classifier == "patch_mean",
                 "fc_norm": config.classifier == "patch_mean",
                 "init_values": config.layer_scale, "qkv_bias": config.qkv_bias == "all", "qk_norm": config.qk_norm,
                 "scale_attn_norm": config.attention_norm, "scale_mlp_norm": config.mlp_norm, "proj_bias": config.proj_bias}
    if config.classifier == "attention" and (has_class_token(config) or config.registers):
        arguments["pool_include_prefix"] = True              # else its query reads only the patches
    if config.patch_norm == "none":
        arguments["embed_norm_layer"] = ""
    elif kind is not SPLIT:
        arguments["embed_norm_layer"] = f"{config.norm}norm"
    if config.norm == "rms" and kind is not SPLIT:
        arguments["norm_layer"] = "rmsnorm"
    if whole or kind is not PLAIN:
        return arguments
    usual = {"class_token": True, "reg_tokens": 0, "no_embed_class": False, "pre_norm": False, "final_norm": True,
             "fc_norm": pool_of(config) == "avg", "init_values": 0, "qkv_bias": True, "qk_norm": False, "scale_attn_norm": False,
             "scale_mlp_norm": False, "proj_bias": True, "embed_norm_layer": ""}
    return {key: value for key, value in arguments.items() if key not in usual or value != usual[key]}


def _eva_arguments(config) -> dict:
    cls = has_class_token(config)
    arguments = {
        "class_token": cls, "num_reg_tokens": config.registers, "no_embed_class": config.positions == "patches",
        "use_abs_pos_emb": config.positions != "none", "use_rot_pos_emb": bool(config.rope),
        "use_pre_transformer_norm": config.pre_norm,
        "use_post_transformer_norm": config.final_norm and config.classifier != "patch_mean",
        "use_fc_norm": config.classifier == "patch_mean", "qkv_bias": config.qkv_bias != "none",
        # Eva's attention "eva" has no bias of keys, "rope" has one.
        "attn_type": "rope" if config.qkv_bias == "all" else "eva", "qkv_fused": not _is_qkv_split(config),
        "qk_norm": config.qk_norm,
        "scale_attn_inner": config.attention_norm, "swiglu_mlp": config.mlp == "swiglu",
        "swiglu_align_to": 8 if _is_gate_split(config) and not config.mlp_norm else 0, "scale_mlp": config.mlp_norm}
    if config.rope == "dinov3":
        arguments |= {"rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True, "rope_grid_offset": 0,
                      "rope_grid_indexing": "ij"}
    elif config.rope:
        columns_first = config.rope == "pe"
        arguments |= {"rope_type": "cat", "rope_temperature": 10_000, "rope_rotate_half": False,
                      "rope_grid_offset": int(columns_first and cls), "rope_grid_indexing": "xy" if columns_first else "ij",
                      "ref_feat_shape": [config.rope_grid] * 2}
    if config.layer_scale:
        arguments["init_values"] = config.layer_scale
    if config.classifier == "attention":
        arguments |= {"attn_pool_num_heads": config.pool_heads or config.num_heads,
                      "attn_pool_mlp_ratio": ratio_of(config.hidden_size, config.pool_mlp_dim or config.mlp_dim)}
    return arguments


def pool_of(config) -> str:
    return POOLS.get(config.classifier, "avg")


def mlp_ratio_of(config, kind: Kind) -> float:
    """Return timm's mlp_ratio; in VisionTransformer's packed SwiGLU it counts gate and value together."""
    return ratio_of(config.hidden_size, config.mlp_dim * (2 if kind is PACKED else 1))


def ratio_of(width: int, mlp_dim: int) -> float:
    """Return the factor for which timm's int(width * factor) is mlp_dim."""
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else math.nextafter(ratio, math.inf)


# ----------------------------------------------------------------------------------------------------------- names


def spelling_of(config) -> Callable[[str], tuple[str, ...]]:
    """Return the function that converts our name of an array to timm's, or to those of the arrays it is split into (rows)."""
    kind = kind_of(config)
    inside = {}
    if isinstance(kind, Kind) and kind.eva:
        inside |= EVA | (QKV_SPLIT if _is_qkv_split(config) else {}) | (GATE_SPLIT if _is_gate_split(config) else {})
    elif kind is SPLIT:
        inside |= GATE_SPLIT

    def names(ours: str) -> tuple[str, ...]:
        part, number, rest = (*ours.split(".", 2), "", "")[:3]
        return tuple(f"blocks.{number}.{name}" for name in inside[rest]) if part == "blocks" and rest in inside else (ours,)

    return names


def _is_qkv_split(config) -> bool:
    """Whether timm's Eva has separate arrays of queries, keys and values, as for EVA-02's larger models."""
    return config.mlp == "swiglu" and config.mlp_norm and config.qkv_bias != "all"


def _is_gate_split(config) -> bool:
    """Whether timm's Eva has separate arrays of gate and value.

    It does with a norm after them, and in DINOv3 if their width is a multiple of 8, to which timm rounds it.
    """
    return config.mlp == "swiglu" and (config.mlp_norm or (config.rope == "dinov3" and config.mlp_dim % 8 == 0))
