"""The keys of a row of configs.MODELS, and the rows of the families of 2022 and later.

Sizes, keys, and how images are normalized and resized, are from the published configurations of timm and transformers and from
the papers named next to the rows.
"""

import re

from ml_collections import ConfigDict

# Every key of a row, except the five sizes, and its default.
KEYS = {
    "dropout_rate": 0.0,               # after positions, attention output and both MLP layers
    "attention_dropout_rate": 0.0,     # on the attention weights
    "drop_path_rate": 0.0,             # stochastic depth of the last block; rises linearly from 0 (CaiT: the same in all blocks)
    # What the head reads. "token": the cls token. "gap": the mean over all tokens after the last norm, without a cls token
    # (Google's GSAM). "patch_mean": the mean over the patches, then `fc_norm` in place of the last norm (MAE, EVA-02).
    # "mean": the mean over the patches after the last norm. "token_mean": the cls token and that mean, concatenated to 2 D
    # (DINO's linear heads). "attention": the output of one learned query over all tokens (SigLIP).
    "classifier": "token",
    "pool_heads": 0,                   # heads of the pooling by attention; 0: as in the blocks
    "pool_mlp_dim": 0,                 # width of its MLP; 0: as in the blocks
    "representation_size": 0,          # width of the tanh layer `pre_logits` before the head; 0: none
    "distilled": False,                # DeiT's second token and head
    "class_layers": 0,                 # CaiT: layers of class attention after the talking-heads layers; 0: not a CaiT
    "layer_scale": 0.0,                # LayerScale: initial factor of each channel of every branch; 0: no factors
    "resnet_layers": None,             # units of each ResNet stage, () for only the stem; None: no ResNet
    "resnet_width": 64,                # channels of the ResNet's stem
    "resnet_style": "google",          # paddings and eps; "timm" and "vit-pytorch" for the hybrids of those programs
    "sigmoid_attention": "",           # layers whose attention people can edit: "last", "all", or numbers from 1 such as "3,7"
    # The tokens before the patches: the cls token, then registers (Darcet et al., arXiv 2309.16588), which no head reads.
    "class_token": True,
    "registers": 0,
    # Learned positions: of "all" tokens, of the "patches" only, or "none".
    "positions": "all",
    "position_resize": "bilinear",     # how a table is resized to another grid: a key of models/layers.py RESIZE_RULES
    # Rotary positions of queries and keys: a kind of models/rope.py, "": none. rope_grid: for "eva" and "pe", coordinates are
    # scaled to a grid of so many patches per side.
    "rope": "",
    "rope_grid": 0,
    "mlp": "plain",                    # "swiglu": silu(gate) * value, each mlp_dim wide, instead of GELU
    "gelu": "tanh",                    # Google's form; "erf" is the exact one, "quick" x * sigmoid(1.702 x) (OpenAI's CLIP)
    "norm": "layer",                   # LayerNorm; "rms": RMSNorm (AIMv2)
    "norm_eps": 1e-6,                  # of every norm; a file of another program may set its own
    "pre_norm": False,                 # a norm before the first block (CLIP)
    "patch_norm": "none",              # "after" the projection of the patches (AIMv2); "around" it (lucidrains' vit-pytorch)
    "final_norm": True,                # the norm after the last block
    "attention_norm": False,           # a norm before the output projection of the attention (EVA-02's CLIP towers)
    "mlp_norm": False,                 # a norm before the second layer of the MLP (EVA-02)
    "qk_norm": False,                  # norms of the queries and the keys, over each head
    "qkv_bias": "all",                 # "qv": the keys have none (DINOv3, EVA-02); "none"
    "proj_bias": True,                 # of the attention's output
    "mlp_bias": True,
    "patch_bias": True,                # of the projection of the patches
    "in_channels": 3,
    "img_size": 224,
    "mean": (0.5, 0.5, 0.5),           # inputs are (x / 255 - mean) / std
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bilinear",       # how its publisher resizes and evaluates images; see the flags of these names
    "eval_crop": 0.0,
    "channel_mean": (),                # for a grey model: mean and std of the color weights that it loads
    "channel_std": (),
}


def architecture(patch_size: int, hidden_size: int, mlp_dim: int, num_heads: int, num_layers: int, **more) -> ConfigDict:
    """Return a row of configs.MODELS.

    patch_size: side of a patch in pixels (hybrids: in cells of the ResNet's output); hidden_size: D; num_heads: H. `more`
    overrides KEYS; raises KeyError for an unknown key.
    """
    row = ConfigDict({"patch_size": patch_size, "hidden_size": hidden_size, "mlp_dim": mlp_dim, "num_heads": num_heads,
                      "num_layers": num_layers} | KEYS)
    row.lock()
    row.update(more)
    return row


# Shared by Meta's DeiT, CaiT and MAE: exact GELU, ImageNet's mean and standard deviation, bicubic resizing of positions.
META = {"gelu": "erf", "position_resize": "bicubic", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


# size: (width, MLP, heads, layers), for most families.
SIZES = {"Ti": (192, 768, 3, 12), "S": (384, 1536, 6, 12), "M": (512, 2048, 8, 12), "B": (768, 3072, 12, 12),
         "L": (1024, 4096, 16, 24), "SO400M": (1152, 4304, 16, 27), "H": (1280, 5120, 16, 32), "g": (1408, 6144, 16, 40),
         "bigG": (1664, 8192, 16, 48)}


def family(name: str, patch_size: int, sizes: str | dict[str, tuple], variant: str = "", **keys) -> dict[str, ConfigDict]:
    """Return rows named NAME-SIZE_PATCH + VARIANT. sizes: names of SIZES, or {name: (width, MLP, heads, layers)}."""
    sizes = sizes if isinstance(sizes, dict) else {size: SIZES[size] for size in sizes.split()}
    return {f"{name}-{size}_{patch_size}{variant}": architecture(patch_size, *numbers, **keys) for size, numbers in sizes.items()}


# Keys that several families share. A published file for another image size is the same row with another img_size.
MIDDLE = {"gelu": "erf", "interpolation": "bicubic", "eval_crop": 1.0}
OPENAI = {**MIDDLE, "mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
PATCHES = {"positions": "patches", "position_resize": "bicubic_antialias"}
NO_CLS = {"classifier": "mean", "class_token": False}

# DINOv2 (arXiv 2304.07193), also with registers (2309.16588); TIPSv2 and DINOv3 (2508.10104) are similar, and LingBot-Vision and
# EUPE are built like DINOv3. The biases of queries and values in Meta's own files of DINOv3 are zero: timm leaves them out; rows
# that end in -qkvb have them.
DINOV2 = {**MIDDLE, **META, "layer_scale": 1e-5, "img_size": 518, "position_resize": "bicubic_offset"}
GIANT = {"g": (1536, 4096, 24, 40)}
TIPS = {**DINOV2, **PATCHES, "registers": 1, "layer_scale": 1.0, "img_size": 448, "mean": (0.0,) * 3, "std": (1.0,) * 3,
        "position_resize": "bilinear_antialias"}
DINOV3 = {**MIDDLE, **META, "layer_scale": 1e-5, "img_size": 256, "norm_eps": 1e-5, "registers": 4, "positions": "none",
          "rope": "dinov3"}
DINOV3_GATED = {"S+": SIZES["S"], "H+": (1280, 5120, 20, 32)}
LINGBOT = {**DINOV3, "img_size": 512, "interpolation": "bilinear", "eval_crop": 0.0}
DINO = {
    **family("DINOv2", 14, "S B L", **DINOV2),
    **family("DINOv2", 14, GIANT, mlp="swiglu", **DINOV2),
    **family("DINOv2", 14, "S B L", "-reg", registers=4, **DINOV2 | PATCHES),
    **family("DINOv2", 14, GIANT, "-reg", registers=4, mlp="swiglu", **DINOV2 | PATCHES),
    **family("DINOv3", 16, "S B L", qkv_bias="none", **DINOV3),
    **family("DINOv3", 16, DINOV3_GATED | {"7B": (4096, 8192, 32, 40)}, qkv_bias="none", mlp="swiglu", **DINOV3),
    **family("DINOv3", 16, "S B L", "-qkvb", qkv_bias="qv", **DINOV3),
    **family("DINOv3", 16, DINOV3_GATED, "-qkvb", qkv_bias="qv", mlp="swiglu", **DINOV3),
    **family("EUPE", 16, "Ti S B", qkv_bias="qv", **DINOV3),
    **family("LingBot", 16, "S B L", qkv_bias="qv", **LINGBOT),
    **family("LingBot", 16, GIANT, qkv_bias="none", mlp="swiglu", **LINGBOT),
    **family("TIPSv2", 14, "B L SO400M", **TIPS),
    **family("TIPSv2", 14, GIANT, mlp="swiglu", **TIPS),
}

# SigLIP (arXiv 2303.15343) and SigLIP 2 (2502.14786) pool with one learned query; some of their files take the mean (--classifier
# mean). CLIP (2103.00020), MetaCLIP and DFN use the quick form of GELU, OpenCLIP's files of LAION and DataComp the exact one.
# TinyCLIP: 2309.12314. EVA (2211.07636), EVA-02 (2303.11331), and their CLIP towers.
SIGLIP = {**MIDDLE, "gelu": "tanh", "eval_crop": 0.9, "classifier": "attention", "class_token": False,
          "position_resize": "bicubic"}
OPENCLIP = {**OPENAI, "norm_eps": 1e-5, "pre_norm": True, "patch_bias": False, "position_resize": "bicubic_antialias"}
CLIP = OPENCLIP | {"gelu": "quick"}
EVA = {**OPENAI, "eval_crop": 0.9, "qkv_bias": "qv", "position_resize": "bicubic"}
EVA02 = {**EVA, "mlp": "swiglu", "rope": "eva", "rope_grid": 16}
TOWERS = {
    **family("SigLIP", 16, "B", **SIGLIP),
    **family("SigLIP", 16, "L SO400M", img_size=256, **SIGLIP),
    **family("SigLIP", 16, {"gopt": (1536, 6144, 16, 40)}, img_size=256, **SIGLIP),
    **family("SigLIP", 14, "SO400M", **SIGLIP),
    **family("SigLIP", 32, "B", img_size=256, **SIGLIP),
    **family("CLIP", 32, "B", **CLIP),
    **family("CLIP", 16, "B", **CLIP),
    **family("CLIP", 14, "L H bigG", **CLIP),
    **family("OpenCLIP", 32, "B", **OPENCLIP),
    **family("OpenCLIP", 16, "B", **OPENCLIP),
    **family("OpenCLIP", 16, {"B+": (896, 3584, 14, 12)}, img_size=240, **OPENCLIP),
    **family("OpenCLIP", 14, "L H g bigG", **OPENCLIP),
    **family("TinyCLIP", 16, {"8M": (256, 1024, 4, 10), "39M": SIZES["M"]}, **OPENCLIP),
    **family("TinyCLIP", 32, {"40M": SIZES["M"], "61M": (640, 2560, 10, 12)}, **OPENCLIP),
    **family("EVA", 14, "g", classifier="patch_mean", **EVA),
    **family("EVA", 14, "g", "-clip", **EVA),
    **family("EVA02", 14, {"Ti": (192, 512, 3, 12), "S": (384, 1024, 6, 12)}, classifier="patch_mean", **EVA02),
    **family("EVA02", 14, {"B": (768, 2048, 12, 12), "L": (1024, 2730, 16, 24)}, classifier="patch_mean", mlp_norm=True, **EVA02),
    **family("EVA02", 16, {"B": (768, 2048, 12, 12)}, "-clip", mlp_norm=True, attention_norm=True, **EVA02),
    **family("EVA02", 14, {"L": (1024, 2730, 16, 24)}, "-clip", mlp_norm=True, attention_norm=True, **EVA02),
}

# Perception Encoder (arXiv 2504.13181): core pools by attention; spatial and lang are towers for dense features.
PE = {**MIDDLE, "norm_eps": 1e-5, "pre_norm": True, "patch_bias": False, "rope": "pe", "position_resize": "bilinear_unaligned"}
CORE = {**PE, "classifier": "attention", "pool_heads": 8}
DENSE = {**PE, "classifier": "mean", "final_norm": False, "rope_grid": 32, "img_size": 448}
PERCEPTION = {
    **family("PE-core", 16, "B", rope_grid=14, **CORE),
    **family("PE-core", 16, "Ti S", rope_grid=24, img_size=384, **CORE),
    **family("PE-core", 14, "L", rope_grid=24, img_size=336, **CORE),
    **family("PE-core", 14, {"G": (1536, 8960, 16, 50)}, rope_grid=32, img_size=448, class_token=False, pool_mlp_dim=6144,
             **CORE),
    **family("PE-spatial", 16, "Ti S B", **DENSE | {"img_size": 512}),
    **family("PE-spatial", 14, "L", **DENSE),
    **family("PE-spatial", 14, {"G": (1536, 8960, 16, 50)}, class_token=False, layer_scale=0.1, **DENSE),
    **family("PE-lang", 14, {"L": (1024, 4096, 16, 23)}, layer_scale=0.1, **DENSE),
    **family("PE-lang", 14, {"G": (1536, 8960, 16, 47)}, class_token=False, layer_scale=0.1, **DENSE),
}

# DeiT III (arXiv 2204.07118), AIMv2 (2411.14402), I-JEPA (2301.08243), BEiT3 (2208.10442), InternViT (2312.14238), C-RADIO
# (2412.07679).
DEIT3 = {**MIDDLE, **META, "eval_crop": 0.9, "layer_scale": 1e-6, "positions": "patches"}
AIMV2 = {**OPENAI, **NO_CLS, "norm": "rms", "norm_eps": 1e-5, "patch_norm": "after", "mlp": "swiglu", "qkv_bias": "none",
         "proj_bias": False, "mlp_bias": False, "position_resize": "bicubic"}
AIMV2_SIZES = {"L": (1024, 2816, 8, 24), "H": (1536, 4096, 12, 24), "1B": (2048, 5632, 16, 24), "3B": (3072, 8192, 24, 24)}
IJEPA = {**MIDDLE, **META, **NO_CLS, "eval_crop": 0.9}
RADIO = {**OPENAI, **PATCHES, "final_norm": False, "img_size": 512, "position_resize": "bilinear_cropped"}
OTHERS = {
    **family("DeiT3", 16, "S M B L", **DEIT3),
    **family("DeiT3", 14, "H", **DEIT3),
    **family("AIMv2", 14, AIMV2_SIZES, **AIMV2),
    **family("IJEPA", 14, "H", **IJEPA),
    **family("IJEPA", 16, "H", **IJEPA | {"eval_crop": 1.0, "img_size": 448}),
    **family("IJEPA", 16, "g", **IJEPA),
    **family("BEiT3", 16, "B L", classifier="patch_mean", norm_eps=1e-5, attention_norm=True, mlp_norm=True, **MIDDLE | META),
    **family("InternViT", 14, {"300M": SIZES["L"]}, layer_scale=0.1, final_norm=False, img_size=448, **MIDDLE | META),
    **family("C-RADIOv3", 16, "B L", registers=7, layer_scale=1e-5, **RADIO),
    **family("C-RADIOv3", 16, {"H": SIZES["H"], "g": (1536, 6144, 24, 40)}, registers=7, **RADIO),
    **family("C-RADIOv4", 16, "SO400M H", registers=9, **RADIO),
}

# timm's own models, trained by R. Wightman: "Searching for better ViT baselines" and later ones.
GAP = {**MIDDLE, "eval_crop": 0.95, "class_token": False, "img_size": 256, "position_resize": "bicubic_antialias"}
SBB = {**GAP, "classifier": "patch_mean", "layer_scale": 1e-5, "positions": "patches"}
SBB_ROPE = SBB | {"positions": "none", "rope": "eva", "rope_grid": 16, "qkv_bias": "qv"}
WEE, LITTLE = {"Wee": (256, 1280, 4, 14)}, {"Little": (320, 1792, 5, 14)}
MEDIUM_DEEP, BETWIXT = {"MediumD": (512, 2048, 8, 20)}, {"Betwixt": (640, 2560, 10, 12)}
TIMM = {
    **family("ViT", 16, WEE | LITTLE | {"M": SIZES["M"]} | BETWIXT, "-reg1", registers=1, **SBB),
    **family("ViT", 16, LITTLE | {"M": SIZES["M"]} | MEDIUM_DEEP | BETWIXT, "-reg4", registers=4, **SBB),
    **family("ViT", 16, "M B", "-rope-reg1", registers=1, **SBB_ROPE),
    **family("ViT", 16, MEDIUM_DEEP, "-rope-reg1", registers=1, **SBB_ROPE | {"qkv_bias": "none"}),
    **family("ViT", 16, BETWIXT, "-rope-reg4", registers=4, **SBB_ROPE),
    **family("ViT", 16, {"SO150M": (896, 2304, 14, 18)}, "-reg4", registers=4, classifier="mean", **GAP),
    **family("ViT", 16, {"SO150M2": (832, 2176, 13, 21)}, "-reg1", registers=1, qkv_bias="none",
             **SBB | {"positions": "all", "eval_crop": 1.0}),
    **family("ViT", 16, "M", "-gap", classifier="mean", layer_scale=1e-6, qkv_bias="none", **GAP),
}

FAMILIES = {**DINO, **TOWERS, **PERCEPTION, **OTHERS, **TIMM}

# (pattern of timm's names, the part that no model here supports).
UNBUILT = tuple((re.compile(pattern), what) for pattern, what in (
    (r"vit_dp?\w+_patch16_reg1_gap_256", "differential attention"), (r"vit_pwee_.*", "attention and MLP side by side"),
    (r"vit_base_mci_.*", "convolutions in place of the patches (MobileCLIP)"),
    (r"eva02_enormous_.*", "norms after its branches"), (r"naflexvit_.*", "images of any shape (NaFlex)"),
    (r"beit(v2)?_.*", "positions relative to each pair of patches (BEiT)")))
FILES = ("pth", "pt", "bin", "ckpt", "npz", "safetensors")


def unbuilt(name: str) -> str:
    """Return the unsupported part of the model that a name of timm means, with or without its tag; "" for any other name."""
    match = re.fullmatch(r"(?:hf[-_]hub:)?(?:timm/)?(\w+)(?:\.(\w+))?", name)
    if match is None or match[2] in FILES:
        return ""
    return next((what for pattern, what in UNBUILT if pattern.fullmatch(match[1])), "")
