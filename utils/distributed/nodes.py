"""Brings the nodes of a run together at its start and after every loss: a rendezvous for torchrun, which train.sh asks for.

torchrun's own ones do not fit: `static` forgets that a node was started again, and c10d numbers the nodes as it likes, whereas
results are written on node 0. Here node 0 keeps the store and begins an attempt whenever its torchrun starts the processes; the
others answer it, and all begin together. A node that is started again waits for the next attempt: the processes of the current
one lose those that it had, and end. The name of the attempt reaches the processes as TORCHELASTIC_RUN_ID.
"""

import contextlib
import datetime
import sys
import time

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from utils import launch
from utils.process import EXIT_PEER_LOST

from .rendezvous import EXIT_CODE, REPLACED, Wait, named, reach

BACKEND = "nodes"           # torchrun --rdzv_backend nodes --rdzv_endpoint ADDRESS:PORT --rdzv_conf rank=NODE_RANK
PATIENCE_S = 7200           # for the other nodes
EXCHANGE_S = 300            # for what torchrun's agents tell each other once they have met
LEAVE_S = 5                 # for the others to leave, before node 0 takes the store away
COUNT = "attempts"


def register() -> None:
    rendezvous_handler_registry.register(BACKEND, Nodes)


def leave() -> None:
    """At the end of a run whose processes all ended by themselves: node 0, which keeps the store, ends last. The farewell of
    torchrun on another node would fail otherwise, with a traceback."""
    if Nodes.current is not None:
        Nodes.current.leave()


class RunEnded(launch.LaunchError):
    """Raised when an error on another node has ended the run."""

    exit_code = EXIT_PEER_LOST


class Nodes(RendezvousHandler):
    """The rendezvous of one node."""

    current: "Nodes | None" = None          # that torchrun has made

    def __init__(self, parameters: RendezvousParameters):
        host, port = parameters.endpoint.rsplit(":", 1)
        self.host, self.port = host, int(port)
        self.node, self.count = parameters.get_as_int("rank"), parameters.max_nodes
        self._store: dist.TCPStore | None = None
        self._attempt = ""
        Nodes.current = self

    def next_rendezvous(self) -> RendezvousInfo:
        """Raises LaunchError if node 0 cannot open its port, RunEnded, dist.DistError if nodes do not come."""
        wait = Wait(PATIENCE_S, self._report)
        while True:
            try:
                attempt = self._begin(wait) if self.node == 0 else self._join(wait)
                break
            except dist.DistError:                      # node 0 has ended meanwhile: it may be started again
                if self.node == 0 or wait.is_over():
                    raise
        self._attempt = launch.attempt_name(attempt)
        self._store.set_timeout(datetime.timedelta(seconds=EXCHANGE_S))
        return RendezvousInfo(dist.PrefixStore(f"{self._attempt}/torchrun", self._store), self.node, self.count,
                              RendezvousStoreInfo(self.host, self.port))

    def _begin(self, wait: Wait) -> int:
        """Node 0: begins an attempt when all the others have answered."""
        self._store = self._store or reach(self.host, self.port, True, wait, "")
        self._check_not_ended(self._store.add(COUNT, 0))
        attempt = self._store.add(COUNT, 1)
        while missing := self._missing(attempt):
            wait.step(f"{missing} to come to {self.host}:{self.port}")
        self._store.set(f"begun-{attempt}", "")
        return attempt

    def _join(self, wait: Wait) -> int:
        """Another node: answers the attempts of node 0 until one begins. What had begun before, it has no part in."""
        node_0, answered = named("node", [0], self.count), 0
        # A store that node 0 kept before it was started again is gone.
        self._store = reach(self.host, self.port, False, wait, node_0)
        while True:
            attempt = self._store.add(COUNT, 0)
            has_begun = attempt and self._store.check([f"begun-{attempt}"])
            if has_begun and attempt == answered:
                return attempt
            if has_begun:
                self._check_not_ended(attempt)
                self._store.set(f"{launch.attempt_name(attempt)}/{REPLACED}", "")
                wait.step(f"{node_0} to begin again, which has not lost this one yet")
                continue
            if attempt > answered:
                self._store.set(f"here-{attempt}-{self.node}", "")
                answered = attempt
            wait.step(f"{self._missing(attempt) or node_0} to come to {self.host}:{self.port}")

    def _missing(self, attempt: int) -> str:
        """The nodes that have not answered this attempt of node 0, named; "" without any."""
        missing = [node for node in range(1, self.count) if not self._store.check([f"here-{attempt}-{node}"])]
        return named("node", missing, self.count) if missing else ""

    def _check_not_ended(self, attempt: int) -> None:
        key = f"{launch.attempt_name(attempt)}/{EXIT_CODE}"
        if self._store.check([key]):
            raise RunEnded(f"a process of another node has ended the run with code {self._store.get(key).decode()}: what it has "
                           "printed says why")

    def leave(self) -> None:
        end, others = time.monotonic() + LEAVE_S, range(1, self.count)
        with contextlib.suppress(dist.DistError):
            if self.node > 0:
                self._store.set(f"{self._attempt}/left-{self.node}", "")
                return
            while time.monotonic() < end and not self._store.check([f"{self._attempt}/left-{node}" for node in others]):
                time.sleep(0.05)

    def _report(self, what: str) -> None:
        print(f"train.sh: node {self.node} is waiting for {what}. Start the same command on each of the {self.count} nodes, with "
              "its own NODE_RANK", file=sys.stderr, flush=True)

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self._attempt

    @property
    def use_agent_store(self) -> bool:
        return True

    def num_nodes_waiting(self) -> int:
        return 0                # torchrun would kill processes that may have a checkpoint to write

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def shutdown(self) -> bool:
        return True
