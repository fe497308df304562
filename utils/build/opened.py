"""The one way to open a trained model: from a run, a checkpoint, any other file with its architecture, or a published name."""

import contextlib
import dataclasses
import functools
import string
from collections.abc import Callable
from pathlib import Path

from models import create_model, load_model
from models.base import ImageTransformer
from models.checkpoints.opened import OpenedCheckpoint
from models.checkpoints.published import find_checkpoint
from utils.config import ConfigError, before
from utils.data import transforms
from utils.data.datasets import imagenet_names
from utils.data.reading import FIND, Reading
from utils.files import where_looked
from utils.run.checkpoint import read_header
from utils.run.folder import resolve_checkpoint

from .find import ROOT

EMBEDDED = "assets/ViT-Nano_2-letters.npz"


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model in eval mode, with what it takes to use it: how it sees images, and what its outputs mean."""

    model: ImageTransformer
    classes: tuple[str, ...]
    settings: dict                    # of its run, or the defaults
    title: str
    has_data: bool                    # the settings name the data set of a run
    path: Path | None = None          # None: the embedded model

    @functools.cached_property
    def transform(self) -> Callable:
        """PIL image -> uint8 (C, height, width), as the model was evaluated"""
        return eval_transform(self.model, self.settings)

    @property
    def reading(self) -> Reading:
        """How an image file is read for the model; fields are "auto" where it is no run's"""
        return Reading.of(self.settings)

    @property
    def region(self) -> Callable[[tuple[int, int]], tuple[float, float, float, float]]:
        """(height, width) of an image -> the part of it that the transform shows to the model"""
        return functools.partial(transforms.eval_region, img_size=self.model.img_size, crop=self.settings["eval_crop"])


def eval_transform(model: ImageTransformer, settings: dict) -> Callable:
    return transforms.eval_transform(model.img_size, channels=model.config.in_channels, interpolation=settings["interpolation"],
                                     crop=settings["eval_crop"])


def open_run(what: str | Path, flag: str = "--checkpoint") -> Opened:
    """The model of a run folder or of a checkpoint of a run. `flag`: what the user typed it after.

    Raises ConfigError, WeightsError or CheckpointError.
    """
    path = Path(resolve_checkpoint(what))
    if not path.is_file():
        raise ConfigError(f"{flag} {what}: no such file{where_looked(what)}. Give a run folder or a checkpoint of this project")
    with OpenedCheckpoint(path) as file:
        if file.settings is None:
            raise ConfigError(f"{flag} {what}: not a checkpoint of a run of train.py. Fine-tune it first, and give the run's "
                              "folder")
        return _of_run(file)


def open_model(what: str | Path | None, *, model_type: str | None = None, img_size: int | tuple[int, int] | None = None,
               interpolation: str | None = None, eval_crop: float | None = None) -> Opened:
    """A run folder, a checkpoint file of a run, or any other file or published name with its model_type; None: the embedded one.

    Raises ConfigError, WeightsError or CheckpointError.
    """
    typed = {name: value for name, value in (("interpolation", interpolation), ("eval_crop", eval_crop)) if value is not None}
    settings = before() | vars(FIND)
    with contextlib.ExitStack() as stack:
        file = None
        if what is not None:
            file = stack.enter_context(OpenedCheckpoint(find_checkpoint(resolve_checkpoint(what))))
        if (model_type or img_size or typed) and (file is None or file.settings is not None):
            raise ConfigError("--model_type, --img_size, --interpolation and --eval_crop only have an effect with a --checkpoint "
                              "that is no run: a run has its own. Omit them")
        if file is None:
            title = "embedded ViT-Nano_2, which was trained on letters and has never seen a digit"
            model = create_model("ViT-Nano_2", pretrained=ROOT / EMBEDDED, head="keep").eval()
            return Opened(model, tuple(string.ascii_uppercase), settings | {"dataset": "digits"}, title, True)
        if file.settings is not None:
            return _of_run(file)
        if model_type is None:
            raise ConfigError(f"--checkpoint {what}: not a checkpoint of a run, which would name its model. Add --model_type, "
                              "such as ViT-B_16")
        model = create_model(model_type, img_size=img_size, pretrained=file, head="keep").eval()
        names = imagenet_names() if model.num_classes == 1000 else map("class {}".format, range(model.num_classes))
        return Opened(model, tuple(names), settings | typed, f"{model_type}, {what}", False, file.path)


def _of_run(file: OpenedCheckpoint) -> Opened:
    model, run = load_model(file), file.settings
    name, step = run.get("name") or file.path.parent.name, read_header(file.path).step
    title = f"{run['model_type']} on {run['dataset']}, run {name}, step {step}"
    return Opened(model, tuple(model.classes), before() | run, title, True, file.path)
