"""The folder of a run: it is used by one process at a time, resumed in place or as a branch, and its log is complete."""

import errno
import json
import os
import platform
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import FORK, AnotherProcess, error_of
from weight_files import plain_state

from utils import files
from utils.files import LOCK_FILE, InUseError, StorageError
from utils.run import checkpoint
from utils.run import folder as run_folder
from utils.run.checkpoint import CheckpointError, open_run_checkpoint, step_path
from utils.run.folder import (
    FolderError,
    create,
    find_run_checkpoint,
    resolve_checkpoint,
    write_config,
)
from utils.run.log import Log, read_log, scan_log, write_log

ONE_RUN = ("P17", "two runs never write into one folder, and a run that has ended never blocks another")


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "output"


def add_checkpoint(folder: Path, step: int, spoilt=False, best=None) -> Path:
    state = plain_state(step, best=best or {})
    path = step_path(folder, step)
    checkpoint.save(path, state)
    if spoilt:
        path.write_bytes(path.read_bytes()[:-1])
    return path


def make_run(output: Path, name="r", steps=(4, 8)) -> Path:
    """Write a finished run with events of every step and checkpoints of some. Return its folder."""
    folder = output / name
    folder.mkdir(parents=True)
    write_log(folder, [{"event": "start", "step": 0}] + [{"event": "train", "step": step} for step in range(1, max(steps) + 1)])
    (folder / "config.json").write_text("{}")
    for step in steps:
        add_checkpoint(folder, step)
    return folder


def resume(path: Path, output_dir: str | None = None, name: str | None = None) -> Path:
    return run_folder.resume(open_run_checkpoint(path), output_dir, name)[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK_FILE}


def steps_of(folder: Path) -> list[int]:
    return [event["step"] for event in read_log(folder)]


# ------------------------------------------------------------------------------------------------------ create


def test_unnamed_runs_are_numbered(output):
    folder = create(str(output), "mine", "digits")
    assert folder == output / "mine" and read_log(folder) == [] and (folder / "log.jsonl").exists()
    made = []
    for _ in range(3):
        made.append(create(str(output), None, "digits"))
        add_checkpoint(made[-1], 1)
    assert [folder.name for folder in made] == ["digits", "digits-2", "digits-3"]


@pytest.mark.parametrize("file", ["step-00000004.pt", "best.pt"])
def test_a_folder_that_holds_a_run_is_refused(output, file):
    (output / "r").mkdir(parents=True)
    (output / "r" / file).touch()
    write_log(output / "r", [{"step": 1}])
    before = contents(output / "r")
    message = error_of(FolderError, create, str(output), "r", "digits")
    assert "already holds a run" in message and "--name" in message
    assert re.search(f"RESUME_PATH={output}/r|--resume_path {output}/r", message)
    assert contents(output / "r") == before


def test_a_start_without_a_checkpoint_leaves_its_folder_free(output):
    (output / "r").mkdir(parents=True)
    write_log(output / "r", [{"event": "start", "step": 0}, {"event": "train", "step": 1}])
    assert create(str(output), "r", "digits") == output / "r"
    assert read_log(output / "r") == []
    (output / "digits").mkdir()
    assert create(str(output), None, "digits") == output / "digits"


def test_a_sweep_s_folder_is_refused_and_its_runs_are_named(output):
    sweep, runs = output / "s", "its final run is still to come; start the sweep again"
    sweep.mkdir(parents=True)
    (sweep / "sweep.json").touch()
    for final in (False, True):
        for find in (lambda: find_run_checkpoint(str(sweep)), lambda: resolve_checkpoint(sweep)):
            assert error_of(CheckpointError, find).startswith(f"{sweep} is a sweep: {runs}")
        if not final:
            make_run(sweep, "final")
            runs = f"give its final run, {sweep / 'final'}"
    before = sorted(output.rglob("*"))
    for refused in (lambda: create(str(output), "s", "s"), lambda: run_folder.check_free(str(output), "s"),
                    lambda: find_run_checkpoint("auto", str(output), "s")):
        assert error_of(FolderError, refused) == f"{sweep} already holds a sweep, of several runs. Choose another --name."
    assert sorted(output.rglob("*")) == before
    assert create(str(output), None, "s") == output / "s-2" and found_in(sweep / "final")


def test_a_folder_in_use_is_refused_and_free_afterwards(output):
    with AnotherProcess(lambda: create(str(output), "r", "digits")) as other:
        message = error_of(InUseError, create, str(output), "r", "digits")
        assert f"in use by process {other.pid} on {platform.node()}. Wait for it, stop it, or choose another --name." in message
        assert create(str(output), None, "r") == output / "r-2"              # an unnamed run gets the next number
    assert create(str(output), "r", "digits") == output / "r"                # killed: no lock is left behind


def test_resuming_a_run_in_use_is_refused(output):
    one, two = make_run(output, "one"), make_run(output, "two")
    newest, before = one / "step-00000008.pt", contents(one)
    with AnotherProcess(lambda: resume(newest)) as other:
        for check in ((resume, newest), (run_folder.check_free, str(output), "one"),
                      (run_folder.check_resume, newest, None, None)):
            assert f"in use by process {other.pid} on" in error_of(InUseError, *check)
        run_folder.check_resume(newest, None, "branch")                      # reading its checkpoints is allowed
        assert "already holds a run" in error_of(FolderError, run_folder.check_resume, newest, None, "two")
    run_folder.check_resume(newest, None, None)
    assert "already holds a run" in error_of(FolderError, run_folder.check_free, str(output), "one")
    assert not (output / "branch").exists() and not (two / LOCK_FILE).exists() and contents(one) == before
    assert resume(newest) == one


@pytest.mark.contract(*ONE_RUN)
def test_of_two_that_start_at_once_one_wins(output, tries, figure):
    count = tries(10, 200)

    def start(barrier, resumed, results):
        barrier.wait(20)
        try:
            folder = output / str(number)
            resume(folder / "step-00000004.pt") if resumed else create(str(output), str(number), "digits")
            results.put("won")
        except InUseError as error:
            results.put(str(error))
        barrier.wait(20)                           # the winner runs until the other has its result

    for number in range(count):
        resumed = number % 2 == 1
        if resumed:
            make_run(output, str(number), steps=(4,))
        barrier, results = FORK.Barrier(2), FORK.SimpleQueue()
        pair = [FORK.Process(target=start, args=(barrier, resumed, results)) for _ in range(2)]
        for process in pair:
            process.start()
        outcomes = sorted([results.get(), results.get()], key=lambda outcome: outcome == "won")
        for process in pair:
            process.join(20)
        assert outcomes[1] == "won" and any(f"in use by process {process.pid} on" in outcomes[0] for process in pair), outcomes
    figure("pairs of runs started at the same instant", count)


@pytest.mark.contract(*ONE_RUN)
def test_a_folder_is_free_as_soon_as_its_run_is_killed(output, tries, figure):
    folder, count, worst = make_run(output), tries(3, 20), 0.0
    for _ in range(count):
        with AnotherProcess(lambda: resume(folder / "step-00000008.pt")) as other:
            error_of(InUseError, resume, folder / "step-00000008.pt")
            os.kill(other.pid, signal.SIGKILL)
            other.join()
        started = time.monotonic()
        child = FORK.Process(target=resume, args=(folder / "step-00000008.pt",))
        child.start()
        child.join()
        assert child.exitcode == 0
        worst = max(worst, time.monotonic() - started)
    assert worst < 5
    figure("starts right after a kill -9 of the first", count)


def test_a_file_system_without_locks_is_reported(output, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", lockf)
    message = error_of(FolderError, create, str(output), "r", "digits")
    assert "No locks available" in message and "--output_dir" in message and "in use" not in message


def test_temporary_files_of_a_killed_process_are_deleted_by_the_next_run(output):
    """A refused run does not delete them: the other process may be writing them."""
    folder = make_run(output)
    with AnotherProcess(lambda: resume(folder / "step-00000008.pt")):
        for name in (".1.tmp", ".2.tmp"):
            (folder / name).touch()
        error_of(InUseError, resume, folder / "step-00000008.pt")
        assert len(list(folder.glob("*.tmp"))) == 2
    resume(folder / "step-00000008.pt")
    assert list(folder.glob("*.tmp")) == []
    (output / "new").mkdir()
    (output / "new" / ".3.tmp").touch()
    assert list(create(str(output), "new", "digits").glob("*.tmp")) == []


@pytest.mark.parametrize("start", ["create", "resume", "branch", "config"])
def test_a_full_disk_at_the_start_is_reported(output, monkeypatch, start):
    folder = make_run(output)
    before = contents(folder)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    call = {"create": (create, str(output), "new", "digits"), "resume": (resume, folder / "step-00000008.pt"),
            "branch": (resume, folder / "step-00000004.pt", None, "new"), "config": (write_config, folder, {}, {}, 1)}[start]
    assert "No space left on device" in error_of(StorageError, *call)
    assert contents(folder) == before and list(output.rglob("*.tmp")) == []


def test_a_file_in_the_place_of_a_folder_is_reported(tmp_path):
    (tmp_path / "page").write_text("x")
    for output_dir in ("page", "page/below"):
        assert str(tmp_path / "page") in error_of(FolderError, create, str(tmp_path / output_dir), "r", "digits")
    assert "is a file" in error_of(FolderError, create, str(tmp_path), "page", "digits")


# -------------------------------------------------------------------------------------------------- checkpoints


def found_in(*arguments) -> tuple[Path, list[Path]]:
    """Return (the checkpoint, the newer files that were skipped)."""
    found = find_run_checkpoint(*map(str, arguments))
    return found.path, list(found.skipped)


def test_the_newest_intact_checkpoint_is_found(output):
    folder = make_run(output)
    assert found_in(folder) == (folder / "step-00000008.pt", [])
    assert found_in(folder / "step-00000004.pt") == (folder / "step-00000004.pt", [])
    spoilt = add_checkpoint(folder, 9, spoilt=True)
    assert found_in(folder) == (folder / "step-00000008.pt", [spoilt])
    error_of(CheckpointError, find_run_checkpoint, str(spoilt))
    assert "nothing to resume at" in error_of(CheckpointError, find_run_checkpoint, str(output / "none"))
    (output / "empty").mkdir()
    assert "no intact checkpoint" in error_of(CheckpointError, find_run_checkpoint, str(output / "empty"))


def test_the_best_checkpoint_of_a_run_folder_is_found(output):
    folder = make_run(output)
    add_checkpoint(folder, 9).write_bytes(b"")
    assert resolve_checkpoint(folder) == str(folder / "step-00000008.pt")
    add_checkpoint(output, 4).rename(folder / "best.pt")
    assert resolve_checkpoint(folder) == str(folder / "best.pt")
    assert resolve_checkpoint("ViT-B_16") == "ViT-B_16" and resolve_checkpoint(folder / "x.pt") == folder / "x.pt"
    (output / "empty").mkdir()
    assert error_of(CheckpointError, resolve_checkpoint, output / "empty").endswith("holds no intact checkpoint")
    for file in folder.glob("*.pt"):
        file.unlink()
    (folder / "step-00000004.pt").touch()
    assert "holds no intact checkpoint (" in error_of(CheckpointError, resolve_checkpoint, folder)


@pytest.mark.contract("P19", "a run is never silently started from scratch")
def test_auto_resumes_where_there_is_something_to_resume(output, figure):
    def find(name="r"):
        return find_run_checkpoint("auto", str(output), name)

    assert find() is None                                                    # no folder
    (output / "r").mkdir(parents=True)
    assert find() is None                                                    # a run without a checkpoint yet
    write_log(output / "r", [{"event": "train", "step": 1}])
    (output / "r/.1.tmp").touch()
    assert find() is None
    best = add_checkpoint(output / "r", 2).rename(output / "r/best.pt")
    assert found_in("auto", output, "r") == (best, [])
    add_checkpoint(output / "r", 4)
    assert found_in("auto", output, "r") == (output / "r/step-00000004.pt", [])
    spoilt = add_checkpoint(output / "r", 8, spoilt=True)
    assert found_in("auto", output, "r") == (output / "r/step-00000004.pt", [spoilt])
    for file in (best, output / "r/step-00000004.pt"):
        file.write_bytes(b"")
    assert "no intact checkpoint" in error_of(CheckpointError, find)         # there was one, so it does not start from scratch
    for name in (None, ""):
        assert "RESUME_PATH=auto needs NAME" in error_of(FolderError, find, name)
    figure("states of a folder for RESUME_PATH=auto", 9)


# ------------------------------------------------------------------------------------------------------- resume


def test_resume_in_place_trims_the_log(output):
    folder = make_run(output, steps=(4, 8))
    write_log(folder, [*read_log(folder), {"event": "train", "step": 9}, {"event": "train", "step": 10}])
    with open(folder / "log.jsonl", "a") as stream:
        stream.write('{"event": "tr')
    for output_dir, name in ((None, None), (None, "r"), (str(output), None), (str(output), "r")):   # its own name is not a branch
        assert resume(folder / "step-00000008.pt", output_dir, name) == folder
    with open(folder / "log.jsonl", "a") as stream:
        stream.write('{"event": "train", "step": 9}\n')
    assert steps_of(folder) == list(range(10))


@pytest.mark.parametrize(("output_dir", "name", "expected"), [
    (None, "branch", "output/branch"), ("other", None, "other/r"), ("other", "branch", "other/branch")])
def test_branching_off_copies_the_log_up_to_the_step(tmp_path, output, output_dir, name, expected):
    folder = make_run(output)
    before = contents(folder)
    branch = resume(folder / "step-00000004.pt", output_dir and str(tmp_path / output_dir), name)
    assert branch == tmp_path / expected and steps_of(branch) == [0, 1, 2, 3, 4]
    assert contents(folder) == before and checkpoint.step_files(branch) == []


@pytest.mark.parametrize(("step", "kept"), [(2, True), (4, True), (8, False)])
def test_a_best_of_a_later_step_is_not_kept(output, step, kept):
    folder = make_run(output, steps=(4,))
    add_checkpoint(output, step, best={"step": step, "accuracy": 0.5}).rename(folder / "best.pt")
    for name in ("branch", None):
        resumed, found = run_folder.resume(open_run_checkpoint(folder / "step-00000004.pt"), None, name)
        assert found == ({"step": step, "accuracy": 0.5} if kept else {})
        assert not kept or (resumed / "best.pt").read_bytes() == (folder / "best.pt").read_bytes()
    assert (output / "branch/best.pt").exists() is kept
    (folder / "best.pt").write_bytes(b"")
    assert run_folder.resume(open_run_checkpoint(folder / "step-00000004.pt"), None, None)[1] == {}


def test_a_checkpoint_that_was_moved_needs_a_name(tmp_path, output, monkeypatch):
    """Without a config.json next to it, its folder is not a run folder."""
    moved = add_checkpoint(make_run(output), 9).rename(tmp_path / "best.pt")
    for refuse in (resume, lambda file: run_folder.check_resume(file, str(output), None)):
        assert "outside its run folder. Add a NAME (--name)" in error_of(FolderError, refuse, moved)
    monkeypatch.chdir(tmp_path)
    assert resume(moved, name="again") == Path("output/again") and steps_of(output / "again") == []


def test_an_older_checkpoint_is_not_resumed_in_place(output):
    folder = make_run(output, steps=(4,))
    best = add_checkpoint(folder, 4).rename(folder / "best.pt")
    assert resume(best) == folder                        # nothing newer is there
    for step in (4, 8, 12):
        add_checkpoint(folder, step)
    assert "step-00000012.pt" in error_of(FolderError, resume, best)
    before = contents(folder)
    message = error_of(FolderError, resume, folder / "step-00000004.pt")
    assert "step-00000012.pt" in message and "--name" in message and "from step 4" in message
    assert contents(folder) == before


def test_damaged_newer_checkpoints_are_renamed(output):
    """Otherwise they would count among the newest when old ones are deleted."""
    folder = make_run(output, steps=(4,))
    add_checkpoint(folder, 8, spoilt=True)
    assert run_folder.resume(find_run_checkpoint(str(folder)), None, None)[0] == folder
    assert (folder / "step-00000008.pt.damaged").exists()
    add_checkpoint(folder, 6)
    checkpoint.retain(folder, 1)
    assert [path.name for path in checkpoint.step_files(folder)] == ["step-00000006.pt"]
    add_checkpoint(folder, 8, spoilt=True)
    assert resume(folder / "step-00000006.pt") == folder         # also if the file is given, so that nothing newer was opened


# ---------------------------------------------------------------------------------------------------------- log


@pytest.mark.contract("P20", "log.jsonl has every step once and in order after any number of kills")
def test_the_log_is_whole_after_any_number_of_kills(output, tries, figure):
    """A process resumes, logs steps and saves every third one. It is killed at any instant, and the next process continues."""
    folder, total, chance, kills = make_run(output, steps=(3,)), tries(300, 3000), random.Random(0), 0

    def work():
        found = find_run_checkpoint(str(folder))
        done = found.header.step
        run_folder.resume(found, None, None)
        log = Log(folder, print)
        log.write({"event": "resume", "step": done})
        for step in range(done + 1, total + 1):
            log.write({"event": "train", "step": step, "loss": 1 / step})
            time.sleep(0.0005)                        # so that the run takes longer than the first wait on any machine
            if step % 3 == 0:
                add_checkpoint(folder, step)
                checkpoint.retain(folder, 2)
        os._exit(0)

    longest = 0.12
    while True:
        newest = checkpoint.step_files(folder)[0]
        process = FORK.Process(target=work)
        process.start()
        process.join(chance.uniform(0.01, longest))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        stuck = checkpoint.step_files(folder)[0] == newest                   # a slow machine must make progress too
        longest = 1.2 * longest if stuck else max(0.12, longest / 1.2)
    events, unreadable = scan_log(folder)
    assert unreadable == 0 and [event["step"] for event in events if event["event"] == "train"] == list(range(1, total + 1))
    resumed = [event["step"] for event in events if event["event"] == "resume"]
    assert resumed == sorted(resumed) and kills >= 1
    figure("kills of a run that logs and saves", kills)


# ------------------------------------------------------------------------------------------------------- config


def test_config_json(tmp_path, monkeypatch):
    write_config(tmp_path, {"name": "r", "img_size": (8, 10)}, {"hidden_size": 64}, 2)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content.pop("commit") is None or re.fullmatch(r"[0-9a-f]{7,40}\+?", run_folder._commit())
    versions = content.pop("versions")
    assert versions["python"] == platform.python_version() and versions["torch"] == torch.__version__ and versions["torchvision"]
    assert content == {"config": {"name": "r", "img_size": [8, 10]}, "architecture": {"hidden_size": 64}, "world_size": 2}
    assert os.listdir(tmp_path) == ["config.json"]
    monkeypatch.setenv("PATH", str(tmp_path))                              # without git
    assert run_folder._commit() is None
