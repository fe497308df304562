"""Every architecture as one row, every recipe as one row, and the configuration of a run.

Sizes: Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929), table 1; Ti and S: Steiner et
al., "How to train your ViT?" (arXiv 2106.10270), table 2. Dropout rates are those of Google's published
configurations (google-research/vision_transformer, vit_jax/configs/models.py).

This file imports ml_collections only (and the standard library), so that a wrong flag is told in a fraction
of a second, before PyTorch is loaded.
"""

import argparse
import re
import shlex

from ml_collections import ConfigDict


class ConfigError(ValueError):
    """A setting that cannot be: one line that says what is wrong and what to do."""


# --------------------------------------------------------------------------------------------- architectures


def architecture(patch_size: int, hidden_size: int, mlp_dim: int, num_heads: int, num_layers: int, **more) -> ConfigDict:
    """One row. `more` overrides the defaults below; an unknown key is an error."""
    row = ConfigDict({
        "patch_size": patch_size,          # side of a patch, in pixels (hybrids: in cells of the ResNet's output)
        "hidden_size": hidden_size,        # D
        "mlp_dim": mlp_dim,
        "num_heads": num_heads,            # H
        "num_layers": num_layers,
        "dropout_rate": 0.0,               # after positions, attention output and both MLP layers
        "attention_dropout_rate": 0.0,     # on the attention weights
        "drop_path_rate": 0.0,             # stochastic depth of the last block; rises linearly from 0 (CaiT: all blocks alike)
        # "token": the cls token. "gap": no cls token, mean over all tokens after the last norm (Google's GSAM).
        # "patch_mean": cls token, but mean over the patch tokens, then `fc_norm` in place of the last norm (MAE).
        "classifier": "token",
        "representation_size": 0,          # width of the tanh layer `pre_logits` before the head; 0: none
        "distilled": False,                # DeiT's second token and head
        "class_layers": 0,                 # CaiT: layers of class attention after the talking-heads layers; 0: not a CaiT
        "layer_scale": 0.0,                # CaiT: initial factor of every branch
        "resnet_layers": None,             # units of each ResNet stage, () for the stem alone; None: no ResNet
        "resnet_width": 64,                # channels of the ResNet's stem
        "sigmoid_attention": "",           # layers whose attention a person may edit: "last", "all", or such as "3,7", from 1
        "gelu": "tanh",                    # Google's form; "erf" is the exact one
        "position_resize": "bilinear",     # Google's rule (corners aligned); "bicubic": DeiT's, CaiT's and MAE's (not aligned)
        "in_channels": 3,
        "img_size": 224,
        "mean": (0.5, 0.5, 0.5),           # inputs are (x / 255 - mean) / std
        "std": (0.5, 0.5, 0.5),
        "channel_mean": (),                # of the colour weights that a grey model is filled from, where it is one
        "channel_std": (),
    })
    row.lock()
    row.update(more)                       # KeyError on an unknown key: a typo is an error
    return row


# What DeiT, CaiT and MAE share, all of them Meta's: exact GELU, ImageNet's mean and standard deviation, bicubic positions.
META = {"gelu": "erf", "position_resize": "bicubic", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def cait(hidden_size: int, num_heads: int, num_layers: int, layer_scale: float, **more) -> ConfigDict:
    """A row of CaiT (arXiv 2103.17239, table 3): head width 48, MLP four times the width, two class-attention layers."""
    return architecture(16, hidden_size, 4 * hidden_size, num_heads, num_layers, class_layers=2, layer_scale=layer_scale,
                        **META, **more)


MODELS = {
    "ViT-Ti_16": architecture(16, 192, 768, 3, 12),
    "ViT-S_16": architecture(16, 384, 1536, 6, 12),
    "ViT-S_32": architecture(32, 384, 1536, 6, 12),
    "ViT-B_8": architecture(8, 768, 3072, 12, 12),
    "ViT-B_16": architecture(16, 768, 3072, 12, 12),
    "ViT-B_32": architecture(32, 768, 3072, 12, 12),
    "ViT-L_16": architecture(16, 1024, 4096, 16, 24, dropout_rate=0.1),
    "ViT-L_32": architecture(32, 1024, 4096, 16, 24),
    "ViT-H_14": architecture(14, 1280, 5120, 16, 32, dropout_rate=0.1),
    "R-ViT-Ti_16": architecture(8, 192, 768, 3, 12, resnet_layers=()),
    "R26-ViT-S_32": architecture(1, 384, 1536, 6, 12, resnet_layers=(2, 2, 2, 2)),
    "R26-ViT-B_32": architecture(1, 768, 3072, 12, 12, resnet_layers=(2, 2, 2, 2)),
    "R50-ViT-B_16": architecture(1, 768, 3072, 12, 12, resnet_layers=(3, 4, 9), dropout_rate=0.1),
    "R50-ViT-L_32": architecture(1, 1024, 4096, 16, 24, resnet_layers=(3, 4, 6, 3), dropout_rate=0.1),
    # DeiT (arXiv 2012.12877, table 1). The files at 384 px are these rows with --img_size 384.
    "DeiT-Ti_16": architecture(16, 192, 768, 3, 12, **META),
    "DeiT-S_16": architecture(16, 384, 1536, 6, 12, **META),
    "DeiT-B_16": architecture(16, 768, 3072, 12, 12, **META),
    "DeiT-Ti_16-distilled": architecture(16, 192, 768, 3, 12, distilled=True, **META),
    "DeiT-S_16-distilled": architecture(16, 384, 1536, 6, 12, distilled=True, **META),
    "DeiT-B_16-distilled": architecture(16, 768, 3072, 12, 12, distilled=True, **META),
    "CaiT-XXS24": cait(192, 4, 24, 1e-5),
    "CaiT-XXS36": cait(192, 4, 36, 1e-5),
    "CaiT-XS24": cait(288, 6, 24, 1e-5, img_size=384),
    "CaiT-S24": cait(384, 8, 24, 1e-5),
    "CaiT-S36": cait(384, 8, 36, 1e-6, img_size=384),
    "CaiT-M36": cait(768, 16, 36, 1e-6, img_size=384),
    "CaiT-M48": cait(768, 16, 48, 1e-6, img_size=448),
    # MAE's encoders (arXiv 2111.06377), as its fine-tuning uses them; --classifier token for the cls token.
    "MAE-B_16": architecture(16, 768, 3072, 12, 12, classifier="patch_mean", **META),
    "MAE-L_16": architecture(16, 1024, 4096, 16, 24, classifier="patch_mean", **META),
    "MAE-H_14": architecture(14, 1280, 5120, 16, 32, classifier="patch_mean", **META),
    # The embedded default (assets/): 8 x 8 px images, small enough for tests and for a laptop.
    "ViT-Nano_2": architecture(2, 64, 256, 4, 4, img_size=8),
}

# --------------------------------------------------------------------------------------------------- recipes

# What DeiT, CaiT and MAE share of their augmentation and loss (timm's "rand-m9-mstd0.5-inc1" is RandAugment, 2 operations
# of magnitude 9; here without its jitter of the magnitude).
META_TRAINING = {
    "optimizer": "adamw", "decay_on": "matrices", "decay_type": "cosine", "max_grad_norm": 0.0, "interpolation": "bicubic",
    "augmentation": "crop_flip", "crop_scale": 0.08, "randaugment_ops": 2, "randaugment_magnitude": 9, "eval_crop": 0.875,
    "random_erasing": 0.25, "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}

# One row a recipe: flags and their values; MODEL_ZOO.md sets them beside the source's, with command and expected result.
# A given flag wins over the row. A row without a data set or a model takes them from DEFAULTS_OF_DATASET.
RECIPES = {
    # Dosovitskiy et al., section 4.1 and appendix B.1.1, in the values that the ViT-pytorch scripts use.
    # Command and expected accuracy: MODEL_ZOO.md (CIFAR-100, ViT-B_16, 500 steps, warm-up 100: about 0.907).
    "vit-paper": {
        "optimizer": "sgd", "learning_rate": 3e-2, "weight_decay": 0.0, "train_batch_size": 512, "num_steps": 10_000,
        "warmup_steps": 500, "decay_type": "cosine", "max_grad_norm": 1.0, "augmentation": "crop_flip", "eval_every": 100},
    # The embedded default: `bash train.sh`. Expected: 94-95 % on the test block (MODEL_ZOO.md).
    "digits": {
        "optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0, "train_batch_size": 64, "num_steps": 100,
        "warmup_steps": 10, "decay_type": "cosine", "max_grad_norm": 1.0, "augmentation": "none", "eval_every": 20},
    # Kolesnikov et al. (arXiv 1912.11370), section 3.3: lengths, milestones and MixUp by the size of the data (SIZE_RULES).
    "bit-hyperrule": {
        "optimizer": "sgd", "learning_rate": 3e-3, "weight_decay": 0.0, "train_batch_size": 512, "decay_type": "step",
        "max_grad_norm": 0.0, "augmentation": "crop_flip", "crop_scale": 0.64, "eval_every": 100},
    # Steiner et al. (arXiv 2106.10270), section 3.5 and table 4, for data of CIFAR-100's size, from the recommended file.
    "augreg": {
        "optimizer": "sgd", "learning_rate": 1e-2, "weight_decay": 0.0, "train_batch_size": 512, "num_steps": 2_500,
        "warmup_steps": 200, "decay_type": "cosine", "max_grad_norm": 1.0, "augmentation": "crop_flip", "eval_every": 100,
        "dropout_rate": 0.0, "pretrained_dir": "augreg"},
    # Touvron et al. (arXiv 2012.12877), table 9: ImageNet from scratch.
    "deit": META_TRAINING | {
        "dataset": "imagenet", "model_type": "DeiT-S_16", "pretrained_dir": "none", "train_batch_size": 1024,
        "learning_rate": 1e-3, "min_learning_rate": 1e-5, "warmup_learning_rate": 1e-6, "weight_decay": 0.05,
        "num_epochs": 300.0, "warmup_epochs": 5.0, "drop_path_rate": 0.1},
    # Fine-tuning at 384 px (README of facebookresearch/deit).
    "deit-384": META_TRAINING | {
        "dataset": "imagenet", "model_type": "DeiT-B_16", "img_size": 384, "train_batch_size": 512,
        "learning_rate": 5e-6, "decay_type": "constant", "warmup_learning_rate": 1e-6, "weight_decay": 1e-8,
        "num_epochs": 30.0, "warmup_epochs": 5.0, "drop_path_rate": 0.1},
    # Touvron et al. (arXiv 2103.17239), section 5: DeiT's recipe with stochastic depth by size (VARIANTS).
    "cait": META_TRAINING | {
        "dataset": "imagenet", "model_type": "CaiT-S24", "img_size": 224, "pretrained_dir": "none", "train_batch_size": 1024,
        "learning_rate": 1e-3, "min_learning_rate": 1e-5, "warmup_learning_rate": 1e-6, "weight_decay": 0.05,
        "num_epochs": 400.0, "warmup_epochs": 5.0, "drop_path_rate": 0.1, "eval_crop": 1.0},
    # He et al. (arXiv 2111.06377), table 9: end-to-end fine-tuning; the larger encoders are in VARIANTS.
    "mae": META_TRAINING | {
        "dataset": "imagenet", "model_type": "MAE-B_16", "train_batch_size": 1024, "learning_rate": 2e-3,
        "min_learning_rate": 1e-6, "weight_decay": 0.05, "layer_decay": 0.65, "num_epochs": 100.0, "warmup_epochs": 5.0,
        "drop_path_rate": 0.1},
    # K. Salama, "Image classification with Vision Transformer" (keras.io): 72 px in patches of 6, from scratch.
    "scratch-small": {
        "dataset": "cifar100", "model_type": "ViT-Ti_16", "img_size": 72, "patch_size": 6, "hidden_size": 64, "mlp_dim": 128,
        "num_heads": 4, "num_layers": 8, "dropout_rate": 0.1, "pretrained_dir": "none", "optimizer": "adamw",
        "learning_rate": 1e-3, "weight_decay": 0.1, "train_batch_size": 256, "num_epochs": 100.0,
        "warmup_steps": 0, "decay_type": "constant", "max_grad_norm": 0.0, "attention_dropout_rate": 0.1,
        "augmentation": "crop_flip", "crop_scale": 0.64, "rotation": 7.2},
    # S. Kriventsov, "MNIST Handwritten Digit Recognition" (Towards Data Science): 28 px in patches of 7, one channel.
    "mnist-scratch": {
        "dataset": "mnist", "model_type": "ViT-Ti_16", "img_size": 28, "patch_size": 7, "hidden_size": 64, "mlp_dim": 128,
        "num_heads": 8, "num_layers": 6, "in_channels": 1, "pretrained_dir": "none", "optimizer": "adam",
        "learning_rate": 3e-3, "weight_decay": 0.0, "train_batch_size": 100, "num_epochs": 25.0,
        "warmup_steps": 0, "decay_type": "constant", "max_grad_norm": 0.0, "augmentation": "none"},
    # He et al., TransFG (arXiv 2103.07976), section 4.1: the settings of its plain ViT baseline, here for ViT-S.
    "cub-vit-s": {
        "dataset": "cub200", "model_type": "ViT-S_16", "img_size": 448, "optimizer": "sgd", "learning_rate": 3e-2,
        "weight_decay": 0.0, "train_batch_size": 64, "num_steps": 10_000, "warmup_steps": 500, "decay_type": "cosine",
        "max_grad_norm": 1.0, "augmentation": "crop_flip", "crop_scale": 0.5, "eval_crop": 0.747, "eval_every": 200},
    # Caron et al. (arXiv 2104.14294), eval_linear.py: a linear classifier on frozen features.
    "linear-probe": {
        "train_layers": "head", "optimizer": "sgd", "learning_rate": 4e-3, "weight_decay": 0.0, "train_batch_size": 1024,
        "num_epochs": 100.0, "warmup_steps": 0, "decay_type": "cosine", "max_grad_norm": 0.0, "augmentation": "crop_flip",
        "crop_scale": 0.08, "interpolation": "bicubic", "eval_crop": 0.875, "dropout_rate": 0.0},
}

# What a recipe says of one model otherwise.
VARIANTS = {
    ("mae", "MAE-L_16"): {"layer_decay": 0.75, "learning_rate": 4e-3, "num_epochs": 50.0, "drop_path_rate": 0.2},
    ("mae", "MAE-H_14"): {"layer_decay": 0.75, "learning_rate": 4e-3, "num_epochs": 50.0, "drop_path_rate": 0.3},
    ("cait", "CaiT-XXS24"): {"drop_path_rate": 0.05},
    ("cait", "CaiT-XXS36"): {"drop_path_rate": 0.1},
    ("cait", "CaiT-XS24"): {"drop_path_rate": 0.05},
    ("cait", "CaiT-S36"): {"drop_path_rate": 0.2},
    ("cait", "CaiT-M36"): {"drop_path_rate": 0.3},
    ("cait", "CaiT-M48"): {"drop_path_rate": 0.4},
}

# What a recipe says by the number of training images: (below this many, values), from small to large. The lengths scale
# with a given --num_steps.
SIZE_RULES = {
    "bit-hyperrule": (
        (20_000, {"num_steps": 500, "warmup_steps": 100, "decay_milestones": (200, 300, 400)}),
        (500_000, {"num_steps": 10_000, "warmup_steps": 500, "decay_milestones": (3_000, 6_000, 9_000), "mixup_alpha": 0.1}),
        (float("inf"), {"num_steps": 20_000, "warmup_steps": 500, "decay_milestones": (6_000, 12_000, 18_000),
                        "mixup_alpha": 0.1})),
}

# Which row a data set starts from, and which model; every other data set takes the first of each.
DEFAULTS_OF_DATASET = {
    None: {"recipe": "vit-paper", "model_type": "ViT-B_16"},
    "digits": {"recipe": "digits", "model_type": "ViT-Nano_2"},
}
# What PRETRAINED_DIR=auto means: the embedded file; for sizes that Google published in the AugReg paper alone, the
# file that its README recommends; for DeiT, CaiT and MAE their own; for all others the ImageNet-21k file of the model's name.
DEFAULT_WEIGHTS = {
    "ViT-Nano_2": "assets/ViT-Nano_2-letters.npz",
    "ViT-Ti_16": "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
    "ViT-S_16": "augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0",
    "ViT-S_32": "augreg/S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0",
    "R-ViT-Ti_16": "augreg/R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
    "R26-ViT-S_32": "augreg/R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0",
    "DeiT-Ti_16": "deit/deit_tiny_patch16_224-a1311bcf",
    "DeiT-S_16": "deit/deit_small_patch16_224-cd65a155",
    "DeiT-B_16": "deit/deit_base_patch16_224-b5f2ef4d",
    "DeiT-Ti_16-distilled": "deit/deit_tiny_distilled_patch16_224-b40b3cf7",
    "DeiT-S_16-distilled": "deit/deit_small_distilled_patch16_224-649709d9",
    "DeiT-B_16-distilled": "deit/deit_base_distilled_patch16_224-df68dfff",
    "CaiT-XXS24": "cait/XXS24_224",
    "CaiT-XXS36": "cait/XXS36_224",
    "CaiT-XS24": "cait/XS24_384",
    "CaiT-S24": "cait/S24_224",
    "CaiT-S36": "cait/S36_384",
    "CaiT-M36": "cait/M36_384",
    "CaiT-M48": "cait/M48_448",
    "MAE-B_16": "mae/mae_pretrain_vit_base",
    "MAE-L_16": "mae/mae_pretrain_vit_large",
    "MAE-H_14": "mae/mae_pretrain_vit_huge",
}

# Google's names of the sizes in the AugReg paper.
AUGREG_SIZES = ("Ti_16", "S_32", "S_16", "B_32", "B_16", "B_8", "L_16", "R_Ti_16", "R26_S_32", "R50_L_32")

# ------------------------------------------------------------------------------------------------ a run's flags


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None


def positive(text: str) -> int:
    if whole(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return whole(text)


def not_negative(text: str) -> int:
    if not 0 <= whole(text) < 2 ** 63:
        raise argparse.ArgumentTypeError(f"must be 0 or more (and below 2 ** 63), not {text}")
    return whole(text)


def not_negative_number(text: str) -> float:
    if not 0 <= float(text) < 1e30:
        raise argparse.ArgumentTypeError(f"must be 0 or more, finite and below 1e30, not {text}")
    return float(text)


def positive_number(text: str) -> float:
    if not 0 < float(text) < 1e30:
        raise argparse.ArgumentTypeError(f"must be more than 0, finite and below 1e30, not {text}")
    return float(text)


def fraction(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, not {text}")
    return float(text)


def share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return float(text)


def magnitude(text: str) -> int:
    if not 0 <= whole(text) <= 10:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 10, not {text}")
    return whole(text)


def image_size(text: str) -> int | tuple[int, int]:
    """'224' or, for a non-square image, '224x160' (height x width)."""
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})?", text):
        raise argparse.ArgumentTypeError(f"must be a side in pixels (224) or height x width (224x160), not {text!r}")
    sides = tuple(int(side) for side in text.split("x"))
    return sides[0] if len(sides) == 1 or sides[0] == sides[1] else sides


def run_name(text: str) -> str:
    """A folder name, so that it can neither leave the output folder nor hide in it."""
    if not re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*", text):
        raise argparse.ArgumentTypeError(f"may hold letters, digits and . _ + - only, not {text!r}")
    return text


def steps_list(text: str) -> tuple[int, ...]:
    """'200,300,400': steps, each more than the one before."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"must be steps such as 200,300,400, not {text!r}")
    steps = tuple(int(step) for step in text.split(","))
    if list(steps) != sorted(set(steps)):
        raise argparse.ArgumentTypeError(f"must rise, not {text}")
    return steps


def layers(text: str) -> str:
    """'all', 'head', or how many of the last blocks."""
    if not re.fullmatch(r"all|head|[1-9]\d{0,3}", text):
        raise argparse.ArgumentTypeError(f"must be all, head, or a number of blocks, not {text!r}")
    return text


def sigmoid_layers(text: str) -> str:
    """'last', 'all', or layers counted from 1: '3,7'."""
    if not re.fullmatch(r"all|last|[1-9]\d{0,3}(,[1-9]\d{0,3})*", text):
        raise argparse.ArgumentTypeError(f"must be last, all, or layers counted from 1 such as 3,7, not {text!r}")
    return text


def weights_of_classes(text: str) -> str:
    """'none', 'balanced', or a number for each class: '1,2.5,1'."""
    if text in ("none", "balanced"):
        return text
    try:
        numbers = [not_negative_number(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not any(numbers):
        raise argparse.ArgumentTypeError(f"must be none, balanced, or a number for each class such as 1,2.5,1, not {text!r}")
    return text


DATASETS = ("digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "imagenet", "cub200", "flowers102", "oxford_pets",
            "folder", "csv")

# name: (type, or a tuple of choices), default, help. The recipe's values go over these defaults, and what is given over
# both. A default of None is filled by the recipe, the model row or the data set (see `resolve` and `set_lengths`), so that
# the resolved value is what is printed and saved.
FLAGS = {
    "name": (run_name, None, "name of the run; its folder is OUTPUT_DIR/NAME (default: the data set's name, numbered)"),
    "dataset": (DATASETS, None, "what to train on (default: the recipe's, else the embedded digits)"),
    "data_dir": (str, "data", "where the data set lies, or is downloaded to"),
    "val_fraction": (fraction, 0.0, "share of each class of train that is held out to choose on, so that test stays untouched"),
    "test_fraction": (fraction, 0.0, "draw a new test set: this share of each class of all images (0: the published split)"),
    "split_seed": (not_negative, 0, "fixes what --val_fraction and --test_fraction draw"),
    "test": (("always", "once", "never"), "always", "evaluate on test before, after (and, where no other split is there to "
             "choose on, while) training; at the end alone; or not at all"),
    "recipe": (("auto", *RECIPES), "auto", "row of configs.py that fills what is not given"),
    # the model
    "model_type": (str, None, "architecture: a row of configs.py"),
    "img_size": (image_size, None, "side in pixels, or height x width such as 224x160 (default: the model's)"),
    "patch_size": (positive, None, "side of a patch; this and the next four make a size of your own"),
    "hidden_size": (positive, None, "width of the model"),
    "mlp_dim": (positive, None, "width of the MLP"),
    "num_heads": (positive, None, "attention heads"),
    "num_layers": (positive, None, "encoder blocks"),
    "in_channels": (positive, None, "1: grey images (published weights are summed over their channels); 3: colour (default)"),
    "classifier": (("token", "gap", "patch_mean"), None, "what the head reads: the cls token, the mean over all tokens (no cls "
                   "token), or the mean over the patches, as MAE (default: the model's)"),
    "sigmoid_attention": (sigmoid_layers, None, "attention that a person may edit, in the last layer, in all, or in some counted "
                          "from 1 (3,7); without edits it is the same as before"),
    "pretrained_dir": (str, "auto", "checkpoint file of any format, run folder, or published name (imagenet21k/ViT-B_16, "
                       "augreg/S_16); none; augreg: the model's recommended AugReg file; auto: the model's own"),
    "head": (("zero", "keep"), None, "begin with a head of zeros, or with the file's, of the same classes (default: zero; keep "
             "for --attention_edits and --eval_only)"),
    "resume_path": (str, None, "run folder or checkpoint file to go on from; wins over --pretrained_dir; auto: OUTPUT_DIR/NAME "
                    "if it holds a run, else a new run there"),
    "override": (None, False, "let a resumed run change what decides its course: learning rate, batch, seed, ..., or its data"),
    "output_dir": (str, "output", "parent of the run folders"),
    "log_dir": (str, "logs", "parent of the TensorBoard folders"),
    "wandb": (str, None, "log to this project of Weights & Biases too; the key comes from WANDB_API_KEY"),
    # the length
    "train_batch_size": (positive, None, "images of an optimizer step, over all processes and micro-steps"),
    "eval_batch_size": (positive, 64, "images of an evaluation batch, per process"),
    "gradient_accumulation_steps": (positive, 1, "micro-steps that a process's share of the batch is cut into"),
    "num_steps": (positive, None, "optimizer steps in all"),
    "num_epochs": (positive_number, None, "instead of --num_steps: passes over the training images"),
    "warmup_steps": (not_negative, None, "steps of warm-up"),
    "warmup_epochs": (not_negative_number, None, "instead of --warmup_steps"),
    # the optimizer
    "optimizer": (("sgd", "adamw", "adam", "lamb"), None, "SGD with momentum; AdamW; Adam; LAMB, where timm is installed"),
    "momentum": (fraction, 0.9, "of SGD"),
    "learning_rate": (not_negative_number, None, "peak learning rate"),
    "min_learning_rate": (not_negative_number, 0.0, "where the decay ends"),
    "warmup_learning_rate": (not_negative_number, 0.0, "where the warm-up begins"),
    "head_learning_rate": (not_negative_number, None, "peak learning rate of the head (default: as the rest)"),
    "layer_decay": (positive_number, 1.0, "learning rate of a block as a share of the next block's"),
    "decay_type": (("cosine", "linear", "step", "constant"), None,
                   "decay after the warm-up; step: a tenth at each of --decay_milestones"),
    "decay_milestones": (steps_list, None, "steps such as 200,300,400, for --decay_type step"),
    "weight_decay": (not_negative_number, None, "weight decay (as the optimizer understands it)"),
    "decay_on": (("all", "matrices"), "all", "what weight decay acts on; matrices: no biases, norms, tokens, positions"),
    "max_grad_norm": (not_negative_number, None, "clip the global gradient norm to this; 0: no clipping"),
    "train_layers": (layers, "all", "all; head: a linear probe; 2: the last 2 blocks and what follows them"),
    "freeze": (str, None, "patterns of parameter names to leave as they are, such as 'patch_embed.*,pos_embed'"),
    "ema_decay": (fraction, 0.0, "average the weights and evaluate the average; the decay rises to this, as (1 + n) / (10 + n) "
                  "at update n; 0: off"),
    # regularisation
    "dropout_rate": (fraction, None, "dropout (default: the model's)"),
    "attention_dropout_rate": (fraction, None, "dropout on attention weights (default: the model's)"),
    "drop_path_rate": (fraction, None, "stochastic depth of the last block (default: the model's)"),
    "label_smoothing": (fraction, 0.0, "share of the target spread over all classes"),
    "class_weights": (weights_of_classes, "none", "none; balanced: by one over the class's frequency; or 1,2.5,1 by label"),
    "augmentation": (("crop_flip", "crop", "pad_flip", "pad", "none"), None,
                     "random resized crop and flip (no flip for digits); crop alone; padding and a random crop, with or "
                     "without a flip; or a plain resize"),
    "crop_scale": (share, 0.05, "smallest share of the image's area that a random resized crop keeps"),
    "crop_padding": (positive, 4, "pixels of padding for --augmentation pad and pad_flip"),
    "rotation": (not_negative_number, 0.0, "random rotation by up to so many degrees"),
    "color_jitter": (fraction, 0.0, "random brightness, contrast and saturation, by up to this share"),
    "randaugment_ops": (not_negative, 0, "RandAugment: operations an image; 0: off"),
    "randaugment_magnitude": (magnitude, 9, "RandAugment: their strength, 0 to 10"),
    "random_erasing": (share, 0.0, "probability of erasing a rectangle of an image"),
    "mixup_alpha": (not_negative_number, 0.0, "MixUp: parameter of its Beta distribution; 0: off"),
    "cutmix_alpha": (not_negative_number, 0.0, "CutMix: parameter of its Beta distribution; 0: off"),
    "mix_probability": (share, 1.0, "share of the image pairs that are mixed"),
    "mix_switch_probability": (share, 0.5, "share of them that CutMix mixes, where both are on"),
    "mix_off_steps": (not_negative, 0, "steps without mixing at the end"),
    "interpolation": (("bilinear", "bicubic"), "bilinear", "how images are resized"),
    "eval_crop": (share, 0.0, "evaluate on the middle of the image, this share of its side; 0: on the whole image"),
    # distillation
    "distillation": (("none", "hard", "soft"), "none", "learn from a teacher: its prediction, or its probabilities"),
    "teacher": (str, None, "run folder or checkpoint of this project"),
    "distillation_alpha": (share, 0.5, "share of the teacher in the loss"),
    "distillation_temperature": (positive_number, 1.0, "softens both sides of --distillation soft"),
    # attention that people have edited
    "attention_edits": (str, None, "folder of edits made with annotate.py, which the attention of the sigmoid layers learns"),
    "attention_loss_weight": (not_negative_number, 1.0, "times the mean square of sigmoid attention - edit, added to the loss"),
    # the run
    "eval_every": (positive, None, "steps between evaluations (default: the recipe's; else an epoch, or a tenth of "
                   "--num_steps where that is given)"),
    "save_every": (positive, None, "steps between checkpoints (default: --eval_every)"),
    "keep_checkpoints": (positive, 2, "how many step checkpoints to keep, besides best.pt"),
    "precision": (("auto", "fp32", "bf16", "fp16"), "auto", "auto: bf16 where the processor multiplies it natively"),
    "fp16": (None, False, "the same as --precision fp16"),
    "fp16_opt_level": (("O0", "O1", "O2", "O3"), "O2", "O0 fp32; O1 autocast; O2 and float16 gradient traffic; O3 all fp16"),
    "loss_scale": (not_negative_number, 0.0, "fixed loss scale for fp16 O1 and O2; 0: dynamic"),
    "float32_matmul": (("highest", "high", "medium"), "highest", "what float32 products may round to inside, with --precision "
                       "fp32: nothing; TF32 (GPUs); or bfloat16 (CPUs with AMX or AVX512-BF16)"),
    "compile": (None, False, "torch.compile the model: a minute or so at the start, faster steps from then on"),
    "device": (("auto", "cpu", "cuda"), "auto", "auto: a GPU where there is one"),
    "num_workers": (not_negative, None, "loader processes per rank (default: none for images held in memory; else on a CPU a "
                    "quarter of the cores, up to 4, on a GPU all but one, up to 16)"),
    "seed": (not_negative, 42, "fixes initialisation, order, augmentation and dropout"),
    "exact": (None, False, "sum gradients in a fixed order: the same bits on any number of processes; slower"),
    "non_finite": (("stop", "skip"), "stop", "what a loss or gradient that is NaN or infinite does: end the run, or skip the "
                   "update (ten in a row end it)"),
    "bad_images": (("stop", "skip"), "stop", "what an unreadable training image does: end the run, or be replaced by the next "
                   "one and listed in bad_images.txt"),
    "max_bad_images": (share, 0.01, "the run ends when a larger share of the training images had to be replaced"),
    "rank_timeout": (positive, 600, "seconds that processes wait for one that does not answer before the run ends"),
    "worker_timeout": (not_negative, 300, "seconds to wait for a loader process before it is started anew; 0: for ever"),
    "check_data": (None, False, "read every image of the data set, report what is wrong with it, and stop"),
    "profile": (None, False, "write a trace of a few steps for Perfetto, and which operators take their time"),
    "prepare": (str, None, "decode all images once, into this folder, which then serves as --data_dir; and stop"),
    "prepare_size": (positive, 256, "shorter side of what --prepare stores, in pixels"),
    "eval_only": (None, False, "evaluate --resume_path (or the pre-trained model with its own head) and stop"),
    "eval_train": (None, False, "at the end, evaluate on the training images too, without augmentation"),
    "confusion_matrix": (None, False, "with the last evaluation, write confusion.csv and per_class.csv"),
}

SIZES = ("patch_size", "hidden_size", "mlp_dim", "num_heads", "num_layers")
# Flags that override a key of the model's row.
MODEL_KEYS = (*SIZES, "in_channels", "classifier", "sigmoid_attention", "dropout_rate", "attention_dropout_rate",
              "drop_path_rate")

# What a resumed run may change; everything else must stay as the checkpoint has it. `pretrained_dir` is
# accepted because the scripts have always let RESUME_PATH win over it: it has no effect. A teacher or edits may have moved.
MAY_CHANGE_ON_RESUME = {
    "name", "data_dir", "pretrained_dir", "resume_path", "output_dir", "log_dir", "wandb", "eval_batch_size",
    "gradient_accumulation_steps", "num_steps", "num_epochs", "eval_every", "save_every", "keep_checkpoints", "device",
    "num_workers", "eval_only", "eval_train", "confusion_matrix", "teacher", "test", "attention_edits", "override", "non_finite",
    "compile", "profile",
    "bad_images", "max_bad_images", "rank_timeout", "worker_timeout"}
# What it may change with --override: what is read anew at every start and is in no state of model or optimizer.
MAY_OVERRIDE = {
    "train_batch_size", "learning_rate", "min_learning_rate", "warmup_learning_rate", "decay_type", "decay_milestones",
    "warmup_steps", "warmup_epochs", "max_grad_norm", "label_smoothing", "class_weights", "augmentation", "crop_scale",
    "crop_padding", "rotation", "color_jitter", "randaugment_ops", "randaugment_magnitude", "random_erasing", "mixup_alpha",
    "cutmix_alpha", "mix_probability", "mix_switch_probability", "mix_off_steps", "interpolation", "eval_crop",
    "distillation_alpha", "distillation_temperature", "attention_loss_weight", "precision", "fp16", "fp16_opt_level",
    "loss_scale", "float32_matmul", "exact", "seed"}

# Flags that act only where another one is set: (the flags, whether that holds for the run, what to set). Given
# without it, they are refused, for they would change nothing.
ACTS_WITH = (
    (("split_seed",), lambda run: run["val_fraction"] or run["test_fraction"], "--val_fraction or --test_fraction"),
    (("decay_milestones",), lambda run: run["decay_type"] == "step", "--decay_type step"),
    (("momentum",), lambda run: run["optimizer"] == "sgd", "--optimizer sgd"),
    (("decay_on",), lambda run: run["weight_decay"], "--weight_decay"),
    (("layer_decay",), lambda run: run["train_layers"] != "head", "--train_layers all or a number"),
    (("crop_scale",), lambda run: run["augmentation"] in ("crop", "crop_flip"), "--augmentation crop or crop_flip"),
    (("crop_padding",), lambda run: run["augmentation"] in ("pad", "pad_flip"), "--augmentation pad or pad_flip"),
    (("randaugment_magnitude",), lambda run: run["randaugment_ops"], "--randaugment_ops"),
    (("mix_probability", "mix_off_steps"),
     lambda run: run["mixup_alpha"] or run["cutmix_alpha"] or run["recipe"] in SIZE_RULES, "--mixup_alpha or --cutmix_alpha"),
    (("mix_switch_probability",), lambda run: run["mixup_alpha"] and run["cutmix_alpha"], "--mixup_alpha and --cutmix_alpha"),
    (("teacher", "distillation_alpha"), lambda run: run["distillation"] != "none", "--distillation hard or soft"),
    (("distillation_temperature",), lambda run: run["distillation"] == "soft", "--distillation soft"),
    (("attention_loss_weight",), lambda run: run["attention_edits"], "--attention_edits"),
    (("override",), lambda run: run["resume_path"], "--resume_path"),
    (("max_bad_images",), lambda run: run["bad_images"] == "skip", "--bad_images skip"),
    (("fp16_opt_level",), lambda run: run["precision"] == "fp16", "--fp16 (PRECISION=fp16 for train.sh)"),
    (("prepare_size",), lambda run: run["prepare"], "--prepare"),
    (("float32_matmul",), lambda run: run["precision"] == "fp32", "--precision fp32"),
)
# All that acts with --prepare.
PREPARING = ("prepare", "prepare_size", "dataset", "recipe", "data_dir", "num_workers", "bad_images", "max_bad_images")
# Knobs that do nothing at their default: left out where the settings are printed.
QUIET = {name for flags, _, _ in ACTS_WITH for name in flags} | {
    "val_fraction", "test_fraction", "test", "min_learning_rate", "warmup_learning_rate", "layer_decay", "train_layers",
    "ema_decay", "label_smoothing", "class_weights", "rotation", "color_jitter", "randaugment_ops", "random_erasing",
    "mixup_alpha", "cutmix_alpha", "interpolation", "eval_crop", "distillation", "loss_scale", "non_finite", "bad_images",
    "rank_timeout", "worker_timeout"}

# Spellings of older scripts that no longer mean anything, and what to do instead.
RETIRED = {
    "--local_rank": "torchrun sets the rank in the environment; leave it out",
    "--local-rank": "torchrun sets the rank in the environment; leave it out",
    "--gpu": "choose devices with GPUS=0,1 bash train.sh (or CUDA_VISIBLE_DEVICES)",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ConfigError(f"{message} (python train.py --help lists the flags)")


def parse(argv: list[str]) -> dict:
    """The flags that were given, by name; nothing is filled in. Raises ConfigError."""
    for word in argv:
        if word.split("=")[0] in RETIRED:
            raise ConfigError(f"{word.split('=')[0]} is not used any more: {RETIRED[word.split('=')[0]]}")
    parser = _Parser(
        prog="train.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Fine-tune a Vision Transformer. bash train.sh starts it on every GPU.")
    for name, (kind, default, text) in FLAGS.items():
        shown = text if default in (None, False) else f"{text} (default: {default})"
        if kind is None:
            parser.add_argument(f"--{name}", action="store_true", help=shown)
        elif isinstance(kind, tuple):
            parser.add_argument(f"--{name}", choices=kind, help=shown)
        else:
            parser.add_argument(f"--{name}", type=kind, metavar=kind.__name__.upper(), help=shown)
    return vars(parser.parse_args(argv))


# ------------------------------------------------------------------------------------------- the resolved run


def resolve(given: dict) -> ConfigDict:
    """Fills the flags that were not given from the recipe, the model row and the defaults; checks the whole.

    num_steps, warmup_steps and eval_every stay None where they depend on the number of training images: `set_lengths`.
    Raises ConfigError for a setting that does not exist or does not fit the others.
    """
    for name in given:
        if name not in FLAGS:
            raise ConfigError(f"no setting is called {name!r}")
    run = {name: default for name, (_, default, _) in FLAGS.items()} | _recipe(given) | given
    for floor in ("min_learning_rate", "warmup_learning_rate"):      # the recipe's is meant for its own learning rate
        if floor not in given and "learning_rate" in given:
            run[floor] = min(run[floor], run["learning_rate"])
    if run["dataset"] == "digits" and "data_dir" in given:
        raise ConfigError(f"--data_dir {run['data_dir']} is not used by the embedded digits: "
                          "give --dataset (DATASET=folder for images of your own)")
    _fill_from_model(run, given)
    if run["eval_only"] and run["pretrained_dir"] == "none":
        raise ConfigError("--eval_only needs something to evaluate: give --resume_path, or a --pretrained_dir with a head")
    if run["head"] is None:
        run["head"] = "keep" if run["eval_only"] or run["attention_edits"] else "zero"
    if run["head"] == "zero" and run["eval_only"]:
        raise ConfigError("--head zero and --eval_only contradict each other: a head of zeros predicts nothing")
    if run["head"] == "keep" and run["pretrained_dir"] == "none":
        needing = "--head keep" if "head" in given else "--attention_edits"
        raise ConfigError(f"{needing} needs a --pretrained_dir with a head: the run folder output/NAME of a run on these data")
    _resolve_precision(run, given)
    _check_together(run, given)
    for one, other in (("num_steps", "num_epochs"), ("warmup_steps", "warmup_epochs")):
        if one in given and other in given:
            raise ConfigError(f"--{one} and --{other} contradict each other: give one")
    run = ConfigDict(run)
    if run.num_epochs is None and run.warmup_epochs is None and run.recipe not in SIZE_RULES:
        set_lengths(run, given, None)
    run.lock()
    return run


def _recipe(given: dict) -> dict:
    """The values of the run's recipe, and its name, data set and model."""
    name = given.get("recipe", "auto")
    dataset = given.get("dataset") or RECIPES.get(name, {}).get("dataset", "digits")
    of_dataset = DEFAULTS_OF_DATASET.get(dataset, DEFAULTS_OF_DATASET[None])
    if name == "auto":
        name = of_dataset["recipe"]
    row = RECIPES[name]
    model_type = given.get("model_type") or row.get("model_type") or of_dataset["model_type"]
    if model_type not in MODELS:
        raise ConfigError(f"--model_type {model_type}: no such model; there are {', '.join(MODELS)}")
    row = row | VARIANTS.get((name, model_type), {})
    if set(SIZES) & set(row) and row["model_type"] != model_type:     # the recipe's dimensions are those of its own model
        row = {key: value for key, value in row.items() if key not in (*SIZES, "img_size")}
    for steps, epochs in (("num_steps", "num_epochs"), ("warmup_steps", "warmup_epochs")):
        if steps in given or epochs in given:                    # one way of saying it takes the other's place
            row = {key: value for key, value in row.items() if key not in (steps, epochs)}
    if "num_steps" in given and "warmup_epochs" in row:
        row = row | {"warmup_steps": given["num_steps"], "warmup_epochs": None}      # `set_lengths` takes a tenth of it
    return row | {"recipe": name, "dataset": dataset, "model_type": model_type}


def _fill_from_model(run: dict, given: dict) -> None:
    model = MODELS[run["model_type"]]
    if run["in_channels"] not in (None, 1, 3):
        raise ConfigError(f"--in_channels {run['in_channels']}: images have 1 channel (grey) or 3 (colour)")
    if "pretrained_dir" not in given and any(run[key] not in (None, model[key]) for key in SIZES):
        run["pretrained_dir"] = "none"                           # nobody has published weights of this size
    if run["pretrained_dir"] == "augreg":
        size = run["model_type"].removeprefix("ViT-").replace("-ViT-", "_")
        if size not in AUGREG_SIZES:
            raise ConfigError(f"--model_type {run['model_type']}: AugReg has no such size; it has {', '.join(AUGREG_SIZES)}")
        run["pretrained_dir"] = f"augreg/{size}"
    for key in ("img_size", "dropout_rate"):
        if run[key] is None:
            run[key] = model[key]


def model_overrides(run: ConfigDict) -> dict:
    """The keys of the model's row that the run sets otherwise."""
    return {key: run[key] for key in MODEL_KEYS if run[key] is not None}


def _check_together(run: dict, given: dict) -> None:
    for names, holds, needed in ACTS_WITH:
        for name in names:
            if name in given and not holds(run):
                raise ConfigError(f"--{name} acts with {needed} alone: add that, or leave --{name} out")
    if run["decay_type"] == "step" and not run["decay_milestones"] and run["recipe"] not in SIZE_RULES:
        raise ConfigError("--decay_type step needs --decay_milestones, such as 200,300,400")
    if run["distillation"] != "none" and run["teacher"] is None:
        raise ConfigError(f"--distillation {run['distillation']} needs a --teacher: a run folder or checkpoint of this project")
    _check_session(run)
    if run["check_data"] and run["prepare"]:
        raise ConfigError("--check_data and --prepare each do one thing and stop: give one")
    for name in given if run["prepare"] else ():
        if name not in PREPARING:
            raise ConfigError(f"--prepare stores every image of every split whole, and --{name} has no part in that: leave it "
                              "out, or give it when you train on them")
    if run["attention_edits"] and run["eval_only"]:
        raise ConfigError("--attention_edits teaches, and --eval_only trains nothing: leave one out")
    _check_edits(run)
    if run["head_learning_rate"] and not run["learning_rate"]:
        raise ConfigError("--head_learning_rate is a multiple of --learning_rate inside, which is 0: to train the head alone, "
                          "take --train_layers head")
    if run["ema_decay"] and run["precision"] == "fp16" and run["fp16_opt_level"] == "O3":
        raise ConfigError("--ema_decay with --fp16_opt_level O3: float16 is too coarse for an average; take O1 or O2")
    if run["min_learning_rate"] > run["learning_rate"]:
        raise ConfigError(f"--min_learning_rate {run['min_learning_rate']} is more than --learning_rate {run['learning_rate']}")


def _check_session(run) -> None:
    """What a resumed run is asked for anew"""
    if run["profile"] and run["eval_only"]:
        raise ConfigError("--profile is of training steps, and --eval_only makes none: leave one out")
    if run["attention_edits"] and run["compile"] and not run["eval_only"]:
        raise ConfigError("--attention_edits and --compile contradict each other: edits listen to the model's attention, which a "
                          "compiled one hides; leave --compile out")


def _check_edits(run) -> None:
    if run["attention_edits"] and (run["randaugment_ops"] or run["mixup_alpha"] or run["cutmix_alpha"]):
        raise ConfigError("--attention_edits cannot follow RandAugment, MixUp or CutMix: set --randaugment_ops, --mixup_alpha "
                          "and --cutmix_alpha to 0")


def set_lengths(run: ConfigDict, given: dict, train_images: int | None) -> str:
    """Turns epochs, and recipes that go by the size of the data, into steps, in place. -> what was computed, for the log.

    train_images None: nothing of the run depends on it. Raises ConfigError for a warm-up longer than the run.
    """
    said, ratio = "", 1.0
    if run.recipe in SIZE_RULES:
        rule = next(values for below, values in SIZE_RULES[run.recipe] if train_images < below)
        if run.num_epochs is not None:
            run.num_steps = _steps(run.num_epochs, train_images, run)
        ratio = (run.num_steps or rule["num_steps"]) / rule["num_steps"]
        for name, value in rule.items():
            if name == "decay_milestones" and run.decay_type != "step":
                continue
            if name not in given and (name != "num_steps" or run.num_steps is None):
                if name == "decay_milestones":
                    value = tuple(dict.fromkeys(max(1, round(step * ratio)) for step in value))
                run[name] = value
        if "warmup_steps" not in given:
            run.warmup_steps = round(rule["warmup_steps"] * ratio)
        said = f"{run.recipe}: {run.num_steps} steps for {train_images} images"
    elif run.num_epochs is not None:
        run.num_steps = _steps(run.num_epochs, train_images, run)
        said = f"{run.num_epochs:g} epochs of {train_images} images = {run.num_steps} steps of {run.train_batch_size}"
    if run.warmup_epochs is not None:
        run.warmup_steps = _steps(run.warmup_epochs, train_images, run) if run.warmup_epochs else 0
    if not {"warmup_steps", "warmup_epochs"} & set(given):
        if run.recipe not in SIZE_RULES and {"num_steps", "num_epochs"} & set(given):
            run.warmup_steps = min(run.warmup_steps, run.num_steps // 10)   # the recipe's is meant for its own length
    elif run.warmup_steps > run.num_steps:
        raise ConfigError(f"--warmup_steps {run.warmup_steps} is more than --num_steps {run.num_steps}")
    if run.eval_every is None:
        run.eval_every = _steps(1, train_images, run) if train_images else max(1, run.num_steps // 10)
    if run.save_every is None:
        run.save_every = run.eval_every
    run.num_epochs = run.warmup_epochs = None                               # from here on the steps say it
    _check_edits(run)                                                        # a recipe may mix by the size of the data
    return said


def _steps(epochs: float, images: int, run: ConfigDict) -> int:
    return max(1, round(epochs * images / run.train_batch_size))


def _resolve_precision(run: dict, given: dict) -> None:
    if run["fp16"]:
        if given.get("precision", "fp16") != "fp16":
            raise ConfigError(f"--fp16 and --precision {run['precision']} contradict each other: give one")
        run["precision"] = "fp16"
    if run["loss_scale"] and (run["precision"] != "fp16" or run["fp16_opt_level"] in ("O0", "O3")):
        raise ConfigError("--loss_scale acts with fp16 at O1 or O2 alone: the other modes do not scale the loss")


def resolve_resumed(given: dict, saved: dict, train_images: int) -> ConfigDict:
    """The configuration of a run that goes on: the checkpoint's, with the flags of MAY_CHANGE_ON_RESUME on top.

    Raises ConfigError where a given flag would make it another run.
    """
    # `--fp16` is one spelling of the precision, so compare what it says. A flag younger than the checkpoint had its default.
    asked, saved = dict(given), {name: default for name, (_, default, _) in FLAGS.items()} | saved
    for epochs, steps in (("num_epochs", "num_steps"), ("warmup_epochs", "warmup_steps")):
        if epochs in asked:
            if steps in asked:
                raise ConfigError(f"--{steps} and --{epochs} contradict each other: give one")
            given_epochs = asked.pop(epochs)
            asked[steps] = max(1, round(given_epochs * train_images / saved["train_batch_size"])) if given_epochs else 0
    if asked.get("recipe") == "auto":
        del asked["recipe"]
    if asked.get("teacher") and saved["distillation"] == "none":
        raise ConfigError("--teacher: the checkpoint's run has none, and a resumed run keeps it so; leave --teacher out")
    if asked.get("attention_edits") and not saved["attention_edits"]:
        raise ConfigError("--attention_edits: the checkpoint's run has none, and a resumed run keeps it so; start a new run with "
                          "--pretrained_dir in place of --resume_path")
    if asked.pop("fp16", False) and asked.setdefault("precision", "fp16") != "fp16":
        raise ConfigError(f"--fp16 and --precision {asked['precision']} contradict each other: give one")
    if asked.get("precision") == "auto":
        del asked["precision"]         # whatever it chose then holds: another processor must not change the run
    for name, value in asked.items():
        before = saved[name]
        if before is None and name in MODEL_KEYS:
            before = MODELS[saved["model_type"]][name]         # what held, though nobody had given it
        allowed = MAY_CHANGE_ON_RESUME | (MAY_OVERRIDE if given.get("override") else set())
        if name not in allowed and _plain(value) != _plain(before):
            or_else = ", add --override" if name in MAY_OVERRIDE else ""
            raise ConfigError(
                f"--{name} {_plain(value)}: the checkpoint was made with {_plain(before)}, and a resumed run keeps it; "
                f"leave --{name} out{or_else}, or start a new run without --resume_path")
    # What was allowed once is not allowed for ever.
    session = {name: bool(given.get(name)) for name in ("override", "compile", "profile")}
    run = ConfigDict(saved | asked | session)
    _check_session(run)
    if run.num_steps < run.warmup_steps:
        raise ConfigError(f"--num_steps {run.num_steps} is less than the run's {run.warmup_steps} warm-up steps")
    if given.get("override"):
        run.fp16 = run.fp16 and run.precision == "fp16"
        for name in ("loss_scale", "fp16_opt_level") if run.precision != "fp16" else ():
            run[name] = asked.get(name, FLAGS[name][1])
        _resolve_precision(run, asked)
        _check_together(run.to_dict(), asked)
    run.lock()
    return run


def as_flags(run: ConfigDict) -> str:
    """The resolved configuration as it could be typed: all of it but what does not act."""
    recipe = RECIPES[run.recipe]
    silent = {"fp16_opt_level"} if run.precision != "fp16" else set()
    silent |= {"data_dir"} if run.dataset == "digits" else set()
    silent |= {"head"} if run.head == "zero" else set()
    silent |= {name for name in QUIET - set(recipe) if run[name] == FLAGS[name][1]}
    silent |= {name for names, holds, _ in ACTS_WITH for name in names if not holds(run)}
    silent |= set(FLAGS) - set(PREPARING) if run.prepare else set()
    words = []
    for name, (kind, _, _) in FLAGS.items():
        value = run[name]
        if kind is None and value:
            words.append(f"--{name}")
        elif kind is not None and value is not None and name not in silent:
            text = _spelt(kind, value)
            words.append(f"--{name} {shlex.quote(text)}")
    return " ".join(words)


def _spelt(kind, value) -> str:
    if isinstance(value, (tuple, list)):
        return ("," if kind is steps_list else "x").join(map(str, value))
    return str(value)


def _plain(value):
    return tuple(value) if isinstance(value, list) else value
