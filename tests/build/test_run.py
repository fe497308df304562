"""The facts by which warnings of a training run are decided."""

import math

import pytest
from building import build_objects

from utils.build.run import plan_of


@pytest.mark.parametrize(("flags", "guess"), [
    ([], math.log(10)), (["--label_smoothing", 0.1], math.log(10)), (["--class_weights", "balanced"], math.log(10)),
    (["--test", "once"], math.log(10))], ids=str)
def test_the_loss_of_a_guess_follows_from_the_classes(flags, guess):
    """In the 1,097 images some digits are a little more frequent than others."""
    objects = build_objects(*flags)
    plan = plan_of(objects.config, objects.data, objects.trainer.criterion)
    assert plan.guess_loss == pytest.approx(guess, abs=2e-3) and plan.classes == tuple("0123456789")
    assert 0.1 < plan.train_share < 0.11 and plan.held_out == "val" and 0.1 <= plan.held_out_share < 0.13
    assert plan.config.num_steps == 100 and not plan.is_unbalanced
