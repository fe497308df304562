"""Figures of runs: curves and sweeps. utils/pictures.py draws what has images in it.

These two are the only importers of matplotlib. Functions return a Figure; nothing is shown and no window is opened.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

COLOURS = matplotlib.color_sequences["tab10"]
SPLIT_COLOURS = {"train": COLOURS[3], "val": COLOURS[1], "test": COLOURS[2]}
SCALES = ("loss", "attention loss", "accuracy in %", "learning rate")


def plain(text: str, length: int = 0) -> str:
    """As it is written, in one line: a dollar sign would begin a formula. `length`: the most letters, the middle goes first."""
    text = " ".join(str(text).split())
    if length and len(text) > length:
        text = text[:length - length // 3 - 1].rstrip() + "…" + text[len(text) - length // 3:].lstrip()
    return text.replace("$", r"\$")


def entitle(place: Figure | SubFigure, title: str, **how) -> None:
    """Above everything, in lines that fit the width."""
    width = int(10.5 * place.get_figure(root=True).get_figwidth())
    lines = [part for line in title.splitlines() for part in textwrap.wrap(plain(line), width) or [""]]
    place.suptitle("\n".join(lines), **how)


def learning_curves(events: Sequence[dict], title: str = "") -> Figure:
    """Loss, accuracy and learning rate over steps, from the events of a log.jsonl; the attention loss where there is one."""
    return _curves({"": events}, title)


def learning_curves_of(runs: Mapping[str, Sequence[dict]], title: str = "") -> Figure:
    """The same of several runs, by name: a colour each."""
    return _curves(runs, title)


def _curves(runs: Mapping[str, Sequence[dict]], title: str) -> Figure:
    taught = any("attention_loss" in event for events in runs.values() for event in events)
    scales = [scale for scale in SCALES if taught or scale != "attention loss"]
    figure = Figure(figsize=(4 * len(scales), 3.6 if len(runs) == 1 else 4.2), layout="constrained")
    axes = dict(zip(scales, figure.subplots(1, len(scales))))
    for number, (name, events) in enumerate(runs.items()):
        _curves_of_run(axes, events, plain(name, 30), COLOURS[number % len(COLOURS)] if len(runs) > 1 else None)
    for scale, each in axes.items():
        each.set(xlabel="step", title=scale)
        each.grid(alpha=0.3)
        if each.get_legend_handles_labels()[0] and (len(runs) == 1 or scale != "learning rate"):
            each.legend(fontsize="small" if len(runs) == 1 else "x-small")
    axes["accuracy in %"].set_ylim(0, 103)
    axes["learning rate"].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    entitle(figure, title)
    return figure


def _curves_of_run(axes: Mapping[str, Axes], events: Sequence[dict], name: str, colour) -> None:
    """colour None: the only run, whose splits have a colour each."""
    train = [event for event in events if event["event"] == "train"]
    evaluations: dict[str, list[dict]] = {}
    for event in events:
        if event["event"] == "eval":
            evaluations.setdefault(event["split"], []).append(event)
    if train:
        steps, label = [event["step"] for event in train], f"{name} train".strip()
        own, grey = {"color": colour or COLOURS[0], "linewidth": 1}, colour or "tab:gray"
        axes["loss"].plot(steps, [float(event["loss"]) for event in train], label=label, alpha=0.4 if colour else 1, **own)
        axes["learning rate"].plot(steps, [event["lr"] for event in train], color=grey)
        taught = [event for event in train if event.get("attention_loss") is not None]
        if taught:
            axes["attention loss"].plot([event["step"] for event in taught],
                                        [float(event["attention_loss"]) for event in taught], label=label, **own)
    for split, series in evaluations.items():
        own, label = {"color": colour or SPLIT_COLOURS.get(split), "markersize": 3}, f"{name} {split}".strip()
        steps = [event["step"] for event in series]
        # Two values (before and after) are no curve: a line between them would look like one.
        line, dotted = ("o-", "o:") if len(series) > 2 else ("o", "v")
        axes["loss"].plot(steps, [float(event["loss"]) for event in series], line, label=label, **own)
        for field, kind, style in (("accuracy", "top-1", line), ("top5", "top-5", dotted)):
            axes["accuracy in %"].plot(steps, [100 * event[field] for event in series], style, label=f"{label} {kind}", **own)


def sweep(rows: Sequence[dict], title: str = "", tried: str = "learning_rate") -> Figure:
    """Accuracy over what was tried, from the rows of sweep.py: trials as points, the final run as a star."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    trials = [row for row in rows if row["run"] != "final"]
    ended = [row for row in trials if row["status"] == "done"]
    axes.plot([row[tried] for row in ended], [100 * row["accuracy"] for row in ended], "o-",
              label=f"on the {ended[0]['images']} images held out" if ended else None)
    for row in trials:
        if row["status"] != "done":
            axes.axvline(row[tried], color="tab:red", linestyle=":", label="diverged")
    for row in rows:
        if row["run"] == "final" and row["status"] == "done":
            axes.plot(row[tried], 100 * row["accuracy"], "*", markersize=14, color="tab:green",
                      label=f"final run, test: {row['accuracy']:.2%} of {row['images']}")
    axes.set(xlabel=tried.replace("_", " "), ylabel="accuracy in %", title=plain(title))
    values = [row[tried] for row in trials]
    above = [value for value in values if value > 0]
    if len(above) == len(values):
        axes.set_xscale("log")
    elif above:
        axes.set_xscale("symlog", linthresh=min(above))               # a weight of 0 has a place there
    axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))       # one "diverged" for all of them
    axes.legend(handles.values(), handles.keys(), fontsize="small")
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """By the suffix of the path (.png, .pdf, .svg): whole or not at all. A stream gets a PNG."""
    if not isinstance(path, (str, os.PathLike)):
        figure.savefig(path, dpi=120)
        return
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(unfinished, dpi=120, format=path.suffix.lstrip(".").lower())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
