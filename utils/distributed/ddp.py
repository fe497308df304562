"""Wraps the model so that gradients are averaged over the processes."""

import contextlib

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from .ranks import Ranks, training_group


def wrap(model: nn.Module, ranks: Ranks, half_gradients: bool = False) -> nn.Module:
    """Return the model in DistributedDataParallel if there are several processes, else the model itself.

    half_gradients sends the gradients over the network as float16, with half the traffic. Call training.precision.warm_up
    before the first step.
    """
    if ranks.size == 1:
        return model
    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    wrapped = nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True,
                                                  process_group=training_group())
    if half_gradients:
        # None would mean the default group, whose collectives wait for hours.
        wrapped.register_comm_hook(training_group(), fp16_compress_hook)
    return wrapped


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model that was passed to `wrap`."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    """Return the context for forward and backward of every micro-step but the last: gradients stay on this rank."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else contextlib.nullcontext()
