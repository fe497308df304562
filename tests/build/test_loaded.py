"""models.load_model in a user's program."""

import copy

import pytest
import torch
from building import write_checkpoint
from miniatures import png

import models
from models import ModelError, load_model
from models.checkpoints.opened import OpenedCheckpoint
from utils.build import open_model


def test_a_run_folder_and_its_checkpoint_are_the_same_model(tmp_path):
    write_checkpoint(tmp_path / "r/best.pt", "--tta", "flip")
    by_folder, by_file = load_model(tmp_path / "r"), load_model(str(tmp_path / "r/best.pt"))
    opened = open_model(tmp_path / "r")
    for model in (by_folder, by_file):
        assert torch.equal(model.head.weight, opened.model.head.weight) and not model.training
        assert model.classes == list("0123456789") and model.predictor.flipped
        assert model.predictor.reading == opened.reading and model.load_report is not None
    with OpenedCheckpoint(tmp_path / "r/best.pt") as file:
        assert load_model(file).predictor is None
    assert copy.deepcopy(by_folder).predictor.classes == opened.classes


@torch.no_grad()
def test_a_loaded_model_can_be_compiled_and_copied_and_still_predicts(tmp_path):
    write_checkpoint(tmp_path / "r/best.pt")
    (tmp_path / "a.png").write_bytes(png())
    model, images = load_model(tmp_path / "r"), torch.randn(2, 3, 8, 8)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), model(images))
    expected = model.predict(tmp_path / "a.png")
    assert compiled.predict(tmp_path / "a.png") == copy.deepcopy(model).predict(tmp_path / "a.png") == expected


def test_a_file_of_another_program_takes_settings_and_needs_a_head_to_predict(tmp_path):
    models.save_npz(open_model(None).model, tmp_path / "x.npz")
    model = load_model(tmp_path / "x.npz", img_size=16, eval_crop=0.875)
    assert model.img_size == (16, 16) and model.predictor.classes[25] == "class 25"
    state = open_model(None).model.state_dict()
    torch.save({name: value for name, value in state.items() if not name.startswith("head")}, tmp_path / "y.pth")
    with pytest.raises(ModelError, match=r"^predict: .*y\.pth has no head, and so no classes: fine-tune it first$"):
        load_model(tmp_path / "y.pth", num_heads=4).predict("x.png")
    with pytest.raises(ModelError, match=r"^no checkpoint at .*gone"):
        load_model(tmp_path / "gone")
