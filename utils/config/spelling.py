"""Names as people type them: flags of other programs, hyphens for underscores, and "Did you mean ...?"."""

import collections
import contextlib
import difflib
import functools
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterable
from types import ModuleType

from configs import MODELS, unbuilt
from utils import launch
from utils.files import where_looked

from .flags import FLAGS
from .types import ConfigError

# Flags of other programs that mean something else here: (our flag, what theirs means and what to type instead).
_BATCH = ("train_batch_size", "is the batch of each GPU elsewhere (timm, DeiT, MAE, torchvision, transformers). Here "
          "--train_batch_size is the batch of an optimizer step: their batch x GPUs x accumulation steps")
_ACCUMULATION = ("gradient_accumulation_steps", "multiplies the batch elsewhere (timm, MAE, transformers). Here "
                 "--gradient_accumulation_steps divides --train_batch_size, which stays the batch of an optimizer step")
_AVERAGE = ("ema_decay", "is --ema_decay 0.9998 here: it turns the average on, and the decay rises to that value")
_RANDAUGMENT = ("randaugment_ops", "is --randaugment_ops 2 --randaugment_magnitude 9 here (timm's rand-m9)")
_CLASSES = ("dataset", "is not needed: the number of classes is that of the data. Omit it")
_PUBLISHED = ("pretrained_dir", "is the default here: a model starts from its published weights unless --pretrained_dir names "
              "others, or none. Omit it")
ELSEWHERE: dict[str, tuple[str, str]] = {
    "batch_size": _BATCH, "batchsize": _BATCH, "b": _BATCH, "per_device_train_batch_size": _BATCH,
    "grad_accum_steps": _ACCUMULATION, "accum_iter": _ACCUMULATION,
    "blr": ("learning_rate", "is MAE's rate for 256 images. --learning_rate is absolute: blr x --train_batch_size / 256"),
    "lr_base": ("learning_rate", "is timm's rate for its base size. --learning_rate is absolute, whatever the batch"),
    "mixup_off_epoch": ("mix_off_steps", "counts epochs from the start in timm. --mix_off_steps counts the run's last steps"),
    "drop": ("dropout_rate", "is only dropout before timm's classifier. --dropout_rate acts on positions, attention and MLPs"),
    "model_ema": _AVERAGE, "model_ema_decay": _AVERAGE, "aa": _RANDAUGMENT, "auto_augment": _RANDAUGMENT,
    "amp": ("precision", "is float16 by autocast in timm and torchvision: here --precision fp16 --fp16_opt_level O1, or bf16"),
    "bf16": ("precision", "is --precision bf16 here"),
    "scale": ("crop_scale", "has two numbers in timm, 0.08 1. Here it is --crop_scale 0.08"),
    "gpus": ("device", "is the variable GPUS of train.sh here: GPUS=0,1 bash train.sh"),
    "hflip": ("augmentation", "is part of --augmentation here: crop_flip and pad_flip mirror half of the images"),
    "sched_on_updates": ("decay_type", "is not needed: the learning rate changes at every step. Omit it"),
    "num_classes": _CLASSES, "nb_classes": _CLASSES, "pretrained": _PUBLISHED}
ALIASES: dict[str, str] = {alias: row.name for row in FLAGS.values() for alias in row.aliases}

# Parts of names of models and data sets that others spell differently, and parts that distinguish nothing.
PARTS = {"tiny": "ti", "small": "s", "base": "b", "large": "l", "huge": "h", "resnet": "r", "float": "fp", "bfloat": "bf",
         "half": "fp 16", "gpu": "cuda", "fmnist": "fashion mnist", "imnet": "imagenet", "ilsvrc": "imagenet"}
NOISE = {"patch", "google", "facebook", "timm", "augreg", "in", "ft", "k", "1", "21", "192", "224", "384", "448", "2012"}
LISTS = (".csv", ".tsv")
ALIKE, RELATED = 0.7, 0.55            # of letters, of parts: from here on, a name is suggested
LIKE_VARIABLE, SHORTEST = 0.85, 6     # the same for names of variables with so many letters; shorter ones are not guessed
MISSPELT = 0.95                       # of the letters of a name, in their order
MAX_SHOWN = 3
VARIABLE = re.compile(r"^([A-Z][A-Z0-9_]+)=\$\{\1:-", re.MULTILINE)                # NAME=${NAME:-...} of a script
OF_ALL_SCRIPTS = ("DRY_RUN", "LOCKED", "PYTHON", "VENV")
# Names that other programs' scripts and our own flags suggest for a variable.
OTHER_VARIABLES = {"EPOCHS": "NUM_EPOCHS", "STEPS": "NUM_STEPS", "BATCH_SIZE": "TRAIN_BATCH_SIZE", "LR": "LEARNING_RATE",
                   "VAL_FRAC": "VAL_FRACTION", "RESUME_FROM": "RESUME_PATH", "PRETRAINED": "PRETRAINED_DIR",
                   "GRADIENT_ACCUMULATION_STEPS": "GRAD_STEPS", "RUN_NAME": "NAME"}
# Job systems and shells have variables with names like these.
NOT_GUESSED = ("LOCKED", "PYTHON", "VENV", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


def respell(words: Iterable[str], options: Collection[str]) -> list[str]:
    """Return the words of a command line, with flags spelled as in `options` (such as "--learning_rate").

    Raises ConfigError for a flag of another program that means something else here.
    """
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    return [_respell(word, options) for word in words[:end]] + words[end:]


def _respell(word: str, options: Collection[str]) -> str:
    match = re.fullmatch(r"--([A-Za-z][\w-]*)(=.*)?|-([A-Za-z])(=.*)?", word, re.DOTALL)
    if match is None or word.partition("=")[0] in options:
        return word
    name, value = (match[1] or match[3]).replace("-", "_"), match[2] or match[4] or ""
    flag, why = ELSEWHERE.get(name, ("", ""))
    if f"--{flag}" in options:
        raise ConfigError(f"{word.partition('=')[0]} {why}")
    ours = f"--{ALIASES.get(name, name)}"
    return ours + value if ours in options else word


def suggest_flag(word: str, options: Collection[str]) -> str:
    """Return ' Did you mean --x?' for a word that is no flag, or ''."""
    known = {option.removeprefix("--") for option in options}
    known |= {alias for alias, name in ALIASES.items() if name in known}
    similar = suggest(word.partition("=")[0], known) if word.startswith("-") else []
    return _ask([f"--{ALIASES.get(name, name)}" for name in similar])


def did_you_mean(typed: str, known: Iterable[str]) -> str:
    """Return ' Did you mean X or Y?' with the known names that are most like what was typed, or ''."""
    return _ask(suggest(typed, known))


def own_images(typed: str) -> str:
    """Return what to type for a --dataset that is none, if a folder or a list of the user's has a name like it; else ''."""
    if os.path.isfile(typed) and typed.lower().endswith(LISTS):
        return (f" For the images of the list {typed}: DATASET=csv DATA_DIR={shlex.quote(os.path.dirname(typed) or '.')} "
                "(--dataset csv --data_dir).")
    folder = typed if os.path.isdir(typed) else next(filter(None, map(functools.partial(_folder_like, typed), (".", "data"))), "")
    if not folder:
        return ""
    return f" For the images in {folder}: DATASET=folder DATA_DIR={shlex.quote(folder)} (--dataset folder --data_dir)."


def _folder_like(typed: str, parent: str) -> str:
    """Return the folder in `parent`, not of Python files, whose name is most like what was typed; ''."""
    with contextlib.suppress(OSError):
        names = [entry.name for entry in os.scandir(parent) if entry.is_dir() and not entry.name.startswith(".")]
        for folder in (os.path.normpath(os.path.join(parent, name)) for name in suggest(typed, names)):
            if not any(name.endswith(".py") for name in os.listdir(folder)):
                return folder
    return ""


def model_named(name: str | None, hub: ModuleType) -> str | None:
    """Return the row of configs.MODELS that a --model_type means, which may be the name of a published file. Raises ConfigError.

    hub: the module models.checkpoints.hub, which knows the published names.
    """
    row = name if name is None or name in MODELS else hub.model_of(name)
    if not row and name is not None and (what := unbuilt(name)):
        raise ConfigError(f"--model_type {name}: it has {what}, which no model here supports")
    if row == "":
        raise ConfigError(f"--model_type {name}: its architecture is not supported (MODEL_ZOO.md lists those that are)")
    if row is None and name is not None:
        meant = hub.did_you_mean(name)
        if hub.repository_of(name):
            raise ConfigError(f"--model_type {name}: a repository that MODEL_ZOO.md does not list.{meant} To start from it, type "
                              f"--pretrained_dir {name} (PRETRAINED_DIR) and omit --model_type")
        raise ConfigError(unknown_model(name, meant))
    return row


def name_model(flags: dict, hub: ModuleType) -> dict:
    """Return the flags with the row that --model_type means. The name of a published file also sets --pretrained_dir, unless
    another flag sets where to start. Raises ConfigError.
    """
    typed = flags.get("model_type")
    row = model_named(typed, hub)
    if row == typed:
        return flags
    start = {} if "resume_path" in flags else {"pretrained_dir": typed}
    return start | flags | {"model_type": row}


def unknown_model(name: str, meant: str = "") -> str:
    """Return the message for a --model_type that is no row of configs.MODELS. meant: ' Did you mean ...?' of published names."""
    similar = suggest(name, MODELS)
    side = re.search(r"[_-](\d{3})(?!\d)", name)                 # vit_base_patch16_384 is the model at 384 px
    if side and len(similar) == 1 and int(side[1]) != MODELS[similar[0]].img_size:
        similar = [f"{similar[0]} with --img_size {side[1]}"]
    return f"--model_type {name}: no such model.{_ask(similar) or f'{meant} MODEL_ZOO.md lists the models'}"


def _ask(names: Iterable[str]) -> str:
    *others, last = list(dict.fromkeys(names))[:MAX_SHOWN] or [""]
    return f" Did you mean {' or '.join(filter(None, [', '.join(others), last]))}?" if last else ""


def suggest(typed: str, known: Iterable[str]) -> list[str]:
    """Return the known names that `typed` may mean, the most likely first: those with the same letters and digits, else the same
    parts ('vit_base_patch16_224' and 'ViT-B_16'), else almost the same letters.
    """
    known = sorted(known)
    if same := [name for name in known if _letters(name) == _letters(typed)]:
        return same
    related = {name: _relation(_parts(typed), _parts(name)) for name in known}
    best = max(related.values(), default=0)
    if best >= RELATED:
        return [name for name in known if related[name] == best]
    alike = {name: _likeness(_letters(typed), _letters(name)) for name in known}
    found = sorted((name for name in known if alike[name] >= ALIKE), key=lambda name: -alike[name])
    return [name for name in found if alike[name] > alike[found[0]] - 0.1]


def warn_of_variables(environment: Iterable[str], *scripts: str) -> None:
    """Print, on standard error, a warning for each name in the environment that is almost a variable of the scripts, or another
    program's name for one. scripts: such as "sweep.sh", which the warning names, and "train.sh", which it starts.
    """
    texts = [(launch.ROOT / script).read_text(encoding="utf-8") for script in scripts]
    known = dict.fromkeys([*OF_ALL_SCRIPTS, *(name for text in texts for name in VARIABLE.findall(text))])
    for typed in sorted(set(environment) - set(known)):
        like = next(filter(functools.partial(_like_variable, typed), known), "")
        if (name := OTHER_VARIABLES.get(typed, like)) in known:
            print(f"warning: {typed} is not a variable of {scripts[0]}.{_ask([name])}", file=sys.stderr)


def _like_variable(typed: str, name: str) -> bool:
    """Whether `typed` is the name but for underscores, capitals and one or two letters: rather no than a false alarm."""
    a, b = _letters(typed), _letters(name)
    if name in NOT_GUESSED or len(b) < SHORTEST or a[:1] != b[:1] or typed.startswith(f"{name}_"):
        return False
    return difflib.SequenceMatcher(None, a, b).ratio() >= LIKE_VARIABLE


def _letters(text: str) -> str:
    return "".join(re.findall(r"[a-z0-9]", text.lower()))


def _parts(text: str) -> collections.Counter:
    found = [part for word in re.findall(r"[a-z]+|\d+", text.lower()) for part in PARTS.get(word, word).split()]
    families = {"mae", "deit", "cait"} & set(found)              # MAE's encoder is a ViT too
    return collections.Counter(part for part in found if part not in NOISE and not (families and part == "vit"))


def _relation(a: collections.Counter, b: collections.Counter) -> float:
    """Return the fraction of the parts of both names that they share, 0 to 1."""
    return (a & b).total() / max(1, (a | b).total())


def _likeness(a: str, b: str) -> float:
    """Return the similarity of the letters, 0 to 1; at least 0.8 for a name that begins or ends the other."""
    short, long = sorted((a, b), key=len)
    ratio = difflib.SequenceMatcher(None, a, b).ratio()
    return max(ratio, 0.8) if len(short) > 2 and (long.startswith(short) or long.endswith(short)) else ratio


def check_opened(flags: dict, hub: ModuleType, published_name: Callable[[str], str | None],
                 names: Collection[str], flag: str, require_weights: Callable[[str], None]) -> str | None:
    """Return the row of configs.MODELS that --model_type means, for a program that opens the trained model named by `flag`.

    require_weights(path) raises ValueError where there are no weights. Raises ConfigError, as model_named and check_published do.
    """
    check_published(flags, published_name, names, flag)
    what = flags.get(flag.lower())
    if what is not None and os.path.exists(what):
        try:
            require_weights(what)
        except ValueError as error:
            raise ConfigError(f"{flag if flag.isupper() else f'--{flag}'}: {error}") from error
    return model_named(flags.get("model_type"), hub)


def check_published(flags: dict, published_name: Callable[[str], str | None], names: Collection[str], flag: str = "pretrained_dir"
                  ) -> None:
    """Raise ConfigError for a --pretrained_dir that is no path and no published name. names: most of the published names.
    flag: another flag, or in capitals the name of an argument."""
    start, shown = flags.get(flag.lower()) or "auto", flag if flag.isupper() else f"--{flag}"
    if start in ("auto", "none", "augreg") or os.path.exists(start) or published_name(start) or flags.get("resume_path"):
        return
    if what := unbuilt(start):
        raise ConfigError(f"{shown} {start}: it has {what}, which no model here supports")
    folder = start.partition("/")[0]
    own = [name for name in names if name.startswith(f"{folder}/")]
    similar = _misspelt(start, names) or suggest(start, own) or [published_name(model) for model in suggest(start, MODELS)]
    meant = _ask(filter(None, similar))
    place = "" if meant else where_looked(start)
    raise ConfigError(f"{shown} {start}: no such file or folder{place}, and no published name.{meant} "
                      "MODEL_ZOO.md lists the names")


def _misspelt(typed: str, names: Collection[str]) -> list[str]:
    """Return timm's names, of weights or of an architecture, that are like what was typed but for a few letters."""
    whole = [name.removeprefix("timm/") for name in names if name.startswith("timm/")]
    known = dict.fromkeys([*(name.partition(".")[0] for name in whole), *whole])
    ratios = {name: difflib.SequenceMatcher(None, typed.removeprefix("timm/"), name).ratio() for name in known}
    best = max(ratios.values(), default=0)
    return [name for name in known if ratios[name] == best >= MISSPELT]
