"""Start, stop, reductions, and who is lost: the only user of torch.distributed. One process is a world of size 1 with no group.

While a run is set up, one process may download for an hour and the others wait. Inside `watching` a collective waits
`timeout_s` alone, and where another process died, hangs or left with an error, each survivor says so in one line. They
find out who is missing through the store in which torchrun's agent introduced them to each other: whoever leaves in
disorder leaves a word there.
"""

import contextlib
import dataclasses
import datetime
import gc
import json
import os
import socket
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.process import restarts

from .lost_ranks import FAILED_TOO, OutOfMemory, lost, out_of_memory, used_up

SETUP_S = 7200      # a collective outside `watching` waits as long: for a download, or the slowest disk
GRACE_S = 1.0       # within which survivors of one failure hear of each other
FAREWELL_S = 3.0    # within which all ranks that leave for the same error come to leave together


class DeviceError(ValueError):
    """A device that was asked for and is not there: one line."""


@dataclasses.dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclasses.dataclass
class _Link:
    """What a process of several knows of the others."""

    store: dist.Store
    training: dist.ProcessGroup     # its collectives wait `timeout_s`; those of the default group SETUP_S
    timeout_s: int
    places: list[list]              # of each rank (pid, host)
    watched: bool = False
    broken: bool = False            # somebody is lost: nobody is waited for any more
    leaving: bool = False           # this process has left a word


_link: _Link | None = None


def start(device: str = "auto", timeout_s: int = 600) -> World:
    """Joins the processes that torchrun started; alone without torchrun. gloo on CPU, nccl on GPU.

    timeout_s: how long a process waits for the others inside `watching`.
    Raises DeviceError if a GPU is asked for and there is none for this process.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    asked = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if device == "cuda" and not gpus:
        raise DeviceError("--device cuda: PyTorch sees no GPU here (nvidia-smi and torch.cuda.is_available() tell more)")
    if device == "auto" and not gpus and asked[:1].isdigit():
        raise DeviceError(f"GPUS={asked} asks for GPUs, but PyTorch sees none: leave GPUS (CUDA_VISIBLE_DEVICES) out "
                          "to train on the CPU")
    use_gpu = gpus > 0 and device != "cpu"
    if use_gpu and local_size > gpus:
        raise DeviceError(f"{local_size} processes on this node but {gpus} GPUs: set NPROC={gpus}")
    place = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(place)
    world = World(rank, size, local_rank, local_size, place)
    if size > 1:
        _join(world, timeout_s)
    return world


def _join(world: World, timeout_s: int) -> None:
    global _link
    patience, on_gpu = datetime.timedelta(seconds=SETUP_S), world.device.type == "cuda"
    store, _, _ = next(dist.rendezvous("env://", timeout=patience))
    # torchrun keeps its store when it starts the processes anew: they would read where their predecessors could be reached.
    store = dist.PrefixStore(f"attempt-{restarts()}", store)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.PrefixStore("groups", store), rank=world.rank,
                            world_size=world.size, timeout=patience, device_id=world.device if on_gpu else None)
    store.set(f"place/{world.rank}", json.dumps([os.getpid(), socket.gethostname()]))
    places = [json.loads(store.get(f"place/{rank}")) for rank in range(world.size)]
    _link = _Link(store, dist.new_group(timeout=datetime.timedelta(seconds=timeout_s)), timeout_s, places)


def stop() -> None:
    """Leaves the group, when all the others do; at once if somebody is lost or left with an error of his own.

    Call it when nothing refers to a wrapped model any more.
    """
    global _link
    if not dist.is_initialized():
        return
    # gloo aborts a process (SIGABRT, in 9 of 24 trials with two) that leaves while another is still connected, or
    # while a DistributedDataParallel that waits for the garbage collector still holds the group. What train.py has frozen
    # the collector leaves out.
    gc.unfreeze()
    gc.collect()
    if not _link.broken and _link.leaving:
        _link.broken = len(_last_words(_link, FAREWELL_S)) < len(_link.places)
    if not _link.broken:
        with contextlib.suppress(RuntimeError):              # the others are gone: nothing to wait for
            dist.barrier(_link.training)
    dist.destroy_process_group()
    _link = None


@contextlib.contextmanager
def watching(world: World, where: Callable[[], str]) -> Iterator[None]:
    """Around all that the processes do together once they are set up; `where()` says what is done just now ("step 13").

    A collective that fails becomes a LostProcessError, lack of memory OutOfMemory. With any other error a word is left, so
    that the others end with its exit code if it was this process's alone.
    """
    if _link is not None:
        _link.watched = True
    try:
        yield
    except BaseException as error:
        if out_of_memory(error):
            leave_word(world, OutOfMemory.code)
            raise used_up(world.device, where()) from error
        if _link is not None and _is_collective(error):
            _link.broken = True
            leave_word(world, FAILED_TOO)
            words = _last_words(_link, GRACE_S)
            raise lost(world.rank, words, _link.places, where(), _link.timeout_s, error) from error
        leave_word(world, getattr(error, "code", 2 if isinstance(error, ValueError) else 1) or 0)
        raise
    finally:
        if _link is not None:
            _link.watched = False


def leave_word(world: World, code: int) -> None:
    """Tells the others, should they miss this process, that it ends with this exit code and has said why."""
    if _link is not None and not _link.leaving:
        _link.leaving = True
        with contextlib.suppress(RuntimeError):              # whoever kept the store is gone
            _link.store.set(f"last/{world.rank}", json.dumps(code if isinstance(code, int) else 1))


def others_know() -> bool:
    """Whether this process has left a word and the others come upon it by themselves: gloo tells them that it is gone, while
    those that wait for a GPU have to be stopped."""
    return _link is not None and _link.leaving and dist.get_backend() == "gloo"


def _is_collective(error: BaseException) -> bool:
    """gloo raises plain RuntimeErrors that name their source file, nccl DistBackendError."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _last_words(link: _Link, wait_s: float) -> dict[int, int]:
    """-> exit code or FAILED_TOO by rank, of those who have left a word within that time"""
    deadline, words = time.monotonic() + wait_s, {}
    with contextlib.suppress(RuntimeError):
        while len(words) < len(link.places):
            for rank in set(range(len(link.places))) - set(words):
                if link.store.check([f"last/{rank}"]):
                    words[rank] = json.loads(link.store.get(f"last/{rank}"))
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    return words


def _group() -> dist.ProcessGroup | None:
    return _link.training if _link is not None and _link.watched else None


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """In place; every rank gets the sum."""
    if dist.is_initialized():
        dist.all_reduce(tensor, group=_group())
    return tensor


def parts_of_ranks(tensor: Tensor, world: World) -> list[Tensor]:
    """The tensors of all ranks, of one shape and type, on every rank; the list's storage is new where there are several."""
    if world.size == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(parts, tensor, group=_group())
    return parts


def on_main(world: World, function: Callable):
    """Runs `function` on rank 0 and gives its result to every rank; a ValueError of it is raised on every rank."""
    outcome = [None, None]
    if world.is_main:
        try:
            outcome[0] = function()
        except ValueError as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0, group=_group())
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather(world: World, value) -> list:
    """The values of all ranks, on every rank."""
    values = [value] * world.size
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=_group())
    return values


def first_on_node(world: World, function: Callable):
    """Runs `function` on one process of each node, then on the others: what it downloads or writes is there for them.

    A ValueError on any process is raised on all of them, so that none waits for one that has given up.
    """
    result, error = None, None
    for turn in (True, False):
        if (world.local_rank == 0) == turn and error is None:
            try:
                result = function()
            except ValueError as caught:
                error = caught
        error = next((other for other in gather(world, error) if other is not None), None)
    if error is not None:
        raise error
    return result


def wrap(model: nn.Module, world: World, half_gradients: bool = False) -> nn.Module:
    """DistributedDataParallel over more than one process, else the model itself.

    half_gradients sends the gradients over the network as float16, at half the traffic. The model is then to be warmed up
    (engine.warm_up) before its first step.
    """
    if world.size == 1:
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    wrapped = nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True,
                                                  process_group=_link.training)
    if half_gradients:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        wrapped.register_comm_hook(_link.training, fp16_compress_hook)      # None would be the default group, which waits SETUP_S
    return wrapped


def share_weights(model: nn.Module, world: World) -> None:
    """Rank 0's weights on every rank, as `wrap` does it: for a model that is not wrapped."""
    if world.size > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), src=0, group=_link.training)


def without_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    """Around forward and backward of every micro-step but the last: gradients stay on this rank."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else contextlib.nullcontext()


@contextlib.contextmanager
def group(device: str = "auto", timeout_s: int = 600) -> Iterator[World]:
    """start() and stop() around a block."""
    world = start(device, timeout_s)
    yield world
    # Not in a `finally`: after an error that one process alone has, the others do not come here, and waiting for them
    # would hide the traceback. The launcher stops them.
    stop()
