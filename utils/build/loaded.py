"""models.load_model: a trained model for the user's own program, with predictions for images."""

import dataclasses
from pathlib import Path
from typing import NoReturn

from models import ModelError
from models.base import ImageTransformer
from models.checkpoints.opened import OpenedCheckpoint
from models.create import load_run_model
from utils.config import ConfigError
from utils.config.saved import SettingsError, check_settings
from utils.predict.predictor import Predictor
from utils.run.checkpoint import CheckpointError

from .opened import Opened, find_weights, of_run, open_model


def load_model(path: str | Path | OpenedCheckpoint, **typed: object) -> ImageTransformer:
    """Load a trained model in eval mode, with `classes`, the names of its classes, and `predict`, which classifies images.

    path: a run folder (its best.pt), a checkpoint of a run (the averaged weights where it kept them), a file or folder of another
    program with a head, a published name; an OpenedCheckpoint of a run gives the bare model.
    typed: settings of a model that is not a run, named like the flags: model_type, img_size, num_heads, classifier,
    interpolation, eval_crop, mean, std.
    Raises ModelError.
    """
    if isinstance(path, OpenedCheckpoint):
        return load_run_model(path)
    try:
        with OpenedCheckpoint(find_weights(path)) as file:
            opened = _of_run(file) if file.settings is not None and not typed else None
        opened = opened or open_model(path, flag="path", **typed)
    except (ConfigError, CheckpointError) as error:
        raise ModelError(str(error)) from error
    opened.model.predictor = (
        _NoAnswer(f"{path} has no head, and so no classes: fine-tune it first") if not opened.has_head else
        _NoAnswer(f"the settings in {path} are not those of a run: they do not say how images are read for it")
        if not opened.settings else
        Predictor(opened.classes, opened.transform, opened.reading, opened.settings["tta"] == "flip"))
    return opened.model


@dataclasses.dataclass(frozen=True)
class _NoAnswer:
    """In place of a Predictor: raises the reason why there is none."""

    why: str

    def __call__(self, *_: object) -> NoReturn:
        raise ModelError(f"predict: {self.why}")


def _of_run(file: OpenedCheckpoint) -> Opened:
    """Open a run's model, with empty settings if those of the file are not a run's: they do not say how images are read."""
    try:
        check_settings(file.settings, file.path)
    except SettingsError:
        model = load_run_model(file)
        return Opened(model, tuple(model.classes), {}, "", False, file.path)
    return of_run(file)
