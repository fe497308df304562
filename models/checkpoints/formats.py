"""Opens files of weights of any kind: names, shapes and arrays, read without trusting the file.

The content of a file determines its kind, never its name: .npz archives (Google), PyTorch's zip files and older pickles (DeiT,
CaiT, MAE, timm, our own checkpoints), .safetensors (Hugging Face). Nothing in a file is executed. Tensors stay on the disk until
they are read.
"""

import contextlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.errors import WeightsError

from . import run_fields, torch_file
from .described import HALF, IMAGENET, ROW_ENTRY, describe, is_weights_folder, weights_in
from .first_look import NPZ, SAFETENSORS, TORCH, again, kind_of, report_damage
from .key_maps import AVERAGED_FIRST, CONTAINERS, SELF_DISTILLED
from .mapping import MappedFile
from .npz import NpzFile
from .zip_archive import shown

RUN_ENTRIES = ("architecture", "classes", "config", "step", "train_images", "data", "license")
MAX_NAME = 1000                        # characters
MAX_DEPTH = 4                          # nested dictionaries
SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
                     "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


class WeightFile(contextlib.AbstractContextManager):
    """An open file of weights with the `names` of its arrays.

    Each kind adds `shape(name)` and `read(name)`, which returns a Tensor of float32 whatever the type in the file. Raises
    WeightsError with one line.
    """

    def __init__(self, path: Path):
        self.path = path
        self.names: list[str] = []
        self.left_out: list[str] = []          # other entries than the weights
        self.notes: list[str] = []
        self.run: dict | None = None           # RUN_ENTRIES, in our own checkpoints
        self.described = describe(path)        # what its config.json or its name says

    def read_view(self, name: str) -> Tensor:
        """Like `read`, but return read-only memory, perhaps of the file itself, valid until this thread's next `read_view`.

        Several threads may read a file after `shape` has been called for every array.
        """
        return self.read(name)

    def release(self, name: str) -> None:
        """Free the memory of an array that was read; it can be read again."""

    def close(self) -> None:
        pass

    def __exit__(self, *_) -> None:
        self.close()


def open_weights(path: str | Path) -> WeightFile:
    """Open a file of weights. Raises WeightsError if it is missing, damaged or of a kind without weights."""
    path = Path(path)
    if path.is_dir() and is_weights_folder(path):
        path = weights_in(path)
    if not path.is_file():
        raise WeightsError(f"no checkpoint at {path}: expected a file of weights (.npz, .pth, .safetensors), a folder of timm or "
                           "transformers (config.json and model.safetensors), or a published name such as imagenet21k/ViT-B_16")
    file = {NPZ: NpzWeights, SAFETENSORS: SafetensorsFile, TORCH: TorchFile}[kind_of(path)](path)
    for name in file.names:
        if not name.isprintable() or len(name) > MAX_NAME:
            file.close()
            raise WeightsError(f"{path}: {shown(name)!r} is not a name of an array; {again(path)}")
    return file


class NpzWeights(NpzFile, WeightFile):
    def __init__(self, path: Path):
        WeightFile.__init__(self, path)
        NpzFile.__init__(self, path)

    def read(self, name: str) -> Tensor:
        return torch.from_numpy(self.read_array(name).astype(np.float32, copy=False))

    def read_view(self, name: str) -> Tensor:
        return torch.from_numpy(self.read_array(name, reuse=True).astype(np.float32, copy=False))


class SafetensorsFile(WeightFile):
    """A .safetensors file. The library checks that the arrays fill the file.

    The format has no checksums, so a changed number goes unnoticed.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise WeightsError(f"{path}: reading a .safetensors file needs the package safetensors: pip install safetensors"
                               ) from error
        with self._report_damage(), open(path, "rb") as stream:
            self._file = safe_open(str(path), framework="pt", device="cpu")
            self.names = list(self._file.keys())
            self._pages, self._data = MappedFile(stream), 8 + int.from_bytes(stream.read(8), "little")
            self._header = json.loads(self._pages.memory_at(8, self._data - 8).tobytes()) if self.names else {}
            row = (self._file.metadata() or {}).get(ROW_ENTRY)
            self.described.take_own(json.loads(row) if row else None)

    def _report_damage(self) -> contextlib.AbstractContextManager:
        return report_damage(self.path, "damaged or cut off", Exception)      # the library may raise anything for a bad header

    def shape(self, name: str) -> tuple[int, ...]:
        with self._report_damage():
            part = self._file.get_slice(name)
            if part.get_dtype() not in SAFETENSORS_TYPES:
                raise ValueError(f"{name} holds {part.get_dtype()}, not plain numbers")
            return tuple(part.get_shape())

    def read(self, name: str) -> Tensor:
        value = self.read_view(name)
        return value.clone() if self._file.get_slice(name).get_dtype() == "F32" else value

    def read_view(self, name: str) -> Tensor:
        """See WeightFile. Does not use the library, which would keep the whole file in memory in addition to the model."""
        shape = self.shape(name)
        with self._report_damage():
            start, size = self._span(name)
            array = self._pages.bytes_at(start, size)
            dtype = SAFETENSORS_TYPES[self._file.get_slice(name).get_dtype()]
            aligned = array if start % dtype.itemsize == 0 else array.clone()
            return aligned.view(dtype).view(shape).float()

    def _span(self, name: str) -> tuple[int, int]:
        """Return the start and size in bytes of an array in the file. The library has checked the header."""
        first, end = self._header[name]["data_offsets"]
        return self._data + first, end - first

    def release(self, name: str) -> None:
        self._pages.release(*self._span(name))


# The format of OpenAI's own CLIP files; the weights without the program are on the hub.
TORCHSCRIPT = ("a TorchScript program, which is not executed here. Save only its weights (model.state_dict()). Those of OpenAI's "
               "CLIP are on huggingface.co (model.safetensors of openai/clip-vit-base-patch32 and others, and of timm/...openai)")


class TorchFile(WeightFile):
    """A file of torch.save: weights, a dictionary with an entry of weights, or a checkpoint of one of our runs."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._maps: list[MappedFile] = []
        content = torch_file.read(path, mapped=self._maps)
        if isinstance(content, (list, tuple)) and len(content) == 1:
            content, = content
        if not isinstance(content, dict):
            kind = content.of if isinstance(content, torch_file.Placeholder) else type(content).__name__
            if kind.startswith("__torch__."):
                raise WeightsError(f"{path}: {TORCHSCRIPT}")
            raise WeightsError(f"{path}: holds a {shown(kind)}, not weights by name; save model.state_dict()")
        if run_fields.is_run(content):
            weights = self._own(content)
        else:
            weights = self._foreign(content)
        modules = getattr(weights, "_metadata", None)             # of a state dict: {module: facts}; "" is the whole model
        if isinstance(modules, dict) and isinstance(modules.get(""), dict):
            self.described.take_own(modules[""].get(ROW_ENTRY))
        self._weights = {str(name): value for name, value in weights.items() if _is_array(value)}
        self.left_out += sorted(shown(name) for name in weights if str(name) not in self._weights)
        if not self._weights:
            raise WeightsError(f"{path}: holds no arrays (its entries: {', '.join(map(shown, list(content)[:6]))})")
        self.names = list(self._weights)

    def _own(self, content: dict) -> dict:
        """Return the weights of one of our checkpoints: the averaged ones, if the run kept them, as it evaluates those."""
        run_fields.check_run(content, self.path, weights_alone=True)
        self.run = {name: content.get(name) for name in RUN_ENTRIES}
        averaged = len(content.get("ema", {})) > 0
        weights = content["ema" if averaged else "model"]
        if averaged:
            self.notes.append("averaged weights (ema)")
        self.left_out = sorted(shown(name) for name in content if name != ("ema" if averaged else "model"))
        return weights

    def _foreign(self, content: dict) -> dict:
        """Return the weights of another program's file, from the entry that holds them."""
        architecture = content.get("arch")
        if isinstance(architecture, str) and "_patch" in architecture:        # timm's training checkpoints name their model
            self.described.model = architecture
            self.described.row |= HALF if architecture.startswith("vit_") else IMAGENET
        for _ in range(MAX_DEPTH):
            name = _container(content)
            if name is None:
                break
            averaged = [other for other in content
                        if "ema" in str(other).split("_") and other != name and _holds_arrays(content[other])]
            if name in AVERAGED_FIRST and AVERAGED_FIRST[name] in content:
                self.notes.append(f"averaged weights ({name}), not those of the last step ({AVERAGED_FIRST[name]})")
            elif averaged:
                self.notes.append(f"the file's averaged weights ({', '.join(map(shown, averaged))}) are not used")
            if name in SELF_DISTILLED:
                self.notes.append(f"the weights are those of DINO's {name} network")
                self.described.row |= IMAGENET
            self.left_out += sorted(shown(other) for other in content if other != name)
            content = content[name]
        return content

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights[name].shape)

    def read(self, name: str) -> Tensor:
        value = self._weights[name]
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value.astype(np.float32))
        return value.detach().float()

    def release(self, name: str) -> None:
        value = self._weights[name]
        if self._maps and isinstance(value, Tensor):
            self._maps[0].release_view(value)


def _container(content: dict) -> str | None:
    """Return the entry that holds the weights; None if the dictionary itself does, or no entry does."""
    for averaged, plain in AVERAGED_FIRST.items():
        if _holds_arrays(content.get(averaged)) and _holds_arrays(content.get(plain)):
            return averaged
    known = next((name for name in CONTAINERS if _holds_arrays(content.get(name), MAX_DEPTH)), None)
    if known is not None or any(map(_is_array, content.values())):
        return known
    others = [name for name in content if _holds_arrays(content[name])]
    return others[0] if len(others) == 1 else None


def _holds_arrays(value: object, depth: int = 1) -> bool:
    return isinstance(value, dict) and any(_is_array(inner) or (depth > 1 and _holds_arrays(inner, depth - 1))
                                           for inner in value.values())


def _is_array(value: object) -> bool:
    return value.dtype.kind in "fiub" if isinstance(value, np.ndarray) else isinstance(value, Tensor) and not value.is_complex()
