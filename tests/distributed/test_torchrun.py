"""A killed process is reported in one line; other failures keep torchrun's report."""

import signal

import pytest
from torch.distributed import DistStoreError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from utils import launch
from utils.distributed import nodes, torchrun


def failing(monkeypatch, *codes: int, seconds_apart: int = 1):
    failures = {rank: ProcessFailure(rank, 4711 + rank, code, "") for rank, code in enumerate(codes)}
    for rank, failure in failures.items():
        failure.timestamp = rank * seconds_apart

    def main(argv):
        raise ChildFailedError("train.py", failures)

    monkeypatch.setattr(torchrun.run, "main", main)


@pytest.mark.parametrize(("codes", "which"), [((-9, 8), "0 (pid 4711)"), ((8, -9), "1 (pid 4712)"), ((-9,), "0 (pid 4711)")])
def test_killed_process_is_reported_in_one_line(monkeypatch, capsys, codes, which):
    failing(monkeypatch, *codes)
    assert torchrun.main([]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"train.sh: error: process {which} was killed by signal 9, probably because the machine is out "
                              "of memory") and printed.count("\n") == 1 and "GRAD_STEPS" in printed


@pytest.mark.parametrize("codes", [(1,), (-11,), (8, 1)])
def test_other_failures_keep_torchruns_report(monkeypatch, codes):
    failing(monkeypatch, *codes)
    with pytest.raises(ChildFailedError):
        torchrun.main([])


def test_process_killed_by_the_launcher_is_not_reported(monkeypatch):
    """It did not react to the loss of another process."""
    failing(monkeypatch, 8, -9, seconds_apart=10)
    with pytest.raises(ChildFailedError):
        torchrun.main([])


@pytest.mark.parametrize(("error", "code", "line"), [
    (launch.LaunchError("MASTER_PORT=1: cannot open"), 2, "train.sh: error: MASTER_PORT=1: cannot open\n"),
    (nodes.RunEnded("code 3"), 8, "train.sh: error: code 3\n"),
    (DistStoreError("timed out\nafter"), 8, "train.sh: error: another node is lost or did not connect: timed out\n")])
def test_lost_node_is_reported_in_one_line(monkeypatch, capsys, error, code, line):
    def main(argv):
        raise error

    monkeypatch.setattr(torchrun.run, "main", main)
    assert torchrun.main([]) == code and capsys.readouterr().err == line


def test_loss_that_processes_have_reported_is_not_repeated(monkeypatch, capsys):
    failing(monkeypatch, 8, 8)
    assert torchrun.main([]) == 8 and capsys.readouterr().err == ""


def test_requested_stop_is_not_a_failure(monkeypatch, tmp_path):
    """train.sh signals torchrun if no process exists yet, or any more."""
    def main(argv):
        raise SignalException("got signal", signal.SIGTERM)

    monkeypatch.setattr(torchrun.run, "main", main)
    monkeypatch.setenv("VIT_LAUNCH", str(tmp_path))
    with pytest.raises(SignalException):
        torchrun.main([])
    (tmp_path / "asked").touch()
    assert torchrun.main([]) == 143


def test_success_returns_0(monkeypatch):
    monkeypatch.setattr(torchrun.nodes.Nodes, "current", None)              # a single node
    monkeypatch.setattr(torchrun.run, "main", lambda argv: None)
    assert torchrun.main([]) == 0
