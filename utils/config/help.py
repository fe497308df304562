"""What `--help` prints: what the program does, examples, then the flags in titled groups with the defaults that apply."""

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

from configs import RECIPES
from utils import launch

from .flags import Flag
from .recipes import sets_by_data
from .spelling import did_you_mean
from .types import METAVARS, ConfigError, to_text

WIDEST = 120                    # columns, also in a wider terminal
COLUMN = 26                     # in which the text about a flag begins
LONGEST_CHOICES = 24            # characters: longer lists of choices are in the text about the flag
AUTOMATIC = ("digits", "photos", "vit-paper")          # the recipes that --recipe auto chooses from
Examples = Iterable[tuple[str, str]]                   # (command, what it does)

TRAIN = ("Fine-tunes a Vision Transformer. bash train.sh starts it on every GPU; train.py runs it in one process. A flag "
         "that is not given has the value of the recipe, or its default. MODEL_ZOO.md lists models, docs/ explains the rest.")
TRAIN_EXAMPLES = (
    ("DATASET=folder DATA_DIR=flowers VAL_FRACTION=0.2 train.sh",
     "trains on the photographs in flowers, which has a folder for each class; a fifth is held out to measure on"),
    ("DATASET=cifar100 MODEL_TYPE=ViT-B_16 train.sh --learning_rate 0.01", "the paper's recipe on a published data set"),
    ("train.py --eval_only --resume_path output/flowers", "evaluates a run"))


class HelpFormatter(argparse.HelpFormatter):
    """A short usage line, paragraphs that keep indented lines, and choices as `a|b`, or in the text where these are many."""

    def __init__(self, prog: str, **more):
        super().__init__(prog, max_help_position=COLUMN, width=min(WIDEST, shutil.get_terminal_size().columns) - 2)

    def _format_usage(self, usage, actions, groups, prefix) -> str:
        needed = [action for action in actions if action.required or not action.option_strings]
        words = [f"{action.option_strings[0]} {placeholder(action)}" if action.option_strings else
                 self._format_args(action, placeholder(action)) for action in needed]
        return f"usage: {' '.join([self._prog, *words])} [FLAG ...]\n\n"

    def _fill_text(self, text, width, indent) -> str:
        return "\n\n".join(part if part.startswith(" ") or "\n  " in part else textwrap.fill(
            " ".join(part.split()), width, break_on_hyphens=False)
                           for part in text.strip("\n").split("\n\n"))

    def _split_lines(self, text, width) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _metavar_formatter(self, action, default_metavar):
        return lambda size: (placeholder(action),) * size

    def _get_help_string(self, action) -> str:
        text = action.help or ""
        if not has_long_choices(action) or set(map(str, action.choices)) <= set(re.findall(r"[\w-]+", text)):
            return text
        before, mark, default = text.partition(" (default")
        return f"{before}. One of {', '.join(map(str, action.choices))}{mark}{default}"


def has_long_choices(action: argparse.Action) -> bool:
    return bool(action.choices) and action.metavar is None and len("|".join(map(str, action.choices))) > LONGEST_CHOICES


def placeholder(action: argparse.Action) -> str:
    """Return what stands for the value of a flag: "N", "PATH", "a|b"; "" for a switch."""
    if action.metavar is not None:
        return action.metavar
    if action.choices:
        return "NAME" if has_long_choices(action) else "|".join(map(str, action.choices))
    return METAVARS.get(action.type or str, "") if action.nargs != 0 else ""


def flag_help(row: Flag, text: str | None = None) -> str:
    """Return the text about a flag: what it does, its default and its other names. text: in place of the row's."""
    text = text or row.help
    if row.type is not None and "(default: " not in text:
        text += f" (default: {_default(row)})"
    if row.aliases:
        text += f" (also {', '.join('-' * min(2, len(alias)) + alias for alias in row.aliases)})"
    return text


def _default(row: Flag) -> str:
    """Return the row's default and what recipes have instead: "0; 0.1 in deit, mae". Without a default it is "the recipe's: 64 in
    digits; computed in photos"."""
    found: dict[str, list[str]] = {}
    for recipe, settings in RECIPES.items():
        if row.name in settings and (row.default is not None or recipe in AUTOMATIC) and settings[row.name] != row.default:
            found.setdefault(_text(row, settings[row.name]), []).append(recipe)
    computed = [recipe for recipe in RECIPES if row.name in sets_by_data(recipe)]
    others = [f"{value} in {', '.join(recipes)}" for value, recipes in found.items()]
    others += [f"computed in {', '.join(computed)}"] * bool(computed)
    return f"the recipe's: {'; '.join(others)}" if row.default is None else "; ".join([_text(row, row.default), *others])


def _text(row: Flag, value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else to_text(row.type, value)


def command(prog: str) -> str:
    """Return a program's name as a command to copy: "dataset.py check" -> "python dataset.py check"."""
    script, _, rest = prog.partition(" ")
    return f"{launch.command(script)} {rest}".strip()


def describe_examples(examples: Examples) -> str:
    """Return the paragraph of examples. Each command begins with a script, which may be preceded by variables of train.sh."""
    lines = []
    for line, what in examples:
        *variables, script = line[:line.index(".py" if ".py" in line else ".sh") + 3].split(" ")
        rest = line[len(" ".join([*variables, script])):]
        lines += [f"  {launch.command(script, ' '.join(variables))}{rest}", f"      {what}"]
    return "\n".join(["examples:", *lines])


Commands = Sequence[tuple[str, str, str]]              # (name, what it does, an example of its arguments)


def overview(what: str, title: str, commands: Commands, prog: str) -> str:
    """Return the help of a program whose first argument is one of `commands`."""
    lines = [line for name, does, example in commands for line in (f"  {name:<15} {does}", f"      {command(prog)} {example}")]
    return "\n".join([what, "", f"{title}:", *lines, "", f"{command(prog)} {_kind(title)} --help lists its flags."])


def parse_command(argv: Sequence[str], what: str, title: str, commands: Commands, prog: str) -> str:
    """Return the first argument, the name of one of `commands`. Raises ConfigError, without arguments after the overview."""
    names, kind = [name for name, *_ in commands], _kind(title)
    if not argv:
        print(overview(what, title, commands, prog), file=sys.stderr)
        raise ConfigError(f"{kind} is missing. Choose one of those above")
    if argv[0] not in names:
        raise ConfigError(f"{kind} must be {listed(names)}, got {argv[0]!r}.{did_you_mean(argv[0], names)} "
                          f"({command(prog)} --help)")
    return argv[0]


def _kind(title: str) -> str:
    """COMMAND of the title "commands"."""
    return title.removesuffix("s").upper()


def listed(words: Iterable[object], conjunction: str = "or") -> str:
    """Return 'a, b or c'."""
    *others, last = map(str, words)
    return f" {conjunction} ".join(filter(None, [", ".join(others), last]))
