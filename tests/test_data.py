"""Data sets, the order of the samples, and the loaders."""

import hashlib
import io
import pickle
import tarfile
import urllib.error
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from utils import data
from utils.data import ArrayImages, DataError, ImageError, Key, StepOrder

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


# ------------------------------------------------------------------------------------------------ data sets


def test_digits():
    splits = data.load_splits("digits", "unused")
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [1097, 200, 500]
    assert splits.classes == tuple("0123456789") and splits.val_name == "val" and not splits.can_flip
    for split in (splits.train, splits.val, splits.test):
        labels = [split[index][1] for index in range(len(split))]
        assert set(labels) == set(range(10)) and all(type(label) is int for label in labels)
    image, _ = splits.train[0]
    assert image.mode == "RGB" and image.size == (8, 8)
    pixels = np.stack([np.asarray(splits.train[index][0]) for index in range(100)])
    assert pixels.min() == 0 and pixels.max() == 255
    # No image of one part is in another.
    parts = [{split.images[index].tobytes() for index in range(len(split))} for split in (splits.train, splits.val, splits.test)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def tree(root: Path, layout: dict[str, int]) -> str:
    """{"train/ant": 3, ...}: folders with so many images, each of another colour"""
    number = 0
    for place, count in layout.items():
        (root / place).mkdir(parents=True)
        for name in range(count):
            number += 1
            Image.new("RGB", (10, 12), (number, 2 * number, 100)).save(root / place / f"{name}.png")
    return str(root)


GOOD = {"train/ant": 3, "train/bee": 2, "val/ant": 1, "val/bee": 2}


def test_folder(tmp_path):
    splits = data.load_splits("folder", tree(tmp_path, GOOD))
    assert splits.classes == ("ant", "bee") and splits.can_flip
    assert [label for _, label in splits.train.samples] == [0, 0, 0, 1, 1]
    assert [label for _, label in splits.val.samples] == [0, 1, 1]
    assert splits.test is splits.val and splits.val_name == "test"
    image, label = splits.train[3]
    assert image.mode == "RGB" and image.size == (10, 12) and label == 1 and image.getpixel((0, 0)) == (4, 8, 100)


def test_folder_takes_nested_folders_and_leaves_hidden_ones_and_other_files(tmp_path):
    root = tree(tmp_path, GOOD | {"train/ant/more/deeper": 2, ".git/objects": 1, "train/.cache": 1, "val/.thumbs": 1})
    (tmp_path / "train" / "notes.txt").write_text("not a class")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    Image.new("L", (4, 4), 7).save(tmp_path / "val" / "bee" / "GREY.JPEG")
    splits = data.load_splits("folder", root)
    assert splits.classes == ("ant", "bee")
    assert Counter(label for _, label in splits.train.samples) == {0: 5, 1: 2}
    assert Counter(label for _, label in splits.val.samples) == {0: 1, 1: 3}
    assert {splits.val[index][0].mode for index in range(4)} == {"RGB"}


BAD_TREES = {
    "no such folder": ({}, ["no such folder: {root}/train", "--data_dir {root}", "train/ and val/"]),
    "no val": ({"train/ant": 1}, ["no such folder: {root}/val"]),
    "no train": ({"val/ant": 1}, ["no such folder: {root}/train"]),
    "no classes": ({"train": 1, "val": 1}, ["{root}/train", "no class folders"]),
    "empty class": (GOOD | {"train/cat": 1, "val/cat": 0}, ["{root}/val", "of class cat"]),
    "class of hidden images": (GOOD | {"train/cat": 1, "val/cat/more": 0}, ["{root}/val", "of class cat"]),
    "class in train alone": (GOOD | {"train/cat": 1}, ["only in train: cat"]),
    "class in val alone": (GOOD | {"val/cat": 1, "val/dog": 1}, ["only in val: cat, dog"]),
    "renamed class": ({"train/ant": 1, "val/aunt": 1}, ["only in train: ant", "only in val: aunt"]),
    "many classes": ({f"train/c{n}": 1 for n in range(8)} | {"val/ant": 1}, ["c0, c1, c2, c3, c4 and 3 more"]),
}


@pytest.mark.parametrize("case", BAD_TREES)
def test_bad_trees_are_told_in_one_line(tmp_path, case):
    layout, words = BAD_TREES[case]
    tree(tmp_path, layout)
    with pytest.raises(DataError) as told:
        data.load_splits("folder", str(tmp_path))
    assert "\n" not in str(told.value)
    for word in words:
        assert word.format(root=tmp_path) in str(told.value)


def test_imagenet_wants_its_thousand_classes(tmp_path):
    with pytest.raises(DataError, match=r"has 2 classes, not 1000: .*--dataset folder"):
        data.load_splits("imagenet", tree(tmp_path / "two", GOOD))
    for split in ("train", "val"):
        for number in range(1000):
            place = tmp_path / "all" / split / f"n{number:08d}"
            place.mkdir(parents=True)
            (place / "0.png").touch()
    assert len(data.load_splits("imagenet", str(tmp_path / "all")).classes) == 1000


def png(cut=None) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()[:cut]


UNREADABLE = {"cut.png": png(cut=600), "header.png": png(cut=20), "empty.jpg": b"", "page.png": b"<html>404</html>",
              "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_image_names_itself(tmp_path, name):
    (tmp_path / name).write_bytes(UNREADABLE[name])
    with pytest.raises(ImageError) as told:
        data.FileImages([(str(tmp_path / name), 0)])[0]
    assert str(tmp_path / name) in str(told.value) and "\n" not in str(told.value)


def test_a_missing_image_names_itself(tmp_path):
    with pytest.raises(ImageError, match=r"gone\.png"):
        data.FileImages([(str(tmp_path / "gone.png"), 0)])[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_comes_through_the_loaders(tmp_path, workers):
    splits = data.load_splits("folder", tree(tmp_path, GOOD))
    for place in ("train/bee/1.png", "val/bee/0.png"):
        (tmp_path / place).write_bytes(png(cut=600))
    common = {"img_size": (8, 8), "num_workers": workers, "pin_memory": False}
    train = data.train_loader(splits.train, StepOrder(5, 5, 1, 0, 1, 0, 0, 2), augmentation="crop", can_flip=True, seed=0,
                              **common)
    evaluation = data.eval_loader(splits.val, batch_size=1, rank=0, world_size=1, **common)
    for loader, place in ((train, "train/bee/1.png"), (evaluation, "val/bee/0.png")):
        with pytest.raises(ImageError, match=place):
            list(loader)


# --------------------------------------------------------------------------------------------------- CIFAR-10

CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def cifar_archive(tmp_path, monkeypatch):
    """An archive in CIFAR-10's format, of 4 images a part, that torchvision takes for the real one -> its path"""
    random, sums = np.random.default_rng(0), {}
    archive = tmp_path / "site" / datasets.CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name in [*(f"data_batch_{part}" for part in range(1, 6)), "test_batch", "batches.meta"]:
            content = {"label_names": CIFAR_CLASSES} if name == "batches.meta" else {
                "data": random.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": random.integers(0, 10, 4).tolist()}
            raw = pickle.dumps(content)
            sums[name] = hashlib.md5(raw).hexdigest()
            info = tarfile.TarInfo(f"{datasets.CIFAR10.base_folder}/{name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    parts = [[name, md5] for name, md5 in sums.items() if name != "batches.meta"]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", parts[:-1])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", parts[-1:])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": sums["batches.meta"]})
    return archive


class Answer(io.BytesIO):
    """What urlopen gives for any address: the file."""

    def __init__(self, file: Path):
        super().__init__(file.read_bytes())
        self.url, self.length = datasets.CIFAR10.url, file.stat().st_size


@pytest.mark.parametrize("how", ["downloaded", "put there by hand"])
def test_cifar10(tmp_path, monkeypatch, cifar_archive, how):
    asked = []
    monkeypatch.setattr("urllib.request.urlopen", lambda request, **_: asked.append(request.full_url) or Answer(cifar_archive))
    place = tmp_path / "data" if how == "downloaded" else cifar_archive.parent
    splits = data.load_splits("cifar10", str(place))
    assert set(asked) == ({datasets.CIFAR10.url} if how == "downloaded" else set())
    assert len(splits.train) == 20 and len(splits.val) == 4 and splits.test is splits.val and splits.val_name == "test"
    assert splits.classes == tuple(CIFAR_CLASSES) and splits.can_flip
    image, label = splits.train[0]
    assert image.size == (32, 32) and image.mode == "RGB" and type(label) is int
    # Rows of the file are channels first.
    batch = pickle.loads((place / datasets.CIFAR10.base_folder / "data_batch_1").read_bytes())
    assert np.array_equal(np.asarray(image), batch["data"][0].reshape(3, 32, 32).transpose(1, 2, 0))
    assert label == batch["labels"][0]


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_without_network_is_one_line_with_the_address(tmp_path, monkeypatch, dataset):
    def offline(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(DataError) as told:
        data.load_splits(dataset, str(tmp_path))
    url = getattr(datasets, dataset.upper()).url
    assert "\n" not in str(told.value)
    for word in (url, str(tmp_path), "no network here", dataset.upper()):
        assert word in str(told.value)


def test_a_damaged_cifar_archive_is_told(tmp_path, monkeypatch, cifar_archive):
    cifar_archive.write_bytes(cifar_archive.read_bytes()[:-100])
    monkeypatch.setattr("urllib.request.urlopen", lambda request, **_: Answer(cifar_archive))
    with pytest.raises(DataError, match="CIFAR10") as told:
        data.load_splits("cifar10", str(tmp_path / "data"))
    assert "\n" not in str(told.value)


# --------------------------------------------------------------------------------------------------- loaders


def pictures(count=11) -> ArrayImages:
    random = np.random.default_rng(1)
    return ArrayImages(random.integers(0, 256, (count, 14, 10, 3), dtype=np.uint8), random.integers(0, 3, count))


def pixels(split=None, *, batch_size=4, micro=1, workers=0, augmentation="crop_flip", can_flip=True, seed=5,
           stop=6, size=(8, 8)) -> dict[tuple[int, int], torch.Tensor]:
    """(epoch, index) -> the image that the training loader makes of it"""
    split = split or pictures()
    order = StepOrder(len(split), batch_size, micro, 0, 1, 0, 0, stop)
    loader = data.train_loader(split, order, img_size=size, augmentation=augmentation, can_flip=can_flip, seed=seed,
                               num_workers=workers, pin_memory=False)
    found = {}
    for batch, expected in zip(loader, order, strict=True):
        assert batch.keys == expected and batch.images.dtype == torch.uint8 and batch.targets.dtype == torch.int64
        assert batch.images.shape == (len(expected), 3, *size)
        assert batch.targets.tolist() == [split[key.index][1] for key in expected]
        found |= {(key.epoch, key.index): image for key, image in zip(batch.keys, batch.images)}
    return found


def same(a: dict, b: dict) -> list[bool]:
    common = a.keys() & b.keys()
    assert len(common) > 10
    return [torch.equal(a[key], b[key]) for key in common]


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


def test_augmentation_kinds_and_flips_through_the_loader():
    kinds = {kind: pixels(augmentation=kind) for kind in ("crop_flip", "crop", "none")}
    assert not any(same(kinds["crop"], kinds["none"]))
    assert len(set(same(kinds["crop"], kinds["crop_flip"]))) == 2                # some flipped, some not
    assert all(same(kinds["crop"], pixels(augmentation="crop_flip", can_flip=False)))


def test_digits_are_not_flipped():
    digits = data.load_splits("digits", "")
    kinds = [pixels(digits.train, augmentation=kind, can_flip=digits.can_flip) for kind in ("crop", "crop_flip")]
    assert all(same(*kinds))


def test_loading_leaves_the_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    split = pictures()
    transform = data.train_transform("crop_flip", (8, 8), True)
    keyed = data._Keyed(split, transform, seed=1)
    for index in range(5):
        keyed[Key(0, 0, 0, index)]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("size", [(6, 10), (10, 6)])
def test_sizes_need_not_be_square(size):
    pixels(size=size, stop=2)
    loader = data.eval_loader(pictures(), batch_size=3, img_size=size, rank=0, world_size=1, num_workers=0, pin_memory=False)
    assert {batch.images.shape[1:] for batch in loader} == {(3, *size)}


@pytest.mark.parametrize("count", [1, 2, 10, 11])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_evaluation_covers_every_image_once(count, world, batch_size):
    split, seen = pictures(count), []
    for rank in range(world):
        loader = data.eval_loader(split, batch_size=batch_size, img_size=(14, 10), rank=rank, world_size=world, num_workers=0,
                                  pin_memory=False)
        batches = list(loader)
        assert len(batches) == len(loader) and all(1 <= len(batch.keys) <= batch_size for batch in batches)
        for batch in batches:
            for key, image, label in zip(batch.keys, batch.images, batch.targets):
                seen.append(key.index)
                assert label == split.labels[key.index]
                assert np.array_equal(image.permute(1, 2, 0).numpy(), split.images[key.index])     # same size: as it is
    assert sorted(seen) == list(range(count))


def test_default_workers(monkeypatch):
    monkeypatch.setattr(data.sys, "platform", "linux")
    for cores, ranks, expected in ((1, 1, 0), (2, 1, 1), (4, 1, 3), (16, 1, 4), (16, 8, 1), (8, 2, 3), (2, 2, 0), (2, 4, 0)):
        monkeypatch.setattr(data.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert data.default_workers("folder", ranks) == expected, (cores, ranks)
        assert data.default_workers("digits", ranks) == 0


def test_data_sets_are_those_of_the_configuration():
    import configs

    assert tuple(data.DATASETS) == configs.FLAGS["dataset"][0]


def test_sixteen_bit_images_keep_their_range(tmp_path):
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    image, _ = data.FileImages([(str(tmp_path / "ramp.png"), 0)])[0]
    assert image.mode == "RGB" and np.asarray(image)[..., 0].ravel().tolist() == list(range(256))


def test_all_samples_of_a_step_are_those_of_its_ranks():
    orders = [data.StepOrder(50, 12, 4, rank, 2, 0, 3, 5) for rank in range(2)]
    dealt = [key for order in orders for batch in list(order)[:2] for key in batch]
    assert orders[1].keys_of(3) == dealt
