"""Checkpoints of which there are names and shapes alone: they take no memory, whatever their size."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch

from models.checkpoints.description import Description
from models.checkpoints.opened import OpenedCheckpoint


def header_of(state: Mapping[str, torch.Tensor], described: Description | None = None, path: str = "x.pth") -> OpenedCheckpoint:
    """An opened file of these arrays, which may be on the meta device; described: what stands beside it."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    file = OpenedCheckpoint.__new__(OpenedCheckpoint)
    file.path = Path(path)
    file.file = SimpleNamespace(path=file.path, names=list(shapes), shape=shapes.get, run=None, notes=[], left_out=[],
                                described=described or Description(),
                                read=lambda name: torch.zeros(shapes[name]), read_view=lambda name: torch.zeros(shapes[name]))
    return file
