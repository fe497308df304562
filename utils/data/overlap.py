"""Images that are in two splits, or in two classes: by the files that they are, and by their bytes."""

import dataclasses
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from .image_files import FileImages
from .splits import Splits, Subset

SAMPLE = 64                 # sizes that are compared
FEW = 32                    # files of a folder that are asked for one by one; for more its listing is read


# ------------------------------------------------------------------------------------------------ before and after a draw


def real_paths(paths: Sequence[str]) -> list[str]:
    """The paths beyond all links. Asks the file system once a folder, and for each file that is a link."""
    divided = [os.path.split(path) for path in paths]
    folders: dict[str, set[str]] = defaultdict(set)
    for folder, name in divided:
        folders[folder].add(name)
    known = {folder: (os.path.realpath(folder), _links(folder, names)) for folder, names in folders.items()}
    found = []
    for folder, name in divided:
        real, links = known[folder]
        found.append(os.path.realpath(os.path.join(folder, name)) if name in links else os.path.join(real, name))
    return found


def _links(folder: str, names: set[str]) -> set[str]:
    if len(names) <= FEW:
        return {name for name in names if os.path.islink(os.path.join(folder, name))}
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_symlink()}
    except OSError:
        return set()


def each_file_once(splits: Splits, pooled: bool, what: str) -> tuple[Splits, dict[str, str]]:
    """Without the images of a file and label that are taken already: a share would hold out what is trained on.

    pooled: the share is drawn from all images, and not from train alone. what: what names them, such as "rows".
    -> (the splits, the file by image name, of files that stay under several labels)
    """
    parts = {id(split): split for split in (splits.train, splits.val, splits.test)[:3 if pooled else 1] if len(split)}
    seen, taken, files = set(), {}, {}
    for key, split in parts.items():
        files[key], chosen = _files(split), []
        for index, image in enumerate(zip(files[key], split.targets.tolist())):
            if image not in seen:
                seen.add(image)
                chosen.append(index)
        taken[key] = split if len(chosen) == len(split) else Subset(split, chosen)
    total, labels = sum(map(len, parts.values())), Counter(file for file, _ in seen)
    unclear = {} if len(labels) == len(seen) else {
        parts[key].name(index): file for key, own in files.items() for index, file in enumerate(own) if labels[file] > 1}
    if len(seen) == total:
        return splits, unclear
    note = (f"{'all parts together' if len(parts) > 1 else 'train'}: {total:,} {what} name {len(labels):,} files: each is taken "
            f"once{' for each of its labels' * bool(unclear)}, since a share is held out")
    train, val, test = (taken.get(id(split), split) for split in (splits.train, splits.val, splits.test))
    return dataclasses.replace(splits, train=train, val=val, test=test, notes=(*splits.notes, note)), unclear


def _files(split: Dataset) -> list[str]:
    """What identifies the file of each image; of a prepared one, its name."""
    if isinstance(split, FileImages):
        return real_paths([path for path, _ in split.samples])
    return [split.name(index) for index in range(len(split))]


def drawn_from_trained(splits: Splits, part: str, files: Mapping[str, str]) -> list[str]:
    """A warning where the share `part` has files that are in train too. files: by image name, as each_file_once has them."""
    if not files:
        return []
    trained, held = ({name: files[name] for name in map(split.name, range(len(split))) if name in files}
                     for split in (splits.train, getattr(splits, part)))
    names = {file: name for name, file in trained.items()}
    both = [name for name, file in held.items() if file in names]
    if not both:
        return []
    return [f"warning: {len(both):,} of the {len(getattr(splits, part)):,} images held out for {part} are training images under "
            f"another label: such as {both[0]}, which is {names[held[both[0]]]} in train. Results on them mean little: keep one "
            "label a file"]


# -------------------------------------------------------------------------------------------------- own splits of the data


def shared_files(images: Mapping[str, FileImages], files: Mapping[str, Sequence[str]], classes: Sequence[str]) -> list[str]:
    """Warnings of one file in train and a held-out split, or under two labels. files: what identifies each image, by split."""
    notes, trained = [], {}
    for split, own in files.items():
        labels: dict[str, int] = {}
        two = [index for index, file in enumerate(own)
               if images[split].targets[labels.setdefault(file, index)] != images[split].targets[index]]
        if two:
            first = labels[own[two[0]]]
            notes.append(f"warning: {len(two):,} image{'s' * (len(two) > 1)} of {split} under two labels: such as "
                         f"{images[split].name(first)} ({classes[images[split].targets[first]]}), which is "
                         f"{images[split].name(two[0])} ({classes[images[split].targets[two[0]]]})")
        trained = labels if split == "train" else trained
    for split in (split for split in files if split != "train" and trained):
        same = [index for index, file in enumerate(files[split]) if file in trained]
        if same:
            part = "all of" if len(same) == len(files[split]) else f"{len(same):,} of"
            notes.append(f"warning: {part} {split}'s {len(files[split]):,} images are training images: such as "
                         f"{images[split].name(same[0])}, which is {images['train'].name(trained[files[split][same[0]]])}. "
                         "Results on them mean little")
    return notes


def seems_copied(images: Mapping[str, FileImages], roots: Mapping[str, Path]) -> list[str]:
    """A warning where each image of a held-out split has the class and name of one of train, and in a sample its size too."""
    if "train" not in images:
        return []
    inside = {split: {path[len(str(roots[split])) + 1:]: path for path, _ in own.samples} for split, own in images.items()}
    notes = []
    for split in (split for split in images if split != "train"):
        names = list(inside[split])
        if not names or not inside[split].keys() <= inside["train"].keys():
            continue
        chosen = [names[number * len(names) // min(len(names), SAMPLE)] for number in range(min(len(names), SAMPLE))]
        sizes = [[os.path.getsize(inside[part][name]) for name in chosen] for part in ("train", split)]
        if sizes[0] == sizes[1] and len(set(sizes[0])) > 1:
            notes.append(f"warning: every image of {split} has the name, class and size of one of train: is it a copy? Results "
                         "on training images mean little; python dataset.py check compares the bytes")
    return notes


def same_bytes(digests: Mapping[int, bytes], targets: np.ndarray, train_images: int, name_of: Callable[[int], str]) -> list[str]:
    """Lines about images that are equal byte by byte. digests, targets: by place, those of train first."""
    lines, first = [], {}
    for place in sorted(digests):
        first.setdefault(digests[place], place)
    held_out = [place for place in sorted(digests) if place >= train_images]
    twice = [place for place in held_out if first[digests[place]] < train_images]
    if twice:
        part = "all " if len(twice) == len(held_out) else ""
        lines.append(f"{part}{len(twice):,} held-out images are in train too, byte by byte, so that results on them mean little: "
                     f"such as {name_of(twice[0])}, which is {name_of(first[digests[twice[0]]])}")
    two = [place for place in sorted(digests) if targets[place] != targets[first[digests[place]]]]
    if two:
        lines.append(f"{len(two):,} images are in two classes, byte by byte: such as {name_of(two[0])}, which is "
                     f"{name_of(first[digests[two[0]]])}")
    return lines
