"""Checkpoints are written completely or not at all, and refused if a single bit is wrong."""

import errno
import hashlib
import os
import random
import shutil
import signal
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from runs import load_state
from torch import nn
from weight_files import plain_state

from models.checkpoints import first_look, torch_file
from models.checkpoints.run_fields import LATER_FIELDS
from utils.files import StorageError
from utils.run import checkpoint
from utils.run.checkpoint import (
    CheckpointError,
    NonFiniteError,
    RunState,
    check_finite,
    open_newest,
    open_run_checkpoint,
    read_header,
    retain,
    save,
    step_files,
    step_path,
)


def state(step=3, **changes) -> RunState:
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 1}
    values = {"updates": step - 1, "skips": 1, "scaler": scaler, "best": {"step": 2, "accuracy": 0.5},
              "first": {"accuracy": 0.125}, "cached": False,
              "config": {"img_size": (8, 10), "name": None, "learning_rate": 1e-3, "ema_decay": 0.9},
              "ema": {"weight": torch.arange(6.0).view(2, 3) / 7}}
    return plain_state(step, **values | changes)


@pytest.fixture
def saved(tmp_path):
    save(tmp_path / "step-00000003.pt", state())
    return tmp_path / "step-00000003.pt"


def sealed(path, content):
    checkpoint._write(path, content)
    return path


def error_of(path) -> str:
    """Assert that both readers refuse the file with the same line, which names it. Return the line."""
    lines = set()
    for reader in (open_run_checkpoint, load_state):
        with pytest.raises(CheckpointError) as caught:
            reader(path)
        lines.add(str(caught.value))
    line, = lines
    assert "\n" not in line and str(path) in line and caught.value.exit_code == 2
    return line


# ------------------------------------------------------------------------------------------------- round trip


def test_a_saved_state_is_loaded(saved):
    loaded, expected = vars(load_state(saved)), vars(state())
    for weights in ("model", "ema"):
        assert torch.equal(loaded.pop(weights)["weight"], expected.pop(weights)["weight"])
    assert loaded == expected and type(loaded["config"]["img_size"]) is tuple
    assert os.listdir(saved.parent) == [saved.name]
    opened, expected = open_run_checkpoint(saved), dict(vars(state())) | checkpoint.WEIGHTS
    assert vars(opened.header) == vars(read_header(saved)) == expected
    assert (opened.path, opened.header.step, opened.skipped) == (saved, 3, {})


def test_the_file_is_an_ordinary_archive(saved):
    with zipfile.ZipFile(saved) as archive:
        assert archive.comment == b"sha256:" + hashlib.sha256(saved.read_bytes()[:-71]).hexdigest().encode()
        assert all(info.CRC == 0 and info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    assert torch.serialization.get_crc32_options()   # unchanged for other files
    assert torch.load(saved, weights_only=True)["step"] == 3


def test_every_type_of_number_in_a_run_is_saved(tmp_path, monkeypatch):
    """Those of AdamW's state and of all precisions, written in pieces."""
    monkeypatch.setattr(checkpoint, "CHUNK", 100)
    torch.manual_seed(0)
    model = {"single": torch.randn(3, 4), "half": torch.randn(3, 4).half(), "scalar": torch.tensor(2.5),
             "empty": torch.zeros(0, 3), "transposed": torch.randn(3, 4).t()}
    parameter = nn.Parameter(torch.randn(500))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, amsgrad=True)
    parameter.sum().backward()
    optimizer.step()
    save(tmp_path / "x.pt", state(model=model, optimizer=optimizer.state_dict(), config={"a": None, "b": (1, True), "c": -2 ** 60,
                                                                                      "ema_decay": 0.5}))
    loaded = load_state(tmp_path / "x.pt")
    assert all(torch.equal(loaded.model[name], model[name]) and loaded.model[name].dtype == model[name].dtype for name in model)
    slots = optimizer.state_dict()["state"][0]
    assert all(torch.equal(loaded.optimizer["state"][0][name], slots[name]) for name in slots)
    assert loaded.config == {"a": None, "b": (1, True), "c": -2 ** 60, "ema_decay": 0.5}


def test_a_file_without_optional_fields_is_read(tmp_path):
    content = {name: value for name, value in vars(state()).items() if name not in sum(LATER_FIELDS, ())}
    content["config"]["ema_decay"] = 0.0
    loaded = load_state(sealed(tmp_path / "old.pt", content))
    assert loaded.ema == {} and loaded.step == 3 and loaded.format == checkpoint.FORMAT
    assert (loaded.world_size, loaded.threads, loaded.data, loaded.cached) == (1, 0, "", None)


# ---------------------------------------------------------------------------------------------------------- hashes


@pytest.fixture
def hashed(monkeypatch) -> Counter:
    """Return a Counter of how often each file was hashed, by its name."""
    times, real = Counter(), torch_file.is_sealed

    def is_sealed(stream):
        times[os.path.basename(os.readlink(f"/proc/self/fd/{stream.fileno()}"))] += 1
        return real(stream)

    for module in (first_look, torch_file):
        monkeypatch.setattr(module, "is_sealed", is_sealed)
    return times


def test_a_resumed_run_hashes_each_file_once(run_train, hashed):
    assert run_train("--name", "r", "--save_every", "2", "--eval_every", "2", "--num_steps", "4") == 0
    hashed.clear()
    assert run_train("--resume_path", "output/r", "--num_steps", "6") == 0
    assert hashed == {"step-00000004.pt": 1, "best.pt": 1}
    hashed.clear()
    assert run_train("--resume_path", "output/r/best.pt", "--name", "branch") == 0
    assert hashed == {"best.pt": 1}


# ----------------------------------------------------------------------------------------------------- damage


@pytest.mark.contract("P6", "a checkpoint of which anything changed is refused, and the one before it serves")
def test_any_damage_is_refused_and_the_one_before_serves(tmp_path, tries, figure):
    older, newer, chance = step_path(tmp_path, 3), step_path(tmp_path, 6), random.Random(0)
    save(older, state(step=3))
    save(newer, state(step=6))
    whole = newer.read_bytes()

    def flipped():
        place = chance.randrange(8 * len(whole))
        return whole[:place // 8] + bytes([whole[place // 8] ^ 1 << place % 8]) + whole[place // 8 + 1:]

    def cut():
        return whole[:chance.randrange(len(whole))]

    def zeroed():
        start = chance.randrange(len(whole) - 1)
        end = min(len(whole), start + chance.choice((1, 512, 4096, len(whole))))
        return whole[:start] + bytes(end - start) + whole[end:]

    for what, make, count in (("flipped bits", flipped, tries(400, 2000)), ("cuts", cut, tries(60, 200)),
                              ("zeros in it or at its end", zeroed, tries(60, 200))):
        tried = 0
        while tried < count:
            damaged = make()
            if damaged == whole:                     # zeros over zeros
                continue
            newer.write_bytes(damaged)
            found = open_newest(tmp_path)
            assert found.path == older and list(found.skipped) == [newer]
            assert str(newer) in found.skipped[newer] and "\n" not in found.skipped[newer]
            with pytest.raises(CheckpointError):
                load_state(newer)
            tried += 1
        figure(what, tried)


FOREIGN = {"empty": b"", "zeros": bytes(5000), "page": b"<!DOCTYPE html><html>404</html>" * 50,
           "digest alone": b"sha256:" + b"0" * 64, "zip without anything": b"PK\5\6" + bytes(18)}


def test_foreign_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "step-00000003.pt"
    for content in FOREIGN.values():
        path.write_bytes(content)
        assert "not a checkpoint of this program" in error_of(path)
    torch.save({"model": {"weight": torch.zeros(3)}}, path)
    assert "not a checkpoint of this program" in error_of(path)
    torch.save({"weight": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    assert "not a zip archive" in error_of(path)
    assert "No such file" in error_of(tmp_path / "none.pt")
    error_of(tmp_path)


HUGE = torch.zeros(1).as_strided((10 ** 6, 10 ** 6), (0, 0))          # 10^12 numbers in the storage of one
LESS = {name: value for name, value in vars(state()).items() if name != "architecture"}
HAND_MADE = {"another format": ({"format": "vit-run-0", "step": 3}, "this version"), "a list": ([1, 2], "this version"),
             "text": ("x" * 5000, "this version"), "a field less": (LESS, "the file lacks architecture"),
             "a field more": (vars(state()) | {"another": 1}, "has another, which this version does not know"),
             "a step of text": (vars(state()) | {"step": "3"}, "step '3': must be 0 or more"),
             "cached of text": (vars(state()) | {"cached": "yes"}, "cached 'yes': must be True or False, or None"),
             "more numbers than bytes": (vars(state()) | {"model": {"weight": HUGE}}, "")}


@pytest.mark.parametrize("case", HAND_MADE)
def test_other_content_with_a_correct_hash_is_refused(tmp_path, case):
    content, message = HAND_MADE[case]
    assert message in error_of(sealed(tmp_path / "odd.pt", content))


@pytest.mark.contract("P6", "a checkpoint of which anything changed is refused, and the one before it serves")
def test_a_file_in_the_place_of_another_is_refused(tmp_path, figure):
    for step in (2, 3, 6):
        save(step_path(tmp_path, step), state(step=step))
    shutil.copyfile(step_path(tmp_path, 3), step_path(tmp_path, 6))
    assert "contains step 3" in error_of(step_path(tmp_path, 6))
    found = open_newest(tmp_path)
    assert found.path == step_path(tmp_path, 3) and list(found.skipped) == [step_path(tmp_path, 6)]
    step_path(tmp_path, 3).rename(tmp_path / "x.pt")
    step_path(tmp_path, 2).rename(step_path(tmp_path, 3))
    with pytest.raises(CheckpointError, match=r"6.pt: contains step 3.*3.pt: contains step 2"):
        open_newest(tmp_path)
    assert load_state(tmp_path / "x.pt").step == 3         # a name without a step
    figure("files renamed or swapped", 3)


def test_a_file_that_is_replaced_after_it_was_opened_is_refused(tmp_path):
    save(tmp_path / "best.pt", state(step=3))
    opened = open_run_checkpoint(tmp_path / "best.pt")
    save(tmp_path / "best.pt", state(step=6))
    with pytest.raises(CheckpointError, match="was replaced while"):
        opened.state()


# ----------------------------------------------------------------------------------------------------- writing


class CrashingFile:
    """A file without a buffer that writes each piece in two halves and calls `here` before, between and after them."""

    def __init__(self, path, here):
        self.file, self.here = open(path, "wb", buffering=0), here

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        view = memoryview(data)
        for part in (view[:len(view) // 2], view[len(view) // 2:]):
            self.here()
            self.file.write(part)
        self.here()


def test_a_write_that_fails_in_the_middle_leaves_the_old_file(saved, monkeypatch):
    """torch's writer continues after an error and reports it with another message."""
    class Full(CrashingFile):
        left = 700

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(data)

    for path in (saved, step_path(saved.parent, 4)):
        with monkeypatch.context() as patch, pytest.raises(StorageError, match=rf"{path.name} \(No space left on device\)$"):
            patch.setattr(checkpoint, "open", lambda path, mode: Full(path, int), raising=False)
            save(path, state(step=4))
    assert os.listdir(saved.parent) == [saved.name] and load_state(saved).step == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_non_finite_weights_are_reported(dtype):
    weights = {"good": torch.full((3,), torch.finfo(dtype).max, dtype=dtype), "count": torch.arange(3), "empty": torch.zeros(0)}
    check_finite(weights)
    check_finite({})
    for wrong in (float("nan"), float("inf"), float("-inf")):
        weights["blocks.1.bias"] = weights["later"] = torch.tensor([0.0, wrong, 1.0], dtype=dtype)
        with pytest.raises(NonFiniteError, match=r"\(blocks.1.bias is the first\)") as caught:
            check_finite(weights)
    assert caught.value.exit_code == 4


def save_in_a_child(path: Path, content: RunState, crash_at: int) -> None:
    """Save in a child that kills itself at point `crash_at` of the save, counted from 1. 0: it writes the number of points."""
    child = os.fork()
    if child == 0:
        passed = 0

        def here():
            nonlocal passed
            passed += 1
            if passed == crash_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def around(real):
            def call(*args):
                here()
                real(*args)
                here()
            return call

        try:
            checkpoint.open = lambda path, mode: CrashingFile(path, here)
            os.fsync, os.replace = around(os.fsync), around(os.replace)
            save(path, content)
            (path.parent / "points").write_text(str(passed))
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status == (signal.SIGKILL if crash_at else 0)


@pytest.mark.contract("P2", "a kill at any point of a save leaves the old checkpoint or the new one, whole")
@pytest.mark.parametrize("name", ["step-00000006.pt", "best.pt"])
def test_every_crash_point_inside_a_save(tmp_path, name, tries, figure):
    save(step_path(tmp_path, 3), state(step=3))
    old = state(step=3, best={"step": 3, "accuracy": 0.5})
    new = state(step=6, best={"step": 6, "accuracy": 0.5}, model={"weight": torch.arange(600.0)})
    save_in_a_child(tmp_path / name, new, crash_at=0)
    points = int((tmp_path / "points").read_text())
    assert points > 100
    outcomes = []
    for number in [*range(1, points - 7, tries(points // 10, 1)), *range(points - 7, points + 1)]:
        for left in (*tmp_path.glob("*.tmp"), step_path(tmp_path, 6)):
            left.unlink(missing_ok=True)
        save(tmp_path / "best.pt", old)
        save_in_a_child(tmp_path / name, new, crash_at=number)
        best, newest = load_state(tmp_path / "best.pt"), load_state(open_newest(tmp_path).path)
        assert open_newest(tmp_path).skipped == {} and best.best["step"] == best.step
        found = best if name == "best.pt" else newest
        assert found.model["weight"].numel() == {3: 6, 6: 600}[found.step]
        outcomes.append(found.step)
    assert outcomes == [3] * (len(outcomes) - 3) + [6] * 3       # the old one until the name changes, then the new one
    figure(f"crash points of a save of {'a step' if name != 'best.pt' else 'best.pt, over the old one'}", len(outcomes))


# ----------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    """Write checkpoints of steps 2, 4, 6 and other files."""
    for step in (4, 2, 6):
        save(step_path(tmp_path, step), state(step=step))
    for name in ("best.pt", ".0123.tmp", "step-9.pt", "xstep-00000010.pt", "log.jsonl"):
        (tmp_path / name).write_text("something else")
    return tmp_path


def test_step_files_are_listed_newest_first(folder):
    assert [path.name for path in step_files(folder)] == ["step-00000006.pt", "step-00000004.pt", "step-00000002.pt"]
    save(step_path(folder, 123_456_789), state())
    assert step_files(folder)[0].name == "step-123456789.pt"


def test_the_newest_intact_checkpoint_is_opened(folder):
    skipped = []
    for step in (6, 4, 2):
        found = open_newest(folder)
        assert (found.path, found.header.step, list(found.skipped)) == (step_path(folder, step), step, skipped)
        found.path.write_bytes(found.path.read_bytes()[:-1])
        skipped.append(found.path)
    with pytest.raises(CheckpointError, match="holds no intact checkpoint") as caught:
        open_newest(folder)
    assert "\n" not in str(caught.value) and all(path.name in str(caught.value) for path in skipped)


def test_only_the_newest_are_retained(folder):
    others = {path.name for path in folder.iterdir()} - {path.name for path in step_files(folder)}
    for keep, left in ((9, [6, 4, 2]), (2, [6, 4]), (1, [6])):
        retain(folder, keep)
        assert step_files(folder) == [step_path(folder, step) for step in left]
        assert {path.name for path in folder.iterdir()} >= others
