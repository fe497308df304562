"""The notebook runs from top to bottom without a network, and its stored pictures are complete."""

import re

import numpy as np
import pytest
from PIL import Image
from run_notebook import NOTEBOOK, ROOT, read_cells, run, with_values

import models
from models import create_model


@pytest.fixture
def run_all(tmp_path, monkeypatch):
    """Return run_all(NAME=value, ...) -> (what the notebook prints, the number of pictures). The network is blocked."""
    def refuse(*_, **__):
        raise OSError("a test has no network")

    def run_cells(**values) -> tuple[str, int]:
        sources = with_values(read_cells(), {name: repr(str(value)) for name, value in values.items()})
        outputs = [output for cell in run(sources) for output in cell]
        printed = "".join(line for output in outputs for line in output.get("text", ()))
        return printed, sum("image/png" in output.get("data", {}) for output in outputs)

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return run_cells


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(run_all, monkeypatch):
    monkeypatch.chdir(ROOT)
    printed, pictures = run_all(PHOTOS="nowhere")
    assert "4 layers of (1, 4, 65, 65) - rows sum to 1.0" in printed and pictures == 11
    before, after = re.search(r"weight of the patch: ([\d.]+) -> ([\d.]+)", printed).groups()
    assert float(before) < 0.1 and float(after) > 0.9
    before, after = re.search(r"probability of \d: ([\d.]+)% -> ([\d.]+)%", printed).groups()
    assert before != after


@pytest.mark.slow
def test_photographs_and_a_checkpoint_of_the_user_are_shown(run_all, tmp_path, monkeypatch):
    """Found in ./photos and ./checkpoint, at another image size."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "deep/b.png"):
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "photos" / name)
    (tmp_path / "checkpoint").mkdir()
    model = create_model("ViT-Nano_2", 3, 12)
    model.head.weight.data.normal_()
    models.save_timm(model, "checkpoint/model.pth")
    monkeypatch.setattr("train.main", lambda argv: pytest.fail("nothing is trained"))
    printed, pictures = run_all()
    assert "images: photos; checkpoint: checkpoint/model.pth" in printed and "4 layers of (1, 4, 37, 37)" in printed
    assert pictures == 9                                                     # neither letters nor curves


@pytest.mark.slow
def test_a_run_is_shown_on_its_data(run_train, run_all, monkeypatch):
    assert run_train("--name", "r") == 0
    printed, pictures = run_all(CHECKPOINT="output/r")
    assert "images: those of its data set; checkpoint: output/r" in printed and pictures == 10


def test_the_stored_notebook_has_its_pictures_and_no_errors():
    cells = read_cells()
    pictures = [output for cell in cells for output in cell["outputs"] if "image/png" in output.get("data", {})]
    drawing = [cell for cell in cells if re.search(r"(pictures\.\w+|draw_\w+)\(", "".join(cell["source"]))]
    assert len(pictures) == len(drawing) >= 11 and all(cell["outputs"] for cell in drawing)
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert NOTEBOOK.stat().st_size < 900_000
    assert all(len(cell["source"]) <= 18 for cell in cells), "few lines a cell"
    texts = [str({**output, "data": output.get("data", {}).get("text/plain")}) for cell in cells for output in cell["outputs"]]
    assert not re.search(r"/(tmp|home|root|work|usr)/", " ".join(texts)), "no place of the machine that ran it"
