"""Reads timm's config.json: the name of the architecture, the arguments in model_args that change it, and pretrained_cfg.

Checked with timm 1.0.31 (vision_transformer.py, eva.py, deit.py). The names of timm's Vision Transformers of 2021 give only the
number of heads, since files with these names may have other sizes; the name of a later family gives the row of configs.MODELS.
"""

import re

from models.errors import WeightsError
from models.families import unbuilt
from models.kinds import NAME, TEXT, Each, Kind, Record, is_number, is_whole, one_of

from .description import OWN_ENTRY, PLAIN_EPS, Description, gelu_of, names_of, number_of, numbers_of, settings_of, size_of
from .zip_archive import shown

_RANGE = Kind("two whole numbers, the lower first", lambda value: isinstance(value, list) and len(value) == 2
              and all(map(is_whole, value)) and -32768 <= value[0] < value[1] <= 65535)
_VALUE = Kind("text or a number", lambda value: TEXT.holds(value) or is_number(value))
OWN_RECORD = Record({"reading": Record({"exif": one_of("follow", "off"), "intensity_range": _RANGE,
                                 "alpha": one_of("white", "black", "mask", "ignore")}),
              "tta": one_of("none", "flip"), "card": Each(Each(_VALUE, keys=NAME), keys=NAME)}, optional=("reading", "tta"))

# Google's weights that timm publishes under these tags or names were trained with the tanh form, whatever timm computes.
TANH_TAGS, TANH_MODELS = re.compile(r"augreg_"), re.compile(r"siglip")
TANH_NOTE = "GELU is computed in the tanh form, as Google trained it, whatever timm computes"
# A part of timm's name -> its default global_pool, where no array shows it: these models have no norm after a mean.
POOL_OF_NAME = {"dinov3": "avg", "lingbot": "token"}
SIZES = {"tiny": "Ti", "small": "S", "small_plus": "S+", "medium": "M", "base": "B", "large": "L", "huge": "H",
         "huge_plus": "H+", "giant": "g", "giantopt": "gopt", "gigantic": "bigG", "so400m": "SO400M", "7b": "7B", "1b": "1B",
         "3b": "3B", "wee": "Wee", "little": "Little", "mediumd": "MediumD", "betwixt": "Betwixt", "so150m": "SO150M",
         "so150m2": "SO150M2"}
SIZE, PATCH, PIXELS = r"([a-z0-9_]+?)", r"_patch(\d+)", r"_\d+"
# (pattern of timm's names, name of our row); {0}, {1}, ... are the groups of the pattern, mostly size and patch.
FAMILIES = tuple((re.compile(pattern), row) for pattern, row in (
    (rf"vit_{SIZE}{PATCH}_dinov2", "DINOv2-{0}_{1}"),
    (rf"vit_{SIZE}{PATCH}_reg4_dinov2", "DINOv2-{0}_{1}-reg"),
    (rf"vit_{SIZE}{PATCH}_reg1_tipsv2", "TIPSv2-{0}_{1}"),
    (rf"vit_(tiny){PATCH}_dinov3_qkvb", "EUPE-{0}_{1}"),
    (rf"vit_{SIZE}{PATCH}_dinov3_qkvb", "DINOv3-{0}_{1}-qkvb"),
    (rf"vit_{SIZE}{PATCH}_dinov3", "DINOv3-{0}_{1}"),
    (rf"vit_{SIZE}{PATCH}_lingbot", "LingBot-{0}_{1}"),
    (rf"vit_{SIZE}{PATCH}_siglip(?:_gap)?{PIXELS}", "SigLIP-{0}_{1}"),
    (rf"vit_(xsmall)_patch(16)_clip{PIXELS}", "TinyCLIP-8M_{1}"),
    (rf"vit_(medium)_patch(16)_clip{PIXELS}", "TinyCLIP-39M_{1}"),
    (rf"vit_(medium)_patch(32)_clip{PIXELS}", "TinyCLIP-40M_{1}"),
    (rf"vit_(betwixt)_patch(32)_clip{PIXELS}", "TinyCLIP-61M_{1}"),
    (rf"vit_(base){PATCH}_plus_clip{PIXELS}", "OpenCLIP-B+_{1}"),
    (rf"vit_{SIZE}{PATCH}_clip_quickgelu{PIXELS}", "CLIP-{0}_{1}"),
    (rf"vit_{SIZE}{PATCH}_clip{PIXELS}", "OpenCLIP-{0}_{1}"),
    (rf"eva_{SIZE}{PATCH}_clip{PIXELS}", "EVA-{0}_{1}-clip"),
    (rf"eva_{SIZE}{PATCH}{PIXELS}", "EVA-{0}_{1}"),
    (rf"eva02_{SIZE}{PATCH}_clip{PIXELS}", "EVA02-{0}_{1}-clip"),
    (rf"eva02_{SIZE}{PATCH}{PIXELS}", "EVA02-{0}_{1}"),
    (rf"vit_pe_(core|spatial|lang)_(gigantic){PATCH}{PIXELS}", "PE-{0}-G_{2}"),
    (rf"vit_pe_(core|spatial|lang)_{SIZE}{PATCH}{PIXELS}", "PE-{0}-{1}_{2}"),
    (rf"deit3_{SIZE}{PATCH}{PIXELS}", "DeiT3-{0}_{1}"),
    (rf"aimv2_{SIZE}{PATCH}{PIXELS}", "AIMv2-{0}_{1}"),
    (rf"vit_(huge|giant){PATCH}_gap{PIXELS}", "IJEPA-{0}_{1}"),
    (rf"beit3_{SIZE}{PATCH}{PIXELS}", "BEiT3-{0}_{1}"),
    (rf"vit_intern300m{PATCH}{PIXELS}", "InternViT-300M_{0}"),
    (rf"vit_{SIZE}{PATCH}_radio_(v\d)", "C-RADIO{2}-{0}_{1}"),
    (rf"vit_{SIZE}{PATCH}_(rope_reg\d|reg\d)_gap{PIXELS}", "ViT-{0}_{1}-{2}"),
    (rf"vit_(so150m2?){PATCH}_(reg\d)_gap{PIXELS}", "ViT-{0}_{1}-{2}"),
    (rf"vit_(medium){PATCH}_gap{PIXELS}", "ViT-{0}_{1}-gap"),
))
# Names of timm's plain VisionTransformer: model_args and arrays determine all that such a model computes.
PLAIN = re.compile(r"(?:vit|deit)_(?:tiny|small|base|large|huge|giant|gigantic)_patch\d+(?:_plus)?_\d+"
                   r"(?:_(?:dino|mae|sam|miil|in21k))?")
# The words in the names of Vision Transformers of 2021, CaiT and the like. A name with other words may be a model that has the
# same arrays and computes something else: rope_ape has the arrays of DeiT III, and rotary positions.
PLAIN_WORDS = re.compile(
    r"vit|deit|cait|flexivit|tiny|small|medium|base|betwixt|large|huge|giant|gigantic|patch\d+|r\d*|[spm]\d+|x?xs\d+|36x1|plus|gap|"
    r"distilled|\d+|in1k|in21k|ft|sam|dino|mae|miil")

# model_args that do not change what the model computes in evaluation.
IGNORED = {"num_classes", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
        "weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "global_pool", "fc_norm",
        "use_fc_norm", "head_init_scale", "depth_token_only", "mlp_ratio_token_only", "img_size", "mlp_ratio", "ref_feat_shape",
        "act_layer", "pool_include_prefix", "qkv_bias", "qkv_fused"}
# model_args that are supported with one value only.
FIXED = {"pos_embed": "learn"}
NORMS = {"layernorm": "layer", "rmsnorm": "rms"}            # timm's own classes, with eps 1e-6
# model_args that are keys of a row: (key, function that converts the value).
ARGUMENTS = {
    "patch_size": ("patch_size", int), "embed_dim": ("hidden_size", int), "depth": ("num_layers", int),
    "num_heads": ("num_heads", int), "in_chans": ("in_channels", int), "class_token": ("class_token", bool),
    "reg_tokens": ("registers", int), "num_reg_tokens": ("registers", int), "pre_norm": ("pre_norm", bool),
    "use_pre_transformer_norm": ("pre_norm", bool), "use_post_transformer_norm": ("final_norm", bool),
    "scale_attn_norm": ("attention_norm", bool), "scale_attn_inner": ("attention_norm", bool),
    "scale_mlp_norm": ("mlp_norm", bool), "scale_mlp": ("mlp_norm", bool), "proj_bias": ("proj_bias", bool),
    "final_norm": ("final_norm", bool), "init_values": ("layer_scale", float),
    "no_embed_class": ("positions", lambda value: "patches" if value else "all"), "qk_norm": ("qk_norm", bool)}


def row_of(architecture: str, tag: str = "") -> str:
    """Return the row of configs.MODELS for a name of a later family, "" for a name of 2021. Raises WeightsError for others."""
    if what := unbuilt(architecture):
        raise WeightsError(f"{architecture} has {what}, which no model here supports")
    for pattern, row in FAMILIES:
        if match := pattern.fullmatch(architecture):
            name = row.format(*(SIZES.get(part, part.replace("_", "-")) for part in match.groups()))
            return name.replace("DINOv3", "EUPE").removesuffix("-qkvb") if tag.startswith("eupe") else name
    if architecture and not all(map(PLAIN_WORDS.fullmatch, architecture.split("_"))):
        raise WeightsError(f"its architecture, {shown(architecture)}, is not one of timm's that are known here; it may compute "
                           "something else than a known one with the same arrays")
    return ""


def describe(values: dict) -> Description:
    """Describe a model by the values of timm's config.json.

    Raises WeightsError for an architecture that is not built here, and other errors for values of other types.
    """
    published, arguments = settings_of(values, "pretrained_cfg"), settings_of(values, "model_args")
    arguments = {key: value for key, value in arguments.items() if value is not None}         # as timm does
    names = values.get("label_names") or values.get("labels") or published.get("label_names")
    found = Description(classes=_own_names(names) if OWN_ENTRY in values else names_of(names))
    tag, name = str(published.get("tag") or ""), str(values.get("architecture") or "")
    found.model, found.license = name, shown(published.get("license") or "")
    if OWN_ENTRY not in values:            # our own weights contain their whole row
        found.base = row_of(name, tag)
    found.outputs = values.get("num_classes") if is_whole(values.get("num_classes")) else None
    _take_arguments(found, arguments, values.get("global_pool"), OWN_ENTRY in values)
    if PLAIN.fullmatch(name) and OWN_ENTRY not in values:
        _take_plain(found, arguments)
    if arguments.get("act_layer") and arguments["act_layer"] not in ("silu", "SiLU"):
        found.row["gelu"] = gelu_of(arguments["act_layer"])
    elif TANH_TAGS.match(tag) or TANH_MODELS.search(name):
        found.row["gelu"] = "tanh"
        found.notes += [TANH_NOTE] * (OWN_ENTRY not in values)
    elif not found.base:
        found.row["gelu"] = "erf"
    for key in ("mean", "std"):
        if published.get(key):
            found.row[key] = numbers_of(published[key])
    size = arguments.get("img_size") or (published.get("input_size") or (0,))[1:]
    if size:
        found.take_size(size_of(size), number_of("patch_size", arguments.get("patch_size", 0)) or _patch_of(name))
    found.take_view(published.get("interpolation"), published.get("crop_pct"), published.get("crop_mode"))
    if OWN_ENTRY in values:
        _take_own_run(found, values[OWN_ENTRY])
    return found


def _take_arguments(found: Description, arguments: dict, pool: object, own: bool) -> None:
    """Take over model_args. Raises WeightsError for an unknown one, and for one that no model here supports."""
    norms = {"norm_layer", "embed_norm_layer"} if PLAIN.fullmatch(found.model) else set()
    for key, value in arguments.items():
        if key in ARGUMENTS:
            ours, convert = ARGUMENTS[key]
            found.row[ours] = convert(number_of(key, value, float if convert is float else int))
        elif not (own or key in IGNORED or key in norms or (key in FIXED and value == FIXED[key])):
            raise WeightsError(f"its model_args have {shown(key)} {shown(value)}, which models here do not support")
    if "qkv_bias" in arguments and not arguments["qkv_bias"]:
        found.row["qkv_bias"] = "none"
    if shape := arguments.get("ref_feat_shape"):
        grid = size_of(shape)
        if not is_whole(grid):
            raise WeightsError(f"its ref_feat_shape is {shown(shape)}, but rotary positions here need a square one")
        found.row["rope_grid"] = grid
    if pool := arguments.get("global_pool") or pool:
        found.pool = str(pool)
    else:
        found.pool = next((pool for part, pool in POOL_OF_NAME.items() if f"_{part}" in found.model), "")
    found.pool_prefix = bool(arguments.get("pool_include_prefix"))


def _take_plain(found: Description, arguments: dict) -> None:
    """Set the keys that a plain VisionTransformer computes by default, and the norms that its arguments name."""
    found.row |= {"norm_eps": PLAIN_EPS, "rope": "", "positions": found.row.get("positions", "all")}
    if pre := found.row.get("pre_norm"):
        found.row["patch_bias"] = not pre
    layers = {key: arguments.get(key) for key in ("norm_layer", "embed_norm_layer")}
    for key, value in layers.items():
        if value is not None and (not isinstance(value, str) or value.lower() not in NORMS):
            raise WeightsError(f"its {key} is {shown(value)}, but models here have {' or '.join(NORMS)}")
    norm, embedding = (str(value).lower() if value else "" for value in layers.values())
    if norm:
        found.row["norm"] = NORMS[norm]
    if embedding:
        found.row["patch_norm"] = "after"
        if embedding != (norm or "layernorm"):
            raise WeightsError(f"its embed_norm_layer is {embedding}, but its blocks have another norm, which no model here "
                               "supports")


def _patch_of(name: str) -> int | None:
    match = re.search(r"_patch(\d+)", name)
    return int(match[1]) if match else None


def _take_own_run(found: Description, own: object) -> None:
    if fault := OWN_RECORD.fault(OWN_ENTRY, own):
        raise WeightsError(fault)
    found.view |= {name: tuple(value) if isinstance(value, list) else value
                   for name, value in own.get("reading", {}).items()} | {name: own[name] for name in ("tta",) if name in own}
    found.card = own["card"]


def _own_names(names: object) -> list[str]:
    """Return the class names of one of our runs unchanged. Raises ValueError for anything but a list of names."""
    if not isinstance(names, list) or not names or not all(map(TEXT.holds, names)):
        raise ValueError("its label_names are not a list of names")
    return names
