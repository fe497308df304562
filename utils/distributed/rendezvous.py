"""Connects the processes of a run, and reports which ones are missing.

They connect to a store at MASTER_ADDR:MASTER_PORT, which torchrun hosts, or process 0 without torchrun. Every attempt of a run
has its own keys in it.
"""

import datetime
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable

import torch.distributed as dist

from utils import launch
from utils.launch import LaunchError

NOTICE_S = 5.0          # until missing processes are reported, once
CONNECT_S = 60.0        # to connect to a store that exists
POLL_S = 0.1
# Keys of an attempt:
REPLACED = "replaced"       # a node was started again, and waits for the next attempt
EXIT_CODE = "exit code"     # of an error that ends the run, so that there is no next attempt


class Wait:
    """Waits at most `patience_s`, in short steps between which signals are handled, and reports once what it waits for."""

    def __init__(self, patience_s: float, report: Callable[[str], None]):
        self.patience_s, self._report = patience_s, report
        self._begun, self._reported = time.monotonic(), False

    def is_over(self) -> bool:
        return time.monotonic() - self._begun > self.patience_s

    def step(self, what: str, reports: bool = True) -> None:
        """Sleep for POLL_S. Raises DistStoreError when the time is over."""
        if self.is_over():
            raise dist.DistStoreError(f"timed out: waited {self.patience_s:g} s for {what}")
        if time.monotonic() - self._begun > NOTICE_S and not self._reported:
            self._reported = True
            if reports:
                self._report(what)
        time.sleep(POLL_S)


def meet(rank: int, size: int, patience_s: float) -> dist.Store:
    """Wait up to `patience_s` until all processes of the run are connected -> the store of this attempt. Signals are handled
    meanwhile.

    Raises LaunchError if process 0 cannot open its port, dist.DistError if processes are missing.
    """
    def report(what: str) -> None:
        advice = "" if launch.below_launcher() else (
            f" (because WORLD_SIZE={size} is set in the environment; to train with one process: {launch.without_variables()} "
            f"{launch.command('train.py')} ...)")
        print(f"train.py: waiting for {what}{advice}", file=sys.stderr, flush=True)

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = Wait(patience_s, report)
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    store = reach(host, port, hosts, wait, named("process", [0], size), launch.is_first_of_node())
    store.set_timeout(datetime.timedelta(seconds=patience_s))
    # torchrun keeps its store when it restarts the processes, which must not read the addresses of their predecessors.
    store = dist.PrefixStore(launch.attempt(), store)
    store.set(f"here-{rank}", "")
    while missing := [other for other in range(size) if not store.check([f"here-{other}"])]:
        if store.check([REPLACED]):
            raise dist.DistStoreError("a node was started again")
        wait.step(f"{named('process', missing, size)} to connect to {host}:{port}",
                  rank == min(set(range(size)) - set(missing)))
    return store


def reach(host: str, port: int, hosts: bool, wait: Wait, missing: str, reports: bool = True) -> dist.TCPStore:
    """Connect to the store at host:port; if `hosts`, this process hosts it. missing: names the host while nobody listens."""
    if not hosts:
        _wait_until_open(host, port, wait, missing, reports)
    try:
        return dist.TCPStore(host, port, None, hosts, timeout=datetime.timedelta(seconds=CONNECT_S), wait_for_workers=False,
                             multi_tenant=True, use_libuv=os.environ.get("USE_LIBUV", "1") == "1")     # as torch's env://
    except dist.DistError as error:
        if not hosts:
            raise
        raise LaunchError(f"MASTER_PORT={port}: process 0 cannot open this port; another run or program may use it. Set "
                          "MASTER_PORT to another number, on every node.") from error


def _wait_until_open(host: str, port: int, wait: Wait, missing: str, reports: bool) -> None:
    """Wait until a process listens there. TCPStore would print many lines while it waits, and not handle signals."""
    while True:
        try:
            return socket.create_connection((host, port), timeout=NOTICE_S).close()
        except OSError as error:
            wait.step(f"{missing} to connect to {host}:{port} ({error.strerror or error})", reports)


def named(kind: str, missing: Iterable[int], size: int) -> str:
    """Names nodes or processes for a message: named("node", [1, 2], 4) -> "nodes 1, 2 (of 0 to 3)" """
    numbers = list(missing)
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    plural = ("es" if kind.endswith("s") else "s") if len(numbers) > 1 else ""
    return f"{kind}{plural} {shown} (of 0 to {size - 1})"
