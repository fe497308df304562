"""A figure whose panels are placed in inches, row by row: every panel has the size that it is given.

Matplotlib's own layouts shrink panels to make room for words, and make color bars taller than an image that keeps its shape.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from .plots import balanced, plain

MARGIN, GAP = 0.15, 0.12                # of the sheet; between panels
LINES = {"large": 0.21, "medium": 0.18, "small": 0.155, "x-small": 0.13}         # height of a line of text
LETTERS = {"large": 10.5, "medium": 12.0, "small": 14.5, "x-small": 17.5}       # that fit into an inch
BAR, BAR_WORDS = 0.11, 0.42             # height of a color bar, and of its numbers and label below it


class Sheet:
    """Rows are added from top to bottom; `finish` sets the height of the figure. Sizes are (width, height) in inches."""

    def __init__(self, width: float, title: str = ""):
        self.width, self.y = width, MARGIN
        self.figure = Figure(figsize=(width, 1))
        self._panels: list[tuple[Axes, tuple[float, float, float, float]]] = []
        self._words: list[tuple[float, float, str, dict]] = []
        self._title = title
        lines = [part for line in title.splitlines() for part in self._wrapped(line, "large")]
        self._title_lines = lines
        self.y += LINES["large"] * len(lines) + 0.08 * bool(lines)

    def _wrapped(self, text: str, size: str) -> list[str]:
        return balanced(plain(text), int(LETTERS[size] * (self.width - 2 * MARGIN)))

    def heading(self, text: str) -> None:
        """Add a line in bold above the next row."""
        self.y += 0.08
        lines = self._wrapped(text, "medium")
        how = {"fontsize": "medium", "fontweight": "bold", "ha": "center"}
        self._words.append((self.width / 2, self.y, "\n".join(lines), how))
        self.y += LINES["medium"] * len(lines) + 0.04

    def note(self, text: str) -> None:
        """Add small print, in as many lines as it takes."""
        if text:
            self.words(MARGIN, self._wrapped(text, "small"), "small")

    def row(self, count: int, size: tuple[float, float], *, above: float = 0.0, below: float = 0.0, left: float | None = None,
            gap: float = GAP) -> list[Axes]:
        """Add `count` panels without ticks, side by side in the middle of the sheet, or from `left`. `above` and `below`: inches
        for their titles and labels."""
        width, height = size
        if left is None:
            left = (self.width - count * width - (count - 1) * gap) / 2
        self.y += above
        row = [self.panel((left + number * (width + gap), self.y, width, height)) for number in range(count)]
        self.y += height + below + gap
        return row

    def panel(self, box: tuple[float, float, float, float]) -> Axes:
        """Add a panel at (left, top, width, height), measured from the top of the sheet."""
        axes = self.figure.add_axes((0, 0, 1, 1), label=str(len(self._panels)))
        axes.set(xticks=[], yticks=[])
        self._panels.append((axes, box))
        return axes

    def box(self, axes: Axes) -> tuple[float, float, float, float]:
        """Return where a panel is: left, top, width, height."""
        return next(box for each, box in self._panels if each is axes)

    def words(self, left: float, lines: Sequence[str], size: str) -> None:
        """Add lines of text, from `left`."""
        self._words.append((left, self.y, "\n".join(lines), {"fontsize": size, "ha": "left"}))
        self.y += LINES[size] * len(lines)

    def bar_below(self, axes: Axes, drawn: ScalarMappable, label: str, distance: float = 0.06, **how) -> Axes:
        """Add the color scale of `axes` below it, as wide as its image; it takes distance + BAR + BAR_WORDS inches."""
        left, top, width, height = self.box(axes)
        shown = min(width, height / axes.get_data_ratio())
        return self.bar((left + (width - shown) / 2, top + height + distance, shown, BAR), drawn, label, **how)

    def bar(self, box: tuple[float, float, float, float], drawn: ScalarMappable, label: str, **how) -> Axes:
        """Add a color scale at (left, top, width, height), horizontal if it is wider than high."""
        place = self.panel(box)
        horizontal = box[2] > box[3]
        bar = self.figure.colorbar(drawn, cax=place, orientation="horizontal" if horizontal else "vertical", **how)
        bar.set_label(plain(label), fontsize="small", labelpad=2)
        bar.ax.tick_params(labelsize="x-small", pad=2, length=2)
        if horizontal and "ticks" not in how:
            bar.ax.locator_params(axis="x", nbins=5)
        return place

    def finish(self, note: str = "") -> Figure:
        """Add the note, and return the figure in its final size."""
        self.note(note)
        height = self.y + MARGIN - GAP / 2
        self.figure.set_size_inches(self.width, height)
        for axes, (left, top, width, tall) in self._panels:
            axes.set_position((left / self.width, 1 - (top + tall) / height, width / self.width, tall / height))
        if self._title_lines:
            self.figure.suptitle("\n".join(self._title_lines), y=1 - MARGIN / height, va="top", fontsize="large")
        for x, top, text, how in self._words:
            self.figure.text(x / self.width, 1 - top / height, text, va="top", **how)
        return self.figure


def lines_high(texts: Sequence[str], size: str) -> float:
    """Return the height of the texts in inches, one line each."""
    return LINES[size] * len(texts) + 0.06 * bool(texts)


def shape(image: np.ndarray) -> float:
    """Return height over width, within reason."""
    return min(max(image.shape[0] / image.shape[1], 0.25), 2.5)
