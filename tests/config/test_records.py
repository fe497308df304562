"""Config is read-only and remembers sources."""

import pytest

from utils.config import Facts, resolve


def test_a_configuration_is_read_only():
    config = resolve({"seed": 3}, Facts(1797, 10))
    config.to_dict()["seed"] = 9
    for change in (lambda: setattr(config, "seed", 4), lambda: config.learning_rat, lambda: config.replace(learning_rat=1)):
        with pytest.raises(AttributeError):
            change()
    other = config.replace(name="r-2")
    assert (config.name, config.seed, other.name, other.source("seed")) == (None, 3, "r-2", "flag") and other != config
