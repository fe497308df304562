"""What an accuracy on a number of images can tell, and which of several is the best as far as that goes.

One image decides nothing: accuracies within one image of the highest count as equal, and the loss, a mean over all images,
decides between them.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

Z = 1.959964                # a normal variable is within Z standard deviations with a probability of 95 %
FEW = 100                   # images; below, one of them is more than a percent


class Result(NamedTuple):
    """An evaluation, as far as it is compared."""

    accuracy: float         # 0..1
    loss: float
    images: int

    @property
    def interval(self) -> tuple[float, float]:
        """The accuracies on all such images that this one is likely for: Wilson's interval of 95 %.

        E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927), 209-212. It holds
        for a few images, and at 0 and 100 %, where the usual accuracy +- 2 standard errors has no width. The images have to be
        a random sample; what other seeds of the training would change is not in it.
        """
        part = Z ** 2 / self.images
        middle = (self.accuracy + part / 2) / (1 + part)
        half = math.sqrt(self.accuracy * (1 - self.accuracy) * part + part ** 2 / 4) / (1 + part)
        # Without the last bits, which could leave out an accuracy of 0 or 100 %.
        return min(self.accuracy, max(0.0, middle - half)), max(self.accuracy, min(1.0, middle + half))

    def rank(self, highest: float) -> tuple[float, bool, float]:
        """Larger is better. highest: the highest accuracy of all that are compared; from one image below it the loss decides."""
        return (round(min(self.accuracy, highest - 1 / self.images), 9),         # rounded: 23/24 is 1 - 1/24
                not math.isnan(self.loss), -self.loss)

    def resembles(self, other: "Result") -> bool:
        """Whether these images cannot tell the two accuracies apart: a two-sided test of two proportions at 5 %, for which one
        image decides nothing. On the same images it says so a little too often, not knowing which of them were right."""
        both = self.images + other.images
        mean = (self.accuracy * self.images + other.accuracy * other.images) / both
        error = math.sqrt(mean * (1 - mean) * (1 / self.images + 1 / other.images))
        return abs(self.accuracy - other.accuracy) - 1 / min(self.images, other.images) <= Z * error + 1e-9


def result_of(event: Mapping) -> Result | None:
    """Of an "eval" event of a log, or a row of a sweep; None where it lacks a figure or has another thing in its place."""
    try:
        result = Result(float(event["accuracy"]), float(event["loss"]), int(event["images"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return result if 0 <= result.accuracy <= 1 and result.images > 0 else None


def best_of(results: Mapping[int, Result]) -> tuple[int | None, float]:
    """-> (the step whose weights are kept as the best after these evaluations, in their order; the highest accuracy)

    An evaluation takes the place of the best so far if its rank is higher by the highest accuracy so far, its own included. So
    the best always is within one image of the highest accuracy, and many small steps down lead nowhere.
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
