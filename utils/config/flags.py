"""FLAGS: one row a flag, with everything about it in one place.

To add a flag, add a row here and use it in utils/build/. tests/config/test_flags.py pins the list, so that a new flag, or
another default, is a decision.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from configs import DATASETS, RECIPES

from .types import (
    auto_or_positive_int,
    center_fraction,
    channel_values,
    channel_widths,
    class_weights,
    fraction,
    image_channels,
    image_size,
    increasing_steps,
    intensity_range,
    magnitude,
    non_negative_float,
    non_negative_int,
    padding,
    positive_float,
    positive_int,
    run_name,
    sigmoid_layers,
    trained_layers,
    unit_interval,
    user_path,
)

# What a resumed run may do with a flag: set it, set it only with --override, or only repeat the checkpoint's value.
FREE, OVERRIDE, FIXED = "free", "override", "fixed"
# Flags that set a key of the model's row. Published weights exist for the row's own sizes only.
SIZE, KEY = "size", "key"
_SAME = object()


@dataclasses.dataclass(frozen=True)
class Flag:
    name: str
    type: Callable[[str], Any] | tuple[str, ...] | None      # a function of utils/config/types.py, choices, or None: a switch
    default: Any                                             # None: the recipe, the model's row or the data decide, or it is off
    help: str                                                # with "(default: ...)" where help.py cannot write it from the row
    on_resume: str = FIXED
    group: str = ""                                          # the title that --help shows it under
    requires: tuple[Callable[[Mapping], Any], str] | None = None    # has an effect where this holds; how to make it hold
    before: Any = _SAME            # what a checkpoint without the flag had; set it to the old default when that changes
    stored: bool = False           # every checkpoint has a value: what no flag sets, the recipe, the model or the data set
    hidden: bool | None = None     # not printed while it has its default, as flags that require something
    model: str | None = None       # SIZE or KEY
    alias_of: tuple[str, Any] | None = None                  # (flag, value): the parser replaces this flag by that one
    metavar: str | None = None
    # Its names in timm, DeiT, MAE, torchvision's references and transformers' Trainer, with underscores (spelling.py reads
    # hyphens too, and explains their flags that mean something else).
    aliases: tuple[str, ...] = ()

    def __post_init__(self):
        for name, value in (("before", self.default if self.before is _SAME else self.before),
                            ("hidden", self.requires is not None if self.hidden is None else self.hidden)):
            object.__setattr__(self, name, value)

    def has_effect(self, values: Mapping) -> bool:
        return self.requires is None or bool(self.requires[0](values))


def _group(title: str, *rows: Flag) -> dict[str, Flag]:
    return {row.name: dataclasses.replace(row, group=title) for row in rows}


def _is(name: str, *values: str) -> tuple[Callable[[Mapping], Any], str]:
    return lambda config: config[name] in values, f"--{name} {' or '.join(values)}"


def _has(*names: str) -> tuple[Callable[[Mapping], Any], str]:
    """Whether any of the flags is set."""
    return lambda config: any(config[name] for name in names), " or ".join(f"--{name}" for name in names)


_IN_FILES = (_is("dataset", "imagenet", "cub200", "flowers102", "oxford_pets", "folder", "csv")[0],
             "a --dataset of image files, such as folder or csv")

_SCRATCH = ", ".join(name for name, row in RECIPES.items() if row.get("pretrained_dir") == "none")

FLAGS: dict[str, Flag] = _group(
    "data",
    Flag("dataset", DATASETS, None, "data set to train on; folder or csv for your own images (default: the recipe's, else the "
         "embedded digits)", stored=True, aliases=("data_set", "dataset_name")),
    Flag("data_dir", user_path, "data", "folder of the data set; a published one is downloaded to it", FREE, hidden=False,
         metavar="DIR",
         requires=(lambda config: config["dataset"] != "digits", "--dataset folder (DATASET=folder) for your own "
                   "images, or the --dataset of a published data set"), aliases=("data_path",)),
    Flag("val_fraction", fraction, 0.0, "fraction of each class of the training images that is held out to choose the best "
         "checkpoint on, so that the test set stays untouched", hidden=True),
    Flag("test_fraction", fraction, 0.0, "fraction of each class of all images that becomes a new test set; 0: the published "
         "split", hidden=True),
    Flag("split_seed", non_negative_int, 0, "seed of the images that --val_fraction and --test_fraction draw",
         requires=_has("val_fraction", "test_fraction")),
    Flag("path_column", str, None, "csv: column of the image paths, a name or a number from 1 (default: found, and logged)",
         OVERRIDE, metavar="COLUMN", requires=_is("dataset", "csv")),
    Flag("label_column", str, None, "csv: column of the labels (default: found, and logged)", OVERRIDE, metavar="COLUMN",
         requires=_is("dataset", "csv")),
    Flag("image_dir", user_path, None, "csv: folder that the paths are relative to, itself relative to --data_dir (default: "
         "--data_dir, or the folder that has the images)", FREE, metavar="DIR", requires=_is("dataset", "csv")),
    Flag("class_order", ("number", "text"), "number", "order of the classes of folders and lists. number: integers by value, "
         "other names as text; text: all as text, as in torchvision's ImageFolder. A checkpoint keeps its own order", before=None,
         hidden=True, requires=_is("dataset", "folder", "csv")),
    Flag("exif", ("auto", "follow", "off"), "auto", "turn photographs upright by their EXIF orientation. auto: yes, except for "
         "published data sets", OVERRIDE, requires=_IN_FILES, before="off"),
    Flag("intensity_range", intensity_range, "auto", "values of 16-bit images that become black and white, such as 0,1023. auto: "
         "from 0 to the largest value of as many bits as the images use", OVERRIDE, requires=_IN_FILES, before=(0, 65535)),
    Flag("alpha", ("auto", "white", "black", "mask", "ignore"), "auto", "transparency. white, black: the background to put the "
         "image on; mask: the alpha channel is the image; ignore: drop it; auto: white, unless shapes would be lost", OVERRIDE,
         requires=_IN_FILES, before="white"),
    Flag("bad_images", ("stop", "skip"), "stop", "what to do with an unreadable training image. stop: end the run; skip: use the "
         "next image, and list it in bad_images.txt", FREE, hidden=True),
    Flag("max_bad_images", unit_interval, 0.01, "largest fraction of training images that may be skipped before the run ends",
         FREE, requires=_is("bad_images", "skip")),
) | _group(
    "model and start weights",
    Flag("model_type", str, None, "architecture: a row of configs.py such as ViT-B_16, or a published name (timm's, the hub's), "
         "which is also the start (default: the recipe's, else by data set and machine)", stored=True, metavar="MODEL",
         aliases=("model",)),
    Flag("pretrained_dir", user_path, "auto", "weights to start from: a checkpoint file of any format, a run folder, a folder of "
         "timm or transformers, or a published name (imagenet21k/ViT-B_16, facebook/dinov2-small). none: start from scratch; "
         "augreg: the model's AugReg file; auto: the model's own published file", FREE, metavar="WEIGHTS",
         aliases=("finetune", "initial_checkpoint", "pretrained_path")),
    Flag("head", ("zero", "keep"), None, "start with a head of zeros, or keep the file's head for the same classes (default: "
         "zero; keep with --attention_edits or --eval_only)", before="zero"),
    Flag("img_size", image_size, None, "image side in pixels, or height x width such as 224x160 (default: the model's, or the "
         "recipe's)", stored=True, aliases=("input_size",)),
    Flag("patch_size", positive_int, None, "patch side in pixels; this and the next four flags define a model of your own size "
         "(default: the model's)", model=SIZE),
    Flag("hidden_size", positive_int, None, "width of the model (default: the model's)", model=SIZE),
    Flag("mlp_dim", positive_int, None, "width of the MLPs (default: the model's)", model=SIZE),
    Flag("num_heads", positive_int, None, "attention heads of a block (default: the model's)", model=SIZE),
    Flag("num_layers", positive_int, None, "encoder blocks (default: the model's)", model=SIZE),
    Flag("in_channels", image_channels, None, "3: color; 1: gray, for which published weights are summed over their channels "
         "(default: the model's, mostly 3)", model=KEY, aliases=("in_chans",)),
    Flag("mean", channel_values, None, "mean of each channel that images are normalized by, for pixels from 0 to 1: "
         "0.485,0.456,0.406, or one number for all (default: the file's, or the model's)", model=KEY),
    Flag("std", channel_widths, None, "standard deviation of each channel (default: the file's, or the model's)", model=KEY),
    Flag("classifier", ("token", "gap", "patch_mean", "mean", "token_mean", "attention"), None, "what the head reads. token: the "
         "cls token; mean: the mean of the patches; token_mean: both, concatenated (DINO's linear heads); attention: the output "
         "of one learned query over all tokens (SigLIP); patch_mean: the mean, with the last norm after it (MAE); gap: the mean, "
         "in a model without a cls token (default: the model's)", model=KEY),
    Flag("sigmoid_attention", sigmoid_layers, None, "layers whose attention a person may edit: the last, all, or some counted "
         "from 1 (3,7). Without edits the model computes the same as before (default: none; last with --attention_edits)",
         model=KEY),
) | _group(
    "recipe, length and batch",
    Flag("recipe", ("auto", *RECIPES), "auto", "settings that apply where no flag is given: a row of configs.py. auto: digits "
         f"for the digits, photos for folder and csv, else vit-paper. {_SCRATCH} start from scratch, the others from trained "
         "weights"),
    Flag("num_steps", positive_int, None, "optimizer steps in total", FREE, stored=True, aliases=("max_steps",)),
    Flag("num_epochs", positive_float, None, "passes over the training images, instead of --num_steps (default: --num_steps; in "
         "some recipes a number of passes)", FREE, aliases=("epochs", "num_train_epochs")),
    Flag("warmup_steps", non_negative_int, None, "steps of learning-rate warm-up", OVERRIDE, stored=True),
    Flag("warmup_epochs", non_negative_float, None, "passes of learning-rate warm-up, instead of --warmup_steps (default: "
         "--warmup_steps; in some recipes a number of passes)", OVERRIDE, aliases=("lr_warmup_epochs",)),
    Flag("train_batch_size", positive_int, None, "images of an optimizer step, over all processes and micro-steps", OVERRIDE,
         stored=True),
    Flag("gradient_accumulation_steps", auto_or_positive_int, "auto", "micro-steps that each process divides its part of the "
         "batch into. auto: as few as fit into the memory", FREE, before=1),
) | _group(
    "optimizer",
    Flag("optimizer", ("sgd", "adamw", "adam", "lamb"), None, "SGD with momentum, AdamW, Adam, or LAMB (needs timm)",
         stored=True, aliases=("opt", "optim")),
    Flag("momentum", fraction, 0.9, "momentum of SGD", requires=_is("optimizer", "sgd")),
    Flag("learning_rate", non_negative_float, None, "peak learning rate", OVERRIDE, stored=True, aliases=("lr",)),
    Flag("min_learning_rate", non_negative_float, 0.0, "learning rate at the end of the decay", OVERRIDE, hidden=True,
         aliases=("min_lr", "lr_min")),
    Flag("warmup_learning_rate", non_negative_float, 0.0, "learning rate at the start of the warm-up", OVERRIDE, hidden=True,
         aliases=("warmup_lr",)),
    Flag("head_learning_rate", non_negative_float, None, "peak learning rate of the head (default: --learning_rate; photos "
         "chooses it for some models)"),
    Flag("layer_decay", positive_float, 1.0, "learning rate of a block, as a ratio of the next block's",
         requires=(lambda config: config["train_layers"] != "head", "--train_layers all or a number")),
    Flag("decay_type", ("cosine", "linear", "step", "constant"), None, "learning-rate decay after the warm-up. step: to a tenth "
         "at each of --decay_milestones", OVERRIDE, stored=True, aliases=("sched", "lr_scheduler", "lr_scheduler_type")),
    Flag("decay_milestones", increasing_steps, None, "steps such as 200,300,400, for --decay_type step (default: none; "
         "bit-hyperrule computes them)", OVERRIDE, requires=_is("decay_type", "step")),
    Flag("weight_decay", non_negative_float, None, "weight decay, as the optimizer defines it", stored=True, aliases=("wd",)),
    Flag("decay_on", ("all", "matrices"), "all", "parameters that weight decay acts on. matrices: no biases, norms, tokens or "
         "positions", requires=_has("weight_decay")),
    Flag("max_grad_norm", non_negative_float, None, "largest global gradient norm, to which larger ones are clipped; 0: no "
         "clipping", OVERRIDE, stored=True, aliases=("clip_grad", "clip_grad_norm")),
    Flag("train_layers", trained_layers, "all", "what is trained. all: every layer; head: only the head, as a linear probe (and "
         "a pooling by attention, if the file has none); N: the last N blocks and what follows them", hidden=True),
    Flag("freeze", str, None, "parameters to leave unchanged, as patterns of their names: 'patch_embed.*,pos_embed' (default: "
         "none)", metavar="PATTERNS"),
    Flag("ema_decay", fraction, 0.0, "average the weights, and evaluate the average. The decay at update n is (1 + n) / (10 + "
         "n), at most this; 0: no average", hidden=True),
) | _group(
    "regularization and augmentation",
    Flag("dropout_rate", fraction, None, "dropout (default: the model's, or the recipe's)", stored=True, model=KEY),
    Flag("attention_dropout_rate", fraction, None, "dropout of attention weights (default: the model's, or the recipe's)",
         model=KEY),
    Flag("drop_path_rate", fraction, None, "stochastic depth of the last block (default: the model's, or the recipe's)",
         model=KEY, aliases=("drop_path",)),
    Flag("label_smoothing", fraction, 0.0, "part of the target that is spread over all classes", OVERRIDE, hidden=True,
         aliases=("smoothing", "label_smoothing_factor")),
    Flag("class_weights", class_weights, "none", "weights of the classes in the loss: none; balanced, by one over the frequency; "
         "or a number for each class, 1,2.5,1", OVERRIDE, hidden=True),
    Flag("augmentation", ("crop_flip", "crop", "pad_flip", "pad", "none"), None, "crop: random resized crop; pad: padding and a "
         "random crop; _flip: mirrored half of the time (digits never); none: resize only", OVERRIDE, stored=True),
    Flag("crop_scale", unit_interval, 0.05, "smallest part of the image's area that a random resized crop keeps", OVERRIDE,
         requires=_is("augmentation", "crop", "crop_flip")),
    Flag("crop_padding", padding, 4, "pixels of padding for --augmentation pad and pad_flip", OVERRIDE,
         requires=_is("augmentation", "pad", "pad_flip")),
    Flag("rotation", non_negative_float, 0.0, "largest angle of a random rotation, in degrees", OVERRIDE, hidden=True),
    Flag("color_jitter", fraction, 0.0, "largest random change of brightness, contrast and saturation, as a fraction", OVERRIDE,
         hidden=True),
    Flag("randaugment_ops", non_negative_int, 0, "RandAugment: operations for each image; 0: off", OVERRIDE, hidden=True),
    Flag("randaugment_magnitude", magnitude, 9, "RandAugment: strength of the operations", OVERRIDE,
         requires=_has("randaugment_ops")),
    Flag("random_erasing", unit_interval, 0.0, "probability that a rectangle of an image is erased", OVERRIDE, hidden=True,
         aliases=("reprob", "random_erase")),
    Flag("mixup_alpha", non_negative_float, 0.0, "MixUp: parameter of its Beta distribution; 0: off", OVERRIDE, hidden=True,
         aliases=("mixup",)),
    Flag("cutmix_alpha", non_negative_float, 0.0, "CutMix: parameter of its Beta distribution; 0: off", OVERRIDE, hidden=True,
         aliases=("cutmix",)),
    Flag("mix_probability", unit_interval, 1.0, "fraction of the image pairs that are mixed", OVERRIDE,
         requires=_has("mixup_alpha", "cutmix_alpha"), aliases=("mixup_prob",)),
    Flag("mix_switch_probability", unit_interval, 0.5, "fraction of the mixed pairs that CutMix mixes, where both are on",
         OVERRIDE, requires=(lambda config: config["mixup_alpha"] and config["cutmix_alpha"], "--mixup_alpha and --cutmix_alpha"),
         aliases=("mixup_switch_prob",)),
    Flag("mix_off_steps", non_negative_int, 0, "last steps of the run, without mixing", OVERRIDE,
         requires=_has("mixup_alpha", "cutmix_alpha")),
    Flag("interpolation", ("bilinear", "bicubic"), "bilinear", "how images are resized (default: the recipe's, or that of the "
         "model's publisher, else bilinear)", OVERRIDE, hidden=True),
) | _group(
    "distillation",
    Flag("distillation", ("none", "hard", "soft"), "none", "learn from a teacher: from its prediction (hard), or from its "
         "probabilities (soft)", hidden=True, aliases=("distillation_type",)),
    Flag("teacher", user_path, None, "the teacher: a run folder, a checkpoint file of any format, a folder of timm or "
         "transformers, or a published name (default: none)", FREE, metavar="PATH", requires=_is("distillation", "hard", "soft"),
         aliases=("teacher_path",)),
    Flag("distillation_alpha", unit_interval, 0.5, "weight of the teacher in the loss", OVERRIDE,
         requires=_is("distillation", "hard", "soft")),
    Flag("distillation_temperature", positive_float, 1.0, "temperature of both sides of --distillation soft", OVERRIDE,
         requires=_is("distillation", "soft"), aliases=("distillation_tau",)),
) | _group(
    "edited attention",
    Flag("attention_edits", user_path, None, "folder of edits made with annotate.py, which the sigmoid attention learns "
         "(default: none)", FREE, metavar="DIR"),
    Flag("attention_loss_weight", non_negative_float, 1.0, "weight in the loss of the mean square of sigmoid attention - edit",
         OVERRIDE, requires=_has("attention_edits")),
) | _group(
    "evaluation",
    Flag("eval_every", positive_int, None, "steps between evaluations (default: the recipe's, but at least five in a shorter "
         "run; else an epoch, or a tenth of --num_steps)", FREE, stored=True, aliases=("eval_steps",)),
    Flag("eval_batch_size", positive_int, 64, "images of an evaluation batch, for each process", FREE,
         aliases=("validation_batch_size", "per_device_eval_batch_size")),
    Flag("test", ("always", "once", "never"), "always", "when to evaluate on the test set. always: before and after training, "
         "and during it where there is no other split to choose on; once: at the end; never. A val that is the only held-out "
         "split counts as the test set: with once it is only evaluated at the end, and there is no best.pt", FREE, hidden=True),
    Flag("eval_crop", center_fraction, 0.0, "part of the image's shorter side that an evaluation shows, from its center; 0: the "
         "whole image (default: the recipe's, or that of the model's publisher, else 0)", OVERRIDE, hidden=True,
         aliases=("crop_pct",)),
    Flag("tta", ("none", "flip"), "none", "test-time augmentation. flip: evaluate the mean of the probabilities of an image and "
         "its mirror image, which takes twice the time", OVERRIDE, hidden=True),
    Flag("eval_only", None, False, "evaluate --resume_path, or --pretrained_dir with its own head, and stop", FREE,
         aliases=("eval", "test_only")),
    Flag("eval_train", None, False, "at the end, evaluate on the training images too, without augmentation", FREE),
    Flag("confusion_matrix", None, False, "with the last evaluation, write confusion.csv and per_class.csv", FREE),
) | _group(
    "run folder and checkpoints",
    Flag("name", run_name, None, "name of the run, whose folder is OUTPUT_DIR/NAME (default: that of the data, numbered)", FREE,
         aliases=("experiment",)),
    Flag("output_dir", user_path, "output", "folder in which each run gets a folder", FREE, metavar="DIR", aliases=("output",)),
    Flag("log_dir", user_path, "logs", "folder in which each run gets a folder for TensorBoard", FREE, metavar="DIR"),
    Flag("wandb", str, None, "also log to this project of Weights & Biases; the key is read from WANDB_API_KEY (default: no)",
         FREE, metavar="PROJECT", aliases=("wandb_project",)),
    Flag("resume_path", user_path, None, "run folder or checkpoint file to resume, in place of --pretrained_dir. auto: "
         "OUTPUT_DIR/NAME if it holds a run, else start it (default: none, a new run)", FREE, metavar="PATH",
         aliases=("resume", "resume_from_checkpoint")),
    Flag("override", None, False, "let a resumed run change settings that affect its result: learning rate, batch, seed, data, "
         "...", FREE, requires=_has("resume_path")),
    Flag("save_every", positive_int, None, "steps between checkpoints (default: --eval_every)", FREE, stored=True,
         aliases=("save_steps",)),
    Flag("keep_checkpoints", positive_int, 2, "step checkpoints to keep, in addition to best.pt", FREE,
         aliases=("save_total_limit",)),
) | _group(
    "device, precision and speed",
    Flag("device", ("auto", "cpu", "cuda", "mps"), "auto", "auto: a GPU of CUDA or ROCm if there is one, else the CPU; mps: an "
         "Apple GPU (not tested by this project)", FREE),
    Flag("precision", ("auto", "fp32", "tf32", "bf16", "fp16"), "auto", "auto: bf16 where the processor multiplies it natively, "
         "else fp32; tf32: fp32 with products that a GPU may round to TF32", OVERRIDE),
    Flag("fp16", None, False, "the same as --precision fp16", OVERRIDE, alias_of=("precision", "fp16")),
    Flag("fp16_opt_level", ("O0", "O1", "O2", "O3"), "O2", "O0: fp32; O1: autocast; O2: autocast, and gradients sent in fp16; "
         "O3: all in fp16", OVERRIDE,
         requires=(lambda config: config["precision"] == "fp16", "--fp16 (PRECISION=fp16 for train.sh)")),
    Flag("loss_scale", non_negative_float, 0.0, "fixed loss scale of fp16 at O1 and O2; 0: dynamic", OVERRIDE, hidden=True),
    Flag("compile", None, False, "torch.compile the model: about a minute at the start, faster steps afterwards", FREE,
         aliases=("torch_compile",)),
    Flag("num_workers", non_negative_int, None, "processes that load images, for each training process (default: 0 for images in "
         "memory; else on a CPU a quarter of the cores, at most 4, on a GPU all cores but one, at most 16)", FREE,
         aliases=("workers", "j", "dataloader_num_workers")),
    Flag("profile", None, False, "write a trace of a few steps for Perfetto, and a table of the slowest operators", FREE),
) | _group(
    "reproducibility and faults",
    Flag("seed", non_negative_int, 42, "seed of initialization, order, augmentation and dropout", OVERRIDE),
    Flag("exact", None, False, "sum gradients in a fixed order: the same bits on any number of processes, but slower", OVERRIDE),
    Flag("non_finite", ("stop", "skip"), "stop", "what to do when a loss or gradient is NaN or infinite. stop: end the run; "
         "skip: skip the update, and end the run after ten in a row", FREE, hidden=True),
    Flag("rank_timeout", positive_int, 600, "seconds that processes wait for one that does not answer before the run ends", FREE,
         hidden=True),
)

SETTINGS: tuple[str, ...] = tuple(row.name for row in FLAGS.values() if row.alias_of is None)       # the attributes of a Config
SIZES: tuple[str, ...] = tuple(row.name for row in FLAGS.values() if row.model == SIZE)
MODEL_KEYS: tuple[str, ...] = tuple(row.name for row in FLAGS.values() if row.model)


def defaults() -> dict:
    """The default of every setting."""
    return {name: FLAGS[name].default for name in SETTINGS}


def before() -> dict:
    """The value of every setting in a checkpoint that was written before the flag existed."""
    return {name: FLAGS[name].before for name in SETTINGS}
