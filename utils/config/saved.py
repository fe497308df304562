"""The settings that a checkpoint holds, compared with the rows of FLAGS before anything is done with them."""

from argparse import ArgumentTypeError
from pathlib import Path

from models.kinds import SWITCH, TEXT, brief, is_number, is_whole, named

from .flags import FLAGS, SETTINGS
from .retired import RETIRED
from .types import ConfigError, as_tuple, run_name, to_text, user_path

# What a run always has, though the flag has no default: the recipe, the model's row or the data decided.
DECIDED = {"model_type", "img_size", "dropout_rate", "train_batch_size", "num_steps", "warmup_steps", "optimizer",
           "learning_rate", "decay_type", "weight_decay", "max_grad_norm", "augmentation", "eval_every", "save_every", "head"}
LARGEST = 2 ** 40        # of whole numbers: more images, steps or pixels than there are


def check_settings(config: dict, path: str | Path) -> None:
    """Raises ConfigError for a setting that no flag and no recipe can have given.

    A setting that is missing has the value that it had before the flag existed (`before` of its row).
    """
    if missing := DECIDED - config.keys():
        raise ConfigError(f"{path}: its settings lack {min(missing)}. Use an earlier checkpoint")
    for name, value in config.items():
        if name in SETTINGS:
            if not _is_possible(name, as_tuple(value)):
                raise ConfigError(f"{path}: its setting {name} is {brief(value)}, which no run has. Use an earlier checkpoint")
        elif not (name in RETIRED or (name in FLAGS and SWITCH.holds(value))):
            raise ConfigError(f"{path}: its setting {named(name)} is not known to this version of the program")


def _is_possible(name: str, value: object) -> bool:
    row = FLAGS[name]
    kind, default = row.type, row.default
    if value is None:
        return name not in DECIDED and None in (default, row.before)
    if kind is None:
        return SWITCH.holds(value)
    if name == "recipe":                                             # its row may have gone
        return TEXT.holds(value)
    if isinstance(kind, tuple):
        return isinstance(value, str) and (value in kind or value in (default, row.before))
    if isinstance(default, str) and value == default and isinstance(value, str):
        return name != "gradient_accumulation_steps"                 # `auto` was resolved
    if kind is str or isinstance(value, str):
        return TEXT.holds(value) and _reads_as(name, value)
    parts = value if isinstance(value, tuple) else (value,)
    if not all((is_whole(part) and abs(part) < LARGEST) or (isinstance(part, float) and is_number(part)) for part in parts):
        return False
    return _reads_as(name, value)


def _reads_as(name: str, value: object) -> bool:
    """Whether the flag, typed, gives this value."""
    kind = FLAGS[name].type
    if kind in (str, user_path, run_name):                           # a folder may be renamed to anything
        return isinstance(value, str)
    try:
        typed = kind(to_text(kind, value))
    except (ValueError, TypeError, ArithmeticError, ArgumentTypeError):
        return False
    return value in (typed, (typed, typed)) and isinstance(typed, str) == isinstance(value, str)
