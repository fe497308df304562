"""Flags that no longer exist: the command line names what to type instead, and checkpoints with them resume if possible."""

import shlex

import pytest

from utils import launch
from utils.config import FLAGS, ConfigError, Facts, Saved, parse, resolve
from utils.config.retired import RETIRED

FACTS = Facts(1797, 10)
PYTHON = launch.python_command()


@pytest.mark.parametrize(("argv", "words"), [
    ("--local_rank 0", "--local_rank is not used any more: torchrun"), ("--local-rank=0", "--local-rank is not used any more"),
    ("--seed 1 --gpu 0", "GPUS=0,1 bash train.sh"), ("--worker_timeout 7", "300 seconds"),
    ("--float32_matmul high --precision fp32", "--precision tf32"), ("--prepare_size 9", f"{PYTHON} dataset.py prepare --size"),
    ("--check_data --dataset folder --data_dir tree --val_fraction 0.1 --seed 3",
     f"Run: {PYTHON} dataset.py check --dataset folder --data_dir tree --val_fraction 0.1"),
    ("--dataset folder --data_dir 'a b' --prepare small --prepare_size 128 --bad_images skip",
     f"Run: {PYTHON} dataset.py prepare small --size 128 --dataset folder --data_dir 'a b' --bad_images skip")])
def test_a_retired_flag_names_what_to_type(argv, words):
    with pytest.raises(ConfigError) as caught:
        parse(shlex.split(argv))
    assert str(caught.value).startswith("--") and words in str(caught.value)
    assert caught.value.exit_code == 2 and not set(RETIRED) & set(FLAGS)


def resumed(**saved):
    old = resolve({}, FACTS).to_dict() | {"precision": "fp32", "fp16": False, "worker_timeout": 300, "float32_matmul": "highest",
                                          "check_data": False, "prepare": None, "prepare_size": 256}
    return resolve({"resume_path": "r"}, FACTS, Saved(old | saved, 0, 1797, 1, "r"))


def test_checkpoints_with_retired_settings_resume():
    assert resumed().precision == "fp32" and not {"fp16", "worker_timeout"} & set(resumed().to_dict())
    assert resumed(float32_matmul="high").precision == "tf32"
    assert resumed(fp16=True, precision="fp16").precision == "fp16"


@pytest.mark.parametrize(("name", "value"), [("worker_timeout", 7), ("float32_matmul", "medium"), ("prepare_size", 128)])
def test_checkpoints_with_other_values_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"--{name} {value}: the checkpoint was made with this flag"):
        resumed(**{name: value})
