"""Pictures: each function draws what it is given, and saves."""

import io
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from utils import plots

RANDOM = np.random.default_rng(0)
EVENTS = [{"event": "start", "step": 0}, {"event": "eval", "step": 0, "split": "test", "loss": 2.3, "accuracy": 0.1, "top5": 0.5}]
for _step in range(1, 6):
    EVENTS.append({"event": "train", "step": _step, "loss": 2.0 / _step, "lr": 0.01 * _step})
EVENTS += [{"event": "eval", "step": 5, "split": "val", "loss": 0.5, "accuracy": 0.75, "top5": 0.9},
           {"event": "eval", "step": 5, "split": "test", "loss": "nan", "accuracy": 0.5, "top5": 0.8}]


def images(count, height=24, width=32) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def heats(count, height=24, width=32) -> np.ndarray:
    return RANDOM.random((count, height, width))


def probabilities(count, classes) -> np.ndarray:
    rows = RANDOM.random((count, classes))
    return rows / rows.sum(axis=1, keepdims=True)


def trial(rate, accuracy, run=None, status="done") -> dict:
    return {"run": run or f"lr-{rate:g}", "learning_rate": rate, "status": status} | (
        {"accuracy": accuracy, "images": 40 if run is None else 60} if status == "done" else {})


SWEEP = [trial(0.001, 0.5), trial(0.01, 0.75), trial(0.1, None, status="diverged at step 3"),
         trial(1.0, None, status="diverged at step 1"), trial(0.01, 0.625, run="final")]


def predictions(count, classes=10) -> Figure:
    return plots.predictions(images(count), probabilities(count, classes), [f"class {c}" for c in range(classes)], [0] * count)


FIGURES = {
    "curves": lambda: plots.learning_curves(EVENTS, "a run"),
    "curves of no events": lambda: plots.learning_curves([]),
    "curves before the first step": lambda: plots.learning_curves(EVENTS[:2]),
    "curves of one step": lambda: plots.learning_curves(EVENTS[2:3]),
    "curves of a diverged run": lambda: plots.learning_curves([{"event": "train", "step": 1, "loss": "nan", "lr": 0.1}]),
    "a sweep": lambda: plots.sweep(SWEEP, "a sweep"),
    "a sweep of one rate": lambda: plots.sweep(SWEEP[:1]),
    "a sweep that diverged": lambda: plots.sweep(SWEEP[2:4]),
    "one prediction": lambda: predictions(1),
    "five predictions": lambda: predictions(5),
    "eight predictions without labels": lambda: plots.predictions(images(8), probabilities(8, 3), "abc"),
    "two classes": lambda: predictions(3, classes=2),
    "attention over an image": lambda: plots.attention_over_image(images(1)[0], heats(1)[0], "title"),
    "no attention anywhere": lambda: plots.attention_over_image(images(1)[0], np.zeros((24, 32))),
    "one layer": lambda: plots.attention_of_layers(images(1)[0], heats(1)),
    "twelve layers": lambda: plots.attention_of_layers(images(1)[0], heats(12), "title"),
    "a tall image": lambda: plots.attention_of_layers(images(1, 60, 20)[0], heats(4, 60, 20)),
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


def test_nothing_opens_a_window():
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def lines(axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_learning_curves_show_the_numbers():
    loss, accuracy, rate = plots.learning_curves(EVENTS, "a run").axes
    assert lines(loss)["train"] == ([1, 2, 3, 4, 5], [2.0, 1.0, 2 / 3, 0.5, 0.4])
    assert lines(loss)["val"] == ([5], [0.5]) and lines(loss)["test"][0] == [0, 5]
    assert lines(accuracy)["val top-1"] == ([5], [75.0]) and lines(accuracy)["val top-5"] == ([5], [90.0])
    assert lines(accuracy)["test top-1"] == ([0, 5], [10.0, 50.0])
    assert [line.get_ydata()[-1] for line in rate.get_lines()] == [0.05]


def test_a_split_has_one_colour():
    loss, accuracy, _ = plots.learning_curves(EVENTS).axes
    colours = {axes: {line.get_label().split()[0]: line.get_color() for line in axes.get_lines()} for axes in (loss, accuracy)}
    assert colours[loss]["val"] == colours[accuracy]["val"] != colours[loss]["test"] == colours[accuracy]["test"]


def test_a_sweep_shows_trials_and_the_final_run():
    axes, = plots.sweep(SWEEP, "a sweep").axes
    drawn = lines(axes)
    assert drawn["on the 40 images held out"] == ([0.001, 0.01], [50.0, 75.0])
    assert drawn["final run, test: 62.50% of 60"] == ([0.01], [62.5])
    diverged = [line.get_xdata()[0] for line in axes.get_lines() if line.get_label() == "diverged"]
    assert diverged == [0.1, 1.0] and axes.get_xscale() == "log" and list(axes.get_xticks()) == [0.001, 0.01, 0.1, 1.0]
    assert [text.get_text() for text in axes.get_legend().get_texts()].count("diverged") == 1


def words(axes) -> list[str]:
    return [line for text in axes.findobj(Text) for line in text.get_text().splitlines() if line]


THREE_IMAGES = [[0.1, 0.2, 0.6, 0.1], [0.7, 0.15, 0.05, 0.1], [0.25, 0.3, 0.05, 0.4]]


def test_predictions_name_the_best_three():
    axes = plots.predictions(images(3), np.array(THREE_IMAGES), ["a", "b", "c", "d"], [2, 3, None], ["x", "y", "z"]).axes
    assert set(words(axes[0])) > {"true: c", "c: 60.0%", "b: 20.0%"}
    assert set(words(axes[1])) == {"true: d", "a: 70.0%", "b: 15.0%", "d: 10.0%"}
    assert set(words(axes[2])) == {"z", "d: 40.0%", "b: 30.0%", "a: 25.0%"}
    colours = [each.title.get_color() for each in axes]
    assert len(set(colours)) == 3                     # right, wrong, unknown


def test_predictions_without_labels():
    axes = plots.predictions(images(1), np.array(THREE_IMAGES[:1]), ["a", "b", "c", "d"]).axes
    assert not any("true" in word for word in words(axes[0])) and "c: 60.0%" in words(axes[0])


def test_attention_lights_the_image():
    image, heat = images(1)[0], heats(1)[0]
    plain, alone, lit = plots.attention_over_image(image, heat).axes[:3]
    assert np.array_equal(plain.images[0].get_array(), image) and np.array_equal(alone.images[0].get_array(), heat)
    assert np.array_equal(lit.images[0].get_array(), (image * heat[..., None]).astype(np.uint8))
    assert alone.images[0].get_clim() == (0, 1)


@pytest.mark.parametrize("layers", [1, 5, 6, 12, 24])
def test_every_layer_has_its_picture(layers):
    drawn = heats(layers)
    figure = plots.attention_of_layers(images(1)[0], drawn)
    titled = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(titled) == ["image", *(f"layer {number}" for number in range(1, layers + 1))]
    for number, heat in enumerate(drawn, start=1):
        assert np.array_equal(titled[f"layer {number}"].images[-1].get_array(), heat)


def test_save_takes_a_name_or_a_stream():
    stream = io.BytesIO()
    plots.save(plots.learning_curves(EVENTS), stream)
    assert stream.getvalue().startswith(b"\x89PNG")
