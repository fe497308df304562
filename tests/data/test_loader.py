"""The loaders: images, targets and random draws of every batch; prefetching."""

import numpy as np
import pytest
import torch
from miniatures import GOOD_TREE, png, tree
from runs import same
from torchvision.transforms import v2

from utils.data import loader as data
from utils.data.datasets import folder
from utils.data.loader import Batch, prefetch
from utils.data.sampler import StepSampler
from utils.data.splits import ArrayImages, ImageError
from utils.data.transforms import eval_transform


def pictures(count=11) -> ArrayImages:
    random = np.random.default_rng(1)
    return ArrayImages(random.integers(0, 256, (count, 14, 10, 3), dtype=np.uint8), random.integers(0, 3, count))


def resized(size) -> v2.Compose:
    return v2.Compose([v2.Resize(size), v2.PILToTensor()])


def cropped(size) -> v2.Compose:
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def pixels(split=None, *, batch_size=4, micro=1, workers=0, transform=None, seed=5, stop=6,
           shape=(3, 8, 8)) -> dict[tuple[int, int], torch.Tensor]:
    """Return {(epoch, index): the image of the training loader}"""
    split = split or pictures()
    order = StepSampler(len(split), batch_size, micro, 0, 1, 0, 0, stop)
    loader = data.train_loader(split, order, transform=transform or cropped(shape[1:]), seed=seed, num_workers=workers,
                               pin_memory=False)
    found = {}
    for batch, expected in zip(loader, order, strict=True):
        assert batch.keys == expected and batch.images.dtype == torch.uint8 and batch.targets.dtype == torch.int64
        assert batch.images.shape == (len(expected), *shape)
        assert batch.targets.tolist() == [split[key.index][1] for key in expected]
        found |= {(key.epoch, key.index): image for key, image in zip(batch.keys, batch.images)}
    return found


CHANGES = [{"workers": 2}, {"micro": 2}, {"batch_size": 3, "stop": 8}, {"batch_size": 24, "stop": 1}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_augmentation_only_depends_on_seed_epoch_and_image(change):
    torch.manual_seed(1)
    expected = pixels()
    torch.manual_seed(2)
    assert all(same(expected, pixels(**change)))


def test_augmentation_differs_between_epochs_and_seeds():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    found = pixels()
    assert torch.equal(torch.rand(3), expected)                  # the global generator is unchanged
    repeated = [torch.equal(found[0, index], found[1, index]) for index in range(11)]
    assert not any(repeated)
    assert not any(same(found, pixels(seed=6)))


@pytest.mark.parametrize("count", [1, 10, 11])
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_evaluation_covers_every_image_once(count, world, batch_size):
    split, seen = pictures(count), []                            # 14 x 10 px: sizes need not be square
    for rank in range(world):
        loader = data.eval_loader(split, transform=v2.PILToTensor(), batch_size=batch_size, rank=rank, world_size=world,
                                  num_workers=0, pin_memory=False)
        batches = list(loader)
        assert len(batches) == len(loader) and all(1 <= len(batch.keys) <= batch_size for batch in batches)
        for batch in batches:
            for key, image, label in zip(batch.keys, batch.images, batch.targets):
                seen.append(key.index)
                assert label == split.targets[key.index]
                assert np.array_equal(image.permute(1, 2, 0).numpy(), split.images[key.index])     # unchanged
    assert sorted(seen) == list(range(count))


def test_default_workers(monkeypatch):
    for cores, ranks, gpu, cpu in ((1, 1, 0, 0), (2, 1, 1, 1), (4, 1, 3, 1), (16, 1, 15, 4), (16, 8, 1, 1), (8, 2, 3, 1),
                                   (2, 2, 0, 0), (2, 4, 0, 0), (64, 1, 16, 4), (192, 8, 16, 4)):
        monkeypatch.setattr(data, "core_count", lambda cores=cores: cores)
        assert data.default_workers("folder", ranks, "cuda") == gpu, (cores, ranks)
        assert data.default_workers("folder", ranks, "cpu") == cpu, (cores, ranks)
        assert data.default_workers("digits", ranks, "cuda") == data.default_workers("folder", ranks, "mps") == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_raise_the_error_of_an_unreadable_image(tmp_path, workers):
    splits = folder(tree(tmp_path, GOOD_TREE))
    for place in ("train/bee/1.png", "val/bee/0.png"):
        (tmp_path / place).write_bytes(png(cut=600))
    common = {"transform": resized((8, 8)), "num_workers": workers, "pin_memory": False}
    train = data.train_loader(splits.train, StepSampler(5, 5, 1, 0, 1, 0, 0, 2), seed=0, **common)
    evaluation = data.eval_loader(splits.val, batch_size=1, rank=0, world_size=1, **common)
    for loader, place in ((train, "train/bee/1.png"), (evaluation, "val/bee/0.png")):
        with pytest.raises(ImageError, match=place):
            list(loader)


def test_image_that_fails_in_the_transform_is_replaced():
    """JPEGs are only decoded there."""
    def transform(image):
        if image.getpixel((0, 0)) == split[3][0].getpixel((0, 0)):
            raise ImageError("cut off")
        return v2.functional.pil_to_tensor(image)

    split, order = pictures(), StepSampler(11, 11, 1, 0, 1, 0, 0, 1)
    options = {"transform": transform, "seed": 0, "num_workers": 0, "pin_memory": False}
    (batch,) = data.train_loader(split, order, bad_images="skip", **options)
    assert batch.bad == ((3, "cut off"),)
    place = [key.index for key in batch.keys].index(3)
    assert torch.equal(batch.images[place], v2.functional.pil_to_tensor(split[4][0]))
    with pytest.raises(ImageError, match=r"cut off; dataset.py check lists all such images, --bad_images skip"):
        list(data.train_loader(split, order, **options))


def test_batches_are_not_prefetched_without_a_gpu():
    batches = iter(range(3))
    passed = prefetch(batches, torch.device("cpu"))
    assert next(passed) == 0 and next(batches) == 1 and list(passed) == [2]


@pytest.mark.gpu
def test_prefetched_batches_are_complete_and_errors_come_in_order():
    device, given = torch.device("cuda"), []

    def batches():
        for number in range(5):
            given.append(number)
            yield Batch(torch.full((4, 3, 32, 32), number, dtype=torch.uint8).pin_memory(), torch.tensor([number] * 4), ())
        raise ImageError("cannot be read")

    seen, load = [], torch.zeros(4096, 4096, device=device)
    with pytest.raises(ImageError):
        for batch in prefetch(batches(), device):
            assert batch.images.is_cuda and len(given) == min(5, len(seen) + 2)
            for _ in range(20):                     # the GPU reads the batch long after it is deleted here
                load = load @ load
            seen.append(batch.images.float().mean() + load[0, 0])
            del batch
    assert [number.item() for number in seen] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_of_files_skips_unreadable_ones(tmp_path, workers):
    """Paths are read on demand; each batch has its own, and the positions of missing images."""
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(b"none")
    path, taken = {name: str(tmp_path / f"{name}.png") for name in "abc"}, []
    batches = [[path[name] for name in names] for names in ("ab", "b", "bca", "c", "a", "ca", "ac", "c")]
    loader = data.stream_loader((taken.append(batch) or batch for batch in batches), transform=resized((4, 4)),
                                num_workers=workers, pin_memory=False)
    for number, batch in enumerate(loader):
        missing = [position for position, name in enumerate(batches[number]) if name == path["b"]]
        assert batch.keys == batches[number] and [position for position, _ in batch.bad] == missing
        assert len(batch.images) == len(batch.targets) == len(batches[number]) - len(missing)
        assert set(batch.targets.tolist()) <= {data.UNKNOWN} and all("cannot be read" in why for _, why in batch.bad)
        assert len(taken) <= number + 2 + 2 * workers
    assert taken == batches and not loader.batches.taken


def test_stream_of_a_split_equals_its_evaluation():
    split = pictures()
    expected = list(data.eval_loader(split, transform=eval_transform((4, 4)), batch_size=4, rank=0, world_size=1, num_workers=0,
                                     pin_memory=False))
    found = list(data.stream_loader([batch.keys for batch in expected], transform=eval_transform((4, 4)), split=split,
                                    num_workers=0, pin_memory=False, device=torch.device("cpu"), cached_workers=0))
    for one, other in zip(found, expected, strict=True):
        assert one.keys == other.keys and torch.equal(one.targets, other.targets) and one.bad == ()
        assert (one.images.int() - other.images.int()).abs().max() <= 2          # cached images are resized in another way


def test_restarted_stream_repeats_unfinished_batches():
    """This happens if workers hang at their start and are replaced."""
    stream = data.Stream([[number] for number in range(5)])
    first = iter(stream)
    assert [next(first), next(first)] == [[0], [1]]
    second = iter(stream)
    assert [next(second), next(second), next(second)] == [[0], [1], [2]] and len(stream.taken) == 3
