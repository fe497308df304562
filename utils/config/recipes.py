"""Recipes: a row of configs.RECIPES, and for recipes that depend on the data a function that the row names.

A function gets the facts and the number of steps that flags ask for (None: they ask for none), and returns flags with their
values. What a flag sets wins over both. Its attribute `sets` lists what it may return: none of it may decide what is opened
(records.Sources).
"""

from collections.abc import Callable

from configs import DEFAULTS_OF_DATASET, MODELS, RECIPES, VARIANTS

from .flags import SIZES
from .records import Facts
from .spelling import unknown_model
from .types import ConfigError

FUNCTION = "function"           # the key of a row of configs.RECIPES that names one of the functions below


def bit_hyperrule(facts: Facts, num_steps: int | None) -> dict:
    """BiT-HyperRule (arXiv 1912.11370, section 3.3): length, milestones and MixUp by the number of training images.

    Another length keeps the shape of the schedule: warm-up and milestones scale with it.
    """
    if facts.train_images < 20_000:
        own, warmup, milestones, mixup = 500, 100, (200, 300, 400), 0.0
    elif facts.train_images < 500_000:
        own, warmup, milestones, mixup = 10_000, 500, (3_000, 6_000, 9_000), 0.1
    else:
        own, warmup, milestones, mixup = 20_000, 500, (6_000, 12_000, 18_000), 0.1
    ratio = (num_steps or own) / own
    scaled = dict.fromkeys(max(1, round(step * ratio)) for step in milestones)        # two may round to the same step
    return {"num_steps": num_steps or own, "warmup_steps": round(warmup * ratio), "decay_milestones": tuple(scaled),
            "mixup_alpha": mixup}


bit_hyperrule.sets = frozenset({"num_steps", "warmup_steps", "decay_milestones", "mixup_alpha"})
FUNCTIONS: dict[str, Callable[[Facts, int | None], dict]] = {"bit_hyperrule": bit_hyperrule}


def function_of(recipe: str) -> Callable[[Facts, int | None], dict] | None:
    return FUNCTIONS.get(RECIPES.get(recipe, {}).get(FUNCTION))


def decides(recipe: str) -> set[str]:
    """The flags that the recipe sets itself."""
    function = function_of(recipe)
    return (set(RECIPES.get(recipe, {})) - {FUNCTION}) | (set(function.sets) if function else set())


def choose_row(flags: dict) -> tuple[dict, dict]:
    """The recipe that the flags ask for -> (its values for their model, the recipe's, data set's and model's name).

    Values that a flag replaces under another name (steps for epochs) are left out. Raises ConfigError for an unknown model.
    """
    recipe = flags.get("recipe", "auto")
    dataset = flags.get("dataset") or RECIPES.get(recipe, {}).get("dataset", "digits")
    of_dataset = DEFAULTS_OF_DATASET.get(dataset, DEFAULTS_OF_DATASET[None])
    if recipe == "auto":
        recipe = of_dataset["recipe"]
    row = RECIPES[recipe]
    model_type = flags.get("model_type") or row.get("model_type") or of_dataset["model_type"]
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
            {"recipe": recipe, "dataset": dataset, "model_type": model_type})
