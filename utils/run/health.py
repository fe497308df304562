"""Early warnings of a run that goes badly, from its log: each once, with the two settings most likely to help.

A false alarm is worse than silence: each limit leaves a margin for healthy runs, whatever their data, loss and augmentation.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any

WINDOW = 512             # images, and at least 10 steps, over which a mean is taken
PATIENCE = 40, 300       # steps after the warm-up before a warning: a tenth of the run, within these limits
UNMOVED = 0.01           # fraction of the loss of guessing by which any run that learns falls below it in that time
UNMOVED_MIXED = 0.001    # the same for mixed images, whose loss stays near it
ROSE = 1.1               # times the loss of guessing: if the loss was that high, the learning rate is too high
ONE_CLASS = 0.05         # of the images of all other classes: at most so many get another prediction
BY_HEART = 0.95          # training accuracy
GAP = 0.1                # by which the held-out accuracy is below it, and by three sampling errors
RISEN = 1.2              # times its lowest value: the held-out loss


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the warnings depend on. `config` has the settings of the run as attributes."""

    config: Any
    classes: Sequence[str]
    train_share: float                      # fraction of the training images in the largest class
    guess_loss: float | None                # criterion.guess_loss; None: unknown, as with a teacher
    held_out: str = ""                      # the split that is evaluated during training; "" without one
    held_out_share: float = 1.0             # as train_share

    @property
    def window(self) -> int:
        """Steps."""
        return max(10, math.ceil(WINDOW / self.config.train_batch_size))

    @property
    def warns_from(self) -> int:
        """Return the first step at which the metrics are reliable; in a short run half of the steps after the warm-up."""
        after, (least, most) = self.config.num_steps - self.config.warmup_steps, PATIENCE
        return self.config.warmup_steps + min(max(after // 10, least), most, after // 2)

    @property
    def is_unbalanced(self) -> bool:
        return self.train_share >= min(0.65, 2 / len(self.classes))


class Health:
    """Follows the events of a run in the form of its log."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._recent: deque[tuple[float, float]] = deque(maxlen=plan.window)        # (loss, accuracy) of steps
        self._evaluations: list[dict] = []                                          # of the held-out split, from step 1 on
        self._first = self._highest = math.nan                                      # loss, as a mean of 5 steps
        self._said: set[str] = set()

    def resume(self, events: Sequence[dict]) -> None:
        """Take the events of earlier sessions, whose warnings have been printed."""
        for event in events:
            self.follow(event)

    def follow(self, event: dict) -> list[str]:
        """Return new warnings, usually none."""
        plan, warnings = self.plan, {}
        if event["event"] == "train" and not event.get("skipped"):
            self._add(event)
            if len(self._recent) == plan.window and event["step"] >= max(plan.warns_from, plan.window) and (
                    event["step"] % plan.window == 0 or event["step"] == plan.warns_from):
                warnings["flat"] = flat_loss(plan, event["step"], self._recent, self._too_fast)
        elif event["event"] == "eval" and event["split"] == plan.held_out and event["step"]:
            if event["step"] >= plan.warns_from:
                warnings["class"] = one_class(plan, event, self._recent, self._too_fast)
                warnings["overfitting"] = overfitting(plan, event, self._evaluations, self._recent)
            self._evaluations.append(event)
        new = {kind: text for kind, text in warnings.items() if text and kind not in self._said}
        self._said |= set(new)
        return [f"warning: {text}" for text in new.values()]

    def _add(self, event: dict) -> None:
        # The log has NaN and infinity as text, and the loss of an earlier version's without the accuracy.
        attention = float(event.get("attention_loss") or 0.0) * self.plan.config.attention_loss_weight
        self._recent.append((float(event["loss"]) - attention, float(event.get("accuracy", math.nan))))
        if len(self._recent) >= 5:
            last = sum(loss for loss, _ in islice(reversed(self._recent), 5)) / 5
            self._first = last if math.isnan(self._first) else self._first
            self._highest = last if math.isnan(self._highest) else max(last, self._highest)

    @property
    def _too_fast(self) -> bool:
        """Return whether the loss was far above that of guessing, or of the first steps."""
        return self._highest > ROSE * (self._first if self.plan.guess_loss is None else self.plan.guess_loss)


def flat_loss(plan: Plan, step: int, recent: Sequence[tuple[float, float]], too_fast: bool) -> str:
    """Return a warning if the last steps, (loss, accuracy) each, are no better than guessing; else ""."""
    loss, accuracy = _means(recent)
    if not _is_unmoved(plan, recent):
        return ""
    if plan.guess_loss is None:
        return (f"at step {step} the training accuracy is {accuracy:.1%} (mean of {len(recent)} steps), no better than always "
                f"guessing the largest class, with {plan.train_share:.1%}. {_advice(plan, too_fast, True)}")
    return (f"at step {step} the training loss is {loss:.4g} (mean of {len(recent)} steps), no better than guessing by how "
            f"frequent the classes are, with {plan.guess_loss:.4g}. {_advice(plan, too_fast, True)}")


def one_class(plan: Plan, event: dict, recent: Sequence[tuple[float, float]], too_fast: bool) -> str:
    """Return a warning if nearly all images of an evaluation are predicted as one class; else ""."""
    images, share = event["images"], event.get("predicted_share", 0.0)
    of_others = round(images * (1 - plan.held_out_share))
    if of_others < 5 or images * (1 - share) > ONE_CLASS * of_others:
        return ""
    name, advice = plan.classes[event["predicted_class"]], _advice(plan, too_fast, _is_unmoved(plan, recent), plan.is_unbalanced)
    return (f"at step {event['step']} {round(images * share)} of the {images} {plan.held_out} images are predicted as {name}, "
            f"one of {len(plan.classes)} classes. {advice}")


def overfitting(plan: Plan, event: dict, earlier: Sequence[dict], recent: Sequence[tuple[float, float]]) -> str:
    """Return a warning of overfitting: the training images are right while the held-out loss rises; else "". `earlier`:
    evaluations."""
    config, (_, training), accuracy = plan.config, _means(recent), event["accuracy"]
    margin = max(GAP, 3 * math.sqrt(accuracy * (1 - accuracy) / event["images"]))
    wrong = (1 - BY_HEART) * min(1, 2 * (1 - plan.train_share))      # where most are of one class, guessing it is right as often
    if not (earlier and training >= 1 - wrong and accuracy < training - margin):
        return ""
    lowest = min(earlier, key=lambda one: float(one["loss"]))
    highest = max(one["accuracy"] for one in earlier)
    if not float(event["loss"]) > RISEN * float(lowest["loss"]) or accuracy > highest:
        return ""
    found = [f"fewer steps (--num_steps, NUM_STEPS, now {config.num_steps})"] * (accuracy < highest - 1.5 / event["images"])
    if config.augmentation not in ("crop", "crop_flip"):
        found.append("more varied images (--augmentation crop_flip)")
    elif not config.mixup_alpha:
        found.append("mixed images (--mixup_alpha 0.2)")
    found.append(f"a higher --weight_decay (WEIGHT_DECAY, now {config.weight_decay:g})")
    return (f"at step {event['step']} {training:.1%} of the training images are right and {accuracy:.1%} of {event['images']} "
            f"{plan.held_out} images, whose loss has risen from {float(lowest['loss']):.3g} (step {lowest['step']}) to "
            f"{float(event['loss']):.3g}: the run overfits. Try {' or '.join(found[:2])}")


def _means(recent: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return tuple(sum(values) / len(values) for values in zip(*recent)) if recent else (math.nan, math.nan)


def _is_unmoved(plan: Plan, recent: Sequence[tuple[float, float]]) -> bool:
    """Return whether nothing but the classes' frequencies has been learned. Comparisons with NaN are false."""
    (loss, accuracy), share = _means(recent), plan.train_share
    images = max(1, len(recent) * plan.config.train_batch_size)
    guesses = accuracy <= share + 2 * math.sqrt(share * (1 - share) / images)
    if plan.guess_loss is None:
        return guesses and share <= 0.5
    if share == 1:
        return False
    if plan.config.mixup_alpha or plan.config.cutmix_alpha:
        return loss >= (1 - UNMOVED_MIXED) * plan.guess_loss or (guesses and loss >= (1 - UNMOVED) * plan.guess_loss)
    return loss >= (1 - UNMOVED) * plan.guess_loss


def _advice(plan: Plan, too_fast: bool, unmoved: bool, unbalanced: bool = False) -> str:
    """Return the two settings most likely to help."""
    config, found = plan.config, []
    slow = unmoved and not too_fast
    if unbalanced and config.class_weights == "none":
        found.append("--class_weights balanced")
    found.append(f"a {'higher' if slow else 'lower'} --learning_rate (LEARNING_RATE, now {config.learning_rate:g})")
    if config.pretrained_dir == "none":
        found.append("start weights (--pretrained_dir, PRETRAINED_DIR)")
    elif slow and (config.train_layers != "all" or config.freeze):
        found.append("training more of the model (--train_layers all, no --freeze)")
    elif slow:
        found.append("more steps (--num_steps, NUM_STEPS)")
    elif not config.max_grad_norm:
        found.append("--max_grad_norm 1")
    else:
        found.append(f"a longer warm-up (--warmup_steps, WARMUP_STEPS, now {config.warmup_steps})")
    return f"Try {found[0]}, or {found[1]}"
