"""timm's config.json: every published name gives its row, and contradictions with the arrays are refused."""

import json

import pytest
import reference
import torch
from filling import refused
from headers import header_of

from configs import MODELS
from models import create_model
from models.checkpoints import config_of_timm
from models.checkpoints.described import describe
from models.checkpoints.description import HALF, IMAGENET
from models.checkpoints.fit import check_pooling
from models.create import resolve_row
from models.match import match_row
from utils.training.memory import parameters

NORMS = {"half": HALF, "imagenet": IMAGENET, "0/1": {"mean": (0.0,) * 3, "std": (1.0,) * 3},
         "clip": {key: MODELS["CLIP-B_32"][key] for key in ("mean", "std")},
         "sat": {"mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}}
# Published weights of timm 1.0.31: name, side in pixels, normalization, interpolation, crop and its mode, outputs of the head.
ZOO = [line.split("|") for line in (reference.FIXTURES / "timm_zoo.txt").read_text(encoding="utf-8").splitlines()[1:]]
# Unsupported architectures, and a word of the reason.
REFUSED = {"beitv2_base_patch16_224": "relative", "beitv2_large_patch16_224": "relative",
           "eva02_enormous_patch14_clip_224": "norms after", "vit_base_mci_224": "convolutions",
           "vit_dlittle_patch16_reg1_gap_256": "differential", "vit_dpwee_patch16_reg1_gap_256": "differential",
           "vit_dwee_patch16_reg1_gap_256": "differential", "vit_pwee_patch16_reg1_gap_256": "side by side"}
# 384 px is not a whole number of patches of 14: its program ignores the last 6.
CUT = {384: 378}


def config_values(name: str, pixels: str, norm: str, interpolation: str, crop: str, mode: str, outputs: str) -> dict:
    """Return the values of a config.json that are read."""
    architecture, _, tag = name.partition(".")
    return {"architecture": architecture, "num_classes": int(outputs), "pretrained_cfg": {
        "tag": tag, "input_size": [3, int(pixels), int(pixels)], **{key: list(value) for key, value in NORMS[norm].items()},
        "interpolation": interpolation, "crop_pct": float(crop), "crop_mode": mode}}


def expected_of(name: str, pixels: str, norm: str, interpolation: str, crop: str, mode: str, outputs: str) -> dict:
    side = CUT.get(int(pixels), int(pixels)) if "patch14" in name else int(pixels)
    return {**NORMS[norm], "img_size": side, "interpolation": interpolation,
            "eval_crop": 0.0 if mode == "squash" and crop == "1.0" else float(crop)}


def seen_by(file, row) -> dict:
    return {"mean": row.mean, "std": row.std, "img_size": file.row["img_size"], **file.view}


def test_every_published_name_gives_its_row():
    """With the arrays of our model of one block, in timm's names."""
    states = {}
    for line in ZOO:
        said = config_values(*line)
        if words := REFUSED.get(said["architecture"]):
            refused(words, config_of_timm.describe, said)
            continue
        described = config_of_timm.describe(said | {"model_args": {"depth": 1}})
        base = MODELS[described.base]
        if described.base not in states:
            with torch.device("meta"):
                states[described.base] = create_model(described.base, 1, num_layers=1).state_dict()
        state = {name: value for name, value in states[described.base].items() if not name.startswith("head.")}
        file = header_of(state, described)
        name, keys = match_row(file)
        row = resolve_row(name, keys | file.computed)
        assert (name, keys.pop("num_layers"), row.num_heads) == (described.base, 1, base.num_heads), line
        assert seen_by(file, row) == expected_of(*line) | {"img_size": file.row["img_size"]}, line
        tanh = "siglip" in line[0]
        assert row.gelu == ("tanh" if tanh else base.gelu) and row.norm_eps == base.norm_eps, line
        assert described.row["img_size"] == expected_of(*line)["img_size"], line


@pytest.mark.parametrize("name, known", [
    ("vit_base_patch16_224", True), ("vit_base_patch16_224_in21k", True), ("vit_tiny_r_s16_p8_384", True),
    ("vit_base_patch16_plus_240", True), ("deit_small_distilled_patch16_224", True), ("cait_xxs24_224", True), ("", True),
    ("vit_small_patch16_rope_ape_224", False), ("vit_base_resnet50d_224", False), ("vit_base_patch16_rpn_224", False),
    ("vit_small_patch14_dinov4", False), ("swin_tiny_patch4_window7_224", False)])
def test_an_unknown_name_is_refused(name, known):
    """It is not read as a known one with the same arrays: rope_ape has those of DeiT III, and rotary positions."""
    said = {"architecture": name, "pretrained_cfg": {"tag": "x"}}
    if known:
        assert config_of_timm.describe(said).base == ""
    else:
        refused(f"its architecture, {name}, is not one of timm's", config_of_timm.describe, said)
        assert config_of_timm.describe(said | {"label_names": ["a"], config_of_timm.OWN_ENTRY: {"card": {}}}).base == ""


@pytest.mark.reference
@pytest.mark.parametrize("architecture", list(dict.fromkeys(line[0].partition(".")[0] for line in ZOO)))
def test_timm_s_own_models_at_full_size_give_their_row(architecture, tmp_path, monkeypatch):
    """Its saved names and shapes and its own config.json: the row has its parameters, image size, mean, std, interpolation and
    crop."""
    timm = pytest.importorskip("timm")
    from timm.models._hub import save_config_for_hf

    if architecture in REFUSED:
        refused(REFUSED[architecture], config_of_timm.row_of, architecture)
        return
    for module in ("weight_init", "pos_embed_rel"):                      # initial values take most of the time
        monkeypatch.setattr(f"timm.layers.{module}.trunc_normal_", lambda tensor, *_, **__: tensor, raising=False)
    monkeypatch.setattr("timm.layers.weight_init._trunc_normal_", lambda tensor, *_: tensor)
    with torch.device("meta"):
        model = timm.create_model(architecture)
    for line in (line for line in ZOO if line[0].partition(".")[0] == architecture):
        published = timm.get_pretrained_cfg(line[0])
        with torch.device("meta"):
            if model.num_classes != published.num_classes:
                model.reset_classifier(published.num_classes)
        model.pretrained_cfg = model.default_cfg = published.to_dict()
        save_config_for_hf(model, tmp_path / "config.json")
        file = header_of(model.state_dict(), config_of_timm.describe(json.loads((tmp_path / "config.json").read_text())))
        name, keys = match_row(file)
        row = resolve_row(name, keys | file.computed)
        assert seen_by(file, row) == expected_of(*line)
        size, classes = file.row["img_size"], model.num_classes
        theirs = sum(parameter.numel() for parameter in model.parameters()) + (0 if classes else row.hidden_size + 1)
        assert parameters(row.to_dict(), (size, size), classes or 1) == theirs
        assert {key for key in keys if key not in ("classifier", "pool_mlp_dim")} == set(), keys


DINO = {"architecture": "vit_small_patch14_reg4_dinov2", "num_classes": 0, "pretrained_cfg": {"tag": "lvd142m"}}


def dino(**changes):
    with torch.device("meta"):
        state = create_model("DINOv2-S_14-reg", 5, num_layers=2, **changes).state_dict()
    return state


@pytest.mark.parametrize("changes, said, words", [
    ({}, {}, "says num_layers 12, but its arrays have num_layers 2"),
    ({}, {"model_args": {"depth": 2, "embed_dim": 768}}, "says hidden_size 768, but its arrays have hidden_size 384"),
    ({}, {"model_args": {"depth": 2, "patch_size": 16}}, "says patch_size 16, but its arrays have patch_size 14"),
    ({}, {"model_args": {"depth": 2, "num_heads": 7}}, "says num_heads 7, which does not divide the width 384"),
    ({}, {"model_args": {"depth": 2}, "num_classes": 6}, "says 6 classes, but its head has 5"),
    ({"registers": 3}, {"model_args": {"depth": 2}}, "says registers 4, but its arrays have registers 3"),
    ({"layer_scale": 0.0}, {"model_args": {"depth": 2}}, "says layer_scale True, but its arrays have layer_scale False"),
    ({"mlp": "swiglu"}, {"model_args": {"depth": 2}}, "says mlp plain, but its arrays have mlp swiglu")])
def test_a_config_that_contradicts_the_arrays_is_reported_in_one_line(changes, said, words):
    refused(words, match_row, header_of(dino(**changes), config_of_timm.describe(DINO | said)))


def test_unknown_arguments_are_refused():
    """They may compute anything, also with a name of 2021."""
    refused("model_args have attn_layer diff", config_of_timm.describe, DINO | {"model_args": {"attn_layer": "diff"}})
    for name in ("vit_base_patch16_224", "deit_tiny_distilled_patch16_224", "vit_tiny_r_s16_p8_384"):
        for key, value in (("x", 1), ("pos_embed", "none")):
            said = {"architecture": name, "model_args": {key: value}}
            refused(f"model_args have {key} {value}, which models here do not support", config_of_timm.describe, said)
    kept = {"pool_include_prefix": False, "pos_embed": "learn", "init_values": None, "norm_layer": None}
    found = config_of_timm.describe({"architecture": "vit_base_patch16_224", "model_args": kept})
    assert found.base == "" and "layer_scale" not in found.row


@pytest.mark.parametrize("name, said, words", [
    ("eva02_tiny_patch14_224", {"model_args": {"ref_feat_shape": [4, 8]}}, "its ref_feat_shape is .4, 8."),
    ("vit_tiny_patch16_224", {"model_args": {"norm_layer": "batchnorm2d"}}, "its norm_layer is batchnorm2d"),
    ("vit_tiny_patch16_224", {"model_args": {"embed_norm_layer": "rmsnorm"}}, "its embed_norm_layer is rmsnorm"),
    ("vit_small_patch14_dinov2", {"model_args": {"embed_norm_layer": "layernorm"}}, "embed_norm_layer layernorm, which models")])
def test_unsupported_arguments_are_refused(name, said, words):
    refused(words, config_of_timm.describe, {"architecture": name, "num_classes": 5} | said)


def test_a_norm_after_the_cls_token_is_refused():
    """If the head is kept; a new head may read the token."""
    state = {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: value for key, value in dino().items()}
    file = header_of(state, config_of_timm.describe(DINO | {
        "num_classes": 5, "global_pool": "token", "model_args": {"depth": 2, "fc_norm": True}}))
    name, keys = match_row(file)
    row = resolve_row(name, keys)
    check_pooling(file, row, keep=False)
    refused("after a norm .fc_norm with global_pool token., which no model here", check_pooling, file, row, True)


PARTS = [({"reg_tokens": 3}, {"registers": 3}),
         ({"reg_tokens": 2, "no_embed_class": True}, {"registers": 2, "positions": "patches"}),
         ({"qk_norm": True}, {"qk_norm": True}), ({"init_values": 0.1}, {"layer_scale": 0.1}),
         ({"norm_layer": "rmsnorm"}, {"norm": "rms"}), ({"embed_norm_layer": "layernorm"}, {"patch_norm": "after"}),
         ({"final_norm": False}, {"final_norm": False}), ({"qkv_bias": False}, {"qkv_bias": "none"}),
         ({"pre_norm": True}, {"pre_norm": True, "patch_bias": False})]


@pytest.mark.parametrize("arguments, parts", PARTS, ids=lambda value: str(value))
def test_a_plain_name_with_other_parts(arguments, parts):
    """Its config.json is complete: timm's VisionTransformer computes it, with eps 1e-6 and the exact GELU."""
    with torch.device("meta"):
        state = create_model("DeiT-Ti_16", 5, 64, num_layers=2, **parts).state_dict()
    said = {"architecture": "deit_tiny_patch16_224", "num_classes": 5, "model_args": {"depth": 2, "img_size": 64} | arguments}
    file = header_of(state, config_of_timm.describe(said))
    name, keys = match_row(file)
    row = resolve_row(name, keys | file.computed)
    wanted = {"norm_eps": 1e-6, "gelu": "erf", "rope": "", "num_heads": 3, **{"positions": "all"} | parts}
    assert {key: row[key] for key in wanted if key != "layer_scale"} == {
        key: value for key, value in wanted.items() if key != "layer_scale"} and bool(row.layer_scale) == ("layer_scale" in parts)
    assert file.row["img_size"] == 64


@pytest.mark.parametrize("row, name, sizes", [
    ("DeiT-Ti_16", "deit_tiny_patch16_224", ((64, 96), (32, 192), (224, 256))),
    ("DINOv2-S_14", "vit_small_patch14_dinov2", ((56, 84),)), ("DeiT3-S_16", "deit3_small_patch16_224", ((32, 80), (64, 96))),
    ("CLIP-B_32", "vit_base_patch32_clip_quickgelu_224", ((128, 192),))])
def test_positions_of_images_that_are_not_square(row, name, sizes):
    """The table of 64 x 96 px has 24 + 1 rows, which is also a square: config.json decides which tokens they belong to."""
    for size in sizes:
        with torch.device("meta"):
            state = create_model(row, 5, size, num_layers=2).state_dict()
        for said in ({"model_args": {"depth": 2, "img_size": list(size)}},
                     {"model_args": {"depth": 2}, "pretrained_cfg": {"input_size": [3, *size]}}):
            file = header_of(state, config_of_timm.describe({"architecture": name, "num_classes": 5, **said}))
            found, keys = match_row(file)
            assert (MODELS[found].positions, "positions" in keys, file.row["img_size"]) == (MODELS[row].positions, False, size)
        other = config_of_timm.describe({"architecture": name, "model_args": {"depth": 2, "img_size": [448, 896]}})
        refused("do not belong together", match_row, header_of(state, other))


@pytest.mark.parametrize("said, keys", [
    ({}, {}), ({"global_pool": "token"}, {}), ({"global_pool": "avg"}, {"classifier": "mean"}),
    ({"model_args": {"depth": 2, "global_pool": "avg"}}, {"classifier": "mean"})])
def test_global_pool_decides_what_the_head_reads(said, keys):
    """Without a head in the file, it is what the family reads."""
    described = config_of_timm.describe(DINO | {"num_classes": 5, "model_args": {"depth": 2}} | said)
    name, found = match_row(header_of(dino(), described))
    assert (name, {key: found[key] for key in found if key == "classifier"}) == ("DINOv2-S_14-reg", keys)
    headless = {name: value for name, value in dino().items() if not name.startswith("head.")}
    assert "classifier" not in match_row(header_of(headless, described))[1]


@pytest.mark.parametrize("folder, name, base", [
    ("x", "vit_small_patch14_reg4_dinov2.lvd142m.safetensors", "DINOv2-S_14-reg"),
    ("vit_base_patch32_clip_quickgelu_224.openai", "model.safetensors", "CLIP-B_32"), ("x", "mine.safetensors", ""),
    ("x", "vit_base_patch16_224.augreg_in21k.safetensors", ""), ("x", "vit_pwee_patch16_reg1_gap_256.sbb_in1k.pth", "")])
def test_the_name_of_a_bare_file_is_used(tmp_path, folder, name, base):
    found = describe(tmp_path / folder / name)
    assert (found.base, found.row.get("gelu") == "tanh") == (base, "augreg" in name)
    file = header_of(dino(), found)                          # with two blocks, which no published size has
    assert match_row(file)[0] == "DINOv2-S_14-reg" and match_row(file)[1]["num_layers"] == 2


def test_a_row_that_configs_lacks_is_named():
    described = config_of_timm.describe({"architecture": "vit_tiny_patch16_lingbot"})
    refused("timm's vit_tiny_patch16_lingbot, but configs.py has no row LingBot-Ti_16", match_row, header_of(dino(), described))


@pytest.mark.parametrize("architecture, tag, says", [
    ("vit_base_patch16_siglip_224", "v2_webli", True), ("vit_tiny_patch16_224", "augreg_in21k", True),
    ("vit_tiny_patch16_224", "dino", False), ("vit_small_patch14_dinov2", "lvd142m", False)])
def test_a_gelu_that_is_not_timm_s_is_reported(architecture, tag, says):
    said = {"architecture": architecture, "pretrained_cfg": {"tag": tag}}
    assert (config_of_timm.describe(said).notes == [
        "GELU is computed in the tanh form, as Google trained it, whatever timm computes"]) is says
    exact = config_of_timm.describe(said | {"model_args": {"act_layer": "gelu"}})
    assert exact.notes == [] and exact.row["gelu"] == "erf"
