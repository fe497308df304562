"""Warnings about images that are in two splits or two classes."""

import os
import shutil

import numpy as np
import pytest
from miniatures import csv_files, png, tree

from utils.data import overlap
from utils.data.classes import ClassRule
from utils.data.datasets import open_splits
from utils.data.overlap import in_two_splits, real_paths, shared_images
from utils.data.splits import ArrayImages

LAYOUT = {"train/ant": 3, "train/bee": 3, "val/ant": 1, "val/bee": 2}


def warnings_of(root, kind="folder") -> list[str]:
    return [note for note in open_splits(kind, str(root)).notes if note.startswith("warning: ")]


def test_links_to_training_images_are_found(tmp_path):
    tree(tmp_path, LAYOUT)
    assert warnings_of(tmp_path) == []
    (tmp_path / "val" / "ant" / "x.png").symlink_to("../../train/ant/1.png")
    assert len(warnings_of(tmp_path)) == 1
    assert "1 of the 4 val images is also in train: for example val/ant/x.png is train/ant/1.png" in warnings_of(tmp_path)[0]


@pytest.mark.parametrize("link", ["val", "val/ant"])
def test_linked_folder_is_found(tmp_path, link):
    tree(tmp_path, LAYOUT)
    shutil.rmtree(tmp_path / link)
    (tmp_path / link).symlink_to(tmp_path / link.replace("val", "train"))
    assert ("all 6 val images are" if link == "val" else "3 of the 5 val images are") in warnings_of(tmp_path)[0]


def test_file_with_two_labels_is_reported(tmp_path):
    tree(tmp_path / "tree", LAYOUT)
    (tmp_path / "tree" / "train" / "bee" / "x.png").symlink_to(tmp_path / "tree" / "train" / "ant" / "0.png")
    assert "1 image under two labels: for example train/ant/0.png (ant) is train/bee/x.png (bee)" in " ".join(
        warnings_of(tmp_path / "tree"))
    csv_files(tmp_path / "csv", train="a.png,x\nb.png,y\n./a.png,y\n", val="b.png,y\nc.png,x\n")
    two, both = warnings_of(tmp_path / "csv", "csv")
    lists = tmp_path / "csv"
    assert two == (f"warning: 1 image under two labels: for example a.png at {lists}/train.csv:1 (x) is ./a.png at "
                   f"{lists}/train.csv:3 (y)")
    assert both == (f"warning: 1 of the 2 val images is also in train: for example b.png at {lists}/val.csv:1 is b.png at "
                    f"{lists}/train.csv:2. Results on them mean little")


def drawn_splits(root, kind, order="number", **fractions):
    """-> (the splits, the files in train, the held-out files)"""
    splits = open_splits(kind, str(root), rule=ClassRule(order), **fractions)
    files = [{str((root / split.name(index)).resolve()) for index in range(len(split))} for split in (splits.train, splits.val)]
    return splits, *files


@pytest.mark.parametrize("fractions", [{"val_fraction": 0.5}, {"test_fraction": 0.5}])
def test_drawn_split_of_a_list_uses_each_file_once(tmp_path, fractions):
    """With one row per box, as in detection lists; other spellings of a path; a linked folder; a link."""
    csv_files(tmp_path / "img")
    (tmp_path / "img2").symlink_to("img")
    (tmp_path / "img" / "g.png").symlink_to("a.png")
    names = [f"{folder}{name}.png" for folder in ("img/", "img/", "./img//", "img2/") for name in "abcdef"] + ["img/g.png"]
    (tmp_path / "train.csv").write_text("filename,width,class,xmin\n" + "".join(
        f"{name},{number % 2 + 9},{'xy'[name[-5] in 'bdf']},{number}\n" for number, name in enumerate(names)))
    splits, trained, held = drawn_splits(tmp_path, "csv", **fractions)
    assert len(splits.train) + len(splits.val) == 6 and held and not trained & held
    assert [note for note in splits.notes if "25 rows name 6 files. Each file is used once" in note]
    assert not any(note.startswith("warning: ") for note in splits.notes)
    before, trained, held = drawn_splits(tmp_path, "csv", order=None, **fractions)              # an older run
    assert len(before.train) + len(before.val) == 25 and trained & held


@pytest.mark.parametrize("kind", ["csv", "folder"])
def test_links_are_resolved_once(tmp_path, monkeypatch, kind):
    """However many checks a start makes."""
    resolved = []
    monkeypatch.setattr(overlap, "real_paths", lambda paths: resolved.append(len(paths)) or paths)
    if kind == "csv":
        csv_files(tmp_path, train="a.png,x\nb.png,y\nc.png,x\nd.png,y\n", test="e.png,x\n")
    else:
        tree(tmp_path, LAYOUT)
    open_splits(kind, str(tmp_path), val_fraction=0.5) if kind == "csv" else open_splits(kind, str(tmp_path), test_fraction=0.5)
    assert sorted(resolved) == ([1, 4] if kind == "csv" else [3, 6])


def test_repeated_rows_are_kept_if_no_split_is_drawn(tmp_path):
    splits = open_splits("csv", csv_files(tmp_path, train="a.png,x\na.png,x\nb.png,y\n", val="c.png,x\nd.png,y\n"))
    assert len(splits.train) == 3
    pooled = open_splits("csv", csv_files(tmp_path, val="a.png,x\nd.png,y\nc.png,x\n"), test_fraction=0.5)
    assert len(pooled.train) + len(pooled.test) == 4
    assert "all parts together: 6 rows name 4 files" in pooled.notes[-1]


def test_drawn_split_of_folders_uses_each_file_once(tmp_path):
    tree(tmp_path, {"train/ant": 3, "train/bee": 3})
    for number in range(3):
        (tmp_path / "train" / "ant" / f"x{number}.png").symlink_to(f"{number}.png")
    splits, trained, held = drawn_splits(tmp_path, "folder", val_fraction=0.5)
    assert len(splits.train) + len(splits.val) == 6 and not trained & held
    assert ("train: 9 images name 6 files. Each file is used once, so that none is both trained on and held out"
            in splits.notes)
    (tmp_path / "train" / "cat").symlink_to("ant")
    splits, trained, held = drawn_splits(tmp_path, "folder", val_fraction=0.5)
    notes = [note for note in splits.notes if "also in train: for example train/" in note]
    assert len(notes) == bool(trained & held)


def test_drawn_files_that_are_in_train_with_another_label_are_reported(tmp_path):
    text = "".join(f"{name}.png,x\n{name}.png,y\n" for name in "abcdef")
    csv_files(tmp_path, train=text)
    splits, trained, held = drawn_splits(tmp_path, "csv", val_fraction=0.3, split_seed=1)
    notes = [note for note in splits.notes if " val images " in note]
    assert len(trained & held) and len(notes) == 1
    file = notes[0].partition("for example ")[2].partition(" (")[0]
    assert notes[0].startswith("warning: ") and f") is {file} (" in notes[0]
    assert file in {name.rpartition("/")[2] for name in trained & held}


def test_held_out_images_of_a_list_in_a_linked_folder_are_found(tmp_path):
    csv_files(tmp_path / "img")
    (tmp_path / "img2").symlink_to("img")
    csv_files(tmp_path, train="img/a.png,x\nimg/b.png,y\n", val="img2/a.png,x\nimg2/c.png,y\n")
    assert len(warnings_of(tmp_path, "csv")) == 1
    assert "1 of the 2 val images is also in train: for example img2/a.png at " in warnings_of(tmp_path, "csv")[0]


def test_possible_copy_of_train_is_found_by_names_and_sizes(tmp_path):
    tree(tmp_path, LAYOUT)
    for number in range(3):
        for name in ("ant", "bee"):
            (tmp_path / "train" / name / f"{number}.png").write_bytes(png(side=10 + number + 5 * (name == "ant")))
    assert warnings_of(tmp_path) == []
    shutil.rmtree(tmp_path / "val")
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    assert len(warnings_of(tmp_path)) == 1 and "every image of val has the name, class and size" in warnings_of(tmp_path)[0]


def test_images_with_the_same_key_are_reported():
    keys = {"train": [b"a", b"b", b"c", b"b"], "val": [b"c", b"a"], "test": [7, b"a"]}             # 7: an unreadable image
    labels = {"train": [0, 0, 1, 1], "val": [1, 0], "test": [0, 0]}
    images = {split: ArrayImages(np.empty(0), own) for split, own in labels.items()}
    lines = shared_images(images, ("x", "y"), "{} {}".format, keys, " (byte by byte)")
    assert lines == ["warning: 1 image under two labels (byte by byte): for example train 1 (x) is train 3 (y)",
                     "warning: all 2 val images are also in train (byte by byte): for example val 0 is train 2. Results on them "
                     "mean little",
                     "warning: 1 of the 2 test images is also in train (byte by byte): for example test 1 is train 0. Results on "
                     "them mean little"]
    keys = {"train": ["a"], "val": ["b"], "test": ["b"]}
    (line,) = in_two_splits(keys, "{} {}".format)
    assert "the only test image is also in val: for example test 0 is val 0" in line
    assert shared_images({}, ("x", "y"), str, {"train": [0], "val": [1]}) == []


def test_real_paths_follow_all_links(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "1.png").touch()
    for link, target in (("b", "a"), ("a/2.png", "1.png"), ("a/deep/3.png", "../2.png"), ("4.png", tmp_path / "b/deep/3.png")):
        (tmp_path / link).symlink_to(target)
    paths = [str(tmp_path / name) for name in ("a/1.png", "b/1.png", "a/2.png", "b/deep/3.png", "4.png", "gone/5.png")]
    assert real_paths(paths) == [os.path.realpath(path) for path in paths] and len(set(real_paths(paths)[:5])) == 1
