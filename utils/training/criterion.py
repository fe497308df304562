"""Losses as sums over images, in float32 whatever the precision: the step divides by its images (engine.py)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def classification_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0,
                        class_weights: Tensor | None = None) -> Tensor:
    """logits (B, C); targets (B,) classes, or (B, C) probabilities as MixUp makes them -> sum of the cross-entropies.

    Targets t become (1 - s) t + s / C with s = label_smoothing (arXiv 1512.00567, section 7). class_weights (C,)
    multiply the terms of their classes; the sum is not divided by them.
    """
    if targets.is_floating_point():
        targets = targets.float()
    return F.cross_entropy(logits.float(), targets, weight=class_weights, reduction="sum", label_smoothing=label_smoothing)


def attention_loss(logits: Tensor, edits: Tensor) -> Tensor:
    """logits (B, H, R, h * w) of sigmoid attention; edits (B, 2, h, w), values and edited shares -> sum over the images.

    An image's loss is the mean of (sigmoid(logit) - value)^2 over its edited patches, heads and the R rows, which share
    the value; 0 without an edited patch. A patch that a crop has left partly edited counts with that share, and where all of an
    image's shares make up less than one patch, the loss is as much less. What lies in entries that are not edited plays no
    part, not even NaN.
    """
    values, shares = (part[:, None, None] for part in edits.float().flatten(2).unbind(1))         # (B, 1, 1, h * w)
    # Chosen before the sigmoid: 0 times the gradient of NaN would be NaN.
    logits, values = torch.where(shares > 0, logits.float(), 0.0), torch.where(shares > 0, values, 0.5)
    squares = (shares * (logits.sigmoid() - values).square()).mean(dim=(1, 2)).sum(dim=-1)
    return (squares / shares.sum(dim=(1, 2, 3)).clamp(min=1)).sum()


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """labels (N,) int64 -> (C,) float32: N / (C n_c) for a class of n_c images, so that the N images weigh 1 on average.

    C counts the classes that have images; one without has weight 0.
    """
    counts = torch.bincount(labels, minlength=num_classes).double()
    weights = len(labels) / (counts.clamp(min=1) * (counts > 0).sum())
    return torch.where(counts > 0, weights, 0.0).float()


def distillation_loss(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """student and teacher logits (B, C) -> sum over the images (DeiT, arXiv 2012.12877, section 4).

    "hard" (equation 3): cross-entropy with the teacher's first class; no temperature. "soft" (equation 2):
    T^2 KL(softmax(teacher / T) || softmax(student / T)); the paper's published code divides the sum by B C, not B.
    """
    assert kind in ("hard", "soft"), kind
    student, teacher = student.float(), teacher.float()
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(dim=1), reduction="sum")
    student, teacher = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return temperature ** 2 * F.kl_div(student, teacher, reduction="sum", log_target=True)
