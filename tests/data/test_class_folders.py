"""Data sets in class folders: which images and classes they have, and which errors and warnings are reported."""

import itertools
import os
from collections import Counter
from pathlib import Path

import pytest
from miniatures import GOOD_TREE, imagenet, png, tree
from PIL import Image
from torchvision.datasets import ImageFolder

from utils.data import image_files
from utils.data.class_folders import picture_files
from utils.data.classes import ClassRule
from utils.data.datasets import open_splits
from utils.data.image_files import IMAGE_EXTENSIONS
from utils.data.splits import DataError


def test_folder(tmp_path):
    splits = open_splits("folder", tree(tmp_path, GOOD_TREE))
    assert splits.classes == ("ant", "bee") and splits.can_flip
    assert splits.train.targets.tolist() == [0, 0, 0, 1, 1]
    assert splits.val.targets.tolist() == [0, 1, 1]
    assert splits.test is splits.val and splits.val_name == "val" and splits.val_is_test
    image, label = splits.train[3]
    assert image.mode == "RGB" and image.size == (10, 12) and label == 1 and image.getpixel((0, 0)) == (4, 8, 100)


def test_folder_reads_nested_folders_and_ignores_hidden_ones_and_other_files(tmp_path):
    root = tree(tmp_path, GOOD_TREE | {"train/ant/more/deeper": 2, ".git/objects": 1, "train/.cache": 1, "val/.thumbs": 1})
    (tmp_path / "train" / "notes.txt").write_text("not a class")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "ant" / "._0.png").write_bytes(b"metadata that macOS stores for 0.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "val" / "bee" / "GREY.JPEG")
    splits = open_splits("folder", root)
    assert splits.classes == ("ant", "bee")
    assert Counter(splits.train.targets.tolist()) == {0: 5, 1: 2}
    assert Counter(splits.val.targets.tolist()) == {0: 1, 1: 3}
    assert {splits.val[index][0].mode for index in range(4)} == {"RGB"}


def test_files_are_in_the_order_of_torchvision(tmp_path):
    layout = {"train/b.c": 2, "train/b/z": 3, "train/b/a/deep": 2, "train/b-a": 1, "train/B": 11, "train/b/a.x": 2}
    root = tree(tmp_path, layout | {f"val/{name}": 1 for name in ("b.c", "b", "b-a", "B")})
    (tmp_path / "train" / "b" / "last.png").write_bytes(png())
    (tmp_path / "train" / "B" / "linked").symlink_to(tmp_path / "train" / "b.c")
    splits = open_splits("folder", root)
    expected = ImageFolder(tmp_path / "train")
    assert splits.train.samples == expected.samples and list(splits.classes) == expected.classes


def test_linked_folders_are_read_once(tmp_path):
    """Each folder by its own path, so that its images keep their names."""
    root = tree(tmp_path, GOOD_TREE | {f"train/cat/{name}": 1 for name in "abcdef"} | {"outside": 0, "outside/deep/end": 1})
    for one in "abcdef":
        for other in "abcdef":
            (tmp_path / "train" / "cat" / one / f"to_{other}").symlink_to(f"../{other}")
    for name in ("z", "y"):
        (tmp_path / "train" / "cat" / "a" / name).symlink_to(tmp_path / "outside")
    for place, target in (("outside/deep/up", "."), ("train/ant/again", "train/ant"), ("train/ant/above", ".")):
        (tmp_path / place).symlink_to(tmp_path / target)          # circles
    splits = open_splits("folder", root)
    found = [Path(path).relative_to(tmp_path).as_posix() for path, label in splits.train.samples if label == 2]
    assert splits.train.targets.tolist() == [0, 0, 0, 1, 1] + [2] * 7
    assert found == ["train/cat/a/0.png", "train/cat/a/y/deep/end/0.png", *(f"train/cat/{name}/0.png" for name in "bcdef")]


BAD_TREES = {
    "no such folder": ({}, ["no such folder: {root}"]),
    "no val": ({"train/ant": 1}, ["{root} contains train/ (1 folder) but no val/", "Add VAL_FRACTION=0.2 (--val_fraction 0.2)"]),
    "no classes": ({"train": 0, "val": 0}, [
        "{root}/train is empty (except for hidden files). It must contain one folder per class"]),
    "one class": ({"train/ant": 2, "val/ant": 1}, ["only one class, ant", "nothing to learn"]),
    "unsorted val": ({"train/ant": 2, "val": 2}, ["{root}/val contains images but no class folders", "one folder per class",
                                                 "ImageNet"]),
    "empty class": (GOOD_TREE | {"train/cat": 0, "val/cat": 1}, ["{root}/train", "of class cat"]),
    "nothing in val": ({"train/ant": 1, "train/bee": 1, "val/ant": 0}, ["{root}/val: no images", "of class ant"]),
    "class only in val": (GOOD_TREE | {"val/cat": 1, "val/dog": 1}, ["only in val: cat, dog"]),
    "renamed class": ({"train/ant": 1, "train/bee": 1, "val/aunt": 1}, ["different classes (only in val: aunt)"]),
    "other case": ({"train/ant": 1, "train/bee": 1, "val/Ant": 1}, ["different classes (only in val: Ant (similar: ant))"]),
    "many classes": ({f"val/c{n}": 1 for n in range(8)} | {"train/ant": 1}, ["c0, c1, c2, c3, c4 and 3 more"]),
    "one tree": ({"ant": 2, "bee": 2}, ["2 folders but no train/ and val/", "add VAL_FRACTION=0.2", "--test_fraction 0.2"]),
    "single folder": ({"ant": 2}, ["{root} contains one folder (ant) but no train/ and val/. Set --data_dir to the folder that"]),
    "only hidden files": ({".hidden": 1}, ["{root} is empty (except for hidden files). Set --data_dir to the folder that"]),
    "hidden files in train": ({"train/.hidden": 1, "val/ant": 1}, ["{root}/train is empty (except for hidden files). It must"]),
    "deep": ({f"b/c/pets/{split}/{name}": 1 for split in ("train", "val") for name in ("ant", "bee")}, [
        "{root} does not contain train/ and val/ directly; they are in {root}/b/c/pets. Set --data_dir {root}/b/c/pets"]),
    "another folder": ({"train/ant": 1, "train/bee": 1, "tests/ant": 1}, ["(there is also 1 folder (tests))"]),
}


# name: (folders in addition to ant and bee, labels of val)
TREES_THAT_WORK = {
    "class missing in val": ({"train/cat": 1, "val/dog": 1, "train/dog": 1}, [0, 1, 1, 3]),
    "class empty in val": ({"train/aa": 1, "val/aa": 0}, [1, 2, 2]),
    "left by notebooks": ({"train/.ipynb_checkpoints": 2, "val/.ipynb_checkpoints": 1}, [0, 1, 1]),
}


@pytest.mark.contract("P14", "labels come from the classes of train; what does not fit is reported before the first step")
def test_class_folders_that_differ(tmp_path, figure):
    for number, case in enumerate(TREES_THAT_WORK):
        layout, labels = TREES_THAT_WORK[case]
        splits = open_splits("folder", tree(tmp_path / str(number), GOOD_TREE | layout))
        assert splits.val.targets.tolist() == labels, case
        for split in (splits.train, splits.val):
            for index, (path, label) in enumerate(split.samples):
                assert splits.classes[label] == Path(path).relative_to(tmp_path / str(number)).parts[1]
                assert split[index][1] == label
    for number, case in enumerate(BAD_TREES):
        tree(tmp_path / f"bad{number}", BAD_TREES[case][0])
        with pytest.raises(DataError) as raised:
            open_splits("folder", str(tmp_path / f"bad{number}"))
        assert "\n" not in str(raised.value), case
        for word in BAD_TREES[case][1]:
            assert word.format(root=tmp_path / f"bad{number}") in str(raised.value), case
    figure("trees of class folders that differ", len(TREES_THAT_WORK) + len(BAD_TREES))


def test_empty_held_out_folder_is_skipped(tmp_path):
    splits = open_splits("folder", tree(tmp_path, GOOD_TREE | {"val/bird": 0, "test/ant": 1, "test/bee": 1, "test/fish": 0}))
    assert splits.classes == ("ant", "bee") and [note for note in splits.notes if note.startswith("warning: ")] == [
        f"warning: {tmp_path}/{name}/ is skipped: it contains no images, and train has no class of this name"
        for name in ("val/bird", "test/fish")]


@pytest.mark.parametrize(("held_out", "name"), [("valid", "val"), ("dev", "val"), ("Validation", "val"), ("test", "test")])
def test_the_only_held_out_split_is_called_as_its_folder(tmp_path, held_out, name):
    assert open_splits("folder", tree(tmp_path, {"train/a": 2, "train/b": 2, f"{held_out}/a": 1})).val_name == name


def test_third_split_is_the_test_set(tmp_path):
    splits = open_splits("folder", tree(tmp_path / "three", {**GOOD_TREE, "test/ant": 4, "test/bee": 1}))
    assert (len(splits.train), len(splits.val), len(splits.test), splits.val_name) == (5, 3, 5, "val")
    unlabelled = tree(tmp_path / "two", {**GOOD_TREE, "test": 3})
    two = open_splits("folder", unlabelled)
    assert two.val is two.test and two.val_name == "val"
    with pytest.raises(DataError, match="train and test have different classes"):
        open_splits("folder", tree(tmp_path / "other", {**GOOD_TREE, "test/wasp": 1}))


def test_test_fraction_divides_a_tree_without_splits(tmp_path):
    tree(tmp_path, {"ant": 10, "bee/small": 3, "bee/large": 2, "cat": 5, ".hidden": 1})
    splits = open_splits("folder", str(tmp_path), test_fraction=0.2)
    assert splits.classes == ("ant", "bee", "cat") and splits.val is splits.test and splits.val_name == "test"
    assert Counter(splits.test.targets.tolist()) == {0: 2, 1: 1, 2: 1}
    assert Counter(splits.train.targets.tolist()) == {0: 8, 1: 4, 2: 4}
    both = open_splits("folder", str(tmp_path), test_fraction=0.2, val_fraction=0.25)
    assert [len(split) for split in (both.train, both.val, both.test)] == [12, 4, 4] and both.val_name == "val"


def test_imagenet_requires_its_thousand_classes_and_splits(tmp_path):
    with pytest.raises(DataError, match=r"has 2 classes, not 1000\. .*--dataset folder"):
        open_splits("imagenet", tree(tmp_path / "two", GOOD_TREE))
    with pytest.raises(DataError, match=r"no such folder: .*/train"):
        open_splits("imagenet", tree(tmp_path / "one", {"ant": 2, "bee": 2}), test_fraction=0.5)
    with pytest.raises(DataError, match=r"names like n01440764.*but here are cat\. .*--dataset folder"):
        (Path(imagenet(tmp_path / "names")) / "train" / "n00000007").rename(tmp_path / "names" / "train" / "cat")
        open_splits("imagenet", str(tmp_path / "names"))


def test_skipped_files_are_reported(tmp_path):
    root = tree(tmp_path, GOOD_TREE | {"train/ant/more": 1, "train/ant/.cache": 1, "notes": 0, "train/__MACOSX/ant": 1})
    for name in ("a.avif", "b.AVIF", "more/c.avif", "e", "d.txt", "._0.png", ".DS_Store", "x.JPG_1"):
        (tmp_path / "train" / "ant" / name).touch()
    for name in ("train/stray.png", "train/list.txt", "notes/i.gif", "train/ant/.cache/j.avif"):
        (tmp_path / name).touch()
    splits = open_splits("folder", root)
    assert splits.classes == ("ant", "bee") and len(splits.train) == 6
    assert [note for note in splits.notes if "supported: " in note] == [
        "warning: skipped because of their extension: 3 .avif, 1 without one (supported: " + ", ".join(IMAGE_EXTENSIONS) + ")"]
    assert "skipped, not images by their extension: 1 .jpg_1, 1 .txt" in splits.notes
    assert any("train/ contains 1 image outside its class folders" in note and "stray.png" in note for note in splits.notes)
    assert "skipped: __MACOSX/ (made by operating systems)" in splits.notes
    for number in range(12):
        (tmp_path / "val" / "ant" / f"x.{number:02}\n").touch()
    assert any(".07\\n, 6 with other extensions" in note and note.isprintable() for note in open_splits("folder", root).notes)


def test_extensions_that_pillow_reads_are_images_except_for_older_runs(tmp_path):
    root = tree(tmp_path, GOOD_TREE)
    for ending, kind in ((".jfif", "JPEG"), (".JPE", "JPEG"), (".gif", "GIF"), (".pnm", "PPM")):
        Image.new("RGB", (4, 4)).save(tmp_path / "train" / "ant" / f"x{ending}", kind)
    splits = open_splits("folder", root)
    assert len(splits.train) == 9 and {splits.train[index][0].mode for index in range(9)} == {"RGB"}
    (tmp_path / "train" / "ant" / "x.heic").touch()
    before = open_splits("folder", root, rule=ClassRule(None, ("ant", "bee")))
    assert len(before.train) == 5 and any("1 .gif, 1 .heic, 1 .jfif, 1 .jpe, 1 .pnm" in note for note in before.notes)


def test_broken_links_are_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(Path("tree"), GOOD_TREE)
    for place, words in (("train/bee/x.jpg", "tree/train/bee/x.jpg is a link to /gone, which does not exist"),
                         ("val/cat", "tree/val/cat is a link to /gone"), ("train/ant/deep", "tree/train/ant/deep is a link")):
        Path("tree", place).symlink_to("/gone")
        with pytest.raises(DataError, match=words) as caught:
            open_splits("folder", "tree")
        assert str(caught.value).count(place) == 1
        Path("tree", place).unlink()
    Path("tree", "train", "ant", "notes.txt").symlink_to("/gone")                # not an image
    open_splits("folder", "tree")
    Path("linked").symlink_to("gone/tree")
    with pytest.raises(DataError, match=r"no such folder: linked \(linked is a link to gone/tree, which does not exist; "):
        open_splits("folder", "linked")
    with pytest.raises(DataError, match=rf"no such folder: tre \(searched in {tmp_path}\)"):
        open_splits("folder", "tre")


@pytest.mark.parametrize(("layout", "listed", "fractions"), [
    ({"train/a": 0, "train/b/deep": 0, "val/a": 0, "val/b": 0}, 1, {}), ({"a": 0, "b/deep": 0}, 3, {"val_fraction": 0.2})])
def test_start_lists_folders_and_opens_only_a_sample(tmp_path, monkeypatch, layout, listed, fractions):
    """100,000 files must take at most a second, so files are not checked one by one. A folder is listed once; a class of a tree
    without splits is also listed to see what it is, and to find links if a split is drawn."""
    root, counts, picture = tree(tmp_path, layout), Counter(), png()
    for place, number in itertools.product(layout, range(300)):
        (tmp_path / place / f"{number}.png").write_bytes(picture)
    scandir, opened = os.scandir, image_files._opened

    def scan(folder):
        counts[str(folder)] += 1
        return scandir(folder)

    def count(what, function):
        return lambda *arguments, **more: counts.update([what]) or function(*arguments, **more)

    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr(image_files, "_opened", count("opened", opened))
    for name in ("stat", "lstat", "readlink"):
        monkeypatch.setattr(os, name, count("checked", getattr(os, name)))
    splits = open_splits("folder", root, **fractions)
    assert len(splits.train) + len(splits.val) == 300 * len(layout)
    assert counts.pop("opened") <= 256 and counts.pop("checked") < 100
    assert max(counts[str(tmp_path / place)] for place in layout) <= listed and counts.total() < 20


def test_tiny_imagenets_list_of_val_is_read(tmp_path):
    root = tree(tmp_path, {"train/n01/images": 2, "train/n02/images": 1, "val/images": 3, "test/images": 2})
    rows = [("2.png", "n01"), ("0.png", "n02"), ("1.png", "n01")]
    names = sorted(path.name for path in (tmp_path / "val" / "images").iterdir())
    for old, (new, _) in zip(names, rows):
        (tmp_path / "val" / "images" / old).rename(tmp_path / "val" / "images" / f"x{new}")
    file = tmp_path / "val" / "val_annotations.txt"
    file.write_text("".join(f"x{name}\t{label}\t0\t0\t9\t9\n" for name, label in rows))
    splits = open_splits("folder", root)
    assert splits.val.targets.tolist() == [0, 1, 0] and splits.val is splits.test and splits.val.name(1) == "val/images/x0.png"
    for text, words in (("x2.png n01\n", ":1: expected an image and its class"), ("x2.png\tn03\n", "only in val: n03"),
                        ("x2.png\tn01\ngone.png\tn01\n", "val_annotations.txt:2: the image .* does not exist")):
        file.write_text(text)
        with pytest.raises(DataError, match=words):
            open_splits("folder", root)


def test_held_out_split_that_lacks_a_class_gives_a_warning(tmp_path):
    notes = open_splits("folder", tree(tmp_path, GOOD_TREE | {"train/cat": 1, "val/cat": 0})).notes
    assert "warning: val has no images of 1 of the 3 classes: cat" in notes


def test_picture_files_skips_hidden_files(tmp_path):
    tree(tmp_path, {"b": 1, "a/deep": 1, ".ipynb_checkpoints": 1})
    (tmp_path / "._x.png").touch()
    assert [Path(path).relative_to(tmp_path).as_posix() for path in picture_files(tmp_path)] == ["a/deep/0.png", "b/0.png"]
