"""The facts of a run in the model card of an exported folder. tests/system/test_export.py tests the formats."""

import json

import pytest
import torch

from models import create_model, save_timm
from utils.build.export import _metrics, _start, class_names, export
from utils.build.find import open_start, reading_of
from utils.build.opened import open_model
from utils.config import ConfigError, choose
from utils.report import model_card


def test_start_weights_and_their_licence(tmp_path, monkeypatch):
    """Published names are complete. Only the end of a path is given, which names nothing of the machine. A config.json that
    cannot be read adds nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm").mkdir()
    save_timm(create_model("ViT-Nano_2", 3), tmp_path / "timm/model.safetensors")
    config = tmp_path / "timm/config.json"
    config.write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"license": "mit"}}))
    for start, model, expected in (
            ("none", "ViT-B_16", {"weights": "none: trained from scratch"}),
            ("auto", "ViT-Nano_2", {"weights": "ViT-Nano_2, trained on drawn letters (this project)", "license": "MIT"}),
            ("auto", "ViT-B_16", {"weights": "imagenet21k/ViT-B_16", "license": "Apache-2.0"}),
            ("auto", "DINOv3-S_16", {"weights": "timm/vit_small_patch16_dinov3.lvd1689m", "license": "dinov3-license",
                                       "terms": "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"}),
            ("mae/mae_pretrain_vit_base", "MAE-B_16", {"weights": "mae/mae_pretrain_vit_base", "license": "CC-BY-NC-4.0",
                                                       "terms": "https://creativecommons.org/licenses/by-nc/4.0/"}),
            ("/a/checkpoint/deit/deit_tiny_patch16_224-a1311bcf.pth", "DeiT-Ti_16",
             {"weights": "deit/deit_tiny_patch16_224-a1311bcf.pth", "license": "Apache-2.0"}),
            (str(tmp_path / "timm"), "ViT-Nano_2", {"weights": f"{tmp_path.name}/timm", "license": "mit"}),
            ("/home/me/output/first", "ViT-B_16", {"weights": "output/first"})):
        assert _start(start, model) == expected
    assert _start("/home/me/output/first", "ViT-B_16", "dinov3-license")["license"] == "dinov3-license"       # of its checkpoint
    config.write_text("{")
    assert _start("timm", "ViT-Nano_2") == {"weights": "timm"}


def test_class_names_of_a_file_without_names(tmp_path):
    """They are given in a text file. 1,000 outputs without names are taken to be ImageNet's."""
    model = create_model("ViT-Nano_2", 3)
    torch.nn.init.normal_(model.head.weight)
    save_timm(model, tmp_path / "x.pth")
    opened, names = open_model(tmp_path / "x.pth"), tmp_path / "names.txt"
    names.write_text("\ufeffant\r\nbee \r\n\u00e7\r\n", encoding="utf-8")
    assert class_names(opened, str(names)) == ["ant", "bee", "\u00e7"]
    for text in (b"a\nb\n", b"a\nb\nb\n", b"a\n\nb\n", b"a\nb\n\xff\n"):
        names.write_bytes(text)
        with pytest.raises(ConfigError, match=r"^--class_names .*names\.txt: (expected 3 diff|not a text file)"):
            class_names(opened, str(names))
    save_timm(create_model("ViT-Nano_2", 1000), tmp_path / "y.pth")
    opened = open_model(tmp_path / "y.pth")
    assert class_names(opened)[0].startswith("tench")
    note, = export(opened, class_names(opened), "folder", tmp_path / "z", card=model_card.text)
    assert "y.pth does not name its 1,000 classes, which are taken to be ImageNet's" in note


def test_an_exported_folder_sets_how_images_are_read(tmp_path):
    """If its head is kept, as a run does. Not if a flag says otherwise, and not for a new task."""
    (tmp_path / "a").mkdir()
    save_timm(create_model("ViT-Nano_2", 3), tmp_path / "a/model.safetensors")
    read = {"exif": "off", "intensity_range": [0, 4095], "alpha": "mask"}
    (tmp_path / "a/config.json").write_text(json.dumps({
        "architecture": "x", "pretrained_cfg": {}, "label_names": ["a", "b", "c"], "vit_run": {"reading": read, "card": {}}}))
    with open_start(str(tmp_path / "a"), "ViT-Nano_2") as start:
        flags = {"dataset": "folder", "data_dir": "x", "pretrained_dir": str(tmp_path / "a"), "model_type": "ViT-Nano_2"}
        reading = reading_of(choose(flags | {"head": "keep", "alpha": "black"}), start)
        assert (reading.exif, reading.intensity_range, reading.alpha) == ("off", (0, 4095), "black")
        assert reading_of(choose(flags), start).exif == "auto"


def test_top_5_of_five_classes_is_no_result(tmp_path):
    event = {"event": "eval", "split": "val", "step": 7, "accuracy": 0.5, "top5": 1.0, "loss": 1.0}
    (tmp_path / "log.jsonl").write_text(f"{json.dumps(event)}\n")
    assert _metrics(tmp_path / "best.pt", 7, 5) == {"val accuracy": 0.5, "val loss": 1.0}
    assert _metrics(tmp_path / "best.pt", 7, 6) == {"val accuracy": 0.5, "val top5": 1.0, "val loss": 1.0}
