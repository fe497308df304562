"""Turns what was typed into a validated `Config`. Imports neither PyTorch nor models, so that a bad flag fails within a second.

    flags = parse(argv); check(flags); sources = choose(flags); ...; config = resolve(flags, facts, saved)
"""

from .checks import check_packages, scratch_warnings
from .flags import FLAGS, SIZES, Flag, before
from .help import overview, parse_command
from .parser import OF_OTHERS, Parser, add_flags_of_others, as_command, parse
from .recipes import machine_of, why_this_model
from .records import Config, Facts, Machine, Saved, Sources
from .resolve import (
    check,
    check_new_file,
    check_writable,
    choose,
    describe_length,
    describe_memory,
    length_warnings,
    model_overrides,
    preview,
    resolve,
)
from .resume import changes, lacking_settings
from .spelling import check_opened, check_published, did_you_mean, model_named, name_model, unknown_model, warn_of_variables
from .types import ConfigError
from .view import describe_view, view_notes
