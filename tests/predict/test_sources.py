"""Which images are labeled, and in which order: files, folders, lists, csv, standard input."""

import io
import itertools
import os
import types
from pathlib import Path

import pytest
from miniatures import csv_files, png
from processes import error_of

from utils.data.csv_tables import read_table
from utils.data.splits import DataError
from utils.files import csv_table
from utils.predict import sources
from utils.predict.sources import Batches, Item, first_of, open_sources


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(*paths: str) -> None:
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(png())


def found(*inputs: str, **more) -> list[str]:
    return [item.path for item in open_sources(inputs, **more)]


def test_a_folder_is_read_at_any_depth_in_the_order_of_its_paths():
    write("p/b.jpg", "p/a/2.PNG", "p/a/10.png", "p/a.jpg", "p/._b.jpg", "p/.hidden/c.jpg", "p/__MACOSX/d.jpg", "p/a/z/1.webp")
    Path("p/notes.txt").touch()
    os.symlink("../../p", "p/a/around")
    os.symlink("a", "p/z")
    expected = ["p/a/10.png", "p/a/2.PNG", "p/a/z/1.webp", "p/a.jpg", "p/b.jpg"]
    assert found("p") == expected == sorted(expected, key=lambda path: Path(path).parts)
    assert found("p/b.jpg", "p/a", "p/a.jpg") == ["p/b.jpg", *expected[:3], "p/a.jpg"]


def test_paths_of_a_list_are_relative_to_the_working_folder_or_the_list():
    write("lists/in.png", "here.png")
    name = os.fsdecode(b"caf\xe9.png")
    Path("lists/all.txt").write_bytes(b"\xef\xbb\xbfin.png\r\n\nhere.png\n/gone/a b.png\n" + os.fsencode(name))
    items = list(open_sources(["lists/all.txt"]))
    assert items == [Item("in.png", "lists/in.png"), Item("here.png", "here.png"), Item("/gone/a b.png", "/gone/a b.png"),
                     Item(name, name)]
    for content, words in ((b"a.png\0b.png", "lists/all.txt:1: NUL bytes"), ("a.png\n".encode("utf-16"), "UTF-16 text")):
        Path("lists/all.txt").write_bytes(content)
        assert words in error_of(DataError, found, "lists/all.txt")


def test_a_list_of_which_no_path_exists_is_remarked_on():
    """It may be something else than a list."""
    write("lists/in.png")
    note = "note: lists/a.txt is read as a list of 2 paths, one a line, and no such files exist"
    for text, line in (("Buy milk.\n\nCall Bob.\n", note), ("milk\nin.png\n", None), ("in.png\nmilk", None), ("\n", None)):
        Path("lists/a.txt").write_text(text)
        list(open_sources(["lists/a.txt", "lists"], remarks=(remarks := sources.Remarks())))
        assert remarks.lists == [line] * bool(line) and remarks.skipped == ["skipped, not images by their extension: 1 .txt"]


def test_standard_input_is_read_line_by_line(monkeypatch):
    class Endless(io.RawIOBase):
        def __iter__(self):
            return (f"{number}.png\n".encode() for number in itertools.count())

    monkeypatch.setattr(sources.sys, "stdin", types.SimpleNamespace(buffer=Endless()))
    assert [item.name for item in itertools.islice(open_sources(["-"]), 3)] == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(("text", "more"), [
    ("path,label\na.png,x\nb.png,y\n", {}),
    ("a.png\nb.png\n", {}),
    ("# made by hand\n;image;level\n0;a;3\n\n1;b;4\n", {}),                        # an index, names without an ending
    ("first\tsecond\nb.png\ta.png\na.png\tb.png\n", {"path_column": "second"}),
    ('label,file\n"x,y","a.png"\nz,b.png\n', {}),
    ("path,label,probability,error\na.png,,,\nb.png,3,0.5,\n", {}),
], ids=["plain", "one column", "kaggle", "flag", "quoted", "ours"])
def test_a_csv_is_read_like_a_list_of_a_data_set(text, more):
    csv_files(Path("d"))
    Path("d/x.csv").write_text(text)
    assert found("d/x.csv", **more) == ["d/a.png", "d/b.png"]
    Path("d/x.csv").write_text(text, encoding="utf-16")
    assert found("d/x.csv", **more) == ["d/a.png", "d/b.png"]


def test_a_csv_may_be_in_another_folder_than_its_images_and_have_rows_without_images():
    csv_files(Path("images"))
    Path("lists").mkdir()
    Path("lists/x.csv").write_text("path,label\na.png,x\ngone.png,y\nb.png,\n,z\n")
    assert found("lists/x.csv", image_dir="images") == ["images/a.png", "images/gone.png", "images/b.png", "images/"]
    Path("lists/y.csv").write_text("one,two,three\nred,blue,green\n")
    assert "--path_column" in error_of(DataError, found, "lists/y.csv")


def test_an_apostrophe_that_our_tables_add_to_formulas_is_removed():
    """In the name of another file an apostrophe is kept."""
    write("d/a.png", "d/=b.png", "d/'-c.png")
    Path("d/x.csv").write_text(csv_table([["path", "label", "error"], ["a.png", "+", ""], ["=b.png", "-", ""],
                                          ["'-c.png", "", ""], ["=gone.png", "", ""]]))
    assert [item.name for item in open_sources(["d/x.csv"])] == ["a.png", "=b.png", "'-c.png", "=gone.png"]
    assert found("d/x.csv") == ["d/a.png", "d/=b.png", "d/'-c.png", "d/=gone.png"]


def test_the_beginning_of_a_long_list_decides_its_columns(monkeypatch):
    csv_files(Path("d"))
    Path("d/x.csv").write_text("path;label\n" + "a.png;x\n" * 500)
    monkeypatch.setattr(sources, "HEAD_BYTES", 100)
    assert len(read_table(Path("d/x.csv"), 100).rows) < 20 and len(found("d/x.csv")) == 500


def test_batches_end_early_when_no_key_follows_and_with_an_error_of_the_source():
    def keys():
        yield from [None, 1, 2, 3, None, None, None, 4, None, 5]
        raise DataError("x.txt:6: NUL bytes")

    batches, got = Batches(keys(), 2), []
    for batch in batches:
        got.append(batch)
        if len(got) > 4:
            batches.answered([1, 2, 3])
    assert got == [[1, 2], [3], [], [], [4], [5]] and str(batches.error) == "x.txt:6: NUL bytes"
    assert first_of(iter([None, 1, 2, None, 3]), 4, True) == ([1, 2], False)
    assert first_of(iter([None, 1, 2, None, 3]), 4, False) == ([1, 2, 3], True)
    assert first_of(iter([1, 2, 3]), 2, True) == ([1, 2], False)


def test_a_folder_that_cannot_be_listed_is_a_row_with_an_error(monkeypatch):
    """Simulated, since the tests may run with the right to list any folder."""
    write("p/a/1.png", "p/b/2.png", "p/c.png")

    def listed(folder):
        if folder == "p/a":
            raise DataError("Permission denied: p/a")
        return entries(folder)

    entries = sources.entries
    monkeypatch.setattr(sources, "entries", listed)
    assert found("p") == ["p/a", "p/b/2.png", "p/c.png"] and "Permission denied" in error_of(DataError, found, "p/a")


def test_inputs_without_images_are_refused_before_anything_is_read():
    Path("empty").mkdir()
    Path("images.zip").write_bytes(b"PK")
    write("p/a.png")
    for given, words in (("empty", r"empty: no images \(.jpg"), ("nothing", "nothing: no such file or folder"),
                         ("images.zip", "images.zip is an archive, not a folder")):
        with pytest.raises(DataError, match=words):
            open_sources(["p", given])
