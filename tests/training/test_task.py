"""What the rest of the program gets from a task."""

import torch

from utils.training.criterion import Criterion
from utils.training.task import SINGLE_LABEL


def test_one_class_an_image():
    criterion = SINGLE_LABEL.criterion(label_smoothing=0.1)
    logits, targets = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]]), torch.zeros(2, dtype=torch.int64)
    assert isinstance(criterion, Criterion) and criterion.count_correct(logits, targets) == 1
    assert SINGLE_LABEL.strata([0, 2, 1]) == [0, 2, 1]
