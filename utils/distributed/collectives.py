"""Collective operations on the processes of a run. With one process they return the same without a group."""

import platform
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import launch, process

from .ranks import Ranks, current_group, training_group

REPORTED = (ValueError, OSError)         # errors that are reported to the user in one line; anything else is a bug


class NodeError(ValueError):
    """An error of a file or disk on one node; the message names the node."""

    exit_code = process.EXIT_BAD_INPUT


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum the tensors of all ranks, in place on every rank, and return the sum."""
    if dist.is_initialized():
        dist.all_reduce(tensor, group=current_group())
    return tensor


def all_gather(tensor: Tensor, ranks: Ranks) -> list[Tensor]:
    """Return the tensors of all ranks, of the same shape and type, on every rank; as copies if there are several ranks."""
    if ranks.size == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(ranks.size)]
    dist.all_gather(parts, tensor, group=current_group())
    return parts


def all_gather_objects(ranks: Ranks, value: object) -> list:
    """Return the values of all ranks, on every rank."""
    values = [value] * ranks.size
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=current_group())
    return values


def broadcast_from_main(ranks: Ranks, function: Callable):
    """Run `function` on rank 0 and return its result on every rank. Raises an error of REPORTED on every rank."""
    outcome = [None, None]
    if ranks.is_main:
        try:
            outcome[0] = function()
        except REPORTED as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0, group=current_group())
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def local_main_first(ranks: Ranks, function: Callable):
    """Run `function` on one process of each node, then on the others, which find what it has downloaded or written.

    Raises an error of REPORTED on any process on all of them, so that none waits for one that has stopped. The error names the
    node unless it occurs on all nodes: a file may be missing on one of them.
    """
    result, error = None, None
    for turn in (True, False):
        if (ranks.local_rank == 0) == turn:
            try:
                result = function()
            except REPORTED as caught:
                error = caught
        outcomes = all_gather_objects(ranks, (launch.node(), platform.node(), error))
        failed = [outcome for outcome in outcomes if outcome[2] is not None]
        if failed:
            node, host, known = failed[0]
            if {outcome[0] for outcome in failed} != {outcome[0] for outcome in outcomes}:
                if isinstance(known, OSError):                  # its message is not made of its `args`
                    known = NodeError(process.classify_error(known)[0] or str(known))
                known.args = (f"node {node} (host {host}): {known}",)
            raise known
    return result


def broadcast_weights(model: nn.Module, ranks: Ranks) -> None:
    """Copy rank 0's weights to every rank, for a model that is not wrapped (`wrap` does it for others)."""
    if ranks.size > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), src=0, group=training_group())
