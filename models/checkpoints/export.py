"""Exports a model for other programs: in Google's layout, with timm's names, or as a folder that timm and transformers open.

A file gets its name only when it is complete.
"""

import errno
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from models.base import PARTS, PLAIN, ImageTransformer
from models.errors import ModelError

from .conversions import CONVERSIONS, google_rows
from .described import CONFIG, ROW_ENTRY, WEIGHTS
from .description import NOT_EXPORTED
from .key_maps import BIG_VISION_POSITIONS, GOOGLE_BLOCKS
from .layout import abbreviate, spelled
from .timm_models import spelling_of
from .timm_names import STEM_ALONE
from .zip_archive import one_line


def save_npz(model: ImageTransformer, path: str | Path) -> None:
    """Write the model in Google's layout (pre-linen names, float32, not compressed); with big_vision's names for SigLIP.

    Raises ModelError for a grid that is not square, because the layout does not store the grid of the position table; for
    parameters without a name in it (CaiT, distilled DeiT, the norm after MAE's mean); and for parts that it does not have.
    """
    _check_google(model, path)
    _check_grid(model, path)
    pools = model.config.classifier == "attention"
    rows = google_rows(model, GOOGLE_BLOCKS[f"MultiHeadDotProductAttention_{0 if pools else 1}"])
    nameless = set(model.state_dict()) - {row.parameter for row in rows}
    if nameless:
        raise ModelError(f"{path}: Google's layout has no names for {abbreviate(nameless)}; save_timm writes them (.safetensors)")
    arrays = {}
    for ours, sources, conversion in rows:
        value = model.get_parameter(ours).detach().float().cpu()
        for part, source in enumerate(BIG_VISION_POSITIONS[:1] if pools and ours == "pos_embed" else sources):
            arrays[source] = np.ascontiguousarray(CONVERSIONS[conversion].to_file(value, model, part).numpy())
    _write(Path(path), lambda stream: np.savez(stream, **arrays))


def _check_google(model: ImageTransformer, path: str | Path) -> None:
    """Raise ModelError if the model has a part that Google's encoder lacks or that no array of the file would show."""
    config = model.config
    parts = {key: config[key] for key in PARTS if config[key] != PLAIN[key]}
    parts.pop("pool_mlp_dim", None)
    if config.pool_heads in (0, config.num_heads):
        parts.pop("pool_heads", None)
    if config.classifier in ("mean", "attention"):
        parts.pop("class_token", None)
    if config.classifier == "token_mean" or (config.classifier in ("mean", "attention") and config.class_token):
        parts["classifier"] = config.classifier
    for key, value in parts.items():
        raise ModelError(f"{path}: Google's layout has no {key} {value!r}; save_timm writes it (.safetensors)")


def save_timm(model: ImageTransformer, path: str | Path) -> None:
    """Write the model's state dict with timm's names, float32: .safetensors, or .pth (.pt, .bin) for torch.load.

    DeiT, CaiT and MAE use these names too. The file also stores the model's row, in an entry that timm ignores. The same model
    gives the same bytes. Raises ModelError for another suffix, and for a grid that is not square.
    """
    _check_grid(model, path)
    save_weights(model, Path(path))


def save_weights(model: ImageTransformer, path: Path) -> None:
    """Write what save_timm writes, for any grid: a config.json next to the file gives the image size."""
    stem_alone = model.config.resnet_layers is not None and not model.config.resnet_layers
    spellings = {ours: theirs for theirs, ours in STEM_ALONE.items()} if stem_alone else {}
    names_of, state = spelling_of(model.config), OrderedDict()
    for ours, value in model.state_dict().items():
        names = names_of(spelled(ours, spellings))
        for name, part in zip(names, value.detach().float().cpu().chunk(len(names))):
            state[name] = part.contiguous()
    row = own_row(model)
    state._metadata = {"": {"version": 1, ROW_ENTRY: row}}                   # the attribute that PyTorch's state dicts have
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import save
        except ImportError as error:
            raise ModelError(f"{path}: writing it needs the package safetensors: pip install safetensors, or use the suffix .pth"
                             ) from error
        _write(path, lambda stream: _write_sorted(stream, save(state, metadata={"format": "pt", ROW_ENTRY: json.dumps(row)})))
    elif path.suffix in (".pth", ".pt", ".bin"):
        _write(path, lambda stream: torch.save(state, stream))
    else:
        raise ModelError(f"{path}: the suffix must be .safetensors, .pth, .pt or .bin, as it determines the format")


def own_row(model: ImageTransformer) -> dict:
    """Return the row that our exports store: how the model is built and computes, but not how it was trained."""
    return {key: list(value) if isinstance(value, tuple) else value
            for key, value in model.config.items() if key not in NOT_EXPORTED}


def save_folder(model: ImageTransformer, folder: Path, config: dict, card: str) -> None:
    """Write a folder that timm and transformers open: the weights, `config` (timm_config.py) and `card`, its README.md."""
    save_weights(model, folder / WEIGHTS[0])
    for name, text in ((CONFIG, json.dumps(config, indent=2) + "\n"), ("README.md", card)):
        _write(folder / name, lambda stream, text=text: stream.write(text.encode("utf-8", "backslashreplace")))


def _write_sorted(stream: BinaryIO, content: bytes) -> None:
    """Write a .safetensors file with sorted metadata, whose order in the library is random; the length stays the same."""
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    notes = header.pop("__metadata__")
    text = json.dumps({"__metadata__": dict(sorted(notes.items())), **header}, separators=(",", ":"), ensure_ascii=False)
    stream.write(content[:8])
    stream.write(text.encode().ljust(length - 8))
    stream.write(memoryview(content)[length:])


def _check_grid(model: ImageTransformer, path: str | Path) -> None:
    if model.grid[0] != model.grid[1]:
        raise ModelError(f"{path}: such a file does not store that its position table has {model.grid[0]} x {model.grid[1]} "
                         "patches. Use a square img_size")


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as stream:
            write(stream)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:          # RuntimeError: torch's writer; errors of an open stream lack the path
        if isinstance(error, OSError) and (error.filename is not None or error.errno is None):
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise OSError(getattr(error, "errno", errno.EIO), reason, str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)
