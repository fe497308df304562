"""Start weights of another program: values in their file become settings, unless flags set these."""

import dataclasses

import pytest

from utils.config import ConfigError, Facts, resolve

TINY = {"model_type": "ViT-B_16", "patch_size": 4, "hidden_size": 32, "mlp_dim": 64, "num_layers": 2, "img_size": 16,
        "names_img_size": False}
FOLDER = {"model_type": "DeiT-S_16", "img_size": 384, "names_img_size": True, "interpolation": "bicubic", "eval_crop": 0.9}


def config(row: dict, flags: dict | None = None):
    facts = Facts(1000, 10, start_row=row, start_head_classes=10, start_path="w.pth")
    return resolve({"dataset": "oxford_pets", "pretrained_dir": "w.pth", **(flags or {})}, facts)


def test_sizes_and_image_size_of_the_file_become_settings():
    found = config(TINY, {"num_heads": 2})
    assert (found.model_type, found.patch_size, found.hidden_size, found.mlp_dim, found.num_layers, found.num_heads) == (
        "ViT-B_16", 4, 32, 64, 2, 2)
    assert found.img_size == 16 and found.source("hidden_size") == "start"
    assert config(TINY | {"num_heads": 8}).num_heads == 8 and config(TINY, {"num_heads": 2, "img_size": 32}).img_size == 32


def test_the_batch_is_divided_for_the_sizes_of_the_file():
    """Not for the sizes of the row of configs.py that they replace."""
    facts = Facts(1000, 10, start_row=TINY, start_path="w.pth", memory=24 << 30)
    flags = {"dataset": "oxford_pets", "pretrained_dir": "w.pth", "num_heads": 2}
    large = TINY | {"patch_size": 16, "hidden_size": 1536, "mlp_dim": 6144, "num_layers": 24}
    plain = {"dataset": "oxford_pets", "pretrained_dir": "none"}
    tiny, row, huge = (resolve(*each).gradient_accumulation_steps for each in (
        (flags, facts), (plain, dataclasses.replace(facts, start_row=None)),
        (flags | {"img_size": 224}, dataclasses.replace(facts, start_row=large))))
    assert tiny == 1 < row < huge


def test_an_unknown_number_of_heads_is_reported():
    with pytest.raises(ConfigError, match=r"--pretrained_dir w.pth: its sizes \(width 32, 2 blocks\) .* add --num_heads 1,"):
        config(TINY)


def test_a_known_model_gets_its_row():
    found = config(FOLDER)
    assert (found.model_type, found.hidden_size, found.img_size) == ("DeiT-S_16", None, 384)
    assert (found.interpolation, found.eval_crop) == ("bilinear", 0.0)                 # a new task
    large = config({"model_type": "ViT-L_16", "img_size": 384, "names_img_size": False})
    assert (large.model_type, large.img_size, large.dropout_rate) == ("ViT-L_16", 224, 0.1)


@pytest.mark.parametrize(("model", "own", "of_photos"), [
    ("DINOv2-S_14", ("bicubic", 1.0), ("bicubic", 1.0)), ("SigLIP-B_16", ("bicubic", 0.9), ("bicubic", 0.9)),
    ("LingBot-S_16", ("bilinear", 0.0), ("bilinear", 0.0)), ("ViT-B_16", ("bilinear", 0.0), ("bicubic", 0.875))])
def test_a_family_sets_the_preprocessing_of_a_new_task(model, own, of_photos):
    """Flags win, then its config.json, then a recipe without a function. Elongated images are shown whole by `photos`."""
    facts = Facts(1000, 10, image_sizes=((300, 200),))
    flags = {"dataset": "oxford_pets", "model_type": model}

    def view(flags, facts=facts):
        found = resolve(flags, facts)
        return found.interpolation, found.eval_crop

    assert view(flags) == own and view(flags | {"recipe": "photos"}) == of_photos
    assert view(flags | {"recipe": "photos", "interpolation": "bilinear", "eval_crop": 0.5}) == ("bilinear", 0.5)
    assert view(flags | {"recipe": "linear-probe"}) == ("bicubic", 0.875)
    assert view(flags | {"recipe": "photos"}, dataclasses.replace(facts, image_sizes=((900, 200),)))[1] == 0.0
    row = {"model_type": model, "img_size": 384, "names_img_size": True, "interpolation": "bicubic", "eval_crop": 0.95}
    of_file = dataclasses.replace(facts, start_row=row, start_path="w.pth")
    expected = own if model == "ViT-B_16" else ("bicubic", 0.95)
    start = {"dataset": "oxford_pets", "pretrained_dir": "w.pth"}
    assert view(start, of_file) == expected and view(start | {"eval_crop": 0.5}, of_file)[1] == 0.5


@pytest.mark.parametrize("more", [{"head": "keep"}, {"eval_only": True}])
def test_a_kept_head_keeps_its_preprocessing(more):
    found = config(FOLDER | {"names_img_size": False}, more)
    assert (found.img_size, found.interpolation, found.eval_crop) == (384, "bicubic", 0.9)
    typed = {"img_size": 224, "interpolation": "bilinear", "eval_crop": 0.5}
    assert {name: getattr(config(FOLDER, more | typed), name) for name in typed} == typed


def test_a_model_type_on_the_command_line_wins():
    """The file is compared with it when it is loaded. Its kind of pooling is used, unless a flag sets that too."""
    found = config(TINY | {"classifier": "patch_mean", "in_channels": 1}, {"model_type": "ViT-Ti_16"})
    assert (found.model_type, found.hidden_size, found.classifier, found.in_channels) == ("ViT-Ti_16", None, "patch_mean", 1)
    assert config(TINY | {"classifier": "gap"}, {"model_type": "ViT-Ti_16", "classifier": "token"}).classifier == "token"


def test_the_file_of_the_model_itself_changes_nothing():
    row = {"model_type": "ViT-B_16", "img_size": 384, "names_img_size": False}
    plain = resolve({"dataset": "oxford_pets", "pretrained_dir": "w.pth"}, Facts(1000, 10, start_path="w.pth"))
    assert config(row) == plain


def test_sizes_of_the_recipe_are_replaced():
    found = config({"model_type": "DeiT-S_16", "names_img_size": False}, {"recipe": "scratch-small", "dataset": "cifar100"})
    assert (found.model_type, found.hidden_size, found.num_layers) == ("DeiT-S_16", None, None)
