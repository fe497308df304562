"""Optimizer steps and evaluation: the reference's traces, accumulation, overflow, divergence, dropout."""

import contextlib
import copy
import dataclasses
import itertools
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from configs import architecture
from models import create_model
from utils.attention.edits import Edit
from utils.data import loader as data
from utils.data.datasets import digits
from utils.data.loader import Batch, Key
from utils.data.mixup import Mixer
from utils.data.transforms import eval_transform, normalise, train_transform
from utils.distributed import World
from utils.training import evaluation
from utils.training import trainer as engine
from utils.training.ema import Ema
from utils.training.optimizer import build_optimizer, lr_multiplier, parameter_groups
from utils.training.precision import BF16, FP32, LEVELS, LossScaler
from utils.training.trainer import DivergedError, Lesson, Objective, Trainer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "train"
CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
DIGITS = digits("")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small products gain nothing from threads, and lose tenfold where other processes are at work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def to_input(images, dtype=torch.float32):
    return normalise(images, (0.5,) * 3, (0.5,) * 3, dtype)


# ---------------------------------------------------------------------------------- traces of the reference

# Absolute. Losses and weights agree within 1e-6, gradient norms (up to 3) within 2e-6. The final logits agree within
# 7e-6 where the processor has vector instructions, within 1.5e-5 without them (ATEN_CPU_CAPABILITY=default).
TOLERANCE = {"final_logits_first16": 3e-5}
OTHER_TOLERANCES = 1e-5
TRACES = [f"zh{head}_{rest}" for head in (0, 1) for rest in (
    "cosine_wd0_acc1", "cosine_wd0_acc4", "cosine_wd0.01_acc1", "linear_wd0_acc1", "linear_wd0.01_acc1")]


def reference_batches(images, labels, steps: int, micro_steps: int):
    """Step s sees images 16 (s % 3) .. 16 (s % 3) + 15, cut into micro-batches."""
    for step, micro in itertools.product(range(steps), range(micro_steps)):
        size = 16 // micro_steps
        first = 16 * (step % 3) + micro * size
        index = range(first, first + size)
        yield Batch(images[index], labels[index], [Key(step, micro, 0, number) for number in index])


@pytest.mark.parametrize("tag", TRACES)
def test_trace_of_the_reference(tag):
    zero_head, decay, weight_decay, micro_steps = re.fullmatch(r"zh(\d)_(\w+)_wd([\d.]+)_acc(\d)", tag).groups()
    with np.load(FIXTURES / "train.npz") as file:
        expected = {name.split("/")[2]: file[name] for name in file.files if name.startswith(f"train/jeon_{tag}/")}
        side, patch, hidden, mlp, heads, layers, classes = file["train/cfg"].tolist()
        warmup, total, peak = file["train/warmup_total_lr"].tolist()
        images = torch.from_numpy(file["train/images"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(file["train/labels"])
    row = architecture(patch, hidden, mlp, heads, layers, img_size=side, gelu="erf")
    model = create_model(row, classes, pretrained=FIXTURES / "train_init.npz", head="keep")
    if zero_head == "1":
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
    groups = parameter_groups(model.named_parameters(), weight_decay=float(weight_decay))
    optimizer = build_optimizer("sgd", groups, peak)
    trainer = Trainer(model, optimizer, LossScaler(FP32, CPU), FP32, ALONE, to_input, batch_size=16,
                      micro_steps=int(micro_steps), max_grad_norm=1.0, seed=0)
    batches = reference_batches(images, labels, int(total), int(micro_steps))
    reports = [report for _ in range(int(total))
               for report in trainer.train_step(batches, lambda update: peak * lr_multiplier(update, warmup, total, decay))]

    model.eval()
    with torch.no_grad():
        logits = model(to_input(images[:16]))
    got = {"loss": [report.loss for report in reports], "lr": [report.learning_rate for report in reports],
           "grad_norm_before_clip": [report.grad_norm for report in reports], "final_logits_first16": logits.numpy(),
           "final_head_weight": model.head.weight.detach().numpy(),
           "final_qw0_row0": model.blocks[0].attn.qkv.weight[0].detach().numpy()}
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=TOLERANCE.get(name, OTHER_TOLERANCES), err_msg=name)
    assert [report.step for report in reports] == list(range(1, 21)) and trainer.updates == 20
    assert expected["loss"][0] - expected["loss"][-1] > 0.5          # it learns: the trace is no flat line


# ------------------------------------------------------------------------------------------------------ steps


def batches(batch_size=32, micro_steps=1, start=0, transform=None):
    order = data.StepOrder(len(DIGITS.train), batch_size, micro_steps, 0, 1, 5, start, 1000)
    return iter(data.train_loader(DIGITS.train, order, transform=transform or train_transform("none", (8, 8)), seed=5,
                                  num_workers=0, pin_memory=False))


class Setup:
    """A small network on digits. `go(n)` trains n steps; `spoil` is called with every gradient of the first weight."""

    def __init__(self, row=FP32, micro_steps=1, clip=1.0, dropout=0.0, optimizer="sgd", rate=0.1, fixed_scale=0.0, seed=1,
                 start=0, batch_size=32, device=CPU, objective=None, ema_decay=None, transform=None, **more):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(dropout),
                                   nn.Linear(32, 10)).to(device, row.weights)
        self.optimizer = build_optimizer(optimizer, self.model.parameters(), rate)
        self.scaler = LossScaler(row, device, fixed_scale)
        self.rate, self.spoil, self.blacken = rate, lambda gradient: gradient, False
        self.model[1].weight.register_hook(lambda gradient: self.spoil(gradient))
        self.ema = None if ema_decay is None else Ema(self.model, ema_decay)
        self.trainer = Trainer(
            self.model, self.optimizer, self.scaler, row, World(0, 1, 0, 1, device), lambda images: self.prepare(images, row),
            batch_size=batch_size, micro_steps=micro_steps, max_grad_norm=clip, seed=seed, step=start, updates=start,
            objective=objective, ema=self.ema, **more)
        self.batches = batches(batch_size, micro_steps, start, transform)

    def prepare(self, images, row):
        return to_input(images, row.weights) * (float("nan") if self.blacken else 1)

    def go(self, steps=1) -> list[engine.StepReport]:
        return [report for _ in range(steps) for report in self.trainer.train_step(self.batches, lambda update: self.rate)]

    def losses(self, steps) -> list[float]:
        return [report.loss for report in self.go(steps)]

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().float().flatten() for parameter in self.model.parameters()]).clone()

    def state(self) -> str:
        """Everything that a step may change in weights, their average and optimizer"""
        models = [self.model, *([self.ema.model] if self.ema else [])]
        return str(([p.tolist() for model in models for p in model.parameters()], copy.deepcopy(self.optimizer.state_dict())))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("micro_steps", [2, 4])
def test_accumulation_changes_nothing_but_the_rounding(optimizer, micro_steps):
    rate = 0.1 if optimizer == "sgd" else 3e-3
    whole, parts = Setup(optimizer=optimizer, rate=rate), Setup(optimizer=optimizer, rate=rate, micro_steps=micro_steps)
    start = whole.weights()
    assert parts.losses(20) == pytest.approx(whole.losses(20), rel=1e-5)
    difference = (parts.weights() - whole.weights()).norm() / (whole.weights() - start).norm()
    assert difference < 1e-5


def test_the_report_of_a_step():
    setup = Setup()
    batch = next(batches())
    model = copy.deepcopy(setup.model)
    logits = model(to_input(batch.images))
    loss = nn.functional.cross_entropy(logits, batch.targets)       # the mean
    loss.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    report, = setup.go()
    assert report.step == 1 and report.learning_rate == 0.1 and report.loss_scale is None and not report.skipped
    assert report.loss == pytest.approx(loss.item(), rel=1e-6) and report.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert report.accuracy == (logits.argmax(1) == batch.targets).double().mean() and report.images_per_second > 0
    assert all(parameter.grad is None for parameter in setup.model.parameters())
    assert setup.optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("row", [LEVELS["O1"], LEVELS["O2"], LEVELS["O3"], BF16], ids=lambda row: row.name)
def test_low_precision_trains(row):
    full, low = Setup().losses(30), Setup(row).losses(30)
    assert low[-1] < 0.6 * low[0]
    assert low == pytest.approx(full, rel=0.05) and low != full


@pytest.mark.parametrize("fixed", [0.0, 1024.0])
def test_an_overflow_is_skipped(fixed):
    setup = Setup(LEVELS["O1"], fixed_scale=fixed, micro_steps=2, ema_decay=0.5)
    scale = fixed or 65536.0
    setup.go(2)
    before = setup.state()
    setup.spoil = lambda gradient: gradient * float("inf")
    report, = setup.go()
    assert report.skipped and report.step == 3 and report.loss_scale == scale and not report.grad_norm < float("inf")
    assert setup.state() == before
    assert (setup.trainer.step, setup.trainer.updates, setup.trainer.skips) == (3, 2, 1)
    assert setup.scaler.scale == (fixed or scale / 2)
    setup.spoil = lambda gradient: gradient
    report, = setup.go()
    assert not report.skipped and report.step == 4 and report.loss_scale == (fixed or scale / 2)
    assert (setup.trainer.step, setup.trainer.updates, setup.trainer.skips) == (4, 3, 0)
    assert setup.state() != before and setup.weights().isfinite().all()


def test_a_skipped_step_uses_up_its_images_and_nothing_else():
    """Two skips, then a step: the weights are those of a run that started at that step."""
    setup, other = Setup(LEVELS["O1"], fixed_scale=1024.0), Setup(LEVELS["O1"], fixed_scale=1024.0, start=2)
    setup.spoil = lambda gradient: gradient * float("nan")
    assert [report.skipped for report in setup.go(2)] == [True, True]
    setup.spoil = lambda gradient: gradient
    assert setup.losses(1) == other.losses(1)
    assert torch.equal(setup.weights(), other.weights())


@pytest.mark.parametrize("fixed", [0.0, 1024.0])
def test_ten_overflows_in_a_row_are_too_many(fixed):
    setup = Setup(LEVELS["O1"], fixed_scale=fixed)
    setup.go(1)
    before = setup.state()
    setup.spoil = lambda gradient: gradient * float("inf")
    assert all(report.skipped for report in setup.go(9))
    with pytest.raises(DivergedError, match=r"step 11: 10 gradient overflows in a row") as told:
        setup.go()
    assert "\n" not in str(told.value) and setup.state() == before


def test_a_good_step_ends_the_row():
    setup = Setup(LEVELS["O1"])
    calls = itertools.count()
    setup.spoil = lambda gradient: gradient * (float("inf") if next(calls) % 9 else 1)      # 8 bad ones, a good one, ...
    assert sum(report.skipped for report in setup.go(27)) == 24


def test_overflows_are_counted_over_a_resume():
    setup = Setup(LEVELS["O1"], start=9)
    setup.trainer.skips = 9
    setup.spoil = lambda gradient: gradient * float("inf")
    with pytest.raises(DivergedError):
        setup.go()


@pytest.mark.parametrize("row", [FP32, BF16, LEVELS["O1"], LEVELS["O3"]], ids=lambda row: row.name)
def test_a_loss_that_is_not_finite_stops_the_run(row):
    setup = Setup(row, micro_steps=2)
    setup.go(2)
    before = setup.state()
    keys = [key for batch in data.StepOrder(len(DIGITS.train), 32, 2, 0, 1, 5, 2, 3) for key in batch]
    setup.blacken = True
    with pytest.raises(DivergedError) as told:
        setup.go()
    samples = ", ".join(str(key.index) for key in keys[:16])
    assert str(told.value).startswith("step 3: loss nan at learning rate 0.1") and ", or --non_finite skip" in str(told.value)
    assert f"; samples {samples}, ..." in str(told.value) and "\n" not in str(told.value)
    assert setup.state() == before and setup.trainer.updates == 2


@pytest.mark.parametrize("value", ["inf", "nan"])
@pytest.mark.parametrize("row", [FP32, BF16], ids=lambda row: row.name)
def test_a_gradient_that_is_not_finite_stops_the_run_where_nothing_is_scaled(row, value):
    setup = Setup(row, batch_size=4)
    setup.go(1)
    before = setup.state()
    setup.spoil = lambda gradient: torch.full_like(gradient, float(value))
    with pytest.raises(DivergedError, match=rf"step 2: gradient norm {value} at .* 0.1: try .*; samples \d+(, \d+){{3}}$"):
        setup.go()
    assert setup.state() == before and DivergedError.code == 4


@pytest.mark.contract("P11", "a loss or gradient that is not finite never reaches weights, average or optimizer")
@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
def test_updates_that_are_not_finite_can_be_skipped(figure, exact):
    """They use up their images and nothing else; ten in a row end the run, also over a resume."""
    for row, fault in itertools.product((FP32, BF16, LEVELS["O1"]), ("loss", "inf", "nan")):
        setup = Setup(row, micro_steps=2, ema_decay=0.5, non_finite="skip", exact=exact)
        setup.go(2)
        before = setup.state()
        if fault == "loss":
            setup.blacken = True
        else:
            setup.spoil = lambda gradient, fault=fault: gradient * float(fault)
        assert [report.skipped for report in setup.go(3)] == [True] * 3
        assert setup.state() == before and (setup.trainer.step, setup.trainer.updates, setup.trainer.skips) == (5, 2, 3)
        setup.blacken, setup.spoil = False, lambda gradient: gradient
        good, = setup.go()
        assert not good.skipped and good.loss < float("inf") and setup.weights().isfinite().all()
        assert setup.state() != before and (setup.trainer.updates, setup.trainer.skips) == (3, 0)
        setup.trainer.skips, setup.blacken, before = 8, True, setup.state()
        setup.go()
        with pytest.raises(DivergedError, match=r"step 8: 10 .* skipped \(the last: loss nan\) at .*: try .*; samples ") as told:
            setup.go()
        assert setup.state() == before and ("loss scale" in str(told.value)) == row.scales_loss
    figure(f"steps with a loss or gradient of NaN or infinity{', --exact' if exact else ''}", 9 * 5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_reading_late_changes_no_number(optimizer):
    """As on a GPU: the figures of a step are read in the middle of the next. Overflows come and go, one of them first."""
    outcomes = []
    for late in (False, True):
        setup, calls = Setup(LEVELS["O1"], optimizer=optimizer, ema_decay=0.9, late=late), itertools.count()
        setup.spoil = lambda gradient, calls=calls: gradient * (float("inf") if next(calls) in (0, 4, 5) else 1)
        rates, reports = [], []

        def rate(update, rates=rates):
            rates.append(update)
            return 0.1 / update

        for number in range(10):
            got = setup.trainer.train_step(setup.batches, rate, now=number == 6)
            assert len(got) == (1 if not late else {0: 0, 6: 2, 7: 0}.get(number, 1))
            reports += got
        reports += setup.trainer.finish()
        assert setup.trainer.finish() == [] and (setup.trainer.step, setup.trainer.updates) == (10, 7)
        outcomes.append(([dataclasses.replace(report, seconds=0, data_seconds=0) for report in reports], rates,
                         setup.weights().tolist(), [p.tolist() for p in setup.ema.model.parameters()], setup.scaler.state_dict()))
    assert outcomes[0] == outcomes[1]
    assert [report.step for report in outcomes[0][0]] == list(range(1, 11))


def test_late_figures_are_read_when_the_next_step_is_under_way(monkeypatch):
    setup, order = Setup(late=True), []
    for name in ("_gradients", "_measured", "_read"):
        real = getattr(setup.trainer, name)
        monkeypatch.setattr(setup.trainer, name, lambda *given, name=name, real=real: order.append(name) or real(*given))
    for _ in range(2):
        setup.trainer.train_step(setup.batches, lambda update: 0.1, now=False)
    assert order == ["_gradients", "_measured", "_read"] * 2


@pytest.mark.parametrize("late", [False, True])
def test_waiting_for_data_lies_in_the_seconds_that_it_is_part_of(late):
    setup, waits = Setup(late=late), iter([0, 0, 0.2, 0, 0.1, 0])
    given = setup.batches
    setup.batches = (time.sleep(next(waits)) or batch for batch in given)
    reports = [report for _ in range(6)
               for report in setup.trainer.train_step(setup.batches, lambda update: 0.1, now=False)] + setup.trainer.finish()
    assert len(reports) == 6 and all(report.data_seconds <= report.seconds for report in reports)
    assert [report.step for report in reports if report.data_seconds > 0.09] == ([2, 4] if late else [3, 5])


def test_a_late_step_that_diverges_is_the_last():
    setup = Setup(late=True)
    setup.go(3)
    setup.blacken = True
    before = setup.weights()
    # Nothing is known of it yet, but its update is left out.
    assert setup.trainer.train_step(setup.batches, lambda update: 0.1, now=False) == []
    with pytest.raises(DivergedError, match=r"^step 4: loss nan"):
        setup.trainer.train_step(setup.batches, lambda update: 0.1, now=False)
    assert setup.trainer.step == 3 and setup.weights().equal(before) and before.isfinite().all()


def test_the_step_before_one_that_diverges_is_told():
    setup = Setup(late=True)
    told = [report.step for _ in range(3)
            for report in setup.trainer.train_step(setup.batches, lambda update: 0.1, now=False)]
    setup.blacken = True
    with pytest.raises(DivergedError, match=r"^step 4: loss nan"):
        setup.trainer.train_step(setup.batches, lambda update: 0.1, now=True)
    assert told == [1, 2] and [report.step for report in setup.trainer.finish()] == [3] and setup.trainer.finish() == []


def test_a_loss_scale_near_nothing_ends_the_run():
    """Bad steps between good ones never make ten in a row."""
    setup, calls = Setup(LEVELS["O1"]), itertools.count()
    setup.spoil = lambda gradient: gradient * (float("inf") if next(calls) % 3 else 1)
    with pytest.raises(DivergedError, match=r"overflows, however low the loss scale at learning rate 0.1, loss scale 0.00"):
        setup.go(60)
    assert setup.trainer.step == 38 and setup.weights().isfinite().all()         # the 26th bad one, at 65536 / 2^25


def test_clipping():
    updates = {}
    for clip in (0, 1e6, 0.01):
        setup = Setup(clip=clip, rate=1.0)
        start = setup.weights()
        report, = setup.go()
        assert report.grad_norm > 0.1                               # before clipping, whatever the limit
        updates[clip] = (setup.weights() - start, report.grad_norm)
    assert torch.equal(updates[0][0], updates[1e6][0])
    assert updates[0][0].norm() == pytest.approx(updates[0][1], rel=1e-4)
    assert updates[0.01][0].norm() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(updates[0.01][0] / 0.01, updates[0][0] / updates[0][0].norm(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("fixed", [0.0, 8.0])
def test_clipping_sees_unscaled_gradients(fixed):
    """Clipping scaled gradients would make the update 65,536 times too small, without any error."""
    updates, norms = [], []
    for row in (FP32, LEVELS["O1"]):
        setup = Setup(row, clip=0.05, rate=1.0, fixed_scale=fixed if row.scales_loss else 0.0)
        start = setup.weights()
        norms.append(setup.go()[0].grad_norm)
        updates.append(setup.weights() - start)
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)
    assert updates[1].norm() == pytest.approx(0.05, rel=1e-3) and (updates[1] - updates[0]).norm() < 0.05 * 0.02


@pytest.mark.parametrize("exact", [False, True])
def test_requests_and_replaced_images_are_handed_on(exact):
    asked = iter([[0.0, 2.0], [1.0, 3.5]])
    setup = Setup(exact=exact, micro_steps=2, requests=lambda: next(asked))
    setup.batches = (batch._replace(bad=((batch.keys[0].index, "cut off"),)) for batch in setup.batches)
    expected = [(key[0].index, "cut off") for key in data.StepOrder(len(DIGITS.train), 32, 2, 0, 1, 5, 0, 2)]
    assert [report.requests for report in setup.go(2)] == [(0.0, 2.0), (1.0, 3.5)] and setup.trainer.bad == expected
    assert Setup().go()[0].requests == ()


# ---------------------------------------------------------------------------------------------- the objective

EVERYTHING = train_transform("crop_flip", (8, 8), crop_scale=0.5, rotation=15.0, color_jitter=0.3, randaugment_ops=2,
                             random_erasing=0.7)
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 1.0, 0.0, 3.0, 1.0, 0.25, 1.0, 1.0])


def mixer(step_images=32, mixup_alpha=0.8, cutmix_alpha=1.0, stop_at=1000, probability=0.8) -> Mixer:
    return Mixer(10, step_images, 3, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha, probability=probability,
                 stop_at=stop_at)


class Teacher:
    """A fixed linear map of the pixels, which remembers what it was shown."""

    def __init__(self):
        self.weight = torch.randn(192, 10, generator=torch.Generator().manual_seed(3)) / 50
        self.seen = []

    def __call__(self, images):
        self.seen.append(images.clone())
        return images.float().flatten(1).to(self.weight) @ self.weight


def mixed_by_hand(images, labels, draws):
    """Pair by pair: images (B, 3, 8, 8) uint8, labels (B,) -> images and targets (B, 10) in float64"""
    targets = np.eye(10)[labels.numpy()]
    images = images.numpy().astype(np.float64)
    out, out_targets = images.copy(), targets.copy()
    for first in range(0, len(images), 2):
        cutmix, lam, center = draws.cutmix[first // 2], draws.lam[first // 2], draws.center[:, first // 2]
        for own, other in ((first, first + 1), (first + 1, first)):
            if cutmix:
                row, column = (int(8 * value) for value in center)
                half = int(0.5 * np.sqrt(1 - lam) * 8)
                for y, x in itertools.product(range(8), range(8)):
                    if row - half <= y < row + half and column - half <= x < column + half:
                        out[own, :, y, x] = images[other, :, y, x]
                foreign = (min(row + half, 8) - max(row - half, 0)) * (min(column + half, 8) - max(column - half, 0)) / 64
            else:
                out[own], foreign = lam * images[own] + (1 - lam) * images[other], 1 - lam
            out_targets[own] = (1 - foreign) * targets[own] + foreign * targets[other]
    return torch.from_numpy(out), torch.from_numpy(out_targets)


def log_probabilities(logits):
    return logits - logits.exp().sum(dim=1, keepdim=True).log()


def plain_loss(own, distilled, images, targets, objective):
    """Sum over the images, in float64, written out: own, distilled and targets (B, 10)"""
    wanted = (1 - objective.label_smoothing) * targets + objective.label_smoothing / 10
    weights = torch.ones(10) if objective.class_weights is None else objective.class_weights
    loss = -(weights.double() * wanted * log_probabilities(own)).sum()
    if objective.distillation == "none":
        return loss
    taught = images.flatten(1) @ Teacher().weight.double()
    if objective.distillation == "hard":
        taught = -log_probabilities(distilled)[torch.arange(len(own)), taught.argmax(1)].sum()
    else:
        t = objective.temperature
        teacher, student = log_probabilities(taught / t), log_probabilities(distilled / t)
        taught = t * t * (teacher.exp() * (teacher - student)).sum()
    return (1 - objective.alpha) * loss + objective.alpha * taught


OBJECTIVES = {
    "cross-entropy": {},
    "label smoothing": {"label_smoothing": 0.2},
    "class weights": {"class_weights": CLASS_WEIGHTS},
    "smoothing and weights": {"label_smoothing": 0.1, "class_weights": CLASS_WEIGHTS},
    "MixUp": {"mixer": mixer(cutmix_alpha=0.0)},
    "CutMix": {"mixer": mixer(mixup_alpha=0.0)},
    "mixing that has ended": {"mixer": mixer(stop_at=0)},
    "hard distillation": {"distillation": "hard", "teacher": Teacher(), "alpha": 0.3},
    "soft distillation": {"distillation": "soft", "teacher": Teacher(), "alpha": 0.7, "temperature": 3.0},
    "a teacher alone": {"distillation": "soft", "teacher": Teacher(), "alpha": 1.0},
    "all of it": {"label_smoothing": 0.1, "class_weights": CLASS_WEIGHTS, "mixer": mixer(), "distillation": "soft",
                  "teacher": Teacher(), "alpha": 0.4, "temperature": 2.0},
    "all of it, hard": {"label_smoothing": 0.1, "class_weights": CLASS_WEIGHTS, "mixer": mixer(), "distillation": "hard",
                        "teacher": Teacher()},
}


@pytest.mark.parametrize("micro_steps", [1, 4])
@pytest.mark.parametrize("case", OBJECTIVES)
def test_loss_gradient_and_accuracy_are_those_of_the_plain_formula(case, micro_steps):
    """The formula knows nothing of micro-steps; the teacher sees what the student sees."""
    objective = Objective(**OBJECTIVES[case])
    setup = Setup(objective=objective, micro_steps=micro_steps, clip=0, rate=1.0)
    if objective.teacher:
        objective.teacher.seen.clear()
    batch = next(batches())
    images, targets = batch.images.double(), torch.from_numpy(np.eye(10)[batch.targets.numpy()])
    if objective.mixer is not None and objective.mixer.stop_at:
        images, targets = mixed_by_hand(batch.images, batch.targets, objective.mixer.draw(0))
        assert (targets.amax(dim=1) < 1).sum() >= 10
    model = copy.deepcopy(setup.model).double()
    logits = model((images / 255 - 0.5) / 0.5)
    loss = plain_loss(logits, logits, images, targets, objective) / 32
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    before = setup.weights().double()
    report, = setup.go()
    assert report.loss == pytest.approx(loss.item(), rel=1e-6)
    assert report.accuracy == (logits.argmax(1) == batch.targets).sum().item() / 32       # of mixed images: the image's own class
    assert report.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-5)
    torch.testing.assert_close(before - setup.weights(), gradient, rtol=0, atol=1e-6)       # SGD's first step of rate 1
    if objective.teacher:
        torch.testing.assert_close(torch.cat(objective.teacher.seen).double(), images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_accumulation_changes_no_mixed_or_augmented_image(optimizer):
    losses = []
    for micro_steps in (1, 4):
        setup = Setup(objective=Objective(0.1, mixer=mixer()), transform=EVERYTHING, micro_steps=micro_steps, optimizer=optimizer,
                      rate=0.05 if optimizer == "sgd" else 1e-3)
        losses.append(setup.losses(20))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert len(set(losses[0])) == 20


@pytest.mark.parametrize("micro_steps", [1, 4])
def test_a_teacher_stays_as_it_is(micro_steps):
    torch.manual_seed(4)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.Dropout(0.5)).eval()
    before = copy.deepcopy(teacher.state_dict())

    @torch.no_grad()
    def teach(images):
        return teacher(images.float() / 255)

    setup = Setup(objective=Objective(distillation="soft", teacher=teach), optimizer="adamw", rate=0.01,
                  micro_steps=micro_steps)
    setup.go(5)
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in before.items())
    assert not teacher.training and all(parameter.grad is None for parameter in teacher.parameters())


# ------------------------------------------------------------------------------------------- two heads, a teacher


def distilled_model():
    """Heads that are not zero, so that they answer differently"""
    torch.manual_seed(0)
    model = create_model(architecture(4, 16, 32, 2, 2, img_size=8, distilled=True), 10)
    for head in (model.head, model.head_dist):
        nn.init.normal_(head.weight)
        nn.init.normal_(head.bias)
    model.distilling = True
    return model


def change_of_heads(alpha, kind="hard", teacher=None, shift=0) -> tuple:
    """-> (the report of one step of rate 1, what it adds to the cls head, to the dist head, the model before it)"""
    model, teacher = distilled_model(), teacher or Teacher()
    before = copy.deepcopy(model)
    trainer = Trainer(model, build_optimizer("sgd", model.parameters(), 1.0), LossScaler(FP32, CPU), FP32, ALONE, to_input,
                      batch_size=32, micro_steps=1, max_grad_norm=0, seed=1,
                      objective=Objective(distillation=kind, teacher=teacher, alpha=alpha, temperature=2.0))
    batch = next(batches())
    report = trainer.train_step(iter([batch._replace(targets=(batch.targets + shift) % 10)]), lambda update: 1.0)[0]
    changes = [torch.cat([(getattr(model, name).weight - getattr(before, name).weight).flatten(),
                          getattr(model, name).bias - getattr(before, name).bias]).detach() for name in ("head", "head_dist")]
    return report, *changes, before


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_each_head_has_its_own_teacher(kind):
    batch, gradients = next(batches()), []
    report, cls, dist, model = change_of_heads(0.3, kind)
    targets = torch.from_numpy(np.eye(10)[batch.targets.numpy()])
    model = copy.deepcopy(model).double().train()
    own, distilled = model((batch.images.double() / 255 - 0.5) / 0.5)
    objective = Objective(distillation=kind, teacher=None, alpha=0.3, temperature=2.0)
    loss = plain_loss(own, distilled, batch.images.double(), targets, objective) / 32
    loss.backward()
    for head in (model.head, model.head_dist):
        gradients.append(torch.cat([head.weight.grad.flatten(), head.bias.grad]))
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    for change, gradient in zip((cls, dist), gradients):
        assert gradient.norm() > 0.1
        torch.testing.assert_close(change.double(), -gradient, rtol=0, atol=1e-5)
    # The prediction is the mean of the two.
    assert report.accuracy == (((own + distilled) / 2).argmax(1) == batch.targets).sum().item() / 32


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_labels_move_one_head_and_the_teacher_the_other(kind):
    other = Teacher()
    other.weight = -other.weight
    _, cls, dist, _ = change_of_heads(0.5, kind)
    _, cls_of_other_teacher, dist_of_other_teacher, _ = change_of_heads(0.5, kind, teacher=other)
    _, cls_of_other_labels, dist_of_other_labels, _ = change_of_heads(0.5, kind, shift=1)
    assert torch.equal(cls, cls_of_other_teacher) and not torch.equal(dist, dist_of_other_teacher)
    assert torch.equal(dist, dist_of_other_labels) and not torch.equal(cls, cls_of_other_labels)
    _, cls, dist, _ = change_of_heads(0.0, kind)
    assert cls.norm() > 0.1 and not dist.any()
    _, cls, dist, _ = change_of_heads(1.0, kind)
    assert dist.norm() > 0.1 and not cls.any()


def test_a_distilled_model_that_has_no_teacher_learns_with_the_mean_of_its_heads():
    model = distilled_model()
    model.distilling = False
    trainer = Trainer(model, build_optimizer("sgd", model.parameters(), 1.0), LossScaler(FP32, CPU), FP32, ALONE, to_input,
                      batch_size=32, micro_steps=1, max_grad_norm=0, seed=1)
    heads = [copy.deepcopy(head) for head in (model.head, model.head_dist)]
    batch = next(batches())
    with torch.no_grad():
        x = model.forward_features(to_input(batch.images))
        mean = (heads[0](x[:, 0]) + heads[1](x[:, 1])) / 2
    report = trainer.train_step(iter([batch]), lambda update: 1.0)[0]
    assert report.loss == pytest.approx(nn.functional.cross_entropy(mean, batch.targets).item(), rel=1e-5)
    assert all(not torch.equal(old.weight, new.weight) for old, new in zip(heads, (model.head, model.head_dist)))


# ------------------------------------------------------------------------------------------- edited attention


class Attentive(nn.Module):
    """A network with something like the logits of two layers of sigmoid attention, 2 heads, 1 row, a grid of 4 x 4."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.GELU())
        self.layers = nn.ModuleList(nn.Linear(24, 32) for _ in range(2))
        self.head = nn.Linear(24, 10)
        self.heard, self.listened = None, 0

    def forward(self, images):
        x = self.trunk(images)
        if self.heard is not None:
            self.heard += [layer(x).view(-1, 2, 1, 16) for layer in self.layers]
        return self.head(x)

    @contextlib.contextmanager
    def listen(self):
        self.heard, self.listened = [], self.listened + 1
        yield self.heard
        self.heard = None


class Taught:
    """Attentive, in its first step on 32 digits, of which those at `positions` of the step have edits."""

    def __init__(self, positions=(0, 1, 5, 30), micro_steps=1, rank=0, world=1, weight=3.0, row=FP32, scale=0.0, beside=0):
        order = data.StepOrder(len(DIGITS.train), 32, micro_steps * world, rank, world, 5, 0, 1000)
        random = np.random.default_rng(0)
        keys = order.keys_of(0)
        self.edits = {keys[position].index: Edit("", "", random.random((4, 4), np.float32), random.random((4, 4)) < 0.4)
                      for position in positions}
        self.model = Attentive()
        lesson = Lesson(weight, self.model.listen,
                        lambda step: beside + sum(key.index in self.edits for key in order.keys_of(step)))
        self.trainer = Trainer(
            self.model, build_optimizer("sgd", self.model.parameters(), 1.0), LossScaler(row, CPU, scale), row,
            World(rank, world, 0, 1, CPU), to_input, batch_size=32, micro_steps=micro_steps, max_grad_norm=0, seed=1,
            objective=Objective(lesson=lesson if weight is not None else None))
        self.batches = iter(data.train_loader(DIGITS.train, order, transform=train_transform("none", (8, 8)), seed=5,
                                              num_workers=0, pin_memory=False, edits=self.edits, grid=(4, 4)))

    def go(self) -> engine.StepReport:
        return self.trainer.train_step(self.batches, lambda update: 1.0)[0]

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()]).clone()


def taught_by_hand(setup, positions, weight=3.0, count=None) -> tuple[float, float, torch.Tensor]:
    """Loss, attention loss and gradient of the first step in float64, image by image"""
    batch = next(batches())
    model = copy.deepcopy(setup.model).double()
    with model.listen() as layers:
        logits = model((batch.images.double() / 255 - 0.5) / 0.5)
    attention = torch.zeros((), dtype=torch.float64)
    for position in positions:
        edit = setup.edits[batch.keys[position].index]
        chosen = torch.from_numpy(edit.edited).flatten()
        wanted = torch.from_numpy(edit.values).double().flatten()[chosen]
        for layer in layers:
            attention = attention + ((layer[position, :, 0, chosen].sigmoid() - wanted) ** 2).mean() / 2
    attention = attention / (count or max(len(positions), 1))
    loss = nn.functional.cross_entropy(logits, batch.targets) + weight * attention
    loss.backward()
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return loss.item(), attention.item(), torch.cat([part.flatten() for part in gradient])


@pytest.mark.parametrize("micro_steps", [1, 4])
@pytest.mark.parametrize("positions", [(0,), (0, 1, 5, 30), range(32)], ids=len)
def test_a_lesson_is_the_plain_formula_however_the_step_is_cut(positions, micro_steps):
    """Some of the four micro-batches have many edited images, others none."""
    setup = Taught(positions, micro_steps)
    loss, attention, gradient = taught_by_hand(setup, positions)
    before = setup.weights()
    report = setup.go()
    assert report.loss == pytest.approx(loss, rel=1e-6) and report.attention_loss == pytest.approx(attention, rel=1e-6)
    assert 0.05 < attention < 0.3
    torch.testing.assert_close((before - setup.weights()).double(), gradient, rtol=0, atol=1e-6)
    assert report.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-5) and setup.model.listened == micro_steps


def test_ranks_share_a_lesson():
    """The mean of their gradients, which DistributedDataParallel takes, is that of the whole step."""
    setup = Taught()
    _, _, gradient = taught_by_hand(setup, (0, 1, 5, 30))
    changes = []
    for rank in range(2):
        part = Taught(rank=rank, world=2, micro_steps=2)
        before = part.weights()
        part.go()
        changes.append(before - part.weights())
    assert not torch.allclose(changes[0], changes[1], atol=1e-3)
    torch.testing.assert_close(((changes[0] + changes[1]) / 2).double(), gradient, rtol=0, atol=1e-6)


def test_an_edit_that_a_crop_left_outside_counts_with_a_loss_of_nothing():
    setup = Taught(beside=2)
    loss, attention, gradient = taught_by_hand(setup, (0, 1, 5, 30), count=6)
    before, report = setup.weights(), setup.go()
    assert report.loss == pytest.approx(loss, rel=1e-6) and report.attention_loss == pytest.approx(attention, rel=1e-6)
    torch.testing.assert_close((before - setup.weights()).double(), gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("micro_steps", [1, 4])
def test_a_step_without_an_edited_image_is_an_ordinary_one(micro_steps):
    setup, ordinary = Taught((), micro_steps), Taught((), micro_steps, weight=None)
    reports = [setup.go(), ordinary.go()]
    assert torch.equal(setup.weights(), ordinary.weights()) and setup.model.listened == 0
    assert reports[0].loss == reports[1].loss and reports[0].attention_loss is None


@pytest.mark.parametrize("row", [BF16, LEVELS["O1"]], ids=lambda row: row.name)
def test_a_lesson_in_low_precision(row):
    full, low = Taught(), Taught(row=row, scale=256.0 if row is not BF16 else 0.0)
    start = full.weights()
    expected, got = full.go(), low.go()
    assert got.attention_loss == pytest.approx(expected.attention_loss, rel=0.02)
    assert got.attention_loss != expected.attention_loss and got.loss == pytest.approx(expected.loss, rel=0.02)
    assert (low.weights() - full.weights()).norm() < 0.03 * (full.weights() - start).norm()


def test_mixing_and_edits_do_not_go_together():
    with pytest.raises(AssertionError):
        Objective(mixer=mixer(), lesson=Lesson(1.0, Attentive().listen, lambda step: 1))


# ------------------------------------------------------------------------------------------------ the average


@pytest.mark.parametrize(("micro_steps", "start"), [(1, 0), (4, 0), (1, 7)])
def test_the_average_follows_once_an_update(micro_steps, start):
    setup = Setup(micro_steps=micro_steps, ema_decay=0.35, start=start)
    average = setup.weights().double()
    for update in range(start + 1, start + 9):
        setup.go()
        decay = min(0.35, (1 + update) / (10 + update))
        average = decay * average + (1 - decay) * setup.weights().double()
        got = torch.cat([parameter.flatten() for parameter in setup.ema.model.parameters()])
        torch.testing.assert_close(got.double(), average, rtol=0, atol=1e-6)
    assert (got - setup.weights()).abs().max() > 1e-3


def test_the_average_does_not_follow_a_skipped_step():
    """And its decay goes by the updates, not by the steps."""
    setup, other = (Setup(LEVELS["O1"], fixed_scale=1024.0, ema_decay=0.9) for _ in range(2))
    setup.go(1)
    before = [parameter.clone() for parameter in setup.ema.model.parameters()]
    setup.spoil = lambda gradient: gradient * float("inf")
    assert [report.skipped for report in setup.go(3)] == [True] * 3
    assert all(torch.equal(old, new) for old, new in zip(before, setup.ema.model.parameters()))
    setup.spoil = lambda gradient: gradient
    setup.go(1)
    other.go(1)
    # Update 2, after five steps: its decay is 3 / 12.
    for old, new, weight in zip(before, setup.ema.model.parameters(), setup.model.parameters()):
        torch.testing.assert_close(new, 0.25 * old + 0.75 * weight.detach(), rtol=0, atol=1e-6)


def test_the_average_changes_nothing_of_the_training():
    with_it, without = Setup(ema_decay=0.9, dropout=0.5), Setup(dropout=0.5)
    assert with_it.losses(5) == without.losses(5) and torch.equal(with_it.weights(), without.weights())


# ---------------------------------------------------------------------------------------------------- dropout


def masks(steps, start=0, micro_steps=2, micros=None, seed=1) -> dict[tuple[int, int], torch.Tensor]:
    """(step, micro) -> what dropout leaves of ones"""
    micros = micros or range(micro_steps)
    found, model = {}, nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 10))
    trainer = Trainer(model, build_optimizer("sgd", model.parameters(), 0.0), LossScaler(FP32, CPU), FP32, ALONE,
                      lambda images: torch.ones(images.shape), batch_size=8, micro_steps=len(micros), max_grad_norm=0, seed=seed,
                      step=start)
    position = iter(itertools.product(range(start, start + steps), micros))
    model[1].register_forward_hook(lambda module, inputs, output: found.__setitem__(next(position), output.detach()))
    batches = (Batch(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), [Key(step, micro, 0, 0)] * 4)
               for step, micro in itertools.product(range(start, start + steps), micros))
    for _ in range(steps):
        trainer.train_step(batches, lambda update: 0.0)
    return found


def test_dropout_is_a_function_of_seed_step_and_micro_batch():
    torch.manual_seed(1)
    first = masks(6)
    assert len(first) == 12 and not any(torch.equal(a, b) for a, b in itertools.combinations(first.values(), 2))
    torch.manual_seed(2)
    for again in (masks(6), masks(2, start=4), masks(6, micros=[1])):       # again; after a restart; as the second of two ranks
        assert all(torch.equal(mask, first[position]) for position, mask in again.items())
    assert not any(torch.equal(mask, first[position]) for position, mask in masks(6, seed=2).items())


def test_a_run_that_starts_later_has_the_same_losses():
    whole, tail = Setup(dropout=0.5, rate=0.0), Setup(dropout=0.5, rate=0.0, start=3)
    assert whole.losses(6)[3:] == tail.losses(3)


def test_a_batch_of_another_step_is_noticed():
    setup = Setup()
    next(setup.batches)
    with pytest.raises(AssertionError):
        setup.go()


# ------------------------------------------------------------------------------------------------- evaluation


def evaluate(model, split=DIGITS.val, batch_size=32, row=FP32, confusion=False):
    loader = data.eval_loader(split, transform=eval_transform((8, 8)), batch_size=batch_size, rank=0, world_size=1,
                              num_workers=0, pin_memory=False)
    return evaluation.evaluate(model, loader, to_input, row, ALONE, 10, confusion)


@pytest.mark.parametrize("batch_size", [1, 32, 500])
def test_evaluation_counts_every_image_once(batch_size):
    setup = Setup(dropout=0.5)
    setup.go(5)
    got = evaluate(setup.model, batch_size=batch_size, confusion=True)
    images = torch.stack([torch.from_numpy(np.array(DIGITS.val[index][0])).permute(2, 0, 1) for index in range(200)])
    labels = torch.tensor([DIGITS.val[index][1] for index in range(200)])
    model = copy.deepcopy(setup.model).eval()
    with torch.no_grad():
        logits = model(to_input(images))
    scores, truth = logits.numpy().astype(np.float64), labels.numpy()
    ranks = (scores > scores[np.arange(200), truth][:, None]).sum(axis=1)         # how many classes are before the true one
    assert got.images == 200 and len(got.top) == 5 and got.top1 == got.top[0] and got.top5 == got.top[4]
    assert list(got.top) == [(ranks < k).sum() / 200 for k in range(1, 6)]
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    true = shares[np.arange(200), truth]
    assert got.loss == pytest.approx(-np.log(true).mean(), rel=1e-5)
    assert got.true_probability == pytest.approx(true.mean(), rel=1e-5)
    confidence, error = shares.max(axis=1), 0.0
    for low in np.arange(15) / 15:
        own = (confidence > low) & (confidence <= low + 1 / 15)
        error += abs((ranks[own] == 0).sum() - confidence[own].sum()) / 200
    assert error > 0.01 and got.calibration_error == pytest.approx(error, rel=1e-5)
    assert torch.equal(got.confusion.sum(1), torch.bincount(labels, minlength=10))
    assert got.confusion.diag().sum() == (ranks == 0).sum()


def test_evaluation_can_be_stopped():
    setup, calls = Setup(), []
    loader = data.eval_loader(DIGITS.val, transform=eval_transform((8, 8)), batch_size=32, rank=0, world_size=1, num_workers=0,
                              pin_memory=False)
    setup.model.register_forward_hook(lambda *_: calls.append(0))
    assert evaluation.evaluate(setup.model, loader, to_input, FP32, ALONE, 10, stop=lambda: len(calls) == 3) is None
    assert len(calls) == 3 and setup.model.training


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(training):
    setup = Setup(dropout=0.5)
    setup.go(2)
    setup.model.train(training)
    before = setup.state()
    seen = []
    handle = setup.model[4].register_forward_hook(lambda module, *_: seen.append(module.training))
    assert evaluate(setup.model) == evaluate(setup.model)             # no dropout in it
    handle.remove()
    assert set(seen) == {False} and setup.model.training is training and setup.model[4].training is training
    assert setup.state() == before
    setup.go(1)


@pytest.mark.parametrize("row", [LEVELS["O1"], BF16], ids=lambda row: row.name)
def test_evaluation_runs_in_the_precision(row):
    setup, types = Setup(), []
    setup.model[5].register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    assert evaluate(setup.model, row=row).loss == pytest.approx(evaluate(setup.model).loss, rel=0.02)
    assert types[0] == row.compute and types[-1] == torch.float32


# -------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("row", [FP32, BF16, LEVELS["O1"], LEVELS["O3"]], ids=lambda row: row.name)
def test_steps_on_a_gpu_follow_the_cpu(row):
    assert Setup(row, device=torch.device("cuda")).losses(20) == pytest.approx(Setup().losses(20), rel=0.05)


@pytest.mark.gpu
def test_an_overflow_is_skipped_on_a_gpu():
    setup = Setup(LEVELS["O1"], device=torch.device("cuda"))
    setup.go(2)
    before = setup.state()
    setup.spoil = lambda gradient: gradient * float("inf")
    assert setup.go()[0].skipped and setup.state() == before and setup.scaler.scale == 32768


@pytest.mark.gpu
def test_dropout_on_a_gpu_is_a_function_of_the_step():
    device = torch.device("cuda")
    whole, tail = Setup(dropout=0.5, rate=0.0, device=device), Setup(dropout=0.5, rate=0.0, start=3, device=device)
    assert whole.losses(6)[3:] == pytest.approx(tail.losses(3), rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("row", [FP32, BF16, LEVELS["O1"]], ids=lambda row: row.name)
def test_no_step_makes_the_host_wait(row):
    setup = Setup(row, device=torch.device("cuda"), ema_decay=0.9, micro_steps=2)
    for _ in range(2):
        setup.trainer.train_step(setup.batches, lambda update: 0.1, now=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            setup.trainer.train_step(setup.batches, lambda update: 0.1, now=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
