"""A data set in folders: one folder a class."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .image_files import IMAGE_EXTENSIONS, FileImages
from .splits import DataError, Splits, abbreviate


def folder(data_dir: str, classes_wanted: int | None = None) -> Splits:
    """DATA_DIR/train/CLASS/... and DATA_DIR/val/CLASS/...: the folders of train are the classes, none of them empty. In val
    a class may be missing or empty; another one there is refused, since one of the two is named wrongly.

    With class folders in DATA_DIR/test too that is the test set, and `val` is what is chosen on. (ImageNet's test/ has none,
    nor labels.) DATA_DIR/CLASS/... alone, without train/ and val/, gives everything as `train` and an empty `test`.
    """
    roots = {split: Path(data_dir) / split for split in ("train", "val")}
    if all(root.is_dir() for root in roots.values()) and classes_wanted is None and class_folders(Path(data_dir) / "test"):
        roots["test"] = Path(data_dir) / "test"
    whole = classes_wanted is None and not any(root.is_dir() for root in roots.values()) and bool(class_folders(Path(data_dir)))
    roots = {"train": Path(data_dir)} if whole else roots
    classes = {split: _class_folders(root, data_dir) for split, root in roots.items()}
    names = classes["train"]
    for other in classes:
        if set(classes[other]) - set(names):
            only = [f"only in {one}: {abbreviate(set(classes[one]) - set(classes[two]))}"
                    for one, two in (("train", other), (other, "train")) if set(classes[one]) - set(classes[two])]
            raise DataError(f"{data_dir}: train and {other} have different classes ({'; '.join(only)})")
    if classes_wanted not in (None, len(names)):
        raise DataError(f"{data_dir} has {len(names)} classes, not {classes_wanted}: for other images take --dataset folder")
    images = {}
    for split, root in roots.items():
        samples = [(path, label) for label, name in enumerate(names) for path in _images_below(root / name)]
        images[split] = FileImages(samples, data_dir)
        counts = np.bincount(images[split].targets, minlength=len(names))
        if not (counts.all() if split == "train" else counts.any()):
            empty = abbreviate(names[label] for label in np.flatnonzero(counts == 0))
            other = " (DATA_DIR has neither train/ nor val/, so that its folders are taken for classes)" if whole else ""
            raise DataError(f"{root}: no images ({', '.join(IMAGE_EXTENSIONS)}) of class {empty}{other}")
    val = images.get("val", FileImages([]))
    return Splits(images["train"], val, images.get("test", val), "val" if "test" in images else "test", tuple(names))


def _class_folders(root: Path, data_dir: str) -> list[str]:
    if not root.is_dir():
        raise DataError(f"no such folder: {root} (--data_dir {data_dir} must hold train/ and val/, with one folder a class)")
    names = class_folders(root)
    if not names and any(entry.suffix.lower() in IMAGE_EXTENSIONS for entry in root.iterdir()):
        raise DataError(f"{root} holds images but no class folders: sort them into one folder a class first "
                        "(ImageNet's validation images are published unsorted, with their labels in a list)")
    if not names:
        raise DataError(f"{root} holds no class folders (one folder a class, with its images inside)")
    return names


def class_folders(root: Path) -> list[str]:
    entries = root.iterdir() if root.is_dir() else ()
    return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _images_below(top: Path) -> list[str]:
    """Image files at any depth, folder by folder. Hidden ones (.ipynb_checkpoints, and the ._NAME.jpg that macOS writes
    beside a file) are skipped, which torchvision takes."""
    return [os.path.join(root, name) for root, names in sorted(files_below(top)) for name in sorted(names)
            if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")]


def files_below(top: str | Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files), every folder once: by its own path, else by the first link to it in alphabetical order,
    or links among folders would multiply the files. Hidden folders, and links to an enclosing folder, are skipped."""
    seen, starts = set(), [str(top)]
    while starts:
        links = []
        for root, folders, names in (step for start in starts for step in os.walk(start)):
            real = os.path.realpath(root)
            folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]
            if real not in seen:
                seen.add(real)
                yield root, names
            inside = [os.path.join(place, "") for place in (os.path.realpath(top), real)]
            links += [path for name in folders if os.path.islink(path := os.path.join(root, name)) and not any(
                place.startswith(os.path.join(os.path.realpath(path), "")) for place in inside)]
        starts = sorted(links)
