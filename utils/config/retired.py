"""Flags that no longer exist: what to type instead, and how checkpoints with them are read."""

import shlex

from utils import launch

from .types import ConfigError

_DATA = ("dataset", "data_dir", "recipe", "class_order", "path_column", "label_column", "image_dir", "exif", "intensity_range",
         "alpha", "num_workers")
# The flags of train.py that the commands of dataset.py have.
DATASET_FLAGS = {
    "check": (*_DATA, "val_fraction", "test_fraction", "split_seed", "output_dir"),
    "prepare": (*_DATA, "bad_images", "max_bad_images"),
}
_BY_TORCHRUN = "torchrun sets the rank in the environment. Omit it."
# What to do in place of the flag.
RETIRED = {
    "local_rank": _BY_TORCHRUN, "local-rank": _BY_TORCHRUN,
    "gpu": "choose devices with GPUS=0,1 bash train.sh (or CUDA_VISIBLE_DEVICES)",
    "worker_timeout": "the time limit of loader processes is 300 seconds. Omit it.",
    "float32_matmul": "use --precision tf32 in place of --float32_matmul high, and --precision fp32 for highest",
    "check_data": "Run: {python} dataset.py check", "prepare": "Run: {python} dataset.py prepare",
    "prepare_size": "set it with {python} dataset.py prepare --size",
}
# The value with which a checkpoint can be resumed (None where nothing is listed).
RESUMABLE = {"worker_timeout": 300, "float32_matmul": "highest", "check_data": False, "prepare_size": 256}


def advise(found: dict, flags: dict) -> str:
    """Return the message for a command line with retired flags. found: name -> text that was typed."""
    name = next(name for name in ("prepare", "check_data", *found) if name in found)
    words = []
    if name == "prepare":
        words = ([found[name]] if found[name] else []) + (["--size", found["prepare_size"]] if "prepare_size" in found else [])
    for flag in DATASET_FLAGS.get(name.removesuffix("_data"), ()):
        words += [f"--{flag}", str(flags[flag])] if flag in flags else []
    instead = RETIRED[name].format(python=launch.python_command())
    separator = "." if instead.startswith("Run") else ":"
    return " ".join([f"--{name} is not used any more{separator} {instead}", *map(shlex.quote, words)])


def check_retired(saved: dict, values: dict) -> dict:
    """Return `values` with a checkpoint's retired settings translated. Raises ConfigError for one that has no equivalent."""
    exact_products = values["precision"] not in ("auto", "fp32")         # the flag had no effect with the others
    if saved.get("float32_matmul") == "high" and not exact_products:
        values = values | {"precision": "tf32"}
    if saved.get("float32_matmul") == "high" or exact_products:
        saved = saved | {"float32_matmul": "highest"}
    for name in RETIRED:
        if name in saved and saved[name] != RESUMABLE.get(name):
            raise ConfigError(f"--{name} {saved[name]}: the checkpoint was made with this flag, which no longer exists. Resume "
                              "it with the version of this project that made it, or start a new run with --pretrained_dir.")
    return values
