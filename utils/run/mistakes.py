"""mistakes.csv: the images that the best model of a run gets wrong, the worst first. Some of them have wrong labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from utils import distributed
from utils.distributed import Ranks
from utils.files import StorageError, atomic_write, csv_table, encoded
from utils.training.evaluation import EvalMetrics

from .folder import MISTAKES_FILE

COLUMNS = ("path", "true", "predicted", "probability", "loss")


def write_mistakes(metrics: EvalMetrics, images: Dataset, classes: Sequence[str], outputs: Any, ranks: Ranks) -> None:
    """Write the mistakes of an evaluation with `answers`; called on all ranks. A full disk only causes a warning.

    outputs: those of the run, with its folder and logger.
    """
    if metrics.answers is None:
        return
    own = metrics.answers[:, metrics.answers[1] != metrics.answers[2]].numpy()
    with distributed.watch(ranks, lambda: f"listing the images for {MISTAKES_FILE}"):
        parts = distributed.all_gather_objects(ranks, own)
    if not ranks.is_main:
        return
    rows = [(images.name(int(index)), classes[int(true)], classes[int(predicted)], f"{probability:.6f}", f"{loss:.6f}")
            for index, true, predicted, probability, loss in worst_first(np.concatenate(parts, axis=1))]
    text, file = csv_table([COLUMNS, *rows]), outputs.folder / MISTAKES_FILE
    try:
        atomic_write(file, lambda unfinished: unfinished.write_bytes(encoded(text)))
    except StorageError as error:
        outputs.logger.log(f"warning: {error}; the run continues without it")


def worst_first(answers: np.ndarray) -> list[list[float]]:
    """(5, n) as EvalMetrics.answers -> its columns, the highest loss first; equal ones in the order of the images"""
    return answers[:, np.lexsort((answers[0], -answers[4]))].T.tolist()
