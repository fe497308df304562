"""Comparison with timm, if it is installed: our state dict in timm's models gives the same features and logits.

timm computes the exact GELU, as in DeiT, CaiT and MAE; here Google's models use it too. timm standardizes the weights of hybrids
with 1e-8 inside the square root, Google with 1e-5 outside: the weights are drawn large enough for the two to agree.
"""

import copy

import pytest
import torch
from filling import random_model as filled
from originals import KINDS as KINDS_OF_FILES
from originals import arrays_of
from torch import nn

from configs import MODELS, architecture
from models import create_model, save_npz
from models.checkpoints.infer import ARRAYS, SIZES
from models.checkpoints.opened import OpenedCheckpoint
from models.resnet import StdConv2d

pytestmark = pytest.mark.reference
timm = pytest.importorskip("timm")
eva, vision_transformer = timm.models.eva, timm.models.vision_transformer

TINY = {"embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 7}
VIT = [
    # our row, image size, timm's options
    (architecture(16, 48, 192, 3, 2, img_size=64), (64, 64), {}),
    (architecture(16, 48, 192, 3, 2, img_size=64), (32, 80), {}),
    (architecture(16, 48, 192, 3, 2, img_size=64, classifier="gap"), (64, 64),
     {"global_pool": "avg", "class_token": False, "fc_norm": False}),
]
HYBRIDS = [
    # our row, image size, timm's model
    (architecture(8, 48, 192, 3, 2, resnet_layers=()), 64, "vit_tiny_r_s16_p8_224"),
    (architecture(1, 48, 192, 3, 2, resnet_layers=(2, 2, 2, 2)), 64, "vit_small_r26_s32_224"),
    (architecture(1, 48, 192, 3, 2, resnet_layers=(3, 4, 9)), 48, "vit_base_r50_s16_384"),
]
PUBLISHED = {
    # our row: timm's model
    "DeiT-Ti_16": "deit_tiny_patch16_224", "DeiT-Ti_16-distilled": "deit_tiny_distilled_patch16_224",
    "DeiT-S_16": "deit_small_patch16_224", "DeiT-S_16-distilled": "deit_small_distilled_patch16_224",
    "DeiT-B_16": "deit_base_patch16_224", "DeiT-B_16-distilled": "deit_base_distilled_patch16_224",
    "CaiT-XXS24": "cait_xxs24_224", "CaiT-XXS36": "cait_xxs36_224", "CaiT-XS24": "cait_xs24_384", "CaiT-S24": "cait_s24_224",
    "CaiT-S36": "cait_s36_384", "CaiT-M36": "cait_m36_384", "CaiT-M48": "cait_m48_448",
    "MAE-B_16": "vit_base_patch16_224", "MAE-L_16": "vit_large_patch16_224", "MAE-H_14": "vit_huge_patch14_224"}


# Families of 2022 and later: timm's name of one of each kind, and our row's keys for it.
_SCALED, _EVA, _CLIP = {"layer_scale": 0.1}, {"rope": "eva", "rope_grid": 16, "qkv_bias": "qv"}, {
    "pre_norm": True, "patch_bias": False, "norm_eps": 1e-5}
_DINOV3 = {"registers": 4, "positions": "none", "rope": "dinov3", "norm_eps": 1e-5, **_SCALED}
_GAP = {"class_token": False, "classifier": "mean"}
_PE = {**_CLIP, "rope": "pe", "classifier": "attention", "pool_heads": 8}
KINDS = {
    "vit_small_patch14_dinov2": _SCALED,
    "vit_small_patch14_reg4_dinov2": _SCALED | {"registers": 4, "positions": "patches"},
    "vit_giant_patch14_dinov2": _SCALED | {"mlp": "swiglu"},
    "vit_small_patch16_dinov3": _DINOV3 | {"qkv_bias": "none", "classifier": "mean"},
    "vit_small_plus_patch16_dinov3_qkvb": _DINOV3 | {"qkv_bias": "qv", "classifier": "mean", "mlp": "swiglu"},
    "vit_small_patch16_lingbot": _DINOV3 | {"qkv_bias": "qv"},
    "vit_base_patch16_siglip_224": {"class_token": False, "classifier": "attention"},
    "vit_base_patch32_siglip_256": {"class_token": False, "classifier": "attention", "gelu": "tanh"},
    "vit_base_patch16_siglip_gap_224": _GAP,
    "vit_base_patch32_clip_224": _CLIP,
    "vit_base_patch32_clip_quickgelu_224": _CLIP | {"gelu": "quick"},
    "deit3_small_patch16_224": _SCALED | {"positions": "patches"},
    "eva02_tiny_patch14_224": _EVA | {"mlp": "swiglu", "classifier": "patch_mean"},
    "eva02_base_patch14_224": _EVA | {"mlp": "swiglu", "mlp_norm": True, "classifier": "patch_mean"},
    "eva02_base_patch16_clip_224": _EVA | {"mlp": "swiglu", "mlp_norm": True, "attention_norm": True},
    "eva_giant_patch14_224": {"qkv_bias": "qv", "classifier": "patch_mean"},
    "vit_pe_core_tiny_patch16_384": _PE | {"rope_grid": 24},
    "vit_pe_core_gigantic_patch14_448": _PE | {"rope_grid": 32, "class_token": False},
    "vit_pe_spatial_tiny_patch16_512": _PE | {"rope_grid": 32, "classifier": "mean", "final_norm": False, "pool_heads": 0},
    "vit_base_patch14_reg1_tipsv2": _SCALED | {"registers": 1, "positions": "patches"},
    "aimv2_large_patch14_224": _GAP | {"norm": "rms", "norm_eps": 1e-5, "patch_norm": "after", "mlp": "swiglu",
                                       "qkv_bias": "none", "proj_bias": False, "mlp_bias": False},
    "vit_betwixt_patch16_reg4_gap_256": _SCALED | {"class_token": False, "registers": 4, "positions": "patches",
                                                   "classifier": "patch_mean"},
    "vit_so150m_patch16_reg4_gap_256": _GAP | {"registers": 4},
    "vit_so150m2_patch16_reg1_gap_256": _SCALED | {"class_token": False, "registers": 1, "qkv_bias": "none",
                                                   "classifier": "patch_mean"},
    "vit_betwixt_patch16_rope_reg4_gap_256": _SCALED | _EVA | {"class_token": False, "registers": 4, "positions": "none",
                                                               "classifier": "patch_mean"},
    "vit_intern300m_patch14_448": _SCALED | {"final_norm": False},
    "vit_base_patch16_radio_v3": _SCALED | {"registers": 7, "positions": "patches", "final_norm": False},
    "beit3_base_patch16_224": {"classifier": "patch_mean", "attention_norm": True, "mlp_norm": True, "norm_eps": 1e-5},
    "vit_little_patch16_reg4_gap_256": _SCALED | {"class_token": False, "registers": 4, "positions": "patches",
                                                  "classifier": "patch_mean"},
}


def random_model(row, img_size, **overrides):
    """Return a model without zeros and ones, so that every parameter counts."""
    torch.manual_seed(0)
    model = create_model(row, 7, img_size, gelu="erf", **overrides).eval()
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.normal_(module.weight, mean=1, std=0.2)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, StdConv2d):
            nn.init.normal_(module.weight, std=100)
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    for name, parameter in model.named_parameters():
        if name.startswith("head") or name == "pos_embed" or "proj_" in name:
            nn.init.normal_(parameter, std=0.2)
        elif name in ("cls_token", "dist_token") or "gamma_" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def timm_s_names(model) -> dict[str, torch.Tensor]:
    """Rename the stem, since timm has no module `stem` if the ResNet has no stages."""
    stem = "patch_embed.backbone.stem." if model.config.resnet_layers == () else " "
    return {name.replace(stem, "patch_embed.backbone."): value for name, value in model.state_dict().items()}


@torch.inference_mode()
def agree(ours, theirs, tolerance: float) -> None:
    theirs = theirs.eval()
    theirs.load_state_dict(timm_s_names(ours))                    # strict: the names are the same
    images = torch.randn(2, 3, *ours.img_size)
    assert (ours.forward_features(images) - theirs.forward_features(images)).abs().max() < tolerance
    assert (ours(images) - theirs(images)).abs().max() < tolerance


@pytest.mark.parametrize("row, img_size, options", VIT, ids=["square", "non_square", "gap"])
def test_transformer(row, img_size, options):
    ours = random_model(row, img_size)
    agree(ours, timm.models.VisionTransformer(img_size=img_size, patch_size=16, **TINY, **options), 2e-5)


@pytest.mark.parametrize("row, img_size, name", HYBRIDS, ids=[name for *_, name in HYBRIDS])
def test_hybrid(row, img_size, name):
    ours = random_model(row, img_size)
    agree(ours, timm.create_model(name, img_size=img_size, **TINY), 3e-4)


def timm_options(name: str, **more) -> dict:
    """Return timm's options: MAE's rows are its plain models with mean pooling."""
    return {"global_pool": "avg"} | more if name.startswith("MAE") else more


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in ("MAE-L_16", "MAE-H_14")])
def test_published_sizes(name):
    """Two blocks of every size, on images of 4 x 4 patches. One size of MAE, as its sizes differ only in width."""
    side = 4 * MODELS[name].patch_size
    ours = random_model(name, side, num_layers=2)
    agree(ours, timm.create_model(PUBLISHED[name], img_size=side, num_classes=7, **timm_options(name, depth=2)), 5e-5)


@pytest.mark.parametrize("name, keys", KINDS.items(), ids=KINDS)
@torch.inference_mode()
def test_todays_families(tmp_path, name, keys):
    """Two narrow blocks of each, in a file that timm saves; at its size, at a larger and at one that is not square (for which
    timm resizes tables like one of our rules); in float64, except for timm's rotary tables, and in float32."""
    torch.manual_seed(0)
    patch = int(name.partition("_patch")[2][:2])
    theirs = timm.create_model(name, depth=2, embed_dim=96, num_heads=4, num_classes=7, img_size=4 * patch)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    pool = theirs.attn_pool.mlp.fc1.out_features if "pool_heads" in keys and keys["classifier"] == "attention" else 0
    row = architecture(patch, 96, theirs.blocks[0].mlp.fc2.in_features, 4, 2,
                       **{"gelu": "erf", "pool_mlp_dim": pool} | keys | {"position_resize": "bicubic_antialias"})
    for height, width in ((4, 4), (6, 6), (3, 5)):
        size = height * patch, width * patch
        other = copy.deepcopy(theirs).eval()
        other.set_input_size(size)
        with OpenedCheckpoint(tmp_path / "x.pth") as file:
            check_row(file.row, row)
            ours = create_model(row, 7, size, file, "keep", norm_eps=row.norm_eps, gelu=row.gelu).eval()
        images = torch.randn(2, 3, *size)
        for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
            ours, other, images = ours.to(dtype), other.to(dtype), images.to(dtype)
            logits, tokens = (ours(images), other(images)), (ours.forward_features(images), other.forward_features(images))
            for mine, expected in (logits, tokens):
                assert (mine - expected).abs().max() < tolerance * expected.abs().max(), (size, dtype)


# A folder that timm saves for a model with arguments: its name, and the arguments.
FOLDERS = [
    *(("deit_tiny_patch16_224", {"img_size": 64, **more}) for more in (
        {"img_size": (64, 96)}, {"img_size": (224, 256)}, {"reg_tokens": 3}, {"qk_norm": True, "init_values": 0.1},
        {"norm_layer": "rmsnorm"}, {"embed_norm_layer": "layernorm"}, {"final_norm": False}, {"pre_norm": True},
        {"qkv_bias": False, "proj_bias": False}, {"init_values": None})),
    ("vit_small_patch14_dinov2", {"img_size": (56, 84)}), ("deit3_small_patch16_224", {"img_size": (32, 80)}),
    ("vit_base_patch32_clip_quickgelu_224", {"img_size": (128, 192)})]


@pytest.mark.parametrize("name, arguments", FOLDERS, ids=map(str, FOLDERS))
@torch.inference_mode()
def test_folders_of_models_with_arguments(tmp_path, name, arguments):
    """The logits are the same, in float64, also if a published row with another GELU is typed."""
    theirs = timm.create_model(name, depth=2, num_classes=7, **arguments).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    timm.models.save_for_hf(theirs, tmp_path, model_args={"depth": 2, **arguments}, safe_serialization=True)
    size = arguments["img_size"]
    images = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size), dtype=torch.float64)
    wanted = theirs.double()(images)
    typed = [{"name_or_config": "OpenCLIP-B_32", "num_layers": 2, "img_size": size}] if "quickgelu" in name else []
    for keys in ({}, *typed):
        ours = create_model(pretrained=tmp_path, head="keep", **keys).double().eval()
        assert (ours(images) - wanted).abs().max() < 1e-6 * wanted.abs().max()


# timm's name of a model whose original files it converts (tests/support/originals.py makes them).
ORIGINALS = {
    "dinov2": "vit_giant_patch14_dinov2", "dinov2_reg": "vit_small_patch14_reg4_dinov2", "tips": "vit_base_patch14_reg1_tipsv2",
    "dinov3": "vit_small_patch16_dinov3_qkvb", "dinov3_gates": "vit_huge_plus_patch16_dinov3", "deit3": "deit3_small_patch16_224",
    "eva02": "eva02_base_patch14_224", "eva02_clip": "eva02_base_patch16_clip_224", "pe": "vit_pe_core_base_patch16_224",
    "pe_spatial": "vit_pe_spatial_gigantic_patch14_448", "aimv2": "aimv2_large_patch14_224", "ijepa": "vit_huge_patch14_gap_224"}


@pytest.mark.parametrize("case, name", ORIGINALS.items(), ids=ORIGINALS)
@torch.inference_mode()
def test_originals_as_timm_converts_them(tmp_path, case, name):
    """timm's own conversion of the same file gives the same tokens."""
    row = KINDS_OF_FILES[case].row
    content = arrays_of(case, filled(row, std=0.4))
    torch.save(content, tmp_path / "x.pth")
    options = {"attn_pool_mlp_ratio": 2, "attn_pool_num_heads": 2} if case == "pe" else {}
    if row.rope_grid:
        options["ref_feat_shape"] = (row.rope_grid, row.rope_grid)
    halves = 1 + (case == "dinov2")                                                   # timm counts both halves of SwiGLU
    theirs = timm.create_model(name, img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=1, num_classes=0,
                               mlp_ratio=halves * row.mlp_dim / 48, **options)
    convert = eva.checkpoint_filter_fn if isinstance(theirs, eva.Eva) else vision_transformer.checkpoint_filter_fn
    whole = {name.replace("blocks.0.0.", "blocks.0."): value for name, value in content.items()}        # timm knows no chunks
    converted = convert(whole, theirs, **{"adapt_layer_scale": True} if case == "deit3" else {})
    lacking = theirs.load_state_dict(converted, strict=False)
    assert not lacking.missing_keys and all(name.startswith(("head", "linear_head")) for name in lacking.unexpected_keys)
    ours = create_model(row, 3, pretrained=tmp_path / "x.pth").double().eval()
    images, theirs = torch.randn(2, 3, 32, 32, dtype=torch.float64), theirs.double().eval()
    mine, expected = ours.forward_features(images), theirs.forward_features(images)
    tolerance = 5e-6 if row.rope == "eva" else 1e-6                          # timm's rotary tables are in float32
    assert (mine - expected).abs().max() < tolerance * expected.abs().max()
    if case == "pe":
        assert (ours.pool(mine) - theirs.forward_head(expected)).abs().max() < 1e-6 * expected.abs().max()


def check_row(found: dict, row) -> None:
    """Check that the keys found in the file are those of the row."""
    wanted = {key: row[key] for key in (*SIZES, *ARRAYS)} | {"layer_scale": bool(row.layer_scale)}
    wanted["class_token"] = wanted["class_token"] and row.classifier != "gap"
    wanted["positions"] = "all" if row.positions == "patches" and not (row.registers or wanted["class_token"]) else row.positions
    assert {key: found[key] for key in wanted} | {"layer_scale": bool(found["layer_scale"])} == wanted
    assert (found.get("pool_mlp_dim") or row.mlp_dim) == (row.pool_mlp_dim or row.mlp_dim)
    assert found.get("classifier", row.classifier) in (row.classifier, {"mean": "gap"}.get(row.classifier))


@pytest.mark.parametrize("row, img_size", [(VIT[0][0], 64), (HYBRIDS[2][0], 48)], ids=["transformer", "hybrid"])
@torch.inference_mode()
def test_timm_reads_what_save_npz_writes(tmp_path, row, img_size):
    """timm's own reader of Google's files is a second opinion on the axes of every kernel."""
    ours = random_model(row, img_size)
    save_npz(ours, tmp_path / "x.npz")
    if row.resnet_layers is None:
        theirs = timm.models.VisionTransformer(img_size=img_size, patch_size=16, **TINY).eval()
    else:
        theirs = timm.create_model("vit_base_r50_s16_384", img_size=img_size, **TINY).eval()
    theirs.load_pretrained(str(tmp_path / "x.npz"))
    images = torch.randn(2, 3, img_size, img_size)
    assert (ours(images) - theirs(images)).abs().max() < 1e-4
