"""One optimizer step, and one evaluation."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from . import exact
from .data import Batch, Key, Loader
from .distributed import World, sum_over_ranks, without_sync
from .ema import Ema
from .loss import attention_loss, classification_loss, distillation_loss
from .metrics import EvalReport, Tally
from .mix import Mixer
from .optim import set_learning_rate
from .precision import LossScaler, Precision
from .randomness import seed_device

MAX_SKIPS = 10      # updates in a row that may be skipped; loss scaling has lowered its scale a thousandfold by then
MIN_SCALE = 1e-3    # below it gradients of a sound size vanish in float16, and what is not finite has another cause


class DivergedError(ValueError):
    """Loss or gradient are not finite, and a lower loss scale does not help: one line with step, samples, rate and scale."""

    code = 4


@dataclasses.dataclass(frozen=True)
class StepReport:
    """`step` counts batches, from 1; loss and accuracy are means over the step's images, augmented, before the update."""

    step: int
    loss: float                     # everything that is minimised: with a lesson, weight * attention_loss included
    accuracy: float                 # top-1; of mixed images, against the class of the first of the two
    learning_rate: float
    grad_norm: float                # before clipping
    loss_scale: float | None        # None where the loss is not scaled
    skipped: bool                   # the weights were left alone because loss or gradients were not finite
    images_per_second: float
    attention_loss: float | None = None      # mean over the step's images that have an edit; None if it has none
    requests: tuple[float, ...] = ()         # what Trainer's requests() gave, summed over the ranks


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
                 updates: int = 0, skips: int = 0, exact: bool = False, non_finite: str = "stop",
                 requests: Callable[[], Sequence[float]] = tuple):
        """`model` may be wrapped; `prepare` turns images of values 0..255 on the device into its input; micro_steps per
        rank; `step` batches were consumed so far, `updates` of them changed the weights, the last `skips` did not.

        `exact` sums as utils/exact.py does it; the model is not wrapped then. `non_finite` is what to do where a loss or a
        gradient is not finite and loss scaling not the cause: "stop", or "skip" the update. What requests() gives at the
        end of a step is summed over the ranks together with the losses.
        """
        assert non_finite in ("stop", "skip"), non_finite
        self.model, self.optimizer, self.scaler, self.precision, self.world = model, optimizer, scaler, precision, world
        self.prepare, self.batch_size, self.micro_steps = prepare, batch_size, micro_steps
        self.objective, self.ema = objective or Objective(), ema
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.step, self.updates, self.skips = step, updates, skips
        self.exact, self.non_finite, self.requests = exact, non_finite, requests
        self.bad: list[tuple[int, str]] = []        # (index, why) of images that the loader replaced, for the caller to empty

    def train_step(self, batches: Iterator[Batch], learning_rate: float) -> StepReport:
        """Takes micro_steps batches; one update of the weights. Raises DivergedError before a non-finite update.

        The loss is the sum over the step's images divided by their number, so that ranks and micro-steps change
        nothing but the rounding; the lesson's part (see Lesson) is added. Order: backward, unscale, clip, step, scale update.
        """
        self.model.train()
        started = time.perf_counter()
        edited = self.objective.lesson.edited_images(self.step) if self.objective.lesson else 0
        keys, (losses, hits, attention, *requests) = self._gradients(batches, edited)
        self.scaler.unscale(self.optimizer)
        norm = self._clip()
        loss, accuracy, attention = losses / self.batch_size, hits / self.batch_size, attention / (edited or 1)
        if edited:
            loss += self.objective.lesson.weight * attention
        skipped = self._is_skipped(loss, norm, learning_rate, keys)
        scale = self.scaler.scale if self.scaler.enabled else None
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
                          self.batch_size / (time.perf_counter() - started), attention if edited else None, tuple(requests))

    def _gradients(self, batches: Iterator[Batch], edited: int) -> tuple[list[Key], list[float]]:
        """Backward over the step's micro-batches; every rank has the gradients of the whole step then.

        -> (keys of this rank's images; sums over all ranks of losses, hits, attention losses and each of the requests)
        """
        keys, tree = [], exact.SumTree()
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        for micro_step in range(self.micro_steps):
            batch = next(batches)
            keys += batch.keys
            self.bad += batch.bad
            assert batch.keys[0].step == self.step, (batch.keys[0], self.step)
            with without_sync(self.model) if micro_step < self.micro_steps - 1 else contextlib.nullcontext():
                part = self._backward(batch, edited)
            if self.exact:
                tree.push([*exact.take_gradients(self.parameters), part])
            else:
                sums += part
        requests = torch.tensor(self.requests(), dtype=torch.float64, device=self.world.device)
        if self.exact:
            *gradients, sums, requests = exact.sum_over_ranks([*tree.root(), requests], [*self.parameters, sums, requests],
                                                              self.world)
            for parameter, gradient in zip(self.parameters, gradients):
                parameter.grad = gradient
            return keys, [*sums.tolist(), *requests.tolist()]
        return keys, sum_over_ranks(torch.cat([sums, requests])).tolist()

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
        share = 1 if self.exact else self.world.size
        total, taught = loss * (share / self.batch_size), loss.new_zeros(())
        if lesson:
            edits = batch.edits.to(self.world.device, non_blocking=True)
            taught = torch.stack([attention_loss(layer, edits) for layer in attention]).mean()
            total = total + taught * (lesson.weight * share / edited)
        self.scaler.backward(total)
        best = (logits[0] + logits[1] if isinstance(logits, tuple) else logits).argmax(dim=1)
        return torch.stack([loss.detach().double(), (best == labels).sum().double(), taught.detach().double()])

    def _clip(self) -> float:
        """-> global gradient norm before clipping; max_grad_norm 0 only measures it"""
        if self.max_grad_norm > 0:
            return nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm).item()
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]).item()

    def _is_skipped(self, loss: float, norm: float, learning_rate: float, keys: list[Key]) -> bool:
        """Whether the weights are to be left alone. Raises DivergedError where the run has to end.

        Gradients are the same on all ranks and the loss was summed over them: every rank decides alike.
        """
        if _is_finite(loss) and _is_finite(norm):
            return False
        overflow = self.scaler.enabled and _is_finite(loss)
        what = "gradient overflows" if overflow else f"loss {loss}" if not _is_finite(loss) else f"gradient norm {norm}"
        if self.skips + 1 >= MAX_SKIPS:
            what = f"{MAX_SKIPS} {what} in a row" if overflow else f"{MAX_SKIPS} updates in a row skipped (the last: {what})"
        elif overflow and not self.scaler.fixed and self.scaler.scale / 2 < MIN_SCALE:
            what += ", however low the loss scale"
        elif overflow or self.non_finite == "skip":
            return True
        samples = ", ".join(str(key.index) for key in keys[:16]) + (", ..." if len(keys) > 16 else "")
        scale = f", loss scale {self.scaler.scale:g}" if self.scaler.enabled else ""
        or_else = " or --precision bf16" if overflow else ""
        if not overflow and self.precision.compute != torch.float32:
            or_else = " or --precision fp32"
        if self.non_finite == "stop" and not overflow:
            or_else += ", or --non_finite skip if it is a rare step"
        raise DivergedError(f"step {self.step + 1}: {what} at learning rate {learning_rate:g}{scale}: try a lower one{or_else}; "
                            f"samples {samples}")


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")        # false for NaN as well


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Loader, prepare: Callable[[Tensor], Tensor], precision: Precision,
             world: World, num_classes: int, confusion: bool = False,
             stop: Callable[[], bool] = lambda: False) -> EvalReport | None:
    """Every image of the split once, whatever the number of ranks. `model` is the plain module, not the wrapped one:
    ranks may have different numbers of batches. None, on every rank, if stop() became true on one before its last batch."""
    was_training = model.training
    model.eval()
    tally, stopped = Tally(num_classes, world.device, confusion), False
    for batch in loader:
        if stopped := stop():
            break
        images = prepare(batch.images.to(world.device, non_blocking=True))
        with precision.autocast(world.device):
            logits = model(images)
        tally.add(logits, batch.targets.to(world.device, non_blocking=True))
    model.train(was_training)
    return tally.report(stopped)
