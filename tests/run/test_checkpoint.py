"""Checkpoints: whole or not at all, and never accepted when a single bit is wrong."""

import contextlib
import errno
import hashlib
import os
import random
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from models.checkpoints import torch_file
from utils.run import checkpoint
from utils.run.checkpoint import (
    CheckpointError,
    NonFiniteError,
    RunState,
    StorageError,
    check_finite,
    load,
    newest_intact,
    retain,
    save,
    step_files,
    step_path,
    verify,
)


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
        assert archive.comment == b"sha256:" + hashlib.sha256(saved.read_bytes()[:-71]).hexdigest().encode()
        assert all(info.CRC == 0 and info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    assert torch.serialization.get_crc32_options()   # for others
    assert torch.load(saved, weights_only=True)["step"] == 3


def test_a_later_save_replaces_the_earlier(saved):
    save(saved, state(seconds=9.0))
    assert load(saved).seconds == 9.0 and os.listdir(saved.parent) == [saved.name]


def test_every_kind_of_number_that_a_run_holds(tmp_path):
    """As LAMB, AdamW and loss scaling keep them, in the precisions of weights."""
    torch.manual_seed(0)
    model = {str(dtype): torch.randn(3, 4).to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
    kinds = model | {"bool": torch.tensor([True, False]), "long": torch.arange(3), "byte": torch.arange(3, dtype=torch.uint8),
                     "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "transposed": torch.randn(3, 4).t()}
    parameter = nn.Parameter(torch.randn(5))
    optimizer = torch.optim.AdamW([parameter], lr=torch.tensor(0.1), amsgrad=True)
    parameter.sum().backward()
    optimizer.step()
    save(tmp_path / "x.pt", state(model=kinds, optimizer=optimizer.state_dict(), best={"a": None, "b": (1, True), "c": -2 ** 60}))
    loaded = load(tmp_path / "x.pt")
    assert all(torch.equal(loaded.model[name], kinds[name]) and loaded.model[name].dtype == kinds[name].dtype for name in kinds)
    slots = optimizer.state_dict()["state"][0]
    assert all(torch.equal(loaded.optimizer["state"][0][name], slots[name]) for name in slots)
    assert loaded.best == {"a": None, "b": (1, True), "c": -2 ** 60}


def test_large_tensors_pass_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK", 1000)
    weights = {"a": torch.randn(3000), "b": torch.arange(3, dtype=torch.uint8)}
    save(tmp_path / "x.pt", state(model=weights))
    loaded = load(tmp_path / "x.pt").model
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


# ----------------------------------------------------------------------------------------------------- damage


def test_every_flipped_bit_is_noticed(saved):
    whole = saved.read_bytes()
    places = random.Random(0).sample(range(len(whole)), 300)
    places += [*range(20), *range(len(whole) - torch_file.SEAL_LENGTH - 22, len(whole))]      # start; directory's end, digest
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        saved.write_bytes(damaged)
        assert "damaged" in refused(saved) or place >= len(whole) - torch_file.SEAL_LENGTH, place
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
    checkpoint._write(path, content)
    return path


def test_a_file_from_before_averages_is_read(tmp_path):
    content = dict(vars(state()))
    for name in ("ema", "world_size", "threads", "data"):
        del content[name]
    loaded = load(sealed(tmp_path / "old.pt", content))
    assert loaded.ema == {} and loaded.step == 3 and loaded.format == checkpoint.FORMAT
    assert (loaded.world_size, loaded.threads, loaded.data) == (1, 0, "")


def test_a_file_with_check_sums_of_its_members_is_read(tmp_path, monkeypatch):
    """As every release wrote them before."""
    monkeypatch.setattr(checkpoint, "_without_crc", contextlib.nullcontext)
    save(step_path(tmp_path, 3), state())
    with zipfile.ZipFile(step_path(tmp_path, 3)) as archive:
        assert archive.testzip() is None and any(info.CRC for info in archive.infolist())
    assert torch.equal(load(step_path(tmp_path, 3)).model["weight"], state().model["weight"])


def test_a_sealed_file_is_read_once_for_its_sums(saved, monkeypatch):
    """`load` verifies the SHA-256 and `read` no other; opened as weights it is that which is verified; of others, the CRC."""
    asked, real = [], torch_file.is_sealed
    monkeypatch.setattr(torch_file, "is_sealed", lambda stream: asked.append(1) or real(stream))
    load(saved)
    assert len(asked) == 1
    torch_file.read(saved)
    assert len(asked) == 2
    whole = bytearray(saved.read_bytes())
    whole[whole.index(torch.arange(6.0).numpy().tobytes()) + 9] ^= 1
    saved.write_bytes(whole)
    with pytest.raises(torch_file.ModelError, match="SHA-256 does not match"):
        torch_file.read(saved)


@pytest.mark.parametrize(("field", "value"), [
    ("step", "3"), ("step", 3.0), ("model", [1]), ("classes", {"a": 1}), ("seconds", "long"), ("data", 7), ("best", None)])
def test_entries_of_another_type_are_refused(tmp_path, field, value):
    with pytest.raises(CheckpointError, match=f"its {field} is of type {type(value).__name__}") as told:
        load(sealed(tmp_path / "odd.pt", vars(state()) | {field: value}))
    assert "\n" not in str(told.value)


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


def half_written(content, stream):
    stream.write(b"half of it")
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
        for path in (saved, saved.with_name("step-00000009.pt")):
            with pytest.raises(StorageError, match=r"No space left on device|Input/output error") as told:
                save(path, state(seconds=9.0))
            assert told.value.code == 3 and str(path) in str(told.value) and "\n" not in str(told.value)
    assert saved.read_bytes() == whole and os.listdir(saved.parent) == [saved.name]
    save(saved, state(seconds=9.0))                  # and when there is space again, all is well
    assert load(saved).seconds == 9.0


def test_a_write_that_fails_in_the_middle_is_told_as_what_it_is(saved, monkeypatch):
    """torch's writer goes on after an error and has its own word for it."""
    class Full:
        def __init__(self, path, mode):
            self.file, self.left = open(path, mode), 700

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

    monkeypatch.setattr(checkpoint, "open", Full, raising=False)
    with pytest.raises(StorageError, match=r"step-00000004.pt \(No space left on device\)$"):
        save(step_path(saved.parent, 4), state(step=4))
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_told(dtype, wrong):
    weights = {"good": torch.full((3,), torch.finfo(dtype).max, dtype=dtype), "count": torch.arange(3), "empty": torch.zeros(0)}
    check_finite(weights)
    weights["blocks.1.bias"] = torch.tensor([0.0, wrong, 1.0], dtype=dtype)
    weights["later"] = weights["blocks.1.bias"]
    with pytest.raises(NonFiniteError, match=r"\(blocks.1.bias is the first\)") as told:
        check_finite(weights)
    assert told.value.code == 4
    check_finite({})


class CrashingFile:
    """Written without a buffer, each piece in two halves; `here` is called before, between and after."""

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


def save_in_a_child(path: Path, content: RunState, crash_at: int) -> None:
    """The child kills itself at one of the points of a save, counted from 1; 0: at none, it notes how many there are."""
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
    old, new = state(step=3, best={"step": 3}), state(step=6, best={"step": 6}, model={"weight": torch.arange(600.0)})
    save_in_a_child(tmp_path / name, new, crash_at=0)
    points = int((tmp_path / "points").read_text())
    assert points > 100
    outcomes = []
    for number in [*range(1, points - 7, tries(points // 10, 1)), *range(points - 7, points + 1)]:
        for left in (*tmp_path.glob("*.tmp"), step_path(tmp_path, 6)):
            left.unlink(missing_ok=True)
        save(tmp_path / "best.pt", old)
        save_in_a_child(tmp_path / name, new, crash_at=number)
        best, newest = load(tmp_path / "best.pt"), load(newest_intact(tmp_path)[0])
        assert newest_intact(tmp_path)[1] == [] and best.best["step"] == best.step
        found = best if name == "best.pt" else newest
        assert found.model["weight"].numel() == {3: 6, 6: 600}[found.step]
        outcomes.append(found.step)
    assert outcomes == [3] * (len(outcomes) - 3) + [6] * 3       # the old one until the name changes, then the new one
    figure(f"crash points of a save of {'a step' if name != 'best.pt' else 'best.pt, over the old one'}", len(outcomes))


def test_data_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(checkpoint.os, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    save(tmp_path / "x.pt", state())
    assert calls == ["fsync", "replace", "fsync"]    # the file, its name, the folder


@pytest.mark.contract("P6", "a checkpoint of which anything changed is refused, and the one before it serves")
def test_any_damage_is_refused_and_the_one_before_serves(tmp_path, tries, figure):
    older, newer, chance = step_path(tmp_path, 3), step_path(tmp_path, 6), random.Random(0)
    save(older, state(step=3))
    save(newer, state(step=6))
    whole = newer.read_bytes()

    def flipped():
        bits = bytearray(whole)
        place = chance.randrange(8 * len(whole))
        bits[place // 8] ^= 1 << place % 8
        return bytes(bits)

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
            path, complaints = newest_intact(tmp_path)
            assert path == older and len(complaints) == 1 and str(newer) in complaints[0] and "\n" not in complaints[0]
            with pytest.raises(CheckpointError):
                load(newer)
            tried += 1
        figure(what, tried)


@pytest.mark.contract("P6", "a checkpoint of which anything changed is refused, and the one before it serves")
def test_a_file_in_the_place_of_another_is_refused(tmp_path, figure):
    for step in (2, 3, 6):
        save(step_path(tmp_path, step), state(step=step))
    shutil.copyfile(step_path(tmp_path, 3), step_path(tmp_path, 6))
    assert "holds step 3" in refused(step_path(tmp_path, 6))
    path, complaints = newest_intact(tmp_path)
    assert path == step_path(tmp_path, 3) and len(complaints) == 1
    step_path(tmp_path, 3).rename(tmp_path / "x.pt")
    step_path(tmp_path, 2).rename(step_path(tmp_path, 3))
    with pytest.raises(CheckpointError, match=r"6.pt: holds step 3.*3.pt: holds step 2"):
        newest_intact(tmp_path)
    assert load(tmp_path / "x.pt").step == 3         # a name that tells no step
    figure("files renamed or swapped", 3)


@pytest.mark.parametrize("content", [[1, 2], {"format": "vit-run-1", "step": "3"}, {"step": None}, "x" * 5000], ids=repr)
def test_a_sealed_file_without_a_step_is_refused(tmp_path, content):
    assert "holds step None" in refused(sealed(step_path(tmp_path, 3), content))


def test_a_sealed_file_that_asks_for_memory_is_refused(tmp_path):
    """Its digest is right, its tensor of 10^12 numbers has the storage of one."""
    huge = torch.zeros(1).as_strided((10 ** 6, 10 ** 6), (0, 0))
    with pytest.raises(CheckpointError) as told:
        load(sealed(tmp_path / "huge.pt", vars(state()) | {"model": {"weight": huge}}))
    assert "\n" not in str(told.value)


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
