"""FLAGS: one row a flag, with all that is known of it.

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

# What a resumed run may do with a flag: set it, set it with --override alone, or repeat the checkpoint's value.
FREE, OVERRIDE, FIXED = "free", "override", "fixed"
# Flags that set a key of the model's row. Published weights exist for the row's own sizes only.
SIZE, KEY = "size", "key"
_SAME = object()


@dataclasses.dataclass(frozen=True)
class Flag:
    name: str
    type: Callable[[str], Any] | tuple[str, ...] | None      # a function of utils/config/types.py, choices, or None: a switch
    default: Any                                             # None: the recipe, the model's row or the data decide, or it is off
    help: str
    on_resume: str = FIXED
    group: str = ""                                          # the title that --help shows it under
    requires: tuple[Callable[[Mapping], Any], str] | None = None    # has an effect where this holds; how to make it hold
    before: Any = _SAME            # what a checkpoint that lacks the flag had; set it to the old default when that changes
    stored: bool = False           # no checkpoint lacks it, nor has None: what no flag sets, the recipe, the model or the data do
    hidden: bool | None = None     # not printed while it has its default; so are flags that require something
    model: str | None = None       # SIZE or KEY
    alias_of: tuple[str, Any] | None = None                  # (flag, value): the parser replaces this flag by that one
    metavar: str | None = None
    # What timm, DeiT, MAE, torchvision's references and transformers' Trainer call it, with underscores (spelling.py reads both,
    # and names their flags that mean something else).
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
    """Any of them is set."""
    return lambda config: any(config[name] for name in names), " or ".join(f"--{name}" for name in names)


_IN_FILES = (_is("dataset", "imagenet", "cub200", "flowers102", "oxford_pets", "folder", "csv")[0],
             "a --dataset of image files, such as folder or csv")

_SCRATCH = ", ".join(name for name, row in RECIPES.items() if row.get("pretrained_dir") == "none")

FLAGS: dict[str, Flag] = _group(
    "data",
    Flag("name", run_name, None, "name of the run; its folder is OUTPUT_DIR/NAME (default: the data set's name, numbered)", FREE,
         aliases=("experiment",)),
    Flag("dataset", DATASETS, None, "what to train on (default: the recipe's, else the embedded digits)", stored=True,
         aliases=("data_set", "dataset_name")),
    Flag("data_dir", user_path, "data", "folder that holds the data set, or that it is downloaded to", FREE, hidden=False,
         metavar="DIR",
         requires=(lambda config: config["dataset"] != "digits", "another --dataset than the embedded digits "
                   "(--dataset folder, DATASET=folder, for images of your own)"), aliases=("data_path",)),
    Flag("path_column", str, None, "csv: the column of the images' paths, by its name or its number from 1 (default: guessed "
         "and told)", OVERRIDE, metavar="COLUMN", requires=_is("dataset", "csv")),
    Flag("label_column", str, None, "csv: the column of the labels (default: guessed and told)", OVERRIDE, metavar="COLUMN",
         requires=_is("dataset", "csv")),
    Flag("image_dir", user_path, None, "csv: the folder that paths count from, seen from --data_dir (default: that, or the one "
         "that has the images)", FREE, metavar="DIR", requires=_is("dataset", "csv")),
    Flag("val_fraction", fraction, 0.0, "fraction of each class of train that is held out to choose on, so that test stays "
         "untouched", hidden=True),
    Flag("test_fraction", fraction, 0.0, "draw a new test set: this fraction of each class of all images (0: the published "
         "split)", hidden=True),
    Flag("split_seed", non_negative_int, 0, "fixes what --val_fraction and --test_fraction draw",
         requires=_has("val_fraction", "test_fraction")),
    Flag("class_order", ("number", "text"), "number", "order of classes that folders or lists name; number: integers by value, "
         "others as text; text: all as text, as torchvision's ImageFolder. A checkpoint's names keep theirs", before=None,
         hidden=True, requires=_is("dataset", "folder", "csv")),
    Flag("exif", ("auto", "follow", "off"), "auto", "turn photographs upright as their EXIF orientation says; auto: but for "
         "published data sets", OVERRIDE, requires=_IN_FILES, before="off"),
    Flag("intensity_range", intensity_range, "auto", "values of 16-bit images that become black and white, such as 0,1023; auto: "
         "0 to the end of as many bits as the images use", OVERRIDE, requires=_IN_FILES, before=(0, 65535)),
    Flag("alpha", ("auto", "white", "black", "mask", "ignore"), "auto", "transparent parts are put on white or black, the alpha "
         "channel is the picture (mask), or it is ignored; auto: white, unless shapes would be lost", OVERRIDE,
         requires=_IN_FILES, before="white"),
    Flag("test", ("always", "once", "never"), "always", "evaluate on test before, after (and, where no other split is there to "
         "choose on, during) training; at the end alone; or not at all", FREE, hidden=True),
    Flag("recipe", ("auto", *RECIPES), "auto", f"row of configs.py that fills what no flag sets; {_SCRATCH} start from scratch, "
         "the others from trained weights"),
) | _group(
    "model and weights",
    Flag("model_type", str, None, "architecture: a row of configs.py, or the name of a published file (timm's, the hub's), which "
         "the run then starts from", stored=True, metavar="MODEL", aliases=("model",)),
    Flag("img_size", image_size, None, "side in pixels, or height x width such as 224x160 (default: the model's)", stored=True,
         aliases=("input_size",)),
    Flag("patch_size", positive_int, None, "side of a patch; this and the next four define a size of your own", model=SIZE),
    Flag("hidden_size", positive_int, None, "width of the model", model=SIZE),
    Flag("mlp_dim", positive_int, None, "width of the MLP", model=SIZE),
    Flag("num_heads", positive_int, None, "attention heads", model=SIZE),
    Flag("num_layers", positive_int, None, "encoder blocks", model=SIZE),
    Flag("in_channels", image_channels, None, "1: gray images (published weights are summed over their channels); 3: color "
         "(default)", model=KEY, aliases=("in_chans",)),
    Flag("mean", channel_values, None, "mean of the images' channels, of values from 0 to 1, by which the weights want them "
         "normalized: 0.485,0.456,0.406, or one for all (default: the file's, or the model's)", model=KEY),
    Flag("std", channel_widths, None, "and their standard deviation (default: likewise)", model=KEY),
    Flag("classifier", ("token", "gap", "patch_mean", "mean", "token_mean", "attention"), None, "what the head reads: token: the "
         "cls token; mean: the mean over the patches; token_mean: both, side by side (DINO's linear heads); attention: what one "
         "learned query takes of all tokens (SigLIP); patch_mean: the mean, with the last norm behind it (MAE); gap: the mean "
         "without a cls token in the model (default: the model's)", model=KEY),
    Flag("sigmoid_attention", sigmoid_layers, None, "attention that a person may edit, in the last layer, in all, or in some "
         "counted from 1 (3,7); without edits the model computes the same as before", model=KEY),
    Flag("pretrained_dir", user_path, "auto", "checkpoint file of any format, run folder, folder of timm or transformers, or "
         "published name (imagenet21k/ViT-B_16, timm's, facebook/dinov2-small); none; augreg: the model's AugReg file; auto: the "
         "model's own", FREE, metavar="WEIGHTS", aliases=("finetune", "initial_checkpoint", "pretrained_path")),
    Flag("head", ("zero", "keep"), None, "start with a head of zeros, or with the file's, of the same classes (default: zero; "
         "keep for --attention_edits and --eval_only)", before="zero"),
    Flag("resume_path", user_path, None, "run folder or checkpoint file to resume; wins over --pretrained_dir; auto: "
         "OUTPUT_DIR/NAME if it holds a run, else a new run there", FREE, metavar="PATH",
         aliases=("resume", "resume_from_checkpoint")),
    Flag("override", None, False, "let a resumed run change what decides its course: learning rate, batch, seed, ..., or its "
         "data", FREE, requires=_has("resume_path")),
    Flag("output_dir", user_path, "output", "parent of the run folders", FREE, metavar="DIR", aliases=("output",)),
    Flag("log_dir", user_path, "logs", "parent of the TensorBoard folders", FREE, metavar="DIR"),
    Flag("wandb", str, None, "log to this project of Weights & Biases too; the key comes from WANDB_API_KEY", FREE,
         metavar="PROJECT", aliases=("wandb_project",)),
) | _group(
    "length and batch",
    Flag("train_batch_size", positive_int, None, "images of an optimizer step, over all processes and micro-steps", OVERRIDE,
         stored=True),
    Flag("eval_batch_size", positive_int, 64, "images of an evaluation batch, per process", FREE,
         aliases=("validation_batch_size", "per_device_eval_batch_size")),
    Flag("gradient_accumulation_steps", auto_or_positive_int, "auto", "micro-steps that a process's part of the batch is divided "
         "into; auto: as few as the memory of the GPU, or of the machine, allows", FREE, before=1),
    Flag("num_steps", positive_int, None, "optimizer steps in all", FREE, stored=True, aliases=("max_steps",)),
    Flag("num_epochs", positive_float, None, "instead of --num_steps: passes over the training images", FREE,
         aliases=("epochs", "num_train_epochs")),
    Flag("warmup_steps", non_negative_int, None, "steps of warm-up", OVERRIDE, stored=True),
    Flag("warmup_epochs", non_negative_float, None, "instead of --warmup_steps", OVERRIDE, aliases=("lr_warmup_epochs",)),
) | _group(
    "optimizer",
    Flag("optimizer", ("sgd", "adamw", "adam", "lamb"), None, "SGD with momentum; AdamW; Adam; LAMB, where timm is installed",
         stored=True, aliases=("opt", "optim")),
    Flag("momentum", fraction, 0.9, "momentum of SGD", requires=_is("optimizer", "sgd")),
    Flag("learning_rate", non_negative_float, None, "peak learning rate", OVERRIDE, stored=True, aliases=("lr",)),
    Flag("min_learning_rate", non_negative_float, 0.0, "learning rate at the end of the decay", OVERRIDE, hidden=True,
         aliases=("min_lr", "lr_min")),
    Flag("warmup_learning_rate", non_negative_float, 0.0, "learning rate at the start of the warm-up", OVERRIDE, hidden=True,
         aliases=("warmup_lr",)),
    Flag("head_learning_rate", non_negative_float, None, "peak learning rate of the head (default: as the rest)"),
    Flag("layer_decay", positive_float, 1.0, "learning rate of a block as a ratio of the next block's",
         requires=(lambda config: config["train_layers"] != "head", "--train_layers all or a number")),
    Flag("decay_type", ("cosine", "linear", "step", "constant"), None, "decay after the warm-up; step: a tenth at each of "
         "--decay_milestones", OVERRIDE, stored=True, aliases=("sched", "lr_scheduler", "lr_scheduler_type")),
    Flag("decay_milestones", increasing_steps, None, "steps such as 200,300,400, for --decay_type step", OVERRIDE,
         requires=_is("decay_type", "step")),
    Flag("weight_decay", non_negative_float, None, "weight decay (as the optimizer understands it)", stored=True,
         aliases=("wd",)),
    Flag("decay_on", ("all", "matrices"), "all", "what weight decay acts on; matrices: no biases, norms, tokens, positions",
         requires=_has("weight_decay")),
    Flag("max_grad_norm", non_negative_float, None, "clip the global gradient norm to this; 0: no clipping", OVERRIDE,
         stored=True, aliases=("clip_grad", "clip_grad_norm")),
    Flag("train_layers", trained_layers, "all", "all; head: a linear probe; 2: the last 2 blocks and what follows them "
         "(head also trains a pooling by attention that the file has not)", hidden=True),
    Flag("freeze", str, None, "patterns of parameter names to leave unchanged, such as 'patch_embed.*,pos_embed'",
         metavar="PATTERNS"),
    Flag("ema_decay", fraction, 0.0, "average the weights and evaluate the average; the decay rises to this, as (1 + n) / (10 + "
         "n) at update n; 0: off", hidden=True),
) | _group(
    "regularization and augmentation",
    Flag("dropout_rate", fraction, None, "dropout (default: the model's)", stored=True, model=KEY),
    Flag("attention_dropout_rate", fraction, None, "dropout on attention weights (default: the model's)", model=KEY),
    Flag("drop_path_rate", fraction, None, "stochastic depth of the last block (default: the model's)", model=KEY,
         aliases=("drop_path",)),
    Flag("label_smoothing", fraction, 0.0, "part of the target spread over all classes", OVERRIDE, hidden=True,
         aliases=("smoothing", "label_smoothing_factor")),
    Flag("class_weights", class_weights, "none", "none; balanced: by one over the class's frequency; or 1,2.5,1 by label",
         OVERRIDE, hidden=True),
    Flag("augmentation", ("crop_flip", "crop", "pad_flip", "pad", "none"), None, "random resized crop and flip (no flip for "
         "digits); crop alone; padding and a random crop, with or without a flip; or a plain resize", OVERRIDE, stored=True),
    Flag("crop_scale", unit_interval, 0.05, "smallest part of the image's area that a random resized crop keeps", OVERRIDE,
         requires=_is("augmentation", "crop", "crop_flip")),
    Flag("crop_padding", padding, 4, "pixels of padding for --augmentation pad and pad_flip", OVERRIDE,
         requires=_is("augmentation", "pad", "pad_flip")),
    Flag("rotation", non_negative_float, 0.0, "random rotation by up to so many degrees", OVERRIDE, hidden=True),
    Flag("color_jitter", fraction, 0.0, "random brightness, contrast and saturation, by up to this fraction", OVERRIDE,
         hidden=True),
    Flag("randaugment_ops", non_negative_int, 0, "RandAugment: operations an image; 0: off", OVERRIDE, hidden=True),
    Flag("randaugment_magnitude", magnitude, 9, "RandAugment: their strength", OVERRIDE, requires=_has("randaugment_ops")),
    Flag("random_erasing", unit_interval, 0.0, "probability of erasing a rectangle of an image", OVERRIDE, hidden=True,
         aliases=("reprob", "random_erase")),
    Flag("mixup_alpha", non_negative_float, 0.0, "MixUp: parameter of its Beta distribution; 0: off", OVERRIDE, hidden=True,
         aliases=("mixup",)),
    Flag("cutmix_alpha", non_negative_float, 0.0, "CutMix: parameter of its Beta distribution; 0: off", OVERRIDE, hidden=True,
         aliases=("cutmix",)),
    Flag("mix_probability", unit_interval, 1.0, "fraction of the image pairs that are mixed", OVERRIDE,
         requires=_has("mixup_alpha", "cutmix_alpha"), aliases=("mixup_prob",)),
    Flag("mix_switch_probability", unit_interval, 0.5, "fraction of them that CutMix mixes, where both are on", OVERRIDE,
         requires=(lambda config: config["mixup_alpha"] and config["cutmix_alpha"], "--mixup_alpha and --cutmix_alpha"),
         aliases=("mixup_switch_prob",)),
    Flag("mix_off_steps", non_negative_int, 0, "steps without mixing at the end", OVERRIDE,
         requires=_has("mixup_alpha", "cutmix_alpha")),
    Flag("interpolation", ("bilinear", "bicubic"), "bilinear", "how images are resized (default: the recipe's, or as the model's "
         "publisher does)", OVERRIDE, hidden=True),
    Flag("eval_crop", center_fraction, 0.0, "evaluate on the center of the image, this fraction of its side; 0: on the whole "
         "image (default: likewise)", OVERRIDE, hidden=True, aliases=("crop_pct",)),
    Flag("tta", ("none", "flip"), "none", "test-time augmentation; flip: evaluate the mean of the probabilities for an image and "
         "its mirror image, in twice the time", OVERRIDE, hidden=True),
) | _group(
    "distillation",
    Flag("distillation", ("none", "hard", "soft"), "none", "learn from a teacher: its prediction, or its probabilities",
         hidden=True, aliases=("distillation_type",)),
    Flag("teacher", user_path, None, "run folder, checkpoint file of any format, folder of timm or transformers, or published "
         "name", FREE, metavar="PATH", requires=_is("distillation", "hard", "soft"), aliases=("teacher_path",)),
    Flag("distillation_alpha", unit_interval, 0.5, "weight of the teacher in the loss", OVERRIDE,
         requires=_is("distillation", "hard", "soft")),
    Flag("distillation_temperature", positive_float, 1.0, "softens both sides of --distillation soft", OVERRIDE,
         requires=_is("distillation", "soft"), aliases=("distillation_tau",)),
) | _group(
    "edited attention",
    Flag("attention_edits", user_path, None, "folder of edits made with annotate.py, which the attention of the sigmoid layers "
         "learns", FREE, metavar="DIR"),
    Flag("attention_loss_weight", non_negative_float, 1.0, "times the mean square of sigmoid attention - edit, added to the loss",
         OVERRIDE, requires=_has("attention_edits")),
) | _group(
    "the run",
    Flag("eval_every", positive_int, None, "steps between evaluations (default: the recipe's, or a fifth of a shorter "
         "--num_steps; else an epoch, or a tenth of --num_steps where that is set)", FREE, stored=True, aliases=("eval_steps",)),
    Flag("save_every", positive_int, None, "steps between checkpoints (default: --eval_every)", FREE, stored=True,
         aliases=("save_steps",)),
    Flag("keep_checkpoints", positive_int, 2, "number of step checkpoints to keep, besides best.pt", FREE,
         aliases=("save_total_limit",)),
    Flag("precision", ("auto", "fp32", "tf32", "bf16", "fp16"), "auto", "auto: bf16 where the processor multiplies it natively, "
         "else fp32; tf32: fp32 whose products may round to TF32 on a GPU", OVERRIDE),
    Flag("fp16", None, False, "the same as --precision fp16", OVERRIDE, alias_of=("precision", "fp16")),
    Flag("fp16_opt_level", ("O0", "O1", "O2", "O3"), "O2", "O0 fp32; O1 autocast; O2 and float16 gradient traffic; O3 all fp16",
         OVERRIDE, requires=(lambda config: config["precision"] == "fp16", "--fp16 (PRECISION=fp16 for train.sh)")),
    Flag("loss_scale", non_negative_float, 0.0, "fixed loss scale for fp16 O1 and O2; 0: dynamic", OVERRIDE, hidden=True),
    Flag("compile", None, False, "torch.compile the model: a minute or so at the start, faster steps from then on", FREE,
         aliases=("torch_compile",)),
    Flag("device", ("auto", "cpu", "cuda", "mps"), "auto", "auto: a GPU of CUDA or ROCm if there is one, otherwise the CPU; mps: "
         "an Apple GPU (not tested by this project)", FREE),
    Flag("num_workers", non_negative_int, None, "loader processes per rank (default: none for images held in memory; else on a "
         "CPU a quarter of the cores, up to 4, on a GPU all but one, up to 16)", FREE,
         aliases=("workers", "j", "dataloader_num_workers")),
    Flag("seed", non_negative_int, 42, "fixes initialization, order, augmentation and dropout", OVERRIDE),
    Flag("exact", None, False, "sum gradients in a fixed order: the same bits on any number of processes; slower", OVERRIDE),
    Flag("non_finite", ("stop", "skip"), "stop", "what a loss or gradient that is NaN or infinite does: end the run, or skip the "
         "update (ten in a row end it)", FREE, hidden=True),
    Flag("bad_images", ("stop", "skip"), "stop", "what an unreadable training image does: end the run, or be replaced by the "
         "next one and listed in bad_images.txt", FREE, hidden=True),
    Flag("max_bad_images", unit_interval, 0.01, "the run ends when a larger fraction of the training images had to be replaced",
         FREE, requires=_is("bad_images", "skip")),
    Flag("rank_timeout", positive_int, 600, "seconds that processes wait for one that does not answer before the run ends", FREE,
         hidden=True),
    Flag("profile", None, False, "write a trace of a few steps for Perfetto, and which operators take their time", FREE),
    Flag("eval_only", None, False, "evaluate --resume_path (or the pre-trained model with its own head) and stop", FREE,
         aliases=("eval", "test_only")),
    Flag("eval_train", None, False, "at the end, evaluate on the training images too, without augmentation", FREE),
    Flag("confusion_matrix", None, False, "with the last evaluation, write confusion.csv and per_class.csv", FREE),
)

SETTINGS: tuple[str, ...] = tuple(row.name for row in FLAGS.values() if row.alias_of is None)       # the attributes of a Config
SIZES: tuple[str, ...] = tuple(row.name for row in FLAGS.values() if row.model == SIZE)
MODEL_KEYS: tuple[str, ...] = tuple(row.name for row in FLAGS.values() if row.model)


def defaults() -> dict:
    """The default of every setting."""
    return {name: FLAGS[name].default for name in SETTINGS}


def before() -> dict:
    """What a checkpoint had that was written before a flag existed."""
    return {name: FLAGS[name].before for name in SETTINGS}
