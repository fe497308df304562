"""Checks of settings together. Each raises ConfigError, and needs only plain values; warnings are lines of text.

A setting that depends on data which are not known yet is missing. A check that needs it is skipped, and repeated when everything
is known.
"""

import importlib.util
from collections.abc import Callable

from utils import launch

from .flags import FLAGS, SETTINGS, SIZES
from .records import FLAG, RECIPE, Config, Facts, Values
from .types import NO_DASH, ConfigError

FEW_FOR_SCRATCH = 10_000                           # training images; recipes that start from scratch have 50,000 or more


def _holds(condition: Callable, values: dict, if_missing: bool) -> bool:
    try:
        return bool(condition(values))
    except KeyError:
        return if_missing


# (what must not hold, the message; {name} is the value of a setting). SESSION: also for a resumed run.
SESSION_CONFLICTS: tuple[tuple[Callable[[dict], object], str], ...] = (
    (lambda v: v["profile"] and v["eval_only"], "--profile records training steps, and --eval_only runs none. Omit one."),
    (lambda v: v["attention_edits"] and v["compile"] and not v["eval_only"],
     "--attention_edits and --compile contradict each other: edits read the model's attention, which a compiled model hides. "
     "Omit --compile."),
    (lambda v: not v["eval_only"] and any("\ud800" <= letter <= "\udfff" for letter in v["log_dir"]),
     "--log_dir {log_dir}: TensorBoard only accepts names in UTF-8. Choose another, or a locale of UTF-8 (LC_ALL=C.UTF-8)."),
)
CONFLICTS: tuple[tuple[Callable[[dict], object], str], ...] = (
    (lambda v: v["decay_type"] == "step" and not v["decay_milestones"],
     "--decay_type step needs --decay_milestones, such as 200,300,400"),
    (lambda v: v["distillation"] != "none" and v["teacher"] is None,
     "--distillation {distillation} needs a --teacher: a run folder or a checkpoint file"),
    (lambda v: v["attention_edits"] and v["eval_only"],
     "--attention_edits trains attention, and --eval_only trains nothing. Omit one."),
    (lambda v: v["attention_edits"] and (v["randaugment_ops"] or v["mixup_alpha"] or v["cutmix_alpha"]),
     "--attention_edits cannot follow RandAugment, MixUp or CutMix. Set --randaugment_ops, --mixup_alpha and --cutmix_alpha "
     "to 0"),
    (lambda v: v["head_learning_rate"] and not v["learning_rate"],
     "--head_learning_rate is applied as a multiple of --learning_rate, which is 0. To train only the head, use "
     "--train_layers head."),
    (lambda v: v["ema_decay"] and v["precision"] == "fp16" and v["fp16_opt_level"] == "O3",
     "--ema_decay with --fp16_opt_level O3: float16 is too coarse for an average. Use O1 or O2."),
    (lambda v: v["loss_scale"] and (v["precision"] != "fp16" or v["fp16_opt_level"] in ("O0", "O3")),
     "--loss_scale only has an effect with fp16 at O1 or O2: the other modes do not scale the loss. Omit it."),
    (lambda v: v["min_learning_rate"] > v["learning_rate"],
     "--min_learning_rate {min_learning_rate} is more than --learning_rate {learning_rate}"),
    *SESSION_CONFLICTS,
)


def check_conflicts(values: dict, conflicts: tuple = CONFLICTS) -> None:
    for condition, message in conflicts:
        if _holds(condition, values, if_missing=False):
            raise ConfigError(message.format_map(values))


def check_effects(flags: dict, values: dict) -> None:
    """Raise ConfigError for a flag that would change nothing."""
    for name in flags:
        if not _holds(FLAGS[name].has_effect, values, if_missing=True):
            raise ConfigError(f"--{name} only has an effect with {FLAGS[name].requires[1]}. Add that or omit --{name}.")


def check_flags(flags: dict) -> None:
    for name in flags:
        if name not in SETTINGS:
            raise ConfigError(f"no flag is called --{name}")
        if flags[name] == "-" and name in ("output_dir", "log_dir"):
            raise ConfigError(f"--{name} {NO_DASH}")
    for steps, epochs in (("num_steps", "num_epochs"), ("warmup_steps", "warmup_epochs")):
        if steps in flags and epochs in flags:
            raise ConfigError(f"--{steps} and --{epochs} contradict each other: set one of them")


def check_batch(values: dict, ranks: int, resumed: bool) -> None:
    """Raise ConfigError unless the batch divides into equal micro-batches; the message names the nearest sizes."""
    if values["eval_only"] or "train_batch_size" not in values:
        return
    size, micro_steps = values["train_batch_size"], values["gradient_accumulation_steps"]
    unit = ranks * micro_steps
    parts = f"{ranks} processes x {micro_steps} micro-steps"
    if size % unit:
        below = size // unit * unit
        advice = ("change --gradient_accumulation_steps (GRAD_STEPS) or the number of processes (NPROC)" if resumed
                  else f"use {below} or {below + unit}" if below else f"use {unit}")
        raise ConfigError(f"--train_batch_size {size} is not divisible by {parts}: {advice}")
    if _holds(lambda v: v["mixup_alpha"] or v["cutmix_alpha"], values, if_missing=False) and size // unit % 2:
        raise ConfigError(f"--train_batch_size {size} over {parts} leaves {size // unit} images, an odd number, and MixUp and "
                          f"CutMix mix pairs. Use {size + unit}.")


def check_exact(values: dict, ranks: int, saved_micro_batches: int | None = None) -> None:
    """Raise ConfigError unless each process has a node of the binary tree in which --exact sums (utils/training/exact.py)."""
    micro_steps = values["gradient_accumulation_steps"]
    if not values["exact"] or values["eval_only"]:
        return
    if ranks > 1 and micro_steps & (micro_steps - 1):
        below = 1 << micro_steps.bit_length() - 1
        raise ConfigError(f"--exact on {ranks} processes: {micro_steps} micro-steps a process are not a power of two. Use "
                          f"--gradient_accumulation_steps (GRAD_STEPS) {below} or {2 * below}, or one process.")
    if saved_micro_batches is not None and micro_steps * ranks != saved_micro_batches:
        raise ConfigError(f"--exact: the run has {saved_micro_batches} micro-batches a step, and {ranks} processes x "
                          f"{micro_steps} micro-steps make {ranks * micro_steps}. Change NPROC or GRAD_STEPS.")


def check_facts(values: dict, facts: Facts) -> None:
    """Raise ConfigError where the data do not fit the settings."""
    if values["test"] == "never" and facts.test_is_val and facts.train_images:
        raise ConfigError("--test never: the only held-out images of these data, val or test, are also the test set, so none "
                          "would be left to evaluate on. Hold out training images to choose on: --val_fraction 0.1")
    weights = values["class_weights"]
    if weights not in ("none", "balanced") and not values["eval_only"] and len(weights.split(",")) != facts.num_classes:
        raise ConfigError(f"--class_weights has {len(weights.split(','))} numbers, the data have {facts.num_classes} classes")


def check_head(values: Values, facts: Facts) -> None:
    """Raise ConfigError unless a head that is kept has the classes of the data, in a known order."""
    if values["head"] != "keep":
        return
    if facts.start_head_classes == facts.num_classes:
        if facts.class_orders and not facts.start_names_classes and values.sources["class_order"] != FLAG:
            number, text = facts.class_orders
            raise ConfigError(f"--class_order: the head of {facts.start_path} does not name its classes, and those of the data "
                              f"have two orders. Add --class_order text ({text}) if the head was trained with torchvision's "
                              f"ImageFolder, as most are, or --class_order number ({number})")
        return
    why = "--eval_only" if values["eval_only"] else "--attention_edits" if values["attention_edits"] else "--head keep"
    other = "--resume_path output/NAME, or " if values["eval_only"] else ""
    raise ConfigError(f"{why}: the head of {facts.start_path} has {facts.start_head_classes or 0} classes, the data "
                      f"{facts.num_classes}: give {other}a --pretrained_dir with a head for these data")


def check_packages(what: str, names: tuple[str, ...], requirements: str) -> None:
    """Raise ConfigError, with the command to install it, for a package that this Python lacks. what: the flag that needs it."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{what} needs the package {missing[0]}. Install it: {launch.command_to_install(requirements)}")


def scratch_warnings(config: Config, facts: Facts) -> list[str]:
    """Return the warning about a recipe that starts from scratch, with fewer images than a Vision Transformer needs for that."""
    if config.pretrained_dir != "none" or config.source("pretrained_dir") != RECIPE or facts.train_images >= FEW_FOR_SCRATCH:
        return []
    own_size = any(config.source(key) == FLAG for key in SIZES)             # no published weights have it
    return [f"warning: the recipe {config.recipe} starts from scratch, and {facts.train_images:,} images are few for that"
            + ("" if own_size else ". Without --recipe (RECIPE) a run starts from trained weights")]
