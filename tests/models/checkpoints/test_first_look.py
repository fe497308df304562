"""The kind of a file from its first and last bytes, without PyTorch."""

import re
import subprocess
import sys
import zipfile

import pytest
import torch
from PIL import Image
from weight_files import saved

import train
from models import ModelError
from models.checkpoints.first_look import NPZ, SAFETENSORS, TORCH, again, check_seal, kind_of, require_run, require_weights
from utils.report.sweeps import FINAL


def test_weights_are_required_at_a_path_or_name(tmp_path, monkeypatch, put):
    monkeypatch.chdir(tmp_path)
    weights = saved(tmp_path / "some.bin", {"a": torch.ones(2)}).read_bytes()
    for file in ("run/step-00000010.pt", "hub/model.safetensors", "lora/adapter_config.json", "other/notes.txt", "s/sweep.json",
                 "parts/model.safetensors.index.json"):
        put(tmp_path / file, weights if file.startswith(("run", "hub")) else b"{}")
    for what in ("hub", "run", "run/step-00000010.pt", "some.bin", "ViT-B_16", "augreg/S_16", "deit/deit_small_patch16_224"):
        require_weights(what)
    (tmp_path / "hub/model.safetensors").write_bytes(b"<html>")
    for what, words in (("lora", "lora: a LoRA adapter"), ("parts", "parts: its weights are in several files"),
                        ("other", "other holds no intact checkpoint: it is not a run"), ("none", "it is no published name"),
                        ("hub", "hub/model.safetensors: a web page"), ("other/notes.txt", "notes.txt: not a file of weights"),
                        ("imagenet21k/ViT-S_16", "imagenet21k has no published file")):
        with pytest.raises(ModelError, match=words):
            require_weights(what)
    require_run("run")
    put(tmp_path / f"s/{FINAL}/log.jsonl", b"")
    with pytest.raises(ModelError, match=f"^s is a sweep: give its final run, s/{FINAL}$"):
        require_weights("s")
    for what, words in (("other", "other holds no intact checkpoint$"), ("s", f"s is a sweep: give its final run, s/{FINAL}$"),
                        ("some.bin", "not a checkpoint of this program")):
        with pytest.raises(ModelError, match=words):
            require_run(what)


def test_kinds_are_recognized_by_their_bytes(tmp_path, put):
    numbers = {"a": torch.ones(2)}
    assert kind_of(saved(tmp_path / "a.npz", numbers)) == kind_of(saved(tmp_path / "b.npz", numbers, legacy=True)) == TORCH
    assert kind_of(put(tmp_path / "c.pth", b"PK\5\6" + bytes(18))) == NPZ
    assert kind_of(put(tmp_path / "d.pth", b"\x10" + bytes(7) + b"{")) == SAFETENSORS


def test_an_exported_program_is_refused_by_name(tmp_path, put):
    with zipfile.ZipFile(tmp_path / "x.pt2", "w") as archive:
        archive.writestr("archive/archive_format", "pt2")
        archive.writestr("archive/data/weights/data.pkl", "")
    put(tmp_path / "x.onnx", b"\x08\x0a\x12\x07pytorch")
    for name in ("x.pt2", "x.onnx"):
        with pytest.raises(ModelError, match=rf"{name}: an exported program .*, or what export\.py --to folder writes"):
            kind_of(tmp_path / name)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_an_image_is_refused_by_name(kind, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x", kind)
    with pytest.raises(ModelError, match=r"x: an image, not weights$"):
        kind_of(tmp_path / "x")


def test_only_published_files_are_to_be_downloaded_again(tmp_path, put):
    for name in ("ViT-B_16.npz", "R50+ViT-B_16.npz", "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz",
                 "deit_tiny_patch16_224-a1311bcf.pth", "S24_224.pth", "mae_pretrain_vit_base.pth"):
        with pytest.raises(ModelError, match="the file is empty; download it again"):
            kind_of(put(tmp_path / name, b""))
    for name in ("mine.pth", "model.safetensors", "ViT-B_16", "ViT-B_16.npz.pth", "best.pt"):
        assert again(tmp_path / "imagenet21k" / name) == "write or copy it again", name


@pytest.mark.parametrize("flags, content, words", [
    (["--pretrained_dir"], b"hello", "--pretrained_dir: .*w.pth: not a file of weights"),
    (["--pretrained_dir"], b"", "--pretrained_dir: .*w.pth: the file is empty"),
    (["--distillation", "soft", "--teacher"], b"<!DOCTYPE html>", "--teacher: .*w.pth: a web page instead of weights"),
    (["--teacher"], b"PK\3\4" + bytes(400), "--teacher: .*w.pth: damaged or cut off"),
    (["--resume_path"], b"PK\3\4" + bytes(400), "--resume_path: .*w.pth: not a checkpoint of this program .not a zip")])
def test_a_file_without_weights_is_refused_before_pytorch_loads(tmp_path, put, monkeypatch, capsys, flags, content, words):
    asked = []

    def no_further():
        asked.append(1)
        assert len(asked) < 2, "PyTorch would load"

    monkeypatch.setattr(train.launch, "only_checks", no_further)
    if "--teacher" in flags and len(flags) == 1:
        flags = ["--distillation", "hard", *flags]
    assert train.main(["--dataset", "digits", *flags, str(put(tmp_path / "w.pth", content))]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error


def test_pytorch_is_not_needed():
    loaded = "import sys, models.checkpoints.first_look as look; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0


def test_only_the_seal_is_checked(tmp_path, put):
    check_seal(put(tmp_path / "x", b"anything" + b"sha256:" + b"0" * 64))
    with pytest.raises(ModelError, match="or it was cut off"):
        check_seal(put(tmp_path / "y", b"anything" + b"sha256:" + b"0" * 63))
