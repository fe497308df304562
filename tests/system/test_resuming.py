"""docs/reliability.md: what a resumed run may change, how runs are gone on with, and who writes. Whole runs of train.py."""

import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import rig
from runs import differences, events_of, make_tree, state_of

from utils.config.flags import FIXED, FLAGS, OVERRIDE
from utils.data import workers
from utils.run import checkpoint

CHANGES = ("P18", "what a resumed run may change, and what it may not without --override")
WAYS = ("P19", "a finished run that is resumed trains nothing; nothing is ever silently begun anew")
WRITERS = ("P21", "only process 0 writes")
PARTS = ("model", "ema", "optimizer", "step", "updates")
# As the rig's runs, so that everything is on that a flag could change; 4 of 8 steps are done.
BEGUN = [
    "--num_steps=8", "--save_every=4", "--eval_every=4", "--warmup_steps=2", "--optimizer=adamw", "--learning_rate=1e-3",
    "--weight_decay=0.05", "--dropout_rate=0.1", "--ema_decay=0.9", "--augmentation=crop", "--randaugment_ops=1",
    "--random_erasing=0.3", "--mixup_alpha=0.8", "--cutmix_alpha=1", "--label_smoothing=0.1", "--max_grad_norm=1",
    "--gradient_accumulation_steps=2", "--name=r"]
RESUMED = ["--resume_path", "output/r"]
KEPT: dict[str, Path] = {}      # runs that were made once, by their flags


@pytest.fixture
def begun(run_train, tmp_path_factory):
    """begun(*flags) -> output/r holds a run that was killed after step 4 of 8; its whole is in whole/r. Made once."""
    def make(*flags) -> None:
        key = " ".join(map(str, flags))
        if key not in KEPT:
            assert run_train(*BEGUN, *flags, "--output_dir", "whole") == 0
            shutil.copytree("whole", "output")
            for file in ("step-00000008.pt", "best.pt", "curves.png"):
                Path("output/r", file).unlink()
            KEPT[key] = tmp_path_factory.mktemp("begun") / "kept"
            shutil.copytree(".", KEPT[key])
        else:
            shutil.copytree(KEPT[key], ".", dirs_exist_ok=True)
    return make


def content(*folders: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for folder in folders for path in Path(folder).rglob("*")}


def end(folder: str = "output/r") -> dict:
    """What was learnt, and what was evaluated."""
    state = vars(state_of(folder))
    return {part: state[part] for part in PARTS} | {"evaluations": events_of(folder, ("eval",))[-1]}


def refusal(run_train, capsys, *flags) -> str:
    """The one line of a start that ends with code 2 and leaves everything as it was."""
    before = content("output")
    capsys.readouterr()
    assert run_train(*RESUMED, *flags) == 2, flags
    said = capsys.readouterr()
    assert said.err.startswith("train.py: error: ") and said.err.count("\n") == 1, said
    assert content("output") == before and not Path("logs/r/changed").exists()
    return said.err


# ----------------------------------------------------------------------------------------------- P18: changed settings

def runs_on_workers(monkeypatch):
    counts, real = [], workers.DataLoader
    monkeypatch.setattr(workers, "DataLoader",
                        lambda *args, **more: counts.append(more["num_workers"]) or real(*args, **more))
    return lambda: set(counts) == {2}


# flag: (value, does it act?). None of them changes what is learnt.
TAKEN = {
    "num_workers": (2, None),
    "eval_every": (3, lambda: [event["step"] for event in events_of("output/r", ("eval",))][-3:] == [6, 8, 8]),
    "save_every": (3, lambda: {path.name for path in checkpoint.step_files(Path("output/r"))} == {
        "step-00000008.pt", "step-00000006.pt"}),
    "output_dir": ("elsewhere", lambda: state_of("elsewhere/r").step == 8 and state_of("output/r").step == 4),
    "gradient_accumulation_steps": (1, None),
    "keep_checkpoints": (1, lambda: len(checkpoint.step_files(Path("output/r"))) == 1),
    "log_dir": ("board", lambda: list(Path("board/r").iterdir())),
}
WAS = {"num_workers": None, "eval_every": 4, "save_every": 4, "output_dir": "whole", "gradient_accumulation_steps": 2,
       "keep_checkpoints": 2, "log_dir": "logs"}


@pytest.mark.contract(*CHANGES)
def test_what_may_change_is_taken(run_train, begun, capsys, monkeypatch, tries, figure):
    """To the same end, bit for bit; but other micro-batches are other sums and other draws."""
    chosen = list(TAKEN)[:tries(5, 7)]
    for flag in chosen:
        begun()
        value, acts = TAKEN[flag]
        if flag == "num_workers":
            acts = runs_on_workers(monkeypatch)
        capsys.readouterr()
        assert run_train(*RESUMED, f"--{flag}", value) == 0
        said = capsys.readouterr().out.splitlines()
        changes = [line for line in said if line.startswith("changed: ")]
        assert changes == [f"changed: --{flag} {value} (was {WAS[flag]})"]
        folder = "elsewhere/r" if flag == "output_dir" else "output/r"
        same = not differences(end(folder), end("whole/r"))
        assert same == (flag != "gradient_accumulation_steps"), flag
        assert acts is None or acts(), flag
        for place in ("output", "whole", "elsewhere", "logs", "board"):
            shutil.rmtree(place, ignore_errors=True)
    figure("settings that a resumed run may change", len(chosen))


@pytest.mark.contract(*CHANGES)
def test_more_steps_lay_the_schedule_anew(run_train, begun, capsys, figure):
    begun()
    assert run_train(*RESUMED, "--num_steps", 12) == 0
    said = "changed: --num_steps 12 (was 8); the learning-rate schedule is recomputed for the new length"
    assert said in capsys.readouterr().out.splitlines()
    rates = {event["step"]: event["lr"] for event in events_of("output/r", ("train",))}
    for step in range(3, 13):
        total = 8 if step <= 4 else 12
        cosine = 1e-3 * 0.5 * (1 + math.cos(math.pi * (step - 2) / (total - 2)))
        assert rates[step] == pytest.approx(cosine, abs=1e-12), step
    assert state_of("output/r").step == 12
    assert "is at step 12 already" in refusal(run_train, capsys, "--num_steps", 6)
    figure("settings that a resumed run may change", 1)


@pytest.mark.contract(*CHANGES)
def test_another_number_of_processes_keeps_the_micro_batches(tmp_path, figure):
    flags = ("--num_steps", 5, "--num_workers", 0)
    assert rig.wait(rig.start(tmp_path, *flags, "--gradient_accumulation_steps", 2, before=rig.stopping_after(3))) == [143]
    assert rig.wait(rig.start(tmp_path, *flags, ranks=2)) == [0, 0]
    said = (tmp_path / "out.txt").read_text()
    assert "changed: 2 processes (were 1), 1 micro-steps each (were 2)\n" in said, said
    assert {event["world_size"] for event in rig.events(tmp_path) if event["event"] == "resume"} == {2}
    assert rig.newest(tmp_path) == 5
    figure("settings that a resumed run may change", 1)


# A value of each flag that a resumed run must not change (without --override), other than that of BEGUN.
REFUSED = {
    "dataset": "cifar10", "val_fraction": 0.3, "test_fraction": 0.3, "split_seed": 3, "recipe": "vit-paper",
    "model_type": "ViT-B_16", "img_size": 16, "patch_size": 4, "hidden_size": 32, "mlp_dim": 32, "num_heads": 2, "num_layers": 2,
    "in_channels": 1,
    "classifier": "gap", "sigmoid_attention": "last", "head": "keep", "optimizer": "sgd", "momentum": 0.5,
    "head_learning_rate": 0.1, "layer_decay": 0.5, "weight_decay": 0.5, "decay_on": "matrices", "train_layers": "head",
    "freeze": "pos*", "ema_decay": 0.5, "dropout_rate": 0.5, "attention_dropout_rate": 0.5, "drop_path_rate": 0.5,
    "distillation": "soft"}
# A value of each that --override lets change, with what it needs beside it.
OVERRIDDEN = {
    "seed": [3], "train_batch_size": [32], "learning_rate": [0.01], "decay_type": ["linear"], "precision": ["fp16"],
    "exact": [], "min_learning_rate": [5e-4], "warmup_learning_rate": [5e-4, "--warmup_steps", 7], "warmup_steps": [7],
    "warmup_epochs": [0.1], "decay_milestones": ["5,6", "--decay_type", "step"], "max_grad_norm": [0.001, "--learning_rate", 0.1],
    "label_smoothing": [0.5], "class_weights": ["1,2,1,2,1,2,1,2,1,2"], "augmentation": ["none"], "crop_scale": [0.9],
    "crop_padding": [2, "--augmentation", "pad"], "rotation": [40], "color_jitter": [0.5], "randaugment_ops": [0],
    "randaugment_magnitude": [1], "random_erasing": [0], "mixup_alpha": [0], "cutmix_alpha": [0], "mix_probability": [0.1],
    "mix_switch_probability": [0.1], "mix_off_steps": [4], "interpolation": ["bicubic"], "eval_crop": [0.5], "fp16": [],
    "fp16_opt_level": ["O1", "--fp16"], "loss_scale": [64, "--fp16", "--fp16_opt_level", "O1"]}
# These three act in a run with a teacher or edits alone; tests/config/test_configs.py has them.
ELSEWHERE = {"distillation_alpha", "distillation_temperature", "attention_loss_weight"}
# Tried at small counts; tests/config/test_configs.py goes through all flags without a run.
NAMED = ("seed", "train_batch_size", "learning_rate", "decay_type", "precision", "model_type", "weight_decay", "dataset")


def typed(flag: str, values) -> list:
    return [f"--{flag}", *values]


def test_no_flag_is_left_out():
    assert set(REFUSED) == {row.name for row in FLAGS.values() if row.on_resume == FIXED}
    assert set(OVERRIDDEN) | ELSEWHERE == {row.name for row in FLAGS.values() if row.on_resume == OVERRIDE}


@pytest.mark.contract(*CHANGES)
def test_what_must_not_change_is_refused(run_train, begun, capsys, tries, figure):
    """In one line that names the flag, and --override where that would take it."""
    begun()
    chosen = NAMED if tries(1, 2) == 1 else [*REFUSED, *OVERRIDDEN]
    for flag in chosen:
        for also in ([], ["--override"]) if flag in REFUSED else ():
            said = refusal(run_train, capsys, f"--{flag}", REFUSED[flag], *also)
            assert f"--{flag} {REFUSED[flag]}: the checkpoint was made with " in said and "--override" not in said, said
        if flag in REFUSED:
            continue
        values = OVERRIDDEN[flag]
        said = refusal(run_train, capsys, *typed(flag, values[:1]))
        named = {"warmup_epochs": "warmup_steps", "fp16": "precision"}.get(flag, flag)
        assert f"--{named} " in said and "the checkpoint was made with " in said and "add --override" in said, said
    figure("settings that are refused without --override, or at all", len(chosen))


@pytest.mark.contract(*CHANGES)
def test_what_override_lets_change(run_train, begun, capsys, tries, figure):
    """It is said, it acts (other weights, or another evaluation), and the steps before stay."""
    chosen = [flag for flag in OVERRIDDEN if flag in NAMED] if tries(1, 2) == 1 else list(OVERRIDDEN)
    for flag in chosen:
        begun()
        before = events_of("output/r", ("train",))[:4]
        capsys.readouterr()
        assert run_train(*RESUMED, "--override", *typed(flag, OVERRIDDEN[flag])) == 0, capsys.readouterr().err
        lines = capsys.readouterr().out.splitlines()
        said = [line for line in lines if line.startswith("changed: ")]
        chosen_as = next(line for line in lines if line.startswith("precision: "))
        assert ("as the run began" in chosen_as) == (flag not in ("precision", "fp16", "fp16_opt_level", "loss_scale"))
        told = {"warmup_epochs": "warmup_steps", "fp16": "precision"}.get(flag, flag)
        assert [line for line in said if line.startswith(f"changed: --{told} ")], (flag, said)
        assert state_of("output/r").step == 8 and events_of("output/r", ("train",))[:4] == before
        if flag == "exact":            # the sum of two micro-batches is the same in any order
            assert state_of("output/r").config["exact"] is True
        else:
            assert differences(end(), end("whole/r")), flag
        for place in ("output", "whole", "logs"):
            shutil.rmtree(place)
    figure("settings that --override changed", len(chosen))


@pytest.mark.contract(*CHANGES)
def test_exact_runs_keep_their_micro_batches(run_train, begun, capsys, figure):
    begun("--exact")
    said = refusal(run_train, capsys, "--gradient_accumulation_steps", 1)
    assert "--exact: the run has 2 micro-batches a step" in said and "GRAD_STEPS" in said
    assert run_train(*RESUMED) == 0 and not differences(end(), end("whole/r"))
    figure("settings that are refused without --override, or at all", 1)


def renamed(tree: Path) -> None:
    (tree / "train/bee/3.png").rename(tree / "train/bee/3-new.png")


def relabelled(tree: Path) -> None:
    (tree / "train/bee/3.png").rename(tree / "train/ant/12.png")


def grown(tree: Path) -> None:
    shutil.copy(tree / "train/bee/3.png", tree / "train/bee/4-new.png")


DATA = {"another name": (renamed, "labels or names"), "another label": (relabelled, "labels or names"),
        "one more": (grown, "the run has trained on 24 images, tree now holds 25")}


@pytest.mark.contract(*CHANGES)
def test_other_data_are_refused(run_train, capsys, figure):
    """Also where their number is the same. Data that have moved are the same data."""
    flags = ("--dataset", "folder", "--data_dir", "tree", "--model_type", "ViT-Nano_2", "--name", "r", "--num_steps", 4)
    tree = make_tree(Path("tree"), images=12)
    assert run_train(*flags) == 0
    shutil.copytree("tree", "kept")
    for case, (change, words) in DATA.items():
        change(tree)
        said = refusal(run_train, capsys, "--num_steps", 6)
        assert words in said and "add --override" in said, (case, said)
        if case == "another label":
            assert run_train(*RESUMED, "--num_steps", 6, "--override", "--name", "over") == 0
            assert f"warning: {words}" in capsys.readouterr().out and state_of("output/over").step == 6
        shutil.rmtree(tree)
        shutil.copytree("kept", "tree")
    (tree / "train/bee").rename(tree / "train/cow")
    (tree / "val/bee").rename(tree / "val/cow")
    assert "not the same task" in refusal(run_train, capsys, "--num_steps", 6, "--override")
    assert run_train(*RESUMED, "--num_steps", 6, "--data_dir", "kept") == 0
    assert "changed: --data_dir kept (was tree)" in capsys.readouterr().out
    figure("other data under a run that goes on", len(DATA) + 1)


# ---------------------------------------------------------------------------------------------- P19: ways of going on


@pytest.mark.contract(*WAYS)
def test_a_finished_run_trains_nothing_and_tells_its_result_again(run_train, begun, capsys, figure):
    assert run_train(*BEGUN) == 0
    result = [line for line in capsys.readouterr().out.splitlines() if "accuracy" in line and "after (" in line]
    files = {name: bytes_ for name, bytes_ in content("output").items() if name.endswith(".pt")}
    events = events_of("output/r")
    ways = [["output/r"], ["output/r/step-00000008.pt"], ["auto", "--name", "r"]]
    for way in ways:
        assert run_train("--resume_path", *way) == 0
        said = capsys.readouterr().out.splitlines()
        assert [line for line in said if "accuracy" in line and "after (" in line] == result and len(result) == 1
        assert "nothing is left to train: resume with a larger --num_steps (NUM_STEPS) to train on" in said
        assert not [line for line in said if line.startswith(("step ", "changed:"))]
        assert {name: bytes_ for name, bytes_ in content("output").items() if name.endswith(".pt")} == files
        assert events_of("output/r") == events and list(Path("output").iterdir()) == [Path("output/r")]
    figure("ways to resume a finished run", len(ways))


@pytest.mark.contract(*WAYS)
def test_a_way_that_leads_nowhere_makes_nothing(run_train, begun, capsys, figure):
    begun()
    Path("empty").mkdir()
    Path("page.pt").write_bytes(b"<html>404</html>" * 100)
    before = content(".")
    ways = {"output/none": "nothing to resume at output/none", "output/r/step-00000099.pt": "nothing to resume at",
            "empty": "no intact checkpoint", "page.pt": "not a checkpoint", "": "no intact checkpoint",
            "/dev/null": "nothing to resume", "auto": "RESUME_PATH=auto needs NAME"}
    for way, words in ways.items():
        for also in ([], ["--output_dir", "new"], ["--override"]):
            capsys.readouterr()
            assert run_train("--resume_path", way, *also) == 2, way
            said = capsys.readouterr().err
            assert words in said and said.count("\n") == 1, (way, said)
            assert content(".") == before, way
    figure("ways that lead to no run", 3 * len(ways))


@pytest.mark.contract(*WAYS)
def test_auto_begins_a_run_once(run_train, capsys, figure):
    """Also in a folder that is there already, without a run; what lies in it stays."""
    Path("output/r").mkdir(parents=True)
    Path("output/r/notes.txt").write_text("mine")
    for number, steps in enumerate((4, 4, 6)):
        assert run_train("--resume_path", "auto", "--name", "r", "--pretrained_dir", "none", "--num_steps", steps,
                         "--train_batch_size", 16, "--eval_every", 4) == 0
        assert ("resuming output/r/step-00000004.pt at step 4" in capsys.readouterr().out) == (number > 0)
        assert [event["step"] for event in events_of("output/r", ("train",))] == list(range(1, steps + 1))
    assert Path("output/r/notes.txt").read_text() == "mine" and [path.name for path in Path("output").iterdir()] == ["r"]
    figure("starts with auto", 3)


@pytest.mark.contract(*WAYS)
def test_damage_goes_back_to_the_one_before_and_never_to_the_beginning(run_train, begun, capsys, figure):
    ways = (["output/r"], ["auto", "--name", "r"])
    for way in ways:
        begun()
        shutil.copytree("whole", "output", dirs_exist_ok=True)                       # with step 8 and best.pt
        flip(Path("output/r/step-00000008.pt"))
        assert run_train("--resume_path", *way) == 0
        said = capsys.readouterr().out
        assert "warning: output/r/step-00000008.pt: damaged" in said and "resuming output/r/step-00000004.pt" in said
        assert not differences(end(), end("whole/r"))
        for file in Path("output/r").glob("*.pt"):
            flip(file)
        before = content("output")
        for also in ([], ["--override"], ["--num_steps", 20], ["--eval_only"]):
            assert run_train("--resume_path", *way, *also) == 2
            said = capsys.readouterr().err
            assert "holds no intact checkpoint" in said and said.count("\n") == 1
            assert content("output") == before
        shutil.rmtree("output"), shutil.rmtree("whole")
    figure("starts of a run of which one checkpoint, or all, are damaged", 5 * len(ways))


def flip(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    file.write_bytes(damaged)


@pytest.mark.contract(*WAYS)
def test_a_branch_leaves_the_run_as_it_is(run_train, begun, capsys, tries, figure):
    """From a file of a finished run: refused in its own folder, where a newer one lies; elsewhere to the same end."""
    begun()
    shutil.rmtree("output")
    Path("whole").rename("output")
    before = {name: content_ for name, content_ in content("output/r").items() if ".lock" not in name}
    file = ["--resume_path", "output/r/step-00000004.pt"]
    assert run_train(*file) == 2
    assert "goes on to step-00000008.pt" in capsys.readouterr().err
    branches = {"output/b": ["--name", "b"], "other/r": ["--output_dir", "other"],
                "other/b": ["--output_dir", "other", "--name", "b"]}
    for folder, flags in list(branches.items())[:tries(2, 3)]:
        assert run_train(*file, *flags) == 0 and not differences(end(folder), end("output/r"))
        assert (Path(folder) / "step-00000004.pt").exists()
        assert run_train(*file, *flags) == 2 and "already holds a run" in capsys.readouterr().err
        assert {name: bytes_ for name, bytes_ in content("output/r").items() if ".lock" not in name} == before
    figure("branches", tries(2, 3))


# ---------------------------------------------------------------------------------------------------- P21: who writes

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of the interpreter (its table of audit events) by which files and folders come, go and change, beside "open".
DEEDS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime", "os.chmod",
         "shutil.copyfile", "shutil.move", "shutil.rmtree", "tempfile.mkstemp", "tempfile.mkdtemp"}


def watched(folder: Path):
    """before(rank): whatever the process and its loader workers write below output/ and logs/ is told in writes-RANK."""
    def install(rank: int) -> None:
        told = os.open(folder / f"writes-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def hear(event: str, arguments: tuple) -> None:
            if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
                deed = isinstance(arguments[2], int) and arguments[2] & WRITING
            else:
                deed = event in DEEDS
            for path in arguments[:2] if deed else ():
                if isinstance(path, (str, bytes, os.PathLike)):
                    place = os.path.realpath(os.fsdecode(path))
                    if place.startswith((f"{folder}/output", f"{folder}/logs")):
                        os.write(told, f"{event} {place}\n".encode())

        sys.addaudithook(hear)
    return install


@pytest.mark.skipif(sys.platform != "linux", reason="needs processes that are forked")
@pytest.mark.contract(*WRITERS)
def test_only_process_0_writes(tmp_path, tries, figure):
    """A start, a request to stop, a resumed session, an evaluation: in two processes, or three, each with a loader worker."""
    place, ranks = tmp_path.resolve(), tries(2, 3)
    flags = ("--num_steps", 5, "--train_batch_size", 12, "--num_workers", 1, "--confusion_matrix")

    def before(rank: int) -> None:
        watched(place)(rank)
        rig.stopping_after(2)(rank)

    assert rig.wait(rig.start(place, *flags, ranks=ranks, before=before)) == [0] * ranks
    assert "stopped as asked, after step 2" in (place / "out.txt").read_text()
    assert rig.wait(rig.start(place, *flags, ranks=ranks, before=watched(place))) == [0] * ranks
    if evaluated := tries(0, 1):
        assert rig.wait(rig.start(place, *flags, "--eval_only", ranks=ranks, before=watched(place))) == [0] * ranks
    own = (place / "writes-0").read_text()
    for file in ("step-00000002.pt.tmp", "step-00000005.pt", "best.pt", "log.jsonl", "config.json", ".lock", "confusion.csv",
                 "logs/run/events.out.tfevents"):
        assert file in own, "the watch is blind"
    for rank in range(1, ranks):
        assert (place / f"writes-{rank}").read_text() == ""
    figure(f"sessions of {ranks} processes, every write below output/ and logs/ watched", 2 + evaluated)
