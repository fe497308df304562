"""A checkpoint is opened once, and all functions that need it use the same object."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import reference
import torch

from models import ModelError, checkpoint_head, create_model, load_model, load_pretrained, run_settings, save_npz, save_timm
from models.checkpoints import first_look
from models.checkpoints.opened import OpenedCheckpoint
from utils.run import checkpoint

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture
def run_file(tmp_path) -> Path:
    """Write a checkpoint of 9 MB like a run."""
    model = create_model("ViT-Nano_2", 3, hidden_size=192, mlp_dim=768, img_size=32)
    state = checkpoint.RunState(
        step=3, updates=3, skips=0, model=model.state_dict(), optimizer={"state": {0: {"buffer": torch.ones(1_000_000)}}},
        scaler={}, best={}, first={}, config={"img_size": 32, "lr": 0.1}, architecture=model.config.to_dict(), classes=CLASSES,
        train_images=9, seconds=1.0)
    checkpoint.save(tmp_path / "step-00000003.pt", state)
    return tmp_path / "step-00000003.pt"


def test_checkpoint_of_a_run_names_its_settings(run_file):
    with OpenedCheckpoint(run_file) as opened:
        assert opened.path == run_file and opened.settings == {"img_size": 32, "lr": 0.1} == run_settings(run_file)
        assert (opened.head_classes, opened.representation_size) == (3, 0) == checkpoint_head(opened)


def test_published_file_has_a_head_and_no_settings():
    with OpenedCheckpoint(reference.weights("g_p16_pre")) as opened:
        assert opened.settings is None
        assert (opened.head_classes, opened.representation_size) == (21, 48)


def bytes_read() -> int:
    """Return the bytes that this process has read so far, except through mappings of files."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_file_of_a_run_is_hashed_and_read_once(run_file, monkeypatch):
    hashes, real = [], hashlib.sha256
    monkeypatch.setattr(first_look.hashlib, "sha256", lambda: hashes.append(1) or real())
    create_model("ViT-Nano_2", initialise=False)                   # PyTorch reads modules of its own on first use
    row, before = {"hidden_size": 192, "mlp_dim": 768}, bytes_read()
    with OpenedCheckpoint(run_file) as opened:
        settings, head = run_settings(opened), checkpoint_head(opened)
        model = create_model("ViT-Nano_2", img_size=settings["img_size"], pretrained=opened, head="keep", **row)
        other = load_model(opened)
    assert len(hashes) == 1 and bytes_read() - before < 1.1 * run_file.stat().st_size
    assert head == (3, 0) and other.classes == model.load_report.classes == CLASSES
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("save, name", [(save_npz, "x.npz"), (save_timm, "x.pth"), (save_timm, "x.safetensors")])
def test_published_file_is_read_once(tmp_path, save, name):
    row = {"hidden_size": 192, "mlp_dim": 768, "img_size": 32}
    model = create_model("ViT-Nano_2", 3, **row)
    save(model, tmp_path / name)
    before = bytes_read()
    with OpenedCheckpoint(tmp_path / name) as opened:
        assert opened.settings is None and opened.head_classes == 3
        filled = create_model("ViT-Nano_2", pretrained=opened, head="keep", **row)
    assert bytes_read() - before < 1.2 * (tmp_path / name).stat().st_size
    assert all(torch.equal(value, filled.state_dict()[name]) for name, value in model.state_dict().items())


def test_opened_file_fills_several_models(tmp_path):
    """It stays open until its owner closes it. Unused arrays are reported once for each model."""
    arrays = {f"params/{name}": array for name, array in reference.arrays(reference.weights("g_p16_gap")).items()}
    np.savez(tmp_path / "x.npz", **arrays, **{"opt/count": np.int32(3)})
    with OpenedCheckpoint(tmp_path / "x.npz") as opened:
        first, second = (create_model(reference.ROWS["g_p16_gap"], pretrained=opened, head="keep") for _ in range(2))
        report = load_pretrained(first, opened, "keep")
    assert str(report) == str(first.load_report) == str(second.load_report) and report.left_out == ["opt/count"]
    with pytest.raises(ModelError):
        load_pretrained(second, opened)
