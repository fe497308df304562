"""Finds held-out images that the start weights were trained on: an accuracy on them means little."""

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


# `start`: fields of a checkpoint, by name: config, classes, train_images, data.


def start_run(start: str) -> tuple[Path, dict] | None:
    """Return the checkpoint of --pretrained_dir and its fields, if it is of a run of this program.

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
    """Return, by name of a held-out split, the number of its images that the run `start` was trained on, if there are any.

    splits: of `dataset` in `data_dir`. None: unknown, because the data have changed since.
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
    except DataError:                                        # these data cannot be divided so: they are different ones
        return {}
    if start["data"] and (len(theirs), fingerprint(theirs)) != (start["train_images"], start["data"]):
        same_place = os.path.realpath(config["data_dir"]) == os.path.realpath(data_dir)
        return None if same_place and (config["val_fraction"] or config["test_fraction"]) else {}
    trained = {theirs.name(index) for index in range(len(theirs))}
    counts = {name: sum(split.name(index) in trained for index in range(len(split))) for name, split in splits.held_out.items()}
    return {name: count for name, count in counts.items() if count}


def warning_of_seen(start: Mapping, path: str | Path, sources: Any, splits: Splits) -> str:
    """Return a warning for a run that starts from these weights, or ''. sources: has `dataset`, `data_dir` and fractions."""
    seen = seen_images(start, sources.dataset, sources.data_dir, splits)
    if seen is None:
        return (f"warning: the images in {sources.data_dir} are not those that {path} was trained on (images were added, "
                "removed or renamed), so it may have been trained on images that are held out here")
    if not seen:
        return ""
    counts = " and ".join(f"{count} of {len(splits.held_out[name])} {name} images" for name, count in seen.items())
    drawn = {name: getattr(sources, name) for name in DRAWN}
    return f"warning: {path} was trained on {counts}, so their accuracy means little. {advise(start, drawn)}"


def advise(start: Mapping, drawn: dict) -> str:
    """Return the flags with which the same images are held out as in the run `start`. `drawn`: the values of DRAWN here."""
    theirs = {name: start["config"].get(name) or 0 for name in DRAWN}
    advice, values = "Hold out the same images as that run", theirs
    if not (theirs["val_fraction"] or theirs["test_fraction"]):
        advice, values = "Train that run again, with the same images held out", drawn
    flags = [f"--{name} {values[name]}" for name in DRAWN if values[name] or name == "split_seed"]
    return f"{advice}: {' '.join(flags)}"


def chosen_on(path: Path, run: Mapping | None, step: int, config: Mapping, splits: Splits, name: str) -> int | None:
    """Return on how many images of the split `name` the checkpoint was chosen; None: unknown, because the data have changed.

    Only a best.pt is chosen, unless it is of the last step, which would have been reported anyway. run: fields of the
    checkpoint, as `start` above, None where it is of no run; config: of the evaluation, of which `splits` are.
    """
    if not run or path.name != BEST_FILE or name == "train":
        return 0
    theirs = before() | run["config"]
    if step == theirs["num_steps"] or theirs["dataset"] != config["dataset"]:
        return 0
    split = splits.held_out[name]
    if all(theirs[key] == config[key] for key in (*DRAWN, "data_dir")):
        return len(split) if name == splits.val_name else 0
    # Their images of the same name may be others now: a `val` that was drawn, where the run had a folder val/.
    same_place = os.path.realpath(theirs["data_dir"]) == os.path.realpath(config["data_dir"])
    try:
        then = splits_of(theirs, data_dir=config["data_dir"], reading=AS_STORED,
                         rule=ClassRule(theirs["class_order"], tuple(run["classes"])))
    except DataError:
        return None if same_place else 0
    known = run["data"] or (same_place and fingerprint(then.train))              # older checkpoints have none
    if (len(then.train), fingerprint(then.train)) != (run["train_images"], known):
        return None if same_place else 0
    chosen = {then.val.name(index) for index in range(len(then.val))}
    return sum(split.name(index) in chosen for index in range(len(split)))
