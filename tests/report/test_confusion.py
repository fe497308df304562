"""The picture of an evaluation: counts, classes that are confused, and the worst mistakes with the names of their files."""

import io
import itertools

import numpy as np
import pytest
from matplotlib.text import Text

from utils.report import confusion
from utils.report.confusion import Mistake

RANDOM = np.random.default_rng(0)


def images(count: int) -> list[np.ndarray]:
    return [RANDOM.integers(0, 256, (24, 32, 3), dtype=np.uint8) for _ in range(count)]


def test_counts_and_mistakes():
    matrix = np.array([[8, 2, 0], [0, 5, 5], [0, 0, 0]])
    shown, wrong = images(2), [Mistake("bee", "$cat$", 0.9, 0.0125, "val/bee/x.jpg"), Mistake(
        "ant", "bee", 0.625, 0.25, "val/ant/" + "a" * 60 + ".png")]
    figure = confusion.draw(matrix, ["ant", "bee", "$cat$"], shown, wrong, "a title")
    table, _, caption = figure.axes[:3]
    np.testing.assert_allclose(table.images[0].get_array(), [[0.8, 0.2, 0], [0, 0.5, 0.5], [0, 0, 0]])
    assert table.images[0].get_clim() == (0, 1) and sorted(text.get_text() for text in table.texts) == ["2", "5", "5", "8"]
    assert (table.get_xlabel(), table.get_ylabel()) == ("predicted class", "true class")
    assert [label.get_text() for label in table.get_yticklabels()] == ["ant", "bee", r"\$cat\$"]
    pairs, heading, hardest = [text.get_text() for text in caption.texts]
    assert pairs.splitlines() == [r"bee → \$cat\$:  5", "ant → bee:  2"]
    assert heading == "least accurate classes" and hardest.splitlines() == ["bee:  50.0% of 10", "ant:  80.0% of 10"]
    worst, second = figure.axes[3:]
    assert worst.get_title() == "\\$cat\\$: 90.0%\ntrue bee: 1.2%" and worst.get_xlabel() == "val/bee/x.jpg"
    assert second.get_title() == "bee: 62.5%\ntrue ant: 25.0%"
    assert second.get_xlabel().replace("\n", "") == "val/ant/" + "a" * 60 + ".png", "no name of a file is cut"
    assert np.array_equal(worst.images[0].get_array(), shown[0]) and np.array_equal(second.images[0].get_array(), shown[1])


@pytest.mark.parametrize("classes", [2, 40, 100, 1000])
def test_few_and_many_classes_are_readable(classes):
    """Of many classes, the 20 with the most mistakes are shown by name, and no name is cut off or drawn over another."""
    matrix = 5 * np.eye(classes, dtype=np.int64)
    matrix[1, 0], matrix[-1, 1] = 3, 1
    figure = confusion.draw(matrix, [f"a class called {number}" for number in range(classes)], images(3), [
        Mistake("a class", "another", 0.5, 0.25, "val/a/b.png")] * 3, "a title")
    table = figure.axes[0]
    names = [label.get_text() for label in table.get_yticklabels()]
    assert len(names) == min(classes, 40) if classes <= 40 else len(names) == confusion.WORST
    assert {"a class called 0", "a class called 1"} <= set(names) and bool(table.get_title()) == (classes > 40)
    if classes > 40:
        assert f"a class called {classes - 1}" in names and f"20 of {classes:,} classes" in table.get_title()
        assert [label.get_text() for label in table.get_xticklabels()] == [*names, "other classes"]
        assert {text.get_text() for text in table.texts} == {"5", "3", "1"}
    figure.savefig(io.BytesIO())
    room = figure.bbox.padded(1)
    cut = [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text() and not (
        room.x0 <= (box := text.get_window_extent()).x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1)]
    assert not cut
    boxes = [label.get_window_extent() for label in table.get_yticklabels()]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in itertools.pairwise(boxes)), "names overlap"


def test_mistakes_with_classes_outside_the_table_are_in_the_last_column():
    """With many classes that are confused with rare ones."""
    classes = 60
    matrix = 9 * np.eye(classes, dtype=np.int64)
    matrix[:20, 30:50] += np.eye(20, dtype=np.int64) * 0 + 1
    matrix[:20, 59] = 7
    table = confusion.draw(matrix, list(map(str, range(classes))), [], []).axes[0]
    shares = np.asarray(table.images[0].get_array())
    assert shares.shape == (20, 21) and np.allclose(shares.sum(axis=1), 1)
    rows = [int(label.get_text()) for label in table.get_yticklabels()]
    assert 59 in rows and 0 in rows and shares[rows.index(0), -1] > 0


def test_no_mistakes():
    figure = confusion.draw(np.eye(3, dtype=np.int64), ["a", "b", "c"], [], [])
    assert [text.get_text() for text in figure.axes[2].texts] == ["no mistakes"]
