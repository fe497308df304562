"""config.json for timm: the model of timm that computes the same, and what timm cannot express."""

import json
from pathlib import Path

import pytest
import reference
import torch
from families import FAMILIES, SMALL, family_model
from filling import load, published_model, random_model, refused

from configs import MODELS, architecture
from models import create_model
from models.checkpoints import timm_config, timm_models
from models.checkpoints.export import save_folder
from models.checkpoints.timm_config import check_timm, computed_otherwise, largest_difference

WHOLE, CUT = {"interpolation": "bilinear", "eval_crop": 0.0}, {"interpolation": "bicubic", "eval_crop": 0.875}
NAMES = {
    "ViT-Ti_16": "vit_tiny_patch16_224", "ViT-S_32": "vit_small_patch32_224", "ViT-B_8": "vit_base_patch8_224",
    "ViT-L_16": "vit_large_patch16_224", "ViT-H_14": "vit_huge_patch14_224", "R-ViT-Ti_16": "vit_tiny_r_s16_p8_224",
    "R26-ViT-S_32": "vit_small_r26_s32_224", "R26-ViT-B_32": "vit_base_r26_s32_224", "R50-ViT-B_16": "vit_base_r50_s16_224",
    "R50-ViT-L_32": "vit_large_r50_s32_224", "DeiT-S_16": "vit_small_patch16_224",
    "DeiT-B_16-distilled": "deit_base_distilled_patch16_224", "CaiT-XXS36": "cait_xxs36_224", "CaiT-M48": "cait_m48_448",
    "MAE-L_16": "vit_large_patch16_224", "ViT-Nano_2": "vit_base_patch16_224"}


def empty(row, size=None, **more):
    with torch.device("meta"):
        return create_model(row, 5, size, initialise=True, **more)


def config_of(model, view=WHOLE) -> dict:
    return timm_config.timm_config(model, list("abcde"), view, {"card": {}})


@pytest.mark.parametrize("name", NAMES)
def test_every_size_has_timm_s_name(name):
    config, row = config_of(empty(name)), MODELS[name]
    assert config["architecture"] == NAMES[name] and config["num_classes"] == 5
    arguments = config["model_args"]
    assert (arguments["embed_dim"], arguments["depth"], arguments["num_heads"], arguments["patch_size"]) == (
        row.hidden_size, row.num_layers, row.num_heads, row.patch_size)
    assert int(row.hidden_size * arguments["mlp_ratio"]) == row.mlp_dim and "num_classes" not in arguments
    assert arguments.get("act_layer") == (None if name.startswith("CaiT") else {"tanh": "gelu_tanh", "erf": "gelu"}[row.gelu])
    assert config["global_pool"] == ("avg" if name.startswith("MAE") else "token")
    assert json.loads(json.dumps(config)) == config


def test_a_config_says_how_images_are_resized():
    config = config_of(empty("ViT-Ti_16", (32, 64), in_channels=1, mean=(0.3,), std=(0.2,)))["pretrained_cfg"]
    assert config["input_size"] == [1, 32, 64] and (config["mean"], config["std"]) == ([0.3], [0.2])
    assert (config["crop_mode"], config["crop_pct"], config["interpolation"]) == ("squash", 1.0, "bilinear")
    config = config_of(empty("DeiT-Ti_16-distilled"), CUT)["pretrained_cfg"]
    assert (config["crop_mode"], config["crop_pct"], config["interpolation"]) == ("center", 0.875, "bicubic")
    assert config["classifier"] == ["head", "head_dist"] and config["first_conv"] == "patch_embed.proj"
    assert [config_of(empty(name))["pretrained_cfg"]["first_conv"] for name in ("R-ViT-Ti_16", "R26-ViT-S_32")] == [
        "patch_embed.backbone.conv", "patch_embed.backbone.stem.conv"]


# Small models whose logits their own programs have computed (tests/fixtures): timm's name and model_args of each.
SAID = {
    "deit": ("vit_base_patch16_224", {"img_size": [48, 48], "embed_dim": 24, "depth": 3, "num_heads": 3, "act_layer": "gelu"}),
    "deit_dist": ("deit_base_distilled_patch16_224", {"img_size": [48, 48], "embed_dim": 24, "depth": 3, "num_heads": 3,
                                                      "act_layer": "gelu"}),
    "cait": ("cait_s24_224", {"img_size": [64, 64], "embed_dim": 32, "depth": 3, "num_heads": 4, "depth_token_only": 2,
                              "mlp_ratio_token_only": 4.0}),
    "mae_gp1": ("vit_base_patch16_224", {"img_size": [64, 64], "embed_dim": 24, "depth": 3, "num_heads": 3, "act_layer": "gelu",
                                         "global_pool": "avg"}),
    "g_p16_gap": ("vit_base_patch16_224", {"img_size": [64, 64], "embed_dim": 48, "depth": 2, "num_heads": 3,
                                           "mlp_ratio": 64 / 48, "act_layer": "gelu_tanh", "global_pool": "avg",
                                           "class_token": False, "fc_norm": False}),
    "g_rti16": ("vit_tiny_r_s16_p8_224", {"img_size": [64, 64], "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3,
                                          "mlp_ratio": 64 / 48, "act_layer": "gelu_tanh"}),
}
USUAL = {"patch_size": 16, "in_chans": 3, "mlp_ratio": 4.0, "global_pool": "token"}


def exported(case: str, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the folder of a known model, and return (images, their logits as computed by its own program)."""
    if case.startswith("g_"):
        model, images = load(reference.weights(case), case), reference.images(reference.ROWS[case].img_size)
        logits = reference.expected(case)["logits"]
    else:
        model, images = published_model(case), reference.torch_images(case)
        found = reference.torch_expected(case.partition("_gp")[0])
        logits = found["ft_logits_gp1"] if case == "mae_gp1" else found["logits"]
    folder.mkdir()
    names = [f"class {number}" for number in range(model.num_classes)]
    save_folder(model, folder, timm_config.timm_config(model, names, WHOLE, {"card": {}}), "")
    return images, logits


@pytest.mark.parametrize("case", SAID)
@torch.no_grad()
def test_an_exported_folder_of_a_known_model_is_read_back(tmp_path, case):
    """It has the expected config.json (the next test runs timm), and computes the known logits when read back."""
    images, logits = exported(case, tmp_path / "x")
    said, (name, arguments) = json.loads((tmp_path / "x/config.json").read_text()), SAID[case]
    assert said["architecture"] == name and said["model_args"] == USUAL | arguments
    row = (reference.TORCH_ROWS | reference.ROWS)[case]
    assert (load(tmp_path / "x", row).eval()(images) - logits).abs().max() < reference.tolerance(case)


@pytest.mark.reference
@pytest.mark.parametrize("case", SAID)
@torch.no_grad()
def test_timm_computes_the_known_logits_from_it(tmp_path, case):
    timm = pytest.importorskip("timm")
    images, logits = exported(case, tmp_path / "x")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    assert (theirs(images) - logits).abs().max() < (1e-3 if case == "g_rti16" else 1e-5)


def test_every_width_of_the_mlp_survives_its_ratio():
    for width in range(1, 400, 7):
        for mlp in (1, 17, width, 3 * width + 1, 4 * width - 1):
            assert int(width * timm_models.ratio_of(width, mlp)) == mlp, (width, mlp)


@pytest.mark.parametrize("row, more, view, words", [
    ("ViT-Ti_16", {"sigmoid_attention": "last"}, WHOLE, "sigmoid_attention 'last': timm has no attention"),
    ("ViT-Ti_16", {"representation_size": 8}, WHOLE, "representation_size 8: timm's models have no layer pre_logits"),
    ("R50-ViT-B_16", {"resnet_layers": (1, 2)}, WHOLE, r"resnet_layers \(1, 2\): timm's hybrids have \(\), \(2, 2, 2, 2\)"),
    ("R-ViT-Ti_16", {"resnet_width": 32}, WHOLE, "resnet_width 32: timm's hybrids have 64"),
    ("R-ViT-Ti_16", {"resnet_style": "vit-pytorch"}, WHOLE, "resnet_style 'vit-pytorch': timm pads"),
    ("CaiT-XXS24", {"gelu": "tanh"}, WHOLE, "gelu 'tanh': timm's CaiT has only the exact GELU"),
    ("ViT-Ti_16", {"img_size": (32, 48)}, CUT, "eval_crop 0.875 at 32 x 48 pixels: timm resizes"),
])
def test_unsupported_parts_are_named(row, more, view, words):
    size = more.pop("img_size", None)
    assert refused(words, check_timm, empty(row, size, **more), view).endswith(". Export it to onnx or torch")


def test_what_timm_computes_differently_is_measured():
    """timm's own eps: in hybrids, and in norms whose eps no model of timm has."""
    for family in FAMILIES:
        assert computed_otherwise(family_model(family)) == ({"resnet_style": "timm"} if family == "hybrid" else {}), family
    row = architecture(4, 12, 16, 2, 1, img_size=8, norm_eps=1e-5)
    assert computed_otherwise(empty(row)) == {} and config_of(empty(row))["architecture"] == "vit_base_patch16_clip_224"
    model = random_model(architecture(4, 12, 16, 2, 1, img_size=8, norm_eps=1e-3), 3)
    otherwise = computed_otherwise(model)
    assert otherwise == {"norm_eps": 1e-6} and 1e-5 < largest_difference(model, otherwise) < 1
    assert largest_difference(model, {"norm_eps": 1e-3}) == 0 and model.norm.eps == 1e-3
    assert 0 < largest_difference(family_model("hybrid"), {"resnet_style": "timm"}) < 1e-3


@pytest.mark.reference
@pytest.mark.parametrize("row, more, view", [
    (architecture(**SMALL, norm_eps=1e-5, in_channels=1), {}, WHOLE),
    (architecture(1, 12, 17, 2, 2, img_size=64, resnet_layers=(2, 2, 2, 2), classifier="gap"), {}, CUT),
    (MODELS["CaiT-XXS24"], SMALL | {"class_layers": 3, "mlp_dim": 17}, CUT),
    (MODELS["DeiT-Ti_16-distilled"], SMALL | {"gelu": "tanh"}, CUT),
    (MODELS["MAE-B_16"], SMALL | {"mlp_dim": 25, "num_heads": 3}, CUT)])
@torch.no_grad()
def test_timm_builds_what_config_json_says(row, more, view):
    """Its model loads the weights, strictly, and computes the same."""
    timm = pytest.importorskip("timm")
    size = (16, 64) if row.in_channels == 1 else 64 if row.resnet_layers else 16
    model = random_model(row, 5, size, **more).eval()
    config = config_of(model, view)
    theirs = timm.create_model(config["architecture"], num_classes=5, **config["model_args"]).eval()
    theirs.load_state_dict(model.state_dict())
    images = torch.randn(2, model.config.in_channels, *model.img_size)
    assert (theirs(images) - model(images)).abs().max() < (1e-3 if row.resnet_layers else 2e-5)
