"""The table of flags: a new flag, another default or another rule for resumed runs is a decision, made in this file too."""

import pytest
from flag_values import other

from utils.config import FLAGS, ConfigError, check
from utils.config.flags import FIXED, FREE, MODEL_KEYS, OVERRIDE, SIZES, before, defaults

# name default, by what a resumed run may do with it. None: the recipe, the model, the data or nothing fills it.
PINNED = {
    FREE: """
        name None, data_dir data, test always, pretrained_dir auto, resume_path None, override False, output_dir output,
        log_dir logs, wandb None, eval_batch_size 64, gradient_accumulation_steps 1, num_steps None, num_epochs None,
        teacher None, attention_edits None, eval_every None, save_every None, keep_checkpoints 2, compile False, device auto,
        num_workers None, non_finite stop, bad_images stop, max_bad_images 0.01, rank_timeout 600, profile False,
        eval_only False, eval_train False, confusion_matrix False, image_dir None""",
    OVERRIDE: """
        train_batch_size None, warmup_steps None, warmup_epochs None, learning_rate None, min_learning_rate 0.0,
        warmup_learning_rate 0.0, decay_type None, decay_milestones None, max_grad_norm None, label_smoothing 0.0,
        class_weights none, augmentation None, crop_scale 0.05, crop_padding 4, rotation 0.0, color_jitter 0.0, randaugment_ops 0,
        randaugment_magnitude 9, random_erasing 0.0, mixup_alpha 0.0, cutmix_alpha 0.0, mix_probability 1.0,
        mix_switch_probability 0.5, mix_off_steps 0, interpolation bilinear, eval_crop 0.0, distillation_alpha 0.5,
        distillation_temperature 1.0, attention_loss_weight 1.0, precision auto, fp16 False, fp16_opt_level O2, loss_scale 0.0,
        seed 42, exact False, path_column None, label_column None""",
    FIXED: """
        dataset None, class_order number, val_fraction 0.0, test_fraction 0.0,
        split_seed 0, recipe auto, model_type None, img_size None,
        patch_size None, hidden_size None, mlp_dim None, num_heads None, num_layers None, in_channels None, classifier None,
        sigmoid_attention None, head None, optimizer None, momentum 0.9, head_learning_rate None, layer_decay 1.0,
        weight_decay None, decay_on all, train_layers all, freeze None, ema_decay 0.0, dropout_rate None,
        attention_dropout_rate None, drop_path_rate None, distillation none"""}


def test_the_flags_are_these():
    """A default that changes leaves its old value as the row's `before`, so that checkpoints that lack the flag keep it."""
    expected = {line.strip().partition(" ")[0]: (line.strip().partition(" ")[2], rule)
                for rule, text in PINNED.items() for line in text.replace("\n", " ").split(",")}
    assert {row.name: (str(row.default), row.on_resume) for row in FLAGS.values()} == expected


def test_rows_are_complete():
    for name, row in FLAGS.items():
        assert name == row.name and row.group and row.help and "\n" not in row.help, name
        assert row.alias_of is None or row.alias_of[0] in FLAGS, name
        assert row.hidden or row.requires is None or name == "data_dir", name
    assert SIZES == ("patch_size", "hidden_size", "mlp_dim", "num_heads", "num_layers")
    assert set(MODEL_KEYS) - set(SIZES) == {
        "in_channels", "classifier", "sigmoid_attention", "dropout_rate", "attention_dropout_rate", "drop_path_rate"}
    assert before() == defaults() | {"class_order": None} and "fp16" not in defaults()


# Flags beside which a flag that requires something has no effect; without an entry: beside none.
BESIDE = {
    "momentum": {"optimizer": "adam"}, "layer_decay": {"train_layers": "head"}, "crop_scale": {"augmentation": "pad"},
    "mix_switch_probability": {"mixup_alpha": 1.0}, "distillation_temperature": {"distillation": "hard", "teacher": "t"}}


def test_a_flag_without_effect_is_refused():
    for name, row in FLAGS.items():
        if row.requires:
            with pytest.raises(ConfigError) as caught:
                check(BESIDE.get(name, {}) | {name: other(name)})
            assert str(caught.value) == f"--{name} only has an effect with {row.requires[1]}. Add that or omit --{name}."
    assert FLAGS["crop_scale"].requires[1] == "--augmentation crop or crop_flip"
    assert FLAGS["mix_off_steps"].requires[1] == "--mixup_alpha or --cutmix_alpha"
