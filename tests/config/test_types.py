"""Types of flags: accepted texts, and refused ones with the reason."""

import argparse

import pytest

from utils.config import FLAGS, types
from utils.config.types import METAVARS


@pytest.mark.parametrize(("kind", "text", "value"), [
    (types.image_size, "224", 224), (types.image_size, "224x160", (224, 160)), (types.image_size, "224x224", 224),
    (types.image_size, "9999", 9999), (types.increasing_steps, "200,300", (200, 300)),
    (types.run_name, "Run_1.2+x-3", "Run_1.2+x-3"),
    (types.class_weights, "1,2.5,0", "1,2.5,0"), (types.class_weights, "balanced", "balanced"), (types.trained_layers, "2", "2"),
    (types.sigmoid_layers, "3,7", "3,7"), (types.fraction, "1e-3", 1e-3), (types.unit_interval, "1", 1.0),
    (types.magnitude, "10", 10), (types.center_fraction, "0", 0.0), (types.center_fraction, "0.1", 0.1), (types.padding, "4", 4),
    (types.auto_or_positive_int, "auto", "auto"), (types.auto_or_positive_int, "3", 3), (types.intensity_range, "auto", "auto"),
    (types.intensity_range, "-1024,3071", (-1024, 3071)),
    (types.channel_values, "0.5", (0.5, 0.5, 0.5)), (types.channel_values, "0.485,0,-1", (0.485, 0.0, -1.0)),
    (types.channel_widths, "0.229,1,2", (0.229, 1.0, 2.0)),
    (types.port, "65535", 65535),
    (types.non_negative_int, "0", 0), (types.positive_int, "1", 1), (types.non_negative_float, "0", 0.0)])
def test_texts_become_values(kind, text, value):
    assert kind(text) == value


REFUSED = {
    types.image_size: ["0", "-8", "08", "big", "224x", "x224", "224x0", "224x160x3", "224 x 160", "2e2", "", "100000", "22.4",
                       "٢٢٤"],
    types.positive_int: ["0", "-1", "1.5", "many", "1e3", str(2 ** 63)], types.non_negative_int: ["-1", str(2 ** 63), "1.5"],
    types.non_negative_float: ["-0.1", "nan", "inf", "1e30", "fast"], types.positive_float: ["0", "nan"],
    types.fraction: ["1", "-0.1", "nan"],
    types.unit_interval: ["1.1", "-0.1"], types.image_channels: ["2", "0"],
    types.center_fraction: ["0.001", "0.0999", "-0.1", "1.01", "nan"], types.padding: ["0", "1001"],
    types.magnitude: ["11", "-1"], types.port: ["-1", "65536", "http"], types.increasing_steps: ["3,2", "x", "0", "1,", ""],
    types.class_weights: ["0,0", "heavy", "1,-1", ""], types.trained_layers: ["tail", "0"], types.sigmoid_layers: ["first", "0"],
    types.intensity_range: ["", "1023", "5,5", "9,3", "0,65536", "-40000,0", "0,1,2", "a,b", "0.5,1"],
    types.channel_values: ["", "a", "1,2", "1,2,3,4", "nan", "inf", "0.5x0.5x0.5"], types.channel_widths: ["0", "1,1,0", "-1"],
    types.run_name: ["../up", "a/b", ".hidden", "", "a b", "-x", "a\n", "ä"]}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_texts_are_refused(kind):
    for text in REFUSED[kind]:
        with pytest.raises(argparse.ArgumentTypeError, match=r"must .*got "):
            kind(text)


def test_a_limit_is_only_named_if_it_is_exceeded():
    for text, words in (("-3", "must be 0 or more, got -3"), (str(2 ** 63), f"must be below 2 ** 63, got {2 ** 63}")):
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            types.non_negative_int(text)
        assert str(caught.value) == words


def test_every_type_is_shown_in_the_help():
    assert {row.type for row in FLAGS.values() if callable(row.type)} | {types.port} == set(METAVARS)
