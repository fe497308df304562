"""Notices when another process of the same machine ends, for runs on GPUs.

gloo's collectives fail when a process is lost. NCCL's wait on the device, and a host that waits for the device does not notice
the loss until NCCL's watchdog aborts the process, without a message or an exit code of ours. So a thread waits for the end of
the other processes. The main thread, which may still finish what it writes, raises the error where it waits for the device
itself (`raise_if_lost`); if it is stuck elsewhere, the thread ends the process.
"""

import contextlib
import os
import select
import threading
from collections.abc import Callable

import torch.distributed as dist

PATIENCE_S = 3.0         # for the main thread, to raise the error itself


class NeighborLost(RuntimeError):
    """Raised when another process of this machine has ended; the message names it."""


def place_of_process() -> str:
    """Identify this process for `Neighbors`: its process number, and the system's namespace in which the number is valid."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{os.getpid()} {namespace}"


class Neighbors:
    """Watches processes until `stop`. Only Linux supports this; on other systems nothing is watched."""

    def __init__(self, places: dict[int, str], leave: Callable[[NeighborLost], None], patience_s: float = PATIENCE_S):
        """places: place_of_process() of the other ranks of this machine. leave(error) ends this process, called in the thread."""
        self._leave, self._patience_s = leave, patience_s
        self._lost: NeighborLost | None = None
        self._raised = threading.Event()
        self._end, self._stop = os.pipe()
        self._watched: dict[int, str] = {}               # descriptor -> name of the process
        own_namespace = place_of_process().partition(" ")[2]
        for rank, place in places.items():
            pid, _, namespace = place.partition(" ")
            if namespace == own_namespace:
                self._watch(int(pid), f"process {rank} (pid {pid})")
        self._thread = threading.Thread(target=self._wait, name="neighbors", daemon=True)
        self._thread.start()

    def _watch(self, pid: int, name: str) -> None:
        try:
            self._watched[os.pidfd_open(pid)] = name
        except ProcessLookupError:
            self._lost = NeighborLost(f"{name} of the run has ended")
        except (AttributeError, OSError):                # another system, or a Linux before 5.3
            return

    def _wait(self) -> None:
        poll = select.poll()
        for descriptor in (self._end, *self._watched):
            poll.register(descriptor, select.POLLIN)
        while self._lost is None:
            ready = [descriptor for descriptor, _ in poll.poll()]
            if self._end in ready:
                return
            self._lost = NeighborLost(f"{self._watched[ready[0]]} of the run has ended")
        if not self._raised.wait(self._patience_s):
            self._leave(self._lost)

    def raise_if_lost(self) -> None:
        """Raise NeighborLost, for the main thread."""
        if self._lost is not None:
            self._raised.set()
            raise self._lost

    def stop(self) -> None:
        """Stop watching, before the processes end normally."""
        self.raise_if_lost()
        os.write(self._stop, b".")                       # closing it would not suffice: forked children have it too
        self._thread.join()
        for descriptor in (self._end, self._stop, *self._watched):
            os.close(descriptor)


def watch_neighbors(store: dist.Store, rank: int, local_rank: int, local_size: int,
                    leave: Callable[[NeighborLost], None]) -> Neighbors:
    """Watch all other processes of this machine, which exchange their place_of_process() in the store."""
    store.set(f"process-{rank}", place_of_process())
    others = [other for other in range(rank - local_rank, rank - local_rank + local_size) if other != rank]
    return Neighbors({other: store.get(f"process-{other}").decode() for other in others}, leave)
