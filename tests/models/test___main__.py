"""`python -m models FILE`: describes a file of weights by its header."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from building import write_checkpoint
from filling import random_model
from safetensors.torch import load_file, save_file

import predict
from configs import MODELS, architecture
from models.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"patch_size": 14, "hidden_size": 32, "mlp_dim": 128, "num_heads": 2, "num_layers": 1, "img_size": 28}


def dino(folder: Path, **said) -> Path:
    """Save a small DINOv2 with registers, with timm's config.json."""
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
    assert "model: DINOv2-reg (width 32, 1 block, patch 14), 4 registers, 28 px (MODEL_TYPE=DINOv2-S_14-reg, with the" in out
    assert "sizes: width 32, MLP 128, 2 heads, 1 block, patches of 14 px, images of 28 x 28 px in 3 channels\n" in out
    assert "images: mean 0.1 0.2 0.3, std 1 1 1; evaluated bicubic, the middle 90 % of the shorter side\n" in out
    assert "head: 3 outputs (ant, bee, cat), which reads the cls token\nlicence: cc-by-nc-4.0\n" in out
    assert out.endswith(f"to use it: DATASET=folder DATA_DIR=PHOTOS PRETRAINED_DIR={tmp_path / 'x'} bash train.sh\n")


def test_a_run_and_a_file_that_lacks_its_heads(tmp_path, capsys):
    """The command to type works as printed, also for paths with spaces."""
    run, named = tmp_path / "a run", tmp_path / "a run/step-00000003.pt"
    write_checkpoint(run / "best.pt")
    shutil.copy(run / "best.pt", named)
    for path in (run, run / "best.pt", named):
        out = printed(capsys, path)[1]
        words = shlex.split(out.rpartition("predict.py ")[2].replace("IMAGES", shlex.quote(str(run))))
        assert predict.parse(words).model == str(named if path == named else run)
        assert "(MODEL_TYPE=ViT-Nano_2, with other sizes), of a run of train.py, step" in out
        assert "head: 10 classes (0, 1, 2, ...), which reads the cls" in out
    torch.save(random_model(architecture(4, 40, 80, 2, 1, img_size=8), 3).state_dict(), tmp_path / "an x.pth")
    out = printed(capsys, tmp_path / "an x.pth")[1]
    assert "number of heads unknown" in out
    assert out.endswith(f"DATASET=folder DATA_DIR=PHOTOS PRETRAINED_DIR='{tmp_path / 'an x.pth'}' bash train.sh --num_heads N\n")
    assert ", from the model's row: the file does not say" in out and "head: 3 outputs, without names" in out


def test_a_published_name_is_not_downloaded(capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, out, _ = printed(capsys, "vit_small_patch14_reg4_dinov2.lvd142m")
    assert code == 0 and "model: DINOv2 ViT-S/14, 4 registers, 518 px (MODEL_TYPE=DINOv2-S_14-reg)\nlicence: apache-2.0\n" in out


@pytest.mark.parametrize("typed, words", [
    ("dinov2-small", "Did you mean facebook/dinov2-small or"), ("DINOv2-S", "Did you mean DINOv2-S_14, DINOv2-S_14-reg or"),
    ("facebook/dinov2-smal", "Did you mean facebook/dinov2-small"), ("facebook/dinov3-vits16", "a repository that MODEL_ZOO.md"),
    ("google/siglip2-base", "Did you mean google/siglip2-base-patch16-224"),
    ("swin_tiny_patch4_window7_224", "MODEL_ZOO.md lists"),
    ("hf-hub:me/model", "To try it: DATASET=folder DATA_DIR=PHOTOS PRETRAINED_DIR=hf-hub:me/model bash train.sh")])
def test_a_name_that_is_almost_right_or_unlisted(capsys, typed, words):
    code, out, err = printed(capsys, typed)
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err and "configs.py" not in err, err


def test_terms_of_a_publisher_are_named_with_their_page(capsys):
    out = printed(capsys, "facebook/dinov3-vits16-pretrain-lvd1689m")[1]
    assert "access: the publisher may ask you to accept the terms at https://huggingface.co/facebook/dinov3-vits16-" in out
    assert "access:" not in printed(capsys, "facebook/dinov2-small")[1]


def with_arrays(**more: torch.Tensor | None) -> Callable:
    """Return a function that changes arrays of the file, or removes them (None)."""
    def change(folder: Path) -> None:
        state = load_file(folder / "model.safetensors") | more
        save_file({name: value for name, value in state.items() if value is not None}, folder / "model.safetensors")

    return change


@pytest.mark.parametrize("change, words", [
    (with_arrays(**{"blocks.0.ls2.gamma": None}), "needs arrays that the file lacks: blocks.0.ls2.gamma"),
    (with_arrays(**{"blocks.0.x": torch.ones(3)}), "has arrays that the model lacks: blocks.0.x"),
    (with_arrays(**{"norm.bias": torch.ones(31)}), r"norm.bias has shape \(31,\), which does not fit"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{"), "model.safetensors: "),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
    (lambda folder: (folder / "config.json").write_text(json.dumps({"architecture": "vit_small_patch14_reg4_dinov2"})),
     "config.json says hidden_size 384, but its arrays have hidden_size 32"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "x"), "x: a folder without weights: none of model.safe")])
def test_a_file_that_is_no_model_is_reported_in_one_line(tmp_path, capsys, change, words):
    change(dino(tmp_path / "x"))
    code, out, err = printed(capsys, tmp_path / "x")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("python -m models: ") and re.search(words, err), err


def test_it_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "models", "no/such"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("python -m models: error: no/such: no such file") and not done.stdout
