"""The layouts: big_vision, transformers, the prefixes of wrappers. Each is made here from a file with known logits."""

import numpy as np
import pytest
import reference
import torch
from filling import load, refused, same_state, save_arrays
from other_programs import transformers_names
from safetensors.torch import save_file

from models.checkpoints.opened import checkpoint_head

TOKEN, GAP = "g_p16_lneps", "g_p16_gap"


# -------------------------------------------------------------------------------------------------- big_vision


def big_vision(case: str, prefix: str = "", stacked: bool = False) -> dict[str, np.ndarray]:
    """A case's checkpoint as big_vision would hold it: its names, and the cls token's position added to the token."""
    names = {"LayerNorm_2": "LayerNorm_1", "MlpBlock_3": "MlpBlock_0",
             "Transformer/posembed_input/pos_embedding": "pos_embedding",
             "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0"}
    arrays = {}
    for name, array in reference.arrays(reference.weights(case)).items():
        for theirs, new in names.items():
            name = name.replace(theirs, new)
        arrays[name] = array
    if "cls" in arrays:
        arrays["cls"] = arrays["cls"] + arrays["pos_embedding"][:, :1]
        arrays["pos_embedding"] = arrays["pos_embedding"][:, 1:]
    if stacked:
        layers = reference.ROWS[case].num_layers
        for name in [name for name in arrays if "encoderblock_0" in name]:
            parts = [arrays.pop(name.replace("encoderblock_0", f"encoderblock_{i}")) for i in range(layers)]
            arrays[name.replace("encoderblock_0", "encoderblock")] = np.stack(parts)
    return {prefix + name: array for name, array in arrays.items()}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("prefix, more", [
    ("", {}), ("params/", {}), ("params/", {"opt/0/count": np.int32(3), "chrono/accum_step": np.float32(1)}),
    ("params/img/", {"params/txt/head/kernel": np.ones((2, 2)), "params/t": np.ones(1), "params/b": np.ones(1)})])
@pytest.mark.parametrize("case", [TOKEN, GAP, "g_p16_pre"])
@torch.inference_mode()
def test_big_vision_gives_google_s_logits(tmp_path, case, prefix, more, stacked):
    model = load(save_arrays(tmp_path / "x.npz", big_vision(case, prefix, stacked), **more), case).eval()
    assert (model(reference.images(model.img_size[0])) - reference.expected(case)["logits"]).abs().max() < 1e-5
    assert model.load_report.left_out == sorted(more) and model.load_report.resized == {}
    assert checkpoint_head(tmp_path / "x.npz") == (model.num_classes, model.config.representation_size)


@torch.inference_mode()
def test_positions_without_a_row_for_the_cls_token_are_resized_too(tmp_path):
    model = load(save_arrays(tmp_path / "x.npz", big_vision(TOKEN)), TOKEN, "zero", img_size=(96, 32))
    plain = load(reference.weights(TOKEN), TOKEN, "zero", img_size=(96, 32))
    assert model.load_report.resized == {"pos_embed": "4x4 -> 6x2"}
    assert not model.pos_embed[:, 0].any() and torch.equal(model.pos_embed[:, 1:], plain.pos_embed[:, 1:])


@torch.inference_mode()
def test_an_older_big_vision_file_has_that_row(tmp_path):
    arrays = reference.arrays(reference.weights(TOKEN))
    for name in ("pos_embedding", "Transformer/pos_embedding"):
        renamed = {name if key == "Transformer/posembed_input/pos_embedding" else key: array for key, array in arrays.items()}
        assert same_state(load(save_arrays(tmp_path / "x.npz", renamed), TOKEN), load(reference.weights(TOKEN), TOKEN))


def test_google_s_own_files_always_have_it(tmp_path):
    """A table of 16 rows under Google's name belongs to a model without a cls token."""
    arrays = reference.arrays(reference.weights(TOKEN))
    arrays["Transformer/posembed_input/pos_embedding"] = arrays["Transformer/posembed_input/pos_embedding"][:, 1:]
    refused(r"pos_embedding has shape \(1, 16, 32\), which does not fit", load, save_arrays(tmp_path / "x.npz", arrays), TOKEN)


@pytest.mark.parametrize("name", ["MAPHead_0/probe", "MAPHead_0/LayerNorm_0/scale", "probe"])
def test_attention_pooling_is_refused(tmp_path, name):
    path = save_arrays(tmp_path / "x.npz", big_vision(GAP, "params/"), **{f"params/{name}": np.ones((1, 1, 48), np.float32)})
    refused("pools by attention .MAPHead_0/., which no model here does; use a file with", load, path, GAP)


def test_a_file_without_positions_is_refused(tmp_path):
    arrays = big_vision(GAP)
    del arrays["pos_embedding"]
    refused("it stores no positions .big_vision's sincos2d", load, save_arrays(tmp_path / "x.npz", arrays), GAP)


def test_stacked_blocks_are_counted(tmp_path):
    path = save_arrays(tmp_path / "x.npz", big_vision(GAP, stacked=True))
    refused("lacks: Transformer/encoderblock_2/.*The file holds: width 48, 2 blocks, patch 16", load, path, GAP, num_layers=3)
    refused("the model lacks: Transformer/encoderblock_1/", load, path, GAP, num_layers=1)
    refused("lacks: cls; it has no cls token: use --classifier gap", load, path, TOKEN)


def test_a_stack_that_claims_a_billion_blocks(tmp_path):
    arrays = big_vision(GAP, stacked=True) | {"Transformer/encoderblock/LayerNorm_0/scale": np.zeros((1 << 30, 0), np.float32)}
    refused("LayerNorm_0/scale claims 1073741824 blocks, more than any model has", load,
            save_arrays(tmp_path / "x.npz", arrays), GAP)


# ------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("prefix", ["", "vit.", "deit."])
@pytest.mark.parametrize("case", ["deit", "deit_dist"])
@torch.inference_mode()
def test_names_of_transformers_give_the_published_logits(tmp_path, case, prefix, later):
    names = transformers_names(reference.torch_state(case), prefix, later)
    beside = {f"{prefix}pooler.dense.weight": torch.ones(2), f"{prefix}embeddings.mask_token": torch.ones(1, 1, 2),
              "decoder.decoder_norm.weight": torch.ones(3)}
    save_file(names | beside, tmp_path / "x.safetensors")
    model = load(tmp_path / "x.safetensors", reference.TORCH_ROWS[case]).eval()
    assert (model(reference.torch_images(case)) - reference.torch_expected(case)["logits"]).abs().max() < 1e-5
    assert model.load_report.left_out == ["decoder.decoder_norm.weight", "embeddings.mask_token", "pooler.dense.weight"]
    assert set(model.load_report.used) == set(model.state_dict()) and checkpoint_head(tmp_path / "x.safetensors") == (10, 0)


def test_a_masked_autoencoder_of_transformers(tmp_path):
    """The encoder into a model that pools the patches: the norm and the decoder are left out."""
    state = torch.load(reference.TORCH / "mae_pretrain_enc.pth", weights_only=True)["model"]
    torch.save(transformers_names(state, "vit.") | {"decoder.mask_token": torch.ones(1)}, tmp_path / "x.bin")
    paths = tmp_path / "x.bin", reference.TORCH / "mae_pretrain_enc.pth"
    model, plain = (load(path, reference.TORCH_ROWS["mae_gp1"], "zero", num_classes=6) for path in paths)
    assert model.load_report.left_out == ["layernorm.bias", "layernorm.weight", "decoder.mask_token"]
    assert model.load_report.fresh == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert same_state(model, plain)


def test_two_names_for_one_thing_are_refused(tmp_path):
    names = transformers_names(reference.torch_state("deit"), "vit.")
    torch.save(names | {"cls_classifier.weight": names["classifier.weight"]}, tmp_path / "x.bin")
    refused("both classifier.weight and cls_classifier.weight are classifier.weight", load, tmp_path / "x.bin",
            reference.TORCH_ROWS["deit"])


@pytest.mark.reference
@pytest.mark.parametrize("kind", ["ViT", "DeiT", "DeiTDistilled"])
@torch.inference_mode()
def test_against_transformers_itself(tmp_path, kind):
    """Where it is installed: its own files, its own logits."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 48,
             "patch_size": 16, "num_labels": 5, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}
    config = (transformers.ViTConfig if kind == "ViT" else transformers.DeiTConfig)(**sizes)
    theirs = {"ViT": transformers.ViTForImageClassification, "DeiT": transformers.DeiTForImageClassification,
              "DeiTDistilled": transformers.DeiTForImageClassificationWithTeacher}[kind](config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "x.bin")
    row = reference.TORCH_ROWS["deit_dist" if kind == "DeiTDistilled" else "deit"].copy_and_resolve_references()
    row.num_layers = 2
    for path in (tmp_path / "model.safetensors", tmp_path / "x.bin"):
        if kind == "DeiT":                       # a cls head alone behind two tokens: no model here
            refused("it is a distilled DeiT", load, path, row)
            continue
        images = torch.randn(2, 3, 48, 48)
        assert (load(path, row).eval()(images) - theirs(images).logits).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize("rename", [
    lambda name: f"module.{name}",
    lambda name: f"_orig_mod.model.backbone.{name}",
    lambda name: f"module.{name}" if name.startswith("blocks") else name,
], ids=["all", "several", "some"])
@torch.inference_mode()
def test_prefixes_of_wrappers(tmp_path, rename):
    state = {rename(name): value for name, value in reference.torch_state("deit").items()}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    model = load(tmp_path / "x.pth", reference.TORCH_ROWS["deit"]).eval()
    assert (model(reference.torch_images("deit")) - reference.torch_expected("deit")["logits"]).abs().max() < 1e-5


@torch.inference_mode()
def test_google_s_names_in_another_kind_of_file(tmp_path):
    save_file({name: torch.from_numpy(np.array(array)) for name, array in reference.arrays(reference.weights(GAP)).items()},
              tmp_path / "x")
    assert same_state(load(tmp_path / "x", GAP), load(reference.weights(GAP), GAP))
