"""A process that was killed is one line; any other failure keeps torchrun's report."""

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from utils.distributed import torchrun


def failing(monkeypatch, *codes: int, seconds_apart: int = 1):
    failures = {rank: ProcessFailure(rank, 4711 + rank, code, "") for rank, code in enumerate(codes)}
    for rank, failure in failures.items():
        failure.timestamp = rank * seconds_apart

    def main(argv):
        raise ChildFailedError("train.py", failures)

    monkeypatch.setattr(torchrun.run, "main", main)


@pytest.mark.parametrize(("codes", "which"), [((-9, 8), "0 (pid 4711)"), ((8, -9), "1 (pid 4712)"), ((-9,), "0 (pid 4711)")])
def test_killed_process_is_one_line(monkeypatch, capsys, codes, which):
    failing(monkeypatch, *codes)
    assert torchrun.main([]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"train.sh: error: process {which} was killed by signal 9, probably because the machine is out "
                              "of memory") and printed.count("\n") == 1 and "GRAD_STEPS" in printed


@pytest.mark.parametrize("codes", [(1,), (-11,), (8, 8)])
def test_other_failures_are_torchruns(monkeypatch, codes):
    failing(monkeypatch, *codes)
    with pytest.raises(ChildFailedError):
        torchrun.main([])


def test_process_that_the_launcher_killed_is_no_cause(monkeypatch):
    """It did not answer the others, nor the request to end."""
    failing(monkeypatch, 8, -9, seconds_apart=10)
    with pytest.raises(ChildFailedError):
        torchrun.main([])


def test_success(monkeypatch):
    monkeypatch.setattr(torchrun.run, "main", lambda argv: None)
    assert torchrun.main([]) == 0
