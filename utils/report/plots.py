"""Figures of runs (curves and sweeps), and files of figures. utils/report/pictures.py draws images.

Only files of this room import matplotlib. Functions return a Figure; no window is opened.
"""

import itertools
import os
import tempfile
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib import font_manager, ticker, transforms
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from utils.files import atomic_write
from utils.training.certainty import result_of

from .events import best_evaluation, choosing_split, evaluations_of, number_of, numbers_of, percent_of
from .sweeps import BY_LOSS, FINAL, chosen_of, ended_trials, is_by_loss, like, spoken

# Fonts for the letters that the user's font lacks, where they are installed. All are outlines, which every format can hold.
FALLBACK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
                  "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "IPAexGothic", "PingFang SC",
                  "Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Noto Sans Arabic", "Noto Sans Hebrew",
                  "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji", "Symbola", "Segoe UI Emoji", "Arial Unicode MS")
_INSTALLED = {font.name for font in font_manager.fontManager.ttflist}
matplotlib.rcParams["font.family"] += [name for name in FALLBACK_FONTS if name in _INSTALLED]

SUFFIXES = (".png", ".pdf", ".svg")
COLORS = matplotlib.color_sequences["tab10"]
SPLIT_COLORS = {"train": COLORS[3], "val": COLORS[1], "test": COLORS[2]}
SCALES = ("loss", "attention loss", "accuracy in %", "learning rate")
# event of a log.jsonl: the fields of it that are drawn
DRAWN = {"train": ("step", "loss", "lr"), "eval": ("step", "loss", "accuracy", "top5")}


class OutputError(ValueError):
    """A picture cannot be written to the given file or folder."""

    exit_code = 2


def plain(text: str, length: int = 0) -> str:
    """Escape a text for Matplotlib (a dollar sign would begin a formula), in one line of at most `length` letters: an ellipsis
    replaces the middle.

    Bytes of a file's name that are not UTF-8 become question marks, since no font has them.
    """
    text = " ".join(str(text).encode("utf-8", "replace").decode().split())
    if length and len(text) > length:
        text = text[:length - length // 3 - 1].rstrip() + "…" + text[len(text) - length // 3:].lstrip()
    return text.replace("$", r"\$")


def set_suptitle(figure: Figure | SubFigure, title: str, **how) -> None:
    """Set the title above everything, in lines that fit the width."""
    width = int(10.5 * figure.get_figure(root=True).get_figwidth())
    lines = [part for line in title.splitlines() for part in balanced(plain(line), width)]
    figure.suptitle("\n".join(lines), **how)


def balanced(line: str, width: int) -> list[str]:
    """Wrap into as few lines of at most `width` letters as possible, of about one length: no single last word. A word that fits
    in a line is not divided."""
    fewest, longest = len(textwrap.wrap(line, width)), max((len(word) for word in line.split() if len(word) <= width), default=1)
    narrow = next(narrow for narrow in range(max(-(-len(line) // max(fewest, 1)), longest), width + 1)
                  if len(textwrap.wrap(line, narrow)) <= fewest)
    return textwrap.wrap(line, narrow) or [""]


def learning_curves(events: Sequence[dict], title: str = "") -> Figure:
    """Draw loss, accuracy and learning rate of a run over its steps, of the training and of the held-out images, the best step
    marked; the attention loss where there is one. events: of a log.jsonl.

    A field that an event lacks, or that is not a number, is a gap; `find_invalid_event` finds it.
    """
    figure, axes = _panels([events], title)
    train, evaluations = [event for event in events if event.get("event") == "train"], evaluations_of(events)
    if train:
        steps, supervised = numbers_of(train, "step"), [event for event in train if event.get("attention_loss") is not None]
        # The training loss contains it, with its weight; that of an evaluation does not.
        _noisy(axes["loss"], steps, numbers_of(train, "loss"), f"train{' (with attention loss)' * bool(supervised)}")
        if any("accuracy" in event for event in train):
            _noisy(axes["accuracy in %"], steps, percent_of(train, "accuracy"), "train, as fed")
        axes["learning rate"].plot(steps, numbers_of(train, "lr"), color="tab:gray")
        if supervised:
            _noisy(axes["attention loss"], numbers_of(supervised, "step"), numbers_of(supervised, "attention_loss"), "train")
    chosen = choosing_split(events)
    for split, series in evaluations.items():
        own = {"color": SPLIT_COLORS.get(split), "markersize": 3}
        steps = numbers_of(series, "step")
        # Two values (before and after) are no curve: a line between them would look like one.
        line, dotted = ("o-", ":") if len(series) > 2 else ("o", "v")
        name = "train, evaluated" if split == "train" else plain(split, 20)
        axes["loss"].plot(steps, numbers_of(series, "loss"), line, label=name, **own)
        axes["accuracy in %"].plot(steps, percent_of(series, "accuracy"), line, label=name, **own)
        if split == chosen and min(numbers_of(series, "top5")) < 1:        # of five classes or fewer it is 100 % and says nothing
            axes["accuracy in %"].plot(steps, percent_of(series, "top5"), dotted, alpha=0.6, label=f"{name}, top-5", **own)
    if best := best_evaluation(events):
        step, accuracy = best
        for scale in ("loss", "accuracy in %"):
            axes[scale].axvline(step, color="black", linewidth=0.8, linestyle="--", alpha=0.5,
                                label=f"best: step {step:g}" + f", {accuracy:.1%}" * (scale != "loss"))
    for each in axes.values():
        if each.get_legend_handles_labels()[0]:
            each.legend(fontsize="small")
    highest = max((y for line in axes["accuracy in %"].get_lines() for y in line.get_ydata() if y == y), default=0)
    axes["accuracy in %"].set_ylim(0, 103 if highest > 50 or not highest else 1.5 * highest)
    if "attention loss" in axes:
        _use_log_scale_if_needed(axes["loss"])
    return figure


def compare_learning_curves(runs: Mapping[str, Sequence[dict]], title: str = "") -> Figure:
    """Draw several runs, by name, in a color each: loss and accuracy of the images that choose the best step, the training loss
    as a thin line, and the learning rate. The legend names a run once, with its best accuracy, and with the number of images if
    runs were evaluated on different numbers of them."""
    figure, axes = _panels(runs.values(), title)
    evaluated = {name: evaluations_of(events).get(choosing_split(events), []) for name, events in runs.items()}
    counts = {name: series[-1].get("images") for name, series in evaluated.items() if series}
    for number, (name, events) in enumerate(runs.items()):
        own = {"color": COLORS[number % len(COLORS)], "linestyle": ("-", "--", ":", "-.")[number // len(COLORS) % 4]}
        train, chosen = [event for event in events if event.get("event") == "train"], choosing_split(events)
        steps = numbers_of(train, "step")
        axes["loss"].plot(steps, _smooth(numbers_of(train, "loss")), linewidth=0.8, alpha=0.5, **own)
        axes["learning rate"].plot(steps, numbers_of(train, "lr"), **own)
        if supervised := [event for event in train if event.get("attention_loss") is not None]:
            axes["attention loss"].plot(numbers_of(supervised, "step"), _smooth(numbers_of(supervised, "attention_loss")), **own)
        series, best = evaluated[name], best_evaluation(events)
        of = f" ({counts.get(name)} images)" * (len(set(counts.values())) > 1 and bool(counts.get(name)))
        what = f"{plain(chosen, 20)}{of} {best[1]:.1%} at step {best[0]:g}" if best else "no evaluation"
        label = f" {plain(name, 30)}: {what}"                      # Matplotlib keeps what begins with "_" out of the legend
        for scale, values in (("loss", numbers_of(series, "loss")), ("accuracy in %", percent_of(series, "accuracy"))):
            axes[scale].plot(numbers_of(series, "step"), values, marker="o", markersize=3, label=label, **own)
        if best:
            axes["accuracy in %"].plot(best[0], 100 * best[1], "*", markersize=10, color=own["color"])
    if any(evaluated.values()):
        axes["accuracy in %"].plot([], [], "*", markersize=10, color="black", label="best evaluation of a run")
    handles, labels = axes["accuracy in %"].get_legend_handles_labels()
    columns = 1 if len(runs) <= 3 else 2
    figure.legend(handles, labels, fontsize="small", loc="outside lower left", ncols=columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // columns))
    axes["loss"].set_title("loss (thin: training)")
    if "attention loss" in axes:
        _use_log_scale_if_needed(axes["loss"])
    drawn = [value for line in axes["accuracy in %"].get_lines() for value in line.get_ydata() if value == value]
    axes["accuracy in %"].set_ylim(max(0, min(drawn, default=0) - 3), min(103, max(drawn, default=100) + 3))
    return figure


def _panels(runs: Iterable[Sequence[dict]], title: str) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure and its panels by SCALES; without attention loss where no run has one."""
    supervised = [event for events in runs for event in events if event.get("attention_loss") is not None]
    scales = [scale for scale in SCALES if supervised or scale != "attention loss"]
    figure = Figure(figsize=(4 * len(scales), 3.6), layout="constrained")
    axes = dict(zip(scales, figure.subplots(1, len(scales))))
    for scale, each in axes.items():
        each.set(xlabel="step", title=scale)
        each.grid(alpha=0.3)
    axes["learning rate"].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    set_suptitle(figure, title)
    return figure, axes


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the mean over the last steps, up to 100 and a fiftieth of all; NaN where one of them is."""
    width = min(100, len(values) // 50) or 1
    return [sum(part) / len(part) for end in range(1, len(values) + 1) if (part := values[max(0, end - width):end])]


def _noisy(axes: Axes, steps: Sequence[float], values: Sequence[float], label: str) -> None:
    """Draw what varies from step to step, and its mean over the last steps."""
    smooth = _smooth(values)
    if smooth != values:
        axes.plot(steps, values, color=COLORS[0], linewidth=0.7, alpha=0.3)
    axes.plot(steps, smooth, color=COLORS[0], linewidth=1.2, label=label)


def find_invalid_event(events: Sequence[dict]) -> str | None:
    """Describe the first event of run.log.scan_log that cannot be drawn, with its number; None if there is none."""
    for number, event in enumerate(events, start=1):
        kind = event["event"]
        for field in (*DRAWN.get(kind, ()), *({"attention_loss"} & event.keys() if kind == "train" else ())):
            if field not in event:
                return f"event {number}: {'a train' if kind == 'train' else 'an eval'} event without its \"{field}\""
            if number_of(event, field) is None:
                return f"event {number}: \"{field}\" is {plain(repr(event[field]), 30)}, not a number"
    return None


def _use_log_scale_if_needed(axes: Axes) -> None:
    """Use a logarithmic scale if a large attention loss in the training loss would flatten the other curves."""
    values = [value for line in axes.get_lines() for value in line.get_ydata() if 0 < value < float("inf")]
    if values and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def sweep(rows: Sequence[dict], title: str = "", tried: str = "learning_rate") -> Figure:
    """Draw accuracy over the values tried, from the rows of sweep.py, with 95 % intervals: trials as points, the chosen one in a
    ring, hollow if the images are too few to distinguish them from it; the final run as a star next to it."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    trials = [row for row in rows if row["run"] != FINAL]
    ended, final = ended_trials(rows), [row for row in rows if row["run"] == FINAL and row["status"] == "done"]
    chosen = chosen_of(rows, tried) if ended and any(row["run"] == FINAL for row in rows) else None
    alike = like(rows, chosen) if chosen else []
    if distinct := [row for row in ended if row not in alike]:
        _with_intervals(axes, distinct, tried, fmt="o", color=COLORS[0],
                        label=f"on the {ended[0]['images']} images held out, 95% interval")
    if alike:
        _with_intervals(axes, alike, tried, fmt="o", color=COLORS[0], markerfacecolor="white",
                        label="the same images, too few to distinguish it from the choice")
    if chosen:
        reason = f", {BY_LOSS}".replace(" within", "\nwithin") * is_by_loss(rows, chosen)
        axes.plot(chosen[tried], 100 * chosen["accuracy"], "o", markersize=12, markerfacecolor="none", markeredgewidth=1.5,
                  color="black", label=f"chosen: {chosen[tried]:g}{reason}")
    for row in trials:
        if row not in ended:
            axes.axvline(row[tried], color="tab:red", linestyle=":", label="diverged")
    if final:
        next_to = axes.transData + transforms.ScaledTranslation(0.1, 0, figure.dpi_scale_trans)
        test = f"on {final[0]['images']} {final[0].get('split', 'test')} images: {final[0]['accuracy']:.2%}"
        _with_intervals(axes, final, tried, fmt="*", markersize=12, color=COLORS[1], transform=next_to,
                        label=f"final run with {final[0][tried]:g}, {test}")
    axes.set(xlabel=spoken(tried), ylabel="accuracy in %", title=plain(title))
    if ends := [100 * end for row in [*ended, *final] for end in result_of(row).interval]:
        axes.set_ylim(min(ends) - 3, max(ends) + 3)                   # Matplotlib ignores what is drawn next to its value
    values = [row[tried] for row in trials]
    if min(values, default=1) > 0:
        axes.set_xscale("log")
    elif above := [value for value in values if value > 0]:
        axes.set_xscale("symlog", linthresh=min(above))               # it can show a weight of 0
    many = len(values) > 6
    axes.set_xticks(values, [f"{value:g}" for value in values], minor=False, rotation=45 * many, ha="right" if many else "center")
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))       # one "diverged" for all of them
    figure.legend(handles.values(), handles.keys(), fontsize="small", loc="outside lower center", ncols=2)
    return figure


def _with_intervals(axes: Axes, rows: Sequence[dict], tried: str, **how) -> None:
    """Draw the accuracies of rows with error bars of 95 %."""
    values, percent = [row[tried] for row in rows], [100 * row["accuracy"] for row in rows]
    low, high = zip(*(result_of(row).interval for row in rows))
    lengths = [[abs(at - 100 * end) for at, end in zip(percent, ends)] for ends in (low, high)]
    axes.errorbar(values, percent, lengths, capsize=3, elinewidth=1, **how)


# -------------------------------------------------------------------------------------------------- files


def output_paths(output: str | None, folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the files of the pictures called `names`: the file `output`, or in the folder `output`, or in `folder` if that is
    None. The second of two equal names (of a.png and a.jpg) gets a -2.

    Raises OutputError, also if they cannot be written: before any work, without leaving a file.
    """
    if output is None or Path(output).is_dir() or not Path(output).suffix:
        names = _distinct(names)
        paths = [(folder if output is None else Path(output)) / f"{name}.png" for name in names]
    elif Path(output).suffix.lower() not in SUFFIXES:
        raise OutputError(f"--output {output}: unknown format. Use {', '.join(SUFFIXES)}, or a folder")
    elif len(names) > 1:
        raise OutputError(f"--output {output} is one file, but there are {len(names)} pictures: give a folder")
    else:
        paths = [Path(output)]
    nearest = next(parent for parent in paths[0].absolute().parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise OutputError(f"cannot write {paths[0]}: {nearest} is not a folder. Choose another --output")
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise OutputError(f"cannot write {paths[0]}: {error.strerror} in {nearest}. Choose another --output") from error
    for path in paths:
        if os.path.isdir(path):
            raise OutputError(f"cannot write {path}: it is a folder. Choose another --output")
    return paths


def _distinct(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for stem in names:
        numbered = (f"{stem}-{number}" for number in itertools.count(2))
        found.append(next(name for name in itertools.chain([stem], numbered) if name not in found))
    return found


def save(figure: Figure, path: str | Path) -> None:
    """Write .png, .pdf or .svg, atomically. Raises StorageError."""
    suffix = Path(path).suffix.lstrip(".").lower()
    with warnings.catch_warnings():                    # letters that no font has are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from|Matplotlib currently does not support")
        atomic_write(path, lambda unfinished: figure.savefig(unfinished, dpi=120, format=suffix))
