"""Prepares a data set for prepared.py: decodes every image and makes it smaller, once.

The sizes of all images are read first: they determine where each image is stored and how much space is needed. Processes
then write the pixels and the digest of each image there, independently, so the bytes do not depend on the number of processes,
and an interrupted build can continue: an image that matches its digest is done. All of this happens in FOLDER.building, which
is renamed to FOLDER once it is on the disk.

Images are made smaller as in torchvision and in evaluation (bilinear, antialiased): with a shorter side of 256, evaluation with
--eval_crop 0.875 at 224 px sees the same as in the files, except for what their faster decoding omits (decode.py).
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image
from torch.utils.data import Dataset

from utils import process
from utils.files import LOCK_FILE, FileLock, StorageError, atomic_write, fsync_path, naming, write_file

from .image_files import FileImages, counted
from .prepared import FILE, FORMAT, ROW, describe, is_prepared
from .splits import DataError, ImageError, Splits, flags_to_skip
from .workers import WorkerError

CHUNK = 32                            # images that a process gets at a time
PLAN_FILE = "plan"                    # digest of everything the pixels depend on: a build continues only if it is the same
BAD_IMAGES_FILE = "bad_images.txt"


class Bad(NamedTuple):
    part: str
    index: int
    why: str


def build(splits: Splits, dataset: str, target: str | Path, size: int, workers: int, log: Callable[[str], None],
          skip: float = 0.0) -> None:
    """Prepare the data set's published splits in the folder `target`, with `workers` processes (at least one), or continue an
    interrupted build.

    size: of the shorter side, in pixels; smaller images keep their size. skip: the ratio of training images that may be skipped
    if they cannot be read. Raises DataError for other unreadable images, StorageError, InUseError, WorkerError.
    """
    target = Path(os.path.abspath(target))
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    if splits.val is splits.test:
        del parts["val"]
    _check(parts, dataset, target)
    building = target.with_name(f"{target.name}.building")
    try:
        building.mkdir(parents=True, exist_ok=True)
        lock = FileLock(building, "Wait for it, or prepare in another folder.")
        with contextlib.ExitStack() as stack:
            lock.acquire()
            stack.callback(lock.release)
            processes = ProcessPoolExecutor(max(1, workers), initializer=_init_process, initargs=(parts, size, building))
            stack.callback(processes.shutdown, cancel_futures=True)
            rows, bad, plan = _read_all_sizes(parts, processes)
            _check_bad(bad, len(splits.train), building, skip)
            _allocate_files(rows, building, target, repr(
                (FORMAT, PIL.__version__, dataset, splits.classes, size, splits.reading, plan)), log)
            tasks = [(name, start, own[start:start + CHUNK]) for name, own in rows.items() for start in range(0, len(own), CHUNK)]
            bad += [one for wrong in _results(processes, "preparing", _write_pixels, tasks) for one in wrong]
            _check_bad(bad, len(splits.train), building, skip)
            facts = {"format": FORMAT, "dataset": dataset, "size": size, "classes": list(splits.classes),
                     "can_flip": splits.can_flip, "val_name": splits.val_name, "reading": vars(splits.reading), "splits": {
                         name: _write_index(name, split, rows[name], bad, building) for name, split in parts.items()}}
            atomic_write(building / FILE, lambda file: file.write_text(describe(facts), encoding="utf-8"))
            os.rename(building, target)
            for name in (PLAN_FILE, *(f"{name}.digests" for name in parts), LOCK_FILE):
                (target / name).unlink()
            fsync_path(target.parent)
    except OSError as error:
        raise StorageError(f"cannot write {error.filename or building} ({error.strerror or error}). Finished images are kept in "
                           f"{building}; run the same command again to continue") from error
    except BrokenProcessPool as error:
        raise WorkerError("a process that reads images was killed or ran out of memory. Run the same command again to continue, "
                          "with fewer --num_workers to use less memory; python dataset.py check finds files that kill the "
                          "process that reads them") from error
    skipped = f", {len(bad):,} skipped ({target / BAD_IMAGES_FILE})" if bad else ""
    images = counted(sum(map(len, parts.values())) - len(bad), "image")
    log(f"{target}: {images}{skipped}. Train on them with --data_dir {target}")


def _check(parts: dict[str, Dataset], dataset: str, target: Path) -> None:
    if not all(isinstance(split, FileImages) for split in parts.values()):
        raise DataError(f"--dataset {dataset}: only images in files can be prepared, not images in memory or prepared already")
    if is_prepared(target):
        raise DataError(f"{target} is already prepared. Train on it with --data_dir {target}, or delete it")
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise DataError(f"{target} already exists. Delete it, or prepare in another folder")
    if target.is_symlink() or target.is_mount():            # the finished folder could not replace it
        raise DataError(f"{target} is a link or a mount point. Prepare in a folder inside it")
    for split in parts.values():
        if target.resolve().is_relative_to(split.root.resolve()) and len(split):
            raise DataError(f"{target} is inside the data set ({split.root}). Prepare in a folder outside")


def _check_bad(bad: list[Bad], train_images: int, building: Path, skip: float) -> None:
    """List the unreadable images in a file. Raises DataError unless they may be skipped."""
    file = building / BAD_IMAGES_FILE
    file.unlink(missing_ok=True)
    if not bad:
        return
    write_file(file, "".join(f"{one.why}\n" for one in bad), errors="backslashreplace")
    if len(bad) > skip * train_images or any(one.part != "train" for one in bad):
        first = bad[0].why + ", ..." * (len(bad) > 1)
        of_train = sum(one.part == "train" for one in bad)
        omit = f", or skip them with {flags_to_skip(of_train, train_images)} (validation and test images must be readable)"
        raise DataError(f"{counted(len(bad), 'image')} cannot be read: {first}; {file} lists them. Replace or remove them"
                        + omit * (of_train > 0))


# ---------------------------------------------------------------------------------------------------- the files


def _read_all_sizes(parts: dict[str, Dataset], processes: ProcessPoolExecutor) -> tuple[dict[str, np.ndarray], list[Bad], str]:
    """Read the size of every image -> (rows by split, without digests; images that cannot be opened, whose height is 0; a digest
    of names, labels, sizes and files)"""
    tasks = [(name, start) for name, split in parts.items() for start in range(0, len(split), CHUNK)]
    rows, bad, digest = {name: [np.empty(0, ROW)] for name in parts}, [], hashlib.sha256()
    for (name, start), (own, wrong, files) in zip(tasks, _results(processes, "reading sizes", _read_sizes, tasks)):
        rows[name].append(own)
        bad += wrong
        names = [parts[name].name(index) for index in range(start, start + len(own))]
        digest.update(repr((name, names, own.tobytes(), files)).encode("utf-8", "surrogateescape"))
    rows = {name: np.concatenate(own) for name, own in rows.items()}
    for own in rows.values():
        ends = np.cumsum(own["height"].astype(np.uint64) * own["width"] * 3)
        own["place"][1:] = ends[:-1]
    return rows, bad, digest.hexdigest()


def _bytes(rows: np.ndarray) -> int:
    return int((rows["height"].astype(np.uint64) * rows["width"] * 3).sum())


def _allocate_files(rows: dict[str, np.ndarray], building: Path, target: Path, plan: str, log: Callable[[str], None]) -> None:
    """Create the files at their full size; if the plan is the same, they keep their content. Raises StorageError."""
    files = {name: (building / f"{name}.pixels", building / f"{name}.digests") for name in rows}
    plan, known = hashlib.sha256(plan.encode("utf-8", "surrogateescape")).hexdigest(), building / PLAN_FILE
    total, count = sum(map(_bytes, rows.values())), sum(map(len, rows.values()))
    if not known.exists() or known.read_text(encoding="utf-8") != plan:
        for file in (known, *(file for pair in files.values() for file in pair)):
            file.unlink(missing_ok=True)
    taken = sum(pixels.stat().st_blocks * 512 for pixels, _ in files.values() if pixels.exists())
    free = shutil.disk_usage(building).free
    if total - taken > free:
        raise StorageError(f"{target} needs {total / 1e9:,.1f} GB, but {(free + taken) / 1e9:,.1f} GB are free there. "
                           "Prepare on another disk, or with a smaller --size")
    for name, (pixels, digests) in files.items():
        for file, length in ((pixels, _bytes(rows[name])), (digests, len(rows[name]) * 32)):
            with naming(file), open(file, "ab") as stream:
                stream.truncate(length)
    done = sum(int(np.fromfile(digests, np.uint8).reshape(-1, 32).any(axis=1).sum()) for _, digests in files.values())
    write_file(known, plan)
    size = f"{total / 1e9:,.1f} GB" if total >= 1e9 else f"{total / 1e6:,.0f} MB"
    log(f"{target}: {counted(count, 'image')}, {size}" + (f"; {done:,} already done" if done else ""))


def _write_index(name: str, split: Dataset, rows: np.ndarray, bad: list[Bad], building: Path) -> dict:
    """Write the index and flush the pixels to the disk -> the entry of the split in prepared.json"""
    pixels, index = building / f"{name}.pixels", building / f"{name}.index"
    rows["sha256"] = np.fromfile(building / f"{name}.digests", np.uint8).reshape(-1, 32)
    without = {one.index for one in bad if one.part == name}
    good = [number for number in range(len(rows)) if number not in without]
    assert rows["sha256"][good].any(axis=1).all()
    names = b"".join(split.name(number).encode("utf-8", "surrogateescape") + b"\0" for number in good)
    content = rows[good].tobytes() + names
    atomic_write(index, lambda file: file.write_bytes(content))
    fsync_path(pixels)
    return {"images": len(good), "bytes": pixels.stat().st_size, "sha256": hashlib.sha256(content).hexdigest()}


# ------------------------------------------------------------------------------------------------- the processes

_work: tuple[dict[str, FileImages], int, Path]           # in each process: the splits, the size, the folder


def _results(pool: ProcessPoolExecutor, what: str, function: Callable, tasks: list[tuple]) -> Iterator:
    """Yield function(*task) for every task, in their order, with a tqdm progress bar."""
    from tqdm import tqdm

    yield from tqdm(pool.map(function, *zip(*tasks)), total=len(tasks), unit_scale=CHUNK, unit="image", desc=what,
                    disable=None, **process.bar_size())


def _init_process(*work) -> None:
    global _work
    process.die_with_parent()
    process.ignore_signals()
    _work = work


def reduced(width: int, height: int, size: int) -> tuple[int, int]:
    """-> (width, height) with the shorter side `size`, never enlarged; rounded down as in torchvision's Resize."""
    if min(width, height) <= size:
        return width, height
    return (size * width // height, size) if width > height else (size, size * height // width)


def _read_sizes(name: str, start: int) -> tuple[np.ndarray, list[Bad], list[tuple[int, int]]]:
    """-> (rows with size and label, images that cannot be opened, sizes and modification times of the files). Decodes nothing."""
    parts, size, _ = _work
    split = parts[name]
    rows, bad, files = np.zeros(min(CHUNK, len(split) - start), ROW), [], []
    rows["label"] = split.targets[start:start + CHUNK]
    for number in range(len(rows)):
        try:
            rows["width"][number], rows["height"][number] = reduced(*split.dimensions(start + number), size)
            status = os.stat(split.samples[start + number][0])
            files.append((status.st_size, status.st_mtime_ns))
        except ImageError as error:
            bad.append(Bad(name, start + number, error.plain))
    return rows, bad, files


def _write_pixels(name: str, start: int, rows: np.ndarray) -> list[Bad]:
    """Write the pixels and digests that are missing -> images that cannot be read"""
    parts, _, building = _work
    bad = []
    places = building / f"{name}.pixels", building / f"{name}.digests"
    with naming(places[0]), open(places[0], "r+b") as pixels, open(places[1], "r+b", 0) as digests:
        for number, row in enumerate(rows, start):
            shape = int(row["width"]), int(row["height"])
            if not all(shape):                            # _read_sizes has reported it
                continue
            digests.seek(32 * number)
            pixels.seek(int(row["place"]))
            if any(known := digests.read(32)) and hashlib.sha256(pixels.read(shape[0] * shape[1] * 3)).digest() == known:
                continue
            try:
                image, _ = parts[name][number]
            except ImageError as error:
                bad.append(Bad(name, number, error.plain))
                continue
            content = image.resize(shape, Image.Resampling.BILINEAR).tobytes()
            pixels.seek(int(row["place"]))
            pixels.write(content)
            pixels.flush()                                # before its digest, which marks it as done
            digests.seek(32 * number)
            digests.write(hashlib.sha256(content).digest())
    return bad
