"""Image transforms: per image on the CPU, to uint8; normalization happens on the device.

An image is PIL RGB, a uint8 tensor, or a JPEG that is only decoded as far as its crop needs (decode.py). The random numbers,
and so the crops, are the same for all three. Tensors, and with them most JPEGs, are resized by PyTorch's uint8 kernel: three
times as fast as Pillow's, and at most one gray level from it (bicubic: two).

RandAugment is Cubuk et al. (arXiv 1909.13719), random erasing Zhong et al. (arXiv 1708.04896). Differences from timm's
"rand-m9-mstd0.5-inc1": the magnitude is not jittered, the operations are those of the paper (one of them does nothing), and
empty areas are black. All random numbers come from torch's global CPU generator, which the caller seeds per sample
(randomness.seeded). Steps that move pixels move torchvision's Masks in the same way, so that an attention edit follows its image.
"""

import functools

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from .decode import MAX_PIXELS, Undecoded, decoded
from .reading import UPRIGHT, stored_box, turned_size, upright

MAGNITUDES = 11               # 0..10 as in the paper and in timm; with torchvision's default of 31, 9 is a third as strong
ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)
ERASED_STD = 0.225 * 255      # of ImageNet's pixels
# A JPEG is decoded with at least this many times the sides of the result. In training, crops and colors vary by far more than
# what is lost (decode.py); in evaluation, accuracies are compared.
TRAIN_MARGIN, EVAL_MARGIN = 1.0, 2.0
MAX_STRETCH = 64              # aspect ratio, relative to the crop, above which evaluation crops before it resizes


def train_transform(kind: str, img_size: tuple[int, int], *, flip: bool = True, channels: int = 3,
                    interpolation: str = "bilinear", crop_scale: float = 0.05, crop_padding: int = 4,
                    rotation: float = 0.0, color_jitter: float = 0.0, randaugment_ops: int = 0,
                    randaugment_magnitude: int = 9, random_erasing: float = 0.0) -> v2.Compose:
    """Return the training transform: PIL RGB, a source of FileImages or uint8 (3, H, W) -> uint8 (channels, height, width).

    kind: "crop" (a random part of at least `crop_scale` of the area, resized; 0.05 as in the ViT paper's fine-tuning),
    "pad" (resized, `crop_padding` black pixels around it, a random crop of the size; as for CIFAR in arXiv 1512.03385),
    either with "_flip" (mirrored half of the time), or "none" (resized). The rest applies to every kind:
    flip: whether a mirrored image keeps its class; digits do not. rotation: up to this many degrees in either direction.
    color_jitter: brightness, contrast and saturation times 1 - color_jitter to 1 + color_jitter.
    randaugment_ops operations of randaugment_magnitude 0..10. random_erasing: probability for an image.
    channels 1: the image's luma; a gray image is unchanged.
    """
    mode = InterpolationMode(interpolation)
    crop, _, mirrored = kind.partition("_")
    assert crop in ("crop", "pad", "none") and mirrored in ("", "flip") and kind != "none_flip", kind
    if crop == "crop":
        steps = [RandomResizedCrop(img_size, scale=(crop_scale, 1.0), interpolation=mode, antialias=True)]
    else:
        steps = [Resize(img_size, mode)]
    if crop == "pad":
        steps.append(v2.RandomCrop(img_size, padding=crop_padding))
    if mirrored and flip:
        steps.append(v2.RandomHorizontalFlip())
    if rotation or color_jitter or randaugment_ops:
        steps.append(v2.ToPILImage())           # so that Pillow always changes colors and rotates; PIL images are kept
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
    """Return the evaluation transform: PIL RGB, a source of FileImages or uint8 (3, H, W) -> uint8 (channels, height, width).

    crop 0: the whole image is resized without keeping its aspect ratio, as in Google's evaluation. 0 < crop <= 1: the aspect
    ratio is kept, and the center is cut out, with the ratio `crop` of the shorter side (DeiT and MAE: 0.875, that is 224 of 256
    pixels).
    """
    mode = InterpolationMode(interpolation)
    if crop:
        steps = [ResizeToCover(_before_crop(img_size, crop), mode), v2.CenterCrop(img_size)]
    else:
        steps = [Resize(img_size, mode, EVAL_MARGIN)]
    return v2.Compose([*steps, *to_tensor(channels)])


def eval_region(image_size: tuple[int, int], img_size: tuple[int, int], crop: float) -> tuple[float, float, float, float]:
    """Return the part of an image of image_size (height, width) that eval_transform shows: top, left, bottom, right as ratios
    of its sides."""
    if not crop:
        return 0.0, 0.0, 1.0, 1.0
    resized = covering(image_size, _before_crop(img_size, crop))
    first = [round((whole - side) / 2) for whole, side in zip(resized, img_size)]        # as CenterCrop rounds
    return (*(start / whole for start, whole in zip(first, resized)),
            *((start + side) / whole for start, side, whole in zip(first, img_size, resized)))


def _before_crop(img_size: tuple[int, int], crop: float) -> tuple[int, int]:
    return tuple(int(side / crop) for side in img_size)


def covering(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest size with the aspect ratio of image_size (height, width) that covers `size`; one side is equal."""
    (height, width), (image_height, image_width) = size, image_size
    if height * image_width >= width * image_height:
        return height, height * image_width // image_height
    return width * image_height // image_width, width


def to_tensor(channels: int) -> list[v2.Transform]:
    """Return the last steps of a transform: PIL RGB or uint8 (3, height, width) -> uint8 (channels, height, width)"""
    return [*([Grayscale()] if channels == 1 else []), v2.PILToTensor()]


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's transform, also for an image that is not decoded yet."""

    def transform(self, inpt: Image.Image | Tensor, params: dict) -> Image.Image | Tensor:
        box = tuple(params[name] for name in ("top", "left", "height", "width"))
        return resized(inpt, self.size, self.interpolation, TRAIN_MARGIN, box)


class Resize(v2.Resize):
    """Resizes the whole image to `size` (height, width), also if it is not decoded yet."""

    def __init__(self, size: tuple[int, int], interpolation: InterpolationMode, margin: float = TRAIN_MARGIN):
        super().__init__(size, interpolation, antialias=True)
        self.margin = margin

    def transform(self, inpt: Image.Image | Tensor, params: dict) -> Image.Image | Tensor:
        return resized(inpt, self.size, self.interpolation, self.margin)


class ResizeToCover(v2.Transform):
    """Resizes the image, with its aspect ratio, to the smallest size that covers `size` (height, width)."""

    def __init__(self, size: tuple[int, int], interpolation: InterpolationMode):
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def transform(self, inpt: Image.Image | Tensor, params: dict) -> Image.Image | Tensor:
        whole = tuple(v2.functional.get_size(inpt))
        box = middle(whole, self.size)
        return resized(inpt, covering(box[2:], self.size), self.interpolation, EVAL_MARGIN, None if box[2:] == whole else box)


def middle(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the box (top, left, height, width) in the middle of an image (height, width) to resize to cover `size`:
    the whole image, except for long strips. A strip of 1 x 65,000 px would otherwise be resized to 256 x 16,640,000."""
    longest = min(image_size) * -(-max(size) * MAX_STRETCH // min(size))
    kept = [side if side <= longest else longest + (side - longest) % 2 for side in image_size]        # equal on both ends
    return (*((whole - side) // 2 for whole, side in zip(image_size, kept)), *kept)


def resized(image: Image.Image | Tensor, size: tuple[int, int], interpolation: InterpolationMode, margin: float,
            box: tuple[int, int, int, int] | None = None) -> Image.Image | Tensor:
    """Resize a box (top, left, height, width; None: the whole image) of an image to `size` (height, width). An image that is not
    decoded yet is decoded with at least `margin` times as many pixels in both directions."""
    turn = UPRIGHT
    if isinstance(image, Undecoded):        # turned after it is resized, when it has the fewest pixels
        turn, whole = image.turn, (image.height, image.width)
        size, box = turned_size(size, turn), stored_box(box or (0, 0, *whole), whole, turn)
        image, reduction = decoded(image, box[2:], size, margin)
        if reduction > 1:               # only Pillow resizes boxes with fractions of pixels
            top, left, height, width = box
            part = tuple(side / reduction for side in (left, top, left + width, top + height))
            return upright(image.resize(size[::-1], Image.Resampling[interpolation.name], part), turn)
    if not isinstance(image, tv_tensors.TVTensor):
        rows, columns = box[2:] if box else v2.functional.get_size(image)
        if rows * size[1] > MAX_PIXELS:     # the libraries resize rows before columns, which takes gigabytes for a strip
            image, box = resized(image, (size[0], columns), interpolation, margin, box), None
    if type(image) is Tensor:
        top, left, height, width = box or (0, 0, *image.shape[1:])
        # A view as a batch of one with its channels last, as decoders return them: twice as fast as torchvision's resize.
        batch = image.movedim(0, -1)[None, top:top + height, left:left + width].movedim(-1, 1)
        return upright(F.interpolate(batch, size, mode=interpolation.value, antialias=True)[0], turn)
    if box is None:
        return v2.functional.resize(image, list(size), interpolation, antialias=True)
    return upright(v2.functional.resized_crop(image, *box, list(size), interpolation, antialias=True), turn)


class Grayscale(v2.Grayscale):
    """Pillow's conversion, for tensors too: torchvision's weights for tensors sum to 0.9999, so 255 would become 254."""

    def transform(self, inpt: Image.Image | Tensor, params: dict) -> Image.Image:
        return super().transform(v2.functional.to_pil_image(inpt) if type(inpt) is Tensor else inpt, params)


class RandomErasing(v2.RandomErasing):
    """Random erasing of uint8 images, which torchvision would fill with noise of standard deviation 1: nearly black.

    timm fills with standard normal noise after normalizing. Here the noise is added before, with mean 127.5 and standard
    deviation 57, clipped to 0..255, which is the same for images normalized by ImageNet's values.
    """

    def make_params(self, flat_inputs: list) -> dict:
        params = super().make_params(flat_inputs)
        if params["v"] is not None:             # None: no rectangle fitted, nothing is erased
            params["v"] = (127.5 + ERASED_STD * params["v"]).round().clamp(0, 255).to(torch.uint8)
        return params

    def transform(self, inpt: Tensor, params: dict) -> Tensor:
        if isinstance(inpt, tv_tensors.Mask) and params["v"] is not None:
            top, left = params["i"], params["j"]
            inpt[:, top:top + params["h"], left:left + params["w"]] = 0         # no edit where there is only noise
            return inpt
        return super().transform(inpt, params)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (x / 255 - mean) / std of images (B, C, height, width), uint8 or floating point in 0..255, on their device."""
    mean, std = _of_bytes(tuple(mean), tuple(std), images.device)
    # Channels first and, for uint8, in place: about twice as fast on a CPU. A compiled model also needs always the same layout.
    images = images.contiguous()
    if images.dtype == torch.uint8:
        return images.to(torch.float32).sub_(mean).div_(std).to(dtype)
    return (images - mean).div_(std).to(dtype)


@functools.lru_cache(maxsize=16)
def _of_bytes(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and std times 255, (C, 1, 1) each. They are copied to a device only once, because each copy waits for it."""
    with torch.inference_mode(False):           # they may be used with gradients later
        mean, std = (255 * torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
        return mean.to(device, torch.float32), std.to(device, torch.float32)
