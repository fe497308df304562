"""Flags and facts -> the configuration: replaces defaults, epochs and `auto` by values (of a resumed run: resume.py).

    choose(flags)           returns what has to be opened
    resolve(flags, facts)   returns the configuration
    check(flags)            the part of `resolve` that needs neither data nor PyTorch, so that a bad flag fails within a second
"""

import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from configs import AUGREG_SIZES, MODELS, RECIPES
from utils import launch
from utils.files import image_folder, no_folder, no_image_folder, where_looked
from utils.training import memory

from . import checks, recipes
from .adopt import adopt_file, put_view
from .flags import FLAGS, MODEL_KEYS, SETTINGS, SIZES, defaults
from .records import DEFAULT, FLAG, MODEL, RECIPE, START, Config, Facts, Machine, Saved, Sources, Values, steps_in
from .resume import AUTOMATIC, NOT_DOWNLOADED, keep_or_refuse, read_saved, resolve_resumed
from .types import ConfigError, as_tuple

AUTO, NONE = "auto", "none"
MAX_PASSES, GOOD_PASSES = 200, 50                  # over the training images: more are hardly ever intended; what to try instead
RESUMED_ONLY = ("resume_path", "override")         # dropped where `auto` finds nothing to resume


def check(flags: dict, written: tuple[str, ...] = ("output_dir", "log_dir")) -> None:
    """Raise ConfigError for everything that can be known from the flags only, missing files and folders included.

    written: the flags whose folders this process writes into.
    """
    checks.check_flags(flags)
    resume_path, edits = flags.get("resume_path"), flags.get("attention_edits")
    if resume_path == AUTO and "name" not in flags:
        raise ConfigError("--resume_path auto needs a --name (RESUME_PATH=auto needs NAME): it resumes OUTPUT_DIR/NAME, if that "
                          "holds a run")
    if resume_path not in (None, AUTO) and not (Path(resume_path).is_dir() or Path(resume_path).is_file()):
        raise ConfigError(f"--resume_path: nothing to resume at {resume_path}{where_looked(resume_path)}: give a run folder "
                          "(output/NAME) or a checkpoint file")
    if edits and not Path(edits).is_dir():
        raise ConfigError(f"--attention_edits {edits}: {no_folder(edits)}")
    if resume_path is not None:
        check_folders(flags, {}, written)
        return                                      # the rest depends on the checkpoint
    values = _resolve(flags, None)
    if values.get("optimizer") == "lamb" and importlib.util.find_spec("timm") is None:
        raise ConfigError("--optimizer lamb needs timm, which is not installed. Install it "
                          f"({launch.command_to_install('timm')}), or use adamw")
    check_folders(flags, values, written)


def check_folders(flags: dict, values: Mapping, written: tuple[str, ...]) -> None:
    """Raise ConfigError where the data are missing, or a folder cannot be written. values: {} for a resumed run, of which only
    the flags are known."""
    dataset, place = values.get("dataset"), Path(values["data_dir"] if values else flags.get("data_dir", "."))
    if dataset != "digits" and (place.exists() or dataset in NOT_DOWNLOADED) and not place.is_dir():
        raise ConfigError(f"--data_dir {place}: {no_folder(place)}")
    if values and dataset not in ("digits", *NOT_DOWNLOADED) and not place.exists():
        check_writable("--data_dir", place)
    if dataset == "csv" and values["image_dir"] and image_folder(values["image_dir"], place) is None:
        raise ConfigError(no_image_folder(values["image_dir"], place))
    if not (values or flags).get("eval_only"):
        for name in (name for name in written if name in (values or flags)):
            check_writable(f"--{name}", Path((values or flags)[name]))


def check_writable(flag: str, folder: Path) -> None:
    """Raise ConfigError where the folder cannot be made or written. It tries, and leaves nothing behind."""
    parents = [part for part in folder.parents if part != Path(".")]                     # as they were typed
    there = next(part for part in (folder, *parents, *folder.absolute().parents) if part.exists())
    if not there.is_dir():
        raise ConfigError(f"{flag} {folder}: {there} is a file, not a folder")
    try:
        os.rmdir(tempfile.mkdtemp(suffix=".tmp", dir=there))
    except OSError as error:
        raise ConfigError(f"{flag} {folder}: {there} cannot be written ({error.strerror}). Give another folder.") from error


def check_new_file(flag: str, path: str | Path, new: str = "file") -> None:
    """Raise ConfigError where no new file can be made at the path. Its folder may be missing: it is made when the file is."""
    if os.path.lexists(path):
        what = f"is a folder. Give the name of a new {new}" if os.path.isdir(path) and new == "file" else (
            "exists, and is not overwritten. Remove it, or give another name")
        raise ConfigError(f"{flag} {path} {what}")
    check_writable(flag, Path(path).parent)


def choose(flags: dict, saved_config: dict | None = None, machine: Machine | None = None) -> Sources:
    """Return what has to be opened. saved_config: of the checkpoint that is resumed. Raises ConfigError."""
    if saved_config is None:
        values = _fill(flags, machine)
    else:
        saved = read_saved(saved_config)
        kept = keep_or_refuse({name: value for name, value in flags.items() if "epochs" not in name}, saved)
        values = saved | kept | {"pretrained_dir": NONE}
    learns = values["distillation"] != "none" and not values["eval_only"]
    settings = {field.name: values[field.name] for field in dataclasses.fields(Sources) if field.name in values}
    return Sources(**settings | {"start": values["pretrained_dir"], "teacher": values["teacher"] if learns else None,
                                 "typed_model": "model_type" in flags, "img_size": flags.get("img_size")})


def resolve(flags: dict, facts: Facts, saved: Saved | None = None) -> Config:
    """Return the configuration of a run, complete and checked. saved: the checkpoint to resume from. Raises ConfigError."""
    checks.check_flags(flags)
    if saved is not None:
        return resolve_resumed(flags, facts, saved)
    values = _resolve({name: value for name, value in flags.items() if name not in RESUMED_ONLY}, facts)
    checks.check_facts(values, facts)
    checks.check_head(values, facts)
    return Config({name: values[name] for name in SETTINGS}, values.sources)


def preview(flags: dict, machine: Machine | None = None) -> dict:
    """Return the settings of a new run that are known without its data; lengths that depend on the data are None.

    Raises ConfigError as `check` does.
    """
    check(flags)
    values = _resolve(flags, None, machine)
    return {name: values.get(name) for name in SETTINGS}


def model_overrides(config: Config) -> dict:
    """Return the keys of the model's row that the run sets, with their values."""
    return {key: getattr(config, key) for key in MODEL_KEYS if getattr(config, key) is not None}


def describe_length(config: Config, facts: Facts) -> str:
    steps, size, images = config.num_steps, config.train_batch_size, facts.train_images
    passes = steps * size / images
    times = (f"{passes:,.0f}" if passes >= 1000 else f"{passes:.3g}") + f" pass{'es' * (passes != 1)}"
    return f"{steps} step{'s' * (steps > 1)} of {size} image{'s' * (size > 1)} = {times} over the {images} training images"


def length_warnings(config: Config, facts: Facts) -> list[str]:
    """Return warnings about lengths that are hardly ever intended."""
    size, images, found = config.train_batch_size, facts.train_images, []
    passes = config.num_steps * size / images
    by_images = config.source("train_batch_size") == RECIPE and "train_batch_size" in recipes.sets_by_data(config.recipe)
    if size > images and not by_images:
        found.append(f"warning: a step uses {size} images and there are {images}: it sees each {size / images:.3g} times. A "
                     "lower --train_batch_size (TRAIN_BATCH_SIZE) gives more steps an epoch")
    # A recipe that starts from scratch may need more: DeiT's has 300.
    of_recipe = config.source("num_steps") == RECIPE and RECIPES[config.recipe].get("num_epochs")
    if passes > MAX_PASSES and not of_recipe:
        found.append(f"warning: {passes:,.0f} passes over the training images take long, and more than {MAX_PASSES} hardly ever "
                     f"help: try --num_epochs {GOOD_PASSES} (NUM_EPOCHS={GOOD_PASSES}), here "
                     f"{steps_in(GOOD_PASSES, images, size)} steps")
    return found


def describe_memory(config: Config, facts: Facts) -> list[str]:
    """Return lines on how `auto` divides a step, and why, and warnings where memory may be short or the batch divides badly."""
    if config.source("gradient_accumulation_steps") != DEFAULT or not facts.memory or config.eval_only:
        return []
    steps, local_batch, lines = config.gradient_accumulation_steps, config.train_batch_size // facts.ranks, []
    need, budget = _need(config.to_dict(), facts), int(facts.memory * memory.USABLE_FRACTION[facts.device_type])
    micro, fitting, usable = local_batch // steps, need.fitting(budget), f"{budget / 2**30:.1f} GiB are available"
    if steps > 1:
        lines.append(f"a step: {steps} x {micro} images, since {local_batch} in one piece would need about "
                     f"{need.step(local_batch) / 2**30:.1f} GiB, and {usable} (--gradient_accumulation_steps, GRAD_STEPS)")
    if 4 * micro < min(fitting, local_batch):
        size = 1 << fitting.bit_length() - 1
        better = max(1, round(local_batch / size)) * size * facts.ranks
        lines.append(f"warning: {local_batch} images cannot be divided into fewer equal parts of at most {fitting}, and such "
                     f"small parts are slow: set --train_batch_size (TRAIN_BATCH_SIZE) {better}")
    if need.step(micro) > budget:
        lines.append(f"warning: a step needs about {need.step(micro) / 2**30:.1f} GiB, and {usable}. A smaller model or "
                     "--optimizer sgd needs less")
    elif need.fixed + need.evaluation > budget:
        lines.append(f"warning: an evaluation needs about {(need.fixed + need.evaluation) / 2**30:.1f} GiB, and {usable}: lower "
                     "--eval_batch_size (EVAL_BATCH_SIZE)")
    return lines


def _resolve(flags: dict, facts: Facts | None, machine: Machine | None = None) -> Values:
    """Return the settings of a new run, checked as far as they are known. Raises ConfigError."""
    values = _fill(flags, facts or machine)
    if facts is not None:
        _adopt_architecture(values, flags, facts)
        if facts.start_row:
            adopt_file(values, flags, facts)
        values.update(facts.reading or {})
        if values["precision"] == AUTO:
            values["precision"] = "bf16" if facts.native_bf16 else "fp32"
    _set_lengths(values, flags, facts)
    checks.check_effects(flags, values)
    checks.check_conflicts(values)
    ranks = facts.ranks if facts else launch.place().size
    if values["gradient_accumulation_steps"] == AUTO:
        values["gradient_accumulation_steps"] = _micro_steps(values, facts, ranks) if facts else 1
    checks.check_batch(values, ranks, resumed=False)
    checks.check_exact(values, ranks)
    return values


def _micro_steps(values: Values, facts: Facts, ranks: int) -> int:
    local_batch = values["train_batch_size"] // ranks
    if values["eval_only"] or not facts.memory or not local_batch or values["train_batch_size"] % ranks:
        return 1
    budget = int(facts.memory * memory.USABLE_FRACTION[facts.device_type])
    return memory.choose_micro_steps(local_batch, _need(values, facts), budget,
                                     even=bool(values["mixup_alpha"] or values["cutmix_alpha"]),
                                     power_of_two=values["exact"] and ranks > 1)


def _need(values: dict, facts: Facts) -> memory.Need:
    row = MODELS[values["model_type"]].to_dict() | {key: values[key] for key in MODEL_KEYS if values[key] is not None}
    size, layers = values["img_size"], values["train_layers"]
    return memory.need(row, size if isinstance(size, tuple) else (size, size), facts.num_classes, precision=values["precision"],
                       fp16_opt_level=values["fp16_opt_level"], optimizer=values["optimizer"], device_type=facts.device_type,
                       eval_batch_size=min(values["eval_batch_size"], facts.evaluated_images or values["eval_batch_size"]),
                       trained_blocks=None if layers == "all" else 0 if layers == "head" else int(layers),
                       averaged=bool(values["ema_decay"]), teacher_parameters=facts.teacher_parameters,
                       cached_images=facts.cached_images)


def _fill(flags: dict, machine: Machine | Facts | None) -> Values:
    """Return defaults, the recipe's row, flags and the model's row, with lengths and `auto` not yet resolved. Raises
    ConfigError."""
    row, chosen = recipes.choose_row(flags, machine)
    values = Values(defaults())
    values.put(RECIPE, row)
    values.put(DEFAULT, {name: value for name, value in chosen.items() if name != "img_size"})
    values.put(MODEL, {name: value for name, value in chosen.items() if name == "img_size"})
    values.sources.update({name: RECIPE for name in ("dataset", "model_type") if name in row and chosen[name] == row[name]})
    values.put(FLAG, {name: value for name, value in flags.items() if not (name in AUTOMATIC and value == AUTO)})
    for floor in ("min_learning_rate", "warmup_learning_rate"):      # the recipe's belongs to its own learning rate
        if floor not in flags and "learning_rate" in flags:
            values[floor] = min(values[floor], values["learning_rate"])
    model = MODELS[values["model_type"]]
    if "pretrained_dir" not in flags and any(values[key] not in (None, model[key]) for key in SIZES):
        values["pretrained_dir"] = NONE                               # there are no published weights of this size
    if values["pretrained_dir"] == "augreg":
        size = values["model_type"].removeprefix("ViT-").replace("-ViT-", "_")
        if size not in AUGREG_SIZES:
            raise ConfigError(f"--model_type {values['model_type']}: AugReg has no such size. It has {', '.join(AUGREG_SIZES)}.")
        values["pretrained_dir"] = f"augreg/{size}"
    for key in ("img_size", "dropout_rate"):
        if values[key] is None:
            values.put(MODEL, {key: model[key]})
    put_view(values)
    _set_head(values, flags)
    return values


def _set_head(values: Values, flags: dict) -> None:
    from_nothing = values["pretrained_dir"] == NONE
    if values["eval_only"] and from_nothing:
        raise ConfigError("--eval_only needs something to evaluate. Add --resume_path, or a --pretrained_dir with a head")
    if values["head"] is None:
        values["head"] = "keep" if values["eval_only"] or values["attention_edits"] else "zero"
    if values["head"] == "zero" and values["eval_only"]:
        raise ConfigError("--head zero and --eval_only contradict each other: a head of zeros predicts nothing")
    if values["head"] == "keep" and from_nothing:
        needing = "--head keep" if "head" in flags else "--attention_edits"
        raise ConfigError(f"{needing} needs a --pretrained_dir with a head: the run folder output/NAME of a run on these data")


def _adopt_architecture(values: Values, flags: dict, facts: Facts) -> None:
    """When fine-tuning from one of our checkpoints, use its architecture unless a flag sets another.

    Where its head is kept the task is the same: then also use its image size, its preprocessing and its sigmoid attention.
    """
    settings = facts.start_settings
    architecture = ("model_type", *SIZES, "in_channels", "classifier")
    own = {key: settings.get(key) or MODELS[settings["model_type"]][key] for key in SIZES} if settings else {}
    others = [key for key in own if key in flags and flags[key] != own[key]]
    if others and "model_type" not in flags:
        key = others[0]
        raise ConfigError(f"--{key} {flags[key]}: {facts.start_path} is of a run of {settings['model_type']} with {key} "
                          f"{own[key]}, and a run has its own sizes. Omit --{key}, or add the --model_type that you mean")
    same = settings and all(flags[key] in (settings.get(key), own.get(key)) for key in architecture if key in flags)
    keys = (*architecture, "img_size", "dropout_rate", "sigmoid_attention") if same else ()
    if settings and values["head"] == "keep":
        keys = (*keys, "img_size", "eval_crop", "interpolation", "tta", "sigmoid_attention")
    for key in keys:
        if key not in flags:
            values.put(START, {key: as_tuple(settings.get(key, FLAGS[key].before))})
    put_view(values)
    if values["attention_edits"] and not values["sigmoid_attention"]:
        values["sigmoid_attention"] = "last"             # without edits the model computes the same


def _compute(function: Callable[[Facts, Values], dict], facts: Facts, values: Values, flags: dict) -> dict:
    """Put what the recipe's function returns where no flag, and no start for the same task, sets it. Return that."""
    computed = {name: value for name, value in function(facts, values).items()
                if name not in flags and values.sources[name] != START}
    values.put(RECIPE, {name: value for name, value in computed.items() if name != "num_steps" or value != values[name]})
    return computed


def _set_lengths(values: Values, flags: dict, facts: Facts | None) -> None:
    """Replace epochs, and lengths that depend on the data, by steps. Without facts, what depends on them stays unknown.

    Raises ConfigError for a warm-up that is longer than the run.
    """
    if "num_steps" in flags and values["warmup_epochs"] is not None and "warmup_epochs" not in flags:
        values.put(RECIPE, {"warmup_steps": flags["num_steps"], "warmup_epochs": None})       # shortened to a tenth below
    function, computed = recipes.function_of(values["recipe"]), {}
    by_data = function is not None or values["num_epochs"] is not None or values["warmup_epochs"] is not None
    if by_data and facts is None:
        unknown = {"num_steps", "warmup_steps", "eval_every", "save_every"} | (function.sets if function else set())
        for name in unknown - set(flags):
            values.pop(name, None)
        return
    if function is not None:
        computed = _compute(function, facts, values, flags)
    steps = (lambda epochs: steps_in(epochs, facts.train_images, values["train_batch_size"])) if by_data else None
    if values["num_epochs"] is not None:
        values.put(values.sources["num_epochs"], {"num_steps": steps(values["num_epochs"])})
        if function is not None:                          # what depends on the length; the batch is known by now
            computed = _compute(function, facts, values, flags)
    if values["decay_type"] != "step" and "decay_milestones" not in flags:
        values["decay_milestones"] = None
    if values["warmup_epochs"] is not None:
        values["warmup_steps"] = steps(values["warmup_epochs"])
    if {"warmup_steps", "warmup_epochs"} & set(flags):
        if values["warmup_steps"] > values["num_steps"]:
            whose = "" if {"num_steps", "num_epochs"} & set(flags) else f", which the recipe {values['recipe']} sets. Give both"
            raise ConfigError(f"--warmup_steps {values['warmup_steps']} is more than --num_steps {values['num_steps']}{whose}")
    elif "warmup_steps" not in computed and {"num_steps", "num_epochs"} & set(flags):
        # The recipe's warm-up belongs to its own length.
        values["warmup_steps"] = min(values["warmup_steps"], values["num_steps"] // 10)
    if values["eval_every"] is None:
        values["eval_every"] = steps(1) if by_data else max(1, values["num_steps"] // 10)
    elif "eval_every" not in flags | computed and {"num_steps", "num_epochs"} & set(flags):
        # So does its interval of evaluations: a shorter run has at least five.
        values["eval_every"] = min(values["eval_every"], max(1, values["num_steps"] // 5))
    if values["save_every"] is None:
        values["save_every"] = values["eval_every"]
    values.update(num_epochs=None, warmup_epochs=None)                    # only the steps count from here on
