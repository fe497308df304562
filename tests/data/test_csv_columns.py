"""Which column is what: by its name, by what the files show, by flags; and what is refused with the choice."""

import pytest
from miniatures import csv_files
from PIL import Image

from utils.data.csv_lists import csv_lists
from utils.data.layouts import Request
from utils.data.splits import DataError

# Lists whose images are a.png, b.png, c.png with the labels x, y, x; and what is told of them.
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
    "C:\\data\\a.png,x\nC:\\data\\b.png,y\nC:\\data\\c.png,x": "absolute paths of another machine, taken by their ends: C:",
    "class id,filepaths,age\nx,a.png,1\ny,b.png,2\nx,c.png,9": "paths from column filepaths, labels from column class id",
    "image,mask,label\na.png,d.png,x\nb.png,e.png,y\nc.png,f.png,x": "paths from column image, labels from column label",
    "a.png,x\nb.png,y\nc.png,x": "",
    "path,label,label_id\na.png,x,0\nb.png,y,1\nc.png,x,0": "labels from column label (label_id is a code of it)",
    "Category_ID,image,category\n7,a.png,x\n3,b.png,y\n7,c.png,x": "labels from column category (Category_ID is a code of it)",
    "image,class_id,class_name\na.png,1,x\nb.png,0,y\nc.png,1,x": "labels from column class_name (class_id is a code of it)",
}


@pytest.mark.parametrize("text", LISTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_columns_are_found_and_told(tmp_path, text, encoding):
    splits = csv_lists(csv_files(tmp_path, train=(text + "\n").encode(encoding)))
    assert [splits.train[index][0].getpixel((0, 0))[0] for index in range(len(splits.train))] == [0, 10, 20]
    assert splits.classes == ("x", "y") and splits.train.targets.tolist() == [0, 1, 0]
    told = LISTS[text]
    assert bool(splits.notes) == bool(told or encoding == "utf-16")
    assert not told or (splits.notes[0].startswith("train.csv: ") and told in splits.notes[0])


MOODS = "image,age,mood\na.png,3,x\nb.png,4,y\nc.png,3,x\n"


@pytest.mark.parametrize(("text", "columns", "words"), [
    ("one,two\na.png,x\nb.png,y\nc.png,x\n", {}, None),
    (MOODS, {}, r"which column holds the labels\? It has image, age, mood: add --label_column with its name"),
    (MOODS, {"label_column": "mood"}, None),
    (MOODS, {"label_column": "Mood", "path_column": "IMAGE"}, None),
    (MOODS, {"label_column": "3"}, None),
    ("a.png,3,x\nb.png,4,y\nc.png,3,x\n", {"label_column": "3"}, None),
    ("a.png,3,x\nb.png,4,y\nc.png,3,x\n", {}, r"It has 1, 2, 3: add --label_column with its number, from 1"),
    ("a.png,3,x\nb.png,4,y\nc.png,3,x\n", {"label_column": "4"}, r"--label_column 4: no such column .*3 columns without names"),
    ("image,age,mood\na.png,3,x\n", {"label_column": "smile"}, r"--label_column smile: no such column .*image, age, mood"),
    ("image,age,mood\na.png,3,x\n", {"path_column": "img"}, r"--path_column img: no such column .*image, age, mood"),
    ("image,label,class\na.png,0,x\nb.png,1,y\n", {}, r"label and class may both be the labels: add --label_column"),
    ("image,label,label_id\na.png,x,0\nb.png,x,1\nc.png,y,2\n", {}, r"label and label_id may both be the labels"),
    ("image,label,class\na.png,0,x\nb.png,1,y\nc.png,0,x\n", {"label_column": "class"}, None),
    ("one,two,label\na.png,d.png,x\nb.png,e.png,y\nc.png,f.png,x\n", {}, r"one, two hold names of files: add --path_column"),
    ("one,two,label\na.png,d.png,x\nb.png,e.png,y\nc.png,f.png,x\n", {"path_column": "one"}, None),
    ("one,two,three\n1,2,x\n3,4,y\n", {}, r"which column holds the paths .*one, two, three|It has 1, 2, 3"),
    ("image,label\na.png,x\n", {"path_column": "label", "label_column": "label"}, "name the same column"),
    ("image,MEL,NV\na.png,1.0,0.0\nb.png,0.0,1.0\n", {}, r"columns MEL, NV hold one 1 a row, .*one column instead, called label"),
    ("emotion,pixels,Usage\n0,70 80,Training\n", {}, "holds pixels")])
def test_flags_decide_and_the_choice_is_told(tmp_path, text, columns, words):
    root = csv_files(tmp_path, train=text)
    if words is None:
        splits = csv_lists(root, Request(**columns))
        assert splits.train.targets.tolist() == [0, 1, 0] and splits.classes == ("x", "y")
        return
    with pytest.raises(DataError, match=words) as raised:
        csv_lists(root, Request(**columns))
    assert "\n" not in str(raised.value) and "train.csv" in str(raised.value)


def test_the_other_lists_take_the_columns_of_the_first(tmp_path):
    """By name where both have a header, in any order; else by position."""
    train = "age,image,mood\n3,a.png,x\n4,b.png,y\n"
    for val in ("mood,other,image\ny,1,c.png\n", "7,c.png,y\n", "age,image,mood\n9,c.png,y\n"):
        splits = csv_lists(csv_files(tmp_path, train=train, val=val), Request(label_column="mood"))
        assert splits.val.targets.tolist() == [1] and splits.val[0][0].getpixel((0, 0))[0] == 20


def test_lists_with_the_same_codes_are_told_in_one_line(tmp_path):
    """A list without them has a line of its own."""
    train, told = "path,label,label_id\na.png,x,0\nb.png,y,1\n", "paths from column path, labels from column label"
    for val, words in (("label_id,label,path\n1,y,c.png\n", f"train.csv, val.csv: {told} (label_id is a code of it)"),
                       ("age,label,path\n1,y,c.png\n", f"val.csv: {told}")):
        assert words in csv_lists(csv_files(tmp_path, train=train, val=val)).notes


def test_a_number_names_a_column_of_that_name_first(tmp_path):
    splits = csv_lists(csv_files(tmp_path, train="2,1,image\nq,x,a.png\nq,y,b.png\n"), Request(label_column="1"))
    assert splits.classes == ("x", "y")


def test_an_id_that_looks_like_a_file_is_not_the_path_beside_a_path(tmp_path):
    for number in range(3):
        Image.new("L", (4, 3), 0).save(tmp_path / f"{number}.png")
    splits = csv_lists(csv_files(tmp_path, train="0,a.png,x\n1,b.png,y\n2,c.png,x\n"))
    assert splits.train.name(0) == "a.png" and splits.classes == ("x", "y")
