"""The MNIST family: idx files in the usual folders and under the usual names, Kaggle's csv, and damaged files."""

import gzip
import hashlib
import struct
from pathlib import Path

import miniatures
import numpy as np
import pytest
from download_answers import Answer
from torchvision import datasets as published

from utils.data.datasets import open_splits
from utils.data.idx_files import read_idx, read_pixels
from utils.data.splits import DataError

pytestmark = pytest.mark.usefixtures("offline")
KINDS = {"mnist": published.MNIST, "fashion_mnist": published.FashionMNIST}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("place", ["", "{kind}/raw", "raw"])
def test_mnist(tmp_path, name, ending, place):
    kind = KINDS[name]
    miniatures.mnist(tmp_path / place.format(kind=kind.__name__), ending)
    splits = open_splits(name, str(tmp_path))
    miniatures.mnist(tmp_path / "other" / kind.__name__ / "raw")               # the same content where torchvision reads it
    for split, train in ((splits.train, True), (splits.test, False)):
        reference = kind(tmp_path / "other", train=train)
        assert split.targets.tolist() == reference.targets.tolist()
        for index in (0, 7):
            assert np.array_equal(np.asarray(split[index][0]), reference.data[index].numpy()[..., None].repeat(3, 2))
    assert splits.classes == (tuple("0123456789") if name == "mnist" else tuple(reference.classes))
    assert splits.train[0][0].size == (5, 7)


def as_kaggle(root: Path, how: str) -> None:
    """Write the four files with the names and folders that Kaggle and unpacking programs give them."""
    for file in sorted(Path(miniatures.mnist(root, ".gz" if "gz" in how else "")).iterdir()):
        name = file.name.replace("-idx", ".idx") if "dot" in how else file.name
        if "folder" in how:
            file.rename(root / "moved")
            folder = root / name.removesuffix(".gz")
            folder.mkdir()
            (root / "moved").rename(folder / name.removesuffix(".gz"))
        else:
            file.rename(root / name)


@pytest.mark.parametrize("how", ["dot", "dot gz", "folder", "folder dot", "folder, packed without the extension gz"])
def test_names_of_kaggle_are_found(tmp_path, how):
    as_kaggle(tmp_path / "kaggle", how)
    splits, plain = (open_splits("mnist", place) for place in (str(tmp_path / "kaggle"), miniatures.mnist(tmp_path / "plain")))
    for split, expected in ((splits.train, plain.train), (splits.test, plain.test)):
        assert np.array_equal(split.images, expected.images) and split.targets.tolist() == expected.targets.tolist()


def test_mnist_is_downloaded(tmp_path, monkeypatch):
    site, requested = Path(miniatures.mnist(tmp_path / "site", ".gz")), []
    monkeypatch.setattr(published.MNIST, "resources", [
        (name, hashlib.md5((site / name).read_bytes()).hexdigest()) for name, _ in published.MNIST.resources])
    monkeypatch.setattr("urllib.request.urlopen", lambda request, **_: requested.append(request.full_url) or Answer(
        site / request.full_url.rpartition("/")[2], request))
    splits = open_splits("mnist", str(tmp_path / "data"))
    assert len(set(requested)) == 4 and len(splits.train) == 30
    requested.clear()
    assert len(open_splits("mnist", str(tmp_path / "data")).test) == 20 and not requested


def test_incomplete_or_mixed_mnist_is_reported(tmp_path):
    miniatures.write_idx(Path(miniatures.mnist(tmp_path / "two")) / "train-labels-idx1-ubyte", np.arange(40, dtype=np.uint8) % 10)
    with pytest.raises(DataError, match=r"has 30 images, but .*train-labels-idx1-ubyte 40 labels"):
        open_splits("mnist", str(tmp_path / "two"))
    (Path(miniatures.mnist(tmp_path)) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte missing \("):
        open_splits("mnist", str(tmp_path))


def idx(*sides: int, data: bytes | None = None, start=b"\0\0\x08\x03") -> bytes:
    return start + struct.pack(f">{len(sides)}I", *sides) + (bytes(int(np.prod(sides))) if data is None else data)


BAD_IDX = {
    "truncated header": (idx(5, 4, 3)[:10], "not an idx file"),
    "floats": (idx(5, 4, 3, start=b"\0\0\x0d\x03"), "not an idx file"),
    "truncated": (idx(5, 4, 3)[:-1], "5 x 4 x 3 bytes"),
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
        read_idx(file, 3)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


def test_damaged_gzip_files_are_reported(tmp_path):
    random = np.random.default_rng(0)
    whole = gzip.compress(idx(50, 4, 3, data=random.integers(0, 256, 600, dtype=np.uint8).tobytes()))
    file = tmp_path / "images.gz"
    file.write_bytes(whole)
    assert read_idx(file, 3).shape == (50, 4, 3)
    for position in range(10, len(whole)):         # the bytes before are the time and the name, which do not matter
        content = bytearray(whole)
        content[position] ^= 1 << int(random.integers(0, 8))
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"images\.gz"):
            read_idx(file, 3)
    for length in range(0, len(whole), 20):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"images\.gz"):
            read_idx(file, 3)


def test_gzip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(idx(10, 10, 10, data=bytes(50_000_000)), 1))
    read = []
    real = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: read.append(size) or real(self, size))
    with pytest.raises(DataError, match="10 x 10 x 10 bytes, but it has more"):
        read_idx(tmp_path / "bomb.gz", 3)
    assert read == [16, 1001]


@pytest.mark.parametrize("case", ["truncated gz", "truncated file", "no gz", "empty"])
def test_damaged_file_is_reported_as_damaged(tmp_path, case):
    ending = ".gz" if "gz" in case else ""
    file = Path(miniatures.mnist(tmp_path, ending)) / f"t10k-images-idx3-ubyte{ending}"
    content = file.read_bytes()
    file.write_bytes({"no gz": b"<html>", "empty": b""}.get(case, content[:len(content) // 2]))
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.*damaged or incomplete.*Delete it to have it down") as raised:
        open_splits("mnist", str(tmp_path))
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------- Kaggle's csv of pixels


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("stem", ["mnist_{}", "fashion-mnist_{}", "{}"])
def test_csv_of_pixels_is_read(tmp_path, header, stem):
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (30, 28, 28), dtype=np.uint8), np.arange(30) % 10
    miniatures.pixel_table(tmp_path / f"{stem.format('train')}.csv", images[:20], labels[:20], header)
    miniatures.pixel_table(tmp_path / f"{stem.format('test')}.csv", images[20:], labels[20:], header)
    splits = open_splits("fashion_mnist" if "fashion" in stem else "mnist", str(tmp_path))
    assert np.array_equal(splits.train.images, images[:20]) and splits.train.targets.tolist() == labels[:20].tolist()
    assert np.array_equal(splits.test.images, images[20:]) and splits.val is splits.test and splits.val_name == "test"
    assert f"{stem.format('train')}.csv" in splits.notes[0]


def test_csv_of_pixels_without_labels_is_not_used(tmp_path):
    images, labels = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8), np.arange(30) % 10
    miniatures.pixel_table(tmp_path / "train.csv", images[:20], labels[:20])
    miniatures.pixel_table(tmp_path / "test.csv", images[20:], None)
    with pytest.raises(DataError, match=r"held out of its 20 images .*test\.csv has no labels and is not used.*--val_fraction 0"):
        open_splits("mnist", str(tmp_path))
    splits = open_splits("mnist", str(tmp_path), val_fraction=0.5)
    assert (len(splits.train), len(splits.val), splits.val_name) == (10, 10, "val") and splits.test is splits.val
    with pytest.raises(DataError, match=r"contains pixels .*pixel0.*--dataset mnist"):
        open_splits("csv", str(tmp_path))


@pytest.mark.parametrize(("text", "words"), [
    ("path,label\na.png,1\n", "2 columns, .*--dataset csv"), ("", "1 columns"), (",".join("0" * 785) + "\n1,2\n", "damaged"),
    (",".join(["300"] * 785), "0 to 255"), (",".join(["x"] * 785), "0 to 255"),
    (",".join("0" * 785) + "\n" + "x," * 785, "damaged")])
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_bad_csv_of_pixels_is_reported(tmp_path, text, words):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(DataError, match=words) as raised:
        read_pixels(tmp_path / "train.csv")
    assert "\n" not in str(raised.value) and "train.csv" in str(raised.value)
