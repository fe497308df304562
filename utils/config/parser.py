"""The command line: `parse` reads flags, `as_command` writes the flags of a configuration."""

import argparse
import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping

from .flags import FLAGS, SETTINGS, Flag
from .help import TRAIN, TRAIN_EXAMPLES, Examples, HelpFormatter, command, describe_examples, flag_help, listed, placeholder
from .recipes import decides
from .records import Config
from .retired import RETIRED, advise
from .spelling import did_you_mean, own_images, respell, suggest_flag
from .types import METAVARS, ConfigError, image_size, positive_int, to_text

# Flags of the programs that open a trained model. Only a model that is not one of our runs needs them: a run has its settings.
TITLE_OF_OTHERS = "only for a model that is not one of your runs"
OF_OTHERS = {
    "model_type": {"metavar": "NAME", "help": "its architecture, such as ViT-B_16 (default: what its file says)"},
    "img_size": {"type": image_size, "metavar": "SIZE", "help": "image side in pixels, or height x width such as 224x160 "
                 "(default: its own)"},
    "num_heads": {"type": positive_int, "metavar": "N", "help": "attention heads of a block, where its file does not say "
                  "(default: what its file says, or those of the known model of its sizes)"},
    "classifier": {"choices": FLAGS["classifier"].type, "help": "what its head reads, where its file does not say: token: the "
                   "cls token; mean: the mean of the patches; see train.py --help (default: what its file says)"},
    "interpolation": {"choices": FLAGS["interpolation"].type, "help": "how images are resized (default: as its config.json or "
                      "its publisher says, else as its architecture's)"},
    "eval_crop": {"type": FLAGS["eval_crop"].type, "metavar": METAVARS[FLAGS["eval_crop"].type], "help": "part of the image's "
                  "shorter side that the model sees, from its center; 0: the whole image (default: as --interpolation)"},
    "mean": {"type": FLAGS["mean"].type, "metavar": "R,G,B", "help": "mean of each channel that images are normalized by, for "
             "pixels from 0 to 1 (default: as its config.json says, else its architecture's)"},
    "std": {"type": FLAGS["std"].type, "metavar": "R,G,B", "help": "standard deviation of each channel (default: as --mean)"},
}


class Parser(argparse.ArgumentParser):
    """Raises ConfigError, one line, where argparse prints the usage. Accepts aliases of flags and hyphens, and suggests names.

    description: its first paragraph begins the help, and the others end it. examples: (command, what it does), for the help and
    for the message about a missing argument.
    """

    def __init__(self, *args, examples: Examples = (), description: str | None = None, **more):
        self.examples = list(examples)
        purpose, _, rest = (description or "").partition("\n\n")
        texts = [purpose, describe_examples(self.examples) if self.examples else ""]
        super().__init__(*args, description="\n\n".join(filter(None, texts)), epilog=rest or None, **{
            "formatter_class": HelpFormatter, "allow_abbrev": False} | more)

    def error(self, message: str):
        raise ConfigError(self._reworded(message))

    def _reworded(self, message: str) -> str:
        """The message of argparse in the words of this project: the flag, what is wrong, what to do."""
        look_up = f"({command(self.prog)} --help lists the flags)"
        if names := re.fullmatch("the following arguments are required: (.*)", message):
            missing = names[1].split(", ")
            example = f". For example: {describe_examples(self.examples).splitlines()[1].strip()}" if self.examples else ""
            return f"{listed(missing, 'and')} {'are' if len(missing) > 1 else 'is'} missing{example} {look_up}"
        name, what = re.fullmatch("(?:argument ([^:]*): )?(.*)", message, re.DOTALL).groups()
        if name is None:
            return f"{what} {look_up}"
        value = placeholder(next(action for action in self._actions if name in ("/".join(action.option_strings), action.metavar,
                                                                                action.dest)))
        if value_given := re.fullmatch("ignored explicit argument (.*)", what, re.DOTALL):
            return f"{name} takes no value, got {value_given[1]}"
        needs = {"expected one argument": "needs a value", "expected at least one argument": "needs a value, or several"}
        return f"{name} {needs[what]}: {value} {look_up}" if what in needs else f"{name} {what}"

    def parse_args(self, args=None, namespace=None):
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            suggestion = next(filter(None, (suggest_flag(word, self._options(shown=True)) for word in unknown)), "")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{suggestion and '.' + suggestion}")
        return values

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(respell(sys.argv[1:] if args is None else args, self._options()), namespace)

    def _options(self, shown: bool = False) -> set[str]:
        """The flags; with `shown` those that --help lists."""
        return {option for action in self._actions if not (shown and action.help == argparse.SUPPRESS)
                for option in action.option_strings}

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is None or value in action.choices:
            return
        typed = str(value)
        advice = own_images(typed) if action.dest == "dataset" else ""
        advice += "" if os.path.isfile(typed) else did_you_mean(typed, action.choices)
        raise argparse.ArgumentError(action, f"cannot be {value!r}.{advice}" if advice else
                                     f"must be {listed(action.choices)}, got {value!r}")


def add_flags_of_others(parser: argparse.ArgumentParser, names: Collection[str] = tuple(OF_OTHERS)) -> None:
    """Add the flags of OF_OTHERS with these names."""
    group = parser.add_argument_group(TITLE_OF_OTHERS)
    for name in OF_OTHERS:
        if name in names:
            group.add_argument(f"--{name}", **OF_OTHERS[name])


def parse(argv: list[str], prog: str = "train.py", names: Iterable[str] | Mapping[str, str] | None = None,
          description: str | None = None, add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
          examples: Examples = ()) -> dict:
    """Return the flags that were typed, by name; nothing is filled in, and aliases are replaced. Raises ConfigError.

    names: the flags that the program has (default: all), or their texts in its help, "" for that of the flag's row.
    add_arguments(parser) adds the program's own.
    """
    if prog == "train.py":
        description, examples = TRAIN, TRAIN_EXAMPLES
    parser = Parser(prog=prog, argument_default=argparse.SUPPRESS, description=description, examples=examples)
    if add_arguments is not None:
        add_arguments(parser)
    texts = names if isinstance(names, Mapping) else dict.fromkeys(FLAGS if names is None else names, "")
    _add_flags(parser, [row for row in FLAGS.values() if row.name in texts], texts)
    if names is None:
        for name in RETIRED:
            parser.add_argument(f"--{name}", dest=f"retired {name}", nargs="?", help=argparse.SUPPRESS)
    typed = vars(parser.parse_args(argv))
    retired = {name: typed.pop(f"retired {name}") for name in RETIRED if f"retired {name}" in typed}
    if retired:
        raise ConfigError(advise(retired, typed))
    return _replace_aliases(typed)


def _add_flags(parser: argparse.ArgumentParser, rows: list[Flag], texts: Mapping[str, str]) -> None:
    for title, group in itertools.groupby(rows, key=lambda row: row.group):
        titled = parser.add_argument_group(title)
        for row in group:
            kind = ({"action": "store_true"} if row.type is None else {"choices": row.type} if isinstance(row.type, tuple)
                    else {"type": row.type, "metavar": row.metavar or METAVARS[row.type]})
            titled.add_argument(f"--{row.name}", help=flag_help(row, texts[row.name]), **kind)


def _replace_aliases(typed: dict) -> dict:
    for name in [name for name in typed if name in FLAGS and FLAGS[name].alias_of]:
        (target, value), _ = FLAGS[name].alias_of, typed.pop(name)
        if typed.setdefault(target, value) != value:
            raise ConfigError(f"--{name} and --{target} {typed[target]} contradict each other: set one of them")
    return typed


def as_command(config: Config) -> str:
    """Return the flags that give this configuration again, without those that have no effect or their default value."""
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
            separator = "=" if text.startswith("-") else " "           # or argparse would read it as a flag
            words.append(f"--{name}{separator}{shlex.quote(text)}")
    return " ".join(words)
