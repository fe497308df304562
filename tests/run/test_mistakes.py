"""mistakes.csv: the images that the best model misclassifies."""

import types

import numpy as np
import pytest
import torch
from building import ALONE, build_objects
from ranks import Ranks

from utils.data.loader import eval_loader
from utils.data.splits import Subset
from utils.files import StorageError, read_csv_table
from utils.run import mistakes
from utils.run.mistakes import worst_first, write_mistakes
from utils.training.evaluation import EvalMetrics, evaluate


def test_mistakes_are_those_of_the_evaluation_with_the_worst_first(tmp_path):
    made = build_objects("--eval_batch_size", "64")
    torch.nn.init.normal_(made.model.head.weight)
    split, classes = made.found.splits.val, made.found.splits.classes
    outputs = types.SimpleNamespace(folder=tmp_path)
    metrics = evaluate(made.model, made.data.eval_loader(split), made.built.normalize, made.built.precision, ALONE, 10,
                       answers=True)
    assert metrics.answers.shape == (5, len(split)) and metrics.answers[0].tolist() == list(range(len(split)))
    assert metrics.answers[4].mean().item() == pytest.approx(metrics.loss, abs=1e-6)
    write_mistakes(metrics, split, classes, outputs, ALONE)
    header, *rows = read_csv_table((tmp_path / "mistakes.csv").read_text())
    assert header == ["path", "true", "predicted", "probability", "loss"]
    assert len(rows) == round((1 - metrics.accuracy) * len(split)) > 0
    losses = [float(row[4]) for row in rows]
    assert losses == sorted(losses, reverse=True) and all(row[1] != row[2] for row in rows)
    number = int(rows[0][0].partition("/")[2])
    assert rows[0][0] == split.name(number) and rows[0][1] == classes[split.targets[number]]


@pytest.mark.parametrize("images", [1, 5])
def test_two_ranks_write_the_same_table_as_one_even_if_one_has_no_image(tmp_path, images):
    made = build_objects("--eval_batch_size", "2")
    torch.nn.init.normal_(made.model.head.weight)
    split, classes = Subset(made.found.splits.val, range(images)), made.found.splits.classes

    def work(ranks):
        loader = eval_loader(split, transform=made.data.eval_transform, batch_size=2, rank=ranks.rank, world_size=ranks.size,
                             num_workers=0, pin_memory=False)
        metrics = evaluate(made.model, loader, made.built.normalize, made.built.precision, ranks, 10, answers=True)
        (tmp_path / str(ranks.size)).mkdir(exist_ok=True)
        write_mistakes(metrics, split, classes, types.SimpleNamespace(folder=tmp_path / str(ranks.size)), ranks)

    work(ALONE)
    with Ranks(2, work, tmp_path, timeout_s=10) as both:
        assert both.wait() == [0, 0]
    assert (tmp_path / "2/mistakes.csv").read_text() == (tmp_path / "1/mistakes.csv").read_text()


def test_without_answers_nothing_is_written_and_a_full_disk_is_a_warning(tmp_path, monkeypatch):
    logged, outputs = [], types.SimpleNamespace(folder=tmp_path)
    outputs.logger = types.SimpleNamespace(log=logged.append)
    metrics = EvalMetrics(1, 1.0, 0.0, 1, 1, 1, 1, 0.5, 0.1)
    write_mistakes(metrics, None, ["a", "b"], outputs, ALONE)
    assert not list(tmp_path.iterdir())

    def refuse(path, write):
        raise StorageError("cannot write it (no room)")

    monkeypatch.setattr(mistakes, "atomic_write", refuse)
    answers = torch.tensor([[0.0], [0], [1], [0.7], [1.2]], dtype=torch.float64)
    images = types.SimpleNamespace(name=str)
    write_mistakes(EvalMetrics(1, 1.0, 0.0, 1, 1, 1, 1, 0.5, 0.1, answers=answers), images, ["a", "b"], outputs, ALONE)
    assert logged == ["warning: cannot write it (no room); the run continues without it"]


def test_equal_losses_are_in_the_order_of_the_images():
    answers = np.array([[3, 1, 2], [0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [2.0, 2.0, 3.0]])
    assert [row[0] for row in worst_first(answers)] == [2, 1, 3]
