"""Evaluation, and the metrics of one class an image. The counts are exact: integers and float64 sums, added over ranks."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.data.loader import Loader, prefetch
from utils.device import batch_on_device, float64_device
from utils.distributed import Ranks, all_reduce_sum, to_host
from utils.files import atomic_write, csv_table

from .precision import Precision

TOP, BINS = 5, 15


@dataclasses.dataclass(frozen=True)
class EvalMetrics:
    """Means over `images` images. A field is logged under its name."""

    images: int
    loss: float
    accuracy: float                         # top-1, 0..1
    top2: float                             # the true class is among the first two, ...
    top3: float
    top4: float
    top5: float
    true_probability: float                 # mean probability (softmax) of the true class
    calibration_error: float                # |accuracy - confidence| over 15 bins of the confidence, weighted by their images
    predicted_class: int = -1               # the label that is predicted most often, and the fraction of the images that get it
    predicted_share: float = 0.0
    confusion: Tensor | None = None         # (C, C) int64: rows true class, columns predicted class; not logged
    # (5, n) float64: index, true and predicted label, its probability, and loss, of the images of this rank; not logged
    answers: Tensor | None = dataclasses.field(default=None, compare=False)

    @property
    def top(self) -> tuple[float, ...]:
        """Top-1 to top-5 accuracy."""
        return self.accuracy, self.top2, self.top3, self.top4, self.top5

    def as_dict(self) -> dict[str, float]:
        """Return the metrics by their names in log.jsonl."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                if field.name not in ("confusion", "answers")}


class ClassificationMetrics:
    """Counts batch by batch; `compute` adds the counts of all ranks.

    The calibration error is the ECE of Guo et al. (arXiv 1706.04599, equation 3): confidence is the probability of the
    predicted class, bin m of M contains ((m - 1) / M, m / M].
    """

    def __init__(self, num_classes: int, device: torch.device, confusion: bool = False, answers: bool = False):
        self.num_classes = num_classes
        # A rank may have no images.
        self.answers = [torch.empty(4, 0, dtype=torch.float64, device=device)] if answers else None
        self.images = torch.zeros(1, dtype=torch.int64, device=device)
        self.top = torch.zeros(TOP, dtype=torch.int64, device=device)
        self.correct = torch.zeros(BINS, dtype=torch.int64, device=device)              # in each bin
        self.confidence = torch.zeros(BINS, dtype=torch.float64, device=device)         # sum in each bin
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)                  # loss, true probability
        self.predicted = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.confusion = torch.zeros(num_classes ** 2, dtype=torch.int64, device=device) if confusion else None

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch. logits (B, C), targets (B,)"""
        logits = logits.float()
        best = ranked(logits)
        hits = best == targets[:, None]
        self.images += len(targets)
        # With fewer than five classes the last columns repeat: all images are among the first C.
        self.top += F.pad(hits.cumsum(dim=1), (0, TOP - hits.shape[1]), value=1).sum(dim=0)
        true_and_best = F.log_softmax(logits, dim=1).gather(1, torch.stack([targets, best[:, 0]], dim=1)).double()
        (true, _), (true_probability, confidence) = true_and_best.unbind(1), true_and_best.exp().unbind(1)
        self.sums += torch.stack([-true.sum(), true_probability.sum()])
        own_bin = (confidence * BINS).ceil().clamp(1, BINS)[:, None] == torch.arange(1, BINS + 1, device=logits.device)
        self.correct += (own_bin & hits[:, :1]).sum(dim=0)
        self.confidence += (own_bin * confidence[:, None]).sum(dim=0)
        self.predicted.index_add_(0, best[:, 0], torch.ones_like(targets))       # the host would wait for bincount
        if self.answers is not None:
            self.answers.append(torch.stack([targets.double(), best[:, 0].double(), confidence, -true]))
        if self.confusion is not None:
            self.confusion.index_add_(0, targets * self.num_classes + best[:, 0], torch.ones_like(targets))

    def compute(self, stopped: bool = False) -> EvalMetrics | None:
        """Return the metrics of all ranks, on every rank; None if a rank has `stopped` before its last image."""
        stops = torch.tensor([stopped], dtype=torch.int64, device=self.images.device)
        counts = torch.cat([stops, self.images, self.top, self.correct, self.predicted])
        stops, images, *counts = to_host(all_reduce_sum(counts)).tolist()
        if stops:
            return None
        sums = to_host(all_reduce_sum(torch.cat([self.sums, self.confidence]))).tolist()
        top, correct, predicted = counts[:TOP], counts[TOP:TOP + BINS], counts[TOP + BINS:]
        loss, true_probability, *confidence = sums
        confusion = None
        if self.confusion is not None:
            confusion = to_host(all_reduce_sum(self.confusion.clone())).view(self.num_classes, -1)
        return EvalMetrics(images, loss / images, *(hits / images for hits in top), true_probability=true_probability / images,
                           calibration_error=sum(abs(hits - total) for hits, total in zip(correct, confidence)) / images,
                           predicted_class=predicted.index(max(predicted)), predicted_share=max(predicted) / images,
                           confusion=confusion)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Loader, normalize: Callable[[Tensor], Tensor], precision: Precision, ranks: Ranks,
             num_classes: int, *, confusion: bool = False, stop_requested: Callable[[], bool] = lambda: False,
             on_compiled: Callable[[int, float], None] | None = None, flipped: bool = False, filled: bool = False,
             answers: bool = False, metrics: type[ClassificationMetrics] = ClassificationMetrics) -> EvalMetrics | None:
    """Evaluate every image of the split once, whatever the number of ranks.

    `model` is the plain module, not the wrapped one: ranks may have different numbers of batches. Returns None, on every rank,
    if stop_requested() became true on one of them before its last batch.
    `on_compiled`, for a compiled model, is called with the images and seconds of the first batch, for which it may have been
    compiled. The last batch is then padded to the size of the others, or the model would be compiled again for it.
    `filled`: pads it in any case, because the last bits depend on the size: an image gets the same logits in any batch.
    `flipped`: the mean of the probabilities for an image and its mirror image counts. `answers`: the metrics have them.
    `metrics`: the class that counts, of the task.
    """
    was_training = model.training
    model.eval()
    place = float64_device(ranks.device)
    counts, stopped, batch_size = metrics(num_classes, place, confusion, answers), False, 0
    indices = [np.empty(0, np.int64)]
    for batch in prefetch(loader, ranks.device):
        if stopped := stop_requested():
            break
        images = normalize(batch_on_device(batch.images, ranks.device))
        count, started = len(images), time.monotonic()
        logits = logits_of(model, images, precision, flipped, batch_size if on_compiled or filled else 0)
        if on_compiled and not batch_size:
            on_compiled(count, time.monotonic() - started)
        batch_size = max(batch_size, count)
        counts.update(logits.to(place), batch_on_device(batch.targets, place))
        indices += [batch.keys.indices] * answers
    model.train(was_training)
    found = counts.compute(stopped)
    if not (answers and found):
        return found
    index = torch.from_numpy(np.concatenate(indices)).double()
    return dataclasses.replace(found, answers=torch.cat([index[None], to_host(torch.cat(counts.answers, dim=1))]))


def logits_of(model: nn.Module, images: Tensor, precision: Precision, flipped: bool = False, size: int = 0) -> Tensor:
    """images (B, C, height, width), normalized, on the device -> logits (B, C): of the image, or of it and its mirror image.

    size: the batch is filled up to this with the last image, and has one shape whatever B is.
    """
    count = len(images)
    if count < size:
        images = torch.cat([images, images[-1:].expand(size - count, -1, -1, -1)])
    with precision.autocast(images.device):
        return mean_prediction([model(view)[:count] for view in ((images, images.flip(-1)) if flipped else (images,))])


def ranked(logits: Tensor, count: int = TOP) -> Tensor:
    """logits (B, C) -> the labels of the highest, in order: (B, count), or (B, C). The order of equal ones does not depend on
    `count`, so that predictions have the classes that evaluations count."""
    first = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    if count > TOP and logits.shape[1] > TOP:
        others = logits.scatter(1, first, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        first = torch.cat([first, others[:, :-TOP]], dim=1)
    return first[:, :count]


def mean_prediction(logits: Sequence[Tensor]) -> Tensor:
    """Logits (B, C) of several views -> (B, C) whose softmax is the mean of their probabilities; the logits of a single view."""
    if len(logits) == 1:
        return logits[0]
    return torch.stack([each.float().log_softmax(dim=1) for each in logits]).logsumexp(dim=0)


def write_confusion(folder: Path, confusion: Tensor, classes: Sequence[str], checkpoint: str = "") -> list[Path]:
    """Write and return confusion.csv (rows true class, columns predicted class) and per_class.csv (images, accuracy).

    checkpoint: the name of the evaluated checkpoint, where that is not the end of a run. It becomes part of the files' names
    (confusion-best.csv), and files that hold something else are kept: then these are confusion-best-2.csv, ... Raises
    StorageError.
    """
    counts = list(zip(classes, confusion.tolist()))
    tables = {"confusion": [["true \\ predicted", *classes], *([name, *row] for name, row in counts)],
              "per_class": [["class", "images", "accuracy"],
                            *([name, sum(row), f"{row[label] / sum(row):.4f}" if sum(row) else ""]
                              for label, (name, row) in enumerate(counts))]}
    contents = {name: csv_table(rows).encode("utf-8", "backslashreplace") for name, rows in tables.items()}
    for number in itertools.count(1):
        suffix = f"-{checkpoint}" * bool(checkpoint) + f"-{number}" * (number > 1)
        files = {folder / f"{name}{suffix}.csv": content for name, content in contents.items()}
        if not checkpoint or all(not file.exists() or file.read_bytes() == content for file, content in files.items()):
            break
    for file, content in files.items():
        atomic_write(file, lambda unfinished, content=content: unfinished.write_bytes(content))
    return list(files)


