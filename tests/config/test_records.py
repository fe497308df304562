"""Config is read-only, remembers sources and travels between processes."""

import pickle

import pytest

from utils.config import Facts, resolve

FACTS = Facts(1797, 10)


def test_a_configuration_is_read_only():
    config = resolve({"seed": 3}, FACTS)
    with pytest.raises(AttributeError, match="replace"):
        config.seed = 4
    with pytest.raises(AttributeError, match="no setting is called 'learning_rat'"):
        _ = config.learning_rat
    with pytest.raises(AttributeError, match="learning_rat"):
        config.replace(learning_rat=1)
    config.to_dict()["seed"] = 9
    other = config.replace(name="r-2")
    assert (config.name, config.seed, other.name, other.source("seed")) == (None, 3, "r-2", "flag") and other != config


def test_a_configuration_can_be_sent():
    config = resolve({"seed": 3}, FACTS)
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config and copy.source("seed") == "flag"
