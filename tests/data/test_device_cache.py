"""Images held on the device: the draws and the pixels of the transforms of single images."""

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
from utils.data.device_cache import Geometry, hold
from utils.data.image_files import FileImages
from utils.data.loader import StepOrder
from utils.data.splits import ArrayImages, Concat, Subset
from utils.data.transforms import eval_transform, train_transform
from utils.randomness import derive_seed, raw_draws, seeded

CPU = torch.device("cpu")


def pictures(count=40, height=32, width=32, colours=(3,), seed=1) -> ArrayImages:
    """Noise and flat areas: what rounds in many ways, and overshoots under a bicubic filter"""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, height, width, *colours), dtype=np.uint8)
    images[::2, : height // 2] = 255 * (images[::2, : height // 2] > 127)
    return ArrayImages(images, random.integers(0, 3, count))


# ----------------------------------------------------------------------------------------------------- draws


def test_numbers_in_bulk_are_those_of_torchs_generator():
    for seed in (0, 7, 2 ** 31, 2 ** 63 - 1, derive_seed(1, "augment", 2, 3)):
        generator = torch.Generator().manual_seed(seed)
        expected = [torch.randint(0, 1 << 24, (), generator=generator).item() for _ in range(30)]
        assert (raw_draws([seed], 30)[0] % (1 << 24)).tolist() == expected


@pytest.mark.parametrize(("image_size", "scale"), [((32, 32), (0.05, 1.0)), ((28, 28), (0.9, 1.0)), ((8, 90), (0.5, 1.0)),
                                                   ((90, 8), (0.2, 1.0)), ((3, 2), (0.05, 1.0)), ((1, 1), (0.05, 1.0))])
def test_crops_are_those_that_torchvision_draws(image_size, scale, tries):
    crop, image = v2.RandomResizedCrop((16, 16), scale=scale), torch.zeros(3, *image_size)
    seeds = [derive_seed(5, "augment", 0, index) for index in range(tries(1_500, 100_000))]
    drawn = Geometry(image_size, (16, 16), "bilinear", 3, scale=scale, flip=True).plan(np.arange(len(seeds)), seeds)
    for seed, (_, *mine) in zip(seeds, drawn.tolist()):
        torch.default_generator.manual_seed(seed)
        box = crop.make_params([image])
        assert mine == [box["top"], box["left"], box["height"], box["width"], int(torch.rand(1) < 0.5)], seed


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_shifts_are_those_that_torchvision_draws(padding):
    crop, image = v2.RandomCrop((16, 12), padding=padding), torch.zeros(3, 16, 12)
    seeds = [derive_seed(5, "augment", 1, index) for index in range(500)]
    geometry = Geometry((32, 32), (16, 12), "bilinear", 3, resized=(16, 12), padding=padding, flip=True)
    drawn = geometry.plan(np.arange(len(seeds)), seeds)
    for seed, (_, *mine) in zip(seeds, drawn.tolist()):
        torch.default_generator.manual_seed(seed)
        box = crop.make_params([image])
        assert mine == [box["top"] - padding, box["left"] - padding, 16, 12, int(torch.rand(1) < 0.5)], seed


# ---------------------------------------------------------------------------------------------------- pixels

TRANSFORMS = {
    **{f"{kind} {size} {mode}": train_transform(kind, size, interpolation=mode) for kind, size, mode in itertools.product(
        ("crop_flip", "pad_flip"), ((48, 40), (12, 20), (32, 32)), ("bilinear", "bicubic"))},
    "crop": train_transform("crop", (40, 40), crop_scale=0.5), "pad": train_transform("pad", (24, 24), crop_padding=9),
    "none": train_transform("none", (30, 50)), "grey": train_transform("crop_flip", (30, 30), channels=1),
    **{f"eval {crop} {size}": eval_transform(size, crop=crop) for crop in (0.0, 0.875, 1.0) for size in ((40, 40), (20, 31))}}


def made(split, transform, together: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(the held images of epoch 3, those of the transform of one image with Pillow)"""
    images = hold(split, transform, CPU)
    assert isinstance(images, device_cache.Held), images
    images = device_cache.Held(images.pixels, images.rows, images.geometry, together)
    seeds, expected = [derive_seed(5, "augment", 3, index) for index in range(len(split))], []
    for index in range(len(split)):
        with seeded(5, "augment", 3, index):
            expected.append(transform(split[index][0]))
    return images.make(images.geometry.plan(images.rows, seeds)), torch.stack(expected)


@pytest.fixture
def rows_first(monkeypatch):
    """Pillow resizes the width first. (From version 13 on the height first where that is less work.)"""
    resize = Image.Image.resize

    def in_two(image, size, *args, **options):
        return resize(resize(image, (size[0], image.height), *args, **options), size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", in_two)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", [(32, 32), (21, 34)])
def test_pixels_are_those_of_pillow(name, shape, rows_first):
    """To the bit as GPUs make them; with PyTorch's kernel one grey level off (bicubic: two), and rarely."""
    split = pictures(40, *shape, colours=() if name == "grey" else (3,))
    actual, expected = made(split, TRANSFORMS[name], together=True)
    assert actual.dtype == torch.uint8 and actual.shape == expected.shape
    assert torch.equal(actual, expected)
    actual, _ = made(split, TRANSFORMS[name], together=False)
    off = (actual.int() - expected.int()).abs()
    worst, share = off.max().item(), (off > 0).float().mean().item()
    assert worst <= 1 + ("bicubic" in name) and share < 0.05, (worst, share)


@pytest.mark.parametrize("together", [False, True])
def test_pixels_do_not_depend_on_the_batch(together, monkeypatch):
    split = pictures()
    images, seeds = hold(split, TRANSFORMS["crop_flip (48, 40) bicubic"], CPU), list(range(40))
    images = device_cache.Held(images.pixels, images.rows, images.geometry, together)
    plan = images.geometry.plan(images.rows, seeds)
    whole = images.make(plan)
    monkeypatch.setattr(device_cache, "CHUNK", 3 * 48 * 40 * 7)
    assert torch.equal(whole, images.make(plan))
    assert torch.equal(whole, torch.cat([images.make(part) for part in plan.split(9)]))


def test_grey_images_for_a_model_of_three_channels():
    actual, expected = made(pictures(colours=()), train_transform("crop", (40, 40)), together=True)
    assert actual.shape == (40, 3, 40, 40) and torch.equal(actual, expected)


# -------------------------------------------------------------------------------------------------- what is held


@pytest.mark.parametrize(("options", "why"), [
    ({"rotation": 10.0}, "RandomRotation"), ({"color_jitter": 0.2}, "ColorJitter"), ({"randaugment_ops": 1}, "RandAugment"),
    ({"random_erasing": 0.2}, "RandomErasing"), ({"channels": 1}, "colour images for a model of one channel")])
def test_other_transforms_are_not_for_whole_batches(options, why):
    assert why in hold(pictures(), train_transform("crop_flip", (16, 16), **options), CPU)


def test_what_is_not_held(monkeypatch):
    transform = train_transform("crop", (8, 8))
    assert "memory" in hold(FileImages([("a.png", 0)]), transform, CPU)
    assert "memory" in hold(Concat([pictures(), FileImages([("a.png", 0)])]), transform, CPU)
    assert "kinds" in hold(Concat([pictures(), pictures(height=31)]), transform, CPU)
    assert "kinds" in hold(Concat([pictures(), pictures(colours=())]), transform, CPU)
    monkeypatch.setattr(device_cache, "MAX_BYTES", 100_000)
    assert hold(pictures(), transform, CPU) == "122,880 bytes of images, more than 100,000"

    class Special(ArrayImages):
        pass

    assert "memory" in hold(Special(pictures().images, pictures().targets), transform, CPU)


def test_parts_of_a_data_set_share_its_memory():
    first, second, transform = pictures(), pictures(30, seed=2), eval_transform((32, 32))
    whole = hold(first, transform, CPU)
    assert whole.pixels.data_ptr() == first.images.ctypes.data               # no copy at all
    joined = Concat([first, second])
    parts = [Subset(joined, [50, 3, 3]), Subset(Subset(joined, range(40, 70)), [29, 0])]
    images = [hold(part, transform, CPU) for part in parts]
    assert images[0].pixels is images[1].pixels and len(images[0].pixels) == 70
    for part, own in zip(parts, images):
        found = own.make(own.geometry.plan(own.rows, None))
        assert torch.equal(found, torch.stack([transform(part[index][0]) for index in range(len(part))]))
    gc.collect()
    before = len(device_cache._HELD)
    del first, joined, parts, part, whole, images, own
    gc.collect()
    assert len(device_cache._HELD) == before - 1


# -------------------------------------------------------------------------------------------------- the loaders


def batches(device, workers=0, micro=1, transform=TRANSFORMS["crop_flip (12, 20) bilinear"]) -> dict:
    """(epoch, index) -> image, of the training loader; and of that for evaluation under (None, index)"""
    split, found = Subset(pictures(), range(5, 27)), {}
    order = StepOrder(len(split), 8, micro, 0, 1, 0, 0, 6)
    train = data.train_loader(split, order, transform=transform, seed=5, num_workers=workers, pin_memory=False, device=device)
    evaluation = data.eval_loader(split, transform=eval_transform((12, 20)), batch_size=9, rank=0, world_size=1,
                                  num_workers=workers, pin_memory=False, device=device)
    for loader in (train, evaluation):
        assert bool(loader.not_held) == (device is None)
        for batch in loader:
            assert batch.images.dtype == torch.uint8 and batch.targets.dtype == torch.int64 and batch.bad == ()
            assert batch.targets.tolist() == [split.targets[key.index] for key in batch.keys]
            found |= {(key.epoch if loader is train else None, key.index): image for key, image in zip(batch.keys, batch.images)}
    return found


def test_the_loaders_give_the_same_images_held_or_not():
    plain, images = batches(None), batches(CPU)
    assert plain.keys() == images.keys() and len(plain) == 48 + 22
    assert all((plain[key].int() - images[key].int()).abs().max() <= 1 for key in plain)
    assert not torch.equal(images[0, 3], images[1, 3])


@pytest.mark.parametrize(("workers", "micro"), [(2, 1), (0, 4)])
def test_workers_and_micro_batches_change_no_bit(workers, micro):
    assert all(same(batches(CPU), batches(CPU, workers, micro)))


def test_edits_keep_a_run_from_being_held():
    order = StepOrder(40, 8, 1, 0, 1, 0, 0, 2)
    loader = data.train_loader(pictures(), order, transform=TRANSFORMS["crop"], seed=5, num_workers=0, pin_memory=False,
                               device=CPU, edits={}, grid=(2, 2))
    assert "edits" in loader.not_held and all(batch.edits is not None for batch in loader)
