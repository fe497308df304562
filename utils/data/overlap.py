"""Finds images that are in two splits or two classes: by the path of their file, or by its bytes."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch.utils.data import Dataset

from utils import launch

from .classes import shown_name
from .image_files import FileImages, counted, shown
from .listed_files import FEW, join_path, split_path
from .splits import Splits, Subset

SAMPLE = 64                 # sizes that are compared


def real_paths(paths: Sequence[str]) -> list[str]:
    """Resolve all links in the paths, with one request to the file system per folder and one per link."""
    divided = [split_path(path) for path in paths]
    folders: dict[str, set[str]] = defaultdict(set)
    for folder, name in divided:
        folders[folder].add(name)
    links = {folder: _links(folder, names) for folder, names in folders.items()}
    real_folder = {folder: os.path.realpath(folder) for folder in folders}
    found = [join_path(real_folder[folder], name) for folder, name in divided]
    linked = [number for number, (folder, name) in enumerate(divided) if name in links[folder]]
    if linked:                                  # realpath of each file would check every folder above it
        targets = [join_path(real_folder[divided[number][0]], os.readlink(found[number])) for number in linked]
        for number, path in zip(linked, real_paths(targets)):
            found[number] = path
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
    """Remove images with the same file and label as one before them: a drawn split could hold out what is trained on.

    pooled: the split is drawn from all images, not only from train. what: what lists the images, such as "rows".
    -> (the splits, {image name: file} for files that remain under several labels)
    """
    parts = {id(split): split for split in (splits.train, *splits.held_out.values())[:None if pooled else 1] if len(split)}
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
    note = (f"{'all parts together' if len(parts) > 1 else 'train'}: {total:,} {what} name {len(labels):,} files. Each file is "
            f"used once{' for each of its labels' * bool(unclear)}, so that none is both trained on and held out")
    return splits.changed(lambda split: taken.get(id(split), split)).replace(note), unclear


def _files(split: Dataset) -> list[str]:
    """Return what identifies the file of each image: its real path, or its name if it is a prepared one."""
    if isinstance(split, FileImages):
        split.files = split.files or real_paths([path for path, _ in split.samples])
        return split.files
    return [split.name(index) for index in range(len(split))]


def drawn_from_trained(splits: Splits, files: Mapping[str, str]) -> list[str]:
    """Return warnings about files that are both held out and in train. files: by image name, as each_file_once returns them."""
    images = {"train": splits.train, **splits.held_out} if files else {}
    names = {part: list(map(split.name, range(len(split)))) for part, split in images.items()}
    return in_two_splits({part: [files.get(name, name) for name in own] for part, own in names.items()},
                         lambda part, index: f"{shown(names[part][index])} ({splits.classes[images[part].targets[index]]})")


# ------------------------------------------------------------------------------------------------------- one image twice

# Arguments by split, train first: `images`, and `keys`, what identifies each image (its file, or a digest). name_of(split,
# index): what a message calls an image. `how`: how images were compared, if not by their files.


def shared_images(images: Mapping[str, Dataset], classes: Sequence[str], name_of: Callable[[str, int], str],
                  keys: Mapping[str, Sequence] | None = None, how: str = "") -> list[str]:
    """Return warnings about images under two labels or in two splits."""
    keys = keys or {split: _files(own) for split, own in images.items()}
    if len(set().union(*keys.values())) == sum(map(len, keys.values())):
        return []
    first, two = {}, []
    for split, own in keys.items():
        for index, (key, label) in enumerate(zip(own, images[split].targets.tolist())):
            before = first.setdefault(key, (split, index, label))
            if before[2] != label:
                two.append((before, (split, index, label)))
    lines = []
    if two:
        one, other = (f"{name_of(split, index)} ({shown_name(classes[label])})" for split, index, label in two[0])
        lines.append(f"warning: {counted(len(two), 'image')} under two labels{how}: for example {one} is {other}")
    return lines + in_two_splits(keys, name_of, how)


def in_two_splits(keys: Mapping[str, Sequence], name_of: Callable[[str, int], str], how: str = "") -> list[str]:
    """Return warnings about images that are also in an earlier split."""
    lines, first = [], {}
    for split, own in keys.items():
        shared: dict[str, list[int]] = defaultdict(list)
        for index, key in enumerate(own):
            before, _ = first.setdefault(key, (split, index))
            if before != split:
                shared[before].append(index)
        for other, same in shared.items():
            which = (f"the only {split} image" if len(own) == 1 else f"all {len(own):,} {split} images" if len(same) == len(own)
                     else f"{len(same):,} of the {len(own):,} {split} images")
            lines.append(f"warning: {which} {'is' if len(same) == 1 else 'are'} also in {other}{how}: for example "
                         f"{name_of(split, same[0])} is {name_of(*first[own[same[0]]])}. Results on them mean little")
    return lines


def seems_copied(images: Mapping[str, FileImages], roots: Mapping[str, Path]) -> list[str]:
    """Return a warning if every image of a held-out split has the class and name of one in train, and in a sample also its
    size."""
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
            notes.append(f"warning: every image of {split} has the name, class and size of one in train, so {split} may be a "
                         "copy. Results on training images mean little. To compare the bytes: "
                         f"{launch.command('dataset.py')} check")
    return notes
