"""Kinds of values accept any value that a file may hold, and describe it in short printable words."""

import pytest
import torch

from configs import MODELS, architecture
from models.base import ROW
from models.checkpoints.torch_file import Placeholder
from models.kinds import FRACTION, PLAIN, SWITCH, TEXT, Each, Record, brief, maybe, named, number, one_of, whole

ODD = [None, True, -1, 2 ** 70, 10 ** 5000, 1.5, float("nan"), float("inf"), "", "x" * 100_000, "\x1b[31m\n\u202e", "a\0b", b"x",
       [], {}, (), [[]], {"a": {}}, torch.tensor([]), torch.tensor(1.0), torch.ones(2, 3), Placeholder(), {1, 2}]
KINDS = {"whole": whole(0), "number": number(), "fraction": FRACTION, "switch": SWITCH, "text": TEXT, "plain": PLAIN,
         "choice": one_of("a", 1), "perhaps": maybe(SWITCH), "record": Record({"a": TEXT}), "list": Each(TEXT),
         "dict": Each(TEXT, keys=TEXT), **ROW}


@pytest.mark.parametrize("kind", KINDS)
def test_any_value_is_compared_without_an_error(kind):
    for value in ODD:
        for given in (value, [value], {"a": value}, {"b": 1}, (value, value)):
            words = KINDS[kind].fault("name", given)
            assert len(words) < 160 and words.isprintable() and (not words or words.startswith("name")), words


@pytest.mark.parametrize(("value", "words"), [
    ("a\x1b[31mb", r"'a\x1b[31mb'"), ("ü\u202e", r"'\xfc\u202e'"), ("x" * 99, "'" + "x" * 26 + "..."), (None, "None"), (7, "7"),
    (2 ** 200, "an int of more than 30 digits"), ((3, 4), "(3, 4)"), ([1] * 9, "a list of 9"), ({"a": 1}, "a dict of 1"),
    (torch.ones(2, 3), "an array of shape (2, 3)"), (Placeholder(), "a Placeholder"), (float("nan"), "nan")])
def test_words_about_a_value(value, words):
    assert brief(value) == words


def test_words_about_a_name():
    assert (named("a.b"), named("\x1b"), named(3)) == ("a.b", r"\x1b", "3")


def test_a_record_names_what_it_lacks_or_does_not_know():
    record = Record({"a": whole(0), "b": Record({"c": TEXT})}, optional={"a"})
    assert record.fault("x", {"b": {"c": "ok"}}) == ""
    assert record.fault("x", {"a": 1}) == "x lacks b"
    assert record.fault("x", {"a": 1, "b": {"c": 5}}) == "x.b.c 5: must be text of at most 4096 characters"
    assert record.fault("x", {"b": {"c": "", "d": 1}}) == "x.b has d, which this version does not know"
    assert Each(whole(1), keys=TEXT).fault("x", {"a": 1, "b": 0}) == "x.b 0: must be 1 or more"
    assert Each(whole(1), keys=TEXT).fault("x", {3: 1}) == "x has 3: its names must be text of at most 4096 characters"
    assert Each(whole(1)).fault("x", [1, 0]) == "x.1 0: must be 1 or more"


@pytest.mark.parametrize("name", MODELS)
def test_every_row_is_of_its_kinds(name):
    """A key of configs.architecture needs its kind in models/base.py."""
    row = MODELS[name].to_dict()
    assert set(row) == set(ROW) == set(architecture(1, 1, 1, 1, 1))
    assert not [fault for key, kind in ROW.items() if (fault := kind.fault(key, row[key]))]
