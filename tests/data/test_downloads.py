"""Failed downloads: one line with the address and what is in the folder; damaged archives are reported as damaged."""

from pathlib import Path

import pytest
from torchvision import datasets as published

from utils.data.datasets import open_splits
from utils.data.splits import DataError

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist", "flowers102", "oxford_pets", "cub200"])
def test_failed_download_is_reported_with_the_address(tmp_path, name):
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


@pytest.mark.parametrize(("name", "archive"), [
    ("flowers102", "flowers-102/102flowers.tgz"), ("oxford_pets", "oxford-iiit-pet/images.tar.gz")])
def test_damaged_archive_is_reported_as_damaged(tmp_path, name, archive):
    file = Path(tmp_path, archive)
    file.parent.mkdir()
    file.write_bytes(b"truncated")
    with pytest.raises(DataError, match=f"{file}: damaged or incomplete .*Delete it and fetch") as raised:
        open_splits(name, str(tmp_path))
    assert "cannot be downloaded" not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("there", ["", "MNIST"])
def test_failed_download_leaves_no_folders(tmp_path, there):
    place = tmp_path / "no" / "such"
    (place / there if there else tmp_path).mkdir(parents=True, exist_ok=True)
    words = r"\(it contains MNIST/\)" if there else r"\(no such folder\)"
    with pytest.raises(DataError, match=rf"MNIST is not in {place} {words} and cannot be downloaded"):
        open_splits("mnist", str(place))
    assert list(tmp_path.rglob("*")) == ([tmp_path / "no", place, place / "MNIST"] if there else [])


def test_archive_that_is_not_unpacked_is_reported(tmp_path):
    (tmp_path / "CUB_200_2011.tgz").touch()
    with pytest.raises(DataError, match=r"packed in .*CUB_200_2011\.tgz: unpack it"):
        open_splits("cub200", str(tmp_path))
