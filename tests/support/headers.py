"""Checkpoints with only names and shapes: files without a description, and opened files without data, of any size."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from models.checkpoints.description import Description
from models.checkpoints.opened import OpenedCheckpoint


def save_plain(model: torch.nn.Module, path: Path) -> None:
    """Save only the arrays, as another program may do: nothing shows that they are ours."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


def header_of(state: Mapping[str, torch.Tensor], described: Description | None = None, path: str = "x.pth") -> OpenedCheckpoint:
    """Return an opened file of these arrays, which may be on the meta device. described: the description next to the file."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    file = OpenedCheckpoint.__new__(OpenedCheckpoint)
    file.path = Path(path)
    file.file = SimpleNamespace(path=file.path, names=list(shapes), shape=shapes.get, run=None, notes=[], left_out=[],
                                described=described or Description(),
                                read=lambda name: torch.zeros(shapes[name]), read_view=lambda name: torch.zeros(shapes[name]))
    return file
