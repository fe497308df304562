"""Files are written whole or not at all; one process at a time works in a folder."""

import errno
import os
import platform
import signal
import time
from pathlib import Path

import pytest
from processes import FORK, AnotherProcess, error_of

from utils import files
from utils.files import FileLock, InUseError, StorageError, atomic_write

ONE_RUN = ("P17", "two runs never write into one folder, and a run that has ended never blocks another")


def test_where_a_path_was_looked_for(tmp_path, monkeypatch):
    here, called = tmp_path / "here", tmp_path / "called"
    (called / "run").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("VIT_CALLED_FROM", str(called))
    assert files.where_looked("/no/such") == ""
    assert files.where_looked("gone") == f" (looked for in {here})"
    assert files.where_looked("run").endswith(f"relative paths are meant from the script's folder: {called / 'run'} is there)")
    (here / "link").symlink_to("/no/such")
    for path in ("link", "link/best.pt"):
        assert files.where_looked(path).startswith(" (link is a link to /no/such, which is not there; looked for in")
    (called / "dead").symlink_to("/no/such")                        # a link of the caller's folder
    assert files.where_looked("dead/x").endswith(f"the script's folder: {called / 'dead'} is a link to /no/such, which is not "
                                                 "there)")
    (here / "there").mkdir()
    assert files.located("there") == "there" and files.located(Path("gone")) == f"gone (looked for in {here})"


def test_what_is_no_folder(tmp_path):
    (tmp_path / "pets.ZIP").touch()
    (tmp_path / "list").touch()
    assert files.no_folder(tmp_path / "pets.ZIP") == "an archive, not a folder: unpack it, and give the folder"
    assert files.no_folder(tmp_path / "list") == "a file, not a folder" and files.no_folder("/no/such") == "no such folder"


# ------------------------------------------------------------------------------------------------------ atomic_write


def failing(*_):
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_failed_write_leaves_the_previous_file(tmp_path, monkeypatch, fails):
    (tmp_path / "x").write_text("old")

    def write(unfinished):
        unfinished.write_text("new")
        if fails == "write":
            failing()

    with monkeypatch.context() as patch:
        if fails != "write":
            patch.setattr(files.os, fails, failing)
        for path in (tmp_path / "x", tmp_path / "y"):
            assert error_of(StorageError, atomic_write, path, write) == f"cannot write {path} (Input/output error)"
    missing = error_of(StorageError, atomic_write, tmp_path / "none/x", lambda unfinished: unfinished.write_text("new"))
    assert missing == f"cannot write {tmp_path}/none/x (No such file or directory)" and StorageError.exit_code == 3
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]
    atomic_write(tmp_path / "x", lambda unfinished: unfinished.write_text("new"))
    assert (tmp_path / "x").read_text() == "new" and os.listdir(tmp_path) == ["x"]


def test_data_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    atomic_write(tmp_path / "x", lambda unfinished: unfinished.write_text("new"))
    assert calls == ["fsync", "replace", "fsync"]    # the file, its name, the folder


# ---------------------------------------------------------------------------------------------------------- FileLock


def test_lock_excludes_other_processes_until_its_owner_ends(tmp_path):
    lock = FileLock(tmp_path, "Stop it.")
    lock.check()
    assert os.listdir(tmp_path) == []
    with AnotherProcess(lock.acquire) as other:
        for refused in (lock.acquire, lock.check):
            assert error_of(InUseError, refused) == f"{tmp_path} is in use by process {other.pid} on {platform.node()}. Stop it."
    assert InUseError.exit_code == 7
    lock.acquire()
    lock.release()

    def acquire_and_release():
        (other := FileLock(tmp_path)).acquire()
        other.release()

    with AnotherProcess(acquire_and_release):
        lock.acquire()
    lock.release()


def test_checking_does_not_release_the_own_lock(tmp_path):
    def acquire_and_check():
        FileLock(tmp_path).acquire()
        FileLock(tmp_path).check()

    with AnotherProcess(acquire_and_check) as other:
        assert f"in use by process {other.pid}" in error_of(InUseError, FileLock(tmp_path).check)


def test_forked_children_do_not_keep_the_lock(tmp_path):
    note = tmp_path / "child"

    def acquire_then_fork():
        FileLock(tmp_path).acquire()
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        note.write_text(str(child))

    with AnotherProcess(acquire_then_fork):
        error_of(InUseError, FileLock(tmp_path).acquire)
    try:
        FileLock(tmp_path).acquire()
    finally:
        os.kill(int(note.read_text()), signal.SIGKILL)


def ended_process() -> int:
    process = FORK.Process(target=int)
    process.start()
    process.join()
    return process.pid


def write_later(path, text):
    time.sleep(0.2)
    path.write_text(text)


@pytest.mark.contract(*ONE_RUN)
def test_the_owner_is_named_even_while_it_writes_its_name(tmp_path, tries, figure):
    """The file may still hold the name of a process that was killed."""
    count = tries(1, 20)
    for _ in range(count):
        with AnotherProcess(FileLock(tmp_path).acquire) as other:
            for stale in ("", f"process {ended_process()} on {platform.node()}"):
                (tmp_path / ".lock").write_text(stale)
                owner = f"process {other.pid} on {platform.node()}"
                late = FORK.Process(target=write_later, args=(tmp_path / ".lock", owner))
                late.start()
                assert f"in use by {owner}." in error_of(InUseError, FileLock(tmp_path).acquire)
                late.join()
    figure("second starts told who is at work", 2 * count)


def test_an_owner_that_never_writes_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "OWNER_SECONDS", 0.1)
    with AnotherProcess(FileLock(tmp_path).acquire):
        for text in ("", f"process {ended_process()} on {platform.node()}"):
            (tmp_path / ".lock").write_text(text)
            assert "in use by another process." in error_of(InUseError, FileLock(tmp_path).acquire)
        (tmp_path / ".lock").write_text("process 7 on another-machine")
        assert "in use by process 7 on another-machine." in error_of(InUseError, FileLock(tmp_path).acquire)
