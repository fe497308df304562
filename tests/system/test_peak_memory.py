"""The peak memory of a whole training process is within a fifth of what utils/training/memory.py expects."""

import os
import subprocess
import sys

import pytest
from miniatures import tree

from configs import MODELS
from utils.training.memory import need

FEW = [("ViT-Ti_16", 16, "fp32", "sgd")]
MANY = [*FEW, ("ViT-Ti_16", 32, "bf16", "adamw"), ("ViT-S_16", 32, "fp32", "adamw"), ("ViT-S_16", 16, "bf16", "sgd"),
        ("ViT-Ti_16", 16, "fp16", "sgd"), ("ViT-B_16", 16, "fp32", "sgd"), ("ViT-B_16", 16, "bf16", "adamw"),
        ("R26-ViT-S_32", 16, "fp32", "sgd"), ("R26-ViT-S_32", 16, "bf16", "sgd")]

# Not the maximum that wait4 returns: that one starts with the size of the parent process.
MEASURED = """
import sys, train
from benchmarks.memory import resident
code = train.main(sys.argv[1:])
print(resident("VmHWM"))
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux")
def test_peak_memory_is_as_expected(tmp_path, tries, monkeypatch):
    root = os.path.abspath(".")
    data = tree(tmp_path / "data", {"train/a": 16, "train/b": 16, "val/a": 1, "val/b": 1})
    monkeypatch.chdir(tmp_path)
    for model, batch, precision, optimizer in tries(FEW, MANY):
        command = [sys.executable, "-c", MEASURED, "--dataset", "folder", "--data_dir", data,
                   "--model_type", model, "--pretrained_dir", "none", "--train_batch_size", str(batch),
                   "--precision", precision, "--optimizer", optimizer,
                   "--num_steps", "2", "--save_every", "1", "--eval_every", "2", "--test", "once", "--num_workers", "0",
                   "--device", "cpu", "--gradient_accumulation_steps", "1", "--name", f"{model}-{precision}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": root})
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout.splitlines()[-1])
        estimate = need(MODELS[model], (224, 224), 2, precision=precision, optimizer=optimizer, eval_batch_size=2)
        expected = max(estimate.step(batch), estimate.fixed + estimate.evaluation)
        assert 0.8 < expected / peak < 1.2, (model, precision, expected >> 20, peak >> 20)
