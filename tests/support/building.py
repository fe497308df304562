"""Builds the objects of a run from flags, as train.py does, on the CPU and without training."""

import types
from pathlib import Path
from unittest import mock

import torch
from runs import TINY

from utils import build
from utils.build import data as build_data
from utils.config import check, choose, parse, resolve
from utils.distributed import Ranks
from utils.process import StopSignal
from utils.run import checkpoint

ONE_RANK = Ranks(0, 1, 0, 1, torch.device("cpu"))


def build_objects(*flags) -> types.SimpleNamespace:
    """Build the objects for a tiny model on digits, from scratch; `flags` override these settings.

    -> config, found, run, built, model, data, trainer; train and eval: the arguments of the loaders
    """
    typed = parse([str(flag) for flag in ("--dataset", "digits", *TINY, *flags)])
    check(typed)
    found = build.find(choose(typed), None, ONE_RANK)
    config = resolve(typed, found.facts)
    run = build.build_run(config, found, None, ONE_RANK, StopSignal())
    built = build.build_model(config, found, None, ONE_RANK)
    with mock.patch.object(build_data, "train_loader", wraps=build_data.train_loader) as train, \
            mock.patch.object(build_data, "eval_loader", wraps=build_data.eval_loader) as evaluation:
        data = build.build_data(config, found, None, ONE_RANK, built)
        data.eval_loader(data.final.images)
    trainer = build.build_trainer(config, None, ONE_RANK, built, data, run.requests)
    return types.SimpleNamespace(config=config, found=found, run=run, built=built, model=built.model, data=data, trainer=trainer,
                                 train=types.SimpleNamespace(**train.call_args.kwargs),
                                 eval=types.SimpleNamespace(**evaluation.call_args.kwargs))


def write_checkpoint(file: Path, *flags) -> types.SimpleNamespace:
    """Write the checkpoint of a run before its first step, with a head that is not zero -> the run's objects"""
    objects = build_objects(*flags)
    torch.nn.init.normal_(objects.model.head.weight)
    file.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(file, checkpoint.RunState(
        *objects.trainer.progress, model=objects.model.state_dict(), optimizer={}, scaler={}, best={}, first={},
        config=objects.config.to_dict(), architecture=objects.model.config.to_dict(), classes=list(objects.data.splits.classes),
        train_images=len(objects.data.splits.train), seconds=0.0))
    return objects
