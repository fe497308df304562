"""transformers' config.json: every class gives its row, and contradictions with the arrays are refused."""

import json

import pytest
import torch
from filling import refused
from headers import header_of
from other_programs import transformers_names

from configs import MODELS
from models import create_model
from models.checkpoints import config_of_transformers
from models.match import match_row

# A class of transformers: (its configuration at a published size, the row, keys that differ from it, GELU and eps).
SIZES = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 224}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224}
GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "image_size": 518, "use_swiglu_ffn": True}
HUGE = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "image_size": 224, "intermediate_size": 5120}
TIPS = {**BASE, "image_size": 448, "patch_size": 14}
AIM = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 8, "image_size": 224}
CLASSES = {
    "ViTForImageClassification": (BASE, "ViT-B_16", {}, ("erf", 1e-12)),
    "ViTModel": (SIZES | {"intermediate_size": 1536, "hidden_act": "gelu_fast"}, "ViT-S_16", {}, ("tanh", 1e-12)),
    "DeiTForImageClassification": (BASE, "DeiT-B_16", {"registers": 1}, ("erf", 1e-12)),
    "DeiTForImageClassificationWithTeacher": (BASE, "DeiT-B_16-distilled", {}, ("erf", 1e-12)),
    "IJepaForImageClassification": (HUGE | {"patch_size": 14}, "IJEPA-H_14", {}, ("erf", 1e-12)),
    "IJepaModel": (HUGE | {"patch_size": 16, "image_size": 448}, "IJEPA-H_16", {}, ("erf", 1e-12)),
    "Dinov2Model": (SIZES | {"image_size": 518}, "DINOv2-S_14", {}, ("erf", 1e-6)),
    "Dinov2ForImageClassification": (LARGE | {"image_size": 518}, "DINOv2-L_14", {"classifier": "token_mean"}, ("erf", 1e-6)),
    "Dinov2WithRegistersModel": (GIANT | {"patch_size": 14}, "DINOv2-g_14-reg", {}, ("erf", 1e-6)),
    "Dinov2WithRegistersForImageClassification": (BASE | {"image_size": 518, "patch_size": 14}, "DINOv2-B_14-reg",
                                                  {"classifier": "token_mean"}, ("erf", 1e-6)),
    "DINOv3ViTModel": (SIZES | {"num_register_tokens": 4}, "DINOv3-S_16-qkvb", {}, ("erf", 1e-5)),
    "DINOv3ViTBackbone": (HUGE | {"num_attention_heads": 20, "num_register_tokens": 4, "use_gated_mlp": True,
                                  "hidden_act": "silu"}, "DINOv3-H+_16-qkvb", {}, ("erf", 1e-5)),
    "SiglipVisionModel": (BASE, "SigLIP-B_16", {}, ("tanh", 1e-6)),
    "SiglipModel": ({"vision_config": {}}, "SigLIP-B_16", {}, ("tanh", 1e-6)),
    "SiglipForImageClassification": ({"vision_config": {"image_size": 384}}, "SigLIP-B_16", {"classifier": "mean"},
                                     ("tanh", 1e-6)),
    "Siglip2VisionModel": ({**BASE, "image_size": None}, "SigLIP-B_16", {}, ("tanh", 1e-6)),
    "Siglip2Model": ({"vision_config": {}}, "SigLIP-B_16", {}, ("tanh", 1e-6)),
    "Siglip2ForImageClassification": ({"vision_config": {}}, "SigLIP-B_16", {"classifier": "mean"}, ("tanh", 1e-6)),
    "CLIPVisionModel": (BASE, "CLIP-B_32", {}, ("quick", 1e-5)),
    "CLIPVisionModelWithProjection": (LARGE | {"intermediate_size": 4096, "patch_size": 14, "hidden_act": "gelu"},
                                      "OpenCLIP-L_14", {}, ("erf", 1e-5)),
    "CLIPModel": ({"vision_config": {}}, "CLIP-B_32", {}, ("quick", 1e-5)),
    "CLIPForImageClassification": ({"vision_config": {"patch_size": 16}}, "CLIP-B_16", {"classifier": "mean"}, ("quick", 1e-5)),
    "MetaClip2VisionModel": (HUGE | {"patch_size": 14}, "CLIP-H_14", {}, ("quick", 1e-5)),
    "MetaClip2Model": ({"vision_config": {}}, "CLIP-B_32", {}, ("quick", 1e-5)),
    "MetaClip2ForImageClassification": ({"vision_config": {}}, "CLIP-B_32", {"classifier": "mean"}, ("quick", 1e-5)),
    "Aimv2VisionModel": (AIM, "AIMv2-L_14", {}, (None, 1e-5)),
    "Aimv2Model": ({"vision_config": {}}, "AIMv2-L_14", {}, (None, 1e-5)),
    "Tipsv2VisionModel": (TIPS, "TIPSv2-B_14", {}, ("erf", 1e-6)),
    "Tipsv2Model": ({"vision_config": {}}, "TIPSv2-B_14", {}, ("erf", 1e-6)),
}


@pytest.mark.reference
@pytest.mark.parametrize("name", CLASSES)
def test_transformers_own_models_at_full_size_give_their_row(name, tmp_path):
    """With the configuration that it saves, and its names and shapes."""
    transformers = pytest.importorskip("transformers")
    from utils.training.memory import parameters

    settings, row, keys, computed = CLASSES[name]
    built = getattr(transformers, name)
    config = built.config_class(**{key: value for key, value in settings.items() if value is not None})
    config.architectures = [name]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = built(config)
    said = config_of_transformers.describe(json.loads((tmp_path / "config.json").read_text()), {})
    file = header_of(model.state_dict(), said)
    found = match_row(file)
    assert found[0] == row and {key: value for key, value in found[1].items() if key != "pool_mlp_dim"} == keys
    assert computed == (file.computed.get("gelu"), file.computed.get("norm_eps"))
    empty = torch.device("meta")
    with empty:
        ours = create_model(row, **found[1] | file.computed)
    assert parameters(ours.config, ours.img_size, 1000) == sum(parameter.numel() for parameter in ours.parameters())
    size = getattr(getattr(config, "vision_config", config), "image_size", 256)
    assert file.row["img_size"] == size


@pytest.mark.parametrize("values, row", [
    ({"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}},
     {"hidden_size": 768, "num_heads": 12, "patch_size": 16, "img_size": 224, "gelu": "tanh", "norm_eps": 1e-6,
      "classifier": "attention", "class_token": False}),
    ({"model_type": "siglip", "vision_config": {"vision_use_head": False}}, {"classifier": "mean"}),
    ({"model_type": "siglip2", "vision_config": {"num_patches": 256}}, {"img_size": 256}),
    ({"model_type": "clip", "vision_config": {"patch_size": 14, "image_size": 336}},
     {"gelu": "quick", "norm_eps": 1e-5, "img_size": 336, "pre_norm": True}),
    ({"model_type": "clip", "vision_config": {"hidden_act": "gelu"}, "architectures": ["CLIPForImageClassification"]},
     {"gelu": "erf", "classifier": "mean", "final_norm": False}),
    ({"model_type": "dinov2", "hidden_size": 1536, "mlp_ratio": 4, "use_swiglu_ffn": True, "layerscale_value": 1.0},
     {"mlp": "swiglu", "mlp_dim": 4096, "layer_scale": 1.0}),
    ({"model_type": "dinov3_vit", "query_bias": True, "key_bias": False, "value_bias": True, "num_register_tokens": 4},
     {"qkv_bias": "qv", "registers": 4, "rope": "dinov3", "positions": "none"}),
    ({"model_type": "dinov3_vit", "query_bias": False, "key_bias": False, "value_bias": False}, {"qkv_bias": "none"}),
    ({"model_type": "aimv2_vision_model", "hidden_act": "silu", "rms_norm_eps": 1e-5},
     {"norm": "rms", "norm_eps": 1e-5, "mlp": "swiglu", "qkv_bias": "none", "proj_bias": False, "mlp_bias": False}),
    ({"model_type": "aimv2_vision_model", "hidden_act": "silu", "qkv_bias": True, "mlp_bias": True},
     {"qkv_bias": "all", "proj_bias": True, "mlp_bias": True}),
    ({"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}, {"img_size": 378})])
def test_values_become_keys_of_a_row(values, row):
    found = config_of_transformers.describe(values, {}).row
    assert {key: found.get(key) for key in row} == row


@pytest.mark.parametrize("values, words", [
    ({"model_type": "siglip_text_model"}, "a model for text,"), ({"model_type": "bert"}, "a model for text,"),
    ({"model_type": "beit"}, "positions relative to each pair"), ({"model_type": "pixio"}, "several cls tokens"),
    ({"model_type": "vit", "hidden_act": "relu"}, "its activation is relu"),
    ({"model_type": "beit"}, "its model_type is beit, which has positions relative to each pair"),
    ({"model_type": "vit", "label2id": [1]}, "its label2id is .1., not a JSON object"),
    ({"model_type": "dinov3_vit", "rope_parameters": 5}, "its rope_parameters is 5"),
    ({"model_type": "dinov3_vit", "rope_theta": 1000.0}, "its rope_theta is not 100"),
    ({"model_type": "dinov3_vit", "query_bias": False, "key_bias": True, "value_bias": True}, "its biases of queries"),
    ({"model_type": "dinov3_vit", "use_gated_mlp": True, "hidden_act": "gelu"}, "its gate is gelu"),
    ({"model_type": "aimv2_vision_model", "hidden_act": "silu", "is_native": True}, "is_native"),
    ({"model_type": "vit", "patch_size": [16, 8]}, "but models here have square patches")])
def test_unsupported_values_are_refused(values, words):
    refused(words, config_of_transformers.describe, values, {})


def dinov3(**changes) -> dict:
    """Return the arrays of a model of two blocks, in transformers' names."""
    with torch.device("meta"):
        state = create_model("DINOv3-S_16-qkvb", 1, num_layers=2, **changes).state_dict()
    found = {"embeddings.cls_token": state["cls_token"], "embeddings.mask_token": state["cls_token"]}
    if "reg_token" in state:
        found["embeddings.register_tokens"] = state["reg_token"]
    for kind in ("weight", "bias"):
        found |= {f"embeddings.patch_embeddings.{kind}": state[f"patch_embed.proj.{kind}"],
                  f"norm.{kind}": state[f"norm.{kind}"]}
        for i in (0, 1):
            ours, theirs = f"blocks.{i}.", f"layer.{i}."
            for mine, other in (("norm1", "norm1"), ("norm2", "norm2"), ("attn.proj", "attention.o_proj"),
                                ("mlp.fc1", "mlp.up_proj"), ("mlp.fc2", "mlp.down_proj")):
                found[f"{theirs}{other}.{kind}"] = state[f"{ours}{mine}.{kind}"]
            for part in "qkv":
                if kind == "weight" or part != "k":
                    found[f"{theirs}attention.{part}_proj.{kind}"] = state[f"{ours}norm1.weight"] if kind == "bias" else state[
                        f"{ours}attn.proj.weight"]
            for n in (1, 2):
                found[f"{theirs}layer_scale{n}.lambda1"] = state[f"{ours}ls{n}.gamma"]
    return found


DINOV3 = {"model_type": "dinov3_vit", "hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6, "patch_size": 16,
          "intermediate_size": 1536, "num_register_tokens": 4, "hidden_act": "gelu", "image_size": 224, "query_bias": True,
          "key_bias": False, "value_bias": True, "layer_norm_eps": 1e-5}


@pytest.mark.parametrize("changes, words", [
    ({}, ""), ({"hidden_size": 768}, "says hidden_size 768, but its arrays have hidden_size 384"),
    ({"num_hidden_layers": 3}, "says num_layers 3, but its arrays have num_layers 2"),
    ({"num_attention_heads": 5}, "says num_heads 5, which does not divide the width 384"),
    ({"patch_size": 14}, "says patch_size 14, but its arrays have patch_size 16"),
    ({"num_register_tokens": 3}, "says registers 3, but its arrays have registers 4"),
    ({"intermediate_size": 1000}, "says mlp_dim 1000, but its arrays have mlp_dim 1536"),
    ({"query_bias": False, "value_bias": False}, "says qkv_bias none, but its arrays have qkv_bias qv")])
def test_a_config_that_contradicts_the_arrays_is_reported_in_one_line(changes, words):
    file = header_of(dinov3(), config_of_transformers.describe(DINOV3 | changes, {}))
    if words:
        refused(words, match_row, file)
    else:
        assert match_row(file)[0] == "DINOv3-S_16-qkvb"


@pytest.mark.parametrize("value, numbers", [(0.5, (0.5,) * 3), ([0.1, 0.2, 0.3], (0.1, 0.2, 0.3))])
def test_one_number_counts_for_every_channel(value, numbers):
    found = config_of_transformers.describe({"model_type": "vit"}, {"image_mean": value, "image_std": value}).row
    assert (found["mean"], found["std"]) == (numbers, numbers)


@pytest.mark.parametrize("size", [(224, 256), (64, 96)])
def test_positions_of_images_that_are_not_square(size):
    """The table of 224 x 256 px has 224 + 1 rows, as many as a square of 15 x 15."""
    with torch.device("meta"):
        state = transformers_names(create_model("ViT-Ti_16", 3, size, num_layers=1).state_dict(), "vit.")
    said = {"model_type": "vit", "hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 768,
            "patch_size": 16, "image_size": list(size)}
    file = header_of(state, config_of_transformers.describe(said, {}))
    name, keys = match_row(file)
    assert (MODELS[name].positions, "positions" in keys, file.row["img_size"]) == ("all", False, size)


def test_aimv2_with_biases():
    """Its SwiGLU has no GELU that could be stated."""
    parts = {"qkv_bias": "all", "proj_bias": True, "mlp_bias": True}
    with torch.device("meta"):
        state = create_model("AIMv2-L_14", 1, num_layers=1, **parts).state_dict()
    said = {"model_type": "aimv2_vision_model", "hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 8,
            "patch_size": 14, "intermediate_size": 2816, "hidden_act": "silu", "rms_norm_eps": 1e-5, "qkv_bias": True,
            "mlp_bias": True}
    state = {name: value for name, value in state.items() if not name.startswith("head.")}
    name, keys = match_row(header_of(state, config_of_transformers.describe(said, {})))
    assert name == "AIMv2-L_14" and {key: keys[key] for key in parts} == parts
