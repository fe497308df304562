"""Rows and functions of recipes."""

import dataclasses
import shlex
from itertools import pairwise

import pytest
from flag_values import words

import configs
from models.checkpoints.hub import published_file
from utils.config import (
    FLAGS,
    ConfigError,
    Facts,
    Machine,
    Sources,
    as_command,
    check,
    choose,
    length_warnings,
    machine_of,
    parse,
    preview,
    resolve,
    why_this_model,
)
from utils.config.recipes import FUNCTION, FUNCTIONS, PAPER_RATES, by_machine, function_of, rates_to_try
from utils.config.resolve import NOT_DOWNLOADED

FACTS = Facts(50_000, 10)


def flags_for(recipe: str) -> dict:
    return {"recipe": recipe} | ({"model_type": "ViT-S_16"} if recipe == "augreg" else {})


@pytest.mark.parametrize("recipe", configs.RECIPES)
def test_a_recipe_has_valid_flags_and_sets_all_that_are_needed(recipe):
    rows = [configs.RECIPES[recipe], *(row for (name, _), row in configs.VARIANTS.items() if name == recipe)]
    for name, value in (item for row in rows for item in row.items()):
        assert name == FUNCTION or parse(words(name, value)) == {name: value}, name
    config = resolve(flags_for(recipe), FACTS)
    filled = {name for name, value in config.to_dict().items() if value is not None}
    assert {"img_size", "head", "train_batch_size", "num_steps", "warmup_steps", "optimizer", "learning_rate", "decay_type",
            "weight_decay", "max_grad_norm", "dropout_rate", "augmentation", "eval_every", "save_every"} <= filled
    assert config.decay_type != "step" or config.decay_milestones


def test_tables_only_have_existing_names():
    assert {name for name, _ in configs.VARIANTS} <= set(configs.RECIPES)
    assert {model for _, model in configs.VARIANTS} <= set(configs.MODELS)
    assert {row[FUNCTION] for row in configs.RECIPES.values() if FUNCTION in row} == set(FUNCTIONS)
    for row in configs.DEFAULTS_OF_DATASET.values():
        assert row["recipe"] in configs.RECIPES and row.get("model_type", "ViT-B_16") in configs.MODELS
    of_machine = [row[key] for row in configs.MODEL_OF_MACHINE for key in ("model", "plain")]
    assert set(of_machine) <= set(configs.MODELS) and all(published_file(model).license == "apache-2.0" for model in of_machine)
    assert {*configs.DEFAULTS_OF_DATASET, *NOT_DOWNLOADED} - {None} <= set(configs.DATASETS)


def test_a_function_sets_no_flag_that_decides_what_is_opened():
    opened = {field.name for field in dataclasses.fields(Sources)} | {"pretrained_dir"}
    for function in FUNCTIONS.values():
        assert not function.sets & opened and function.sets <= set(FLAGS)
        assert function.sets >= set(function(FACTS, {"num_steps": None, "train_batch_size": None, "model_type": "MAE-B_16",
                                                     "optimizer": None, "pretrained_dir": "auto", "attention_edits": None,
                                                     "augmentation": "crop_flip", "gradient_accumulation_steps": "auto",
                                                     "mixup_alpha": 0.0, "cutmix_alpha": 0.0}))
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
def test_bit_sets_lengths_by_the_number_of_images(images, flags, lengths):
    flags = {"recipe": "bit-hyperrule", "dataset": "cifar10"} | flags
    check(flags)
    config = resolve(flags, Facts(images, 10))
    assert (config.num_steps, config.warmup_steps, config.decay_milestones, config.mixup_alpha) == lengths


def test_values_of_a_function_are_checked_once_they_are_known():
    flags = {"recipe": "bit-hyperrule", "dataset": "cifar10", "train_batch_size": 15, "mix_probability": 0.5}
    check(flags)
    with pytest.raises(ConfigError, match=r"an odd number.*Use 16"):
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


PHOTOS = {"dataset": "folder", "data_dir": "d"}


def photos(images: int = 300, facts: dict | None = None, **flags):
    return resolve(PHOTOS | flags, Facts(images, 5, **facts or {}))


@pytest.mark.parametrize(("images", "batch", "steps"), [
    (2, 2, 200), (10, 10, 200), (32, 32, 200), (50, 32, 240), (512, 32, 240), (1_000, 32, 468), (1_999, 32, 937),
    (2_000, 32, 937), (2_500, 40, 937), (20_000, 320, 937), (40_000, 512, 1_171), (10 ** 6, 512, 20_000), (10 ** 8, 512, 20_000)])
def test_photos_sets_batch_and_length_by_the_number_of_images(images, batch, steps):
    config = photos(images)
    assert (config.recipe, config.train_batch_size, config.num_steps, config.warmup_steps) == (
        "photos", batch, steps, steps // 10)
    assert config.num_steps // 9 < config.eval_every <= config.num_steps // 8 and not length_warnings(config, Facts(images, 5))


def test_more_photos_never_mean_fewer_updates():
    found = [photos(images) for images in (*range(32, 4_000, 7), *range(4_000, 10 ** 5, 997))]
    assert all(one.num_steps <= more.num_steps and one.train_batch_size <= more.train_batch_size for one, more in pairwise(found))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("images", [2, 5, 17, 25, 31, 32, 300, 2_500])
def test_the_batch_of_photos_can_be_divided_and_causes_no_warning(images, ranks):
    """Since no flag sets it: equal for all processes, in pairs if images are mixed, and at most all images if possible."""
    for flags, unit in (({}, ranks), ({"mixup_alpha": 0.2}, 2 * ranks), ({"gradient_accumulation_steps": 2}, 2 * ranks)):
        config = photos(images, facts={"ranks": ranks}, **flags)
        batch = config.train_batch_size
        assert batch % unit == 0 and (batch <= images or batch == unit)
        assert length_warnings(config, Facts(images, 5, ranks=ranks)) == []
    assert length_warnings(photos(5, train_batch_size=8), Facts(5, 5))[0].startswith("warning: a step uses 8 images")


def test_photos_shows_elongated_images_whole():
    assert [photos(facts={"image_sizes": sizes}).eval_crop for sizes in (
        (), ((600, 800), (800, 600)), ((100, 1000), (1000, 100), (500, 500)), ((100, 190),), ((100, 210),),
        ((100, 190), (100, 190), (100, 10_000)))] == [0.875, 0.875, 0.0, 0.875, 0.0, 0.875]


def test_values_that_photos_chooses_are_reproduced_by_flags():
    """Flags win. A length in passes is computed with the chosen batch."""
    config = photos()
    typed = parse(shlex.split(as_command(config)))
    again = resolve(typed, Facts(10 ** 5, 5, image_sizes=((1, 9),)))                 # other facts no longer matter
    assert again.to_dict() == config.to_dict() and all(
        again.source(name) == "flag" for name in function_of("photos").sets if getattr(config, name) is not None)
    assert photos(num_epochs=4.0).num_steps == round(4 * 300 / 32) == photos(num_epochs=4.0).warmup_steps * 10 + 8
    some = photos(learning_rate=0.5, eval_crop=0.0, train_batch_size=16, num_steps=7)
    assert (some.learning_rate, some.eval_crop, some.train_batch_size, some.num_steps) == (0.5, 0.0, 16, 7)


@pytest.mark.parametrize(("flags", "rates"), [
    ({"dataset": "cifar10"}, PAPER_RATES), ({}, PAPER_RATES), ({"dataset": "folder"}, PAPER_RATES),
    ({"dataset": "folder", "model_type": "MAE-B_16"}, [1.2e-5, 3.7e-5, 1.2e-4, 3.8e-4]),
    ({"dataset": "folder", "optimizer": "adamw"}, [1.2e-5, 3.7e-5, 1.2e-4, 3.8e-4]),
    ({"recipe": "deit-384"}, [5e-7, 1.5e-6, 5e-6, 1.5e-5])], ids=str)
def test_a_sweep_tries_rates_like_that_of_the_recipe(flags, rates, tmp_path):
    found = rates_to_try(preview(flags | ({"data_dir": str(tmp_path)} if flags else {})))
    assert found == pytest.approx(rates, rel=0.1)


def test_photos_sets_the_rates_by_model_and_optimizer():
    """Every row has a source and at least one optimizer. The last row fits any model."""
    def taken(model_type: str, **flags) -> tuple:
        config = photos(model_type=model_type, **flags)
        return config.optimizer, config.learning_rate, config.layer_decay, config.weight_decay, config.drop_path_rate

    assert taken("ViT-Ti_16") == ("sgd", 0.03, 1.0, 0.0, None) and taken("ViT-B_16") == ("sgd", 0.01, 1.0, 0.0, None)
    assert taken("CaiT-S24") == taken("DeiT-Ti_16-distilled") == ("sgd", 0.01, 1.0, 1e-4, None)
    assert taken("MAE-L_16") == ("adamw", 1.25e-4, 0.75, 0.05, 0.1) and taken("MAE-L_16", optimizer="sgd")[:2] == ("sgd", 0.01)
    assert taken("MAE-L_16", pretrained_dir="none", train_batch_size=64) == ("adamw", 1e-3, 1.0, 0.1, None)
    assert taken("MAE-L_16", train_batch_size=64)[1] == 2.5e-4 and taken("ViT-B_16", train_batch_size=64)[1] == 0.01
    assert photos(2000, pretrained_dir="none").num_steps > 3 * photos(2000).num_steps
    assert taken("ViT-B_16", optimizer="adamw") == ("adamw", 1.25e-4, 0.75, 0.05, None)
    assert taken("ViT-B_16", optimizer="adam", layer_decay=0.5)[:3] == ("adam", 1.25e-4, 0.5)
    # The rate of a family for its publisher's batch: 512 (used for any batch here), 2048, 1024.
    def with_head(model_type: str, **flags) -> tuple:
        config = photos(model_type=model_type, **flags)
        return config.optimizer, config.learning_rate, config.layer_decay, config.head_learning_rate

    assert with_head("DINOv2-S_14-reg") == with_head("DINOv3-S_16", train_batch_size=64) == ("adamw", 1e-5, 1.0, 1e-3)
    assert with_head("OpenCLIP-B_16", train_batch_size=2048) == ("adamw", 6e-4, 0.6, 1e-3)
    assert with_head("SigLIP-SO400M_14", train_batch_size=2048) == ("adamw", 4e-4, 0.65, 1e-3)
    assert with_head("EVA02-L_14", train_batch_size=1024) == ("adamw", 5e-5, 0.8, 1e-3)
    assert with_head("DINOv2-B_14", learning_rate=3e-5)[1:] == (3e-5, 1.0, 1e-3)
    assert with_head("DINOv2-B_14", learning_rate=2e-3)[3] is with_head("DINOv2-B_14", learning_rate=0.0)[3] is None
    assert with_head("DINOv2-B_14", optimizer="sgd") == ("sgd", 0.01, 1.0, None)
    assert taken("BEiT3-B_16") == taken("AIMv2-L_14") == ("adamw", 1.25e-4, 0.75, 0.05, None)
    assert rates_to_try(preview(PHOTOS | {"data_dir": "."}, Machine("cuda", 24 << 30, 4))) == [1e-6, 3e-6, 1e-5, 3e-5]
    assert all(row["source"] and {"sgd", "adamw"} <= set(row) for row in configs.FINE_TUNING)
    assert "".startswith(configs.FINE_TUNING[-1]["models"])


def test_photos_mirrors_and_augments_where_possible():
    assert [photos(augmentation=kind).tta for kind in ("crop_flip", "crop", "pad_flip")] == ["flip", "none", "flip"]
    assert photos(facts={"can_flip": False}).tta == "none"
    edited, plain = photos(50, attention_edits="e", facts={"start_head_classes": 5}), photos(50, augmentation="none")
    assert [config.randaugment_ops for config in (photos(10), photos(100), photos(101), edited, plain)] == [1, 1, 0, 0, 0]
    assert (plain.eval_crop, photos(augmentation="pad_flip").eval_crop, photos(augmentation="crop").eval_crop) == (0, 0, 0.875)


def test_an_evaluation_sees_images_as_the_paper_does():
    config = photos(facts={"start_head_classes": 5}, eval_only=True)
    assert (config.recipe, config.eval_crop, config.tta, config.head) == ("vit-paper", 0.0, "none", "keep")


@pytest.mark.parametrize(("machine", "model"), [
    (None, "ViT-Ti_16"), (Machine("cpu", 16 << 30, 2), "ViT-Ti_16"), (Machine("cpu", 64 << 30, 32), "ViT-S_16"),
    (Machine("mps", 64 << 30, 12), "ViT-S_16"),
    (Machine("cpu", 4 << 30, 32), "ViT-Ti_16"), (Machine("cuda", 6 << 30, 4), "DINOv2-S_14-reg"),
    (Machine("cuda", 24 << 30, 4), "DINOv2-B_14-reg"), (Machine("cuda", 80 << 30, 4), "DINOv2-L_14-reg")], ids=str)
def test_the_machine_only_decides_the_model_of_photos(machine, model):
    assert choose(PHOTOS, machine=machine).model_type == model
    assert choose(PHOTOS | {"model_type": "ViT-B_32"}, machine=machine).model_type == "ViT-B_32"
    assert choose(PHOTOS | {"recipe": "vit-paper"}, machine=machine).model_type == "ViT-B_16"
    assert choose({"dataset": "oxford_pets", "recipe": "photos"}, machine=machine).model_type == model
    assert choose({"recipe": "photos"}, machine=machine).model_type == "ViT-Nano_2"
    facts = Facts(300, 5) if machine is None else Facts(300, 5, **vars(machine))
    found = resolve(PHOTOS, facts)
    assert (found.model_type, found.img_size) == (model, 224)
    assert preview(PHOTOS | {"data_dir": "."}, machine)["model_type"] == model
    assert by_machine(PHOTOS) and not by_machine({}) and not by_machine(PHOTOS | {"model_type": model})
    assert machine_of({"dataset": "digits"}) is machine_of(PHOTOS | {"model_type": model}) is None
    why = why_this_model(found, facts)
    assert (f" {facts.memory >> 30} GiB a process, of the models that are free to use: " in why) == bool(machine)
    # For what a file does not say, a plain ViT decides; so does it for an own size.
    for other in ({"pretrained_dir": "none"}, {"pretrained_dir": "w.npz"}, {"patch_size": 8}):
        assert not by_machine(PHOTOS | other) and choose(PHOTOS | other, machine=machine).model_type.startswith("ViT-")
        assert why_this_model(resolve(PHOTOS | other, facts), facts) == ""
    assert resolve(PHOTOS | {"img_size": 448}, facts).img_size == 448
