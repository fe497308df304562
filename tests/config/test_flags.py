"""The table of flags. A new flag, another default or another rule for resumed runs is a decision: change this file too."""

import pytest
from flag_values import other

from utils.config import FLAGS, ConfigError, check, types
from utils.config.flags import FIXED, FREE, MODEL_KEYS, OVERRIDE, SIZES, before, defaults

# name default, by what a resumed run may do with the flag. None: the recipe, the model, the data or nothing sets the value.
PINNED = {
    FREE: """
        name None, data_dir data, test always, pretrained_dir auto, resume_path None, override False, output_dir output,
        log_dir logs, wandb None, eval_batch_size 64, gradient_accumulation_steps auto, num_steps None, num_epochs None,
        teacher None, attention_edits None, eval_every None, save_every None, keep_checkpoints 2, compile False, device auto,
        num_workers None, non_finite stop, bad_images stop, max_bad_images 0.01, rank_timeout 600, profile False,
        eval_only False, eval_train False, confusion_matrix False, image_dir None""",
    OVERRIDE: """
        exif auto, intensity_range auto, alpha auto,
        train_batch_size None, warmup_steps None, warmup_epochs None, learning_rate None, min_learning_rate 0.0,
        warmup_learning_rate 0.0, decay_type None, decay_milestones None, max_grad_norm None, label_smoothing 0.0,
        class_weights none, augmentation None, crop_scale 0.05, crop_padding 4, rotation 0.0, color_jitter 0.0, randaugment_ops 0,
        randaugment_magnitude 9, random_erasing 0.0, mixup_alpha 0.0, cutmix_alpha 0.0, mix_probability 1.0,
        mix_switch_probability 0.5, mix_off_steps 0, interpolation bilinear, eval_crop 0.0, tta none, distillation_alpha 0.5,
        distillation_temperature 1.0, attention_loss_weight 1.0, precision auto, fp16 False, fp16_opt_level O2, loss_scale 0.0,
        seed 42, exact False, path_column None, label_column None""",
    FIXED: """
        dataset None, class_order number, val_fraction 0.0, test_fraction 0.0,
        split_seed 0, recipe auto, model_type None, img_size None,
        patch_size None, hidden_size None, mlp_dim None, num_heads None, num_layers None, in_channels None, classifier None,
        sigmoid_attention None, mean None, std None,
        head None, optimizer None, momentum 0.9, head_learning_rate None, layer_decay 1.0,
        weight_decay None, decay_on all, train_layers all, freeze None, ema_decay 0.0, dropout_rate None,
        attention_dropout_rate None, drop_path_rate None, distillation none"""}
# The flags of each type: those of utils/config/types.py, text, switches, and choices (which --help lists).
TYPES = {
    "str": "path_column label_column model_type wandb freeze",
    "user_path": "data_dir image_dir pretrained_dir resume_path output_dir log_dir teacher attention_edits",
    "switch": "override fp16 compile exact profile eval_only eval_train confusion_matrix",
    "choice": """dataset class_order test recipe classifier head optimizer decay_type decay_on augmentation interpolation tta
        distillation exif alpha precision fp16_opt_level device non_finite bad_images""",
    "positive_int": """patch_size hidden_size mlp_dim num_heads num_layers train_batch_size eval_batch_size num_steps
        eval_every save_every keep_checkpoints rank_timeout""",
    "non_negative_int": "split_seed warmup_steps randaugment_ops mix_off_steps num_workers seed",
    "positive_float": "num_epochs layer_decay distillation_temperature",
    "non_negative_float": """warmup_epochs learning_rate min_learning_rate warmup_learning_rate head_learning_rate weight_decay
        max_grad_norm rotation mixup_alpha cutmix_alpha attention_loss_weight loss_scale""",
    "fraction": """val_fraction test_fraction momentum ema_decay dropout_rate attention_dropout_rate drop_path_rate
        label_smoothing color_jitter""",
    "unit_interval": """crop_scale random_erasing mix_probability mix_switch_probability distillation_alpha max_bad_images""",
    "intensity_range": "intensity_range", "auto_or_positive_int": "gradient_accumulation_steps",
    "channel_values": "mean", "channel_widths": "std", "padding": "crop_padding", "center_fraction": "eval_crop",
    "run_name": "name", "image_size": "img_size", "image_channels": "in_channels", "sigmoid_layers": "sigmoid_attention",
    "increasing_steps": "decay_milestones", "trained_layers": "train_layers", "class_weights": "class_weights",
    "magnitude": "randaugment_magnitude"}


def test_flags_and_defaults_are_those_above():
    """If a default changes, its old value becomes the row's `before`, so that checkpoints without the flag keep it."""
    expected = {line.strip().partition(" ")[0]: (line.strip().partition(" ")[2], rule)
                for rule, text in PINNED.items() for line in text.replace("\n", " ").split(",")}
    assert {row.name: (str(row.default), row.on_resume) for row in FLAGS.values()} == expected
    kinds = {kind: name for name, kind in vars(types).items() if callable(kind)} | {str: "str", None: "switch"}
    assert {row.name: "choice" if isinstance(row.type, tuple) else kinds[row.type] for row in FLAGS.values()} == {
        name: kind for kind, names in TYPES.items() for name in names.split()}


def test_rows_are_complete():
    for name, row in FLAGS.items():
        assert name == row.name and row.group and row.help and "\n" not in row.help, name
        assert row.alias_of is None or row.alias_of[0] in FLAGS, name
        assert row.hidden or row.requires is None or name == "data_dir", name
    assert SIZES == ("patch_size", "hidden_size", "mlp_dim", "num_heads", "num_layers")
    assert set(MODEL_KEYS) - set(SIZES) == {
        "in_channels", "mean", "std", "classifier", "sigmoid_attention", "dropout_rate", "attention_dropout_rate",
        "drop_path_rate"}
    changed = {"gradient_accumulation_steps": 1, "class_order": None, "exif": "off", "intensity_range": (0, 65535),
               "alpha": "white", "head": "zero"}
    assert before() == defaults() | changed and "fp16" not in defaults()
    assert all(row.before is None for row in FLAGS.values() if row.stored)
    assert {row.name for row in FLAGS.values() if row.stored} == {
        "dataset", "model_type", "img_size", "dropout_rate", "train_batch_size", "num_steps", "warmup_steps", "optimizer",
        "learning_rate", "decay_type", "weight_decay", "max_grad_norm", "augmentation", "eval_every", "save_every"}


# Other flags with which a flag that requires something has no effect. Without an entry: no other flags.
WITHOUT_EFFECT_WITH = {
    "momentum": {"optimizer": "adam"}, "layer_decay": {"train_layers": "head"}, "crop_scale": {"augmentation": "pad"},
    "mix_switch_probability": {"mixup_alpha": 1.0}, "distillation_temperature": {"distillation": "hard", "teacher": "t"}}


def test_a_flag_without_effect_is_refused():
    for name, row in FLAGS.items():
        if row.requires:
            with pytest.raises(ConfigError) as caught:
                check(WITHOUT_EFFECT_WITH.get(name, {}) | {name: other(name)})
            assert str(caught.value) == f"--{name} only has an effect with {row.requires[1]}. Add that or omit --{name}."
    assert FLAGS["crop_scale"].requires[1] == "--augmentation crop or crop_flip"
    assert FLAGS["mix_off_steps"].requires[1] == "--mixup_alpha or --cutmix_alpha"
