"""The table of data sets: miniatures in the published layouts, read and compared with torchvision's readers."""

import hashlib
import re
import sys
from collections import Counter
from pathlib import Path

import miniatures
import numpy as np
import pytest
from scipy.io import savemat
from torchvision import datasets as published

import configs
from utils.attention.edits import is_safe
from utils.config.types import run_name
from utils.data import datasets
from utils.data.datasets import DATASETS, data_name, open_splits, run_stem
from utils.data.splits import DataError

# -------------------------------------------------------------------------------------------------- every row


def unpacked_cifar(kind, root: Path, monkeypatch) -> str:
    miniatures.cifar(kind, root / kind.filename, monkeypatch)
    return str(root)


# Every data set has a row: (how to make a small one, images to train, validate and test on, classes, flip).
MINIATURES = {
    "digits": (lambda root, _: "", (1097, 200, 500), 10, False),
    "cifar10": (lambda root, patch: unpacked_cifar(published.CIFAR10, root, patch), (20, 10, 10), 10, True),
    "cifar100": (lambda root, patch: unpacked_cifar(published.CIFAR100, root, patch), (200, 100, 100), 100, True),
    "mnist": (lambda root, _: miniatures.mnist(root), (30, 20, 20), 10, False),
    "fashion_mnist": (lambda root, _: miniatures.mnist(root), (30, 20, 20), 10, True),
    "imagenet": (lambda root, _: miniatures.imagenet(root), (1000, 1000, 1000), 1000, True),
    "cub200": (lambda root, _: miniatures.cub(root), (400, 200, 200), 200, True),
    "flowers102": (lambda root, _: miniatures.flowers(root), (204, 204, 204), 102, True),
    "oxford_pets": (lambda root, _: miniatures.pets(root), (74, 37, 37), 37, True),
    "folder": (lambda root, _: miniatures.tree(root / "tree", miniatures.GOOD_TREE), (5, 3, 3), 2, True),
    "csv": (lambda root, _: miniatures.csv_files(root, train="a.png,x\nb.png,y\nc.png,x", val="d.png,y"), (3, 1, 1), 2, True),
}


pytestmark = pytest.mark.usefixtures("offline")


def test_every_data_set_of_the_configuration_is_tested():
    assert set(configs.DATASETS) == set(DATASETS), "a data set is a name in configs.DATASETS and a row of datasets.DATASETS"
    assert set(DATASETS) == set(MINIATURES), "add a row to MINIATURES"


def names_of(splits) -> list[str]:
    different = [splits.train, splits.val, *([] if splits.val is splits.test else [splits.test])]
    return [split.name(index) for split in different for index in range(len(split))]


@pytest.mark.parametrize("name", MINIATURES)
def test_published_splits(tmp_path, monkeypatch, name):
    make, sizes, classes, flip = MINIATURES[name]
    splits = open_splits(name, make(tmp_path, monkeypatch))
    assert (len(splits.train), len(splits.val), len(splits.test)) == sizes
    assert len(set(splits.classes)) == len(splits.classes) == classes and splits.can_flip is flip
    assert splits.val_is_test == (splits.val is splits.test)
    assert splits.val_name == ("val" if name in ("digits", "imagenet", "folder", "csv") else "test")
    for split in (splits.train, splits.val, splits.test):
        assert split.targets.shape == (len(split),) and split.targets.dtype == np.int64
        assert set(split.targets.tolist()) <= set(range(classes))
        for index in (0, len(split) // 2, len(split) - 1):
            image, label = split[index]
            assert image.mode == "RGB" and type(label) is int and label == split.targets[index]
            assert isinstance(split.content(index), bytes) and split.content(index)
    assert set(splits.train.targets.tolist()) == set(range(classes))
    names = names_of(splits)
    assert len(set(names)) == len(names) and all(is_safe(image) and not image.startswith("outside") for image in names)


@pytest.mark.parametrize("name", MINIATURES)
def test_drawn_splits(tmp_path, monkeypatch, name):
    make, sizes, classes, flip = MINIATURES[name]
    place = make(tmp_path, monkeypatch)
    splits = open_splits(name, place)
    drawn, again = (open_splits(name, place, test_fraction=0.4, split_seed=1) for _ in range(2))
    assert sorted(names_of(drawn)) == sorted(names_of(splits))           # an image keeps its name
    assert drawn.val is drawn.test and drawn.can_flip is flip
    pooled, counts = (Counter(labels.tolist()) for labels in
                      (np.concatenate([drawn.train.targets, drawn.test.targets]), drawn.test.targets))
    assert counts == {label: max(1, round(0.4 * count)) for label, count in pooled.items() if count > 1}
    assert again.test.indices.tolist() == drawn.test.indices.tolist()
    if splits.val is not splits.test or len(splits.train) == classes:     # a validation split of its own; one image a class
        with pytest.raises(DataError, match="--val_fraction"):
            open_splits(name, place, val_fraction=0.4)
        return
    after = open_splits(name, place, val_fraction=0.4, split_seed=1)
    assert len(after.train) + len(after.val) == sizes[0] and len(after.test) == sizes[2] and after.val_name == "val"


def test_digits():
    splits = open_splits("digits", "unused")
    assert splits.classes == tuple("0123456789") and splits.train[0][0].size == (8, 8)
    pixels = np.stack([np.asarray(splits.train[index][0]) for index in range(100)])
    assert pixels.min() == 0 and pixels.max() == 255
    # No image of one part is in another.
    parts = [{split.images[index].tobytes() for index in range(len(split))} for split in (splits.train, splits.val, splits.test)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


# ------------------------------------------------------------------------------------------- images and lists


@pytest.mark.parametrize("name", ["CUB_200_2011", "."])
def test_cub(tmp_path, name):
    splits = open_splits("cub200", str(Path(miniatures.cub(tmp_path)) / name))
    assert splits.classes[0] == "Grey-headed Bird 1" and splits.classes[199] == "Grey-headed Bird 200"
    assert splits.train.targets.tolist() == np.repeat(np.arange(200), 2).tolist()
    assert splits.test.targets.tolist() == list(range(200))
    assert [Path(path).name for path, _ in splits.train.samples[:4]] == ["Bird_1.jpg", "Bird_3.jpg", "Bird_4.jpg", "Bird_6.jpg"]
    assert all(path.endswith(f"/{label + 1:03d}.Grey-headed_Bird_{label + 1}/Bird_{3 * label + 2}.jpg")
               for path, label in splits.test.samples)


def line(file: str, number: int, text: str | None):
    """Replace a line (from 1), or take it out."""
    def damage(place: Path) -> None:
        lines = (place / file).read_text().splitlines()
        lines[number - 1:number] = [] if text is None else [text]
        (place / file).write_text("\n".join(lines))
    return damage


BAD_CUB = {
    "no list": (lambda place: (place / "train_test_split.txt").unlink(), ["train_test_split.txt", "CUB_200_2011.tgz"]),
    "an image gone": (lambda place: (place / "images/007.Grey-headed_Bird_7/Bird_19.jpg").unlink(),
                      ["images.txt: ", "Bird_19.jpg does not exist"]),
    "a line gone": (line("image_class_labels.txt", 9, None), ["image_class_labels.txt lists other images"]),
    "a line twice": (line("images.txt", 9, "8 x.jpg"), ["images.txt:9: "]),
    "no value": (line("train_test_split.txt", 5, "5"), ["train_test_split.txt:5: "]),
    "no number": (line("image_class_labels.txt", 5, "5 Bird"), ["image_class_labels.txt:5: "]),
    "neither train nor test": (line("train_test_split.txt", 5, "5 2"), ["train_test_split.txt: image 5 has 2, not 0 or 1"]),
    "a label of many digits": (line("image_class_labels.txt", 5, "5 " + "9" * 5000), ["image_class_labels.txt:5: "]),
    "a number of many digits": (line("images.txt", 5, "9" * 5000 + " x.jpg"), ["images.txt:5: "]),
    "class 201": (line("image_class_labels.txt", 5, "5 201"), ["the label 200, but there are 200 classes"]),
    "a class gone": (line("classes.txt", 200, None), ["classes.txt does not hold the classes 1 to 200"]),
}


@pytest.mark.parametrize("name", ["flowers-102", "."])
def test_flowers(tmp_path, monkeypatch, name):
    root = Path(miniatures.flowers(tmp_path))
    splits = open_splits("flowers102", str(root / name))
    lists = {kind: (file, hashlib.md5((root / "flowers-102" / file).read_bytes()).hexdigest())
             for kind, file in (("label", "imagelabels.mat"), ("setid", "setid.mat"))}
    monkeypatch.setattr(published.Flowers102, "_file_dict", lists)
    expected = [published.Flowers102(root, split) for split in ("train", "val", "test")]
    parts = [[(str(path), label) for path, label in zip(split._image_files, split._labels)] for split in expected]
    assert [(str(Path(path).resolve()), label) for path, label in splits.train.samples] == parts[0] + parts[1]
    assert [(str(Path(path).resolve()), label) for path, label in splits.test.samples] == parts[2]
    assert splits.classes[0] == "pink primrose" and splits.classes[101] == "blackberry lily"


def test_flowers_without_scipy(tmp_path, monkeypatch):
    miniatures.flowers(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match=r"flowers102: .*pip install scipy"):
        open_splits("flowers102", str(tmp_path))


def matlab(file: str, **values):
    return lambda place: savemat(place / file, {name: np.array(value) for name, value in values.items()})


BAD_FLOWERS = {
    "an image gone": (lambda place: (place / "jpg/image_00017.jpg").unlink(), ["image_00017.jpg does not exist"]),
    "images gone": (lambda place: [file.unlink() for file in (place / "jpg").glob("image_0000*.jpg")],
                    ["setid.mat: the image", "does not exist (9"]),
    "cut": (lambda place: (place / "setid.mat").write_bytes((place / "setid.mat").read_bytes()[:300]), ["setid.mat: cannot be"]),
    "a page": (lambda place: (place / "imagelabels.mat").write_bytes(b"<html>" * 99), ["imagelabels.mat: cannot be read"]),
    "too large": (lambda place: (place / "setid.mat").write_bytes(bytes(2_000_000)), ["setid.mat: 2,000,000 bytes, more than"]),
    "not a number": (matlab("imagelabels.mat", labels=[np.nan, 2]), ["labels should hold whole numbers"]),
    "class 103": (matlab("imagelabels.mat", labels=[103] * 408), ["the label 102, but there are 102 classes"]),
    "few labels": (matlab("imagelabels.mat", labels=[5] * 400), ["setid.mat", "no label in imagelabels.mat"]),
    "trained and tested": (matlab("setid.mat", trnid=[1, 2], valid=[3], tstid=[2]), ["setid.mat: an image is listed twice"]),
}


@pytest.mark.parametrize("name", ["oxford-iiit-pet", "."])
def test_pets(tmp_path, name):
    root = Path(miniatures.pets(tmp_path))
    splits = open_splits("oxford_pets", str(root / name))
    for split, part in ((splits.train, "trainval"), (splits.test, "test")):
        reference = published.OxfordIIITPet(root, part)
        assert [(str(Path(path).resolve()), label) for path, label in split.samples] == [
            (str(path), label) for path, label in zip(reference._images, reference._labels)]
    assert [name.lower() for name in splits.classes] == [name.lower() for name in reference.classes]
    assert splits.classes[0] == "Long haired cat-1" and splits.classes[2] == "dog-3"


BAD_PETS = {
    "an image gone": (lambda place: (place / "images/dog-9_2.jpg").unlink(), ["test.txt: the image", "dog-9_2.jpg does not"]),
    "no class": (line("annotations/test.txt", 4, "dog_7"), ["test.txt:4: "]),
    "a class of many digits": (line("annotations/trainval.txt", 4, f"dog_7 {'9' * 5000} 1 1"), ["trainval.txt:4: ", "1 to 37"]),
    "class 38": (line("annotations/trainval.txt", 4, "dog_7 38 1 1"), ["trainval.txt:4: ", "1 to 37"]),
    "another breed": (line("annotations/trainval.txt", 4, "cat_7 1 1 1"), ["trainval.txt:4: class 1 is Long haired cat-1"]),
    "few lines": (lambda place: [(place / f"annotations/{part}.txt").write_text("dog-3_1 3 1 1\n")
                                 for part in ("trainval", "test")], ["annotations: 1 breeds, not 37"]),
}


DAMAGED = {"cub200": (miniatures.cub, "CUB_200_2011", BAD_CUB), "flowers102": (miniatures.flowers, "flowers-102", BAD_FLOWERS),
           "oxford_pets": (miniatures.pets, "oxford-iiit-pet", BAD_PETS)}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, (_, _, cases) in DAMAGED.items() for case in cases])
def test_damaged_lists_and_missing_images_are_reported(tmp_path, name, case):
    make, folder, cases = DAMAGED[name]
    damage, words = cases[case]
    damage(Path(make(tmp_path)) / folder)
    with pytest.raises(DataError) as raised:
        open_splits(name, str(tmp_path))
    assert not re.search(r"[\r\n]", str(raised.value))
    for word in words:
        assert word in str(raised.value)


def test_imagenet_names_by_number():
    names = datasets.imagenet_names()
    assert len(names) == 1000
    assert (names[0], names[207], names[281], names[999]) == ("tench", "golden retriever", "tabby", "toilet tissue")


@pytest.mark.parametrize(("dataset", "data_dir", "stem"), [
    ("folder", "flowers", "flowers"), ("csv", "photos/birds/", "birds"), ("folder", "a/b/..", "a"), ("folder", "/", "folder"),
    ("folder", "my photos (2)", "my-photos-2"), ("folder", "größe", "groe"), ("folder", "фото", "folder"),
    ("folder", ".hidden", "hidden"), ("imagenet", "data/ilsvrc", "imagenet"), ("digits", "x", "digits")])
def test_runs_are_named_by_the_folder_of_the_users_own_images(dataset, data_dir, stem):
    assert run_stem(dataset, data_dir) == stem == run_name(stem)


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "pets/train").mkdir(parents=True)
    for place, data_dir in (("pets", "."), ("pets/train", "..")):
        monkeypatch.chdir(tmp_path / place)
        assert data_name("folder", data_dir) == run_stem("folder", data_dir) == "pets"
