"""One optimizer step."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from math import isfinite

import torch
from torch import Tensor, nn

from utils.data.loader import Batch
from utils.data.mixup import Mixer
from utils.data.sampler import SampleIndex
from utils.device import on_device
from utils.distributed import World, sum_over_ranks, without_sync
from utils.randomness import seed_device

from . import exact
from .criterion import attention_loss, classification_loss, distillation_loss
from .ema import Ema
from .optimizer import set_learning_rate, update
from .precision import LossScaler, Precision

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
    images: int                     # of all ranks
    seconds: float                  # of this rank, from reading the step before to reading this one
    data_seconds: float             # of them, waiting for the loader (late figures: for the next step's batches)
    attention_loss: float | None = None      # mean over the step's images that have an edit; None if it has none
    requests: tuple[float, ...] = ()         # what Trainer's requests() gave, summed over the ranks

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


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


class _Step:
    """A step that is under way on the device, until `Trainer.finish` has read its figures."""

    def __init__(self, number: int, started: float):
        self.number, self.started = number, started                           # number from 0
        self.keys: list[Sequence[SampleIndex]] = []                                   # of this rank's micro-batches
        self.edited, self.learning_rate = 0, 0.0
        self.figures: Tensor | None = None          # losses, hits, attention, requests ..., norm, scale; float64, on the CPU
        self.ready: torch.cuda.Event | None = None


class Trainer:
    """What a step needs, so that train.py's loop reads as the procedure. Takes plain values, not the configuration.

    The host does not wait for a GPU inside a step (lamb aside: optim.update): a step's figures are read in the middle of the
    next, while the device is at work on that. Whether the weights are changed is decided where the gradients are; what the
    host decides (learning rate, average of the weights) follows with the figures, so that reading late changes no number.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: LossScaler, precision: Precision,
                 world: World, prepare: Callable[[Tensor], Tensor], *, batch_size: int, micro_steps: int,
                 max_grad_norm: float, seed: int, objective: Objective | None = None, ema: Ema | None = None, step: int = 0,
                 updates: int = 0, skips: int = 0, exact: bool = False, non_finite: str = "stop",
                 requests: Callable[[], Sequence[float]] = tuple, late: bool | None = None):
        """`model` may be wrapped; `prepare` turns images of values 0..255 on the device into its input; micro_steps per
        rank; `step` batches were consumed so far, `updates` of them changed the weights, the last `skips` did not.

        `exact` sums as utils/training/exact.py does it; the model is not wrapped then. `non_finite`: what a loss or gradient
        does that is not finite, loss scaling aside: "stop", or "skip" the update. What requests() gives at the end of a step
        is summed over the ranks together with the losses. `late`: see above; by default on a GPU alone.
        """
        assert non_finite in ("stop", "skip"), non_finite
        self.model, self.optimizer, self.scaler, self.precision, self.world = model, optimizer, scaler, precision, world
        self.prepare, self.batch_size, self.micro_steps = prepare, batch_size, micro_steps
        self.objective, self.ema = objective or Objective(), ema
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.step, self.updates, self.skips = step, updates, skips
        self.exact, self.non_finite, self.requests = exact, non_finite, requests
        self.late = world.device.type == "cuda" if late is None else late
        self.bad: list[tuple[int, str]] = []        # (index, why) of images that the loader replaced, for the caller to empty
        self._pending: _Step | None = None
        self._unread: list[StepReport] = []
        self._read_at, self._waited = 0.0, 0.0      # seconds for the loader since then

    def train_step(self, batches: Iterator[Batch], learning_rate: Callable[[int], float], now: bool = True) -> list[StepReport]:
        """Takes micro_steps batches; one update of the weights, the n-th with learning_rate(n), n from 1. -> the reports that
        are there: of this step; where figures are read late, and unless they are wanted `now`, of the step before. Raises
        DivergedError, of the step that it reports, and no update is ever not finite.

        The loss is the sum over the step's images divided by their number, so that ranks and micro-steps change
        nothing but the rounding; the lesson's part (see Lesson) is added. Order: backward, unscale, clip, step, scale update.
        """
        if not self.model.training:
            self.model.train()
        step = self._gradients(batches)
        norm, non_finite = self._measured(step)
        self._read()
        step.learning_rate = learning_rate(self.updates + 1)
        set_learning_rate(self.optimizer, step.learning_rate)
        update(self.optimizer, norm, non_finite, self.scaler.scale, self.max_grad_norm)
        self.scaler.update(non_finite)
        self.optimizer.zero_grad(set_to_none=True)
        self._pending = step
        self.step += 1
        return self.finish(now or not self.late)

    def finish(self, read: bool = True) -> list[StepReport]:
        """The reports that train_step has not given: of the step under way, if `read`, and of one before a DivergedError."""
        if read:
            self._read()
        reports, self._unread = self._unread, []
        return reports

    def _read(self) -> None:
        """The figures of the step that is under way, if one is. Raises DivergedError."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        if step.ready is not None:
            step.ready.synchronize()
        losses, hits, attention, *requests, norm, scale = step.figures.tolist()
        loss, accuracy, attention = losses / self.batch_size, hits / self.batch_size, attention / (step.edited or 1)
        loss += self.objective.lesson.weight * attention if step.edited else 0.0
        skipped = self._is_skipped(step, loss, norm, scale)
        self.skips = self.skips + 1 if skipped else 0
        if not skipped:
            self.updates += 1
            if self.ema is not None:
                self.ema.update(self.model, self.updates)
        started, self._read_at = max(step.started, self._read_at), time.perf_counter()
        waited, self._waited = self._waited, 0.0
        self._unread.append(StepReport(
            step.number + 1, loss, accuracy, step.learning_rate, norm, scale if self.scaler.enabled else None, skipped,
            self.batch_size, self._read_at - started, waited, attention if step.edited else None, tuple(requests)))

    def _gradients(self, batches: Iterator[Batch]) -> _Step:
        """Backward over the step's micro-batches; every rank has the gradients of the whole step then. The step's figures
        are the sums over all ranks of losses, hits, attention losses and each of the requests."""
        step, tree = _Step(self.step, time.perf_counter()), exact.SumTree()
        step.edited = self.objective.lesson.edited_images(self.step) if self.objective.lesson else 0
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        for micro_step in range(self.micro_steps):
            asked = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - asked
            step.keys.append(batch.keys)
            self.bad += batch.bad
            assert batch.keys[0].step == self.step, (batch.keys[0], self.step)
            with without_sync(self.model) if micro_step < self.micro_steps - 1 else contextlib.nullcontext():
                part = self._backward(batch, step.edited)
            if self.exact:
                tree.push([*exact.take_gradients(self.parameters), part])
            else:
                sums += part
        requests = on_device(torch.tensor(self.requests(), dtype=torch.float64), self.world.device)
        if self.exact:
            *gradients, sums, requests = exact.sum_over_ranks([*tree.root(), requests], [*self.parameters, sums, requests],
                                                              self.world)
            for parameter, gradient in zip(self.parameters, gradients):
                parameter.grad = gradient
            step.figures = torch.cat([sums, requests])
        else:
            step.figures = sum_over_ranks(torch.cat([sums, requests]))
        return step

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

    def _measured(self, step: _Step) -> tuple[Tensor, Tensor]:
        """-> (global norm of the gradients as they lie there, scaled; whether loss or gradients are not finite); completes
        the step's figures and sends them to the host."""
        scale = self.scaler.scale
        norm = nn.utils.get_total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        non_finite = ~(step.figures[:3].isfinite().all() & norm.isfinite())
        step.figures = torch.cat([step.figures, torch.stack([norm.double() / scale, scale.double()])])
        if step.figures.is_cuda:
            step.figures = step.figures.to("cpu", non_blocking=True)
            step.ready = torch.cuda.Event()
            step.ready.record()
        return norm, non_finite

    def _is_skipped(self, step: _Step, loss: float, norm: float, scale: float) -> bool:
        """Whether the weights were left alone. Raises DivergedError where the run has to end.

        Gradients are the same on all ranks and the loss was summed over them: every rank decides alike.
        """
        if isfinite(loss) and isfinite(norm):
            return False
        overflow = self.scaler.enabled and isfinite(loss)
        what = "gradient overflows" if overflow else f"loss {loss}" if not isfinite(loss) else f"gradient norm {norm}"
        if self.skips + 1 >= MAX_SKIPS:
            what = f"{MAX_SKIPS} {what} in a row" if overflow else f"{MAX_SKIPS} updates in a row skipped (the last: {what})"
        elif overflow and not self.scaler.fixed and scale / 2 < MIN_SCALE:
            what += ", however low the loss scale"
        elif overflow or self.non_finite == "skip":
            return True
        self.step = step.number                     # it does not count, nor does one that was begun after it
        indices = [key.index for keys in step.keys for key in keys]
        samples = ", ".join(map(str, indices[:16])) + (", ..." if len(indices) > 16 else "")
        scaled = f", loss scale {scale:g}" if self.scaler.enabled else ""
        fp32 = "" if self.precision.compute == torch.float32 else " or --precision fp32"
        or_else = " or --precision bf16" if overflow else fp32
        if self.non_finite == "stop" and not overflow:
            or_else += ", or --non_finite skip if it is a rare step"
        raise DivergedError(f"step {step.number + 1}: {what} at learning rate {step.learning_rate:g}{scaled}: try a lower one"
                            f"{or_else}; samples {samples}")
