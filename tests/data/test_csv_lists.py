"""Lists in CSV."""


import pytest
from miniatures import csv_files, png

from utils.data.datasets import open_splits
from utils.data.splits import DataError


def test_csv(tmp_path):
    splits = open_splits("csv", csv_files(tmp_path, train="b.png,cat\na.png, a dog \nc.png,cat\n", val="d.png,cat"))
    assert splits.classes == ("a dog", "cat") and splits.can_flip
    assert splits.train.targets.tolist() == [1, 0, 1] and splits.val.targets.tolist() == [1]
    assert splits.test is splits.val and splits.val_name == "test"
    assert [splits.train[index][0].getpixel((0, 0))[0] for index in range(3)] == [10, 0, 20]
    after = open_splits("csv", str(tmp_path), val_fraction=0.5)
    assert [len(after.train), after.val.targets.tolist(), after.val_name] == [2, [1], "val"] and len(after.test) == 1


def test_csv_with_three_lists(tmp_path):
    root = csv_files(tmp_path, train="a.png,x\nb.png,y\n", val="c.png,y\n", test="d.png,x\ne.png,x\n")
    splits = open_splits("csv", root)
    assert [split.targets.tolist() for split in (splits.train, splits.val, splits.test)] == [[0, 1], [1], [0, 0]]
    assert splits.val_name == "val"
    with pytest.raises(DataError, match=r"validation split of its own \(1 images\)"):
        open_splits("csv", root, val_fraction=0.5)
    drawn = open_splits("csv", root, test_fraction=0.4)
    assert drawn.val is drawn.test and len(drawn.train) + len(drawn.test) == 5


@pytest.mark.parametrize("header", ["path,label", "Image,Class", "FILE, label", '"path","class"', "\ufeffpath,label"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_header_is_detected(tmp_path, header, end):
    text = end.join([header, "a.png,x", "", "b.png,y", ""])
    splits = open_splits("csv", csv_files(tmp_path, train=end + text if header[0] == "F" else text, val="c.png,x"))
    assert splits.classes == ("x", "y") and len(splits.train) == 2


def test_csv_header_is_not_a_class_elsewhere(tmp_path):
    (tmp_path / "path").write_bytes(png())
    splits = open_splits("csv", csv_files(tmp_path, train="path,x\npath,label\n", val="path,x"))
    assert splits.classes == ("label", "x") and splits.train.targets.tolist() == [1, 0]


@pytest.mark.parametrize(("labels", "classes", "expected"), [
    ("2 0 1 1 10 3 4 5 6 7 8 9", [str(number) for number in range(11)], [2, 0, 1, 1, 10, 3, 4, 5, 6, 7, 8, 9]),
    ("7 100 9", ["7", "9", "100"], [0, 2, 1]),                       # gaps: names, still in numerical order
    ("0 1 x 10 2", ["0", "1", "10", "2", "x"], [0, 1, 4, 2, 3]),      # not all are integers: names
    ("01 1 0", ["0", "01", "1"], [1, 2, 0]),                         # 01 and 1 would be one class
    ("9" * 5000, ["9" * 5000], [0]),
])
def test_csv_labels(tmp_path, labels, classes, expected):
    labels = labels.split(" ")
    splits = open_splits("csv", csv_files(tmp_path, train="".join(f"a.png,{label}\n" for label in labels),
                                          val=f"b.png,{labels[0]}"))
    assert list(splits.classes) == classes and splits.train.targets.tolist() == expected
    assert splits.val.targets.tolist() == expected[:1]


def test_csv_paths_with_commas_folders_and_from_the_root(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("one, two.png", 'a "b".png', "ü.png"):
        (tmp_path / "sub" / name).write_bytes(png())
    train = f'"sub/one, two.png",x\n"sub/a ""b"".png",x\nsub/ü.png,x\n{tmp_path}/data/a.png,x\n../sub/ü.png,x\n'
    splits = open_splits("csv", csv_files(tmp_path / "data", train=train.replace("sub/", "../sub/").replace("../../", "../"),
                                          val="a.png,x"))
    assert [splits.train[index][0].size for index in range(5)] == [(20, 20)] * 3 + [(4, 3), (20, 20)]


BAD_LISTS = {
    "no comma": ({"train": "a.png,x\n\nb.png\n"}, ["train.csv:3: no comma", "path,label"]),
    "three columns": ({"train": "a.png,x,y\n"}, ["train.csv:1: 3 columns"]),
    "unquoted comma": ({"val": "a,b.png,x\n"}, ["val.csv:1: 3 columns", '"a,b.png",cat']),
    "open quote": ({"train": 'a.png,x\n"b.png,x\nc.png,x\n'}, ["train.csv:2: "]),
    "empty label": ({"train": "path,label\na.png,x\nb.png,\n"}, ["train.csv:3: empty label"]),
    "empty path": ({"train": "a.png,x\n,x\n"}, ["train.csv:2: empty path"]),
    "unknown test label": ({"test": "a.png,X\n"}, ["test.csv:1: the label 'X' does not occur"]),
    "unknown label": ({"val": "a.png,x\nb.png,z\n"}, ["val.csv:2: the label 'z' does not occur in train.csv"]),
    "no image": ({"train": "a.png,x\ngone.png,x\nb.png,x\n"}, ["train.csv:2: the image {root}/gone.png does not exist"]),
    "no images": ({"val": "path,label\n1.png,x\n2.png,x\n3.png,x\n"}, ["val.csv:2: ", "{root}/1.png", "exist, nor 2 more"]),
    "nothing": ({"train": ""}, ["train.csv: no rows"]),
    "NUL": ({"train": b"a.png,x\nb.p\0ng,x\n"}, ["train.csv:2: NUL bytes"]),
    "UTF-16": ({"train": "a.png,x\n".encode("utf-16")}, ["train.csv:1: NUL bytes", "UTF-8"]),
    "Latin-1": ({"train": "a.png,x\nb.png,kätzchen\n".encode("latin-1")}, ["train.csv:2: not UTF-8 text", "column 8"]),
    "picture": ({"train": png()}, ["train.csv:1: "]),
    "one long line": ({"train": "a.png,x\n" + "y" * 70_000}, ["train.csv:2: the line is longer than"]),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_lists_are_reported_by_line(tmp_path, case):
    texts, words = BAD_LISTS[case]
    csv_files(tmp_path, **{"train": "a.png,x\nb.png,y\n", "val": "c.png,y\n"} | texts)
    with pytest.raises(DataError) as raised:
        open_splits("csv", str(tmp_path))
    assert "\n" not in str(raised.value) and "\r" not in str(raised.value)
    for word in words:
        assert word.format(root=tmp_path) in str(raised.value)


def test_missing_lists_are_reported(tmp_path):
    for missing in ("train", "val"):
        csv_files(tmp_path, train="a.png,x", val="b.png,x")
        (tmp_path / f"{missing}.csv").unlink()
        with pytest.raises(DataError, match=rf"no such file: {tmp_path}/{missing}.csv .*must hold train.csv and val.csv"):
            open_splits("csv", str(tmp_path))
