"""Optimizer steps: accumulation, overflow, divergence, late reading of metrics, losses, dropout."""

import contextlib
import copy
import dataclasses
import itertools
import types
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from tests.reference_door import to_input
from utils import distributed
from utils.attention.edit_transform import transform_with_edits
from utils.attention.edits import Edit
from utils.data import loader as data
from utils.data.datasets import digits
from utils.data.loader import Batch
from utils.data.mixup import Mixer
from utils.data.sampler import SampleIndex, StepSampler
from utils.data.transforms import train_transform
from utils.training import trainer as engine
from utils.training.criterion import AttentionSupervision, Criterion
from utils.training.ema import Ema
from utils.training.exact import ExactReducer
from utils.training.optimizer import build_optimizer
from utils.training.precision import BF16, FP32, LEVELS, LossScaler
from utils.training.trainer import DivergedError, Progress, Requests, StepMetrics, StepSettings, Trainer

CPU = torch.device("cpu")
ALONE = distributed.Ranks(0, 1, 0, 1, CPU)
DIGITS = digits("")


def batches(batch_size=32, micro_steps=1, start=0, transform=None):
    order = StepSampler(len(DIGITS.train), batch_size, micro_steps, 0, 1, 5, start, 1000)
    return iter(data.train_loader(DIGITS.train, order, transform=transform or train_transform("none", (8, 8)), seed=5,
                                  num_workers=0, pin_memory=False))


def make_trainer(model, optimizer="sgd", row=FP32, ranks=ALONE, rate=1.0, fixed_scale=0.0, criterion=None, normalize=to_input,
                 exact=False, batch_size=32, micro_steps=1, clip=0.0, seed=1, non_finite="stop", schedule=None, **more):
    settings = StepSettings(batch_size, micro_steps, clip, seed, schedule or (lambda update: rate), non_finite)
    return Trainer(model, build_optimizer(optimizer, model.parameters(), rate), criterion or Criterion(),
                   LossScaler(row, ranks.device, fixed_scale), row, ranks, normalize, settings,
                   reducer=ExactReducer(model, ranks) if exact else None, **more)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()]).clone()


class Setup:
    """A small network on digits. `change_gradient` maps every gradient of the first weight; `nan_loss` makes the loss NaN."""

    def __init__(self, row=FP32, micro_steps=1, clip=1.0, dropout=0.0, rate=0.1, start=0, batch_size=32, device=CPU,
                 ema_decay=None, transform=None, skips=0, **more):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(dropout),
                                   nn.Linear(32, 10)).to(device, row.weights)
        self.change_gradient, self.nan_loss = lambda gradient: gradient, False
        self.model[1].weight.register_hook(lambda gradient: self.change_gradient(gradient))
        self.ema = None if ema_decay is None else Ema(self.model, ema_decay)
        self.trainer = make_trainer(
            self.model, row=row, ranks=distributed.Ranks(0, 1, 0, 1, device), rate=rate, micro_steps=micro_steps, clip=clip,
            batch_size=batch_size, progress=Progress(start, start, skips), ema=self.ema,
            normalize=lambda images: to_input(images, row.weights) * (float("nan") if self.nan_loss else 1), **more)
        self.batches = batches(batch_size, micro_steps, start, transform)

    def run(self, steps=1, flush=True) -> list[StepMetrics]:
        return [metrics for _ in range(steps) for metrics in self.trainer.train_step(self.batches, flush)]

    def losses(self, steps) -> list[float]:
        return [metrics.loss for metrics in self.run(steps)]

    def weights(self) -> torch.Tensor:
        return flat(self.model)

    def state(self) -> str:
        """Return everything that a step may change: weights, averaged weights and optimizer state."""
        models = [self.model, *([self.ema.model] if self.ema else [])]
        return str(([p.tolist() for model in models for p in model.parameters()],
                    copy.deepcopy(self.trainer.optimizer.state_dict())))


# ------------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("micro_steps", [2, 4])
def test_accumulation_only_changes_rounding(optimizer, micro_steps):
    rate = 0.1 if optimizer == "sgd" else 3e-3
    whole, parts = (Setup(optimizer=optimizer, rate=rate, micro_steps=number) for number in (1, micro_steps))
    start = whole.weights()
    assert parts.losses(20) == pytest.approx(whole.losses(20), rel=1e-5)
    difference = (parts.weights() - whole.weights()).norm() / (whole.weights() - start).norm()
    assert difference < 1e-5


@pytest.mark.parametrize("row", [LEVELS["O1"], LEVELS["O2"], LEVELS["O3"], BF16], ids=lambda row: row.name)
def test_low_precision_trains(row):
    full, low = Setup().losses(30), Setup(row).losses(30)
    assert low[-1] < 0.6 * low[0]
    assert low == pytest.approx(full, rel=0.05) and low != full


@pytest.mark.parametrize("exact", [False, True])
def test_requests_and_replaced_images_are_reported(exact):
    requests = iter([(0.0, 2.0), Requests(stop=1.0)])
    setup = Setup(exact=exact, micro_steps=2, requests=lambda: next(requests))
    setup.batches = (batch._replace(bad=((batch.keys[0].index, "cut off"),)) for batch in setup.batches)
    expected = [(key[0].index, "cut off") for key in StepSampler(len(DIGITS.train), 32, 2, 0, 1, 5, 0, 2)]
    first, second = setup.run(2)
    assert (first.requests, second.requests) == (Requests(0, 2, 2), Requests(1, 0, 2))
    assert [*first.replaced, *second.replaced] == expected
    ordinary, = Setup().run()
    assert ordinary.requests == Requests(0, 0, 0) and ordinary.replaced == ()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_an_interrupted_step_changes_nothing(exact, late):
    requests = iter([False] * 3 + [False, True])           # in the second step, after two of its four micro-batches
    setup, whole = (Setup(exact=exact, late=late, micro_steps=4, ema_decay=0.5, **more)
                    for more in ({"stop": lambda: next(requests)}, {}))
    steps = setup.run(2, flush=False)
    assert [step.step for step in steps] == [1] and setup.trainer.step == setup.trainer.progress.updates == 1
    whole.run(1)
    assert setup.state() == whole.state() and steps[0].loss == Setup(exact=exact, micro_steps=4).losses(1)[0]


@pytest.mark.parametrize("fixed", [0.0, 8.0])
def test_clipping_sees_unscaled_gradients(fixed):
    """Clipping scaled gradients would make the update 65,536 times too small without any error."""
    changes, norms = {}, []
    for row, clip in itertools.product((FP32, LEVELS["O1"]), (0, 0.05)):
        setup = Setup(row, clip=clip, rate=1.0, fixed_scale=fixed if row.scales_loss else 0.0)
        start = setup.weights()
        norms.append(setup.run()[0].grad_norm)                      # before clipping
        changes[row.name, clip] = setup.weights() - start
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-2) and changes["fp32", 0].norm() == pytest.approx(norms[0], rel=1e-4)
    clipped, scaled = changes["fp32", 0.05], changes[LEVELS["O1"].name, 0.05]
    assert clipped.norm() == pytest.approx(0.05, rel=1e-3) and (scaled - clipped).norm() < 0.05 * 0.02
    torch.testing.assert_close(clipped / 0.05, changes["fp32", 0] / norms[0], rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------- overflow, divergence


@pytest.mark.parametrize(("fixed", "device"), [
    (0.0, "cpu"), (1024.0, "cpu"), pytest.param(0.0, "cuda", marks=pytest.mark.gpu)])
def test_an_overflow_is_skipped(fixed, device):
    setup = Setup(LEVELS["O1"], fixed_scale=fixed, micro_steps=2, ema_decay=0.5, device=torch.device(device))
    scale = fixed or 65536.0
    setup.run(2)
    before = setup.state()
    setup.change_gradient = lambda gradient: gradient * float("inf")
    metrics, = setup.run()
    assert metrics.skipped and metrics.step == 3 and metrics.loss_scale == scale and not metrics.grad_norm < float("inf")
    assert setup.state() == before and setup.trainer.progress == Progress(3, 2, 1)
    assert setup.trainer.scaler.scale == (fixed or scale / 2)
    setup.change_gradient = lambda gradient: gradient
    metrics, = setup.run()
    assert not metrics.skipped and metrics.step == 4 and metrics.loss_scale == (fixed or scale / 2)
    assert setup.trainer.progress == Progress(4, 3, 0)
    assert setup.state() != before and setup.weights().isfinite().all()


@pytest.mark.parametrize("fixed", [0.0, 1024.0])
def test_ten_overflows_in_a_row_end_the_run(fixed):
    """Overflows before a resume count too."""
    for start, skips in ((1, 0), (9, 9)):
        setup = Setup(LEVELS["O1"], fixed_scale=fixed, start=start, skips=skips)
        before, setup.change_gradient = setup.state(), lambda gradient: gradient * float("inf")
        assert all(metrics.skipped for metrics in setup.run(9 - skips))
        with pytest.raises(DivergedError, match=rf"step {start + 10 - skips}: 10 gradient overflows in a row"):
            setup.run()
        assert setup.state() == before


def test_overflows_between_good_steps_end_the_run_at_the_lowest_scale_only():
    setup, calls = Setup(LEVELS["O1"]), itertools.count()
    setup.change_gradient = lambda gradient: gradient * (float("inf") if next(calls) % 3 else 1)
    with pytest.raises(DivergedError, match=r"overflows, however low the loss scale at learning rate 0.1, loss scale 0.00"):
        setup.run(60)
    assert setup.trainer.step == 38 and setup.weights().isfinite().all()         # the 26th bad one, at 65536 / 2^25


@pytest.mark.parametrize("row", [FP32, BF16, LEVELS["O1"], LEVELS["O3"]], ids=lambda row: row.name)
def test_a_non_finite_loss_or_gradient_stops_the_run(row):
    keys = [key for batch in StepSampler(len(DIGITS.train), 32, 2, 0, 1, 5, 2, 3) for key in batch]
    for fault in ("loss nan", *(() if row.scales_loss else ("gradient norm inf", "gradient norm nan"))):
        setup = Setup(row, micro_steps=2)
        setup.run(2)
        before = setup.state()
        if fault == "loss nan":
            setup.nan_loss = True
        else:
            setup.change_gradient = lambda gradient, fault=fault: torch.full_like(gradient, float(fault.split()[-1]))
        with pytest.raises(DivergedError) as caught:
            setup.run()
        remedy = "" if row is FP32 else ", or --precision fp32"
        assert str(caught.value) == (
            f"step 3: {fault} at learning rate 0.1{', loss scale 65536' * row.scales_loss}. Try a lower learning rate{remedy}, "
            f"or --non_finite skip if such steps are rare; samples {', '.join(str(key.index) for key in keys[:16])}, ...")
        assert setup.state() == before and setup.trainer.progress == Progress(2, 2, 0)
    assert DivergedError.exit_code == 4


@pytest.mark.contract("P11", "a loss or gradient that is not finite never reaches weights, average or optimizer")
@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
def test_updates_that_are_not_finite_can_be_skipped(figure, exact):
    """A skipped update uses up its images and changes nothing else. Ten in a row end the run, also across a resume."""
    for row, fault in itertools.product((FP32, BF16, LEVELS["O1"]), ("loss", "inf", "nan")):
        setup = Setup(row, micro_steps=2, ema_decay=0.5, non_finite="skip", exact=exact)
        setup.run(2)
        before = setup.state()
        if fault == "loss":
            setup.nan_loss = True
        else:
            setup.change_gradient = lambda gradient, fault=fault: gradient * float(fault)
        assert [metrics.skipped for metrics in setup.run(3)] == [True] * 3
        assert setup.state() == before and setup.trainer.progress == Progress(5, 2, 3)
        setup.nan_loss, setup.change_gradient = False, lambda gradient: gradient
        good, = setup.run()
        assert not good.skipped and good.loss < float("inf") and setup.weights().isfinite().all()
        assert setup.state() != before and setup.trainer.progress == Progress(6, 3, 0)
        setup.trainer.progress, setup.nan_loss, before = Progress(6, 3, 8), True, setup.state()
        setup.run()
        with pytest.raises(DivergedError, match=r"step 8: 10 .* skipped \(the last: loss nan\) at .*. Try .*; samples") as caught:
            setup.run()
        assert setup.state() == before and ("loss scale" in str(caught.value)) == row.scales_loss
    figure(f"steps with a loss or gradient of NaN or infinity{', --exact' if exact else ''}", 9 * 5)


# ------------------------------------------------------------------------------------------------ late reading


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_late_reading_changes_no_number(optimizer):
    """As on a GPU, the metrics of a step are read during the next one. Some steps overflow, among them the first."""
    outcomes = []
    for late in (False, True):
        rates, metrics, calls = [], [], itertools.count()
        setup = Setup(LEVELS["O1"], optimizer=optimizer, ema_decay=0.9, late=late,
                      schedule=lambda update, rates=rates: rates.append(update) or 0.1 / update)
        setup.change_gradient = lambda gradient, calls=calls: gradient * (float("inf") if next(calls) in (0, 4, 5) else 1)
        for number in range(10):
            got = setup.run(flush=number == 6)
            assert len(got) == (1 if not late else {0: 0, 6: 2, 7: 0}.get(number, 1))
            metrics += got
        metrics += setup.trainer.finish()
        assert setup.trainer.finish() == [] and setup.trainer.progress == Progress(10, 7, 0)
        outcomes.append(([dataclasses.replace(each, seconds=0, data_seconds=0) for each in metrics], rates,
                         setup.weights().tolist(), flat(setup.ema.model).tolist(), setup.trainer.scaler.state_dict()))
    assert outcomes[0] == outcomes[1]
    assert [each.step for each in outcomes[0][0]] == list(range(1, 11))


@pytest.mark.parametrize("late", [False, True])
def test_late_metrics_are_read_during_the_next_step(monkeypatch, late):
    """The forward pass of a step does not wait for the step before. The seconds include the wait for data."""
    clock, waits, seen = types.SimpleNamespace(now=0.0), iter([0, 0, 0.2, 0, 0.1, 0]), []
    monkeypatch.setattr(engine, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))

    def forward(images):
        clock.now += 1.0
        seen.append(setup.trainer.progress.updates)
        return to_input(images)

    def slow(batches):
        for batch in batches:
            clock.now += next(waits)
            yield batch

    setup = Setup(late=late)
    setup.trainer.normalize, setup.batches = forward, slow(setup.batches)
    metrics = setup.run(6, flush=False) + setup.trainer.finish()
    assert seen == ([0, 0, 1, 2, 3, 4] if late else [0, 1, 2, 3, 4, 5])
    assert len(metrics) == 6 and all(each.data_seconds <= each.seconds for each in metrics)
    assert [each.step for each in metrics if each.data_seconds > 0.09] == ([2, 4] if late else [3, 5])


def test_the_host_polls_for_late_metrics_instead_of_blocking():
    """If it blocked, it would notice neither signals nor the loss of another process. With a stand-in for a CUDA event."""
    class Event:
        queries = 0

        def query(self):
            self.queries += 1
            return self.queries == 3

    setup, event = Setup(late=True), Event()
    setup.run(1, flush=False)
    setup.trainer._readout.pending.ready = event
    assert [metrics.step for metrics in setup.run(1, flush=False)] == [1] and event.queries == 3


def test_a_late_step_that_diverges_is_the_last():
    """Its metrics are not read yet when it ends, but its update is skipped. The step before it is reported."""
    for flush in (False, True):
        setup = Setup(late=True)
        metrics = setup.run(3, flush=False)
        before, setup.nan_loss = setup.weights(), True
        with pytest.raises(DivergedError, match=r"^step 4: loss nan"):
            for _ in range(2):
                metrics += setup.run(flush=flush)
        assert setup.trainer.step == 3 and setup.weights().equal(before) and before.isfinite().all()
        metrics += setup.trainer.finish()
        assert [each.step for each in metrics] == [1, 2, 3] and setup.trainer.finish() == []


# ---------------------------------------------------------------------------------------------- the criterion

CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 1.0, 0.0, 3.0, 1.0, 0.25, 1.0, 1.0])


def mixer(stop_at=1000) -> Mixer:
    return Mixer(10, 32, 3, mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.8, stop_at=stop_at)


class Teacher:
    """A fixed linear map of the pixels, which records its inputs."""

    def __init__(self):
        self.weight = torch.randn(192, 10, generator=torch.Generator().manual_seed(3)) / 50
        self.seen = []

    def __call__(self, images):
        self.seen.append(images.clone())
        return images.float().flatten(1).to(self.weight) @ self.weight


CRITERIA = {
    "plain": {},
    "smoothing and weights": {"label_smoothing": 0.1, "class_weights": CLASS_WEIGHTS},
    "mixing": {"mixer": mixer()},
    "mixing that has ended": {"mixer": mixer(stop_at=0)},
    "hard distillation": {"distillation": "hard", "teacher": Teacher(), "alpha": 0.3},
    "all of it": {"label_smoothing": 0.1, "class_weights": CLASS_WEIGHTS, "mixer": mixer(), "distillation": "soft",
                  "teacher": Teacher(), "alpha": 0.4, "temperature": 2.0},
}


@pytest.mark.parametrize("micro_steps", [1, 4])
@pytest.mark.parametrize("case", CRITERIA)
def test_a_step_minimizes_the_mean_over_its_images(case, micro_steps):
    """The formula is that of the whole batch, without micro-steps. The teacher gets the images of the student."""
    criterion = Criterion(**CRITERIA[case])
    setup = Setup(criterion=criterion, micro_steps=micro_steps, clip=0, rate=1.0)
    batch, model = next(batches()), copy.deepcopy(setup.model)
    images, targets = criterion.mix(batch.images.float(), batch.targets, 0, 0)
    logits = model(to_input(images))
    loss = criterion.loss(logits, targets, images) / 32
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    if criterion.teacher:
        criterion.teacher.seen.clear()

    before = setup.weights()
    metrics, = setup.run()
    assert (metrics.step, metrics.learning_rate, metrics.loss_scale, metrics.skipped) == (1, 1.0, None, False)
    assert metrics.loss == pytest.approx(loss.item(), rel=1e-6) and metrics.images_per_second > 0
    assert metrics.accuracy == (logits.argmax(1) == batch.targets).sum().item() / 32      # mixed images: their own class
    assert metrics.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-5)
    torch.testing.assert_close(before - setup.weights(), gradient, rtol=0, atol=1e-6)       # SGD's first step with rate 1
    if criterion.teacher:
        torch.testing.assert_close(torch.cat(criterion.teacher.seen).float(), images, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------- edited attention


class Attentive(nn.Module):
    """A network with outputs like the logits of two layers of sigmoid attention, 2 heads, 1 row, a grid of 4 x 4."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.GELU())
        self.layers = nn.ModuleList(nn.Linear(24, 32) for _ in range(2))
        self.head = nn.Linear(24, 10)
        self.layers_seen, self.recordings = None, 0

    def forward(self, images):
        x = self.trunk(images)
        if self.layers_seen is not None:
            self.layers_seen += [layer(x).view(-1, 2, 1, 16) for layer in self.layers]
        return self.head(x)

    @contextlib.contextmanager
    def record_logits(self):
        self.layers_seen, self.recordings = [], self.recordings + 1
        yield self.layers_seen
        self.layers_seen = None


class Supervised:
    """An Attentive model in its first step on 32 digits, of which those at `positions` of the step have edits."""

    def __init__(self, positions=(0, 1, 5, 30), micro_steps=1, rank=0, size=1, weight=3.0, cut_off=0):
        order = StepSampler(len(DIGITS.train), 32, micro_steps * size, rank, size, 5, 0, 1000)
        random, keys = np.random.default_rng(0), order.samples_of(0)
        edits = {keys[position].index: Edit("", "", random.random((4, 4), np.float32), random.random((4, 4)) < 0.4)
                 for position in positions}
        self.model = Attentive()
        self.attention = AttentionSupervision(weight, self.model.record_logits,
                                              lambda step: cut_off + sum(key.index in edits for key in order.samples_of(step)))
        self.trainer = make_trainer(self.model, ranks=distributed.Ranks(rank, size, 0, 1, CPU), micro_steps=micro_steps,
                                    criterion=Criterion(attention=self.attention if weight else None))
        self.batches = iter(data.train_loader(DIGITS.train, order, transform=train_transform("none", (8, 8)), seed=5,
                                              num_workers=0, pin_memory=False,
                                              edit_transform=partial(transform_with_edits, edits, (4, 4))))

    def step(self) -> tuple[StepMetrics, torch.Tensor]:
        """Return the metrics and by how much the weights decrease."""
        before = flat(self.model)
        metrics, = self.trainer.train_step(self.batches)
        return metrics, before - flat(self.model)

    def by_formula(self) -> tuple[float, float, torch.Tensor]:
        """Return loss, attention loss and gradient of the first step, computed from the whole batch at once."""
        batch, model = next(self.batches), copy.deepcopy(self.model)
        with model.record_logits() as layers:
            logits = model(to_input(batch.images))
        attention = self.attention.loss(layers, batch.edits) / self.attention.edited_images(0)
        loss = nn.functional.cross_entropy(logits, batch.targets) + self.attention.weight * attention
        loss.backward()
        return loss.item(), attention.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("micro_steps", [1, 4])
@pytest.mark.parametrize(("positions", "cut_off"), [((0,), 0), ((0, 1, 5, 30), 0), ((0, 1, 5, 30), 2), (range(32), 0)])
def test_attention_supervision_is_a_mean_over_the_edited_images(positions, cut_off, micro_steps):
    """Some of the four micro-batches have many edited images, others none. An edit outside the crop counts as 0."""
    setup = Supervised(positions, micro_steps, cut_off=cut_off)
    loss, attention, gradient = Supervised(positions, cut_off=cut_off).by_formula()
    metrics, change = setup.step()
    assert metrics.loss == pytest.approx(loss, rel=1e-6) and metrics.attention_loss == pytest.approx(attention, rel=1e-6)
    assert 0.05 < attention < 0.3
    torch.testing.assert_close(change, gradient, rtol=0, atol=1e-6)
    assert metrics.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-5) and setup.model.recordings == micro_steps


def test_the_mean_over_ranks_is_the_gradient_of_the_step():
    """DistributedDataParallel takes the mean of the ranks' gradients. It equals the gradient of the whole step."""
    changes = [Supervised(rank=rank, size=2, micro_steps=2).step()[1] for rank in range(2)]
    assert not torch.allclose(changes[0], changes[1], atol=1e-3)
    torch.testing.assert_close((changes[0] + changes[1]) / 2, Supervised().by_formula()[2], rtol=0, atol=1e-6)


def test_a_step_without_edited_images_has_no_attention_loss():
    setup = Supervised((), micro_steps=4)
    (metrics, change), (ordinary, expected) = setup.step(), Supervised((), micro_steps=4, weight=0.0).step()
    assert torch.equal(change, expected) and setup.model.recordings == 0
    assert metrics.loss == ordinary.loss and metrics.attention_loss is None


# ----------------------------------------------------------------------------------------- averaged weights


def test_the_average_ignores_skipped_steps_and_changes_nothing_in_training():
    """Its decay follows the number of updates, not of steps: for update 2, after five steps, it is 3 / 12."""
    setup, without = (Setup(LEVELS["O1"], fixed_scale=1024.0, ema_decay=decay, dropout=0.5) for decay in (0.9, None))
    for each in (setup, without):
        each.run(1)
        before = flat(setup.ema.model)
        each.change_gradient = lambda gradient: gradient * float("inf")
        assert [metrics.skipped for metrics in each.run(3)] == [True] * 3
        assert torch.equal(before, flat(setup.ema.model))
        each.change_gradient = lambda gradient: gradient
        each.run(1)
        if each is setup:
            torch.testing.assert_close(flat(setup.ema.model), 0.25 * before + 0.75 * setup.weights(), rtol=0, atol=1e-6)
    assert torch.equal(setup.weights(), without.weights())


# ---------------------------------------------------------------------------------------------------- dropout


def masks(steps, start=0, micro_steps=2, micros=None, seed=1) -> dict[tuple[int, int], torch.Tensor]:
    """Return {(step, micro): the output of dropout on ones}."""
    micros = micros or range(micro_steps)
    found, model = {}, nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 10))
    trainer = make_trainer(model, rate=0.0, normalize=lambda images: torch.ones(images.shape), batch_size=8,
                           micro_steps=len(micros), seed=seed, progress=Progress(start))
    position = iter(itertools.product(range(start, start + steps), micros))
    model[1].register_forward_hook(lambda module, inputs, output: found.__setitem__(next(position), output.detach()))
    images, targets = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    batches = (Batch(images, targets, [SampleIndex(step, micro, 0, 0)] * 4)
               for step, micro in itertools.product(range(start, start + steps), micros))
    for _ in range(steps):
        trainer.train_step(batches)
    return found


def test_dropout_is_a_function_of_seed_step_and_micro_batch():
    torch.manual_seed(1)
    first = masks(6)
    assert len(first) == 12 and not any(torch.equal(a, b) for a, b in itertools.combinations(first.values(), 2))
    torch.manual_seed(2)
    for again in (masks(6), masks(2, start=4), masks(6, micros=[1])):       # again, after a restart, as the second of two ranks
        assert all(torch.equal(mask, first[position]) for position, mask in again.items())
    assert not any(torch.equal(mask, first[position]) for position, mask in masks(6, seed=2).items())


@pytest.mark.parametrize(("tolerance", "device"), [(0.0, "cpu"), pytest.param(1e-6, "cuda", marks=pytest.mark.gpu)])
def test_a_run_that_starts_at_a_later_step_has_the_same_losses(tolerance, device):
    whole, tail = (Setup(dropout=0.5, rate=0.0, start=start, device=torch.device(device)) for start in (0, 3))
    assert whole.losses(6)[3:] == pytest.approx(tail.losses(3), rel=tolerance, abs=0)


# -------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("row", [FP32, BF16, LEVELS["O1"], LEVELS["O3"]], ids=lambda row: row.name)
def test_steps_on_a_gpu_follow_the_cpu(row):
    assert Setup(row, device=torch.device("cuda")).losses(20) == pytest.approx(Setup().losses(20), rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("row", [FP32, BF16, LEVELS["O1"]], ids=lambda row: row.name)
def test_no_step_makes_the_host_wait(row):
    setup = Setup(row, device=torch.device("cuda"), ema_decay=0.9, micro_steps=2)
    setup.run(2, flush=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        setup.run(3, flush=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
