"""Metrics compared with plain numpy, and how an evaluation runs the model."""

import copy
import csv

import numpy as np
import pytest
import torch
from torch import nn

from tests.reference_door import to_input
from utils import distributed
from utils.data import loader as data
from utils.data.datasets import digits
from utils.data.transforms import eval_transform
from utils.files import read_csv_table
from utils.training import evaluation
from utils.training.evaluation import ClassificationMetrics, EvalMetrics, write_confusion
from utils.training.precision import BF16, FP32, LEVELS
from utils.training.task import SINGLE_LABEL

CPU = torch.device("cpu")


def scores(images: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    return torch.randn(images, classes, generator=generator) * 3, torch.randint(classes, (images,), generator=generator)


def counted(logits, targets, cuts=(), confusion=False) -> EvalMetrics:
    counts = ClassificationMetrics(logits.shape[1], CPU, confusion)
    for part, labels in zip(logits.tensor_split(list(cuts)), targets.tensor_split(list(cuts))):
        counts.update(part, labels)
    return counts.compute()


def softmax(logits: torch.Tensor) -> np.ndarray:
    x = logits.double().numpy()
    x = np.exp(x - x.max(axis=1, keepdims=True))
    return x / x.sum(axis=1, keepdims=True)


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the error by equations 1 to 3 of Guo et al. with M = 15, bin by bin."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    error = 0.0
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


@pytest.mark.parametrize("classes", [1, 2, 5, 6, 100])
def test_metrics_equal_those_of_numpy(classes):
    logits, targets = scores(77, classes)
    got = counted(logits, targets, (10, 11, 50), confusion=True)
    x, labels, probabilities = logits.double().numpy(), targets.numpy(), softmax(logits)
    ranks = (x > x[np.arange(77), labels][:, None]).sum(axis=1)           # how many classes score above the true one
    true = probabilities[np.arange(77), labels]
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (labels, x.argmax(axis=1)), 1)
    assert got.images == 77
    assert got.top == tuple((ranks < k).sum() / 77 for k in range(1, 6))
    assert (got.accuracy, got.top5) == (got.top[0], got.top[4])
    assert list(got.as_dict()) == ["images", "loss", "accuracy", "top2", "top3", "top4", "top5", "true_probability",
                                   "calibration_error", "predicted_class", "predicted_share"]
    often = np.bincount(x.argmax(axis=1), minlength=classes)
    assert (got.predicted_class, got.predicted_share) == (often.argmax(), often.max() / 77)
    assert got.loss == pytest.approx(-np.log(true).mean(), abs=1e-6)
    assert got.true_probability == pytest.approx(true.mean(), abs=1e-6)
    assert got.calibration_error == pytest.approx(expected_calibration_error(probabilities, labels), abs=1e-6)
    assert got.confusion.dtype == torch.int64 and np.array_equal(got.confusion.numpy(), confusion)
    assert got.top[min(classes, 5) - 1:] == (1.0,) * (6 - min(classes, 5)) or classes > 5
    if classes > 5:
        assert got.accuracy < got.top5 < 1


def test_full_confidence_is_in_the_last_bin():
    """Right at 0.95 and wrong at 1: both belong to the bin above 14/15."""
    got = counted(torch.tensor([[0.95, 0.05], [1.0, 0.0]]).log(), torch.tensor([0, 1])).calibration_error
    assert got == pytest.approx(abs(1 - 1.95) / 2, abs=1e-6)


def test_logits_are_scored_in_float32_and_nan_is_reported_as_such():
    logits, targets = scores(60, 10)
    half = logits.half()
    assert counted(half, targets) == counted(half.float(), targets)
    logits[3] = float("nan")
    got = counted(logits, targets)
    assert got.images == 60 and np.isnan([got.loss, got.true_probability, got.calibration_error]).all()


# ---------------------------------------------------------------------------------------------------- evaluate


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 10))


def evaluate(model, batch_size=32, row=FP32, **options) -> EvalMetrics | None:
    loader = data.eval_loader(digits("").val, transform=eval_transform((8, 8)), batch_size=batch_size, rank=0, world_size=1,
                              num_workers=0, pin_memory=False)
    ranks = distributed.Ranks(0, 1, 0, 1, CPU)
    return evaluation.evaluate(model, loader, to_input, row, ranks, 10, metrics=SINGLE_LABEL.metrics, **options)


@pytest.mark.parametrize("batch_size", [1, 32, 500])
def test_every_image_is_evaluated_once(batch_size):
    model, split = network(), digits("").val
    images = torch.stack([torch.from_numpy(np.array(split[index][0])).permute(2, 0, 1) for index in range(200)])
    with torch.no_grad():
        expected = counted(copy.deepcopy(model).eval()(to_input(images)), torch.tensor(split.targets[:200]), (), True)
    got = evaluate(model, batch_size, confusion=True)
    assert (got.images, got.top) == (200, expected.top) and torch.equal(got.confusion, expected.confusion)
    assert list(got.as_dict().values()) == pytest.approx(list(expected.as_dict().values()), rel=1e-5)


def test_an_evaluation_can_be_stopped():
    model, calls = network(), []
    model.register_forward_hook(lambda *_: calls.append(0))
    assert evaluate(model, stop_requested=lambda: len(calls) == 3) is None
    assert len(calls) == 3 and model.training


def test_an_image_and_its_mirror_image_count_as_one():
    """The result does not depend on which of the two is given. Metrics use the mean of the probabilities."""
    class Mirrored(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(images.flip(-1))

    class Mean(Mirrored):
        def forward(self, images):
            return ((self.model(images).softmax(1) + self.model(images.flip(-1)).softmax(1)) / 2).log()

    model = network()
    both, plain = evaluate(model, flipped=True).as_dict(), evaluate(model).as_dict()
    assert both == pytest.approx(evaluate(Mean(model)).as_dict(), rel=1e-5)
    assert both == pytest.approx(evaluate(Mirrored(model), flipped=True).as_dict(), rel=1e-5) and both["loss"] != plain["loss"]


def test_batches_of_a_compiled_model_have_one_size():
    model, sizes, compiled = network(), [], []
    expected = evaluate(model)
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    assert evaluate(model, on_compiled=lambda images, seconds: compiled.append(images)) == expected
    assert set(sizes) == {32} and compiled == [32]


def test_a_padded_batch_has_the_size_of_the_others_and_changes_no_metric():
    model, sizes = network(), []
    expected = evaluate(model)
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    filled = evaluate(model, filled=True)
    assert set(sizes) == {32} and filled.images == 200 and filled.top == expected.top
    assert filled.loss == pytest.approx(expected.loss, rel=1e-6)


def test_predictions_of_each_image_are_returned_on_request():
    model = network()
    metrics = evaluate(model, confusion=True, answers=True)
    index, true, predicted, probability, loss = metrics.answers
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion.index_put_((true.long(), predicted.long()), torch.tensor(1), accumulate=True)
    assert torch.equal(confusion, metrics.confusion) and index.tolist() == list(range(200)) and evaluate(model).answers is None
    assert loss.mean().item() == pytest.approx(metrics.loss, abs=1e-6) and probability.min() > 0.1
    assert "answers" not in metrics.as_dict()


def test_the_order_of_equal_logits_does_not_depend_on_top_k():
    """Logits in bfloat16 are often equal. The first one is the class that evaluation counts."""
    logits = torch.randint(0, 3, (50, 12), generator=torch.Generator().manual_seed(0)).float()
    every = evaluation.ranked(logits, 12)
    values = logits.gather(1, every)
    assert (values.diff(dim=1) <= 0).all() and torch.equal(every.sort(dim=1).values, torch.arange(12).expand(50, -1))
    for count in range(1, 12):
        assert torch.equal(evaluation.ranked(logits, count), every[:, :count])
    assert torch.equal(evaluation.ranked(logits, 1)[:, 0], logits.topk(5).indices[:, 0])
    assert evaluation.ranked(logits[:, :3], 5).shape == (50, 3)


@pytest.mark.parametrize(("row", "training"), [(LEVELS["O1"], True), (BF16, False)], ids=str)
def test_evaluation_computes_in_the_precision_and_does_not_change_the_model(row, training):
    model, seen = network().train(training), []
    before = [parameter.clone() for parameter in model.parameters()]
    model[4].register_forward_hook(lambda module, inputs, output: seen.append((output.dtype, module.training)))
    assert evaluate(model, row=row).loss == pytest.approx(evaluate(model).loss, rel=0.02)
    assert evaluate(model) == evaluate(model)             # without dropout
    assert set(seen) == {(row.compute, False), (torch.float32, False)} and model.training is model[3].training is training
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_batch_makes_the_host_wait(device):
    """On the device `meta`, where nothing can wait for values."""
    counts = ClassificationMetrics(10, torch.device(device), confusion=True)
    logits, labels = torch.zeros(4, 10, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        counts.update(logits, labels)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert counts.confusion.shape == (100,)


def test_write_confusion(tmp_path):
    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 5]])
    files = write_confusion(tmp_path, confusion, ["cat", "a, b", 'the "dog"'])
    assert files == [tmp_path / "confusion.csv", tmp_path / "per_class.csv"]
    matrix, per_class = (list(csv.reader(file.open(newline=""))) for file in files)
    assert matrix == [["true \\ predicted", "cat", "a, b", 'the "dog"'],
                      ["cat", "3", "1", "0"], ["a, b", "0", "0", "0"], ['the "dog"', "2", "0", "5"]]
    assert per_class == [["class", "images", "accuracy"], ["cat", "4", "0.7500"], ["a, b", "0", ""], ['the "dog"', "7", "0.7143"]]


def test_class_names_are_not_written_as_formulas(tmp_path):
    names = ["=cmd|'/C calc'!A0", "-0.5", "@x"]
    confusion, per_class = write_confusion(tmp_path, torch.eye(3, dtype=torch.int64), names)
    assert confusion.read_text().splitlines()[0] == "true \\ predicted,'=cmd|'/C calc'!A0,-0.5,'@x"
    assert [row[0] for row in read_csv_table(per_class.read_text())] == ["class", *names]


def test_tables_of_a_checkpoint_do_not_replace_others(tmp_path):
    """Repeating an evaluation writes the same files. Another one, for example on other images, gets a number."""
    one, two = torch.eye(2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.int64)

    def written(confusion, *label) -> list[str]:
        return [file.name for file in write_confusion(tmp_path, confusion, ["a", "b"], *label)]

    assert written(one) == ["confusion.csv", "per_class.csv"]
    before = (tmp_path / "confusion.csv").read_bytes()
    for _ in range(2):
        assert written(two, "best") == ["confusion-best.csv", "per_class-best.csv"]
    assert written(one, "best") == ["confusion-best-2.csv", "per_class-best-2.csv"]
    assert written(2 * one, "best") == ["confusion-best-3.csv", "per_class-best-3.csv"]
    assert before == (tmp_path / "confusion.csv").read_bytes() == (tmp_path / "confusion-best-2.csv").read_bytes()
    assert written(two) == ["confusion.csv", "per_class.csv"]                 # a continued run ends again
