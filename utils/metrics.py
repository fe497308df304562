"""What an evaluation counts, exactly: integers and a float64 sum, added over ranks."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .distributed import sum_over_ranks


@dataclasses.dataclass(frozen=True)
class EvalReport:
    """Of `images` images: mean loss and the shares (0..1) whose true class is first, or among the first five."""

    images: int
    loss: float
    top1: float
    top5: float
    confusion: Tensor | None = None         # (C, C) int64: rows true class, columns predicted class


class Tally:
    """Counts batch by batch; `report()` adds the ranks up."""

    def __init__(self, num_classes: int, device: torch.device, confusion: bool = False):
        self.num_classes = num_classes
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)         # images, top-1, top-5
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.confusion = torch.zeros(num_classes ** 2, dtype=torch.int64, device=device) if confusion else None

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """logits (B, C), targets (B,)"""
        logits = logits.float()
        best = logits.topk(min(5, self.num_classes), dim=1).indices
        hits = best == targets[:, None]
        self.counts += torch.stack([torch.full_like(targets, 1).sum(), hits[:, 0].sum(), hits.sum()])
        self.loss += F.cross_entropy(logits, targets, reduction="none").double().sum()
        if self.confusion is not None:
            cells = targets * self.num_classes + best[:, 0]
            self.confusion += torch.bincount(cells, minlength=self.num_classes ** 2)

    def report(self) -> EvalReport:
        counts, loss = sum_over_ranks(self.counts.clone()), sum_over_ranks(self.loss.clone())
        images, top1, top5 = counts.tolist()
        confusion = None
        if self.confusion is not None:
            confusion = sum_over_ranks(self.confusion.clone()).view(self.num_classes, -1).cpu()
        return EvalReport(images, loss.item() / images, top1 / images, top5 / images, confusion)


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
