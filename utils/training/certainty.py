"""How certain an accuracy on a number of images is, and which of several evaluations is the best.

A difference of one image means nothing: accuracies within one image of the highest count as equal, and the loss, a mean over all
images, decides between them.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

Z = 1.959964                # a normal variable is within Z standard deviations with a probability of 95 %
FEW = 100                   # images; below, one of them is more than a percent


class Result(NamedTuple):
    """The figures of an evaluation that are compared."""

    accuracy: float         # 0..1
    loss: float
    images: int

    @property
    def interval(self) -> tuple[float, float]:
        """Return Wilson's 95 % interval: the accuracies on all such images for which this one is likely.

        E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927), 209-212. It is
        valid for few images, and at 0 and 100 %, where the usual accuracy +- 2 standard errors has no width. The images must be
        a random sample; the effect of other training seeds is not included.
        """
        part = Z ** 2 / self.images
        middle = (self.accuracy + part / 2) / (1 + part)
        half = math.sqrt(self.accuracy * (1 - self.accuracy) * part + part ** 2 / 4) / (1 + part)
        # Without the last bits, which could leave out an accuracy of 0 or 100 %.
        return min(self.accuracy, max(0.0, middle - half)), max(self.accuracy, min(1.0, middle + half))

    def rank(self, highest: float) -> tuple[float, bool, float]:
        """Return a key: larger is better. highest: the highest accuracy of all that are compared; from one image below it on,
        the loss decides."""
        return (round(min(self.accuracy, highest - 1 / self.images), 9),         # rounded: 23/24 is 1 - 1/24
                not math.isnan(self.loss), -self.loss)

    def resembles(self, other: "Result") -> bool:
        """Return whether the two accuracies may differ by chance: a two-sided test of two proportions at 5 %, in which one image
        decides nothing. For evaluations on the same images it says so slightly too often, since it ignores which were right."""
        both = self.images + other.images
        mean = (self.accuracy * self.images + other.accuracy * other.images) / both
        error = math.sqrt(mean * (1 - mean) * (1 / self.images + 1 / other.images))
        return abs(self.accuracy - other.accuracy) - 1 / min(self.images, other.images) <= Z * error + 1e-9


def result_of(event: Mapping) -> Result | None:
    """Return the result of an "eval" event of a log, or of a row of a sweep; None if a figure is missing or is no number."""
    try:
        result = Result(float(event["accuracy"]), float(event["loss"]), int(event["images"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return result if 0 <= result.accuracy <= 1 and result.images > 0 else None


def best_of(results: Mapping[int, Result]) -> tuple[int | None, float]:
    """Return the step whose weights are the best after these evaluations, in their order, and the highest accuracy.

    An evaluation replaces the best so far if its rank is higher with the highest accuracy so far, including its own. So the best
    is always within one image of the highest accuracy, and many small steps down cannot add up.
    """
    best, highest = None, 0.0
    for step, result in results.items():
        highest = max(highest, result.accuracy)
        if best is None or result.rank(highest) > results[best].rank(highest):
            best = step
    return best, highest


def describe_images(images: int) -> str:
    count = f"{images} image{'s' * (images > 1)}"
    return f"{count}, one is {1 / images:.1%}" if 1 < images < FEW else count


def describe_interval(result: Result) -> str:
    return "95% interval {:.1%} to {:.1%}".format(*result.interval)


def describe(result: Result) -> str:
    return f"{describe_images(result.images)}; {describe_interval(result)}"
