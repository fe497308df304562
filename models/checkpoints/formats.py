"""Files of weights of any kind: names, shapes and arrays, read without trusting the file.

The content tells the kind, never the name: .npz archives (Google), PyTorch's zip files and older pickles (DeiT, CaiT,
MAE, timm, our own checkpoints), .safetensors (Hugging Face). Nothing is executed: arrays of numbers and plain values
are read, and of PyTorch's pickles nothing else is built than `weights_only=True` allows, and argparse.Namespace, the
flags of the run, which DeiT's and MAE's files hold. Tensors stay on the disk until they are read.
"""

import argparse
import json
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.errors import ModelError

from . import torch_file
from .key_maps import CONTAINERS
from .npz import NpzError, NpzFile
from .torch_file import AGAIN
from .zip_archive import DAMAGE, ZipError, one_line, open_archive, shown

OWN_FORMAT = "vit-run-"                # the `format` entry of the checkpoints of our own runs begins so
MAX_HEADER = 1 << 22                   # bytes of a .safetensors file's JSON; published ViTs take 50 kB
MAX_NAME = 1000                        # characters
SAFETENSORS_TYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}


class WeightFile:
    """`names`, `shape(name)` and `read(name)` of a file; `read` gives float32, 4 bytes a number whatever the file takes.
    Raises ModelError with one line."""

    def __init__(self, path: Path):
        self.path = path
        self.names: list[str] = []
        self.left_out: list[str] = []          # what stands beside the weights
        self.notes: list[str] = []
        self.run: dict | None = None           # of our own checkpoints: architecture, classes, config

    def shape(self, name: str) -> tuple[int, ...]:
        raise NotImplementedError

    def read(self, name: str) -> Tensor:
        raise NotImplementedError

    def lend(self, name: str) -> Tensor:
        """`read`, good until the same thread's next `lend`, and only to be read: it may lie in the file. Threads may share a
        file once every shape was asked for."""
        return self.read(name)

    def close(self) -> None:
        pass

    def __enter__(self) -> "WeightFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_weights(path: str | Path) -> WeightFile:
    """Raises ModelError if there is no such file, or it is damaged or of a kind that holds no weights."""
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no checkpoint at {path}: give a file of weights (.npz, .pth, .safetensors) or a published name "
                         "such as imagenet21k/ViT-B_16")
    try:
        with open(path, "rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    if start[4:9] == b"\0\0\0\0{":                 # the length of the header in 8 bytes, then its JSON
        file = SafetensorsFile(path)
    elif start[:2] == b"PK":
        file = _open_zip(path)
    elif start[:1] == b"\x80":
        file = TorchFile(path)
    else:
        raise ModelError(f"{path}: {_what_it_is(start)}")
    for name in file.names:
        if not name.isprintable() or len(name) > MAX_NAME:
            file.close()
            raise ModelError(f"{path}: {shown(name)!r} is no name of an array; {AGAIN}")
    return file


def _what_it_is(start: bytes) -> str:
    if not start:
        return f"the file is empty; {AGAIN}"
    if start.lstrip()[:1] == b"<":
        return f"a web page instead of weights, of a sign-in perhaps; {AGAIN}"
    if start.startswith(b"version https://git-lfs"):
        return "the stand-in of Git LFS instead of weights; fetch the file itself (git lfs pull)"
    return f"not a file of weights (.npz, PyTorch or .safetensors), or damaged; {AGAIN} if it should be one"


def _open_zip(path: Path) -> WeightFile:
    try:
        with open(path, "rb") as stream, open_archive(stream) as archive:
            ours = any(info.filename.endswith("data.pkl") for info in archive.infolist())
        return TorchFile(path) if ours else NpzArrays(path)
    except ModelError:
        raise
    except NpzError as error:
        raise ModelError(f"{error}; {AGAIN} if it was cut off") from error
    except (ZipError, *DAMAGE) as error:
        raise ModelError(f"{path}: damaged or cut off ({one_line(error)}); {AGAIN}") from error


class NpzArrays(WeightFile):
    """An .npz archive."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._file = NpzFile(path)
        self.names = self._file.names

    def shape(self, name: str) -> tuple[int, ...]:
        try:
            return self._file.shape(name)
        except NpzError as error:
            raise ModelError(str(error)) from error

    def read(self, name: str) -> Tensor:
        return self._read(name, lend=False)

    def lend(self, name: str) -> Tensor:
        return self._read(name, lend=True)

    def _read(self, name: str, lend: bool) -> Tensor:
        try:
            array = self._file.read(name, lend)
        except NpzError as error:
            raise ModelError(str(error)) from error
        return torch.from_numpy(array.astype(np.float32, copy=False))

    def close(self) -> None:
        self._file.close()


class SafetensorsFile(WeightFile):
    """A .safetensors file; the library checks that the arrays fill the file. It has no check sums: a number that was changed
    is not noticed."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise ModelError(f"{path}: a .safetensors file; pip install safetensors, the package that reads it") from error
        self._checked(_check_header, path)
        self._file = self._checked(safe_open, str(path), framework="pt", device="cpu")
        self.names = list(self._checked(self._file.keys))

    def _checked(self, call, *arguments, **more):
        try:
            return call(*arguments, **more)
        except Exception as error:             # whatever the library makes of a hostile header
            raise ModelError(f"{self.path}: damaged or cut off ({one_line(error)}); {AGAIN}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._checked(lambda: self._file.get_slice(name).get_shape()))

    def read(self, name: str) -> Tensor:
        return self._checked(lambda: self._file.get_tensor(name).float())


def _check_header(path: Path) -> None:
    """Before the library makes an object of everything in it. Raises ValueError."""
    with open(path, "rb") as stream:
        length, = struct.unpack("<Q", stream.read(8))
        if length > MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(stream.read(length))
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] not in SAFETENSORS_TYPES:
            raise ValueError(f"{name} holds {entry['dtype']}, not plain numbers")


class TorchFile(WeightFile):
    """A file of torch.save: weights alone, weights in an entry of a dictionary, or a checkpoint of one of our runs."""

    def __init__(self, path: Path):
        super().__init__(path)
        content = torch_file.read(path, [argparse.Namespace], mapped=True)
        if not isinstance(content, dict):
            raise ModelError(f"{path}: holds a {type(content).__name__}, not weights by name; save model.state_dict()")
        if isinstance(content.get("format"), str) and content["format"].startswith(OWN_FORMAT):
            weights = self._own(content)
        else:
            weights = self._foreign(content)
        self._weights = {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
        self.left_out += sorted(shown(name) for name in weights if str(name) not in self._weights)
        if not self._weights:
            raise ModelError(f"{path}: holds no arrays (its entries: {', '.join(map(shown, list(content)[:6]))})")
        self.names = list(self._weights)

    def _own(self, content: dict) -> dict:
        """The averaged weights where the run kept them: they are the ones that it evaluates."""
        self.run = {name: content.get(name) for name in ("architecture", "classes", "config")}
        averaged = isinstance(content.get("ema"), dict) and len(content["ema"]) > 0
        weights = content.get("ema" if averaged else "model")
        if not (isinstance(weights, dict) and isinstance(self.run["architecture"], dict) and isinstance(self.run["config"], dict)
                and isinstance(self.run["classes"], list) and all(isinstance(name, str) for name in self.run["classes"])):
            raise ModelError(f"{self.path}: a checkpoint of a run without model, architecture, classes or config; it is damaged")
        if averaged:
            self.notes.append("averaged weights (ema)")
        self.left_out = sorted(shown(name) for name in content if name != ("ema" if averaged else "model"))
        return weights

    def _foreign(self, content: dict) -> dict:
        for name in CONTAINERS:
            inside = content.get(name)
            if isinstance(inside, dict) and any(isinstance(value, Tensor) for value in inside.values()):
                self.left_out = sorted(shown(other) for other in content if other != name)
                return inside
        return content

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights[name].shape)

    def read(self, name: str) -> Tensor:
        return self._weights[name].detach().float()
