"""open_model, which opens every kind of trained model."""

import json
import string

import numpy as np
import pytest
import torch
from building import ONE_RANK, write_checkpoint
from headers import save_plain
from PIL import Image

from configs import MODELS, architecture
from models import create_model, save_npz
from utils import build
from utils.build import open_model
from utils.build import opened as opened_model
from utils.build.opened import preferred_row
from utils.config import ConfigError, before, choose, resolve
from utils.data.reading import AS_STORED, FIND, Reading
from utils.data.splits import ArrayImages, Splits


def test_runs_files_and_the_embedded_model_are_opened(tmp_path):
    """A run with its preprocessing, a file of another program with given settings, and the embedded model."""
    write_checkpoint(tmp_path / "r/best.pt", "--eval_crop", 0.5, "--in_channels", 1)
    for opened in (open_model(tmp_path / "r"), open_model(tmp_path / "r/best.pt")):
        assert opened.classes == tuple("0123456789")
        assert opened.title == "ViT (width 16, 1 block, patch 2) on digits, run r, step 0"
        assert opened.has_data and not opened.model.training and opened.path == tmp_path / "r/best.pt"
        assert opened.transform(Image.new("RGB", (10, 12))).shape == (1, 8, 8)
        assert opened.region((16, 16)) == (0.25, 0.25, 0.75, 0.75)
    save_npz(open_model(None).model, tmp_path / "other.npz")
    other = open_model(tmp_path / "other.npz", model_type="ViT-Nano_2", img_size=16, eval_crop=1.0)
    assert (other.classes[25], other.has_data, other.model.img_size) == ("class 25", False, (16, 16))
    assert other.settings["eval_crop"] == 1.0 and other.settings["interpolation"] == "bilinear"
    embedded = open_model(None)
    assert embedded.classes == tuple(string.ascii_uppercase) and embedded.settings["dataset"] == "digits"


def test_images_are_read_as_by_the_run_of_the_model(tmp_path):
    """For a model that is not a run, as the images require."""
    made = write_checkpoint(tmp_path / "r/best.pt")
    assert open_model(tmp_path / "r").reading == made.found.splits.reading == Reading("follow")
    state = torch.load(tmp_path / "r/best.pt", weights_only=True)["config"]
    assert Reading.of(state) == Reading("follow"), "a checkpoint stores it"
    assert open_model(None).reading == FIND and Reading.of(before()) == AS_STORED


def test_errors_name_the_flag_to_add_or_omit(tmp_path):
    write_checkpoint(tmp_path / "r/best.pt")
    save_npz(open_model(None).model, tmp_path / "other.npz")
    save_plain(create_model(architecture(4, 40, 80, 2, 1, img_size=8), 3), tmp_path / "other.pth")
    for what, more, words in (
            (tmp_path / "none", {"flag": "--teacher"}, "--teacher: no checkpoint at .*none, and it is no published name"),
            (tmp_path / "other.pth", {}, "--checkpoint .*other.pth: its sizes .* Add --num_heads")):
        with pytest.raises(ConfigError, match=words):
            open_model(what, **more)
    for what in (None, tmp_path / "r"):
        with pytest.raises(ConfigError, match="only have an effect with a --checkpoint that is not one of your runs"):
            open_model(what, img_size=16)


def test_classifier_is_required_where_the_file_does_not_determine_it(tmp_path):
    """The arrays of timm's DINOv3 fit a head on the cls token and one on the mean."""
    torch.save(create_model("DINOv3-S_16", 3, 32, num_layers=1).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=r"does not say whether its head reads the cls token or the mean .* Add --classifier"):
        open_model(tmp_path / "x.pth", num_heads=6, img_size=32)
    for classifier in ("token", "mean"):
        opened = open_model(tmp_path / "x.pth", num_heads=6, img_size=32, classifier=classifier)
        assert opened.model.config.classifier == classifier


def other_file(path, size: int = 8, **names):
    """Write a file of another program with three classes, and a config.json next to it if `names` are given. Return the model."""
    model = create_model(architecture(2, 40, 80, 2, 1, img_size=size), 3)
    torch.nn.init.normal_(model.head.weight)
    save_plain(model, path)
    if names:
        said = {"architecture": "vit", "model_args": {"num_heads": 2}, "label_names": names["classes"],
                "pretrained_cfg": {"crop_pct": 0.5, "interpolation": "bicubic"}}
        (path.parent / "config.json").write_text(json.dumps(said))
    return model


def test_a_file_of_another_program_needs_no_model_type(tmp_path):
    """Sizes, image size, classes and preprocessing come from the file and its config.json. Flags set what these lack."""
    (tmp_path / "hub").mkdir()
    model = other_file(tmp_path / "hub/model.safetensors", 12, classes=["ant", "bee", "cat"])
    opened = open_model(tmp_path / "hub")
    assert opened.model.img_size == (12, 12) and opened.classes == ("ant", "bee", "cat") and opened.named
    assert (opened.settings["eval_crop"], opened.settings["interpolation"], opened.has_data) == (0.5, "bicubic", False)
    assert torch.equal(opened.model.head.weight, model.head.weight)
    other_file(tmp_path / "x.pth")
    opened = open_model(tmp_path / "x.pth", num_heads=4, img_size=16)
    assert (opened.model.config.num_heads, opened.model.img_size, opened.named) == (4, (16, 16), False)
    assert opened.classes == tuple(opened.model.classes) == ("class 0", "class 1", "class 2")
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    torch.save({name: value for name, value in state.items() if not name.startswith("head")}, tmp_path / "y.pth")
    assert not open_model(tmp_path / "y.pth", num_heads=2).has_head and opened.has_head


def test_preprocessing_that_no_flag_can_express_causes_a_warning(tmp_path, capsys):
    """Not if the flag is set, and not for a teacher, which gets the images of its student."""
    other_file(tmp_path / "model.safetensors", classes=["a", "b", "c"])
    said = json.loads((tmp_path / "config.json").read_text())
    said["pretrained_cfg"]["crop_mode"] = "border"
    (tmp_path / "config.json").write_text(json.dumps(said))
    open_model(tmp_path)
    assert capsys.readouterr().err == (f"warning: {tmp_path}: its config.json describes images as no flag can (crop: border, "
                                       "0.5): here --eval_crop is 0.0\n")
    open_model(tmp_path, eval_crop=0.5), open_model(tmp_path, flag="--teacher")
    assert capsys.readouterr().err == ""


@pytest.mark.reference
def test_a_folder_of_transformers_sees_images_as_its_processor(tmp_path):
    """Up to one of 256 levels, since Pillow and torchvision round differently. With a crop, squeezed, and with another scale of
    pixels."""
    transformers = pytest.importorskip("transformers")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).resize((140, 100))
    model = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, image_size=32, patch_size=8))
    square = {"height": 32, "width": 32}
    for kind, said in (("Bit", {"size": {"shortest_edge": 40}, "crop_size": square, "resample": 3}),
                       ("ViT", {"size": square, "do_rescale": False, "image_mean": [100.0] * 3, "image_std": [50.0] * 3}),
                       ("ViT", {"size": square, "rescale_factor": 2 / 255, "resample": 3})):
        processor = getattr(transformers, f"{kind}ImageProcessor")(**said)
        model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
        opened = open_model(tmp_path)
        mean, std = (torch.tensor(opened.model.config[key]).view(3, 1, 1) for key in ("mean", "std"))
        difference = (opened.transform(picture) / 255 - mean) / std - processor(picture, return_tensors="pt")["pixel_values"][0]
        assert (difference * std * 255).abs().max() < 1.01, said


def test_a_published_name_selects_the_row_that_shapes_leave_open(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"deit/deit_small_patch16_224": "DeiT-", "mae/mae_pretrain_vit_base": "MAE-", "imagenet21k/ViT-B_16": "ViT-B_16",
             "vit_base_patch32_clip_quickgelu_224.laion400m_e32": "CLIP-B_32", "facebook/dinov2-small": "DINOv2-S_14",
             "dinov2/dinov2_vits14_reg4_pretrain": "DINOv2-S_14-reg", "output/r": "", "x.pth": ""}
    assert {name: preferred_row(name) for name in names} == names


def test_a_published_file_sees_images_as_its_publisher_does(tmp_path):
    """Unless a flag is set. A file with the same name in another folder does not."""
    for name, view in (("deit/deit_tiny_patch16_224-a1311bcf.pth", ("bicubic", 0.875)), ("sam/ViT-B_16.pth", ("bilinear", 0.0)),
                       ("mine/deit_tiny_patch16_224-a1311bcf.pth", ("bilinear", 0.0))):
        (tmp_path / name).parent.mkdir()
        other_file(tmp_path / name)
        opened = open_model(tmp_path / name, num_heads=2)
        assert (opened.settings["interpolation"], opened.settings["eval_crop"]) == view
    opened = open_model(tmp_path / "deit/deit_tiny_patch16_224-a1311bcf.pth", num_heads=2, eval_crop=0.5)
    assert (opened.settings["interpolation"], opened.settings["eval_crop"]) == ("bicubic", 0.5)


def test_a_model_sees_images_as_its_row_says(tmp_path, monkeypatch):
    """Unless its file or a flag says otherwise. --mean and --std are for weights whose file does not contain them."""
    monkeypatch.setitem(MODELS, "Mine", architecture(2, 40, 80, 2, 1, img_size=8, interpolation="bicubic", eval_crop=0.9))
    other_file(tmp_path / "w.pth")
    opened = open_model(tmp_path / "w.pth", model_type="Mine", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    assert (opened.settings["interpolation"], opened.settings["eval_crop"]) == ("bicubic", 0.9)
    assert (opened.model.config.mean, opened.model.config.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert open_model(tmp_path / "w.pth", model_type="Mine", eval_crop=0.5).settings["eval_crop"] == 0.5


def test_numbers_that_are_not_finite_are_named_first_and_each_message_has_the_flag(tmp_path):
    """Before an unknown head, other classes or missing arrays."""
    weights = create_model("ViT-Nano_2", 3).state_dict()
    whole = tmp_path / "whole.pth"
    torch.save(weights | {"my_head.weight": torch.ones(3, 64)}, whole)
    torch.save(weights | {"my_head.weight": torch.full((3, 64), float("nan"))}, tmp_path / "extra.pth")
    torch.save(weights | {"head.bias": torch.tensor([0.0, float("inf"), 0.0])}, tmp_path / "head.pth")
    digits = {"dataset": "digits", "model_type": "ViT-Nano_2"}
    refused = "[0-9]+ of the [0-9]+ numbers of .* are not finite"
    for start, more, words in (("extra.pth", {}, refused), ("head.pth", {"eval_only": True}, refused),
                               ("whole.pth", {}, "whole.pth: the file has arrays that the model lacks: my_head.weight")):
        flags = digits | {"pretrained_dir": str(tmp_path / start), **more}
        with pytest.raises(ConfigError, match=f"^--pretrained_dir: .*{start}: .*{words}|^--pretrained_dir: .*{words}"):
            found = build.find(choose(flags), None, ONE_RANK)
            build.build_model(resolve(flags, found.facts), found, None, ONE_RANK)
        with pytest.raises(ConfigError, match=f"^--teacher: .*{words if start != 'head.pth' else refused}"):
            open_model(tmp_path / start, flag="--teacher")


@pytest.mark.parametrize(("own", "other"), [("val", "test"), ("test", "val")])
def test_another_name_of_the_only_held_out_split_is_reported(own, other, monkeypatch, capsys):
    held = ArrayImages(np.zeros((3, 2, 2)), [0, 1, 2])
    monkeypatch.setattr(opened_model, "splits_of", lambda *_, **__: Splits(held, held, held, own, ("a", "b", "c")))
    subject = open_model(None)
    assert subject.split(own)[0] == subject.split()[0] == own and capsys.readouterr().err == ""
    assert subject.split(other)[0] == own and subject.split("train")[0] == "train"
    assert capsys.readouterr().err == f"note: this run's only held-out split is called {own}: --split {other} means it\n"
