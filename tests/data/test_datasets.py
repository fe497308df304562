"""The table of data sets: miniatures in the published layouts, read and compared with torchvision's readers."""

import gzip
import hashlib
import io
import re
import struct
import sys
import urllib.error
from collections import Counter
from pathlib import Path

import miniatures
import numpy as np
import pytest
from scipy.io import savemat
from torchvision import datasets as published

import configs
from utils.attention.edits import is_safe
from utils.data import datasets
from utils.data.datasets import DATASETS, open_splits
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


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


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
    assert (splits.val is splits.test) == (splits.val_name == "test")
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


# ----------------------------------------------------------------------------------------------------- CIFAR


class Answer(io.BytesIO):
    """What urlopen gives for any address: the file."""

    def __init__(self, file: Path, request):
        super().__init__(file.read_bytes())
        self.url, self.length = request.full_url, file.stat().st_size


@pytest.mark.parametrize("how", ["downloaded", "put there by hand"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, name, how):
    kind, asked = getattr(published, name.upper()), []
    archive = miniatures.cifar(kind, tmp_path / "site" / kind.filename, monkeypatch)
    monkeypatch.setattr("urllib.request.urlopen",
                        lambda request, **_: asked.append(request.full_url) or Answer(archive, request))
    place = tmp_path / "data" if how == "downloaded" else archive.parent
    splits = open_splits(name, str(place))
    assert set(asked) == ({kind.url} if how == "downloaded" else set())
    for split, train in ((splits.train, True), (splits.test, False)):
        reference = kind(place, train=train)
        assert split.targets.tolist() == reference.targets and list(splits.classes) == reference.classes
        assert np.array_equal(split[3][0], reference.data[3])
    if name == "cifar10":
        assert list(splits.classes) == miniatures.CIFAR_CLASSES
    if how == "downloaded":
        archive.write_bytes(archive.read_bytes()[:-100])
        with pytest.raises(DataError, match=kind.__name__):
            open_splits(name, str(tmp_path / "damaged"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist", "flowers102", "oxford_pets", "cub200"])
def test_a_download_that_fails_is_one_line_with_the_address(tmp_path, name):
    with pytest.raises(DataError) as raised:
        open_splits(name, str(tmp_path))
    words = {"cifar10": [published.CIFAR10.url, "CIFAR10", published.CIFAR10.filename],
             "cifar100": [published.CIFAR100.url, "CIFAR100"],
             "mnist": ["https://ossci-datasets.s3.amazonaws.com/mnist/", "t10k-labels-idx1-ubyte.gz", "/MNIST/raw"],
             "fashion_mnist": ["http://fashion-mnist.s3-website", "train-images-idx3-ubyte.gz", "/FashionMNIST/raw"],
             "flowers102": ["https://www.robots.ox.ac.uk/~vgg/data/flowers/102/", "102flowers.tgz", "/flowers-102"],
             "oxford_pets": ["https://www.robots.ox.ac.uk/~vgg/data/pets/", "images.tar.gz", "/oxford-iiit-pet"],
             "cub200": ["https://data.caltech.edu/records/65de6-vp158", "CUB_200_2011.tgz"]}[name]
    assert "\n" not in str(raised.value)
    for word in [*words, str(tmp_path), *([] if name == "cub200" else ["no network here"])]:
        assert word in str(raised.value)


# ------------------------------------------------------------------------------------------------ MNIST family


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("place", ["", "{kind}/raw"])
def test_mnist(tmp_path, name, ending, place):
    kind = {"mnist": published.MNIST, "fashion_mnist": published.FashionMNIST}[name]
    miniatures.mnist(tmp_path / place.format(kind=kind.__name__), ending)
    splits = open_splits(name, str(tmp_path))
    miniatures.mnist(tmp_path / "other" / kind.__name__ / "raw")               # where torchvision reads: the same content
    for split, train in ((splits.train, True), (splits.test, False)):
        reference = kind(tmp_path / "other", train=train)
        assert split.targets.tolist() == reference.targets.tolist()
        for index in (0, 7):
            assert np.array_equal(np.asarray(split[index][0]), reference.data[index].numpy()[..., None].repeat(3, 2))
    assert splits.classes == (tuple("0123456789") if name == "mnist" else tuple(reference.classes))
    assert splits.train[0][0].size == (5, 7)


def test_mnist_is_downloaded(tmp_path, monkeypatch):
    site, asked = Path(miniatures.mnist(tmp_path / "site", ".gz")), []
    monkeypatch.setattr(published.MNIST, "resources", [
        (name, hashlib.md5((site / name).read_bytes()).hexdigest()) for name, _ in published.MNIST.resources])
    monkeypatch.setattr("urllib.request.urlopen", lambda request, **_: asked.append(request.full_url) or Answer(
        site / request.full_url.rpartition("/")[2], request))
    splits = open_splits("mnist", str(tmp_path / "data"))
    assert len(set(asked)) == 4 and len(splits.train) == 30
    asked.clear()
    assert len(open_splits("mnist", str(tmp_path / "data")).test) == 20 and not asked


def test_incomplete_or_mixed_mnist_is_reported(tmp_path):
    miniatures.write_idx(Path(miniatures.mnist(tmp_path / "two")) / "train-labels-idx1-ubyte", np.arange(40, dtype=np.uint8) % 10)
    with pytest.raises(DataError, match=r"has 30 images, .*train-labels-idx1-ubyte 40 labels"):
        open_splits("mnist", str(tmp_path / "two"))
    (Path(miniatures.mnist(tmp_path)) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"lacks t10k-labels-idx1-ubyte \("):
        open_splits("mnist", str(tmp_path))


def idx(*sides: int, data: bytes | None = None, start=b"\0\0\x08\x03") -> bytes:
    return start + struct.pack(f">{len(sides)}I", *sides) + (bytes(int(np.prod(sides))) if data is None else data)


BAD_IDX = {
    "a header cut off": (idx(5, 4, 3)[:10], "not an idx file"),
    "floats": (idx(5, 4, 3, start=b"\0\0\x0d\x03"), "not an idx file"),
    "cut off": (idx(5, 4, 3)[:-1], "5 x 4 x 3 bytes"),
    "too much": (idx(5, 4, 3) + b"\0", "5 x 4 x 3 bytes"),
    "no images": (idx(0, 28, 28), "0 x 28 x 28 bytes, which does not fit"),
    "far too many": (idx(2 ** 31, 2 ** 31, 2 ** 31, data=b"1234"), "2147483648 x 2147483648 bytes, which does not fit"),
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_files_are_reported(tmp_path, case, ending):
    content, words = BAD_IDX[case]
    file = tmp_path / f"images{ending}"
    file.write_bytes(gzip.compress(content) if ending else content)
    with pytest.raises(DataError, match=words) as raised:
        datasets.read_idx(file, 3)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


def test_damaged_gzip_files_are_reported(tmp_path):
    random = np.random.default_rng(0)
    whole = gzip.compress(idx(50, 4, 3, data=random.integers(0, 256, 600, dtype=np.uint8).tobytes()))
    file = tmp_path / "images.gz"
    file.write_bytes(whole)
    assert datasets.read_idx(file, 3).shape == (50, 4, 3)
    for position in range(10, len(whole)):         # before: the time and the name, which nothing depends on
        content = bytearray(whole)
        content[position] ^= 1 << int(random.integers(0, 8))
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"images\.gz"):
            datasets.read_idx(file, 3)
    for length in range(0, len(whole), 20):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"images\.gz"):
            datasets.read_idx(file, 3)


def test_a_gzip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(idx(10, 10, 10, data=bytes(50_000_000)), 1))
    read = []
    real = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: read.append(size) or real(self, size))
    with pytest.raises(DataError, match="10 x 10 x 10 bytes, but it holds more"):
        datasets.read_idx(tmp_path / "bomb.gz", 3)
    assert read == [16, 1001]


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
    """Replaces a line (from 1), or takes it out."""
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
                    ["setid.mat: the image", "does not exist, nor"]),
    "cut": (lambda place: (place / "setid.mat").write_bytes((place / "setid.mat").read_bytes()[:300]), ["setid.mat: cannot be"]),
    "a page": (lambda place: (place / "imagelabels.mat").write_bytes(b"<html>" * 99), ["imagelabels.mat: cannot be read"]),
    "too large": (lambda place: (place / "setid.mat").write_bytes(bytes(2_000_000)), ["setid.mat: 2,000,000 bytes are more"]),
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
