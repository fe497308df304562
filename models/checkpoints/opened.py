"""A checkpoint that is opened once: read, verified and parsed, then passed to all functions that need it."""

import contextlib
import functools
import math
from pathlib import Path

from models.errors import WeightsError
from models.families import FAMILIES

from .described import COMPUTED
from .formats import WeightFile, open_weights
from .infer import candidates, infer_row, is_plain
from .layout import Layout
from .layouts import TIMM_ROW, detect_layout

OF_BASE = ("gelu", "norm_eps", "rope", "rope_grid", "pool_heads", "position_resize")       # keys of COMPUTED that no array shows


class OpenedCheckpoint(contextlib.AbstractContextManager):
    """A published checkpoint, a file of timm or transformers, or a checkpoint of one of our runs, opened once for all uses.

    Arrays are read when they are loaded into a model. Close it, or use it as a context manager. Raises WeightsError.
    """

    _expected: tuple = ()

    def __init__(self, path: str | Path):
        self.file: WeightFile = open_weights(path)
        self.path: Path = self.file.path

    def expect(self, size: int | tuple[int, int], positions: str) -> None:
        """Set the image size and kind of positions that the caller's row has, to interpret a position table that fits them.

        Ignored if the file states its image size, or if its table has another number of positions.
        """
        if "img_size" not in self.file.described.row:
            self._expected = size, positions
            self.__dict__.pop("row", None), self.__dict__.pop("computed", None)

    @property
    def settings(self) -> dict | None:
        """The configuration of the run that wrote the file; None for a file of another program."""
        return self.file.run["config"] if self.file.run else None

    @property
    def step(self) -> int | None:
        """The step at which a run wrote the file; None for a file of another program."""
        return self.file.run["step"] if self.file.run else None

    @property
    def class_names(self) -> list[str] | None:
        """Names by label, of a run of ours or of a config.json with as many names as the head has classes; else None."""
        if self.file.run:
            return list(self.file.run["classes"])
        names = self.file.described.classes
        with contextlib.suppress(WeightsError):
            return list(names) if names and len(names) == self.head_classes else None
        return None

    @property
    def view(self) -> dict:
        """How images are read, resized and evaluated (flags), as far as the config.json next to the weights says."""
        return dict(self.file.described.view)

    @property
    def untaken(self) -> dict[str, str]:
        """What that config.json says and no flag can express, in words by flag."""
        return dict(self.file.described.untaken)

    @property
    def tells_mean(self) -> bool:
        """Whether mean and standard deviation of the images are known; all of Google's files use 0.5."""
        return "mean" in self.computed or self.is_google

    @property
    def is_google(self) -> bool:
        """Whether the arrays have the names of Google's program."""
        return any("encoderblock" in name for name in self.file.names)

    @functools.cached_property
    def computed(self) -> dict:
        """The values of COMPUTED's keys that our own run, the program that wrote the file, or its config.json determines."""
        known = self.file.run["architecture"] if self.file.run else self._of_program | self._of_base | self.file.described.row
        found = {key: tuple(value) if isinstance(value, (list, tuple)) else value
                 for key, value in known.items() if key in COMPUTED}
        for key in ("mean", "std"):
            value = found.get(key, (1.0,))
            if not (isinstance(value, tuple) and len(value) in (1, 3)
                    and all(isinstance(number, (int, float)) and math.isfinite(number) for number in value)
                    and (key == "mean" or all(number > 0 for number in value))):
                raise WeightsError(f"{self.path}: its {key} of the images must be one number for each channel")
        if not self.file.run and self.row["resnet_layers"] is None:
            found.pop("resnet_style", None)
        of_ours = self.file.run or self.file.described.own
        if len(found.get("mean", ())) == 1 and not of_ours:             # for grey images, resolve_row averages the row's
            found.pop("mean"), found.pop("std", None)
        return found

    @property
    def _of_program(self) -> dict:
        """What the program always computes; for encoders that are not plain, the row decides about GELU and eps."""
        row, described = self.layout.program_row, self.file.described
        plain = row is not TIMM_ROW or (is_plain(self.row) and not described.base)
        return row if plain else {key: value for key, value in row.items() if key not in ("gelu", "norm_eps")}

    @property
    def _of_base(self) -> dict:
        """What the model computes that a config.json names, or that the file's name names if the arrays fit it."""
        described = self.file.described
        if described.base not in FAMILIES or (described.by_name and described.base not in candidates(self.row, FAMILIES)):
            return {}
        return {key: value for key, value in FAMILIES[described.base].items() if key in OF_BASE}

    @property
    def own_row(self) -> dict:
        """The keys of the row in an export of ours; {} for other files, and for older exports, which contain less."""
        described = self.file.described
        return dict(described.row) if described.own and "hidden_size" in described.row else {}

    @functools.cached_property
    def row(self) -> dict:
        """The keys of a model's row that names and shapes determine, with `img_size`, and `num_heads` if the file states it."""
        described = self.file.described
        found = infer_row(self.layout, *([described.row["img_size"]] if "img_size" in described.row else self._expected))
        heads = described.heads(found["hidden_size"])
        found |= {"num_heads": heads} if heads else {}
        return found | {key: value for key, value in described.row.items() if key == "img_size"}

    @functools.cached_property
    def layout(self) -> Layout:
        return detect_layout(self.file)

    @property
    def head_classes(self) -> int:
        """The number of classes of the head, from its shapes. Raises WeightsError for a file without a head."""
        if not (self.layout.has("head.weight") and self.layout.has("head.bias")):
            raise WeightsError(f"{self.path}: has no head to keep")
        return self.layout.outputs("head")

    @property
    def representation_size(self) -> int:
        """The width of the pre_logits layer; 0 without one."""
        return self.layout.outputs("pre_logits.fc") if self.layout.has("pre_logits.fc.bias") else 0

    def close(self) -> None:
        self.file.close()

    def __exit__(self, *_) -> None:
        self.close()


Source = str | Path | OpenedCheckpoint


def opened(path: Source) -> contextlib.AbstractContextManager[OpenedCheckpoint]:
    """Open a checkpoint for a `with` block; one that was opened before stays open after it."""
    return contextlib.nullcontext(path) if isinstance(path, OpenedCheckpoint) else OpenedCheckpoint(path)


def run_settings(path: Source) -> dict | None:
    """Return the configuration of the run that wrote a checkpoint; None for a file of another program. Raises WeightsError."""
    with opened(path) as checkpoint:
        return checkpoint.settings


def checkpoint_head(path: Source) -> tuple[int, int]:
    """Return (number of classes, width of pre_logits or 0) of a file, from its shapes. Raises WeightsError."""
    with opened(path) as checkpoint:
        return checkpoint.head_classes, checkpoint.representation_size
