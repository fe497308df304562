"""Flags: parsed, filled from recipe and model, contradictions told; what a resumed run may change; torchrun's parser."""

import re
import shlex

import pytest
import torch.distributed.run

import configs
from configs import FLAGS, MAY_CHANGE_ON_RESUME, MODELS, RECIPES, RETIRED, ConfigError, as_flags, parse, resolve, resolve_resumed

# A value of each flag that is nobody's default, as it is typed; None: the flag takes no value.
OTHER = {
    "name": "mine", "dataset": "cifar100", "data_dir": "elsewhere", "recipe": "vit-paper", "model_type": "ViT-S_16",
    "img_size": "96x64", "pretrained_dir": "none", "resume_path": "output/r", "output_dir": "out", "log_dir": "events",
    "train_batch_size": "48", "eval_batch_size": "7", "gradient_accumulation_steps": "3", "num_steps": "777",
    "warmup_steps": "33", "decay_type": "linear", "optimizer": "sgd", "learning_rate": "0.025", "weight_decay": "0.125",
    "max_grad_norm": "0.5", "dropout_rate": "0.3", "augmentation": "crop", "eval_every": "9", "save_every": "11",
    "keep_checkpoints": "5", "precision": "fp16", "fp16": None, "fp16_opt_level": "O1", "loss_scale": "64.0",
    "device": "cpu", "num_workers": "6", "seed": "1", "eval_only": None, "confusion_matrix": None, "eval_train": None,
    "val_fraction": "0.1", "test_fraction": "0.2", "split_seed": "3", "test": "once", "patch_size": "4", "hidden_size": "96",
    "mlp_dim": "100", "num_heads": "2", "num_layers": "3", "in_channels": "1", "classifier": "gap", "wandb": "project",
    "num_epochs": "2.5", "warmup_epochs": "0.5", "momentum": "0.8", "min_learning_rate": "1e-06",
    "warmup_learning_rate": "1e-05", "head_learning_rate": "0.5", "layer_decay": "0.75", "decay_milestones": "20,40",
    "decay_on": "matrices", "train_layers": "head", "freeze": "pos_embed,blocks.0.*", "ema_decay": "0.99",
    "attention_dropout_rate": "0.2", "drop_path_rate": "0.15", "label_smoothing": "0.1", "class_weights": "balanced",
    "crop_scale": "0.3", "crop_padding": "2", "rotation": "10.0", "color_jitter": "0.4", "randaugment_ops": "2",
    "randaugment_magnitude": "5", "random_erasing": "0.25", "mixup_alpha": "0.8", "cutmix_alpha": "1.0",
    "mix_probability": "0.5", "mix_switch_probability": "0.25", "mix_off_steps": "10", "interpolation": "bicubic",
    "eval_crop": "0.875", "distillation": "soft", "teacher": "output/teacher", "distillation_alpha": "0.1",
    "distillation_temperature": "3.0", "sigmoid_attention": "3,7", "head": "keep", "attention_edits": "edits",
    "attention_loss_weight": "10.0", "override": None, "exact": None, "non_finite": "skip", "bad_images": "skip",
    "max_bad_images": "0.05", "rank_timeout": "30", "worker_timeout": "7", "check_data": None,
    "compile": None, "float32_matmul": "medium", "prepare": "prepared", "prepare_size": "128", "profile": None}
# What a flag needs beside it to make sense.
WITH = {
    "fp16_opt_level": ["--fp16"], "loss_scale": ["--fp16"], "data_dir": ["--dataset", "folder"],
    "float32_matmul": ["--precision", "fp32"], "prepare_size": ["--prepare", "prepared"],
    "split_seed": ["--val_fraction", "0.1"], "decay_milestones": ["--decay_type", "step", "--decay_milestones", "7"],
    "momentum": ["--optimizer", "sgd"], "decay_on": ["--weight_decay", "0.1"], "crop_scale": ["--augmentation", "crop"],
    "crop_padding": ["--augmentation", "pad"], "randaugment_magnitude": ["--randaugment_ops", "1"],
    "mix_probability": ["--mixup_alpha", "1"], "mix_off_steps": ["--cutmix_alpha", "1"],
    "mix_switch_probability": ["--mixup_alpha", "1", "--cutmix_alpha", "1"],
    "teacher": ["--distillation", "hard", "--teacher", "t"],
    "distillation": ["--teacher", "t", "--distillation", "hard"],
    "distillation_alpha": ["--distillation", "hard", "--teacher", "t"],
    "distillation_temperature": ["--distillation", "soft", "--teacher", "t"],
    "attention_edits": ["--recipe", "vit-paper"], "attention_loss_weight": ["--attention_edits", "e"],
    "override": ["--resume_path", "r"], "max_bad_images": ["--bad_images", "skip"]}
# Epochs become steps when the number of training images is known.
LENGTHS = {"num_epochs": ("num_steps", 1797, 70), "warmup_epochs": ("warmup_steps", 1797, 14)}


def typed(name: str) -> list[str]:
    return [f"--{name}"] if OTHER[name] is None else [f"--{name}", OTHER[name]]


def shown(value) -> str:
    """A name for a case"""
    return " ".join(value) or "nothing" if isinstance(value, list) else str(value)


def run_of(*argv: str) -> dict:
    return resolve(parse(list(argv))).to_dict()


def told(function, *args) -> str:
    """What the ConfigError says, in its one line"""
    with pytest.raises(ConfigError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ tables


def test_the_list_above_is_whole():
    assert set(OTHER) == set(FLAGS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_hold_flags_of_the_right_kind(recipe):
    variants = [row for (name, _), row in configs.VARIANTS.items() if name == recipe]
    sizes = [row for _, row in configs.SIZE_RULES.get(recipe, ())]
    for row in [RECIPES[recipe], *variants, *sizes]:
        for name, value in row.items():
            assert name in FLAGS, name
            typed = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert parse([f"--{name}", typed]) == {name: value}, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fills_all_that_is_needed(recipe):
    """What has no default, and what no later stage fills."""
    filled = {name for name, (_, default, _) in FLAGS.items() if default is None} - {
        "name", "resume_path", "num_workers", "wandb", "head_learning_rate", "freeze", "teacher", "num_epochs", "warmup_epochs",
        "attention_dropout_rate", "drop_path_rate", "classifier", "in_channels", "decay_milestones",
        "sigmoid_attention", "attention_edits", "prepare", *configs.SIZES}
    given = {"recipe": recipe} | ({"model_type": "ViT-S_16"} if recipe == "augreg" else {})
    run = resolve(given)
    configs.set_lengths(run, given, 50_000)
    assert {name for name in filled if run[name] is None} == set()
    assert run.decay_type != "step" or run.decay_milestones


def test_variants_and_rules_belong_to_recipes():
    assert {name for name, _ in configs.VARIANTS} | set(configs.SIZE_RULES) <= set(RECIPES)
    assert {model for _, model in configs.VARIANTS} <= set(MODELS)
    assert {name for names, _, _ in configs.ACTS_WITH for name in names} <= set(FLAGS)
    assert not configs.QUIET - set(FLAGS) and not set(configs.MODEL_KEYS) - set(FLAGS)


def test_other_tables_name_what_exists():
    for row in configs.DEFAULTS_OF_DATASET.values():
        assert row["recipe"] in RECIPES and row["model_type"] in MODELS
    assert set(configs.DEFAULTS_OF_DATASET) - {None} <= set(FLAGS["dataset"][0])
    assert set(MAY_CHANGE_ON_RESUME) <= set(FLAGS)
    assert not {flag.strip("-").replace("-", "_") for flag in RETIRED} & set(FLAGS)
    assert all(text and "\n" not in text for _, _, text in FLAGS.values())


def test_an_architecture_with_a_typing_error_is_an_error():
    with pytest.raises(KeyError):
        configs.architecture(16, 32, 64, 4, 2, droput_rate=0.1)
    with pytest.raises((KeyError, AttributeError)):
        MODELS["ViT-B_16"].droput_rate = 0.1


# Published sizes: width, MLP, heads, layers (papers: table 1 of 2010.11929, table 2 of 2106.10270).
@pytest.mark.parametrize(("letter", "sizes"), [
    ("Ti", (192, 768, 3, 12)), ("S", (384, 1536, 6, 12)), ("B", (768, 3072, 12, 12)), ("L", (1024, 4096, 16, 24)),
    ("H", (1280, 5120, 16, 32))])
def test_architectures_have_the_published_sizes(letter, sizes):
    rows = {name: row for name, row in MODELS.items() if f"ViT-{letter}_" in name}
    assert rows
    for name, row in rows.items():
        assert (row.hidden_size, row.mlp_dim, row.num_heads, row.num_layers) == sizes, name
        stride = row.patch_size if row.resnet_layers is None else row.patch_size * 4 * 2 ** max(len(row.resnet_layers) - 1, 0)
        # The name gives the stride, but for this one, which Google named by other rules.
        assert name == "R-ViT-Ti_16" or stride == int(name.rpartition("_")[2]), name


# ----------------------------------------------------------------------------------------------------- parsing


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_parsed_alone_and_acts_on_the_result(name):
    given = parse(typed(name))
    assert set(given) == {name}
    with_it, without = run_of(*WITH.get(name, []), *typed(name)), run_of(*WITH.get(name, []))
    if name in LENGTHS:
        steps, images, value = LENGTHS[name]
        run = resolve(given)
        configs.set_lengths(run, given, images)
        assert run[steps] == value != without[steps] and run[name] is None
    else:
        assert with_it[name] == given[name] != without[name]


def test_nothing_given_is_nothing_filled():
    assert parse([]) == {}


@pytest.mark.parametrize(("text", "value"), [
    ("224", 224), ("8", 8), ("224x160", (224, 160)), ("160x224", (160, 224)), ("224x224", 224), ("9999", 9999)])
def test_image_sizes(text, value):
    assert parse(["--img_size", text]) == {"img_size": value}


@pytest.mark.parametrize("text", ["0", "-8", "08", "big", "224x", "x224", "224x0", "224x160x3", "224 x 160", "224,160", "2e2", "",
                                  "100000", "224X160", "22.4", "٢٢٤"])
def test_image_sizes_that_cannot_be(text):
    assert "--img_size" in told(parse, [f"--img_size={text}"])


BAD_VALUES = [
    ("train_batch_size", "0"), ("train_batch_size", "-1"), ("train_batch_size", "1.5"), ("train_batch_size", "many"),
    ("eval_batch_size", "0"), ("gradient_accumulation_steps", "0"), ("num_steps", "0"), ("eval_every", "0"),
    ("save_every", "0"), ("keep_checkpoints", "0"), ("warmup_steps", "-1"), ("num_workers", "-1"), ("seed", "-1"),
    ("learning_rate", "-0.1"), ("learning_rate", "nan"), ("learning_rate", "inf"), ("learning_rate", "fast"),
    ("weight_decay", "-1"), ("max_grad_norm", "-1"), ("loss_scale", "-1"), ("loss_scale", "nan"), ("dropout_rate", "1"),
    ("dropout_rate", "-0.1"), ("dropout_rate", "nan"), ("name", "../up"), ("name", "a/b"), ("name", ".hidden"), ("name", ""),
    ("name", "a b"), ("name", "-x"), ("name", "a\n"), ("name", "ä"),
    ("dataset", "cifar11"), ("recipe", "none"), ("decay_type", "exponential"), ("optimizer", "rmsprop"),
    ("augmentation", "flip"), ("decay_milestones", "3,2"), ("decay_milestones", "x"), ("class_weights", "0,0"),
    ("class_weights", "heavy"), ("class_weights", "1,-1"), ("train_layers", "tail"), ("train_layers", "0"), ("num_epochs", "0"),
    ("num_steps", "1e3"),
    ("seed", "1.5"), ("randaugment_magnitude", "11"), ("mix_probability", "1.1"), ("random_erasing", "-0.1"),
    ("test", "sometimes"),
    ("precision", "fp8"), ("fp16_opt_level", "O4"), ("device", "tpu")]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_bad_values_are_told_with_the_flag(name, value):
    assert f"--{name}" in told(parse, [f"--{name}={value}"])


@pytest.mark.parametrize("argv", [
    ["--nonsense"], ["--nonsense", "1"], ["stray"], ["--seed"], ["--fp16", "yes"], ["--fp16=1"], ["-seed", "1"],
    ["--train-batch-size", "8"]], ids=shown)
def test_unknown_words_are_told(argv):
    assert argv[0].split("=")[0].lstrip("-") in told(parse, argv) or argv[-1] in told(parse, argv)


@pytest.mark.parametrize("name", [name for name in FLAGS if len(name) > 4])
def test_abbreviations_are_refused(name):
    short = name[:-1]
    assert short not in FLAGS and f"--{short}" in told(parse, [f"--{short}", OTHER[name] or "1"])


@pytest.mark.parametrize("flag", RETIRED)
@pytest.mark.parametrize("form", ["{} 0", "{}=0", "--seed 1 {} 0"])
def test_retired_flags_are_told(flag, form):
    said = told(parse, form.format(flag).split())
    assert said.startswith(f"{flag} is not used any more") and RETIRED[flag] in said


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert all(f"--{name}" in said for name in FLAGS)


def test_the_last_one_counts():
    assert parse(["--seed", "1", "--seed", "2"]) == {"seed": 2}


# --------------------------------------------------------------------------------------------------- resolving


def test_digits_are_the_default():
    run = run_of()
    assert run == run_of("--dataset", "digits")
    assert (run["dataset"], run["model_type"], run["recipe"], run["img_size"]) == ("digits", "ViT-Nano_2", "digits", 8)
    assert {name: run[name] for name in RECIPES["digits"]} == RECIPES["digits"]


@pytest.mark.parametrize("dataset", [name for name in configs.DATASETS if name != "digits"])
def test_other_data_start_from_the_paper(dataset):
    run = run_of("--dataset", dataset)
    assert (run["model_type"], run["recipe"], run["img_size"]) == ("ViT-B_16", "vit-paper", 224)
    assert {name: run[name] for name in RECIPES["vit-paper"]} == RECIPES["vit-paper"]
    assert (run["optimizer"], run["learning_rate"], run["num_steps"], run["warmup_steps"]) == ("sgd", 3e-2, 10_000, 500)


@pytest.mark.parametrize(("argv", "recipe"), [
    (["--model_type", "ViT-B_16"], "digits"), (["--model_type", "ViT-Nano_2"], "digits"),
    (["--dataset", "cifar10", "--model_type", "ViT-Nano_2"], "vit-paper"), (["--recipe", "vit-paper"], "vit-paper"),
    (["--dataset", "cifar10", "--recipe", "digits"], "digits")], ids=shown)
def test_which_recipe(argv, recipe):
    run = run_of(*argv)
    assert run["recipe"] == recipe and run["learning_rate"] == RECIPES[recipe]["learning_rate"]


@pytest.mark.parametrize("name", RECIPES["digits"])
def test_a_flag_wins_over_the_recipe(name):
    run = run_of(*typed(name))
    assert run[name] == parse(typed(name))[name] != RECIPES["digits"][name]
    changed = {other for other in RECIPES["digits"] if run[other] != RECIPES["digits"][other]}
    assert changed == {name}                                     # and nothing else changes with it


def test_zero_is_a_value():
    run = run_of("--warmup_steps", "0", "--learning_rate", "0", "--max_grad_norm", "0", "--num_workers", "0")
    assert (run["warmup_steps"], run["learning_rate"], run["max_grad_norm"], run["num_workers"]) == (0, 0, 0, 0)


@pytest.mark.parametrize(("model_type", "rate"), [("ViT-L_16", 0.1), ("ViT-B_16", 0.0)])
def test_dropout_and_image_size_come_from_the_model(model_type, rate):
    run = run_of("--model_type", model_type)
    assert run["dropout_rate"] == rate and run["img_size"] == 224
    assert run_of("--model_type", model_type, "--dropout_rate", "0.0")["dropout_rate"] == 0.0


@pytest.mark.parametrize(("argv", "warmup"), [
    (["--num_steps", "5"], 0), (["--num_steps", "10"], 1), (["--num_steps", "50"], 5), (["--num_steps", "200"], 10),
    (["--dataset", "cifar10", "--num_steps", "300"], 30), (["--dataset", "cifar10", "--num_steps", "500"], 50),
    (["--dataset", "cifar10", "--num_steps", "6000"], 500),
    (["--num_steps", "5", "--warmup_steps", "5"], 5), (["--num_steps", "5", "--warmup_steps", "0"], 0)], ids=shown)
def test_warm_up_of_short_runs(argv, warmup):
    assert run_of(*argv)["warmup_steps"] == warmup


def test_a_warm_up_that_is_given_and_too_long_is_told():
    said = told(resolve, parse(["--num_steps", "5", "--warmup_steps", "6"]))
    assert "--warmup_steps 6" in said and "--num_steps 5" in said


def test_saving_follows_evaluation():
    assert run_of("--eval_every", "7")["save_every"] == 7
    assert run_of("--eval_every", "7", "--save_every", "3")["save_every"] == 3


def test_unknown_models_and_settings():
    assert all(name in told(resolve, {"model_type": "ViT-Q_16"}) for name in ("ViT-Q_16", *MODELS))
    assert "'learning_rat'" in told(resolve, {"learning_rat": 0.1})


def test_a_resolved_configuration_is_locked():
    run = resolve({})
    with pytest.raises(AttributeError):
        run.learning_rat = 0.1
    run.name = "x"                        # known keys may still be set: the folder's number is only known later
    assert run.name == "x"


def test_resolving_does_not_change_the_tables():
    before = str((RECIPES, FLAGS, MODELS))
    run = resolve(parse(["--dataset", "cifar10", "--learning_rate", "1", "--fp16"]))
    run.learning_rate = 2.0
    assert str((RECIPES, FLAGS, MODELS)) == before


@pytest.mark.parametrize(("argv", "precision", "level"), [
    ([], "auto", "O2"), (["--fp16"], "fp16", "O2"), (["--precision", "fp16"], "fp16", "O2"),
    (["--fp16", "--precision", "fp16", "--fp16_opt_level", "O3"], "fp16", "O3"), (["--precision", "bf16"], "bf16", "O2"),
    (["--fp16", "--loss_scale", "128"], "fp16", "O2"), (["--fp16", "--fp16_opt_level", "O1", "--loss_scale", "8"], "fp16", "O1"),
    (["--loss_scale", "0"], "auto", "O2"), (["--fp16", "--fp16_opt_level", "O3", "--loss_scale", "0"], "fp16", "O3")],
    ids=shown)
def test_precision(argv, precision, level):
    run = run_of(*argv)
    assert (run["precision"], run["fp16_opt_level"]) == (precision, level)


@pytest.mark.parametrize(("argv", "words"), [
    (["--fp16", "--precision", "bf16"], "contradict"), (["--fp16", "--precision", "fp32"], "contradict"),
    (["--fp16", "--precision", "auto"], "contradict"), (["--fp16_opt_level", "O1"], "--fp16_opt_level"),
    (["--fp16_opt_level", "O2"], "--fp16_opt_level"), (["--precision", "bf16", "--fp16_opt_level", "O1"], "--fp16_opt_level"),
    (["--loss_scale", "8"], "--loss_scale"), (["--precision", "bf16", "--loss_scale", "8"], "--loss_scale"),
    (["--fp16", "--fp16_opt_level", "O0", "--loss_scale", "8"], "--loss_scale"),
    (["--fp16", "--fp16_opt_level", "O3", "--loss_scale", "8"], "--loss_scale")], ids=shown)
def test_precision_that_contradicts_itself(argv, words):
    assert words in told(resolve, parse(argv))


# ----------------------------------------------------------------------------------------------------- lengths


def lengths_of(images: int, *argv: str) -> tuple:
    given = parse(list(argv))
    run = resolve(given)
    configs.set_lengths(run, given, images)
    return run.num_steps, run.warmup_steps, run.decay_milestones, run.mixup_alpha


@pytest.mark.parametrize(("images", "argv", "lengths"), [
    (5_000, [], (500, 100, (200, 300, 400), 0.0)),
    (50_000, [], (10_000, 500, (3_000, 6_000, 9_000), 0.1)),
    (1_281_167, [], (20_000, 500, (6_000, 12_000, 18_000), 0.1)),
    (20_000, [], (10_000, 500, (3_000, 6_000, 9_000), 0.1)),
    (5_000, ["--num_steps", "50"], (50, 10, (20, 30, 40), 0.0)),
    (5_000, ["--num_steps", "1000", "--warmup_steps", "7"], (1000, 7, (400, 600, 800), 0.0)),
    (5_000, ["--num_epochs", "102.4"], (1000, 200, (400, 600, 800), 0.0)),
    (50_000, ["--mixup_alpha", "0"], (10_000, 500, (3_000, 6_000, 9_000), 0.0)),
    (50_000, ["--decay_milestones", "5,6"], (10_000, 500, (5, 6), 0.1)),
    (50_000, ["--decay_type", "cosine"], (10_000, 500, None, 0.1))], ids=shown)
def test_bit_goes_by_the_size_of_the_data(images, argv, lengths):
    assert lengths_of(images, "--recipe", "bit-hyperrule", "--dataset", "cifar10", *argv) == lengths


@pytest.mark.parametrize(("argv", "steps", "warmup"), [
    (["--num_epochs", "3"], 84, 8), (["--num_epochs", "0.5", "--warmup_steps", "4"], 14, 4),
    (["--num_epochs", "3", "--warmup_epochs", "1"], 84, 28), (["--num_steps", "84", "--warmup_epochs", "1"], 84, 28),
    (["--recipe", "mae", "--dataset", "digits"], 175, 9), (["--recipe", "deit-384", "--dataset", "digits"], 105, 18),
    (["--recipe", "mae", "--dataset", "digits", "--num_steps", "50"], 50, 5),
    (["--recipe", "mae", "--dataset", "digits", "--num_epochs", "10"], 18, 1)], ids=shown)
def test_epochs_become_steps(argv, steps, warmup):
    """1,797 images; batches of 64 (28 steps an epoch), with MAE's recipe of 1,024."""
    assert lengths_of(1797, *argv)[:2] == (steps, warmup)


@pytest.mark.parametrize("argv", [["--num_steps", "5", "--num_epochs", "1"], ["--warmup_steps", "5", "--warmup_epochs", "1"]],
                         ids=shown)
def test_steps_and_epochs_contradict_each_other(argv):
    assert "contradict" in told(resolve, parse(argv))


def test_a_warm_up_in_epochs_that_is_too_long_is_told():
    given = parse(["--num_epochs", "1", "--warmup_epochs", "2"])
    assert "--warmup_steps 56" in told(configs.set_lengths, resolve(given), given, 1797)


def test_an_epoch_between_evaluations_where_the_recipe_says_nothing():
    given = parse(["--recipe", "mae", "--train_batch_size", "100"])
    run = resolve(given)
    assert configs.set_lengths(run, given, 1000) == "100 epochs of 1000 images = 1000 steps of 100"
    assert run.eval_every == run.save_every == 10


# ---------------------------------------------------------------------------------------- recipes and dimensions


def test_a_recipe_brings_its_data_set_and_model():
    run = run_of("--recipe", "scratch-small")
    assert (run["dataset"], run["img_size"], run["patch_size"], run["pretrained_dir"]) == ("cifar100", 72, 6, "none")
    assert run_of("--recipe", "scratch-small", "--dataset", "cifar10")["dataset"] == "cifar10"


def test_another_model_does_not_take_the_recipes_dimensions():
    run = run_of("--recipe", "scratch-small", "--model_type", "ViT-B_16")
    assert run["patch_size"] is None and run["img_size"] == 224


def test_a_variant_of_a_recipe():
    assert run_of("--recipe", "mae")["layer_decay"] == 0.65
    large = run_of("--recipe", "mae", "--model_type", "MAE-L_16")
    assert (large["layer_decay"], large["drop_path_rate"]) == (0.75, 0.2)
    assert run_of("--recipe", "mae", "--model_type", "MAE-L_16", "--layer_decay", "0.9")["layer_decay"] == 0.9


@pytest.mark.parametrize(("argv", "pretrained"), [
    ([], "auto"), (["--patch_size", "4"], "none"), (["--patch_size", "2"], "auto"), (["--hidden_size", "32"], "none"),
    (["--patch_size", "4", "--pretrained_dir", "mine.npz"], "mine.npz"), (["--in_channels", "1"], "auto"),
    (["--pretrained_dir", "augreg", "--model_type", "ViT-S_16"], "augreg/S_16"),
    (["--recipe", "augreg", "--model_type", "R26-ViT-S_32"], "augreg/R26_S_32"),
    (["--recipe", "augreg", "--model_type", "R-ViT-Ti_16"], "augreg/R_Ti_16"),
    (["--recipe", "augreg", "--pretrained_dir", "none"], "none")], ids=shown)
def test_where_the_weights_come_from(argv, pretrained):
    assert run_of(*argv)["pretrained_dir"] == pretrained


def test_a_recipes_floor_gives_way_to_a_lower_learning_rate():
    run = run_of("--recipe", "deit", "--learning_rate", "1e-7")
    assert run["min_learning_rate"] == run["warmup_learning_rate"] == 1e-7
    assert run_of("--recipe", "deit", "--learning_rate", "1e-3")["min_learning_rate"] == 1e-5


def test_only_what_is_set_overrides_the_models_row():
    run = resolve(parse(["--num_heads", "2", "--drop_path_rate", "0.1"]))
    assert configs.model_overrides(run) == {"num_heads": 2, "drop_path_rate": 0.1, "dropout_rate": 0.0}


@pytest.mark.parametrize("name", [name for names, _, _ in configs.ACTS_WITH for name in names])
def test_a_flag_that_would_do_nothing_is_refused(name):
    extra = {"crop_scale": ["--augmentation", "pad"], "momentum": ["--optimizer", "adam"],
             "layer_decay": ["--train_layers", "head"]}.get(name, [])
    said = told(resolve, parse([*extra, *typed(name)]))
    assert f"--{name} acts with" in said


@pytest.mark.parametrize(("argv", "words"), [
    (["--decay_type", "step"], "--decay_milestones"), (["--recipe", "augreg"], "AugReg has no such size"),
    (["--distillation", "hard"], "--teacher"),
    (["--min_learning_rate", "1"], "--min_learning_rate"), (["--ema_decay", "0.9", "--fp16", "--fp16_opt_level", "O3"], "O3"),
    (["--learning_rate", "0", "--head_learning_rate", "1"], "--train_layers head"),
    (["--check_data", "--prepare", "p", "--dataset", "folder"], "--prepare"), (["--eval_only", "--profile"], "--profile"),
    (["--prepare", "p", "--dataset", "folder", "--val_fraction", "0.1"], "--val_fraction has no part"),
    (["--prepare", "p", "--dataset", "folder", "--interpolation", "bicubic"], "--interpolation has no part"),
    (["--in_channels", "2"], "--in_channels 2")], ids=shown)
def test_settings_that_do_not_fit(argv, words):
    assert words in told(resolve, parse(argv))


# --------------------------------------------------------------------------------------------------- resuming

SAVED = run_of("--name", "r", "--fp16", "--fp16_opt_level", "O2", "--num_steps", "100")
# What makes a run what it is. With another value of these, the steps before and after would not be one experiment.
FIXED = ["dataset", "recipe", "model_type", "img_size", "train_batch_size", "warmup_steps", "decay_type", "optimizer",
         "learning_rate", "weight_decay", "max_grad_norm", "dropout_rate", "augmentation", "precision", "fp16",
         "fp16_opt_level", "loss_scale", "seed", "val_fraction", "test_fraction", "split_seed", "patch_size", "hidden_size",
         "mlp_dim", "num_heads", "num_layers", "in_channels", "classifier", "warmup_epochs", "momentum", "min_learning_rate",
         "warmup_learning_rate", "head_learning_rate", "layer_decay", "decay_milestones", "decay_on", "train_layers", "freeze",
         "ema_decay", "attention_dropout_rate", "drop_path_rate", "label_smoothing", "class_weights", "crop_scale",
         "crop_padding", "rotation", "color_jitter", "randaugment_ops", "randaugment_magnitude", "random_erasing",
         "mixup_alpha", "cutmix_alpha", "mix_probability", "mix_switch_probability", "mix_off_steps", "interpolation",
         "eval_crop", "distillation", "distillation_alpha", "distillation_temperature", "sigmoid_attention", "head",
         "attention_loss_weight", "exact", "check_data", "float32_matmul", "prepare", "prepare_size"]


def test_what_a_session_does_once_is_not_kept():
    """A machine without a compiler goes on with a run that was compiled."""
    saved = SAVED | {"compile": True, "profile": True, "override": True}
    run = resolve_resumed({"resume_path": "output/r"}, saved, 1000)
    assert not (run.compile or run.profile or run.override)
    assert "--compile" in told(resolve_resumed, {"resume_path": "output/r", "compile": True},
                               SAVED | {"attention_edits": "edits", "sigmoid_attention": "last"}, 1000)


def test_every_flag_may_change_on_resume_or_may_not():
    assert sorted([*FIXED, *MAY_CHANGE_ON_RESUME]) == sorted(FLAGS)


@pytest.mark.parametrize("name", [name for name in FIXED if name not in ("fp16", "precision", "warmup_epochs")])
def test_a_resumed_run_keeps_what_it_is(name):
    given = parse(["--resume_path", "output/r", *typed(name)])
    said = told(resolve_resumed, given, SAVED, 1000)
    held = MODELS[SAVED["model_type"]][name] if SAVED[name] is None and name in configs.MODEL_KEYS else SAVED[name]
    assert f"--{name} " in said and str(held) in said and "--resume_path" in said
    # The value that it has is accepted, also where nobody had given it.
    same = resolve_resumed({"resume_path": "output/r", name: held}, SAVED, 1000)
    assert same.to_dict() == SAVED | {"resume_path": "output/r", name: held}


@pytest.mark.parametrize("name", FIXED)
def test_what_override_lets_a_resumed_run_change(name):
    """What is read anew at every start; what model and optimizer are made of stays."""
    given = parse(["--resume_path", "output/r", "--override", *WITH.get(name, []), *typed(name)])
    if name in ("fp16", "precision", "fp16_opt_level", "loss_scale"):
        given = parse(["--resume_path", "output/r", "--override", "--precision", "bf16"])
        run = resolve_resumed(given, SAVED, 1000)
        assert run.precision == "bf16" and not run.fp16
    elif name in configs.MAY_OVERRIDE and name != "distillation":
        known = {"distillation": "soft", "teacher": "t"} if "distillation" in name else {}
        known |= {"attention_edits": "e"} if "attention" in name else {}
        given = {key: value for key, value in given.items() if key not in ("distillation", "teacher", "attention_edits")}
        run = resolve_resumed(given, SAVED | known, 1000)
        assert name == "warmup_epochs" or run[name] == given[name]
        assert "--override" in told(resolve_resumed, {"resume_path": "output/r", name: given[name]}, SAVED | known, 1000)
    else:
        assert "add --override" not in told(resolve_resumed, given, SAVED, 1000)


def test_what_was_allowed_once_is_not_allowed_for_ever():
    again = resolve_resumed({"resume_path": "x"}, SAVED | {"override": True}, 1000)
    assert not again.override and resolve_resumed({"resume_path": "x", "override": True}, SAVED, 1000).override


def test_a_precision_that_scales_no_loss_takes_the_scale_along():
    scaled = SAVED | {"precision": "fp16", "loss_scale": 1024.0}
    run = resolve_resumed({"resume_path": "x", "override": True, "precision": "fp32"}, scaled, 1000)
    assert (run.precision, run.loss_scale, run.fp16_opt_level) == ("fp32", 0.0, "O2")


def test_a_job_script_may_say_no_warm_up_in_epochs_each_time():
    without = SAVED | {"warmup_steps": 0, "warmup_epochs": 0.0}
    assert resolve_resumed({"resume_path": "x", "warmup_epochs": 0.0}, without, 1000).warmup_steps == 0


def test_what_a_resumed_run_may_say_again():
    assert resolve_resumed({"recipe": "auto"}, SAVED, 1000)["recipe"] == "digits"
    assert resolve_resumed({"warmup_epochs": 0.64}, SAVED, 1000)["warmup_steps"] == 10       # 0.64 * 1000 / 64
    assert "--warmup_steps 8" in told(resolve_resumed, {"warmup_epochs": 0.5}, SAVED, 1000)
    assert "has none" in told(resolve_resumed, {"teacher": "output/t"}, SAVED, 1000)
    taught = run_of("--distillation", "hard", "--teacher", "output/t")
    assert resolve_resumed({"teacher": "moved/t"}, taught, 1000)["teacher"] == "moved/t"
    assert "has none" in told(resolve_resumed, {"attention_edits": "edits"}, SAVED, 1000)
    marked = run_of("--attention_edits", "edits")
    assert resolve_resumed({"attention_edits": "moved"}, marked, 1000)["attention_edits"] == "moved"


def test_a_resumed_run_may_be_given_epochs():
    """SAVED has batches of 64 images."""
    run = resolve_resumed(parse(["--num_epochs", "32"]), SAVED, 1000)
    assert run.num_steps == 500 and run.num_epochs is None
    assert "contradict" in told(resolve_resumed, {"num_epochs": 2.0, "num_steps": 50}, SAVED, 1000)


@pytest.mark.parametrize("name", sorted(MAY_CHANGE_ON_RESUME - {"resume_path", "num_epochs", "teacher", "attention_edits"}))
def test_a_resumed_run_takes_what_may_change(name):
    given = parse(["--resume_path", "output/r", *typed(name)])
    run = resolve_resumed(given, SAVED, 1000).to_dict()
    assert run[name] == given[name] != SAVED[name]
    assert {other for other in run if run[other] != SAVED[other]} == {name, "resume_path"}


def test_a_resumed_run_without_flags_is_the_saved_one():
    assert resolve_resumed({"resume_path": "x"}, SAVED, 1000).to_dict() == SAVED | {"resume_path": "x"}


@pytest.mark.parametrize(("saved", "argv", "accepted"), [
    (["--fp16"], ["--fp16"], True), (["--fp16"], ["--precision", "fp16"], True), (["--precision", "fp16"], ["--fp16"], True),
    (["--fp16"], ["--precision", "bf16"], False), (["--precision", "bf16"], ["--fp16"], False), ([], ["--fp16"], False),
    ([], ["--precision", "auto"], True), (["--fp16"], ["--fp16", "--fp16_opt_level", "O3"], False)], ids=shown)
def test_both_spellings_of_fp16_on_resume(saved, argv, accepted):
    given = parse(argv)
    if accepted:
        assert resolve_resumed(given, run_of(*saved), 1000)["precision"] == run_of(*saved)["precision"]
    else:
        assert "the checkpoint was made with" in told(resolve_resumed, given, run_of(*saved), 1000)


@pytest.mark.parametrize(("text", "saved", "accepted"), [
    ("8x10", (8, 10), True), ("8x10", [8, 10], True), ("10x8", (8, 10), False), ("8", 8, True), ("8x8", 8, True),
    ("10", 8, False)])
def test_image_sizes_on_resume(text, saved, accepted):
    given = parse(["--img_size", text])
    if accepted:
        resolve_resumed(given, SAVED | {"img_size": saved}, 1000)
    else:
        assert "--img_size" in told(resolve_resumed, given, SAVED | {"img_size": saved}, 1000)


def test_a_resumed_run_cannot_end_in_its_warm_up():
    assert "10 warm-up steps" in told(resolve_resumed, {"num_steps": 9}, SAVED, 1000)
    assert resolve_resumed({"num_steps": 10}, SAVED, 1000).num_steps == 10


def test_checkpoints_from_before_a_flag_have_its_default():
    older = {name: value for name, value in SAVED.items() if name not in ("confusion_matrix", "keep_checkpoints")}
    run = resolve_resumed({"resume_path": "x"}, older, 1000)
    assert run.keep_checkpoints == 2 and run.confusion_matrix is False


def test_checkpoints_from_before_a_flag_take_it_at_its_default():
    older = {name: value for name, value in SAVED.items() if name != "loss_scale"}
    assert resolve_resumed({"loss_scale": 0.0}, older, 1000).loss_scale == 0.0


# ---------------------------------------------------------------------------------------------------- as flags


@pytest.mark.parametrize("argv", [
    [], *([*WITH.get(name, []), *typed(name)] for name in FLAGS), ["--num_steps", "5"],
    ["--dataset", "cifar10", "--fp16", "--fp16_opt_level", "O3", "--img_size", "384x256", "--eval_only", "--confusion_matrix"],
    ["--learning_rate", "1e-05", "--weight_decay", "0.30000000000000004", "--model_type", "ViT-H_14"]], ids=shown)
def test_as_flags_says_the_same_again(argv):
    given = parse(argv)
    run = resolve(given)
    if run.num_steps is None or run.warmup_steps is None:
        configs.set_lengths(run, given, 1797)
    assert resolve(parse(shlex.split(as_flags(run)))) == run


# ----------------------------------------------------------------------------------------------------- torchrun


@pytest.mark.parametrize("launcher", [
    ["--standalone", "--nproc_per_node", "2"],
    ["--nnodes", "2", "--node_rank", "1", "--master_addr", "host", "--master_port", "29500", "--nproc_per_node", "2"]],
    ids=["one node", "two nodes"])
@pytest.mark.parametrize("form", ["alone", "with =", "among others"])
@pytest.mark.parametrize("name", FLAGS)
def test_torchrun_hands_every_flag_on(name, form, launcher):
    """Its parser reads the script's flags too: one that begins two of its own flags would be refused as ambiguous."""
    words = typed(name)
    if form == "with =" and len(words) == 2:
        words = ["=".join(words)]
    if form == "among others":
        words = ["--seed", "3", *words, "--fp16"]
    parsed = torch.distributed.run.parse_args([*launcher, "train.py", *words])
    assert parsed.training_script == "train.py" and parsed.training_script_args == words
    assert parsed.nproc_per_node == "2" and parsed.node_rank == (1 if "--nnodes" in launcher else 0)


def begins(name: str) -> set:
    """The launcher's flags that --name could be short for; none where it is one of them in full"""
    options = torch.distributed.run.get_args_parser()._option_string_actions
    return set() if f"--{name}" in options else {id(options[word]) for word in options if word.startswith(f"--{name}")}


@pytest.mark.parametrize("name", FLAGS)
def test_no_flag_is_ambiguous_for_torchrun(name):
    """Newer Pythons may pass it on all the same; this holds for all of them."""
    assert len(begins("no")) > 1 and len(begins(name)) <= 1


def test_flags_in_train_sh_exist():
    script = (configs.__file__.rpartition("/")[0] or ".") + "/train.sh"
    with open(script) as stream:
        names = re.findall(r"^add (\w+) ", stream.read(), flags=re.MULTILINE)
    assert len(names) > 10 and set(names) <= set(FLAGS)
