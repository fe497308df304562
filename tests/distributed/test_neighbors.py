"""A process on a GPU notices the end of the others on its machine, which NCCL does not report. Tested with gloo in its place, and
a replacement for the device's events."""

import contextlib
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from utils import distributed
from utils.distributed import PeerLost, neighbors, ranks, to_host, wait_for
from utils.distributed.neighbors import NeighborLost, Neighbors, place_of_process, watch_neighbors

ONE_RANK = distributed.Ranks(0, 1, 0, 1, torch.device("cpu"))
pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux reports when a process ends")


class Device:
    """An event that is done after a number of queries, or never."""

    def __init__(self, queries: float):
        self.queries = queries

    def query(self) -> bool:
        self.queries -= 1
        return self.queries < 0


@pytest.fixture
def child():
    """-> (number of a running process, its place)"""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(writer, place_of_process().encode())
        signal.pause()
        os._exit(0)
    place = os.read(reader, 100).decode()
    yield pid, place
    with contextlib.suppress(ChildProcessError):        # if a test has waited for it
        if os.waitpid(pid, os.WNOHANG) == (0, 0):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def lost(watched: Neighbors, within_s: float = 5) -> str:
    deadline = time.monotonic() + within_s
    with pytest.raises(NeighborLost) as caught:
        while time.monotonic() < deadline:
            watched.raise_if_lost()
            time.sleep(0.01)
    return str(caught.value)


def test_ended_process_is_named(child):
    pid, place = child
    left = []
    watched = Neighbors({3: place}, left.append, patience_s=1)
    time.sleep(0.1)
    watched.raise_if_lost()
    os.kill(pid, signal.SIGKILL)                        # its parent does not need to wait for it
    assert lost(watched) == f"process 3 (pid {pid}) of the run has ended"
    time.sleep(1.2)
    assert not left                                     # the main thread has raised the error
    with pytest.raises(NeighborLost):
        watched.stop()


def test_process_with_a_stuck_main_thread_is_ended(child):
    pid, place = child
    left = threading.Event()
    Neighbors({1: place}, lambda error: left.set(), patience_s=0.1)
    assert not left.wait(0.3)
    os.kill(pid, signal.SIGTERM)
    assert left.wait(5)


def test_processes_that_end_after_stop_are_not_lost(child):
    pid, place = child
    left = []
    watched = Neighbors({1: place}, left.append, patience_s=0)
    watched.stop()
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    watched.raise_if_lost()
    assert not left


def test_earlier_end_is_noticed_and_other_containers_are_not_watched(child):
    pid, place = child
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert f"(pid {pid})" in lost(Neighbors({1: place}, lambda error: None))
    Neighbors({1: f"{pid} pid:[1]"}, lambda error: None).stop()


def test_nothing_is_watched_on_other_systems(child, monkeypatch):
    monkeypatch.setattr(neighbors.os, "pidfd_open", lambda pid: (_ for _ in ()).throw(OSError(38, "not implemented")))
    Neighbors({1: child[1]}, lambda error: None).stop()


def test_wait_for_ends_with_the_device_a_lost_neighbor_or_the_timeout(child, monkeypatch):
    wait_for(Device(3))
    tensor = torch.arange(3)
    assert to_host(tensor) is tensor
    watched = Neighbors({1: child[1]}, lambda error: None)
    monkeypatch.setattr(ranks, "_group", ranks._Group(object(), 0.2, store=None, neighbors=watched))
    with pytest.raises(PeerLost, match=r"^step 7: another process of the run did not answer within 0.2 s \(--rank_t"), \
            distributed.watch(ONE_RANK, lambda: "step 7"):
        wait_for(Device(float("inf")))
    os.kill(child[0], signal.SIGKILL)
    with pytest.raises(PeerLost, match=rf"^step 8: process 1 \(pid {child[0]}\) of the run has ended; .* --resume") as caught, \
            distributed.watch(ONE_RANK, lambda: "step 8"):
        time.sleep(0.2)
        wait_for(Device(float("inf")))
    assert caught.value.exit_code == 8


@pytest.mark.parametrize("stuck", [False, True], ids=["waits for the device", "is stuck elsewhere"])
def test_process_that_waits_for_its_device_notices_a_lost_one(tmp_path, capfd, stuck):
    """Without a collective: nothing is sent."""
    def work(place: distributed.Ranks) -> None:
        watched = watch_neighbors(dist.distributed_c10d._get_default_store(), place.rank, place.local_rank, place.local_size,
                                  ranks._end)
        watched._patience_s = 0.3
        ranks._group.neighbors = watched
        ranks.before_end.append((tmp_path / f"written-{place.rank}").touch)
        dist.barrier()
        with distributed.watch(place, lambda: "step 4"):
            if place.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60) if stuck else wait_for(Device(float("inf")))

    began = time.monotonic()
    with Ranks(2, work, tmp_path) as processes:
        assert processes.wait([0]) == [8] and time.monotonic() - began < 20
        line = capfd.readouterr().err if stuck else processes.error(0)
        assert (tmp_path / "written-0").exists() == stuck           # the thread that ends the process completes writes
    assert f"step 4: process 1 (pid {processes.pids[1]}) of the run has ended; " in line


def test_normal_end_of_a_run_loses_no_process(tmp_path):
    def work(place: distributed.Ranks) -> int:
        ranks._group.neighbors = watch_neighbors(
            dist.distributed_c10d._get_default_store(), place.rank, place.local_rank, place.local_size, ranks._end)
        dist.barrier()
        return place.rank

    with Ranks(3, work, tmp_path) as processes:
        assert processes.results() == [0, 1, 2]
