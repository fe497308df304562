"""The folder of a run: claimed once, resumed in place or branched off, its log whole."""

import errno
import json
import multiprocessing
import os
import platform
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from utils.run import checkpoint
from utils.run import folder as run_folder
from utils.run.checkpoint import CheckpointError, StorageError, step_path
from utils.run.folder import FolderError, InUseError, create, find_checkpoint, resume, write_config
from utils.run.log import Log, read_log, scan_log, write_log

ONE_RUN = ("P17", "two runs never write into one folder, and a run that has ended never blocks another")
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


def told_to_the_second(output, first: int) -> float:
    """-> seconds until another process that asks for the run of process `first` is refused"""
    started = time.monotonic()
    said = told(InUseError, create, str(output), "r", "digits")
    assert f"in use by process {first} on {platform.node()}: wait for it, stop it, or give another NAME" in said
    return time.monotonic() - started


@pytest.mark.contract(*ONE_RUN)
def test_the_second_is_told_who_the_first_is(output, tries, figure):
    """Also where the first has not yet written who it is, over the words of a run that was killed."""
    assert InUseError.code == 7 and issubclass(InUseError, FolderError)
    count = tries(1, 20)
    for _ in range(count):
        with AnotherProcess(lambda: create(str(output), "r", "digits")) as other:
            assert told_to_the_second(output, other.pid) < 0.5
            lock = output / "r" / run_folder.LOCK_FILE
            for stale in ("", f"process {gone()} on {platform.node()}"):
                lock.write_text(stale)
                late = FORK.Process(target=write_later, args=(lock, f"process {other.pid} on {platform.node()}"))
                late.start()
                assert 0.1 < told_to_the_second(output, other.pid) < 2
                late.join()
    figure("second starts told within 2 s who is at work", 3 * count)


def gone() -> int:
    """The number of a process that has ended"""
    process = FORK.Process(target=int)
    process.start()
    process.join()
    return process.pid


def write_later(path, text):
    time.sleep(0.2)
    path.write_text(text)


def test_a_holder_that_never_says_who_it_is(output, monkeypatch):
    monkeypatch.setattr(run_folder, "OWNER_SECONDS", 0.1)
    with AnotherProcess(lambda: create(str(output), "r", "digits")):
        for said in ("", f"process {gone()} on {platform.node()}"):
            (output / "r" / run_folder.LOCK_FILE).write_text(said)
            assert "in use by another process" in told(InUseError, create, str(output), "r", "digits")
        (output / "r" / run_folder.LOCK_FILE).write_text("process 7 on another-machine")
        assert "in use by process 7 on another-machine" in told(InUseError, create, str(output), "r", "digits")


def test_a_run_at_work_is_told_before_time_is_spent(output):
    one, two = make_run(output, "one"), make_run(output, "two")
    newest = one / "step-00000008.pt"
    run_folder.check_unused(output / "none")
    with AnotherProcess(lambda: resume(newest, 8, None, None)) as other:
        for check in ((run_folder.check_unused, one), (run_folder.check_free, str(output), "one"),
                      (run_folder.check_resume, newest, None, None)):
            assert f"in use by process {other.pid} on" in told(InUseError, *check)
        run_folder.check_resume(newest, None, "branch")                      # its checkpoints may be read
        assert "already holds a run" in told(FolderError, run_folder.check_resume, newest, None, "two")
    run_folder.check_resume(newest, None, None)
    assert "already holds a run" in told(FolderError, run_folder.check_free, str(output), "one")
    assert not (output / "branch").exists() and not (two / run_folder.LOCK_FILE).exists()


def test_looking_does_not_release_ones_own_lock(output):
    folder = make_run(output)

    def claim_and_look():
        resume(folder / "step-00000008.pt", 8, None, None)
        run_folder.check_unused(folder)

    with AnotherProcess(claim_and_look) as other:
        assert f"in use by process {other.pid}" in told(InUseError, run_folder.check_unused, folder)
        assert f"in use by process {other.pid}" in told(InUseError, create, str(output), "r", "digits")


@pytest.mark.contract(*ONE_RUN)
def test_of_two_that_start_at_once_one_wins(output, tries, figure):
    count = tries(10, 200)

    def start(barrier, resumed, results):
        barrier.wait(20)
        try:
            folder = output / str(number)
            resume(folder / "step-00000004.pt", 4, None, None) if resumed else create(str(output), str(number), "digits")
            results.put("won")
        except InUseError as error:
            results.put(str(error))
        barrier.wait(20)                           # the winner lives until the other has been told

    for number in range(count):
        resumed = number % 2 == 1
        if resumed:
            make_run(output, str(number), steps=(4,))
        barrier, results = FORK.Barrier(2), FORK.SimpleQueue()
        pair = [FORK.Process(target=start, args=(barrier, resumed, results)) for _ in range(2)]
        for process in pair:
            process.start()
        outcomes = sorted([results.get(), results.get()], key=lambda said: said == "won")
        for process in pair:
            process.join(20)
        assert outcomes[1] == "won" and any(f"in use by process {process.pid} on" in outcomes[0] for process in pair), outcomes
    figure("pairs of runs started at the same instant", count)


@pytest.mark.contract(*ONE_RUN)
def test_a_folder_is_free_as_soon_as_its_run_is_killed(output, tries, figure):
    folder, count, worst = make_run(output), tries(3, 20), 0.0
    for _ in range(count):
        with AnotherProcess(lambda: resume(folder / "step-00000008.pt", 8, None, None)) as other:
            told(InUseError, resume, folder / "step-00000008.pt", 8, None, None)
            os.kill(other.pid, signal.SIGKILL)
            other.join()
        started = time.monotonic()
        child = FORK.Process(target=resume, args=(folder / "step-00000008.pt", 8, None, None))
        child.start()
        child.join()
        assert child.exitcode == 0
        worst = max(worst, time.monotonic() - started)
    assert worst < 5
    figure("starts right after a kill -9 of the first", count)


def test_a_file_system_without_locks_is_told(output, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", lockf)
    said = told(FolderError, create, str(output), "r", "digits")
    assert "No locks available" in said and "--output_dir" in said and "in use" not in said


def test_a_vanished_folder_is_made_anew_and_claimed(output):
    folder = output / "r"
    with AnotherProcess(lambda: run_folder.make_anew(folder)) as other:
        assert f"in use by process {other.pid}" in told(InUseError, run_folder.make_anew, folder)
    output_file = output / "file"
    output_file.touch()
    with pytest.raises(OSError):
        run_folder.make_anew(output_file / "r")


def test_what_a_killed_process_left_is_cleared_by_the_next_alone(output):
    """Not by one that is refused: the other may be writing it."""
    folder = make_run(output)
    with AnotherProcess(lambda: resume(folder / "step-00000008.pt", 8, None, None)):
        for name in ("step-00000012.pt.tmp", "log.jsonl.tmp"):
            (folder / name).touch()
        told(InUseError, resume, folder / "step-00000008.pt", 8, None, None)
        assert len(list(folder.glob("*.tmp"))) == 2
    resume(folder / "step-00000008.pt", 8, None, None)
    assert list(folder.glob("*.tmp")) == []
    (output / "new").mkdir()
    (output / "new" / "step-00000004.pt.tmp").touch()
    assert list(create(str(output), "new", "digits").glob("*.tmp")) == []


@pytest.mark.parametrize("start", ["create", "resume", "branch", "config"])
def test_a_full_disk_at_the_start_is_one_line_of_code_3(output, monkeypatch, start):
    folder = make_run(output)
    before = contents(folder)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    call = {"create": (create, str(output), "new", "digits"), "resume": (resume, folder / "step-00000008.pt", 8, None, None),
            "branch": (resume, folder / "step-00000004.pt", 4, None, "new"), "config": (write_config, folder, {}, {}, 1)}[start]
    assert "No space left on device" in told(StorageError, *call) and StorageError.code == 3
    assert contents(folder) == before and list(output.rglob("*.tmp")) == []


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


@pytest.mark.contract("P19", "a run is never silently started from scratch")
def test_auto_goes_on_where_there_is_something_to_go_on_from(output, figure):
    def find(name="r"):
        return find_checkpoint("auto", str(output), name)

    assert find() is None                                                    # no folder
    (output / "r").mkdir(parents=True)
    assert find() is None                                                    # a start that left no checkpoint
    write_log(output / "r", [{"event": "train", "step": 1}])
    (output / "r/step-00000004.pt.tmp").touch()
    assert find() is None
    best = add_checkpoint(output / "r", 2).rename(output / "r/best.pt")
    assert find() == (best, [])
    add_checkpoint(output / "r", 4)
    assert find() == (output / "r/step-00000004.pt", [])
    add_checkpoint(output / "r", 8, spoilt=True)
    path, complaints = find()
    assert path == output / "r/step-00000004.pt" and len(complaints) == 1
    for file in (best, output / "r/step-00000004.pt"):
        file.write_bytes(b"")
    assert "no intact checkpoint" in told(CheckpointError, find)             # there was one: not from scratch
    for name in (None, ""):
        assert "RESUME_PATH=auto needs NAME" in told(FolderError, find, name)
    figure("states of a folder that RESUME_PATH=auto is given", 9)


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


@pytest.mark.parametrize(("step", "copied"), [(2, True), (4, True), (8, False)])
def test_a_branch_takes_the_best_of_its_own_history(output, step, copied):
    folder = make_run(output)
    add_checkpoint(output, step).rename(folder / "best.pt")
    branch = resume(folder / "step-00000004.pt", 4, None, "branch")
    assert (branch / "best.pt").exists() is copied


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


def test_a_resumed_run_writes_on_after_the_cut(output):
    folder = make_run(output, steps=(4,))
    with open(folder / "log.jsonl", "a") as stream:
        stream.write('{"event": "tr')
    resume(folder / "step-00000004.pt", 4, None, None)
    with open(folder / "log.jsonl", "a") as stream:
        stream.write('{"event": "train", "step": 5}\n')
    assert steps_of(folder) == [0, 1, 2, 3, 4, 5]


@pytest.mark.contract("P20", "log.jsonl has every step once and in order after any number of kills")
def test_the_log_is_whole_after_any_number_of_kills(output, tries, figure):
    """A process resumes, logs steps and saves every third; it is killed at any instant, and the next goes on."""
    folder, total, chance, kills = make_run(output, steps=(3,)), tries(450, 3000), random.Random(0), 0

    def work():
        path, _ = find_checkpoint(str(folder))
        done = checkpoint.load(path).step
        resume(path, done, None, None)
        log = Log(folder, print)
        log.write({"event": "resume", "step": done})
        for step in range(done + 1, total + 1):
            log.write({"event": "train", "step": step, "loss": 1 / step})
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
        stuck = checkpoint.step_files(folder)[0] == newest                   # a slow machine is to get somewhere too
        longest = 1.2 * longest if stuck else max(0.12, longest / 1.2)
    events, unreadable = scan_log(folder)
    assert unreadable == 0 and [event["step"] for event in events if event["event"] == "train"] == list(range(1, total + 1))
    resumed = [event["step"] for event in events if event["event"] == "resume"]
    assert resumed == sorted(resumed) and kills >= 1
    figure("kills of a run that logs and saves", kills)


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
