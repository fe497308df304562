"""Recipes: a row of configs.RECIPES, and for recipes that depend on the data a function that the row names.

A function gets the facts and the settings so far (`num_steps` is None where no flag asks for a length), and returns flags with
their values. What a flag sets wins over both. Its attribute `sets` lists what it may return: none of it may decide what is opened
(records.Sources).
"""

import statistics
from collections.abc import Callable, Mapping

from configs import (
    DEFAULTS_OF_DATASET,
    FAMILIES,
    FINE_TUNING,
    FROM_SCRATCH,
    MODEL_OF_MACHINE,
    MODELS,
    RECIPES,
    VARIANTS,
)
from utils import launch

from .flags import SIZES
from .records import DEFAULT, FLAG, Config, Facts, Machine, Values
from .spelling import unknown_model
from .types import ConfigError

# photos: the batch is a part of the training images within bounds, so that more images never mean fewer steps; the length is
# in passes over them, within bounds.
LEAST_BATCH, MOST_BATCH, BATCH_PART, BATCH_UNIT = 32, 512, 1 / 62.5, 8
PASSES, SCRATCH_PASSES, MOST_PASSES, LEAST_STEPS, MOST_STEPS = 15, 100, 200, 240, 20_000
FEW_OF_CLASS = 20               # images: so few are varied by RandAugment too; with more it was not compared
OPTIMIZERS = ("sgd", "adamw")
PAPER_RATES = 0.001, 0.003, 0.01, 0.03      # of SGD, for CIFAR, Pets and Flowers (arXiv 2010.11929, appendix B.1.1)
LONG = 2.0                      # longer side over shorter: of images beyond it the middle square shows less than half

FUNCTION = "function"           # the key of a row of configs.RECIPES that names one of the functions below


def bit_hyperrule(facts: Facts, values: Values) -> dict:
    """BiT-HyperRule (arXiv 1912.11370, section 3.3): length, milestones and MixUp by the number of training images.

    Another length keeps the shape of the schedule: warm-up and milestones scale with it.
    """
    if facts.train_images < 20_000:
        own, warmup, milestones, mixup = 500, 100, (200, 300, 400), 0.0
    elif facts.train_images < 500_000:
        own, warmup, milestones, mixup = 10_000, 500, (3_000, 6_000, 9_000), 0.1
    else:
        own, warmup, milestones, mixup = 20_000, 500, (6_000, 12_000, 18_000), 0.1
    num_steps = values["num_steps"] or own
    ratio = num_steps / own
    scaled = dict.fromkeys(max(1, round(step * ratio)) for step in milestones)        # two may round to the same step
    return {"num_steps": num_steps, "warmup_steps": round(warmup * ratio), "decay_milestones": tuple(scaled),
            "mixup_alpha": mixup}


bit_hyperrule.sets = frozenset({"num_steps", "warmup_steps", "decay_milestones", "mixup_alpha"})


def photos(facts: Facts, values: Values) -> dict:
    """For images of one's own: batch and length by their number, rates (configs.FINE_TUNING) by model, view by their shapes."""
    images = facts.train_images
    own = min(max(LEAST_BATCH, images * BATCH_PART), MOST_BATCH)
    batch = values["train_batch_size"] or _divisible(min(images, own), facts, values)
    passes = SCRATCH_PASSES if values["pretrained_dir"] == "none" else PASSES
    wanted = max(LEAST_STEPS, int(passes * images / (values["train_batch_size"] or own)))
    steps = values["num_steps"] or max(1, min(wanted, MOST_PASSES * images // batch, MOST_STEPS))
    ratios = [max(size) / min(size) for size in facts.image_sizes]
    whole = bool(ratios) and statistics.median(ratios) > LONG
    few = images <= FEW_OF_CLASS * facts.num_classes
    crops, _, flips = values["augmentation"].partition("_")
    model = MODELS[values["model_type"]]
    own = values["model_type"] in FAMILIES                  # whose publishers crop and resize in their own ways
    view = {"eval_crop": 0.0 if whole or crops != "crop" else model.eval_crop if own else 0.875}
    view |= {"interpolation": model.interpolation} if own else {}
    return {"train_batch_size": batch, "num_steps": steps, "warmup_steps": steps // 10, "eval_every": max(1, steps // 8),
            **view, "tta": "flip" if flips and facts.can_flip else "none",
            # Not with edits, which cannot follow it, nor where images are wanted as they are.
            "randaugment_ops": int(few and crops != "none" and not values["attention_edits"])} | _fine_tuning(values, batch)


def _divisible(batch: float, facts: Facts, values: Values) -> int:
    """The next smaller batch of equal micro-batches, in pairs where images are mixed; the smallest one if there is none."""
    unit = facts.ranks * (2 if values["mixup_alpha"] or values["cutmix_alpha"] else 1)
    if isinstance(values["gradient_accumulation_steps"], int):
        unit *= values["gradient_accumulation_steps"]
    rounded = max(batch // BATCH_UNIT * BATCH_UNIT, min(batch, LEAST_BATCH))
    return int(max(1, rounded // unit) * unit)


def rates_to_try(values: Mapping) -> list[float]:
    """The learning rates that a sweep tries by itself: those of the paper, or some around the recipe's own where that is none of
    them. values: what is known without the data, so that of `photos` it is the rate for a batch of 32."""
    rate = values["learning_rate"]
    if function_of(values["recipe"]) is photos:
        rate = _fine_tuning(values, LEAST_BATCH)["learning_rate"]
    is_like_them = rate is None or PAPER_RATES[0] <= rate <= PAPER_RATES[-1]
    return list(PAPER_RATES) if is_like_them else [float(f"{rate * part:.2g}") for part in (0.1, 0.3, 1, 3)]


def _fine_tuning(values: Values, batch: int) -> dict:
    """The optimizer and its rates: of the first row of configs.FINE_TUNING that is of the model, or of FROM_SCRATCH."""
    row = FROM_SCRATCH if values["pretrained_dir"] == "none" else next(
        row for row in FINE_TUNING if values["model_type"].startswith(row["models"]))
    own = next(name for name in row if name in OPTIMIZERS)
    optimizer = values["optimizer"] or own
    rates = {"weight_decay": 0.0} | row.get(optimizer, row["adamw"])
    scale = 1 if optimizer == "sgd" or row is FROM_SCRATCH or row.get("any_batch") else batch / LEAST_BATCH
    if getattr(values, "sources", {}).get("learning_rate") == FLAG and not (
            0 < values["learning_rate"] < rates.get("head_learning_rate", 0)):             # which is meant for the head too
        rates.pop("head_learning_rate", None)
    return {"optimizer": optimizer} | rates | {"learning_rate": rates["learning_rate"] * scale}


photos.sets = frozenset({"train_batch_size", "num_steps", "warmup_steps", "eval_every", "eval_crop", "interpolation", "tta",
                         "randaugment_ops", "optimizer",
                         *(flag for row in FINE_TUNING for name in OPTIMIZERS for flag in row.get(name, ()))})
FUNCTIONS: dict[str, Callable[[Facts, Values], dict]] = {"bit_hyperrule": bit_hyperrule, "photos": photos}


def function_of(recipe: str) -> Callable[[Facts, Values], dict] | None:
    return FUNCTIONS.get(RECIPES.get(recipe, {}).get(FUNCTION))


def decides(recipe: str) -> set[str]:
    """The flags that the recipe sets itself."""
    return (set(RECIPES.get(recipe, {})) - {FUNCTION}) | sets_by_data(recipe)


def sets_by_data(recipe: str) -> set[str]:
    """The flags that the recipe's function may set."""
    function = function_of(recipe)
    return set(function.sets) if function else set()


def _of_machine(machine: Machine | Facts | None) -> dict:
    """The row of MODEL_OF_MACHINE."""
    # An Apple GPU, on which nothing was measured, takes the rows of CPUs.
    rows = [row for row in MODEL_OF_MACHINE if machine and (machine.device_type == "cuda") == (row["device"] == "cuda")
            and machine.memory >= row["memory"] << 30 and machine.cores >= row["cores"]]
    return rows[0] if rows else MODEL_OF_MACHINE[-1]


def by_machine(flags: Mapping) -> bool:
    """Whether the machine decides the model that a new run of these flags starts from."""
    return "img_size" in choose_row(dict(flags))[1]


def machine_of(flags: Mapping) -> Machine | None:
    """That of the runs of a sweep, where it decides their model."""
    return Machine(*launch.machine_here(flags.get("device", "auto"))) if by_machine(flags) else None


def why_this_model(config: Config, facts: Facts) -> str:
    """A line where the machine has decided which model a run starts from; else ""."""
    row = _of_machine(facts)
    chosen = config.source("model_type") == DEFAULT and function_of(config.recipe) is photos and config.pretrained_dir == "auto"
    if not chosen or config.model_type != row["model"] or not facts.memory:
        return ""
    place = {"cuda": "GPU", "mps": "Mac"}.get(facts.device_type, "processor")
    return (f"why this model: for a {place} with {facts.memory / 2**30:.0f} GiB a process, of those that are free to use: "
            f"{row['why']}. --model_type (MODEL_TYPE) takes another; MODEL_ZOO.md helps to choose")


def choose_row(flags: dict, machine: Machine | Facts | None = None) -> tuple[dict, dict]:
    """The recipe that the flags ask for -> (its values for their model, the recipe's, data set's and model's name, and the image
    size, where the machine decides both).

    Values that a flag replaces under another name (steps for epochs) are left out. machine: None while it is not known; the
    model that it decides is then the smallest. Raises ConfigError for an unknown model.
    """
    recipe = flags.get("recipe", "auto")
    dataset = flags.get("dataset") or RECIPES.get(recipe, {}).get("dataset", "digits")
    of_dataset = DEFAULTS_OF_DATASET.get(dataset, DEFAULTS_OF_DATASET[None])
    if recipe == "auto":
        recipe = of_dataset["recipe"]
        if function_of(recipe) is photos and flags.get("eval_only"):       # nothing is trained, and the head's own view counts
            recipe, of_dataset = DEFAULTS_OF_DATASET[None]["recipe"], DEFAULTS_OF_DATASET[None]
    row, size = RECIPES[recipe], {}
    model_type = flags.get("model_type") or row.get("model_type")
    if not model_type and function_of(recipe) is photos and dataset != "digits":
        of_machine = _of_machine(machine)
        starts = flags.get("pretrained_dir", "auto") == "auto" and not flags.keys() & {*SIZES, "resume_path"}
        model_type = of_machine["model"] if starts else of_machine["plain"]
        size = {"img_size": of_machine["img_size"]} if starts else {}
    model_type = model_type or (DEFAULTS_OF_DATASET[None] | of_dataset)["model_type"]
    if model_type not in MODELS:
        raise ConfigError(unknown_model(model_type))
    dropped = {FUNCTION}
    if set(SIZES) & set(row) and row["model_type"] != model_type:         # the recipe's sizes are those of its own model
        dropped |= {*SIZES, "img_size"}
    for steps, epochs in (("num_steps", "num_epochs"), ("warmup_steps", "warmup_epochs")):
        if steps in flags or epochs in flags:
            dropped |= {steps, epochs}
    row = row | VARIANTS.get((recipe, model_type), {})
    return ({name: value for name, value in row.items() if name not in dropped},
            {"recipe": recipe, "dataset": dataset, "model_type": model_type} | size)
