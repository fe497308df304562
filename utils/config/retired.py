"""Flags that no longer exist: what to type instead, and how checkpoints that used them are read."""

import dataclasses
import shlex

from .types import ConfigError

# The flags of train.py that python dataset.py check, and prepare, take.
CHECK_FLAGS = ("dataset", "data_dir", "recipe", "val_fraction", "test_fraction", "split_seed", "num_workers", "output_dir")
PREPARE_FLAGS = ("dataset", "data_dir", "recipe", "num_workers", "bad_images", "max_bad_images")


@dataclasses.dataclass(frozen=True)
class Retired:
    advice: str                  # what to do instead
    only_value: object = None    # what a checkpoint may have had and is resumed with


RETIRED = {
    "local_rank": Retired("torchrun sets the rank in the environment. Omit it."),
    "local-rank": Retired("torchrun sets the rank in the environment. Omit it."),
    "gpu": Retired("choose devices with GPUS=0,1 bash train.sh (or CUDA_VISIBLE_DEVICES)"),
    "worker_timeout": Retired("loader processes are waited for 300 seconds. Omit it.", only_value=300),
    "float32_matmul": Retired("use --precision tf32 in place of --float32_matmul high, and --precision fp32 for highest",
                              only_value="highest"),
    "check_data": Retired("", only_value=False),           # advise() has the commands of these
    "prepare": Retired(""),
    "prepare_size": Retired("give it to python dataset.py prepare", only_value=256),
}


def advise(found: dict, flags: dict) -> str:
    """The message for command lines that hold retired flags (name: text that was typed)."""
    if "prepare" in found:
        folder = [] if not isinstance(found["prepare"], str) else [found["prepare"]]
        size = [] if "prepare_size" not in found else ["--size", str(found["prepare_size"])]
        return _moved("prepare", ["python", "dataset.py", "prepare", *folder, *size], PREPARE_FLAGS, flags)
    if "check_data" in found:
        return _moved("check_data", ["python", "dataset.py", "check"], CHECK_FLAGS, flags)
    name = next(iter(found))
    return f"--{name} is not used any more: {RETIRED[name].advice}"


def _moved(name: str, command: list[str], taken: tuple[str, ...], flags: dict) -> str:
    words = [word for flag in taken if flag in flags for word in (f"--{flag}", str(flags[flag]))]
    return f"--{name} is not used any more. Run: {shlex.join(command + words)}"


def check_retired(saved: dict, values: dict) -> dict:
    """Translates a checkpoint's retired settings into `values`. Raises ConfigError for what has no equal."""
    if saved.get("float32_matmul") == "high" and values["precision"] in ("auto", "fp32"):
        values, saved = values | {"precision": "tf32"}, saved | {"float32_matmul": "highest"}
    for name, row in RETIRED.items():
        if name in saved and saved[name] != row.only_value:
            raise ConfigError(f"--{name} {saved[name]}: the checkpoint was made with this flag, which no longer exists. Resume "
                              "it with the version of this project that made it, or start a new run with --pretrained_dir.")
    return values
