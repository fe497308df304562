"""Missing processes are named, and a port that is in use."""

import socket

import pytest
import torch.distributed as dist

from utils.distributed import rendezvous
from utils.launch import LaunchError

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE")


@pytest.fixture(autouse=True)
def port(monkeypatch):
    """Set MASTER_PORT to a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    monkeypatch.setattr(rendezvous, "NOTICE_S", 0.1)
    return number


@pytest.mark.parametrize(("rank", "missing"), [(0, "processes 1, 2"), (2, "process 0")])
def test_missing_processes_are_named_soon(monkeypatch, capfd, port, rank, missing):
    """With advice in case the variables were not meant for this program, unless torchrun has set them."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", str(rank))
    for advice in (True, False):
        with pytest.raises(dist.DistError, match="timed out"):
            rendezvous.meet(rank, 3, 0.5)
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py")]
        assert len(lines) == 1 and f"train.py: waiting for {missing} (of 0 to 2) to connect to 127.0.0.1:{port}" in lines[0]
        assert ("env -u RANK -u WORLD_SIZE -u MASTER_ADDR -u MASTER_PORT" in lines[0]) == advice
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")


def test_port_in_use_is_reported(port):
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        with pytest.raises(LaunchError, match=f"MASTER_PORT={port}: process 0 cannot open this port"):
            rendezvous.meet(0, 2, 1.0)
