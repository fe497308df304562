"""Reads every image of a data set once and reports what training would fail on.

Processes decode the images as training would. A process that a file kills or blocks is replaced, and the file is reported.
Also reported: images that are decoded in a way the user may not expect, and images with an exact copy in another split or
in another class.
"""

import contextlib
import hashlib
import io
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

import numpy as np
from torch.utils.data import Dataset

from utils import process

from . import overlap
from .decode import opened_image
from .image_files import counted
from .reading import UPRIGHT, Reading, is_color16, is_gray16, orientation, tiff_orientation
from .splits import Concat, ImageError, Splits, abbreviate
from .workers import ADVICE, WorkerError, ending

POLL_S = 1.0                 # between checks whether a process is late
LATE_S = 60.0                # for one image
MAX_DEATHS = 100
ONE_COLOR = "one color everywhere, which show nothing"
LARGE_PIXELS = 16_000_000
MAX_SHOWN = 20                   # unreadable images in `lines`; `bad` has all


@dataclass
class Findings:
    """`bad`: (split, index, name, reason) of the images that cannot be read, in the order of the splits; `lines` to print."""

    lines: list[str] = field(default_factory=list)
    bad: list[tuple[str, int, str, str]] = field(default_factory=list)


@dataclass
class _Result:
    """What a process found out about the image at position `place`, counted over all splits."""

    place: int
    why: str | None = None
    digest: bytes = b""
    odd: tuple[str, ...] = ()


def check(splits: Splits, num_workers: int, log: Callable[[str], None]) -> Findings:
    """Decode every image once, in num_workers processes (at least one), with a tqdm progress bar.

    `log` gets a line for each image that kills or blocks its process. Raises WorkerError after MAX_DEATHS lost processes.
    """
    from tqdm import tqdm

    named = {"train": splits.train, **splits.held_out}
    images, starts = Concat(list(named.values())), np.cumsum([0, *map(len, named.values())])

    def split_of(place: int) -> int:
        return int(np.searchsorted(starts, place, side="right")) - 1

    def name_of(place: int) -> str:
        return f"{list(named)[split_of(place)]}: {images.name(place)}"

    def report_lost(place: int, what: str) -> str:
        log(f"warning: {name_of(place)} {what}")
        return f"{images.name(place)} {what}; remove or replace it"

    odd, examples, digests, bad = Counter(), {}, {}, {}
    with (contextlib.closing(_results(images, splits.reading, num_workers, report_lost)) as results,
          tqdm(total=len(images), unit="image", desc="reading", disable=None, **process.bar_size()) as bar):
        for result in results:
            bar.update()
            if result.why is None:
                digests[result.place] = result.digest
            else:
                bad[result.place] = result.why
            odd.update(result.odd)
            for what in result.odd:
                examples[what] = min(result.place, examples.get(what, result.place))
    findings = Findings(bad=[(list(named)[split_of(place)], int(place - starts[split_of(place)]), images.name(place), bad[place])
                             for place in sorted(bad)])
    findings.lines = [*_class_counts(named, splits.classes, findings.bad)]
    findings.lines += [f"{name}: {why}" for name, _, _, why in findings.bad[:MAX_SHOWN]]
    if len(bad) > MAX_SHOWN:
        findings.lines.append(f"and {len(bad) - MAX_SHOWN:,} more that cannot be read")
    findings.lines += [f"{odd[what]:,} with {what}, for example {name_of(examples[what])}" for what in sorted(odd)]
    begin = dict(zip(named, starts.tolist()))
    keys = {name: [digests.get(place, place) for place in range(begin[name], begin[name] + len(split))]
            for name, split in named.items()}
    findings.lines += overlap.shared_images(named, splits.classes, lambda name, index: name_of(begin[name] + index), keys,
                                            " (byte by byte)")
    return findings


def _class_counts(named: dict[str, Dataset], classes: tuple[str, ...], bad: list) -> Iterator[str]:
    for name, split in named.items():
        of_class = np.bincount(split.targets, minlength=len(classes))
        without = [classes[label] for label in np.flatnonzero(of_class == 0)]
        few, many = (f"{of_class[label]:,} ({classes[label]})" for label in (of_class.argmin(), of_class.argmax()))
        range_of = f"from {few} to {many}" if of_class.min() < of_class.max() else f"{of_class.min():,}"
        present, unreadable = counted(len(classes) - len(without), "class", "classes"), sum(1 for one in bad if one[0] == name)
        # The notes of the data set name the classes that held-out splits lack.
        yield (f"{name}: {counted(len(split), 'image')} of {present}, {range_of} per class"
               + f"; {unreadable:,} cannot be read" * bool(unreadable)
               + (f"; no images of {abbreviate(without)}" if without and name == "train" else ""))


# ------------------------------------------------------------------------------------------------------- processes


def _inspect(images: Dataset, reading: Reading, place: int) -> _Result:
    try:
        image, _ = images[place]
        content = images.content(place)
    except ImageError as error:
        return _Result(place, str(error))
    one_color = all(low == high for low, high in (channel.getextrema() for channel in image.split()))
    return _Result(place, None, hashlib.sha256(content).digest()[:16], (*oddities(content, reading), *[ONE_COLOR] * one_color))


def oddities(content: bytes, reading: Reading) -> tuple[str, ...]:
    """Return the ways in which decoding an image file may surprise the user; () if it is not an image file."""
    follows = "" if reading.exif == "follow" else "not "
    alpha = {"mask": "whose alpha channel is used as the image", "ignore": "which are shown"}
    try:
        image = opened_image(io.BytesIO(content))
        deep = is_gray16(image) or is_color16(image)
        found = {
            f"an EXIF orientation, which is {follows}followed": orientation(image) != UPRIGHT,
            "a TIFF's orientation, which is always followed": tiff_orientation(image) != UPRIGHT,
            "CMYK colors, converted to RGB without a color profile": image.mode == "CMYK",
            "palette colors": image.mode == "P",
            "16 bits per channel, {:,} to {:,} read as black to white".format(*reading.intensity_range): deep,
            f"transparent parts, {alpha.get(reading.alpha, f'put on {reading.alpha}')}": image.has_transparency_data,
            "several frames, of which the first is used": getattr(image, "n_frames", 1) > 1,
            f"more than {LARGE_PIXELS // 1_000_000} megapixels": image.width * image.height > LARGE_PIXELS}
    except Exception:                           # Pillow raises many kinds
        return ()
    return tuple(what for what, is_so in found.items() if is_so)


def _read(images: Dataset, reading: Reading, requests: Connection) -> None:
    process.die_with_parent()
    process.ignore_signals()
    while True:
        requests.send(_inspect(images, reading, requests.recv()))


class _Reader:
    """A process that reads the image `place`, then the next one that is requested."""

    def __init__(self, images: Dataset, reading: Reading):
        self.place, self.began = 0, 0.0
        self.pipe, requests = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_read, args=(images, reading, requests), daemon=True)
        self.process.start()
        requests.close()                        # so that the death of the process closes the pipe

    def request(self, place: int) -> None:
        self.place, self.began = place, time.monotonic()
        with contextlib.suppress(OSError):      # the process has died: result() notices it
            self.pipe.send(place)

    def result(self) -> _Result | None:
        """Wait for the result of the image; None if the process has ended."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return None

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _results(images: Dataset, reading: Reading, num_workers: int,
             report_lost: Callable[[int, str], str]) -> Iterator[_Result]:
    """Yield the result of every image, in any order. report_lost(place, what happened) -> why the image counts as unreadable."""
    places, deaths, suspects = list(reversed(range(len(images)))), 0, set()
    readers = [_Reader(images, reading) for _ in range(min(max(1, num_workers), len(places)))]
    try:
        for reader in readers:
            reader.request(places.pop())
        while readers:
            ready = wait([reader.pipe for reader in readers], timeout=POLL_S)
            for reader in list(readers):
                late = reader.pipe not in ready
                if late and time.monotonic() - reader.began < LATE_S:
                    continue
                result, place = None if late else reader.result(), reader.place
                if result is None:
                    readers.remove(reader)
                    reader.end()
                    what, deaths = ending(reader.process.exitcode), deaths + 1
                    if deaths > MAX_DEATHS:
                        raise WorkerError(f"{deaths} processes that read images were lost; the last one {what}; {ADVICE}")
                    reader = _Reader(images, reading)
                    readers.append(reader)
                    # A lost process may have another cause, so the image is only blamed when it happens twice.
                    if late or place in suspects:
                        result = _Result(place, report_lost(place, f"took more than {LATE_S:g} s to read" if late else
                                                            f"killed the process that read it, which {what}"))
                    else:
                        suspects.add(place)
                        places.append(place)
                if result is not None:
                    yield result
                if places:
                    reader.request(places.pop())
                else:
                    readers.remove(reader)
                    reader.end()
    finally:
        for reader in readers:
            reader.end()
