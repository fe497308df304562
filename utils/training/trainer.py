"""One optimizer step: gradients of the micro-batches, update of the weights, metrics."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from math import isfinite

import torch
from torch import Tensor, nn

from utils.data.loader import Batch
from utils.data.sampler import SampleIndex
from utils.device import as_float64, batch_on_device, float64_device, on_device
from utils.distributed import Ranks, all_reduce_sum, no_sync, unwrap, wait_for
from utils.randomness import seed_device

from .criterion import Criterion
from .ema import Ema
from .optimizer import set_learning_rate, update
from .precision import LossScaler, Precision
from .step import Progress, Requests, StepMetrics, StepSettings

MAX_SKIPS = 10      # updates in a row that may be skipped; loss scaling has lowered its scale a thousandfold by then
MIN_SCALE = 1e-3    # below it gradients of a normal size vanish in float16: what is not finite has another cause


class DivergedError(ValueError):
    """Raised when the loss or a gradient is not finite and a lower loss scale cannot help."""

    exit_code = 4


class Reducer:
    """Sums a step over its micro-batches and ranks. DistributedDataParallel has averaged the gradients over the ranks."""

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.loss_factor = ranks.size           # the losses are multiplied by it before backward
        self._sums: Tensor | float = 0.0

    def add(self, sums: Tensor) -> None:
        """Add the sums of a micro-batch's losses, (3,) float64, after its backward pass."""
        self._sums = self._sums + sums

    def reduce(self, requests: Tensor) -> Tensor:
        """Return the step's sums and requests over all ranks; afterwards every rank has the gradients of the whole step."""
        sums, self._sums = self._sums, 0.0
        return all_reduce_sum(torch.cat([sums, requests]))


@dataclasses.dataclass
class _Step:
    """A step that runs on the device, until its figures have been read."""

    number: int                                 # from 0
    started: float
    edited: int                                 # images of the whole step that have an edit
    learning_rate: float = 0.0
    keys: list[Sequence[SampleIndex]] = dataclasses.field(default_factory=list)           # of this rank's micro-batches
    replaced: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    figures: Tensor | None = None               # losses, hits, attention losses, requests, norm, scale; float64, on the CPU
    ready: torch.cuda.Event | None = None


@dataclasses.dataclass
class _Readout:
    """The step whose figures are still to be read, and the clocks."""

    requests: Callable[[], tuple]
    stop: Callable[[], bool]
    late: bool                                  # a step is read while the next one is under way
    pending: _Step | None = None
    unread: list[StepMetrics] = dataclasses.field(default_factory=list)
    read_at: float = 0.0
    waited: float = 0.0                         # seconds for the loader since then


class Trainer:
    """Trains a model step by step.

    The host does not wait for a GPU inside a step (with lamb it does, see optimizer.update): a step's figures are read in the
    middle of the next one, while the device works on that. Whether the weights are updated is decided on the device. What the
    host decides (learning rate, average of the weights) follows when the figures are read, so that reading them late changes
    no number.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Criterion, scaler: LossScaler,
                 precision: Precision, ranks: Ranks, normalize: Callable[[Tensor], Tensor], settings: StepSettings, *,
                 ema: Ema | None = None, reducer: Reducer | None = None, progress: Progress | None = None,
                 requests: Callable[[], tuple] = Requests, stop: Callable[[], bool] = lambda: False, late: bool | None = None):
        """`model` may be wrapped. `normalize` maps images of values 0..255 on the device to the model's input. `requests`
        returns this rank's Requests at the end of a step; `stop` whether to abandon the current step, the same on every
        rank. `late`: by default only on a GPU."""
        self.model, self.optimizer, self.criterion, self.scaler = model, optimizer, criterion, scaler
        self.precision, self.ranks, self.normalize, self.settings = precision, ranks, normalize, settings
        self.ema, self.reducer, self.progress = ema, reducer or Reducer(model, ranks), progress or Progress()
        self._readout = _Readout(requests, stop, ranks.device.type == "cuda" if late is None else late)

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def module(self) -> nn.Module:
        """Return the model without its wrapper."""
        return unwrap(self.model)

    @property
    def eval_model(self) -> nn.Module:
        """Return the model that is evaluated: with the averaged weights if the run has them."""
        return self.module if self.ema is None else self.ema.model

    def train_step(self, batches: Iterator[Batch], flush: bool = True) -> list[StepMetrics]:
        """Take micro_steps batches, update the weights once and return the metrics that are available: those of this step;
        if figures are read late and `flush` is false, those of the step before. A step that is abandoned changes nothing and has
        none. Raises DivergedError for the step that it names; no non-finite update is ever made.

        The loss is the sum over the step's images divided by their number, so that ranks and micro-steps change nothing but
        the rounding. Order: backward, unscale, clip, step, scale update.
        """
        if not self.model.training:
            self.model.train()
        step = self._accumulate(batches)
        if step is None:
            return self.finish()
        norm, non_finite = self._measure(step)
        self._read()
        step.learning_rate = self.settings.schedule(self.progress.updates + 1)
        set_learning_rate(self.optimizer, step.learning_rate)
        update(self.optimizer, norm, non_finite, self.scaler.scale, self.settings.max_grad_norm)
        self.scaler.update(non_finite)
        self.optimizer.zero_grad(set_to_none=True)
        self._readout.pending = step
        self.progress = self.progress._replace(step=self.step + 1)
        return self.finish(read=flush or not self._readout.late)

    def finish(self, read: bool = True) -> list[StepMetrics]:
        """Return the metrics that train_step has not returned: of the current step if `read`, and of one before an error."""
        if read:
            self._read()
        unread, self._readout.unread = self._readout.unread, []
        return unread

    def _accumulate(self, batches: Iterator[Batch]) -> _Step | None:
        """Run backward over the step's micro-batches and sum gradients and losses over all ranks. None: abandoned."""
        attention = self.criterion.attention
        step = _Step(self.step, time.perf_counter(), attention.edited_images(self.step) if attention else 0)
        for micro_step in range(self.settings.micro_steps):
            if micro_step and self._readout.stop():
                return None
            asked = time.perf_counter()
            batch = next(batches)
            self._readout.waited += time.perf_counter() - asked
            assert batch.keys[0].step == self.step, (batch.keys[0], self.step)
            step.keys.append(batch.keys)
            step.replaced += batch.bad
            with no_sync(self.model) if micro_step < self.settings.micro_steps - 1 else contextlib.nullcontext():
                sums = self._backward(batch, step.edited)
            self.reducer.add(sums)
        requests = Requests(*self._readout.requests())._replace(replaced=len(step.replaced))
        requests = torch.tensor(requests, dtype=torch.float64)
        step.figures = self.reducer.reduce(on_device(requests, float64_device(self.ranks.device)))
        return step

    def _backward(self, batch: Batch, edited: int) -> Tensor:
        """Return the micro-batch's sums of losses, of correct images and of attention losses. `edited`: the number of images of
        the whole step that have an edit."""
        key, device, settings = batch.keys[0], self.ranks.device, self.settings
        seed_device(device, settings.seed, "model", key.step, key.micro)
        images, labels = (batch_on_device(tensor, device) for tensor in (batch.images, batch.targets))
        images, targets = self.criterion.mix(images, labels, key.step, key.micro * len(batch.keys))
        attention = self.criterion.attention if edited else None
        with self.precision.autocast(device), attention.record_logits() if attention else contextlib.nullcontext() as layers:
            logits = self.model(self.normalize(images))
        loss, factor = self.criterion.loss(logits, targets, images), self.reducer.loss_factor
        total, attention_loss = loss * (factor / settings.batch_size), loss.new_zeros(())
        if attention:
            attention_loss = attention.loss(layers, batch_on_device(batch.edits, device))
            total = total + attention_loss * (attention.weight * factor / edited)
        self.scaler.backward(total)
        correct = self.criterion.count_correct(logits, labels)
        return torch.stack([as_float64(each.detach()) for each in (loss, correct, attention_loss)])

    def _measure(self, step: _Step) -> tuple[Tensor, Tensor]:
        """Return the global norm of the (scaled) gradients and whether loss or gradients are not finite; complete the step's
        figures and send them to the host."""
        scale = self.scaler.scale
        norm = nn.utils.get_total_norm([each.grad for each in self.reducer.parameters if each.grad is not None])
        non_finite = ~(step.figures[:3].isfinite().all().to(norm.device) & norm.isfinite())
        exact_scale = as_float64(scale)
        step.figures = torch.cat([step.figures, torch.stack([as_float64(norm) / exact_scale, exact_scale])])
        if step.figures.is_cuda:
            step.figures = step.figures.to("cpu", non_blocking=True)
            step.ready = torch.cuda.Event()
            step.ready.record()
        return norm, non_finite

    def _read(self) -> None:
        """Read the figures of the current step, if there is one. Raises DivergedError."""
        readout, step = self._readout, self._readout.pending
        if step is None:
            return
        readout.pending = None
        if step.ready is not None:
            wait_for(step.ready)
        losses, correct, attention, *requests, norm, scale = step.figures.tolist()
        images = self.settings.batch_size
        loss, attention = losses / images, attention / (step.edited or 1)
        loss += self.criterion.attention.weight * attention if step.edited else 0.0
        skipped = self._is_skipped(step, loss, norm, scale)
        self.progress = self.progress._replace(skips=self.progress.skips + 1 if skipped else 0)
        if not skipped:
            self.progress = self.progress._replace(updates=self.progress.updates + 1)
            if self.ema is not None:
                self.ema.update(self.model, self.progress.updates)
        started, readout.read_at = max(step.started, readout.read_at), time.perf_counter()
        waited, readout.waited = readout.waited, 0.0
        readout.unread.append(StepMetrics(
            step.number + 1, loss, correct / images, step.learning_rate, norm, scale if self.scaler.enabled else None, skipped,
            images, readout.read_at - started, waited, attention if step.edited else None, Requests(*requests),
            tuple(step.replaced)))

    def _is_skipped(self, step: _Step, loss: float, norm: float, scale: float) -> bool:
        """Return whether the weights were not updated. Raises DivergedError if the run has to end. All ranks decide the same:
        gradients and the loss are those of all ranks."""
        if isfinite(loss) and isfinite(norm):
            return False
        overflow = self.scaler.enabled and isfinite(loss)
        fault = "gradient overflows" if overflow else f"gradient norm {norm}" if isfinite(loss) else f"loss {loss}"
        if self.progress.skips + 1 >= MAX_SKIPS:
            fault = f"{MAX_SKIPS} {fault} in a row" if overflow else f"{MAX_SKIPS} updates in a row skipped (the last: {fault})"
        elif overflow and not self.scaler.fixed and scale / 2 < MIN_SCALE:
            fault += ", however low the loss scale"
        elif overflow or self.settings.non_finite == "skip":
            return True
        self.progress = self.progress._replace(step=step.number)      # this step and those begun after it do not count
        remedies = ["a lower learning rate"]
        remedies += ["--precision bf16"] * overflow
        remedies += ["--precision fp32"] * (not overflow and self.precision.compute != torch.float32)
        remedies += ["--non_finite skip if such steps are rare"] * (not overflow and self.settings.non_finite == "stop")
        scaled = f", loss scale {scale:g}" if self.scaler.enabled else ""
        indices = [key.index for keys in step.keys for key in keys]
        samples = ", ".join(map(str, indices[:16])) + (", ..." if len(indices) > 16 else "")
        raise DivergedError(f"step {step.number + 1}: {fault} at learning rate {step.learning_rate:g}{scaled}. "
                            f"Try {', or '.join(remedies)}; samples {samples}")
