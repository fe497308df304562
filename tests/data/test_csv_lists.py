"""Data sets in lists: which lists are used, which images and labels they have, and which errors and warnings are reported."""

import os

import numpy as np
import pytest
from miniatures import csv_files, png

from utils.data.classes import ClassRule
from utils.data.csv_lists import csv_lists, lists_in
from utils.data.datasets import open_splits
from utils.data.layouts import HELD_OUT, TRAIN, Request
from utils.data.splits import DataError


def test_csv(tmp_path):
    splits = open_splits("csv", csv_files(tmp_path, train="b.png,cat\na.png, a dog \nc.png,cat\n", val="d.png,cat"))
    assert splits.classes == ("a dog", "cat") and splits.can_flip and not csv_lists(str(tmp_path)).notes
    assert splits.train.targets.tolist() == [1, 0, 1] and splits.val.targets.tolist() == [1]
    assert splits.test is splits.val and splits.val_name == "val"
    assert [splits.train[index][0].getpixel((0, 0))[0] for index in range(3)] == [10, 0, 20]
    after = open_splits("csv", str(tmp_path), val_fraction=0.5)
    assert [len(after.train), after.val.targets.tolist(), after.val_name] == [2, [1], "val"] and len(after.test) == 1
    assert after.notes[0] == "test: the 1 image of val, since --val_fraction draws another val from train"


def test_csv_with_three_lists(tmp_path):
    root = csv_files(tmp_path, train="a.png,x\nb.png,y\n", val="c.png,y\n", test="d.png,x\ne.png,x\n")
    splits = open_splits("csv", root)
    assert [split.targets.tolist() for split in (splits.train, splits.val, splits.test)] == [[0, 1], [1], [0, 0]]
    assert splits.val_name == "val"
    with pytest.raises(DataError, match=r"already has a validation split \(1 image\)"):
        open_splits("csv", root, val_fraction=0.5)
    drawn = open_splits("csv", root, test_fraction=0.4)
    assert drawn.val is drawn.test and len(drawn.train) + len(drawn.test) == 5


@pytest.mark.parametrize("header", ["path,label", "Image,Class", "FILE, label", '"path","class"', "\ufeffpath,label"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_header_is_detected(tmp_path, header, end):
    text = end.join([header, "a.png,x", "", "b.png,y", ""])
    splits = csv_lists(csv_files(tmp_path, train=end + text if header[0] == "F" else text, val="c.png,x"))
    assert splits.classes == ("x", "y") and len(splits.train) == 2 and not splits.notes


def test_csv_header_is_not_a_class_elsewhere(tmp_path):
    (tmp_path / "path").write_bytes(png())
    splits = open_splits("csv", csv_files(tmp_path, train="path,x\npath,label\n", val="path,x"))
    assert splits.classes == ("label", "x") and splits.train.targets.tolist() == [1, 0]


@pytest.mark.parametrize(("labels", "classes", "expected"), [
    ("2 0 1 1 10 3 4 5 6 7 8 9", [str(number) for number in range(11)], [2, 0, 1, 1, 10, 3, 4, 5, 6, 7, 8, 9]),
    ("7 100 9", ["7", "9", "100"], [0, 2, 1]),                       # with gaps, still in numerical order
    ("0 1 2", ["0", "1", "2"], [0, 1, 2]),                           # one image per class, which is not an index
    ("0 1 x 10 2", ["0", "1", "10", "2", "x"], [0, 1, 4, 2, 3]),      # not all integers: sorted as text
    ("01 1 0", ["0", "01", "1"], [1, 2, 0]),                         # 01 and 1 would be one class
    ("9" * 5000 + " 8", ["8", "9" * 5000], [1, 0]),
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
    train = f'"sub/one, two.png",x\n"sub/a ""b"".png",y\nsub/ü.png,x\n{tmp_path}/data/a.png,x\n../sub/ü.png,x\n'
    splits = open_splits("csv", csv_files(tmp_path / "data", train=train.replace("sub/", "../sub/").replace("../../", "../"),
                                          val="a.png,x"))
    assert [splits.train[index][0].size for index in range(5)] == [(20, 20)] * 3 + [(4, 3), (20, 20)]


# ------------------------------------------------------------------------------------------------------ which lists


@pytest.mark.parametrize(("names", "parts"), [
    ("train.csv val.csv test.csv", {"train": "train.csv", "val": "val.csv", "test": "test.csv"}),
    ("Train.CSV Validation.csv", {"train": "Train.CSV", "val": "Validation.csv"}),
    ("training.csv dev.csv testing.csv", {"train": "training.csv", "val": "dev.csv", "test": "testing.csv"}),
    ("train.tsv valid.tsv", {"train": "train.tsv", "val": "valid.tsv"}),
    ("trainLabels.csv sampleSubmission.csv", {"train": "trainLabels.csv"}),                       # Kaggle's CIFAR-10
    ("train_labels.csv val_labels.csv", {"train": "train_labels.csv", "val": "val_labels.csv"}),
    ("Training_set.csv Testing_set.csv", {"train": "Training_set.csv", "test": "Testing_set.csv"}),
    ("train.csv train_extra.csv", {"train": "train.csv"}),
    ("legend.csv", {"train": "legend.csv"}), ("val.csv", {"train": "val.csv"})])
def test_lists_are_found_by_name(tmp_path, names, parts):
    for name in [*names.split(), ".hidden.csv", "readme.txt"]:
        (tmp_path / name).touch()
    assert {part: path.name for part, path in lists_in(str(tmp_path)).items()} == parts


@pytest.mark.parametrize(("names", "words"), [
    ("train.csv val.csv valid.csv", "val.csv, valid.csv may each be the list for val. Keep only one"),
    ("train.csv Train.csv", "may each be the list for train"), ("train_a.csv train_b.csv", "may each be the list for train"),
    ("a.csv b.csv", "contains a.csv, b.csv, but no train.csv"),
    ("val.csv test.csv", "contains test.csv, val.csv, but no train.csv"),
    ("readme.txt img/a.png", "contains no csv file, only img/, readme.txt. It must contain train.csv and val.csv, or one list"),
    ("fer/train.csv fer/val.csv", "no csv file itself, but there are .*fer/train.csv, .*fer/val.csv. Set --data_dir .*fer"),
    ("", "contains no csv file. It must contain")])
def test_unclear_or_missing_lists_are_reported(tmp_path, names, words):
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=words):
        open_splits("csv", str(tmp_path))


@pytest.mark.parametrize("name", ["train", "legend", "val"])
def test_single_list_needs_a_fraction(tmp_path, name):
    root = csv_files(tmp_path, **{name: "a.png,x\nb.png,y\nc.png,x\nd.png,y\ne.png,x\nf.png,y"})
    with pytest.raises(DataError, match=rf"contains {name}\.csv \(6 labeled images\), but nothing .*VAL_FRACTION=0\.2 .*--test"):
        open_splits("csv", root)
    held = open_splits("csv", root, val_fraction=0.34)
    assert (len(held.train), len(held.val), held.val_name) == (4, 2, "val") and held.test is held.val
    drawn = open_splits("csv", root, test_fraction=0.34)
    assert (len(drawn.train), len(drawn.test), drawn.val_name) == (4, 2, "test")
    both = open_splits("csv", root, test_fraction=0.34, val_fraction=0.5)
    assert (len(both.train), len(both.val), len(both.test), both.val_name) == (2, 2, 2, "val")
    assert any(note == f"lists: train from {root}/{name}.csv" for note in held.notes) == (name != "train")
    assert not [note for note in open_splits("csv", root, need=HELD_OUT).notes if note.startswith("lists: train")]


def test_choosing_on_the_test_list_is_reported(tmp_path):
    splits = open_splits("csv", csv_files(tmp_path, train="a.png,x\nb.png,y\n", Test="c.png,y\n"))
    assert splits.val is splits.test and splits.val_name == "test"
    assert splits.notes[0].startswith("lists: train from ")
    assert any(note.startswith(f"best.pt is chosen on {tmp_path}/Test.csv") for note in splits.notes)


def test_test_list_without_labels_is_not_used(tmp_path):
    """Kaggle's competitions have such lists."""
    for text in ("id\nc\nd\n", "c.png\nd.png\n", "id,age\nc,3\nd,4\n"):
        root = csv_files(tmp_path, train="id,breed\na,x\nb,y\n", test=text)
        splits = csv_lists(root)
        assert len(splits.train) == 2 and not len(splits.test)
        assert f"{root}/test.csv has no labels and is not used" in splits.notes
    with pytest.raises(DataError, match=r"nothing to validate or test on\. .*test\.csv has no labels and is not used"):
        open_splits("csv", root)


# ------------------------------------------------------------------------------------------------------ split column


@pytest.mark.parametrize(("column", "values"), [
    ("split", "train train val test"), ("Usage", "Training Training PublicTest PrivateTest"),
    ("set", "TRAIN train Valid testing"), ("anything", "train train dev test")])
def test_split_column_divides_a_list(tmp_path, column, values):
    rows = [f"{name}.png,{label},{value}" for name, label, value in zip("abcd", "xyxy", values.split())]
    splits = open_splits("csv", csv_files(tmp_path, legend="\n".join([f"image,emotion,{column}", *rows])))
    assert [split.targets.tolist() for split in (splits.train, splits.val, splits.test)] == [[0, 1], [0], [1]]
    assert splits.val_name == "val"
    assert f"legend.csv: split by column {column}: 2 rows for train, 1 row for val, 1 row for test" in splits.notes


def test_choosing_on_test_rows_is_reported(tmp_path):
    root = csv_files(tmp_path, train="path,label,Usage\na.png,x,train\nb.png,y,train\nc.png,y,test\nd.png,x,test\n")
    assert any(note.startswith("best.pt is chosen on the 2 test rows of train.csv (column Usage), because")
               for note in open_splits("csv", root).notes)


def test_split_column_with_one_part_or_next_to_another_list(tmp_path):
    root = csv_files(tmp_path, train="path,label,split\n" + "".join(f"{name}.png,{name > 'c'},train\n" for name in "abcdef"))
    with pytest.raises(DataError, match=r"train\.csv \(6 lab.*VAL_FRACTION=0\.2 .*split by column split: 6 rows for train"):
        open_splits("csv", root)
    assert len(open_splits("csv", root, val_fraction=0.34).val) == 2
    csv_files(tmp_path, train="path,label,split\na.png,x,train\nb.png,y,val\n", val="path,label,split\nc.png,x,val\n")
    with pytest.raises(DataError, match=r"column split of .*train\.csv names the split, but there is also val\.csv"):
        open_splits("csv", root)
    csv_files(tmp_path, train="path,label,split\na.png,x,val\nb.png,y,test\n", val="c.png,x,val\n")
    (tmp_path / "val.csv").unlink()
    with pytest.raises(DataError, match="has no rows for train"):
        open_splits("csv", root)
    csv_files(tmp_path, train="path,label,fold\na.png,x,1\nb.png,y,2\n", val="path,label,fold\nc.png,x,2\n")
    notes = open_splits("csv", root).notes
    assert any(note.startswith("warning: ") and "column fold is not used as the split: its values 1, 2" in note
               for note in notes)


# ------------------------------------------------------------------------------------------------------ faults of the data


BAD_LISTS = {
    "unquoted comma": ({"val": "a,b.png,x\n"}, ["val.csv:1: 3 columns, but 2 in train.csv", '"a,b.png",cat']),
    "one column": ({"train": "a.png\nb.png\n"}, ["train.csv:1: no comma, semicolon, tab or |", "path,label"]),
    "only a header": ({"train": "path,label\n"}, ["train.csv: no rows"]),
    "only a header of another kind": ({"train": "filename,breed\n"}, ["train.csv: no rows"]),
    "empty label": ({"train": "path,label\na.png,x\nb.png,\n"}, ["train.csv:3: empty label. Fill it in or remove"]),
    "empty labels": ({"train": "path,label\na.png,x\nb.png,\nc.png,\nd.png,\n"},
                     ["train.csv:3: empty label (and in lines 4, 5)"]),
    "empty path": ({"train": "a.png,x\n,x\n"}, ["train.csv:2: empty path"]),
    "unknown test label": ({"test": "a.png,X\n"}, ["test.csv:1: the label X (similar: x) does not occur in train.csv"]),
    "unknown label": ({"val": "a.png,x\nb.png,z\n"}, ["val.csv:2: the label z does not occur in train.csv"]),
    "no image": ({"train": "a.png,x\ngone.png,x\nb.png,x\n"}, ["train.csv:2: the image {root}/gone.png does not exist"]),
    "no images": ({"val": "path,label\n1.png,x\n2.png,x\n3.png,x\n"}, [
        "val.csv:2: ", "{root}/1.png", "does not exist (3 missing in all), nor does any other of this list. Add --image_dir"]),
    "URL": ({"train": "url,label\nhttps://x.org/a.png,x\n"}, [
        "train.csv:2: https://x.org/a.png is a URL. Download the images and write their paths into the list"]),
    "URL without an extension": ({"train": "id2,url,kind\n7,https://x.org/a?b=1,x\n8,https://x.org/a?b=2,y\n"}, [
        "train.csv:2: https://x.org/a?b=1 is a URL"]),
    "case": ({"train": "a.png,x\nB.PNG,y\n"}, ["train.csv:2: ", "{root}/b.png does: upper and lower case differ"]),
    "another header": ({"train": "image,breed\na.png,x\n", "val": "image,species\nb.png,x\n"},
                       ["val.csv: no column breed as in train.csv. The columns are image, species"]),
    "picture": ({"train": png()}, ["train.csv:1: ", "not a list of images"]),
    "nothing": ({"train": ""}, ["train.csv: no rows"]),
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


def warnings_of(root, **texts) -> list[str]:
    return [note for note in csv_lists(csv_files(root, **texts)).notes if note.startswith("warning: ")]


def test_file_with_two_labels_is_reported_with_both_lines(tmp_path):
    place = f"{tmp_path}/train.csv"
    assert warnings_of(tmp_path, train="a.png,x\nb.png,y\n./a.png,y\na.png,y\n", val="c.png,x") == [
        f"warning: 2 images under two labels: for example a.png at {place}:1 (x) is ./a.png at {place}:3 (y)"]
    assert warnings_of(tmp_path, train="a.png,x\nb.png,y\n", val="b.png,x")[0] == (
        f"warning: 1 image under two labels: for example b.png at {place}:2 (y) is b.png at {tmp_path}/val.csv:1 (x)")
    assert not warnings_of(tmp_path, train="a.png,x\nb.png,y\na.png,x\n", val="c.png,x")


@pytest.mark.parametrize(("labels", "words"), [
    ([f"{number / 7:.3f}" for number in range(20)], "look like measurements, not classes (20 different ones in 20 rows"),
    (["1.5e-3", ".25", "-7", *map(str, range(20))], "look like measurements"),
    ([f"a{number}" for number in range(20)], "warning: {}/train.csv: the labels in column label do not look like classes (20 d"),
    (list(map(str, range(20, 40))), "do not look like classes")])
def test_labels_that_differ_in_nearly_every_row_are_reported(tmp_path, labels, words):
    (tmp_path / "train.csv").write_text("path,label\n" + "".join(f"{row}.png,{label}\n" for row, label in enumerate(labels)))
    for row in range(len(labels)):
        (tmp_path / f"{row}.png").touch()
    try:
        found = [note for note in csv_lists(str(tmp_path), Request(val_fraction=0.5)).notes if note.startswith("warning: ")]
    except DataError as error:
        found = [str(error)]
    assert len(found) == 1 and words.format(tmp_path) in found[0]
    (tmp_path / "train.csv").write_text("".join(f"{row}.png,{labels[row % 7]}\n" for row in range(20)))        # few
    assert not [note for note in csv_lists(str(tmp_path), Request(val_fraction=0.5)).notes if "look like" in note]


@pytest.mark.parametrize(("column", "values", "counts"), [
    ("is_train", "True False", "1 row for train, 1 row for val"), ("is_valid", "0 1", "1 row for train, 1 row for val"),
    ("isTest", "no yes", "1 row for train, 1 row for test"), ("is_training_image", "1 0", "1 row for train, 1 row for val")])
def test_column_of_yes_and_no_divides_a_list(tmp_path, column, values, counts):
    first, second = values.split()
    root = csv_files(tmp_path, train=f"path,label,{column}\na.png,x,{first}\nb.png,x,{second}\n")
    splits = csv_lists(root, Request(need=TRAIN))
    assert (len(splits.train), len(splits.val)) == (1, 1)
    assert f"train.csv: split by column {column}: {counts}" in splits.notes
    csv_files(tmp_path, train=f"path,label,{column}\na.png,x,{first}\nb.png,x,maybe\n")
    notes = csv_lists(root, Request(val_fraction=0.5)).notes
    assert [note for note in notes if note.startswith("warning: ") and f"column {column} is not used" in note] and (
        "are not true and false" in " ".join(notes))


def test_broken_links_are_reported(tmp_path):
    for name in ("a.png", "img"):
        (tmp_path / name).symlink_to("/gone")
    (tmp_path / "b.png").touch()
    for rows, more in (("b.png,x\na.png,y\n", ". Restore that file or folder, or remove the link"),
                       ("a.png,x\nb.png,y\nimg/c.png,x\n", " (2 broken links in all). Restore the files")):
        (tmp_path / "train.csv").write_text(rows)
        with pytest.raises(DataError) as caught:
            csv_lists(str(tmp_path), Request(val_fraction=0.5))
        assert f": {tmp_path}/a.png is a link to /gone, which does not exist{more}" in str(caught.value)


def test_held_out_files_that_are_trained_on_are_reported(tmp_path):
    assert warnings_of(tmp_path, train="a.png,x\nb.png,y\n", val="c.png,x\na.png,x", test="b.png,y") == [
        f"warning: 1 of the 2 val images is also in train: for example a.png at {tmp_path}/val.csv:2 is a.png at "
        f"{tmp_path}/train.csv:1. Results on them mean little",
        f"warning: the only test image is also in train: for example b.png at {tmp_path}/test.csv:1 is b.png at "
        f"{tmp_path}/train.csv:2. Results on them mean little"]


@pytest.mark.parametrize("label", ["nan", "NaN", "null", "<NA>", "NA", "None"])
def test_labels_for_missing_values_are_reported_with_lines(tmp_path, label):
    """Only if they are few compared with the others, because a class may have such a name."""
    rows = 5 * "c.png,x\nd.png,y\n"
    assert warnings_of(tmp_path, train=f"a.png,{label}\n{rows}b.png,{label}\n", val="e.png,x") == [
        f"warning: {tmp_path}/train.csv:1: the label {label} is what spreadsheets and pandas write for a missing one (and in "
        "line 12). Remove the rows, unless it is a class"]
    assert not warnings_of(tmp_path, train=f"a.png,{label}\n{rows}b.png,{label}\na.png,{label}\n", val="e.png,x")


def test_floats_of_one_list_match_integers_of_the_other(tmp_path):
    ints, floats = ("".join(f"a.png,{number}{end}\n" for number in range(1, 13)) for end in ("", ".0"))
    for train, val in ((ints, floats), (floats, ints)):
        splits = csv_lists(csv_files(tmp_path, train=train, val=val))
        assert splits.val.targets.tolist() == splits.train.targets.tolist() == list(range(12))


def test_labels_that_differ_only_in_case_are_reported(tmp_path):
    """A public list has HAPPINESS and happiness."""
    assert any("HAPPINESS and happiness are 2 classes" in note for note in warnings_of(
        tmp_path, train="a.png,HAPPINESS\nb.png,happiness\n", val="c.png,happiness"))
    csv_files(tmp_path, train="a.png,happiness\nb.png,sad\n", val="c.png,HAPPINESS")
    with pytest.raises(DataError, match=r"val\.csv:1: the label HAPPINESS \(similar: happiness\) does not occur in train\.csv"):
        csv_lists(str(tmp_path))


def test_evaluation_needs_no_training_list(tmp_path):
    kept = {"rule": ClassRule(wanted=("x", "y"), partly=True), "need": HELD_OUT}
    for name in ("val", "test", "legend"):
        root = csv_files(tmp_path / name, **{name: "a.png,y\nb.png,y\n"})
        splits = open_splits("csv", root, **kept)
        assert not len(splits.train) and splits.test.targets.tolist() == [1, 1] and splits.classes == ("x", "y")
    root = csv_files(tmp_path / "both", val="age,path,label\n3,a.png,x\n", test="label,path\ny,b.png\n")
    both = open_splits("csv", root, **kept)
    assert (both.val.targets.tolist(), both.test.targets.tolist(), both.val_name) == ([0], [1], "val")


def test_files_are_found_by_listing_folders_not_one_by_one(tmp_path, monkeypatch):
    real = os.path.isfile
    root = csv_files(tmp_path, train="".join(f"img/{number}.png,{number % 2}\n" for number in range(500)), val="img/0.png,0")
    (tmp_path / "img").mkdir()
    for number in range(500):
        (tmp_path / "img" / f"{number}.png").touch()
    checked = []
    monkeypatch.setattr("os.path.isfile", lambda path: checked.append(path) or real(path))
    assert np.bincount(csv_lists(root).train.targets).tolist() == [250, 250]
    assert len(checked) < 100
