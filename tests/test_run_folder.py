"""The folder of a run: claimed once, resumed in place or branched off, its log whole."""

import json
import multiprocessing
import os
import platform
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from utils import checkpoint, run_folder
from utils.checkpoint import CheckpointError, step_path
from utils.run_folder import FolderError, InUseError, create, find_checkpoint, read_log, resume, write_config, write_log

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "output"


def add_checkpoint(folder: Path, step: int, spoilt=False) -> Path:
    state = checkpoint.RunState(step, step, 0, {}, {}, {}, {}, {}, {}, {}, [], 7, 0.0)
    path = step_path(folder, step)
    checkpoint.save(path, state)
    if spoilt:
        path.write_bytes(path.read_bytes()[:-1])
    return path


def make_run(output: Path, name="r", steps=(4, 8)) -> Path:
    """A run that has ended: events of every step, a checkpoint at some of them"""
    folder = output / name
    folder.mkdir(parents=True)
    write_log(folder, [{"event": "start", "step": 0}] + [{"event": "train", "step": step} for step in range(1, max(steps) + 1)])
    (folder / "config.json").write_text("{}")
    for step in steps:
        add_checkpoint(folder, step)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != run_folder.LOCK_FILE}


def steps_of(folder: Path) -> list[int]:
    return [event["step"] for event in read_log(folder)]


def told(error_type, function, *args) -> str:
    """What the error says, in its one line"""
    with pytest.raises(error_type) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class AnotherProcess:
    """with AnotherProcess(function): the function has been called in another process, which is still alive."""

    def __init__(self, function):
        self.ready = FORK.Event()
        self.process = FORK.Process(target=self.work, args=(function,))

    def work(self, function):
        function()
        self.ready.set()
        time.sleep(60)

    def __enter__(self):
        self.process.start()
        assert self.ready.wait(20)
        return self.process

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()


# ------------------------------------------------------------------------------------------------------ create


def test_a_named_run(output):
    folder = create(str(output), "mine", "digits")
    assert folder == output / "mine" and folder.is_dir() and read_log(folder) == [] and (folder / "log.jsonl").exists()


def test_unnamed_runs_are_numbered(output):
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
    said = told(FolderError, create, str(output), "r", "digits")
    assert "already holds a run" in said and f"RESUME_PATH={output}/r" in said and "--name" in said
    assert contents(output / "r") == before


def test_a_start_without_a_checkpoint_leaves_its_folder_free(output):
    (output / "r").mkdir(parents=True)
    write_log(output / "r", [{"event": "start", "step": 0}, {"event": "train", "step": 1}])
    assert create(str(output), "r", "digits") == output / "r"
    assert read_log(output / "r") == []
    (output / "digits").mkdir()
    assert create(str(output), None, "digits") == output / "digits"


def test_a_folder_in_use_is_refused_and_free_afterwards(output):
    with AnotherProcess(lambda: create(str(output), "r", "digits")) as other:
        said = told(InUseError, create, str(output), "r", "digits")
        assert f"in use by process {other.pid} on {platform.node()}" in said
        assert create(str(output), None, "r") == output / "r-2"              # an unnamed run takes the next
    assert create(str(output), "r", "digits") == output / "r"                # killed: no lock is left behind


def test_resuming_a_run_in_use_is_refused(output):
    folder = make_run(output)
    before = contents(folder)
    with AnotherProcess(lambda: resume(folder / "step-00000008.pt", 8, None, None)):
        assert "in use by process" in told(InUseError, resume, folder / "step-00000008.pt", 8, None, None)
    assert contents(folder) == before
    assert resume(folder / "step-00000008.pt", 8, None, None) == folder


def test_loader_workers_do_not_keep_the_folder(output, tmp_path):
    """A child of the process that claimed it lives on; the folder is free as soon as that process has ended."""
    note = tmp_path / "worker"

    def claim_then_fork():
        create(str(output), "r", "digits")
        worker = os.fork()
        if worker == 0:
            time.sleep(30)
            os._exit(0)
        note.write_text(str(worker))

    with AnotherProcess(claim_then_fork):
        told(InUseError, create, str(output), "r", "digits")
    try:
        assert create(str(output), "r", "digits") == output / "r"
    finally:
        os.kill(int(note.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("output_dir", ["page", "page/below"])
def test_a_file_in_the_way_is_told(tmp_path, output_dir):
    (tmp_path / "page").write_text("x")
    assert str(tmp_path / "page") in told(FolderError, create, str(tmp_path / output_dir), "r", "digits")
    assert (tmp_path / "page").read_text() == "x"


def test_a_file_of_the_runs_name_is_told(tmp_path):
    (tmp_path / "r").write_text("x")
    assert "is a file" in told(FolderError, create, str(tmp_path), "r", "digits")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "r").mkdir()
    for place in (tmp_path / "r", tmp_path):
        place.chmod(0o500)
    for output_dir in (tmp_path, tmp_path / "new"):
        assert "cannot write" in told(FolderError, create, str(output_dir), "r", "digits")


# -------------------------------------------------------------------------------------------------- checkpoints


def test_find_checkpoint(output):
    folder = make_run(output)
    assert find_checkpoint(str(folder)) == (folder / "step-00000008.pt", [])
    assert find_checkpoint(str(folder / "step-00000004.pt")) == (folder / "step-00000004.pt", [])
    add_checkpoint(folder, 9, spoilt=True)
    path, complaints = find_checkpoint(str(folder))
    assert path == folder / "step-00000008.pt" and len(complaints) == 1
    assert "nothing to resume at" in told(CheckpointError, find_checkpoint, str(output / "none"))
    (output / "empty").mkdir()
    assert "no intact checkpoint" in told(CheckpointError, find_checkpoint, str(output / "empty"))


# ------------------------------------------------------------------------------------------------------- resume


def test_resume_in_place_trims_the_log(output):
    folder = make_run(output, steps=(4, 8))
    write_log(folder, [*read_log(folder), {"event": "train", "step": 9}, {"event": "train", "step": 10}])
    assert resume(folder / "step-00000008.pt", 8, None, None) == folder
    assert steps_of(folder) == list(range(9))


@pytest.mark.parametrize(("output_dir", "name"), [(None, "r"), ("same", None), ("same", "r")])
def test_its_own_name_is_no_branch(output, output_dir, name):
    folder = make_run(output)
    assert resume(folder / "step-00000008.pt", 8, output_dir and str(output), name) == folder


@pytest.mark.parametrize(("output_dir", "name", "expected"), [
    (None, "branch", "output/branch"), ("other", None, "other/r"), ("other", "branch", "other/branch")])
def test_branching_off_copies_the_log_up_to_the_step(tmp_path, output, output_dir, name, expected):
    folder = make_run(output)
    before = contents(folder)
    branch = resume(folder / "step-00000004.pt", 4, output_dir and str(tmp_path / output_dir), name)
    assert branch == tmp_path / expected and steps_of(branch) == [0, 1, 2, 3, 4]
    assert contents(folder) == before and checkpoint.step_files(branch) == []


def test_branching_into_a_run_is_refused(output):
    one, two = make_run(output, "one"), make_run(output, "two")
    before = contents(two)
    assert "already holds a run" in told(FolderError, resume, one / "step-00000004.pt", 4, None, "two")
    assert contents(two) == before


def test_an_older_checkpoint_is_not_resumed_in_place(output):
    folder = make_run(output, steps=(4, 8, 12))
    before = contents(folder)
    said = told(FolderError, resume, folder / "step-00000004.pt", 4, None, None)
    assert "step-00000012.pt" in said and "--name" in said and "from step 4" in said
    assert contents(folder) == before


def test_best_is_resumed_in_place_where_nothing_newer_is(output):
    folder = make_run(output, steps=(4,))
    best = add_checkpoint(folder, 4).rename(folder / "best.pt")
    assert resume(best, 4, None, None) == folder
    add_checkpoint(folder, 8)
    assert "step-00000008.pt" in told(FolderError, resume, best, 4, None, None)


def test_newer_checkpoints_that_are_damaged_do_not_count(output):
    folder = make_run(output, steps=(4,))
    add_checkpoint(folder, 8, spoilt=True)
    assert resume(folder / "step-00000004.pt", 4, None, None) == folder


def test_after_going_back_the_intact_checkpoint_is_the_one_that_is_kept(output):
    folder = make_run(output, steps=(4,))
    add_checkpoint(folder, 8, spoilt=True)
    path, _ = find_checkpoint(str(folder))
    resume(path, 4, None, None)
    add_checkpoint(folder, 6)
    checkpoint.retain(folder, 1)
    assert checkpoint.newest_intact(folder)[0] == folder / "step-00000006.pt"


# ---------------------------------------------------------------------------------------------------------- log


@pytest.mark.parametrize("tail", ['{"event": "train", "st', '{"event": "train", "step": 3', "\0\0\0\0", '{"a"\n'])
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, tail):
    events = [{"event": "train", "step": 1}, {"event": "train", "step": 2}]
    write_log(tmp_path, events)
    with open(tmp_path / "log.jsonl", "a") as stream:
        stream.write(tail)
    assert read_log(tmp_path) == events


def test_a_resumed_run_writes_on_after_the_cut(output):
    folder = make_run(output, steps=(4,))
    with open(folder / "log.jsonl", "a") as stream:
        stream.write('{"event": "tr')
    resume(folder / "step-00000004.pt", 4, None, None)
    with open(folder / "log.jsonl", "a") as stream:
        stream.write('{"event": "train", "step": 5}\n')
    assert steps_of(folder) == [0, 1, 2, 3, 4, 5]


def test_a_missing_log_is_empty_and_writing_leaves_no_scraps(tmp_path):
    assert read_log(tmp_path) == []
    write_log(tmp_path, [{"step": 1}])
    write_log(tmp_path, [{"step": 2, "loss": "nan"}])
    assert read_log(tmp_path) == [{"step": 2, "loss": "nan"}] and os.listdir(tmp_path) == ["log.jsonl"]


# ------------------------------------------------------------------------------------------------------- config


def test_config_json(tmp_path):
    write_config(tmp_path, {"name": "r", "img_size": (8, 10)}, {"hidden_size": 64}, 2)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content.pop("commit") is None or re.fullmatch(r"[0-9a-f]{7,40}\+?", run_folder._commit())
    versions = content.pop("versions")
    assert versions["python"] == platform.python_version() and versions["torch"] == torch.__version__ and versions["torchvision"]
    assert content == {"config": {"name": "r", "img_size": [8, 10]}, "architecture": {"hidden_size": 64}, "world_size": 2}
    assert os.listdir(tmp_path) == ["config.json"]


def test_no_commit_where_there_is_no_git(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(run_folder.subprocess, "run", missing)
    assert run_folder._commit() is None
