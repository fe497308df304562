"""Files of weights of any kind: names, shapes and arrays, read without trusting the file.

The content tells the kind, never the name: .npz archives (Google), PyTorch's zip files and older pickles (DeiT, CaiT,
MAE, timm, our own checkpoints), .safetensors (Hugging Face). Nothing is executed: arrays of numbers and plain values
are read, and of PyTorch's pickles nothing else is built than `weights_only=True` allows, and argparse.Namespace, the
flags of the run, which DeiT's and MAE's files hold. Tensors stay on the disk until they are read.
"""

import argparse
import mmap
import pickle
import pickletools
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .npz import DAMAGE, MAX_MEMBERS, NpzError, NpzFile
from .vit import ModelError
from .weight_names import CONTAINERS

CHUNK = 1 << 20
OWN_FORMAT = "vit-run-"                # the `format` entry of the checkpoints of our own runs begins so
# How the files begin that torch.save wrote until 2020: with a magic number, pickled.
LEGACY_NUMBER = 0x1950A86A20F9469CFC6C
LEGACY_MAGIC = pickle.dumps(LEGACY_NUMBER, protocol=2)
SMALL = 1 << 16                        # numbers in such a file that may exceed its size
AGAIN = "download it again"


class WeightFile:
    """`names`, `shape(name)` and `read(name)` of a file; `read` gives float32. Raises ModelError with one line."""

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
        return SafetensorsFile(path)
    if start[:2] == b"PK":
        return _open_zip(path)
    if start[:1] == b"\x80":
        _check_legacy(path, start)
        return TorchFile(path, mapped=False)
    raise ModelError(f"{path}: {_what_it_is(start)}")


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
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(info.filename.endswith("data.pkl") for info in members):
                _check_members(path, archive, members)
                return TorchFile(path, mapped=True)
        return NpzArrays(path)
    except NpzError as error:
        raise ModelError(f"{error}; {AGAIN} if it was cut off") from error
    except DAMAGE as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: damaged or cut off ({_line(error)}); {AGAIN}") from error


def _check_members(path: Path, archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> None:
    """PyTorch packs nothing, so that no member can be larger than the file; and its check sums must agree."""
    if len(members) > MAX_MEMBERS:
        raise ModelError(f"{path}: {len(members)} members, more than any checkpoint has")
    for info in members:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ModelError(f"{path}: member {info.filename!r} is packed or encrypted, which PyTorch does not write")
    if sum(info.file_size for info in members) > path.stat().st_size:
        raise ModelError(f"{path}: its members claim more bytes than the file has; {AGAIN}")
    for info in members:
        if info.CRC:                           # 0: written with torch.serialization.set_crc32_options(False)
            with archive.open(info) as stream:
                while stream.read(CHUNK):
                    pass


def _check_legacy(path: Path, start: bytes) -> None:
    """The older format makes room for what its pickles claim before it reads: no number in them may exceed the file."""
    if not start.startswith(LEGACY_MAGIC):
        raise ModelError(f"{path}: a pickle that PyTorch did not write: nothing of it was run; take a file of torch.save, "
                         "or a .safetensors file")
    size = path.stat().st_size
    try:
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for _ in range(5):                 # magic number, version, machine, weights, names of the arrays that follow
                largest = max((abs(number) for _, number, _ in pickletools.genops(content)
                               if isinstance(number, int) and number != LEGACY_NUMBER), default=0)
                if largest > max(size, SMALL):
                    raise ModelError(f"{path}: speaks of {largest} bytes or numbers and has {size} bytes; damaged, or to be "
                                     "saved anew with a PyTorch of today")
    except ModelError:
        raise
    except (ValueError, OSError, OverflowError, MemoryError) as error:
        raise ModelError(f"{path}: damaged or cut off ({_line(error)}); {AGAIN}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


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
        try:
            array = self._file.read(name)
        except NpzError as error:
            raise ModelError(str(error)) from error
        return torch.from_numpy(np.array(array, dtype=np.float32))       # a copy: the buffer read is read-only

    def close(self) -> None:
        self._file.close()


class SafetensorsFile(WeightFile):
    """A .safetensors file; the library checks that every array lies inside the file."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise ModelError(f"{path}: a .safetensors file; pip install safetensors, the package that reads it") from error
        self._file = self._checked(safe_open, str(path), framework="pt", device="cpu")
        self.names = list(self._file.keys())

    def _checked(self, call, *arguments, **more):
        try:
            return call(*arguments, **more)
        except Exception as error:             # whatever the library makes of a hostile header
            raise ModelError(f"{self.path}: damaged or cut off ({_line(error)}); {AGAIN}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._checked(lambda: self._file.get_slice(name).get_shape()))

    def read(self, name: str) -> Tensor:
        return self._checked(lambda: self._file.get_tensor(name).float())


class TorchFile(WeightFile):
    """A file of torch.save: weights alone, weights in an entry of a dictionary, or a checkpoint of one of our runs."""

    def __init__(self, path: Path, mapped: bool):
        super().__init__(path)
        content = self._load(mapped)
        if not isinstance(content, dict):
            raise ModelError(f"{path}: holds a {type(content).__name__}, not weights by name; save model.state_dict()")
        if str(content.get("format", "")).startswith(OWN_FORMAT):
            weights = self._own(content)
        else:
            weights = self._foreign(content)
        self._weights = {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
        self.left_out += sorted(str(name) for name in weights if str(name) not in self._weights)
        if not self._weights:
            raise ModelError(f"{path}: holds no arrays (its entries: {', '.join(map(str, list(content)[:6]))})")
        self.names = list(self._weights)
        for name, value in self._weights.items():
            self._check(name, value)

    def _load(self, mapped: bool):
        mapped = mapped and self.path.suffix != ".safetensors"       # a path of that name torch.load gives to safetensors
        try:
            with open(self.path, "rb") as stream, torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(self.path if mapped else stream, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:             # what is raised depends on where the file is damaged
            foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
            if foreign:
                raise ModelError(f"{self.path}: asks for {foreign[1]}, which no file of weights needs: nothing was run; "
                                 "take a file that holds arrays alone, or a .safetensors file") from error
            raise ModelError(f"{self.path}: damaged, cut off or not of torch.save ({_line(error)}); {AGAIN}") from error

    def _own(self, content: dict) -> dict:
        """The averaged weights where the run kept them: they are the ones that it evaluates."""
        self.run = {name: content.get(name) for name in ("architecture", "classes", "config")}
        averaged = isinstance(content.get("ema"), dict) and len(content["ema"]) > 0
        weights = content.get("ema" if averaged else "model")
        if not (isinstance(weights, dict) and isinstance(self.run["architecture"], dict) and isinstance(self.run["config"], dict)
                and isinstance(self.run["classes"], list)):
            raise ModelError(f"{self.path}: a checkpoint of a run without model, architecture, classes or config; it is damaged")
        if averaged:
            self.notes.append("averaged weights (ema)")
        self.left_out = sorted(str(name) for name in content if name != ("ema" if averaged else "model"))
        return weights

    def _foreign(self, content: dict) -> dict:
        for name in CONTAINERS:
            inside = content.get(name)
            if isinstance(inside, dict) and any(isinstance(value, Tensor) for value in inside.values()):
                self.left_out = sorted(str(other) for other in content if other != name)
                return inside
        return content

    def _check(self, name: str, value: Tensor) -> None:
        """A dense array whose numbers are all in the file: a few bytes must not stand for a large array."""
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized and not value.is_complex()
        if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ModelError(f"{self.path}: {name} is no plain array of numbers")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights[name].shape)

    def read(self, name: str) -> Tensor:
        return self._weights[name].detach().float()
