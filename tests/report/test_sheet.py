"""Rows of panels that have the size they were given."""

import numpy as np
import pytest
from matplotlib.image import AxesImage

from utils.report.sheet import BAR, GAP, MARGIN, Sheet, shape


def inches(figure, axes) -> tuple[float, ...]:
    width, height = figure.get_size_inches()
    box = axes.get_position()
    return box.x0 * width, (1 - box.y1) * height, box.width * width, box.height * height


def test_panels_have_their_size_and_place():
    sheet = Sheet(6, "a title")
    first = sheet.row(2, (1.5, 1.0), above=0.2, below=0.3)
    second = sheet.row(1, (4.0, 0.5), left=MARGIN)
    figure = sheet.finish("a note")
    boxes = [inches(figure, axes) for axes in (*first, *second)]
    assert [box[2:] for box in boxes] == [pytest.approx((1.5, 1.0))] * 2 + [pytest.approx((4.0, 0.5))]
    assert boxes[0][0] == pytest.approx(3 - 1.5 - GAP / 2) and boxes[1][0] == pytest.approx(3 + GAP / 2), "in the middle"
    assert boxes[2][:2] == pytest.approx((MARGIN, boxes[0][1] + 1.0 + 0.3 + GAP))
    assert figure.get_suptitle() == "a title" and [text.get_text() for text in figure.texts] == ["a title", "a note"]


def test_a_scale_is_as_wide_as_its_image():
    """A tall image is narrower than its panel."""
    sheet = Sheet(6)
    wide, tall = sheet.row(2, (2.0, 1.0))
    bars = []
    for axes, pixels in ((wide, (10, 20)), (tall, (40, 20))):
        drawn = axes.imshow(np.zeros(pixels))
        assert isinstance(drawn, AxesImage)
        bars.append(sheet.bar_below(axes, drawn, "words"))
    figure = sheet.finish()
    figure.draw_without_rendering()
    for axes, bar, width in ((wide, bars[0], 2.0), (tall, bars[1], 0.5)):
        (left, _, shown, _), found = inches(figure, axes), inches(figure, bar)
        assert found[2:] == pytest.approx((width, BAR)) and (left, shown) == pytest.approx((found[0], width))


def test_long_words_are_wrapped():
    sheet = Sheet(3, "word " * 30)
    sheet.heading("word " * 30)
    figure = sheet.finish("word " * 30)
    assert all(text.get_text().count("\n") >= 3 for text in figure.texts) and figure.get_figheight() > 2


def test_shapes_are_within_reason():
    assert shape(np.zeros((10, 20, 3))) == 0.5 and shape(np.zeros((1, 99, 3))) == 0.25 and shape(np.zeros((99, 1, 3))) == 2.5
