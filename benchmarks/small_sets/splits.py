"""New splits of a data set of class folders: all images of train/ and val/ in one pool, drawn again class by class."""

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
    """Links the images of a new split into out/train/CLASS and out/val/CLASS.

    Of each class val keeps its size; train gets `per_class` images, or its old size (None; also where there are fewer). The same
    draw has the same val for every size, and the larger train holds the smaller one. Raises ValueError where a folder is missing.
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
    """Raises ValueError where train/ and val/ are not there with the same classes."""
    found = []
    for part in PARTS:
        if not (source / part).is_dir():
            raise ValueError(f"{source}: no folder {part}/; expected class folders in train/ and val/")
        found.append(sorted(path.name for path in (source / part).iterdir() if path.is_dir()))
    if found[0] != found[1] or not found[0]:
        raise ValueError(f"{source}: train/ and val/ must have the same class folders")
    return found[0]
