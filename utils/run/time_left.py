"""Estimates how long a run still takes, from the measured steps and evaluations of this session."""

import time

WARM_UP = 3              # first steps of a session, not counted if there are twice as many
STEPS = 20               # after so many steps the estimate is printed,
SLOW_STEPS = 30.0        # or after two or more that took so many seconds: 20 steps of a large model on a CPU may take an hour


class TimeLeft:
    """Follows the events of a run. Checkpoints are not part of the time: they are written in the background."""

    def __init__(self, first_step: int, total_steps: int, eval_every: int | None = None):
        """eval_every: steps between evaluations; None: there are none."""
        self._step, self._total, self._every = first_step, total_steps, eval_every
        self._seconds: list[float] = []                     # of the first steps, then of all others together
        self._count, self._evaluation, self._last = 0, 0.0, time.monotonic()

    def follow(self, event: dict) -> None:
        """Take a "train" or "eval" event when it happens."""
        now = time.monotonic()
        if event["event"] == "train":
            self._step, self._count = event["step"], self._count + 1
            if self._count <= 2 * WARM_UP:
                self._seconds.append(event["seconds"])
            else:
                self._seconds[-1] += event["seconds"]
        elif event["event"] == "eval":
            self._evaluation = now - self._last
        self._last = now

    @property
    def known(self) -> bool:
        return self._count >= STEPS or (self._count > 1 and sum(self._seconds) >= SLOW_STEPS)

    @property
    def a_step(self) -> float:
        """Return the seconds of a step, without the first steps, which warm up."""
        first = min(WARM_UP, self._count // 2)
        return sum(self._seconds[first:]) / (self._count - first)

    @property
    def seconds(self) -> float:
        """Return the seconds for the steps that are left and their evaluations, each as long as the last one."""
        evaluations = 0
        if self._every and self._step < self._total:
            evaluations = self._total // self._every - self._step // self._every + (self._total % self._every > 0)
        return self.a_step * (self._total - self._step) + self._evaluation * evaluations


def in_words(seconds: float) -> str:
    """'45 s', '1 min 40 s', '3 h 20 min', '2 days 5 h'"""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 599.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} days {hours % 24} h"
