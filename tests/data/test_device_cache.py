"""Images cached on the device: the random draws equal those of the single-image transform, the pixels within 2 gray levels."""

import gc
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from runs import same
from torchvision.transforms import v2

from utils.data import device_cache
from utils.data import loader as data
from utils.data.device_cache import CachedImages, Geometry, cache_on_device
from utils.data.image_files import FileImages
from utils.data.sampler import StepSampler
from utils.data.splits import ArrayImages, Concat, Subset
from utils.data.transforms import eval_transform, train_transform
from utils.randomness import derive_seed, seeded

CPU = torch.device("cpu")


def pictures(count=40, height=32, width=32, colors=(3,), seed=1) -> ArrayImages:
    """Return images of noise and flat areas, which round in many ways, and overshoot with a bicubic filter"""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, height, width, *colors), dtype=np.uint8)
    images[::2, : height // 2] = 255 * (images[::2, : height // 2] > 127)
    return ArrayImages(images, random.integers(0, 3, count))


# ----------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize(("image_size", "scale"), [((32, 32), (0.05, 1.0)), ((28, 28), (0.9, 1.0)), ((8, 90), (0.5, 1.0)),
                                                   ((90, 8), (0.2, 1.0)), ((3, 2), (0.05, 1.0)), ((1, 1), (0.05, 1.0))])
def test_boxes_and_flips_equal_those_of_the_transform(image_size, scale, tries):
    crop, image = v2.RandomResizedCrop((16, 16), scale=scale), torch.zeros(3, *image_size)
    seeds = [derive_seed(5, "augment", 0, index) for index in range(tries(1_500, 100_000))]
    drawn = Geometry(image_size, (16, 16), "bilinear", 3, scale=scale, flip=True).draw(np.arange(len(seeds)), seeds)
    for seed, (_, *mine) in zip(seeds, drawn.tolist()):
        torch.default_generator.manual_seed(seed)
        box = crop.make_params([image])
        assert mine == [box["top"], box["left"], box["height"], box["width"], int(torch.rand(1) < 0.5)], seed


@pytest.mark.parametrize("padding", [0, 4])
def test_shifts_equal_those_of_the_transform(padding):
    crop, image = v2.RandomCrop((16, 12), padding=padding), torch.zeros(3, 16, 12)
    seeds = [derive_seed(5, "augment", 1, index) for index in range(500)]
    geometry = Geometry((32, 32), (16, 12), "bilinear", 3, resized=(16, 12), padding=padding, flip=True)
    drawn = geometry.draw(np.arange(len(seeds)), seeds)
    for seed, (_, *mine) in zip(seeds, drawn.tolist()):
        torch.default_generator.manual_seed(seed)
        box = crop.make_params([image])
        assert mine == [box["top"] - padding, box["left"] - padding, 16, 12, int(torch.rand(1) < 0.5)], seed


# ---------------------------------------------------------------------------------------------------- pixels

TRANSFORMS = {
    **{f"{kind} {size} {mode}": train_transform(kind, size, interpolation=mode) for kind, size, mode in itertools.product(
        ("crop_flip", "pad_flip"), ((48, 40), (12, 20)), ("bilinear", "bicubic"))},
    "crop": train_transform("crop", (40, 40), crop_scale=0.5), "pad": train_transform("pad", (24, 24), crop_padding=9),
    "none": train_transform("none", (30, 50)), "one channel": train_transform("crop_flip", (30, 30), channels=1),
    **{f"eval {crop} {size}": eval_transform(size, crop=crop) for crop in (0.0, 0.875, 1.0) for size in ((40, 40), (20, 31))}}
WAYS = (CachedImages.resize_each, CachedImages.resize_together)


@pytest.fixture
def width_first(monkeypatch):
    """Make Pillow resize the width first. From version 13 on it may start with the height if that is less work."""
    resize = Image.Image.resize

    def in_two(image, size, *args, **options):
        return resize(resize(image, (size[0], image.height), *args, **options), size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", in_two)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_pixels_are_within_two_gray_levels_of_the_transform(name, way, width_first, monkeypatch):
    """For both methods on a CPU; a GPU uses the second."""
    transform, shape = TRANSFORMS[name], (21, 34)
    split = pictures(40, *shape, colors=() if name in ("one channel", "crop") else (3,))
    cached = cache_on_device(split, transform, CPU)
    seeds, expected = [derive_seed(5, "augment", 3, index) for index in range(len(split))], []
    for index in range(len(split)):
        with seeded(5, "augment", 3, index):
            expected.append(transform(split[index][0]))
    expected, draws = torch.stack(expected), cached.geometry.draw(cached.rows, seeds)
    monkeypatch.setattr(CachedImages, "resize_each", way)
    actual = cached.make(draws)
    assert actual.dtype == torch.uint8 and actual.shape == expected.shape
    difference = (actual.int() - expected.int()).abs()
    worst, ratio = difference.max().item(), (difference > 0).float().mean().item()
    assert worst <= 2 and ratio < 0.05, (worst, ratio)


@pytest.mark.parametrize("way", WAYS)
def test_pixels_do_not_depend_on_the_batch(way, monkeypatch):
    cached = cache_on_device(pictures(), TRANSFORMS["crop_flip (48, 40) bicubic"], CPU)
    draws = cached.geometry.draw(cached.rows, list(range(40)))
    whole = way(cached, draws)
    monkeypatch.setattr(device_cache, "CHUNK", 3 * 48 * 40 * 7)
    assert torch.equal(whole, way(cached, draws))
    assert torch.equal(whole, torch.cat([way(cached, part) for part in draws.split(9)]))


@pytest.mark.gpu
def test_pixels_on_gpu_equal_those_on_cpu():
    for transform in (TRANSFORMS["crop_flip (48, 40) bicubic"], TRANSFORMS["eval 0.875 (20, 31)"], TRANSFORMS["pad"]):
        split, found = pictures(), []
        for device in (CPU, torch.device("cuda")):
            cached = cache_on_device(split, transform, device)
            found.append(cached.resize_together(cached.geometry.draw(cached.rows, list(range(40)))).cpu())
        assert torch.equal(*found)


# ------------------------------------------------------------------------------------------------ what is cached


@pytest.mark.parametrize(("options", "why"), [
    ({"rotation": 10.0}, "RandomRotation"), ({"color_jitter": 0.2}, "ColorJitter"), ({"randaugment_ops": 1}, "RandAugment"),
    ({"random_erasing": 0.2}, "RandomErasing"), ({"channels": 1}, "color images for a model of one channel")])
def test_other_transforms_are_not_cached(options, why):
    assert why in cache_on_device(pictures(), train_transform("crop_flip", (16, 16), **options), CPU)


def test_only_small_alike_images_in_memory_are_cached(monkeypatch):
    class Special(ArrayImages):
        pass

    transform = train_transform("crop", (8, 8))
    others = {"not in memory": [FileImages([("a.png", 0)]), Concat([pictures(), FileImages([("a.png", 0)])]),
                                Special(pictures().images, pictures().targets)],
              "several kinds": [Concat([pictures(), pictures(height=31)]), Concat([pictures(), pictures(colors=())])]}
    for why, splits in others.items():
        for split in splits:
            assert why in cache_on_device(split, transform, CPU)
            assert "too large" in cache_on_device(split, transform, CPU, any_size=False)
    for split in (pictures(), Subset(Concat([pictures(), pictures()]), [3])):
        assert isinstance(cache_on_device(split, transform, CPU, any_size=False), CachedImages)
    monkeypatch.setattr(device_cache, "MAX_BYTES", 100_000)         # `pictures` has 122,880
    assert "too large" in cache_on_device(pictures(), transform, CPU, any_size=False)
    assert isinstance(cache_on_device(pictures(), transform, CPU), CachedImages)


def test_subsets_of_a_data_set_share_its_memory():
    first, second, transform = pictures(), pictures(30, seed=2), eval_transform((32, 32))
    whole = cache_on_device(first, transform, CPU)
    assert whole.pixels.data_ptr() == first.images.ctypes.data               # no copy
    joined = Concat([first, second])
    subsets = [Subset(joined, [50, 3, 3]), Subset(Subset(joined, range(40, 70)), [29, 0])]
    cached = [cache_on_device(subset, transform, CPU) for subset in subsets]
    assert cached[0].pixels is cached[1].pixels and len(cached[0].pixels) == 70
    for subset, own in zip(subsets, cached):
        found = own.make(own.geometry.draw(own.rows, None))
        assert torch.equal(found, torch.stack([transform(subset[index][0]) for index in range(len(subset))]))
    gc.collect()
    before = len(device_cache._PIXELS)
    del first, joined, subsets, subset, whole, cached, own
    gc.collect()
    assert len(device_cache._PIXELS) == before - 1


# -------------------------------------------------------------------------------------------------- the loaders


def batches(device, workers=0, micro=1, cached=None) -> dict:
    """Return {(epoch, index): image} of the training loader, and {(None, index): image} of the evaluation loader"""
    split, found = Subset(pictures(), range(5, 27)), {}
    sampler = StepSampler(len(split), 8, micro, 0, 1, 0, 0, 6)
    options = {"num_workers": workers, "pin_memory": False, "device": device, "cached": cached}
    train = data.train_loader(split, sampler, transform=TRANSFORMS["crop_flip (12, 20) bilinear"], seed=5, **options)
    evaluation = data.eval_loader(split, transform=eval_transform((12, 20)), batch_size=9, rank=0, world_size=1, **options)
    for loader in (train, evaluation):
        assert loader.not_cached == ("as when the run started" if cached is False else "" if device else "no device was set")
        for batch in loader:
            assert batch.images.dtype == torch.uint8 and batch.targets.dtype == torch.int64 and batch.bad == ()
            assert batch.targets.tolist() == [split.targets[key.index] for key in batch.keys]
            found |= {(key.epoch if loader is train else None, key.index): image for key, image in zip(batch.keys, batch.images)}
    return found


def test_loaders_return_the_same_images_cached_or_not():
    plain, images = batches(None), batches(CPU)
    assert plain.keys() == images.keys() and len(plain) == 48 + 22
    assert all((plain[key].int() - images[key].int()).abs().max() <= 1 for key in plain)
    assert all(same(plain, batches(CPU, cached=False))) and not torch.equal(images[0, 3], images[1, 3])


@pytest.mark.parametrize(("workers", "micro"), [(2, 1), (0, 4)])
def test_images_do_not_depend_on_workers_and_micro_batches(workers, micro):
    assert all(same(batches(CPU), batches(CPU, workers, micro)))


def test_size_decides_caching_unless_it_is_set(monkeypatch):
    monkeypatch.setattr(device_cache, "MAX_BYTES", 0)
    options = {"transform": eval_transform((8, 8)), "batch_size": 9, "rank": 0, "world_size": 1, "num_workers": 1,
               "pin_memory": False, "device": CPU, "cached_workers": 0}
    assert data.eval_loader(pictures(), **options).not_cached
    cached, other = (data.eval_loader(pictures(), **options, cached=cached) for cached in (True, False))
    assert not cached.not_cached and other.not_cached and [cached.num_workers, other.num_workers] == [0, 1]


def test_images_with_edits_are_not_cached():
    loader = data.train_loader(pictures(), StepSampler(40, 8, 1, 0, 1, 0, 0, 2), transform=TRANSFORMS["crop"], seed=5,
                               num_workers=0, pin_memory=False, device=CPU, cached=True,
                               edit_transform=lambda transform, image, index: (transform(image), torch.zeros(2, 2, 2)))
    assert "edits" in loader.not_cached and all(batch.edits is not None for batch in loader)
