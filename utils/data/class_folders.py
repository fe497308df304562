"""A data set with one folder per class. layouts.py decides which folders are the splits."""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import layouts, overlap
from .classes import Classes
from .image_files import (
    FIRST_EXTENSIONS,
    IMAGE_EXTENSIONS,
    FileImages,
    describe_broken_links,
    entries,
    existing_images,
    shown,
    splits_in_files,
)
from .layouts import BY_DEFAULT, HELD_OUT, Layout, Listing, Request, is_hidden
from .splits import DataError, Splits, abbreviate

# Extensions of images that cannot be read: skipping those is worth a warning, skipping lists and the like is not.
OTHER_PICTURES = (".avif", ".jxl", ".jp2", ".j2k", ".tga", ".psd", ".svg", ".ico", ".raw", ".cr2", ".cr3",
                  ".nef", ".arw", ".dng", ".exr", ".hdr", ".pfm", ".dcm", ".npy", ".mat", *IMAGE_EXTENSIONS)
SHOWN_ENDINGS = 8
SYNSET_DIGITS = 8


@dataclasses.dataclass
class Scan:
    """Lists folders, and collects what they hold besides images."""

    endings: tuple[str, ...]
    others: Counter = dataclasses.field(default_factory=Counter)       # other files, by lower-case extension
    gone: list[str] = dataclasses.field(default_factory=list)          # broken links
    linked: bool = False                                               # a file or folder is reached through a link
    systems: set[str] = dataclasses.field(default_factory=set)         # folders that operating systems make

    def is_image(self, name: str) -> bool:
        return name.lower().endswith(self.endings) and not name.startswith(".")

    def listing(self, folder: Path) -> Listing:
        names = {True: [], False: []}
        for entry in entries(folder):
            if not is_hidden(entry.name):
                names[entry.is_dir()].append(entry.name)
            elif not entry.name.startswith("."):
                self.systems.add(entry.name)
        files = sorted(names[False])
        return Listing(tuple(sorted(names[True])), tuple(name for name in files if self.is_image(name)),
                       tuple(name for name in files if not self.is_image(name)))

    def images_below(self, top: str) -> list[str]:
        """Return the paths of image files at any depth, folder by folder. Skips hidden ones (.ipynb_checkpoints, and the
        ._NAME.jpg that macOS adds), which torchvision would use."""
        found = []
        for folder in sorted(files_below(top)):
            self.linked |= folder.linked
            for name in sorted(folder.names):
                if self.is_image(name):
                    found.append(os.path.join(folder.path, name))
                elif not name.startswith("."):
                    self.others[os.path.splitext(name)[1].lower()] += 1
            self.gone += [path for path in sorted(folder.gone)
                          if self.is_image(name := os.path.basename(path)) or not (os.path.splitext(name)[1] or name[0] == ".")]
        return found


def folder(data_dir: str, request: Request = BY_DEFAULT, synsets: int | None = None) -> Splits:
    """Load a data set whose classes are the folders of train, none of them empty. In val a class may be missing or empty; a
    class that train does not have is an error, since one of the two is probably misspelled.

    Where layouts.find finds a third split, it is the test set, and `val` chooses the best checkpoint. A tree without splits is
    all `train`, with an empty `test`; or all held out, for an evaluation that draws no split. synsets: the number of classes
    required, named like ImageNet's.

    Raises DataError.
    """
    first = request.classes.order is None                # a run of an older version: the same images, and no new errors
    scan = Scan(FIRST_EXTENSIONS if first else IMAGE_EXTENSIONS)
    listing = functools.cache(scan.listing)
    layout = layouts.find(data_dir, listing, request)
    if layout.whole and request.need == HELD_OUT and not request.draws:
        layout = layout._replace(folders={"val": layout.folders["train"]})
    elif layout.whole and synsets:
        raise DataError(f"no such folder: {Path(data_dir, 'train')} (--data_dir {data_dir} must contain train/ and val/, with "
                        "one folder per class)")
    if not first:
        scan.gone += [str(root / name) for root in layout.folders.values() for name in listing(root).files
                      if "." not in name and not os.path.exists(root / name)]
        _check_gone(scan)
    trees = {split: root for split, root in layout.folders.items() if not (split == "val" and layout.val_list)}
    found = {split: _class_names(root, listing(root)) for split, root in trees.items()}
    rows = list(_list_rows(layout.val_list)) if layout.val_list else []
    if layout.val_list:
        found["val"] = tuple(sorted({label for _, _, label in rows}))
    empty = _remove_empty(found, trees, request, scan)
    classes = _classes_of(found, layout, data_dir, request, synsets)
    images = {}
    for split, root in layout.folders.items():
        images[split] = (_images_of(root, found[split], classes, data_dir, scan) if split in trees else
                         _listed(layout.val_list, rows, classes, data_dir))
        _check_counts(split, root, images[split], classes, layout.whole, scan.endings)
    notes = [*layout.notes, *classes.notes, *empty, *_images_outside_classes(trees, listing), *_skipped_files(scan)]
    if not first:
        _check_gone(scan)
        if scan.linked:
            notes += overlap.shared_images(images, classes.names, lambda split, index: shown(images[split].name(index)))
        notes += overlap.seems_copied(images, layout.folders)
    return splits_in_files(images, data_dir, classes.names, notes)


def check_layout(data_dir: str, request: Request = BY_DEFAULT) -> None:
    """Raise DataError, as `folder` does, if there are no splits or no class folders. Lists the outer folders only."""
    layouts.find(data_dir, functools.cache(Scan(IMAGE_EXTENSIONS).listing), request)


def _remove_empty(found: dict[str, tuple[str, ...]], trees: dict[str, Path], request: Request, scan: Scan) -> list[str]:
    """Remove from `found` empty held-out folders that are no class of train or of the checkpoint -> warnings"""
    known, notes = Classes(request.classes, found.get("train", ())), []
    for split in [split for split in trees if split != "train"] if known.names else ():
        root = trees[split]
        empty = [name for name in found[split] if known.label(name) is None and not scan.images_below(os.path.join(root, name))]
        found[split] = tuple(name for name in found[split] if name not in empty)
        notes += [f"warning: {shown(os.path.join(root, name))}/ is skipped: it contains no images, and train has no class of "
                  "this name" for name in empty]
    return notes


def _classes_of(found: dict[str, tuple[str, ...]], layout: Layout, data_dir: str, request: Request,
                synsets: int | None) -> Classes:
    """Return the classes for the names of class folders, by split. Raises DataError for names that do not fit."""
    classes = Classes(request.classes, found.get("train") or set().union(*found.values()))
    classes.check(data_dir)
    if synsets:
        _check_synsets(classes.names, synsets, data_dir)
    for split, own in found.items():
        if unknown := [name for name in own if classes.label(name) is None]:
            raise DataError(f"{data_dir}: train and {split} have different classes (only in {layout.folders[split].name}: "
                            f"{classes.describe(unknown)})")
    return classes


def _check_gone(scan: Scan) -> None:
    if scan.gone:
        raise DataError(describe_broken_links(scan.gone))


def _class_names(root: Path, here: Listing) -> tuple[str, ...]:
    if not here.folders and here.images:
        raise DataError(f"{root} contains images but no class folders. Sort the images into one folder per class first "
                        "(ImageNet's validation images are published unsorted, with their labels in a list)")
    if not any(here):
        raise DataError(f"{root} {layouts.NOTHING}. It must contain one folder per class, with its images inside")
    if not here.folders:
        raise DataError(f"{root} contains {layouts.contents(here)} but no class folders (one folder per class, with its images "
                        "inside)")
    return here.folders


def _images_of(root: Path, names: Sequence[str], classes: Classes, data_dir: str, scan: Scan) -> FileImages:
    """Return the images of a split, class by class."""
    scan.linked |= os.path.realpath(root) != os.path.join(os.path.realpath(data_dir), os.path.relpath(root, data_dir))
    named = sorted((classes.label(name), name) for name in names)
    return FileImages([(path, label) for label, name in named for path in scan.images_below(os.path.join(root, name))], data_dir)


def _check_counts(split: str, root: Path, images: FileImages, classes: Classes, whole: bool, endings: Sequence[str]) -> None:
    counts = np.bincount(images.targets, minlength=len(classes.names))
    if not (counts.all() if split == "train" else counts.any()):
        empty = abbreviate(classes.names[label] for label in np.flatnonzero(counts == 0))
        other = " (DATA_DIR has neither train/ nor val/, so its folders are read as classes)" if whole else ""
        raise DataError(f"{root}: no images ({', '.join(endings)}) of class {empty}{other}")


def _check_synsets(names: Sequence[str], count: int, data_dir: str) -> None:
    if len(names) != count:
        raise DataError(f"{data_dir} has {len(names)} classes, not {count}. For other images use --dataset folder")
    others = [name for name in names if not (name[0] == "n" and name[1:].isdecimal() and len(name) == 1 + SYNSET_DIGITS)]
    if others:
        raise DataError(f"{data_dir}: ImageNet's class folders have names like n01440764, which put the classes in the order of "
                        f"published heads, but here are {abbreviate(others)}. For other images use --dataset folder")


def _list_rows(file: Path) -> Iterator[tuple[int, str, str]]:
    """Read Tiny-ImageNet's list -> (line number, image, class) of each row"""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text ({error})") from error
    for number, line in enumerate(lines, 1):
        words = line.split("\t")
        if line.strip():
            if len(words) < 2 or not (words[0].strip() and words[1].strip()):
                raise DataError(f"{file}:{number}: expected an image and its class, separated by a tab")
            yield number, words[0].strip(), words[1].strip()


def _listed(file: Path, rows: list[tuple[int, str, str]], classes: Classes, data_dir: str) -> FileImages:
    inner = file.parent / "images"
    place = inner if inner.is_dir() else file.parent
    samples = [(str(place / image), classes.label(label)) for _, image, label in rows]
    return existing_images(samples, data_dir, lambda row: f"{file}:{rows[row][0]}")


def _images_outside_classes(trees: dict[str, Path], listing: layouts.List) -> Iterator[str]:
    for root in trees.values():
        if names := listing(root).images:
            yield (f"warning: {root}/ contains {len(names)} image{'s' * (len(names) > 1)} outside its class folders, skipped "
                   f"because they have no class: {shown(abbreviate(names))}")


def _skipped_files(scan: Scan) -> Iterator[str]:
    """Yield notes on what the folders contain besides images; files by extension, the most frequent first."""
    if scan.systems:
        yield f"skipped: {', '.join(f'{name}/' for name in sorted(scan.systems))} (made by operating systems)"
    yield from describe_skipped(scan.others, scan.endings)


def describe_skipped(others: Counter, supported: Sequence[str]) -> Iterator[str]:
    """Yield notes on files that are not images by their extension. others: the number of files by lower-case extension."""
    pictures = {ending: count for ending, count in others.items() if ending in OTHER_PICTURES or not ending}
    for found, begin in ((pictures, "warning: skipped because of their extension: "),
                         (others - Counter(pictures), "skipped, not images by their extension: ")):
        endings = sorted(found, key=lambda ending: (-found[ending], ending))
        counts = [f"{found[ending]:,} {shown(ending)[:20] or 'without one'}" for ending in endings[:SHOWN_ENDINGS]]
        if len(endings) > SHOWN_ENDINGS:
            counts.append(f"{sum(found[ending] for ending in endings[SHOWN_ENDINGS:]):,} with other extensions")
        if counts:
            yield begin + ", ".join(counts) + (f" (supported: {', '.join(supported)})" if found is pictures else "")


# ------------------------------------------------------------------------------------------------------ the file system


class Folder(NamedTuple):
    path: str
    names: list[str]            # its files
    gone: list[str]             # the paths of its broken links
    linked: bool                # it, or a file in it, is reached through a link


def files_below(top: str | Path) -> Iterator[Folder]:
    """Yield every folder below `top` once, so that links between folders do not multiply the files: by its own path, else by the
    first link to it in alphabetical order. Skips hidden folders, and links to an enclosing folder."""
    seen, starts, begin, linked = set(), [str(top)], os.path.realpath(top), os.path.islink(top)
    while starts:
        links, inside = [], starts[::-1]
        while inside:
            root = inside.pop()
            real = os.path.realpath(root)
            if real in seen:
                continue
            seen.add(real)
            names, gone, has_links = [], [], False
            places = [os.path.join(place, "") for place in (begin, real)]
            for entry in entries(root):
                if not entry.is_dir():
                    names.append(entry.name)
                    if entry.is_symlink():
                        has_links = True
                        gone += [entry.path] if not (entry.is_file() or os.path.exists(entry.path)) else []
                elif entry.is_symlink() and not is_hidden(entry.name):
                    target = os.path.join(os.path.realpath(entry.path), "")
                    links += [] if any(place.startswith(target) for place in places) else [entry.path]
                elif not is_hidden(entry.name):
                    inside.append(entry.path)
            yield Folder(root, names, gone, linked or has_links)
        starts, linked = sorted(links), True


def picture_files(top: str | Path) -> list[str]:
    """Return the image files below a folder, without hidden ones, sorted by path."""
    return sorted(Scan(IMAGE_EXTENSIONS).images_below(str(top)), key=lambda path: Path(path).parts)
