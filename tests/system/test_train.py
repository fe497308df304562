"""Whole runs of train.py: files and events, exact resume, what every flag does, refused input."""

import gzip
import json
import math
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import differences, events_of, make_tree, mark, state_of

import configs
import train
from utils import distributed
from utils.data import loader as data
from utils.data import workers
from utils.data.splits import ImageError
from utils.run import checkpoint
from utils.training import trainer

# ------------------------------------------------------------------------------------------------ a whole run


def test_a_run_leaves_what_the_readme_names(run_train, capsys):
    assert run_train("--num_steps", 5, "--eval_every", 2) == 0
    folder = Path("output/digits")
    files = sorted(path.name for path in folder.iterdir())
    assert files == [".lock", "best.pt", "config.json", "curves.png", "log.jsonl", "step-00000004.pt", "step-00000005.pt"]
    assert list(Path("logs/digits").iterdir())
    content = json.loads((folder / "config.json").read_text())
    assert content["config"]["num_steps"] == 5 and content["config"]["learning_rate"] == 1e-3
    assert content["architecture"]["hidden_size"] == 64 and content["versions"]["torch"] == torch.__version__
    events = events_of(kinds=("start", "train", "eval", "end"))
    assert [(event["event"], event["step"], event.get("split")) for event in events] == [
        ("start", 0, None), ("eval", 0, "test"), ("train", 1, None), ("train", 2, None), ("eval", 2, "val"),
        ("train", 3, None), ("train", 4, None), ("eval", 4, "val"), ("train", 5, None), ("eval", 5, "val"),
        ("eval", 5, "test"), ("end", 5, None)]
    assert events[1]["images"] == 60 and events[4]["images"] == 40
    said = capsys.readouterr().out
    for words in ("test accuracy", "before", "after", "output/digits/step-00000005.pt", "output/digits/curves.png",
                  "logs/digits", "Next:", "RESUME_PATH=output/digits NUM_STEPS=10 bash train.sh", "--eval_only"):
        assert words in said, words


def test_unnamed_runs_get_folders_of_their_own(run_train):
    assert run_train() == run_train() == 0
    assert sorted(path.name for path in Path("output").iterdir()) == ["digits", "digits-2"]


def test_best_is_the_best_evaluation(run_train):
    assert run_train("--num_steps", 12, "--eval_every", 3, "--learning_rate", 0.01) == 0
    best = checkpoint.load(Path("output/digits/best.pt"))
    accuracies = {event["step"]: event["accuracy"] for event in events_of() if event.get("split") == "val"}
    assert best.best == {"step": best.step, "accuracy": max(accuracies.values())}
    assert accuracies[best.step] == max(accuracies.values())
    assert state_of().best == best.best


def test_eval_only_repeats_the_evaluation_and_writes_nothing(run_train, capsys):
    assert run_train("--num_steps", 6) == 0
    before = {path: path.read_bytes() for path in Path("output").rglob("*") if path.is_file()}
    expected = [event for event in events_of() if event.get("split") == "test"][-1]
    capsys.readouterr()
    assert run_train("--eval_only", "--resume_path", "output/digits") == 0
    assert f"test accuracy {expected['accuracy']:.2%}" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in Path("output").rglob("*") if path.is_file()}


def test_eval_only_keeps_the_head_of_a_pretrained_file(run_train, capsys, tmp_path):
    """A trained run, exported to Google's layout, scores the same from there."""
    from models import create_model, save_npz

    assert run_train("--num_steps", 8, "--learning_rate", 0.01) == 0
    expected = [event for event in events_of() if event.get("split") == "test"][-1]
    model = create_model("ViT-Nano_2", 10)
    model.load_state_dict(state_of().model)
    save_npz(model, tmp_path / "model.npz")
    capsys.readouterr()
    assert run_train("--eval_only", "--pretrained_dir", tmp_path / "model.npz") == 0
    assert f"test accuracy {expected['accuracy']:.2%}" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- resume

RESUMED = {
    "inside an epoch": ["--train_batch_size", 64],
    "workers, augmentation, dropout": ["--num_workers", 2, "--augmentation", "crop", "--dropout_rate", 0.2],
    "accumulation": ["--gradient_accumulation_steps", 4, "--dropout_rate", 0.1],
    "fp16 O1": ["--fp16", "--fp16_opt_level", "O1"],
    "fp16 O3": ["--fp16", "--fp16_opt_level", "O3"],
    "fp16 with overflows": ["--fp16", "--loss_scale", 2.0 ** 15],
    "bf16, sgd": ["--precision", "bf16", "--optimizer", "sgd", "--weight_decay", 0.01, "--learning_rate", 0.05],
}


@pytest.mark.parametrize("flags", RESUMED.values(), ids=RESUMED)
def test_resume_is_exact(run_train, monkeypatch, tmp_path, flags):
    """11 + 11 steps equal 22 steps bit for bit; an epoch is 17 1/7 steps of 64 images: step 11 lies inside the first."""
    flags = ["--num_steps", 22, "--eval_every", 8, "--save_every", 11, "--name", "r", *flags]
    assert run_train(*flags, "--output_dir", "whole") == 0
    # The same run, which comes to a sudden end after its checkpoint at step 11.
    real_step = trainer.Trainer.train_step

    def step_or_die(self, *arguments, **keywords):
        if self.step == 13:
            raise KeyboardInterrupt
        return real_step(self, *arguments, **keywords)

    monkeypatch.setattr(trainer.Trainer, "train_step", step_or_die)
    with pytest.raises(KeyboardInterrupt):
        run_train(*flags, "--output_dir", "parts")
    monkeypatch.setattr(trainer.Trainer, "train_step", real_step)
    assert run_train("--resume_path", "parts/r") == 0

    whole, parts = vars(state_of("whole/r")), vars(state_of("parts/r"))
    for session in (whole, parts):
        session.pop("seconds")
        session["config"] = {k: v for k, v in session["config"].items() if k not in ("output_dir", "resume_path")}
    assert differences(whole, parts) == []
    assert events_of("whole/r") == events_of("parts/r")
    best = [vars(checkpoint.load(Path(folder) / "r/best.pt"))["model"] for folder in ("whole", "parts")]
    assert differences(*best) == []


def test_a_finished_run_goes_on_with_more_steps(run_train, capsys):
    assert run_train("--num_steps", 4, "--name", "r") == 0
    assert run_train("--resume_path", "output/r", "--num_steps", 6) == 0
    assert "changed: --num_steps 6 (was 4)" in capsys.readouterr().out
    assert state_of("output/r").step == 6 and state_of("output/r").updates == 6
    assert [event["step"] for event in events_of("output/r", ("train",))] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_resumed_as_it_is_trains_nothing_and_tells_the_result_again(run_train, capsys):
    assert run_train("--name", "r") == 0
    before, events = Path("output/r/step-00000004.pt").read_bytes(), events_of("output/r")
    said = [line for line in capsys.readouterr().out.splitlines() if "before" in line]
    assert run_train("--resume_path", "output/r") == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "before" in line] == said
    assert Path("output/r/step-00000004.pt").read_bytes() == before and events_of("output/r") == events


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run_train, capsys):
    assert run_train("--num_steps", 8, "--eval_every", 4, "--name", "r") == 0
    newest = Path("output/r/step-00000008.pt")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert run_train("--resume_path", "output/r") == 0
    said = capsys.readouterr().out
    assert "warning: output/r/step-00000008.pt: damaged" in said and "resuming output/r/step-00000004.pt at step 4" in said
    assert [event["step"] for event in events_of("output/r", ("train",))] == list(range(1, 9))
    assert state_of("output/r").step == 8


def test_branching_off_keeps_both_histories(run_train):
    assert run_train("--num_steps", 8, "--name", "r") == 0
    before = events_of("output/r")
    assert run_train("--resume_path", "output/r/step-00000004.pt", "--name", "branch", "--num_steps", 5) == 0
    assert events_of("output/r") == before
    assert [event["step"] for event in events_of("output/branch", ("train",))] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("steps", [4, 6])
def test_a_branch_has_the_best_checkpoint_it_speaks_of(run_train, capsys, steps):
    """Also where nothing is left to train."""
    assert run_train("--name", "r") == 0
    assert run_train("--resume_path", "output/r/step-00000004.pt", "--name", "branch", "--num_steps", steps) == 0
    branch = Path("output/branch")
    assert state_of(branch).step == steps and "output/branch/best.pt" in capsys.readouterr().out
    assert checkpoint.load(branch / "best.pt").best == state_of(branch).best


def test_going_back_behind_the_best_forgets_it(run_train):
    assert run_train("--num_steps", 12, "--eval_every", 4, "--learning_rate", 0.01, "--keep_checkpoints", 9, "--name", "r",
                     "--warmup_steps", 2) == 0
    best = checkpoint.load(Path("output/r/best.pt")).step
    assert best > 4, "the run of this test improves"
    for step in (8, 12):
        checkpoint.step_path(Path("output/r"), step).unlink()
    assert run_train("--resume_path", "output/r", "--num_steps", 7) == 0
    assert checkpoint.load(Path("output/r/best.pt")).best == state_of("output/r").best == {
        "step": 7, "accuracy": state_of("output/r").best["accuracy"]}


def test_a_run_with_its_best_checkpoint_alone_can_go_on(run_train):
    assert run_train("--name", "r") == 0
    for path in checkpoint.step_files(Path("output/r")):
        path.unlink()
    assert run_train("--resume_path", "output/r", "--num_steps", 6) == 0 and state_of("output/r").step == 6


def test_a_checkpoint_outside_its_run_needs_a_name(run_train, capsys):
    assert run_train("--name", "r") == 0
    Path("elsewhere").mkdir()
    Path("output/r/best.pt").rename("elsewhere/best.pt")
    assert run_train("--resume_path", "elsewhere/best.pt", "--num_steps", 6) == 2
    assert "--name" in capsys.readouterr().err and len(list(Path("elsewhere").iterdir())) == 1
    assert run_train("--resume_path", "elsewhere/best.pt", "--num_steps", 6, "--name", "s") == 0
    assert state_of("output/s").step == 6


def test_evaluation_does_not_ask_for_a_divisible_batch(run_train, monkeypatch):
    assert run_train("--name", "r") == 0
    assert run_train("--resume_path", "output/r", "--eval_only", "--gradient_accumulation_steps", 5) == 0
    assert run_train("--resume_path", "output/r", "--num_steps", 6, "--gradient_accumulation_steps", 5) == 2


def test_other_data_are_refused_on_resume(run_train, capsys):
    tree = make_tree(Path("tree"))
    assert run_train("--dataset", "folder", "--data_dir", "tree", "--model_type", "ViT-Nano_2", "--name", "r") == 0
    (tree / "train" / "bee" / "more.png").write_bytes((tree / "train" / "bee" / "1.png").read_bytes())
    assert run_train("--resume_path", "output/r", "--num_steps", 6) == 2
    assert "12 images" in capsys.readouterr().err


def test_resume_wins_over_pretrained_dir(run_train, capsys):
    assert run_train("--name", "r") == 0
    assert run_train("--resume_path", "output/r", "--pretrained_dir", "no/such/file", "--num_steps", 5) == 0
    assert "--pretrained_dir is not used" in capsys.readouterr().out


# ------------------------------------------------------------------------------- every flag acts: none left out

FOLDER = ["--dataset", "folder", "--data_dir", "tree", "--model_type", "ViT-Nano_2", "--recipe", "digits"]
TAUGHT = ["--distillation", "soft", "--teacher", "output/teacher"]
STEP_2 = ["--pretrained_dir", "output/step-1", "--attention_edits", "edits"]
# Flags that change what is learnt: the weights after a few steps are not those of the run without the flag.
LEARNING = {
    "dataset": FOLDER,
    "recipe": ["--recipe", "vit-paper"],
    "model_type": ["--model_type", "ViT-Ti_16", "--img_size", 16, "--recipe", "digits"],
    "img_size": ["--img_size", "8x10"],
    "pretrained_dir": ["--pretrained_dir", "start.npz"],
    "train_batch_size": ["--train_batch_size", 24],
    "num_steps": ["--num_steps", 5],
    "warmup_steps": ["--warmup_steps", 2],
    "decay_type": ["--decay_type", "linear"],
    "optimizer": ["--optimizer", "sgd"],
    "learning_rate": ["--learning_rate", 2e-3],
    "weight_decay": ["--weight_decay", 0.1],
    "max_grad_norm": ["--max_grad_norm", 0.01, "--optimizer", "sgd"],
    "dropout_rate": ["--dropout_rate", 0.5],
    "augmentation": ["--augmentation", "crop"],
    "precision": ["--precision", "fp16"],
    "fp16": ["--fp16"],
    "fp16_opt_level": ["--fp16", "--fp16_opt_level", "O3"],
    "seed": ["--seed", 1],
    "val_fraction": [*FOLDER, "--val_fraction", 0.5],
    "test_fraction": ["--test_fraction", 0.5],
    "split_seed": ["--test_fraction", 0.5, "--split_seed", 1],
    "patch_size": ["--patch_size", 4],
    "hidden_size": ["--hidden_size", 32],
    "mlp_dim": ["--mlp_dim", 32],
    "num_heads": ["--num_heads", 2],
    "num_layers": ["--num_layers", 2],
    "in_channels": ["--in_channels", 1],
    "classifier": ["--classifier", "patch_mean"],
    "num_epochs": ["--num_epochs", 0.1],
    "warmup_epochs": ["--warmup_epochs", 0.03],
    "momentum": ["--optimizer", "sgd", "--momentum", 0.5],
    "min_learning_rate": ["--min_learning_rate", 5e-4],
    "warmup_learning_rate": ["--warmup_steps", 2, "--warmup_learning_rate", 5e-4],
    "head_learning_rate": ["--head_learning_rate", 1e-2],
    "layer_decay": ["--layer_decay", 0.5],
    "decay_milestones": ["--decay_type", "step", "--decay_milestones", 2],
    "decay_on": ["--weight_decay", 0.5, "--decay_on", "matrices"],
    "train_layers": ["--train_layers", "head"],
    "freeze": ["--freeze", "pos_embed,blocks.0.*"],
    "attention_dropout_rate": ["--attention_dropout_rate", 0.5],
    "drop_path_rate": ["--drop_path_rate", 0.5],
    "label_smoothing": ["--label_smoothing", 0.2],
    "class_weights": ["--class_weights", "balanced"],
    "crop_scale": ["--augmentation", "crop", "--crop_scale", 0.9],
    "crop_padding": ["--augmentation", "pad", "--crop_padding", 1],
    "rotation": ["--rotation", 45],
    "color_jitter": ["--color_jitter", 0.5],
    "randaugment_ops": ["--randaugment_ops", 2],
    "randaugment_magnitude": ["--randaugment_ops", 2, "--randaugment_magnitude", 3],
    "random_erasing": ["--random_erasing", 1],
    "mixup_alpha": ["--mixup_alpha", 1],
    "cutmix_alpha": ["--cutmix_alpha", 1],
    "mix_probability": ["--mixup_alpha", 1, "--mix_probability", 0.3],
    "mix_switch_probability": ["--mixup_alpha", 1, "--cutmix_alpha", 1, "--mix_switch_probability", 0.1],
    "mix_off_steps": ["--mixup_alpha", 1, "--mix_off_steps", 2],
    "interpolation": ["--augmentation", "crop", "--interpolation", "bicubic"],
    "distillation": TAUGHT,
    "teacher": [*TAUGHT[:-1], "output/teacher-2"],
    "distillation_alpha": [*TAUGHT, "--distillation_alpha", 0.9],
    "distillation_temperature": [*TAUGHT, "--distillation_temperature", 3],
    "head": ["--pretrained_dir", "output/step-1", "--head", "keep"],
    "attention_edits": STEP_2,
    "attention_loss_weight": [*STEP_2, "--attention_loss_weight", 30],
    "sigmoid_attention": [*STEP_2, "--sigmoid_attention", 2],
}
# What the flag is compared with, where that is not the run without any flag.
COMPARED_WITH = {
    "max_grad_norm": ["--optimizer", "sgd"], "fp16_opt_level": ["--fp16", "--fp16_opt_level", "O1"], "val_fraction": FOLDER,
    "split_seed": ["--test_fraction", 0.5], "momentum": ["--optimizer", "sgd"], "warmup_learning_rate": ["--warmup_steps", 2],
    "decay_milestones": ["--decay_type", "step", "--decay_milestones", 3], "decay_on": ["--weight_decay", 0.5],
    "crop_scale": ["--augmentation", "crop"], "crop_padding": ["--augmentation", "pad"],
    "randaugment_magnitude": ["--randaugment_ops", 2], "mix_probability": ["--mixup_alpha", 1],
    "mix_switch_probability": ["--mixup_alpha", 1, "--cutmix_alpha", 1], "mix_off_steps": ["--mixup_alpha", 1],
    "interpolation": ["--augmentation", "crop"],
    "teacher": TAUGHT, "distillation_alpha": TAUGHT, "distillation_temperature": TAUGHT,
    "head": ["--pretrained_dir", "output/step-1"], "attention_edits": ["--pretrained_dir", "output/step-1", "--head", "keep"],
    "attention_loss_weight": STEP_2, "sigmoid_attention": STEP_2}


@pytest.mark.parametrize("flag", LEARNING)
def test_a_learning_flag_acts(run_train, flag):
    make_tree(Path("tree"))
    from models import create_model, save_npz

    torch.manual_seed(7)
    save_npz(create_model("ViT-Nano_2", 3), "start.npz")
    for number in ("1", "2") if "teacher" in str(LEARNING[flag]) else ():
        name = "teacher" if number == "1" else "teacher-2"
        assert run_train("--name", name, "--seed", number, "--learning_rate", 0.01, "--model_type", "ViT-Nano_2") == 0
    if "output/step-1" in LEARNING[flag]:
        assert run_train("--name", "step-1") == 0
        mark(Path("edits"))
    assert run_train("--name", "without", *COMPARED_WITH.get(flag, [])) == 0
    assert run_train("--name", "with", *LEARNING[flag]) == 0
    without, with_flag = state_of("output/without").model, state_of("output/with").model
    assert differences(without, with_flag), flag


def spy(monkeypatch, owner, name) -> list[dict]:
    """Records the keyword arguments of every call of owner.name."""
    calls, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(kwargs) or real(*args, **kwargs))
    return calls


def check_name(run_train, monkeypatch, capsys):
    assert run_train("--name", "mine") == 0 and Path("output/mine/best.pt").exists()


def check_data_dir(run_train, monkeypatch, capsys):
    make_tree(Path("elsewhere"))
    flags = ["--dataset", "folder", "--model_type", "ViT-Nano_2"]
    assert run_train(*flags, "--data_dir", "elsewhere") == 0 and run_train(*flags) == 2


def check_resume_path(run_train, monkeypatch, capsys):
    assert run_train() == 0 and run_train("--resume_path", "output/digits", "--num_steps", 5) == 0
    assert state_of().step == 5


def check_output_dir(run_train, monkeypatch, capsys):
    assert run_train("--output_dir", "a/b c") == 0 and Path("a/b c/digits/best.pt").exists()


def check_log_dir(run_train, monkeypatch, capsys):
    assert run_train("--log_dir", "events") == 0 and list(Path("events/digits").iterdir())


def check_eval_batch_size(run_train, monkeypatch, capsys):
    from utils.data import datasets
    from utils.data import loader as data

    calls = spy(monkeypatch, data, "eval_loader")
    assert run_train("--eval_batch_size", 7) == 0 and {call["batch_size"] for call in calls} == {7}
    batch = next(iter(data.eval_loader(datasets.digits("").val, **calls[0])))
    assert len(batch.targets) == 7


def check_gradient_accumulation_steps(run_train, monkeypatch, capsys):
    from utils.training.criterion import Criterion

    sizes, real = [], Criterion.loss
    monkeypatch.setattr(Criterion, "loss", lambda self, logits, targets, images: sizes.append(len(targets))
                        or real(self, logits, targets, images))
    assert run_train("--gradient_accumulation_steps", 4) == 0 and sizes == [4] * 16


def check_eval_every(run_train, monkeypatch, capsys):
    assert run_train("--eval_every", 3) == 0
    assert [event["step"] for event in events_of() if event.get("split") == "val"] == [3, 4]


def check_save_every(run_train, monkeypatch, capsys):
    assert run_train("--save_every", 3) == 0
    assert [path.name for path in checkpoint.step_files(Path("output/digits"))] == ["step-00000004.pt", "step-00000003.pt"]


def check_keep_checkpoints(run_train, monkeypatch, capsys):
    assert run_train("--save_every", 1, "--keep_checkpoints", 3) == 0
    assert len(checkpoint.step_files(Path("output/digits"))) == 3


def check_loss_scale(run_train, monkeypatch, capsys):
    assert run_train("--fp16", "--loss_scale", 128) == 0
    assert {event["loss_scale"] for event in events_of(kinds=("train",))} == {128.0}


def check_device(run_train, monkeypatch, capsys):
    if torch.cuda.is_available():
        assert run_train("--device", "cuda") == 0 and torch.cuda.get_device_name() in capsys.readouterr().out
    else:
        assert run_train("--device", "cuda") == 2 and "sees no GPU" in capsys.readouterr().err


def check_num_workers(run_train, monkeypatch, capsys):
    calls = spy(monkeypatch, workers, "DataLoader")
    assert run_train("--num_workers", 1) == 0 and {call["num_workers"] for call in calls} == {1}


def check_eval_only(run_train, monkeypatch, capsys):
    assert run_train() == 0
    capsys.readouterr()
    assert run_train("--resume_path", "output/digits", "--eval_only", "--num_steps", 9) == 0
    assert state_of().step == 4 and "step 5" not in capsys.readouterr().out


def check_confusion_matrix(run_train, monkeypatch, capsys):
    assert run_train("--confusion_matrix") == 0
    rows = [line.split(",") for line in Path("output/digits/confusion.csv").read_text().splitlines()]
    assert rows[0][1:] == list("0123456789") and sum(int(cell) for row in rows[1:] for cell in row[1:]) == 60
    assert len(Path("output/digits/per_class.csv").read_text().splitlines()) == 11


def check_test(run_train, monkeypatch, capsys):
    expected = {"always": [(0, "test"), (4, "val"), (4, "test")], "once": [(0, "val"), (4, "val"), (4, "test")],
                "never": [(0, "val"), (4, "val")]}
    for choice, evaluations in expected.items():
        assert run_train("--test", choice, "--name", choice) == 0
        assert [(event["step"], event["split"]) for event in events_of(f"output/{choice}", ("eval",))] == evaluations
    make_tree(Path("tree"))
    assert run_train(*FOLDER, "--test", "once", "--eval_every", 2, "--name", "folder") == 0
    assert [event["step"] for event in events_of("output/folder", ("eval",))] == [4]
    assert run_train("--resume_path", "output/folder", "--num_steps", 6) == 0
    assert [event["step"] for event in events_of("output/folder", ("eval",))] == [4, 6]
    for also in ([], ["--eval_only", "--pretrained_dir", "output/folder"]):
        assert run_train(*FOLDER, "--test", "never", *also) == 2 and "--val_fraction" in capsys.readouterr().err


def check_eval_crop(run_train, monkeypatch, capsys):
    assert run_train("--name", "whole") == run_train("--name", "middle", "--eval_crop", 0.5) == 0
    losses = [[event["loss"] for event in events_of(f"output/{name}", ("eval",))] for name in ("whole", "middle")]
    assert losses[0][1:] != losses[1][1:]
    assert not differences(state_of("output/whole").model, state_of("output/middle").model)


def check_ema_decay(run_train, monkeypatch, capsys):
    """The average is what is evaluated, kept, gone on with, and loaded by other runs; the weights themselves stay."""
    flags = ["--learning_rate", 0.01, "--num_steps", 8, "--eval_every", 4]
    assert run_train(*flags, "--name", "plain") == run_train(*flags, "--name", "averaged", "--ema_decay", 0.9) == 0
    plain, averaged = state_of("output/plain"), state_of("output/averaged")
    assert plain.ema == {} and not differences(plain.model, averaged.model) and differences(averaged.model, averaged.ema)
    losses = [events_of(f"output/{name}", ("eval",))[-1]["loss"] for name in ("plain", "averaged")]
    assert losses[0] != losses[1]
    capsys.readouterr()
    assert run_train("--eval_only", "--resume_path", "output/averaged") == 0
    assert f"loss {losses[1]:.4f}" in capsys.readouterr().out
    assert run_train("--eval_only", "--pretrained_dir", "output/averaged/step-00000008.pt") == 0
    assert f"loss {losses[1]:.4f}" in capsys.readouterr().out


def check_eval_train(run_train, monkeypatch, capsys):
    assert run_train("--eval_train") == 0
    event = [event for event in events_of() if event.get("split") == "train"]
    assert [(each["step"], each["images"]) for each in event] == [(4, 1097)]
    capsys.readouterr()
    assert run_train("--eval_only", "--eval_train", "--resume_path", "output/digits") == 0
    assert f"train accuracy {event[0]['accuracy']:.2%}" in capsys.readouterr().out


def check_exact(run_train, monkeypatch, capsys):
    """Four micro-batches are summed in pairs, not one after the other: other bits, and nearly the same numbers."""
    flags = ["--gradient_accumulation_steps", 4, "--optimizer", "sgd"]
    assert run_train("--name", "without", *flags) == run_train("--name", "with", "--exact", *flags) == 0
    without, with_it = state_of("output/without").model, state_of("output/with").model
    assert differences(without, with_it)
    assert all(torch.allclose(without[name], with_it[name], atol=1e-5) for name in without)


def check_override(run_train, monkeypatch, capsys):
    assert run_train("--name", "r") == 0
    flags = ["--resume_path", "output/r", "--num_steps", 8, "--learning_rate", 5e-4]
    assert run_train(*flags) == 2 and "add --override" in capsys.readouterr().err
    assert run_train(*flags, "--override") == 0
    assert "changed: --learning_rate 0.0005 (was 0.001)" in capsys.readouterr().out
    assert max(event["lr"] for event in events_of("output/r", ("train",))[4:]) < 5e-4
    assert run_train("--name", "h", "--head_learning_rate", 1e-2) == 0
    assert run_train("--resume_path", "output/h", "--num_steps", 8, "--learning_rate", 5e-4, "--override") == 0
    groups = state_of("output/h").optimizer["param_groups"]
    assert sorted({round(group["lr_scale"], 6) for group in groups}) == [1.0, 20.0]      # the head's stays 1e-2


def check_non_finite(run_train, monkeypatch, capsys):
    real = trainer.classification_loss

    def bad_at(calls, number):
        monkeypatch.setattr(trainer, "classification_loss", lambda *args, **more: (
            real(*args, **more) * (calls.append(1) or float("nan") if len(calls) + 1 == number else calls.append(1) or 1)))

    bad_at([], 3)
    assert run_train("--name", "stop") == 4
    said = capsys.readouterr().err
    assert "step 3: loss nan" in said and "samples" in said and not list(Path("output/stop").glob("step-*3.pt"))
    bad_at([], 3)
    assert run_train("--name", "skip", "--non_finite", "skip") == 0
    assert [event["skipped"] for event in events_of("output/skip", ("train",))] == [False, False, True, False]
    assert state_of("output/skip").updates == 3
    assert all(value.isfinite().all() for value in state_of("output/skip").model.values())


def bad_tree() -> list:
    tree = make_tree(Path("tree"))
    (tree / "train" / "bee" / "2.png").write_bytes(b"not an image")
    return [*FOLDER, "--num_epochs", 1]


def check_bad_images(run_train, monkeypatch, capsys):
    flags = bad_tree()
    assert run_train("--name", "stop", *flags) == 2 and "tree/train/bee/2.png" in capsys.readouterr().err
    assert run_train("--name", "skip", *flags, "--bad_images", "skip", "--max_bad_images", 0.1) == 0
    said = capsys.readouterr().out
    assert "warning: replaced by the next readable image: tree/train/bee/2.png" in said
    assert "1 of the training images were replaced: output/skip/bad_images.txt" in said
    listed = Path("output/skip/bad_images.txt").read_text().splitlines()
    assert len(listed) == 1 and listed[0].startswith("tree/train/bee/2.png: ")


def check_max_bad_images(run_train, monkeypatch, capsys):
    flags = [*bad_tree(), "--bad_images", "skip"]
    assert run_train(*flags) == 2
    said = capsys.readouterr().err
    assert "1 of 12 training images" in said and "bad_images.txt" in said
    assert run_train(*flags, "--max_bad_images", 0.1) == 0


def check_rank_timeout(run_train, monkeypatch, capsys):
    """tests/distributed/test_lost_ranks.py shows what it does."""
    calls, real = [], distributed.start
    monkeypatch.setattr(distributed, "start", lambda device, timeout_s: calls.append(timeout_s) or real(device, timeout_s))
    assert run_train() == run_train("--rank_timeout", 5) == 0 and calls == [600, 5]


def check_worker_timeout(run_train, monkeypatch, capsys):
    """tests/data/test_workers.py shows what it does."""
    calls = spy(monkeypatch, data, "train_loader")
    assert run_train() == run_train("--worker_timeout", 5) == 0 and [call["timeout_s"] for call in calls] == [300, 5]


def check_check_data(run_train, monkeypatch, capsys):
    bad_tree()
    assert run_train("--check_data", *FOLDER) == 2
    said = capsys.readouterr()
    assert "tree/train/bee/2.png" in said.out and "1 images cannot be read: output/bad_images.txt" in said.err
    assert [path.name for path in Path("output").iterdir()] == ["bad_images.txt"]
    (Path("tree") / "train" / "bee" / "2.png").unlink()
    assert run_train("--check_data", *FOLDER) == 0 and "train" in capsys.readouterr().out


def check_prepare(run_train, monkeypatch, capsys):
    """tests/data/test_prepared.py shows what it makes."""
    make_tree(Path("tree"))
    assert train.main(["--prepare", "small", *FOLDER[:4]]) == 0 and "small" in capsys.readouterr().out
    assert run_train("--check_data", *FOLDER, "--data_dir", "small") == 0
    shutil.rmtree("tree")
    assert run_train("--name", "r", *FOLDER, "--data_dir", "small") == 0
    assert "prepared, the shorter side 256 px at most" in (said := capsys.readouterr().out) and "enlarged" not in said


def check_prepare_size(run_train, monkeypatch, capsys):
    from utils.data import datasets

    make_tree(Path("tree"))
    sides = []
    for name, *size in (("whole",), ("small", "--prepare_size", "5")):
        assert train.main(["--prepare", name, *size, *FOLDER[:4]]) == 0
        sides.append(min(datasets.load_splits("folder", name).train[0][0].size))
    assert sides[1] == 5 < sides[0]
    assert run_train("--name", "r", *FOLDER, "--data_dir", "small") == 0             # its model takes 8 x 8
    assert "they are enlarged; prepare them with --prepare_size 9" in capsys.readouterr().out


def check_profile(run_train, monkeypatch, capsys):
    assert run_train("--name", "r", "--profile") == 0 and "output/r/trace.json.gz" in capsys.readouterr().out
    with gzip.open("output/r/trace.json.gz") as stream:
        assert {"aten::addmm", "Optimizer.step#AdamW.step"} <= {event["name"] for event in json.load(stream)["traceEvents"]}


def check_float32_matmul(run_train, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls.append)       # it would last for the whole process
    assert run_train("--precision", "fp32") == run_train("--precision", "fp32", "--float32_matmul", "medium") == 0
    assert calls == ["highest", "medium"]
    assert capsys.readouterr().out.count("products may round inside: medium") == 1


def check_compile(run_train, monkeypatch, capsys):
    """What is compiled, and that every batch has one size: that of training, that of evaluation. test_compiled does it."""
    sizes = []

    def record(model, images):
        assert images.is_contiguous()              # another layout would be compiled for too
        sizes.append((model.training, len(images)))
        return model.forward(images)

    def stand_in(self, **options):
        assert options == {"dynamic": False}
        self._compiled_call_impl = lambda images: record(self, images)

    monkeypatch.setattr(torch.nn.Module, "compile", stand_in)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    flags = ["--ema_decay", 0.5, "--train_batch_size", 16, "--gradient_accumulation_steps", 2, "--eval_batch_size", 30]
    assert run_train("--compile", "--mixup_alpha", 0.5, *flags) == 0
    said = capsys.readouterr()
    for size in ("8 images a micro-step", "30 images an evaluation batch"):
        assert len(re.findall(f"compiled in .* for {size}", said.out + said.err)) == 1
    assert set(sizes) == {(True, 8), (False, 30)}                  # neither split is a multiple of 30 images


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles with g++ on a CPU")
def test_compiled(run_train):
    """The same run as without --compile, to the rounding."""
    shared = ["--num_steps", 4, "--num_layers", 1, "--hidden_size", 32, "--mlp_dim", 32, "--num_heads", 2, "--precision", "fp32",
              "--dropout_rate", 0, "--test", "once", "--save_every", 2]
    assert run_train("--name", "plain", *shared) == 0
    assert run_train("--name", "compiled", "--compile", *shared) == 0
    plain, compiled = (torch.tensor([event["loss"] for event in events_of(f"output/{name}")])
                       for name in ("plain", "compiled"))
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=0)


def test_without_a_compiler(run_train, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function: (_ for _ in ()).throw(RuntimeError("no compiler\nat all")))
    assert run_train("--compile") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "(RuntimeError: no compiler)" in told and "leave --compile out" in told


def check_wandb(run_train, monkeypatch, capsys):
    """With a stand-in for the package: what it is told, and that the key reaches no file."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if find_spec("wandb") is None:
        assert run_train("--wandb", "project") == 2 and "pip install wandb" in capsys.readouterr().err
    Path("wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert run_train("--wandb", "project") == 2 and "WANDB_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-key")
    assert run_train("--wandb", "project", "--name", "r") == 0
    told = [json.loads(line) for line in Path("told.jsonl").read_text().splitlines()]
    assert told[0]["project"] == "project" and told[0]["name"] == "r" and told[0]["config"]["num_steps"] == 4
    assert [figures["step"] for figures in told if "train/loss" in figures] == [1, 2, 3, 4]
    assert any("val/accuracy" in figures for figures in told) and told[-1] == {"finished": True}
    assert run_train("--resume_path", "output/r", "--num_steps", 5) == 0
    again = [json.loads(line) for line in Path("told.jsonl").read_text().splitlines()][len(told):]
    assert again[0]["id"] == told[0]["id"] and again[0]["resume"] == "allow"
    for path in (path for path in Path(".").rglob("*") if path.is_file()):
        assert b"a-secret-key" not in path.read_bytes(), path


WANDB = """
import json

def note(content):
    with open("told.jsonl", "a") as stream:
        stream.write(json.dumps(content, default=str) + "\\n")

class Run:
    def log(self, figures, step):
        note(figures | {"step": step})

    def finish(self):
        note({"finished": True})

def init(**settings):
    note(settings)
    return Run()
"""


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


@pytest.mark.parametrize("flag", CHECKS)
def test_another_flag_acts(run_train, monkeypatch, capsys, flag):
    CHECKS[flag](run_train, monkeypatch, capsys)


def test_no_flag_is_left_out():
    assert set(LEARNING) | set(CHECKS) == set(configs.FLAGS) and not set(LEARNING) & set(CHECKS)


# -------------------------------------------------------------------- bad input: one line, exit code 2, no run left

FOREIGN = {"page.npz": b"<html>404</html>", "empty.npz": b"", "weights.pth": b"PK\x03\x04 not a zip",
           "page.pt": b"<html>404</html>" * 100}
REFUSED = {
    "unknown flag": (["--learning_rat", 0.1], "--learning_rat"),
    "abbreviated flag": (["--learning", 0.1], "--learning"),
    "not a number": (["--num_steps", "many"], "--num_steps"),
    "negative": (["--num_steps", -1], "must be 1 or more"),
    "infinite": (["--learning_rate", "inf"], "finite"),
    "unknown model": (["--model_type", "ViT-Q_16"], "ViT-B_16"),
    "unknown data set": (["--dataset", "cifar11"], "cifar10"),
    "name with a path": (["--name", "../up"], "letters, digits"),
    "retired flag": (["--local_rank", 0], "torchrun"),
    "indivisible batch": (["--train_batch_size", 50, "--gradient_accumulation_steps", 4], "take 48 or 52"),
    "batch below its parts": (["--train_batch_size", 3, "--gradient_accumulation_steps", 4], "take 4"),
    "warm-up longer than the run": (["--warmup_steps", 9], "--warmup_steps 9"),
    "missing checkpoint": (["--pretrained_dir", "no/such.npz"], "no/such.npz"),
    "a page for a checkpoint": (["--pretrained_dir", "page.npz"], "page.npz"),
    "an empty checkpoint": (["--pretrained_dir", "empty.npz"], "empty.npz"),
    "a foreign checkpoint": (["--pretrained_dir", "weights.pth"], "weights.pth"),
    "a checkpoint of other things": (["--pretrained_dir", "other.npz"], "other.npz"),
    "weights of another model": (
        ["--pretrained_dir", "start.npz", "--model_type", "ViT-Ti_16", "--img_size", 16], "--model_type"),
    "wrong head": (["--pretrained_dir", "start.npz", "--eval_only"], "3 classes, the data 10"),
    "bad image size": (["--img_size", 9], "take 8 or 10"),
    "image size in words": (["--img_size", "big"], "224"),
    "no such data": (["--dataset", "folder", "--data_dir", "nowhere"], "nowhere"),
    "missing val": (["--dataset", "folder", "--data_dir", "trainonly"], "trainonly/val"),
    "different classes": (["--dataset", "folder", "--data_dir", "differ"], "wasp"),
    "empty class": (["--dataset", "folder", "--data_dir", "hollow"], "of class bee"),
    "too few classes for ImageNet": (["--dataset", "imagenet", "--data_dir", "tree"], "--dataset folder"),
    "nothing to resume": (["--resume_path", "output/none"], "output/none"),
    "resume a page": (["--resume_path", "page.pt"], "page.pt"),
    "resume a folder without checkpoints": (["--resume_path", "tree"], "no intact checkpoint"),
    "contradicting precision": (["--fp16", "--precision", "bf16"], "contradict"),
    "loss scale without fp16": (["--loss_scale", 8], "fp16"),
    "data folder that digits do not use": (["--data_dir", "tree"], "--dataset"),
    "evaluation of nothing": (["--eval_only", "--pretrained_dir", "none"], "--resume_path"),
    "a torch file of other things": (["--pretrained_dir", "run.pt"], "not a Vision Transformer"),
    "TensorBoard below a file": (["--log_dir", "page.pt"], "page.pt"),
    "a head of zeros to evaluate": (["--eval_only", "--head", "zero", "--pretrained_dir", "start.npz"], "contradict"),
    "a head from nowhere": (["--head", "keep"], "--head keep needs a --pretrained_dir"),
    "a head of other classes": (["--head", "keep", "--pretrained_dir", "start.npz"], "--head keep: the head of start.npz has 3"),
    "edits without a start": (["--attention_edits", "tree"], "--attention_edits needs a --pretrained_dir"),
    "edits and mixing": (["--attention_edits", "tree", "--pretrained_dir", "start.npz", "--mixup_alpha", 1], "cannot follow"),
    "a weight without edits": (["--attention_loss_weight", 1], "acts with --attention_edits"),
    "no such layer": (["--sigmoid_attention", "5"], "the model has 4 layers"),
    "layers in words": (["--sigmoid_attention", "first"], "layers counted from 1"),
    "both spellings at odds": (["--fp16", "--precision", "fp32"], "contradict"),
    "level without fp16": (["--fp16_opt_level", "O1"], "--fp16"),
    "output below a file": (["--output_dir", "page.pt/x"], "page.pt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(run_train, capsys, case):
    flags, words = REFUSED[case]
    from models import create_model, save_npz

    for name, content in FOREIGN.items():
        Path(name).write_bytes(content)
    np.savez("other.npz", weights=np.zeros(3, np.float32))
    save_npz(create_model("ViT-Nano_2", 3), "start.npz")
    torch.save({"weights": torch.zeros(3)}, "run.pt")
    make_tree(Path("tree"))
    make_tree(Path("trainonly"), splits=("train",))
    make_tree(Path("differ"))
    (Path("differ/val/bee")).rename("differ/val/wasp")
    make_tree(Path("hollow"))
    for image in Path("hollow/train/bee").iterdir():
        image.unlink()
    assert run_train(*flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("train.py: error: ") and said.count("\n") == 1 and words in said, said
    assert not Path("output").exists() or not list(Path("output").rglob("*.pt"))


def test_run_folder_in_use(run_train, capsys):
    assert run_train("--name", "r") == 0
    before = {path: path.read_bytes() for path in Path("output/r").iterdir()}
    assert run_train("--name", "r") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in Path("output/r").iterdir()}


def test_a_truncated_image_is_named(run_train, capsys):
    image = make_tree(Path("tree")) / "train" / "bee" / "3.png"
    image.write_bytes(image.read_bytes()[:40])
    assert run_train("--dataset", "folder", "--data_dir", "tree", "--model_type", "ViT-Nano_2", "--num_workers", 1) == 2
    said = capsys.readouterr().err
    assert "tree/train/bee/3.png" in said and said.count("\n") == 1


def test_the_step_before_a_truncated_image_is_told(run_train, capsys, monkeypatch):
    """Also where its figures are read late, as on a GPU."""
    make_tree(Path("tree"))
    taken = []
    for late in (False, True):
        monkeypatch.setattr(trainer.Trainer, "late", property(lambda self, late=late: late, lambda self, value: None),
                            raising=False)
        real = data.Loader.__iter__

        def breaks(self, real=real):
            for number, batch in enumerate(real(self)):
                if number == 3 and batch.keys[0].step == 3:
                    raise ImageError("cannot be read")
                yield batch

        with monkeypatch.context() as patch:
            patch.setattr(data.Loader, "__iter__", breaks)
            assert run_train("--dataset", "folder", "--data_dir", "tree", "--model_type", "ViT-Nano_2", "--num_steps", 9,
                             "--eval_every", 9, "--save_every", 9, "--name", f"late-{late}") == 2
        taken.append([event["step"] for event in events_of(f"output/late-{late}", ("train",))])
    assert taken == [[1, 2, 3]] * 2


@pytest.mark.parametrize("kept", [False, True], ids=["before the first checkpoint", "after one"])
def test_nan_loss_stops_with_step_samples_and_the_last_good_checkpoint(run_train, capsys, monkeypatch, kept):
    from utils.training.criterion import Criterion

    real, losses = Criterion.loss, []

    def spoil(self, logits, targets, images):
        losses.append(real(self, logits, targets, images))
        return losses[-1] * (math.nan if len(losses) == 3 else 1)

    monkeypatch.setattr(Criterion, "loss", spoil)
    assert run_train("--save_every", 1 if kept else 4, "--name", "r") == 4
    said = capsys.readouterr().err
    assert "step 3: loss nan at learning rate " in said and "; samples " in said and said.count("\n") == 1
    event, = events_of("output/r", ("diverged",))
    assert event["step"] == 3 and len(event["samples"]) == 16
    assert ("step-00000002.pt" if kept else "none yet") in said
    assert [event["step"] for event in events_of("output/r", ("train",))] == [1, 2]
    if not kept:      # nothing to go on from: the name is free for another try
        monkeypatch.setattr(Criterion, "loss", real)
        assert run_train("--name", "r") == 0


KEPT = {"learning_rate": 0.5, "seed": 3, "train_batch_size": 32, "model_type": "ViT-B_16", "img_size": 16,
        "dataset": "cifar10", "precision": "fp16", "optimizer": "sgd", "decay_type": "linear", "weight_decay": 0.5}


@pytest.mark.parametrize("flag", KEPT)
def test_what_must_not_change_on_resume_is_refused(run_train, capsys, flag):
    assert run_train("--name", "r") == 0
    before = {path: path.read_bytes() for path in Path("output/r").iterdir()}
    assert run_train("--resume_path", "output/r", f"--{flag}", KEPT[flag]) == 2
    said = capsys.readouterr().err
    assert f"--{flag} {KEPT[flag]}" in said and said.count("\n") == 1
    assert before == {path: path.read_bytes() for path in Path("output/r").iterdir()}


def test_resuming_on_other_classes_is_refused(run_train, capsys):
    flags = ["--dataset", "folder", "--model_type", "ViT-Nano_2", "--name", "r"]
    assert run_train(*flags, "--data_dir", make_tree(Path("one"))) == 0
    make_tree(Path("two"), classes=("cat", "dog"))
    assert run_train("--resume_path", "output/r", "--data_dir", "two", "--num_steps", 5) == 2
    assert "not the same task" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch, run_train):
    from utils.training import optimizer

    def broken(*_, **__):
        raise ValueError("a genuine bug")

    monkeypatch.setattr(optimizer, "lr_multiplier", broken)
    with pytest.raises(ValueError, match="a genuine bug"):
        run_train()


def test_wrong_flags_are_told_before_torch_is_loaded():
    import subprocess
    import sys

    code = "import sys, train; code = train.main(['--nonsense']); sys.exit(1 if 'torch' in sys.modules else code)"
    done = subprocess.run([sys.executable, "-c", code], cwd=train.ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr


# ------------------------------------------------------------------------------- what a review of this program found


def test_a_final_evaluation_that_was_cut_off_is_made_up_for(run_train):
    """The last checkpoint was written, the run was stopped before it told its test accuracy."""
    assert run_train("--name", "r") == 0
    log = Path("output/r/log.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    expected = [event for event in events if event.get("split") == "test"][-1]
    log.write_text("".join(json.dumps(event) + "\n" for event in events[:-2]))
    assert run_train("--resume_path", "output/r") == 0
    assert [event for event in events_of("output/r") if event.get("split") == "test"][-1] == expected
    assert run_train("--resume_path", "output/r") == 0
    assert len([event for event in events_of("output/r") if event.get("split") == "test"]) == 2


def test_a_resumed_run_has_no_accuracy_before_training(run_train, capsys):
    assert run_train("--test_fraction", 0.2, "--test", "once", "--name", "r") == 0
    capsys.readouterr()
    assert run_train("--resume_path", "output/r", "--test", "always", "--num_steps", 6) == 0
    assert "step 0:" not in capsys.readouterr().out


def test_a_finished_run_of_which_the_best_is_left_tells_its_result(run_train):
    assert run_train("--name", "r") == 0
    for path in checkpoint.step_files(Path("output/r")):
        path.unlink()
    assert run_train("--resume_path", "output/r") == 0


def test_mixing_by_the_size_of_the_data_is_checked_too(run_train, monkeypatch, capsys):
    monkeypatch.setitem(configs.SIZE_RULES, "bit-hyperrule", ((float("inf"), {
        "num_steps": 4, "warmup_steps": 1, "decay_milestones": (2,), "mixup_alpha": 0.1}),))
    assert run_train("--recipe", "bit-hyperrule", "--train_batch_size", 15) == 2
    assert "an odd number: take 16" in capsys.readouterr().err


def test_a_run_is_not_evaluated_on_other_classes(run_train, capsys):
    assert run_train("--name", "r") == 0
    make_tree(Path("tree"), classes=tuple("abcdefghij"))
    assert run_train(*FOLDER, "--eval_only", "--pretrained_dir", "output/r") == 2
    assert "not the same task" in capsys.readouterr().err


def test_a_teacher_that_is_not_there_is_told(run_train, capsys):
    assert run_train("--distillation", "hard", "--teacher", "imagenet21k/ViT-B_16") == 2
    assert "a run folder or a checkpoint of this project" in capsys.readouterr().err


def test_epochs_and_milestones_on_resume_are_told(run_train, capsys):
    assert run_train("--name", "r", "--decay_type", "step", "--decay_milestones", 2) == 0
    assert run_train("--resume_path", "output/r", "--num_epochs", 0.1) == 0
    assert "changed: --num_steps 7 (was 4); the milestones of the learning rate stay" in capsys.readouterr().out


def test_a_run_given_as_a_start_brings_its_architecture(run_train, capsys):
    """Its size, heads and image size; with other flags it must fit, also where shapes do not tell."""
    own = ["--patch_size", 4, "--hidden_size", 32, "--num_heads", 8, "--num_layers", 2, "--mlp_dim", 48]
    assert run_train("--name", "r", "--img_size", "8x12", *own) == 0
    make_tree(Path("tree"))
    assert run_train("--dataset", "folder", "--data_dir", "tree", "--pretrained_dir", "output/r", "--name", "s") == 0
    assert state_of("output/s").config["num_heads"] == 8 and state_of("output/s").config["img_size"] == (8, 12)
    assert "parameters from output/r/best.pt; fresh: head.bias, head.weight" in capsys.readouterr().out
    wrong = [*own[:5], 4, *own[6:]]
    assert run_train("--pretrained_dir", "output/r", "--model_type", "ViT-Nano_2", *wrong) == 2
    assert "take --num_heads 8" in capsys.readouterr().err


def test_evaluation_without_test_is_that_of_val(run_train, capsys):
    assert run_train("--test", "never", "--name", "r") == 0
    expected = [event for event in events_of("output/r") if event.get("split") == "val"][-1]
    capsys.readouterr()
    assert run_train("--eval_only", "--resume_path", "output/r") == 0
    said = capsys.readouterr().out
    assert f"val accuracy {expected['accuracy']:.2%}" in said and "test accuracy" not in said


def test_a_head_that_does_not_fit_the_data_is_told_in_flags(run_train, capsys, monkeypatch):
    monkeypatch.chdir(train.ROOT)
    assert run_train("--eval_only", "--pretrained_dir", "auto") == 2
    said = capsys.readouterr().err
    assert "26 classes, the data 10: give --resume_path" in said and "head=" not in said


def test_frozen_random_weights_are_warned_of(run_train, capsys):
    assert run_train("--train_layers", "head") == 0
    assert "warning: what is frozen has random weights" in capsys.readouterr().out
