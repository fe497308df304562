"""Reads transformers' config.json and preprocessor_config.json: what the model is, and how its images are resized.

Checked with transformers 5.23. The model type determines how the model is built. Of a model of text and images, the section of
the image encoder is read; values that are defaults of its class are not in the file.
"""

import math
from collections.abc import Mapping

from models.errors import WeightsError
from models.kinds import is_number, is_whole

from .description import RESAMPLE, SILU, Description, gelu_of, names_of, number_of, numbers_of, settings_of, side_of, size_of
from .zip_archive import shown

IMAGE_TEXT = "vision_config"
MEAN = {"classifier": "mean", "class_token": False}
CLIP = {"pre_norm": True, "patch_bias": False, "positions": "all"}
# Model type -> keys of a row that its class fixes.
TYPES = {
    "vit": {"positions": "all"}, "deit": {"positions": "all"}, "ijepa": MEAN,
    "dinov2": {"positions": "all"}, "dinov2_with_registers": {"positions": "patches"},
    "tipsv2_vision_model": {"positions": "patches"},
    "dinov3_vit": {"positions": "none", "rope": "dinov3"},
    "siglip_vision_model": {"class_token": False}, "siglip2_vision_model": {"class_token": False},
    "clip_vision_model": CLIP, "metaclip_2_vision_model": CLIP,
    "aimv2_vision_model": MEAN | {"norm": "rms", "patch_norm": "after", "mlp": "swiglu"},
}
# Model type -> how the names of its rows begin.
FAMILIES = {"vit": "ViT-", "deit": "DeiT-", "ijepa": "IJEPA-", "siglip_vision_model": "SigLIP-",
            "siglip2_vision_model": "SigLIP-", "dinov2": "DINOv2-", "dinov2_with_registers": "DINOv2-",
            "dinov3_vit": "DINOv3-", "tipsv2_vision_model": "TIPSv2-", "aimv2_vision_model": "AIMv2-"}
SIGLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16,
          "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
CLIP_DEFAULTS = SIGLIP | {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
TIPS = SIGLIP | {"image_size": 448, "patch_size": 14, "hidden_act": "gelu", "num_register_tokens": 1, "layerscale_value": 1.0,
                 "mlp_ratio": 4}
# Model type -> defaults of its class, which the section of the image encoder omits.
DEFAULTS = {
    "siglip_vision_model": SIGLIP | {"image_size": 224}, "siglip2_vision_model": SIGLIP | {"num_patches": 256},
    "clip_vision_model": CLIP_DEFAULTS, "metaclip_2_vision_model": CLIP_DEFAULTS,
    "tipsv2_vision_model": {key: value for key, value in TIPS.items() if key != "intermediate_size"},
    "aimv2_vision_model": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 8,
                           "image_size": 224, "patch_size": 14, "hidden_act": "silu", "rms_norm_eps": 1e-5},
}
# Class of the model -> what its head reads, if that differs from the row.
HEADS = {"Dinov2ForImageClassification": {"classifier": "token_mean"},
         "Dinov2WithRegistersForImageClassification": {"classifier": "token_mean"},
         "SiglipForImageClassification": {"classifier": "mean"}, "Siglip2ForImageClassification": {"classifier": "mean"},
         "CLIPForImageClassification": {"classifier": "mean", "final_norm": False},
         "MetaClip2ForImageClassification": {"classifier": "mean", "final_norm": False},
         "IJepaForImageClassification": {"classifier": "mean"},
         "DeiTForImageClassification": {"registers": 1, "distilled": False},
         "DeiTForImageClassificationWithTeacher": {"registers": 0, "distilled": True}}
# Numbers in the config -> keys of a row.
NUMBERS = {"hidden_size": "hidden_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
           "num_channels": "in_channels", "intermediate_size": "mlp_dim", "num_register_tokens": "registers"}
ROPE_BASE = 100.0                                            # DINOv3's
WRITTEN_AS = {"siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model", "clip": "clip_vision_model",
              "metaclip_2": "metaclip_2_vision_model", "aimv2": "aimv2_vision_model", "tipsv2": "tipsv2_vision_model"}
TEXT = ("clip_text_model", "siglip_text_model", "siglip2_text_model", "metaclip_2_text_model", "aimv2_text_model",
        "tipsv2_text_model", "bert", "roberta", "distilbert", "gpt2", "t5", "llama", "qwen2")
# Model types that no model here supports -> the reason. For others, the arrays decide.
RELATIVE = "positions relative to each pair of patches (BEiT)"
REFUSED = {"beit": RELATIVE, "data2vec-vision": RELATIVE, "pixio": "several cls tokens", "swin": "windows", "swinv2": "windows"}


def describe(values: dict, preprocessor: dict) -> Description:
    """Describe a model by the values of transformers' config.json and preprocessor_config.json.

    Raises WeightsError for a model that is not built here, and other errors for values of other types.
    """
    found = Description()
    kind, seen = str(values.get("model_type") or ""), values
    if kind in TEXT:
        raise WeightsError(f"its model_type is {shown(kind)}: a model for text, not for images")
    if kind in REFUSED:
        raise WeightsError(f"its model_type is {shown(kind)}, which has {REFUSED[kind]}; no model here supports that")
    if isinstance(values.get(IMAGE_TEXT), dict):
        seen = values[IMAGE_TEXT]
        kind = str(seen.get("model_type") or WRITTEN_AS.get(kind, ""))
        kind = WRITTEN_AS.get(kind, kind)
        seen = DEFAULTS.get(kind, {}) | {key: value for key, value in seen.items() if value is not None}
    architectures = values.get("architectures")
    built = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    found.row, found.family = _row(seen, kind) | HEADS.get(built, {}), FAMILIES.get(kind, "")
    if kind in ("siglip_vision_model", "siglip2_vision_model") and "classifier" not in found.row:
        found.row["classifier"] = "attention" if seen.get("vision_use_head", True) else "mean"
    if size := seen.get("image_size") or _side_of_table(seen):
        found.take_size(size_of(size), side_of(seen["patch_size"]) if seen.get("patch_size") else None)
    labels = settings_of(values, "id2label") or {number: name for name, number in settings_of(values, "label2id").items()}
    if labels:
        names = names_of(labels)
        found.classes = None if names is None or names == [f"LABEL_{number}" for number in range(len(names))] else names
    if built.endswith(("ForImageClassification", "ForImageClassificationWithTeacher")):
        found.outputs = len(labels) or None
    _take_preprocessor(found, preprocessor)
    return found


def _row(seen: Mapping, kind: str) -> dict:
    """Return the keys of a row that the values determine."""
    fixed = TYPES.get(kind)
    row = {ours: number_of(theirs, seen[theirs]) for theirs, ours in NUMBERS.items() if seen.get(theirs) is not None}
    row |= fixed or {}
    if kind != "dinov3_vit" and "num_register_tokens" not in seen:
        row.pop("registers", None)
    if seen.get("patch_size"):
        row["patch_size"] = side_of(seen["patch_size"])
    gated = seen.get("use_swiglu_ffn") or seen.get("use_gated_mlp") or row.get("mlp") == "swiglu"
    if gated:
        row["mlp"] = "swiglu"
    if seen.get("mlp_ratio") and "hidden_size" in row:
        wide = int(row["hidden_size"] * number_of("mlp_ratio", seen["mlp_ratio"], float))
        row["mlp_dim"] = (int(wide * 2 / 3) + 7) // 8 * 8 if gated else wide
    _check_activation(seen.get("hidden_act"), row, kind, gated)
    if eps := seen.get("layer_norm_eps") or seen.get("rms_norm_eps"):
        row["norm_eps"] = number_of("layer_norm_eps", eps, float)
    if seen.get("layerscale_value") and kind.startswith(("dinov", "tipsv2")):
        row["layer_scale"] = number_of("layerscale_value", seen["layerscale_value"], float)
    _take_biases(seen, row)
    rope = settings_of(seen, "rope_parameters") or seen
    if number_of("rope_theta", rope.get("rope_theta") or ROPE_BASE, float) != ROPE_BASE:
        raise WeightsError(f"its rope_theta is not {ROPE_BASE:g}, the only value that models here support")
    if seen.get("is_native"):
        raise WeightsError("it computes its positions for images of any size (is_native), which no model here supports")
    return row


def _check_activation(name: object, row: dict, kind: str, gated: bool) -> None:
    """Set the form of GELU. Raises WeightsError for another activation, or for another gate than SiLU in SwiGLU."""
    if gated:
        if kind in ("dinov3_vit", "aimv2_vision_model") and name not in SILU:
            raise WeightsError(f"its gate is {shown(name)}, but models here use SiLU")
    elif name:
        row["gelu"] = gelu_of(name)


def _take_biases(seen: Mapping, row: dict) -> None:
    if "query_bias" in seen:
        biases = tuple(bool(seen.get(f"{part}_bias")) for part in ("query", "key", "value"))
        known = {(True, True, True): "all", (True, False, True): "qv", (False, False, False): "none"}
        if biases not in known:
            raise WeightsError(f"its biases of queries, keys and values are {biases}, which no model here supports")
        row["qkv_bias"] = known[biases]
    elif seen.get("qkv_bias") is False:
        row["qkv_bias"] = "none"
    if row.get("norm") == "rms":
        row |= {"qkv_bias": "all" if seen.get("qkv_bias") else "none", "proj_bias": bool(seen.get("qkv_bias")),
                "mlp_bias": bool(seen.get("mlp_bias"))}
        return
    row |= {key: bool(seen[key]) for key in ("proj_bias", "mlp_bias") if key in seen}


def _side_of_table(seen: Mapping) -> int | None:
    """Return the side of the images for the square position table of a siglip2_vision_model, whose images may have any shape."""
    patches = seen.get("num_patches")
    if not is_whole(patches) or not seen.get("patch_size"):
        return None
    side = math.isqrt(patches)
    return side * side_of(seen["patch_size"]) if side * side == patches else None


def _take_preprocessor(found: Description, preprocessor: dict) -> None:
    numbers = {key: preprocessor.get(f"image_{key}") for key in ("mean", "std")}
    if not preprocessor.get("do_normalize", True):
        numbers = {"mean": [0] * 3, "std": [1] * 3}
    factor = number_of("rescale_factor", preprocessor.get("rescale_factor") or 1 / 255, float)
    scale = 255 * factor if preprocessor.get("do_rescale", True) else 255.0
    scale = 1.0 if math.isclose(scale, 1) else scale                # the largest value of a pixel before it is normalized
    numbers = {key: [value] * 3 if is_number(value) else value for key, value in numbers.items()}        # one for each channel
    found.row |= {key: tuple(number / scale for number in numbers_of(value)) for key, value in numbers.items() if value}
    resample = preprocessor.get("resample")
    found.take_view(None if resample is None else RESAMPLE.get(resample, f"resample {resample}"), *_cut(preprocessor))


def _cut(preprocessor: dict) -> tuple[object, str | None]:
    """Return timm's (crop_pct, crop_mode) for how transformers resizes and crops images.

    What timm cannot express is (None, a description).
    """
    size, crop = preprocessor.get("size"), preprocessor.get("crop_size") if preprocessor.get("do_center_crop") else None
    if "crop_pct" in preprocessor or size is None:
        return preprocessor.get("crop_pct"), None
    squeezed = not (isinstance(size, dict) and "shortest_edge" in size)        # a number is both sides
    if crop is None and squeezed:
        return 1, "squash"
    sides, crop = ({value} if is_number(value) else {value.get(name) for name in ("shortest_edge", "height", "width")} - {None}
                   for value in (size, crop or {}))
    if len(sides) == len(crop) == 1 and max(crop) <= max(sides):
        return max(crop) / max(sides), "squash" if squeezed else "center"
    return None, f"size {shown(size)}, crop_size {shown(preprocessor.get('crop_size'))}"
