"""The task: what is learned from an image. Only the rows of this file define it; all other code uses the parts of a row."""

import dataclasses
from collections.abc import Callable

import numpy as np
from torch import Tensor

from utils.data.splits import by_class

from .criterion import Criterion
from .evaluation import ClassificationMetrics


@dataclasses.dataclass(frozen=True)
class Task:
    """The parts of a run that depend on what is learned.

    target_shape: of one image's target. criterion: built with the run's losses; the trainer calls its `loss` and `count_correct`.
    metrics: built by `evaluate`. strata: all targets -> labels whose proportions held-out splits keep. probabilities: logits
    (B, C) -> the numbers (B, C) that predictions contain.
    """

    name: str
    target_shape: tuple[int, ...]
    criterion: type[Criterion]
    metrics: type[ClassificationMetrics]
    strata: Callable[[np.ndarray], np.ndarray]
    probabilities: Callable[[Tensor], Tensor]


SINGLE_LABEL = Task("one class an image", (), Criterion, ClassificationMetrics, strata=by_class,
                    probabilities=lambda logits: logits.float().softmax(dim=1))
