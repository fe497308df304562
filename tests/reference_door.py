"""Three functions for comparisons with other implementations. Their signatures do not change when the project's code does."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.layers import resize_positions as resize
from utils import distributed
from utils.data.loader import Batch
from utils.data.sampler import SampleIndex
from utils.data.transforms import normalize
from utils.training.criterion import Criterion
from utils.training.optimizer import build_optimizer, lr_multiplier, parameter_groups
from utils.training.precision import FP32, LossScaler
from utils.training.trainer import StepMetrics, StepSettings, Trainer

CPU = torch.device("cpu")
HALF = (0.5,) * 3


def resize_positions(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], rule: str) -> Tensor:
    """Resize position embeddings (1, prefix + h * w, d) -> (1, prefix + h' * w', d); prefix rows are kept. rule: bilinear or
    bicubic."""
    return resize(table, old_grid, new_grid, rule)


def learning_rates(kind: str, warmup: int, total: int, peak: float) -> list[float]:
    """Return the learning rates of steps 1 to total. kind: cosine, linear or constant."""
    return [peak * lr_multiplier(step, warmup, total, kind) for step in range(1, total + 1)]


def train_trace(model: nn.Module, images: Tensor, labels: Tensor, batch: int, steps: int, warmup: int, peak: float, decay: str,
                weight_decay: float, accumulation: int, clip: float) -> list[float]:
    """Train the model and return the losses of the steps, each before its update."""
    metrics = train(model, images, labels, batch, steps, warmup, peak, decay, weight_decay, accumulation, clip)
    return [step.loss for step in metrics]


def train(model: nn.Module, images: Tensor, labels: Tensor, batch: int, steps: int, warmup: int, peak: float, decay: str,
          weight_decay: float, accumulation: int, clip: float) -> list[StepMetrics]:
    """Train with SGD, momentum 0.9, in float32, on images (n, h, w, 3) uint8 repeatedly in their order; mean and std 0.5.

    `batch` images per step, in `accumulation` micro-batches; clip: the largest norm of the gradient, 0 for no clipping.
    """
    rates = learning_rates(decay, warmup, steps, peak)
    settings = StepSettings(batch_size=batch, micro_steps=accumulation, max_grad_norm=clip, seed=0,
                            schedule=lambda update: rates[update - 1])
    optimizer = build_optimizer("sgd", parameter_groups(model.named_parameters(), weight_decay=weight_decay), peak)
    ranks = distributed.Ranks(0, 1, 0, 1, CPU)
    trainer = Trainer(model, optimizer, Criterion(), LossScaler(FP32, CPU), FP32, ranks, to_input, settings)
    batches = micro_batches(torch.as_tensor(images).permute(0, 3, 1, 2), torch.as_tensor(labels), batch, steps, accumulation)
    return [metrics for _ in range(steps) for metrics in trainer.train_step(batches)]


def to_input(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return normalize(images, HALF, HALF, dtype)


def micro_batches(images: Tensor, labels: Tensor, batch: int, steps: int, accumulation: int) -> Iterator[Batch]:
    """Yield the micro-batches of images (n, 3, h, w). Step s, from 0, has images s * batch to (s + 1) * batch - 1, modulo n."""
    size = batch // accumulation
    for step, micro in itertools.product(range(steps), range(accumulation)):
        first = step * batch + micro * size
        index = [number % len(images) for number in range(first, first + size)]
        yield Batch(images[index], labels[index].long(), [SampleIndex(step, micro, 0, number) for number in index])
