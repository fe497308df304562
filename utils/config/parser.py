"""The command line: `parse` reads flags, `as_command` writes the flags of a configuration."""

import argparse
import itertools
import shlex
import sys
from collections.abc import Callable, Iterable

from .flags import FLAGS, SETTINGS, Flag
from .recipes import decides
from .records import Config
from .retired import RETIRED, advise
from .spelling import did_you_mean, respell, suggest_flag
from .types import METAVARS, ConfigError, image_size, positive_int, to_text

# Flags of the programs that open a trained model: what only a model that is no run needs.
OF_OTHERS = {
    "model_type": {"metavar": "NAME", "help": "of a model that is no run: its architecture, such as ViT-B_16 (default: what its "
                   "file says)"},
    "img_size": {"type": image_size, "metavar": "SIZE", "help": "of such a model: side, or height x width (default: its own)"},
    "num_heads": {"type": positive_int, "metavar": "N", "help": "of such a model: its attention heads, where no file says"},
    "interpolation": {"choices": FLAGS["interpolation"].type, "help": "of such a model: how images are resized (default: as its "
                      "config.json or its publisher says, else as its architecture's)"},
    "eval_crop": {"type": FLAGS["eval_crop"].type, "metavar": "0|0.1..1", "help": "of such a model: the fraction of the image's "
                  "side that is shown, its middle; 0: the whole image (default: as --interpolation)"},
    "mean": {"type": FLAGS["mean"].type, "metavar": "R,G,B", "help": "of such a model: a number for each channel, 0 to 1"},
    "std": {"type": FLAGS["std"].type, "metavar": "R,G,B", "help": "of such a model: the standard deviation of each channel"},
}


class Parser(argparse.ArgumentParser):
    """Raises ConfigError in place of printing the usage. Takes flags under their aliases and with hyphens, and suggests names."""

    def error(self, message: str):
        raise ConfigError(f"{message.removeprefix('argument ')} (python {self.prog} --help lists the flags)")

    def parse_args(self, args=None, namespace=None):
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            suggestion = next(filter(None, (suggest_flag(word, self._options(shown=True)) for word in unknown)), "")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{suggestion and '.' + suggestion}")
        return values

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(respell(sys.argv[1:] if args is None else args, self._options()), namespace)

    def _options(self, shown: bool = False) -> set[str]:
        """`shown`: those that --help lists, of the subcommands too."""
        actions = list(self._actions)
        if shown:
            below = [parser for action in actions if isinstance(action, argparse._SubParsersAction)
                     for parser in action.choices.values()]
            actions += [action for parser in below for action in parser._actions]
        return {option for action in actions if not (shown and action.help == argparse.SUPPRESS)
                for option in action.option_strings}

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            suggestion = did_you_mean(str(value), action.choices)
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}" + (
                f".{suggestion}" if suggestion else f" (choose from {', '.join(map(str, action.choices))})"))


def parse(argv: list[str], prog: str = "train.py", names: Iterable[str] | None = None, description: str | None = None,
          add_arguments: Callable[[argparse.ArgumentParser], None] | None = None) -> dict:
    """The flags that were typed, by name; nothing is filled in, and aliases are replaced. Raises ConfigError.

    names: the flags that the program takes (default: all). add_arguments(parser) adds a program's own.
    """
    parser = Parser(prog=prog, allow_abbrev=False, argument_default=argparse.SUPPRESS, description=description or (
        "Fine-tune a Vision Transformer. bash train.sh starts it on every GPU."))
    if add_arguments is not None:
        add_arguments(parser)
    _add_flags(parser, [row for row in FLAGS.values() if names is None or row.name in names])
    if names is None:
        for name in RETIRED:
            parser.add_argument(f"--{name}", dest=f"retired {name}", nargs="?", help=argparse.SUPPRESS)
    typed = vars(parser.parse_args(argv))
    retired = {name: typed.pop(f"retired {name}") for name in RETIRED if f"retired {name}" in typed}
    if retired:
        raise ConfigError(advise(retired, typed))
    return _replace_aliases(typed)


def _add_flags(parser: argparse.ArgumentParser, rows: list[Flag]) -> None:
    for title, group in itertools.groupby(rows, key=lambda row: row.group):
        titled = parser.add_argument_group(title)
        for row in group:
            kind = ({"action": "store_true"} if row.type is None else {"choices": row.type} if isinstance(row.type, tuple)
                    else {"type": row.type, "metavar": row.metavar or METAVARS[row.type]})
            text = row.help if row.default in (None, False) else f"{row.help} (default: {row.default})"
            if row.aliases:
                text += f" (also {', '.join('-' * min(2, len(alias)) + alias for alias in row.aliases)})"
            titled.add_argument(f"--{row.name}", help=text, **kind)


def _replace_aliases(typed: dict) -> dict:
    for name in [name for name in typed if name in FLAGS and FLAGS[name].alias_of]:
        (target, value), _ = FLAGS[name].alias_of, typed.pop(name)
        if typed.setdefault(target, value) != value:
            raise ConfigError(f"--{name} and --{target} {typed[target]} contradict each other: set one of them")
    return typed


def as_command(config: Config) -> str:
    """The flags that give this configuration again, without those that have no effect or their default."""
    values, decided = config.to_dict(), decides(config.recipe)
    words = []
    for name in SETTINGS:
        row, value = FLAGS[name], values[name]
        if row.type is None:
            words += [f"--{name}"] * bool(value)
            continue
        default = "zero" if name == "head" else row.default            # the head's default is resolved
        hidden = (row.hidden or name == "head") and name not in decided and value == default
        if value is not None and not hidden and row.has_effect(values):
            text = to_text(row.type, value)
            separator = "=" if text.startswith("-") else " "           # or argparse would take it for a flag
            words.append(f"--{name}{separator}{shlex.quote(text)}")
    return " ".join(words)
