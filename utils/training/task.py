"""What is learned from an image. Only the rows of this file know a task; all other code uses the parts that a row holds."""

import dataclasses
from collections.abc import Callable

import numpy as np

from utils.data.splits import by_class

from .criterion import Criterion


@dataclasses.dataclass(frozen=True)
class Task:
    """The parts of a run that depend on what is learned.

    criterion: built with the run's losses; `loss` and `count_correct` are what the trainer asks. strata: all targets -> the
    labels of which held-out splits keep the proportions.
    """

    criterion: type[Criterion]
    strata: Callable[[np.ndarray], np.ndarray]


SINGLE_LABEL = Task(Criterion, strata=by_class)                 # one class an image
