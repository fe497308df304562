"""The notebook runs from top to bottom, offline, and keeps pictures to look at."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "visualize_attention_map.ipynb"


def cells(kind: str = "code") -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def run(source: str, folder: Path) -> str:
    """Runs it as a plain program, without Jupyter: magics are left out, and no network can be reached."""
    block = ("import socket\ndef refuse(*_, **__):\n    raise OSError('a test has no network')\nsocket.socket.connect = refuse\n"
             "def display(figure):\n    assert figure.axes\n")
    lines = [line for line in source.splitlines() if not line.startswith("%")]
    done = subprocess.run([sys.executable, "-c", block + "\n".join(lines)], cwd=ROOT, capture_output=True, text=True,
                          timeout=600, env=os.environ | {"TMPDIR": str(folder)})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_runs_from_top_to_bottom(tmp_path):
    printed = run("\n".join(line for cell in cells() for line in ["", "".join(cell["source"])]), tmp_path)
    assert "4 layers of (1, 4, 17, 17) - rows sum to 1.0" in printed
    before, after = re.search(r"weight of the patch: ([\d.]+) -> ([\d.]+)", printed).groups()
    assert float(before) < 0.1 and float(after) > 0.9
    before, after = re.search(r"probability of \d: ([\d.]+)% -> ([\d.]+)%", printed).groups()
    assert before != after


@pytest.mark.slow
def test_shows_another_checkpoint_and_a_picture(tmp_path, run_train):
    """Of another size, not square, on a picture of the user's."""
    from PIL import Image

    assert run_train("--img_size", "8x12", "--name", "r") == 0
    Image.new("L", (30, 20), 128).save(tmp_path / "picture.png")
    source = "\n".join("".join(cell["source"]) for cell in cells())
    source = source.replace("CHECKPOINT = None ", f"CHECKPOINT = {str(tmp_path / 'output/r/best.pt')!r} ")
    source = source.replace("IMAGE = None ", f"IMAGE = {str(tmp_path / 'picture.png')!r} ")
    assert "4 layers of (1, 4, 25, 25)" in run(source, tmp_path)


def test_reads_well_where_it_is_only_looked_at():
    pictures = [output for cell in cells() for output in cell["outputs"] if "image/png" in output.get("data", {})]
    errors = [output for cell in cells() for output in cell["outputs"] if output["output_type"] == "error"]
    drawing = [cell for cell in cells() if re.search(r"(pictures\.\w+|draw_\w+)\(", "".join(cell["source"]))]
    assert len(pictures) == len(drawing) >= 11 and not errors
    assert all(cell["outputs"] for cell in drawing)
    assert NOTEBOOK.stat().st_size < 700_000
    assert all(len(cell["source"]) <= 14 for cell in cells()), "few lines a cell"
    texts = [str({**output, "data": output.get("data", {}).get("text/plain")}) for cell in cells() for output in cell["outputs"]]
    assert not re.search(r"/(tmp|home|root|work|usr)/", " ".join(texts)), "no place of the machine that ran it"
