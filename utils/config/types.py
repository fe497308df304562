"""The types of flags: each turns the text that was typed into a value, or raises argparse.ArgumentTypeError.

METAVARS holds what `--help` shows in the place of a value.
"""

import argparse
import re
from collections.abc import Callable


class ConfigError(ValueError):
    """A setting that is not possible. The message names the flag, what is wrong and what to do."""

    exit_code = 2


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None


def _within(kind: Callable[[str], float], accepts: Callable[[float], bool], condition: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {condition}, not {text}")
        return value

    return read


positive_int = _within(whole_number, lambda n: n >= 1, "1 or more")
non_negative_int = _within(whole_number, lambda n: 0 <= n < 2 ** 63, "0 or more (and below 2 ** 63)")
magnitude = _within(whole_number, lambda n: 0 <= n <= 10, "a whole number from 0 to 10")
positive_float = _within(number, lambda x: 0 < x < 1e30, "more than 0, finite and below 1e30")
non_negative_float = _within(number, lambda x: 0 <= x < 1e30, "0 or more, finite and below 1e30")
fraction = _within(number, lambda x: 0 <= x < 1, "at least 0 and below 1")
unit_interval = _within(number, lambda x: 0 <= x <= 1, "from 0 to 1")


def image_size(text: str) -> int | tuple[int, int]:
    """'224' or, for an image that is not square, '224x160' (height x width)."""
    if not re.fullmatch(r"[1-9][0-9]{0,3}(x[1-9][0-9]{0,3})?", text):
        raise argparse.ArgumentTypeError(f"must be a side in pixels (224) or height x width (224x160), not {text!r}")
    sides = tuple(int(side) for side in text.split("x"))
    return sides[0] if len(sides) == 1 or sides[0] == sides[1] else sides


def run_name(text: str) -> str:
    """The name of a folder that is neither hidden nor outside the output folder."""
    if not re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*", text):
        raise argparse.ArgumentTypeError(f"must consist of letters, digits and . _ + - only, not {text!r}")
    return text


def increasing_steps(text: str) -> tuple[int, ...]:
    """'200,300,400': steps, each larger than the one before."""
    if not re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", text):
        raise argparse.ArgumentTypeError(f"must be steps such as 200,300,400, not {text!r}")
    steps = tuple(int(step) for step in text.split(","))
    if list(steps) != sorted(set(steps)):
        raise argparse.ArgumentTypeError(f"must increase, not {text}")
    return steps


def trained_layers(text: str) -> str:
    """'all', 'head', or a number of blocks counted from the last."""
    if not re.fullmatch(r"all|head|[1-9][0-9]{0,3}", text):
        raise argparse.ArgumentTypeError(f"must be all, head, or a number of blocks, not {text!r}")
    return text


def sigmoid_layers(text: str) -> str:
    """'last', 'all', or layers counted from 1: '3,7'."""
    if not re.fullmatch(r"all|last|[1-9][0-9]{0,3}(,[1-9][0-9]{0,3})*", text):
        raise argparse.ArgumentTypeError(f"must be last, all, or layers counted from 1 such as 3,7, not {text!r}")
    return text


def class_weights(text: str) -> str:
    """'none', 'balanced', or one number a class: '1,2.5,1'."""
    if text in ("none", "balanced"):
        return text
    try:
        numbers = [non_negative_float(weight) for weight in text.split(",")]
    except argparse.ArgumentTypeError:
        numbers = []
    if not any(numbers):
        raise argparse.ArgumentTypeError(f"must be none, balanced, or a number for each class such as 1,2.5,1, not {text!r}")
    return text


METAVARS: dict[Callable, str] = {
    str: "TEXT", positive_int: "N", non_negative_int: "N", magnitude: "0..10", positive_float: "FLOAT",
    non_negative_float: "FLOAT", fraction: "0..1", unit_interval: "0..1", image_size: "SIZE", run_name: "NAME",
    increasing_steps: "N,N,...", trained_layers: "all|head|N", sigmoid_layers: "last|all|N,N,...", class_weights: "WEIGHTS"}


def to_text(kind: Callable | tuple, value: object) -> str:
    """The value as it is typed."""
    if isinstance(value, (tuple, list)):
        return ("," if kind is increasing_steps else "x").join(map(str, value))
    return str(value)
