"""A resumed run: the checkpoint's settings, changed by the flags that may change them."""

from configs import MODELS

from . import checks
from .flags import FIXED, FLAGS, FREE, MODEL_KEYS, SETTINGS, before
from .records import CHECKPOINT, FLAG, Config, Facts, Saved, Values, steps_in
from .retired import check_retired
from .types import ConfigError, as_tuple

NOT_DOWNLOADED = ("folder", "csv", "imagenet")
EVALUATED_ON = ("dataset", "val_fraction", "test_fraction", "split_seed")      # an evaluation may use other data
# Flags whose `auto` is the same as no flag.
AUTOMATIC = ("recipe", "precision", "gradient_accumulation_steps", "exif", "intensity_range", "alpha")
THIS_SESSION = ("override", "compile", "profile")      # not kept for the next session
EVALUATION = ("eval_train", "confusion_matrix")        # --eval_only uses what is typed, not what the run had


def read_saved(config: dict) -> dict:
    """Return a checkpoint's settings in this version: missing ones filled in, retired ones translated.

    Raises ConfigError for a retired setting that cannot be translated.
    """
    values = before() | {name: as_tuple(value) for name, value in config.items() if name in SETTINGS}
    for row in FLAGS.values():
        if row.alias_of and config.get(row.name):
            values[row.alias_of[0]] = row.alias_of[1]
    return check_retired(config, values)


def lacking_settings(config: dict) -> list[str]:
    """Return the settings that the checkpoint lacks, because the flag did not exist when it was written."""
    return sorted(set(SETTINGS) - config.keys())


def keep_or_refuse(flags: dict, saved: dict) -> dict:
    """Return the flags that change something, without those that only repeat it. `saved`: as read_saved returns it.

    What may change is `on_resume` of the flag's row in flags.py: FREE, OVERRIDE, or by default FIXED. An evaluation may use
    another data set; the run's held-out fractions then do not apply.

    Raises ConfigError where a flag would make it another run.
    """
    requested = {name: value for name, value in flags.items() if not (name in AUTOMATIC and value == "auto")}
    if requested.get("teacher") and saved["distillation"] == "none":
        raise ConfigError("--teacher: the checkpoint's run has none, and a resumed run cannot add one. Omit --teacher.")
    if requested.get("attention_edits") and not saved["attention_edits"]:
        raise ConfigError("--attention_edits: the checkpoint's run has none, and a resumed run cannot add them. Start a new run "
                          "with --pretrained_dir in place of --resume_path.")
    if flags.get("eval_only") and requested.get("dataset", saved["dataset"]) != saved["dataset"]:
        others = ("val_fraction", "test_fraction", "test", *["data_dir"] * (requested["dataset"] not in NOT_DOWNLOADED))
        requested = {name: FLAGS[name].default for name in others} | requested
    for name, value in requested.items():
        old = saved[name]
        if flags.get("eval_only") and name in EVALUATED_ON:
            continue
        if old is None and name in MODEL_KEYS:
            old = MODELS[saved["model_type"]][name]               # the value came from the model's row
        allowed = FLAGS[name].on_resume
        if allowed == FREE or as_tuple(value) == as_tuple(old) or (allowed != FIXED and flags.get("override")):
            continue
        or_else = "" if allowed == FIXED else ", add --override"
        raise ConfigError(f"--{name} {as_tuple(value)}: the checkpoint was made with {as_tuple(old)}, and a resumed run keeps "
                          f"it. Omit --{name}{or_else}, or start a new run without --resume_path.")
    return requested


def resolve_resumed(flags: dict, facts: Facts, saved: Saved) -> Config:
    """Return the checkpoint's settings changed by the flags. Raises ConfigError where a flag would make it another run."""
    old = read_saved(saved.config)
    requested = keep_or_refuse(_epochs_to_steps(flags, old, saved.train_images), old)
    values = Values(old, CHECKPOINT)
    values.put(FLAG, requested)
    values.put(FLAG, {name: bool(flags.get(name)) for name in THIS_SESSION})
    if values["eval_only"]:
        values.put(FLAG, {name: bool(flags.get(name)) for name in EVALUATION})
    checks.check_conflicts(values, checks.SESSION_CONFLICTS)
    if values["num_steps"] < values["warmup_steps"]:
        raise ConfigError(f"--num_steps {values['num_steps']} is less than the run's {values['warmup_steps']} warm-up steps")
    if values["precision"] == "auto":
        values["precision"] = "bf16" if facts.native_bf16 else "fp32"
    if values["override"]:
        if values["precision"] != "fp16":                         # these belong to fp16
            values.update({name: requested.get(name, FLAGS[name].default) for name in ("loss_scale", "fp16_opt_level")})
        moved = {"data_dir"}                                      # train.sh may pass a folder for the embedded data
        checks.check_effects({name: value for name, value in requested.items() if name not in moved}, values)
        checks.check_conflicts(values)
    micro_batches = old["gradient_accumulation_steps"] * saved.world_size
    if "gradient_accumulation_steps" not in requested and micro_batches % facts.ranks == 0:
        values["gradient_accumulation_steps"] = micro_batches // facts.ranks      # the same micro-batches on any number of ranks
    checks.check_batch(values, facts.ranks, resumed=True)
    checks.check_exact(values, facts.ranks, micro_batches if old["exact"] else None)
    if values["num_steps"] < saved.step and not values["eval_only"]:
        raise ConfigError(f"--num_steps {values['num_steps']}: {saved.path} is already at step {saved.step}")
    checks.check_facts(values, facts)
    return Config(values, values.sources)


def changes(config: Config, saved: Saved, ranks: int) -> list[str]:
    """Return a message for each setting that differs from the session before."""
    old, found = read_saved(saved.config), []
    if saved.world_size != ranks and not config.eval_only:
        found.append(f"changed: {ranks} processes (were {saved.world_size}), {config.gradient_accumulation_steps} micro-steps "
                     f"each (were {old['gradient_accumulation_steps']})")
    schedule = ("the milestones of the learning rate stay" if config.decay_type == "step"
                else "the learning-rate schedule is recomputed for the new length")
    silent = {"resume_path", "override", "eval_only"} | ({"name", "output_dir"} if config.resume_path == "auto" else set())
    silent |= set(EVALUATION) if config.eval_only else set()
    for name in sorted(set(SETTINGS) - silent):
        if config.source(name) != FLAG:
            continue
        if name == "pretrained_dir":
            found.append("--pretrained_dir is not used, since --resume_path is given")
        elif (value := getattr(config, name)) != old[name] and (value or name not in THIS_SESSION):
            found.append(f"changed: --{name} {value} (was {old[name]})" + (f"; {schedule}" if name == "num_steps" else ""))
    if saved.step == config.num_steps and not config.eval_only:
        found.append("nothing is left to train. To train longer, resume with a larger --num_steps (NUM_STEPS)")
    return found


def _epochs_to_steps(flags: dict, saved: dict, train_images: int) -> dict:
    requested = dict(flags)
    for epochs, steps in (("num_epochs", "num_steps"), ("warmup_epochs", "warmup_steps")):
        if epochs in requested:
            number = requested.pop(epochs)
            requested[steps] = steps_in(number, train_images, saved["train_batch_size"])
    return requested
