"""A task: criterion, metrics and probabilities."""

import torch

from utils.training.criterion import Criterion
from utils.training.evaluation import ClassificationMetrics
from utils.training.task import SINGLE_LABEL


def test_one_class_an_image():
    criterion, metrics = SINGLE_LABEL.criterion(label_smoothing=0.1), SINGLE_LABEL.metrics(3, torch.device("cpu"))
    assert isinstance(criterion, Criterion) and isinstance(metrics, ClassificationMetrics)
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    targets = torch.zeros(2, *SINGLE_LABEL.target_shape, dtype=torch.int64)
    metrics.update(logits, targets)
    assert criterion.count_correct(logits, targets) == 1 and metrics.compute().accuracy == 0.5
    assert SINGLE_LABEL.strata([0, 2, 1]) == [0, 2, 1]
    torch.testing.assert_close(SINGLE_LABEL.probabilities(logits).log(), logits - logits.logsumexp(1, keepdim=True))
