"""Files that a list names: without extensions, with paths of other systems, in a given or a likely folder."""

import unicodedata
from pathlib import Path

import pytest

from utils.data.csv_lists import csv_lists
from utils.data.layouts import Request
from utils.data.listed_files import FileFinder
from utils.data.splits import DataError


def touch(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


@pytest.mark.parametrize(("name", "file"), [
    ("img/a.png", "img/a.png"), ("./img/a.png", "img/a.png"), ("img\\a.png", "img/a.png"), ("/img/a.png", "img/a.png"),
    ("img/a", "img/a.png"), ("img\\a", "img/a.png"), ("b.1", "b.1.JPEG"), ("D:\\work\\data\\img\\a.png", "img/a.png"),
    ("/home/other/data/img/a", "img/a.png"), ("img/" + unicodedata.normalize("NFD", "ü.png"), "img/ü.png"),
    ("gone", None), ("gone.png", None), ("img", None), ("note", None), ("../img/a.png", None), ("other/a.png", None)])
def test_names_are_found(tmp_path, name, file):
    root = touch(tmp_path / "data", "img/a.png", "img/ü.png", "b.1.JPEG", "note.txt")
    found = FileFinder(root).find(name, [root])
    assert found == file if file is None else Path(found) == Path(root, file)


def test_name_of_two_files_is_reported(tmp_path):
    root = touch(tmp_path, "a.png", "a.jpg", "part1/b.png", "part2/b.png")
    with pytest.raises(DataError, match=r"^a may be a\.jpg or a\.png in .*\. Write the names with their extensions"):
        FileFinder(root).find("a", [root])
    with pytest.raises(DataError, match=r"b\.png may be .*part1/b\.png or .*part2/b\.png\. Set --image_dir to one of the"):
        FileFinder(root).find("b.png", [f"{root}/part1", f"{root}/part2"])
    (tmp_path / "train.csv").write_text("path,label\na,x\n")
    with pytest.raises(DataError, match=r"train\.csv:2: a may be a\.jpg or a\.png"):
        csv_lists(root)


@pytest.mark.parametrize(("files", "names", "part", "folders"), [
    ("images/a.png images/b.png", "a.png b.png", "train", ["images"]),
    ("a.png images/a.png images/b.png", "a.png b.png", "train", ["."]),                # DATA_DIR first, if it has any
    ("train/1.png train/2.png test/1.png test/2.png", "1 2", "train", ["train"]),      # Kaggle's CIFAR-10: by the part
    ("train/1.png train/2.png test/1.png test/2.png", "1 2", "test", ["test"]),
    ("images/images/a.png", "a.png", "train", ["images/images"]),                      # unpacked twice
    ("part_1/a.jpg part_2/b.jpg", "a b", "train", ["part_1", "part_2"]),               # HAM10000
    ("x/a.png", "c.png", "train", []), ("x/a.png x/b.png", "a.png b.png gone.png", "train", ["x"])])
def test_folders_are_found(tmp_path, monkeypatch, files, names, part, folders):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "data", *files.split())
    found = FileFinder("data").folders_of(names.split(), part)
    assert [str(Path(folder)) for folder in found] == [str(Path("data", folder)) for folder in folders]


def test_folders_around_the_data_set_are_found(tmp_path, monkeypatch):
    """Paths may be relative to the folder above or to the current folder, as scripts write them."""
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "sets/data/img/a.png", "elsewhere/b.png")
    assert FileFinder("sets/data").folders_of(["data/img/a.png"], "train") == [str(tmp_path / "sets")]
    assert FileFinder("sets/data").folders_of(["elsewhere/b.png"], "train") == ["."]


def test_two_possible_folders_are_reported(tmp_path):
    root = touch(tmp_path, "small/a.png", "large/a.png")
    with pytest.raises(DataError, match=r"may be in .*large or in .*small\. Add --image_dir"):
        FileFinder(root).folders_of(["a.png"], "train")
    assert FileFinder(root, "small").folders_of(["a.png"], "train") == [f"{root}/small"]


def test_image_dir_is_relative_to_the_data_set_then_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "data/img/a.png", "img/b.png", "other/c.png")
    assert FileFinder("data", "img").given == "data/img" and FileFinder("data", "other").given == "other"
    assert FileFinder("data", str(tmp_path / "img")).given == str(tmp_path / "img")
    assert FileFinder("data", "img").folders_of(["b.png"], "train") == []              # no other folder is searched
    with pytest.raises(DataError, match=rf"--image_dir gone: no such folder in data or in {tmp_path}"):
        FileFinder("data", "gone")


@pytest.mark.parametrize("image_dir", [None, "images", "pictures/images"])
def test_images_in_another_folder_than_the_list(tmp_path, image_dir):
    """A public list of faces has the columns user.id,image,emotion."""
    place = tmp_path / ("pictures/images" if image_dir == "pictures/images" else "images")
    touch(place, "Angry.jpg", "s_1.jpg")
    (tmp_path / "legend.csv").write_text("user.id,image,emotion\n628,s_1.jpg,anger\ndwdii,Angry.jpg,surprise\n")
    splits = csv_lists(str(tmp_path), Request(image_dir=image_dir))
    assert [path for path, _ in splits.train.samples] == [f"{place}/s_1.jpg", f"{place}/Angry.jpg"]
    assert splits.classes == ("anger", "surprise") and [splits.train.name(0)] == [f"{place.relative_to(tmp_path)}/s_1.jpg"]
    assert f"legend.csv: paths from column image, labels from column emotion; images in {place}" in splits.notes
