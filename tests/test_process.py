"""Requests to stop, and exit codes for train.sh; tests with whole runs are in system/test_kills.py and test_launches.py."""

import ctypes
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import is_gone, wait_until

from utils import launch as launching
from utils import process

ROOT = Path(__file__).resolve().parents[1]
EVERY = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


def in_child(work) -> int:
    """Return the exit code of work() in a child process; -9 if signal 9 ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(autouse=True)
def no_signal_is_ignored():
    """Signals are ignored if the tests run in the background of a script."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in EVERY}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def below_torchrun(monkeypatch, number: int = 0, size: int = 1, local_size: int = 1) -> None:
    for name, value in {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local_size,
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500, "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def launch(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_LAUNCH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("number", EVERY)
def test_request_is_remembered_and_handlers_are_restored(number):
    before = signal.getsignal(number)
    with process.StopSignal() as stop:
        stop.saves = True
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
    assert signal.getsignal(number) is before and process.requested_at() == float("inf")


@pytest.mark.parametrize("number", EVERY)
def test_request_ends_the_process_if_there_is_nothing_to_save(number, launch, capfd):
    def work():
        with process.StopSignal():
            os.kill(os.getpid(), number)
            time.sleep(10)

    assert in_child(work) == 143 and (launch / "code-000").read_text() == "143"
    name = "asked to stop" if number == signal.SIGUSR1 else signal.Signals(number).name       # train.sh sends it for any signal
    assert f"{name}: stopped before the first step; nothing to save" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="how C code waits")
def test_request_is_handled_while_c_code_waits(launch, monkeypatch, capfd):
    """It may wait for another process while the run is set up. If there is something to save, only the main thread handles it."""
    monkeypatch.setattr(process, "UNHANDLED_S", 0.1)
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)

    def work():
        with process.StopSignal():
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)             # waits for itself, even if a signal comes

    assert in_child(work) == 143 and (launch / "code-000").read_text() == "143"
    assert "SIGTERM: stopped before the first step; nothing to save" in capfd.readouterr().err


def test_signal_to_a_child_is_not_handled_by_its_parent(monkeypatch):
    monkeypatch.setattr(process, "UNHANDLED_S", 0.0)

    def work():
        with process.StopSignal() as stop:
            child = os.fork()
            if child == 0:
                signal.pause()
                os._exit(0)
            time.sleep(0.1)
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
            time.sleep(0.2)
            return 0 if not stop.requested() and threading.active_count() == 2 else 1

    assert in_child(work) == 0


@pytest.mark.parametrize("signalled", [True, False])
def test_stopped_process_below_torchrun_exits_with_0(signalled, launch, monkeypatch):
    """torchrun would restart it otherwise. Also if the process starts after the request."""
    below_torchrun(monkeypatch)
    if not signalled:
        (launch / "asked").touch()

    def work():
        with process.StopSignal():
            os.kill(os.getpid(), signal.SIGUSR1)
            return 9

    assert in_child(work) == 0 and (launch / "code-000").read_text() == "143"


@pytest.mark.parametrize(("rank", "pause", "code"), [(None, 0.0, 143), ("0", 0.0, 7), ("0", 0.3, 143)])
def test_second_request_ends_the_process_at_once(rank, pause, code, monkeypatch, capfd):
    """Below a launcher, signals within ONE_REQUEST seconds are the same request."""
    monkeypatch.setattr(process, "ONE_REQUEST", 0.2)
    if rank is not None:
        below_torchrun(monkeypatch)

    def work():
        with process.StopSignal() as stop:
            stop.saves = True
            os.kill(os.getpid(), signal.SIGTERM)
            assert process.requested_at() <= time.monotonic()
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGUSR1)
            return 7

    assert in_child(work) == code


def test_ignored_signals_stay_ignored_except_those_of_batch_systems():
    def work():
        for number in EVERY:
            signal.signal(number, signal.SIG_IGN)
        with process.StopSignal() as stop:
            stop.saves = True
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested()
            os.kill(os.getpid(), signal.SIGUSR1)
            return 0 if stop.requested() else 3

    assert in_child(work) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="a feature of the Linux kernel")
def test_child_dies_with_its_parent():
    reader, writer = os.pipe()

    def parent():
        child = os.fork()
        if child == 0:
            process.die_with_parent()
            os.write(writer, b"%d " % os.getpid())
            time.sleep(60)
        os.read(reader, 20)
        os.write(writer, b"%d" % child)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(parent) == -signal.SIGKILL
    child = int(os.read(reader, 20))
    assert wait_until(lambda: is_gone(child))


# --------------------------------------------------------------------------------------------- the end of a program


class BadImage(ValueError):
    exit_code = 5


def code_of(error: Exception | None, code: int = 0) -> int:
    with process.program("x.py", single_process=False) as program:
        program.exit_code = code
        if error is not None:
            raise error
    return program.exit_code


@pytest.mark.parametrize(("error", "code", "line"), [
    (BadImage("a.png:\n cut off"), 5, "x.py: error: a.png: cut off\n"),
    (FileNotFoundError(2, "No such file", "a.png"), 2, "x.py: error: a.png: No such file\n"), (None, 0, "")])
def test_user_error_is_reported_in_one_line_with_its_exit_code(capfd, error, code, line):
    assert code_of(error) == code and capfd.readouterr().err == line


def test_error_comes_after_earlier_output():
    code = "from utils import process\nclass E(ValueError): exit_code = 2\ndef main(_):\n print('a report')\n"
    code += " with process.program('x.py') as program:\n  raise E('a fault')\n return program.exit_code\nprocess.run(main)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env=os.environ | {"PYTHONUNBUFFERED": ""})
    assert done.returncode == 2 and done.stdout == "a report\nx.py: error: a fault\n"


@pytest.mark.parametrize("error", [
    KeyError("a"), OSError("no file"), ValueError("not ours"), RuntimeError(),
    ModuleNotFoundError("No module named 'utils.x'", name="utils.x")])
def test_bug_keeps_its_traceback(launch, error):
    with pytest.raises(type(error)), process.program("x.py", single_process=False):
        raise error
    assert (launch / "code-000").read_text() == "1"


def test_process_below_train_sh_exits_with_0_and_posts_its_code(launch, monkeypatch, capfd):
    below_torchrun(monkeypatch, 0, 2, 2)
    monkeypatch.setattr(process, "die_with_parent", lambda: None)
    assert code_of(BadImage("a.png")) == 0 and launching.posted_exit_code() == 5
    monkeypatch.setattr(launching, "restarts", lambda: 1)
    assert code_of(None, process.EXIT_PREEMPTED) == 0 and launching.posted_exit_code() == 143
    monkeypatch.setattr(launching, "restarts", lambda: 2)
    below_torchrun(monkeypatch, 0, 4, 2)                 # another node has its own train.sh
    assert code_of(BadImage("a.png")) == 5
    monkeypatch.setattr(process, "_nodes_know", False)
    process.nodes_know()                                 # the other node knows the code
    assert code_of(BadImage("a.png")) == 0
    monkeypatch.setattr(process, "_nodes_know", False)
    monkeypatch.delenv("VIT_LAUNCH")                # torchrun without train.sh
    assert code_of(BadImage("a.png")) == 5 and code_of(None, process.EXIT_PREEMPTED) == 0


def test_first_error_overrides_a_lost_peer(launch, monkeypatch, capfd):
    class PeerLost(ValueError):
        exit_code = process.EXIT_PEER_LOST

    monkeypatch.setattr(process, "die_with_parent", lambda: None)
    monkeypatch.setattr(process, "SILENCE_S", 0.1)
    below_torchrun(monkeypatch, 1, 2, 2)
    assert code_of(BadImage("a.png")) == 0
    below_torchrun(monkeypatch, 0, 2, 2)
    assert code_of(PeerLost("step 3: lost")) == 0 and launching.posted_exit_code() == 5
    assert capfd.readouterr().err == "x.py: error: a.png\n"
    monkeypatch.setattr(launching, "restarts", lambda: 1)
    assert code_of(PeerLost("step 3: lost")) == code_of(BadImage("a.png")) == 8         # so that torchrun restarts them
    assert launching.posted_exit_code() == 8 and capfd.readouterr().err == "x.py: error: step 3: lost\n"


def test_process_of_a_broken_group_ends_at_once(launch, capfd):
    """Without the rest of the program, in which destructors would wait."""
    def work(error):
        process.end_at_once_on_error()
        code_of(error)
        return 9

    assert in_child(lambda: work(BadImage("a.png"))) == 5 and in_child(lambda: work(KeyError("a"))) == 1
    assert "KeyError: 'a'" in capfd.readouterr().err


def test_closed_output_does_not_end_a_run():
    """As in: bash train.sh | head"""
    reader, writer = os.pipe()
    stream = process.ResilientStream(open(writer, "w", buffering=1))
    os.close(reader)
    for _ in range(3):
        assert stream.write("a line\n") == 7
        stream.flush()
    assert not stream.isatty()
    assert process.ResilientStream(None).write("of none") == 7


def test_output_escapes_characters_that_its_encoding_lacks():
    kept = io.BytesIO()
    stream = process.ResilientStream(io.TextIOWrapper(kept, encoding="ascii"))
    stream.write("b\xe4ume/\u72ac \udcff\n")
    stream.flush()
    assert kept.getvalue() == rb"b\xe4ume/\u72ac \udcff" + b"\n"


VERBS = ("train", "dataset", "sweep", "visualize", "annotate", "export")


@pytest.mark.parametrize("verb", VERBS)
def test_every_program_survives_a_closed_output(verb):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, f"{verb}.py", "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("verb", VERBS)
def test_missing_package_is_reported_in_one_line(verb):
    code = (f"import runpy, sys; sys.modules['ml_collections'] = None; sys.argv = ['{verb}.py']; "
            f"runpy.run_path('{verb}.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{verb}.py: error: the package ml_collections is not installed in this Python. Use ")


def test_garbage_collector_starts_late_and_skips_existing_objects():
    code = ("import gc; from utils import process\n"
            "def main(argv):\n"
            "    assert not gc.isenabled(); process.collect_garbage(); assert gc.isenabled() and gc.get_freeze_count()\n"
            "    return 4 + len(argv)\n"
            "process.run(main)")
    assert subprocess.run([sys.executable, "-c", code, "a"], check=False).returncode == 5


@pytest.mark.parametrize(("text", "shown"), [
    ("a\x1b]0;title\x07b", r"a\x1b]0;title\x07b"), ("\x9b2J", r"\x9b2J"), ("\u202etxt", r"\u202etxt"),
    ("\x1b[31mred\x1b[0m", "red"), ("ü مرحبا 日本\tx\n", "ü مرحبا 日本\tx\n"), ("\r  5%|", "\r  5%|"), ("\x00\x7f", r"\x00\x7f")])
def test_control_characters_are_written_as_escapes(text, shown, tmp_path):
    """In error messages color codes too."""
    with open(tmp_path / "x", "w", encoding="utf-8", newline="") as file:
        stream = process.ResilientStream(file)
        assert stream.write(text) == len(text)
    assert (tmp_path / "x").read_bytes().decode() == shown
    assert process.printable("\x1b[31mred") == r"\x1b[31mred"


def test_error_message_is_printable(capsys):
    process.report_error("x.py", "class \x1b[2J\n\x1b]0;t\x07: no", 2)
    assert capsys.readouterr().err == "x.py: error: class \\x1b[2J \\x1b]0;t\\x07: no\n"
    process.report_error("x.py", f"{'a/' * 5000}: no such folder", 2)
    assert len(capsys.readouterr().err) < 170


def test_both_outputs_keep_their_order_in_a_file(tmp_path):
    """As of `bash train.sh > log 2>&1`: what is printed without a flush comes before a later error."""
    code = ("import sys; from utils import process\n"
            "def main(argv): print('first'); print('second', file=sys.stderr); print('third'); return 0\n"
            "process.run(main)")
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(tmp_path / "log", "w") as log:
        done = subprocess.run([sys.executable, "-c", code], cwd=launching.ROOT, stdout=log, stderr=log, env=buffered)
    assert done.returncode == 0 and (tmp_path / "log").read_text() == "first\nsecond\nthird\n"


@pytest.mark.parametrize(("columns", "typed", "size"), [
    (100, "", {"dynamic_ncols": True}), (0, "", {"ncols": 80, "nrows": 24}), (0, "120", {"ncols": 120, "nrows": 24}),
    (0, "0", {"ncols": 80, "nrows": 24})])
def test_bars_fit_terminals_that_do_not_know_their_size(monkeypatch, columns, typed, size):
    monkeypatch.setattr(process.os, "get_terminal_size", lambda _: os.terminal_size((columns, 0)))
    monkeypatch.setattr(process.sys, "stderr", open(os.devnull, "w"))
    monkeypatch.setenv("COLUMNS", typed)
    assert process.bar_size() == size
