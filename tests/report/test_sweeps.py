"""The choice of a sweep, and its description."""

import pytest

from utils.report import sweeps


def rows(*trials, images=24) -> list[dict]:
    """Return rows of trials: (rate, correct images, loss), or (rate, None, None) of a diverged one."""
    done = {"status": "done", "split": "val", "images": images, "top5": 1.0}
    return [{"run": f"lr-{rate:g}", "learning_rate": rate} | (
        {"status": "diverged at step 3"} if hits is None else done | {"accuracy": hits / images, "loss": loss})
        for rate, hits, loss in trials]


@pytest.mark.parametrize(("trials", "rate"), [
    ([(0.001, 16, "nan"), (0.01, 16, 0.9), (0.1, 16, 0.8)], 0.1), ([(0.01, 17, 0.9), (0.1, 16, 0.8)], 0.1),
    ([(0.01, 17, 0.9), (0.1, 15, 0.1)], 0.01), ([(0.001, 17, 0.9), (0.01, 16, 0.8), (0.1, 15, 0.7)], 0.01),
    ([(0.01, 5, "nan"), (0.1, None, None)], 0.01), ([(0.1, None, None)], None)])
def test_the_choice(trials, rate):
    """The lowest loss within one held-out image of the highest accuracy."""
    chosen = sweeps.choose(rows(*trials))
    assert (chosen and chosen["learning_rate"]) == rate


def test_the_table_marks_the_choice_and_what_may_be_as_good():
    trials = rows((0.001, 8, 1.2), (0.01, 18, 0.6), (0.03, 19, 0.7), (0.1, 14, 0.9), (1.0, None, None))
    final = {**rows((0.01, 100, 0.5), images=128)[0], "run": "final", "split": "test"}
    head, *lines, choice, images = sweeps.table([*trials, final], "learning_rate")
    assert head.split() == ["run", "learning", "rate", "split", "images", "accuracy", "95%", "interval", "loss"]
    assert [line.rpartition("00  ")[2] for line in lines[:4]] == [lines[0], "<- chosen", "may be as good", "may be as good"]
    assert lines[5].endswith(" 0.5000")
    assert "75.00%   55.1% to 88.0%" in lines[1] and lines[4].endswith("diverged at step 3")
    assert choice == (
        "choice   learning rate 0.01, chosen on val (24 images, one is 4.2%): the lowest loss within one image of the highest "
        "accuracy. 0.03, 0.1 may be as good: on so few images such differences can be chance (a test at 5%)")
    assert images == (
        "images   trials are evaluated on 24 images (val), the final run on 128 images (test). These are different images, and "
        "the highest of several accuracies is partly luck: report the final run's accuracy, with its interval")


def test_the_table_has_top_5_where_it_is_not_always_100_percent():
    trials = [row | {"top5": 0.75} for row in rows((0.01, 18, 0.6), (0.03, 19, 0.7))]
    head, first, *_ = sweeps.table([*trials, trials[0] | {"run": "final"}], "learning_rate")
    assert "top-5" in head and " 75.00% " in first.replace("75.00%   55.1%", "")


def test_a_choice_that_is_clear_needs_few_words():
    trials = rows((0.01, 1800, 0.5), (0.1, 1200, 0.4), images=2400)
    text = sweeps.describe_choice(trials, sweeps.choose(trials), "learning_rate")
    assert text == "learning rate 0.01, chosen on val (2400 images)"
    text = sweeps.describe_choice(trials, trials[1], "learning_rate")
    assert text.endswith(": the final run began with it, as an earlier version chose")
