"""One optimizer step, and one evaluation."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from .data import Batch, Loader
from .distributed import World, sum_over_ranks, without_sync
from .ema import Ema
from .loss import attention_loss, classification_loss, distillation_loss
from .metrics import EvalReport, Tally
from .mix import Mixer
from .optim import set_learning_rate
from .precision import LossScaler, Precision
from .randomness import seed_device

MAX_SKIPS = 10      # overflows in a row that loss scaling may skip; by then the scale has fallen a thousandfold


class DivergedError(ValueError):
    """Loss or gradient are not finite, and loss scaling is not the cause: one line with step and samples."""


@dataclasses.dataclass(frozen=True)
class StepReport:
    """`step` counts batches, from 1; loss and accuracy are means over the step's images, augmented, before the update."""

    step: int
    loss: float                     # everything that is minimised: with a lesson, weight * attention_loss included
    accuracy: float                 # top-1; of mixed images, against the class of the first of the two
    learning_rate: float
    grad_norm: float                # before clipping
    loss_scale: float | None        # None where the loss is not scaled
    skipped: bool                   # the weights were left alone because the scaled gradients overflowed
    images_per_second: float
    attention_loss: float | None = None      # mean over the step's images that have an edit; None if it has none


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What edits of attention teach: weight times the mean of loss.attention_loss over the step's images that have one.

    `with listen() as logits: model(images)` gives the sigmoid attention's logits, (B, H, R, h * w) a layer; the loss is the
    mean over layers. `edited_images(step)` is the number of images of the whole step, all its ranks and micro-batches,
    that have an edit (one that a crop left outside counts, with a loss of 0): every rank works it out alike, so that
    ranks and micro-steps change nothing but the rounding.
    """

    weight: float
    listen: Callable[[], AbstractContextManager[list[Tensor]]]
    edited_images: Callable[[int], int]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: cross-entropy, mixed images or not, a teacher's say and what edits of attention teach.

    `teacher` turns images (B, C, height, width) of values 0..255 into logits; it stays as it is. The loss of an image is
    (1 - alpha) * classification + alpha * distillation (DeiT, arXiv 2012.12877, equations 2 and 3; where the model has a
    distillation head, that head alone learns from the teacher and the other alone from the labels).
    """

    label_smoothing: float = 0.0
    class_weights: Tensor | None = None
    mixer: Mixer | None = None
    distillation: str = "none"
    teacher: Callable[[Tensor], Tensor] | None = None
    alpha: float = 0.5
    temperature: float = 1.0
    lesson: Lesson | None = None

    def __post_init__(self):
        assert self.mixer is None or self.lesson is None, "edits are of one image, not of a mixture"

    def loss(self, logits: Tensor | tuple[Tensor, Tensor], targets: Tensor, images: Tensor) -> Tensor:
        """Sum over the images, without what the lesson adds."""
        own, distilled = logits if isinstance(logits, tuple) else (logits, logits)
        loss = classification_loss(own, targets, label_smoothing=self.label_smoothing, class_weights=self.class_weights)
        if self.distillation == "none":
            return loss
        taught = distillation_loss(self.distillation, distilled, self.teacher(images), self.temperature)
        return (1 - self.alpha) * loss + self.alpha * taught


class Trainer:
    """What a step needs, so that train.py's loop reads as the procedure. Takes plain values, not the configuration."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: LossScaler, precision: Precision,
                 world: World, prepare: Callable[[Tensor], Tensor], *, batch_size: int, micro_steps: int,
                 max_grad_norm: float, seed: int, objective: Objective | None = None, ema: Ema | None = None, step: int = 0,
                 updates: int = 0, skips: int = 0):
        """`model` may be wrapped; `prepare` turns images of values 0..255 on the device into its input; micro_steps per
        rank; `step` batches were consumed so far, `updates` of them changed the weights, the last `skips` did not."""
        self.model, self.optimizer, self.scaler, self.precision, self.world = model, optimizer, scaler, precision, world
        self.prepare, self.batch_size, self.micro_steps = prepare, batch_size, micro_steps
        self.objective, self.ema = objective or Objective(), ema
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.step, self.updates, self.skips = step, updates, skips

    def train_step(self, batches: Iterator[Batch], learning_rate: float) -> StepReport:
        """Takes micro_steps batches; one update of the weights. Raises DivergedError before a non-finite update.

        The loss is the sum over the step's images divided by their number, so that ranks and micro-steps change
        nothing but the rounding; the lesson's part (see Lesson) is added. Order: backward, unscale, clip, step, scale update.
        """
        self.model.train()
        started, keys = time.perf_counter(), []
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)          # losses, hits, attention losses
        edited = self.objective.lesson.edited_images(self.step) if self.objective.lesson else 0
        for micro_step in range(self.micro_steps):
            batch = next(batches)
            keys += batch.keys
            assert batch.keys[0].step == self.step, (batch.keys[0], self.step)
            if micro_step < self.micro_steps - 1:
                with without_sync(self.model):
                    sums += self._backward(batch, edited)
            else:
                sums += self._backward(batch, edited)
        self.scaler.unscale(self.optimizer)
        norm = self._clip()
        counts = (self.batch_size, self.batch_size, edited or 1)
        loss, accuracy, attention = (total / count for total, count in zip(sum_over_ranks(sums).tolist(), counts))
        if edited:
            loss += self.objective.lesson.weight * attention
        self._check(loss, norm, keys)
        scale = self.scaler.scale if self.scaler.enabled else None
        skipped = not _is_finite(norm)
        if not skipped:
            set_learning_rate(self.optimizer, learning_rate)
            self.scaler.step(self.optimizer)
            self.updates += 1
            if self.ema is not None:
                self.ema.update(self.model, self.updates)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.skips = self.skips + 1 if skipped else 0
        return StepReport(self.step, loss, accuracy, learning_rate, norm, scale, skipped,
                          self.batch_size / (time.perf_counter() - started), attention if edited else None)

    def _backward(self, batch: Batch, edited: int) -> Tensor:
        """-> (sum of the losses of the micro-batch's images, how many of them were right, sum of their attention losses)

        `edited`: how many images of the whole step have an edit."""
        key = batch.keys[0]
        seed_device(self.world.device, self.seed, "model", key.step, key.micro)
        images = batch.images.to(self.world.device, non_blocking=True)
        labels = batch.targets.to(self.world.device, non_blocking=True)
        targets = labels
        if self.objective.mixer is not None:
            images, targets = self.objective.mixer(images.float(), labels, key.step, key.micro * len(batch.keys))
        lesson = self.objective.lesson if edited else None
        with (self.precision.autocast(self.world.device),
              lesson.listen() if lesson else contextlib.nullcontext() as attention):
            logits = self.model(self.prepare(images))
        loss = self.objective.loss(logits, targets, images)
        # DistributedDataParallel divides the ranks' gradients by their number.
        total, taught = loss * (self.world.size / self.batch_size), loss.new_zeros(())
        if lesson:
            edits = batch.edits.to(self.world.device, non_blocking=True)
            taught = torch.stack([attention_loss(layer, edits) for layer in attention]).mean()
            total = total + taught * (lesson.weight * self.world.size / edited)
        self.scaler.backward(total)
        best = (logits[0] + logits[1] if isinstance(logits, tuple) else logits).argmax(dim=1)
        return torch.stack([loss.detach().double(), (best == labels).sum().double(), taught.detach().double()])

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
