"""--device mps: runs on a stand-in for an Apple GPU, which refuses what MPS refuses, compared with the same runs on the CPU."""

import csv
from pathlib import Path

import numpy as np
import pytest
from apple_gpu import apple_gpu
from PIL import Image
from runs import events_of, mark, state_of

import predict

FEATURES = {
    "mixing": ("--mixup_alpha", 0.8, "--cutmix_alpha", 1, "--ema_decay", 0.9, "--max_grad_norm", 1, "--class_weights", "balanced",
               "--optimizer", "adamw", "--tta", "flip", "--gradient_accumulation_steps", 2),
    "edits": ("--pretrained_dir", "output/first", "--attention_edits", "edits", "--attention_loss_weight", 5, "--exact",
              "--augmentation", "crop", "--teacher", "output/first", "--distillation", "soft")}


def numbers(run: str) -> np.ndarray:
    return np.array([[event[name] for name in ("loss", "accuracy")] for event in events_of(run, ("train", "eval"))])


@pytest.mark.parametrize("features", FEATURES)
def test_a_run_has_the_numbers_of_the_cpu(run_train, monkeypatch, capsys, features):
    monkeypatch.setattr("utils.run.profiling.MEASURED_FROM", 1e9)
    if features == "edits":
        assert run_train("--name", "first", "--num_steps", 1) == 0
        mark(Path("edits"), range(100))
    flags = ("--precision", "fp32", "--num_steps", 3, *FEATURES[features])
    assert run_train("--name", "cpu", *flags) == 0
    capsys.readouterr()
    with apple_gpu() as gpu:
        assert run_train("--name", "mps", "--device", "mps", *flags) == 0
    assert gpu.moved > 50 and gpu.seeds >= 3
    printed = capsys.readouterr().out
    assert "device: 1 x Apple GPU (MPS; not tested by this project)" in printed and "in the memory of the GPU" not in printed
    np.testing.assert_allclose(numbers("output/mps"), numbers("output/cpu"), rtol=2e-5)


def test_a_run_resumes_and_predicts(run_train, tmp_path, monkeypatch, capsys):
    """From a checkpoint of the CPU's fused optimizer, and back on the CPU. Then predict.py --device mps."""
    monkeypatch.setattr("utils.run.profiling.MEASURED_FROM", 1e9)
    flags = ("--name", "run", "--precision", "fp32")
    assert run_train(*flags, "--num_steps", 2) == 0
    with apple_gpu():
        assert run_train("--resume_path", "output/run", "--device", "mps", "--num_steps", 4) == 0
    assert run_train("--resume_path", "output/run", "--num_steps", 6) == 0
    assert state_of("output/run").step == 6
    Image.new("L", (9, 9), 200).save("a.png")
    rows = []
    with apple_gpu() as gpu:
        for device in ("cpu", "mps"):
            moved = gpu.moved
            assert predict.main(["output/run", "a.png", "--device", device, "--output", f"{device}.csv"]) == 0
            assert (gpu.moved > moved) == (device == "mps")
            rows += list(csv.DictReader(Path(f"{device}.csv").open()))
    assert rows[0] == rows[1]
