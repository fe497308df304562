"""Requests to stop, and what a launch leaves for train.sh; whole runs are in system/test_kills.py and system/test_launches.py."""

import os
import signal
import sys
import time

import pytest

from utils import process

EVERY = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


def in_child(work) -> int:
    """Exit code of work() in a process of its own; -9 for one that signal 9 ended."""
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
    """As it is for a test run in the background of a script."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in EVERY}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def launch(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_LAUNCH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("number", EVERY)
def test_a_request_is_remembered_and_the_handlers_are_given_back(number):
    before = signal.getsignal(number)
    with process.Stop() as stop:
        stop.saves = True
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", EVERY)
def test_without_a_run_to_save_a_request_ends_the_process(number, launch, capfd):
    def work():
        with process.Stop():
            os.kill(os.getpid(), number)
            time.sleep(10)

    assert in_child(work) == 143 and (launch / "code-000").read_text() == "143"
    assert f"{signal.Signals(number).name}: stopped before the first step: nothing to save" in capfd.readouterr().err


@pytest.mark.parametrize("signalled", [True, False])
def test_below_the_launcher_it_ends_with_0(signalled, launch, monkeypatch):
    """torchrun would start it anew, which is for processes that were lost. Also where it comes after the request."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    if not signalled:
        (launch / "asked").touch()

    def work():
        with process.Stop():
            os.kill(os.getpid(), signal.SIGUSR1)
            return 9

    assert in_child(work) == 0 and (launch / "code-000").read_text() == "143"


@pytest.mark.parametrize(("rank", "pause", "code"), [(None, 0.0, 143), ("0", 0.0, 7), ("0", 0.3, 143)])
def test_the_second_request_ends_it(rank, pause, code, monkeypatch, capfd):
    """Below a launcher what comes within ONE_REQUEST seconds is the same request, by another way."""
    monkeypatch.setattr(process, "ONE_REQUEST", 0.2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)

    def work():
        with process.Stop() as stop:
            stop.saves = True
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGUSR1)
            return 7

    assert in_child(work) == code


def test_ignored_signals_stay_ignored_but_those_that_are_meant_for_us():
    def work():
        for number in EVERY:
            signal.signal(number, signal.SIG_IGN)
        with process.Stop() as stop:
            stop.saves = True
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested()
            os.kill(os.getpid(), signal.SIGUSR1)
            return 0 if stop.requested() else 3

    assert in_child(work) == 0


def test_the_first_code_counts_and_each_restart_has_its_own(launch, monkeypatch):
    assert process.leave_code(6) is True and process.leave_code(8) is False
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert process.restarts() == 2 and process.leave_code(0) is True
    assert {path.name: path.read_text() for path in launch.iterdir()} == {"code-000": "6", "code-002": "0"}
    monkeypatch.setenv("VIT_LAUNCH", str(launch / "gone"))
    assert process.leave_code(2) is None
    monkeypatch.delenv("VIT_LAUNCH")
    assert process.leave_code(2) is None and process.launch_file("folder") is None


def test_a_process_leaves_its_number(launch, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with process.Stop():
        assert (launch / "pid-3").read_text() == f"{os.getpid()}\n"          # train.sh reads them all in one go


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's doing")
def test_a_child_dies_with_its_parent():
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
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{child}") and b"(" in open(f"/proc/{child}/stat", "rb").read().partition(b"Z")[0]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        if open(f"/proc/{child}/stat").read().rpartition(")")[2].split()[0] == "Z":
            break


def test_loader_workers_ignore_requests():
    def work():
        process.ignore_signals()
        for number in EVERY:
            os.kill(os.getpid(), number)
        return 5

    assert in_child(work) == 5
