"""For each flag, a value other than its default, and the flags that it needs to have an effect."""

import argparse

from utils.config import FLAGS

TEXTS = ("0.25", "7", "96x64", "20,40", "last", "other")
SPECIAL = {"model_type": "ViT-S_16", "in_channels": 1, "pretrained_dir": "none", "data_dir": ".",
           "gradient_accumulation_steps": 4, "class_weights": "balanced"}
# The flags that a flag needs.
WITH = {
    "fp16_opt_level": ["--fp16"], "loss_scale": ["--fp16"], "data_dir": ["--dataset", "cifar10"],
    "path_column": ["--dataset", "csv"], "label_column": ["--dataset", "csv"], "image_dir": ["--dataset", "csv"],
    "class_order": ["--dataset", "folder", "--data_dir", "."],
    "exif": ["--dataset", "folder"], "alpha": ["--dataset", "csv"], "intensity_range": ["--dataset", "imagenet"],
    "split_seed": ["--val_fraction", "0.1"], "decay_milestones": ["--decay_type", "step"], "momentum": ["--optimizer", "sgd"],
    "decay_on": ["--weight_decay", "0.1"], "crop_scale": ["--augmentation", "crop"], "crop_padding": ["--augmentation", "pad"],
    "randaugment_magnitude": ["--randaugment_ops", "1"], "mix_probability": ["--mixup_alpha", "1"],
    "mix_off_steps": ["--cutmix_alpha", "1"], "mix_switch_probability": ["--mixup_alpha", "1", "--cutmix_alpha", "1"],
    "teacher": ["--distillation", "hard"], "distillation": ["--teacher", "t"],
    "distillation_alpha": ["--distillation", "hard", "--teacher", "t"],
    "distillation_temperature": ["--distillation", "soft", "--teacher", "t"],
    "min_learning_rate": ["--learning_rate", "0.5"],
    "attention_edits": ["--pretrained_dir", "weights.npz"],
    "attention_loss_weight": ["--attention_edits", ".", "--pretrained_dir", "weights.npz"],
    "max_bad_images": ["--bad_images", "skip"],
    "override": ["--resume_path", "."], "head": ["--pretrained_dir", "weights.npz"]}


def other(name: str, than: object = None) -> object:
    """Return a value of the flag other than `than` and than its default."""
    row = FLAGS[name]
    if name in SPECIAL:
        return SPECIAL[name]
    if row.type is None:
        return True
    if isinstance(row.type, tuple):
        taken = {than, row.default, "auto", "none", "digits", "step"}
        return next(value for value in row.type if value not in taken)
    for text in TEXTS:
        try:
            if (value := row.type(text)) not in (than, row.default):
                return value
        except (ValueError, argparse.ArgumentTypeError):
            continue
    raise AssertionError(name)


def words(name: str, value: object) -> list[str]:
    """Return the flag as it is typed."""
    if FLAGS[name].type is None:
        return [f"--{name}"]
    separator = "," if name in ("decay_milestones", "intensity_range", "mean", "std") else "x"
    return [f"--{name}", separator.join(map(str, value)) if isinstance(value, tuple) else str(value)]
