"""The one way to open a trained model."""

import string

import pytest
import torch
from building import write_checkpoint
from PIL import Image

from models import save_npz
from utils.build import open_model, open_run
from utils.config import ConfigError, before
from utils.data.reading import AS_STORED, FIND, Reading


def test_what_can_be_opened(tmp_path):
    """A run with its own view of images, a file of other origin with what is typed, and the embedded model."""
    write_checkpoint(tmp_path / "r/best.pt", "--eval_crop", 0.5, "--in_channels", 1)
    for opened in (open_run(tmp_path / "r"), open_model(tmp_path / "r/best.pt")):
        assert opened.classes == tuple("0123456789") and opened.title == "ViT-Nano_2 on digits, run r, step 0"
        assert opened.has_data and not opened.model.training and opened.path == tmp_path / "r/best.pt"
        assert opened.transform(Image.new("RGB", (10, 12))).shape == (1, 8, 8)
        assert opened.region((16, 16)) == (0.25, 0.25, 0.75, 0.75)
    save_npz(open_model(None).model, tmp_path / "other.npz")
    other = open_model(tmp_path / "other.npz", model_type="ViT-Nano_2", img_size=16, eval_crop=1.0)
    assert (other.classes[25], other.has_data, other.model.img_size) == ("class 25", False, (16, 16))
    assert other.settings["eval_crop"] == 1.0 and other.settings["interpolation"] == "bilinear"
    embedded = open_model(None)
    assert embedded.classes == tuple(string.ascii_uppercase) and embedded.settings["dataset"] == "digits"


def test_how_images_are_read_for_a_model(tmp_path):
    """As its run read them; for a model of no run, as the images themselves say."""
    made = write_checkpoint(tmp_path / "r/best.pt")
    assert open_run(tmp_path / "r").reading == made.found.splits.reading == Reading("follow")
    state = torch.load(tmp_path / "r/best.pt", weights_only=True)["config"]
    assert Reading.of(state) == Reading("follow"), "a checkpoint keeps it"
    assert open_model(None).reading == FIND and Reading.of(before()) == AS_STORED


def test_what_cannot_be_opened_names_what_to_type(tmp_path):
    write_checkpoint(tmp_path / "r/best.pt")
    save_npz(open_model(None).model, tmp_path / "other.npz")
    for function, arguments, words in (
            (open_run, (tmp_path / "none", "--teacher"), "--teacher .*none: no such file. Give a run folder"),
            (open_run, (tmp_path / "other.npz",), "--checkpoint .*other.npz: not a checkpoint of a run of train.py"),
            (open_model, (tmp_path / "other.npz",), "--checkpoint .*other.npz: .* Add --model_type")):
        with pytest.raises(ConfigError, match=words):
            function(*arguments)
    for what in (None, tmp_path / "r"):
        with pytest.raises(ConfigError, match="only have an effect with a --checkpoint that is no run"):
            open_model(what, img_size=16)
