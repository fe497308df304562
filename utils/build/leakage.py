"""Held-out images that the start weights were trained on: an accuracy on them says little."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.config import before
from utils.config.saved import check_settings
from utils.data.classes import ClassRule
from utils.data.datasets import splits_of
from utils.data.reading import AS_STORED
from utils.data.splits import DataError, Splits, fingerprint
from utils.run.checkpoint import BEST_FILE, CheckpointError, read_header
from utils.run.folder import resolve_checkpoint

from .opened import given_by

DRAWN = ("val_fraction", "test_fraction", "split_seed")


# `start` is what a checkpoint holds of its run, by name: config, classes, train_images, data.


def start_run(start: str) -> tuple[Path, dict] | None:
    """The checkpoint that --pretrained_dir means and what it holds of its run, if it is of one of ours.

    Raises ConfigError for settings that no run has.
    """
    path = Path(resolve_checkpoint(start))
    try:
        header = read_header(path) if path.is_file() else None
    except CheckpointError:
        return None
    if header is not None:
        with given_by("--pretrained_dir"):
            check_settings(header.config, path)
    return header and (path, vars(header))


def seen_images(start: Mapping, dataset: str, data_dir: str, splits: Splits) -> dict[str, int] | None:
    """By name of a held-out split, how many of its images the run `start` was trained on; nothing where it is none.

    splits: of `dataset` in `data_dir`. None: this cannot be known, because the data are not what they were then.
    """
    config = before() | start["config"]
    if config["dataset"] != dataset:
        return {}
    now = (len(splits.train), fingerprint(splits.train))
    if now == (start["train_images"], start["data"]):
        return {}                                            # the same images were held out
    try:
        theirs = splits_of(config, data_dir=data_dir, reading=AS_STORED,
                           rule=ClassRule(config["class_order"], tuple(start["classes"]))).train
    except DataError:                                        # these data cannot be divided so: they are others
        return {}
    if start["data"] and (len(theirs), fingerprint(theirs)) != (start["train_images"], start["data"]):
        same_place = os.path.realpath(config["data_dir"]) == os.path.realpath(data_dir)
        return None if same_place and (config["val_fraction"] or config["test_fraction"]) else {}
    trained = {theirs.name(index) for index in range(len(theirs))}
    counts = {name: sum(split.name(index) in trained for index in range(len(split))) for name, split in splits.held_out.items()}
    return {name: count for name, count in counts.items() if count}


def warning_of_seen(start: Mapping, path: str | Path, sources: Any, splits: Splits) -> str:
    """The line for a run that starts from these weights, or ''. sources: with `dataset`, `data_dir` and the fractions."""
    seen = seen_images(start, sources.dataset, sources.data_dir, splits)
    if seen is None:
        return (f"warning: the images in {sources.data_dir} are not those that {path} was trained on (images were added, "
                "removed or renamed), so that it may have seen those that are held out here")
    if not seen:
        return ""
    counts = " and ".join(f"{count} of {len(splits.held_out[name])} {name} images" for name, count in seen.items())
    drawn = {name: getattr(sources, name) for name in DRAWN}
    return f"warning: {path} was trained on {counts}, so that their accuracy says little. {advise(start, drawn)}"


def advise(start: Mapping, drawn: dict) -> str:
    """What to set, so that what is held out here was held out there. `drawn`: the values of DRAWN here."""
    theirs = {name: start["config"].get(name) or 0 for name in DRAWN}
    advice, values = "Hold out the same images as that run", theirs
    if not (theirs["val_fraction"] or theirs["test_fraction"]):
        advice, values = "Train that run again, with the same images held out", drawn
    flags = [f"--{name} {values[name]}" for name in DRAWN if values[name] or name == "split_seed"]
    return f"{advice}: {' '.join(flags)}"


def chosen_on(path: Path, settings: Mapping | None, step: int, values: Mapping, splits: Splits, name: str) -> bool:
    """Whether the split of this name holds the images on which the checkpoint was chosen: that is a run's best.pt, unless it is
    of the last step, which would have been reported anyway.

    settings, step: of the checkpoint's run, None where it is of none; values: of the evaluation, of which `splits` are.
    """
    if settings is None or path.name != BEST_FILE or name != splits.val_name:
        return False
    run = before() | settings
    return step != run["num_steps"] and all(run[key] == values[key] for key in (*DRAWN, "dataset", "data_dir"))
