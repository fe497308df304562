"""--exact: the same bits for any number of processes. Imported only when the flag is on.

Floating-point sums depend on the order, and DistributedDataParallel adds what each rank has summed by itself. Here the
micro-batches of a step, 0 .. M - 1 over all ranks, are the leaves of one binary tree: neighbors of equal size are added as a
binary counter carries, and what is left at the end is folded from the last to the first. A rank owns a block of L = M / W
leaves. If L is a power of two, the block is a node of the tree, whatever W is, and every rank adds the ranks' nodes by the same
rule. So the order depends on M only. A rank stores up to log2(L) + 1 sums besides the gradient of the current micro-batch
(pairwise summation: Higham, "The accuracy of floating point summation", 1993).
"""

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from utils.device import on_device
from utils.distributed import Ranks, all_gather

from .trainer import Reducer

CHUNK = 2 ** 22        # numbers that cross the network at a time: up to 2 W + 1 times 16 MiB of float32 are stored


def set_deterministic(device: torch.device) -> None:
    """Make products deterministic: one thread on the CPU, deterministic kernels on a GPU. Call it before the first product."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")          # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


class ExactReducer(Reducer):
    """Sums gradients and losses of a step along the tree. The Trainer's model is not wrapped."""

    def __init__(self, model: nn.Module, ranks: Ranks):
        super().__init__(model, ranks)
        self.loss_factor = 1
        self._ranks, self._tree = ranks, SumTree()

    def add(self, sums: Tensor) -> None:
        # Contiguous, since the order in which a norm sums follows the memory.
        gradients = [None if parameter.grad is None else parameter.grad.contiguous() for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        self._tree.push([*gradients, sums])

    def reduce(self, requests: Tensor) -> Tensor:
        *gradients, sums = self._tree.root()
        like = [*self.parameters, sums, requests]
        *gradients, sums, requests = all_reduce_tree([*gradients, sums, requests], like, self._ranks)
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient
        return torch.cat([sums, requests])


class SumTree:
    """`push` all leaves, then call `root`. A leaf is a list of tensors, which the tree overwrites; None counts as 0."""

    def __init__(self):
        self._nodes: list[tuple[int, list[Tensor | None]]] = []          # (leaves in it, their sums), from the left

    def push(self, leaf: list[Tensor | None]) -> None:
        size = 1
        while self._nodes and self._nodes[-1][0] == size:
            leaf, size = _add(self._nodes.pop()[1], leaf), 2 * size
        self._nodes.append((size, leaf))

    def root(self) -> list[Tensor | None]:
        """Return the sums, None where no leaf had a tensor, and empties the tree."""
        _, total = self._nodes.pop()
        while self._nodes:
            total = _add(self._nodes.pop()[1], total)
        return total


def _add(left: list[Tensor | None], right: list[Tensor | None]) -> list[Tensor | None]:
    # Adding 0 turns -0.0 into 0.0, so None must be added too: another rank's None arrives as zeros.
    return [(one if one is not None else other).add_(0 if one is None or other is None else other)
            if one is not None or other is not None else None for one, other in zip(left, right)]


def all_reduce_tree(node: list[Tensor | None], like: Sequence[Tensor], ranks: Ranks) -> list[Tensor | None]:
    """Add the ranks' nodes to the tree's root, on every rank; `like` has the shapes and types that None means."""
    if ranks.size == 1:
        return node
    present = torch.tensor([tensor is not None for tensor in node], dtype=torch.uint8)
    present = torch.stack(all_gather(on_device(present, ranks.device), ranks)).any(dim=0)
    # The host waits for the device only where a tensor is missing, which is rare.
    known = present.tolist() if any(tensor is None for tensor in node) else [True] * len(node)
    total = [torch.zeros_like(shape, memory_format=torch.contiguous_format) if tensor is None else tensor
             for tensor, shape in zip(node, like)]
    for pieces in _chunks(total):
        tree = SumTree()
        for part in all_gather(torch.cat(pieces), ranks):
            tree.push([part])
        for piece, part in zip(pieces, tree.root()[0].split([len(piece) for piece in pieces])):
            piece.copy_(part)
    return [tensor if there else None for tensor, there in zip(total, known)]


def _chunks(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield lists of flat views of the (contiguous) tensors, each list of one type and at most CHUNK numbers."""
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
