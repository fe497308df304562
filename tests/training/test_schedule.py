"""The learning rate against the values that the ViT-pytorch scripts, MAE and timm produce (fixtures/train)."""

import math
from pathlib import Path

import numpy as np
import pytest

from utils.training.schedule import factor, is_time

FIXTURES = Path(__file__).parents[1] / "fixtures" / "train"
TAGS = [(decay, *rest) for decay in ("cosine", "linear") for rest in ((500, 10_000, 0.03), (10, 100, 0.03), (0, 50, 0.01))]


@pytest.mark.parametrize(("decay", "warmup", "total", "peak"), TAGS)
def test_every_update_has_the_rate_of_the_reference(decay, warmup, total, peak):
    with np.load(FIXTURES / "train.npz") as file:
        updates, expected = (file[f"lr/jeon_{decay}_w{warmup}_T{total}/{part}"] for part in ("update", "lr"))
    assert updates[0] == 1 and updates[-1] == total
    got = [peak * factor(int(update), warmup, total, decay) for update in updates]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("decay", "warmup", "total", "peak"), TAGS)
def test_without_floor_and_start_not_a_bit_changes(decay, warmup, total, peak):
    """The formula that runs begun with earlier versions followed; a resumed run must go on as it began."""
    for update in range(1, total + 1):
        if update < warmup:
            expected = update / warmup
        else:
            progress = (update - warmup) / max(1, total - warmup)
            expected = max(0.0, 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1 - progress)
        assert factor(update, warmup, total, decay) == expected


def test_floor_is_mae_s():
    """Its scripts set the rate at fractions of an epoch: an update may be one."""
    with np.load(FIXTURES / "fine_tuning.npz") as file:
        epochs, expected, (peak, smallest, warmup, total) = (file[f"lr/mae_{part}"] for part in ("epochs", "lr", "args"))
    got = [peak * factor(epoch, warmup, total, "cosine", floor=smallest / peak) for epoch in epochs]
    assert len(got) == 200
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (5, 35)])
def test_start_and_floor_are_timm_s(warmup, total):
    with np.load(FIXTURES / "fine_tuning.npz") as file:
        expected = file[f"lr/timm_cosine_w{warmup}_T{total}"]
    got = [1e-3 * factor(epoch, warmup, total, "cosine", floor=1e-3, start=1e-3) for epoch in range(total + 1)]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (5, 5), (3, 10)])
@pytest.mark.parametrize(("floor", "start"), [(0, 0), (0.1, 0.25)])
def test_peak_and_end(decay, warmup, total, floor, start):
    rates = [factor(update, warmup, total, decay, floor=floor, start=start) for update in range(1, total + 1)]
    assert all(floor <= rate <= 1 for rate in rates)
    assert rates[-1] == (1 if warmup == total else floor)
    if warmup:
        assert max(rates) == rates[warmup - 1] == 1
        assert rates[:warmup] == pytest.approx([start + (1 - start) * update / warmup for update in range(1, warmup + 1)])


def test_linear_with_a_floor():
    rates = [factor(update, 2, 10, "linear", floor=0.2) for update in range(1, 11)]
    assert rates == pytest.approx([0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])


def test_steps_are_bit_s():
    """BiT-HyperRule for less than 20,000 images (bit_hyperrule.py): a tenth for each milestone that is below the step"""
    milestones = [200, 300, 400]
    rates = {update: factor(update, 100, 500, "step", milestones=milestones)
             for update in (1, 50, 99, 100, 101, 200, 201, 300, 301, 400, 401, 500)}
    assert rates == pytest.approx({1: 0.01, 50: 0.5, 99: 0.99, 100: 1, 101: 1, 200: 1, 201: 0.1, 300: 0.1, 301: 0.01,
                                   400: 0.01, 401: 0.001, 500: 0.001}, rel=1e-12)
    assert factor(450, 100, 500, "step", milestones=milestones, floor=0.5) == pytest.approx(0.5005)


def test_milestones_without_steps_are_a_mistake():
    with pytest.raises(AssertionError):
        factor(3, 0, 5, "cosine", milestones=(2,))


def test_unknown_decay():
    with pytest.raises(ValueError, match="cosine, linear, step or constant"):
        factor(3, 0, 5, "exponential")


@pytest.mark.parametrize(("every", "total", "expected"), [
    (3, 10, [3, 6, 9, 10]), (5, 10, [5, 10]), (1, 3, [1, 2, 3]), (100, 4, [4]), (4, 4, [4])])
def test_is_time(every, total, expected):
    assert [step for step in range(1, total + 1) if is_time(step, every, total)] == expected
