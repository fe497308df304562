"""Writing models for other programs: files are complete or absent, and reading them back is exact, bit for bit."""

import os

import numpy as np
import pytest
import reference
import torch
from families import LATER_FAMILIES, SMALL
from filling import load, load_case, random_model, refused, same_state

from configs import MODELS, architecture
from models import create_model
from models.checkpoints import export
from models.checkpoints.export import save_npz, save_timm

ROWS, CASE = reference.ROWS, "g_p16_pre"
SUFFIXES = ["safetensors", "pth", "pt", "bin"]


@pytest.mark.parametrize("case", ROWS)
def test_a_model_in_google_s_layout_is_read_back(tmp_path, case):
    """The written file has the names, shapes and numbers of the one that was read, and numpy reads it."""
    model = load(reference.weights(case), case)
    save_npz(model, tmp_path / "new" / "x.npz")
    written, original = reference.arrays(tmp_path / "new" / "x.npz"), reference.arrays(reference.weights(case))
    assert written.keys() == original.keys()
    for name, array in original.items():
        assert (written[name].shape, written[name].dtype) == (array.shape, np.float32)
        np.testing.assert_array_equal(written[name], array)
    again = load(tmp_path / "new" / "x.npz", case)
    assert same_state(model, again) and (again.load_report.left_out, again.load_report.fresh) == ([], [])
    assert os.listdir(tmp_path / "new") == ["x.npz"]


def test_another_grid_and_precision_are_written_as_float32(tmp_path):
    model = load(reference.weights(CASE), CASE, img_size=96).bfloat16()
    save_npz(model, tmp_path / "x.npz")
    written = reference.arrays(tmp_path / "x.npz")
    assert written["Transformer/posembed_input/pos_embedding"].shape == (1, 37, 48)
    assert {array.dtype for array in written.values()} == {np.dtype(np.float32)}
    for suffix in SUFFIXES:
        save_timm(model, tmp_path / f"x.{suffix}")
    for suffix in ("npz", *SUFFIXES):
        assert same_state(load(tmp_path / f"x.{suffix}", CASE, img_size=96), model.float())


@pytest.mark.parametrize("case", ["deit", "timm_vit", "mae_gp0"])
def test_plain_models_of_other_families_fit_google_s_layout(tmp_path, case):
    model = load_case(case)
    save_npz(model, tmp_path / "x.npz")
    assert same_state(model, load(tmp_path / "x.npz", reference.TORCH_ROWS[case]))


@pytest.mark.parametrize("case, lacks", [
    ("deit_dist", "dist_token, head_dist.bias, head_dist.weight"), ("mae_gp1", "fc_norm.bias, fc_norm.weight"),
    ("cait", "blocks.0.attn.proj_l.bias, .* and [0-9]+ more")])
def test_models_without_names_in_google_s_layout_are_refused(tmp_path, case, lacks):
    refused(f"Google's layout has no names for {lacks}; save_timm writes them", save_npz, load_case(case), tmp_path / "x.npz")
    assert os.listdir(tmp_path) == []


def test_pooling_by_attention_gets_the_names_of_big_vision(tmp_path):
    """SigLIP's position table has another name there; a mean without a cls token is in Google's layout."""
    keys = {"class_token": False, "classifier": "attention", "pool_mlp_dim": 20, "pool_heads": 2}
    row = architecture(4, 8, 16, 2, 1, img_size=8, **keys)
    model = random_model(row)
    save_npz(model, tmp_path / "x.npz")
    names = reference.arrays(tmp_path / "x.npz")
    assert names["MAPHead_0/MultiHeadDotProductAttention_0/query/kernel"].shape == (8, 2, 4) and "pos_embedding" in names
    assert "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/out/kernel" in names
    assert same_state(model, load(tmp_path / "x.npz", row))
    mean = random_model(architecture(4, 8, 16, 2, 1, img_size=8, class_token=False, classifier="mean"))
    save_npz(mean, tmp_path / "y.npz")
    images = torch.randn(2, 3, 8, 8)
    again = load(tmp_path / "y.npz", architecture(4, 8, 16, 2, 1, img_size=8, classifier="gap"))
    assert torch.equal(again.eval()(images), mean.eval()(images))


@pytest.mark.parametrize("more, part", [
    ({"registers": 2}, "registers 2"), ({"rope": "dinov3"}, "rope 'dinov3'"), ({"norm": "rms"}, "norm 'rms'"),
    ({"qkv_bias": "none"}, "qkv_bias 'none'"), ({"final_norm": False}, "final_norm False"), ({"mlp": "swiglu"}, "mlp 'swiglu'"),
    ({"classifier": "token_mean"}, "classifier 'token_mean'"), ({"classifier": "mean"}, "classifier 'mean'"),
    ({"positions": "patches"}, "positions 'patches'"), ({"classifier": "attention"}, "classifier 'attention'"),
    ({"classifier": "attention", "class_token": False, "pool_heads": 1}, "pool_heads 1")])
def test_parts_that_google_s_encoder_lacks_are_named(tmp_path, more, part):
    model = create_model(architecture(4, 8, 16, 2, 1, img_size=8, **more), 3)
    refused(f"Google's layout has no {part}; save_timm writes it", save_npz, model, tmp_path / "x.npz")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("family", LATER_FAMILIES)
@torch.no_grad()
def test_parts_that_no_row_has_together_are_read_back(tmp_path, family):
    """The metadata of the file contains the whole row: rotary positions, pooling, norms."""
    row, keys, _ = LATER_FAMILIES[family]
    model = random_model(row, 5, 16, **SMALL | keys).eval()
    export.save_weights(model, tmp_path / "x.safetensors")
    again = create_model(None, None, model.img_size, tmp_path / "x.safetensors", "keep").eval()
    images = torch.randn(2, 3, 16, 16)
    assert same_state(model, again) and torch.equal(model(images), again(images))
    ours, theirs = model.config.to_dict(), again.config.to_dict()
    assert {key: ours[key] for key in export.own_row(model)} == {key: theirs[key] for key in export.own_row(model)}


@pytest.mark.parametrize("key, value, words", [
    ("rope", "x", "rope 'x': must be"), ("num_heads", "x" * 5000, "num_heads='xxx"), ("registers", 3, "x.pth"),
    ("hidden_size", 2 ** 70, "hidden_size"), ("mlp", None, "mlp"), ("resnet_layers", [1, 2], "is not a multiple of 32"),
    ("pool_heads", -1, "pool_heads"), ("later_part", True, "its model has 'later_part', which this version does not know")])
def test_a_row_that_is_not_the_file_s_is_reported_in_one_line(tmp_path, key, value, words):
    row, keys, _ = LATER_FAMILIES["dino_mean"]
    model = random_model(row, 5, 16, **SMALL | keys)
    export.save_weights(model, tmp_path / "x.pth")
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    state._metadata[""]["vit_row"][key] = value
    torch.save(state, tmp_path / "x.pth")
    refused(words, create_model, None, None, model.img_size, tmp_path / "x.pth", "keep")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("case", reference.TORCH_ROWS)
def test_a_model_in_timm_s_names_is_read_back(tmp_path, case, suffix):
    """The written file has the names and numbers of the published one, without wrappers."""
    model, path = load_case(case), tmp_path / "new" / f"x.{suffix}"
    save_timm(model, path)
    original = reference.torch_state(case)
    if suffix == "safetensors":
        from safetensors.torch import load_file
        written = load_file(path)
    else:
        written = torch.load(path, weights_only=True)
    assert written.keys() == original.keys() and all(torch.equal(written[name], original[name]) for name in original)
    again = load(path, reference.TORCH_ROWS[case])
    assert same_state(model, again) and (again.load_report.left_out, again.load_report.fresh) == ([], [])
    assert os.listdir(tmp_path / "new") == [f"x.{suffix}"]


@pytest.mark.parametrize("case", ROWS)
def test_google_s_models_in_timm_s_names_are_read_back(tmp_path, case):
    model = load(reference.weights(case), case)
    save_timm(model, tmp_path / "x.safetensors")
    assert same_state(model, load(tmp_path / "x.safetensors", case))


def test_a_model_of_one_channel_is_read_back(tmp_path):
    model = create_model(architecture(4, 8, 16, 2, 1, img_size=8), 3, in_channels=1)
    for path, save in ((tmp_path / "x.npz", save_npz), (tmp_path / "x.pth", save_timm)):
        save(model, path)
        assert same_state(model, load(path, architecture(4, 8, 16, 2, 1, img_size=8), in_channels=1))


@pytest.mark.parametrize("save, name", [(save_npz, "x.npz"), (save_timm, "x.safetensors"), (save_timm, "x.pth")])
def test_a_grid_that_is_not_square_is_refused(tmp_path, save, name):
    model = create_model("ViT-Nano_2", 3, (8, 12))
    refused("position table has 4 x 6 patches. Use a square", save, model, tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["x", "x.npz", "x.ckpt", "x.PTH"])
def test_the_suffix_determines_the_format(tmp_path, name):
    refused(r"the suffix must be \.safetensors, \.pth", save_timm, create_model("ViT-Nano_2", 3), tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("save, name", [(save_npz, "x.npz"), (save_timm, "x.pth")])
def test_an_unfinished_file_is_removed_and_replaces_nothing(tmp_path, monkeypatch, save, name, error):
    (tmp_path / name).write_bytes(b"the old one")

    def break_off(*arguments, **arrays):
        next(stream for stream in arguments if hasattr(stream, "write")).write(b"half")
        raise error

    monkeypatch.setattr(export.np, "savez", break_off)
    monkeypatch.setattr(export.torch, "save", break_off)
    with pytest.raises(type(error)):
        save(create_model("ViT-Nano_2", 3), tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"the old one" and os.listdir(tmp_path) == [name]


@pytest.mark.reference
@pytest.mark.parametrize("row, options, name", [
    (architecture(16, 48, 192, 3, 2, img_size=64, gelu="erf"), {}, "vit_tiny_patch16_224"),
    (architecture(8, 48, 192, 3, 2, img_size=64, gelu="erf", resnet_layers=()), {}, "vit_tiny_r_s16_p8_224"),
    (MODELS["DeiT-Ti_16-distilled"], {"depth": 2}, "deit_tiny_distilled_patch16_224"),
    (MODELS["CaiT-XXS24"], {"depth": 2}, "cait_xxs24_224"),
])
@torch.inference_mode()
def test_timm_and_this_project_read_each_other_s_files(tmp_path, row, options, name):
    """If timm is installed: strictly, with its own names."""
    timm = pytest.importorskip("timm")
    row = row.copy_and_resolve_references()
    row.num_layers = 2
    ours = random_model(row, 7, 64).eval()
    sizes = {} if "depth" in options else {"embed_dim": 48, "num_heads": 3, "depth": 2}
    theirs = timm.create_model(name, img_size=64, num_classes=7, **sizes, **options).eval()
    save_timm(ours, tmp_path / "x.safetensors")
    timm.models.load_checkpoint(theirs, str(tmp_path / "x.safetensors"), strict=True)
    torch.save(theirs.state_dict(), tmp_path / "y.pth")
    assert same_state(ours, load(tmp_path / "y.pth", row, img_size=64))
    if row.resnet_layers is None:                # hybrids standardize their weights differently (test_timm.py)
        images = torch.randn(2, 3, 64, 64)
        assert (ours(images) - theirs(images)).abs().max() < 1e-4
