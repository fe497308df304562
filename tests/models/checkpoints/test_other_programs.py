"""Files of other programs give the logits that those programs compute, with their GELU, eps and ResNet.

tests/fixtures/other_programs.npz holds what their own code computed for checkpoints of tests/fixtures/google; torchvision is
installed, and runs here.
"""

import argparse

import numpy as np
import pytest
import reference
import torch
from filling import load, random_model, refused
from other_programs import renamed
from torchvision.models import VisionTransformer
from weight_files import saved

from configs import MODELS, architecture
from models import create_model, save_timm
from models.checkpoints.opened import OpenedCheckpoint
from models.match import match_row
from utils.build import open_model

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def expected(name: str) -> torch.Tensor:
    with np.load(reference.FIXTURES / "other_programs.npz") as file:
        return torch.from_numpy(file[name])


def theirs(case: str, program: str) -> dict[str, torch.Tensor]:
    return renamed(load(reference.weights(case), case).state_dict(), program)


def difference(path, case: str, name: str, **more) -> float:
    """Return the largest difference of logits from the program's; the row is Google's, with the tanh form."""
    model = load(path, case, **more).eval()
    with torch.inference_mode():
        return float((model(reference.images(model.img_size[0])) - expected(name)).abs().max())


@pytest.mark.parametrize("wrap", [
    lambda state: state,                                                                                # ViT-pytorch, .bin
    lambda state: {"state_dict": state, "optimizer": {"state": {}}, "scheduler": {}, "steps": 7, "best_acc": np.float64(0.5)},
    lambda state: {f"module.{name}": value for name, value in state.items()},
], ids=["bin", "ckpt", "module"])
@pytest.mark.parametrize("case", ["g_p16_224", "g_p14"])
def test_logits_of_vit_pytorch(tmp_path, case, wrap):
    path = saved(tmp_path / "x", wrap(theirs(case, "vit_pytorch")))
    assert difference(path, case, f"vit_pytorch/{case}") < 1e-5
    model = load(path, case)
    assert (model.config.gelu, model.config.norm_eps, (model.config.mean, model.config.std)) == ("erf", 1e-6, HALF)
    assert set(model.load_report.used) == set(model.state_dict())
    assert "settings of the program that wrote the file: gelu erf" in model.load_report.notes


@pytest.mark.parametrize("case", ["g_r50b", "g_r50b_ft"])
def test_logits_of_vit_pytorch_s_hybrids(tmp_path, case):
    """Their ResNet pads, standardizes and normalizes differently from Google's, with the same weights."""
    state = {name: value for name, value in load(reference.weights(case), case).state_dict().items() if "pre_logits" not in name}
    path = saved(tmp_path / "x.bin", renamed(state, "vit_pytorch"))
    assert difference(path, case, f"vit_pytorch/{case}") < 3e-5
    with OpenedCheckpoint(path) as file:
        assert (file.row["resnet_layers"], file.row["resnet_width"]) == (reference.ROWS[case].resnet_layers, 32)
        assert file.row["img_size"] == reference.ROWS[case].img_size


@pytest.mark.parametrize("more", [{}, {"pre_logits.weight": torch.ones(32, 32), "pre_logits.bias": torch.ones(32)}])
def test_logits_of_pretrained_vit(tmp_path, more):
    """Its releases are in PyTorch's older format; those of ImageNet-21k have pre_logits, which its own model does not use."""
    path = saved(tmp_path / "x.pth", theirs("g_p16_224", "pretrained_vit") | more, legacy=True)
    assert difference(path, "g_p16_224", "pretrained_vit/g_p16_224") < 1e-5
    model = load(path, "g_p16_224")
    assert model.load_report.left_out == sorted(more) and (model.config.mean, model.config.std) == HALF


def torchvision_model(**more) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5,
                              **more).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("prefix", ["", "net.model."])
@pytest.mark.parametrize("older", [False, True])
@torch.inference_mode()
def test_logits_of_torchvision(tmp_path, older, prefix):
    model, images = torchvision_model(), torch.randn(2, 3, 32, 32)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    if older:                                       # like its published files from before 2022
        state = {name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
                 for name, value in state.items()}
    ours = load(saved(tmp_path / "x.pth", state), architecture(8, 32, 64, 2, 2, img_size=32)).eval()
    assert (ours(images) - model(images)).abs().max() < 1e-5
    assert (ours.config.mean, ours.config.std) == IMAGENET and ours.config.norm_eps == 1e-6
    assert f"prefix {prefix} stripped" in ours.load_report.notes or not prefix


@torch.inference_mode()
def test_logits_of_torchvision_with_pre_logits(tmp_path):
    model, images = torchvision_model(representation_size=24), torch.randn(2, 3, 32, 32)
    ours = load(saved(tmp_path / "x.pth", model.state_dict()), architecture(8, 32, 64, 2, 2, img_size=32)).eval()
    assert (ours(images) - model(images)).abs().max() < 1e-5 and ours.config.representation_size == 24


def test_a_torchvision_training_checkpoint_is_read(tmp_path):
    """From its reference scripts, with names under `module.`; averaged weights in addition to the last step's are reported."""
    state = torchvision_model().state_dict()
    averaged = {f"module.{name}": value + 1 for name, value in state.items()} | {"n_averaged": torch.tensor(3)}
    row = architecture(8, 32, 64, 2, 2, img_size=32)
    report = load(saved(tmp_path / "x.pth", {"model": state, "model_ema": averaged, "epoch": 3}), row).load_report
    assert report.notes[0] == "the file's averaged weights (model_ema) are not used"
    report = load(saved(tmp_path / "y.pth", {"model_ema": averaged}), row).load_report
    assert report.left_out == ["n_averaged"]


@pytest.mark.parametrize("program", ["vit_pytorch", "torchvision", "pretrained_vit"])
def test_an_architecture_is_inferred_from_every_layout(tmp_path, program):
    model = random_model(architecture(4, 24, 40, 2, 3, img_size=16), 3)
    with OpenedCheckpoint(saved(tmp_path / "x", renamed(model.state_dict(), program))) as file:
        sizes = {"patch_size": 4, "hidden_size": 24, "mlp_dim": 40, "num_layers": 3, "img_size": 16, "num_heads": None}
        assert {key: file.row.get(key) for key in sizes} == sizes
        assert file.head_classes == 3 and file.class_names is None and file.settings is None


def test_overrides_win_over_the_program(tmp_path):
    path = saved(tmp_path / "x", theirs("g_p16_224", "vit_pytorch"))
    model = load(path, "g_p16_224", gelu="tanh", mean=(0.1, 0.2, 0.3))
    assert (model.config.gelu, model.config.mean, model.config.std) == ("tanh", (0.1, 0.2, 0.3), HALF[1])
    assert difference(path, "g_p16_224", "vit_pytorch/g_p16_224", gelu="tanh") > 1e-4


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "bin"])
@pytest.mark.parametrize("name", ["ViT-Nano_2", "DeiT-Ti_16"])
def test_our_exports_keep_how_they_compute(tmp_path, name, suffix):
    """timm's names do not show it, and timm computes the exact GELU: our own files store it next to the weights."""
    model = create_model(MODELS[name], 3, num_layers=1)
    save_timm(model, tmp_path / f"x.{suffix}")
    other = {"num_layers": 1, "gelu": "erf", "mean": (0.0,) * 3}
    again = load(tmp_path / f"x.{suffix}", architecture(**MODELS[name].to_dict() | other))
    assert [again.config[key] for key in ("gelu", "norm_eps", "mean", "std")] == [
        model.config[key] for key in ("gelu", "norm_eps", "mean", "std")]


# -------------------------------------------------------------------------------------- prefixes and several networks


STATE = random_model(architecture(4, 24, 40, 2, 1, img_size=8), 2).state_dict()
ROW = architecture(4, 24, 40, 2, 1, img_size=8)


def under(prefix: str, more: float = 0.0) -> dict[str, torch.Tensor]:
    return {prefix + name: value + more for name, value in STATE.items()}


@pytest.mark.parametrize("content, left_out, note", [
    (under("base_model.model."), [], "prefix base_model.model. stripped"),
    (under("teacher.backbone."), [], "prefix teacher.backbone. stripped"),
    ({"state_dict": under("net.") | {"criterion.weight": torch.ones(2)}}, ["criterion.weight"], "prefix net. stripped"),
    ({"state_dict": under("model.") | {"train_acc.total": torch.ones(2)}}, ["train_acc.total"], None),
    (under("student.backbone.", 1) | under("teacher.backbone."), sorted(under("student.backbone.")),
     "the weights under teacher.backbone., of student.backbone., teacher.backbone."),
    ({"student": under("module.backbone.", 1), "teacher": under("backbone.") | {"head.mlp.0.weight": torch.ones(2)}, "epoch": 3},
     ["epoch", "head.mlp.0.weight", "student"], "the weights are those of DINO's teacher network"),
    ({"network": under(""), "epoch": 3}, ["epoch"], None),
    ({"checkpoint": {"state_dict": under("")}, "state_dict": {"model": under("")}}, ["checkpoint"], None),
    ({"state_dict": under("", 1), "state_dict_ema": under(""), "arch": "deit_tiny_patch16_224"}, ["arch", "state_dict"],
     "averaged weights (state_dict_ema), not those of the last step (state_dict)"),
    ([{"model": {name: value.numpy() for name, value in STATE.items()}, "acc": np.float32(3)}], ["acc"], None),
], ids=["peft", "teacher", "lightning", "metric", "flat_dino", "dino", "one_entry", "nested", "timm_training", "list_of_numpy"])
def test_weights_with_prefixes_and_in_entries_are_found(tmp_path, content, left_out, note):
    model = load(saved(tmp_path / "x.pth", content), ROW)
    assert all(torch.equal(value, STATE[name]) for name, value in model.state_dict().items())
    assert sorted(model.load_report.left_out) == left_out
    assert note is None or note in model.load_report.notes


def test_normalization_of_a_program_or_its_model_is_known(tmp_path):
    """DINO's, and that of the model that timm's training checkpoint names."""
    for content, mean in (({"teacher": under("backbone.")}, IMAGENET[0]),
                          ({"state_dict": under(""), "arch": "deit_tiny_patch16_224"}, IMAGENET[0]),
                          ({"state_dict": under(""), "arch": "vit_tiny_patch16_224"}, HALF[0])):
        other = architecture(**ROW.to_dict() | {"mean": (0.1, 0.1, 0.1)})
        model = load(saved(tmp_path / "x.pth", content), other, "zero")
        assert model.config.mean == mean and model.config.gelu == "erf"


def test_two_models_in_one_file_are_refused(tmp_path):
    refused(r"x.pth: holds several models, under a\., b\.; save only the one that you want", load,
            saved(tmp_path / "x.pth", under("a.") | under("b.")), ROW)


@pytest.mark.parametrize("names, message", [
    (["base_model.model.blocks.0.attn.qkv.lora_A.weight", "base_model.model.blocks.0.attn.qkv.lora_B.weight"],
     "it is a LoRA adapter, .*merge_and_unload"),
    (["patch_embed.proj.weight", "rope.freqs"], "it is a model with learned rotary frequencies"),
    (["patch_embed.proj.weight", "blocks.0.attn.lambda_q1"], "it is a model with differential attention"),
    (["patch_embed.projection.weight", "blocks.0.attn.wq.weight"], "it is a Sapiens2"),
    (["radio_model.model.blocks.0.norm1.weight"], "it is an original file of C-RADIO, .*use timm's"),
    (["patch_embed.proj.weight", "layers.0.blocks.0.attn.relative_position_bias_table"], "it is a model with relative positions"),
    (["conv1.weight", "layer1.0.conv1.weight", "fc.weight"], "not a Vision Transformer in a known layout"),
])
@pytest.mark.parametrize("head", ["zero", "keep"])
def test_unsupported_files_are_refused_by_name(tmp_path, names, message, head):
    refused(f"x.pth: {message}", load, saved(tmp_path / "x.pth", {name: torch.ones(2) for name in names}), ROW, head)


def test_a_patch_embedding_without_known_blocks_is_refused(tmp_path):
    state = {"patch_embed.proj.weight": torch.ones(8, 3, 4, 4), "stages.0.attn.qkv.weight": torch.ones(24, 8)}
    with OpenedCheckpoint(saved(tmp_path / "x.pth", state)) as file:
        refused("x.pth: not a Vision Transformer in a known layout: it has a patch embedding, but no blocks .its arrays: ",
                lambda: file.row)


# --------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.weight", "pos_embed", "head.bias", "norm.weight"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, name, number):
    state = {key: value.clone() for key, value in STATE.items()}
    state[name].flatten()[1] = number
    refused(rf"x.pth: 1 of the \d+ numbers of {name} are not finite .NaN or infinity.: its run .* Use an earlier checkpoint",
            load, saved(tmp_path / "x.pth", state), ROW)
    if name == "head.bias":                          # a new task reads no head
        load(saved(tmp_path / "x.pth", state), ROW, "zero")


def test_large_numbers_are_finite(tmp_path):
    """Although their sum is not."""
    state = STATE | {"blocks.0.mlp.fc1.weight": torch.full_like(STATE["blocks.0.mlp.fc1.weight"], 3e38)}
    load(saved(tmp_path / "x.pth", state), ROW)


# ---------------------------------------------------------------------------- the programs themselves, where installed


def filled(model, std: float = 0.3):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


@pytest.mark.reference
@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "avg", "fc_norm": False}],
                         ids=["token", "avg", "gap"])
@torch.inference_mode()
def test_timm_s_training_checkpoints_compute_the_same(tmp_path, options):
    """From its saver, with averaged weights, which are used; with the exact GELU and its pooling."""
    timm, utils = pytest.importorskip("timm"), pytest.importorskip("timm.utils")
    model = filled(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3, **options))
    average = utils.ModelEmaV3(model, decay=0.9)
    average.update(filled(model, 0.2))
    optimizer, args = torch.optim.AdamW(model.parameters()), argparse.Namespace(model="vit_tiny_patch16_224")
    saver = utils.CheckpointSaver(model, optimizer, args=args, model_ema=average, checkpoint_dir=str(tmp_path),
                                  recovery_dir=str(tmp_path))
    saver.save_checkpoint(3, metric=50.0)
    opened, images = open_model(tmp_path / "last.pth.tar"), torch.randn(2, 3, 32, 32)
    assert (opened.model(images) - average.module.eval()(images)).abs().max() < 1e-5
    assert "averaged weights (state_dict_ema)" in str(opened.model.load_report) and opened.model.config.mean == HALF[0]


@pytest.mark.reference
@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_small_r26_s32_224"])
@torch.inference_mode()
def test_timm_s_hybrids_compute_the_same(tmp_path, name):
    """With small kernels, whose standardization depends on its eps."""
    timm = pytest.importorskip("timm")
    model = filled(timm.create_model(name, img_size=64, num_classes=3, depth=2), 0.02)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    with OpenedCheckpoint(tmp_path / "x.pth") as file:
        row, keys = match_row(file)
        ours, images = create_model(row, None, 64, file, "keep", **keys).eval(), torch.randn(2, 3, 64, 64)
    assert ours.config.resnet_style == "timm" and (ours(images) - model(images)).abs().max() < 1e-5


@pytest.mark.reference
@pytest.mark.parametrize("tag, act", [("mine", None), ("augreg_in21k_ft_in1k", "gelu_tanh"), ("mine", "gelu_tanh")])
@torch.inference_mode()
def test_a_folder_of_timm_computes_the_same(tmp_path, tag, act):
    timm = pytest.importorskip("timm")
    options = {"act_layer": act} if act else {}
    model = filled(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3, **options))
    model.pretrained_cfg.update(tag=tag, mean=(0.1, 0.2, 0.3))
    said = {"label_names": ["a", "b", "c"]} | ({"model_args": options} if tag == "mine" else {})
    timm.models._hub.save_for_hf(model, tmp_path / "hub", model_config=said)
    opened, images = open_model(tmp_path / "hub"), torch.randn(2, 3, 32, 32)
    assert (opened.model(images) - model(images)).abs().max() < 1e-5
    assert opened.model.config.mean == (0.1, 0.2, 0.3) and opened.classes == ("a", "b", "c")


@pytest.mark.reference
@pytest.mark.parametrize("act, eps", [("gelu", 1e-12), ("gelu_pytorch_tanh", 1e-3)])
@torch.inference_mode()
def test_a_folder_of_transformers_computes_the_same(tmp_path, act, eps):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
                                    image_size=32, patch_size=8, hidden_act=act, layer_norm_eps=eps,
                                    id2label={0: "ant", 1: "bee"})
    model = filled(transformers.ViTForImageClassification(config), 0.1)
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.4] * 3).save_pretrained(tmp_path)
    opened, images = open_model(tmp_path), torch.randn(2, 3, 32, 32)
    assert (opened.model(images) - model(images).logits).abs().max() < 1e-5
    assert opened.classes == ("ant", "bee") and opened.model.config.mean == (0.4,) * 3


@pytest.mark.reference
def test_an_adapter_of_peft_is_refused(tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=48,
                                    image_size=32, patch_size=8, num_labels=2)
    model = peft.get_peft_model(transformers.ViTForImageClassification(config), peft.LoraConfig(
        target_modules=["q_proj", "query"], modules_to_save=["classifier"]))
    model.save_pretrained(tmp_path / "adapter")
    torch.save(model.state_dict(), tmp_path / "x.pth")
    refused("adapter: a LoRA adapter", load, tmp_path / "adapter", ROW)
    refused("adapter_model.safetensors: it is a LoRA adapter", load, tmp_path / "adapter/adapter_model.safetensors", ROW)
    refused("x.pth: it is a LoRA adapter", load, tmp_path / "x.pth", ROW)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert open_model(tmp_path / "merged").model.num_classes == 2
