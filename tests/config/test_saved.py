"""Settings of a checkpoint: those that a run can have, and no others."""

import pytest

from configs import DATASETS, MODELS, RECIPES
from utils.config import FLAGS, ConfigError, Facts, before, resolve
from utils.config.flags import SETTINGS
from utils.config.saved import DECIDED, check_settings

FACTS = Facts(1000, 10, native_bf16=True, memory=2 ** 34)
RUN = resolve({"name": "r", "num_steps": 100}, FACTS).to_dict()
ODD = [True, -1, 2 ** 70, float("nan"), float("inf"), 1e300, "x" * 5000, "a\0b", [], (), ["1"], {"a": 1}, b"x"]


def fault(**changes) -> str:
    with pytest.raises(ConfigError) as caught:
        check_settings(RUN | changes, "x.pt")
    assert len(str(caught.value)) < 150 and str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_run_resolves_is_possible(recipe):
    for flags in ({}, {"img_size": (224, 160)}, {"precision": "fp16"}, {"train_layers": "head"}):
        config = resolve({"recipe": recipe, "model_type": "ViT-B_16", "num_steps": 100} | flags, FACTS).to_dict()
        check_settings(config, "x.pt")
        assert not [name for name in DECIDED if config[name] is None]


def test_every_setting_refuses_what_it_cannot_be():
    for name in SETTINGS:
        for value in ODD:
            if value is True and FLAGS[name].type is None:
                continue
            assert f"its setting {name} is" in fault(**{name: value})


def test_values_that_flags_take_are_possible():
    for changes in ({"dataset": name} for name in DATASETS):
        check_settings(RUN | changes, "x.pt")
    for changes in ({"model_type": name} for name in MODELS):
        check_settings(RUN | changes, "x.pt")
    check_settings(RUN | {
        "name": "renamed by hand (2)", "output_dir": "ü/a b", "intensity_range": [0, 1023], "img_size": [8, 10],
        "recipe": "a row that is gone", "decay_milestones": (3, 4), "learning_rate": 1, "precision": "auto"}, "x.pt")


def test_older_settings():
    """Of flags that came later nothing is there; those that have gone are translated or refused elsewhere (retired.py)."""
    check_settings({name: RUN[name] for name in DECIDED}, "x.pt")
    check_settings(RUN | {"worker_timeout": 300, "fp16": True, "prepare": None}, "x.pt")
    check_settings(before() | {name: RUN[name] for name in DECIDED}, "x.pt")


def test_what_is_wrong_is_named():
    assert fault(num_steps=None) == "x.pt: its setting num_steps is None, which no run has. Use an earlier checkpoint"
    assert fault(seed="42").startswith("x.pt: its setting seed is '42', which")
    assert fault(gradient_accumulation_steps="auto").startswith("x.pt: its setting gradient_accumulation_steps is 'auto'")
    assert fault(**{"\x1b[2J": 1}) == r"x.pt: its setting \x1b[2J is not known to this version of the program"
    lacking = {name: value for name, value in RUN.items() if name != "optimizer"}
    with pytest.raises(ConfigError, match=r"x\.pt: its settings lack optimizer"):
        check_settings(lacking, "x.pt")
