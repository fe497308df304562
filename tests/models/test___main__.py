"""`python -m models FILE`: what a file of weights is, in words, from its header alone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from building import write_checkpoint
from filling import random_model
from safetensors.torch import save_file

from configs import MODELS, architecture
from models.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"patch_size": 14, "hidden_size": 32, "mlp_dim": 128, "num_heads": 2, "num_layers": 1, "img_size": 28}


def dino(folder: Path, **said) -> Path:
    """A small DINOv2 with registers, with timm's config.json."""
    folder.mkdir()
    row = architecture(**MODELS["DINOv2-S_14-reg"].to_dict() | SMALL)
    save_file({name: value.clone() for name, value in random_model(row, 3).state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "architecture": "vit_small_patch14_reg4_dinov2", "num_classes": 3, "label_names": ["ant", "bee", "cat"],
        "model_args": {"depth": 1, "embed_dim": 32, "num_heads": 2}, "pretrained_cfg": {
            "tag": "mine", "license": "cc-by-nc-4.0", "input_size": [3, 28, 28], "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1],
            "interpolation": "bicubic", "crop_pct": 0.9}} | said))
    return folder


def printed(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(word) for word in arguments])
    return code, *capsys.readouterr()


def test_a_folder_of_timm(tmp_path, capsys):
    code, out, err = printed(capsys, dino(tmp_path / "x"))
    assert (code, err) == (0, "")
    assert "model: DINOv2 ViT, width 32, 1 block, patch 14, 4 registers, 28 px (MODEL_TYPE=DINOv2-S_14-reg, with the" in out
    assert "sizes: width 32, MLP 128, 2 heads, 1 block, patches of 14 px, images of 28 x 28 px in 3 channels\n" in out
    assert "images: mean 0.1 0.2 0.3, std 1 1 1; evaluated bicubic, the middle 90 % of the shorter side\n" in out
    assert "head: 3 outputs (ant, bee, cat), which reads the cls token\nlicence: cc-by-nc-4.0\n" in out
    assert out.endswith(f"to use it: PRETRAINED_DIR={tmp_path / 'x'} bash train.sh\n")


def test_a_run_and_a_file_that_lacks_its_heads(tmp_path, capsys):
    write_checkpoint(tmp_path / "r/best.pt")
    for path in (tmp_path / "r", tmp_path / "r/best.pt"):
        out = printed(capsys, path)[1]
        assert "(MODEL_TYPE=ViT-Nano_2), of a run of train.py, step" in out
        assert "head: 10 classes (0, 1, 2, ...), which reads the cls" in out
    torch.save(random_model(architecture(4, 40, 80, 2, 1, img_size=8), 3).state_dict(), tmp_path / "x.pth")
    out = printed(capsys, tmp_path / "x.pth")[1]
    assert "number of heads not told" in out and "NUM_HEADS=... bash train.sh" in out
    assert ", as of the model's row: the file does not say" in out and "head: 3 outputs, without names" in out


def test_a_published_name_is_not_downloaded(capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, out, _ = printed(capsys, "vit_small_patch14_reg4_dinov2.lvd142m")
    assert code == 0 and "model: DINOv2 ViT-S/14, 4 registers, 518 px (MODEL_TYPE=DINOv2-S_14-reg)\nlicence: apache-2.0\n" in out


@pytest.mark.parametrize("change, words", [
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"), "model.safetensors: "),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
    (lambda folder: (folder / "config.json").write_text(json.dumps({"architecture": "vit_small_patch14_reg4_dinov2"})),
     "config.json says hidden_size 384, and its arrays have hidden_size 32"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "x"), "no file or folder|neither|no checkpoint")])
def test_what_is_no_model_is_one_line(tmp_path, capsys, change, words):
    change(dino(tmp_path / "x"))
    code, out, err = printed(capsys, tmp_path / "x")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("python -m models: ") and re.search(words, err), err


def test_as_a_command():
    done = subprocess.run([sys.executable, "-m", "models", "no/such"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("python -m models: no file or folder at no/such") and not done.stdout
