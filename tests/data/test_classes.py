"""Class names: their order, and which spellings mean the same class."""

import numpy as np
import pytest
from miniatures import csv_files, tree
from torchvision.datasets import ImageFolder

from utils.data.classes import Classes, ClassRule, apply, first_names, number_order, text_order, two_orders
from utils.data.datasets import open_splits
from utils.data.splits import ArrayImages, DataError, Splits

ORDERS = [
    (["10", "9", "2"], ["2", "9", "10"]), (["1.0", "10.0", "2.0"], ["1.0", "2.0", "10.0"]),
    (["-1", "1", "-10"], ["-10", "-1", "1"]),
    (["007", "10", "8"], ["007", "8", "10"]), (["10", "9", "x"], ["10", "9", "x"]), (["1.5", "10", "2"], ["1.5", "10", "2"]),
    (["b", "B", "a"], ["B", "a", "b"]), (["1", "01", "0"], ["0", "01", "1"]),
    (["2" + "0" * 20, "10", "-1" + "0" * 5000], ["-1" + "0" * 5000, "10", "2" + "0" * 20])]


@pytest.mark.parametrize(("names", "by_number"), ORDERS)
def test_integers_are_sorted_by_value_and_other_names_as_text(names, by_number):
    assert number_order(names) == by_number and text_order(names) == sorted(names)
    assert Classes(ClassRule(), set(names)).names == tuple(by_number)
    assert Classes(ClassRule("text"), set(names)).names == tuple(sorted(names))
    assert bool(two_orders(names)) == (by_number != sorted(names))


def test_names_are_shown_from_where_the_orders_differ():
    names = ["-1", "0", "1", "10", "2", "3"]
    assert two_orders(names) == ("..., 2, 3, 10", "..., 10, 2, 3") and two_orders(["0", "1"]) == ()
    assert Classes(ClassRule(), names).notes == (
        "classes: in the order ..., 2, 3, 10; --class_order text would be ..., 10, 2, 3, as in torchvision's ImageFolder",)


def test_folders_and_lists_have_the_same_order_and_text_is_image_folders(tmp_path):
    names = [str(number) for number in range(12)]
    root = tree(tmp_path / "tree", {f"{split}/{name}": 2 for split in ("train", "val") for name in names})
    csv = csv_files(tmp_path / "csv", train="".join(f"a.png,{name}\n" for name in reversed(names)), val="b.png,3\n")
    for order, classes in (("number", names), ("text", sorted(names))):
        for kind, place in (("folder", root), ("csv", csv)):
            splits = open_splits(kind, place, rule=ClassRule(order))
            assert list(splits.classes) == classes and any("--class_order" in note for note in splits.notes)
    splits = open_splits("folder", root, rule=ClassRule("text"))
    assert splits.train.samples == ImageFolder(tmp_path / "tree" / "train").samples


def test_checkpoint_names_override_the_order(tmp_path):
    """Also for an evaluation on some of the classes."""
    wanted = ("10", "9", "2")
    root = tree(tmp_path, {f"{split}/{name}": int(name) for split in ("train", "val") for name in wanted})
    for kind in ("number", "text", None):
        splits = open_splits("folder", root, rule=ClassRule(kind, wanted))
        assert splits.classes == wanted and np.bincount(splits.val.targets).tolist() == [10, 9, 2]
        assert sorted(splits.train.targets.tolist()) == splits.train.targets.tolist()
    fewer = tree(tmp_path / "fewer", {"val/2": 3, "val/10": 1})
    with pytest.raises(DataError, match="but no train/"):
        open_splits("folder", fewer, rule=ClassRule("number", wanted))
    splits = open_splits("folder", fewer, rule=ClassRule("number", wanted, partly=True), need="held out")
    assert splits.classes == wanted and splits.test.targets.tolist() == [0, 2, 2, 2] and not len(splits.train)
    assert "warning: val has no images of 1 of the 3 classes: 9" in splits.notes
    with pytest.raises(DataError, match=r"has 2 classes \(9, 10\), but not 2: not the same task"):
        open_splits("folder", fewer, rule=ClassRule("number", ("9", "10"), partly=True), need="held out")
    with pytest.raises(DataError, match=r"3 classes .*but 9 is missing"):
        open_splits("folder", fewer, rule=ClassRule("number", wanted), need="held out")


def test_loaded_splits_are_relabeled():
    images = ArrayImages(np.arange(6, dtype=np.uint8).reshape(6, 1, 1), [0, 1, 2, 2, 1, 0])
    splits = Splits(images, images, images, "test", ("ant", "bee", "cat"))
    assert apply(ClassRule(), splits, "here") is splits
    other = apply(ClassRule("number", ("cat", "dog", "ant", "bee"), partly=True), splits, "here")
    assert other.classes == ("cat", "dog", "ant", "bee") and other.val is other.test is other.train
    assert other.train.targets.tolist() == [2, 3, 0, 0, 3, 2] == [other.train[index][1] for index in range(6)]
    assert [other.train.source(index)[1] for index in (0, 2)] == [2, 0] and other.train.name(1) == images.name(1)
    assert other.train.content(4) == images.content(4) and other.train[5][0].getpixel((0, 0)) == (5, 5, 5)
    with pytest.raises(DataError, match=r"here: the checkpoint has 2 classes \(Ant, bee\), but not ant \(similar: Ant\), cat"):
        apply(ClassRule("number", ("Ant", "bee")), splits, "here")


def test_spellings_that_look_the_same_are_one_class():
    nfc, nfd = "caf\u00e9", "cafe\u0301"
    classes = Classes(ClassRule(), {nfc, nfd, "cat", "cat "})
    assert classes.names == (nfc, "cat") or classes.names == ("cat", nfc)
    assert classes.label(nfd) == classes.label(nfc) and classes.label(" cat") == classes.label("cat")
    assert classes.label("x") is None and all(note.isascii() for note in classes.notes)
    assert sum("are treated as one class" in note for note in classes.notes) == 2
    # An older run keeps both, by their spelling.
    before = Classes(ClassRule(None, (nfd, nfc)), {nfc, nfd})
    assert (before.label(nfd), before.label(nfc)) == (0, 1) and not any("one class" in note for note in before.notes)


@pytest.mark.parametrize(("names", "words"), [
    (("Cat", "cat", "dog"), "Cat and cat are 2 classes"), (("HAPPINESS", "happiness"), "HAPPINESS and happiness"),
    (("hot dog", "hot  dog"), "hot  dog and hot dog"), (("1", "1.0", "2"), "1 and 1.0 are 2")])
def test_similar_names_give_a_warning(names, words):
    notes = [note for note in Classes(ClassRule(), names).notes if note.startswith("warning: ")]
    assert len(notes) == 1 and words in notes[0]
    assert not [note for note in Classes(ClassRule(), ("ant", "none", "NA", "nap")).notes if note.startswith("warning: ")]


def test_wrong_classes_are_reported_with_the_name_of_the_data_set():
    """And not with --data_dir, which the embedded digits do not use."""
    with pytest.raises(DataError, match=r"^digits: the checkpoint has 2 classes \(a, b\), but not 0, 1"):
        open_splits("digits", "the/old/folder", rule=ClassRule(wanted=("a", "b")))


def test_first_names_escape_what_cannot_be_seen():
    assert first_names(("a", "b")) == "a, b" and first_names(("a", "b ", "c\n", "d")) == r"a, 'b ', 'c\n', ..."


def test_integer_and_its_float_are_one_class_in_different_sources():
    """pandas writes 1.0 if a label of the column is missing. Within one source both are classes, with a warning."""
    for wanted, found in (((*map(str, range(1, 13)),), [f"{n}.0" for n in range(1, 13)]), (("1.0", "2.0"), ["1", "2"])):
        classes = Classes(ClassRule("number", wanted), found)
        assert [classes.label(name) for name in found] == list(range(len(wanted)))
        classes.check("here")
    both = Classes(ClassRule(), {"1", "1.0", "2", "02"})
    assert len(both.names) == 4 and both.label("1.0") != both.label("1")
    assert both.label("2.") == both.label("2") != both.label("02")
    assert Classes(ClassRule(None), {"1"}).label("1.0") is None
