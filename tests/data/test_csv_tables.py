"""Lists as text: encodings, separators, comments, trailing separators, quotes, and the errors for bad ones."""

import pytest

from utils.data.csv_tables import read_table, text_lines
from utils.data.splits import DataError

PLAIN = "path,label\na.png,cat\nb.png,dog\n"
ROWS = [["path", "label"], ["a.png", "cat"], ["b.png", "dog"]]


def table_of(tmp_path, text: str | bytes):
    file = tmp_path / "train.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_table(file)


@pytest.mark.parametrize("separator", [";", "\t", "|", ","])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_separators_and_line_ends(tmp_path, separator, ending):
    table = table_of(tmp_path, PLAIN.replace(",", separator).replace("\n", ending))
    assert (table.rows, table.lines, table.separator) == (ROWS, [1, 2, 3], separator)


@pytest.mark.parametrize(("text", "separator", "row"), [
    ("a.png;cat, black\nb.png;dog, white\n", ";", ["a.png", "cat, black"]),           # a comma in every row too
    ("a.png;cat;0,5\nb.png;dog;1,5\n", ";", ["a.png", "cat", "0,5"]),                 # European decimals
    ('"a,1.png",cat\n"b,2.png",dog\n', ",", ["a,1.png", "cat"]),
    ('"a;1.png";cat\n"b;2.png";dog\n', ";", ["a;1.png", "cat"]),
    ("a b.png,cat | black\nc.png,dog\n", ",", ["a b.png", "cat | black"]),
    ("\tpath\tlabel\n0\ta.png\tcat\n", "\t", ["", "path", "label"]),                  # an index without a name
    ("cat,a.png\n", ",", ["cat", "a.png"])])
def test_separator_is_the_one_in_all_rows(tmp_path, text, separator, row):
    table = table_of(tmp_path, text)
    assert table.separator == separator and table.rows[0] == row


@pytest.mark.parametrize("text", [
    PLAIN.replace("\n", ",\n"), PLAIN.replace("cat\n", "cat,\n"), PLAIN.replace("label\n", "label,\n"), PLAIN + ",\n,,\n",
    "# made by hand\n" + PLAIN, PLAIN.replace("b.png", "#b.png was not good\nb.png"), PLAIN.replace(",", " , "),
    "\n\n" + PLAIN.replace("\n", "\n\n"), PLAIN.replace("cat", '"cat"'), "\ufeff" + PLAIN, PLAIN.encode("utf-16")])
def test_ignored_characters(tmp_path, text):
    """Trailing separators, comments, blank lines and rows, spaces, quotes, byte order marks."""
    table = table_of(tmp_path, text)
    assert table.rows == ROWS and table.encoding == ("utf-16" if isinstance(text, bytes) else "utf-8")


def test_big_endian_and_file_name_that_starts_like_a_comment(tmp_path):
    table = table_of(tmp_path, b"\xfe\xff" + "#1.png,käse\n".encode("utf-16-be"))
    assert table.rows == [["#1.png", "käse"]]


def test_quoted_cell_may_contain_line_breaks(tmp_path):
    table = table_of(tmp_path, 'path,label,note\na.png,cat,"two\nlines, one cell"\nb.png,dog,\n')
    assert table.rows[1:] == [["a.png", "cat", "two lines, one cell"], ["b.png", "dog", ""]] and table.lines == [1, 2, 4]


@pytest.mark.parametrize(("text", "words"), [
    ("a.png,x\nb.png,y,z\n", r"train\.csv:2: 3 columns, but 2 in other rows\. Each row must be path,label"),
    ("a.png,x,y\nb.png,z\n", r"train\.csv:2: 2 columns, but 3 in other rows"),
    ("a.png,x\n\nb.png\n", r"train\.csv:3: no comma"), ("a.png;x\n\nb.png\n", r"train\.csv:3: no semicolon"),
    ('a.png,x\n"b.png,x\nc.png,x\n', r"train\.csv:2: "), ("", "no rows"), ("# path,label\n\n", "no rows"), (",,\n", "no rows"),
    (b"a.png,x\nb.p\0ng,x\n", r"train\.csv:2: not plain text \(NUL bytes\)\. Save it as UTF-8"),
    (PLAIN.encode("utf-16-le"), r"train\.csv:1: not plain text"), (b"\xff\xfea", "damaged UTF-16 text"),
    (PLAIN.encode("utf-32"), r"train\.csv:1: not plain text"),
    ("a.png,x\n" + "y" * 70_000, r"train\.csv:2: the line is longer than")])
def test_bad_text_is_reported_by_line(tmp_path, text, words):
    with pytest.raises(DataError, match=words) as raised:
        table_of(tmp_path, text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "cp1250", "gbk"])
def test_other_encodings_are_reported_with_advice(tmp_path, encoding):
    """The encoding is not guessed: the message shows the line in the likeliest one, for the user to decide."""
    word = "黑猫" if encoding == "gbk" else "löwe"
    with pytest.raises(DataError, match=r"train\.csv:2: not UTF-8 text \(.* in column 1[12]\)") as raised:
        table_of(tmp_path, f"a.png,cat\nimg/b.png,{word}\n".encode(encoding))
    assert "iconv -f WINDOWS-1252 -t UTF-8 train.csv > utf8.csv" in str(raised.value) and "\n" not in str(raised.value)
    assert (repr(f"img/b.png,{word}") in str(raised.value)) == (encoding != "gbk")


def test_text_lines(tmp_path):
    (tmp_path / "list.txt").write_text("\ufeff1 a\n\n 2 b \n")
    assert list(text_lines(tmp_path / "list.txt")) == [(1, "1 a"), (3, "2 b")]
    with pytest.raises(DataError, match="no such file"):
        list(text_lines(tmp_path / "gone.txt"))
