"""Image transforms: per image on the CPU, from PIL to uint8; normalising happens on the device.

RandAugment is Cubuk et al. (arXiv 1909.13719), random erasing Zhong et al. (arXiv 1708.04896). Differs from timm's
"rand-m9-mstd0.5-inc1": no jitter of the magnitude, the operations of the paper (one of them: nothing), holes black.
All random numbers come from torch's global CPU generator, which the caller seeds per sample (randomness.seeded).
"""

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

MAGNITUDES = 11               # 0..10 as in the paper and in timm; torchvision's default of 31 makes 9 a third as strong
ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)
ERASED_STD = 0.225 * 255      # of ImageNet's pixels


def train_transform(kind: str, img_size: tuple[int, int], *, flip: bool = True, channels: int = 3,
                    interpolation: str = "bilinear", crop_scale: float = 0.05, crop_padding: int = 4,
                    rotation: float = 0.0, color_jitter: float = 0.0, randaugment_ops: int = 0,
                    randaugment_magnitude: int = 9, random_erasing: float = 0.0) -> v2.Compose:
    """PIL RGB -> uint8 (channels, height, width).

    kind: "crop" (a random part of at least `crop_scale` of the area, resized; 0.05 as in the ViT paper's fine-tuning),
    "pad" (resized, `crop_padding` black pixels around it, a random crop of the size; as for CIFAR in arXiv 1512.03385),
    either with "_flip" (mirrored half of the time), or "none" (resized). What follows acts on every kind:
    flip: whether the data set's classes survive mirroring; digits do not. rotation: up to so many degrees either way.
    color_jitter: brightness, contrast and saturation times 1 - color_jitter to 1 + color_jitter.
    randaugment_ops operations of randaugment_magnitude 0..10. random_erasing: probability for an image.
    channels 1: the image's luma; a grey image comes back as it was.
    """
    mode = InterpolationMode(interpolation)
    crop, _, mirrored = kind.partition("_")
    assert crop in ("crop", "pad", "none") and mirrored in ("", "flip") and kind != "none_flip", kind
    if crop == "crop":
        steps = [v2.RandomResizedCrop(img_size, scale=(crop_scale, 1.0), interpolation=mode, antialias=True)]
    else:
        steps = [v2.Resize(img_size, interpolation=mode, antialias=True)]
    if crop == "pad":
        steps.append(v2.RandomCrop(img_size, padding=crop_padding))
    if mirrored and flip:
        steps.append(v2.RandomHorizontalFlip())
    if rotation:
        steps.append(v2.RandomRotation(rotation, interpolation=mode))
    if color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    if randaugment_ops:
        steps.append(v2.RandAugment(randaugment_ops, randaugment_magnitude, MAGNITUDES, interpolation=mode))
    steps += to_tensor(channels)
    if random_erasing:
        steps.append(RandomErasing(random_erasing, ERASED_AREA, ERASED_RATIO, value="random"))
    return v2.Compose(steps)


def eval_transform(img_size: tuple[int, int], *, channels: int = 3, interpolation: str = "bilinear",
                   crop: float = 0.0) -> v2.Compose:
    """PIL RGB -> uint8 (channels, height, width).

    crop 0: the whole image resized, its shape not kept, as Google's evaluation. 0 < crop <= 1: its shape kept, and the
    middle cut out, which holds the share `crop` of the shorter side (DeiT and MAE: 0.875, that is 224 of 256 pixels).
    """
    assert 0 <= crop <= 1, crop
    mode = InterpolationMode(interpolation)
    if crop:
        steps = [ResizeToCover(tuple(int(side / crop) for side in img_size), mode), v2.CenterCrop(img_size)]
    else:
        steps = [v2.Resize(img_size, interpolation=mode, antialias=True)]
    return v2.Compose([*steps, *to_tensor(channels)])


def to_tensor(channels: int) -> list[v2.Transform]:
    """PIL RGB -> uint8 (channels, height, width)"""
    assert channels in (1, 3), channels
    # Grey while it is a PIL image: on tensors torchvision's weights sum to 0.9999 and are cut off, 255 becomes 254.
    return [*([v2.Grayscale()] if channels == 1 else []), v2.PILToTensor()]


class ResizeToCover(v2.Transform):
    """PIL image -> the smallest of its shape that is at least `size` (height, width); one side is exactly that."""

    def __init__(self, size: tuple[int, int], interpolation: InterpolationMode):
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def transform(self, image: Image.Image, params: dict) -> Image.Image:
        (height, width), (image_width, image_height) = self.size, image.size
        if height * image_width >= width * image_height:
            width = height * image_width // image_height
        else:
            height = width * image_height // image_width
        return v2.functional.resize(image, [height, width], self.interpolation, antialias=True)


class RandomErasing(v2.RandomErasing):
    """On uint8, which torchvision's would fill with noise of standard deviation 1: nearly black.

    timm fills with standard normal noise after normalising. Here, before it: mean 127.5, standard deviation 57, cut to
    0..255, which is the same for images normalised by ImageNet's values.
    """

    def make_params(self, flat_inputs: list) -> dict:
        params = super().make_params(flat_inputs)
        if params["v"] is not None:             # None: no rectangle fitted, nothing is erased
            params["v"] = (127.5 + ERASED_STD * params["v"]).round().clamp(0, 255).to(torch.uint8)
        return params


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8, or floating point in 0..255, (B, C, height, width) -> (x / 255 - mean) / std, on the images' device"""
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
    return ((images.float() / 255 - mean) / std).to(dtype)
