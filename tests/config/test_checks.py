"""Errors that are found before PyTorch is loaded, and settings that do not fit the data."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from utils.config import FLAGS, ConfigError, Facts, check, checks, flags, resolve, scratch_warnings

FACTS = Facts(1797, 10, start_head_classes=10, start_path="w.npz")


def message(function, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


REFUSED = {
    "num_steps and": {"num_steps": 5, "num_epochs": 1.0}, "warmup_steps and": {"warmup_steps": 5, "warmup_epochs": 1.0},
    "--warmup_steps 6 is more than --num_steps 5": {"num_steps": 5, "warmup_steps": 6},
    "--decay_type step needs --decay_milestones": {"decay_type": "step"},
    "--distillation hard needs a --teacher": {"distillation": "hard"},
    "AugReg has no such size": {"recipe": "augreg"}, "no such model. MODEL_ZOO": {"model_type": "swin"},
    "no flag is called --learning_rat": {"learning_rat": 0.1},
    "--min_learning_rate 1.0 is more than": {"min_learning_rate": 1.0},
    "float16 is too coarse": {"ema_decay": 0.9, "precision": "fp16", "fp16_opt_level": "O3"},
    "--train_layers head": {"learning_rate": 0.0, "head_learning_rate": 1.0},
    "--loss_scale only has an effect": {"loss_scale": 8.0},
    "--loss_scale only": {"loss_scale": 8.0, "precision": "fp16", "fp16_opt_level": "O0"},
    "--profile records training steps": {"eval_only": True, "profile": True},
    "--eval_only needs something": {"eval_only": True, "pretrained_dir": "none"},
    "--head zero and --eval_only contradict": {"eval_only": True, "head": "zero"},
    "--head keep needs a --pretrained_dir": {"head": "keep", "pretrained_dir": "none"},
    "--attention_edits needs a --pretrained_dir": {"attention_edits": ".", "num_layers": 2},
    "--eval_only trains nothing": {"attention_edits": ".", "eval_only": True},
    "--log_dir l\udcf6gs: TensorBoard only accepts names in UTF-8": {"log_dir": "l\udcf6gs"},
    "a compiled model hides": {"attention_edits": ".", "compile": True},
    "cannot follow RandAugment": {"attention_edits": ".", "mixup_alpha": 1.0},
    "by 1 processes x 4 micro-steps: use 48 or 52": {"train_batch_size": 50, "gradient_accumulation_steps": 4},
    "micro-steps: use 4": {"train_batch_size": 3, "gradient_accumulation_steps": 4},
    "an odd number, and MixUp": {"train_batch_size": 15, "mixup_alpha": 1.0},
    "--num_epochs contradict": {"resume_path": ".", "num_steps": 1, "num_epochs": 1.0}, "needs NAME": {"resume_path": "auto"},
    "nothing to resume at no/run": {"resume_path": "no/run"},
    "--data_dir no/data: no such folder": {"dataset": "folder", "data_dir": "no/data"},
    "--attention_edits no/edits: no such folder": {"attention_edits": "no/edits"}}


@pytest.mark.parametrize("words", REFUSED)
def test_impossible_flags_are_refused_before_anything_is_opened(words):
    assert words in message(check, REFUSED[words])


def test_every_folder_of_a_flag_is_checked(tmp_path):
    """Without PyTorch, and without leaving files behind."""
    (tmp_path / "pets.zip").touch()
    packed = str(tmp_path / "pets.zip")
    for dataset in ("folder", "csv", "imagenet", "cifar10", "mnist", "cub200"):
        assert message(check, {"dataset": dataset, "data_dir": packed}) == (
            f"--data_dir {packed}: an archive, not a folder. Unpack it and use the unpacked folder")
    resumed = {"resume_path": str(tmp_path)}
    assert "--data_dir" in message(check, resumed | {"data_dir": packed})
    for typed in ({}, resumed):
        for name in ("output_dir", "log_dir"):
            assert message(check, typed | {name: f"{packed}/x"}) == f"--{name} {packed}/x: {packed} is a file, not a folder"
            assert message(check, typed | {name: "/proc/runs/x"}).startswith(f"--{name} /proc/runs/x: /proc cannot be written (")
            check(typed | {name: str(tmp_path / "new/x")})
    assert "--data_dir /proc/x: /proc cannot be written" in message(check, {"dataset": "mnist", "data_dir": "/proc/x"})
    lists = {"dataset": "csv", "data_dir": str(tmp_path)}
    assert f"--image_dir gone: no such folder in {tmp_path} or in" in message(check, lists | {"image_dir": "gone"})
    assert "--image_dir pets.zip: " in (text := message(check, lists | {"image_dir": "pets.zip"})) and "an archive" in text
    check(lists | {"image_dir": "."})
    check(resumed | {"output_dir": "/proc/runs", "eval_only": True})
    assert [path.name for path in tmp_path.iterdir()] == ["pets.zip"]


def test_the_number_of_processes_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("VIT_CHECK", "3")
    assert "not divisible by 3 processes" in message(check, {})
    assert "3 micro-steps a process are not a power of two. Use" in message(
        check, {"exact": True, "train_batch_size": 90, "gradient_accumulation_steps": 3})
    check({"train_batch_size": 90})
    check({"eval_only": True})
    check({"resume_path": ".", "decay_type": "step", "momentum": 0.5})        # checked later, together with the checkpoint


@pytest.mark.parametrize(("typed", "facts", "words"), [
    ({"test": "never"}, Facts(1797, 10, test_is_val=True), "Hold out training images"),
    ({"class_weights": "1,2"}, FACTS, "--class_weights has 2 numbers, the data have 10 classes"),
    ({"head": "keep"}, Facts(1797, 3, start_head_classes=10, start_path="w.npz"),
     "--head keep: the head of w.npz has 10 classes, the data 3: give a --pretrained_dir"),
    ({"eval_only": True}, Facts(1797, 3, start_path="w.npz"),
     "--eval_only: the head of w.npz has 0 classes, the data 3: give --resume_path output/NAME, or"),
    ({"num_epochs": 1.0, "warmup_epochs": 2.0}, FACTS, "--warmup_steps 56 is more than --num_steps 28"),
    ({}, Facts(1797, 10, ranks=3), "not divisible by 3 processes"),
    ({"exact": True, "train_batch_size": 60, "gradient_accumulation_steps": 3}, Facts(1797, 10, ranks=2), "or one process")],
    ids=str)
def test_flags_that_do_not_fit_the_facts_are_refused(typed, facts, words):
    assert words in message(resolve, typed, facts)


@pytest.mark.parametrize(("typed", "images", "warned"), [
    ({"recipe": "deit"}, 256, True), ({"recipe": "scratch-small"}, 9_999, True), ({"recipe": "deit"}, 10_000, False),
    ({"recipe": "mae"}, 256, False), ({}, 256, False), ({"recipe": "deit", "pretrained_dir": "auto"}, 256, False),
    ({"pretrained_dir": "none"}, 256, False)], ids=str)
def test_a_recipe_from_scratch_on_few_images_causes_a_warning(typed, images, warned):
    facts = Facts(images, 8)
    lines = scratch_warnings(resolve({"dataset": "folder", "data_dir": "photos"} | typed, facts), facts)
    assert lines == [f"warning: the recipe {typed.get('recipe')} starts from scratch, and {images:,} images are few for that. "
                     "Without --recipe (RECIPE) a run starts from trained weights"] * warned


def test_the_warning_offers_no_trained_weights_for_an_own_size():
    line, = scratch_warnings(resolve({"dataset": "folder", "recipe": "deit", "num_layers": 2}, FACTS), FACTS)
    assert line == "warning: the recipe deit starts from scratch, and 1,797 images are few for that"


def test_conditions_only_use_settings_that_exist():
    """A missing name counts as not yet known, so its check would be skipped."""
    for module in (checks, flags):
        names = re.findall(r'\b(?:v|values|config)\["(\w+)"\]', Path(module.__file__).read_text())
        assert len(names) > 3 and set(names) <= set(flags.SETTINGS)
    for row in FLAGS.values():
        row.has_effect(flags.defaults())


def test_a_bad_flag_fails_without_pytorch():
    code = ("import sys; from utils.config import check, parse\n"
            "try: check(parse(['--resume_path', 'no/run']))\n"
            "except ValueError: sys.exit(3 if {'torch', 'numpy'} & set(sys.modules) else 0)")
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2]).returncode == 0
