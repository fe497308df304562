"""Pictures of images and attention: every axes shows what it was given, under the right name."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from utils.report import pictures, plots

RANDOM = np.random.default_rng(0)
THREE_IMAGES = [[0.1, 0.2, 0.6, 0.1], [0.7, 0.15, 0.05, 0.1], [0.25, 0.3, 0.05, 0.4]]


def images(count, height=24, width=32) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def named(count, word="layer", height=48, width=64) -> list:
    return [(f"{word} {number}", RANDOM.random((height, width)).astype(np.float32)) for number in range(1, count + 1)]


def words(place) -> list[str]:
    return [line for text in place.findobj(Text) for line in text.get_text().splitlines() if line]


def titled(figure) -> dict:
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def saved(figure: Figure, folder) -> np.ndarray:
    """Drawing finds what building does not: texts that cannot be, layouts that collapse."""
    plots.save(figure, folder / "picture.png")
    with Image.open(folder / "picture.png") as picture:
        width, height = figure.get_size_inches()
        assert picture.size == pytest.approx((120 * width, 120 * height), abs=1) and max(picture.size) < 4000
        return np.asarray(picture.convert("L"))


# ---------------------------------------------------------------------------------------------- predictions


def test_predictions_name_the_best_three():
    figure = pictures.predictions(images(3), np.array(THREE_IMAGES), ["a", "b", "c", "d"], [2, 3, None], ["x", "y", "z"])
    axes = figure.axes
    assert set(words(axes[0])) > {"true: c", "predicted:", "c: 60.0%", "b: 20.0%"}
    assert set(words(axes[1])) == {"true: d", "predicted:", "a: 70.0%", "b: 15.0%", "d: 10.0%"}
    assert set(words(axes[2])) == {"z", "predicted:", "d: 40.0%", "b: 30.0%", "a: 25.0%"}
    assert len({each.title.get_color() for each in axes}) == 3                     # right, wrong, unknown
    assert pictures.best(np.array([0.25, 0.75]), ["ant", "$b$"]) == [r"\$b\$: 75.0%", "ant: 25.0%"]


# ------------------------------------------------------------------------------------------------ confusion


def test_confusion_counts_and_mistakes():
    matrix = np.array([[8, 2, 0], [0, 5, 5], [0, 0, 0]])
    shown = images(2)
    figure = pictures.confusion(matrix, ["ant", "bee", "$cat$"], shown, [("bee", "$cat$", 0.9), ("ant", "bee", 0.625)], "a title")
    table, names = figure.axes[:2]
    np.testing.assert_allclose(table.images[0].get_array(), [[0.8, 0.2, 0], [0, 0.5, 0.5], [0, 0, 0]])
    assert table.images[0].get_clim() == (0, 1) and sorted(text.get_text() for text in table.texts) == ["2", "5", "5", "8"]
    assert (table.get_xlabel(), table.get_ylabel()) == ("predicted class", "true class")
    assert [label.get_text() for label in table.get_yticklabels()] == ["ant", "bee", r"\$cat\$"]
    assert names.texts[0].get_text().splitlines() == [r"bee → \$cat\$:  5", "ant → bee:  2"]
    found = titled(figure)
    worst, second = found["\\$cat\\$: 90.0%\n(true: bee)"], found["bee: 62.5%\n(true: ant)"]
    assert np.array_equal(worst.images[0].get_array(), shown[0]) and np.array_equal(second.images[0].get_array(), shown[1])


@pytest.mark.parametrize("classes", [2, 40, 1000])
def test_confusion_of_few_and_of_many(classes, tmp_path):
    matrix = np.eye(classes, dtype=np.int64)
    figure = pictures.confusion(matrix, [f"a class called {number}" for number in range(classes)], [], [])
    table, names = figure.axes[:2]
    assert names.texts[0].get_text() == "no mistakes" and len(table.texts) == (2 if classes == 2 else 0)
    assert len(table.get_xticklabels()) == classes if classes <= 40 else "by number" in table.get_xlabel()
    if classes == 40:
        assert saved(figure, tmp_path).std() > 3


# ------------------------------------------------------------------------------------------------ attention


def test_maps_over_an_image(tmp_path):
    image, maps = images(1)[0], named(2, "reader")
    figure = pictures.over_image(image, "a: 60 %\nb: 40 %", maps, "a title\nwith a $second$ line", "a note", "a scale")
    axes = figure.axes
    assert axes[0].get_title() == "image as the model saw it" and "a: 60 %" in axes[0].get_xlabel()
    assert np.array_equal(axes[0].images[0].get_array(), image)
    for (name, heat), alone, over in zip(maps, (axes[1], axes[4]), (axes[2], axes[5])):
        assert alone.get_title() == name and np.array_equal(alone.images[0].get_array(), heat)
        assert alone.images[0].get_clim() == (0, heat.max())
        grey, lit = over.images
        np.testing.assert_allclose(lit.get_array(), heat / heat.max(), rtol=1e-6)
        np.testing.assert_allclose(grey.get_array(), image.mean(axis=-1))
        assert lit.get_extent() == grey.get_extent() == [-0.5, 31.5, 23.5, -0.5] == alone.images[0].get_extent()
    assert [bar.get_ylabel() for bar in axes[6:]] == ["a scale", "a scale"]
    assert "a note" in words(figure) and r"with a \$second\$ line" in words(figure)
    assert saved(figure, tmp_path).std() > 3


def test_negative_weights_and_no_attention_anywhere():
    heat = np.array([[-0.5, 0.0], [0.25, 0.5]], dtype=np.float32)
    _, alone, over, _ = pictures.over_image(images(1)[0], "", [("a map", heat)]).axes
    assert alone.images[0].get_clim() == (-0.5, 0.5)
    assert over.images[1].get_array().tolist() == [[0, 0], [0.5, 1]]
    _, alone, over, _ = pictures.over_image(images(1)[0], "", [("a map", np.zeros((4, 4)))]).axes
    assert not over.images[1].get_array().any() and alone.images[0].get_clim()[1] > 0


@pytest.mark.parametrize("layers", [1, 10])
def test_every_layer_and_head_has_its_map(layers):
    image, tiles, heads = images(1)[0], named(layers), named(3, "head")
    groups = {"every layer": tiles, "every head": heads}
    figure = pictures.attention(image, "words", named(1, "chosen"), groups, "a title", "a note")
    found = {title.splitlines()[0]: axes for title, axes in titled(figure).items()}
    for name, heat in [*tiles, *heads]:
        np.testing.assert_allclose(found[name].images[-1].get_array(), heat / heat.max(), rtol=1e-6)
        assert f"max {heat.max():.2g}" in found[name].get_title()
    assert {"every layer", "every head", "a title", "a note", "words"} <= set(words(figure))
    assert sum(axes.get_ylabel() == "share of max" for axes in figure.axes) == 2


def test_variants():
    maps = named(5, "way")
    figure = pictures.variants(images(1)[0], maps, "a title")
    assert [title.splitlines()[0] for title in titled(figure)] == [name for name, _ in maps]


# ------------------------------------------------------------------------------------- the paper's figure 7


def test_distance_has_a_dot_for_every_head():
    distances = RANDOM.random((3, 2)) * 10
    axes, = pictures.distance(distances, 40, "a title", "a note").axes
    heads = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert [line.get_ydata().tolist() for line in heads] == distances.T.tolist()
    assert all(line.get_xdata().tolist() == [1, 2, 3] for line in heads) and axes.get_ylim() == (0, 20)
    assert "pixels" in axes.get_ylabel() and axes.get_xlabel() == "layer"


def test_positions_are_in_their_places():
    similarity = (RANDOM.random((2, 3, 2, 3)) * 2 - 1).astype(np.float32)
    axes, bar = pictures.positions(similarity, "a title").axes
    shown = axes.images[0].get_array().filled(np.nan)
    cell = 11                                     # dots, 32 over the longer side of 3
    gap = cell * 3 // 10
    for row, column in np.ndindex(2, 3):
        top, left = row * (2 * cell + gap), column * (3 * cell + gap)
        tile = shown[top:top + 2 * cell, left:left + 3 * cell]
        np.testing.assert_array_equal(tile[cell // 2::cell, cell // 2::cell], similarity[row, column])
    assert axes.images[0].get_clim() == (-1, 1) and "cosine" in bar.get_ylabel()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "3"]


@pytest.mark.parametrize(("height", "width"), [(1, 16), (8, 8), (16, 4)])
def test_the_words_of_positions_and_maps_fit(height, width):
    assert not outside(pictures.positions(np.zeros((height, width, height, width), np.float32), "a title"))
    image, maps = images(1, 4 * height, 4 * width)[0], named(1, "token", 4 * height, 4 * width)
    assert not outside(pictures.over_image(image, "words", maps, "a title", "", "share of the joint attention"))


def test_a_long_name_of_a_map_does_not_reach_its_scale():
    maps = [("layer 24, mean of the heads, mean of all queries", np.eye(8))]
    for figure in (pictures.over_image(images(1, 32, 32)[0], "", maps), pictures.attention(images(1, 32, 32)[0], "", maps, {
            "a heading": named(2)})):
        figure.savefig(io.BytesIO())
        alone, scale = figure.axes[1], figure.axes[3]
        assert alone.title.get_window_extent().x1 < scale.get_window_extent().x0


def test_the_words_of_before_and_after_fit_their_panels():
    name, heat = "Wide-Mouthed WWWW Mammal of the North", np.zeros((4, 4))
    row = pictures.BeforeAfter("taught", images(1)[0], name, (heat, name, 1.0), (heat, name, 0.5), heat)
    figure = pictures.before_and_after([row, row._replace(edit=None)], "a title")
    assert not outside(figure)
    for axes in figure.axes[:8]:
        assert axes.xaxis.label.get_window_extent().width <= 1.02 * axes.get_window_extent().width
    assert figure.axes[3].get_xlabel().splitlines()[1] == "true class: 50.0%"


def outside(figure) -> list[str]:
    """Texts that the picture cuts off."""
    figure.savefig(io.BytesIO())
    room = figure.bbox.padded(1)
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text() and not (
        room.x0 <= (box := text.get_window_extent()).x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1)]


def test_filters_are_numbered(tmp_path):
    colors = RANDOM.random((9, 4, 4, 3))
    figure = pictures.filters(colors, np.linspace(0.5, 0.1, 9), "a title", "a note")
    assert next(iter(titled(figure))) == "1: 50.0%" and len(titled(figure)) == 9
    assert np.array_equal(figure.axes[8].images[0].get_array(), colors[8])
    assert saved(figure, tmp_path).std() > 3
