"""Saving during training: training only waits for the copy, and a disk error only causes a warning."""

import contextlib
import errno
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from processes import AnotherProcess
from rig import files_no_larger_than
from runs import load_state
from weight_files import plain_state

from utils import files
from utils.files import StorageError
from utils.run import checkpoint
from utils.run import folder as run_folder
from utils.run.checkpoint import NonFiniteError, open_newest, step_files, step_path
from utils.run.saver import Memory, Saver, copied, size_of

FULL_DISK = ("P8", "a full disk costs warnings and not the run, its checkpoints or its log")


def state(step: int, numbers: int = 6, **changes) -> checkpoint.RunState:
    weights = {"weight": torch.full((numbers,), float(step))}
    return plain_state(step, **{"model": weights, "optimizer": {"state": {0: dict(weights)}}, "best": best(step)} | changes)


def best(step: int) -> dict:
    return {"step": step, "accuracy": 0.5}


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def folder(tmp_path) -> Path:
    return run_folder.create(str(tmp_path), "r", "digits")


@pytest.fixture
def saver(folder, lines):
    saver = Saver(folder, keep=2, warn=lines.append)
    yield saver
    saver.wait()


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock", "log.jsonl"}


def save(saver, step: int, *files: Path, room: int | None = None, numbers: int = 1000, **changes) -> None:
    """Save and wait. `room` is the largest size of a file in bytes."""
    with contextlib.nullcontext() if room is None else files_no_larger_than(room):
        saver.save(list(files), state(step, numbers, **changes))
        saver.wait()


def slow_disk(monkeypatch, seconds: float) -> None:
    real = files.os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda file: time.sleep(seconds) or real(file))


# ---------------------------------------------------------------------------------------------------- without errors


def test_saved_states_are_loaded_and_the_newest_are_kept(saver, folder, lines, monkeypatch):
    """Each has the values at the time of its save, although the next save follows immediately and uses the same memory."""
    slow_disk(monkeypatch, 0.02)
    for step in (2, 4, 6):
        saver.save([step_path(folder, step), folder / "best.pt"], state(step))
    saver.close()
    assert names(folder) == {"step-00000004.pt", "step-00000006.pt", "best.pt"} and lines == []
    assert load_state(step_path(folder, 4)).model["weight"].tolist() == [4.0] * 6
    loaded, expected = vars(load_state(folder / "best.pt")), vars(state(6))
    assert torch.equal(loaded.pop("model")["weight"], expected.pop("model")["weight"])
    assert torch.equal(loaded.pop("optimizer")["state"][0]["weight"], expected.pop("optimizer")["state"][0]["weight"])
    assert loaded == expected and type(loaded["config"]["img_size"]) is tuple


def test_training_does_not_wait_for_a_slow_disk(saver, folder, monkeypatch):
    """Changes during the write are not in the file."""
    slow_disk(monkeypatch, 0.3)                         # for the log, the file and the folder
    content = state(2)
    started = time.monotonic()
    saver.save([step_path(folder, 2)], content)
    assert time.monotonic() - started < 0.2 and step_files(folder) == []
    content.model["weight"].fill_(7)
    content.optimizer["state"][0]["weight"].fill_(7)
    content.config["img_size"], content.step = 7, 7
    started = time.monotonic()
    saver.wait()
    assert time.monotonic() - started > 0.5
    saved = load_state(step_path(folder, 2))
    assert (saved.step, saved.config["img_size"]) == (2, (8, 10))
    assert saved.model["weight"].tolist() == saved.optimizer["state"][0]["weight"].tolist() == [2.0] * 6


@pytest.mark.contract("P8")
def test_training_waits_for_the_copy_alone(saver, folder, tries, figure):
    """With weights and momentum of 4 million numbers, with --full 86.6 million as in ViT-B/16. Its memory is reserved first."""
    content, threaded, direct = state(0, tries(4_000_000, 86_600_000)), [], []
    content.optimizer["state"][0]["weight"] = content.optimizer["state"][0]["weight"].clone()
    saver.reserve(content)
    for step in range(4):
        content.step = step
        started = time.monotonic()
        checkpoint.save(folder / "direct.pt", content)
        direct.append(time.monotonic() - started)
        started = time.monotonic()
        saver.save([step_path(folder, step)], content)
        threaded.append(time.monotonic() - started)
        saver.wait()
    threaded, direct = sorted(threaded[1:])[1], sorted(direct[1:])[1]
    assert threaded < direct
    size = (folder / "direct.pt").stat().st_size / 1e6
    figure(f"saves of {size:,.0f} MB: training waits {threaded:.2f} s (median), without a thread it would {direct:.2f} s", 3)


def test_a_fork_waits_for_the_end_of_the_write(saver, folder, monkeypatch):
    slow_disk(monkeypatch, 0.1)
    saver.save([step_path(folder, 2)], state(2))
    assert step_files(folder) == []
    child = os.fork()
    if child == 0:
        os._exit(0 if step_path(folder, 2).exists() and not list(folder.glob("*.tmp")) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_copies_share_no_memory_with_the_original_and_reuse_their_own():
    parameter = torch.nn.Parameter(torch.arange(4.0))
    value = {"a": [parameter, (1, "x", None)], "b": {3: torch.tensor(2, dtype=torch.int64)}, "c": parameter[1:3],
             "d": torch.arange(6.0).view(2, 3).t(), "e": torch.zeros(0, 3), "f": torch.tensor([True, False])}
    memory = Memory(size_of(value))
    first = copied(value, memory)
    assert first["a"][0].tolist() == [0, 1, 2, 3] and not first["a"][0].requires_grad and first["a"][1] == (1, "x", None)
    assert first["c"].untyped_storage().nbytes() == 8              # only the part, not the whole storage
    assert torch.equal(first["d"], value["d"]) and first["d"].stride() == (1, 3) and first["e"].shape == (0, 3)
    assert first["f"].tolist() == [True, False] and first["b"][3].shape == ()
    places = first["a"][0].data_ptr(), first["b"][3].data_ptr()
    with torch.no_grad():
        parameter.mul_(10)
    assert first["a"][0].tolist() == [0, 1, 2, 3]
    value["b"] = {3: torch.tensor(5, dtype=torch.int64)}
    value["c"] = torch.arange(4).to(torch.bfloat16)
    second = copied(value, memory)
    assert (second["a"][0].data_ptr(), second["b"][3].data_ptr()) == places
    assert second["a"][0].tolist() == [0, 10, 20, 30] and second["b"][3] == 5
    assert second["c"].dtype == torch.bfloat16 and second["c"].tolist() == [0, 1, 2, 3]


def test_missing_memory_is_reported(saver, folder):
    with pytest.raises(MemoryError, match="not enough memory for a copy of"):
        Memory(1 << 60)
    huge = torch.zeros(1).expand(1 << 58)               # it uses hardly any memory itself
    saver.reserve(state(2, model={"weight": huge}))
    saver.wait()                                        # the save reports it
    with pytest.raises(MemoryError):
        saver.save([step_path(folder, 2)], state(2, optimizer={"x": huge}))


def test_memory_is_reserved_before_the_first_save(saver, folder):
    saver.reserve(state(2, 100_000))
    saver.wait()
    memory = saver._memory
    for step in (2, 4):
        save(saver, step, step_path(folder, step), numbers=100_000)
        assert saver._memory is memory and load_state(step_path(folder, step)).model["weight"][-1] == step
    save(saver, 6, step_path(folder, 6), numbers=200_000)          # more than expected
    assert load_state(step_path(folder, 6)).model["weight"].shape == (200_000,)


@pytest.mark.parametrize("limit", [1 << 30, 1000], ids=["pinned", "more than the system allows"])
def test_memory_for_copies_of_a_gpu_is_pinned_at_its_exact_size_and_released(saver, folder, monkeypatch, limit):
    """With a stand-in for CUDA's functions."""
    class Cuda:
        pinned: dict[int, int] = {}
        most = 0

        def cudaHostRegister(self, place, size, flags):
            if size > limit:
                return 2                                # cudaErrorMemoryAllocation
            self.pinned[place] = size
            self.most = max(self.most, sum(self.pinned.values()))
            return 0

        def cudaHostUnregister(self, place):
            del self.pinned[place]

    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("utils.run.saver.on_gpu", lambda value: True)
    saver.reserve(state(2, 5_000))
    for numbers in (5_000, 6_000):                      # the second needs more
        save(saver, numbers, step_path(folder, numbers), numbers=numbers)
        assert load_state(step_path(folder, numbers)).model["weight"][-1] == numbers
        if limit > 1000:
            assert list(cuda.pinned.values()) == [size_of(vars(state(2, numbers)))]
    assert cuda.most < 1.1 * size_of(vars(state(2, 6_000)))                             # never two at the same time
    saver.close()
    assert not cuda.pinned


@pytest.mark.gpu
def test_copies_of_a_gpu_are_in_pinned_memory():
    value = {"weight": torch.arange(100_000.0, device="cuda")}
    memory = Memory(size_of(value), pinned=True)
    copy = copied(value, memory)["weight"]
    assert copy.is_pinned() and torch.equal(copy, value["weight"].cpu())
    del memory
    assert not copy.is_pinned() and copy[-1] == 99_999
    assert torch.zeros(1, device="cuda").item() == 0


def test_a_state_that_is_on_the_disk_is_not_written_again(saver, folder):
    """If a run is stopped right after a save."""
    save(saver, 2, folder / "best.pt", step_path(folder, 2))
    before = step_path(folder, 2).stat().st_ino
    save(saver, 2, step_path(folder, 2), seconds=9.0)
    assert step_path(folder, 2).stat().st_ino == before
    step_path(folder, 2).unlink()
    save(saver, 2, step_path(folder, 2))
    assert load_state(step_path(folder, 2)).step == 2


@pytest.mark.parametrize("field", ["model", "ema"])
def test_non_finite_weights_stop_training_and_keep_the_last_checkpoint(saver, folder, field):
    save(saver, 2, step_path(folder, 2))
    with pytest.raises(NonFiniteError) as caught:
        saver.save([step_path(folder, 4)], state(4, **{field: {"weight": torch.tensor([1.0, float("nan")])}}))
    assert caught.value.exit_code == 4
    saver.close()
    assert names(folder) == {"step-00000002.pt"} and load_state(step_path(folder, 2)).step == 2


def test_an_error_of_the_program_is_not_swallowed(saver, folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "save", lambda path, state: path.nothing)
    saver.save([step_path(folder, 2)], state(2))
    with pytest.raises(AttributeError):
        saver.wait()


# ------------------------------------------------------------------------------------------------------ disk errors


@pytest.mark.contract(*FULL_DISK)
def test_a_full_disk_at_any_byte_of_a_checkpoint(saver, folder, lines, tries, figure):
    save(saver, 2, step_path(folder, 2))
    size, chance, step, count = step_path(folder, 2).stat().st_size, random.Random(0), 2, tries(40, 1000)
    for _ in range(count):
        kept, step = open_newest(folder).path, step + 2
        before = names(folder)
        save(saver, step, step_path(folder, step), folder / "best.pt", room=chance.randrange(size))
        assert len(lines) == 1 and lines[0].startswith(f"warning: cannot write {folder / 'best.pt'} (File too large); earlier")
        assert "\n" not in lines[0] and open_newest(folder).path == kept and names(folder) == before and not saver.failed
        save(saver, step, step_path(folder, step))
        assert open_newest(folder).path == step_path(folder, step) and "saving works again" in lines[1] and len(lines) == 2
        lines.clear()
    saver.close()
    figure("saves on a disk that is full at any byte", count)


@pytest.mark.contract(*FULL_DISK)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_small_disk_that_is_full(tmp_path, lines, tries, figure):
    place, count = tmp_path / "disk", tries(3, 30)
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", place], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        folder = place / "r"
        folder.mkdir()                                 # without run_folder.create, whose lock would keep the disk busy
        saver = Saver(folder, keep=1, warn=lines.append)
        for step in range(1, 2 * count, 2):
            save(saver, step, step_path(folder, step), numbers=50_000)         # 0.4 MB
            (place / "others").write_bytes(bytes(1_300_000))                   # a second one does not fit
            save(saver, step + 1, step_path(folder, step + 1), numbers=50_000)
            assert "No space left on device" in lines[0] and names(folder) == {step_path(folder, step).name}
            assert load_state(step_path(folder, step)).step == step
            (place / "others").unlink()
            save(saver, step + 1, step_path(folder, step + 1), numbers=50_000)
            assert names(folder) == {step_path(folder, step + 1).name} and len(lines) == 2
            lines.clear()
        saver.close()
    finally:
        subprocess.run(["umount", place], check=True)
    figure("saves on a disk of 2 MB that is full", count)


def test_several_failures_in_a_row_end_the_run(saver, folder, lines):
    save(saver, 2, step_path(folder, 2))
    for number, step in enumerate((4, 6, 8), start=1):
        saver.raise_if_failed()
        save(saver, step, step_path(folder, step), room=100)
        assert f"(failed save {number} of 3 in a row that end the run)" in lines[-1]
    assert saver.failed and len(lines) == 3
    for end in (saver.raise_if_failed, saver.close):
        with pytest.raises(StorageError, match=r"3 failed save\(s\) in a row") as caught:
            end()
    line = str(caught.value)
    assert "step-00000008.pt (File too large)" in line and "RESUME_PATH" in line and "\n" not in line
    assert f"last checkpoint on the disk is {step_path(folder, 2)}" in line


def test_a_later_save_that_succeeds_counts(saver, folder):
    for step in (2, 4, 6):
        save(saver, step, step_path(folder, step), room=100)
    saver.save([step_path(folder, 8)], state(8))
    saver.raise_if_failed()                             # waits for it
    saver.close()
    assert names(folder) == {"step-00000008.pt"}


def test_a_run_ends_with_an_error_if_its_last_save_failed(saver, folder):
    with pytest.raises(StorageError, match=r"1 failed save\(s\).*No checkpoint was written:.*again"):
        save(saver, 2, step_path(folder, 2), room=100)
        saver.close()


def test_nothing_is_written_into_a_folder_that_vanished_or_that_another_run_has_taken(saver, folder, lines):
    shutil.rmtree(folder)
    save(saver, 2, step_path(folder, 2))
    assert len(lines) == 1 and "No such file or directory" in lines.pop() and not folder.exists()
    with AnotherProcess(lambda: run_folder.create(str(folder.parent), folder.name, "digits")) as other:
        save(saver, 4, step_path(folder, 4))
    assert len(lines) == 1 and f"in use by process {other.pid}" in lines[0] and names(folder) == set()


@pytest.mark.parametrize("error", [RuntimeError("[enforce fail at inline_container.cc]\n unexpected pos 64"), MemoryError()])
def test_other_failures_of_a_write_are_reported_in_one_line(saver, folder, lines, monkeypatch, error):
    def fails(path, state):
        raise error

    monkeypatch.setattr(checkpoint, "save", fails)
    save(saver, 2, step_path(folder, 2))
    assert len(lines) == 1 and "\n" not in lines[0] and ("unexpected pos 64" in lines[0] or "MemoryError" in lines[0])
    assert f"cannot write {step_path(folder, 2)} (" in lines[0]


def test_a_log_that_cannot_be_flushed_is_named(saver, folder, lines, monkeypatch):
    (folder / "log.jsonl").write_text("{}\n")

    def fails(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    save(saver, 2, step_path(folder, 2))
    assert lines[0].startswith(f"warning: cannot write {folder / 'log.jsonl'} (Input/output error); earlier checkpoints are kept")


def test_old_checkpoints_that_cannot_be_deleted_only_cause_a_warning(saver, folder, lines):
    (folder / "step-00000001.pt").mkdir()              # unlink fails, for root too
    for step in (2, 4):
        save(saver, step, step_path(folder, step))
    assert len(lines) == 1 and lines[0].startswith("warning: cannot delete old checkpoints in") and not saver.failed
    saver.close()
    assert load_state(step_path(folder, 4)).step == 4


# ------------------------------------------------------------------------------------------------------------- best


def test_the_best_is_the_one_on_the_disk(saver, folder):
    """After a failed save a later evaluation may become the best, and no checkpoint names a best.pt that does not exist."""
    assert saver.best == {}
    save(saver, 2, step_path(folder, 2), folder / "best.pt")
    assert saver.best == load_state(folder / "best.pt").best == load_state(step_path(folder, 2)).best == best(2)
    save(saver, 4, step_path(folder, 4), folder / "best.pt", room=100)
    assert saver.best == best(2) and load_state(folder / "best.pt").step == 2
    save(saver, 6, step_path(folder, 6))
    assert load_state(step_path(folder, 6)).best == best(2)
    (folder / "best.pt").unlink()
    assert saver.best == {}


def test_the_best_of_an_earlier_session_is_kept(folder):
    (folder / "best.pt").touch()
    saver = Saver(folder, keep=2, best=best(4))
    save(saver, 6, step_path(folder, 6))
    saver.close()
    assert load_state(step_path(folder, 6)).best == best(4)


def test_a_best_that_cannot_be_written_does_not_prevent_the_checkpoint(saver, folder):
    (folder / "best.pt").mkdir()
    save(saver, 2, folder / "best.pt", step_path(folder, 2))
    assert load_state(step_path(folder, 2)).step == 2
    with pytest.raises(StorageError, match=r"cannot write .*best.pt .*step-00000002.pt: make room"):
        saver.close()


def test_a_process_that_writes_reports_to_train_sh_that_it_is_alive(saver, folder, tmp_path, monkeypatch):
    """Otherwise train.sh would kill it after another process has failed, and the checkpoint would be lost."""
    monkeypatch.setenv("VIT_LAUNCH", str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    real = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, content: (time.sleep(1.5), real(path, content)))
    saver.save([step_path(folder, 1)], state(1))
    saver.wait()
    assert (tmp_path / "alive-0").exists() and step_path(folder, 1).exists()
