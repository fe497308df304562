"""Pictures of images and attention: every panel shows the values that it was given, under the right name."""

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
    """Draw the figure: this finds errors that building it does not, such as invalid texts and collapsed layouts."""
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


# ------------------------------------------------------------------------------------------------ attention


def test_maps_over_an_image(tmp_path):
    """Two maps share a row with the image; both panels of a map have its weights, and its scale below the first."""
    image, maps = images(1)[0], named(2, "reader")
    photo = RANDOM.integers(0, 256, (240, 320, 3), dtype=np.uint8)
    figure = pictures.over_image(image, "a: 60 %\nb: 40 %", maps, "a title\nwith a $second$ line", "a note", "a scale", photo)
    shown, first, over, second, over_second, *bars = figure.axes if len(figure.axes) == 7 else pytest.fail(str(figure.axes))
    assert shown.get_title() == "image as the model saw it" and "a: 60 %" in shown.get_xlabel()
    assert np.array_equal(shown.images[0].get_array(), image)
    for (name, heat), plain, lit in zip(maps, (first, second), (over, over_second)):
        assert plain.get_title() == name
        for panel in (plain, lit):
            assert np.array_equal(panel.images[-1].get_array(), heat) and panel.images[-1].get_clim() == (0, 4 * heat.mean())
        assert lit.images[0].get_array().shape == photo.shape, "the photograph's own pixels"
        assert lit.images[0].get_extent() == lit.images[1].get_extent() == [-0.5, 319.5, 239.5, -0.5]
    assert [bar.get_xlabel() for bar in bars] == ["a scale", "a scale"]
    assert "a note" in words(figure) and r"with a \$second\$ line" in words(figure)
    assert saved(figure, tmp_path).std() > 3 and not outside(figure)


def opacity(heat: np.ndarray) -> np.ndarray:
    """Return the opacity of a map over a photograph, pixel by pixel."""
    over = pictures.over_image(images(1)[0], "", [("a map", heat)]).axes[2].images[-1]
    return over.to_rgba(over.get_array())[..., 3]


def test_opacity_follows_the_weights():
    peak = np.zeros((8, 8), np.float32)
    peak[2, 3] = 0.5
    assert opacity(peak)[2, 3] == pytest.approx(pictures.OPACITY) and opacity(peak).sum() == pytest.approx(pictures.OPACITY)
    ramp = opacity(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8) ** 4)
    assert (np.diff(ramp.ravel()) >= 0).all() and ramp[0, 0] == 0


def test_even_attention_is_even_and_weak():
    even = opacity(np.full((8, 8), 1 / 64, np.float32))
    assert len(np.unique(even)) == 1 and 0.05 < even[0, 0] < 0.25


def test_a_photograph_keeps_a_part_of_its_colors():
    photo = np.zeros((8, 8, 3), np.uint8)
    photo[..., 0] = 240
    over = pictures.over_image(photo, "", [("a map", np.zeros((2, 2)))]).axes[2]
    red, green, blue = over.images[0].get_array()[0, 0]
    assert 100 < red < 240 and 0 < green == blue < 80


def test_negative_weights_are_blue_and_nothing_is_transparent():
    heat = np.array([[-0.5, 0.0], [0.25, 0.5]], dtype=np.float32)
    _, plain, over, _ = pictures.over_image(images(1)[0], "", [("a map", heat)]).axes
    for panel in (plain, over):
        drawn = panel.images[-1]
        assert drawn.get_clim() == (-1.25, 1.25)
        negative, none, weak, strong = drawn.to_rgba(drawn.get_array()).reshape(4, 4)
        assert negative[2] > 0.8 > 0.3 > negative[0] and strong[0] > 0.8 > 0.3 > strong[2]
        assert none[3] < 0.02 and 0 < weak[3] < strong[3] == pytest.approx(negative[3], abs=0.01)
    _, plain, over, _ = pictures.over_image(images(1)[0], "", [("a map", np.zeros((4, 4)))]).axes
    assert plain.images[0].get_clim()[1] > 0 and not opacity(np.zeros((4, 4))).any()


def test_small_maps_say_their_range():
    tiles = [("layer 1", np.full((4, 4), -0.0012)), ("layer 2", np.array([[-0.5, 0.25]])), ("layer 3", np.array([[0, 0.19]]))]
    figure = pictures.variants(images(1)[0], tiles)
    assert set(titled(figure)) == {"layer 1\n-0.0012", "layer 2\n-0.5 to 0.25", "layer 3\nmax 0.19"}
    bar = figure.axes[-1]
    assert [tick.get_text() for tick in bar.get_xticklabels()] == ["-max", "0", "max"]


@pytest.mark.parametrize("layers", [1, 10])
def test_every_layer_and_head_has_its_map(layers):
    image, tiles, heads = images(1)[0], named(layers), named(3, "head")
    groups = {"every layer": tiles, "every head": heads}
    figure = pictures.attention(image, "words", named(1, "chosen"), groups, "a title", "a note")
    found = {title.splitlines()[0]: axes for title, axes in titled(figure).items()}
    for name, heat in [*tiles, *heads]:
        assert np.array_equal(found[name].images[-1].get_array(), heat) and f"max {heat.max():.2g}" in found[name].get_title()
    assert {"every layer", "every head", "a title", "a note", "words"} <= set(words(figure))
    assert len(figure.axes) == 4 + layers + 3 + 1, "one scale for all small maps"


@pytest.mark.parametrize(("layers", "heads", "readers"), [(12, 3, 2), (12, 12, 1), (26, 4, 1), (6, 3, 1)])
def test_a_sheet_of_attention_is_mostly_panels(layers, heads, readers):
    """The sheet of a distilled DeiT used to have 1632 x 2938 pixels, half of them blank, with four equal bars."""
    image = images(1, 32, 32)[0]
    groups = {f"every layer, {reader}": named(layers) for reader in range(readers)}
    groups["every head"] = named(heads * readers, "head")
    figure = pictures.attention(image, "a\nb\nc\nd", named(readers, "chosen"), groups, "a title")
    width, height = figure.get_size_inches()
    panels = sum(box.width * box.height for axes in figure.axes if axes.images for box in (axes.get_position(),))
    assert panels > 0.5 and width * 120 < 1500 and height * 120 < 2200, (panels, width, height)


@pytest.mark.parametrize(("height", "width"), [(8, 64), (32, 32), (64, 16)])
def test_scales_are_no_larger_than_their_panels(height, width):
    image = images(1, height, width)[0]
    for figure in (pictures.over_image(image, "", named(1)), pictures.over_image(image, "", named(2)),
                   pictures.positions(np.zeros((4, 4, 4, 4), np.float32))):
        figure.draw_without_rendering()                        # makes a panel as narrow as its image
        panels = [axes.get_position() for axes in figure.axes if axes.images]
        bars = [axes.get_position() for axes in figure.axes if not axes.images]
        assert bars
        for bar in bars:
            assert any(abs(bar.x0 - box.x0) < 0.002 and bar.width <= box.width + 0.002 and bar.y1 < box.y0 for box in panels)


def test_columns_leave_little_empty():
    assert [pictures._columns(count, 5, 8) for count in (2, 3, 6, 12, 24, 26, 38)] == [2, 3, 6, 6, 8, 7, 8]


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


def test_distance_leaves_out_a_head_that_attends_to_nothing():
    axes, = pictures.distance(np.array([[4.0, np.nan], [np.nan, np.nan]]), 10).axes
    mean = axes.get_lines()[-1].get_ydata()
    assert mean[0] == 4 and np.isnan(mean[1]) and axes.get_ylim() == (0, 5)


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
    assert axes.images[0].get_clim() == (-1, 1) and "cosine" in bar.get_xlabel()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "3"]


@pytest.mark.parametrize(("height", "width"), [(1, 16), (8, 8), (16, 4)])
def test_the_words_of_positions_and_maps_fit(height, width):
    assert not outside(pictures.positions(np.zeros((height, width, height, width), np.float32), "a title"))
    image, maps = images(1, 4 * height, 4 * width)[0], named(1, "token", 4 * height, 4 * width)
    assert not outside(pictures.over_image(image, "words", maps, "a title", "", "share of the joint attention"))


def test_a_long_name_of_a_map_does_not_reach_its_neighbors():
    maps = [("layer 24, mean of the heads, mean of all queries", np.eye(8))] * 2
    for count in (1, 2):
        figure = pictures.over_image(images(1, 32, 32)[0], "", maps[:count])
        figure.savefig(io.BytesIO())
        for axes in figure.axes[1:2 * count:2]:
            assert axes.title.get_window_extent().width <= 1.05 * axes.get_window_extent().width
            assert " ".join(axes.get_title().split()) == maps[0][0]


def test_the_words_of_before_and_after_fit_their_panels():
    name, heat = "Wide-Mouthed WWWW Mammal of the North", np.zeros((4, 4))
    row = pictures.BeforeAfter("taught", images(1)[0], name, (heat, name, 1.0), (heat, name, 0.5), heat)
    figure = pictures.before_and_after([row, row._replace(edit=None)], "a title")
    assert not outside(figure)
    for axes in figure.axes[:8]:
        assert axes.xaxis.label.get_window_extent().width <= 1.02 * axes.get_window_extent().width
    assert figure.axes[3].get_xlabel().splitlines()[1] == "true class: 50.0%"


def outside(figure) -> list[str]:
    """Return the texts that the picture cuts off."""
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
