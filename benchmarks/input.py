"""Reading images, on one core without workers: batches of training images at 224 px, cropped and flipped.

python -m benchmarks.input [--data_dir FOLDER with train/CLASS/*.jpg and val/CLASS/*.jpg]

The baseline is that of torchvision's tutorials: ImageFolder, PIL, RandomResizedCrop(224), flip, ToTensor, Normalize.
Ours returns uint8 and normalizes on the device; here the CPU is the device, so that this is counted.
"""

import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from . import harness, pictures
from .harness import OURS, Contender

SIZES = {"500x375": (96, 500, 375), "2000x1500": (32, 2000, 1500)}      # images, width, height; the first as in ImageNet
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR = 2000            # arrays of 32 px


def _baseline_transform(size: int):
    from torchvision import transforms

    return transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                               transforms.Normalize(MEAN, STD)])


def image_folder(root: str, batch: int, size: int) -> Callable[[], None]:
    """Return a step: the next batch from torchvision's ImageFolder."""
    from torchvision.datasets import ImageFolder

    return _loaded(ImageFolder(f"{root}/train", _baseline_transform(size)), batch)


class Arrays:
    """Like torchvision.datasets.CIFAR10: a PIL image of each array, transformed. grey: like its MNIST, 28 px, as RGB."""

    def __init__(self, images: int, size: int, grey: bool = False):
        pixels = arrays(images)
        self.pixels, self.transform = pixels[:, :28, :28, 0] if grey else pixels, _baseline_transform(size)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple:
        return self.transform(Image.fromarray(self.pixels[index]).convert("RGB")), index % 10


def arrays(images: int) -> np.ndarray:
    """Return noise, uint8 (images, 32, 32, 3)."""
    return np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)


def array_images(images: int, batch: int, size: int) -> Callable[[], None]:
    """Return a step: the next batch of Arrays."""
    return _loaded(Arrays(images, size), batch)


def _loaded(dataset, batch: int) -> Callable[[], None]:
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    loader = DataLoader(dataset, batch, shuffle=True, drop_last=True, num_workers=0)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> None:
        next(batches)

    return step


def decoded(root: str, batch: int) -> Callable[[], None]:
    """Return a step that only decodes files, in full size, with torchvision's decoder."""
    import torch
    from torchvision.io import decode_jpeg

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")              # torchvision 0.29 warns of its end at every call
    files = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in sorted(Path(root).glob("train/*/*"))]
    files = itertools.cycle(files)

    def step() -> None:
        for _ in range(batch):
            decode_jpeg(next(files))

    return step


def main(argv: list[str] | None = None) -> None:
    options = harness.options(__doc__, argv, size=224, batch="32", data_dir=None, contenders="", rounds=7)
    sizes, batch = SIZES, int(options.batch)
    if options.quick:
        sizes, batch = {"40x30": (8, 40, 30)}, 4
    with tempfile.TemporaryDirectory() as folder, harness.worker_pool(options.quick) as pool:
        given = {"batch": batch, "size": options.size}
        roots = {str(options.data_dir): options.data_dir} if options.data_dir else {
            name: pictures.folder(Path(folder, name), *facts) for name, facts in sizes.items()}
        for name, root in roots.items():
            _measure(f"input JPEG {name}", [
                Contender("torchvision", "benchmarks.input:image_folder", given | {"root": str(root)}),
                Contender(OURS, "benchmarks.ours:folder_input", given | {"root": str(root)}, "ours"),
                Contender(f"{OURS} (prepared)", "benchmarks.ours:prepared_input",
                          given | {"root": str(root), "cache": str(Path(folder, f"prepared-{name}"))}, "ours"),
                Contender("decoding alone", "benchmarks.input:decoded", {"root": str(root), "batch": batch}, "limit"),
            ], pool, options, batch)
        count = {"images": 64 if options.quick else CIFAR}
        _measure("input arrays 32x32", [
            Contender("torchvision", "benchmarks.input:array_images", given | count),
            Contender(OURS, "benchmarks.ours:cached_input", given | count, "ours")], pool, options, batch)


def _measure(title: str, group: list[Contender], pool: harness.WorkerPool, options, batch: int) -> None:
    group = harness.choose_contenders(group, options.contenders)
    costs = harness.measure(group, pool, rounds=options.rounds)
    harness.report(harness.record(title, group, costs, baseline="torchvision", unit="seconds a batch", settings={
        "batch": batch, "size": options.size, "threads": 1, "rounds": options.rounds}), options.json)


if __name__ == "__main__":
    sys.exit(main())
