"""The picture of an evaluation: the confusion matrix, the classes that are most often confused, and the worst mistakes."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plots import plain
from .sheet import BAR, GAP, LETTERS, LINES, MARGIN, Sheet, shape

NAMED, COUNTED, WORST = 40, 25, 20   # classes of a whole matrix, and of one with counts in its cells; classes of a part of one


class Mistake(NamedTuple):
    true: str
    predicted: str
    probability: float              # of the predicted class
    of_true: float                  # of the true class
    name: str = ""                  # of the image's file


def draw(matrix: np.ndarray, classes: Sequence[str], images: Sequence[np.ndarray], wrong: Sequence[Mistake],
         title: str = "") -> Figure:
    """Draw the confusion matrix (C, C), rows true class, columns predicted class; list the classes that are most often confused;
    and show the worst mistakes with the names of their files.

    Of more than NAMED classes the matrix has the WORST with the most mistakes, and a column for all others together.
    """
    sheet = Sheet(13, title)
    names, table = [plain(name, 18) for name in classes], matrix
    mistaken = np.where(np.eye(len(classes), dtype=bool), 0, matrix)
    heading = ""
    if len(classes) > NAMED:
        chosen = np.sort(np.argsort(-(mistaken.sum(axis=0) + mistaken.sum(axis=1)), kind="stable")[:WORST])
        others = np.delete(matrix, chosen, axis=1)[chosen].sum(axis=1)
        table = np.concatenate([matrix[np.ix_(chosen, chosen)], others[:, None]], axis=1)
        names = [names[index] for index in chosen]
        heading = f"the {WORST} of {len(classes):,} classes with the most mistakes, as true or as predicted class"
    side, left = 6.2, 0.45 + max(map(len, names)) / 13
    size = (side, side * table.shape[0] / table.shape[1])
    below = 0.45 + (0.1 if _level(names) else max(map(len, names)) / 13)
    axes, = sheet.row(1, size, left=MARGIN + left, above=LINES["medium"] + 0.1, below=below)
    _matrix(axes, table, names)
    axes.set_title(heading, fontsize="medium")
    (_, top, _, height), right = sheet.box(axes), MARGIN + left + side + 0.12
    sheet.bar((right, top, BAR, height), axes.images[0], "share of the true class's images")
    order = [divmod(int(index), len(classes)) for index in np.argsort(-mistaken, axis=None, kind="stable")[:12]]
    rows = [f"{plain(classes[row], 18)} → {plain(classes[column], 18)}:  {mistaken[row, column]}"
            for row, column in order if mistaken[row, column]]
    caption = sheet.panel((right + 1.1, top, 3.4, height))
    caption.axis("off")
    caption.set_title("most often confused: true → predicted", loc="left", fontsize="medium", fontweight="bold")
    caption.text(0, 0.98, "\n".join(rows) or "no mistakes", va="top", linespacing=1.6, transform=caption.transAxes)
    if hardest := _least_accurate(matrix, classes):
        caption.text(0, 0.36, "least accurate classes", va="top", fontweight="bold", transform=caption.transAxes)
        caption.text(0, 0.31, "\n".join(hardest), va="top", linespacing=1.6, transform=caption.transAxes)
    if len(images):
        _mistakes(sheet, images, wrong)
    return sheet.finish()


def _mistakes(sheet: Sheet, images: Sequence[np.ndarray], wrong: Sequence[Mistake], columns: int = 6) -> None:
    """Add rows of images, each with the predicted and the true class above it and the name of its file below it."""
    sheet.heading("the worst mistakes: those whose true class has the lowest probability")
    width = (sheet.width - 2 * MARGIN - (columns - 1) * GAP) / columns
    for first in range(0, len(images), columns):
        part = list(zip(images, wrong))[first:first + columns]
        names = [_name_lines(mistake.name, int(LETTERS["x-small"] * width)) for _, mistake in part]
        size = (width, width * max(shape(image) for image, _ in part))
        panels = sheet.row(len(part), size, left=MARGIN if first else None, above=2 * LINES["small"] + 0.05,
                           below=max(map(len, names)) * LINES["x-small"] + 0.08)
        for panel, (image, mistake), name in zip(panels, part, names):
            panel.imshow(image)
            panel.set_title(f"{plain(mistake.predicted, 18)}: {mistake.probability:.1%}\ntrue {plain(mistake.true, 14)}: "
                            f"{mistake.of_true:.1%}", fontsize="small")
            panel.set_xlabel("\n".join(name), fontsize="x-small")


def _name_lines(name: str, width: int) -> list[str]:
    """Return a path in one line, or the folder and the name of the file in lines of their own, the latter in up to three."""
    if len(name) <= width:
        return [plain(name)]
    folder, slash, file = name.rpartition("/")
    return [plain(folder + slash, width)] * bool(slash) + textwrap.wrap(plain(file, 3 * width - 3), width)


def _least_accurate(matrix: np.ndarray, classes: Sequence[str], count: int = 6) -> list[str]:
    """Return the classes of the lowest accuracy below 100 %, with it and the number of their images."""
    images, right = matrix.sum(axis=1), matrix.diagonal()
    order = np.argsort(right / np.maximum(images, 1), kind="stable")
    return [f"{plain(classes[label], 18)}:  {right[label] / images[label]:.1%} of {images[label]}"
            for label in order if right[label] < images[label]][:count]


def _level(names: Sequence[str]) -> bool:
    """Whether the names fit below the columns without being turned."""
    return max(map(len, names)) * len(names) <= 60


def _matrix(axes: Axes, matrix: np.ndarray, names: Sequence[str]) -> None:
    """matrix (R, R), or (R, R + 1) with the other classes last"""
    count, columns = matrix.shape
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted class", ylabel="true class")
    size = "medium" if count <= 12 else "small" if count <= COUNTED else "x-small"
    axes.set_xticks(range(columns), [*names, "other classes"][:columns], fontsize=size, rotation=0 if _level(names) else 90)
    axes.set_yticks(range(count), names, fontsize=size)
    for row, column in np.argwhere(matrix > 0) if count <= COUNTED else ():
        axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize="small" if count <= 12 else "x-small",
                  color="white" if shares[row, column] > 0.5 else "black")
