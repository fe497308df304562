"""Draw new splits of a data set of class folders: all images of train/ and val/ in one pool, class by class."""

import dataclasses
import random
from pathlib import Path

PARTS = ("train", "val")


@dataclasses.dataclass(frozen=True)
class Split:
    folder: Path
    train: int             # images
    held_out: int
    classes: int


def draw_split(source: Path, out: Path, draw: int, per_class: int | None) -> Split:
    """Link the images of a new split into out/train/CLASS and out/val/CLASS.

    In each class val keeps its size; train gets `per_class` images, or its old size (None; also if there are fewer). The same
    draw has the same val for every size, and a larger train contains the smaller one. Raises ValueError if a folder is missing.
    """
    counts, classes = dict.fromkeys(PARTS, 0), class_names(source)
    for name in classes:
        parts = {part: sorted(path for path in (source / part / name).iterdir() if path.is_file()) for part in PARTS}
        images = [(part, path) for part in PARTS for path in parts[part]]
        random.Random(f"{draw} {name}").shuffle(images)
        held_out = len(parts["val"])
        drawn = {"val": images[:held_out], "train": images[held_out:][:per_class]}
        for part, chosen in drawn.items():
            target = out / part / name
            target.mkdir(parents=True)
            for old, path in chosen:                                   # files of both parts may have the same name
                (target / f"{old}_{path.name}").symlink_to(path.resolve())
            counts[part] += len(chosen)
    return Split(out, counts["train"], counts["val"], len(classes))


def class_names(source: Path) -> list[str]:
    """Return the names of the classes. Raises ValueError if train/ and val/ do not both exist with the same classes."""
    found = []
    for part in PARTS:
        if not (source / part).is_dir():
            raise ValueError(f"--sets: {source} has no folder {part}/. Expected class folders in train/ and val/")
        found.append(sorted(path.name for path in (source / part).iterdir() if path.is_dir()))
    if found[0] != found[1] or not found[0]:
        raise ValueError(f"--sets: train/ and val/ of {source} must have the same class folders")
    return found[0]
