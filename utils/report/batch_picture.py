"""batch.png: the first training batch and the first evaluation batch as the model sees them, with their labels.

What a wrong label, crop, color or augmentation does to a run is seen here at its first step. Pillow draws it, which takes a
few hundredths of a second; Matplotlib would take a second.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.data.loader import Batch
from utils.files import StorageError, atomic_write

BATCH_FILE = "batch.png"
MAX_IMAGES, COLUMNS = 16, 8             # images of each batch, and in a row
TILE, GAP, LINE = 112, 8, 15       # sizes in pixels
SMALL, LARGE, TIMES = 12, 15, 4    # pixels of a letter, and how many times larger it is drawn at first


class BatchPicture:
    """Collects the two batches as they pass, and writes the picture when the training batch has come, and again if the evaluation
    batch comes later."""

    def __init__(self, file: Path, title: str, classes: Sequence[str], mix: Callable, warn: Callable[[str], None]):
        """mix: criterion.mix; warn: takes one line."""
        self.file, self.title, self.classes, self.mix, self.warn = file, title, classes, mix, warn
        self.parts: dict[str, tuple[Tensor, list[str]]] = {}            # heading: images (n, C, height, width), labels

    def training(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass the batches on, after drawing the first one."""
        batches = iter(batches)
        if (batch := next(batches, None)) is None:
            return
        key, count = batch.keys[0], min(MAX_IMAGES, len(batch.images)) // 2 * 2 or 1             # MixUp mixes pairs
        images, labels = (part[:count].to("cpu", copy=True) for part in (batch.images, batch.targets))
        mixed, targets = self.mix(images, labels, key.step, key.micro * len(batch.keys))
        self._draw(f"training, step {key.step + 1}: the first {count} of {len(batch.images)} images", mixed,
                   [self._label(target) for target in targets])
        yield batch
        yield from batches

    def evaluation(self, batches: Iterable[Batch], name: str) -> Iterator[Batch]:
        """Pass the batches on, after drawing some images of the first one, evenly spaced: evaluations go class by class."""
        for batch in batches:
            if not any("evaluation" in heading for heading in self.parts):
                count = len(batch.images)
                some = sorted({number * count // MAX_IMAGES for number in range(MAX_IMAGES)})
                labels = [self._label(target) for target in batch.targets[some].cpu()]
                self._draw(f"evaluation on {name}: {len(some)} of the first {count} images", batch.images[some].cpu(), labels)
            yield batch

    def _label(self, target: Tensor) -> str:
        """target: a class, or probabilities (C,) after mixing."""
        if not target.ndim:
            return self.classes[int(target)]
        order = [index for index in target.argsort(descending=True)[:2].tolist() if target[index] > 0]
        names = [self.classes[index] for index in order]
        return names[0] if len(names) == 1 else f"{target[order[0]]:.0%} {names[0]}\n{target[order[1]]:.0%} {names[1]}"

    def _draw(self, heading: str, images: Tensor, labels: list[str]) -> None:
        self.parts[heading] = images, labels
        if not any(heading.startswith("training") for heading in self.parts):
            return
        picture = draw(self.title, dict(sorted(self.parts.items(), reverse=True)))          # training first
        try:
            atomic_write(self.file, lambda unfinished: picture.save(unfinished, format="PNG", compress_level=3))
        except StorageError as error:
            self.warn(f"warning: {error}; the run continues without {BATCH_FILE}")


def watch_first_batches(run: Any, trainer: Any, data: Any) -> Any:
    """Return `data` with loaders whose first batches become batch.png on the main process; `data` itself where the run's folder
    has one. The batches and their order stay the same. run, data: of utils.run and utils.build."""
    file = run.outputs.folder / BATCH_FILE
    if not run.ranks.is_main or file.exists():
        return data
    title = f"{run.config.name}: what the model sees"
    picture = BatchPicture(file, title, data.splits.classes, trainer.criterion.mix, run.outputs.logger.log)
    names = {id(split.images): split.name for split in (data.train, data.final, data.watched) if split}
    return dataclasses.replace(
        data, batches=picture.training(data.batches),
        eval_loader=lambda images: picture.evaluation(data.eval_loader(images), names.get(id(images), "held-out images")))


def draw(title: str, parts: dict[str, tuple[Tensor, list[str]]]) -> Image.Image:
    """Draw images (n, C, height, width) of values 0..255 with the labels below them, under the heading of each part."""
    font, large = (ImageFont.load_default(TIMES * size) for size in (SMALL, LARGE))
    height, width = next(iter(parts.values()))[0].shape[-2:]
    size = (TILE, min(max(round(TILE * height / width), TILE // 4), 2 * TILE))
    lines = {heading: max(label.count("\n") + 1 for label in labels) for heading, (_, labels) in parts.items()}
    cells = {heading: size[1] + lines[heading] * LINE + GAP for heading in parts}
    rows = {heading: math.ceil(len(labels) / COLUMNS) for heading, (_, labels) in parts.items()}
    total = sum(rows[heading] * cells[heading] + 3 * GAP + LINE for heading in parts)
    sheet = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, total + 3 * GAP + LINE), "white")
    top = GAP
    _write(sheet, (GAP, top), title, large, sheet.width - 2 * GAP)
    top += LINE + 2 * GAP
    for heading, (images, labels) in parts.items():
        _write(sheet, (GAP, top), heading, font, sheet.width - 2 * GAP)
        top += LINE + GAP
        for number, (image, label) in enumerate(zip(images, labels)):
            row, column = divmod(number, COLUMNS)
            left, above = GAP + column * (TILE + GAP), top + row * cells[heading]
            pixels = image.expand(3, -1, -1).permute(1, 2, 0).float().round().clamp(0, 255).numpy().astype(np.uint8)
            larger = size[0] > pixels.shape[1]
            tile = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.BILINEAR)
            sheet.paste(tile, (left, above))
            for line, text in enumerate(label.split("\n")):
                _write(sheet, (left, above + size[1] + 1 + line * LINE), text, font, TILE)
        top += rows[heading] * cells[heading] + 2 * GAP
    return sheet


def _write(sheet: Image.Image, at: tuple[int, int], text: str, font: Any, width: int) -> None:
    """Draw a line of text, as far as it fits into so many pixels.

    It is drawn TIMES larger and reduced: Pillow places letters on whole pixels, which closes the gaps between small words.
    """
    times = TIMES if isinstance(font, ImageFont.FreeTypeFont) else 1
    text = _fitting(text, font, times * width)
    size = (math.ceil(font.getlength(text) / times) + 1, LINE + 4)
    ink = Image.new("L", (times * size[0], times * size[1]))
    ImageDraw.Draw(ink).text((0, 0), text, 255, font)
    sheet.paste("black", at, ink.resize(size, Image.Resampling.BOX))


def _fitting(text: str, font: Any, width: int) -> str:
    """Return the text as far as it fits into so many pixels. Pillow's font has few letters beyond Latin's; that of a Pillow
    without FreeType raises an error for them."""
    text = " ".join(text.split()).encode("utf-8", "replace").decode()
    if not isinstance(font, ImageFont.FreeTypeFont):
        text = text.encode("latin-1", "replace").decode("latin-1")
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
