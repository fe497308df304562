"""The notebook runs from top to bottom without a network, and its stored pictures are complete."""

import json
import re
from pathlib import Path

import pytest
from matplotlib import pyplot
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "visualize_attention_map.ipynb"


def cells(kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return run(source), which executes the source without Jupyter (magics are removed, the network is blocked) and returns
    what it printed."""
    def refuse(*_, **__):
        raise OSError("a test has no network")

    def display(figure):
        assert figure.axes

    def body(source: str) -> str:
        capsys.readouterr()
        exec("\n".join(line for line in source.splitlines() if not line.startswith("%")), {"display": display})
        return capsys.readouterr().out

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(ROOT)
    yield body
    pyplot.close("all")


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(run):
    printed = run("\n".join(line for cell in cells() for line in ["", "".join(cell["source"])]))
    assert "4 layers of (1, 4, 17, 17) - rows sum to 1.0" in printed
    before, after = re.search(r"weight of the patch: ([\d.]+) -> ([\d.]+)", printed).groups()
    assert float(before) < 0.1 and float(after) > 0.9
    before, after = re.search(r"probability of \d: ([\d.]+)% -> ([\d.]+)%", printed).groups()
    assert before != after


@pytest.mark.slow
def test_another_checkpoint_and_picture_can_be_set(tmp_path, run_train, run, monkeypatch):
    """A checkpoint of another size that is not square, and a picture of the user's."""
    monkeypatch.chdir(tmp_path)
    assert run_train("--img_size", "8x12", "--name", "r") == 0
    Image.new("L", (30, 20), 128).save(tmp_path / "picture.png")
    source = "\n".join("".join(cell["source"]) for cell in cells())
    source = source.replace("CHECKPOINT = None ", f"CHECKPOINT = {str(tmp_path / 'output/r/best.pt')!r} ")
    source = source.replace("IMAGE = None ", f"IMAGE = {str(tmp_path / 'picture.png')!r} ")
    assert "4 layers of (1, 4, 25, 25)" in run(source)


def test_the_stored_notebook_has_its_pictures_and_no_errors():
    pictures = [output for cell in cells() for output in cell["outputs"] if "image/png" in output.get("data", {})]
    errors = [output for cell in cells() for output in cell["outputs"] if output["output_type"] == "error"]
    drawing = [cell for cell in cells() if re.search(r"(pictures\.\w+|draw_\w+)\(", "".join(cell["source"]))]
    assert len(pictures) == len(drawing) >= 11 and not errors
    assert all(cell["outputs"] for cell in drawing)
    assert NOTEBOOK.stat().st_size < 700_000
    assert all(len(cell["source"]) <= 14 for cell in cells()), "a cell has too many lines"
    texts = [str({**output, "data": output.get("data", {}).get("text/plain")}) for cell in cells() for output in cell["outputs"]]
    assert not re.search(r"/(tmp|home|root|work|usr)/", " ".join(texts)), "a path of the machine that ran the notebook"
