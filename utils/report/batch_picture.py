"""batch.png: images of the first training step and of the first evaluation batch as the model sees them, with their labels.

What a wrong label, crop, color or augmentation does to a run is seen here at its first step. Pillow draws it, which takes a
tenth of a second; Matplotlib would take a second.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.data.loader import Batch
from utils.files import StorageError, atomic_write

BATCH_FILE = "batch.png"
MAX_IMAGES, COLUMNS = 16, 8             # images of each part, and in a row
TILE, GAP, LINE = 112, 8, 15       # sizes in pixels
SMALL, LARGE, TIMES = 11, 14, 4    # pixels of a letter, and how many times larger it is drawn at first
DOTS = "..."


class Part(NamedTuple):
    heading: str
    tiles: list[Image.Image]
    labels: list[str]               # of one or two lines


class BatchPicture:
    """Collects images as the batches pass, and writes the picture when those of the training step are complete, and again if the
    evaluation batch comes later."""

    def __init__(self, file: Path, title: str, classes: Sequence[str], mix: Callable, warn: Callable[[str], None], *,
                 step_images: int, micro_steps: int):
        """mix: criterion.mix; warn: takes one line; step_images: images of a step over all ranks; micro_steps: batches of a step
        on this rank."""
        self.file, self.title, self.classes, self.mix, self.warn = file, title, classes, mix, warn
        self.step_images, self.micro_steps = step_images, micro_steps
        self.train, self.eval, self.failed = Part("", [], []), None, False

    def training(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass the batches on, after drawing the first images of the first step: a micro-batch may have fewer than MAX_IMAGES."""
        batches = iter(batches)
        for number, batch in enumerate(itertools.islice(batches, self.micro_steps), 1):
            if not self.failed and len(self.train.tiles) < MAX_IMAGES:
                with self._warn_if_it_fails():
                    self._add_training(batch)
                    if len(self.train.tiles) == MAX_IMAGES or number == self.micro_steps:
                        self._save()
            yield batch
        yield from batches

    def evaluation(self, batches: Iterable[Batch], name: str) -> Iterator[Batch]:
        """Pass the batches on, after drawing some images of the first one, evenly spaced: evaluations go class by class."""
        for batch in batches:
            if not self.failed and self.eval is None:
                with self._warn_if_it_fails():
                    self._add_evaluation(batch, name)
                    if self.file.exists():
                        self._save()
            yield batch

    def _add_training(self, batch: Batch) -> None:
        key, (_, tiles, labels) = batch.keys[0], self.train
        count = min(MAX_IMAGES - len(tiles), len(batch.images))            # even if images are mixed: the batches are, too
        images, targets = (part[:count].cpu() for part in (batch.images, batch.targets))
        images, targets = self.mix(images, targets, key.step, key.micro * len(batch.keys))
        tiles, labels = tiles + make_tiles(images), labels + [self._label(target) for target in targets]
        self.train = Part(f"training, step {key.step + 1}: the first {len(tiles)} of {self.step_images} images", tiles, labels)

    def _add_evaluation(self, batch: Batch, name: str) -> None:
        count = len(batch.images)
        some = sorted({number * count // MAX_IMAGES for number in range(MAX_IMAGES)})
        self.eval = Part(f"evaluation on {name}: {len(some)} of the first {count} images",
                         make_tiles(batch.images[number].cpu() for number in some),
                         [self._label(batch.targets[number].cpu()) for number in some])

    def _label(self, target: Tensor) -> str:
        """target: a class, or probabilities (C,) after mixing."""
        if not target.ndim:
            return self._name(int(target))
        order = [index for index in target.argsort(descending=True)[:2].tolist() if target[index] > 0]
        names = [self._name(index) for index in order]
        return names[0] if len(names) == 1 else f"{target[order[0]]:.0%} {names[0]}\n{target[order[1]]:.0%} {names[1]}"

    def _name(self, index: int) -> str:
        """Return the name of a class, or its number if the font has no letter of the name."""
        name = legible(self.classes[index], load_font(SMALL))
        return name if name.strip("? ") or name == self.classes[index] else f"class {index}"

    def _save(self) -> None:
        picture = draw(self.title, [self.train, self.eval] if self.eval else [self.train])
        atomic_write(self.file, lambda unfinished: picture.save(unfinished, format="PNG", compress_level=1))

    @contextlib.contextmanager
    def _warn_if_it_fails(self) -> Iterator[None]:
        """Turn any error into a warning, after which nothing is drawn. The picture is a convenience, drawn where the training
        waits for its next batch: whatever a Pillow, a font, a class name or a disk does must not end the run."""
        try:
            yield
        except Exception as error:
            self.failed = True
            why = f"{type(error).__name__}: {error}"
            reason = str(error) if isinstance(error, StorageError) else f"cannot draw {self.file} ({why})"
            without = f"with the {BATCH_FILE} that it has" if self.file.exists() else f"without {BATCH_FILE}"
            self.warn(f"warning: {' '.join(reason.split())}; the run continues {without}")


def watch_first_batches(run: Any, trainer: Any, data: Any) -> Any:
    """Return `data` with loaders whose first batches become batch.png on the main process; `data` itself where the run's folder
    has one. The batches and their order stay the same. run, data: of utils.run and utils.build."""
    file = run.outputs.folder / BATCH_FILE
    if not run.ranks.is_main or file.exists():
        return data
    title = f"{run.config.name}: what the model sees"
    picture = BatchPicture(file, title, data.splits.classes, trainer.criterion.mix, run.outputs.logger.log,
                           step_images=trainer.settings.batch_size, micro_steps=trainer.settings.micro_steps)
    names = {id(split.images): split.name for split in (data.train, data.final, data.watched) if split}
    return dataclasses.replace(
        data, batches=picture.training(data.batches),
        eval_loader=lambda images: picture.evaluation(data.eval_loader(images), names.get(id(images), "held-out images")))


def make_tiles(images: Iterable[Tensor]) -> list[Image.Image]:
    """Return small pictures of images (C, height, width) of values 0..255 on the CPU. numpy and Pillow use one thread each; torch
    would make all threads wait for such small work."""
    tiles = []
    for image in images:
        pixels = image.numpy()
        if pixels.dtype != np.uint8:
            pixels = np.rint(pixels).clip(0, 255).astype(np.uint8)
        height, width = pixels.shape[1:]
        size = (TILE, min(max(round(TILE * height / width), TILE // 4), 2 * TILE))
        way = Image.Resampling.NEAREST if width < TILE else Image.Resampling.BILINEAR
        bands = [Image.fromarray(np.ascontiguousarray(band)).resize(size, way) for band in pixels]
        tiles.append(Image.merge("RGB", bands if len(bands) == 3 else 3 * bands[:1]))
    return tiles


def draw(title: str, parts: Sequence[Part]) -> Image.Image:
    """Draw the tiles with their labels below them, under the heading of each part."""
    font, large = load_font(SMALL), load_font(LARGE)
    cells = [part.tiles[0].height + (max(label.count("\n") for label in part.labels) + 1) * LINE + GAP for part in parts]
    rows = [math.ceil(len(part.tiles) / COLUMNS) for part in parts]
    total = sum(count * cell + 3 * GAP + LINE for count, cell in zip(rows, cells))
    sheet = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, total + 3 * GAP + LINE), "white")
    top = GAP
    _write(sheet, (GAP, top), title, large, sheet.width - 2 * GAP)
    top += LINE + 2 * GAP
    for part, count, cell in zip(parts, rows, cells):
        _write(sheet, (GAP, top), part.heading, font, sheet.width - 2 * GAP)
        top += LINE + GAP
        for number, (tile, label) in enumerate(zip(part.tiles, part.labels)):
            row, column = divmod(number, COLUMNS)
            left, above = GAP + column * (TILE + GAP), top + row * cell
            sheet.paste(tile, (left, above))
            for line, text in enumerate(label.split("\n")):
                _write(sheet, (left, above + tile.height + 1 + line * LINE), text, font, TILE)
        top += count * cell + 2 * GAP
    return sheet


@functools.cache
def load_font(size: int) -> Any:
    """Return a font for letters TIMES * size pixels high: Matplotlib's, which has Greek and Cyrillic letters and is found without
    importing Matplotlib, or Pillow's; a Pillow without FreeType has one of a fixed size."""
    found = importlib.util.find_spec("matplotlib")
    if found and found.origin:
        file = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        with contextlib.suppress(ImportError, OSError):             # no FreeType; no such file
            return ImageFont.truetype(str(file), TIMES * size)
    try:
        return ImageFont.load_default(TIMES * size)
    except (ImportError, TypeError):                                # no FreeType; Pillow before 10.1
        return ImageFont.load_default()


def legible(text: str, font: Any) -> str:
    """Return the text in one line, with ? for letters that the font does not have: it would draw a box, or raise an error."""
    text = " ".join(text.split()).encode("utf-8", "replace").decode()
    text = unicodedata.normalize("NFC", text)                       # macOS writes an umlaut as a letter and its dots
    if not isinstance(font, ImageFont.FreeTypeFont):
        return text.encode("latin-1", "replace").decode("latin-1")
    box = bytes(font.getmask("\uffff"))                             # not a letter: no font has it
    lacking = {letter for letter in set(text) if not letter.isascii() and bytes(font.getmask(letter)) == box}
    return "".join("?" if letter in lacking else letter for letter in text)


def _write(sheet: Image.Image, at: tuple[int, int], text: str, font: Any, width: int) -> None:
    """Draw a line of text into so many pixels.

    It is drawn TIMES larger and reduced: Pillow places letters on whole pixels, which closes the gaps between small words.
    """
    times = TIMES if isinstance(font, ImageFont.FreeTypeFont) else 1
    text = _fitting(text, font, times * width)
    size = (math.ceil(font.getlength(text) / times) + 1, LINE + 4)
    ink = Image.new("L", (times * size[0], times * size[1]))
    ImageDraw.Draw(ink).text((0, 0), text, 255, font)
    sheet.paste("black", at, ink.resize(size, Image.Resampling.BOX))


def _fitting(text: str, font: Any, width: int) -> str:
    """Return the text, without its middle if it does not fit into so many pixels: names often differ at the end only."""
    text = legible(text if len(text) <= 2 * width else text[:width] + text[-width:], font)
    if font.getlength(text) <= width:
        return text

    def shortened(count: int) -> str:
        return text[:(count + 1) // 2] + DOTS + text[len(text) - count // 2:]

    fits, too_many = 0, len(text)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if font.getlength(shortened(middle)) <= width else (fits, middle)
    return shortened(fits)
