"""The columns of lists are found by name, by which files exist, or by flags; unclear ones are errors that list the choices."""

import pytest
from miniatures import csv_files
from PIL import Image

from utils.data.csv_lists import csv_lists
from utils.data.layouts import Request
from utils.data.splits import DataError

# Lists whose images are a.png, b.png, c.png with the labels x, y, x; and the note on them.
LISTS = {
    "Image,Category\na.png,x\nb.png,y\nc.png,x": "paths from column Image, labels from column Category",
    "filename;class\na.png;x\nb.png;y\nc.png;x": "separated by a semicolon",
    "label,path\nx,a.png\ny,b.png\nx,c.png": "paths from column path, labels from column label",
    "x,a.png\ny,b.png\nx,c.png": "paths from column 2, labels from column 1",
    ",path,label\n0,a.png,x\n0,b.png,y\n0,c.png,x": "paths from column path, labels from column label",          # pandas
    "Unnamed: 0,photo,kind\n0,a.png,x\n1,b.png,y\n2,c.png,x": "paths from column photo, labels from column kind",
    "0,a.png,x\n1,b.png,y\n2,c.png,x": "paths from column 2, labels from column 3",
    "user.id,image,emotion\n7,a.png,x\n7,b.png,y\n9,c.png,x": "paths from column image, labels from column emotion",
    "image,kind\na.png,x\nb.png,y\nc.png,x": "paths from column image, labels from column kind",
    "foo,bar\na.png,x\nb.png,y\nc.png,x": "paths from column foo, labels from column bar",                        # by the files
    "id,breed\na,x\nb,y\nc,x": "paths from column id, labels from column breed",
    "lesion,image_id,dx,age\n1,a,x,30\n1,b,y,40\n2,c,x,50": "paths from column image_id, labels from column dx",
    "class_name\timg_path\nx\ta.png\ny\tb.png\nx\tc.png": "separated by a tab",
    "path,label,\na.png,x,\nb.png,y,\nc.png,x,": "",
    "# ours\npath,label\na.png,x\nb.png,y\n# a doubt\nc.png,x": "",
    ".\\a.png,x\n.\\b.png,y\n.\\c.png,x": "",
    "C:\\data\\a.png,x\nC:\\data\\b.png,y\nC:\\data\\c.png,x": "absolute paths of another machine, found by their last parts: C:",
    "class id,filepaths,age\nx,a.png,1\ny,b.png,2\nx,c.png,9": "paths from column filepaths, labels from column class id",
    "image,mask,label\na.png,d.png,x\nb.png,e.png,y\nc.png,f.png,x": "paths from column image, labels from column label",
    "a.png,x\nb.png,y\nc.png,x": "",
    "path,label,label_id\na.png,x,0\nb.png,y,1\nc.png,x,0": "labels from column label (label_id is a numeric code for it)",
    "Category_ID,image,category\n7,a.png,x\n3,b.png,y\n7,c.png,x": "labels from column category (Category_ID is a numeric code",
    "image,class_id,class_name\na.png,1,x\nb.png,0,y\nc.png,1,x": "labels from column class_name (class_id is a numeric code",
}


@pytest.mark.parametrize("text", LISTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_columns_are_found_and_reported(tmp_path, text, encoding):
    splits = csv_lists(csv_files(tmp_path, train=(text + "\n").encode(encoding)))
    assert [splits.train[index][0].getpixel((0, 0))[0] for index in range(len(splits.train))] == [0, 10, 20]
    assert splits.classes == ("x", "y") and splits.train.targets.tolist() == [0, 1, 0]
    note = LISTS[text]
    assert bool(splits.notes) == bool(note or encoding == "utf-16")
    assert not note or (splits.notes[0].startswith("train.csv: ") and note in splits.notes[0])


MOODS = "image,age,mood\na.png,3,x\nb.png,4,y\nc.png,3,x\n"


@pytest.mark.parametrize(("text", "columns", "words"), [
    ("one,two\na.png,x\nb.png,y\nc.png,x\n", {}, None),
    (MOODS, {}, r"column of the labels is unclear\. Add --label_column with its name \(columns: image, age, mood\)"),
    (MOODS, {"label_column": "mood"}, None),
    (MOODS, {"label_column": "Mood", "path_column": "IMAGE"}, None),
    (MOODS, {"label_column": "3"}, None),
    ("a.png,3,x\nb.png,4,y\nc.png,3,x\n", {"label_column": "3"}, None),
    ("a.png,3,x\nb.png,4,y\nc.png,3,x\n", {}, r"Add --label_column with its number, from 1 \(columns: 1, 2, 3\)"),
    ("a.png,3,x\nb.png,4,y\nc.png,3,x\n", {"label_column": "4"}, r"--label_column 4: no such column, .*3 columns without names"),
    ("image,age,mood\na.png,3,x\n", {"label_column": "smile"}, r"--label_column smile: no such column, .*image, age, mood"),
    ("image,age,mood\na.png,3,x\n", {"path_column": "img"}, r"--path_column img: no such column, .*image, age, mood"),
    ("image,label,class\na.png,0,x\nb.png,1,y\n", {}, r"label and class may both be the labels\. Add --label_column"),
    ("image,label,label_id\na.png,x,0\nb.png,x,1\nc.png,y,2\n", {}, r"label and label_id may both be the labels"),
    ("image,label,class\na.png,0,x\nb.png,1,y\nc.png,0,x\n", {"label_column": "class"}, None),
    ("one,two,label\na.png,d.png,x\nb.png,e.png,y\nc.png,f.png,x\n", {}, r"one, two all name files\. Add --path_column"),
    ("one,two,label\na.png,d.png,x\nb.png,e.png,y\nc.png,f.png,x\n", {"path_column": "one"}, None),
    ("one,two,three\n1,2,x\n3,4,y\n", {}, r"no column names files in .*columns: (one, two, three|1, 2, 3)"),
    ("image,label\na.png,x\n", {"path_column": "label", "label_column": "label"}, "are the same column"),
    ("image,MEL,NV\na.png,1.0,0.0\nb.png,0.0,1.0\n", {}, r"columns MEL, NV are one-hot labels, .*single column called label"),
    ("emotion,pixels,Usage\n0,70 80,Training\n", {}, "contains pixels")])
def test_flags_choose_columns_and_unclear_ones_are_errors(tmp_path, text, columns, words):
    root = csv_files(tmp_path, train=text)
    if words is None:
        splits = csv_lists(root, Request(**columns))
        assert splits.train.targets.tolist() == [0, 1, 0] and splits.classes == ("x", "y")
        return
    with pytest.raises(DataError, match=words) as raised:
        csv_lists(root, Request(**columns))
    assert "\n" not in str(raised.value) and "train.csv" in str(raised.value)


def test_other_lists_use_the_columns_of_the_first(tmp_path):
    """By name if both have a header, in any order; else by position."""
    train = "age,image,mood\n3,a.png,x\n4,b.png,y\n"
    for val in ("mood,other,image\ny,1,c.png\n", "7,c.png,y\n", "age,image,mood\n9,c.png,y\n"):
        splits = csv_lists(csv_files(tmp_path, train=train, val=val), Request(label_column="mood"))
        assert splits.val.targets.tolist() == [1] and splits.val[0][0].getpixel((0, 0))[0] == 20


def test_lists_read_in_the_same_way_share_a_note(tmp_path):
    train, note = "path,label,label_id\na.png,x,0\nb.png,y,1\n", "paths from column path, labels from column label"
    for val, words in (("label_id,label,path\n1,y,c.png\n", f"train.csv, val.csv: {note} (label_id is a numeric code for it)"),
                       ("age,label,path\n1,y,c.png\n", f"val.csv: {note}")):
        assert words in csv_lists(csv_files(tmp_path, train=train, val=val)).notes


def test_number_means_a_column_of_that_name_first(tmp_path):
    splits = csv_lists(csv_files(tmp_path, train="2,1,image\nq,x,a.png\nq,y,b.png\n"), Request(label_column="1"))
    assert splits.classes == ("x", "y")


def test_id_that_matches_file_names_is_not_the_path_if_there_is_a_path(tmp_path):
    for number in range(3):
        Image.new("L", (4, 3), 0).save(tmp_path / f"{number}.png")
    splits = csv_lists(csv_files(tmp_path, train="0,a.png,x\n1,b.png,y\n2,c.png,x\n"))
    assert splits.train.name(0) == "a.png" and splits.classes == ("x", "y")
