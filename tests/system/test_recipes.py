"""Whole runs of recipes, with frozen layers, from one task to another, and with a teacher."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import miniatures
import numpy as np
import pytest
import torch
from runs import TINY, differences, events_of, load_state, state_of, whole_and_killed
from torch.nn import functional as F

import configs
from models import create_model, load_model, save_npz
from utils.config import parse
from utils.data.datasets import digits
from utils.data.transforms import normalize

ROOT = Path(__file__).parents[2]
LETTERS = str(ROOT / "assets" / "ViT-Nano_2-letters.npz")
LENGTHS = {"num_steps", "num_epochs", "warmup_steps", "warmup_epochs", "decay_milestones", "train_batch_size"}


OTHER_TASK = {"train/ant": 6, "train/bee": 5, "train/cat": 5, "val/ant": 2, "val/bee": 2, "val/cat": 2}


# --------------------------------------------------------------------------------------------------------- recipes
# tests/config/ checks that every recipe resolves to its row.


@pytest.mark.parametrize("recipe", ["deit", "mae", "cait"])
def test_a_recipe_runs_with_the_settings_of_its_row(run_train, capsys, recipe):
    """With a smaller model of its family."""
    row = configs.RECIPES[recipe]
    small = {"img_size": 32, "hidden_size": 48, "num_heads": 3, "num_layers": 2, "mlp_dim": 96}
    given = {"dataset": "folder", "data_dir": miniatures.tree(Path("tree"), OTHER_TASK), "train_batch_size": 8, "num_steps": 3,
             "num_workers": 0, **small}
    assert run_train("--recipe", recipe, "--name", "r", *(word for name in given for word in (f"--{name}", given[name]))) == 0
    losses = [event["loss"] for event in events_of("output/r", ("train",))]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    block = re.search(r"^settings:\n((?:  .*\n)+)", capsys.readouterr().out, re.MULTILINE)[1]
    saved = json.loads(Path("output/r/config.json").read_text())
    own = {name: value for name, value in row.items() if name not in {*given, *LENGTHS, "pretrained_dir", "eval_every"}}
    assert len(own) >= 6 and {name: saved["config"][name] for name in own} == own
    printed = own | parse(shlex.split(block))          # settings at their defaults are not printed
    assert {name: printed[name] for name in own} == own


def test_mnist_scratch_on_grey_images(run_train, capsys):
    """The recipe's own model, from packed idx files to a checkpoint of one channel, and evaluated from there."""
    miniatures.mnist(Path("data/MNIST/raw"), ".gz")
    assert run_train("--recipe", "mnist-scratch", "--num_epochs", 2, "--train_batch_size", 10, "--num_workers", 1, "--name", "r",
                     "--eval_every", 6) == 0
    assert "length: 6 steps of 10 images = 2 passes over the 30 training images" in capsys.readouterr().out
    model = load_model(Path("output/r/best.pt"))
    assert model.patch_embed.proj.weight.shape == (64, 1, 7, 7) and model.img_size == (28, 28)
    assert len(model.blocks) == 6 and model.config.num_heads == 8 and model.classes == list("0123456789")
    assert {event["lr"] for event in events_of("output/r", ("train",))} == {3e-3}
    after = events_of("output/r", ("eval",))[-1]
    assert run_train("--eval_only", "--resume_path", "output/r") == 0
    assert f"loss {after['loss']:.4f} (20 images, one is 5.0%; " in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- frozen layers


def changed(before, after) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_frozen_weights_stay_the_same_bit_for_bit(run_train, capsys):
    """With weight decay, which would change a parameter without gradient, and with averaged weights."""
    torch.manual_seed(5)
    model = create_model("ViT-Nano_2", 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_npz(model, "start.npz")
    start = create_model("ViT-Nano_2", 10, pretrained="start.npz").state_dict()
    from_start = ["--pretrained_dir", "start.npz", "--model_type", "ViT-Nano_2", "--weight_decay", 0.1, "--ema_decay", 0.5,
                  "--warmup_steps", 0, "--learning_rate", 0.01]
    blocks = {name for name in start if name.startswith(("blocks.2.", "blocks.3.")) and "norm" not in name}
    head = {"head.weight", "head.bias"}
    for name, flags, expected in (("blocks", ["--train_layers", 2, "--freeze", "*norm*"], head | blocks),
                                  ("head", ["--recipe", "linear-probe"], head)):
        capsys.readouterr()
        assert run_train(*from_start, *flags, "--name", name) == 0
        printed = capsys.readouterr().out
        assert f"frozen: {len(start) - len(expected)} array" in printed and "random weights" not in printed
        state = state_of(f"output/{name}")
        assert changed(start, state.model) == expected
        assert sum(len(group["params"]) for group in state.optimizer["param_groups"]) == len(expected)
        for frozen in start.keys() - expected:             # averages of equal numbers, equal up to rounding
            torch.testing.assert_close(state.ema[frozen], start[frozen], rtol=1e-6, atol=0)
    assert run_train("--train_layers", "head") == 0
    assert "warning: the frozen layers have random weights" in capsys.readouterr().out


def test_a_linear_probe_trains_a_pooling_by_attention_that_the_file_lacks(run_train, monkeypatch, capsys):
    """Its initial values are random. Also after a kill. A pooling that the file contains is frozen."""
    probe = ["--classifier", "attention", "--train_layers", "head", "--warmup_steps", 0, "--learning_rate", 0.01]
    end = whole_and_killed(run_train, monkeypatch, "--pretrained_dir", LETTERS, *probe)
    assert capsys.readouterr().out.count("(the head, and the pooling by attention, which the file lacks)") == 3
    start = create_model("ViT-Nano_2", 10, pretrained=LETTERS, classifier="attention").state_dict()
    pool = {name for name in start if name.startswith("attn_pool.")}
    head = {"head.weight", "head.bias"}
    assert head <= changed(start, end.model) <= pool | head
    assert len(end.optimizer["state"]) == len(pool) + 2
    assert run_train("--pretrained_dir", "whole/r", *probe, "--name", "next") == 0
    assert changed(load_state("whole/r/best.pt").model, state_of("output/next").model) == {"head.weight", "head.bias"}
    assert "frozen: " in (printed := capsys.readouterr().out) and "the file lacks" not in printed


@pytest.mark.parametrize(("classifier", "own"), [
    ("token", ()), ("gap", ()), ("mean", ()), ("patch_mean", ("fc_norm.weight",)), ("token_mean", ()),
    ("attention", ("attn_pool.latent", "attn_pool.kv.weight", "attn_pool.mlp.fc2.bias"))])
def test_every_kind_of_head_learns(classifier, own, run_train, tries):
    """In 3 steps. With --full also in 20 steps of train.sh, whose loss falls."""
    flags = ["--classifier", classifier, "--learning_rate", 0.003, "--warmup_steps", 0, "--num_workers", 0]
    assert run_train(*TINY, *flags, "--num_steps", 3) == 0
    state = state_of()
    assert state.architecture["classifier"] == classifier and ("cls_token" in state.model) == (classifier != "gap")
    assert state.model["head.weight"].shape == (10, 32 if classifier == "token_mean" else 16) and state.model["head.weight"].any()
    moments = dict(zip(state.model, state.optimizer["state"].values()))
    assert all(next(iter(moments[name].values())).any() for name in own)
    if tries(False, True):
        more = ["--device", "cpu", "--output_dir", os.getcwd(), "--name", "learns"]
        variables = {"NUM_STEPS": "20", "PRETRAINED_DIR": "none", "TRAIN_BATCH_SIZE": "64"}
        done = subprocess.run(["bash", str(ROOT / "train.sh"), *map(str, [*flags, *more])], capture_output=True, text=True,
                              cwd=ROOT, env=os.environ | variables)
        assert done.returncode == 0, done.stderr
        losses = [event["loss"] for event in events_of("learns", ("train",))]
        assert losses[-1] < 0.95 * losses[0]


# ------------------------------------------------------------------------------------- from one task to the next


def test_another_task_starts_from_the_averaged_weights_of_the_best_checkpoint(run_train, capsys):
    """With other classes and another image size."""
    assert run_train("--num_steps", 6, "--eval_every", 3, "--learning_rate", 0.01, "--name", "r", "--ema_decay", 0.5) == 0
    shutil.copy("output/r/step-00000003.pt", "output/r/best.pt")           # not the newest
    best = load_state(Path("output/r/best.pt"))
    assert changed(best.model, state_of("output/r").model) and changed(best.model, best.ema)
    miniatures.tree(Path("tree"), OTHER_TASK)
    # At learning rate 0 the weights after a step are those before it.
    other = ["--dataset", "folder", "--data_dir", "tree", "--model_type", "ViT-Nano_2", "--img_size", "8x12", "--pretrained_dir",
             "output/r", "--recipe", "digits"]
    assert run_train(*other, "--learning_rate", 0, "--num_steps", 1, "--name", "s") == 0
    assert "resized" in capsys.readouterr().out
    model, new = state_of("output/s").model, {"head.weight", "head.bias", "pos_embed"}
    assert changed(*({name: value for name, value in some.items() if name not in new} for some in (best.ema, model))) == set()
    assert model["head.weight"].shape == (3, 64) and not model["head.weight"].any() and not model["head.bias"].any()
    assert model["pos_embed"].shape == (1, 1 + 4 * 6, 64) and best.ema["pos_embed"].shape == (1, 17, 64)
    assert torch.equal(model["pos_embed"][:, 0], best.ema["pos_embed"][:, 0])
    assert state_of("output/s").classes == ["ant", "bee", "cat"]


# ---------------------------------------------------------------------------------------------------- distillation

STUDENT = ["--model_type", "DeiT-Ti_16-distilled", "--patch_size", 8, "--img_size", 8, "--hidden_size", 48, "--num_heads", 3,
           "--num_layers", 1, "--mlp_dim", 96, "--learning_rate", 1e-2, "--warmup_steps", 4, "--train_batch_size", 64]


def test_a_distilled_student_learns_from_its_teacher(run_train):
    assert run_train("--num_steps", 12, "--train_batch_size", 64, "--learning_rate", 3e-3, "--pretrained_dir", LETTERS,
                     "--eval_every", 12, "--name", "teacher") == 0
    teacher = Path("output/teacher")
    before = {path: path.read_bytes() for path in teacher.iterdir() if path.is_file()}
    assert run_train(*STUDENT, "--distillation", "hard", "--teacher", teacher, "--num_steps", 60, "--eval_every", 60, "--name",
                     "r") == 0
    state, losses = state_of("output/r"), [event["loss"] for event in events_of("output/r", ("train",))]
    assert losses[0] == pytest.approx(math.log(10), rel=1e-4)              # both heads start at zero
    assert np.mean(losses[-5:]) < 1
    for name in ("head", "head_dist"):
        assert state.model[f"{name}.weight"].norm() > 0.1
    assert not torch.equal(state.model["head.weight"], state.model["head_dist.weight"])
    student, other = load_model(Path("output/r/step-00000060.pt")), load_model(teacher / "best.pt")
    images = torch.from_numpy(digits("").test.images)[:, None].expand(-1, 3, -1, -1)
    inputs = (normalize(images, model.config.mean, model.config.std) for model in (student, other))
    with torch.no_grad():
        answers = student.head_dist(student.forward_features(next(inputs))[:, 1]).argmax(dim=1)
        assert (answers == other(next(inputs)).argmax(dim=1)).float().mean() > 0.6
    assert before == {path: path.read_bytes() for path in teacher.iterdir() if path.is_file()}


def test_inputs_and_outputs_of_the_teacher(run_train):
    """The teacher gets the student's mixed images in its own size, colors and normalization, and runs without dropout."""
    teachers = {"color": ["--dropout_rate", 0.5, "--ema_decay", 0.5], "gray": ["--in_channels", 1, "--model_type", "DeiT-Ti_16"]}
    fed, seen = [], []                   # the student's inputs; the teacher's inputs and answers

    def listen(module, inputs, output):
        if getattr(module, "img_size", None) == (8, 8):
            assert not module.training and not inputs[0].requires_grad and not output.requires_grad
            seen.append((inputs[0], output))
        elif hasattr(module, "patch_embed") and module.training:
            fed.append(inputs[0])

    for name, flags in teachers.items():
        assert run_train(*TINY, *flags, "--patch_size", 4, "--img_size", 8, "--learning_rate", 0.01, "--name", name) == 0
        fed.clear()
        seen.clear()
        hook = torch.nn.modules.module.register_module_forward_hook(listen)
        try:
            assert run_train("--model_type", "ViT-Nano_2", "--img_size", 12, "--in_channels", 1, "--mixup_alpha", 1,
                             "--distillation", "soft", "--teacher", f"output/{name}", "--precision", "fp32", "--name",
                             f"of_{name}") == 0
        finally:
            hook.remove()
        model, student = load_model(f"output/{name}/best.pt").eval(), load_model(f"output/of_{name}/best.pt").config
        mean, std = (torch.tensor(values)[:, None, None] for values in (model.config.mean, model.config.std))
        assert len(fed) == len(seen) == 4 and len({output.sum().item() for _, output in seen}) == 4
        for images, (_, logits) in zip(fed, seen):
            small = F.interpolate((images * student.std[0] + student.mean[0]), (8, 8), mode="bilinear", antialias=True)
            with torch.no_grad():
                expected = model((small.expand(-1, len(mean), -1, -1) - mean) / std)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert differences(state_of("output/of_gray").model, state_of("output/of_color").model)
