"""Pictures of images, mistakes, attention, positions and filters. utils/report/plots.py draws runs.

Functions take numpy arrays and names, and return a Figure. image: (height, width, 3) uint8, as the model saw it;
heat: a map of the whole image, of any resolution; caption: the text below the image.

Source of the last three: Dosovitskiy et al. (arXiv 2010.11929), figure 7.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from .plots import balanced, plain, set_suptitle

Named = tuple[str, np.ndarray]
COLUMNS, TILE = 8, 1.55             # maps in a row, and the side of one in inches
WIDE_NAME = 40                      # letters of a name above a map that would reach its scale


def predictions(images: Sequence[np.ndarray], probabilities: np.ndarray, classes: Sequence[str],
                labels: Sequence[int | None] | None = None, captions: Sequence[str] | None = None, title: str = "") -> Figure:
    """probabilities (B, C): each image with its three most probable classes.

    Titles are the true classes where `labels` are given (green where right, red where wrong), else the captions.
    """
    labels, captions = labels or [None] * len(images), captions or [""] * len(images)
    figure = Figure(figsize=(max(1.6 * len(images), 3), 2.75 + 0.3 * bool(title)), layout="constrained")
    axes_row = np.atleast_1d(figure.subplots(1, len(images)))
    for axes, image, row, label, caption in zip(axes_row, images, probabilities, labels, captions):
        axes.imshow(image)
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel("\n".join(["predicted:", *best(row, classes, 16)]), fontsize="small")
        if label is None:
            axes.set_title(plain(caption, 20), fontsize="medium")
        else:
            right = row.argmax() == label
            axes.set_title(plain(f"true: {classes[label]}", 20), fontsize="medium", color="tab:green" if right else "tab:red")
    return _finish(figure, title)


def best(probabilities: np.ndarray, classes: Sequence[str], length: int = 30) -> list[str]:
    """The three most probable classes, with their probabilities."""
    return [f"{plain(classes[index], length)}: {probabilities[index]:.1%}" for index in probabilities.argsort()[::-1][:3]]


def confusion(matrix: np.ndarray, classes: Sequence[str], images: Sequence[np.ndarray],
              wrong: Sequence[tuple[str, str, float]], title: str = "") -> Figure:
    """The confusion matrix (C, C), rows true class, columns predicted class; the classes that are most often confused; and
    the worst mistakes: images, and of each (true class, predicted class, its probability).

    Colors are shares of the true class's images. Up to 12 classes have their counts in the cells, up to 40 their names.
    """
    columns = 8
    lines = -(-len(images) // columns)
    figure = Figure(figsize=(13, 7.6 + 2.2 * lines + 0.4), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(1 + bool(lines), 1, height_ratios=[7.2, 2.2 * lines + 0.4][:1 + bool(lines)]))
    axes, caption = parts[0].subplots(1, 2, width_ratios=(2.2, 1))
    _matrix(axes, matrix, classes)
    parts[0].colorbar(axes.images[0], ax=axes, shrink=0.8, label="share of the true class's images")
    mistaken = np.where(np.eye(len(classes), dtype=bool), 0, matrix)
    order = [divmod(int(index), len(classes)) for index in np.argsort(-mistaken, axis=None, kind="stable")[:12]]
    rows = [f"{plain(classes[row], 18)} → {plain(classes[column], 18)}:  {mistaken[row, column]}"
            for row, column in order if mistaken[row, column]]
    caption.axis("off")
    caption.set_title("most often confused: true → predicted", loc="left", fontsize="medium", fontweight="bold")
    caption.text(0, 0.98, "\n".join(rows) or "no mistakes", va="top", linespacing=1.7, transform=caption.transAxes)
    if lines:
        parts[1].suptitle("the worst mistakes: those with the highest loss", fontsize="medium", fontweight="bold")
        for panel, image, (true, predicted, probability) in zip(_empty_grid(parts[1], lines, columns), images, wrong):
            panel.imshow(image)
            panel.set_title(f"{plain(predicted, 16)}: {probability:.1%}\n(true: {plain(true, 14)})", fontsize="small")
    return _finish(figure, title)


def _matrix(axes: Axes, matrix: np.ndarray, classes: Sequence[str]) -> None:
    count = len(classes)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest" if count <= 40 else "auto")
    named = "" if count <= 40 else " (by number)"
    axes.set(xlabel=f"predicted class{named}", ylabel=f"true class{named}")
    if count <= 40:
        size, names = "medium" if count <= 12 else "x-small", [plain(name, 18) for name in classes]
        axes.set_xticks(range(count), names, fontsize=size, rotation=0 if max(map(len, names)) * count <= 60 else 90)
        axes.set_yticks(range(count), names, fontsize=size)
    for row, column in np.argwhere(matrix > 0) if count <= 12 else ():
        axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize="small",
                  color="white" if shares[row, column] > 0.5 else "black")


# ----------------------------------------------------------------------------------------------- attention


def over_image(image: np.ndarray, caption: str, maps: Sequence[Named], title: str = "", note: str = "",
               scale: str = "weight of a patch") -> Figure:
    """The image, and each map beside it, alone with its scale and over the image."""
    figure = Figure(figsize=(10.2, (3 * _tall(image) + 0.5) * len(maps) + 1.2 + 0.3 * bool(note)), layout="constrained")
    _beside(figure, image, caption, maps, scale)
    return _finish(figure, title, note)


def attention(image: np.ndarray, caption: str, chosen: Sequence[Named], groups: Mapping[str, Sequence[Named]], title: str = "",
              note: str = "") -> Figure:
    """As over_image for the `chosen` maps; below them groups of small maps over the image, each group with a heading."""
    columns = min(COLUMNS, max(4, *map(len, groups.values())))
    lines = [-(-len(tiles) // columns) for tiles in groups.values()]
    width = max(10.2, TILE * columns + 1.2)
    heights = [(0.29 * width * _tall(image) + 0.5) * len(chosen) + 1.3]
    heights += [((width - 1.2) / columns * _tall(image) + 0.5) * count + 0.5 for count in lines]
    figure = Figure(figsize=(width, sum(heights) + 0.3 * bool(note)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights))
    _beside(parts[0], image, caption, chosen, "weight of a patch")
    for part, (heading, tiles) in zip(parts[1:], groups.items()):
        _tiles(part, image, tiles, columns)
        part.suptitle(plain(heading), fontsize="medium", fontweight="bold")
    set_suptitle(parts[0], title)
    _note(parts[-1], note)
    return figure


def variants(image: np.ndarray, maps: Sequence[Named], title: str = "", columns: int = 4) -> Figure:
    """Small maps over the image, each with its name."""
    lines = -(-len(maps) // columns)
    figure = Figure(figsize=(2 * columns + 1, (2 * _tall(image) + 0.5) * lines + 0.5), layout="constrained")
    _tiles(figure, image, maps, columns)
    return _finish(figure, title)


def _tall(image: np.ndarray) -> float:
    """Height over width, within reason."""
    return min(max(image.shape[0] / image.shape[1], 0.25), 2.5)


def _in_two(label: str) -> str:
    """Lines of about one length: a bar beside something low has no room for one."""
    return "\n".join(balanced(label, (len(label) + 9) // 2))


def _note(figure: Figure | SubFigure, note: str) -> None:
    if note:
        figure.supxlabel(plain(note), fontsize="small", x=0.01, ha="left")


def _finish(figure: Figure, title: str, note: str = "") -> Figure:
    set_suptitle(figure, title)
    _note(figure, note)
    return figure


def _beside(panel: Figure | SubFigure, image: np.ndarray, caption: str, maps: Sequence[Named], scale: str) -> None:
    rows = panel.subplots(len(maps), 3, squeeze=False)
    for number, ((shown, alone, over), (name, heat)) in enumerate(zip(rows, maps)):
        for axes in (shown, alone, over):
            axes.set(xticks=[], yticks=[])
        shown.imshow(image)
        shown.set_title("image as the model saw it" if number == 0 else "", fontsize="medium")
        shown.set_xlabel(caption if number == 0 else "", fontsize="small")
        drawn = alone.imshow(heat, extent=shown.images[0].get_extent(), cmap="viridis", vmin=min(0.0, float(heat.min())),
                             vmax=max(float(heat.max()), 1e-12))
        alone.set_title(plain(name, 60), fontsize="medium" if len(name) <= WIDE_NAME else "small")
        panel.colorbar(drawn, ax=alone, shrink=0.8).set_label(scale if _tall(image) > 0.8 else _in_two(scale),
                                                              fontsize="medium" if _tall(image) > 0.45 else "x-small")
        _overlay(over, image, heat)
        over.set_title("over the image", fontsize="medium")


def _tiles(panel: Figure | SubFigure, image: np.ndarray, tiles: Sequence[Named], columns: int) -> None:
    lines = -(-len(tiles) // columns)
    grid = _empty_grid(panel, lines, columns)
    for axes, (name, heat) in zip(grid, tiles):
        drawn = _overlay(axes, image, heat)
        axes.set_title(f"{plain(name)}\nmax {heat.max():.2g}", fontsize="small")
    panel.colorbar(drawn, ax=grid, shrink=0.9, aspect=12 * lines, label="share of max", ticks=(0, 0.5, 1))


def _empty_grid(panel: Figure | SubFigure, lines: int, columns: int) -> list[Axes]:
    """Row by row, without frames."""
    grid = list(panel.subplots(lines, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    return grid


def _overlay(axes: Axes, image: np.ndarray, heat: np.ndarray):
    """The map, its largest value 1 and what is below 0 at 0, over the image in grey."""
    grey = axes.imshow(image.mean(axis=-1), cmap="gray", vmin=0, vmax=255)
    return axes.imshow(heat.clip(0) / max(float(heat.max()), 1e-12), extent=grey.get_extent(), cmap="viridis", vmin=0, vmax=1,
                       alpha=0.65)


# ------------------------------------------------------------------------------------- the paper's figure 7


def distance(distances: np.ndarray, longest: float, title: str = "", note: str = "") -> Figure:
    """distances (layers, H) in pixels: a dot for each head. longest: from corner to corner, the upper end of the scale."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    layers = np.arange(1, len(distances) + 1)
    for head, column in enumerate(distances.T):
        axes.plot(layers, column, "o", color="tab:blue", alpha=0.7, markersize=5, label="a head" if head == 0 else None)
    axes.plot(layers, distances.mean(axis=1), "-", color="tab:gray", linewidth=1, label="mean of the heads")
    axes.set(xlabel="layer", ylabel="mean attention distance in pixels", ylim=(0, max(1.05 * distances.max(), longest / 2)))
    axes.set_xticks(layers if len(layers) <= 16 else layers[::2])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return _finish(figure, title, note)


def positions(similarity: np.ndarray, title: str = "") -> Figure:
    """similarity (h, w, h, w) in -1..1: a tile for each patch, in its place, of its similarity to all others."""
    height, width = similarity.shape[:2]
    cell = -(-32 // max(height, width))                    # dots of a cell, so that the gaps can be narrow
    tall, wide, gap = height * cell, width * cell, max(2, cell * max(height, width) // 10)
    mosaic = np.full((height * (tall + gap) - gap, width * (wide + gap) - gap), np.nan, dtype=np.float32)
    for row, column in np.ndindex(height, width):
        top, left = row * (tall + gap), column * (wide + gap)
        mosaic[top:top + tall, left:left + wide] = similarity[row, column].repeat(cell, axis=0).repeat(cell, axis=1)
    share = mosaic.shape[0] / mosaic.shape[1]
    figure = Figure(figsize=(7.5, min(max(6 * share, 2.2), 12) + 0.9), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(mosaic, cmap="viridis", vmin=-1, vmax=1, interpolation="nearest")
    label = "cosine similarity to the patch of the tile"
    for ticks, count, side in ((axes.set_xticks, width, wide), (axes.set_yticks, height, tall)):
        every = 1 if count <= 16 else 4
        ticks([(side + gap) * number + (side - 1) / 2 for number in range(0, count, every)],
              [str(number + 1) for number in range(0, count, every)])
    axes.tick_params(length=0)
    axes.set(xlabel="column of the patch", ylabel="row of the patch")
    figure.colorbar(drawn, ax=axes, shrink=0.8, label=label if share > 0.8 else _in_two(label))
    return _finish(figure, title)


def filters(colors: np.ndarray, shares: np.ndarray, title: str = "", note: str = "") -> Figure:
    """colors (k, P, P, 3) in 0..1, shares (k,) of the variance."""
    columns = min(7, len(colors))
    lines = -(-len(colors) // columns)
    figure = Figure(figsize=(1.25 * columns + 0.4, 1.5 * lines + 0.9), layout="constrained")
    for number, (axes, color, share) in enumerate(zip(_empty_grid(figure, lines, columns), colors, shares), start=1):
        axes.imshow(color, interpolation="nearest")
        axes.set_title(f"{number}: {share:.1%}", fontsize="small")
    return _finish(figure, title, note)


# ------------------------------------------------------------------------------------ training on attention edits


class BeforeAfter(NamedTuple):
    """An image before and after training on edits: its sigmoid attention (h, w), and the class predicted."""

    kind: str                       # such as "taught" (trained on its edit) or "test"
    image: np.ndarray
    truth: str
    before: tuple[np.ndarray, str, float]       # attention, predicted class, probability of the true class
    after: tuple[np.ndarray, str, float]
    edit: np.ndarray | None         # (h, w), NaN where nothing was edited; None: this image has no edit


def before_and_after(rows: Sequence[BeforeAfter], title: str = "") -> Figure:
    """A row an image: the image, its attention before, the edit, its attention after, all on one scale from 0 to 1."""
    figure = Figure(figsize=(9, 2.3 * len(rows) + 0.6), layout="constrained")
    grid = figure.subplots(len(rows), 4, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes, name in zip(grid[0], ("", "attention before", "edit (grey: left alone)", "attention after")):
        axes.set_title(name, fontsize="medium")
    for axes, row in zip(grid, rows):
        axes[0].imshow(row.image, cmap="gray", vmin=0, vmax=255)
        extent = axes[0].images[0].get_extent()
        axes[0].set_ylabel(plain(row.kind), fontsize="medium")
        axes[0].set_xlabel(plain(f"true: {row.truth}", 26), fontsize="small")
        for panel, (heat, predicted, probability) in ((axes[1], row.before), (axes[3], row.after)):
            drawn = panel.imshow(heat, extent=extent, cmap="viridis", vmin=0, vmax=1)
            panel.set_xlabel(f"{plain(f'predicted: {predicted}', 26)}\ntrue class: {probability:.1%}", fontsize="small",
                             color="tab:green" if predicted == row.truth else "tab:red")
        axes[2].set_facecolor("lightgray")
        if row.edit is None:
            axes[2].axis("off")
            axes[2].text(0.5, 0.5, "none", transform=axes[2].transAxes, ha="center", va="center", color="gray")
        else:
            axes[2].imshow(row.edit, extent=extent, cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=list(grid.flat), shrink=min(1.0, 3 / len(rows)), label="sigmoid attention, mean over heads")
    return _finish(figure, title)
