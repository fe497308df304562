"""The time left, estimated from the times of steps and evaluations."""

import pytest

from utils.run import time_left
from utils.run.time_left import TimeLeft, in_words


def train(step: int, seconds: float = 0.5) -> dict:
    return {"event": "train", "step": step, "seconds": seconds}


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose last entry is the current time."""
    times = [0.0]
    monkeypatch.setattr(time_left.time, "monotonic", lambda: times[-1])
    return times


@pytest.mark.parametrize("first", [0, 100])
def test_the_first_steps_of_a_session_are_ignored(clock, first):
    left = TimeLeft(first, first + 220)
    for step in range(1, 21):
        assert not left.known
        left.follow(train(first + step, 2.0 if step < 4 else 0.25))
    assert left.known and left.a_step == 0.25 and left.seconds == 50.0


def test_the_time_left_is_known_sooner_if_steps_are_slow(clock):
    left = TimeLeft(0, 10)
    left.follow(train(1, 100.0))
    assert not left.known                                 # one step is not enough: it includes the warm-up
    left.follow(train(2, 40.0))
    assert left.known and left.seconds == 8 * 40.0


@pytest.mark.parametrize(("every", "step", "evaluations"), [
    (100, 20, 3), (100, 100, 2), (80, 20, 3), (None, 20, 0), (500, 20, 1)])
def test_evaluations_are_part_of_the_time_left(clock, every, step, evaluations):
    """The last one took 7 s. With `every` 100 they follow steps 100, 200 and 240, the last."""
    left = TimeLeft(0, 240, every)
    clock.append(9.0)
    left.follow({"event": "eval", "step": 0})
    clock.append(10.0)
    for number in range(1, step + 1):
        left.follow(train(number))
    clock.append(17.0)
    left.follow({"event": "eval", "step": step})
    assert left.seconds == pytest.approx(0.5 * (240 - step) + 7 * evaluations)


def test_nothing_is_left_after_the_last_step(clock):
    left = TimeLeft(0, 2, 1)
    for step in (1, 2):
        left.follow(train(step))
    assert left.seconds == 0.0


@pytest.mark.parametrize(("seconds", "words"), [
    (0.2, "0 s"), (45.4, "45 s"), (59.6, "1 min 0 s"), (100, "1 min 40 s"), (599.6, "10 min"), (1500, "25 min"),
    (3590, "1 h 0 min"), (12_000, "3 h 20 min"), (190_000, "2 days 5 h")])
def test_in_words(seconds, words):
    assert in_words(seconds) == words
