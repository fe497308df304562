"""MixUp (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899), on the device.

torchvision's v2.MixUp and v2.CutMix draw once per batch and mix each image with its neighbor, the first with the last: the
result depends on how a step is split into ranks and micro-batches. Here images 2k and 2k + 1 of a step are mixed with each
other, and every pair has its own draws, which are a function of (seed, step): the result is the same for any number of
ranks and micro-batches.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.device import on_device
from utils.randomness import derive_seed


class Draws(NamedTuple):
    """One entry for each pair of images."""

    cutmix: np.ndarray      # bool: CutMix, else MixUp
    lam: np.ndarray         # lambda, the weight of the image itself; 1 where nothing is mixed
    center: np.ndarray      # (2, pairs): the center of CutMix's box, relative to height and width


class Mixer:
    """Mixes the images of a step, until step `stop_at`.

    `step_images`: the number of images of a step over all ranks and micro-batches, even. An alpha of 0 turns its method off;
    lambda is drawn from Beta(alpha, alpha). A pair is mixed with `probability`; if both methods are on, by CutMix with
    `switch_probability`.
    """

    def __init__(self, num_classes: int, step_images: int, seed: int, *, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0,
                 probability: float = 1.0, switch_probability: float = 0.5, stop_at: int):
        assert step_images % 2 == 0, step_images
        self.num_classes, self.pairs, self.seed, self.stop_at = num_classes, step_images // 2, seed, stop_at
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        self.probability = probability if mixup_alpha or cutmix_alpha else 0.0
        self.cutmix_probability = switch_probability if mixup_alpha and cutmix_alpha else float(cutmix_alpha > 0)

    def draw(self, step: int) -> Draws:
        """Draw for all pairs of the step."""
        generator = np.random.default_rng(derive_seed(self.seed, "mix", step))
        mixed, cutmix = generator.random((2, self.pairs)) < [[self.probability], [self.cutmix_probability]]
        center = generator.random((2, self.pairs))
        # numpy needs alpha > 0; the draws of a method that is off are not used.
        lams = [generator.beta(alpha or 1, alpha or 1, self.pairs) for alpha in (self.mixup_alpha, self.cutmix_alpha)]
        return Draws(cutmix & mixed, np.where(mixed, np.where(cutmix, lams[1], lams[0]), 1.0), center)

    def __call__(self, images: Tensor, targets: Tensor, step: int, position: int) -> tuple[Tensor, Tensor]:
        """Mix images (B, channels, h, w), floating point, and targets (B,) int64 -> images, targets (B, C) float32.

        `position`: the position of the first image in the step, counted over all ranks; it and B are even.
        """
        one_hot = torch.zeros(len(targets), self.num_classes, device=targets.device).scatter_(1, targets[:, None], 1.0)
        if step >= self.stop_at:
            return images, one_hot
        own = slice(position // 2, (position + len(images)) // 2)
        box, lam = boxes(*(part[..., own] for part in self.draw(step)), *images.shape[-2:])
        plan = torch.from_numpy(np.concatenate([box, lam[None]]).repeat(2, axis=1).astype(np.float32))
        plan = on_device(plan, images.device)
        weight = pixel_weights(plan[:4], plan[4], *images.shape[-2:]).to(images.dtype)
        return torch.lerp(swap_pairs(images), images, weight), torch.lerp(swap_pairs(one_hot), one_hot, plan[4, :, None])


def boxes(cutmix: np.ndarray, lam: np.ndarray, center: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (4, pairs) top, bottom, left, right of the boxes in pixels, empty for MixUp, and the corrected lambdas (pairs,).

    A box's sides are sqrt(1 - lambda) of the image's. It is clipped at the image's edges, and lambda is corrected for its area.
    """
    size = np.array([[height], [width]])
    middle = (center * size).astype(int)
    half = (0.5 * np.sqrt(1 - lam) * size).astype(int) * cutmix
    (top, left), (bottom, right) = (middle - half).clip(0), np.minimum(middle + half, size)
    area = (bottom - top) * (right - left)
    return np.stack([top, bottom, left, right]), np.where(cutmix, 1 - area / (height * width), lam)


def pixel_weights(box: Tensor, lam: Tensor, height: int, width: int) -> Tensor:
    """Return the weight of the image itself at each pixel, from box (4, B) and lam (B,) -> (B, 1, height, width): 0 inside a
    box, 1 around it, and `lam` everywhere if there is no box."""
    top, bottom, left, right = box[:, :, None]
    rows, columns = torch.arange(height, device=box.device), torch.arange(width, device=box.device)
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]
    has_box = ((bottom > top) & (right > left))[:, :, None]
    return torch.where(has_box, (~inside).to(lam.dtype), lam[:, None, None])[:, None]


def swap_pairs(batch: Tensor) -> Tensor:
    """Return the batch (B, ...) with images 2k and 2k + 1 exchanged."""
    return batch.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
