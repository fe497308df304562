"""The types of flags: each converts the typed text to a value, or raises argparse.ArgumentTypeError ("must be ..., got ...").

METAVARS holds what `--help` shows for a value of each type.
"""

import argparse
import os
import re
from collections.abc import Callable

LONGEST_PATH = 4096      # characters, the limit of Linux
NO_DASH = "must be a file or folder, and - would mean standard output. For one that is called -, type ./-"


class ConfigError(ValueError):
    """Raised for an impossible setting. The message names the flag, what is wrong and what to do."""

    exit_code = 2


def _within(kind: type, accepts: Callable[[float], bool], condition: str, below: float = float("inf"), limit: str = ""
            ) -> Callable[[str], float]:
    """A type of numbers for which `condition` holds. below: what no setting reaches, written as `limit`."""
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {noun}, got {text!r}") from None
        if value >= below:
            raise argparse.ArgumentTypeError(f"must be below {limit}, got {text}")
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {condition}, got {text}")
        return value

    return read


_INT, _FLOAT = {"below": 2 ** 63, "limit": "2 ** 63"}, {"below": 1e30, "limit": "1e30"}
positive_int = _within(int, lambda n: n >= 1, "1 or more", **_INT)
non_negative_int = _within(int, lambda n: n >= 0, "0 or more", **_INT)
magnitude = _within(int, lambda n: 0 <= n <= 10, "a whole number from 0 to 10")
image_channels = _within(int, lambda n: n in (1, 3), "1 (gray) or 3 (color)")
positive_float = _within(float, lambda x: x > 0, "more than 0", **_FLOAT)
non_negative_float = _within(float, lambda x: x >= 0, "0 or more", **_FLOAT)
fraction = _within(float, lambda x: 0 <= x < 1, "at least 0 and below 1")
unit_interval = _within(float, lambda x: 0 <= x <= 1, "from 0 to 1")
port = _within(int, lambda n: 0 <= n <= 65535, "a whole number from 0 to 65535")
# The whole image is resized so that its center has the model's size: a small fraction makes it very large.
center_fraction = _within(float, lambda x: x == 0 or 0.1 <= x <= 1, "0 or from 0.1 to 1")
padding = _within(int, lambda n: 1 <= n <= 1000, "a whole number from 1 to 1000")


def _matching(pattern: str, condition: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"must {condition}, got {text!r}")
        return text

    return read


# The run folder is neither hidden nor outside the output folder.
run_name = _matching(r"[A-Za-z0-9_+][A-Za-z0-9._+-]{0,254}", "consist of letters, digits and . _ + - only, at most 255")
trained_layers = _matching(r"all|head|[1-9][0-9]{0,3}", "be all, head, or a number of blocks")
sigmoid_layers = _matching(r"all|last|[1-9][0-9]{0,3}(,[1-9][0-9]{0,3})*", "be last, all, or layers counted from 1 such as 3,7")
_sides = _matching(r"[1-9][0-9]{0,3}(x[1-9][0-9]{0,3})?", "be a side in pixels (224) or height x width (224x160)")
_steps = _matching(r"[1-9][0-9]*(,[1-9][0-9]*)*", "be steps such as 200,300,400")


def user_path(text: str) -> str:
    """A path, or a published name. A leading `~` is replaced by the home folder, since a shell does not do so in --flag=~/x."""
    path = os.path.expanduser(text)
    if len(path) > LONGEST_PATH:
        raise argparse.ArgumentTypeError(f"must be a path of at most {LONGEST_PATH} characters, got {len(path)}")
    return path


def new_path(text: str) -> str:
    """A path to write to, as user_path. Other programs take "-" for standard output, so here it is not the name of a file."""
    if text == "-":
        raise argparse.ArgumentTypeError(NO_DASH)
    return user_path(text)


def image_size(text: str) -> int | tuple[int, int]:
    """'224' or, for images that are not square, '224x160' (height x width)."""
    sides = tuple(map(int, _sides(text).split("x")))
    return sides[0] if len(set(sides)) == 1 else sides


def increasing_steps(text: str) -> tuple[int, ...]:
    """'200,300,400': steps, each larger than the one before."""
    steps = tuple(map(int, _steps(text).split(",")))
    if steps[-1] >= 2 ** 63:
        raise argparse.ArgumentTypeError("must be below 2 ** 63")
    if list(steps) != sorted(set(steps)):
        raise argparse.ArgumentTypeError(f"must increase, got {text}")
    return steps


def auto_or_positive_int(text: str) -> str | int:
    return text if text == "auto" else positive_int(text)


def intensity_range(text: str) -> str | tuple[int, int]:
    """'auto', or 'LOW,HIGH' with values of 16 bits: '0,1023'."""
    if text == "auto":
        return text
    low, _, high = text.partition(",")
    try:
        found = int(low), int(high)
    except ValueError:
        found = (0, 0)
    if not -32768 <= found[0] < found[1] <= 65535:
        raise argparse.ArgumentTypeError(f"must be auto or LOW,HIGH within -32768..65535 such as 0,1023, got {text!r}")
    return found


def channel_values(text: str) -> tuple[float, float, float]:
    """'0.5', or a number each for red, green and blue: '0.485,0.456,0.406'. Pixels are from 0 to 1."""
    try:
        found = [float(number) for number in text.split(",")]
    except ValueError:
        found = []
    if len(found) not in (1, 3) or not all(-1e3 < number < 1e3 for number in found):
        raise argparse.ArgumentTypeError(f"must be a number, or three such as 0.485,0.456,0.406, got {text!r}")
    return tuple(found * 3 if len(found) == 1 else found)


def channel_widths(text: str) -> tuple[float, float, float]:
    """As channel_values, with numbers above 0."""
    found = channel_values(text)
    if min(found) <= 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text!r}")
    return found


def class_weights(text: str) -> str:
    """'none', 'balanced', or a number for each class: '1,2.5,1'."""
    if text in ("none", "balanced"):
        return text
    try:
        numbers = [non_negative_float(weight) for weight in text.split(",")]
    except argparse.ArgumentTypeError:
        numbers = []
    if not any(numbers):
        raise argparse.ArgumentTypeError(f"must be none, balanced, or a number for each class such as 1,2.5,1, got {text!r}")
    return text


METAVARS: dict[Callable, str] = {
    str: "TEXT", user_path: "PATH", positive_int: "N", auto_or_positive_int: "auto|N", non_negative_int: "N", magnitude: "0..10",
    image_channels: "1|3", positive_float: "FLOAT", non_negative_float: "FLOAT", fraction: "0..1", unit_interval: "0..1",
    center_fraction: "0|0.1..1", padding: "1..1000", port: "0..65535", image_size: "SIZE", run_name: "NAME",
    increasing_steps: "N,N,...", trained_layers: "all|head|N", sigmoid_layers: "last|all|N,N,...", class_weights: "WEIGHTS",
    intensity_range: "auto|LOW,HIGH", channel_values: "R,G,B", channel_widths: "R,G,B"}


def as_tuple(value: object) -> object:
    """Convert a list to a tuple: checkpoints and JSON have lists where flags have tuples."""
    return tuple(value) if isinstance(value, list) else value


def to_text(kind: Callable | tuple, value: object) -> str:
    """Return the value as a user would type it."""
    if isinstance(value, (tuple, list)):
        return ("," if kind in (increasing_steps, intensity_range, channel_values, channel_widths) else "x").join(map(str, value))
    return str(value)
