"""Shared by the tests of whole runs: their data, and comparisons of checkpoints and logs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.attention import edits
from utils.config import parse
from utils.data import datasets
from utils.run import checkpoint
from utils.training import trainer

# The class folders of make_tree.
FOLDER = ["--dataset", "folder", "--data_dir", "tree", "--model_type", "ViT-Nano_2", "--recipe", "digits"]
# For tests in which a larger model would show nothing more.
TINY = ["--hidden_size", 16, "--mlp_dim", 32, "--num_heads", 2, "--num_layers", 1]


def load_state(path) -> checkpoint.RunState:
    """Load and verify a checkpoint; its tensors are on the CPU."""
    return checkpoint.open_run_checkpoint(Path(path)).state()


def state_of(folder="output/digits") -> checkpoint.RunState:
    return load_state(checkpoint.step_files(Path(folder))[0])


def events_of(folder="output/digits", kinds=("train", "eval")):
    """Return the events of the log, without values that depend on the clock."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("images_per_second", "time", "seconds", "data_wait")}
            for line in lines if line["event"] in kinds]


def differences(a, b, path="") -> list[str]:
    """Return the paths at which two nested values differ; tensors are compared bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b)) for found in differences(*pair, f"{path}/{i}")]
    if isinstance(a, (dict, list, tuple, torch.Tensor)):
        return [] if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b) else [path]
    return [] if a == b else [path]


def whole_and_killed(run_train, monkeypatch, *flags) -> checkpoint.RunState:
    """Run 12 steps in whole/r, and the same in parts/r, killed in step 9 and resumed at step 6: both must end the same, bit for
    bit -> the end of the whole run"""
    flags = [*flags, "--num_steps", 12, "--save_every", 6, "--eval_every", 4, "--name", "r"]
    assert run_train(*flags, "--output_dir", "whole") == 0
    real = trainer.Trainer.train_step

    def step_or_die(self, *arguments, **more):
        if self.step == 8:
            raise KeyboardInterrupt
        return real(self, *arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Trainer, "train_step", step_or_die)
        run_train(*flags, "--output_dir", "parts")
    assert run_train("--resume_path", "parts/r") == 0
    for file in ("step-00000012.pt", "best.pt"):
        assert not differences(*(comparable(Path(folder, "r", file)) for folder in ("whole", "parts")))
    assert events_of("whole/r") == events_of("parts/r")
    return state_of("whole/r")


def comparable(file: Path) -> dict:
    """Return the content of a checkpoint, except for its duration and folder."""
    state = vars(load_state(file)) | {"seconds": 0}
    return state | {"config": {key: value for key, value in state["config"].items() if key not in ("output_dir", "resume_path")}}


def make_tree(root: Path, classes=("ant", "bee"), images=6, splits=("train", "val")) -> Path:
    random = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(images):
                pixels = random.integers(0, 256, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def mark(folder: Path, images=range(0, 1097, 3), value=0.9) -> None:
    """Write edits of digits: the upper left quarter of the 4 x 4 grid."""
    split = datasets.digits("").train
    for index in images:
        edited = np.zeros((4, 4), bool)
        edited[:2, :2] = True
        edits.write(edits.path_of(folder, split.name(index)), edits.Edit(
            split.name(index), edits.checksum(split, index), np.where(edited, value, 0).astype(np.float32), edited))


def same(a: dict, b: dict) -> list[bool]:
    common = a.keys() & b.keys()
    assert len(common) > 10
    return [torch.equal(a[key], b[key]) for key in common]


# A value for each variable of train.sh that sets a flag.
VARIABLES = {
    "DATASET": "cifar100", "DATA_DIR": "my data", "RECIPE": "mae", "MODEL_TYPE": "ViT-B_16", "IMG_SIZE": "384", "NAME": "c100",
    "TRAIN_BATCH_SIZE": "256", "EVAL_BATCH_SIZE": "32", "GRAD_STEPS": "4", "VAL_FRACTION": "0.1", "NUM_STEPS": "500",
    "NUM_EPOCHS": "2.5", "WARMUP_STEPS": "100", "DECAY_TYPE": "linear", "OPTIMIZER": "adamw", "WEIGHT_DECAY": "0.05",
    "LEARNING_RATE": "0.01", "RESUME_PATH": "output/a b", "PRETRAINED_DIR": "checkpoint/ViT-B_16.npz", "SEED": "7",
    "PRECISION": "fp16", "FP16_OPT_LEVEL": "O1"}


def flag_of(variable: str) -> str:
    return "gradient_accumulation_steps" if variable == "GRAD_STEPS" else variable.lower()


def flags_of(variables: dict[str, str]) -> dict:
    """Return what train.py parses from variables of train.sh."""
    return parse([f"--{flag_of(name)}={value}" for name, value in variables.items()])
