"""Writes weight files for tests: with torch.save, and zip archives with any members."""

import zipfile
from pathlib import Path

import pytest
import torch

from configs import MODELS
from utils.run.checkpoint import RunState


def saved(path: Path, content: object, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def archive(path: Path, members: dict[str, bytes], **more) -> Path:
    with zipfile.ZipFile(path, "w", **more) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def rezipped(source: Path, path: Path, edit=lambda name, data: data, **more) -> Path:
    """Copy an archive with changed members and right check sums."""
    with zipfile.ZipFile(source) as file:
        members = {name: edit(name, file.read(name)) for name in file.namelist()}
    return archive(path, members, **more)


def plain_state(step: int = 3, **changes) -> RunState:
    """Return the smallest valid state."""
    values = {"step": step, "updates": step, "skips": 0, "model": {"weight": torch.arange(6.0).view(2, 3)}, "optimizer": {},
              "scaler": {}, "best": {}, "first": {}, "config": {"img_size": (8, 10)},
              "architecture": MODELS["ViT-Nano_2"].to_dict(), "classes": ["a", "b"], "train_images": 7, "seconds": 1.5}
    return RunState(**values | changes)


def run_state(optimizer: str) -> RunState:
    """Return a state with all kinds of values that a checkpoint of a run has."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3, bias=False))
    stepped = {"sgd": lambda of: torch.optim.SGD(of, 0.1, momentum=0.9), "adamw": torch.optim.AdamW,
               "lamb": lambda of: pytest.importorskip("timm.optim").Lamb(of)}[optimizer](model.parameters())
    for _ in range(2):
        model(torch.randn(4, 6)).square().sum().backward()
        stepped.step()
    scaler = torch.amp.GradScaler("cpu").state_dict()
    more = {"half": torch.randn(4).half(), "brain": torch.randn(4).bfloat16(), "double": torch.randn(2).double(),
            "whole": torch.arange(3), "bytes": torch.get_rng_state()[:9], "flag": torch.tensor([True]), "none": torch.zeros(0, 4)}
    return RunState(step=7, updates=6, skips=1, model=model.state_dict(), optimizer=stepped.state_dict(), scaler=scaler,
                    best={"step": 3, "accuracy": 0.5}, first={}, config={"lr": 1e-3, "betas": (0.9, 0.999), "edits": None},
                    architecture={"patch_size": 4, "name": "ü"}, classes=["a", "b"], train_images=9, seconds=1.5, ema=more)


def same(one: object, other: object) -> bool:
    """Whether two values have the same type and the same bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
