"""Small data sets cached on the device as uint8, and whole batches of random crops, flips and resizes made there.

The loader (loader.py) then transports no pixels but draws: which box of which image, and whether it is mirrored. They are
the draws of the transform of a single image (transforms.py), number for number; the pixels are within 2 grey levels of
Pillow's. (Of an image that is made smaller, Pillow 13 may resize the height before the width; of black and white noise a
bicubic filter then cuts off other overshoots.) Cached are images in memory (CIFAR, the MNIST family, digits) under
transforms that only crop, resize and mirror.
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

MAX_BYTES = 1 << 30               # of the images of a data set that is cached
RATIO = (3 / 4, 4 / 3)            # of torchvision's RandomResizedCrop, as what follows
ATTEMPTS = 10                     # to find a box inside the image
NUMBERS = 2 * ATTEMPTS + 3        # that one image draws at most: the attempts, a position, the flip
CHUNK = 1 << 25                   # float32 values made at a time on a GPU
WEIGHT_UNIT = 2.0 ** -14          # of the weights of pixels


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What a transform does to images of one size. Boxes are (top, left, height, width).

    scale None: the image is resized to `resized` and a box of `size` is cut out, which may reach beyond it into black: at
    `position`, or at a random one up to `padding` pixels outside. Else a random box, of the share `scale` of the image's
    area and of an aspect ratio within RATIO, is resized to `size`.
    """

    image_size: tuple[int, int]                  # height, width, as all sizes
    size: tuple[int, int]                        # of the result
    interpolation: str
    channels: int
    scale: tuple[float, float] | None = None
    resized: tuple[int, int] = (0, 0)
    position: tuple[int, int] = (0, 0)
    padding: int = 0
    flip: bool = False

    def draw(self, rows: np.ndarray, seeds: list[int] | None) -> Tensor:
        """Draw what the transform, seeded so, draws for the images in these rows (B,); seeds None: nothing is random.

        -> (B, 6) int32: row, box, whether mirrored. It needs no pixels, so that any process can do it.
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
    """32 bits -> what torch.rand makes of them, in [0, 1)"""
    return (numbers & 0xFFFFFF) * 2.0 ** -24


def _uniform(numbers: np.ndarray, low: float, high: float) -> np.ndarray:
    """As Tensor.uniform_ on float32, whose multiplication and addition are rounded once."""
    low, high = np.float32(low), np.float32(high)
    return (_unit_interval(numbers) * float(high - low) + float(low)).astype(np.float32).astype(np.float64)


def _random_boxes(numbers: np.ndarray, image_size: tuple[int, int],
                  scale: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """v2.RandomResizedCrop's draws: (B, NUMBERS) -> boxes (B, 4), and how many of its numbers each has used (B,)"""
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
    # None fits: the middle, as much of it as the ratio allows.
    height[~found] = min(image_height, round(image_width / RATIO[0]))
    width[~found] = min(image_width, round(image_height * RATIO[1]))
    spare = image_height - height, image_width - width
    top, left = (np.where(found, numbers[every, used + number] % (room + 1), room // 2) for number, room in enumerate(spare))
    return np.stack([top, left, height, width], axis=1), used + 2 * found


def geometry(transform: v2.Compose, image_size: tuple[int, int], grey: bool) -> Geometry | str:
    """The Geometry of train_transform's or eval_transform's transform; or why it has none."""
    first, *others = transform.transforms
    if isinstance(first, v2.RandomResizedCrop):
        given = {"scale": tuple(first.scale), "size": tuple(first.size)}
    elif isinstance(first, ResizeToCover):
        given = {"resized": covering(image_size, first.size)}
    elif isinstance(first, v2.Resize):
        given = {"size": tuple(first.size), "resized": tuple(first.size)}
    else:
        return f"{type(first).__name__} is not for whole batches"
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
            return f"{type(step).__name__} is not for whole batches"
    if channels == 1 and not grey:
        return "color images for a model of one channel"
    return Geometry(image_size, interpolation=first.interpolation.value, channels=channels, **given)


# ---------------------------------------------------------------------------------------------------- pixels


class CachedImages:
    """Images on a device, of which make(geometry.draw(rows[indices], seeds)) makes a batch."""

    def __init__(self, pixels: Tensor, rows: np.ndarray, geometry: Geometry):
        """pixels (n, C, height, width) uint8; image i of the split is pixels[rows[i]]"""
        self.pixels, self.rows, self.geometry = pixels, rows, geometry

    def make(self, draws: Tensor) -> Tensor:
        """draws (B, 6) int32 on the CPU -> (B, channels, height, width) uint8 on the images' device"""
        images = self.resize_each(draws) if self.pixels.device.type == "cpu" else self.resize_together(draws)
        return images.expand(-1, self.geometry.channels, -1, -1)

    def resize_each(self, draws: Tensor) -> Tensor:
        """One image after the other by PyTorch's uint8 kernel: on a CPU three times as fast as resize_together."""
        geometry, images = self.geometry, []
        resize = functools.partial(F.interpolate, mode=geometry.interpolation, antialias=True)
        for row, *box, mirrored in draws.tolist():
            image, flipped = self.pixels[row:row + 1], [3] * mirrored
            if geometry.scale:          # flipped while there are few pixels: resizing commutes with it
                images.append(resize(v2.functional.crop(image, *box).flip(flipped), geometry.size))
            else:
                images.append(v2.functional.crop(resize(image, geometry.resized), *box).flip(flipped))
        return torch.cat(images)

    def resize_together(self, draws: Tensor) -> Tensor:
        """All images at once: a matrix product for the columns, another for the rows, each rounded to 8 bits.

        The weights are multiples of 2^-14, so that float32 sums are exact in any order, whatever batch an image is in.
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
        """Of boxes (B,) in one dimension -> (B, new pixels, old pixels): Pillow's antialiased filters, rows sum to 1, or to 0
        where a new pixel is padding."""
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
    """The split's images on the device; or why they cannot be cached: without `any_size` because they are too large, too.

    They are stored there once, whatever subsets of the data set and however many loaders use them, as long as it exists.
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
    """What the images take on a device: 0 unless they are in memory, of one kind, and small enough to be cached."""
    arrays, _ = _arrays(split)
    size = sum(array.images.nbytes for array in arrays)
    return size if _are_alike(arrays) and size <= MAX_BYTES else 0


def _arrays(split: Dataset) -> tuple[list[ArrayImages], np.ndarray]:
    """-> (the arrays that hold the images; the split's images as numbers into them, one after the other). No arrays if an
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
    """Whether there are images, all of them uint8, of one size, and grey or of three colors."""
    kinds = {(array.images.dtype.name, *array.images.shape[1:]) for array in arrays}
    return len(kinds) == 1 and min(kinds)[0] == "uint8" and min(kinds)[3:] in ((), (3,))


def _pixels(arrays: list[ArrayImages], device: torch.device) -> Tensor:
    """(n, C, height, width): on a CPU channels last, and the data set's own memory where it is one array."""
    images = [array.images if array.images.ndim == 4 else array.images[..., None] for array in arrays]
    stored = np.require(images[0] if len(images) == 1 else np.concatenate(images), requirements=["C", "W"])
    pixels = torch.from_numpy(stored).permute(0, 3, 1, 2)
    return pixels if device.type == "cpu" else pixels.to(device).contiguous()
