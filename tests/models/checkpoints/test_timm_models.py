"""timm's model for a model of ours: its name, its arguments, and its names of the arrays."""

import pytest
import torch
from filling import random_model

from configs import MODELS, architecture
from models.checkpoints import timm_config, timm_models
from models.checkpoints.export import save_weights
from models.checkpoints.hub import table
from models.families import FAMILIES

SMALL = {"patch_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2, "num_layers": 2}
# The arguments of timm 1.0.31 for its own models, except patch, width, depth and heads.
EVA02 = {"swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": [16, 16]}
DINOV3 = {"init_values": 1e-5, "rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True, "use_rot_pos_emb": True,
          "use_abs_pos_emb": False, "num_reg_tokens": 4, "use_fc_norm": False}
PE = {"attn_type": "rope", "use_pre_transformer_norm": True, "use_rot_pos_emb": True, "ref_feat_shape": [32, 32],
      "rope_grid_indexing": "xy"}
SAID = {
    "DINOv2-S_14": ("vit_small_patch14_dinov2", {"init_values": 1e-5}),
    "DINOv2-g_14-reg": ("vit_giant_patch14_reg4_dinov2", {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}),
    "DINOv3-B_16": ("vit_base_patch16_dinov3", DINOV3 | {"qkv_bias": False}),
    "DINOv3-H+_16-qkvb": ("vit_huge_plus_patch16_dinov3_qkvb", DINOV3 | {"qkv_bias": True, "swiglu_mlp": True,
                                                                         "swiglu_align_to": 8}),
    "SigLIP-SO400M_14": ("vit_so400m_patch14_siglip_224", {"class_token": False}),
    "CLIP-B_32": ("vit_base_patch32_clip_quickgelu_224", {"pre_norm": True, "act_layer": "quick_gelu"}),
    "DeiT3-M_16": ("deit3_medium_patch16_224", {"no_embed_class": True, "init_values": 1e-6}),
    "EVA02-Ti_14": ("eva02_tiny_patch14_224", EVA02),
    "EVA02-L_14-clip": ("eva02_large_patch14_clip_224", EVA02 | {"qkv_fused": False, "scale_mlp": True,
                                                                 "scale_attn_inner": True}),
    "EVA-g_14": ("eva_giant_patch14_224", {}),
    "PE-core-G_14": ("vit_pe_core_gigantic_patch14_448", PE | {"class_token": False, "attn_pool_num_heads": 8,
                                                               "attn_pool_mlp_ratio": 4.0}),
    "PE-lang-L_14": ("vit_pe_lang_large_patch14_448", PE | {"rope_grid_offset": 1, "use_post_transformer_norm": False,
                                                            "use_fc_norm": False, "init_values": 0.1}),
    "AIMv2-H_14": ("aimv2_huge_patch14_224", {"class_token": False, "fc_norm": False, "qkv_bias": False, "proj_bias": False,
                                              "act_layer": "silu"}),
    "ViT-Betwixt_16-rope-reg4": ("vit_betwixt_patch16_rope_reg4_gap_256", {
        "qkv_fused": True, "qkv_bias": True, "init_values": 1e-5, "class_token": False, "num_reg_tokens": 4,
        "use_rot_pos_emb": True, "use_abs_pos_emb": False, "ref_feat_shape": [16, 16]}),
    "ViT-SO150M2_16-reg1": ("vit_so150m2_patch16_reg1_gap_256", {"init_values": 1e-5, "qkv_bias": False, "class_token": False,
                                                                 "reg_tokens": 1}),
    "BEiT3-B_16": ("beit3_base_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True, "class_token": True}),
    "C-RADIOv4-SO400M_16": ("vit_so400m_patch16_radio_v4", {"reg_tokens": 9, "no_embed_class": True, "final_norm": False}),
}


@pytest.mark.parametrize("row", SAID)
def test_arguments_are_those_of_timm_s_own_model(row):
    """A model of that row also gets its name; a model that differs from what the name fixes gets another."""
    config, (name, said) = MODELS[row], SAID[row]
    kind = timm_models.kind_of(config)
    found = timm_models.arguments_of(config, kind, whole=True)
    assert {key: found.get(key) for key in said} == said
    assert timm_models.published_name_of(config, row, config.img_size) == name
    width = 2 * config.mlp_dim if kind is timm_models.PACKED else config.mlp_dim
    assert int(config.hidden_size * timm_models.mlp_ratio_of(config, kind)) == width
    other = config.copy_and_resolve_references()
    other.norm_eps = {1e-5: 1e-6, 1e-6: 1e-5}[config.norm_eps]
    assert timm_models.published_name_of(other, row, config.img_size) == ""


def test_the_size_of_the_images_chooses_among_published_names():
    row = MODELS["SigLIP-B_16"]
    assert [timm_models.published_name_of(row, "SigLIP-B_16", pixels) for pixels in (384, 500)] == [
        "vit_base_patch16_siglip_384", "vit_base_patch16_siglip_224"]
    assert timm_models.published_name_of(row, "ViT-B_16", 224) == timm_models.published_name_of(row, "", 224) == ""
    assert {file.model for file in table() if "/" not in file.name} >= set(FAMILIES)


@pytest.mark.parametrize("more, name", [
    ({"layer_scale": 0.1, "registers": 3}, "vit_base_patch16_224"), ({"norm": "rms"}, "vit_base_patch16_224"),
    ({"norm_eps": 1e-5}, "vit_base_patch16_clip_224"), ({"mlp": "swiglu"}, "vit_giant_patch14_dinov2"),
    ({"mlp": "swiglu", "norm": "rms", "norm_eps": 1e-5}, "aimv2_large_patch14_224"),
    ({"mlp": "swiglu", "norm_eps": 1e-5, "qkv_bias": "none"}, "vit_pe_core_tiny_patch16_384"),
    ({"rope": "dinov3", "gelu": "erf"}, "eva02_tiny_patch14_224"),
    ({"rope": "dinov3", "gelu": "erf", "norm_eps": 1e-5, "layer_scale": 0.1}, "vit_small_patch16_dinov3"),
    ({"rope": "dinov3", "gelu": "erf", "norm_eps": 1e-5}, "vit_pe_core_tiny_patch16_384"),
    ({"qkv_bias": "qv", "mlp": "swiglu"}, "eva02_tiny_patch14_224"),
    ({"norm_eps": 1e-3, "norm": "rms"}, "vit_base_patch16_224")])
def test_a_model_with_an_unpublished_combination_of_parts(more, name):
    config = architecture(**SMALL, **more)
    assert timm_models.name_of(config, timm_models.kind_of(config)) == name


@pytest.mark.parametrize("more, words", [
    ({"classifier": "token_mean"}, "classifier 'token_mean': timm uses the cls token or the mean"),
    ({"patch_norm": "around"}, "patch_norm 'around': timm has no norm of the pixels"),
    ({"patch_bias": False}, "patch_bias False: timm's patch embedding has a bias if and only if"),
    ({"rope": "dinov3"}, "gelu 'tanh': timm's Eva has only the exact GELU"),
    ({"rope": "dinov3", "mlp": "swiglu", "norm": "rms"}, "norm 'rms': timm's Eva has LayerNorm"),
    ({"rope": "dinov3", "mlp": "swiglu", "proj_bias": False}, "proj_bias False, mlp_bias True: timm's Eva has both"),
    ({"mlp_bias": False}, "proj_bias True, mlp_bias False: timm's VisionTransformer has both or neither"),
    ({"classifier": "attention", "pool_heads": 1}, "pool_heads 1: timm's VisionTransformer pools with the heads of its blocks"),
    ({"classifier": "attention", "pool_mlp_dim": 9}, "pool_mlp_dim 9: timm's VisionTransformer pools with an MLP as wide"),
    ({"classifier": "attention", "mlp": "swiglu", "norm": "rms"}, "with mlp 'swiglu' timm's VisionTransformer pools with"),
    ({"resnet_layers": (), "rope": "eva", "rope_grid": 4}, "rope 'eva': timm's VisionTransformer has no rotary positions")])
def test_parts_that_no_model_of_timm_has_are_named(more, words):
    found = timm_models.kind_of(architecture(**SMALL, **more))
    assert isinstance(found, str) and words in found


@pytest.mark.parametrize("row, ours, theirs", [
    ("DINOv2-B_14", "attn.qkv.bias", "attn.qkv.bias"), ("DINOv2-g_14", "mlp.fc1.weight", "mlp.fc1.weight"),
    ("DINOv3-B_16-qkvb", "attn.qkv.q_bias ls2.gamma", "attn.q_bias gamma_2"),
    ("DINOv3-S+_16", "mlp.fc1.bias", "mlp.fc1_g.bias mlp.fc1_x.bias"), ("EVA02-S_14", "mlp.fc1.bias", "mlp.fc1.bias"),
    ("EVA02-B_14", "attn.qkv.weight attn.qkv.v_bias mlp.fc1.weight",
     "attn.q_proj.weight attn.k_proj.weight attn.v_proj.weight attn.v_proj.bias mlp.fc1_g.weight mlp.fc1_x.weight"),
    ("PE-core-B_16", "attn.qkv.bias", "attn.qkv.bias"), ("AIMv2-L_14", "mlp.fc1.weight", "mlp.fc1_g.weight mlp.fc1_x.weight"),
    ("CaiT-XXS24", "gamma_1 mlp.fc1.weight", "gamma_1 mlp.fc1.weight")])
def test_names_in_a_block(row, ours, theirs):
    spell = timm_models.spelling_of(MODELS[row])
    assert [name for our in ours.split() for name in spell(f"blocks.3.{our}")] == [f"blocks.3.{name}" for name in theirs.split()]
    assert spell("norm.weight") == ("norm.weight",) and spell("pos_embed") == ("pos_embed",)


POOLED = ("ViT-B_16", "CLIP-B_32", "DINOv2-S_14", "DINOv2-S_14-reg", "DeiT3-S_16", "TIPSv2-B_14", "EVA02-Ti_14", "SigLIP-B_16")


def test_timm_s_query_reads_all_tokens_if_the_argument_says_so():
    for name in POOLED:
        row = architecture(**MODELS[name].to_dict() | SMALL | {"classifier": "attention", "gelu": "erf"})
        said = timm_models.arguments_of(row, timm_models.kind_of(row), whole=False).get("pool_include_prefix")
        assert said == (None if name in ("EVA02-Ti_14", "SigLIP-B_16") else True), name


@pytest.mark.reference
@torch.inference_mode()
def test_timm_pools_by_attention_what_an_export_does(tmp_path):
    """For a model fine-tuned with --classifier attention; timm's own file of it gives the same here."""
    timm = pytest.importorskip("timm")
    for name in POOLED:
        model = random_model(MODELS[name], 5, 16, **SMALL | {"classifier": "attention", "gelu": "erf"}).eval()
        view, own = {"interpolation": "bicubic", "eval_crop": 0.0}, {"card": {"model": {"architecture": name}}}
        config = timm_config.timm_config(model, list("abcde"), view, own)
        theirs = timm.create_model(config["architecture"], num_classes=5, **config["model_args"]).eval()
        save_weights(model, tmp_path / "x.pth")
        theirs.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True))
        images = torch.randn(2, 3, 16, 16)
        assert (theirs(images) - model(images)).abs().max() < 2e-5, name


@pytest.mark.reference
@torch.inference_mode()
def test_timm_computes_what_a_model_of_every_row_does(tmp_path):
    """With its own name and arguments, in a tiny size; those with rotary positions on images that are not square."""
    timm = pytest.importorskip("timm")
    for name, row in FAMILIES.items():
        pool = {"pool_heads": 4, "pool_mlp_dim": 40} if row.pool_heads else {}
        model = random_model(row, 5, (16, 24) if row.rope else 16, **SMALL | pool).eval()
        view, own = {"interpolation": "bicubic", "eval_crop": 0.0}, {"card": {"model": {"architecture": name}}}
        config = timm_config.timm_config(model, list("abcde"), view, own)
        assert config["architecture"] in {file.name.partition(".")[0] for file in table() if file.model == name}
        theirs = timm.create_model(config["architecture"], num_classes=5, **config["model_args"]).eval()
        save_weights(model, tmp_path / "x.pth")
        theirs.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True))
        images = torch.randn(2, 3, *model.img_size)
        assert (theirs(images) - model(images)).abs().max() < 2e-5, name
