"""Shared by all tests: the `gpu` marker, and running train.py in this process or the scripts in another."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")      # as train.py; before PyTorch is loaded

import torch

import train
from utils import datasets, plots
from utils.splits import Part, Splits

# The models of the tests are tiny: more threads gain nothing, and on a busy machine they wait for each other.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def run_train(tmp_path, monkeypatch):
    """run_train("--flag", value, ...) -> exit code of train.py in an empty folder: from scratch, on the CPU, few steps,
    digits with 40 images to validate and 60 to test on. Its picture is an empty file: drawing would be half of the time.

    Flags given win over these, because the last one counts.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(datasets.DATASETS, "digits", small_digits)
    monkeypatch.setattr(plots, "save", lambda figure, path: Path(path).touch())

    def run(*flags) -> int:
        argv = [str(flag) for flag in flags]
        if "--resume_path" not in argv:
            length = [] if "--num_epochs" in argv else ["--num_steps", "4"]
            argv = ["--pretrained_dir", "none", *length, "--eval_every", "4", "--train_batch_size", "16", *argv]
        return train.main(["--device", "cpu", *argv])

    return run


def small_digits(data_dir: str) -> Splits:
    splits = datasets.digits(data_dir)
    return dataclasses.replace(splits, val=Part(splits.val, range(40)), test=Part(splits.test, range(60)))


@pytest.fixture
def run_script(tmp_path):
    """run_script("train.sh", "--flag", "value", VARIABLE="x") -> the finished process; results go below tmp_path."""

    def run(script: str, *flags: str, cwd: Path = ROOT, timeout: int = 300, **variables: str) -> subprocess.CompletedProcess:
        clean = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
        environment = clean | {"PYTHON": sys.executable} | variables
        if variables.get("DRY_RUN") != "1" and script != "test.sh":
            flags = ("--output_dir", str(tmp_path / "output"), "--log_dir", str(tmp_path / "logs"), *flags)
        return subprocess.run(["bash", str(cwd / script), *flags], capture_output=True, text=True, env=environment,
                              timeout=timeout, stdin=subprocess.DEVNULL)

    return run
