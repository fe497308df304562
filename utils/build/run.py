"""Config and checkpoint -> the Run: new, resumed, or branched off another."""

import contextlib
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch

from utils import distributed, launch
from utils.config import Config, as_command, changes, lacking_settings
from utils.config.records import FLAG
from utils.data.classes import first_names
from utils.data.datasets import run_stem
from utils.distributed import Ranks
from utils.files import naming
from utils.process import StopSignal
from utils.run import folder
from utils.run.checkpoint import RULES, CheckpointError
from utils.run.health import Health, Plan
from utils.run.loggers import check_wandb
from utils.run.run import Run
from utils.training.criterion import Criterion, guess_loss
from utils.training.trainer import Trainer

from .data import Data
from .find import Found, SavedRun
from .model import Built

MAX_SHOWN = 6           # names in a line


def build_run(config: Config, found: Found, saved: SavedRun | None, ranks: Ranks, stop: StopSignal) -> Run:
    """Build the run and print what a resumed run changes; write nothing.

    Raises CheckpointError or LoggerError on every rank.
    """
    if config.wandb:
        check_wandb()
    if saved is None:
        return Run(config, None, None, ranks, stop)
    print_resume(config, saved, ranks)
    check_same_data(config, found, saved, ranks)
    return Run(config, saved.state, saved.opened, ranks, stop)


def print_resume(config: Config, saved: SavedRun, ranks: Ranks) -> None:
    if not ranks.is_main:
        return
    for reason in saved.opened.skipped.values():
        print(f"warning: {reason}; using the checkpoint before it")
    path, step, skipped = saved.opened.path, saved.state.step, saved.state.step - saved.state.updates
    what = f" ({skipped} step{'s' * (skipped > 1)} made no update)" if skipped else ""
    what += f"; loss scale {saved.state.scaler['scale']:g}" if saved.state.scaler else ""
    print(f"evaluating {path} (step {step})" if config.eval_only else
          f"resuming {path} at step {step} of {config.num_steps}{what}")
    if lacking := [*saved.opened.lacking, *lacking_settings(saved.state.config)]:
        more = f", and {len(lacking) - MAX_SHOWN} more" if len(lacking) > MAX_SHOWN else ""
        print(f"a checkpoint of an earlier version: what it lacks ({', '.join(lacking[:MAX_SHOWN])}{more}) has the values of "
              "that version")
    for line in changes(config, saved.facts, ranks.size):
        print(line, flush=True)


def check_same_data(config: Config, found: Found, saved: SavedRun, ranks: Ranks) -> None:
    """Raise CheckpointError unless the data are those of the checkpoint's run, as far as a quick check can show."""
    state, splits = saved.state, found.splits
    if list(splits.classes) != state.classes:
        raise CheckpointError(f"--data_dir {config.data_dir}: the data have {len(splits.classes)} classes "
                              f"({first_names(splits.classes)}), the checkpoint {len(state.classes)} "
                              f"({first_names(state.classes)}): not the same task")
    if config.eval_only:
        return
    difference = ""
    if len(splits.train) != state.train_images:
        difference = f"the run has trained on {state.train_images} images, {config.data_dir} now holds {len(splits.train)}"
    elif state.data and found.fingerprint != state.data:
        difference = f"labels or names of the training images in {config.data_dir} have changed since the run began"
    if difference and not config.override:
        raise CheckpointError(f"{difference}, so the order of the samples would differ. Restore the data, start a new run, or "
                              "add --override")
    if difference and ranks.is_main:
        print(f"warning: {difference}: the order of the samples differs from here on (--override)")


@contextlib.contextmanager
def open_outputs(run: Run, found: Found, built: Built, data: Data, trainer: Trainer) -> Iterator[None]:
    """Around the step loop: claims the run's folder, opens the outputs of the run, and closes them and the loader at the end.

    Raises FolderError or InUseError on every rank.
    """
    ranks = run.ranks
    where, run.history.best = distributed.broadcast_from_main(ranks, lambda: _claim(run))
    run.config = config = run.config.replace(name=where.name, output_dir=str(where.parent))
    if ranks.is_main and (place := launch.launch_file("folder")) is not None:
        with naming(place):
            place.write_bytes(os.fsencode(where))      # processes that torchrun restarts continue there
    architecture = built.model.config.to_dict()
    distributed.broadcast_from_main(ranks, lambda: folder.write_config(where, config.to_dict(), architecture, ranks.size))
    constant = {"config": config.to_dict(), "architecture": architecture, "classes": list(data.splits.classes),
                "train_images": len(data.splits.train), "data": found.fingerprint, "cached": not data.loader.not_cached,
                "rules": run.state.rules if run.state else RULES,
                "license": run.state.license if run.state else found.license}
    settings = "\n  ".join(["settings:", *textwrap.wrap(as_command(config), 100, break_on_hyphens=False)])
    health = Health(plan_of(config, data, trainer.criterion)) if ranks.is_main else None
    # Runs used to call the only held-out split "test" always: their curves and those of newer runs meet in one chart.
    aliases = {f"{data.final.name}/accuracy": "test/accuracy"} if data.splits.val_is_test and data.final.name != "test" else None
    with contextlib.closing(data.loader), run.opened(where, Path(config.log_dir) / where.name, constant, trainer, data.sampler,
                                                     settings, health, aliases):
        yield


def plan_of(config: Config, data: Data, criterion: Criterion) -> Plan:
    """Return what the warnings of a run that goes badly depend on."""
    classes = data.splits.classes
    counts = torch.bincount(torch.as_tensor(data.splits.train.targets), minlength=len(classes))
    held_out, share = "", 1.0
    if data.watched and len(data.watched.images):
        targets = torch.as_tensor(data.watched.images.targets)
        held_out, share = data.watched.name, float(torch.bincount(targets).max()) / len(targets)
    guess = None if criterion.teacher else guess_loss(counts, criterion.label_smoothing, criterion.class_weights)
    return Plan(config, classes, float(counts.max() / counts.sum()), guess, held_out, share)


def _claim(run: Run) -> tuple[Path, dict]:
    """-> (the run's folder, {"step", "accuracy"} of its best.pt or {})"""
    config = run.config
    if run.source is None:
        return folder.create(config.output_dir, config.name, run_stem(config.dataset, config.data_dir)), {}
    typed = {name: config.to_dict()[name] if config.source(name) == FLAG else None for name in ("output_dir", "name")}
    return folder.resume(run.source, **typed)
