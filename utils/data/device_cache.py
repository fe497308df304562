"""Small data sets held on the device as uint8, and random crops, flips and resizes of whole batches there.

The loader (data.py) then carries no pixels but what is to be made of which image: the crop and flip that the transform of
a single image (augment.py) would draw, number for number. Held are images that lie in memory (CIFAR, the MNIST family,
digits) under transforms that only crop, resize and mirror.

On a GPU the pixels are made with Pillow's own integers (Resample.c: its filter in 22-bit fixed point, width before height,
each pass rounded to 8 bits), so that they equal those of the transform bit for bit, in every batch. (Pillow 13 takes the
height first where that is less work, which it never is in making images larger.) On a CPU it is PyTorch's uint8 kernel,
faster than Pillow, one image at a time: one grey level from Pillow (bicubic: two) in one value of two hundred (of black
and white noise, one of twenty).
"""

import dataclasses
import math
import weakref

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from utils.device import on_device
from utils.randomness import raw_draws

from .splits import ArrayImages, Concat, Subset
from .transforms import ResizeToCover, covering

MAX_BYTES = 1 << 30               # of images; and on a GPU a quarter of what is free
PRECISION_BITS = 22               # of Pillow's weights: 32 - 8 bits of a pixel - 2 of overshoot
ATTEMPTS = 10                     # of torchvision's RandomResizedCrop to find a box inside the image
NUMBERS = 2 * ATTEMPTS + 3        # that one image draws at most: the attempts, a place, the flip
CHUNK = 1 << 24                   # values made at a time on a GPU, which take 12 bytes each meanwhile
KERNELS = {"bilinear": torch.ops.aten._upsample_bilinear2d_aa.out, "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What a transform makes of images of one size. Boxes are (top, left, height, width).

    scale None: the image is resized to `resized` and a box of `size` taken there, which may stick out into black: at
    `place`, or at a random one up to `padding` pixels outside. Else a random box, a share `scale` of the image in area, of
    the side ratio `ratio`, is resized to `size`.
    """

    image_size: tuple[int, int]
    size: tuple[int, int]                        # of what is made; height, width as all of them
    interpolation: str
    channels: int
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    resized: tuple[int, int] = (0, 0)
    place: tuple[int, int] = (0, 0)
    padding: int = 0
    flip: bool = False

    def plan(self, rows: np.ndarray, seeds: list[int] | None) -> Tensor:
        """What to make of the images in these rows (B,), whose transforms would be seeded so (None: nothing is drawn):
        (B, 6) int32: row, box, whether mirrored. For any process: it takes no pixels."""
        plan = np.zeros((len(rows), 6), dtype=np.int32)
        plan[:, 0], plan[:, 1:5] = rows, (*self.place, *self.size)
        if self.scale or self.padding or self.flip:
            numbers, used = raw_draws(seeds, NUMBERS), np.zeros(len(rows), dtype=np.int64)
            if self.scale:
                plan[:, 1:5], used = _crops(numbers, self.image_size, self.scale, self.ratio)
            elif self.padding:
                plan[:, 1:3], used = numbers[:, :2] % (2 * self.padding + 1) - self.padding, used + 2
            if self.flip:
                plan[:, 5] = _shares(numbers[np.arange(len(rows)), used]) < 0.5
        return torch.from_numpy(plan)


def _shares(numbers: np.ndarray) -> np.ndarray:
    """32 bits -> what torch.rand makes of them, in [0, 1)"""
    return (numbers & 0xFFFFFF) * 2.0 ** -24


def _uniform(numbers: np.ndarray, low: float, high: float) -> np.ndarray:
    """As Tensor.uniform_ on float32, whose multiplication and addition are rounded once."""
    low, high = np.float32(low), np.float32(high)
    return (_shares(numbers) * float(high - low) + float(low)).astype(np.float32).astype(np.float64)


def _crops(numbers: np.ndarray, image_size: tuple[int, int], scale: tuple[float, float],
           ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """v2.RandomResizedCrop's draws: (B, NUMBERS) -> boxes (B, 4), and how many of its numbers each has used (B,)"""
    (image_height, image_width), every = image_size, np.arange(len(numbers))
    low, high = np.log(np.float32(ratio))
    areas = image_height * image_width * _uniform(numbers[:, 0:2 * ATTEMPTS:2], *scale)
    aspects = np.exp(_uniform(numbers[:, 1:2 * ATTEMPTS:2], low, high)).astype(np.float32).astype(np.float64)
    heights, widths = np.rint(np.sqrt(areas / aspects)), np.rint(np.sqrt(areas * aspects))
    fits = (widths > 0) & (widths <= image_width) & (heights > 0) & (heights <= image_height)
    first = fits.argmax(axis=1)
    height, width = (sides[every, first].astype(np.int64) for sides in (heights, widths))
    found = fits[every, first]
    used = np.where(found, 2 * first + 2, 2 * ATTEMPTS)
    # None fits: the middle, as much of it as the ratio allows.
    height[~found] = min(image_height, round(image_width / ratio[0]))
    width[~found] = min(image_width, round(image_height * ratio[1]))
    spare = image_height - height, image_width - width
    top, left = (np.where(found, numbers[every, used + number] % (room + 1), room // 2) for number, room in enumerate(spare))
    return np.stack([top, left, height, width], axis=1), used + 2 * found


def geometry(transform: v2.Compose, image_size: tuple[int, int], grey: bool) -> Geometry | str:
    """What train_transform's or eval_transform's transform makes of the images; or why it cannot be told, in words."""
    first, *others = transform.transforms
    if isinstance(first, v2.RandomResizedCrop):
        given = {"scale": tuple(first.scale), "ratio": tuple(first.ratio), "size": tuple(first.size)}
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
            given["place"] = tuple(round((whole - side) / 2) for whole, side in zip(given["resized"], given["size"]))
        elif isinstance(step, v2.Grayscale):
            channels = 1
        elif not isinstance(step, (v2.PILToTensor, v2.ToPILImage)):
            return f"{type(step).__name__} is not for whole batches"
    if channels == 1 and not grey:
        return "colour images for a model of one channel"
    return Geometry(image_size, interpolation=first.interpolation.value, channels=channels, **given)


# ---------------------------------------------------------------------------------------------------- pixels


class Held:
    """Images on a device, of which make(geometry.plan(rows[indices], seeds)) makes a batch."""

    def __init__(self, pixels: Tensor, rows: np.ndarray, geometry: Geometry, together: bool):
        """pixels (n, C, height, width) uint8; image i of the split is pixels[rows[i]]. together: as on a GPU."""
        self.pixels, self.rows, self.geometry = pixels, rows, geometry
        sides = zip(geometry.image_size, geometry.resized, geometry.size)
        self._tables = [_Table(*side, geometry, pixels.device) for side in sides] if together else None

    def make(self, plan: Tensor) -> Tensor:
        """plan (B, 6) int32 on the CPU -> (B, channels, height, width) uint8 on the images' device"""
        images = self._one_by_one(plan.tolist()) if self._tables is None else self._together(plan)
        return images.expand(-1, self.geometry.channels, -1, -1)

    def _one_by_one(self, plan: list[list[int]]) -> Tensor:
        shape, channels = self.geometry.size, self.pixels.shape[1]
        kernel, resized = KERNELS[self.geometry.interpolation], self.geometry.resized
        # Channels last, as they are stored: PyTorch's kernel is twice as fast there.
        images = torch.empty(len(plan), channels, *shape, dtype=torch.uint8, memory_format=torch.channels_last)
        whole = torch.empty(1, channels, *resized, dtype=torch.uint8, memory_format=torch.channels_last)
        for number, (row, top, left, height, width, mirrored) in enumerate(plan):
            image, made = self.pixels[row:row + 1], images[number:number + 1]
            if self.geometry.scale:
                image = image[:, :, top:top + height, left:left + width]
                # Mirroring commutes with resizing, and there are fewer pixels before.
                kernel(image.flip(3) if mirrored else image, shape, False, out=made)
            else:
                kernel(image, resized, False, out=whole)
                inside = whole[:, :, max(top, 0):top + height, max(left, 0):left + width]
                target = made.zero_()[:, :, max(-top, 0):, max(-left, 0):][:, :, :inside.shape[2], :inside.shape[3]]
                target.copy_(inside)
                if mirrored:
                    made.copy_(made.flip(3))
        return images

    def _together(self, plan: Tensor) -> Tensor:
        plan = on_device(plan, self.pixels.device).long()
        size = max(1, CHUNK // (self.pixels.shape[1] * math.prod(self.geometry.size)))
        return torch.cat([self._pass(part) for part in plan.split(size)])

    def _pass(self, plan: Tensor) -> Tensor:
        row, top, left, height, width, mirrored = plan.unbind(1)
        rows, columns = self._tables
        images = _resampled(self.pixels[row], 3, *columns(left, width, mirrored))
        return _resampled(images, 2, *rows(top, height, torch.zeros_like(mirrored)))


def hold(split: Dataset, transform: v2.Compose, device: torch.device) -> Held | str:
    """The split's images on the device; or why they cannot be held there, in words.

    They lie there once, whatever parts of the data set and however many loaders use them, as long as the data set does.
    """
    leaves: list[ArrayImages] = []
    rows = _rows(split, leaves)
    if rows is None:
        return "the images are not in memory"
    shapes = {(leaf.images.dtype.name, *leaf.images.shape[1:]) for leaf in leaves}
    dtype, height, width, *colours = min(shapes)
    if len(shapes) > 1 or dtype != "uint8" or colours not in ([], [3]):
        return "the images are of several kinds"
    found = geometry(transform, (height, width), not colours)
    if isinstance(found, str):
        return found
    size, limit = sum(leaf.images.nbytes for leaf in leaves), MAX_BYTES
    if device.type == "cuda":
        limit = min(limit, torch.cuda.mem_get_info(device)[0] // 4)
    held = _HELD.setdefault(leaves[0], {})
    name = (str(device), *map(id, leaves))
    if name not in held:
        if size > limit:
            return f"{size:,} bytes of images, more than {limit:,}"
        held[name] = _pixels(leaves, device)
    return Held(held[name], rows, found, device.type != "cpu")


_HELD: "weakref.WeakKeyDictionary[ArrayImages, dict[tuple, Tensor]]" = weakref.WeakKeyDictionary()


def _rows(split: Dataset, leaves: list[ArrayImages]) -> np.ndarray | None:
    """Where the split's images are in the leaves, one after the other, to which it adds. None if one is not in memory."""
    if type(split) is Subset:
        rows = _rows(split.split, leaves)
        return None if rows is None else rows[split.indices]
    if type(split) is Concat:
        parts = [_rows(part, leaves) for part in split.splits]
        return None if any(rows is None for rows in parts) else np.concatenate(parts)
    if type(split) is not ArrayImages or not len(split):         # what is built on it may give other images
        return None
    if not any(leaf is split for leaf in leaves):
        leaves.append(split)
    number = next(number for number, leaf in enumerate(leaves) if leaf is split)
    return sum(len(leaf) for leaf in leaves[:number]) + np.arange(len(split))


def _pixels(leaves: list[ArrayImages], device: torch.device) -> Tensor:
    """(n, C, height, width): on a CPU channels last, and the data set's own memory where it is one array."""
    arrays = [leaf.images if leaf.images.ndim == 4 else leaf.images[..., None] for leaf in leaves]
    images = np.require(arrays[0] if len(arrays) == 1 else np.concatenate(arrays), requirements=["C", "W"])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return pixels if device.type == "cpu" else pixels.to(device).contiguous()


# ------------------------------------------------------------------------------------------- Pillow's resizing


def weights(length: int, size: int, interpolation: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each of `size` new pixels from `length` old ones: the first that it is made of (size,), and the weights (size, K) of
    that and those after it, in units of 2 ** -PRECISION_BITS. As precompute_coeffs in Pillow's Resample.c."""
    scale = length / size
    stretch, reach = max(scale, 1.0), {"bilinear": 1.0, "bicubic": 2.0}[interpolation]
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum(centre - reach * stretch + 0.5, 0).astype(np.int64)
    last = np.minimum(centre + reach * stretch + 0.5, length).astype(np.int64)
    places = first[:, None] + np.arange((last - first).max())
    share = _filter((places - centre[:, None] + 0.5) * (1 / stretch), interpolation) * (places < last[:, None])
    total = sum(share.T)                               # one after the other, as there
    share = share / total[:, None] * (1 << PRECISION_BITS)
    return first, np.trunc(share + np.copysign(0.5, share)).astype(np.int32)


def _filter(x: np.ndarray, interpolation: str) -> np.ndarray:
    x = np.abs(x)
    if interpolation == "bilinear":
        return np.maximum(1 - x, 0)
    a = -0.5
    return np.where(x < 1, ((a + 2) * x - (a + 3)) * x * x + 1, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * a, 0))


class _Table:
    """The weights of one dimension, on the device, for every box that the geometry can draw."""

    def __init__(self, length: int, resized: int, size: int, geometry: Geometry, device: torch.device):
        self.cropping, self.size, self.padding = geometry.scale is not None, size, geometry.padding
        lengths, count = (range(1, length + 1), size) if self.cropping else ((length,), resized)
        tables = [weights(old, count, geometry.interpolation) for old in lengths]
        taps, around = max(weight.shape[1] for _, weight in tables), (self.padding, self.padding)
        first = np.stack([np.pad(start, around) for start, _ in tables])
        weight = np.stack([np.pad(weight, (around, (0, taps - weight.shape[1]))) for _, weight in tables])
        self.first, self.weight = (torch.from_numpy(table).to(device) for table in (first, weight))

    def __call__(self, start: Tensor, length: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        """Of boxes (B,): the first pixels (B, size) and the weights (B, size, K)"""
        place = torch.arange(self.size, device=start.device)
        place = torch.where(mirrored[:, None] > 0, self.size - 1 - place, place)
        if self.cropping:
            table = length[:, None] - 1
            return self.first[table, place] + start[:, None], self.weight[table, place]
        place = place + (start + self.padding)[:, None]
        return self.first[0, place], self.weight[0, place]


def _resampled(images: Tensor, dim: int, first: Tensor, weight: Tensor) -> Tensor:
    """images (B, C, height, width) uint8 with `dim` resized. Whole numbers alone: the same on every device and in every batch."""
    shape = [len(images), 1, 1, 1]
    shape[dim] = first.shape[1]
    wanted = list(images.shape)
    wanted[dim] = first.shape[1]
    total = torch.full(wanted, 1 << (PRECISION_BITS - 1), dtype=torch.int32, device=images.device)
    for tap in range(weight.shape[2]):
        place = (first + tap).clamp(max=images.shape[dim] - 1)       # beyond it the weight is 0
        total += images.gather(dim, place.view(shape).expand(wanted)) * weight[:, :, tap].view(shape)
    return (total >> PRECISION_BITS).clamp_(0, 255).to(torch.uint8)
