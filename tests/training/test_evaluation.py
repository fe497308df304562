"""Counting against plain numpy."""

import csv

import numpy as np
import pytest
import torch

from utils.training import evaluation
from utils.training.evaluation import EvalReport, Tally, write_confusion

CPU = torch.device("cpu")


def scores(images: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    return torch.randn(images, classes, generator=generator) * 3, torch.randint(classes, (images,), generator=generator)


def counted(logits, targets, cuts=(), confusion=False) -> EvalReport:
    tally = Tally(logits.shape[1], CPU, confusion)
    for part, labels in zip(logits.tensor_split(list(cuts)), targets.tensor_split(list(cuts))):
        tally.add(part, labels)
    return tally.report()


def softmax(logits: torch.Tensor) -> np.ndarray:
    x = logits.double().numpy()
    x = np.exp(x - x.max(axis=1, keepdims=True))
    return x / x.sum(axis=1, keepdims=True)


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Guo et al., equations 1 to 3 with M = 15, bin after bin."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    error = 0.0
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 6, 100])
def test_against_numpy(classes):
    logits, targets = scores(77, classes)
    got = counted(logits, targets, (10, 11, 50), confusion=True)
    x, labels, probabilities = logits.double().numpy(), targets.numpy(), softmax(logits)
    ranks = (x > x[np.arange(77), labels][:, None]).sum(axis=1)           # how many classes score above the true one
    true = probabilities[np.arange(77), labels]
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (labels, x.argmax(axis=1)), 1)
    assert got.images == 77
    assert got.top == tuple((ranks < k).sum() / 77 for k in range(1, 6))
    assert (got.top1, got.top5) == (got.top[0], got.top[4])
    assert got.loss == pytest.approx(-np.log(true).mean(), abs=1e-6)
    assert got.true_probability == pytest.approx(true.mean(), abs=1e-6)
    assert got.calibration_error == pytest.approx(expected_calibration_error(probabilities, labels), abs=1e-6)
    assert got.confusion.dtype == torch.int64 and np.array_equal(got.confusion.numpy(), confusion)
    assert got.top[min(classes, 5) - 1:] == (1.0,) * (6 - min(classes, 5)) or classes > 5
    if classes > 5:
        assert got.top1 < got.top5 < 1


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_calibration_error_of_many_images(temperature):
    """Labels drawn from the softmax: calibrated at temperature 1 and at no other."""
    logits, _ = scores(4000, 4)
    labels = torch.multinomial(torch.softmax(logits, 1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    got = counted(logits / temperature, labels, range(100, 4000, 100)).calibration_error
    assert got == pytest.approx(expected_calibration_error(softmax(logits / temperature), labels.numpy()), abs=1e-6)
    assert (got < 0.03) == (temperature == 1)


def test_full_confidence_is_in_the_last_bin():
    """Right at 0.95 and wrong at 1: both are the bin's from 14/15 on."""
    got = counted(torch.tensor([[0.95, 0.05], [1.0, 0.0]]).log(), torch.tensor([0, 1])).calibration_error
    assert got == pytest.approx(abs(1 - 1.95) / 2, abs=1e-6)


def test_batches_do_not_matter():
    logits, targets = scores(60, 10)
    whole, parts = counted(logits, targets, (), True), counted(logits, targets, range(1, 60), True)
    assert (whole.images, whole.top) == (parts.images, parts.top)
    assert torch.equal(whole.confusion, parts.confusion)
    for name in ("loss", "true_probability", "calibration_error"):
        assert getattr(whole, name) == pytest.approx(getattr(parts, name), rel=1e-6)


def test_ranks_are_added_up(monkeypatch):
    logits, targets = scores(60, 10)
    whole, tallies = counted(logits, targets, (20,), True), [Tally(10, CPU, confusion=True) for _ in range(2)]
    for tally, own in zip(tallies, (slice(0, 20), slice(20, 60))):
        tally.add(logits[own], targets[own])
    sent = []
    monkeypatch.setattr(evaluation, "all_reduce_sum", lambda tensor: sent.append(tensor.clone()) or tensor)
    tallies[1].report()
    others = iter(sent.copy())
    monkeypatch.setattr(evaluation, "all_reduce_sum", lambda tensor: tensor.add_(next(others)))
    for _ in range(2):
        got = tallies[0].report()
        assert (got.images, got.top, got.true_probability) == (60, whole.top, pytest.approx(whole.true_probability, rel=1e-12))
        assert (got.loss, got.calibration_error) == pytest.approx((whole.loss, whole.calibration_error), rel=1e-12)
        assert torch.equal(got.confusion, whole.confusion)
        others = iter(sent)             # the sums did not go into what was counted


def test_half_precision_logits_are_scored_in_float32():
    logits, targets = scores(60, 10)
    half = logits.half()
    assert counted(half, targets) == counted(half.float(), targets)


def test_logits_that_are_not_numbers_are_reported_as_such():
    logits, targets = scores(20, 10)
    logits[3] = float("nan")
    got = counted(logits, targets)
    assert got.images == 20 and np.isnan([got.loss, got.true_probability, got.calibration_error]).all()


def test_reporting_twice_gives_the_same():
    logits, targets = scores(20, 4)
    tally = Tally(4, CPU)
    tally.add(logits, targets)
    assert tally.report() == tally.report() and tally.report().confusion is None


def test_write_confusion(tmp_path):
    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 5]])
    files = write_confusion(tmp_path, confusion, ["cat", "a, b", 'the "dog"'])
    assert files == [tmp_path / "confusion.csv", tmp_path / "per_class.csv"]
    matrix, per_class = (list(csv.reader(file.open(newline=""))) for file in files)
    assert matrix == [["true \\ predicted", "cat", "a, b", 'the "dog"'],
                      ["cat", "3", "1", "0"], ["a, b", "0", "0", "0"], ['the "dog"', "2", "0", "5"]]
    assert per_class == [["class", "images", "accuracy"], ["cat", "4", "0.7500"], ["a, b", "0", ""], ['the "dog"', "7", "0.7143"]]
