"""Introduces the processes of a run to each other, and reports the ones that do not come.

They meet in a store at MASTER_ADDR:MASTER_PORT, which torchrun keeps; without torchrun process 0 does.
"""

import datetime
import os
import socket
import sys
import time

import torch.distributed as dist

from utils import launch
from utils.launch import LaunchError

NOTICE_S = 5.0          # after which the missing processes are reported, once
CONNECT_S = 60.0        # to reach a store that is there
POLL_S = 0.1


def meet(rank: int, size: int, patience_s: float) -> dist.Store:
    """-> a store that all processes of the run have reached. Waits `patience_s` for them; a signal is heard meanwhile.

    Raises LaunchError if process 0 cannot open its port, dist.DistError if processes do not come.
    """
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    begun = time.monotonic()
    store = _reach(rank, size, address, begun + patience_s)
    store.set_timeout(datetime.timedelta(seconds=patience_s))
    # torchrun keeps its store when it restarts the processes: they would read where their predecessors could be reached.
    store = dist.PrefixStore(f"attempt-{launch.restarts()}", store)
    store.set(f"here-{rank}", "")
    noticed = False
    while missing := [other for other in range(size) if not store.check([f"here-{other}"])]:
        if time.monotonic() - begun > patience_s:
            raise dist.DistStoreError(f"timed out: {_named(missing, size)} did not come to {address} within {patience_s:g} s")
        if not noticed and time.monotonic() - begun > NOTICE_S:
            noticed = True
            if rank == min(set(range(size)) - set(missing)):
                _report(missing, size, address)
        time.sleep(POLL_S)
    return store


def _reach(rank: int, size: int, address: str, until: float) -> dist.TCPStore:
    host, port = address.rsplit(":", 1)
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    if not hosts:
        _knock(host, int(port), size, until)
    try:
        return dist.TCPStore(host, int(port), size, hosts, timeout=datetime.timedelta(seconds=CONNECT_S), wait_for_workers=False,
                             multi_tenant=True, use_libuv=os.environ.get("USE_LIBUV", "1") == "1")     # as torch's env://
    except dist.DistError as error:
        if not hosts:
            raise
        raise LaunchError(f"MASTER_PORT={port}: process 0 cannot open this port, which another run or program may use. Set "
                          "MASTER_PORT to another number, on every node.") from error


def _knock(host: str, port: int, size: int, until: float) -> None:
    """Waits until somebody listens there. TCPStore would print many lines meanwhile, and hear no signal."""
    begun, noticed = time.monotonic(), False
    while True:
        try:
            return socket.create_connection((host, port), timeout=NOTICE_S).close()
        except OSError as error:
            if time.monotonic() > until:
                raise dist.DistNetworkError(f"timed out: nobody listens at {host}:{port} ({error})") from error
            if not noticed and time.monotonic() - begun >= NOTICE_S:
                noticed = True
                if launch.is_first_of_node():
                    _report([0], size, f"{host}:{port} ({error.strerror or error})")
        time.sleep(POLL_S)


def _named(missing: list[int], size: int) -> str:
    shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return f"process{'es' if len(missing) > 1 else ''} {shown} (of 0 to {size - 1})"


def _report(missing: list[int], size: int, address: str) -> None:
    advice = "" if launch.below_launcher() else (
        f" (WORLD_SIZE={size} of the environment asks for it; to train alone: {launch.without_variables()} python train.py ...)")
    print(f"train.py: waiting for {_named(missing, size)} to come to {address}{advice}", file=sys.stderr, flush=True)
