"""The loss: cross-entropy, smoothing, class weights, mixing, distillation, and supervision of attention.

All losses are sums over images, in float32 whatever the precision; the trainer divides them by the number of images of a step.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.data.mixup import Mixer


@dataclasses.dataclass(frozen=True)
class AttentionSupervision:
    """Adds weight * the mean of attention_loss over those images of a step that have an edit.

    `with record_logits() as layers: model(images)` fills `layers` with the logits of the sigmoid attention, (B, H, R, h * w) a
    layer; the loss is the mean over layers. `edited_images(step)` is the number of images with an edit in the whole step, over
    all ranks and micro-batches (one whose edit a crop cut off counts, with a loss of 0). Every rank computes the same number,
    so that ranks and micro-steps change nothing but the rounding.
    """

    weight: float
    record_logits: Callable[[], AbstractContextManager[list[Tensor]]]
    edited_images: Callable[[int], int]

    def loss(self, layers: list[Tensor], edits: Tensor) -> Tensor:
        """Return the sum over the images, without the weight. edits (B, 2, h, w): values and edited ratios."""
        return torch.stack([attention_loss(logits, edits) for logits in layers]).mean()


@dataclasses.dataclass(frozen=True)
class Criterion:
    """What a step minimizes when each image has one class.

    `teacher` maps images (B, C, height, width) of values 0..255 to logits and is not trained. The loss of an image is
    (1 - alpha) * classification + alpha * distillation (DeiT, arXiv 2012.12877, equations 2 and 3). In a model with a
    distillation head that head learns from the teacher only, and the other one from the labels only.
    """

    label_smoothing: float = 0.0
    class_weights: Tensor | None = None
    mixer: Mixer | None = None
    distillation: str = "none"
    teacher: Callable[[Tensor], Tensor] | None = None
    alpha: float = 0.5
    temperature: float = 1.0
    attention: AttentionSupervision | None = None        # not with a mixer: an edit belongs to one image

    def mix(self, images: Tensor, targets: Tensor, step: int, position: int) -> tuple[Tensor, Tensor]:
        """Mix the images (B, C, height, width) and targets (B,) of a micro-batch, whose first image is the step's
        `position`-th. Returns both unchanged without a mixer."""
        return (images, targets) if self.mixer is None else self.mixer(images.float(), targets, step, position)

    def loss(self, logits: Tensor | tuple[Tensor, Tensor], targets: Tensor, images: Tensor) -> Tensor:
        """Return the sum over the images, without the supervision of attention. `logits` may be those of two heads."""
        logits, distilled = logits if isinstance(logits, tuple) else (logits, logits)
        loss = classification_loss(logits, targets, label_smoothing=self.label_smoothing, class_weights=self.class_weights)
        if self.distillation == "none":
            return loss
        from_teacher = distillation_loss(self.distillation, distilled, self.teacher(images), self.temperature)
        return (1 - self.alpha) * loss + self.alpha * from_teacher

    def count_correct(self, logits: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """Return the number of images whose top-1 class is their label (B,); two heads predict together."""
        return ((logits[0] + logits[1] if isinstance(logits, tuple) else logits).argmax(dim=1) == labels).sum()


def classification_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0,
                        class_weights: Tensor | None = None) -> Tensor:
    """Return the sum of the cross-entropies. logits (B, C); targets (B,) classes, or (B, C) probabilities after mixing.

    Targets t become (1 - s) t + s / C with s = label_smoothing (arXiv 1512.00567, section 7). class_weights (C,) multiply the
    terms of their classes; the sum is not divided by them.
    """
    if targets.is_floating_point():
        targets = targets.float()
    return F.cross_entropy(logits.float(), targets, weight=class_weights, reduction="sum", label_smoothing=label_smoothing)


def balanced_weights(targets: Tensor, num_classes: int) -> Tensor:
    """Return (C,) float32, N / (C n_c) for a class of n_c of the N images, so that an image weighs 1 on average.

    targets (N,) int64. C counts the classes that have images; a class without images has weight 0.
    """
    counts = torch.bincount(targets, minlength=num_classes).double()
    weights = len(targets) / (counts.clamp(min=1) * (counts > 0).sum())
    return torch.where(counts > 0, weights, 0.0).float()


def guess_loss(counts: Tensor, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> float:
    """Return the mean loss of the best prediction that is the same for all images, of which `counts` (C,) are of each class.

    A model reaches it that has learned only the frequencies of the classes: ln C if they are equal. Mixing images does not change
    it, since on average their targets are those of the images.
    """
    counts = counts.cpu().double()
    targets = (1 - label_smoothing) * counts / counts.sum() + label_smoothing / len(counts)
    terms = targets if class_weights is None else targets * class_weights.cpu().double()
    return float(-torch.xlogy(terms, terms / terms.sum()).sum())


def distillation_loss(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the sum over the images of logits (B, C) each (DeiT, arXiv 2012.12877, section 4).

    "hard" (equation 3): cross-entropy with the teacher's top-1 class; no temperature. "soft" (equation 2):
    T^2 KL(softmax(teacher / T) || softmax(student / T)); the paper's published code divides the sum by B C, not B.
    """
    student, teacher = student.float(), teacher.float()
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(dim=1), reduction="sum")
    student, teacher = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return temperature ** 2 * F.kl_div(student, teacher, reduction="sum", log_target=True)


def attention_loss(logits: Tensor, edits: Tensor) -> Tensor:
    """Return the sum over the images. logits (B, H, R, h * w) of sigmoid attention; edits (B, 2, h, w), values and ratios.

    An image's loss is the mean of (sigmoid(logit) - value)^2 over its edited patches, the heads and the R rows, which have the
    same values; 0 without an edited patch. A patch that a crop left partly edited is weighted by that ratio; if an image's
    ratios sum to less than one patch, its loss is smaller accordingly. Entries that are not edited have no influence, even
    if they are NaN.
    """
    values, ratios = (part[:, None, None] for part in edits.float().flatten(2).unbind(1))         # (B, 1, 1, h * w)
    # Selected before the sigmoid: 0 times the gradient of NaN would be NaN.
    logits, values = torch.where(ratios > 0, logits.float(), 0.0), torch.where(ratios > 0, values, 0.5)
    squares = (ratios * (logits.sigmoid() - values).square()).mean(dim=(1, 2)).sum(dim=-1)
    return (squares / ratios.sum(dim=(1, 2, 3)).clamp(min=1)).sum()
