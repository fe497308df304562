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
        "classifier": "token",             # "token": the cls token; "gap": mean over the tokens, no cls token
        "representation_size": 0,          # width of the tanh layer `pre_logits` before the head; 0: none
        "resnet_layers": None,             # units of each ResNet stage, () for the stem alone; None: no ResNet
        "resnet_width": 64,                # channels of the ResNet's stem
        "gelu": "tanh",                    # Google's form; "erf" is the exact one
        "in_channels": 3,
        "img_size": 224,
        "mean": (0.5, 0.5, 0.5),           # inputs are (x / 255 - mean) / std
        "std": (0.5, 0.5, 0.5),
    })
    row.lock()
    row.update(more)                       # KeyError on an unknown key: a typo is an error
    return row


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
    # The embedded default (assets/): 8 x 8 px images, small enough for tests and for a laptop.
    "ViT-Nano_2": architecture(2, 64, 256, 4, 4, img_size=8),
}

# --------------------------------------------------------------------------------------------------- recipes

RECIPES = {
    # Dosovitskiy et al., section 4.1 and appendix B.1.1, in the values that the ViT-pytorch scripts use.
    # Command and expected accuracy: MODEL_ZOO.md (CIFAR-100, ViT-B_16, 500 steps, warm-up 100: about 0.907).
    "vit-paper": {
        "optimizer": "sgd", "learning_rate": 3e-2, "weight_decay": 0.0, "train_batch_size": 512, "num_steps": 10_000,
        "warmup_steps": 500, "decay_type": "cosine", "max_grad_norm": 1.0, "augmentation": "crop_flip", "eval_every": 100},
    # The embedded default: `bash train.sh`. Expected: 94-96 % on the test block (MODEL_ZOO.md).
    "digits": {
        "optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0, "train_batch_size": 64, "num_steps": 100,
        "warmup_steps": 10, "decay_type": "cosine", "max_grad_norm": 1.0, "augmentation": "none", "eval_every": 20},
}

# Which row a data set starts from, and which model; every other data set takes the first of each.
DEFAULTS_OF_DATASET = {
    None: {"recipe": "vit-paper", "model_type": "ViT-B_16"},
    "digits": {"recipe": "digits", "model_type": "ViT-Nano_2"},
}
# What PRETRAINED_DIR=auto means: the embedded file; for sizes that Google published in the AugReg paper alone, the
# file that its README recommends; for all others the ImageNet-21k file of the model's own name.
DEFAULT_WEIGHTS = {
    "ViT-Nano_2": "assets/ViT-Nano_2-letters.npz",
    "ViT-Ti_16": "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
    "ViT-S_16": "augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0",
    "ViT-S_32": "augreg/S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0",
    "R-ViT-Ti_16": "augreg/R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0",
    "R26-ViT-S_32": "augreg/R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0",
}

# ------------------------------------------------------------------------------------------------ a run's flags


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return int(text)


def not_negative(text: str) -> int:
    if not 0 <= int(text) < 2 ** 63:
        raise argparse.ArgumentTypeError(f"must be 0 or more (and below 2 ** 63), not {text}")
    return int(text)


def not_negative_number(text: str) -> float:
    if not 0 <= float(text) < 1e30:
        raise argparse.ArgumentTypeError(f"must be 0 or more, finite and below 1e30, not {text}")
    return float(text)


def fraction(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, not {text}")
    return float(text)


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


# name: (type, or a tuple of choices), default, help. A default of None is filled by the recipe, the model row
# or the data set (see `resolve`), so that the resolved value is what is printed and saved.
FLAGS = {
    "name": (run_name, None, "name of the run; its folder is OUTPUT_DIR/NAME (default: the data set's name, numbered)"),
    "dataset": (("digits", "cifar10", "cifar100", "imagenet", "folder"), "digits", "what to train on"),
    "data_dir": (str, "data", "where the data set lies, or is downloaded to"),
    "recipe": (("auto", *RECIPES), "auto", "row of configs.py that fills what is not given"),
    "model_type": (str, None, "architecture: a row of configs.py"),
    "img_size": (image_size, None, "side in pixels, or height x width such as 224x160 (default: the model's)"),
    "pretrained_dir": (str, "auto", "checkpoint (.npz) or published name (imagenet21k/ViT-B_16); none; auto: the model's own"),
    "resume_path": (str, None, "run folder or checkpoint file to go on from; wins over --pretrained_dir"),
    "output_dir": (str, "output", "parent of the run folders"),
    "log_dir": (str, "logs", "parent of the TensorBoard folders"),
    "train_batch_size": (positive, None, "images of an optimizer step, over all processes and micro-steps"),
    "eval_batch_size": (positive, 64, "images of an evaluation batch, per process"),
    "gradient_accumulation_steps": (positive, 1, "micro-steps that a process's share of the batch is cut into"),
    "num_steps": (positive, None, "optimizer steps in all"),
    "warmup_steps": (not_negative, None, "steps of linear warm-up"),
    "decay_type": (("cosine", "linear"), None, "decay of the learning rate after the warm-up"),
    "optimizer": (("sgd", "adamw"), None, "SGD with momentum 0.9, or AdamW"),
    "learning_rate": (not_negative_number, None, "peak learning rate"),
    "weight_decay": (not_negative_number, None, "weight decay (as the optimizer understands it)"),
    "max_grad_norm": (not_negative_number, None, "clip the global gradient norm to this; 0: no clipping"),
    "dropout_rate": (fraction, None, "dropout (default: the model's)"),
    "augmentation": (("crop_flip", "crop", "none"), None,
                     "random resized crop and flip (no flip for digits), crop alone, or a plain resize"),
    "eval_every": (positive, None, "steps between evaluations"),
    "save_every": (positive, None, "steps between checkpoints (default: --eval_every)"),
    "keep_checkpoints": (positive, 2, "how many step checkpoints to keep, besides best.pt"),
    "precision": (("auto", "fp32", "bf16", "fp16"), "auto", "auto: bf16 where the processor multiplies it natively"),
    "fp16": (None, False, "the same as --precision fp16"),
    "fp16_opt_level": (("O0", "O1", "O2", "O3"), "O2", "O0 fp32; O1 autocast; O2 and float16 gradient traffic; O3 all fp16"),
    "loss_scale": (not_negative_number, 0.0, "fixed loss scale for fp16 O1 and O2; 0: dynamic"),
    "device": (("auto", "cpu", "cuda"), "auto", "auto: a GPU where there is one"),
    "num_workers": (not_negative, None, "loader processes per rank (default: 0 for digits, else 4 or the cores at hand)"),
    "seed": (not_negative, 42, "fixes initialisation, order, augmentation and dropout"),
    "eval_only": (None, False, "evaluate --resume_path (or the pre-trained model with its own head) and stop"),
    "confusion_matrix": (None, False, "with the last evaluation, write confusion.csv and per_class.csv"),
}

# What a resumed run may change; everything else must stay as the checkpoint has it. `pretrained_dir` is
# accepted because the scripts have always let RESUME_PATH win over it: it has no effect.
MAY_CHANGE_ON_RESUME = {
    "name", "data_dir", "pretrained_dir", "resume_path", "output_dir", "log_dir", "eval_batch_size",
    "gradient_accumulation_steps", "num_steps", "eval_every", "save_every", "keep_checkpoints", "device",
    "num_workers", "eval_only", "confusion_matrix"}

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


def resolve(given: dict) -> ConfigDict:
    """Fills the flags that were not given from the recipe, the model row and the defaults; checks the whole.

    Raises ConfigError for a setting that does not exist or does not fit the others.
    """
    for name in given:
        if name not in FLAGS:
            raise ConfigError(f"no setting is called {name!r}")
    run = {name: default for name, (_, default, _) in FLAGS.items()} | given
    row = DEFAULTS_OF_DATASET.get(run["dataset"], DEFAULTS_OF_DATASET[None])
    if run["dataset"] == "digits" and "data_dir" in given:
        raise ConfigError(f"--data_dir {run['data_dir']} is not used by the embedded digits: "
                          "give --dataset (DATASET=folder for images of your own)")
    if run["eval_only"] and run["pretrained_dir"] == "none":
        raise ConfigError("--eval_only needs something to evaluate: give --resume_path, or a --pretrained_dir with a head")
    if run["model_type"] is None:
        run["model_type"] = row["model_type"]
    if run["model_type"] not in MODELS:
        raise ConfigError(f"--model_type {run['model_type']}: no such model; there are {', '.join(MODELS)}")
    if run["recipe"] == "auto":
        run["recipe"] = row["recipe"]
    for name, value in RECIPES[run["recipe"]].items():
        if run[name] is None:
            run[name] = value
    model = MODELS[run["model_type"]]
    if run["img_size"] is None:
        run["img_size"] = model.img_size
    if run["dropout_rate"] is None:
        run["dropout_rate"] = model.dropout_rate
    if "warmup_steps" not in given:
        run["warmup_steps"] = min(run["warmup_steps"], run["num_steps"] // 10)   # the recipe's is meant for its own length
    elif run["warmup_steps"] > run["num_steps"]:
        raise ConfigError(f"--warmup_steps {run['warmup_steps']} is more than --num_steps {run['num_steps']}")
    if run["save_every"] is None:
        run["save_every"] = run["eval_every"]
    _resolve_precision(run, given)
    return _locked(run)


def _locked(run: dict) -> ConfigDict:
    run = ConfigDict(run)
    run.lock()
    return run


def _resolve_precision(run: dict, given: dict) -> None:
    if run["fp16"]:
        if given.get("precision", "fp16") != "fp16":
            raise ConfigError(f"--fp16 and --precision {run['precision']} contradict each other: give one")
        run["precision"] = "fp16"
    if "fp16_opt_level" in given and run["precision"] != "fp16":
        raise ConfigError("--fp16_opt_level acts with fp16 alone: add --fp16 (PRECISION=fp16 for train.sh)")
    if run["loss_scale"] and (run["precision"] != "fp16" or run["fp16_opt_level"] in ("O0", "O3")):
        raise ConfigError("--loss_scale acts with fp16 at O1 or O2 alone: the other modes do not scale the loss")


def resolve_resumed(given: dict, saved: dict) -> ConfigDict:
    """The configuration of a run that goes on: the checkpoint's, with the flags of MAY_CHANGE_ON_RESUME on top.

    Raises ConfigError where a given flag would make it another run.
    """
    # `--fp16` is one spelling of the precision, so compare what it says. A flag younger than the checkpoint had its default.
    asked, saved = dict(given), {name: default for name, (_, default, _) in FLAGS.items()} | saved
    if asked.pop("fp16", False) and asked.setdefault("precision", "fp16") != "fp16":
        raise ConfigError(f"--fp16 and --precision {asked['precision']} contradict each other: give one")
    if asked.get("precision") == "auto":
        del asked["precision"]         # whatever it chose then holds: another processor must not change the run
    for name, value in asked.items():
        if name not in MAY_CHANGE_ON_RESUME and _plain(value) != _plain(saved[name]):
            raise ConfigError(
                f"--{name} {_plain(value)}: the checkpoint was made with {_plain(saved[name])}, and a resumed run keeps it; "
                f"leave --{name} out, or start a new run without --resume_path")
    if asked.get("num_steps", saved["num_steps"]) < saved["warmup_steps"]:
        raise ConfigError(f"--num_steps {asked['num_steps']} is less than the run's {saved['warmup_steps']} warm-up steps")
    return _locked(saved | asked)


def as_flags(run: ConfigDict) -> str:
    """The resolved configuration as it could be typed: all of it but what does not act."""
    silent = {"loss_scale"} if not run.loss_scale else set()
    silent |= {"fp16_opt_level"} if run.precision != "fp16" else set()
    silent |= {"data_dir"} if run.dataset == "digits" else set()
    words = []
    for name, (kind, _, _) in FLAGS.items():
        value = run[name]
        if kind is None and value:
            words.append(f"--{name}")
        elif kind is not None and value is not None and name not in silent:
            text = "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
            words.append(f"--{name} {shlex.quote(text)}")
    return " ".join(words)


def _plain(value):
    return tuple(value) if isinstance(value, list) else value
