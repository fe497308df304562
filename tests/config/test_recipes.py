"""Rows and functions of recipes."""

import dataclasses

import pytest
from flag_values import words

import configs
from utils.config import FLAGS, ConfigError, Facts, Sources, check, parse, resolve
from utils.config.recipes import FUNCTION, FUNCTIONS, function_of
from utils.config.resolve import NOT_DOWNLOADED

FACTS = Facts(50_000, 10)


def flags_for(recipe: str) -> dict:
    return {"recipe": recipe} | ({"model_type": "ViT-S_16"} if recipe == "augreg" else {})


@pytest.mark.parametrize("recipe", configs.RECIPES)
def test_a_recipe_consists_of_valid_flags_and_fills_what_is_needed(recipe):
    rows = [configs.RECIPES[recipe], *(row for (name, _), row in configs.VARIANTS.items() if name == recipe)]
    for name, value in (item for row in rows for item in row.items()):
        assert name == FUNCTION or parse(words(name, value)) == {name: value}, name
    config = resolve(flags_for(recipe), FACTS)
    filled = {name for name, value in config.to_dict().items() if value is not None}
    assert {"img_size", "head", "train_batch_size", "num_steps", "warmup_steps", "optimizer", "learning_rate", "decay_type",
            "weight_decay", "max_grad_norm", "dropout_rate", "augmentation", "eval_every", "save_every"} <= filled
    assert config.decay_type != "step" or config.decay_milestones


def test_tables_name_what_exists():
    assert {name for name, _ in configs.VARIANTS} <= set(configs.RECIPES)
    assert {model for _, model in configs.VARIANTS} | set(configs.DEFAULT_WEIGHTS) <= set(configs.MODELS)
    assert {row[FUNCTION] for row in configs.RECIPES.values() if FUNCTION in row} == set(FUNCTIONS)
    for row in configs.DEFAULTS_OF_DATASET.values():
        assert row["recipe"] in configs.RECIPES and row.get("model_type", "ViT-B_16") in configs.MODELS
    assert {model for *_, model in configs.MODEL_OF_MACHINE} <= set(configs.MODELS)
    assert {*configs.DEFAULTS_OF_DATASET, *NOT_DOWNLOADED} - {None} <= set(configs.DATASETS)


def test_a_function_sets_nothing_that_is_opened_before():
    opened = {field.name for field in dataclasses.fields(Sources)} | {"pretrained_dir"}
    for function in FUNCTIONS.values():
        assert not function.sets & opened and function.sets <= set(FLAGS)
        assert function.sets == set(function(FACTS, {"num_steps": None, "train_batch_size": None, "model_type": "ViT-B_16",
                                                     "optimizer": "adamw", "attention_edits": None}))
    assert function_of("digits") is function_of("a name of an older version") is None


@pytest.mark.parametrize(("images", "flags", "lengths"), [
    (5_000, {}, (500, 100, (200, 300, 400), 0.0)),
    (20_000, {}, (10_000, 500, (3_000, 6_000, 9_000), 0.1)),
    (1_281_167, {}, (20_000, 500, (6_000, 12_000, 18_000), 0.1)),
    (5_000, {"num_steps": 50}, (50, 10, (20, 30, 40), 0.0)),
    (5_000, {"num_steps": 1000, "warmup_steps": 7}, (1000, 7, (400, 600, 800), 0.0)),
    (5_000, {"num_epochs": 102.4}, (1000, 200, (400, 600, 800), 0.0)),
    (50_000, {"mixup_alpha": 0.0, "decay_milestones": (5, 6)}, (10_000, 500, (5, 6), 0.0)),
    (50_000, {"decay_type": "cosine"}, (10_000, 500, None, 0.1))], ids=str)
def test_bit_goes_by_the_number_of_images(images, flags, lengths):
    flags = {"recipe": "bit-hyperrule", "dataset": "cifar10"} | flags
    check(flags)
    config = resolve(flags, Facts(images, 10))
    assert (config.num_steps, config.warmup_steps, config.decay_milestones, config.mixup_alpha) == lengths


def test_what_a_function_sets_is_checked_when_it_is_known():
    flags = {"recipe": "bit-hyperrule", "dataset": "cifar10", "train_batch_size": 15, "mix_probability": 0.5}
    check(flags)
    with pytest.raises(ConfigError, match=r"an odd number.*Take 16"):
        resolve(flags, FACTS)
    with pytest.raises(ConfigError, match="--mix_probability only has an effect"):
        resolve(flags, Facts(5_000, 10))


def test_variants_and_sizes_belong_to_one_model():
    assert resolve({"recipe": "mae"}, FACTS).layer_decay == 0.65
    large = resolve({"recipe": "mae", "model_type": "MAE-L_16", "drop_path_rate": 0.5}, FACTS)
    assert (large.layer_decay, large.drop_path_rate, large.source("layer_decay")) == (0.75, 0.5, "recipe")
    own = resolve({"recipe": "scratch-small"}, FACTS)
    assert (own.dataset, own.img_size, own.patch_size, own.pretrained_dir) == ("cifar100", 72, 6, "none")
    assert own.source("dataset") == own.source("model_type") == own.source("patch_size") == "recipe"
    other = resolve({"recipe": "scratch-small", "model_type": "ViT-B_16"}, FACTS)
    assert other.patch_size is None and other.img_size == 224 and other.source("img_size") == "model"
