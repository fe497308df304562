"""Checkpoints with a correct SHA-256 and a wrong value, in every way to open one.

Each is opened in a child process: a real run's checkpoint with one changed value (tests/support/sealed.py). Either it is refused
in one line of at most 200 characters with exit code 2, or the value does no harm: the result (weights, averages and optimizer
state at the end of the training, metrics of an evaluation, outputs of the model) is that of the unchanged file, bit for bit, or
the output before the first step differs from that of the unchanged file, so that the user can see it.
"""

import copy
from collections.abc import Callable

import doors
import pytest
import sealed
import torch
from doors import Outcome

from models.checkpoints import torch_file
from utils.config.saved import STORED

# How many of 17 tries use each way.
WAYS = {"resume": 5, "python": 4, "start": 3, "eval": 2, "eval_start": 1, "picture": 1, "annotate": 1}
DESCRIBES = ("resume", "start", "eval", "eval_start")    # ways that print what the file contains before they use it
LONGEST = 200


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return {name: (the run's folder, the content of its checkpoint)}."""
    folders = {name: doors.train_base(tmp_path_factory.mktemp(name), name) for name in doors.BASES}
    return {name: (folder, torch_file.read(next(folder.glob("step-*.pt")))) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def unchanged(runs, tmp_path_factory):
    """Return unchanged(name, door) -> the outcome of the run's own checkpoint."""
    known = {}

    def outcome(name: str, door: str) -> Outcome:
        if (name, door) not in known:
            folder, content = runs[name]
            known[name, door] = doors.through(door, tmp_path_factory.mktemp("own") / "x", folder,
                                              lambda path: sealed.seal(path, content))
            assert known[name, door].code == 0 and known[name, door].result, known[name, door].output
        return known[name, door]

    return outcome


def assert_harmless(outcome: Outcome, own: Callable[[], Outcome]) -> bool:
    """Return whether it was refused. own() returns the outcome of the run's own checkpoint."""
    assert "Traceback" not in outcome.output, outcome.output
    assert all(letter.isprintable() or letter in "\n\r" for letter in outcome.output), ascii(outcome.output)
    if outcome.code == 0:
        assert outcome.result == own().result or outcome.printed != own().printed, "the result differs without a message"
        return False
    lines = [line for line in outcome.output.splitlines() if "error: " in line]
    assert outcome.code == 2 and len(lines) == 1 and len(lines[0]) <= LONGEST, (outcome.code, lines)
    return True


@pytest.mark.contract("P7", "a checkpoint with a correct SHA-256 and a wrong value is refused on one line, or does no harm")
def test_a_wrong_value_is_refused_or_does_no_harm(runs, unchanged, tmp_path, tries, figure):
    ways = [door for door in WAYS for _ in range(WAYS[door])]
    names = ["adamw", *doors.BASES]                                   # twice as often: it has the most values
    count, refused = tries(17, 1000), 0
    for seed in range(count):
        name, door = names[seed % len(names)], ways[seed % len(ways)]
        folder, content = runs[name]
        changed, what = sealed.changed(content, seed, plausible=door in DESCRIBES)
        outcome = doors.through(door, tmp_path / "x", folder, lambda path, changed=changed: sealed.seal(path, changed))
        try:
            refused += assert_harmless(outcome, lambda name=name, door=door: unchanged(name, door))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {door} of {name}, {what}: {error}") from error
    assert refused > count / 2
    figure(f"checkpoints with a correct SHA-256 and a wrong value, opened in each of {len(WAYS)} ways", count)


@pytest.mark.parametrize("change", [lambda average: average.flatten()[:1].clone(), lambda average: average.flatten()[1:].clone(),
                                    lambda average: average.transpose(-1, -2).contiguous()],
                         ids=["one number", "one fewer", "transposed"])
def test_an_optimizer_state_of_another_shape_is_refused(runs, unchanged, tmp_path, change):
    """Without the comparison of shapes it caused a segmentation fault, or training from wrong averages without a message."""
    folder, content = runs["adamw"]
    wrong = copy.copy(content) | {"optimizer": copy.deepcopy(content["optimizer"])}
    for slots in wrong["optimizer"]["state"].values():
        if slots["exp_avg"].shape == (24, 8):                       # the layer's queries, keys and values
            slots["exp_avg"] = change(slots["exp_avg"])
    outcome = doors.through("resume", tmp_path / "x", folder, lambda path: sealed.seal(path, wrong))
    assert assert_harmless(outcome, lambda: unchanged("adamw", "resume"))
    assert "optimizer state: exp_avg of blocks.0.attn.qkv.weight is an array of shape" in outcome.error


@pytest.mark.reference
def test_a_lamb_run_is_resumed_and_opened(runs, unchanged):
    """timm stores the number of updates as an array in every group."""
    pytest.importorskip("timm")
    folder, content = runs["lamb"]
    assert torch.is_tensor(content["optimizer"]["param_groups"][0]["step"])
    for door in doors.DOORS:
        unchanged("lamb", door)
    assert unchanged("lamb", "resume").result == doors.ended(folder), "differs from the uninterrupted run"


@pytest.mark.reference
def test_a_lamb_run_of_another_timm_version_is_resumed_or_refused(runs, unchanged, tmp_path):
    pytest.importorskip("timm")
    folder, content = runs["lamb"]

    def resumed(changes: dict, removed: tuple = (), *flags: str) -> Outcome:
        wrong = copy.copy(content) | {"optimizer": copy.deepcopy(content["optimizer"])}
        for group in wrong["optimizer"]["param_groups"]:
            group |= changes
            for key in removed:
                del group[key]
        return doors.through("resume", tmp_path / "x", folder, lambda path: sealed.seal(path, wrong), flags)

    own = unchanged("lamb", "resume").result
    older = resumed({"step": doors.AT, "later": None}, ("max_lr_snapshot", "foreach", "caution", "decoupled_decay"))
    assert (older.code, older.result) == (0, own), older.output
    assert resumed({}, (), "--override", "--learning_rate", "0.002").code == 0
    for outcome, words in ((resumed({}, ("step",)), "a group lacks step, after 2 updates"),
                           (resumed({"step": torch.ones(2)}), "step an array of shape (2,): must be a number"),
                           (resumed({"later": True}), "later True of a group, written by another version of timm or PyTorch")):
        assert outcome.code == 2 and words in outcome.error, outcome.output


def test_plausible_changes_are_printed(runs, tmp_path):
    """Values that another run may have, and fields that an older file lacks."""
    folder, content = runs["adamw"]
    wrong = content | {"architecture": content["architecture"] | {"dropout_rate": 0.25}, "updates": 2, "world_size": 2,
                       "config": {key: value for key, value in content["config"].items() if key != "seed"} | {"rotation": 5.0}}
    del wrong["rules"], wrong["license"]
    printed = doors.through("resume", tmp_path / "x", folder, lambda path: sealed.seal(path, wrong)).output
    for line in ("a checkpoint of an earlier version: what it lacks (rules, license, seed) has the values of that version",
                 "--rotation 5.0",
                 "weights: from the checkpoint, whose model is not that of configs.py: dropout_rate 0.25",
                 "changed: 1 processes (were 2), 2 micro-steps each (were 1)"):
        assert line in printed, printed
    own = doors.through("resume", tmp_path / "x", folder, lambda path: sealed.seal(path, content)).output
    assert "earlier version" not in own and "weights: from the checkpoint\n" in own


def test_a_run_from_before_most_flags_is_resumed(runs, unchanged, tmp_path):
    """It had the default values of all of them."""
    folder, content = runs["adam"]
    older = content | {"config": {name: value for name, value in content["config"].items() if name in STORED}}
    outcome = doors.through("resume", tmp_path / "x", folder, lambda path: sealed.seal(path, older))
    assert (outcome.code, outcome.result) == (0, unchanged("adam", "resume").result), outcome.output


@pytest.mark.parametrize(("door", "flag"), [
    ("resume", "--resume_path"), ("start", "--pretrained_dir"), ("picture", "--checkpoint")])
def test_a_wrong_setting_is_reported_with_the_flag_of_the_file(runs, tmp_path, door, flag):
    folder, content = runs["adamw"]
    wrong = content | {"config": content["config"] | {"seed": -1}}
    error = doors.through(door, tmp_path / "x", folder, lambda path: sealed.seal(path, wrong)).error
    assert error.endswith(f"{flag}: {doors.FILE}: its setting seed is -1, which no run has. Use an earlier checkpoint"), error


def test_escape_sequences_in_names_are_not_printed(runs, tmp_path):
    """In class names, where an evaluation reports a checkpoint of other data, and in folders, where a run prints its settings."""
    folder, content = runs["adamw"]
    classes = content | {"classes": [sealed.ESCAPE, *content["classes"][1:]]}
    settings = content | {"config": content["config"] | {"log_dir": "logs\x1b]0;title\x07"}}
    for door, wrong in (("eval", classes), ("python", classes), ("resume", settings)):
        outcome = doors.through(door, tmp_path / door, folder, lambda path, wrong=wrong: sealed.seal(path, wrong))
        assert "\x1b" not in outcome.output and "\x07" not in outcome.output, door
    assert r"--log_dir 'logs\x1b]0;title\x07'" in outcome.output and outcome.code == 0
