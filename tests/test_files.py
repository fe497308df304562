"""Files are written completely or not at all; only one process at a time works in a folder."""

import ast
import csv
import errno
import io
import os
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import rig
from processes import FORK, AnotherProcess, error_of

from utils import files, process
from utils.files import FileLock, InUseError, StorageError, atomic_folder, atomic_write
from utils.run.log import Log

ROOT = Path(__file__).resolve().parents[1]

ONE_RUN = ("P17", "two runs never write into one folder, and a run that has ended never blocks another")


def test_where_a_path_was_searched(tmp_path, monkeypatch):
    here, called = tmp_path / "here", tmp_path / "called"
    (called / "run").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("VIT_CALLED_FROM", str(called))
    assert files.where_looked("/no/such") == ""
    assert files.where_looked("gone") == f" (searched in {here})"
    assert files.where_looked("run").endswith(f"relative paths start at the script's folder; {called / 'run'} exists)")
    (here / "link").symlink_to("/no/such")
    for path in ("link", "link/best.pt"):
        assert files.where_looked(path).startswith(" (link is a link to /no/such, which does not exist; searched in")
    (called / "dead").symlink_to("/no/such")                        # a link in the caller's folder
    assert files.where_looked("dead/x").endswith(f"the script's folder; {called / 'dead'} is a link to /no/such, which does "
                                                 "not exist)")
    (here / "there").mkdir()
    assert files.located("there") == "there" and files.located(Path("gone")) == f"gone (searched in {here})"


def test_paths_that_are_not_folders_are_described(tmp_path):
    (tmp_path / "pets.ZIP").touch()
    (tmp_path / "list").touch()
    assert files.no_folder(tmp_path / "pets.ZIP") == "an archive, not a folder. Unpack it and use the unpacked folder"
    assert files.no_folder(tmp_path / "list") == "a file, not a folder" and files.no_folder("/no/such") == "no such folder"


def test_atomic_folder_is_complete_or_absent(tmp_path, monkeypatch):
    """Also if its name is taken, or the disk is full."""
    atomic_folder(tmp_path / "a", lambda folder: (folder / "x").write_text("1"))
    assert (tmp_path / "a/x").read_text() == "1" and os.listdir(tmp_path) == ["a"]
    assert "cannot write" in error_of(StorageError, atomic_folder, tmp_path / "a", lambda folder: None)

    def full(folder):
        (folder / "x").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    assert "cannot write" in error_of(StorageError, atomic_folder, tmp_path / "b", full)
    with pytest.raises(KeyError):
        atomic_folder(tmp_path / "b", lambda folder: {}["x"])
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a/x").read_text() == "1"


# ------------------------------------------------------------------------------------------------- names of files


def test_error_of_an_open_file_gets_its_name(tmp_path):
    with pytest.raises(OSError) as caught, files.naming(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "x") and caught.value.errno == errno.ENOSPC
    with pytest.raises(FileNotFoundError) as caught, files.naming("other"):
        open(tmp_path / "gone")                                      # this error has a name already
    assert caught.value.filename == str(tmp_path / "gone")
    with pytest.raises(OSError, match=r"^cut off$"), files.naming("x"):
        raise OSError("cut off")


def test_errors_of_write_flush_and_close_name_their_file(tmp_path, monkeypatch):
    with rig.files_no_larger_than(10), pytest.raises(OSError) as caught:
        files.write_file(tmp_path / "x", "more than ten letters")
    assert process.classify_error(caught.value) == (f"{tmp_path / 'x'}: File too large", 2)
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError) as caught:
        files.fsync_path(tmp_path / "x")
    assert process.classify_error(caught.value) == (f"{tmp_path / 'x'}: Input/output error", 2)
    log = Log(tmp_path, print)
    monkeypatch.setattr(os, "close", failing)
    with pytest.raises(OSError) as caught:
        log.close()
    assert caught.value.filename == str(tmp_path / "log.jsonl")


# Files that write without either of the two: with their own rules, or where the file is optional (launch.post_exit_code).
UNNAMED = {"utils/files.py", "utils/launch.py", "utils/run/checkpoint.py", "utils/process.py"}


def writes_of(tree: ast.AST, around: tuple = ()) -> Iterator[tuple[ast.Call, tuple]]:
    """Yield calls that write a file, each with the nodes around it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = (*node.args, *(more.value for more in node.keywords))
            modes = {str(each.value) for each in given if isinstance(each, ast.Constant)}
            if name in ("write_text", "write_bytes") or (name == "open" and modes & {"w", "wb", "ab", "a", "x", "r+b"}):
                yield node, around
        yield from writes_of(node, (*around, node))


def test_every_write_names_its_file():
    """Inside atomic_write, or `with naming(...)`, since the error of a write to an open file does not name the file."""
    found = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("utils/**/*.py")]:
        for call, around in writes_of(ast.parse(path.read_text())):
            calls = [each.func for each in around if isinstance(each, ast.Call)]
            calls += [item.context_expr.func for each in around if isinstance(each, ast.With) for item in each.items
                      if isinstance(item.context_expr, ast.Call)]
            if not {getattr(each, "id", "") for each in calls} & {"atomic_write", "naming"}:
                found.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert not [place for place in found if place.partition(":")[0] not in UNNAMED]


# ------------------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("text", ["=1+1", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'=1", "''@x", "-", "=", "\uff1d1"])
def test_text_cells_are_not_formulas(text):
    """And read_csv_table returns the original text."""
    cell = next(csv.reader(io.StringIO(files.csv_table([[text]]), newline="")))[0]
    assert cell == f"'{text}" and files.read_csv_table(files.csv_table([[text, "b"]])) == [[text, "b"]]


@pytest.mark.parametrize("cell", ["-0.5", "+3", "-1e-5", "'", "a=b", "'a", " =1", "", "5", -0.5, 7, "x-y"])
def test_other_cells_are_unchanged(cell):
    assert files.csv_table([[cell, "b"]]) == f"{cell},b\r\n"
    assert files.read_csv_table(files.csv_table([[cell, "b"]])) == [[str(cell), "b"]]


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


def test_data_reach_the_disk_before_the_name(tmp_path, monkeypatch):
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
        for call in (lock.acquire, lock.check):
            assert error_of(InUseError, call) == f"{tmp_path} is in use by process {other.pid} on {platform.node()}. Stop it."
    assert InUseError.exit_code == 7
    lock.acquire()
    lock.release()

    def acquire_and_release():
        (other := FileLock(tmp_path)).acquire()
        other.release()

    with AnotherProcess(acquire_and_release):
        lock.acquire()
    lock.release()


def test_check_does_not_release_the_processs_own_lock(tmp_path):
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
    """The file may still contain the name of a process that was killed."""
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
    figure("second starts, refused with the name of the running process", 2 * count)


def test_owner_that_never_writes_its_name_is_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "OWNER_SECONDS", 0.1)
    with AnotherProcess(FileLock(tmp_path).acquire):
        for text in ("", f"process {ended_process()} on {platform.node()}"):
            (tmp_path / ".lock").write_text(text)
            assert "in use by another process." in error_of(InUseError, FileLock(tmp_path).acquire)
        (tmp_path / ".lock").write_text("process 7 on another-machine")
        assert "in use by process 7 on another-machine." in error_of(InUseError, FileLock(tmp_path).acquire)
