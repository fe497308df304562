"""Class names: their order, and which spellings mean the same class.

The same rule applies to folders and lists. A run that is resumed or evaluated keeps the names of its checkpoint, in their order.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from decimal import Decimal

import numpy as np
from torch.utils.data import Dataset

from .splits import DataError, Splits, View, abbreviate

NUMBER, TEXT = "number", "text"                  # the values of --class_order
INTEGER = re.compile(r"([+-]?[0-9]+)(\.0*)?")
SHOWN_FIRST = 3
LONGEST_SHOWN = 40       # letters of a name in a message


@dataclasses.dataclass(frozen=True)
class ClassRule:
    """How classes are ordered, and which ones the data must have.

    order: NUMBER, TEXT, or None for a run of a version without --class_order, which uses the names exactly as spelled. wanted:
    the names of a checkpoint, by label, which are kept. partly: whether the data may lack some of them.
    """

    order: str | None = NUMBER
    wanted: tuple[str, ...] = ()
    partly: bool = False


BY_DEFAULT = ClassRule()


def text_order(names: Iterable[str]) -> list[str]:
    """Sort names as text, as torchvision's ImageFolder sorts folders."""
    return sorted(names)


def number_order(names: Collection[str]) -> list[str]:
    """Sort names by value if all are integers (7, 007, -1, 1.0), else as text."""
    matches = [INTEGER.fullmatch(name) for name in names]
    if not all(matches):
        return text_order(names)
    value = {name: Decimal(match[1]) for name, match in zip(names, matches)}       # int() refuses thousands of digits
    return sorted(names, key=lambda name: (value[name], name))


def where_orders_differ(names: Collection[str]) -> int | None:
    """Return the first label that has another name in the order by number than in the order as text; None without one."""
    pairs = zip(number_order(names), text_order(names))
    return next((label for label, (by_number, as_text) in enumerate(pairs) if by_number != as_text), None)


def two_orders(names: Collection[str]) -> tuple[str, ...]:
    """Return a few names in the order by number and as text, from where the two differ; () if they do not."""
    start = where_orders_differ(names)
    return () if start is None else tuple(first_names(order, start) for order in (number_order(names), text_order(names)))


def canonical(name: str) -> str:
    """Return one spelling for all that look the same: without surrounding space, in Unicode's form NFC (macOS writes NFD)."""
    return unicodedata.normalize("NFC", name.strip())


def as_integer(name: str) -> str:
    """Return the canonical name, and 1 for 1.0: pandas writes integers like that in a column with a missing value."""
    match = INTEGER.fullmatch(canonical(name))
    return match[1] if match else canonical(name)


class Classes:
    """The classes, by label, for the spellings that were found (in train, if there is one). `notes` are lines to print."""

    def __init__(self, rule: ClassRule, found: Collection[str]):
        self.rule, self.found, self._canonical = rule, found, {}
        self.names = rule.wanted or _sorted(rule.order, found)
        self._labels = {name: label for label, name in enumerate(self.names)}
        if rule.order is not None or rule.wanted:
            for same in (canonical, as_integer):
                for label, name in enumerate(self.names):
                    self._canonical.setdefault(same(name), label)
        self.notes = tuple(self._notes())

    def label(self, spelling: str) -> int | None:
        """Return the label of a class in any of its spellings; None if there is no such class."""
        same = self._canonical.get(as_integer(spelling))
        return self._labels.get(spelling, self._canonical.get(canonical(spelling), same))

    def describe(self, names: Iterable[str]) -> str:
        """Return the first of the unknown names for a message, each with the class that may be meant."""
        return abbreviate(short_name(name) + self.hint(name) for name in names)

    def hint(self, name: str) -> str:
        meant = next((own for own in self.names if _key(own) == _key(name)), None)
        return f" (similar: {shown_name(meant)})" if meant is not None else ""

    def check(self, location: str) -> None:
        """Raise DataError unless the classes found are the wanted ones, or some of them if `partly` allows that."""
        if not self.rule.wanted:
            return
        labels = {name: self.label(name) for name in self.found}
        unknown = [name for name, label in labels.items() if label is None]
        missing = set(range(len(self.names))) - set(labels.values())
        has = f"the checkpoint has {len(self.names)} classes ({first_names(self.names)})"
        if unknown:
            raise DataError(f"{location}: {has}, but not {self.describe(unknown)}: not the same task")
        if missing and not self.rule.partly:
            raise DataError(f"{location}: {has}, but {abbreviate(self.names[label] for label in missing)} is missing here: "
                            "not the same task")

    def _notes(self) -> Iterator[str]:
        spelled: dict[int | None, list[str]] = {}
        for name in sorted(self.found):
            spelled.setdefault(self.label(name), []).append(name)
        for label, names in spelled.items():
            if label is not None and len(names) > 1:
                yield f"classes: {' and '.join(map(ascii, names))} look the same and are treated as one class"
        yield from _similar_names([self.names[label] for label in spelled if label is not None])
        if not self.rule.wanted and (orders := two_orders(self.names)):
            by_number, as_text = (f"--class_order {name} would be {first}" for name, first in zip((NUMBER, TEXT), orders))
            yield (f"classes: in the order {first_names(self.names, where_orders_differ(self.names))}; "
                   + (f"{as_text}, as in torchvision's ImageFolder" if self.rule.order == NUMBER else by_number))


def _sorted(order: str | None, found: Collection[str]) -> tuple[str, ...]:
    arrange = number_order if order == NUMBER else text_order
    if order is None:
        return tuple(arrange(found))
    # ImageFolder's order is that of the names as they are spelled.
    return tuple(dict.fromkeys(map(canonical, arrange(found)))) if order == TEXT else tuple(
        arrange({canonical(name) for name in found}))


def first_names(names: Sequence[str], start: int | None = None) -> str:
    """Return a few names for a message: the first ones, or those from label `start`."""
    start = start or 0
    end = start + SHOWN_FIRST
    return "..., " * (start > 0) + ", ".join(map(short_name, names[start:end])) + ", ..." * (len(names) > end)


def short_name(name: str) -> str:
    """Return `shown_name`, shortened if it is long."""
    return shown_name(name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN - 3]}...")


def shown_name(name: str) -> str:
    """Return the name for a message; quoted and escaped if a terminal would not show exactly what it is."""
    plain = name.isprintable() and name == name.strip() and name == unicodedata.normalize("NFC", name) and name
    return name if plain else ascii(name)


def _key(name: str) -> str | Decimal:
    """Return a key that is equal for names that are the same number, or differ only in case, space, width or Unicode form."""
    text = " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).split())
    match = INTEGER.fullmatch(text)
    return Decimal(match[1]) if match else text


def _similar_names(names: Iterable[str]) -> Iterable[str]:
    groups: dict[str | Decimal, list[str]] = {}
    for name in names:
        groups.setdefault(_key(name), []).append(name)
    for same in groups.values():
        if len(same) > 1:
            yield (f"warning: {' and '.join(map(shown_name, same))} are {len(same)} classes whose names differ only in case, "
                   "space or spelling. If they mean the same class, rename one")


# ------------------------------------------------------------------------------------------ data sets that are loaded


class Relabeled(View):
    """The images of `split` with the label table[label] in place of each label."""

    def __init__(self, split: Dataset, table: np.ndarray):
        self.split, self.targets = split, table[split.targets] if len(split) else split.targets

    def _locate(self, index: int) -> tuple[Dataset, int]:
        return self.split, index

    def __getitem__(self, index: int):
        return self.split[index][0], int(self.targets[index])

    def source(self, index: int):
        return self.split.source(index)[0], int(self.targets[index])


def apply(rule: ClassRule, splits: Splits, location: str, sort: bool = False) -> Splits:
    """Return the splits with the labels of the wanted names, matched by name; or, with `sort`, of the rule's order.

    Raises DataError for a class that is not wanted, and for a wanted one that is missing.
    """
    if not rule.wanted and not sort:
        return splits
    classes = Classes(rule, splits.classes)
    classes.check(location)
    if classes.names == splits.classes:
        return splits
    table = np.array([classes.label(name) for name in splits.classes], dtype=np.int64)
    return splits.changed(lambda split: Relabeled(split, table)).replace(*classes.notes, classes=classes.names)
