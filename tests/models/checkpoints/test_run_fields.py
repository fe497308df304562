"""The table of the fields of a run's checkpoint. For complete files with wrong values: tests/system/test_sealed.py."""

import dataclasses

import pytest
import torch
from weight_files import plain_state

from models.checkpoints.run_fields import FIELDS, FORMAT, LATER_FIELDS, LATER_KEYS, check_run, check_shapes, is_run, lacking
from models.errors import WeightsError
from utils.run.checkpoint import RULES, RunState


def content(**changes) -> dict:
    return dict(vars(plain_state())) | changes


def fault(**changes) -> str:
    with pytest.raises(WeightsError) as caught:
        check_run(content(**changes), "x.pt")
    text = str(caught.value)
    assert text.startswith("x.pt: ") and text.endswith(". Use an earlier checkpoint") and len(text) < 160
    return text.removeprefix("x.pt: ").removesuffix(". Use an earlier checkpoint")


def test_the_table_has_the_fields_of_a_run():
    assert FIELDS.keys() == {field.name for field in dataclasses.fields(RunState)}
    assert FIELDS["rules"].holds(RULES) and not FIELDS["rules"].holds(RULES + 1)
    check_run(content(), "x.pt")


@pytest.mark.parametrize(("changes", "words"), [
    ({"step": 3.0}, "step 3.0: must be 0 or more"), ({"updates": True}, "updates True: must be 0 or more"),
    ({"updates": 4}, "4 updates and 0 skipped steps do not make 3 steps"),
    ({"updates": 0}, "0 updates and 0 skipped steps do not make 3 steps"),
    ({"best": {"step": 4, "accuracy": 0.5}}, "best is from step 4, but the file from step 3"),
    ({"best": {"step": 3, "accuracy": 1.5}}, "best.accuracy 1.5: must be from 0 to 1"),
    ({"best": {"step": 3}}, "best lacks accuracy"),
    ({"classes": []}, "the file has no classes"),
    ({"classes": ["a", 7]}, "classes.1 7: must be text of at most 4096 characters"),
    ({"model": {"w": torch.ones(3, dtype=torch.int64)}},
     "model.w an array of shape (3,): must be an array of float32 or float16"),
    ({"model": {"\x1b[2J": torch.ones(3)}}, r"model has '\x1b[2J': its names must be short printable text"),
    ({"ema": {"w": torch.ones(3)}}, "the file has averaged weights, but ema_decay is None"),
    ({"scaler": {"scale": 1.0}}, "scaler lacks growth_factor"),
    ({"threads": 2 ** 40}, "threads 1099511627776: must be a whole number from 0 to 4096"),
    ({"config": {"a": torch.ones(2)}}, "config.a an array of shape (2,): must be a plain value"),
    ({"optimizer": {"state": {"a": {}}}}, "optimizer.state has 'a': its names must be 0 or more"),
    ({"first": {"attention": {"names": ["a"], "pixels": torch.ones(1, 3, 2, 2), "probabilities": torch.ones(2, 2),
                              "attention": torch.ones(1, 2, 2)}}},
     "the arrays of first.attention do not fit its names and the classes"),
    ({"another": 1}, "the file has another, which this version does not know")])
def test_a_wrong_field_is_named(changes, words):
    assert fault(**changes) == words


def with_group(**settings) -> dict:
    return {"optimizer": {"state": {}, "param_groups": [settings]}}


def test_the_step_of_an_optimizer_group_may_be_an_array():
    """As in timm's LAMB."""
    for count in (2, 2.0, torch.tensor(2.0), torch.tensor(2)):
        check_run(content(**with_group(step=count, eps=1e-6)), "x.pt")
    assert fault(**with_group(step=torch.ones(2))) == "optimizer.param_groups.0.step an array of shape (2,): must be a number"
    assert fault(**with_group(eps=torch.tensor(1.0))).endswith("eps an array of shape (): must be a plain value")


def test_reading_only_weights_accepts_any_optimizer_state():
    wrong = content(optimizer={"state": torch.ones(2)}, scaler=7, skips=None, best=[], seconds="long")
    check_run(wrong, "x.pt", weights_alone=True)
    for name in ("ema", "step", "classes", "config", "train_images"):
        with pytest.raises(WeightsError, match=name):
            check_run(wrong | {name: -1}, "x.pt", weights_alone=True)


def test_another_format_is_named():
    for wrong in ("vit-run-0", None, torch.ones(2), 7):
        with pytest.raises(WeightsError, match=f"not a checkpoint of this version of the program .format {FORMAT}"):
            check_run(content(format=wrong), "x.pt")
        assert is_run(content(format=wrong))
    assert not is_run({"model": {}, "optimizer": {}, "epoch": 3})


@pytest.mark.parametrize(("place", "versions"), [("", LATER_FIELDS), ("architecture", LATER_KEYS)])
def test_fields_of_a_version_are_complete_or_the_file_is_older(place, versions):
    """A file that lacks one key but has later ones was changed."""
    for number, keys in enumerate(versions):
        older = content()
        there = older[place] if place else older
        for later in sum(versions[number:], ()):
            del there[later]
        check_run(older, "x.pt")
        assert lacking(older) == list(sum(versions[number:], ()))
        for key in keys:
            changed = content()
            del (changed[place] if place else changed)[key]
            if len(keys) == 1 and number == len(versions) - 1:
                continue                       # as if the file were older: the run reports what it lacks
            with pytest.raises(WeightsError, match=f"lacks {key}"):
                check_run(changed, "x.pt")


def test_names_and_shapes_must_be_those_of_the_model():
    model = {"a": torch.ones(2, 3), "b": torch.ones(3)}
    check_shapes({"a": (2, 3), "b": (3,)}, model, "x.pt")
    for shapes, words in (({"a": (2, 3)}, "its weights lack b"), ({"a": (2, 3), "b": (3,), "c": ()}, "its weights have c"),
                          ({"a": (3, 2), "b": (3,)}, r"a has shape \(3, 2\), but its architecture needs \(2, 3\)")):
        with pytest.raises(WeightsError, match=words):
            check_shapes(shapes, model, "x.pt")
