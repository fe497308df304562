"""Images that are in two splits or in two classes."""

import shutil

import numpy as np
import pytest
from miniatures import csv_files, png, tree

from utils.data.datasets import open_splits
from utils.data.overlap import same_bytes

LAYOUT = {"train/ant": 3, "train/bee": 3, "val/ant": 1, "val/bee": 2}


def warnings_of(root, kind="folder") -> list[str]:
    return [note for note in open_splits(kind, str(root)).notes if note.startswith("warning: ")]


def test_links_to_training_images_are_found(tmp_path):
    tree(tmp_path, LAYOUT)
    assert warnings_of(tmp_path) == []
    (tmp_path / "val" / "ant" / "x.png").symlink_to("../../train/ant/1.png")
    assert len(warnings_of(tmp_path)) == 1
    assert "1 of val's 4 images are training images: such as val/ant/x.png, which is train/ant/1.png" in warnings_of(tmp_path)[0]


@pytest.mark.parametrize("link", ["val", "val/ant"])
def test_a_linked_folder_is_found(tmp_path, link):
    tree(tmp_path, LAYOUT)
    shutil.rmtree(tmp_path / link)
    (tmp_path / link).symlink_to(tmp_path / link.replace("val", "train"))
    assert ("all of val's 6" if link == "val" else "3 of val's 5") in warnings_of(tmp_path)[0]


def test_one_file_under_two_labels(tmp_path):
    tree(tmp_path / "tree", LAYOUT)
    (tmp_path / "tree" / "train" / "bee" / "x.png").symlink_to(tmp_path / "tree" / "train" / "ant" / "0.png")
    assert "1 image of train under two labels: such as train/ant/0.png (ant), which is train/bee/x.png (bee)" in " ".join(
        warnings_of(tmp_path / "tree"))
    csv_files(tmp_path / "csv", train="a.png,x\nb.png,y\n./a.png,y\n", val="b.png,y\nc.png,x\n")
    two, both = warnings_of(tmp_path / "csv", "csv")
    assert "train.csv:3: ./a.png is y here and x at" in two and "1 of 2 images of val are images of train too" in both


def test_a_copy_is_suspected_by_names_and_sizes(tmp_path):
    tree(tmp_path, LAYOUT)
    for number in range(3):
        for name in ("ant", "bee"):
            (tmp_path / "train" / name / f"{number}.png").write_bytes(png(side=10 + number + 5 * (name == "ant")))
    assert warnings_of(tmp_path) == []
    shutil.rmtree(tmp_path / "val")
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    assert len(warnings_of(tmp_path)) == 1 and "every image of val has the name, class and size" in warnings_of(tmp_path)[0]


def test_equal_bytes_are_reported():
    digests = {0: b"a", 1: b"b", 2: b"c", 3: b"b", 5: b"c", 6: b"a"}                 # 4 cannot be read
    lines = same_bytes(digests, np.array([0, 0, 1, 1, 0, 1, 0]), 4, "image {}".format)
    assert lines == ["all 2 held-out images are in train too, byte by byte, so that results on them mean little: such as "
                     "image 5, which is image 2", "1 images are in two classes, byte by byte: such as image 3, which is image 1"]
    assert same_bytes({0: b"a", 1: b"b"}, np.array([0, 1]), 1, str) == []
