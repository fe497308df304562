"""Checks the settings in a checkpoint against the rows of FLAGS, before they are used."""

from argparse import ArgumentTypeError
from pathlib import Path

from models.kinds import LONGEST_WORD, SWITCH, TEXT, brief, is_text, is_whole, named

from .flags import FLAGS, SETTINGS
from .retired import RETIRED
from .types import LONGEST_PATH, ConfigError, as_tuple, run_name, to_text, user_path

PATHS = (user_path, run_name)
STORED = {name for name in SETTINGS if FLAGS[name].stored}


class SettingsError(ConfigError):
    """Raised when the settings of a checkpoint are not those of a run."""


def check_settings(config: dict, path: str | Path) -> None:
    """Raise SettingsError for a setting that no flag and no recipe can set.

    A missing setting has the value from before the flag existed (`before` of its row).
    """
    if missing := STORED - config.keys():
        raise SettingsError(f"{path}: its settings lack {min(missing)}. Use an earlier checkpoint")
    for name, value in config.items():
        if name in SETTINGS:
            if not _is_possible(name, as_tuple(value)):
                raise SettingsError(f"{path}: its setting {name} is {brief(value)}, which no run has. Use an earlier checkpoint")
        elif not (name in RETIRED or (name in FLAGS and SWITCH.holds(value))):
            raise SettingsError(f"{path}: its setting {named(name)} is not known to this version of the program")


def _is_possible(name: str, value: object) -> bool:
    row = FLAGS[name]
    kind, default = row.type, row.default
    if value is None:
        return name not in STORED and None in (default, row.before)
    if kind is None:
        return SWITCH.holds(value)
    if name == "recipe":                                             # its row may have gone
        return TEXT.holds(value)
    if isinstance(kind, tuple):
        return isinstance(value, str) and (value in kind or value in (default, row.before))
    if isinstance(default, str) and value == default and isinstance(value, str):
        return name != "gradient_accumulation_steps"                 # `auto` was resolved
    if kind is str or isinstance(value, str):
        return is_text(value, LONGEST_PATH if kind in PATHS else LONGEST_WORD) and _reads_as(name, value)
    parts = value if isinstance(value, tuple) else (value,)
    return all(isinstance(part, float) or (is_whole(part) and abs(part) < 2 ** 63) for part in parts) and _reads_as(name, value)


def _reads_as(name: str, value: object) -> bool:
    """Return whether the typed flag would give this value."""
    kind = FLAGS[name].type
    if kind in (str, *PATHS):                     # a folder may be renamed to anything
        return isinstance(value, str)
    try:
        typed = kind(to_text(kind, value))
    except (ValueError, TypeError, ArithmeticError, ArgumentTypeError):
        return False
    return value in (typed, (typed, typed)) and isinstance(typed, str) == isinstance(value, str)
