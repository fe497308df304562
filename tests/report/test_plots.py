"""Figures of runs: each function draws the numbers that it is given."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from utils.report import plots

EVENTS = [{"event": "start", "step": 0}, {"event": "eval", "step": 0, "split": "test", "loss": 2.3, "accuracy": 0.1, "top5": 0.5}]
for _step in range(1, 6):
    EVENTS.append({"event": "train", "step": _step, "loss": 2.0 / _step, "lr": 0.01 * _step})
EVENTS += [{"event": "eval", "step": 5, "split": "val", "loss": 0.5, "accuracy": 0.75, "top5": 0.9},
           {"event": "eval", "step": 5, "split": "test", "loss": "nan", "accuracy": 0.5, "top5": 0.8}]


def trial(rate, accuracy, run=None, status="done") -> dict:
    return {"run": run or f"lr-{rate:g}", "learning_rate": rate, "status": status} | (
        {"accuracy": accuracy, "images": 40 if run is None else 60, "loss": 1.0} if status == "done" else {})


WEIGHTS = [{"attention_loss_weight" if key == "learning_rate" else key: value for key, value in trial(*each).items()}
           for each in ((0, 0.5), (0.1, 0.75), (10, 0.25), (0.1, 0.8, "final"))]
MANY = [trial(0.001 * number, number / 12) for number in range(1, 13)]                 # 0.012: all of them are right
SWEEP = [trial(0.001, 0.5), trial(0.01, 0.75), trial(0.1, None, status="diverged at step 3"),
         trial(1.0, None, status="diverged at step 1"), trial(0.01, 0.625, run="final")]


SUPERVISED = [event | ({"attention_loss": 0.5 / event["step"]} if event["event"] == "train" else {}) for event in EVENTS]

FIGURES = {
    "curves": lambda: plots.learning_curves(EVENTS, "a run"),
    "curves before the first step": lambda: plots.learning_curves(EVENTS[:2]),
    "curves of a diverged run": lambda: plots.learning_curves([{"event": "train", "step": 1, "loss": "nan", "lr": 0.1}]),
    "a sweep": lambda: plots.sweep(SWEEP, "a sweep"),
    "a sweep of twelve": lambda: plots.sweep([*MANY, trial(0.012, 0.0, run="final")], "a sweep"),
    "a sweep that diverged": lambda: plots.sweep(SWEEP[2:4]),
    "a sweep of weights": lambda: plots.sweep(WEIGHTS, "a sweep", "attention_loss_weight"),
    "curves of what lacks everything": lambda: plots.learning_curves([{"a": 1}, {"event": "train"}, {"event": "eval"},
                                                                      {"event": "train", "step": 1, "loss": "abc", "lr": None}]),
    "curves of letters that no font has": lambda: plots.compare_learning_curves({"犬 🐕": EVENTS, "\udcff": EVENTS},
                                                                                 "\u0b95 \udcff"),
    "curves of two runs": lambda: plots.compare_learning_curves({"a $run$": SUPERVISED, "another": EVENTS}, "two runs"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", FIGURES)
def test_every_figure_saves(tmp_path, case):
    figure = FIGURES[case]()
    assert isinstance(figure, Figure)
    plots.save(figure, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.format == "PNG"
        width, height = figure.get_size_inches()
        assert picture.size == pytest.approx((120 * width, 120 * height), abs=1)
        assert min(picture.size) >= 150 and max(picture.size) < 3000
        assert np.asarray(picture.convert("L")).std() > 3          # something is on it
    assert 2_000 < (tmp_path / "picture.png").stat().st_size < 1_000_000


def lines(axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def with_errors(axes) -> dict[str, tuple[list, list, list]]:
    """Return {label: x, y, and the ends of the error bars}."""
    return {bars.get_label(): (list(bars[0].get_xdata()), list(bars[0].get_ydata()),
                               [[round(y, 1) for y in bar[:, 1]] for bar in bars[2][0].get_segments()])
            for bars in axes.containers}


def test_learning_curves_show_the_numbers():
    loss, accuracy, rate = plots.learning_curves(EVENTS, "a run").axes
    assert lines(loss)["train"] == ([1, 2, 3, 4, 5], [2.0, 1.0, 2 / 3, 0.5, 0.4])
    assert lines(loss)["val"] == ([5], [0.5]) and lines(loss)["test"][0] == [0, 5]
    assert lines(accuracy)["val"] == ([5], [75.0]) and lines(accuracy)["val, top-5"] == ([5], [90.0])
    assert lines(accuracy)["test"] == ([0, 5], [10.0, 50.0]) and "test, top-5" not in lines(accuracy)
    few_classes = [event | {"top5": 1.0} if event["event"] == "eval" else event for event in EVENTS]
    assert "val, top-5" not in lines(plots.learning_curves(few_classes, "five classes").axes[1])
    assert [line.get_ydata()[-1] for line in rate.get_lines()] == [0.05]
    colors = [{line.get_label().split(",")[0]: line.get_color() for line in axes.get_lines()} for axes in (loss, accuracy)]
    assert colors[0]["val"] == colors[1]["val"] != colors[0]["test"] == colors[1]["test"]


def evaluation(step, accuracy, loss=1.0, split="test", **more) -> dict:
    return {"event": "eval", "step": step, "split": split, "loss": loss, "accuracy": accuracy, "top5": 1.0} | more


def test_the_best_step_is_marked():
    """By the rule of best.pt: within one image of the highest accuracy the loss decides."""
    series = [evaluation(0, 0.95), evaluation(10, 0.90, 0.5), evaluation(20, 0.91, 0.6), evaluation(30, 0.80)]
    counted = [event | {"images": 100} for event in series]
    loss, accuracy, _ = plots.learning_curves(counted).axes
    assert lines(loss)["best: step 10"][0] == lines(accuracy)["best: step 10, 90.0%"][0] == [10, 10]


def test_a_long_run_has_a_smooth_line_over_the_noise():
    noise = [float(step % 2) for step in range(1000)]
    events = [{"event": "train", "step": step, "loss": value, "lr": 0.1, "accuracy": 0.5} for step, value in enumerate(noise, 1)]
    loss, accuracy, _ = plots.learning_curves(events).axes
    raw, smooth = loss.get_lines()
    assert list(raw.get_ydata()) == noise and raw.get_alpha() < 0.5 and list(smooth.get_ydata()[-20:]) == [0.5] * 20
    assert list(loss.get_legend_handles_labels()[1]) == ["train"] and lines(accuracy)["train, as fed"][1][-1] == 50


def test_a_sweep_shows_trials_and_the_final_run():
    """With Wilson's intervals. The choice has a ring, and values that the images cannot distinguish from it are hollow."""
    figure = plots.sweep(SWEEP, "a sweep")
    axes, = figure.axes
    drawn = with_errors(axes)
    assert drawn["on the 40 images held out, 95% interval"] == ([0.001, 0.01], [50.0, 75.0], [[35.2, 64.8], [59.8, 85.8]])
    assert drawn["final run with 0.01, on 60 test images: 62.50%"] == ([0.01], [62.5], [[49.8, 73.6]])
    assert lines(axes)["chosen: 0.01"] == ([0.01], [75.0])
    low, high = plots.sweep([*SWEEP[:2], trial(0.01, 0.0, run="final")]).axes[0].get_ylim()
    assert low < 0 and high > 85.8, "the bars of the final run are inside"
    assert not any("too few" in label for label in drawn)
    close = plots.sweep([*SWEEP[:2], trial(0.003, 29 / 40), trial(0.03, 28 / 40), *SWEEP[2:]]).axes[0]
    hollow = with_errors(close)["the same images, too few to distinguish it from the choice"]
    assert hollow[:2] == ([0.003, 0.03], [72.5, 70.0])
    assert with_errors(close)["on the 40 images held out, 95% interval"][:2] == ([0.001, 0.01], [50.0, 75.0])
    assert "chosen: 0.01, the lowest loss\nwithin one image of the highest accuracy" in lines(close)
    assert "chosen: 0.01" not in lines(plots.sweep(SWEEP[:2]).axes[0]), "before the final run nothing is chosen"
    diverged = [line.get_xdata()[0] for line in axes.get_lines() if line.get_label() == "diverged"]
    assert diverged == [0.1, 1.0] and axes.get_xscale() == "log" and list(axes.get_xticks()) == [0.001, 0.01, 0.1, 1.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()].count("diverged") == 1


def test_several_runs_have_one_color_and_one_line_of_the_legend_each():
    """Eleven runs used to have 22 entries in each legend."""
    figure = plots.compare_learning_curves({"a": SUPERVISED, "b": EVENTS, "_c": EVENTS[3:4]}, "three runs")
    loss, attention, accuracy, rate = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        " a: val 75.0% at step 5", " b: val 75.0% at step 5", " _c: no evaluation", "best evaluation of a run"]
    assert not any(axes.get_legend() for axes in figure.axes)
    assert lines(accuracy)[" b: val 75.0% at step 5"] == ([5], [75.0]) and lines(loss)[" a: val 75.0% at step 5"] == ([5], [0.5])
    assert [list(line.get_ydata()) for line in attention.get_lines()] == [[0.5, 0.25, 0.5 / 3, 0.125, 0.1]]
    thin = [line for line in loss.get_lines() if line.get_linewidth() < 1]
    assert list(thin[0].get_ydata()) == [2.0, 1.0, 2 / 3, 0.5, 0.4] and len(thin) == 3
    colors = {line.get_label()[1]: line.get_color() for line in accuracy.get_lines() if line.get_label()[0] == " "}
    assert len(set(colors.values())) == 3 and [line.get_color() for line in rate.get_lines()] == list(colors.values())
    assert [axes.get_title() for axes in figure.axes] == ["loss (thin: training)", *plots.SCALES[1:]]
    styles = plots.compare_learning_curves({str(number): EVENTS for number in range(11)}).axes[-1].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in styles}) == 11


def test_every_accuracy_of_several_runs_is_inside_the_panel():
    runs = {"a": [evaluation(step, accuracy) for step, accuracy in ((0, 0.1), (5, 0.5), (10, 0.9), (15, 0.95))],
            "b": [evaluation(step, 0.75) for step in (5, 10)]}
    accuracy = plots.compare_learning_curves(runs).axes[1]
    low, high = accuracy.get_ylim()
    assert low < 10 and high > 95


@pytest.mark.parametrize(("images", "labels"), [
    ((48, 128), [" a: val (48 images) 75.0% at step 5", " b: val (128 images) 75.0% at step 5"]),
    ((48, 48), [" a: val 75.0% at step 5", " b: val 75.0% at step 5"]),
    ((48, None), [" a: val (48 images) 75.0% at step 5", " b: val 75.0% at step 5"])])       # None: of an early version
def test_different_numbers_of_images_are_in_the_legend(images, labels):
    runs = {name: [evaluation(5, 0.75, split="val", **({"images": count} if count else {}))] for name, count in zip("ab", images)}
    found = [text.get_text() for text in plots.compare_learning_curves(runs).legends[0].get_texts()]
    assert found == [*labels, "best evaluation of a run"]


def test_a_heavy_attention_loss_leaves_room_for_the_others():
    mixed = {"attention_loss": 0.2}
    heavy = [event | (mixed | {"loss": 24 - event["step"]} if event["event"] == "train" else {}) for event in EVENTS]
    loss, *_ = plots.learning_curves(heavy).axes
    assert lines(loss)["train (with attention loss)"][1] == [23, 22, 21, 20, 19] and loss.get_yscale() == "log"
    light = plots.learning_curves(SUPERVISED).axes[0]
    assert light.get_yscale() == plots.learning_curves(EVENTS).axes[0].get_yscale() == "linear"


def test_the_legend_of_many_runs_hides_no_curve_and_fits():
    figure = plots.compare_learning_curves({f"_run {number}": SUPERVISED for number in range(11)}, "eleven runs")
    figure.savefig(io.BytesIO())
    box = figure.legends[0].get_window_extent()
    assert box.y0 >= 0 and box.x0 >= 0 and box.x1 <= figure.bbox.x1
    assert all(box.y1 < axes.get_window_extent().y0 for axes in figure.axes)


def test_a_title_has_no_lone_last_word():
    assert plots.balanced("one two three four", 15) == ["one two", "three four"]
    assert plots.balanced("", 9) == [""] and plots.balanced("short", 9) == ["short"]
    assert plots.balanced("a b /c/defghijkl", 14) == ["a b", "/c/defghijkl"], "a path is not divided where it fits"
    assert plots.balanced("a" * 25, 10) == ["aaaaaaaaa", "aaaaaaaaa", "aaaaaaa"]


def test_output_paths(tmp_path):
    assert [path.name for path in plots.output_paths(None, tmp_path / "x/y", ["a", "b", "a"])] == ["a.png", "b.png", "a-2.png"]
    assert plots.output_paths(str(tmp_path / "c.PDF"), tmp_path, ["a"]) == [tmp_path / "c.PDF"] and not list(tmp_path.iterdir())
    with pytest.raises(plots.OutputError, match="give a folder"):
        plots.output_paths(str(tmp_path / "c.pdf"), tmp_path, ["a", "b"])


def test_a_sweep_of_weights_shows_a_weight_of_zero():
    axes, = plots.sweep(WEIGHTS, "a sweep", "attention_loss_weight").axes
    assert with_errors(axes)["on the 40 images held out, 95% interval"][:2] == ([0, 0.1, 10], [50.0, 75.0, 25.0])
    assert axes.get_xscale() == "symlog" and [text.get_text() for text in axes.get_xticklabels()] == ["0", "0.1", "10"]
    assert axes.get_xlabel() == "attention loss weight"


def test_names_are_written_as_they_are():
    assert plots.plain("a\n $x$  b") == r"a \$x\$ b" and plots.plain("a\udcff") == "a?"
    assert plots.plain("American Staffordshire terrier", 16) == "American S…rrier" and plots.plain("cat", 16) == "cat"
    figure = plots.learning_curves([], "a very long title " * 20 + "\nand a $second$ line")
    *first, last = figure.get_suptitle().splitlines()
    assert len(first) > 1 and last == r"and a \$second\$ line"


def test_the_suffix_decides_the_format(tmp_path):
    for suffix, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
        plots.save(Figure((1, 1)), tmp_path / f"a{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 3
