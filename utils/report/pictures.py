"""Pictures of images, attention, positions and filters. utils/report/plots.py draws runs.

Functions take numpy arrays and names, and return a Figure. image: (height, width, 3) uint8, as the model saw it; photo: the
same part of the photograph in more pixels (None: the image), which is drawn under the maps; heat: a map of the whole image, of
any resolution; caption: the text below the image.

A map is drawn over a photograph with an opacity that follows its weights: where nothing is attended to, the photograph shows.

Source of the last three: Dosovitskiy et al. (arXiv 2010.11929), figure 7.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from .plots import balanced, plain, set_suptitle
from .sheet import BAR, BAR_WORDS, GAP, LETTERS, LINES, MARGIN, Sheet, lines_high, shape

Named = tuple[str, np.ndarray]
WIDTH = 9.3                         # of a sheet of maps, in inches
TILE = (1.0, 1.9)                   # the narrowest and widest small map
FLAT = 4                            # a map's scale ends at its largest weight, or at FLAT times its mean if that is more
FADED = 0.65                        # how much of a photograph's color is taken away under a map
OPACITY = 0.85                      # of the largest weight


def _colors(stops: Sequence[tuple[float, float, float]]) -> np.ndarray:
    """Colors from the first stop to the last, (128, 4), from transparent to OPACITY."""
    at = np.linspace(0, 1, 128)
    channels = [np.interp(at, np.linspace(0, 1, len(stops)), values) for values in zip(*stops)]
    return np.stack([*channels, OPACITY * at ** 1.15], axis=1)


_WARM, _COLD = _colors([(1.0, 0.85, 0.1), (1.0, 0.45, 0.0), (0.8, 0.0, 0.15)]), _colors([(0.3, 0.8, 1.0), (0.0, 0.3, 0.9)])
WEIGHTS = ListedColormap(_WARM, "weights")
SIGNED = ListedColormap(np.concatenate([_COLD[::-1], _WARM]), "signed weights")         # negative ones in blue


def predictions(images: Sequence[np.ndarray], probabilities: np.ndarray, classes: Sequence[str],
                labels: Sequence[int | None] | None = None, captions: Sequence[str] | None = None, title: str = "") -> Figure:
    """Draw each image with its three most probable classes. probabilities: (B, C)

    Titles are the true classes where `labels` are given (green where right, red where wrong), else the captions.
    """
    labels, captions = labels or [None] * len(images), captions or [""] * len(images)
    width, columns = 1.5, min(len(images), 8)
    tall, lines = max(map(shape, images)), LINES["small"] * 4 + 0.06
    sheet = Sheet(max(columns * (width + GAP) + 2 * MARGIN, 3), title)
    for first in range(0, len(images), columns):
        shown = range(first, min(first + columns, len(images)))
        for number, axes in zip(shown, sheet.row(len(shown), (width, width * tall), above=LINES["medium"] + 0.05, below=lines)):
            row, label = probabilities[number], labels[number]
            axes.imshow(images[number])
            axes.set_xlabel("\n".join(["predicted:", *best(row, classes, 14)]), fontsize="small")
            if label is None:
                axes.set_title(plain(captions[number], 18), fontsize="medium")
            else:
                right = row.argmax() == label
                axes.set_title(plain(f"true: {classes[label]}", 18), fontsize="medium", color="tab:green" if right else "tab:red")
    return sheet.finish()


def best(probabilities: np.ndarray, classes: Sequence[str], length: int = 30) -> list[str]:
    """Return the three most probable classes, with their probabilities."""
    return [f"{plain(classes[index], length)}: {probabilities[index]:.1%}" for index in probabilities.argsort()[::-1][:3]]


# ----------------------------------------------------------------------------------------------- attention


def over_image(image: np.ndarray, caption: str, maps: Sequence[Named], title: str = "", note: str = "",
               scale: str = "weight of a patch", photo: np.ndarray | None = None) -> Figure:
    """Draw the image, and each map by itself with its scale and over the photograph."""
    sheet = Sheet(_width(image, maps), title)
    _image_and_maps(sheet, image, caption, maps, scale, photo)
    return sheet.finish(note)


def attention(image: np.ndarray, caption: str, chosen: Sequence[Named], groups: Mapping[str, Sequence[Named]], title: str = "",
              note: str = "", photo: np.ndarray | None = None) -> Figure:
    """Draw the `chosen` maps as over_image does; below them groups of small maps over the photograph, each with a heading."""
    sheet = Sheet(max(WIDTH, _width(image, chosen)), title)
    _image_and_maps(sheet, image, caption, chosen, "weight of a patch", photo)
    for heading, tiles in groups.items():
        sheet.heading(heading)
        _tiles(sheet, image if photo is None else photo, tiles)
    _scale_of_tiles(sheet, [heat for tiles in groups.values() for _, heat in tiles])
    return sheet.finish(note)


def variants(image: np.ndarray, maps: Sequence[Named], title: str = "", columns: int = 4) -> Figure:
    """Draw small maps over the image, each with its name."""
    sheet = Sheet(2 * columns + 1, title)
    _tiles(sheet, image, maps, columns)
    _scale_of_tiles(sheet, [heat for _, heat in maps])
    return sheet.finish()


def _panel(image: np.ndarray, count: int) -> tuple[float, float]:
    """Return width and height of the large panels of so many maps."""
    tall = shape(image)
    width = min(3.0 if count == 1 else 2.25, max(3.4 / tall, 1.9))
    return width, width * tall


def _width(image: np.ndarray, maps: Sequence[Named]) -> float:
    panels = 1 + 2 * min(len(maps), 2)
    return panels * _panel(image, len(maps))[0] + (panels - 1) * GAP + 2 * MARGIN


def _image_and_maps(sheet: Sheet, image: np.ndarray, caption: str, maps: Sequence[Named], scale: str,
                    photo: np.ndarray | None) -> None:
    """Add rows: the image with its caption, and of two maps in each row the map with its scale, and over the photograph."""
    width, height = _panel(image, len(maps))
    named = [(balanced(plain(name), int(LETTERS["small"] * width)), heat) for name, heat in maps]
    for first in range(0, len(maps), 2):
        part, captions = named[first:first + 2], caption.splitlines() if first == 0 else []
        above = LINES["small"] * max(len(lines) for lines, _ in part) + 0.06
        below = max(lines_high(captions, "small"), 0.06 + BAR + BAR_WORDS)
        shown, *panels = sheet.row(1 + 2 * len(part), (width, height), above=above, below=below)
        if first == 0:
            shown.imshow(image)
            shown.set_title("image as the model saw it", fontsize="small")
            shown.set_xlabel(caption, fontsize="small")
        else:
            shown.axis("off")
        for (lines, heat), plain_map, over in zip(part, panels[::2], panels[1::2]):
            drawn = _draw_map(plain_map, heat, (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5))
            plain_map.set_title("\n".join(lines), fontsize="small")
            sheet.bar_below(plain_map, drawn, scale)
            _overlay(over, image if photo is None else photo, heat)
            over.set_title("over the image", fontsize="small")


def _tiles(sheet: Sheet, photo: np.ndarray, tiles: Sequence[Named], columns: int = 0) -> None:
    """Add rows of small maps over the photograph."""
    room = sheet.width - 2 * MARGIN
    columns = columns or _columns(len(tiles), math.ceil((room + GAP) / (TILE[1] + GAP)), int((room + GAP) / (TILE[0] + GAP)))
    width = min((room + GAP) / columns - GAP, TILE[1], max(3.0 / shape(photo), TILE[0]))
    left = (sheet.width - columns * (width + GAP) + GAP) / 2
    for first in range(0, len(tiles), columns):
        part = tiles[first:first + columns]
        row = sheet.row(len(part), (width, width * shape(photo)), above=2 * LINES["small"] + 0.04, left=left)
        for axes, (name, heat) in zip(row, part):
            _overlay(axes, photo, heat)
            axes.set_title(f"{plain(name, int(LETTERS['small'] * width))}\n{_range(heat)}", fontsize="small")


def _columns(count: int, fewest: int, most: int) -> int:
    """Return in how many columns so many tiles leave the least of a row empty, the more the better."""
    return min(range(min(count, fewest), most + 1), key=lambda columns: (-count % columns / columns, -columns))


def _range(heat: np.ndarray) -> str:
    low, high = f"{heat.min():.2g}", f"{heat.max():.2g}"
    return f"max {high}" if heat.min() >= 0 else low if low == high else f"{low} to {high}"


def _scale_of_tiles(sheet: Sheet, heats: Sequence[np.ndarray]) -> None:
    """Add one scale for all small maps."""
    signed = any(heat.min() < 0 for heat in heats)
    drawn = ScalarMappable(Normalize(-1 if signed else 0, 1), SIGNED if signed else WEIGHTS)
    ticks = {-1: "-max", 0: "0", 1: "max"} if signed else {0: "0", 0.5: "max / 2", 1: "max"}
    sheet.y += 0.06
    bar = sheet.bar((MARGIN + 0.1, sheet.y, 2.2, BAR), drawn, "", ticks=list(ticks))
    bar.set_xticks(list(ticks), list(ticks.values()))
    largest = f"largest weight{', of either sign' * signed}"
    words = f"small maps: each has its own scale, up to its {largest}; a nearly even map stays pale"
    sheet.words(2.65, balanced(words, int(LETTERS["small"] * (sheet.width - 2.8))), "small")
    sheet.y += 0.2


def _draw_map(axes: Axes, heat: np.ndarray, extent: Sequence[float], end: float | None = None) -> AxesImage:
    """Draw a map in colors that become opaque with the weight, those of negative weights blue. end: of the scale."""
    size = np.abs(heat)
    end = end or max(float(size.max()), FLAT * float(size.mean()), 1e-12)
    signed = heat.min() < 0
    return axes.imshow(heat, extent=extent, cmap=SIGNED if signed else WEIGHTS, vmin=-end if signed else 0, vmax=end)


def _overlay(axes: Axes, photo: np.ndarray, heat: np.ndarray, end: float | None = None) -> AxesImage:
    """Draw a map over a photograph whose colors are faded."""
    grey = photo.mean(axis=-1, keepdims=True)
    under = axes.imshow((photo + FADED * (grey - photo)).round().astype(np.uint8).repeat(3 // photo.shape[-1], axis=-1))
    return _draw_map(axes, heat, under.get_extent(), end)


# ------------------------------------------------------------------------------------- the paper's figure 7


def distance(distances: np.ndarray, longest: float, title: str = "", note: str = "") -> Figure:
    """Draw a dot for each head. distances: (layers, H) in pixels, NaN for a head that attends to nothing; longest: the distance
    between opposite corners, of which the scale shows at least half."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    layers = np.arange(1, len(distances) + 1)
    for head, column in enumerate(distances.T):
        axes.plot(layers, column, "o", color="tab:blue", alpha=0.7, markersize=5, label="a head" if head == 0 else None)
    known = ~np.isnan(distances)
    means = np.nansum(distances, axis=1) / np.where(known.any(axis=1), known.sum(axis=1), np.nan)
    axes.plot(layers, means, "-", color="tab:gray", linewidth=1, label="mean of the heads")
    axes.set(xlabel="layer", ylabel="mean attention distance in pixels",
             ylim=(0, max(1.05 * np.max(distances, initial=0, where=known), longest / 2)))
    axes.set_xticks(layers if len(layers) <= 16 else layers[::2])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    set_suptitle(figure, title)
    figure.supxlabel("\n".join(balanced(plain(note), 95)), fontsize="small", x=0.01, ha="left")
    return figure


def positions(similarity: np.ndarray, title: str = "", note: str = "") -> Figure:
    """Draw a tile for each patch, at its position, with its similarity to all others. similarity: (h, w, h, w) in -1..1"""
    height, width = similarity.shape[:2]
    cell = -(-32 // max(height, width))                    # dots of a cell, so that the gaps can be narrow
    tall, wide, gap = height * cell, width * cell, max(2, cell * max(height, width) // 10)
    mosaic = np.full((height * (tall + gap) - gap, width * (wide + gap) - gap), np.nan, dtype=np.float32)
    for row, column in np.ndindex(height, width):
        top, left = row * (tall + gap), column * (wide + gap)
        mosaic[top:top + tall, left:left + wide] = similarity[row, column].repeat(cell, axis=0).repeat(cell, axis=1)
    aspect = min(mosaic.shape[0] / mosaic.shape[1], 2.0)
    sheet = Sheet(7.5, title)
    size = (6.2, max(6.2 * aspect, 1.3)) if aspect <= 1 else (6.2 / aspect, 6.2)          # room for the words on the left
    axes, = sheet.row(1, size, left=MARGIN + 0.5, below=0.45)
    drawn = axes.imshow(mosaic, cmap="viridis", vmin=-1, vmax=1, interpolation="nearest")
    for ticks, count, side in ((axes.set_xticks, width, wide), (axes.set_yticks, height, tall)):
        every = 1 if count <= 16 else 4
        ticks([(side + gap) * number + (side - 1) / 2 for number in range(0, count, every)],
              [str(number + 1) for number in range(0, count, every)])
    axes.tick_params(length=0)
    axes.set(xlabel="column of the patch", ylabel="row of the patch")
    sheet.bar_below(axes, drawn, "cosine similarity to the patch of the tile", distance=0.5)
    sheet.y += BAR + BAR_WORDS
    return sheet.finish(note)


def filters(colors: np.ndarray, shares: np.ndarray, title: str = "", note: str = "") -> Figure:
    """Draw filters with their share of the variance. colors: (k, P, P, 3) in 0..1; shares: (k,)"""
    columns, side = min(7, len(colors)), 1.1
    sheet = Sheet(max(columns * (side + GAP) + 2 * MARGIN, 4), title)
    left = (sheet.width - columns * (side + GAP) + GAP) / 2
    for first in range(0, len(colors), columns):
        shown = range(first, min(first + columns, len(colors)))
        for number, axes in zip(shown, sheet.row(len(shown), (side, side), above=LINES["small"] + 0.04, left=left)):
            axes.imshow(colors[number], interpolation="nearest")
            axes.set_title(f"{number + 1}: {shares[number]:.1%}", fontsize="small")
    return sheet.finish(note)


# ------------------------------------------------------------------------------------ training on attention edits


class BeforeAfter(NamedTuple):
    """An image before and after training on edits: its sigmoid attention (h, w), and the predicted class."""

    kind: str                       # such as "taught" (trained on its edit) or "test"
    image: np.ndarray
    truth: str
    before: tuple[np.ndarray, str, float]       # attention, predicted class, probability of the true class
    after: tuple[np.ndarray, str, float]
    edit: np.ndarray | None         # (h, w), NaN where nothing was edited; None: this image has no edit


def before_and_after(rows: Sequence[BeforeAfter], title: str = "") -> Figure:
    """Draw a row for each image: the image, its attention before, the edit, its attention after, on one scale from 0 to 1."""
    sheet, width = Sheet(9.4, title), 2.1
    for number, row in enumerate(rows):
        size, above = (width, width * shape(row.image)), (LINES["medium"] + 0.05) * (number == 0)
        axes = sheet.row(4, size, left=MARGIN + 0.3, above=above, below=2 * LINES["small"] + 0.08)
        if number == 0:
            for panel, name in zip(axes, ("", "attention before", "edit (grey: not edited)", "attention after")):
                panel.set_title(name, fontsize="medium")
        axes[0].imshow(row.image, cmap="gray", vmin=0, vmax=255)
        extent = axes[0].images[0].get_extent()
        axes[0].set_ylabel(plain(row.kind), fontsize="medium")
        axes[0].set_xlabel(plain(f"true: {row.truth}", 26), fontsize="small")
        for panel, (heat, predicted, probability) in ((axes[1], row.before), (axes[3], row.after)):
            drawn = _overlay(panel, row.image, heat, 1.0)
            panel.set_xlabel(f"{plain(f'predicted: {predicted}', 26)}\ntrue class: {probability:.1%}", fontsize="small",
                             color="tab:green" if predicted == row.truth else "tab:red")
        axes[2].set_facecolor("lightgray")
        if row.edit is None:
            axes[2].axis("off")
            axes[2].text(0.5, 0.5, "none", transform=axes[2].transAxes, ha="center", va="center", color="gray")
        else:
            axes[2].imshow(np.where(np.isnan(row.edit), np.nan, 0.0), extent=extent, cmap="binary", vmin=0, vmax=1)
            axes[2].imshow(row.edit, extent=extent, cmap=WEIGHTS, vmin=0, vmax=1)
    sheet.bar_below(axes[3], drawn, "sigmoid attention, mean over heads", distance=2 * LINES["small"] + 0.12)
    sheet.y += BAR + BAR_WORDS
    return sheet.finish()
