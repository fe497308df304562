"""Counting against plain numpy."""

import csv

import numpy as np
import pytest
import torch

from utils.metrics import EvalReport, Tally, write_confusion

CPU = torch.device("cpu")


def scores(images: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    return torch.randn(images, classes, generator=generator) * 3, torch.randint(classes, (images,), generator=generator)


def counted(logits, targets, cuts=(), confusion=False) -> EvalReport:
    tally = Tally(logits.shape[1], CPU, confusion)
    for part, labels in zip(logits.tensor_split(list(cuts)), targets.tensor_split(list(cuts))):
        tally.add(part, labels)
    return tally.report()


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 6, 100])
def test_against_numpy(classes):
    logits, targets = scores(77, classes)
    got = counted(logits, targets, (10, 11, 50), confusion=True)
    x, labels = logits.double().numpy(), targets.numpy()
    ranks = (x > x[np.arange(77), labels][:, None]).sum(axis=1)           # how many classes score above the true one
    losses = np.log(np.exp(x - x.max(axis=1, keepdims=True)).sum(axis=1)) + x.max(axis=1) - x[np.arange(77), labels]
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (labels, x.argmax(axis=1)), 1)
    assert got.images == 77
    assert got.top1 == (ranks == 0).sum() / 77
    assert got.top5 == (ranks < 5).sum() / 77
    assert got.loss == pytest.approx(losses.mean(), abs=1e-6)
    assert got.confusion.dtype == torch.int64 and np.array_equal(got.confusion.numpy(), confusion)
    if classes <= 5:
        assert got.top5 == 1
    if classes > 5:
        assert got.top1 < got.top5 < 1


def test_batches_do_not_matter():
    logits, targets = scores(60, 10)
    whole, parts = counted(logits, targets, (), True), counted(logits, targets, range(1, 60), True)
    assert (whole.images, whole.top1, whole.top5) == (parts.images, parts.top1, parts.top5)
    assert torch.equal(whole.confusion, parts.confusion)
    assert whole.loss == pytest.approx(parts.loss, rel=1e-6)


def test_half_precision_logits_are_scored_in_float32():
    logits, targets = scores(60, 10)
    half = logits.half()
    assert counted(half, targets).loss == counted(half.float(), targets).loss


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
