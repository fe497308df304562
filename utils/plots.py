"""Pictures: the only importer of matplotlib. Functions return a Figure; nothing is shown and no window is opened."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def learning_curves(events: Sequence[dict], title: str = "") -> Figure:
    """Loss, learning rate and accuracy over steps, from the events of a log.jsonl."""
    train = [event for event in events if event["event"] == "train"]
    evaluations: dict[str, list[dict]] = {}
    for event in events:
        if event["event"] == "eval":
            evaluations.setdefault(event["split"], []).append(event)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    if train:
        steps = [event["step"] for event in train]
        loss.plot(steps, [float(event["loss"]) for event in train], label="train", linewidth=1)
        rate.plot(steps, [event["lr"] for event in train], color="tab:gray")
    for split, series in evaluations.items():
        colour = {"val": "tab:orange", "test": "tab:green", "train": "tab:red"}.get(split)
        steps = [event["step"] for event in series]
        # Two values (before and after) are no curve: a line between them would look like one.
        line, dotted = ("o-", "o:") if len(series) > 2 else ("o", "v")
        loss.plot(steps, [float(event["loss"]) for event in series], line, label=split, markersize=3, color=colour)
        for field, name, style in (("accuracy", "top-1", line), ("top5", "top-5", dotted)):
            accuracy.plot(steps, [100 * event[field] for event in series], style, label=f"{split} {name}", markersize=3,
                          color=colour)
    for axes, name in ((loss, "loss"), (accuracy, "accuracy in %"), (rate, "learning rate")):
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    accuracy.set_ylim(0, 103)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    figure.suptitle(title)
    return figure


def sweep(rows: Sequence[dict], title: str = "") -> Figure:
    """Accuracy over learning rate, from the rows of sweep.py: trials as points, the final run as a line."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    trials = [row for row in rows if row["run"] != "final"]
    ended = [row for row in trials if row["status"] == "done"]
    axes.plot([row["learning_rate"] for row in ended], [100 * row["accuracy"] for row in ended], "o-",
              label=f"on the {ended[0]['images']} images held out" if ended else None)
    for row in trials:
        if row["status"] != "done":
            axes.axvline(row["learning_rate"], color="tab:red", linestyle=":", label="diverged")
    for row in rows:
        if row["run"] == "final" and row["status"] == "done":
            axes.plot(row["learning_rate"], 100 * row["accuracy"], "*", markersize=14, color="tab:green",
                      label=f"final run, test: {row['accuracy']:.2%} of {row['images']}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="accuracy in %", title=title)
    rates = [row["learning_rate"] for row in trials]
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))       # one "diverged" for all of them
    axes.legend(handles.values(), handles.keys(), fontsize="small")
    return figure


def predictions(images: np.ndarray, probabilities: np.ndarray, classes: Sequence[str],
                labels: Sequence[int | None] | None = None, captions: Sequence[str] | None = None) -> Figure:
    """images (B, height, width, 3) uint8, probabilities (B, C): each image with its three most probable classes.

    Titles are the true classes where `labels` are given (green where right, red where wrong), else the captions.
    """
    labels = [None] * len(images) if labels is None else labels
    captions = [""] * len(images) if captions is None else captions
    figure = Figure(figsize=(max(1.5 * len(images), 3), 2.6), layout="constrained")
    axes_row = np.atleast_1d(figure.subplots(1, len(images)))
    for axes, image, row, label, caption in zip(axes_row, images, probabilities, labels, captions):
        best = row.argsort()[::-1][:3]
        axes.imshow(image)
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel("\n".join(f"{classes[index]}: {row[index]:.1%}" for index in best), fontsize="small")
        if label is None:
            axes.set_title(caption, fontsize="medium")
        else:
            axes.set_title(f"true: {classes[label]}", fontsize="medium", color="tab:green" if best[0] == label else "tab:red")
    return figure


def attention_over_image(image: np.ndarray, heat: np.ndarray, title: str = "") -> Figure:
    """image (height, width, 3) uint8, heat (height, width) in 0..1: the image, the map, and the image lit by the map."""
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    plain, alone, lit = figure.subplots(1, 3)
    plain.imshow(image)
    plain.set_title("image as the model sees it")
    drawn = alone.imshow(heat, vmin=0, vmax=1, cmap="viridis")
    alone.set_title("attention (maximum = 1)")
    figure.colorbar(drawn, ax=alone, shrink=0.85)
    lit.imshow((image * heat[..., None]).astype(np.uint8))
    lit.set_title("image lit by attention")
    for axes in (plain, alone, lit):
        axes.axis("off")
    figure.suptitle(title)
    return figure


def attention_of_layers(image: np.ndarray, heats: np.ndarray, title: str = "") -> Figure:
    """heats (layers, height, width) in 0..1: one picture a layer, over the darkened image."""
    columns = min(6, len(heats) + 1)
    rows = -(-(len(heats) + 1) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.5 * rows), layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in grid:
        axes.axis("off")
    grid[0].imshow(image)
    grid[0].set_title("image", fontsize="medium")
    for number, (axes, heat) in enumerate(zip(grid[1:], heats), start=1):
        axes.imshow(image.mean(axis=-1), cmap="gray", alpha=0.5)
        drawn = axes.imshow(heat, cmap="viridis", vmin=0, vmax=1, alpha=0.75)
        axes.set_title(f"layer {number}", fontsize="medium")
    figure.colorbar(drawn, ax=list(grid), shrink=0.7, label="share of the maximum")
    figure.suptitle(title)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    figure.savefig(path, dpi=120)
