"""Kinds of values, each a test and its description: tables of them define what a model's row or a file may hold.

`fault(name, value)` returns what is wrong, for a one-line message, or "". It accepts any value that a file may hold, and calls a
method only after it has checked the type.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping

LARGEST = 1e6            # of a factor or a mean
LONGEST = 4096           # characters of a text: as long as a path may be
LONGEST_WORD = 1 << 17   # of an argument on a command line: Linux's limit
MAX_SHOWN = 30               # of a value in a message
LISTED = 4               # up to so many choices of text are quoted in a message


def brief(value: object) -> str:
    """Describe any value for a one-line message: short, in printable letters."""
    if isinstance(shape := getattr(value, "shape", None), tuple):       # without PyTorch, which takes a second to load
        return f"an array of shape {brief(tuple(shape))}"
    kind = type(value)
    if kind in (list, tuple, dict) and not (kind is tuple and len(value) <= 4 and all(map(is_number, value))):
        return f"a {kind.__name__} of {len(value)}"
    if kind is str:
        text = ascii(value[:MAX_SHOWN + 1])                   # bidirectional letters could make it look like another text
    elif kind in (bytes, int):
        text = repr(value) if kind is bytes or abs(value) < 10 ** MAX_SHOWN else "an int of more than 30 digits"
    else:
        text = repr(value) if value is None or kind in (bool, float, tuple) else f"a {kind.__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN - 3]}..."


def named(name: object) -> str:
    """Describe a name from a file for a one-line message: as `brief`, without quotes."""
    return brief(name).strip("'\"") if isinstance(name, str) else brief(name)


@dataclasses.dataclass(frozen=True)
class Kind:
    words: str                              # "1 or more"
    holds: Callable[[object], bool]         # never raises

    def fault(self, name: str, value: object) -> str:
        return "" if self.holds(value) else f"{name} {brief(value)}: must be {self.words}"


@dataclasses.dataclass(frozen=True)
class Record:
    """A dict with these fields; only those in `optional` may be missing."""

    fields: Mapping[str, "Kind | Record | Each"]
    optional: Collection[str] = ()

    def fault(self, name: str, value: object) -> str:
        if not isinstance(value, dict):
            return f"{name} {brief(value)}: must be a dictionary"
        for key in value:
            if key not in self.fields:
                return f"{name} has {named(key)}, which this version does not know"
        for key in self.fields:
            if key not in value and key not in self.optional:
                return f"{name} lacks {key}"
        faults = (kind.fault(f"{name}.{key}", value[key]) for key, kind in self.fields.items() if key in value)
        return next(filter(None, faults), "")


@dataclasses.dataclass(frozen=True)
class Each:
    """A list of values of one kind; with `keys`, a dict with such keys, where the keys in `special` have another kind."""

    kind: "Kind | Record | Each"
    keys: Kind | None = None
    special: Mapping[str, Kind] = dataclasses.field(default_factory=dict)

    def fault(self, name: str, value: object) -> str:
        if self.keys is None:
            if not isinstance(value, list):
                return f"{name} {brief(value)}: must be a list"
            return next(filter(None, (self.kind.fault(f"{name}.{number}", item) for number, item in enumerate(value))), "")
        if not isinstance(value, dict):
            return f"{name} {brief(value)}: must be a dictionary"
        for key, item in value.items():
            if not self.keys.holds(key):
                return f"{name} has {brief(key)}: its names must be {self.keys.words}"
            if fault := self.special.get(key, self.kind).fault(f"{name}.{named(key)}", item):
                return fault
        return ""


# --------------------------------------------------------------------------------------------------------------- kinds


def is_whole(value: object) -> bool:
    return type(value) is int


def is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e300          # neither NaN nor infinity


def is_text(value: object, longest: int = LONGEST) -> bool:
    return isinstance(value, str) and len(value) <= longest and "\0" not in value


def whole(low: int, high: int = 2 ** 63 - 1, words: str = "") -> Kind:
    words = words or (f"{low} or more" if high == 2 ** 63 - 1 else f"a whole number from {low} to {high}")
    return Kind(words, lambda value: is_whole(value) and low <= value <= high)


def number(low: float = -math.inf, high: float = math.inf, below: float = math.inf, words: str = "a finite number") -> Kind:
    """low <= value <= high, and value < below."""
    return Kind(words, lambda value: is_number(value) and low <= value <= high and value < below)


def one_of(*values: object) -> Kind:
    is_long = len(values) > LISTED and all(isinstance(value, str) and value for value in values)
    *most, last = values if is_long else map(repr, values)                       # without quotes
    return Kind(f"{', '.join(most)} or {last}" if most else last,
                lambda value: any(type(value) is type(known) and value == known for known in values))


def maybe(kind: Kind) -> Kind:
    return Kind(f"{kind.words}, or None", lambda value: value is None or kind.holds(value))


def numbers(fewest: int, above: float, words: str) -> Kind:
    """A tuple or list of at least `fewest` numbers above `above`, small enough that computing with them stays finite."""
    return Kind(words, lambda value: isinstance(value, (tuple, list)) and fewest <= len(value) <= LONGEST
                and all(is_number(each) and above < each < LARGEST for each in value))


def _is_plain(value: object, depth: int = 2) -> bool:
    if isinstance(value, (tuple, list)):
        return depth > 0 and len(value) <= LONGEST_WORD and all(_is_plain(each, depth - 1) for each in value)
    return value is None or type(value) in (bool, int, float) or is_text(value, LONGEST_WORD)


TEXT = Kind(f"text of at most {LONGEST} characters", is_text)
SWITCH = Kind("True or False", lambda value: type(value) is bool)
NAME = Kind("short printable text", lambda value: isinstance(value, str) and 0 < len(value) <= 1000 and value.isprintable())
PLAIN = Kind("a plain value", _is_plain)
FRACTION = number(0, 1, words="from 0 to 1")
