"""From flags and facts to the configuration: which value wins, which are computed, which come from the start weights."""

import dataclasses
import re

import pytest

import configs
from utils.config import (
    ConfigError,
    Facts,
    Sources,
    as_command,
    choose,
    describe_length,
    describe_memory,
    length_warnings,
    model_overrides,
    preview,
    resolve,
)

FACTS = Facts(1797, 10, start_head_classes=10)


def test_digits_are_the_default_and_other_data_start_from_the_paper():
    config = resolve({}, FACTS)
    assert resolve({"model_type": "ViT-B_16"}, FACTS).recipe == resolve({"recipe": "digits"}, FACTS).recipe == "digits"
    assert (config.dataset, config.model_type, config.recipe, config.img_size) == ("digits", "ViT-Nano_2", "digits", 8)
    assert {name: getattr(config, name) for name in configs.RECIPES["digits"]} == configs.RECIPES["digits"]
    assert config == resolve({"dataset": "digits", "recipe": "auto"}, FACTS)
    for dataset in set(configs.DATASETS) - set(configs.DEFAULTS_OF_DATASET):
        config = resolve({"dataset": dataset}, FACTS)
        assert (config.model_type, config.recipe, config.img_size) == ("ViT-B_16", "vit-paper", 224)
        assert (config.optimizer, config.learning_rate, config.num_steps, config.warmup_steps) == ("sgd", 3e-2, 10_000, 500)


def test_sources_of_values():
    config = resolve({"learning_rate": 0.0, "num_epochs": 2.0, "recipe": "mae", "model_type": "MAE-L_16"}, FACTS)
    assert {name: config.source(name) for name in (
        "learning_rate", "num_steps", "model_type", "recipe", "layer_decay", "img_size", "seed", "dataset")} == {
        "learning_rate": "flag", "num_steps": "flag", "model_type": "flag", "recipe": "flag", "layer_decay": "recipe",
        "img_size": "model", "seed": "default", "dataset": "recipe"}
    assert config.learning_rate == 0.0 and config.min_learning_rate == 0.0          # the recipe's floor is dropped
    assert resolve({"recipe": "mae"}, FACTS).source("num_steps") == "recipe"


@pytest.mark.parametrize(("flags", "lengths"), [
    ({}, (100, 10, 20, 20)), ({"num_steps": 50, "eval_every": 7}, (50, 5, 7, 7)),
    ({"num_steps": 200, "eval_every": 7, "save_every": 3}, (200, 10, 7, 3)),
    ({"dataset": "cifar10", "num_steps": 500}, (500, 50, 100, 100)), ({"num_steps": 4, "warmup_steps": 4}, (4, 4, 1, 1)),
    ({"dataset": "cifar10", "num_steps": 40}, (40, 4, 8, 8)), ({"num_steps": 40, "eval_every": 100}, (40, 4, 100, 100)),
    ({"num_steps": 300}, (300, 10, 20, 20)), ({"recipe": "bit-hyperrule", "num_steps": 50}, (50, 10, 10, 10)),
    ({"num_epochs": 3.0}, (84, 8, 16, 16)), ({"num_epochs": 0.5, "warmup_steps": 4}, (14, 4, 2, 2)),
    ({"num_epochs": 3.0, "warmup_epochs": 1.0}, (84, 28, 16, 16)), ({"num_steps": 84, "warmup_epochs": 1.0}, (84, 28, 16, 16)),
    ({"recipe": "mae", "dataset": "digits"}, (175, 9, 2, 2)), ({"recipe": "deit-384", "dataset": "digits"}, (105, 18, 4, 4)),
    ({"recipe": "mae", "dataset": "digits", "num_steps": 50}, (50, 5, 5, 5)),
    ({"recipe": "mae", "dataset": "digits", "num_epochs": 10.0}, (18, 1, 2, 2))], ids=str)
def test_lengths_are_resolved(flags, lengths):
    """1,797 images in batches of 64 (28 steps an epoch), with MAE's recipe of 1,024. Evaluations come once an epoch or every
    tenth of the run; at least five times if flags shorten a recipe that sets the interval, unless a flag sets it."""
    config = resolve(flags, FACTS)
    assert (config.num_steps, config.warmup_steps, config.eval_every, config.save_every) == lengths
    assert config.num_epochs is None and config.warmup_epochs is None
    assert describe_length(config, FACTS).startswith(f"{lengths[0]} steps of {config.train_batch_size} images = ")


PHOTOGRAPHS = {"dataset": "oxford_pets"}


@pytest.mark.parametrize(("flags", "facts", "steps"), [
    ({}, {}, 1), ({}, {"memory": 24 << 30}, 8), ({}, {"memory": 48 << 30}, 4), ({}, {"memory": 24 << 30, "ranks": 2}, 4),
    ({}, {"memory": 80 << 30, "device_type": "cuda", "native_bf16": True}, 1),
    ({}, {"memory": 16 << 30, "device_type": "cuda", "native_bf16": True}, 8),
    ({"gradient_accumulation_steps": 2}, {"memory": 24 << 30}, 2),
    ({"gradient_accumulation_steps": "auto"}, {"memory": 24 << 30}, 8),
    ({"model_type": "ViT-Ti_16"}, {"memory": 24 << 30}, 2), ({"img_size": 384}, {"memory": 24 << 30}, 32),
    ({"train_batch_size": 96, "mixup_alpha": 1.0, "optimizer": "adamw"}, {"memory": 6 << 30}, 48),
    ({"train_layers": "head"}, {"memory": 24 << 30}, 2), ({}, {"memory": 24 << 30, "teacher_parameters": 10 ** 9}, 16),
    ({"train_batch_size": 96, "exact": True}, {"memory": 9 << 30, "ranks": 2}, 4)], ids=str)
def test_auto_divides_the_batch_by_the_memory(flags, facts, steps):
    assert resolve(PHOTOGRAPHS | flags, Facts(1797, 10, **facts)).gradient_accumulation_steps == steps


def test_the_choice_of_auto_micro_steps_is_printed():
    def lines_on_memory(memory=24 << 30, **flags) -> list[str]:
        facts = Facts(1797, 10, memory=memory, evaluated_images=300)
        return describe_memory(resolve(PHOTOGRAPHS | flags, facts), facts)

    line, = lines_on_memory()
    assert re.fullmatch(r"a step: 8 x 64 images, since 512 in one piece would need about \d\d\.\d GiB, and 12\.0 GiB "
                        r"are available \(--gradient_accumulation_steps, GRAD_STEPS\)", line), line
    assert lines_on_memory(1 << 40) == lines_on_memory(gradient_accumulation_steps=8) == lines_on_memory(memory=0) == []
    line, warning = lines_on_memory(train_batch_size=509)
    assert line.startswith("a step: 509 x 1 images") and warning.endswith("(TRAIN_BATCH_SIZE) 512"), warning
    line, warning = lines_on_memory(model_type="ViT-H_14", optimizer="adamw")
    assert line.startswith("a step: 256 x 2 images") and "warning: a step needs about 17" in warning, (line, warning)
    assert lines_on_memory(eval_batch_size=4096)[1:] == []                        # only 300 images are evaluated
    warning, = lines_on_memory(4 << 30, model_type="ViT-Ti_16", train_batch_size=4, eval_batch_size=300)
    assert "an evaluation needs about" in warning and "EVAL_BATCH_SIZE" in warning


@pytest.mark.parametrize(("flags", "images", "words"), [
    ({"num_steps": 10}, 1000, []), ({"num_steps": 199}, 511, ["a step uses 512 images and there are 511"]),
    ({"num_epochs": 200.0}, 1024, []), ({"num_steps": 402}, 1024, ["201 passes over the training images"]),
    ({}, 20, ["it sees each 25.6 times", "256,000 passes"]), ({"recipe": "deit"}, 2048, []),
    ({"recipe": "deit", "num_epochs": 300.0}, 2048, ["try --num_epochs 50 (NUM_EPOCHS=50), here 100 steps"])], ids=str)
def test_implausible_lengths_cause_a_warning(flags, images, words):
    facts = Facts(images, 10)
    lines = length_warnings(resolve({"recipe": "vit-paper"} | PHOTOGRAPHS | flags, facts), facts)
    assert len(lines) == len(words)
    for line, part in zip(lines, words):
        assert line.startswith("warning: ") and part in line


def test_a_value_of_the_models_row_is_not_an_override():
    assert resolve({"model_type": "ViT-L_16"}, FACTS).dropout_rate == 0.1
    assert model_overrides(resolve({"num_heads": 2, "dropout_rate": 0.0}, FACTS)) == {"num_heads": 2, "dropout_rate": 0.0}


def test_a_preview_leaves_out_what_depends_on_the_data():
    known = preview({"num_epochs": 3.0, "seed": 5})
    assert known["num_steps"] is None and known["seed"] == 5 and known["precision"] == "auto"
    assert preview({})["num_steps"] == 100 and set(known) == set(resolve({}, FACTS).to_dict())


@pytest.mark.parametrize(("flags", "native", "precision"), [
    ({}, True, "bf16"), ({}, False, "fp32"), ({"precision": "auto"}, True, "bf16"), ({"precision": "tf32"}, True, "tf32"),
    ({"precision": "fp16", "loss_scale": 8.0}, True, "fp16"), ({"loss_scale": 0.0}, False, "fp32")], ids=str)
def test_precision_is_resolved(flags, native, precision):
    config = resolve(flags, Facts(1797, 10, native_bf16=native))
    assert (config.precision, config.fp16_opt_level) == (precision, "O2")


@pytest.mark.parametrize(("flags", "start"), [
    ({}, "auto"), ({"patch_size": 4}, "none"), ({"patch_size": 2}, "auto"), ({"hidden_size": 32}, "none"),
    ({"patch_size": 4, "pretrained_dir": "mine.npz"}, "mine.npz"), ({"in_channels": 1}, "auto"),
    ({"pretrained_dir": "augreg", "model_type": "ViT-S_16"}, "augreg/S_16"),
    ({"recipe": "augreg", "model_type": "R26-ViT-S_32"}, "augreg/R26_S_32"),
    ({"recipe": "augreg", "model_type": "R-ViT-Ti_16"}, "augreg/R_Ti_16"),
    ({"recipe": "augreg", "pretrained_dir": "none"}, "none")], ids=str)
def test_the_source_of_the_weights_is_resolved(flags, start):
    assert choose(flags).start == start == resolve(flags, FACTS).pretrained_dir


def test_choose_returns_what_has_to_be_opened():
    flags = {"dataset": "folder", "data_dir": "d", "val_fraction": 0.1, "split_seed": 3, "seed": 1}
    assert choose(flags) == Sources("folder", "d", 0.1, 0.0, 3, "number", "auto", "auto", "auto", "zero", False, "photos",
                                    "ViT-Ti_16", "auto")


def test_the_way_to_read_images_is_stored():
    found = {"exif": "follow", "intensity_range": (0, 1023), "alpha": "black"}
    flags = {"dataset": "folder", "alpha": "black"}
    config = resolve(flags, Facts(1797, 10, reading=found))
    assert {name: getattr(config, name) for name in found} == found
    assert config.source("alpha") == "flag" and config.source("exif") == "default"
    assert "--exif follow --intensity_range 0,1023 --alpha black" in as_command(config)


# ------------------------------------------------------------------------------------------ from one of our own runs

OF_START = {"model_type": "ViT-S_16", "num_heads": 8, "img_size": [8, 12], "dropout_rate": 0.25, "sigmoid_attention": "all",
       "eval_crop": 0.875, "interpolation": "bicubic"}
STARTED = Facts(1797, 10, start_settings=OF_START, start_head_classes=10, start_path="output/r/best.pt")


def adopted(**flags) -> tuple:
    config = resolve({"pretrained_dir": "output/r"} | flags, STARTED)
    return tuple(getattr(config, name) for name in (*OF_START, "patch_size"))


def test_a_start_from_a_run_sets_the_architecture():
    assert adopted() == ("ViT-S_16", 8, (8, 12), 0.25, "all", 0.0, "bilinear", None)
    other = adopted(model_type="ViT-Nano_2", num_heads=4)
    assert other == ("ViT-Nano_2", 4, 8, 0.0, None, 0.0, "bilinear", None)                # another architecture
    for typed, own in (({"num_heads": 3}, "num_heads 8"), ({"hidden_size": 64, "num_heads": 8}, "hidden_size 384")):
        with pytest.raises(ConfigError, match=rf"best.pt is of a run of ViT-S_16 with {own}, .*its own sizes. Omit --{own[:5]}"):
            adopted(**typed)
    assert adopted(hidden_size=384) == (*adopted()[:-1], None)
    assert adopted(img_size=16, num_heads=8) == ("ViT-S_16", 8, 16, 0.25, "all", 0.0, "bilinear", None)
    config = resolve({"pretrained_dir": "output/r"}, STARTED)
    assert config.source("num_heads") == config.source("img_size") == "start" and config.source("seed") == "default"


def test_a_start_with_its_head_sets_the_preprocessing_too():
    assert adopted(head="keep") == ("ViT-S_16", 8, (8, 12), 0.25, "all", 0.875, "bicubic", None)
    assert adopted(model_type="ViT-Nano_2", num_heads=4, head="keep")[2:] == ((8, 12), 0.0, "all", 0.875, "bicubic", None)
    assert adopted(eval_only=True, eval_crop=0.5)[5:7] == (0.5, "bicubic")
    mirrored = dataclasses.replace(STARTED, start_settings=OF_START | {"tta": "flip"})
    for flags, tta in (({"eval_only": True}, "flip"), ({}, "none"), ({"head": "keep", "dataset": "folder"}, "flip"),
                       ({"head": "keep", "tta": "none"}, "none")):
        assert resolve({"pretrained_dir": "output/r"} | flags, mirrored).tta == tta
    whole = dataclasses.replace(STARTED, start_settings=OF_START | {"tta": "none", "eval_crop": 0.0})      # `photos` has others
    kept = resolve({"pretrained_dir": "output/r", "head": "keep", "dataset": "folder"}, whole)
    assert (kept.recipe, kept.tta, kept.eval_crop) == ("photos", "none", 0.0)


def test_edits_make_the_last_layer_editable():
    flags = {"pretrained_dir": "w.npz", "attention_edits": "."}
    assert resolve(flags, FACTS).sigmoid_attention == "last"
    assert resolve(flags | {"sigmoid_attention": "2"}, FACTS).sigmoid_attention == "2"
    assert resolve(flags, STARTED).sigmoid_attention == "all"


def test_resume_path_auto_without_a_run_starts_one():
    config = resolve({"resume_path": "auto", "name": "r", "override": True}, FACTS)
    assert config.resume_path is None and config.override is False
    with pytest.raises(ConfigError, match="no flag is called --fp16"):
        resolve({"fp16": True}, FACTS)                     # the parser has replaced it
