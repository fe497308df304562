"""Fills models from files in tests: load, compare, and check errors."""

from pathlib import Path

import numpy as np
import pytest
import reference
import torch

from models import ModelError, create_model


def load(path: Path, row, head: str = "keep", **more):
    """Return a model of `row`, or of a case of reference.ROWS, filled from a file."""
    return create_model(reference.ROWS[row] if isinstance(row, str) else row, pretrained=path, head=head, **more)


def load_case(case: str, head: str = "keep", file: str | None = None, **more):
    """Return the model of a case of reference.TORCH_ROWS, filled from its file or another one."""
    return load(reference.TORCH / (file or reference.TORCH_FILES[case]), reference.TORCH_ROWS[case], head, **more)


def random_model(row, classes: int = 3, img_size=None, std: float = 0.2, **overrides):
    """Return a model with random parameters, none of them zero, so that each affects the output."""
    torch.manual_seed(0)
    model = create_model(row, classes, img_size, **overrides)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def published_model(case: str):
    """Return the model of a case of reference.TORCH_ROWS, filled without our loader; the names must be the published ones."""
    state = reference.torch_state(case)
    model = create_model(reference.TORCH_ROWS[case], len(state["head.bias"])).eval()
    model.load_state_dict(state)
    return model


def refused(message: str, call, *arguments, **more) -> str:
    """Return the text of the ModelError, which must be one line that matches `message`."""
    with pytest.raises(ModelError, match=message) as error:
        call(*arguments, **more)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


def same_state(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save_arrays(path: Path, arrays: dict[str, np.ndarray], save=np.savez, **more: np.ndarray) -> Path:
    with open(path, "wb") as stream:                     # a stream, because numpy adds .npz to other names
        save(stream, **arrays, **more)
    return path
