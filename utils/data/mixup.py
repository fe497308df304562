"""MixUp (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899), on the device.

torchvision's v2.MixUp and v2.CutMix draw once for the batch that they are given and mix each image with its neighbour,
the first with the last: their result depends on how a step is cut into ranks and micro-batches. Here image 2k of a step
is mixed with image 2k + 1, and that with it, and every pair has its own draws, which are a function of (seed, step):
ranks and micro-batches change nothing.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.device import on_device
from utils.randomness import derive_seed


class Draws(NamedTuple):
    """For each pair of a step."""

    cut: np.ndarray         # bool: CutMix, else MixUp
    share: np.ndarray       # lambda: how much of an image stays; 1 where nothing is mixed
    centre: np.ndarray      # (2, pairs) of CutMix's box, as shares of height and width


class Mixer:
    """Mixes the images of a step, until step `stop_at`.

    `step_images` are all of a step, over ranks and micro-batches: an even number. An alpha of 0 turns its method off;
    lambda is drawn from Beta(alpha, alpha). `probability` of a pair to be mixed; `switch_probability` of CutMix instead
    of MixUp where both are on.
    """

    def __init__(self, num_classes: int, step_images: int, seed: int, *, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0,
                 probability: float = 1.0, switch_probability: float = 0.5, stop_at: int):
        assert step_images % 2 == 0, step_images
        assert min(mixup_alpha, cutmix_alpha) >= 0, (mixup_alpha, cutmix_alpha)
        self.num_classes, self.pairs, self.seed, self.stop_at = num_classes, step_images // 2, seed, stop_at
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        self.probability = probability if mixup_alpha or cutmix_alpha else 0.0
        self.cutmix_share = switch_probability if mixup_alpha and cutmix_alpha else float(cutmix_alpha > 0)

    def draws(self, step: int) -> Draws:
        """Of all pairs of the step."""
        generator = np.random.default_rng(derive_seed(self.seed, "mix", step))
        mixed, cut = generator.random((2, self.pairs)) < [[self.probability], [self.cutmix_share]]
        centre = generator.random((2, self.pairs))
        # numpy wants alpha > 0; the shares of a method that is off are not used.
        shares = [generator.beta(alpha or 1, alpha or 1, self.pairs) for alpha in (self.mixup_alpha, self.cutmix_alpha)]
        return Draws(cut & mixed, np.where(mixed, np.where(cut, shares[1], shares[0]), 1.0), centre)

    def __call__(self, images: Tensor, targets: Tensor, step: int, position: int) -> tuple[Tensor, Tensor]:
        """images (B, channels, h, w) floating point, targets (B,) int64 -> images, targets (B, C) float32.

        `position` of the first image in the step, counted over all ranks; it and B are even.
        """
        one_hot = torch.zeros(len(targets), self.num_classes, device=targets.device).scatter_(1, targets[:, None], 1.0)
        if step >= self.stop_at:
            return images, one_hot
        assert images.is_floating_point() and len(images) == len(targets), (images.dtype, images.shape, targets.shape)
        assert len(images) % 2 == 0 and position % 2 == 0, (len(images), position)
        assert position + len(images) <= 2 * self.pairs, (position, len(images))
        own = slice(position // 2, (position + len(images)) // 2)
        box, share = boxes(*(part[..., own] for part in self.draws(step)), *images.shape[-2:])
        plan = torch.from_numpy(np.concatenate([box, share[None]]).repeat(2, axis=1).astype(np.float32))
        plan = on_device(plan, images.device)
        weight = kept(plan[:4], plan[4], *images.shape[-2:]).to(images.dtype)
        return torch.lerp(swapped(images), images, weight), torch.lerp(swapped(one_hot), one_hot, plan[4, :, None])


def boxes(cut: np.ndarray, share: np.ndarray, centre: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """-> boxes (4, pairs) top, bottom, left, right in pixels, empty for MixUp; and the shares of the images that stay.

    A box of sides sqrt(1 - lambda) of the image's, clipped at its edges; lambda is then corrected to its real area.
    """
    size = np.array([[height], [width]])
    middle = (centre * size).astype(int)
    half = (0.5 * np.sqrt(1 - share) * size).astype(int) * cut
    (top, left), (bottom, right) = (middle - half).clip(0), np.minimum(middle + half, size)
    area = (bottom - top) * (right - left)
    return np.stack([top, bottom, left, right]), np.where(cut, 1 - area / (height * width), share)


def kept(box: Tensor, share: Tensor, height: int, width: int) -> Tensor:
    """box (4, B), share (B,) -> (B, 1, height, width): each pixel's weight; 0 in a box, 1 around it, `share` without one"""
    top, bottom, left, right = box[:, :, None]
    rows, columns = torch.arange(height, device=box.device), torch.arange(width, device=box.device)
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]
    has_box = ((bottom > top) & (right > left))[:, :, None]
    return torch.where(has_box, (~inside).to(share.dtype), share[:, None, None])[:, None]


def swapped(pairs: Tensor) -> Tensor:
    """(B, ...) -> the same with each image in its partner's place"""
    return pairs.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
