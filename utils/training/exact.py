"""The same bits for any number of processes: a step's gradients are summed in an order that its micro-batches fix.

DistributedDataParallel adds what each rank has summed up by itself, and floating-point sums depend on the order. Here the
micro-batches of a step, 0 .. M - 1 over all ranks, are the leaves of one binary tree: equal neighbours are added as a
binary counter carries, and what is left at the end is folded from the last to the first. A rank owns a block of
L = M / W leaves; with L a power of two it is a node of the tree, whatever W is, and the ranks' nodes are added by the same
rule on every rank. The order is fixed as long as M stays. A rank holds up to log2(L) + 1 sums besides the gradient of
the micro-batch at hand (pairwise summation: Higham, "The accuracy of floating point summation", 1993).
"""

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from utils.distributed import Ranks, all_gather

CHUNK = 2 ** 22        # numbers that cross the network at a time: up to 2 W + 1 times 16 MiB of float32 are held


class ExactError(ValueError):
    """Processes and micro-steps whose sums cannot be those of another number of processes: one line."""


def check(world_size: int, micro_steps: int) -> None:
    """Raises ExactError unless the `micro_steps` of a rank are a node of the tree."""
    if world_size > 1 and micro_steps & (micro_steps - 1):
        below = 1 << micro_steps.bit_length() - 1
        raise ExactError(f"--exact on {world_size} processes: {micro_steps} micro-steps a process are no power of two: take "
                         f"--gradient_accumulation_steps (GRAD_STEPS) {below} or {2 * below}, or one process")


def prepare(device: torch.device) -> None:
    """What else decides bits: one thread on the CPU, deterministic kernels on a GPU. Call it before the first product."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")          # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


class SumTree:
    """`push` leaf after leaf, then `root`. A leaf is a list of tensors, which the tree takes over; None counts as 0."""

    def __init__(self):
        self._nodes: list[tuple[int, list[Tensor | None]]] = []          # (leaves in it, their sums), from the left

    def push(self, leaf: list[Tensor | None]) -> None:
        size = 1
        while self._nodes and self._nodes[-1][0] == size:
            leaf, size = _add(self._nodes.pop()[1], leaf), 2 * size
        self._nodes.append((size, leaf))

    def root(self) -> list[Tensor | None]:
        """None where no leaf had a tensor. The tree is empty afterwards."""
        _, total = self._nodes.pop()
        while self._nodes:
            total = _add(self._nodes.pop()[1], total)
        return total


def _add(left: list[Tensor | None], right: list[Tensor | None]) -> list[Tensor | None]:
    # Adding 0 turns -0.0 into 0.0, so that None has to be added too: from another rank it comes as zeros.
    return [(one if one is not None else other).add_(0 if one is None or other is None else other)
            if one is not None or other is not None else None for one, other in zip(left, right)]


def take_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Their gradients, which they lose. Contiguous, since the order in which a norm sums follows the memory."""
    gradients = [None if parameter.grad is None else parameter.grad.contiguous() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def sum_over_ranks(node: list[Tensor | None], like: Sequence[Tensor], world: Ranks) -> list[Tensor | None]:
    """The tree's root from the ranks' nodes, on every rank; `like` has the shapes and types that None stands for."""
    if world.size == 1:
        return node
    present = torch.tensor([tensor is not None for tensor in node], dtype=torch.uint8, device=world.device)
    present = torch.stack(all_gather(present, world)).any(dim=0).tolist()
    total = [(torch.zeros_like(shape, memory_format=torch.contiguous_format) if tensor is None else tensor) if there else None
             for tensor, shape, there in zip(node, like, present)]
    for pieces in _chunks([tensor for tensor in total if tensor is not None]):
        tree = SumTree()
        for part in all_gather(torch.cat(pieces), world):
            tree.push([part])
        for piece, part in zip(pieces, tree.root()[0].split([len(piece) for piece in pieces])):
            piece.copy_(part)
    return total


def _chunks(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of flat views, of one type and of CHUNK numbers at most each, that cover the (contiguous) tensors"""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        chunk, room = [], CHUNK
        for tensor in tensors:
            rest = tensor.view(-1) if tensor.dtype == dtype else tensor.new_empty(0)
            while len(rest):
                chunk.append(rest[:room])
                rest, room = rest[room:], room - len(chunk[-1])
                if not room:
                    yield chunk
                    chunk, room = [], CHUNK
        if chunk:
            yield chunk
