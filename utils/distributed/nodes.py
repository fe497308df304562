"""Connects the nodes of a run at its start and after every loss: a rendezvous for torchrun, which train.sh selects.

torchrun's own rendezvous do not fit: `static` does not notice that a node was started again, and c10d numbers the nodes
arbitrarily, although results are written on node 0. Here node 0 hosts the store and begins an attempt whenever its torchrun
starts the processes; the other nodes answer, and all start together. A node that is started again waits for the next attempt:
the processes of the current attempt end, because they have lost those of that node. The processes get the name of the attempt
as TORCHELASTIC_RUN_ID.
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
EXCHANGE_S = 300            # for the messages of torchrun's agents once they are connected
LEAVE_S = 5                 # for the others to leave, before node 0 closes the store
COUNT = "attempts"


def register() -> None:
    rendezvous_handler_registry.register(BACKEND, Nodes)


def leave() -> None:
    """Leave the rendezvous after a run whose processes all ended by themselves: node 0, which hosts the store, ends last.
    Otherwise torchrun on another node would fail with a traceback when it leaves."""
    if Nodes.current is not None:
        Nodes.current.leave()


class RunEnded(launch.LaunchError):
    """Raised when an error on another node has ended the run."""

    exit_code = EXIT_PEER_LOST


class Nodes(RendezvousHandler):
    """The rendezvous of one node."""

    current: "Nodes | None" = None          # the one that torchrun has made

    def __init__(self, parameters: RendezvousParameters):
        host, port = parameters.endpoint.rsplit(":", 1)
        self.host, self.port = host, int(port)
        self.node, self.count = parameters.get_as_int("rank"), parameters.max_nodes
        self._store: dist.TCPStore | None = None
        self._attempt = ""
        Nodes.current = self

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the next attempt. Raises LaunchError if node 0 cannot open its port, RunEnded, dist.DistError if nodes are
        missing."""
        wait = Wait(PATIENCE_S, self._report)
        while True:
            try:
                attempt = self._begin(wait) if self.node == 0 else self._join(wait)
                break
            except dist.DistError:                      # node 0 has ended, but may be started again
                if self.node == 0 or wait.is_over():
                    raise
        self._attempt = launch.attempt_name(attempt)
        self._store.set_timeout(datetime.timedelta(seconds=EXCHANGE_S))
        return RendezvousInfo(dist.PrefixStore(f"{self._attempt}/torchrun", self._store), self.node, self.count,
                              RendezvousStoreInfo(self.host, self.port))

    def _begin(self, wait: Wait) -> int:
        """On node 0: begins an attempt when all other nodes have answered."""
        self._store = self._store or reach(self.host, self.port, True, wait, "")
        self._check_not_ended(self._store.add(COUNT, 0))
        attempt = self._store.add(COUNT, 1)
        while missing := self._missing(attempt):
            wait.step(f"{missing} to connect to {self.host}:{self.port}")
        self._store.set(f"begun-{attempt}", "")
        return attempt

    def _join(self, wait: Wait) -> int:
        """On another node: answers the attempts of node 0 until one begins, except for one that has already begun."""
        node_0, answered = named("node", [0], self.count), 0
        # Connects every time, because a store ends with node 0.
        self._store = reach(self.host, self.port, False, wait, node_0)
        while True:
            attempt = self._store.add(COUNT, 0)
            has_begun = attempt and self._store.check([f"begun-{attempt}"])
            if has_begun and attempt == answered:
                return attempt
            if has_begun:
                self._check_not_ended(attempt)
                self._store.set(f"{launch.attempt_name(attempt)}/{REPLACED}", "")
                wait.step(f"{node_0} to notice that this node was started again")
                continue
            if attempt > answered:
                self._store.set(f"here-{attempt}-{self.node}", "")
                answered = attempt
            wait.step(f"{self._missing(attempt) or node_0} to connect to {self.host}:{self.port}")

    def _missing(self, attempt: int) -> str:
        """Names the nodes that have not answered this attempt of node 0; "" if all have."""
        missing = [node for node in range(1, self.count) if not self._store.check([f"here-{attempt}-{node}"])]
        return named("node", missing, self.count) if missing else ""

    def _check_not_ended(self, attempt: int) -> None:
        key = f"{launch.attempt_name(attempt)}/{EXIT_CODE}"
        if self._store.check([key]):
            raise RunEnded(f"a process on another node has ended the run with exit code {self._store.get(key).decode()}; its "
                           "output says why")

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
        return 0                # otherwise torchrun would kill processes that may still write a checkpoint

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def shutdown(self) -> bool:
        return True
