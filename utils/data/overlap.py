"""Images that are in two splits, or in two classes: by what the scan of the folders knows, and by their bytes."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .image_files import FileImages

SAMPLE = 64                 # sizes that are compared


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
