"""Generate images to measure with: smooth shapes with detail and grain, with files about as large as those of photographs."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image


def photograph(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    """Return noise of several scales, the coarse ones strongest, as in photographs."""
    total = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((4, 70), (16, 35), (64, 14), (256, 6)):
        size = min(cells, width), min(max(1, cells * height // width), height)
        coarse = generator.normal(0, strength, (size[1], size[0], 3)).clip(-128, 127).astype(np.int16) + 128
        total += np.asarray(Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.BICUBIC), np.float32) - 128
    total += generator.normal(0, 4, total.shape).astype(np.float32)
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))


def folder(root: Path, images: int, width: int, height: int) -> Path:
    """Write root/train/CLASS/n.jpg and root/val/CLASS/n.jpg, two classes, quality 90. Return root."""
    generator = np.random.default_rng(0)
    for part, count in (("train", images), ("val", 2)):
        for number in range(count):
            place = root / part / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            photograph(generator, width, height).save(place / f"{number}.jpg", quality=90)
    return root


def mnist(root: Path, train: int, test: int) -> Path:
    """Write files in MNIST's format (idx: a magic number, the sizes, bytes): gray noise of 28 px, ten classes. Return root."""
    generator = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("t10k", test)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (root / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, count, 28, 28) + pixels.tobytes())
        (root / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, count) + labels.tobytes())
    return root
