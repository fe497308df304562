"""Joins and leaves the processes of a run; turns a broken collective into a one-line error.

While a run is set up, one process may download for an hour while the others wait. Inside `watch` a collective waits only
`timeout_s`. A process that loses another one raises PeerLost and ends at once (utils.process). It does not contact the others,
and waits for the store that connects them at most `ANSWER_S`, because that may be lost with its machine. On several nodes, a
process whose error ends the run leaves its exit code in the store, so that all end with the same code and none is started
again. The report of a lost process names one that died.
"""

import contextlib
import dataclasses
import datetime
import gc
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from utils import launch, process
from utils.device import SMALLER_MODEL, SMALLER_STEP, choose_device, is_out_of_memory, keep_memory, out_of_memory_error

from .neighbors import NeighborLost, Neighbors, watch_neighbors
from .rendezvous import EXIT_CODE, meet

OF_GLOO = ("gloo", "Application timeout caused pair closure", "Operation timed out!")
ANSWER_S = 2.0      # to wait for the store after a failure
SETUP_S = 7200      # that a collective outside `watch` waits: for a download, or the slowest disk
WATCHDOG_S = 60     # between the error of `wait_for` and the abort by NCCL's watchdog, which leaves no exit code of ours
POLL_S = 0.0005     # between two checks of a device


class PeerLost(ValueError):
    """Raised when a collective fails: another process of the run died or did not answer in time."""

    exit_code = process.EXIT_PEER_LOST


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The rank of this process among the `size` processes of the run, and among the `local_size` of its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclasses.dataclass
class _Group:
    training: dist.ProcessGroup     # its collectives wait `timeout_s`; those of the default group wait SETUP_S
    timeout_s: int
    store: dist.Store
    watched: bool = False
    where: Callable[[], str] = lambda: "setting up"
    neighbors: Neighbors | None = None


_group: _Group | None = None
before_end: list[Callable[[], None]] = []       # called in `_end`, to complete what is being written


@contextlib.contextmanager
def init(device: str = "auto", timeout_s: int = 600) -> Iterator[Ranks]:
    """Join the processes that torchrun started, and leave with them; without torchrun this is the only process. The backend is
    gloo on CPUs, nccl on GPUs.

    timeout_s: how long a collective inside `watch` waits for the other processes. Raises OutOfMemory if memory is used up,
    PeerLost if a collective fails, DeviceError if a GPU is requested and there is none for this process, LaunchError if the
    variables of the launcher are inconsistent.
    """
    place = launch.place()
    ranks, size = Ranks(*place, choose_device(device, place.local_rank, place.local_size)), place.size
    with _shared_exit_code(), _user_errors(ranks, lambda: "setting up", SMALLER_MODEL):
        if ranks.device.type == "cuda":
            torch.cuda.set_device(ranks.device)
        else:
            keep_memory()
        if size > 1:
            _join(ranks, timeout_s)
        yield ranks
    # Not in a `finally`: after an error that only one process has, the others do not leave.
    if size > 1:
        with _user_errors(ranks, lambda: "at the end of the run"):
            _leave()


@contextlib.contextmanager
def watch(ranks: Ranks, where: Callable[[], str], remedy: str = SMALLER_STEP) -> Iterator[None]:
    """Context for all that the processes do together after the setup. `where()` describes the current activity ("step 13"),
    `remedy` what helps if memory is used up."""
    before = _group and (_group.watched, _group.where)
    if _group is not None:
        _group.watched, _group.where = True, where
    try:
        with _user_errors(ranks, where, remedy):
            yield
    finally:
        if _group is not None:
            _group.watched, _group.where = before


@contextlib.contextmanager
def _user_errors(ranks: Ranks, where: Callable[[], str], remedy: str = SMALLER_STEP) -> Iterator[None]:
    """Convert errors of memory and of collectives to OutOfMemory and PeerLost, which are reported in one line."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory_error(ranks.device, where(), remedy) from error
        if _is_of_collective(error):
            raise _peer_lost(where(), error) from error
        raise


@contextlib.contextmanager
def _shared_exit_code() -> Iterator[None]:
    """On several nodes: posts the exit code of an error for the others, or ends with the code that another process has posted."""
    try:
        yield
    except Exception as error:
        message, code = process.classify_error(error)
        if _group is None or message is None or launch.one_node() or not launch.below_launcher():
            raise
        if not isinstance(error, PeerLost):
            known = _query_store(lambda: _group.store.set(EXIT_CODE, str(code)))
        elif known := _query_store(lambda: _group.store.check([EXIT_CODE]) and int(_group.store.get(EXIT_CODE))):
            error = PeerLost(f"a process on another node has ended the run with exit code {known[0]}; its output says why")
            error.exit_code = known[0]
        if known:
            process.nodes_know()
        raise error


def _query_store(function: Callable[[], object]) -> list:
    """-> [what function() returns]; [] if that is False, or the store does not answer in time"""
    answers = []

    def query() -> None:
        with contextlib.suppress(dist.DistError):
            answers.append(function())

    thread = threading.Thread(target=query, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    return [answer for answer in answers if answer is not False]


def wait_for(event: torch.cuda.Event) -> None:
    """Return when the device has reached the event. Unlike the event's own method, it also notices signals and lost processes.

    Raises NeighborLost, or DistError after the time that a collective waits.
    """
    began = time.monotonic()
    while not event.query():
        if _group is not None:
            if _group.neighbors is not None:
                _group.neighbors.raise_if_lost()
            if time.monotonic() - began > (_group.timeout_s if _group.watched else SETUP_S):
                raise dist.DistBackendError("timed out")
        time.sleep(POLL_S)


def to_host(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU of what all ranks have computed, after `wait_for`; a CPU tensor is returned unchanged."""
    if not tensor.is_cuda:
        return tensor.cpu()
    done = torch.cuda.Event()
    done.record()
    wait_for(done)                      # before the copy, which would wait inside CUDA
    return tensor.cpu()


def _peer_lost(where: str, error: Exception) -> PeerLost:
    return PeerLost(f"{where}: {_describe_loss(error)}. --resume_path continues from the last checkpoint")


def _end(error: NeighborLost) -> None:
    """End this process, whose main thread waits for a lost one and does not notice the loss."""
    for finish in before_end:
        finish()
    code = process.report_error("train.py", str(_peer_lost(_group.where(), error)), PeerLost.exit_code)
    sys.stdout.flush()
    os._exit(code)


def _is_of_collective(error: Exception) -> bool:
    """Whether the error comes from a collective. nccl raises DistBackendError; gloo raises plain RuntimeErrors, most of which
    name its source files; the rest are in OF_GLOO."""
    return isinstance(error, (dist.DistError, NeighborLost)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OF_GLOO))


def _describe_loss(error: Exception) -> str:
    if isinstance(error, NeighborLost):
        return f"{error}; possibly killed by the out-of-memory killer (see dmesg)"
    if re.search("timed out|timeout", str(error).lower()):
        patience = f"{_group.timeout_s} s (--rank_timeout)" if current_group() else f"{SETUP_S} s"
        return f"another process of the run did not answer within {patience}"
    reason = re.sub(r"^\[\S*\] ", "", f"{error}".partition("\n")[0]).partition(". ")[0][:200]
    where = "below" if launch.one_node() else "below or on its node"
    return (f"another process of the run has ended ({reason}); the output {where} names it. It was possibly killed by the "
            "out-of-memory killer (see dmesg)")


def _join(ranks: Ranks, timeout_s: int) -> None:
    global _group
    patience, on_gpu = datetime.timedelta(seconds=SETUP_S), ranks.device.type == "cuda"
    # By default NCCL's watchdog writes to the store before it ends the process, but the store's machine may be lost.
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    process.end_at_once_on_error()
    store = meet(ranks.rank, ranks.size, SETUP_S)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=ranks.rank, world_size=ranks.size, timeout=patience,
                            device_id=ranks.device if on_gpu else None)
    _group = _Group(dist.new_group(timeout=datetime.timedelta(seconds=timeout_s + on_gpu * WATCHDOG_S)), timeout_s, store)
    if on_gpu:
        _group.neighbors = watch_neighbors(store, ranks.rank, ranks.local_rank, ranks.local_size, _end)


def _leave() -> None:
    """Leave the group together with all others. No reference to a wrapped model may exist any more."""
    global _group
    # gloo aborts a process (SIGABRT, in 9 of 24 trials with two) that leaves while another is still connected, or while a
    # DistributedDataParallel that is not yet garbage-collected refers to the group. The collector skips frozen objects.
    gc.unfreeze()
    gc.collect()
    if _group.neighbors is not None:
        _group.neighbors.stop()
    dist.barrier(_group.training)
    dist.destroy_process_group()
    _group = None


def training_group() -> dist.ProcessGroup:
    """Return the group whose collectives wait `timeout_s`."""
    return _group.training


def current_group() -> dist.ProcessGroup | None:
    """Return the training group inside `watch`; elsewhere None, which means the default group."""
    return _group.training if _group is not None and _group.watched else None
