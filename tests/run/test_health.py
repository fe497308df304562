"""Warnings about a run that goes badly. Curves of runs that go well must not cause any."""

import math
import types

import pytest

from utils.run.health import Health, Plan

CONFIG = {"num_steps": 240, "warmup_steps": 24, "train_batch_size": 32, "learning_rate": 0.03, "pretrained_dir": "w.npz",
          "train_layers": "all", "freeze": None, "max_grad_norm": 1.0, "class_weights": "none", "augmentation": "crop_flip",
          "mixup_alpha": 0.0, "cutmix_alpha": 0.0, "attention_loss_weight": 1.0,
          "weight_decay": 0.0}
TEN = [f"class {number}" for number in range(10)]
MIXED = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}


def plan(classes=TEN, share=0.1, guess: float | None = math.log(10), held_out_share=0.1, **flags) -> Plan:
    return Plan(types.SimpleNamespace(**CONFIG | flags), classes, share, guess, "val", held_out_share)


def train(step: int, loss: float, accuracy: float, **more) -> dict:
    return {"event": "train", "step": step, "loss": loss, "accuracy": accuracy, "skipped": False} | more


def evaluation(step: int, accuracy=0.5, loss=1.0, share=0.15, images=200, split="val", label=3) -> dict:
    return {"event": "eval", "step": step, "split": split, "images": images, "accuracy": accuracy, "loss": loss,
            "predicted_class": label, "predicted_share": share}


def warnings_of(plan: Plan, *events: dict) -> list[str]:
    health = Health(plan)
    return [line for event in events for line in health.follow(event)]


def curve(loss, accuracy=lambda step: 0.1, steps: int = 240, **more) -> list[dict]:
    """Return steps with loss and accuracy as functions of the step. Every fifth loss is a little lower, every seventh higher."""
    wobble = lambda step: 1 - 0.01 * (step % 5 == 0) + 0.01 * (step % 7 == 0)        # noqa: E731
    return [train(step, loss(step) * wobble(step), accuracy(step), **more) for step in range(1, steps + 1)]


# ------------------------------------------------------------------------------------------------------------- runs that learn


@pytest.mark.parametrize(("settings", "loss", "accuracy"), [
    ({}, lambda step: 2.3 * math.exp(-step / 60), lambda step: min(0.99, step / 100)),
    ({}, lambda step: 2.3 if step < 45 else 2.25 - step / 400, lambda step: 0.15),                  # learns late
    ({}, lambda step: 2.26, lambda step: 0.15),                                                 # learns slowly: 2 % below a guess
    (MIXED, lambda step: 2.29 - step / 4000, lambda step: 0.2 + step / 1000),                       # far from a loss of 0
    ({"classes": "ab", "share": 0.5, "guess": math.log(2), **MIXED}, lambda step: 0.69, lambda step: 0.60),
    ({"classes": "ab", "share": 0.95, "guess": 0.1985}, lambda step: 0.15, lambda step: 0.95),      # most images are of one class
    ({"guess": None}, lambda step: 3.0, lambda step: 0.2),                                         # the loss has a teacher's part
    ({"num_steps": 30, "warmup_steps": 3}, lambda step: 2.3 if step < 10 else 2.1, lambda step: 0.3),
    ({"classes": "a", "share": 1.0, "guess": 0.0}, lambda step: 0.0, lambda step: 1.0),
    ({}, lambda step: 0.01, lambda step: 1.0), ({}, lambda step: math.nan, lambda step: 0.1)])
def test_a_run_that_learns_causes_no_warning(settings, loss, accuracy):
    steps = curve(loss, accuracy, settings.get("num_steps", 240))
    assert warnings_of(plan(**settings), *steps) == []


def test_the_loss_of_edited_attention_is_subtracted():
    steps = curve(lambda step: 2.0 + 4.0, attention_loss=2.0)
    assert warnings_of(plan(attention_loss_weight=2.0), *steps) == []
    assert len(warnings_of(plan(attention_loss_weight=1.0), *steps)) == 1


# -------------------------------------------------------------------------------------------------- runs that do not learn


@pytest.mark.parametrize(("settings", "loss", "words"), [
    ({"learning_rate": 1e-7}, 2.3026, "Try a higher --learning_rate (LEARNING_RATE, now 1e-07), or more steps (--num_steps"),
    ({"pretrained_dir": "none"}, 2.3, "a higher --learning_rate (LEARNING_RATE, now 0.03), or start weights (--pretrained_dir"),
    ({"train_layers": "head"}, 2.3, "or training more of the model (--train_layers all"),
    ({"learning_rate": 10.0}, 20.0, "Try a lower --learning_rate (LEARNING_RATE, now 10), or a longer warm-up (--warmup_steps"),
    ({"max_grad_norm": 0.0}, 20.0, "a lower --learning_rate (LEARNING_RATE, now 0.03), or --max_grad_norm 1"),
    (MIXED, 2.3026, "no better than guessing by how frequent the classes are, with 2.303"),
    ({"classes": "ab", "share": 0.9, "guess": 0.325}, 0.325, "with 0.325"),
    ({"guess": None}, 5.0, "the training accuracy is 10.0% (mean of 16 steps), no better than always guessing the largest")])
def test_a_loss_that_does_not_fall_is_reported_once_and_early(settings, loss, words):
    made = plan(**settings)
    steps = curve(lambda step: loss, lambda step: settings.get("share", 0.1))
    line, = warnings_of(made, *steps)
    assert line.startswith("warning: at step 64 ") and words in line and made.judged_from == 64
    assert warnings_of(made, *steps[:63]) == []


def test_a_high_loss_that_falls_to_guessing_suggests_a_lower_learning_rate():
    line, = warnings_of(plan(), *curve(lambda step: 30.0 if step < 20 else 2.31))
    assert "a lower --learning_rate" in line


def test_warnings_start_after_hundreds_of_steps_or_half_of_a_short_run():
    assert plan(num_steps=10_000, warmup_steps=500).judged_from == 800
    assert plan(num_steps=2000, warmup_steps=0).judged_from == 200
    assert plan(num_steps=30, warmup_steps=10).judged_from == 20


@pytest.mark.parametrize(("settings", "share", "words"), [
    ({}, 1.0, "200 of the 200 val images are predicted as class 3, one of 10 classes. Try a lower --learning_rate"),
    ({}, 0.99, "198 of the 200 val images"), ({}, 0.9, None),
    ({"classes": ["ant", "bee", "c", "d"], "share": 0.9, "held_out_share": 0.9}, 1.0, "Try --class_weights balanced, or a lower"),
    ({"classes": "abcd", "share": 0.9, "held_out_share": 0.98}, 1.0, None),                        # 4 images are of other classes
    ({"classes": "abcd", "share": 0.9, "held_out_share": 0.9, "class_weights": "balanced"}, 1.0, "Try a lower --learning_rate")])
def test_one_predicted_class_for_all_images_is_reported(settings, share, words):
    learning = curve(lambda step: 1.0, lambda step: 0.6, 100)
    lines = warnings_of(plan(**settings), *learning, *(evaluation(step, 0.1, share=share) for step in (100, 150)))
    assert len(lines) == (words is not None) and (words is None or words in lines[0])


def test_evaluations_at_the_beginning_and_of_another_split_cause_no_warning():
    others = evaluation(0, share=1.0), evaluation(30, share=1.0), evaluation(100, share=1.0, split="test")
    assert warnings_of(plan(), *others) == [] and len(warnings_of(plan(), *others, evaluation(100, share=1.0))) == 1


LEARNED = curve(lambda step: 0.01, lambda step: 1.0)


@pytest.mark.parametrize(("evaluations", "training", "warns"), [
    ([(0.6, 1.0), (0.6, 1.3)], 1.0, True), ([(0.6, 1.0), (0.6, 1.1)], 1.0, False),                  # the loss has hardly risen
    ([(0.6, 1.0), (0.65, 1.3)], 1.0, False),                                                 # the accuracy is higher all the same
    ([(0.95, 0.1), (0.95, 0.2)], 1.0, False), ([(0.6, 1.0), (0.6, 1.3)], 0.9, False),
    ([(0.6, 1.0)], 1.0, False), ([(0.6, 1.0), (0.6, math.inf)], 1.0, True)])
def test_memorized_training_images_are_reported(evaluations, training, warns):
    steps = curve(lambda step: 0.01, lambda step: training, 60)
    lines = warnings_of(plan(), *steps, *(evaluation(80 + 20 * number, *values) for number, values in enumerate(evaluations)))
    assert len(lines) == warns
    if warns:
        assert "warning: at step 100 100.0% of the training images are right and 60.0% of 200 val images" in lines[0]
        assert "(step 80)" in lines[0] and "Try mixed images (--mixup_alpha 0.2) or a higher --weight_decay" in lines[0]


@pytest.mark.parametrize(("settings", "words"), [
    ({"augmentation": "none"}, "more varied images (--augmentation crop_flip)"),
    ({"mixup_alpha": 0.2}, "a higher --weight_decay (WEIGHT_DECAY, now 0)")])
def test_remedies_against_memorization_fit_the_settings(settings, words):
    """Fewer steps are suggested only if the accuracy was higher before. One image of 200 is not higher."""
    for before, steps in ((0.605, ""), (0.61, "fewer steps (--num_steps, NUM_STEPS, now 240) or ")):
        line, = warnings_of(plan(**settings), *LEARNED[:60], evaluation(80, before, 1.0), evaluation(100, 0.6, 1.3))
        assert f"Try {steps}{words}" in line


def test_guessing_the_largest_class_is_not_memorization():
    steps = curve(lambda step: 0.15, lambda step: 0.957, 60)
    evaluations = evaluation(80, 0.6, 1.0), evaluation(100, 0.6, 1.3)
    unbalanced = plan(classes="ab", share=0.953, guess=0.19, held_out_share=0.78)
    assert warnings_of(unbalanced, *steps, *evaluations) == [] and len(warnings_of(plan(), *steps, *evaluations)) == 1


def test_few_held_out_images_cause_no_warning():
    """12 of 16 are within three sampling errors of all."""
    few = [evaluation(step, 0.75, loss, images=16) for step, loss in ((80, 1.0), (100, 1.3))]
    assert warnings_of(plan(), *LEARNED[:60], *few) == []


def test_a_resumed_run_does_not_repeat_warnings():
    """Events in the log have had their warnings. The log has NaN as text, and logs of earlier versions lack accuracies and
    predictions."""
    steps = curve(lambda step: 2.3026)
    health = Health(plan())
    health.resume([{"event": "start", "step": 0}, *steps[:100], evaluation(100, share=1.0)])
    assert [line for event in (*steps[100:], evaluation(200, share=1.0)) for line in health.follow(event)] == []
    fresh = Health(plan())
    old = {"event": "eval", "step": 100, "split": "val", "images": 200, "accuracy": 0.1, "loss": "nan"}
    fresh.resume([train(1, "nan", 0.1, skipped=True), {"event": "train", "step": 2, "loss": "inf"}, old])
    assert len([line for event in steps for line in fresh.follow(event)]) == 1
