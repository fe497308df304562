"""The order of the samples, and the loaders."""

import pickle

import numpy as np
import pytest
import torch
from miniatures import GOOD_TREE, png, tree
from runs import same
from torchvision.transforms import v2

from utils.attention.edits import Edit
from utils.data import loader as data
from utils.data.datasets import digits, folder
from utils.data.loader import Key, StepOrder
from utils.data.splits import ArrayImages, ImageError
from utils.data.transforms import train_transform, with_edit
from utils.randomness import seeded

# ----------------------------------------------------------------------------------------------------- order


def keys(images=50, batch_size=16, micro=4, rank=0, world=1, seed=3, start=0, stop=12) -> list[list[Key]]:
    order = StepOrder(images, batch_size, micro, rank, world, seed, start, stop)
    batches = list(order)
    assert len(batches) == len(order)
    return batches


def steps(batches: list[list[Key]]) -> dict[int, list[tuple[int, int]]]:
    """step -> its samples as (epoch, index), in the order of the micro-batches"""
    found = {}
    for batch in batches:
        assert len({(key.step, key.micro) for key in batch}) == 1
        found.setdefault(batch[0].step, []).extend((key.epoch, key.index) for key in batch)
    return found


@pytest.mark.parametrize("images", [7, 16, 50, 64])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4)])
def test_a_step_has_the_same_samples_in_the_same_order_however_it_is_cut(images, world, accumulation):
    whole = steps(keys(images, micro=1))
    parts = [keys(images, micro=world * accumulation, rank=rank, world=world) for rank in range(world)]
    for rank, batches in enumerate(parts):
        assert len(batches) == 12 * accumulation
        # Contiguous blocks: rank 0 holds the first micro-batches of every step.
        assert [(batch[0].step, batch[0].micro) for batch in batches] == [
            (step, rank * accumulation + micro) for step in range(12) for micro in range(accumulation)]
        assert {len(batch) for batch in batches} == {16 // (world * accumulation)}
    shares = [steps(batches) for batches in parts]
    joined = {step: [sample for share in shares for sample in share[step]] for step in whole}
    assert joined == whole


@pytest.mark.parametrize("start", range(12))
@pytest.mark.parametrize("images", [7, 50])
def test_a_restart_at_any_step_gives_the_tail(images, start):
    assert keys(images, start=start) == [batch for batch in keys(images) if batch[0].step >= start]


@pytest.mark.parametrize("images", [7, 50])
def test_micro_batches_are_found_by_number_in_any_order(images):
    order, batches = StepOrder(images, 16, 4, 1, 2, 3, 2, 12), keys(images, rank=1, world=2, start=2)
    for number in (19, 0, 7, 8, 3, 18):
        assert order[number] == batches[number]
    for number in (20, -1):
        with pytest.raises(IndexError):
            order[number]


@pytest.mark.parametrize("images", [5, 16, 50])
def test_every_epoch_is_a_permutation(images):
    seen = [(key.epoch, key.index) for batch in keys(images, stop=25) for key in batch]
    assert len(seen) == 400
    epochs = {}
    for epoch, index in seen:
        epochs.setdefault(epoch, []).append(index)
    assert list(epochs) == list(range(-(-400 // images)))      # one after the other, no gap
    orders = list(epochs.values())
    for order in orders[:-1]:
        assert sorted(order) == list(range(images))
    assert len(set(orders[-1])) == len(orders[-1])              # the unfinished one
    assert len(set(map(tuple, orders[:-1]))) > len(orders[:-1]) / 2      # not one order again and again


def test_seeds_give_other_orders():
    orders = [str(keys(seed=seed)) for seed in range(5)]
    assert len(set(orders)) == 5
    assert str(keys(seed=0)) == orders[0]


def test_permutations_are_not_hoarded():
    order = StepOrder(10, 16, 4, 0, 1, 0, 0, 50)
    assert max(len(order._permutations) for _ in order) <= 2


def test_keys_are_the_list_that_they_stand_for():
    own = StepOrder(50, 16, 4, 0, 1, 3, 0, 12)[17]
    listed = list(own)
    assert listed == [own[number] for number in range(4)] and len(own) == 4 and own == listed and own != listed[:3]
    assert repr(own) == repr(listed) and all(type(value) is int for key in listed for value in key)
    assert pickle.loads(pickle.dumps(own)) == own


# --------------------------------------------------------------------------------------------------- loaders


def pictures(count=11) -> ArrayImages:
    random = np.random.default_rng(1)
    return ArrayImages(random.integers(0, 256, (count, 14, 10, 3), dtype=np.uint8), random.integers(0, 3, count))


def resized(size) -> v2.Compose:
    return v2.Compose([v2.Resize(size), v2.PILToTensor()])


def cropped(size) -> v2.Compose:
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def pixels(split=None, *, batch_size=4, micro=1, workers=0, transform=None, seed=5, stop=6,
           shape=(3, 8, 8)) -> dict[tuple[int, int], torch.Tensor]:
    """(epoch, index) -> the image that the training loader makes of it"""
    split = split or pictures()
    order = StepOrder(len(split), batch_size, micro, 0, 1, 0, 0, stop)
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
def test_augmentation_depends_on_seed_epoch_and_image_alone(change):
    torch.manual_seed(1)
    expected = pixels()
    torch.manual_seed(2)
    assert all(same(expected, pixels(**change)))


def test_augmentation_differs_between_epochs_and_seeds():
    found = pixels()
    repeated = [torch.equal(found[0, index], found[1, index]) for index in range(11)]
    assert not any(repeated)
    assert not any(same(found, pixels(seed=6)))


def test_the_given_transform_is_what_acts():
    found = pixels(transform=resized((8, 8)))
    for (_, index), image in found.items():
        assert torch.equal(image, resized((8, 8))(pictures()[index][0]))
    assert not any(same(found, pixels()))
    grey = pixels(transform=v2.Compose([v2.Grayscale(), v2.Resize((8, 8)), v2.PILToTensor()]), shape=(1, 8, 8))
    assert not any(image.shape == (3, 8, 8) for image in grey.values())


def test_augmentation_kinds_and_flips_through_the_loader():
    kinds = {kind: pixels(transform=train_transform(kind, (8, 8), flip=True)) for kind in ("crop_flip", "crop", "none")}
    assert not any(same(kinds["crop"], kinds["none"]))
    assert len(set(same(kinds["crop"], kinds["crop_flip"]))) == 2                # some flipped, some not
    assert all(same(kinds["crop"], pixels(transform=train_transform("crop_flip", (8, 8), flip=False))))


def test_digits_are_not_flipped():
    splits = digits("")
    kinds = [pixels(splits.train, transform=train_transform(kind, (8, 8), flip=splits.can_flip))
             for kind in ("crop", "crop_flip")]
    assert all(same(*kinds))


def test_loading_leaves_the_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    split = pictures()
    keyed = data._Keyed(split, cropped((8, 8)), seed=1)
    for index in range(5):
        keyed[Key(0, 0, 0, index)]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("size", [(6, 10), (10, 6)])
def test_sizes_need_not_be_square(size):
    pixels(shape=(3, *size), stop=2)
    loader = data.eval_loader(pictures(), transform=resized(size), batch_size=3, rank=0, world_size=1, num_workers=0,
                              pin_memory=False)
    assert {batch.images.shape[1:] for batch in loader} == {(3, *size)}


@pytest.mark.parametrize("count", [1, 2, 10, 11])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_evaluation_covers_every_image_once(count, world, batch_size):
    split, seen = pictures(count), []
    for rank in range(world):
        loader = data.eval_loader(split, transform=v2.PILToTensor(), batch_size=batch_size, rank=rank, world_size=world,
                                  num_workers=0, pin_memory=False)
        batches = list(loader)
        assert len(batches) == len(loader) and all(1 <= len(batch.keys) <= batch_size for batch in batches)
        for batch in batches:
            for key, image, label in zip(batch.keys, batch.images, batch.targets):
                seen.append(key.index)
                assert label == split.targets[key.index]
                assert np.array_equal(image.permute(1, 2, 0).numpy(), split.images[key.index])     # as it is
    assert sorted(seen) == list(range(count))


def test_default_workers(monkeypatch):
    monkeypatch.setattr(data.sys, "platform", "linux")
    for cores, ranks, gpu, cpu in ((1, 1, 0, 0), (2, 1, 1, 1), (4, 1, 3, 1), (16, 1, 15, 4), (16, 8, 1, 1), (8, 2, 3, 1),
                                   (2, 2, 0, 0), (2, 4, 0, 0), (64, 1, 16, 4), (192, 8, 16, 4)):
        monkeypatch.setattr(data.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert data.default_workers("folder", ranks, "cuda") == gpu, (cores, ranks)
        assert data.default_workers("folder", ranks, "cpu") == cpu, (cores, ranks)
        assert data.default_workers("digits", ranks, "cuda") == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_comes_through_the_loaders(tmp_path, workers):
    splits = folder(tree(tmp_path, GOOD_TREE))
    for place in ("train/bee/1.png", "val/bee/0.png"):
        (tmp_path / place).write_bytes(png(cut=600))
    common = {"transform": resized((8, 8)), "num_workers": workers, "pin_memory": False}
    train = data.train_loader(splits.train, StepOrder(5, 5, 1, 0, 1, 0, 0, 2), seed=0, **common)
    evaluation = data.eval_loader(splits.val, batch_size=1, rank=0, world_size=1, **common)
    for loader, place in ((train, "train/bee/1.png"), (evaluation, "val/bee/0.png")):
        with pytest.raises(ImageError, match=place):
            list(loader)


def test_an_image_that_only_the_transform_finds_unreadable_is_replaced():
    """As one that is not decoded before."""
    def transform(image):
        if image.getpixel((0, 0)) == split[3][0].getpixel((0, 0)):
            raise ImageError("cut off")
        return v2.functional.pil_to_tensor(image)

    split, order = pictures(), StepOrder(11, 11, 1, 0, 1, 0, 0, 1)
    options = {"transform": transform, "seed": 0, "num_workers": 0, "pin_memory": False}
    (batch,) = data.train_loader(split, order, bad_images="skip", **options)
    assert batch.bad == ((3, "cut off"),)
    place = [key.index for key in batch.keys].index(3)
    assert torch.equal(batch.images[place], v2.functional.pil_to_tensor(split[4][0]))
    with pytest.raises(ImageError, match="cut off"):
        list(data.train_loader(split, order, **options))


def test_all_samples_of_a_step_are_those_of_its_ranks():
    orders = [data.StepOrder(50, 12, 4, rank, 2, 0, 3, 5) for rank in range(2)]
    dealt = [key for order in orders for batch in list(order)[:2] for key in batch]
    assert orders[1].keys_of(3) == dealt


# ------------------------------------------------------------------------------------------- edits of attention


def edits_of(*indices) -> dict[int, Edit]:
    random = np.random.default_rng(2)
    return {index: Edit("", "", random.random((7, 5), np.float32), random.random((7, 5)) < 0.7) for index in indices}


def taught(edits, workers=0, micro=1, kind="crop_flip", seed=5) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """(epoch, index) -> image and edit as the training loader gives them"""
    order = StepOrder(11, 4, micro, 0, 1, 0, 0, 6)
    loader = data.train_loader(pictures(), order, transform=train_transform(kind, (8, 12)), seed=seed, num_workers=workers,
                               pin_memory=False, edits=edits, grid=(2, 3))
    found = {}
    for batch in loader:
        assert batch.edits.shape == (len(batch.keys), 2, 2, 3) and batch.edits.dtype == torch.float32
        found |= {(key.epoch, key.index): pair for key, pair in zip(batch.keys, zip(batch.images, batch.edits))}
    return found


@pytest.mark.parametrize(("workers", "micro"), [(0, 1), (2, 2)])
def test_edits_come_with_their_images(workers, micro):
    """As the same draw moves them, and the images as they are without."""
    edits = edits_of(1, 4, 9)
    transform = train_transform("crop_flip", (8, 12))
    plainly = pixels(transform=transform, shape=(3, 8, 12))
    found = taught(edits, workers, micro)
    assert found.keys() == plainly.keys() and len(found) == 24
    for (epoch, index), (image, edit) in found.items():
        assert torch.equal(image, plainly[epoch, index])
        if index not in edits:
            assert not edit.any()
            continue
        with seeded(5, "augment", epoch, index):
            expected = with_edit(transform, pictures()[index][0], edits[index], (2, 3))[1]
        assert torch.equal(edit, expected)
    assert sum(edit.any() for _, edit in found.values()) >= 4
    assert not torch.equal(found[0, 4][1], found[1, 4][1])


def test_a_loader_whose_images_have_no_edit_gives_unedited_ones():
    assert not any(edit.any() for _, edit in taught({}).values())


def test_without_edits_batches_have_none():
    loader = data.train_loader(pictures(), StepOrder(11, 4, 1, 0, 1, 0, 0, 2), transform=resized((8, 8)), seed=0, num_workers=0,
                               pin_memory=False)
    assert all(batch.edits is None for batch in loader)
