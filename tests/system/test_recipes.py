"""Every recipe from the script, and what the knobs of fine-tuning do to the weights of whole runs."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import miniatures
import numpy as np
import pytest
import torch

import configs
import train
from models import create_model, load_model, save_npz
from utils.data.datasets import digits
from utils.data.transforms import normalise
from utils.run import checkpoint
from utils.training.criterion import Criterion

LETTERS = str(Path(__file__).parents[2] / "assets" / "ViT-Nano_2-letters.npz")
ROOT = Path(__file__).resolve().parents[2]


def events_of(folder, kind="train") -> list[dict]:
    events = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == kind]


def state_of(folder) -> checkpoint.RunState:
    return checkpoint.load(checkpoint.step_files(Path(folder))[0])


# ------------------------------------------------------------------------------------- every recipe from the script

# Recipes whose model takes too long on a CPU keep their family and lose their size.
SMALL = {"img_size": 32, "hidden_size": 48, "num_heads": 3, "num_layers": 2, "mlp_dim": 96}
# The flags that are given; the data are those of the recipe, or else a folder with class folders.
GIVEN = {
    "vit-paper": {"model_type": "ViT-Nano_2"},
    "digits": {"dataset": "digits"},
    "bit-hyperrule": {"model_type": "ViT-Nano_2"},
    "augreg": {"model_type": "ViT-Nano_2", "pretrained_dir": LETTERS},
    "deit": SMALL, "deit-384": SMALL, "cait": SMALL, "mae": SMALL, "cub-vit-s": SMALL,
    "scratch-small": {},
    "mnist-scratch": {},
    "linear-probe": {"model_type": "ViT-Nano_2"},
}
LENGTHS = {"num_steps", "num_epochs", "warmup_steps", "warmup_epochs", "decay_milestones", "train_batch_size"}
MAKERS = {"mnist": miniatures.mnist, "cub200": miniatures.cub}


def test_every_recipe_is_run():
    assert set(GIVEN) == set(configs.RECIPES)


def printed_settings(said: str) -> dict:
    block = re.search(r"^settings:\n((?:  .*\n)+)", said, re.MULTILINE)[1]
    return {name: default for name, (_, default, _) in configs.FLAGS.items()} | configs.parse(shlex.split(block))


BY_SCRIPT = ("vit-paper", "deit")          # the others in this process, which spares each the start of two


@pytest.mark.slow
@pytest.mark.parametrize("recipe", configs.RECIPES)
def test_a_recipe_runs(run_script, tmp_path, monkeypatch, capsys, recipe):
    row = configs.RECIPES[recipe]
    given = {"train_batch_size": 8, "num_steps": 3, "num_workers": 0, **({} if "eval_every" in row else {"eval_every": 3})}
    given |= GIVEN[recipe]
    if given.get("dataset") != "digits":
        given["data_dir"] = str(tmp_path / "data")
        if row.get("dataset") in MAKERS:
            MAKERS[row["dataset"]](tmp_path / "data")
        else:
            given["dataset"] = "folder"
            miniatures.tree(tmp_path / "data", {"train/ant": 6, "train/bee": 5, "val/ant": 2, "val/bee": 2})
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    if recipe in BY_SCRIPT:
        done = run_script("train.sh", *flags, RECIPE=recipe, NAME="r", OMP_NUM_THREADS="1")
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
        said = done.stdout
    else:
        monkeypatch.chdir(tmp_path)
        assert train.main(["--recipe", recipe, "--name", "r", "--device", "cpu", *flags]) == 0
        said = capsys.readouterr().out

    losses = [event["loss"] for event in events_of(tmp_path / "output/r")]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    saved = json.loads((tmp_path / "output/r/config.json").read_text())
    printed = printed_settings(said)
    for settings in (saved["config"], printed):
        assert {name: settings[name] for name in given} == given
        own = {name: value for name, value in row.items() if name not in {*given, *LENGTHS}}
        if any(name in given for name in configs.SIZES):
            own.pop("pretrained_dir", None)
            assert settings["pretrained_dir"] == "none"
        assert len(own) >= 6 and {name: settings[name] for name in own} == own
    kept = [name for name in configs.MODEL_KEYS if name in row and name not in given]
    assert {name: saved["architecture"][name] for name in kept} == {name: row[name] for name in kept}


def test_mnist_scratch_on_grey_images(run_train, capsys):
    """The recipe's own model, from packed idx files to a checkpoint of one channel, and evaluated from there."""
    miniatures.mnist(Path("data/MNIST/raw"), ".gz")
    assert run_train("--recipe", "mnist-scratch", "--num_epochs", 2, "--train_batch_size", 10, "--num_workers", 1, "--name", "r",
                     "--eval_every", 6) == 0
    assert "length: 2 epochs of 30 images = 6 steps of 10" in capsys.readouterr().out
    model = load_model(Path("output/r/best.pt"))
    assert model.patch_embed.proj.weight.shape == (64, 1, 7, 7) and model.img_size == (28, 28)
    assert len(model.blocks) == 6 and model.config.num_heads == 8 and model.classes == list("0123456789")
    assert {event["lr"] for event in events_of("output/r")} == {3e-3}
    after = events_of("output/r", "eval")[-1]
    assert run_train("--eval_only", "--resume_path", "output/r") == 0
    assert f"loss {after['loss']:.4f} (20 images)" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- what is left alone

START = ["--pretrained_dir", "start.npz", "--model_type", "ViT-Nano_2"]


@pytest.fixture
def start(run_train):
    """The weights a run begins with: a file with random values everywhere, without its head"""
    torch.manual_seed(5)
    model = create_model("ViT-Nano_2", 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_npz(model, "start.npz")
    return create_model("ViT-Nano_2", 10, pretrained="start.npz").state_dict()


def changed(before, after) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


HEAD = {"head.weight", "head.bias"}


def of_block(number: int) -> set[str]:
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    return {f"blocks.{number}.{part}.{kind}" for part in parts for kind in ("weight", "bias")}


NORM = {"norm.weight", "norm.bias"}
PATCHES = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
ALL = HEAD | NORM | PATCHES | {"cls_token", "pos_embed"} | of_block(0) | of_block(1) | of_block(2) | of_block(3)
TRAINED = {
    "everything": ([], ALL),
    "the head": (["--train_layers", "head"], HEAD),
    "the last block": (["--train_layers", 1], HEAD | NORM | of_block(3)),
    "the last two blocks": (["--train_layers", 2], HEAD | NORM | of_block(2) | of_block(3)),
    "all but the embeddings": (["--freeze", "patch_embed.*,pos_embed,cls_token"], ALL - PATCHES - {"pos_embed", "cls_token"}),
    "all but attention": (["--freeze", "*.attn.*"], {name for name in ALL if ".attn." not in name}),
    "the last two blocks without norms": (
        ["--train_layers", 2, "--freeze", "*norm*"],
        {name for name in HEAD | of_block(2) | of_block(3) if "norm" not in name}),
}


@pytest.mark.parametrize("case", TRAINED)
def test_what_is_frozen_stays_bit_for_bit(run_train, start, case):
    """With weight decay, which would move a parameter without gradient, and an average beside the weights."""
    flags, expected = TRAINED[case]
    assert run_train(*START, *flags, "--weight_decay", 0.1, "--ema_decay", 0.5, "--warmup_steps", 0, "--learning_rate", 0.01,
                     "--name", "r") == 0
    state = state_of("output/r")
    assert changed(start, state.model) == expected
    # Averages of equal numbers: equal but for rounding.
    for name in ALL - expected:
        torch.testing.assert_close(state.ema[name], start[name], rtol=1e-6, atol=0)


def test_the_linear_probe_moves_the_head_alone(run_train, start, capsys):
    assert run_train(*START, "--recipe", "linear-probe", "--learning_rate", 0.05, "--name", "r", "--num_steps", 8) == 0
    assert f"training 650 parameters; frozen: {len(ALL - HEAD)} arrays" in capsys.readouterr().out
    state = state_of("output/r")
    assert changed(start, state.model) == HEAD
    assert sum(len(group["params"]) for group in state.optimizer["param_groups"]) == 2


def test_a_pattern_that_fits_nothing_is_told(run_train, capsys):
    assert run_train("--freeze", "pos_embed,block.*") == 2
    said = capsys.readouterr().err
    assert "'block.*'" in said and said.count("\n") == 1


# ------------------------------------------------------------------------------------------ learning rates by layer


def updates_of(run_train, start, steps, *flags) -> dict[str, torch.Tensor]:
    """What so many steps of SGD of rate 0.5 add to the weights"""
    name = f"r{len(list(Path('output').glob('*')))}"
    assert run_train(*START, *flags, "--precision", "fp32", "--optimizer", "sgd", "--learning_rate", 0.5, "--name", name,
                     "--min_learning_rate", 0.5, "--warmup_steps", 0, "--num_steps", steps, "--max_grad_norm", 0) == 0
    model = state_of(f"output/{name}").model
    return {key: model[key].double() - start[key].double() for key in model}


def test_layer_decay_scales_the_updates(run_train, start):
    """The head starts at zero: only at the second step has anything else a gradient, its first."""
    plain, decayed = (updates_of(run_train, start, 2, *flags) for flags in ([], ["--layer_decay", 0.5]))
    expected = dict.fromkeys(PATCHES | {"cls_token", "pos_embed"}, 1 / 32)
    expected |= {name: 0.5 ** (4 - block) for block in range(4) for name in of_block(block)}
    expected |= dict.fromkeys(NORM | HEAD, 1.0)
    assert expected.keys() == plain.keys()
    for name, scale in expected.items():
        assert (decayed[name].norm() / plain[name].norm()).item() == pytest.approx(scale, rel=1e-3), name
        torch.testing.assert_close(decayed[name], plain[name] * scale, rtol=0, atol=2e-7)     # of rounding w - lr g


def test_the_head_may_have_its_own_learning_rate(run_train, start):
    """At the first step the gradients are the same; a step later they are not."""
    updates = {}
    for rate in (None, 0.125, 1.0, 0.0):
        own = [] if rate is None else ["--head_learning_rate", rate]
        updates[rate] = updates_of(run_train, start, 1, *own)
    for rate in (0.125, 1.0):
        for name in HEAD:
            torch.testing.assert_close(updates[rate][name], updates[None][name] * (rate / 0.5), rtol=0, atol=2e-7)
    assert updates[None]["head.weight"].norm() > 0.01 and not updates[0.0]["head.weight"].any()
    events = events_of("output/r1")
    assert events[0]["lr"] == pytest.approx(events_of("output/r0")[0]["lr"])        # what is logged is that of the rest


# --------------------------------------------------------------------------------------------------------- resume


@pytest.fixture
def teacher(run_train) -> str:
    assert run_train("--num_steps", 12, "--train_batch_size", 64, "--learning_rate", 3e-3, "--pretrained_dir", ROOT / LETTERS,
                     "--eval_every", 12, "--name", "teacher") == 0
    return "output/teacher"


AUGMENTED = ["--augmentation", "crop", "--crop_scale", 0.3, "--rotation", 10, "--color_jitter", 0.2, "--randaugment_ops", 2,
             "--random_erasing", 0.5]
REGULARISED = ["--mixup_alpha", 0.8, "--cutmix_alpha", 1, "--mix_off_steps", 2, "--label_smoothing", 0.1, "--drop_path_rate", 0.3,
               "--dropout_rate", 0.1, "--ema_decay", 0.9, "--layer_decay", 0.8, "--weight_decay", 0.05, "--decay_on", "matrices"]
RESUMED = {
    "a ViT": ["--model_type", "ViT-Nano_2", "--distillation", "soft", "--distillation_temperature", 2],
    "a distilled DeiT, workers, accumulation": [
        "--model_type", "DeiT-Ti_16-distilled", "--patch_size", 4, "--img_size", 8, "--hidden_size", 48, "--num_heads", 3,
        "--num_layers", 2, "--mlp_dim", 96, "--distillation", "hard", "--num_workers", 2, "--gradient_accumulation_steps", 2],
    "SGD in bfloat16, frozen embeddings": [
        "--model_type", "ViT-Nano_2", "--distillation", "hard", "--optimizer", "sgd", "--precision", "bf16", "--freeze",
        "pos_embed,patch_embed.*", "--class_weights", "balanced"],
}


@pytest.mark.parametrize("case", RESUMED)
def test_resume_is_exact_with_everything_on(run_train, teacher, monkeypatch, case):
    """6 + 6 steps equal 12 bit for bit: weights, average, optimizer, events, best checkpoint."""
    flags = ["--num_steps", 12, "--eval_every", 6, "--warmup_steps", 2, "--teacher", teacher, *AUGMENTED, *REGULARISED,
             *RESUMED[case], "--name", "r"]
    assert run_train(*flags, "--output_dir", "whole") == 0
    real_save = checkpoint.save

    def save_and_die(path, state):
        real_save(path, state)
        if path.name == "step-00000006.pt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run_train(*flags, "--output_dir", "parts")
    assert run_train("--resume_path", "parts/r") == 0
    for file in ("step-00000012.pt", "best.pt"):
        whole, parts = (checkpoint.load(Path(folder) / "r" / file) for folder in ("whole", "parts"))
        assert changed(whole.model, parts.model) == changed(whole.ema, parts.ema) == set()
        for name in ("step", "updates", "skips", "best", "first", "scaler", "classes"):
            assert getattr(whole, name) == getattr(parts, name), name
        assert len(whole.optimizer["param_groups"]) > 2
        assert whole.optimizer["param_groups"] == parts.optimizer["param_groups"]
        for key, slots in whole.optimizer["state"].items():
            assert all(torch.equal(value, parts.optimizer["state"][key][slot]) for slot, value in slots.items())
    clock = ("images_per_second", "seconds", "data_wait")
    for kind in ("train", "eval"):
        whole, parts = ([{key: value for key, value in event.items() if key not in clock} for event in events_of(folder, kind)]
                        for folder in ("whole/r", "parts/r"))
        assert whole == parts and len(whole) >= 4
    assert changed(state_of("whole/r").ema, state_of("whole/r").model)


# --------------------------------------------------------------------------------------------------------- length


@pytest.mark.parametrize(("flags", "said", "steps"), [
    (["--num_epochs", 0.1], "length: 0.1 epochs of 1097 images = 7 steps of 16", 7),
    (["--num_epochs", 0.1, "--train_batch_size", 32], "length: 0.1 epochs of 1097 images = 3 steps of 32", 3),
    (["--num_epochs", 0.001], "length: 0.001 epochs of 1097 images = 1 steps of 16", 1)])
def test_epochs_become_steps_that_are_told(run_train, capsys, flags, said, steps):
    assert run_train(*flags, "--name", "r") == 0
    assert said in capsys.readouterr().out and len(events_of("output/r")) == steps == state_of("output/r").step
    assert state_of("output/r").config["num_steps"] == steps


def test_warm_up_in_epochs(run_train):
    assert run_train("--num_epochs", 0.15, "--warmup_epochs", 0.06, "--learning_rate", 0.01, "--name", "r") == 0
    rates = [event["lr"] for event in events_of("output/r")]        # 10 steps of 16 of 1,097 images, 4 of them to warm up
    assert len(rates) == 10 and rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01]) and rates[4] < 0.01


# ------------------------------------------------------------------------------------- from one task to the next


def make_other_task(root: Path) -> str:
    return miniatures.tree(root, {"train/ant": 6, "train/bee": 5, "train/cat": 5, "val/ant": 2, "val/bee": 2, "val/cat": 2})


@pytest.mark.parametrize("averaged", [False, True])
def test_a_run_is_the_start_of_another_task(run_train, capsys, averaged):
    """Other classes, another image size; the best checkpoint, and of it the average where there is one."""
    flags = ["--ema_decay", 0.5] if averaged else []
    assert run_train("--num_steps", 6, "--eval_every", 3, "--learning_rate", 0.01, "--name", "r", *flags) == 0
    shutil.copy("output/r/step-00000003.pt", "output/r/best.pt")           # not the newest
    best = checkpoint.load(Path("output/r/best.pt"))
    expected = best.ema if averaged else best.model
    assert changed(best.model, state_of("output/r").model) and (not averaged or changed(best.model, best.ema))
    make_other_task(Path("tree"))
    # At learning rate 0 the weights after a step are those before it.
    other = ["--dataset", "folder", "--data_dir", "tree", "--model_type", "ViT-Nano_2", "--img_size", "8x12", "--pretrained_dir",
             "output/r", "--recipe", "digits"]
    assert run_train(*other, "--learning_rate", 0, "--num_steps", 1, "--name", "s") == 0
    assert "resized" in capsys.readouterr().out
    model = state_of("output/s").model
    assert changed({name: value for name, value in expected.items() if name not in HEAD | {"pos_embed"}},
                   {name: value for name, value in model.items() if name not in HEAD | {"pos_embed"}}) == set()
    assert model["head.weight"].shape == (3, 64) and not model["head.weight"].any() and not model["head.bias"].any()
    assert model["pos_embed"].shape == (1, 1 + 4 * 6, 64) and expected["pos_embed"].shape == (1, 17, 64)
    torch.testing.assert_close(model["pos_embed"][:, 0], expected["pos_embed"][:, 0], rtol=0, atol=0)
    assert run_train(*other, "--name", "t") == 0 and state_of("output/t").classes == ["ant", "bee", "cat"]


def test_a_grey_student_of_a_colour_run(run_train):
    """Weights are summed over the colours: the grey model gives what the colour model gives for grey images."""
    assert run_train("--num_steps", 4, "--learning_rate", 0.01, "--name", "r") == 0
    flags = ["--pretrained_dir", "output/r", "--in_channels", 1, "--learning_rate", 0, "--num_steps", 1]
    assert run_train(*flags, "--name", "s") == 0
    colour, grey = checkpoint.load(Path("output/r/best.pt")).model, state_of("output/s").model
    torch.testing.assert_close(grey["patch_embed.proj.weight"], colour["patch_embed.proj.weight"].sum(1, keepdim=True))


# ---------------------------------------------------------------------------------------------------- distillation

STUDENT = ["--model_type", "DeiT-Ti_16-distilled", "--patch_size", 8, "--img_size", 8, "--hidden_size", 48, "--num_heads", 3,
           "--num_layers", 1, "--mlp_dim", 96, "--learning_rate", 1e-2, "--warmup_steps", 4, "--train_batch_size", 64]


def test_a_distilled_student_learns_from_its_teacher(run_train, teacher):
    before = {path: path.read_bytes() for path in Path(teacher).iterdir() if path.is_file()}
    assert run_train(*STUDENT, "--distillation", "hard", "--teacher", teacher, "--num_steps", 60, "--eval_every", 60, "--name",
                     "r") == 0
    state, losses = state_of("output/r"), [event["loss"] for event in events_of("output/r")]
    assert losses[0] == pytest.approx(math.log(10), rel=1e-4)              # both heads start at zero
    assert np.mean(losses[-5:]) < 1
    for name in ("head", "head_dist"):
        assert state.model[f"{name}.weight"].norm() > 0.1
    assert not torch.equal(state.model["head.weight"], state.model["head_dist.weight"])
    student, taught_by = load_model(Path("output/r/step-00000060.pt")), load_model(Path(teacher) / "best.pt")
    images = torch.from_numpy(digits("").test.images)[:, None].expand(-1, 3, -1, -1)
    own, other = (normalise(images, model.config.mean, model.config.std) for model in (student, taught_by))
    with torch.no_grad():
        said = student.head_dist(student.forward_features(own)[:, 1]).argmax(dim=1)
        assert (said == taught_by(other).argmax(dim=1)).float().mean() > 0.6
    assert before == {path: path.read_bytes() for path in Path(teacher).iterdir() if path.is_file()}


@pytest.mark.parametrize(("alpha", "moves", "stays"), [(0.0, "head", "head_dist"), (1.0, "head_dist", "head")])
def test_the_share_of_the_teacher(run_train, teacher, alpha, moves, stays):
    """With all of the loss one side's, the other head has no gradient and stays at zero."""
    assert run_train(*STUDENT, "--distillation", "hard", "--teacher", teacher, "--distillation_alpha", alpha, "--name", "r") == 0
    model = state_of("output/r").model
    assert model[f"{moves}.weight"].norm() > 0.01 and not model[f"{stays}.weight"].any() and not model[f"{stays}.bias"].any()


def test_what_the_teacher_sees_and_says(run_train, monkeypatch):
    """The student's mixed images, resized, in the teacher's colours and normalised as it is used to; without its dropout."""
    teachers = {"colour": ["--dropout_rate", 0.5, "--ema_decay", 0.5],
                "grey": ["--in_channels", 1, "--model_type", "DeiT-Ti_16", "--num_layers", 1]}
    for name, flags in teachers.items():
        assert run_train(*flags, "--patch_size", 4, "--img_size", 8, "--learning_rate", 0.01, "--name", name) == 0
    taught, real = [], Criterion.loss

    def listen(self, logits, targets, images):
        taught.append((images, self.teacher(images)))
        return real(self, logits, targets, images)

    monkeypatch.setattr(Criterion, "loss", listen)
    for name in teachers:
        taught.clear()
        assert run_train("--model_type", "ViT-Nano_2", "--img_size", 12, "--in_channels", 1, "--mixup_alpha", 1, "--distillation",
                         "soft", "--teacher", f"output/{name}", "--precision", "fp32", "--name", f"of_{name}") == 0
        model = load_model(f"output/{name}/best.pt").eval()
        for images, logits in taught:
            assert images.shape == (16, 1, 12, 12) and not images.requires_grad and not logits.requires_grad
            small = torch.nn.functional.interpolate(images.float(), (8, 8), mode="bilinear", antialias=True)
            mean, std = (torch.tensor(values)[:, None, None] for values in (model.config.mean, model.config.std))
            with torch.no_grad():
                expected = model((small.expand(-1, len(mean), -1, -1) / 255 - mean) / std)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert len(taught) == 4 and len({logits.sum().item() for _, logits in taught}) == 4


def test_a_teacher_that_cannot_be_is_told(run_train, teacher, capsys):
    make_other_task(Path("tree"))
    shutil.copytree(teacher, "empty", ignore=shutil.ignore_patterns("*.pt"))
    Path("page.pt").write_text("<html>404</html>" * 100)
    assert run_train("--name", "grey", "--in_channels", 1) == 0
    hard = ["--model_type", "ViT-Nano_2", "--distillation", "hard", "--teacher"]
    for flags, words in (([*hard, "no/such"], "no/such"), ([*hard, "empty"], "no intact checkpoint"),
                         ([*hard, "page.pt"], "page.pt"), ([*hard, "output/grey"], "takes grey images"),
                         ([*hard, teacher, "--dataset", "folder", "--data_dir", "tree"], "not the same task")):
        capsys.readouterr()
        assert run_train(*flags, "--name", "r") == 2, flags
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
    assert not Path("output/r").exists()
