"""Several processes train like one, and are resumed bit for bit."""

import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Ranks
from torch import nn

from configs import architecture
from models import create_model, record_patch_logits
from utils import distributed
from utils.attention.edit_transform import transform_with_edits
from utils.attention.edits import Edit
from utils.data import loader as data
from utils.data.datasets import digits
from utils.data.mixup import Mixer
from utils.data.sampler import StepSampler
from utils.data.transforms import normalize, train_transform
from utils.training import trainer as engine
from utils.training.criterion import AttentionSupervision, Criterion
from utils.training.ema import Ema
from utils.training.exact import ExactReducer
from utils.training.optimizer import build_optimizer
from utils.training.precision import FP32, LEVELS, LossScaler, warm_up

CPU = torch.device("cpu")
ONE_RANK = distributed.Ranks(0, 1, 0, 1, CPU)
STEPS = 20

# -------------------------------------------------------------------------------- the work of each of two ranks


def to_input(images):
    return normalize(images, (0.5,) * 3, (0.5,) * 3)


def network(dropout=0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 10))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def half_frozen_with_two_heads() -> nn.Module:
    """Return a DeiT whose embeddings and first block are not trained"""
    torch.manual_seed(0)
    model = create_model(architecture(4, 16, 32, 2, 2, img_size=8, distilled=True), 10)
    model.distilling = True
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.layer_index(name) > 1)
    return model


def make_trainer(model, wrapped, ranks, row, micro_steps, optimizer=None, criterion=None, rate=0.1, non_finite="stop",
                 **more) -> engine.Trainer:
    settings = engine.StepSettings(32, micro_steps, 1.0, 1, lambda update: rate, non_finite)
    return engine.Trainer(wrapped, optimizer or build_optimizer("sgd", model.parameters(), rate), criterion or Criterion(),
                          LossScaler(row, CPU), row, ranks, to_input, settings, **more)


PLAIN = train_transform("crop", (8, 8))
EVERYTHING = train_transform("crop_flip", (8, 8), crop_scale=0.5, rotation=15.0, color_jitter=0.3, randaugment_ops=2,
                             random_erasing=0.7)


def mixer() -> Mixer:
    return Mixer(10, 32, 7, mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.8, stop_at=STEPS - 3)


def order_of(ranks, micro_steps, start=0) -> StepSampler:
    """Return this rank's part of 20 steps of 32 digits each"""
    return StepSampler(len(digits("").train), 32, micro_steps * ranks.size, ranks.rank, ranks.size, 5, start, STEPS)


def batches(ranks, micro_steps, transform=PLAIN, start=0, **more):
    return iter(data.train_loader(digits("").train, order_of(ranks, micro_steps, start), transform=transform, seed=5,
                                  num_workers=0, pin_memory=False, **more))


def teacher(images):
    weight = torch.randn(192, 10, generator=torch.Generator().manual_seed(3)) / 50
    return images.float().flatten(1) @ weight


def trained(ranks, row=FP32, micro_steps=1, dropout=0.0, everything=False, model=None) -> dict:
    """Train a model. everything: with augmented and mixed images, smoothed labels and class weights, a teacher, and an average of
    the weights"""
    model, more = model or network(dropout), {}
    own = batches(ranks, micro_steps, EVERYTHING if everything else PLAIN)
    if everything:
        criterion = Criterion(0.1, torch.linspace(0.5, 2, 10), mixer(), "soft", teacher, 0.3, 2.0)
        more = {"criterion": criterion, "ema": Ema(model, 0.8)}
    trainer = make_trainer(model, distributed.wrap(model, ranks, row.half_gradients), ranks, row, micro_steps, **more)
    reports = [trainer.train_step(own)[0] for _ in range(STEPS)]
    models = {"weights": model} | ({"average": more["ema"].model} if more else {})
    return {"losses": [report.loss for report in reports], "norms": [report.grad_norm for report in reports],
            "accuracies": [report.accuracy for report in reports],
            **{name: flat(each) for name, each in models.items()}}


def trained_on_edits(ranks, micro_steps=1) -> dict:
    """Train on cropped and mirrored images, of which every seventh has an edit: some steps have few, some micro-batches none."""
    torch.manual_seed(0)
    model = create_model(architecture(2, 16, 32, 2, 2, img_size=8), 10, sigmoid_attention="all")
    generator = np.random.default_rng(0)
    edits = {index: Edit("", "", generator.random((4, 4), np.float32), generator.random((4, 4)) < 0.7)
             for index in range(0, 1097, 7)}
    order = order_of(ranks, micro_steps)
    attention = AttentionSupervision(20.0, lambda: record_patch_logits(model),
                                     lambda step: sum(key.index in edits for key in order.samples_of(step)))
    own = batches(ranks, micro_steps, train_transform("crop_flip", (8, 8), crop_scale=0.5),
                  edit_transform=partial(transform_with_edits, edits, (4, 4)))
    trainer = make_trainer(model, distributed.wrap(model, ranks), ranks, FP32, micro_steps,
                           criterion=Criterion(attention=attention))
    reports = [trainer.train_step(own)[0] for _ in range(STEPS)]
    return {"losses": [report.loss for report in reports], "attention": [report.attention_loss for report in reports],
            "weights": flat(model)}


def times_sent(ranks, micro_steps: int) -> int:
    """Return how often one step sends gradients"""
    model, sent = network(), []
    wrapped = distributed.wrap(model, ranks)

    def count(_, bucket):
        sent.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, count)
    make_trainer(model, wrapped, ranks, FP32, micro_steps).train_step(batches(ranks, micro_steps))
    return len(sent)


def skipping(ranks, exact: bool) -> dict:
    """Train with a gradient of NaN on rank 1 in steps 2 and 3, and an infinite loss in step 5 of 6; all three are skipped."""
    model, reports = network(), []
    trainer = make_trainer(model, model if exact else distributed.wrap(model, ranks), ranks, FP32, 1, non_finite="skip",
                           reducer=ExactReducer(model, ranks) if exact else None, ema=Ema(model, 0.5),
                           requests=lambda: (ranks.rank, 1))

    def spoil(gradient):
        return gradient * float("nan") if ranks.rank == 1 and trainer.step in (1, 2) else gradient

    def prepare(images):
        return to_input(images) * (1e38 if ranks.rank == 1 and trainer.step == 4 else 1)

    model[1].weight.register_hook(spoil)
    trainer.normalize, own = prepare, batches(ranks, 1)
    weights = []
    for _ in range(6):
        reports.append(trainer.train_step(own)[0])
        weights.append(torch.cat([flat(model), flat(trainer.ema.model)]))
    return {"skipped": [report.skipped for report in reports], "requests": [tuple(report.requests) for report in reports],
            "counts": tuple(trainer.progress), "weights": torch.stack(weights)}


def scenarios(ranks: distributed.Ranks) -> dict:
    return {
        "plain": trained(ranks),
        "dropout": trained(ranks, dropout=0.5),
        "everything": trained(ranks, dropout=0.5, everything=True),
        "two heads": trained(ranks, micro_steps=2, everything=True, model=half_frozen_with_two_heads()),
        "edits": trained_on_edits(ranks, micro_steps=2),
        "O1": trained(ranks, LEVELS["O1"]),
        "O2": trained(ranks, LEVELS["O2"]),
        "skips": skipping(ranks, exact=False),
        "exact skips": skipping(ranks, exact=True),
        "sent": [times_sent(ranks, 1), times_sent(ranks, 4)],
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """Return the results of the two ranks"""
    folder = tmp_path_factory.mktemp("ranks")
    with Ranks(2, scenarios, folder) as both:
        return both.results()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------------- two processes

def check_both_trained_as(single: dict, ranks: list[dict], what: str) -> None:
    for each in ranks:
        for name, expected in single.items():
            if name == "accuracies":
                assert each[what][name] == expected
            elif isinstance(expected, list):
                assert each[what][name] == pytest.approx(expected, rel=1e-5), name
            else:
                torch.testing.assert_close(each[what][name], expected, rtol=0, atol=1e-5)
    assert ranks[0][what]["losses"] == ranks[1][what]["losses"]
    assert torch.equal(ranks[0][what]["weights"], ranks[1][what]["weights"])


@pytest.mark.slow
@pytest.mark.parametrize(("what", "micro_steps", "dropout"), [
    ("plain", 1, 0.0), ("plain", 2, 0.0), ("dropout", 2, 0.5), ("everything", 2, 0.5)],
    ids=["as one batch", "as two micro-batches", "as two micro-batches with dropout",
         "with dropout, augmented and mixed images, a teacher, an average"])
def test_two_processes_train_like_one(ranks, what, micro_steps, dropout):
    single = trained(ONE_RANK, micro_steps=micro_steps, dropout=dropout, everything=what == "everything")
    check_both_trained_as(single, ranks, what)
    distance = (single["weights"] - flat(network())).norm()
    assert (ranks[0][what]["weights"] - single["weights"]).norm() < 1e-5 * distance


@pytest.mark.slow
def test_two_processes_train_two_heads_and_half_a_model_like_one(ranks):
    start = half_frozen_with_two_heads()
    frozen = torch.cat([torch.full((parameter.numel(),), not parameter.requires_grad) for parameter in start.parameters()])
    expected = trained(ONE_RANK, micro_steps=2, everything=True, model=half_frozen_with_two_heads())
    check_both_trained_as(expected, ranks, "two heads")
    for name in ("weights", "average"):
        changed = ranks[0]["two heads"][name] != flat(start)
        assert not changed[frozen].any() and changed[~frozen].float().mean() > 0.99


@pytest.mark.slow
def test_two_processes_learn_edits_like_one(ranks):
    single = trained_on_edits(ONE_RANK)
    assert single["attention"][-1] < single["attention"][0]
    check_both_trained_as(single, ranks, "edits")


@pytest.mark.slow
def test_half_gradients_are_only_sent_at_O2(ranks):
    """They are rounded twice, so the weights differ a little from O1's; on one process nothing is sent."""
    first, second = ranks[0]["O1"]["weights"], ranks[0]["O2"]["weights"]
    distance = (first - flat(network())).norm()
    assert 0 < (first - second).norm() < 0.02 * distance
    assert torch.equal(second, ranks[1]["O2"]["weights"])
    assert ranks[0]["O2"]["losses"] == pytest.approx(ranks[0]["O1"]["losses"], rel=0.01)
    assert torch.equal(trained(ONE_RANK, LEVELS["O1"])["weights"], trained(ONE_RANK, LEVELS["O2"])["weights"])


@pytest.mark.slow
def test_gradients_are_sent_once_per_step(ranks):
    assert all(each["sent"] == [1, 1] for each in ranks)


@pytest.mark.slow
@pytest.mark.contract("P11", "a loss or gradient that is not finite on one process is skipped on all")
def test_one_process_that_is_not_finite_skips_the_update_of_all(ranks, figure):
    for kind in ("skips", "exact skips"):
        for each in ranks:
            got = each[kind]
            assert got["skipped"] == [False, True, True, False, True, False] and got["counts"] == (6, 3, 0)
            assert got["requests"] == [(1.0, 2.0, 0.0)] * 6 and got["weights"].isfinite().all()
            assert [bool((after != before).any()) for before, after in zip(got["weights"], got["weights"][1:])] == [
                False, False, True, False, True]
        assert torch.equal(ranks[0][kind]["weights"], ranks[1][kind]["weights"])
    figure("steps with NaN or infinity on one of two processes", 6)


# ----------------------------------------------------------------------- restarts, bit for bit


def part_of_a_run(ranks, steps: int, file: Path, killed: bool = False) -> dict:
    """Resume from `file` if it exists, train some steps, save to it, and die if `killed`"""
    model = half_frozen_with_two_heads()
    optimizer, done = build_optimizer("adamw", model.parameters(), 1e-3), 0
    if file.exists():
        state = torch.load(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    wrapped = distributed.wrap(model, ranks)
    warm_up(wrapped, torch.zeros(2, 3, 8, 8), FP32)
    criterion = Criterion(0.1, None, mixer(), "soft", teacher, 0.3, 2.0)
    trainer = make_trainer(model, wrapped, ranks, FP32, 2, optimizer, criterion, 1e-3, progress=engine.Progress(done, done))
    own = batches(ranks, 2, start=done)
    for _ in range(steps):
        trainer.train_step(own)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": trainer.step}
    if ranks.is_main:
        torch.save(state, file)
    if killed:
        torch.distributed.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    return state


@pytest.mark.slow
@pytest.mark.contract("P3", "a run on several processes that is killed and resumed is, bit for bit, the run that was not")
def test_a_run_on_many_processes_is_resumed_bit_for_bit(tmp_path, tries, figure):
    """From three ranks on, the order of the sum changes bits; it must be the same in every launch."""
    kills = 0
    for size, cuts in [(4, (3, 3)), (8, (1, 5)), (4, (1, 1, 4)), (8, (4, 2))][:tries(1, 4)]:
        with Ranks(size, lambda ranks: part_of_a_run(ranks, 6, tmp_path / "whole"), tmp_path) as several:
            whole = several.results()[0]
        for number, steps in enumerate(cuts, 1):
            killed = number < len(cuts)
            with Ranks(size, lambda ranks, steps=steps, killed=killed: part_of_a_run(ranks, steps, tmp_path / "parts", killed),
                       tmp_path) as several:
                assert several.wait() == [-9 if killed else 0] * size
                kills += killed
        parts = torch.load(tmp_path / "parts")
        assert parts["step"] == whole["step"] == 6
        for name, weight in whole["model"].items():
            assert torch.equal(parts["model"][name], weight), name
        assert str(parts["optimizer"]) == str(whole["optimizer"])
        (tmp_path / "whole").unlink()
        (tmp_path / "parts").unlink()
    figure("kills of runs on four and eight processes", kills)
