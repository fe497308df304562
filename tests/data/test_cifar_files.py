"""CIFAR's files: the archive, unpacked in several places, the binary version, and damaged ones."""

import shutil
import tarfile

import miniatures
import numpy as np
import pytest
from download_answers import Answer
from torchvision import datasets as published

from utils.data import cifar_files
from utils.data.datasets import open_splits
from utils.data.splits import DataError

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.parametrize("how", ["downloaded", "put there by hand"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, name, how):
    kind, requested = getattr(published, name.upper()), []
    archive = miniatures.cifar(kind, tmp_path / "site" / kind.filename, monkeypatch)
    monkeypatch.setattr("urllib.request.urlopen",
                        lambda request, **_: requested.append(request.full_url) or Answer(archive, request))
    place = tmp_path / "data" if how == "downloaded" else archive.parent
    splits = open_splits(name, str(place))
    assert set(requested) == ({kind.url} if how == "downloaded" else set())
    for split, train in ((splits.train, True), (splits.test, False)):
        reference = kind(place, train=train)
        assert split.targets.tolist() == reference.targets and list(splits.classes) == reference.classes
        assert np.array_equal(split[3][0], reference.data[3])
    if name == "cifar10":
        assert list(splits.classes) == miniatures.CIFAR_CLASSES


@pytest.fixture(params=["cifar10", "cifar100"])
def unpacked(request, tmp_path, monkeypatch):
    """(name, torchvision's class, a folder with the archive and the unpacked files)"""
    kind = getattr(published, request.param.upper())
    archive = miniatures.cifar(kind, tmp_path / "data" / kind.filename, monkeypatch)
    kind(archive.parent, download=True)                                   # unpacks it
    return request.param, kind, archive.parent


@pytest.mark.parametrize("place", ["as torchvision", "the folder itself", "its folder twice", "inside another folder"])
def test_unpacked_files_are_found(tmp_path, unpacked, place):
    name, kind, root = unpacked
    expected = open_splits(name, str(root))
    (root / kind.filename).unlink()
    own = root / kind.base_folder
    if place == "the folder itself":
        root = own.rename(root / "Kaggle's")
    elif place != "as torchvision":
        outer = root / (kind.base_folder if "twice" in place else "archive (1)")
        own.rename(root / "moved")
        outer.mkdir()
        (root / "moved").rename(outer / kind.base_folder)
    splits = open_splits(name, str(root))
    assert splits.classes == expected.classes and np.array_equal(splits.train.images, expected.train.images)
    assert splits.test.targets.tolist() == expected.test.targets.tolist()


def test_damaged_files_are_reported_as_damaged(unpacked):
    name, kind, root = unpacked
    archive, batch = root / kind.filename, root / kind.base_folder / kind.train_list[0][0]
    content = batch.read_bytes()
    batch.write_bytes(content[:-100])                                     # truncated
    with pytest.raises(DataError, match=f"{batch}: damaged or incomplete .*Delete .* have {name.upper()} downloaded") as raised:
        open_splits(name, str(root))
    assert "cannot be downloaded" not in str(raised.value) and "\n" not in str(raised.value)
    batch.unlink()
    assert len(open_splits(name, str(root)).train)                        # unpacked again
    archive.rename(root / "elsewhere")
    batch.unlink()
    with pytest.raises(DataError, match=rf"{kind.base_folder}: {batch.name} missing\. Delete"):
        open_splits(name, str(root))
    shutil.rmtree(root / kind.base_folder)
    packed = (root / "elsewhere").read_bytes()
    for damaged in (packed[:-100], packed[:50] + b"x" + packed[51:], b"", b"<html>not found</html>"):
        archive.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{archive}: damaged or incomplete .*Delete it") as raised:
            open_splits(name, str(root))
        assert "cannot be downloaded" not in str(raised.value) and "\n" not in str(raised.value)
        assert archive.read_bytes() == damaged


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_binary_version_is_read(tmp_path, monkeypatch, name):
    folder, packed, per_row, names, _ = cifar_files.BINARY[name]
    files = miniatures.cifar_binary(name, tmp_path / folder)
    monkeypatch.setitem(cifar_files.BINARY, name, (folder, packed, per_row, names, files))
    splits = open_splits(name.lower(), str(tmp_path))
    assert len(splits.train) == sum(files.values()) - len(splits.test) and splits.classes[3] == "class_3"
    first = np.frombuffer((tmp_path / folder / next(iter(files))).read_bytes(), np.uint8)
    assert splits.train.targets[0] == first[per_row - 1]                      # the fine one of two labels
    assert splits.train[0][0].getpixel((1, 0)) == tuple(first[per_row + 1 + 1024 * color] for color in range(3))
    with tarfile.open(tmp_path / packed, "w:gz") as tar:
        tar.add(tmp_path / folder, folder)
    (tmp_path / folder).rename(tmp_path / "other")
    again = open_splits(name.lower(), str(tmp_path))                          # read from the archive
    assert np.array_equal(again.train.images, splits.train.images) and again.classes == splits.classes
    content = (tmp_path / packed).read_bytes()
    (tmp_path / packed).write_bytes(content[:len(content) // 2])
    with pytest.raises(DataError, match=f"{packed}: damaged or incomplete"):
        open_splits(name.lower(), str(tmp_path))
    (tmp_path / packed).unlink()
    file = tmp_path / "other" / list(files)[-1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{file}: damaged or incomplete \("):
        open_splits(name.lower(), str(tmp_path / "other"))
    file.unlink()
    with pytest.raises(DataError, match=f"{file.name} missing"):
        open_splits(name.lower(), str(tmp_path / "other"))


def test_other_layouts_are_reported(tmp_path):
    """Kaggle's competition has a list; other copies have one folder per class."""
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "trainLabels.csv").write_text("id,label\n1,frog\n")
    with pytest.raises(DataError, match=r"it contains trainLabels\.csv; --dataset csv reads"):
        open_splits("cifar10", str(tmp_path / "list"))
    miniatures.tree(tmp_path / "tree", miniatures.GOOD_TREE)
    with pytest.raises(DataError, match=r"it contains train/, val/; --dataset folder reads"):
        open_splits("cifar10", str(tmp_path / "tree"))
