"""A checkpoint that is opened once: read, verified and parsed, then handed to whoever asks about it or fills a model from it."""

import contextlib
import functools
from pathlib import Path

from models.errors import WeightsError

from .formats import WeightFile, open_weights
from .layouts import Layout, detect_layout


class OpenedCheckpoint(contextlib.AbstractContextManager):
    """A published checkpoint, a file of timm or transformers, or a checkpoint of one of our runs, to be handed to whoever needs
    it: nobody opens it again.

    Arrays are read when a model is filled. Close it, or use it as a context manager. Raises WeightsError.
    """

    def __init__(self, path: str | Path):
        self.file: WeightFile = open_weights(path)
        self.path: Path = self.file.path

    @property
    def settings(self) -> dict | None:
        """The configuration of the run that wrote the file; None for a file of another program."""
        return self.file.run["config"] if self.file.run else None

    @property
    def class_names(self) -> list[str] | None:
        """Of a run of ours; other files do not name their classes."""
        return list(self.file.run["classes"]) if self.file.run else None

    @functools.cached_property
    def layout(self) -> Layout:
        return detect_layout(self.file)

    @property
    def head_classes(self) -> int:
        """How many classes the head has, from its shapes. Raises WeightsError for a file without a head."""
        if not (self.layout.has("head.weight") and self.layout.has("head.bias")):
            raise WeightsError(f"{self.path}: holds no head to keep")
        return self.layout.outputs("head")

    @property
    def representation_size(self) -> int:
        """Width of the pre_logits layer; 0 without one."""
        return self.layout.outputs("pre_logits.fc") if self.layout.has("pre_logits.fc.bias") else 0

    def close(self) -> None:
        self.file.close()

    def __exit__(self, *_) -> None:
        self.close()


Source = str | Path | OpenedCheckpoint


def opened(path: Source) -> contextlib.AbstractContextManager[OpenedCheckpoint]:
    """One that was opened before stays open."""
    return contextlib.nullcontext(path) if isinstance(path, OpenedCheckpoint) else OpenedCheckpoint(path)


def run_settings(path: Source) -> dict | None:
    """The configuration of the run that wrote a checkpoint; None for a file of another program. Raises WeightsError."""
    with opened(path) as checkpoint:
        return checkpoint.settings


def checkpoint_head(path: Source) -> tuple[int, int]:
    """(classes, width of pre_logits or 0) of a file that load_pretrained reads, from shapes alone. Raises WeightsError."""
    with opened(path) as checkpoint:
        return checkpoint.head_classes, checkpoint.representation_size
