"""The rendezvous of two nodes, in one process: which waits for which, when they begin, and what each reports."""

import gc
import socket
import threading
import time

import pytest
import torch.distributed as dist
from processes import wait_until
from torch.distributed.elastic.rendezvous import RendezvousParameters

from utils import launch
from utils.distributed import nodes, rendezvous

COUNT = 2


@pytest.fixture
def port(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "VIT_LAUNCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rendezvous, "NOTICE_S", 0.1)
    monkeypatch.setattr(rendezvous, "POLL_S", 0.01)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def node(number: int, port: int) -> nodes.Nodes:
    return nodes.Nodes(RendezvousParameters("nodes", f"127.0.0.1:{port}", "none", COUNT, COUNT, rank=str(number)))


def printed(capfd, words: str) -> bool:
    """Return whether these words are printed soon."""
    seen = []
    return wait_until(lambda: seen.append(capfd.readouterr().err) or words in "".join(seen))


class Meeting(threading.Thread):
    """The rendezvous of a node, in a thread."""

    def __init__(self, place: nodes.Nodes):
        super().__init__(daemon=True)
        self.place, self.outcome = place, None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self.place.next_rendezvous()
        except (dist.DistError, launch.LaunchError) as error:
            self.outcome = error

    def result(self):
        self.join(20)
        assert self.outcome is not None, "it still waits"
        return self.outcome


def attempt_of(*meetings: Meeting) -> str:
    """Return the name of the attempt that they begin together, as their processes will see it."""
    found = [meeting.result() for meeting in meetings]
    assert all(isinstance(each, nodes.RendezvousInfo) for each in found), found
    assert [each.rank for each in found] == [meeting.place.node for meeting in meetings]
    names = {meeting.place.get_run_id() for meeting in meetings}
    assert len(names) == 1
    return names.pop()


def test_nodes_begin_together_and_name_who_is_missing(port, capfd):
    first = Meeting(node(0, port))
    assert wait_until(lambda: first.place._store is not None)
    assert printed(capfd, "train.sh: node 0 is waiting for node 1 (of 0 to 1) to connect to 127.0.0.1:")
    assert attempt_of(first, Meeting(node(1, port))) == "attempt-1"
    began, other = time.monotonic(), nodes.Nodes.current           # the last one that was made
    threading.Timer(0.3, other.leave).start()
    first.place.leave()
    assert 0.2 < time.monotonic() - began < nodes.LEAVE_S          # node 0 hosts the store, and leaves last
    again = Meeting(first.place)                                   # torchrun of node 0 starts its processes again
    assert attempt_of(again, Meeting(node(1, port))) == "attempt-2"


def test_restarted_node_joins_the_next_attempt(port, capfd):
    """The processes that wait for it in the current attempt end."""
    first = node(0, port)
    attempt_of(Meeting(first), Meeting(node(1, port)))
    second = Meeting(node(1, port))
    assert printed(capfd, "node 1 is waiting for node 0 (of 0 to 1) to notice that this node was started again")
    keys = dist.PrefixStore("attempt-1", first._store)
    assert keys.check([rendezvous.REPLACED]) and second.outcome is None
    assert attempt_of(Meeting(first), second) == "attempt-2"


def test_node_0_can_be_restarted(port, capfd):
    first = Meeting(node(0, port))
    attempt_of(first, Meeting(node(1, port)))
    second = Meeting(node(1, port))
    assert printed(capfd, "is waiting for node 0")
    first.outcome = first.place._store = None                      # its store ends with it
    gc.collect()
    assert attempt_of(Meeting(node(0, port)), second) == "attempt-1"


def test_error_that_ended_the_run_ends_waiting_nodes(port):
    first, second = node(0, port), node(1, port)
    attempt_of(Meeting(first), Meeting(second))
    dist.PrefixStore("attempt-1", first._store).set(rendezvous.EXIT_CODE, "2")
    for place in (first, second):
        ended = Meeting(place).result()
        assert isinstance(ended, nodes.RunEnded) and "ended the run with exit code 2" in str(ended) and ended.exit_code == 8


@pytest.mark.parametrize("number", [0, 1])
def test_waiting_for_a_node_ends(port, monkeypatch, number):
    monkeypatch.setattr(nodes, "PATIENCE_S", 0.2)
    ended = Meeting(node(number, port)).result()
    assert isinstance(ended, dist.DistError) and f"for node {1 - number} (of 0 to 1) to connect" in str(ended)


def test_port_in_use_is_reported(port):
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        ended = Meeting(node(0, port)).result()
        assert isinstance(ended, launch.LaunchError) and f"MASTER_PORT={port}" in str(ended)
