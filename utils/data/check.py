"""Reads every image of a data set once and reports what training would fail on.

Processes decode the images as training would. A process that a file kills or holds up is replaced, and the file is reported.
Reported as well: images that are decoded in a way one may not expect, and images of which an exact copy is in the training
and in a held-out split.
"""

import contextlib
import hashlib
import io
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from utils import process

from .image_files import IMAGE_EXTENSIONS, class_folders, files_below, opened_image, shown
from .splits import ImageError, Splits, abbreviate
from .workers import ADVICE, WorkerError, ending

POLL_S = 1.0                 # between checks whether a process is late
LATE_S = 60.0                # for one image
MAX_DEATHS = 100
ORIENTATION = 0x0112         # the tag of EXIF
LARGE_PIXELS = 16_000_000
HIDDEN = "hidden"
SHOWN_ENDINGS = 8
SHOWN = 20                   # unreadable images in `lines`; `bad` has all


@dataclass
class Findings:
    """`bad`: (split, index, name, reason) of the images that cannot be read, in the order of the splits; `lines` to print."""

    lines: list[str] = field(default_factory=list)
    bad: list[tuple[str, int, str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)     # (held out, the same image in train)
    oddities: Counter = field(default_factory=Counter)


@dataclass
class _Result:
    """What a process found out about image `place` (counted through all splits)."""

    place: int
    why: str | None = None
    digest: bytes = b""
    odd: tuple[str, ...] = ()


def check(splits: Splits, num_workers: int, log: Callable[[str], None]) -> Findings:
    """Decode every image once, in num_workers processes (at least one), under a tqdm bar.

    `log` gets a line for each lost process. Raises WorkerError after MAX_DEATHS of them.
    """
    from tqdm import tqdm

    named = {"train": splits.train, splits.val_name: splits.val, "test": splits.test}
    starts = np.cumsum([0, *(len(split) for split in named.values())])
    names, parts = list(named), list(named.values())

    def locate(place: int) -> tuple[str, int]:
        number = int(np.searchsorted(starts, place, side="right")) - 1
        return names[number], place - int(starts[number])

    def name_of(place: int) -> str:
        name, index = locate(place)
        return f"{name}: {named[name].name(index)}"

    def report_lost(place: int, what: str) -> str:
        name, index = locate(place)
        log(f"warning: {name_of(place)} {what}")
        return f"{named[name].name(index)} {what}; remove or replace it"

    findings, examples, digests, bad = Findings(), {}, {}, {}
    with (contextlib.closing(_results(parts, num_workers, report_lost)) as results,
          tqdm(total=int(starts[-1]), unit="image", desc="reading", dynamic_ncols=True, disable=None) as bar):
        for result in results:
            bar.update()
            digests[result.place] = result.digest
            if result.why is not None:
                bad[result.place] = result.why
            for what in result.odd:
                findings.oddities[what] += 1
                examples[what] = min(result.place, examples.get(what, result.place))
    for place in sorted(bad):
        name, index = locate(place)
        findings.bad.append((name, index, named[name].name(index), bad[place]))
    trained = {digests[place]: place for place in range(len(splits.train) - 1, -1, -1) if place not in bad}
    for place in range(len(splits.train), int(starts[-1])):
        if place not in bad and digests[place] in trained:
            findings.duplicates.append((name_of(place), name_of(trained[digests[place]])))
    findings.lines = [*_counts(named, splits.classes, findings.bad), *_unreadable(findings.bad)]
    findings.lines += [f"{findings.oddities[what]:,} with {what}, such as {name_of(examples[what])}" for what in sorted(examples)]
    if findings.duplicates:
        one, other = findings.duplicates[0]
        findings.lines.append(f"{len(findings.duplicates):,} held-out images are in train too, byte by byte, so that results "
                              f"on them mean little: such as {one}, which is {other}")
    return findings


def _counts(named: dict[str, Dataset], classes: tuple[str, ...], bad: list) -> Iterator[str]:
    for name, split in named.items():
        of_class = np.bincount(split.targets, minlength=len(classes))
        without = [classes[label] for label in np.flatnonzero(of_class == 0)]
        few, many = (f"{of_class[label]:,} ({classes[label]})" for label in (of_class.argmin(), of_class.argmax()))
        range_of = f"from {few} to {many}" if of_class.min() < of_class.max() else f"{of_class.min():,}"
        yield (f"{name}: {len(split):,} images of {len(classes) - len(without):,} classes, {range_of} a class; "
               f"{sum(1 for one in bad if one[0] == name):,} cannot be read"
               + (f"; none of {abbreviate(without)}" if without else ""))


def _unreadable(bad: list) -> Iterator[str]:
    yield from (f"{name}: {why}" for name, _, _, why in bad[:SHOWN])
    if len(bad) > SHOWN:
        yield f"and {len(bad) - SHOWN:,} more that cannot be read"


def ignored_files(data_dir: str) -> Counter:
    """Count the files in class folders that image_files.folder() ignores, by their ending in small letters ("" for none);
    hidden ones under HIDDEN. Opens no file."""
    found = Counter()
    parts = ("train", "val", "test") if any(Path(data_dir, part).is_dir() for part in ("train", "val")) else ("",)
    for top in (Path(data_dir, part, name) for part in parts for name in class_folders(Path(data_dir, part))):
        for _, names in files_below(top):
            found.update(HIDDEN if name.startswith(".") else os.path.splitext(name)[1].lower() for name in names
                         if name.startswith(".") or not name.lower().endswith(IMAGE_EXTENSIONS))
    return found


def ignored_line(data_dir: str) -> str:
    """What ignored_files() counts, the most frequent ending first; "" if there are none."""
    found = ignored_files(data_dir)
    hidden = found.pop(HIDDEN, 0)
    endings = sorted(found, key=lambda ending: (-found[ending], ending))
    counts = [f"{found[ending]:,} {shown(ending)[:20] or 'without one'}" for ending in endings[:SHOWN_ENDINGS]]
    if len(endings) > SHOWN_ENDINGS:
        counts.append(f"{sum(found[ending] for ending in endings[SHOWN_ENDINGS:]):,} of other endings")
    allowed = ", ".join(IMAGE_EXTENSIONS)
    lines = [f"ignored for their ending: {', '.join(counts)} (images must end in {allowed})"] if counts else []
    return "; ".join(lines + ([f"ignored as hidden: {hidden:,}"] if hidden else []))


# ------------------------------------------------------------------------------------------------------- processes


def _inspect(split: Dataset, index: int, place: int) -> _Result:
    try:
        split[index]
        content = split.content(index)
    except ImageError as error:
        return _Result(place, str(error))
    return _Result(place, None, hashlib.sha256(content).digest()[:16], oddities(content))


def oddities(content: bytes) -> tuple[str, ...]:
    """The ways in which an image file is not decoded as one may expect; () for what is no image file."""
    try:
        image = opened_image(io.BytesIO(content))
        found = {
            "an EXIF orientation, which is not followed": image.getexif().get(ORIENTATION, 1) not in (0, 1),
            "CMYK inks, turned into RGB without a colour profile": image.mode == "CMYK",
            "palette colours": image.mode == "P",
            "16 bits a channel, of which 8 are kept": image.mode.startswith("I"),
            "transparent parts, put on white": image.has_transparency_data,
            "several frames, of which the first is taken": getattr(image, "n_frames", 1) > 1,
            f"more than {LARGE_PIXELS // 1_000_000} megapixels": image.width * image.height > LARGE_PIXELS}
    except Exception:                           # Pillow lets out many kinds
        return ()
    return tuple(what for what, is_so in found.items() if is_so)


def _read(parts: list[Dataset], places: range, at, number: int, out: Connection) -> None:
    process.die_with_parent()
    process.ignore_signals()
    ends = np.cumsum([len(split) for split in parts])
    for place in places:
        at[number] = place
        part = int(np.searchsorted(ends, place, side="right"))
        out.send(_inspect(parts[part], int(place - ends[part] + len(parts[part])), place))
    at[number] = -1


class _Reader:
    """A process that reads the images `places`; `at`, in shared memory, is the one under way, even after its death."""

    def __init__(self, parts: list[Dataset], places: range, at, number: int):
        self.number, self.late, self.first, self.reported = number, False, places.start, -1
        at[number] = -1
        self.answers, out = multiprocessing.Pipe(duplex=False)
        self.process = multiprocessing.Process(target=_read, args=(parts, places, at, number, out), daemon=True)
        self.process.start()
        out.close()                             # so that the death of the process closes the pipe
        self.heard = time.monotonic()

    def receive(self) -> _Result | None:
        """None if the process has ended."""
        try:
            result = self.answers.recv()
        except (EOFError, OSError):
            self.process.join()
            return None
        self.heard, self.reported = time.monotonic(), result.place
        return result

    def stop_if_late(self) -> None:
        if time.monotonic() - self.heard > LATE_S and not self.late:
            self.late = True
            self.process.kill()

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.answers.close()


def _results(parts: list[Dataset], num_workers: int, report_lost: Callable[[int, str], str]) -> Iterator[_Result]:
    """The result of every image, in any order. report_lost(place, what happened) -> why the image counts as unreadable."""
    count, total, deaths, suspects = max(1, num_workers), sum(map(len, parts)), 0, set()
    at = multiprocessing.RawArray("q", count)
    readers = [_Reader(parts, range(number, total, count), at, number) for number in range(count)]
    try:
        while readers:
            for answers in wait([reader.answers for reader in readers], timeout=POLL_S):
                reader = next(reader for reader in readers if reader.answers is answers)
                result = reader.receive()
                if result is not None:
                    yield result
                    continue
                place, code = at[reader.number], reader.process.exitcode
                readers.remove(reader)
                reader.end()
                if place < 0 and code == 0:
                    continue
                deaths += 1
                if deaths > MAX_DEATHS:
                    raise WorkerError(f"{deaths} processes that read images were lost, at last one that {ending(code)}; {ADVICE}")
                # It may not be the image's fault, unless it happens twice.
                again = place if place >= 0 else reader.first
                if place == reader.reported >= 0:
                    again += count
                elif place >= 0 and (place in suspects or reader.late):
                    yield _Result(place, report_lost(place, f"held its reader up for {LATE_S:g} s" if reader.late else
                                                     f"killed its reader, which {ending(code)}"))
                    again += count
                else:
                    suspects.add(place)
                readers.append(_Reader(parts, range(again, total, count), at, reader.number))
            for reader in readers:
                reader.stop_if_late()
    finally:
        for reader in readers:
            reader.end()
