"""docs/promises.md: resumed runs equal uninterrupted ones, what they may change, which process writes. Runs of train.py."""

import math
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import rig
import torch
from runs import FOLDER, TINY, comparable, differences, events_of, load_state, make_tree, mark, state_of, whole_and_killed

import predict
from utils.files import read_csv_table
from utils.run import checkpoint
from utils.training import precision

CHANGES = ("P18", "what a resumed run may change, and what it may not without --override")
WAYS = ("P19", "a finished run that is resumed trains nothing; no run is ever silently restarted from the beginning")
WRITERS = ("P21", "only process 0 writes")
PARTS = ("model", "ema", "optimizer", "step", "updates")
# As the runs of the rig: everything is switched on that a flag could change. 4 of 8 steps are done.
BEGUN = [
    *TINY, "--num_steps=8", "--save_every=4", "--eval_every=4", "--warmup_steps=2", "--optimizer=adamw", "--learning_rate=1e-3",
    "--weight_decay=0.05", "--dropout_rate=0.1", "--ema_decay=0.9", "--augmentation=crop", "--randaugment_ops=1",
    "--random_erasing=0.3", "--mixup_alpha=0.8", "--cutmix_alpha=1", "--label_smoothing=0.1", "--max_grad_norm=1",
    "--gradient_accumulation_steps=2", "--name=r"]
RESUMED = ["--resume_path", "output/r"]
KEPT: dict[str, Path] = {}      # runs that are reused, by their flags


@pytest.fixture
def begun(run_train, tmp_path_factory):
    """Return begun(*flags), which puts a run that was killed after step 4 of 8 in output/r, and the same run without the kill in
    whole/r. Each run is made once."""
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
    """Return the trained state and the last evaluation."""
    state = vars(state_of(folder))
    return {part: state[part] for part in PARTS} | {"evaluations": events_of(folder, ("eval",))[-1]}


def refusal(run_train, capsys, *flags) -> str:
    """Start with flags that are refused. Assert code 2, one line and unchanged files. Return the line."""
    before = content("output")
    capsys.readouterr()
    assert run_train(*RESUMED, *flags) == 2, flags
    printed = capsys.readouterr()
    assert printed.err.startswith("train.py: error: ") and printed.err.count("\n") == 1, printed
    assert content("output") == before and not Path("logs/r/changed").exists()
    return printed.err


# ------------------------------------------------------------------------------------------- exact with any flags

EVERYTHING = [
    "--train_batch_size", 16, "--gradient_accumulation_steps", 2, "--num_workers", 2, "--seed", 3, "--test_fraction", 0.2,
    "--split_seed", 1, "--img_size", 12, "--patch_size", 4, "--hidden_size", 32, "--num_heads", 2, "--num_layers", 2,
    "--mlp_dim", 48, "--classifier", "patch_mean", "--optimizer", "adamw", "--learning_rate", 3e-3, "--head_learning_rate", 6e-3,
    "--layer_decay", 0.5, "--weight_decay", 0.05, "--decay_on", "matrices", "--decay_type", "linear", "--warmup_steps", 3,
    "--warmup_learning_rate", 1e-4, "--min_learning_rate", 1e-5, "--max_grad_norm", 0.5, "--freeze", "pos_embed,patch_embed.*",
    "--ema_decay", 0.9, "--dropout_rate", 0.1, "--attention_dropout_rate", 0.1, "--drop_path_rate", 0.3,
    "--label_smoothing", 0.1, "--class_weights", "balanced", "--augmentation", "crop", "--crop_scale", 0.3,
    "--interpolation", "bicubic", "--rotation", 10, "--color_jitter", 0.2, "--randaugment_ops", 2, "--randaugment_magnitude", 5,
    "--random_erasing", 0.5, "--mixup_alpha", 0.8, "--cutmix_alpha", 1, "--mix_probability", 0.8,
    "--mix_switch_probability", 0.4, "--mix_off_steps", 2, "--eval_crop", 0.9]
SUPERVISED = [
    "--pretrained_dir", "output/start", "--attention_edits", "edits", "--attention_loss_weight", 5, "--distillation", "soft",
    "--distillation_temperature", 2, "--teacher", "output/teacher", "--optimizer", "sgd", "--momentum", 0.8,
    "--precision", "bf16", "--learning_rate", 0.05, "--augmentation", "pad_flip"]


def test_a_run_with_every_learning_flag_resumes_exactly(run_train, monkeypatch):
    """The log and the checkpoint also show that the flags have their effect."""
    whole = whole_and_killed(run_train, monkeypatch, *EVERYTHING)
    rates = [event["lr"] for event in events_of("whole/r", ("train",))]
    assert rates[2:] == pytest.approx([1e-5 + (3e-3 - 1e-5) * (12 - step) / 9 for step in range(3, 13)])
    assert 1e-4 <= rates[0] < rates[1] < rates[2]
    groups = {(group["lr_scale"], group["weight_decay"]) for group in whole.optimizer["param_groups"]}
    assert {(2.0, 0.05), (2.0, 0.0), (0.5, 0.05), (0.25, 0.05), (0.25, 0.0)} <= groups
    half = load_state(Path("whole/r/step-00000006.pt")).model
    unchanged = {name for name in half if torch.equal(half[name], whole.model[name])}
    assert unchanged == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_a_float16_run_with_overflows_resumes_exactly(run_train, monkeypatch, level):
    """At O3 the weights are float16 too: there is no loss scale, and nothing overflows."""
    monkeypatch.setattr(precision, "INITIAL_SCALE", 2.0 ** 22)             # far too large
    flags = [*TINY, "--fp16", "--gradient_accumulation_steps", 2, "--dropout_rate", 0.1, "--augmentation", "crop"]
    whole = whole_and_killed(run_train, monkeypatch, *flags, "--fp16_opt_level", level)
    if level == "O3":
        assert {weight.dtype for weight in whole.model.values()} == {torch.float16} and whole.updates == 12
        return
    skipped = [event["skipped"] for event in events_of("whole/r", ("train",))]
    assert 2 <= sum(skipped) < 10 and whole.updates == 12 - sum(skipped) and 1 < whole.scaler["scale"] < 2 ** 22


def test_a_supervised_run_resumes_exactly(run_train, monkeypatch):
    """With a teacher and edits of attention, from another run's weights."""
    for name in ("start", "teacher"):
        assert run_train(*TINY, "--name", name, "--learning_rate", 0.01, "--seed", len(name)) == 0
    mark(Path("edits"), range(0, 1097, 9))
    whole_and_killed(run_train, monkeypatch, *TINY, *SUPERVISED)
    assert any(event["attention_loss"] for event in events_of("whole/r", ("train",)))


# -------------------------------------------------------------------------------------- stopped during an evaluation

OFTEN = [*TINY, "--num_steps", 4, "--eval_every", 2, "--learning_rate", 0.01, "--ema_decay", 0.5, "--train_batch_size", 8,
         "--name", "r", "--resume_path", "auto", "--pretrained_dir", "none"]


@pytest.mark.parametrize(("flags", "evaluations"), [
    (["--eval_batch_size", 20], [(0, "test"), (2, "val"), (4, "val"), (4, "test")]),
    ([*FOLDER, "--num_workers", 0, "--eval_batch_size", 8], [(0, "val"), (2, "val"), (4, "val")])],
    ids=["val and test", "val only"])
def test_a_stop_during_any_evaluation_changes_nothing(run_train, flags, evaluations):
    """Wherever an evaluation is stopped, the resumed run has the log, best.pt and mistakes.csv of an uninterrupted run.
    mistakes.csv has the mistakes of the averaged weights, which are those that best.pt is opened with."""
    make_tree(Path("tree"), images=10)
    batches, stop_at = [], 0                   # the evaluations' batches so far; the one in which a stop is requested

    def count(module, inputs):
        if hasattr(module, "patch_embed") and not module.training:
            batches.append(len(inputs[0]))
            if len(batches) == stop_at:
                os.kill(os.getpid(), signal.SIGUSR1)

    def files() -> list[dict]:
        mistakes = {"mistakes": Path("output/r/mistakes.csv").read_text()}
        return [comparable(Path("output/r", file)) for file in ("step-00000004.pt", "best.pt")] + [mistakes]

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        assert run_train(*flags, *OFTEN) == 0
        whole, events, count_of_batches = files(), events_of("output/r"), len(batches)
        assert [(event["step"], event["split"]) for event in events if event["event"] == "eval"] == evaluations
        assert 2 * len(evaluations) < count_of_batches
        split = next(name for step, name in evaluations if step)
        assert predict.main(["output/r", "--split", split, "--output", "rows.csv", "--device", "cpu"]) == 0
        (_, *rows), (_, *wrong) = map(read_csv_table, (Path("rows.csv").read_text(), whole[-1]["mistakes"]))
        assert sorted(row[:3] for row in wrong) == sorted(row[:3] for row in rows if row[1] != row[2]) != []
        codes = []
        for stop_at in range(2, count_of_batches + 1, 2):
            shutil.rmtree("output")
            batches.clear()
            codes.append(run_train(*flags, *OFTEN))
            if codes[-1]:
                assert codes[-1] == 143 and run_train(*flags, *OFTEN) == 0
            assert not differences(files(), whole) and events_of("output/r") == events, stop_at
    finally:
        hook.remove()
    assert codes.count(143) >= len(codes) - 1                # after the last batch of all the run ends anyway


@pytest.mark.parametrize("step", [1, 3])
def test_a_stop_takes_effect_within_a_step(run_train, step, capsys):
    """On a CPU a step with hundreds of photographs takes minutes. Its partial sums are dropped and computed again later."""
    micro_batches = []

    def count(module, inputs):
        if hasattr(module, "patch_embed") and module.training:
            micro_batches.append(len(inputs[0]))
            if len(micro_batches) == 8 * (step - 1) + 2:
                os.kill(os.getpid(), signal.SIGUSR1)

    flags = ["--gradient_accumulation_steps", 8, *OFTEN]
    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        assert run_train(*flags) == 143
        assert len(micro_batches) == 8 * (step - 1) + 2                  # two of the step's eight
        assert f"Stopped on request after step {step - 1} of 4" in capsys.readouterr().out
        assert run_train(*flags) == 0
        stopped, events = comparable(Path("output/r/step-00000004.pt")), events_of("output/r")
        shutil.rmtree("output")
        assert run_train(*flags) == 0
    finally:
        hook.remove()
    assert not differences([stopped], [comparable(Path("output/r/step-00000004.pt"))]) and events_of("output/r") == events


# ----------------------------------------------------------------------------------------------- P18: changed settings

# Flags that do not change the result of training: (new value, value before).
TAKEN = {"num_workers": (2, None), "eval_every": (3, 4), "save_every": (3, 4), "output_dir": ("elsewhere", "whole"),
         "keep_checkpoints": (1, 2), "log_dir": ("board", "logs")}
# What a resumed run must not change, and what it may change with --override, each with a new value.
# tests/config/ checks all flags.
REFUSED = {"model_type": "ViT-B_16", "weight_decay": 0.5, "dataset": "cifar10", "img_size": 16}
OVERRIDDEN = {"seed": 3, "train_batch_size": 32, "learning_rate": 0.01, "decay_type": "linear", "precision": "fp16"}


@pytest.mark.contract(*CHANGES)
def test_what_may_change_is_taken(run_train, begun, capsys, figure):
    """With the same result, bit for bit. Only other micro-batches mean other sums and other random numbers."""
    begun()
    capsys.readouterr()
    assert run_train(*RESUMED, *(word for flag, (value, _) in TAKEN.items() for word in (f"--{flag}", value))) == 0
    printed = capsys.readouterr().out.splitlines()
    assert {line for line in printed if line.startswith("changed: ")} == {
        f"changed: --{flag} {value} (was {was})" for flag, (value, was) in TAKEN.items()}
    assert not differences(end("elsewhere/r"), end("whole/r")) and state_of("output/r").step == 4
    assert [event["step"] for event in events_of("elsewhere/r", ("eval",))][-3:] == [6, 8, 8] and list(Path("board/r").iterdir())
    assert [path.name for path in checkpoint.step_files(Path("elsewhere/r"))] == ["step-00000008.pt"]
    assert run_train(*RESUMED, "--gradient_accumulation_steps", 1) == 0
    assert "changed: --gradient_accumulation_steps 1 (was 2)" in capsys.readouterr().out
    assert differences(end("output/r"), end("whole/r"))
    figure("settings that a resumed run may change", len(TAKEN) + 1)


@pytest.mark.contract(*CHANGES)
def test_more_steps_recompute_the_schedule(run_train, begun, capsys, figure):
    begun()
    assert run_train(*RESUMED, "--num_steps", 12, "--pretrained_dir", "no/such/file") == 0
    printed = capsys.readouterr().out
    assert "changed: --num_steps 12 (was 8); the learning-rate schedule is recomputed for the new length\n" in printed
    assert "--pretrained_dir is not used" in printed
    rates = {event["step"]: event["lr"] for event in events_of("output/r", ("train",))}
    assert list(rates) == list(range(1, 13))
    for step in range(3, 13):
        progress = (step - 3) / 6 if step <= 4 else (step - 2) / 10          # below 10 steps no rate is 0
        cosine = 1e-3 * 0.5 * (1 + math.cos(math.pi * progress))
        assert rates[step] == pytest.approx(cosine, abs=1e-12), step
    assert state_of("output/r").step == 12
    assert "is already at step 12" in refusal(run_train, capsys, "--num_steps", 6)
    figure("settings that a resumed run may change", 1)


@pytest.mark.contract(*CHANGES)
def test_what_must_not_change_is_refused(run_train, begun, capsys, figure):
    """In one line that names the flag, and --override where that would allow it."""
    begun()
    for flag, value in (REFUSED | OVERRIDDEN).items():
        for also in ([], ["--override"]) if flag in REFUSED else ([],):
            printed = refusal(run_train, capsys, f"--{flag}", value, *also)
            assert f"--{flag} {value}: the checkpoint was made with " in printed, printed
            assert ("add --override" in printed) == (flag in OVERRIDDEN), printed
    figure("settings that are refused without --override, or at all", len(REFUSED | OVERRIDDEN))


@pytest.mark.contract(*CHANGES)
def test_what_override_lets_change(run_train, begun, capsys, figure):
    """The change is logged and has its effect, and the logged steps before it stay."""
    begun()
    before = events_of("output/r", ("train",))[:4]
    assert run_train(*RESUMED, "--override", *(word for flag, value in OVERRIDDEN.items() for word in (f"--{flag}", value))) == 0
    printed = capsys.readouterr().out
    assert all(f"changed: --{flag} {value} (was " in printed for flag, value in OVERRIDDEN.items())
    assert state_of("output/r").step == 8 and events_of("output/r", ("train",))[:4] == before
    after = events_of("output/r", ("train",))[4:]
    assert [event["lr"] for event in after] == pytest.approx([0.01 * (9 - step) / 6 for step in range(5, 9)])
    assert all(event["loss_scale"] for event in after) and differences(end(), end("whole/r"))
    figure("settings that --override changed", len(OVERRIDDEN))


@pytest.mark.contract(*CHANGES)
def test_exact_runs_keep_their_micro_batches(run_train, begun, capsys, figure):
    begun("--exact")
    printed = refusal(run_train, capsys, "--gradient_accumulation_steps", 1)
    assert "--exact: the run has 2 micro-batches a step" in printed and "GRAD_STEPS" in printed
    assert run_train(*RESUMED) == 0 and not differences(end(), end("whole/r"))
    figure("settings that are refused without --override, or at all", 1)


# Changes of tree/train/bee/3.png by renaming or copying it: (function, new name, words of the error).
DATA = {"another name": (Path.rename, "bee/3-new.png", "labels or names"),
        "another label": (Path.rename, "ant/12.png", "labels or names"),
        "one more": (shutil.copy, "bee/4-new.png", "the run has trained on 24 images, tree now holds 25")}


@pytest.mark.contract(*CHANGES)
def test_other_data_are_refused(run_train, capsys, figure):
    """Also if their number is the same. Data in another folder are the same data."""
    flags = ("--dataset", "folder", "--data_dir", "tree", "--model_type", "ViT-Nano_2", "--name", "r", "--num_steps", 4)
    tree = make_tree(Path("tree"), images=12)
    assert run_train(*flags) == 0
    shutil.copytree("tree", "kept")
    for case, (change, to, words) in DATA.items():
        change(tree / "train/bee/3.png", tree / "train" / to)
        message = refusal(run_train, capsys, "--num_steps", 6)
        assert words in message and "add --override" in message, (case, message)
        if case == "another label":
            assert run_train(*RESUMED, "--num_steps", 6, "--override", "--name", "over") == 0
            assert f"warning: {words}" in capsys.readouterr().out and state_of("output/over").step == 6
        shutil.rmtree(tree)
        shutil.copytree("kept", "tree")
    for split in ("train", "val"):
        (tree / split / "bee").rename(tree / split / "cow")
    assert "not the same task" in refusal(run_train, capsys, "--num_steps", 6, "--override")
    assert run_train(*RESUMED, "--num_steps", 6, "--data_dir", "kept") == 0
    assert "changed: --data_dir kept (was tree)" in capsys.readouterr().out
    figure("runs resumed on other data", len(DATA) + 1)


# ------------------------------------------------------------------------------------------------- P19: ways to resume


@pytest.mark.contract(*WAYS)
def test_a_finished_run_trains_nothing_and_reports_its_result_again(run_train, begun, capsys, figure):
    """With every way to resume it. `auto` starts the run if there is none, also in a folder that exists, whose files stay."""
    Path("output/r").mkdir(parents=True)
    Path("output/r/notes.txt").write_text("mine")
    assert run_train(*BEGUN, "--resume_path", "auto") == 0
    result = [line for line in capsys.readouterr().out.splitlines() if "after the last step (" in line]
    files = {name: bytes_ for name, bytes_ in content("output").items() if name.endswith((".pt", ".txt"))}
    events = events_of("output/r")
    ways = [["output/r"], ["output/r/step-00000008.pt"], ["auto", "--name", "r"]]
    for way in ways:
        assert run_train("--resume_path", *way) == 0
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in printed if "after the last step (" in line] == result and len(result) == 2
        assert "nothing is left to train. To train longer, resume with a larger --num_steps (NUM_STEPS)" in printed
        assert not [line for line in printed if line.startswith(("step ", "changed:"))]
        assert {name: bytes_ for name, bytes_ in content("output").items() if name.endswith((".pt", ".txt"))} == files
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
        for also in ([], ["--output_dir", "new", "--override"]):
            capsys.readouterr()
            assert run_train("--resume_path", way, *also) == 2, way
            printed = capsys.readouterr().err
            assert words in printed and printed.count("\n") == 1, (way, printed)
            assert content(".") == before, way
    figure("paths that are no run", 2 * len(ways))


@pytest.mark.contract(*WAYS)
def test_damage_goes_back_to_the_one_before_and_never_to_the_beginning(run_train, begun, capsys, figure):
    ways = (["output/r"], ["auto", "--name", "r"])
    for way in ways:
        begun()
        shutil.copytree("whole", "output", dirs_exist_ok=True)                       # with step 8 and best.pt
        flip(Path("output/r/step-00000008.pt"))
        assert run_train("--resume_path", *way) == 0
        printed = capsys.readouterr().out
        assert "warning: output/r/step-00000008.pt: damaged" in printed and "resuming output/r/step-00000004.pt" in printed
        assert not differences(end(), end("whole/r"))
        for file in Path("output/r").glob("*.pt"):
            flip(file)
        before = content("output")
        for also in ([], ["--override", "--num_steps", 20], ["--eval_only"]):
            assert run_train("--resume_path", *way, *also) == 2
            printed = capsys.readouterr().err
            assert "holds no intact checkpoint" in printed and printed.count("\n") == 1
            assert content("output") == before
        shutil.rmtree("output"), shutil.rmtree("whole")
    figure("starts of a run of which one checkpoint, or all, are damaged", 4 * len(ways))


def flip(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    file.write_bytes(damaged)


@pytest.mark.contract(*WAYS)
def test_a_branch_leaves_the_run_as_it_is(run_train, begun, capsys, figure):
    """From a file of a finished run: refused in its own folder, which has a newer one; elsewhere with the same result."""
    begun()
    shutil.rmtree("output")
    Path("whole").rename("output")
    before = {name: content_ for name, content_ in content("output/r").items() if ".lock" not in name}
    file = ["--resume_path", "output/r/step-00000004.pt"]
    assert run_train(*file) == 2 and "continues to step-00000008.pt" in capsys.readouterr().err
    branches = {"output/b": ["--name", "b"], "other/r": ["--output_dir", "other"]}
    for folder, flags in branches.items():
        assert run_train(*file, *flags) == 0 and not differences(end(folder), end("output/r"))
        assert (Path(folder) / "step-00000004.pt").exists()
        assert load_state(Path(folder, "best.pt")).best == state_of(folder).best
        assert run_train(*file, *flags) == 2 and "already holds a run" in capsys.readouterr().err
        assert {name: bytes_ for name, bytes_ in content("output/r").items() if ".lock" not in name} == before
    for path in checkpoint.step_files(Path("output/b")):             # a folder with only best.pt can be resumed too
        path.unlink()
    assert run_train("--resume_path", "output/b", "--num_steps", 9) == 0 and state_of("output/b").step == 9
    figure("branches", len(branches))


def test_evaluation_ignores_the_micro_batches_and_a_resumed_run_is_not_evaluated_first(run_train, capsys):
    assert run_train("--test_fraction", 0.2, "--test", "once", "--name", "r") == 0
    assert run_train(*RESUMED, "--eval_only", "--gradient_accumulation_steps", 5) == 0
    assert run_train(*RESUMED, "--num_steps", 6, "--gradient_accumulation_steps", 5) == 2
    capsys.readouterr()
    assert run_train(*RESUMED, "--test", "always", "--num_steps", 6) == 0
    assert "step 0:" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- P21: who writes

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events of the interpreter, next to "open", that create, remove or change files and folders.
DEEDS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime", "os.chmod",
         "shutil.copyfile", "shutil.move", "shutil.rmtree", "tempfile.mkstemp", "tempfile.mkdtemp"}


def watched(folder: Path):
    """Return before(rank), which records in writes-RANK what the process and its loader workers write below output/ and logs/."""
    def install(rank: int) -> None:
        log = os.open(folder / f"writes-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def audit(event: str, arguments: tuple) -> None:
            if event == "open":
                writes = isinstance(arguments[2], int) and arguments[2] & WRITING
            else:
                writes = event in DEEDS
            for path in arguments[:2] if writes else ():
                if isinstance(path, (str, bytes, os.PathLike)):
                    place = os.path.realpath(os.fsdecode(path))
                    if place.startswith((f"{folder}/output", f"{folder}/logs")):
                        os.write(log, f"{event} {place}\n".encode())

        sys.addaudithook(audit)
    return install


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs processes that are forked")
@pytest.mark.contract(*WRITERS)
def test_only_process_0_writes(tmp_path, tries, figure):
    """In a start, a request to stop, a resumed session and an evaluation, with two or three processes that have a loader worker
    each."""
    place, ranks = tmp_path.resolve(), tries(2, 3)
    flags = ("--num_steps", 5, "--train_batch_size", 12, "--num_workers", 1, "--confusion_matrix")

    def before(rank: int) -> None:
        watched(place)(rank)
        rig.stopping_after(2)(rank)

    assert rig.wait(rig.start(place, *flags, ranks=ranks, before=before)) == [0] * ranks
    assert "Stopped on request after step 2" in (place / "out.txt").read_text()
    assert rig.wait(rig.start(place, *flags, ranks=ranks, before=watched(place))) == [0] * ranks
    if evaluated := tries(0, 1):
        assert rig.wait(rig.start(place, *flags, "--eval_only", ranks=ranks, before=watched(place))) == [0] * ranks
    own = (place / "writes-0").read_text()
    for file in (".tmp", "step-00000002.pt", "step-00000005.pt", "best.pt", "log.jsonl", "config.json", ".lock", "confusion.csv",
                 "logs/run/events.out.tfevents"):
        assert file in own, "the audit hook recorded nothing"
    for rank in range(1, ranks):
        assert (place / f"writes-{rank}").read_text() == ""
    figure(f"sessions of {ranks} processes, every write below output/ and logs/ watched", 2 + evaluated)
