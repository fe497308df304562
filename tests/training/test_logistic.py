"""Logistic regression on features: the minimum, what it does not depend on, and scikit-learn's result."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from utils.training.logistic import PENALTY, fit


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    """Features (60, 5) of three classes that overlap, and targets."""
    draws = np.random.default_rng(0)
    targets = np.arange(60) % 3
    return draws.normal(size=(60, 5)) * [1, 2, 3, 0.1, 1] + 7 + targets[:, None] * [1, 0, -1, 0, 0.5], targets


def objective(features, targets, weight, bias, weights=None, penalty=PENALTY) -> float:
    features, weight, bias = (torch.as_tensor(array) for array in (features, weight, bias))
    scale = (features - features.mean(0)).square().mean().sqrt()
    losses = F.cross_entropy(features @ weight.T + bias, torch.as_tensor(targets), reduction="none")
    share = torch.full((len(losses),), 1 / len(losses)) if weights is None else torch.as_tensor(weights / weights.sum())
    return ((losses * share).sum() + penalty / (2 * len(losses)) * (weight * scale).square().sum()).item()


@pytest.mark.parametrize("weights", [None, np.linspace(0.1, 3, 60)], ids=["alike", "weighed"])
def test_it_is_the_minimum(blobs, weights):
    weight, bias = fit(*blobs, 3, weights)
    lowest, draws = objective(*blobs, weight, bias, weights), np.random.default_rng(1)
    for size in (1e-3, 0.1):
        for _ in range(20):
            other = weight + size * draws.normal(size=weight.shape), bias + size * draws.normal(size=bias.shape)
            assert objective(*blobs, *other, weights) > lowest


def test_order_scale_and_offset_of_features_change_nothing(blobs):
    features, targets = blobs
    order = np.random.default_rng(2).permutation(60)
    logits = [inputs @ weight.T + bias for inputs, (weight, bias) in (
        (features, fit(features, targets, 3)), (features, fit(features[order], targets[order], 3)),
        (1e3 * features - 5e4, fit(1e3 * features - 5e4, targets, 3)))]
    assert np.allclose(logits[0], logits[1], atol=1e-4) and np.allclose(logits[0], logits[2], atol=1e-4)


def test_images_that_are_easy_to_tell_apart_or_all_alike_give_a_finite_head():
    apart = np.array([[0.0], [1.0]]).repeat(5, axis=0)
    weight, bias = fit(apart, np.arange(10) // 5, 2)
    assert 0 < weight[1, 0] - weight[0, 0] < 10 and (((apart @ weight.T + bias).argmax(1)) == np.arange(10) // 5).all()
    weight, bias = fit(np.ones((4, 3)), np.array([0, 1, 1, 1]), 2)
    probabilities = torch.tensor(np.ones(3) @ weight.T + bias).softmax(0)
    assert torch.allclose(probabilities, torch.tensor([0.25, 0.75], dtype=torch.float64), atol=1e-3)        # their frequencies


@pytest.mark.reference
def test_as_scikit_learn(blobs):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, targets = blobs
    inputs = (features - features.mean(0)) / (features - features.mean(0)).std()
    other = linear_model.LogisticRegression(C=1 / PENALTY, tol=1e-8, max_iter=1000).fit(inputs, targets)
    weight, bias = fit(features, targets, 3)
    ours = torch.as_tensor(features @ weight.T + bias).softmax(1).numpy()
    assert np.abs(ours - other.predict_proba(inputs)).max() < 1e-4
