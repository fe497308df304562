"""An evaluation, and what it counts, exactly: integers and float64 sums, added over ranks."""

import csv
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.data.loader import Loader, prefetch
from utils.distributed import World, sum_over_ranks

from .precision import Precision

TOP, BINS = 5, 15


@dataclasses.dataclass(frozen=True)
class EvalReport:
    """Of `images` images: means and shares (0..1)."""

    images: int
    loss: float
    top: tuple[float, ...]                  # five: whose true class is first, among the first two, ..., the first five
    true_probability: float                 # mean probability (softmax) of the true class
    calibration_error: float                # |accuracy - confidence| over 15 bins of the confidence, weighted by their images
    confusion: Tensor | None = None         # (C, C) int64: rows true class, columns predicted class

    @property
    def top1(self) -> float:
        return self.top[0]

    @property
    def top5(self) -> float:
        return self.top[4]


class Tally:
    """Counts batch by batch; `report()` adds the ranks up.

    The calibration error is the ECE of Guo et al. (arXiv 1706.04599, equation 3): confidence is the probability of the
    predicted class, bin m of M holds ((m - 1) / M, m / M].
    """

    def __init__(self, num_classes: int, device: torch.device, confusion: bool = False):
        self.num_classes = num_classes
        self.images = torch.zeros(1, dtype=torch.int64, device=device)
        self.top = torch.zeros(TOP, dtype=torch.int64, device=device)
        self.right = torch.zeros(BINS, dtype=torch.int64, device=device)                # in each bin
        self.confidence = torch.zeros(BINS, dtype=torch.float64, device=device)         # sum in each bin
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)                  # loss, true probability
        self.confusion = torch.zeros(num_classes ** 2, dtype=torch.int64, device=device) if confusion else None

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """logits (B, C), targets (B,)"""
        logits = logits.float()
        best = logits.topk(min(TOP, self.num_classes), dim=1).indices
        hits = best == targets[:, None]
        self.images += len(targets)
        # With fewer than five classes the last columns repeat: all images are among the first C.
        self.top += F.pad(hits.cumsum(dim=1), (0, TOP - hits.shape[1]), value=1).sum(dim=0)
        true_and_best = F.log_softmax(logits, dim=1).gather(1, torch.stack([targets, best[:, 0]], dim=1)).double()
        (true, _), (true_probability, confidence) = true_and_best.unbind(1), true_and_best.exp().unbind(1)
        self.sums += torch.stack([-true.sum(), true_probability.sum()])
        own = (confidence * BINS).ceil().clamp(1, BINS)[:, None] == torch.arange(1, BINS + 1, device=logits.device)
        self.right += (own & hits[:, :1]).sum(dim=0)
        self.confidence += (own * confidence[:, None]).sum(dim=0)
        if self.confusion is not None:
            cells = targets * self.num_classes + best[:, 0]
            self.confusion += torch.bincount(cells, minlength=self.num_classes ** 2)

    def report(self, stopped: bool = False) -> EvalReport | None:
        """Of all ranks, on every rank; None if one of them has `stopped` before its last image."""
        own = torch.tensor([stopped], dtype=torch.int64, device=self.images.device)
        *counts, stops = sum_over_ranks(torch.cat([self.images, self.top, self.right, own])).tolist()
        if stops:
            return None
        sums = sum_over_ranks(torch.cat([self.sums, self.confidence])).tolist()
        images, top, right = counts[0], counts[1:TOP + 1], counts[TOP + 1:]
        loss, true_probability, *confidence = sums
        confusion = None
        if self.confusion is not None:
            confusion = sum_over_ranks(self.confusion.clone()).view(self.num_classes, -1).cpu()
        return EvalReport(images, loss / images, tuple(hits / images for hits in top), true_probability / images,
                          sum(abs(hits - total) for hits, total in zip(right, confidence)) / images, confusion)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Loader, prepare: Callable[[Tensor], Tensor], precision: Precision,
             world: World, num_classes: int, confusion: bool = False,
             stop: Callable[[], bool] = lambda: False,
             compiled: Callable[[int, float], None] | None = None) -> EvalReport | None:
    """Every image of the split once, whatever the number of ranks. `model` is the plain module, not the wrapped one:
    ranks may have different numbers of batches. None, on every rank, if stop() became true on one before its last batch.
    `compiled`, of a compiled model: is told the images and the seconds of the first batch, for which it may have been
    compiled. The last batch is then filled up to the size of the others, or it would be compiled for that one alone."""
    was_training = model.training
    model.eval()
    tally, stopped, size = Tally(num_classes, world.device, confusion), False, 0
    for batch in prefetch(loader, world.device):
        if stopped := stop():
            break
        images = prepare(batch.images.to(world.device, non_blocking=True))
        own, begun = len(images), time.monotonic()
        if compiled and own < size:
            images = torch.cat([images, images[-1:].expand(size - own, -1, -1, -1)])
        with precision.autocast(world.device):
            logits = model(images)[:own]
        if compiled and not size:
            compiled(own, time.monotonic() - begun)
        size = max(size, own)
        tally.add(logits, batch.targets.to(world.device, non_blocking=True))
    model.train(was_training)
    return tally.report(stopped)


def write_confusion(folder: Path, confusion: Tensor, classes: Sequence[str]) -> list[Path]:
    """confusion.csv (rows true class, columns predicted class) and per_class.csv (images, accuracy) -> the two files"""
    matrix, per_class = folder / "confusion.csv", folder / "per_class.csv"
    with open(matrix, "w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        rows = csv.writer(stream)
        rows.writerow(["true \\ predicted", *classes])
        rows.writerows([name, *counts] for name, counts in zip(classes, confusion.tolist()))
    with open(per_class, "w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        rows = csv.writer(stream)
        rows.writerow(["class", "images", "accuracy"])
        for label, name in enumerate(classes):
            images = int(confusion[label].sum())
            rows.writerow([name, images, f"{int(confusion[label, label]) / images:.4f}" if images else ""])
    return [matrix, per_class]
