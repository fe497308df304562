"""The best evaluation of a log, the split that chooses it, and numbers that are none."""

import math

from utils.report import events
from utils.report.events import best_evaluation, choosing_split


def evaluation(step, accuracy, loss=1.0, split="test", **more) -> dict:
    return {"event": "eval", "step": step, "split": split, "loss": loss, "accuracy": accuracy, "top5": 1.0} | more


def test_the_best_step_is_found():
    """By the rule of best.pt: within one image of the highest accuracy the loss decides."""
    series = [evaluation(0, 0.95), evaluation(10, 0.90, 0.5), evaluation(20, 0.91, 0.6), evaluation(30, 0.80)]
    counted = [event | {"images": 100} for event in series]
    assert best_evaluation(counted) == (10, 0.9) and best_evaluation(series) == (20, 0.91), "a log without counts"
    assert best_evaluation(counted[:1]) is None and best_evaluation([]) is None, "nothing is trained at step 0"


def test_the_split_that_chooses_is_found_by_any_name():
    test, val = [evaluation(step, 0.5) for step in (0, 10, 20)], evaluation(10, 0.5, split="val")
    assert choosing_split(test) == "test" and choosing_split([*test, val]) == "val"
    assert choosing_split([evaluation(5, 1.0, split="train"), evaluation(5, 0.5, split="test")]) == "test"
    assert choosing_split([{"event": "train", "step": 1}]) is None


def test_numbers_of_events():
    """nan and inf are text in a log; what is no number is a gap."""
    logged = [{"loss": value} for value in (1, "inf", "nan", "abc", None, True, 10 ** 400)]
    assert events.numbers_of(logged, "loss")[:2] == [1.0, math.inf] and events.percent_of(logged[:1], "loss") == [100.0]
    assert all(math.isnan(value) for value in events.numbers_of([*logged[2:], {}], "loss"))
    assert [events.number_of(event, "loss") for event in logged[3:]] == [None] * 4
