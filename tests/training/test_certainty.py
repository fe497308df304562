"""The uncertainty of an accuracy on a number of images."""

import itertools
import math

import pytest

from utils.training.certainty import Result, best_of, describe, describe_images, result_of


@pytest.mark.parametrize(("hits", "images", "low", "high"), [
    (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (15, 148, 0.0624, 0.1605), (81, 263, 0.2553, 0.3662),
    (20, 20, 0.8389, 1.0), (18, 24, 0.5510, 0.8800), (1, 2, 0.0945, 0.9055)])
def test_the_interval_is_wilsons(hits, images, low, high):
    """The first four are from R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in
    Medicine 17 (1998), table I."""
    assert Result(hits / images, 1.0, images).interval == pytest.approx((low, high), abs=6e-5)


def test_the_interval_stays_inside_and_solves_wilsons_equation():
    """Its ends are the proportions p whose distance to the observed one is 1.96 standard errors at p."""
    for images in (1, 2, 24, 10_000):
        for hits in {0, 1, images // 2, images}:
            low, high = Result(hits / images, 1.0, images).interval
            assert 0 <= low <= hits / images <= high <= 1
            for end in (low, high):
                if 0 < end < 1:
                    assert abs(hits / images - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / images), rel=1e-4)


def test_descriptions_of_few_and_many_images():
    assert (describe_images(1), describe_images(99), describe_images(100)) == ("1 image", "99 images, one is 1.0%", "100 images")
    assert describe(Result(18 / 24, 1.0, 24)) == "24 images, one is 4.2%; 95% interval 55.1% to 88.0%"
    assert describe(Result(0.8, 1.0, 200)) == "200 images; 95% interval 73.9% to 85.0%"
    assert describe(Result(1.0, 1.0, 1)).startswith("1 image; ")


def evaluations(*pairs, images=24) -> dict[int, Result]:
    """Return results by step, from pairs of (correct images, loss) after step 1, 2, ..."""
    return {step: Result(hits / images, loss, images) for step, (hits, loss) in enumerate(pairs, start=1)}


@pytest.mark.parametrize(("pairs", "step"), [
    ([(18, 0.9), (19, 1.0)], 1),                                  # one image more, at a higher loss: not better
    ([(18, 0.9), (19, 0.8)], 2), ([(18, 0.9), (17, 0.8)], 2),     # the loss decides both ways
    ([(18, 0.9), (16, 0.1)], 1), ([(18, 0.9), (20, 5.0)], 2),     # a difference of two images counts
    ([(18, 0.9), (18, 0.9)], 1),                                  # no difference: the earlier
    ([(18, math.nan), (18, 9.0)], 2), ([(18, 9.0), (19, math.nan)], 1),
    # Each within one image of the one before and with a lower loss: the accuracy must not drift down.
    ([(20, 0.9), (19, 0.8), (18, 0.7), (17, 0.6), (16, 0.5)], 2),
    # The highest accuracy counts although it was never the best.
    ([(18, 0.5), (19, 0.9), (20, 2.0)], 3), ([(18, 0.5), (19, 0.9), (17, 0.1)], 1),
    ([(24, 0.9), (23, 0.8)], 2), ([(0, 0.9), (1, 1.0), (2, 1.1)], 3)])
def test_within_one_image_of_the_highest_accuracy_the_loss_decides(pairs, step):
    assert best_of(evaluations(*pairs))[0] == step


def test_the_best_is_never_more_than_one_image_below_the_highest():
    for images in (7, 24, 49):                                    # 1/49 and others are not exact as floats
        for hits in itertools.product(range(images - 3, images + 1), repeat=4):
            results = evaluations(*((each, 1.0 - 0.1 * number) for number, each in enumerate(hits)), images=images)
            best, highest = best_of(results)
            assert round(highest * images) == max(hits) and max(hits) - hits[best - 1] <= 1
            later = [each for each in hits[best:] if max(hits) - each <= 1]
            assert not later, "a later result with a lower loss is within one image"
    assert best_of({}) == (None, 0.0)


def test_accuracies_whose_difference_is_not_significant_resemble_each_other():
    best = Result(18 / 24, 1, 24)
    assert best.resembles(Result(14 / 24, 1, 24)) and not best.resembles(Result(8 / 24, 1, 24))
    assert not Result(18 / 24, 1, 2400).resembles(Result(14 / 24, 1, 2400))
    # Fisher's exact test has p = 0.09 and p = 0.002; a single image shows nothing.
    best = Result(21 / 24, 1, 24)
    assert best.resembles(Result(15 / 24, 1, 24)) and not best.resembles(Result(10 / 24, 1, 24))
    assert Result(1.0, 1, 1).resembles(Result(0.0, 1, 1)) and Result(1.0, 1, 24).resembles(Result(1.0, 1, 24))


def test_events_without_valid_numbers_are_not_results():
    event = {"event": "eval", "step": 3, "accuracy": 0.5, "loss": "nan", "images": 24, "top5": 1}
    assert result_of(event)[::2] == (0.5, 24) and math.isnan(result_of(event).loss)
    for wrong in ({"accuracy": "high"}, {"accuracy": 2}, {"accuracy": "nan"}, {"images": 0}, {"images": None}):
        assert result_of(event | wrong) is None
    assert result_of({"event": "eval"}) is None
