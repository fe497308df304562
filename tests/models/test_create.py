"""The public functions and create_model: names and arguments, published sizes, one-line errors."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from building import write_checkpoint
from headers import save_plain

import models
from configs import MODELS, architecture
from models import CaiT, DistilledVisionTransformer, ModelError, VisionTransformer, create_model, list_models, save_npz
from models.families import FAMILIES

FUNCTIONS = {
    "checkpoint_head": "path",
    "create_model": "name_or_config=None, num_classes=None, img_size=None, pretrained=None, head='zero', initialise=True, "
                    "**overrides",
    "edit_attention": "model, values, edited",
    "find_checkpoint": "name_or_path",
    "list_models": "",
    "load_model": "path, **typed",
    "load_pretrained": "model, path, head='zero'",
    "record_attention": "model, differentiable=False",
    "record_patch_logits": "model",
    "run_settings": "path",
    "save_npz": "model, path",
    "save_timm": "model, path",
    "use_sigmoid_attention": "model, layers",
}
CLASSES = {"CaiT", "DistilledVisionTransformer", "ImageTransformer", "LoadReport", "ModelError", "VisionTransformer"}
SMALL = architecture(4, 32, 64, 2, 2, img_size=16)
PARAMETERS = {
    "ViT-Ti_16": 5_717_416, "ViT-S_16": 22_050_664, "ViT-S_32": 22_878_952, "ViT-B_8": 86_576_872, "ViT-B_16": 86_567_656,
    "ViT-B_32": 88_224_232, "ViT-L_16": 304_326_632, "ViT-L_32": 306_535_400, "ViT-H_14": 632_045_800,
    "R-ViT-Ti_16": 6_337_704, "R26-ViT-S_32": 36_431_912, "R26-ViT-B_32": 101_383_976, "R50-ViT-B_16": 98_659_112,
    "R50-ViT-L_32": 328_994_856, "ViT-Nano_2": 267_048,
    "DeiT-Ti_16": 5_717_416, "DeiT-S_16": 22_050_664, "DeiT-B_16": 86_567_656, "DeiT-Ti_16-distilled": 5_910_800,
    "DeiT-S_16-distilled": 22_436_432, "DeiT-B_16-distilled": 87_338_192,
    "CaiT-XXS24": 11_956_264, "CaiT-XXS36": 17_299_720, "CaiT-XS24": 26_670_088, "CaiT-S24": 46_916_200,
    "CaiT-S36": 68_366_632, "CaiT-M36": 271_221_352, "CaiT-M48": 356_460_520,
    "MAE-B_16": 86_567_656, "MAE-L_16": 304_326_632, "MAE-H_14": 632_045_800,
}


def test_public_names_keep_their_arguments():
    """Users rely on them."""
    assert set(models.__all__) == FUNCTIONS.keys() | CLASSES
    for name, arguments in FUNCTIONS.items():
        signature = inspect.signature(getattr(models, name))
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
        assert str(inspect.Signature(bare)) == f"({arguments})", name
    assert all(inspect.isclass(getattr(models, name)) for name in CLASSES)


@pytest.mark.parametrize("size", [(16, 24), (8, 12)])
def test_a_position_table_of_images_that_are_not_square_is_read(tmp_path, size):
    """For the image size that is passed with the row."""
    model = create_model(SMALL, 3, size).eval()
    save_plain(model, tmp_path / "x.pth")
    keys = {"gelu": SMALL.gelu, "norm_eps": SMALL.norm_eps}
    again = create_model(SMALL, 3, size, tmp_path / "x.pth", "keep", **keys).eval()
    images = torch.randn(1, 3, *size)
    assert torch.equal(model(images), again(images)) and not again.load_report.resized
    with pytest.raises(ModelError, match=r"pos_embed has shape"):
        create_model(SMALL, 3, 12, tmp_path / "x.pth", "keep")


def test_names_of_models_and_errors_need_no_pytorch():
    check = "import sys, models; models.list_models(), models.ModelError, models.WeightsError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_every_listed_model_has_a_golden_count():
    assert list_models() == list(MODELS) and set(list_models()) == set(PARAMETERS) | set(FAMILIES)      # those: test_families


@pytest.mark.parametrize("name", PARAMETERS)
def test_class_and_parameter_count_of_a_row(name):
    """At the row's size and 1000 classes: Google's, DeiT's and CaiT's counts, and timm's (ViT-Nano_2 is ours)."""
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert type(model) is (CaiT if name.startswith("CaiT") else DistilledVisionTransformer if name.endswith("-distilled")
                           else VisionTransformer)
    assert model.pos_embed.shape[1] == model.num_prefix_tokens + model.grid[0] * model.grid[1]
    assert {model.layer_index(parameter) for parameter, _ in model.named_parameters()} == set(range(model.depth + 1))


def test_the_name_of_a_published_file_is_that_of_its_model():
    with torch.device("meta"):
        model = create_model("vit_base_patch16_siglip_512.webli", num_layers=1)
    assert model.img_size == (512, 512) and model.config.patch_size == 16 and model.config.classifier == "attention"


@pytest.mark.parametrize("name, img_size, message", [
    ("ViT-B_16", 230, "230x230: 230 is not a multiple of 16, .*. Use 224 or 240$"),
    ("ViT-B_16", (224, 100), "224x100: 100 is not a multiple of 16, .*. Use 96 or 112$"),
    ("R-ViT-Ti_16", 225, "225 is not a multiple of 32, .*. Use 224 or 256$"),
])
def test_a_size_that_does_not_fit_names_its_neighbours(name, img_size, message):
    with pytest.raises(ModelError, match=message):
        create_model(name, img_size=img_size)


@pytest.mark.parametrize("arguments, message", [
    ({"name_or_config": "ViT-B_17"}, r"unknown model 'ViT-B_17'\. Did you mean ViT-B_16\? list_models\(\)"),
    ({"name_or_config": "beitv2_base_patch16_224"}, "unknown model 'beitv2_base_patch16_224'"),
    ({"droput_rate": 0.1}, "unknown keys droput_rate; a model's row has .*dropout_rate"),
    ({"name_or_config": "dinov2-small"}, r"Did you mean facebook/dinov2-small or "),
    ({"pretrained": True}, "pretrained=True: must be a file, a folder or a published name, such as pretrained='vit_small"),
    ({"head": "new"}, "head='new': must be 'zero' or 'keep'"),
    ({"head": "keep"}, "head='keep' needs pretrained="),
    ({"num_classes": 0}, "num_classes 0: must be 1 or more"),
    ({"num_heads": 5}, "hidden_size 32 is not divisible by num_heads 5"),
    ({"num_layers": "two"}, "num_layers='two': must have the type of the row's value, 2"),
    ({"classifier": "map"}, "classifier 'map': must be token, gap, patch_mean, mean, token_mean or attention$"),
    ({"position_resize": "nearest"}, "position_resize 'nearest': must be a rule of models/layers.py RESIZE_RULES, such as"),
    ({"dropout_rate": 1.0}, "dropout_rate 1.0: must be at least 0 and below 1"),
    ({"attention_dropout_rate": 1.5}, "attention_dropout_rate 1.5: must be at least 0 and below 1"),
    ({"num_layers": 0}, "num_layers 0: must be 1 or more"),
    ({"drop_path_rate": float("nan")}, "drop_path_rate nan: must be at least 0 and below 1"),
    ({"resnet_layers": (1, 0)}, r"resnet_layers \(1, 0\): must be None, or the number of units of every stage"),
    ({"resnet_layers": (1,), "resnet_width": 40, "img_size": 32}, "resnet_width 40: must be a multiple of 32"),
    ({"classifier": "patch_mean", "representation_size": 8}, "representation_size 8: classifier 'patch_mean' has no pre_logits"),
    ({"layer_scale": -0.1}, r"layer_scale -0.1: must be above 0, or 0 for a model without LayerScale"),
    ({"classifier": "token", "class_token": False}, r"classifier 'token': the model has no cls token \(class_token\)"),
    ({"positions": "none"}, "positions 'none': without rotary positions"),
    ({"rope": "dinov3", "hidden_size": 36, "num_heads": 6}, "the width of a head, 6"),
    ({"rope": "eva"}, "rope_grid 0: must be the number of patches per side"),
    ({"rope_grid": 3}, "rope_grid 3: must be .* 0 for others"),
    ({"classifier": "attention", "pool_heads": 5}, r"pool_heads 5: hidden_size \d+ is not divisible by it"),
    ({"distilled": True, "registers": 1}, r"registers 1: a distilled DeiT \(distilled\) has no such part, must be 0"),
    ({"class_layers": 2, "layer_scale": 0.1, "mlp": "swiglu"}, r"mlp 'swiglu': CaiT \(class_layers\) has no such part"),
    ({"resnet_layers": (1,), "img_size": 32, "patch_bias": False}, "patch_bias False: the patch embedding of a hybrid"),
    ({"class_layers": 2}, r"layer_scale 0.0: CaiT \(class_layers\) multiplies its branches by it, must be above 0"),
    ({"class_layers": 2, "distilled": True}, "distilled and class_layers: the first makes a DeiT"),
    ({"distilled": True, "classifier": "gap"}, r"classifier 'gap': a distilled DeiT \(distilled\) reads its tokens"),
    ({"distilled": True, "representation_size": 8}, r"representation_size 8: a distilled DeiT \(distilled\) has no pre_logits"),
    ({"class_layers": 2, "resnet_layers": ()}, r"resnet_layers \(\): CaiT \(class_layers\) has no ResNet"),
    ({"distilled": True, "resnet_layers": (1,)}, r"resnet_layers \(1,\): a distilled DeiT \(distilled\) has no ResNet"),
    ({"class_layers": 2, "classifier": "patch_mean"}, r"classifier 'patch_mean': CaiT \(class_layers\) reads its tokens"),
])
def test_wrong_arguments_are_reported_in_one_line(arguments, message):
    with pytest.raises(ModelError, match=message) as error:
        create_model(**{"name_or_config": SMALL} | arguments)
    assert "\n" not in str(error.value)


def test_overrides_act_only_on_this_model():
    before = MODELS["ViT-Nano_2"].to_dict()
    model = create_model("ViT-Nano_2", num_layers=2, dropout_rate=0.25, representation_size=48)
    assert len(model.blocks) == 2 and model.pos_drop.p == 0.25 and model.pre_logits.fc.out_features == 48
    assert MODELS["ViT-Nano_2"].to_dict() == before
    assert (model.training, model.load_report, model.num_classes) == (True, None, 1000)


def test_numpy_numbers_are_accepted():
    """Computed values are often NumPy's; files hold only Python's."""
    numpy_row = architecture(np.int64(4), 8, 8, np.int32(2), 1, drop_path_rate=np.float64(0.1))
    for row, keys in ((numpy_row, {}), ("ViT-Nano_2", {
            "patch_size": np.int64(4), "hidden_size": np.uint8(8), "mlp_dim": np.int32(8), "num_heads": np.int64(2),
            "num_layers": np.int16(1), "drop_path_rate": np.float64(0.1), "norm_eps": np.float32(1e-6),
            "mean": (np.float32(0.5),) * 3, "distilled": np.bool_(False), "classifier": np.str_("token")})):
        model = create_model(row, np.int64(10), (np.int64(8), 8), **keys)
        assert model.img_size == (8, 8) and model.num_classes == 10 and model.config.drop_path_rate == 0.1
        values = [*model.config.values(), *model.config.mean, *model.img_size, model.num_classes]
        assert not [value for value in values if isinstance(value, np.generic)]
    assert isinstance(numpy_row.drop_path_rate, np.float64)                          # the caller's row does not change
    assert create_model("ViT-Nano_2", 10, np.int64(8)).img_size == (8, 8)
    with pytest.raises(ModelError, match=r"drop_path_rate 1\.5"):
        create_model("ViT-Nano_2", 10, drop_path_rate=np.float64(1.5))


def test_no_initial_values_are_drawn_for_loaded_parameters(tmp_path):
    """Every parameter is in memory, contiguous and trainable, with the file's values or zeros."""
    source = create_model("ViT-Nano_2", 7)
    save_npz(source, tmp_path / "x.npz")
    state = torch.get_rng_state()
    model = create_model("ViT-Nano_2", 3, pretrained=tmp_path / "x.npz")
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.named_parameters():
        assert value.device.type == "cpu" and value.is_contiguous() and value.requires_grad and value.is_leaf
        assert torch.equal(value, torch.zeros_like(value) if name.startswith("head.") else source.get_parameter(name)), name
    assert len({value.untyped_storage().data_ptr() for value in model.parameters()}) == len(list(model.parameters()))


def test_a_model_without_initial_values_takes_a_state():
    """For a caller who loads all parameters: nothing is drawn, and the result is the model of the state."""
    source, state = create_model("ViT-Nano_2", 7), torch.get_rng_state()
    model = create_model("ViT-Nano_2", 7, initialise=False)
    assert torch.equal(torch.get_rng_state(), state) and not any(value.is_meta for value in model.parameters())
    model.load_state_dict(source.state_dict())
    images = torch.randn(2, 3, *model.img_size)
    assert torch.equal(model.eval()(images), source.eval()(images)) and all(value.requires_grad for value in model.parameters())


def test_a_file_determines_its_model(tmp_path):
    """Without a name: row, image size and classes; also for a run of ours."""
    sizes = {"patch_size": 4, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "mlp_dim": 64, "img_size": 8}
    row = architecture(**MODELS["DINOv2-S_14-reg"].to_dict() | sizes)
    model = create_model(row, 3)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({
        "architecture": "vit_small_patch14_reg4_dinov2", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 8, 8]},
        "model_args": {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 4}}))
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        found = create_model(pretrained=path, head="keep")
        assert found.img_size == (8, 8) and found.num_classes == 3 and found.config.registers == 4
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
    larger = create_model(pretrained=tmp_path, num_classes=5, img_size=16, dropout_rate=0.5)
    assert larger.img_size == (16, 16) and larger.num_classes == 5 and larger.config.dropout_rate == 0.5
    write_checkpoint(tmp_path / "r/best.pt")
    assert create_model(pretrained=tmp_path / "r/best.pt", head="keep").num_classes == 10
    for arguments, words in (({}, "needs the name of a model, or pretrained"), ({"pretrained": tmp_path / "x"}, "no checkpoint"),
                             ({"pretrained": tmp_path, "depth": 3}, "unknown keys depth")):
        with pytest.raises(ModelError, match=words):
            create_model(**arguments)
    torch.save(create_model(SMALL, 3).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ModelError, match="how many attention heads it has"):
        create_model(pretrained=tmp_path / "x.pth")
    assert create_model(pretrained=tmp_path / "x.pth", num_heads=4).config.num_heads == 4
