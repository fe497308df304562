"""Finds the splits of a data set in class folders. `find` is a pure function of the listings of folders.

A train folder next to a held-out one is recognized in many spellings, also inside one or two other folders, as archives are
often unpacked. If the folders could mean two things, an error names the choices.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from utils.files import located

from .classes import BY_DEFAULT as DEFAULT_RULE
from .classes import ClassRule
from .splits import DataError, abbreviate

SPELLINGS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
ROLE = {spelling: role for role, spellings in SPELLINGS.items() for spelling in spellings}
# seg_train next to seg_test, train_images next to test_images: names that differ only in this word.
SPLIT_NAME = re.compile(rf"((?:.*[-_. ])?)({'|'.join(ROLE)})((?:[-_. ].*|set)?)", re.IGNORECASE)
LEFT_BY_SYSTEMS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
MAX_OUTER = 2                       # folders around train/ and val/
MAX_DEPTH = 8                       # the same, where only a message names them
NOTHING = "is empty (except for hidden files)"
TINY_IMAGENET_LIST = "val_annotations.txt"
TRAIN, HELD_OUT, ANYTHING = "train", "held out", "anything"
HOLD_OUT = ("VAL_FRACTION=0.2 (--val_fraction 0.2) to hold out a fifth of the images to measure on, or --test_fraction 0.2 to "
            "draw a test set")


@dataclasses.dataclass(frozen=True)
class Request:
    """How class folders and lists are read. need: TRAIN (which needs a held-out split), HELD_OUT (an evaluation), ANYTHING."""

    classes: ClassRule = DEFAULT_RULE
    val_fraction: float = 0.0
    test_fraction: float = 0.0
    need: str = ANYTHING
    path_column: str | None = None          # of lists, by name or number from 1; None: found automatically
    label_column: str | None = None
    image_dir: str | None = None

    @property
    def draws(self) -> bool:
        """Whether a held-out split is drawn from train."""
        return bool(self.val_fraction or self.test_fraction)


BY_DEFAULT = Request()


class Listing(NamedTuple):
    """A folder's content, sorted by name, without hidden entries. A link counts as its target."""

    folders: tuple[str, ...]
    images: tuple[str, ...]         # files with the extension of an image
    files: tuple[str, ...]          # all other files, and broken links


List = Callable[[Path], Listing]


class Layout(NamedTuple):
    """The folder of class folders of each split. whole: the tree has no splits and is all `train`."""

    folders: dict[str, Path]
    whole: bool = False
    val_list: Path | None = None    # lists the images of val/images and their classes (Tiny-ImageNet)
    notes: tuple[str, ...] = ()


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in LEFT_BY_SYSTEMS


def find(data_dir: str, listing: List, request: Request) -> Layout:
    """Find the splits. Raises DataError if there is no data set, an incomplete one, or more than one."""
    root = Path(data_dir)
    here = listing(root)
    if request.classes.wanted and here.folders and set(here.folders) <= set(request.classes.wanted):
        return _without_splits(root, root, listing, request)            # a run was trained with these folders as its classes
    found = _divisions(root, listing, 0)
    if len(found) > 1:
        _check_swapped(root, found, listing)
        raise DataError(f"{located(root)} contains more than one data set: {', '.join(str(place) for place, _ in found[:5])}. "
                        "Set --data_dir to one of them")
    if found:
        return _with_splits(root, *found[0], listing, request)
    return _without_splits(root, _skip_outer_folders(root, listing), listing, request)


def _check_swapped(root: Path, found: list[tuple[Path, dict[str, list[str]]]], listing: List) -> None:
    """Raise DataError if each class has its own splits: cat/train, cat/test, dog/train, dog/test."""
    parts = [place / name for place, roles in found for same in roles.values() for name in same]
    if {place.parent for place, _ in found} != {root} or not all(listing(part).images for part in parts):
        return
    first, splits = found[0][0].name, [part.name for part in parts if part.parent == found[0][0]]
    raise DataError(f"{located(root)}: each class contains {' and '.join(f'{split}/' for split in splits)} "
                    f"({abbreviate(str(part.relative_to(root)) for part in parts)}), but each split must contain the classes. "
                    f"Move {first}/{splits[0]} to {splits[0]}/{first}, and so on")


def _skip_outer_folders(root: Path, listing: List) -> Path:
    """Return the folder itself, or the folder up to MAX_OUTER levels inside that contains more than one folder."""
    place = root
    for _ in range(MAX_OUTER):
        if len(listing(place).folders) == 1:
            place = place / listing(place).folders[0]
    return place if len(listing(place).folders) > 1 else root


# ------------------------------------------------------------------------------------------------- train, val and test


def _divisions(place: Path, listing: List, depth: int) -> list[tuple[Path, dict[str, list[str]]]]:
    """Find the folders that contain splits, outermost first -> (folder, names of its splits by role)"""
    here = listing(place)
    roles = split_names(here.folders)
    if roles and not (len(roles) == 1 and _is_class(place, here, roles, listing)):
        return [(place, roles)]
    if depth == MAX_OUTER or (depth and here.images):
        return []
    return [one for name in here.folders for one in _divisions(place / name, listing, depth + 1)]


def split_names(folders: Sequence[str]) -> dict[str, list[str]]:
    """Return the folders with names of splits, by role: {"train": ["Train"], "test": ["Test"]}; {} if there are none.

    Raises DataError if there are two sets of them.
    """
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name in folders:
        if match := SPLIT_NAME.fullmatch(name):
            before, word, after = (part.casefold() for part in match.groups())
            groups.setdefault((before, after), {}).setdefault(ROLE[word], []).append(name)
    plain = groups.pop(("", ""), {})
    pairs = [roles for roles in groups.values() if "train" in roles and len(roles) > 1]
    if plain or not pairs:
        return plain
    if len(pairs) > 1:
        raise DataError(" and ".join(", ".join(f"{name}/" for same in roles.values() for name in same) for roles in pairs)
                        + ": more than one data set. Set --data_dir to a folder that contains only one train/ and val/")
    return pairs[0]


def _is_class(place: Path, here: Listing, roles: dict[str, list[str]], listing: List) -> bool:
    """Whether the only folder with the name of a split is a class among others: images of trains, next to cars."""
    (names,) = roles.values()
    own = [listing(place / name) for name in names]
    others = [listing(place / name) for name in here.folders if name not in names]
    return all(one.images and not one.folders for one in own) and any(other.images for other in others)


def _with_splits(root: Path, place: Path, roles: dict[str, list[str]], listing: List, request: Request) -> Layout:
    names, notes = {}, []
    for role, same in roles.items():
        names[role] = role if role in same else same[0]
        if len(same) > 1 and role not in same:
            raise DataError(f"{located(place)} contains {' and '.join(same)}. Remove or rename all but one of them")
        notes += [f"warning: {place / name} is skipped, because there is also {role}/" for name in same if name != names[role]]
    if request.classes.order is None and names.get("train") == "train" and names.get("val") == "val" and (
            names.get("test") not in (None, "test")):
        del names["test"]                       # a run of a version that did not know other spellings
    folders, classes = {}, set(request.classes.wanted)
    for role in (role for role in SPELLINGS if role in names):
        folders[role] = _class_root(place / names[role], listing, classes)
        classes |= set(listing(folders[role]).folders) if role == "train" else set()
    classes = set(listing(folders["train"]).folders) if "train" in folders else set()
    test = folders.get("test")
    if test and classes and not set(listing(test).folders) - ({"images"} - classes):
        del folders["test"]
        notes.append(f"skipped: {test}/ (no class folders, so its images have no labels)")
    val_list = None
    if "val" in folders and TINY_IMAGENET_LIST in listing(folders["val"]).files:
        val_list = folders["val"] / TINY_IMAGENET_LIST
        notes.append(f"using: the classes of the images in {folders['val']} from {TINY_IMAGENET_LIST}")
    _check_parts(place, folders, listing, request)
    others = set(listing(place).folders).difference(*roles.values())
    if others:
        notes.append(f"skipped: {abbreviate(f'{place / name}/' for name in others)}")
    return Layout(folders, False, val_list, (*_describe_folders(root, folders, request), *notes))


def _class_root(folder: Path, listing: List, classes: Collection[str]) -> Path:
    """Return the folder itself, or the extra folder inside that archives and programs add: training_set/training_set/cats,
    train/images/cats.

    classes: names that are known to be classes. A single class cannot be trained, so a single folder that contains several
    others is not a class.
    """
    here = listing(folder)
    if here.images or len(here.folders) != 1 or here.folders[0] in classes:
        return folder
    inner = folder / here.folders[0]
    below = listing(inner)
    same = here.folders[0].casefold() == folder.name.casefold()
    return inner if not below.images and len(below.folders) > (0 if same else 1) else folder


def _check_parts(place: Path, folders: dict[str, Path], listing: List, request: Request) -> None:
    """Raise DataError if a part that is needed is missing."""
    if request.need == ANYTHING or (request.need == HELD_OUT and len(folders) > ("train" in folders)):
        return
    here = listing(place)
    shown = " and ".join(f"{folder.relative_to(place)}/ ({_count(listing(folder).folders, 'folder')})"
                         for folder in folders.values())
    used = {folder.relative_to(place).parts[0] for folder in folders.values()}
    rest = here._replace(folders=tuple(name for name in here.folders if name not in used))
    verb = "is" if sum(map(len, rest)) == 1 else "are"
    others = f" (there {verb} also {contents(rest)})" if any(rest) else ""
    if "train" not in folders:
        raise DataError(f"{located(place)} contains {shown} but no train/ to train on{others}. To evaluate a model on it, add "
                        "--eval_only; to train, set --data_dir to the folder that contains train/ and val/")
    if len(folders) == 1 and not request.draws:
        raise DataError(f"{located(place)} contains {shown} but no val/ or test/ with class folders{others}. Add {HOLD_OUT}")


def _describe_folders(root: Path, folders: dict[str, Path], request: Request) -> list[str]:
    """Return notes on which folder is used for what, unless they are just train/ and val/ (and test/)."""
    lone_test = "train" in folders and "test" in folders and "val" not in folders
    plain = all(folder == root / role for role, folder in folders.items()) and {"train", "val"} <= folders.keys()
    if plain:
        return []
    means = {"train": "to train on", "val": "to validate on", "test": "to test on"}
    if request.need == HELD_OUT:
        means = dict.fromkeys(("val", "test"), "to evaluate")
    parts = [f"{folder.relative_to(root)}/ {means[role]}" for role, folder in folders.items() if role in means]
    if request.test_fraction:
        parts = [" and ".join(f"{folder.relative_to(root)}/" for folder in folders.values()) + ", to draw a test set from"]
    notes = [f"using: {', '.join(parts)} (in {root})"]
    if lone_test and not request.draws and request.need == TRAIN:
        notes.append(chosen_on_test("the test set"))
    return notes


def chosen_on_test(what: str) -> str:
    return (f"best.pt is chosen on {what}, because nothing else is held out. --val_fraction 0.1 (VAL_FRACTION=0.1) would hold "
            "out a tenth of train for that")


# --------------------------------------------------------------------------------------------------- a tree without splits


def _without_splits(root: Path, place: Path, listing: List, request: Request) -> Layout:
    here = listing(place)
    if not here.folders:
        holds = f"contains {contents(here)} but no train/ and val/, and no class folders" if any(here) else NOTHING
        raise DataError(f"{located(place)} {holds}. Set --data_dir to the folder that contains them, with one folder per class"
                        + _advice(here))
    notes = []
    if not (request.classes.wanted and set(here.folders) <= set(request.classes.wanted)):
        _check_levels(place, here, listing, request)
        _check_depth(place, listing)
        notes += _classes_named_as_splits(place, here)
    if request.need == TRAIN and not request.draws:
        if len(here.folders) == 1:
            raise DataError(f"{located(place)} contains one folder ({here.folders[0]}) but no train/ and val/. Set --data_dir to "
                            "the folder that contains them, with one folder per class")
        raise DataError(f"{located(place)} contains {_count(here.folders, 'folder')} but no train/ and val/ "
                        f"({abbreviate(here.folders)}). If the folders are classes, add {HOLD_OUT}. Otherwise set "
                        "--data_dir to the folder that contains train/ and val/")
    notes += [f"using: the {_count(here.folders, 'folder')} of {place}/ as classes"] if place != root else []
    if request.need == HELD_OUT and not request.draws:
        notes.append(f"using: all images of {place}/, which has no train/ and val/")
    return Layout({"train": place}, True, notes=tuple(notes))


def _classes_named_as_splits(place: Path, here: Listing) -> list[str]:
    """Return warnings about classes with the name of a split. A folder train may be a class, pictures of trains, as well as a
    split. Raises DataError for val and test, which nobody calls a class."""
    called = {name: SPLIT_NAME.fullmatch(name) for name in here.folders}
    plain = [name for name, match in called.items() if match and name.casefold() in ROLE and ROLE[name.casefold()] != "train"]
    if plain:
        others = abbreviate(name for name in here.folders if name not in plain)
        raise DataError(f"{located(place)}: {plain[0]}/ has the name of a split, but contains images and no class folders, like "
                        f"{others} next to it. Rename it if it is a class; otherwise move it out of {place}")
    return [f"warning: {place / name}/ is used as a class, like the {len(here.folders) - 1} folders next to it. If it is not a "
            "class, move it elsewhere" for name, match in called.items() if match and not match[1]]


def _check_levels(place: Path, here: Listing, listing: List, request: Request) -> None:
    """Raise DataError if the classes may also be one level deeper: Dataset/0 ... Dataset/9 next to Examples/; or color/... next
    to gray/..., fold1/... next to fold2/..., with mostly the same folders in each."""
    inner = {name: listing(place / name) for name in here.folders}
    outer = [name for name, one in inner.items() if one.folders and not one.images]
    below = {name: inner[name].folders for name in outer}
    counts = Counter(name for names in below.values() for name in names)
    shared = [name for name, count in counts.items() if count > 1]
    several = [name for name in outer if len(below[name]) > 1]
    alike = bool(len(shared) > 1 and several) and (
        2 * sum(counts[name] for name in shared) >= counts.total() and 2 * len(outer) > len(inner))
    if not alike and not (len(several) == 1 and len(inner) > 1 and len(below[several[0]]) > len(inner) - 1):
        return
    largest = max(several, key=lambda name: len(below[name]))
    together = f", or merge those of {abbreviate(outer)} in one folder" if alike else ""
    move = f"{place / 'val'}" if request.need == HELD_OUT else f"{place / 'train'} and add --val_fraction 0.1"
    raise DataError(f"{located(place)}: it is unclear which folders are the classes. If they are the {len(below[largest])} in "
                    f"{largest} ({abbreviate(below[largest])}), set --data_dir {place / largest}{together}. If they are the "
                    f"{_count(here.folders, 'folder')} {abbreviate(here.folders)}, move them into {move}")


def _check_depth(place: Path, listing: List) -> None:
    """Raise DataError if train/ and val/ are deeper than MAX_OUTER single folders inside `place`."""
    inner = place
    for _ in range(MAX_DEPTH):
        if len(listing(inner).folders) != 1 or listing(inner).images:
            return
        inner = inner / listing(inner).folders[0]
        roles = split_names(listing(inner).folders)
        if len(roles) > 1:
            names = " and ".join(f"{same[0]}/" for same in roles.values())
            raise DataError(f"{located(place)} does not contain {names} directly; they are in {inner}. Set --data_dir {inner}")


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'s' * (len(names) != 1)}"


def contents(here: Listing) -> str:
    """Describe what a folder contains."""
    parts = [f"{_count(here.folders, 'folder')} ({abbreviate(here.folders)})"] if here.folders else []
    parts += [_count(here.images, "image")] if here.images else []
    parts += [f"{_count(here.files, 'other file')} ({abbreviate(here.files)})"] if here.files else []
    return " and ".join(parts) or "nothing"


def _advice(here: Listing) -> str:
    names = [name.lower() for name in here.files]
    if any(name.endswith((".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar")) for name in names):
        return ". Unpack the archive first"
    if any(name.endswith((".csv", ".tsv")) for name in names):
        return ". For images named in a list use --dataset csv"
    return ". Sort the images into one folder per class first" if here.images else ""
