"""Caches small data sets on the device as uint8, and crops, flips and resizes whole batches there.

The loader (loader.py) then sends draws instead of pixels: which box of which image, and whether it is mirrored. These are
exactly the random numbers that the transform of a single image (transforms.py) draws; the pixels are within 2 gray levels of
Pillow's. (When an image is made smaller, Pillow 13 may resize the height before the width; a bicubic filter then clips other
overshoots of black and white noise.) Only images in memory (CIFAR, the MNIST family, digits) are cached, with transforms that
only crop, resize and mirror.
"""

import dataclasses
import functools
import math
import weakref

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2

from utils.device import on_device
from utils.randomness import raw_draws

from .splits import ArrayImages, Concat, Subset
from .transforms import ResizeToCover, covering

MAX_BYTES = 1 << 30               # of all images of a data set that is cached
RATIO = (3 / 4, 4 / 3)            # range of aspect ratios in torchvision's RandomResizedCrop
ATTEMPTS = 10                     # to find a box inside the image, also as there
NUMBERS = 2 * ATTEMPTS + 3        # random numbers that one image draws at most: the attempts, a position, the flip
CHUNK = 1 << 25                   # float32 values computed at a time on a GPU
WEIGHT_UNIT = 2.0 ** -14          # resize weights are multiples of this


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What a transform does to images of one size. Boxes are (top, left, height, width).

    scale None: the image is resized to `resized`, and a box of `size` is cut out: at `position`, or at a random one up to
    `padding` pixels outside the image, where it is black. Otherwise a random box, with a ratio within `scale` of the image's
    area and an aspect ratio within RATIO, is resized to `size`.
    """

    image_size: tuple[int, int]                  # (height, width), like all sizes
    size: tuple[int, int]                        # of the result
    interpolation: str
    channels: int
    scale: tuple[float, float] | None = None
    resized: tuple[int, int] = (0, 0)
    position: tuple[int, int] = (0, 0)
    padding: int = 0
    flip: bool = False

    def draw(self, rows: np.ndarray, seeds: list[int] | None) -> Tensor:
        """Draw what the transform, with these seeds, draws for the images in these rows (B,); seeds None: nothing is random.

        -> (B, 6) int32: row, box, whether mirrored. It needs no pixels, so any process can do it.
        """
        draws = np.zeros((len(rows), 6), dtype=np.int32)
        draws[:, 0], draws[:, 1:5] = rows, (*self.position, *self.size)
        if self.scale or self.padding or self.flip:
            numbers, used = raw_draws(seeds, NUMBERS), np.zeros(len(rows), dtype=np.int64)
            if self.scale:
                draws[:, 1:5], used = _random_boxes(numbers, self.image_size, self.scale)
            elif self.padding:
                draws[:, 1:3], used = numbers[:, :2] % (2 * self.padding + 1) - self.padding, used + 2
            if self.flip:
                draws[:, 5] = _unit_interval(numbers[np.arange(len(rows)), used]) < 0.5
        return torch.from_numpy(draws)


def _unit_interval(numbers: np.ndarray) -> np.ndarray:
    """Convert 32 random bits as torch.rand does -> [0, 1)"""
    return (numbers & 0xFFFFFF) * 2.0 ** -24


def _uniform(numbers: np.ndarray, low: float, high: float) -> np.ndarray:
    """Convert 32 random bits as Tensor.uniform_ does on float32, which rounds its multiplication and addition once."""
    low, high = np.float32(low), np.float32(high)
    return (_unit_interval(numbers) * float(high - low) + float(low)).astype(np.float32).astype(np.float64)


def _random_boxes(numbers: np.ndarray, image_size: tuple[int, int],
                  scale: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Draw as v2.RandomResizedCrop: numbers (B, NUMBERS) -> boxes (B, 4), and how many numbers each image has used (B,)"""
    (image_height, image_width), every = image_size, np.arange(len(numbers))
    low, high = np.log(np.float32(RATIO))
    areas = image_height * image_width * _uniform(numbers[:, 0:2 * ATTEMPTS:2], *scale)
    aspects = np.exp(_uniform(numbers[:, 1:2 * ATTEMPTS:2], low, high)).astype(np.float32).astype(np.float64)
    heights, widths = np.rint(np.sqrt(areas / aspects)), np.rint(np.sqrt(areas * aspects))
    fits = (widths > 0) & (widths <= image_width) & (heights > 0) & (heights <= image_height)
    first = fits.argmax(axis=1)
    height, width = (sides[every, first].astype(np.int64) for sides in (heights, widths))
    found = fits[every, first]
    used = np.where(found, 2 * first + 2, 2 * ATTEMPTS)
    # If none fits: the middle of the image, as large as RATIO allows.
    height[~found] = min(image_height, round(image_width / RATIO[0]))
    width[~found] = min(image_width, round(image_height * RATIO[1]))
    spare = image_height - height, image_width - width
    top, left = (np.where(found, numbers[every, used + number] % (room + 1), room // 2) for number, room in enumerate(spare))
    return np.stack([top, left, height, width], axis=1), used + 2 * found


def geometry(transform: v2.Compose, image_size: tuple[int, int], gray: bool) -> Geometry | str:
    """Return the Geometry of a transform of train_transform or eval_transform; or the reason why it has none."""
    first, *others = transform.transforms
    if isinstance(first, v2.RandomResizedCrop):
        given = {"scale": tuple(first.scale), "size": tuple(first.size)}
    elif isinstance(first, ResizeToCover):
        given = {"resized": covering(image_size, first.size)}
    elif isinstance(first, v2.Resize):
        given = {"size": tuple(first.size), "resized": tuple(first.size)}
    else:
        return f"{type(first).__name__} cannot be applied to whole batches"
    channels = 3
    for step in others:
        if isinstance(step, v2.RandomHorizontalFlip):
            given["flip"] = True
        elif isinstance(step, v2.RandomCrop):
            given["padding"] = step.padding[0] if step.padding else 0
        elif isinstance(step, v2.CenterCrop):
            given["size"] = tuple(step.size)
            given["position"] = tuple(round((whole - side) / 2) for whole, side in zip(given["resized"], given["size"]))
        elif isinstance(step, v2.Grayscale):
            channels = 1
        elif not isinstance(step, (v2.PILToTensor, v2.ToPILImage)):
            return f"{type(step).__name__} cannot be applied to whole batches"
    if channels == 1 and not gray:
        return "color images for a model of one channel"
    return Geometry(image_size, interpolation=first.interpolation.value, channels=channels, **given)


# ---------------------------------------------------------------------------------------------------- pixels


class CachedImages:
    """Images on a device. make(geometry.draw(rows[indices], seeds)) returns a batch of them."""

    def __init__(self, pixels: Tensor, rows: np.ndarray, geometry: Geometry):
        """pixels (n, C, height, width) uint8; image i of the split is pixels[rows[i]]"""
        self.pixels, self.rows, self.geometry = pixels, rows, geometry

    def make(self, draws: Tensor) -> Tensor:
        """draws (B, 6) int32 on the CPU -> (B, channels, height, width) uint8 on the images' device"""
        images = self.resize_each(draws) if self.pixels.device.type == "cpu" else self.resize_together(draws)
        return images.expand(-1, self.geometry.channels, -1, -1)

    def resize_each(self, draws: Tensor) -> Tensor:
        """Resize one image after the other with PyTorch's uint8 kernel: on a CPU three times as fast as resize_together."""
        geometry, images = self.geometry, []
        resize = functools.partial(F.interpolate, mode=geometry.interpolation, antialias=True)
        for row, *box, mirrored in draws.tolist():
            image, flipped = self.pixels[row:row + 1], [3] * mirrored
            if geometry.scale:          # flipping commutes with resizing, and before it there are fewer pixels
                images.append(resize(v2.functional.crop(image, *box).flip(flipped), geometry.size))
            else:
                images.append(v2.functional.crop(resize(image, geometry.resized), *box).flip(flipped))
        return torch.cat(images)

    def resize_together(self, draws: Tensor) -> Tensor:
        """Resize all images at once: one matrix product for the columns, another for the rows, each rounded to 8 bits.

        The weights are multiples of 2^-14, so float32 sums are exact in any order, whatever batch an image is in.
        """
        draws = on_device(draws, self.pixels.device).long()
        count = max(1, CHUNK // (self.pixels.shape[1] * math.prod(self.geometry.size)))
        return torch.cat([self._resize_chunk(part) for part in draws.split(count)])

    def _resize_chunk(self, draws: Tensor) -> Tensor:
        row, top, left, height, width, mirrored = draws.unbind(1)
        images = self.pixels[row].float()                                            # (B, C, H, W)
        columns = self._weights(1, left, width).transpose(1, 2)                      # (B, W, width)
        images = _round(torch.bmm(images.flatten(1, 2), columns).unflatten(1, images.shape[1:3]))
        images = _round(torch.matmul(self._weights(0, top, height)[:, None], images)).to(torch.uint8)
        return torch.where(mirrored[:, None, None, None] > 0, images.flip(3), images)

    def _weights(self, dim: int, start: Tensor, length: Tensor) -> Tensor:
        """Return the weights of Pillow's antialiased filters for boxes (B,) in one dimension -> (B, new pixels, old pixels); rows
        sum to 1, or to 0 where a new pixel is padding."""
        geometry, device = self.geometry, start.device
        old, size, start, length = geometry.image_size[dim], geometry.size[dim], start[:, None, None], length[:, None, None]
        place = torch.arange(size, device=device)[:, None]
        if geometry.scale:
            stretch, first, last = length / size, start, start + length
            center = start + (place + 0.5) * stretch
            inside = torch.ones_like(place, dtype=torch.bool)
        else:
            stretch, first, last = torch.tensor(old / geometry.resized[dim], device=device), 0, old
            center = (place + start + 0.5) * stretch
            inside = (place + start >= 0) & (place + start < geometry.resized[dim])
        pixel = torch.arange(old, device=device)
        weights = _filter((pixel + 0.5 - center) / stretch.clamp(min=1), geometry.interpolation)
        weights = weights * ((pixel >= first) & (pixel < last))
        weights = (weights / weights.sum(dim=2, keepdim=True) / WEIGHT_UNIT).round() * WEIGHT_UNIT
        return torch.where(inside, weights, 0.0)


def _filter(x: Tensor, interpolation: str) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    a = -0.5
    return torch.where(x < 1, ((a + 2) * x - (a + 3)) * x * x + 1, torch.where(x < 2, (((x - 5) * x + 8) * x - 4) * a, 0.0))


def _round(images: Tensor) -> Tensor:
    return images.add_(0.5).floor_().clamp_(0, 255)


# ----------------------------------------------------------------------------------------------------- caching


_PIXELS: "weakref.WeakKeyDictionary[ArrayImages, dict[tuple, Tensor]]" = weakref.WeakKeyDictionary()


def cache_on_device(split: Dataset, transform: v2.Compose, device: torch.device, any_size: bool = True) -> CachedImages | str:
    """Return the split's images on the device; or the reason why they cannot be cached, which may be their size unless
    `any_size`.

    The images of a data set are stored once, however many subsets and loaders use them, as long as the data set exists.
    """
    arrays, rows = _arrays(split)
    if not any_size and not cached_bytes(split):
        return "the images are in files, or too large to stay in memory"
    if not arrays:
        return "the images are not in memory"
    if not _are_alike(arrays):
        return "the images are of several kinds"
    device = torch.device("cpu") if device.type == "mps" else device         # an Apple GPU uses the machine's memory anyway
    found = geometry(transform, arrays[0].images.shape[1:3], arrays[0].images.ndim == 3)
    if isinstance(found, str):
        return found
    stored, name = _PIXELS.setdefault(arrays[0], {}), (str(device), *map(id, arrays))
    if name not in stored:
        stored[name] = _pixels(arrays, device)
    return CachedImages(stored[name], rows, found)


def cached_bytes(split: Dataset) -> int:
    """Return the bytes that the images need on a device; 0 unless they are in memory, alike and small enough to be cached."""
    arrays, _ = _arrays(split)
    size = sum(array.images.nbytes for array in arrays)
    return size if _are_alike(arrays) and size <= MAX_BYTES else 0


def _arrays(split: Dataset) -> tuple[list[ArrayImages], np.ndarray]:
    """-> (the arrays that contain the images, the index of each image of the split in their concatenation). No arrays if any
    image is not in memory."""
    if type(split) is Subset:
        arrays, rows = _arrays(split.split)
        return arrays, rows[split.indices] if arrays else rows
    if type(split) is Concat:
        parts = [_arrays(part) for part in split.splits]
        if not all(arrays for arrays, _ in parts):
            return [], np.empty(0, int)
        starts = np.cumsum([0, *(sum(map(len, arrays)) for arrays, _ in parts)])
        return [one for arrays, _ in parts for one in arrays], np.concatenate(
            [rows + start for (_, rows), start in zip(parts, starts)])
    is_stored = type(split) is ArrayImages and len(split) > 0          # a subclass may return other images
    return ([split] if is_stored else []), np.arange(len(split))


def _are_alike(arrays: list[ArrayImages]) -> bool:
    """Whether there are images, all uint8, of one size, and either gray or RGB."""
    kinds = {(array.images.dtype.name, *array.images.shape[1:]) for array in arrays}
    return len(kinds) == 1 and min(kinds)[0] == "uint8" and min(kinds)[3:] in ((), (3,))


def _pixels(arrays: list[ArrayImages], device: torch.device) -> Tensor:
    """Return the pixels (n, C, height, width): on a CPU channels last, and without a copy if the data set is one array."""
    images = [array.images if array.images.ndim == 4 else array.images[..., None] for array in arrays]
    stored = np.require(images[0] if len(images) == 1 else np.concatenate(images), requirements=["C", "W"])
    pixels = torch.from_numpy(stored).permute(0, 3, 1, 2)
    return pixels if device.type == "cpu" else pixels.to(device).contiguous()
