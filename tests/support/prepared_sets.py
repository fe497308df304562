"""Makes and prepares a small data set of pictures in files."""

from pathlib import Path

import numpy as np
from PIL import Image

from utils.data import prepare
from utils.data.datasets import own_splits

SIZE = 32
SIDES = [(90, 70), (64, 64), (45, 130), (20, 50), (32, 33), (200, 61), (9, 7)]        # the short side below, at and above SIZE
PLACES = [f"train/{name}/{number}" for name in ("ant", "bee") for number in range(20)] + [
    f"{part}/{name}/{number}" for part in ("val", "test") for name in ("ant", "bee") for number in range(3)]


def smooth_pictures(root: Path) -> Path:
    """Write 52 smooth pictures, every third as PNG."""
    draw = np.random.default_rng(0)
    for number, place in enumerate(PLACES):
        image = Image.fromarray(draw.integers(0, 256, (6, 5, 3), np.uint8)).resize(SIDES[number % len(SIDES)], Image.BICUBIC)
        path = root / f"{place}.{'jpg' if number % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return root


def make(source: Path, target: Path, workers: int = 1, skip: float = 0.0, size: int = SIZE, dataset: str = "folder") -> list[str]:
    logged = []
    prepare.build(own_splits(dataset, str(source)), dataset, target, size, workers, logged.append, skip)
    return logged
