"""Names of classes: the one rule for their order, and which spellings mean the same class.

Folders and lists share it. A run that is resumed or evaluated keeps the names of its checkpoint, in their order.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from decimal import Decimal

import numpy as np
from torch.utils.data import Dataset

from .splits import DataError, Splits, View, abbreviate

NUMBER, TEXT = "number", "text"                  # the values of --class_order
INTEGER = re.compile(r"([+-]?[0-9]+)(\.0*)?")
MISSING = {"nan", "na", "none", "null", "<na>", "n/a", "#n/a", "nat"}         # what spreadsheets and pandas write for no value
SHOWN_FIRST = 3
LONGEST_SHOWN = 40       # letters of a name in a message


@dataclasses.dataclass(frozen=True)
class ClassRule:
    """What is asked of the classes.

    order: NUMBER, TEXT, or None for a run from before --class_order, whose names are taken as they are spelled. wanted: the
    names of a checkpoint, by label, which are kept. partly: the data may lack some of them.
    """

    order: str | None = NUMBER
    wanted: tuple[str, ...] = ()
    partly: bool = False


BY_DEFAULT = ClassRule()


def text_order(names: Iterable[str]) -> list[str]:
    """As torchvision's ImageFolder sorts folders."""
    return sorted(names)


def number_order(names: Collection[str]) -> list[str]:
    """By value where all are integers (7, 007, -1, 1.0), else as text."""
    matches = [INTEGER.fullmatch(name) for name in names]
    if not all(matches):
        return text_order(names)
    value = {name: Decimal(match[1]) for name, match in zip(names, matches)}       # int() refuses thousands of digits
    return sorted(names, key=lambda name: (value[name], name))


def where_orders_differ(names: Collection[str]) -> int | None:
    """The first label whose name by number is another than as text."""
    pairs = zip(number_order(names), text_order(names))
    return next((label for label, (by_number, as_text) in enumerate(pairs) if by_number != as_text), None)


def two_orders(names: Collection[str]) -> tuple[str, ...]:
    """Names by number and as text, from where the orders differ; () if they do not."""
    start = where_orders_differ(names)
    return () if start is None else tuple(first_names(order, start) for order in (number_order(names), text_order(names)))


def canonical(name: str) -> str:
    """Spellings that look the same become one: no space around them, Unicode's form NFC (macOS writes NFD)."""
    return unicodedata.normalize("NFC", name.strip())


class Classes:
    """The classes of the spellings that were found (of train, where there is one), by label; `notes` to print."""

    def __init__(self, rule: ClassRule, found: Collection[str]):
        self.names, self._canonical = rule.wanted or _sorted(rule.order, found), {}
        self._labels = {name: label for label, name in enumerate(self.names)}
        if rule.order is not None or rule.wanted:
            for label, name in enumerate(self.names):
                self._canonical.setdefault(canonical(name), label)
        self.notes = tuple(self._notes(rule, found))

    def label(self, spelling: str) -> int | None:
        """None: it is none of the classes."""
        return self._labels.get(spelling, self._canonical.get(canonical(spelling)))

    def describe(self, names: Iterable[str]) -> str:
        """The first of the names that are no class, and which class each may be meant for."""
        return abbreviate(short_name(name) + self.hint(name) for name in names)

    def hint(self, name: str) -> str:
        meant = next((own for own in self.names if _key(own) == _key(name)), None)
        return f" (similar: {shown_name(meant)})" if meant is not None else ""

    def _notes(self, rule: ClassRule, found: Collection[str]) -> Iterable[str]:
        spelled: dict[int | None, list[str]] = {}
        for name in sorted(found):
            spelled.setdefault(self.label(name), []).append(name)
        for label, names in spelled.items():
            if label is not None and len(names) > 1:
                yield f"classes: {' and '.join(map(ascii, names))} are taken for one class: they look the same"
        yield from _twins([self.names[label] for label in spelled if label is not None])
        if not rule.wanted and (orders := two_orders(self.names)):
            by_number, as_text = (f"--class_order {name} would be {first}" for name, first in zip((NUMBER, TEXT), orders))
            yield (f"classes: in the order {first_names(self.names, where_orders_differ(self.names))}; "
                   + (f"{as_text}, as torchvision's ImageFolder" if rule.order == NUMBER else by_number))


def _sorted(order: str | None, found: Collection[str]) -> tuple[str, ...]:
    arrange = number_order if order == NUMBER else text_order
    if order is None:
        return tuple(arrange(found))
    # ImageFolder's order is that of the names as they are spelled.
    return tuple(dict.fromkeys(map(canonical, arrange(found)))) if order == TEXT else tuple(
        arrange({canonical(name) for name in found}))


def first_names(names: Sequence[str], start: int | None = None) -> str:
    """A few names: the first, or those from label `start`."""
    start = start or 0
    end = start + SHOWN_FIRST
    return "..., " * (start > 0) + ", ".join(map(short_name, names[start:end])) + ", ..." * (len(names) > end)


def short_name(name: str) -> str:
    """As `shown_name`, and cut if it is long."""
    return shown_name(name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN - 3]}...")


def shown_name(name: str) -> str:
    """The name; in quotes and escaped where a terminal would not show what it is."""
    plain = name.isprintable() and name == name.strip() and name == unicodedata.normalize("NFC", name) and name
    return name if plain else ascii(name)


def _key(name: str) -> str | Decimal:
    """Equal for names that differ only in case, space, width or form, or are the same number."""
    text = " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).split())
    match = INTEGER.fullmatch(text)
    return Decimal(match[1]) if match else text


def _twins(names: Iterable[str]) -> Iterable[str]:
    groups: dict[str | Decimal, list[str]] = {}
    for name in names:
        groups.setdefault(_key(name), []).append(name)
    for same in groups.values():
        if len(same) > 1:
            yield (f"warning: {' and '.join(map(shown_name, same))} are {len(same)} classes whose names differ only in case, "
                   "space or spelling: rename one if they are the same")
        if same[0].casefold() in MISSING:
            yield (f"warning: the class {shown_name(same[0])} is what spreadsheets and pandas write where a label is missing: "
                   "remove its images if it is no class")


# ------------------------------------------------------------------------------------------ data that are opened already


class Relabeled(View):
    """The images of `split` under other labels: table[label]."""

    def __init__(self, split: Dataset, table: np.ndarray):
        self.split, self.targets = split, table[split.targets] if len(split) else split.targets

    def _locate(self, index: int) -> tuple[Dataset, int]:
        return self.split, index

    def __getitem__(self, index: int):
        return self.split[index][0], int(self.targets[index])

    def source(self, index: int):
        return self.split.source(index)[0], int(self.targets[index])


def apply(rule: ClassRule, splits: Splits, location: str, sort: bool = False) -> Splits:
    """The splits under the wanted names, matched by name; or, where `sort`, in the order that is asked for.

    Raises DataError for a class that is not wanted, or one that is and is missing.
    """
    if not rule.wanted and not sort:
        return splits
    classes = Classes(rule, splits.classes)
    check_wanted(rule, classes, splits.classes, location)
    if classes.names == splits.classes:
        return splits
    table = np.array([classes.label(name) for name in splits.classes], dtype=np.int64)
    kinds = {id(split): Relabeled(split, table) for split in (splits.train, splits.val, splits.test)}
    train, val, test = (kinds[id(split)] for split in (splits.train, splits.val, splits.test))
    return dataclasses.replace(splits, train=train, val=val, test=test, classes=classes.names,
                               notes=(*splits.notes, *classes.notes))


def check_wanted(rule: ClassRule, classes: Classes, found: Collection[str], location: str) -> None:
    """Raise DataError unless the classes that were found are the wanted ones, or some of them where that is allowed."""
    if not rule.wanted:
        return
    labels = {name: classes.label(name) for name in found}
    unknown = [name for name, label in labels.items() if label is None]
    missing = set(range(len(classes.names))) - set(labels.values())
    has = f"the checkpoint has {len(classes.names)} classes ({first_names(classes.names)})"
    if unknown:
        raise DataError(f"{location}: {has}, and not {classes.describe(unknown)}: not the same task")
    if missing and not rule.partly:
        raise DataError(f"{location}: {has}, and {abbreviate(classes.names[label] for label in missing)} is missing: "
                        "not the same task")
