"""Optimizers by name, against their formulas."""

import pytest
import torch
from torch import nn

from utils.optim import build_optimizer, set_learning_rate


def trajectory(name: str, rates: list[float], weight_decay: float) -> tuple[list[float], list[float]]:
    """-> the weight after each step on gradients 1, 2, ..., and those gradients"""
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = build_optimizer(name, [weight], 123.0, weight_decay)
    weights, gradients = [], []
    for number, rate in enumerate(rates, start=1):
        weight.grad = torch.tensor([float(number)], dtype=torch.float64)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        weights.append(weight.item())
        gradients.append(float(number))
    return weights, gradients


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd(decay):
    """momentum 0.9 without Nesterov, decay inside the gradient, the momentum not scaled by the rate"""
    rates = [0.1, 0.2, 0.05]
    weights, gradients = trajectory("sgd", rates, decay)
    weight, momentum, expected = 2.0, 0.0, []
    for rate, gradient in zip(rates, gradients):
        momentum = 0.9 * momentum + gradient + decay * weight
        weight -= rate * momentum
        expected.append(weight)
    assert weights == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw(decay):
    """betas 0.9 and 0.999, eps 1e-8, decay outside the moments"""
    rates = [0.1, 0.2, 0.05]
    weights, gradients = trajectory("adamw", rates, decay)
    weight, first, second, expected = 2.0, 0.0, 0.0, []
    for step, (rate, gradient) in enumerate(zip(rates, gradients), start=1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient ** 2
        weight *= 1 - rate * decay
        weight -= rate * (first / (1 - 0.9 ** step)) / ((second / (1 - 0.999 ** step)) ** 0.5 + 1e-8)
        expected.append(weight)
    assert weights == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_every_parameter_is_optimised_and_has_the_rate(name):
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    optimizer = build_optimizer(name, model.parameters(), 0.5, 0.0)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


def test_unknown_name():
    with pytest.raises(ValueError, match="'adam': sgd or adamw"):
        build_optimizer("adam", [nn.Parameter(torch.zeros(1))], 0.1, 0.0)
