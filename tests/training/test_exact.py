"""The fixed order of summation: compared with the tree as a recursion, and on 4 -> 1 -> 2 -> 4 processes, bit for bit."""

import os

import pytest
import torch
from ranks import Ranks
from torch import nn

from configs import architecture
from models import create_model
from utils import distributed
from utils.data import loader as data
from utils.data.datasets import digits
from utils.data.mixup import Mixer
from utils.data.sampler import StepSampler
from utils.data.transforms import normalize, train_transform
from utils.training import exact
from utils.training.criterion import Criterion
from utils.training.ema import Ema
from utils.training.exact import ExactReducer, SumTree
from utils.training.optimizer import build_optimizer
from utils.training.precision import FP32, LEVELS, LossScaler
from utils.training.trainer import Progress, Requests, StepSettings, Trainer

CPU = torch.device("cpu")
ALONE = distributed.Ranks(0, 1, 0, 1, CPU)


def recursion(leaves: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the first leaves (the largest power of two below their number) plus the sum of the others."""
    if len(leaves) == 1:
        return leaves[0]
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return recursion(leaves[:half]) + recursion(leaves[half:])


def same_bits(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16])
def test_the_tree_is_the_recursion(count):
    leaves = list(torch.randn(count, 100, generator=torch.Generator().manual_seed(0)))
    tree = SumTree()
    for leaf in leaves:
        tree.push([leaf.clone(), leaf.double()])
    root = tree.root()
    assert same_bits(root[0], recursion(leaves)) and same_bits(root[1], recursion([leaf.double() for leaf in leaves]))
    if count > 4:
        assert not torch.equal(root[0], sum(leaves[1:], leaves[0]))          # another order, other bits


def leaf_of(number: int) -> list[torch.Tensor | None]:
    """Return gradients of several types: an empty one, a transposed one, one with -0.0, and some that are None in some or all
    leaves."""
    generator = torch.Generator().manual_seed(number)
    values = torch.randn(3, 50, generator=generator)
    return [values[0], values[1].half(), None if number % 3 else values[2], None, values[2].double()[:7],
            torch.randn(6, 7, generator=generator).t().contiguous(), None if number % 2 else torch.tensor([-0.0, 1.0]),
            torch.zeros(0)]


def tree_of(numbers) -> list[torch.Tensor | None]:
    tree = SumTree()
    for number in numbers:
        tree.push(leaf_of(number))
    return tree.root()


LIKE = [torch.empty(50), torch.empty(50).half(), torch.empty(50), torch.empty(1), torch.empty(7).double(), torch.empty(7, 6),
        torch.empty(2), torch.empty(0)]


def summed(ranks: distributed.Ranks, leaves: int) -> list[torch.Tensor | None]:
    count = leaves // ranks.size
    node = tree_of(range(ranks.rank * count, (ranks.rank + 1) * count))
    return exact.sum_over_ranks(node, LIKE, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 2])
def test_ranks_sum_as_one(tmp_path, monkeypatch, tries, size):
    if size == 2 and not tries(0, 1):
        pytest.skip("only with three processes, not a power of two, unless --full")
    monkeypatch.setattr(exact, "CHUNK", 64)              # several tensors in a chunk, a tensor in several chunks
    counts = (4 * size, size)
    expected = [summed(ALONE, leaves) for leaves in counts]
    assert all(one[3] is None and one[2] is not None for one in expected)
    with Ranks(size, lambda ranks: [summed(ranks, leaves) for leaves in counts], tmp_path) as processes:
        for got in processes.results():
            assert all(same_bits(*pair) for pairs in zip(got, expected, strict=True) for pair in zip(*pairs, strict=True))


def test_the_host_does_not_wait_for_sums_that_all_ranks_have(monkeypatch):
    """On the device `meta`, where nothing can wait for values."""
    ranks, meta = distributed.Ranks(0, 2, 0, 2, torch.device("meta")), torch.device("meta")
    monkeypatch.setattr(exact, "all_gather", lambda tensor, ranks: [tensor, tensor.clone()])
    node = [torch.empty(3, 4, device=meta), torch.empty(5, dtype=torch.float64, device=meta)]
    total = exact.sum_over_ranks(node, node, ranks)
    assert [(tensor.shape, tensor.dtype) for tensor in total] == [(tensor.shape, tensor.dtype) for tensor in node]


@pytest.mark.gpu
def test_no_micro_step_makes_the_host_wait():
    reducer = ExactReducer(nn.Linear(8, 8).cuda(), distributed.Ranks(0, 1, 0, 1, torch.device("cuda")))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            for parameter in reducer.parameters:
                parameter.grad = torch.ones_like(parameter)
            reducer.add(torch.ones(3, dtype=torch.float64, device="cuda"))
        reducer.reduce(torch.zeros(2, dtype=torch.float64, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_deterministic_is_one_thread_on_a_cpu_and_deterministic_kernels_on_a_gpu(monkeypatch):
    torch.set_num_threads(2)
    exact.set_deterministic(CPU)
    assert torch.get_num_threads() == 1 and not torch.are_deterministic_algorithms_enabled()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with torch.backends.cudnn.flags():                                   # restores cuDNN's
        exact.set_deterministic(torch.device("cuda"))
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and not torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(False)


# ----------------------------------------------------------------------------------------------- a run in pieces

EVERYTHING = train_transform("crop_flip", (8, 8), crop_scale=0.5, randaugment_ops=1, random_erasing=0.5)


def train(ranks: distributed.Ranks, micro_batches: int, row, state: dict | None, steps: int) -> dict:
    """Train a ViT for some steps with everything that draws or rounds. Return the content of a checkpoint and the losses."""
    torch.manual_seed(ranks.rank)
    model = create_model(architecture(4, 16, 32, 2, 2, img_size=8, distilled=True, dropout_rate=0.1), 10)
    model.distilling = True
    nn.init.normal_(model.head.weight)
    distributed.broadcast_weights(model, ranks)                          # rank 0's, as every rank has made its own
    optimizer, scaler, ema = build_optimizer("adamw", model.parameters(), 1e-3), LossScaler(row, CPU), Ema(model, 0.5)
    done, updates, losses = 0, 0, []
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        ema.model.load_state_dict(state["ema"])
        done, updates, losses = state["step"], state["updates"], state["losses"]
    criterion = Criterion(0.1, None, Mixer(10, 24, 7, mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.8, stop_at=100),
                          "soft", lambda images: images.float().flatten(1)[:, :10] / 99, 0.3, 2.0)
    order = StepSampler(len(digits("").train), 24, micro_batches, ranks.rank, ranks.size, 5, done, done + steps)
    batches = iter(data.train_loader(digits("").train, order, transform=EVERYTHING, seed=5, num_workers=0, pin_memory=False))
    trainer = Trainer(
        model, optimizer, criterion, scaler, row, ranks, lambda images: normalize(images, (0.5,) * 3, (0.5,) * 3),
        StepSettings(24, micro_batches // ranks.size, max_grad_norm=0.5, seed=1, schedule=lambda update: 1e-3), ema=ema,
        reducer=ExactReducer(model, ranks), progress=Progress(done, updates), requests=lambda: Requests(stop=1.0))
    for _ in range(steps):
        metrics, = trainer.train_step(batches)
        losses.append(metrics.loss)
        assert metrics.requests.stop == ranks.size
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
            "ema": ema.model.state_dict(), "step": trainer.step, "updates": trainer.progress.updates, "losses": losses}


def plain(state):
    """Return the state with numbers instead of tensors, whose text can be compared bit for bit."""
    if isinstance(state, dict):
        return {name: plain(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [plain(each) for each in state]
    return state.tolist() if torch.is_tensor(state) else state


@pytest.mark.slow
@pytest.mark.contract("P5", "with --exact the number of processes changes no bit, from start to start")
def test_another_number_of_processes_changes_no_bit(tmp_path, tries, figure):
    plans = [(FP32, 4, (4, 1, 2, 4)), (LEVELS["O1"], 6, (3, 6, 1)), (FP32, 4, (1, 4, 2)), (LEVELS["O1"], 4, (2, 4, 2)),
             (FP32, 12, (3, 1, 6)), (FP32, 3, (1, 3))][:tries(1, 6)]
    changes = 0
    for row, micro_batches, sizes in plans:
        state = None
        for size in sizes:
            if size == 1:
                state = train(ALONE, micro_batches, row, state, 2)
                continue
            with Ranks(size, lambda ranks, before=state: train(ranks, micro_batches, row, before, 2), tmp_path) as processes:  # noqa: B023
                state, *others = processes.results()
            assert {str(plain(other)) for other in others} == {str(plain(state))}
        assert str(plain(state)) == str(plain(train(ALONE, micro_batches, row, None, 2 * len(sizes)))), sizes
        changes += len(sizes) - 1
    figure("changes of the number of processes, 1 to 6, of runs in fp32 and fp16", changes)
