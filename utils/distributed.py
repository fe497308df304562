"""Start, stop, reductions: the only user of torch.distributed. One process is a world of size 1 with no group."""

import contextlib
import dataclasses
import datetime
import gc
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


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


def start(device: str = "auto", timeout_s: int = 7200) -> World:
    """Joins the processes that torchrun started; alone without torchrun. gloo on CPU, nccl on GPU.

    timeout_s also bounds how long the others wait while one process downloads.
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
    if size > 1:
        dist.init_process_group("nccl" if use_gpu else "gloo", timeout=datetime.timedelta(seconds=timeout_s),
                                device_id=place if use_gpu else None)
    return World(rank, size, local_rank, local_size, place)


def stop() -> None:
    """Leaves the group, when all the others do. Call it when nothing refers to a wrapped model any more."""
    if dist.is_initialized():
        # gloo aborts a process (SIGABRT, in 9 of 24 trials with two) that leaves while another is still connected, or
        # while a DistributedDataParallel that waits for the garbage collector still holds the group.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """In place; every rank gets the sum."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def on_main(world: World, function: Callable):
    """Runs `function` on rank 0 and gives its result to every rank; a ValueError of it is raised on every rank."""
    outcome = [None, None]
    if world.is_main:
        try:
            outcome[0] = function()
        except ValueError as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather(world: World, value) -> list:
    """The values of all ranks, on every rank."""
    values = [value] * world.size
    if dist.is_initialized():
        dist.all_gather_object(values, value)
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

    half_gradients sends the gradients over the network as float16, at half the traffic.
    """
    if world.size == 1:
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    wrapped = nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    if half_gradients:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        wrapped.register_comm_hook(None, fp16_compress_hook)
    return wrapped


def without_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    """Around forward and backward of every micro-step but the last: gradients stay on this rank."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else contextlib.nullcontext()


@contextlib.contextmanager
def group(device: str = "auto") -> Iterator[World]:
    """start() and stop() around a block."""
    world = start(device)
    yield world
    # Not in a `finally`: after an error that one process alone has, the others do not come here, and waiting for them
    # would hide the traceback. The launcher stops them.
    stop()
