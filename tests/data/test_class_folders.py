"""Trees of class folders."""

from collections import Counter
from pathlib import Path

import pytest
from miniatures import GOOD_TREE, png, tree
from PIL import Image
from torchvision.datasets import ImageFolder

from utils.data.datasets import open_splits
from utils.data.splits import DataError


def test_folder(tmp_path):
    splits = open_splits("folder", tree(tmp_path, GOOD_TREE))
    assert splits.classes == ("ant", "bee") and splits.can_flip
    assert splits.train.targets.tolist() == [0, 0, 0, 1, 1]
    assert splits.val.targets.tolist() == [0, 1, 1]
    assert splits.test is splits.val and splits.val_name == "test"
    image, label = splits.train[3]
    assert image.mode == "RGB" and image.size == (10, 12) and label == 1 and image.getpixel((0, 0)) == (4, 8, 100)


def test_folder_reads_nested_folders_and_ignores_hidden_ones_and_other_files(tmp_path):
    root = tree(tmp_path, GOOD_TREE | {"train/ant/more/deeper": 2, ".git/objects": 1, "train/.cache": 1, "val/.thumbs": 1})
    (tmp_path / "train" / "notes.txt").write_text("not a class")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "ant" / "._0.png").write_bytes(b"what macOS knows of 0.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "val" / "bee" / "GREY.JPEG")
    splits = open_splits("folder", root)
    assert splits.classes == ("ant", "bee")
    assert Counter(splits.train.targets.tolist()) == {0: 5, 1: 2}
    assert Counter(splits.val.targets.tolist()) == {0: 1, 1: 3}
    assert {splits.val[index][0].mode for index in range(4)} == {"RGB"}


def test_the_order_of_the_files_is_that_of_torchvision(tmp_path):
    layout = {"train/b.c": 2, "train/b/z": 3, "train/b/a/deep": 2, "train/b-a": 1, "train/B": 11, "train/b/a.x": 2}
    root = tree(tmp_path, layout | {f"val/{name}": 1 for name in ("b.c", "b", "b-a", "B")})
    (tmp_path / "train" / "b" / "last.png").write_bytes(png())
    (tmp_path / "train" / "B" / "linked").symlink_to(tmp_path / "train" / "b.c")
    splits = open_splits("folder", root)
    expected = ImageFolder(tmp_path / "train")
    assert splits.train.samples == expected.samples and list(splits.classes) == expected.classes


def test_every_folder_is_visited_once_whatever_links_to_it(tmp_path):
    """By its own path, so that its images keep their names."""
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
    "no such folder": ({}, ["no such folder: {root}/train", "--data_dir {root}", "train/ and val/"]),
    "no val": ({"train/ant": 1}, ["no such folder: {root}/val"]),
    "no classes": ({"train": 0, "val": 0}, ["{root}/train", "no class folders"]),
    "unsorted val": ({"train/ant": 2, "val": 2}, ["{root}/val holds images but no class folders", "one folder a class",
                                                 "ImageNet"]),
    "empty class": (GOOD_TREE | {"train/cat": 0, "val/cat": 1}, ["{root}/train", "of class cat"]),
    "nothing in val": ({"train/ant": 1, "val/ant": 0}, ["{root}/val: no images", "of class ant"]),
    "class in val alone": (GOOD_TREE | {"val/cat": 1, "val/dog": 1}, ["only in val: cat, dog"]),
    "renamed class": ({"train/ant": 1, "val/aunt": 1}, ["only in train: ant", "only in val: aunt"]),
    "many classes": ({f"train/c{n}": 1 for n in range(8)} | {"val/ant": 1}, ["c0, c1, c2, c3, c4 and 3 more"]),
    "one tree": ({"ant": 2, "bee": 2}, ["2 folders but no train/ and val/", "--test_fraction 0.2"]),
    "other things": ({"ant": 2, "notes": 0}, ["of class notes", "neither train/ nor val/"]),
}


# what is there besides ant and bee: labels of val
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


def test_a_third_split_is_the_test_set(tmp_path):
    splits = open_splits("folder", tree(tmp_path / "three", {**GOOD_TREE, "test/ant": 4, "test/bee": 1}))
    assert (len(splits.train), len(splits.val), len(splits.test), splits.val_name) == (5, 3, 5, "val")
    unlabelled = tree(tmp_path / "two", {**GOOD_TREE, "test": 3})
    two = open_splits("folder", unlabelled)
    assert two.val is two.test and two.val_name == "test"
    with pytest.raises(DataError, match="train and test have different classes"):
        open_splits("folder", tree(tmp_path / "other", {**GOOD_TREE, "test/wasp": 1}))


def test_one_tree_is_divided_by_a_test_fraction(tmp_path):
    splits = open_splits("folder", tree(tmp_path, {"ant": 10, "bee/small": 3, "bee/large": 2, ".hidden": 1}), test_fraction=0.2)
    assert splits.classes == ("ant", "bee") and splits.val is splits.test and splits.val_name == "test"
    assert Counter(splits.test.targets.tolist()) == {0: 2, 1: 1} and Counter(splits.train.targets.tolist()) == {0: 8, 1: 4}
    both = open_splits("folder", str(tmp_path), test_fraction=0.2, val_fraction=0.25)
    assert [len(split) for split in (both.train, both.val, both.test)] == [9, 3, 3] and both.val_name == "val"


def test_imagenet_wants_its_thousand_classes_and_its_own_splits(tmp_path):
    with pytest.raises(DataError, match=r"has 2 classes, not 1000: .*--dataset folder"):
        open_splits("imagenet", tree(tmp_path / "two", GOOD_TREE))
    with pytest.raises(DataError, match=r"no such folder: .*/train"):
        open_splits("imagenet", tree(tmp_path / "one", {"ant": 2, "bee": 2}), test_fraction=0.5)
