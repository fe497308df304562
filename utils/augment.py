"""Image transforms: per image on the CPU, from PIL to uint8; normalising happens on the device.

All random numbers come from torch's global CPU generator, which the caller seeds per sample (randomness.seeded).
"""

import torch
from torch import Tensor
from torchvision.transforms import v2

CROP_SCALE = (0.05, 1.0)      # share of the image's area, as in the ViT paper's fine-tuning


def train_transform(kind: str, img_size: tuple[int, int], flip: bool) -> v2.Compose:
    """PIL RGB -> uint8 (3, height, width).

    kind: "crop_flip" (random resized crop, horizontal flip), "crop" (without the flip) or "none" (plain resize).
    flip: whether the data set's classes survive mirroring; digits do not.
    """
    if kind == "none":
        return eval_transform(img_size)
    steps = [v2.RandomResizedCrop(img_size, scale=CROP_SCALE, antialias=True)]
    if kind == "crop_flip" and flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose([*steps, v2.PILToTensor()])


def eval_transform(img_size: tuple[int, int]) -> v2.Compose:
    """PIL RGB -> uint8 (3, height, width): the whole image resized, its shape not kept, as Google's evaluation."""
    return v2.Compose([v2.Resize(img_size, antialias=True), v2.PILToTensor()])


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (B, C, height, width) -> (x / 255 - mean) / std, on the images' device"""
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
    return ((images.float() / 255 - mean) / std).to(dtype)
