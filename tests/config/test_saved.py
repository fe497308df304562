"""Settings in a checkpoint are only accepted if a run can have them."""

import argparse
from collections.abc import Iterator

import pytest

from configs import DATASETS, MODELS, RECIPES
from utils.config import FLAGS, ConfigError, Facts, resolve
from utils.config.flags import SETTINGS
from utils.config.saved import STORED, check_settings

FACTS = Facts(1000, 10, native_bf16=True, memory=2 ** 34)
RUN = resolve({"name": "r", "num_steps": 100}, FACTS).to_dict()
ODD = [True, -1, 2 ** 70, float("nan"), float("inf"), 1e300, "x" * 200_000, "a\0b", [], (), ["1"], {"a": 1}, b"x"]


def fault(**changes) -> str:
    with pytest.raises(ConfigError) as caught:
        check_settings(RUN | changes, "x.pt")
    assert len(str(caught.value)) < 150 and str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_resolved_settings_are_accepted(recipe):
    for flags in ({}, {"img_size": (224, 160)}, {"precision": "fp16"}, {"train_layers": "head"}):
        config = resolve({"recipe": recipe, "model_type": "ViT-B_16", "num_steps": 100} | flags, FACTS).to_dict()
        check_settings(config, "x.pt")
        assert not [name for name in STORED if config[name] is None]


def test_every_setting_refuses_impossible_values():
    for name in SETTINGS:
        for value in ODD:
            if value is True and FLAGS[name].type is None:
                continue
            assert f"its setting {name} is" in fault(**{name: value})


# Values at the limits of some flags, each next to values beyond them.
WORDS = ["-1", "-0.0", "0", "1", "2", "3", "5e-324", "1e-320", "0.05", "0.1", "0.9999999999999999", "1.0", "1000",
         "1001", "9999", "9999x9998", "10000", "1e29", "9.999999999999999e29", "1e30",
         str(2 ** 40), str(10 ** 15), str(2 ** 63 - 1), str(2 ** 63),
         f"1,{2 ** 40},{2 ** 63 - 1}", f"1,{2 ** 63}", ",".join(map(str, range(1, 20_000))), "-32768,65535", "0,65536", "all",
         "head", "last", "3,7", "none", "balanced", ",".join(["0.123456789"] * 1000), "auto", "a.b_c+d-e", "ü/~ b", "~/x",
         "\udcff", "x" * 255, "x" * 256, "x" * 4096, "x" * 4097, "", " "]


def accepted(name: str) -> Iterator[object]:
    """Yield the values that the flag makes of the words that it accepts."""
    kind = FLAGS[name].type
    if not callable(kind):
        yield from kind or (True, False)
        return
    for word in WORDS:
        try:
            yield kind(word)
        except argparse.ArgumentTypeError:
            continue


def test_all_values_that_a_flag_accepts_are_accepted():
    """Otherwise a run could be started with one and not be resumed."""
    tried = 0
    for name in SETTINGS:
        for value in accepted(name):
            if (name, value) != ("gradient_accumulation_steps", "auto"):              # a run resolves it
                check_settings(RUN | {name: value}, "x.pt")
                check_settings(RUN | {name: list(value) if isinstance(value, tuple) else value}, "x.pt")
                tried += 1
    assert tried > 700
    assert {2 ** 40, 10 ** 15, 2 ** 63 - 1} <= set(accepted("seed")) & set(accepted("eval_every")) - {2 ** 63}


def test_epochs_with_too_many_steps_are_refused():
    with pytest.raises(ConfigError, match=r"--num_epochs or --warmup_epochs 1e\+29: these are 2 \*\* 63 steps or more"):
        resolve({"name": "r", "num_epochs": 1e29}, FACTS)


def test_values_that_no_flag_can_have_are_refused():
    for name in (*DATASETS, *MODELS):
        check_settings(RUN | {"dataset" if name in DATASETS else "model_type": name}, "x.pt")
    check_settings(RUN | {"name": "renamed by hand (2)", "img_size": [8, 10], "recipe": "a row that is gone", "learning_rate": 1,
                          "precision": "auto"}, "x.pt")


def test_a_setting_may_be_missing_exactly_if_it_has_a_before():
    """Checkpoints lack flags that were added later. Flags that no longer exist are translated or refused in retired.py."""
    for name in SETTINGS:
        older = {other: value for other, value in RUN.items() if other != name}
        if FLAGS[name].stored:
            with pytest.raises(ConfigError, match=rf"x\.pt: its settings lack {name}\. Use an earlier checkpoint"):
                check_settings(older, "x.pt")
        else:
            check_settings(older | {name: FLAGS[name].before}, "x.pt")
            check_settings(older, "x.pt")
    check_settings({name: RUN[name] for name in STORED}, "x.pt")
    check_settings(RUN | {"worker_timeout": 300, "fp16": True, "prepare": None}, "x.pt")


def test_a_wrong_setting_is_named():
    assert fault(num_steps=None) == "x.pt: its setting num_steps is None, which no run has. Use an earlier checkpoint"
    assert fault(seed="42").startswith("x.pt: its setting seed is '42', which")
    assert fault(gradient_accumulation_steps="auto").startswith("x.pt: its setting gradient_accumulation_steps is 'auto'")
    assert fault(**{"\x1b[2J": 1}) == r"x.pt: its setting \x1b[2J is not known to this version of the program"
