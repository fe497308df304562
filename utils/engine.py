"""One optimizer step, and one evaluation."""

import dataclasses
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Batch, Loader
from .distributed import World, sum_over_ranks, without_sync
from .metrics import EvalReport, Tally
from .optim import set_learning_rate
from .precision import LossScaler, Precision
from .randomness import seed_device

MAX_SKIPS = 10      # overflows in a row that loss scaling may skip; by then the scale has fallen a thousandfold


class DivergedError(ValueError):
    """Loss or gradient are not finite, and loss scaling is not the cause: one line with step and samples."""


@dataclasses.dataclass(frozen=True)
class StepReport:
    """`step` counts batches, from 1; the loss is the mean over the step's images, before the update."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float                # before clipping
    loss_scale: float | None        # None where the loss is not scaled
    skipped: bool                   # the weights were left alone because the scaled gradients overflowed
    images_per_second: float


class Trainer:
    """What a step needs, so that train.py's loop reads as the procedure. Takes plain values, not the configuration."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: LossScaler, precision: Precision,
                 world: World, prepare: Callable[[Tensor], Tensor], *, batch_size: int, micro_steps: int,
                 max_grad_norm: float, seed: int, step: int = 0, updates: int = 0, skips: int = 0):
        """`model` may be wrapped; `prepare` turns uint8 images on the device into its input; micro_steps per rank;
        `step` batches were consumed so far, `updates` of them changed the weights, the last `skips` did not."""
        self.model, self.optimizer, self.scaler, self.precision, self.world = model, optimizer, scaler, precision, world
        self.prepare, self.batch_size, self.micro_steps = prepare, batch_size, micro_steps
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.step, self.updates, self.skips = step, updates, skips

    def train_step(self, batches: Iterator[Batch], learning_rate: float) -> StepReport:
        """Takes micro_steps batches; one update of the weights. Raises DivergedError before a non-finite update.

        The loss is the sum over the step's images divided by their number, so that ranks and micro-steps change
        nothing but the rounding. Order: backward, unscale, clip, step, scale update.
        """
        self.model.train()
        started, keys = time.perf_counter(), []
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for micro_step in range(self.micro_steps):
            batch = next(batches)
            keys += batch.keys
            assert batch.keys[0].step == self.step, (batch.keys[0], self.step)
            if micro_step < self.micro_steps - 1:
                with without_sync(self.model):
                    loss_sum += self._backward(batch)
            else:
                loss_sum += self._backward(batch)
        self.scaler.unscale(self.optimizer)
        norm = self._clip()
        loss = sum_over_ranks(loss_sum).item() / self.batch_size
        self._check(loss, norm, keys)
        scale = self.scaler.scale if self.scaler.enabled else None
        skipped = not _is_finite(norm)
        if not skipped:
            set_learning_rate(self.optimizer, learning_rate)
            self.scaler.step(self.optimizer)
            self.updates += 1
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.skips = self.skips + 1 if skipped else 0
        return StepReport(self.step, loss, learning_rate, norm, scale, skipped,
                          self.batch_size / (time.perf_counter() - started))

    def _backward(self, batch: Batch) -> Tensor:
        """-> sum of the losses of the micro-batch's images"""
        key = batch.keys[0]
        seed_device(self.world.device, self.seed, "model", key.step, key.micro)
        images = self.prepare(batch.images.to(self.world.device, non_blocking=True))
        targets = batch.targets.to(self.world.device, non_blocking=True)
        with self.precision.autocast(self.world.device):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        # DistributedDataParallel divides the ranks' gradients by their number.
        self.scaler.backward(loss * (self.world.size / self.batch_size))
        return loss.detach().double()

    def _clip(self) -> float:
        """-> global gradient norm before clipping; max_grad_norm 0 only measures it"""
        if self.max_grad_norm > 0:
            return nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm).item()
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]).item()

    def _check(self, loss: float, norm: float, keys: list) -> None:
        step = self.step + 1
        # Gradients are the same on all ranks and the loss was summed over them: every rank decides alike.
        if not _is_finite(loss) or (not _is_finite(norm) and not self.scaler.enabled):
            what = f"loss {loss}" if not _is_finite(loss) else f"gradient norm {norm}"
            samples = ", ".join(str(key.index) for key in keys[:16]) + (", ..." if len(keys) > 16 else "")
            raise DivergedError(f"step {step}: {what}; samples {samples}; try a lower --learning_rate or --precision fp32")
        if not _is_finite(norm) and self.skips + 1 >= MAX_SKIPS:
            raise DivergedError(f"step {step}: {MAX_SKIPS} gradient overflows in a row (loss scale {self.scaler.scale:g}); "
                                "try a lower --learning_rate or --precision bf16")


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")        # false for NaN as well


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Loader, prepare: Callable[[Tensor], Tensor], precision: Precision,
             world: World, num_classes: int, confusion: bool = False) -> EvalReport:
    """Every image of the split once, whatever the number of ranks. `model` is the plain module, not the wrapped one:
    ranks may have different numbers of batches."""
    was_training = model.training
    model.eval()
    tally = Tally(num_classes, world.device, confusion)
    for batch in loader:
        images = prepare(batch.images.to(world.device, non_blocking=True))
        with precision.autocast(world.device):
            logits = model(images)
        tally.add(logits, batch.targets.to(world.device, non_blocking=True))
    model.train(was_training)
    return tally.report()
