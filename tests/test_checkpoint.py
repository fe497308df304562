"""Checkpoints: whole or not at all, and never accepted when a single bit is wrong."""

import errno
import os
import random
import zipfile

import pytest
import torch
from torch import nn

from utils import checkpoint
from utils.checkpoint import CheckpointError, RunState, load, newest_intact, retain, save, step_files, step_path, verify


def state(step=3, **changes) -> RunState:
    values = {"step": step, "updates": step - 1, "skips": 1, "model": {"weight": torch.arange(6.0).view(2, 3)}, "optimizer": {},
              "scaler": {"scale": 65536.0}, "best": {"step": 2, "accuracy": 0.5}, "first": {"accuracy": 0.125},
              "config": {"img_size": (8, 10), "name": None, "learning_rate": 1e-3}, "architecture": {"mean": (0.5, 0.5, 0.5)},
              "classes": ["a", "b"], "train_images": 7, "seconds": 1.5, "ema": {"weight": torch.arange(6.0).view(2, 3) / 7}}
    return RunState(**values | changes)


@pytest.fixture
def saved(tmp_path):
    save(tmp_path / "step-00000003.pt", state())
    return tmp_path / "step-00000003.pt"


def refused(path) -> str:
    """Both readers refuse the file, in one line that names it."""
    said = set()
    for reader in (verify, load):
        with pytest.raises(CheckpointError) as told:
            reader(path)
        said.add(str(told.value))
    assert len(said) == 1
    line = said.pop()
    assert "\n" not in line and str(path) in line
    return line


# ------------------------------------------------------------------------------------------------- round trip


def test_what_is_saved_is_loaded(saved):
    loaded, expected = vars(load(saved)), vars(state())
    for weights in ("model", "ema"):
        assert torch.equal(loaded.pop(weights)["weight"], expected.pop(weights)["weight"])
    assert loaded == expected and type(loaded["config"]["img_size"]) is tuple
    verify(saved)
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=0.1)],
                         ids=["sgd", "adamw"])
def test_an_optimizer_goes_on_as_if_nothing_had_happened(tmp_path, make):
    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())
    step(model, optimizer)
    save(tmp_path / "x.pt", state(model=model.state_dict(), optimizer=optimizer.state_dict()))
    loaded = load(tmp_path / "x.pt")
    again = nn.Linear(3, 2)
    again_optimizer = make(again.parameters())
    again.load_state_dict(loaded.model)
    again_optimizer.load_state_dict(loaded.optimizer)
    for _ in range(3):
        step(model, optimizer)
        step(again, again_optimizer)
    assert torch.equal(model.weight, again.weight) and torch.equal(model.bias, again.bias)


def test_the_file_is_an_ordinary_archive(saved):
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:") and len(archive.comment) == checkpoint.COMMENT_LENGTH
    assert torch.load(saved, weights_only=True)["step"] == 3


def test_a_later_save_replaces_the_earlier(saved):
    save(saved, state(step=9))
    assert load(saved).step == 9 and os.listdir(saved.parent) == [saved.name]


# ----------------------------------------------------------------------------------------------------- damage


def test_every_flipped_bit_is_noticed(saved):
    whole = saved.read_bytes()
    places = random.Random(0).sample(range(len(whole)), 300)
    places += [*range(20), *range(len(whole) - checkpoint.COMMENT_LENGTH - 22, len(whole))]      # start; directory's end, digest
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        saved.write_bytes(damaged)
        assert "damaged" in refused(saved) or place >= len(whole) - checkpoint.COMMENT_LENGTH, place
    saved.write_bytes(whole)
    assert load(saved).step == 3


def test_every_truncation_is_noticed(saved):
    whole = saved.read_bytes()
    for length in [*range(0, len(whole), 37), *range(len(whole) - 100, len(whole))]:
        saved.write_bytes(whole[:length])
        refused(saved)


def test_appended_bytes_are_noticed(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    refused(saved)


FOREIGN = {"empty": b"", "one byte": b"P", "zeros": bytes(5000), "page": b"<!DOCTYPE html><html>404</html>" * 50,
           "digest alone": b"sha256:" + b"0" * 64, "zip without anything": b"PK\5\6" + bytes(18)}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files_are_refused(tmp_path, case):
    path = tmp_path / "step-00000003.pt"
    path.write_bytes(FOREIGN[case])
    assert "not a checkpoint of this program" in refused(path)


def test_zero_filled_tails_are_refused(saved):
    """What a crash of the machine may leave: the right length, the end never written."""
    whole = saved.read_bytes()
    for kept in (0, len(whole) // 2, len(whole) - 10):
        saved.write_bytes(whole[:kept] + bytes(len(whole) - kept))
        refused(saved)


def test_checkpoints_of_other_programs_are_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"model": {"weight": torch.zeros(3)}}, path)
    assert "not a checkpoint of this program" in refused(path)
    torch.save({"weight": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    assert "not a zip archive" in refused(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    assert "No such file" in refused(tmp_path / "none.pt")
    refused(tmp_path)


@pytest.mark.parametrize("content", [{"format": "vit-run-0", "step": 3}, {"step": 3}, [1, 2]], ids=str)
def test_other_versions_of_the_format_are_told(tmp_path, content):
    with pytest.raises(CheckpointError, match="this version"):
        load(sealed(tmp_path / "old.pt", content))


def sealed(path, content):
    torch.save(content, path)
    checkpoint._seal(path)
    return path


def test_a_file_from_before_averages_is_read(tmp_path):
    content = dict(vars(state()))
    del content["ema"]
    loaded = load(sealed(tmp_path / "old.pt", content))
    assert loaded.ema == {} and loaded.step == 3 and loaded.format == checkpoint.FORMAT


@pytest.mark.parametrize("name", ["model", "skips", "architecture", "train_images"])
def test_a_file_that_lacks_anything_else_is_refused(tmp_path, name):
    content = dict(vars(state()))
    del content[name]
    with pytest.raises(CheckpointError, match="this version"):
        load(sealed(tmp_path / "less.pt", content))
    with pytest.raises(CheckpointError, match="this version"):
        load(sealed(tmp_path / "more.pt", vars(state()) | {"another": 1}))


def test_nothing_in_a_file_is_run(tmp_path):
    """Sealed as ours, but with code in it."""
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made by the file"),)

    path = sealed(tmp_path / "code.pt", vars(state()) | {"best": Code()})
    with pytest.raises(CheckpointError) as told:
        load(path)
    assert "\n" not in str(told.value) and not (tmp_path / "made by the file").exists()


# ----------------------------------------------------------------------------------------------------- writing


def half_written(content, path):
    path.write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, "No space left on device")


def failing(*_, **__):
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(("owner", "name", "fails"), [
    (checkpoint.torch, "save", half_written), (checkpoint.os, "fsync", failing), (checkpoint.os, "replace", failing)],
    ids=["write", "fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file(saved, monkeypatch, owner, name, fails):
    whole = saved.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(OSError):
            save(saved, state(step=9))
        with pytest.raises(OSError):
            save(saved.with_name("step-00000009.pt"), state(step=9))
    assert saved.read_bytes() == whole and os.listdir(saved.parent) == [saved.name]
    save(saved, state(step=9))                       # and when there is space again, all is well
    assert load(saved).step == 9


def test_data_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(checkpoint.os, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    save(tmp_path / "x.pt", state())
    assert calls == ["fsync", "replace", "fsync"]    # the file, its name, the folder


# ----------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 2, 4, 6, and what else may lie there"""
    for step in (4, 2, 6):
        save(step_path(tmp_path, step), state(step=step))
    for name in ("best.pt", "step-00000008.pt.tmp", "step-9.pt", "xstep-00000010.pt", "log.jsonl"):
        (tmp_path / name).write_text("something else")
    return tmp_path


def spoil(path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_step_files_are_listed_newest_first(folder):
    assert [path.name for path in step_files(folder)] == ["step-00000006.pt", "step-00000004.pt", "step-00000002.pt"]
    save(step_path(folder, 123_456_789), state())
    assert step_files(folder)[0].name == "step-123456789.pt"


def test_newest_intact(folder):
    assert newest_intact(folder) == (step_path(folder, 6), [])
    spoil(step_path(folder, 6))
    path, complaints = newest_intact(folder)
    assert path == step_path(folder, 4) and len(complaints) == 1 and "step-00000006.pt" in complaints[0]
    spoil(step_path(folder, 4))
    path, complaints = newest_intact(folder)
    assert path == step_path(folder, 2) and len(complaints) == 2
    spoil(step_path(folder, 2))
    with pytest.raises(CheckpointError, match="no intact checkpoint") as told:
        newest_intact(folder)
    assert "\n" not in str(told.value) and all(f"step-0000000{step}.pt" in str(told.value) for step in (2, 4, 6))


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no intact checkpoint$"):
        newest_intact(tmp_path)


@pytest.mark.parametrize(("keep", "left"), [(1, [6]), (2, [6, 4]), (3, [6, 4, 2]), (9, [6, 4, 2])])
def test_retention(folder, keep, left):
    others = {path.name for path in folder.iterdir()} - {path.name for path in step_files(folder)}
    retain(folder, keep)
    assert step_files(folder) == [step_path(folder, step) for step in left]
    assert {path.name for path in folder.iterdir()} >= others
