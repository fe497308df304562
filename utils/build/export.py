"""Exports a trained model as files that other programs open, with the facts of its run."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import configs
from models import ModelError, save_npz
from models.checkpoints import programs
from models.checkpoints.described import describe, is_weights_folder, weights_in
from models.checkpoints.export import save_folder
from models.checkpoints.opened import OpenedCheckpoint
from models.checkpoints.published import license_of, published_name
from models.checkpoints.timm_config import computed_otherwise, largest_difference, timm_config
from models.kinds import is_number
from models.match import model_name
from utils.config import ConfigError
from utils.config.types import as_tuple
from utils.data.datasets import NAMED_BY_FOLDER, data_name
from utils.files import StorageError, atomic_folder, atomic_write
from utils.run.log import read_log
from utils.training.evaluation import TOP

from .find import file_of
from .model import FREE, LICENSE_TEXTS
from .opened import EMBEDDED, Opened

FLIPPED = ("note: the run was evaluated with the mean over each image and its mirror image (--tta flip), which your program must "
           "compute itself")
LONGEST = 200                   # characters of a value in a model card: longer ones are cut
LOOSE = 1e-3                    # of a logit: a larger difference between timm's model and this one causes a warning
# Settings of a run that a model card lists if they have an effect.
TRAINED = ("recipe", "num_steps", "train_batch_size", "optimizer", "learning_rate", "layer_decay", "weight_decay", "warmup_steps",
           "decay_type", "train_layers", "ema_decay", "dropout_rate", "drop_path_rate", "augmentation", "crop_scale",
           "color_jitter", "randaugment_ops", "random_erasing", "mixup_alpha", "cutmix_alpha", "label_smoothing", "class_weights",
           "distillation", "precision", "tta", "seed")
GOOGLE = {"gelu": "tanh", "norm_eps": 1e-6, "resnet_style": "google", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def class_names(opened: Opened, file: str | None = None) -> list[str]:
    """Return the names in the order of the outputs. file: for a model without names, a text file with one name on each line.
    Raises ConfigError."""
    if not opened.has_head:
        raise ConfigError(f"{opened.path} has no head, and so no classes. Fine-tune it first (train.py --pretrained_dir "
                          f"{opened.path})")
    known = opened.named or opened.model.num_classes == 1000
    if file is None:
        if not known:
            raise ConfigError(f"{opened.path} does not name its {len(opened.classes):,} classes. Add --class_names FILE, a text "
                              "file with a name a line")
        return list(opened.classes)
    if opened.named:
        raise ConfigError(f"--class_names {file}: {opened.path} has names of its classes. Omit the flag")
    try:
        names = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"--class_names {file}: not a text file in UTF-8") from error
    count = opened.model.num_classes
    different = len({name for name in names if name})
    if not len(names) == different == count:
        raise ConfigError(f"--class_names {file}: expected {count:,} different names, one on each line; got {len(names):,} lines "
                          f"with {different:,} different names")
    return names


def export(opened: Opened, classes: list[str], to: str, output: Path, opset: int | None = None,
           card: Callable[[dict, dict, Sequence[str]], str] | None = None) -> list[str]:
    """Write the model, whole or not at all -> lines about it

    to: "folder", "onnx", "torch" or "npz". card(config.json, what it says of the run, notes) -> the text of a folder's model
    card. Raises ConfigError.
    """
    writers = {"folder": functools.partial(_write_folder, card), "npz": _write_npz,
               "onnx": functools.partial(_write_program, functools.partial(programs.save_onnx, opset=opset)),
               "torch": functools.partial(_write_program, programs.save_program)}
    notes = []
    if not opened.named and classes == list(opened.classes):
        notes.append(f"note: {opened.path} does not name its {len(classes):,} classes, which are taken to be ImageNet's. If they "
                     "are not, write it again with --class_names FILE")
    if opened.settings["tta"] == "flip":
        notes.append(FLIPPED)

    def fill(unfinished: Path) -> None:
        try:
            notes.extend(writers[to](opened, classes, unfinished))
        except ModelError as error:
            raise ConfigError(f"--to {to}: {str(error).removeprefix(f'{unfinished}: ')}") from error

    try:
        (atomic_folder if to == "folder" else atomic_write)(output, fill)
    except StorageError as error:
        raise ConfigError(f"--output: {error}") from error
    return notes


def _write_folder(card: Callable, opened: Opened, classes: list[str], folder: Path) -> list[str]:
    reading, of_run = reading_of(opened), opened.has_data or "tta" in describe(opened.path).view
    own = ({"reading": reading} if reading else {}) | ({"tta": opened.settings["tta"]} if of_run else {})
    own["card"] = card_facts(opened)
    config, notes = timm_config(opened.model, classes, view_of(opened), own), []
    if otherwise := computed_otherwise(opened.model):
        difference = largest_difference(opened.model, otherwise)
        notes = [f"{'warning: ' * (difference > LOOSE)}timm's model has another eps ({', '.join(otherwise)}): on images of noise "
                 f"its logits differ by {difference:.1e} at most"]
    save_folder(opened.model, folder, config, card(config, own, notes))
    return notes


def _write_program(save: Callable, opened: Opened, classes: list[str], path: Path) -> list[str]:
    view = view_of(opened) | reading_of(opened) | {"tta": opened.settings["tta"]}
    return [save(opened.model, path, programs.facts_of(opened.model, classes, view))]


def _write_npz(opened: Opened, classes: list[str], path: Path) -> list[str]:
    config = opened.model.config
    if config.sigmoid_attention:
        raise ModelError(f"sigmoid_attention {config.sigmoid_attention!r}: Google's layout has no place for it. Export it to "
                         "onnx or torch")
    save_npz(opened.model, path)
    others = [f"{key} {config[key]}" for key, value in GOOGLE.items()
              if as_tuple(config[key]) != value and (key != "resnet_style" or config.resnet_layers is not None)]
    notes = ["Google's layout holds neither the names of the classes nor how images are resized"]
    return notes + ([f"warning: nor what this model computes differently from Google's programs: {', '.join(others)}"]
                    if others else [])


# ------------------------------------------------------------------------------------------------ facts of a run


def view_of(opened: Opened) -> dict:
    """Return how images are resized for the model (flags)."""
    return {name: opened.settings[name] for name in ("interpolation", "eval_crop")}


def reading_of(opened: Opened) -> dict:
    """Return how a run reads image files (flags); {} for a model that is not of a run."""
    if opened.reading.unknown:
        return {}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(opened.reading).items()}


def card_facts(opened: Opened) -> dict[str, dict]:
    """Return the values in a model card by name, in sections. For an exported folder they are those in its config.json."""
    settings, described = opened.settings, describe(opened.path)
    if described.card is not None:
        return described.card
    config = opened.model.config
    sizes = {"architecture": settings["model_type"]}
    if (called := model_name(settings["model_type"], config)) != settings["model_type"]:
        sizes["called"] = called
    if config.positions != "none":
        sizes["positions"] = config.position_resize
    if not opened.has_data:
        return {"model": sizes, "start": _start(str(opened.path), settings["model_type"], described.license)}
    with OpenedCheckpoint(opened.path) as file:                    # other fields may be missing
        run = {key: file.file.run[key] for key in ("step", "train_images", "license")}
    data = {"data set": settings["dataset"]}
    if settings["dataset"] in NAMED_BY_FOLDER:
        data["folder"] = data_name(settings["dataset"], settings["data_dir"])
    data |= {"training images": run["train_images"], "classes": len(opened.classes)}
    training = {"step of these weights": run["step"]} | {
        key: settings[key] for key in TRAINED if settings.get(key) not in (0, False, "none", "all")}
    if not settings["augmentation"].startswith("crop"):
        training.pop("crop_scale", None)
    sections = {"model": {"name": settings.get("name") or opened.path.parent.name} | sizes, "data": data, "training": training,
                "metrics": _metrics(opened.path, run["step"], len(opened.classes)),
                "start": _start(settings["pretrained_dir"], settings["model_type"], run["license"] or "")}
    return {section: {name: value if is_number(value) else str(value)[:LONGEST] for name, value in values.items()
                      if value is not None} for section, values in sections.items()}


def _metrics(path: Path, step: int | None, classes: int) -> dict:
    """Return the evaluations at the weights' step; top-5 only of more than five classes."""
    names = ("accuracy", *["top5"] * (classes > TOP), "loss", "images")
    events = [event for event in read_log(path.parent) if event.get("event") == "eval" and event.get("step") == step]
    return {f"{event.get('split')} {key}": event[key] for event in events for key in names
            if is_number(event.get(key))}


def _start(start: str, model_type: str, known: str = "") -> dict:
    """Return the start weights, and their license if it is known."""
    if start == "none":
        return {"weights": "none: trained from scratch"}
    name = file_of(model_type) if start == "auto" and model_type in configs.MODELS else start
    if name.endswith(EMBEDDED):
        return {"weights": "ViT-Nano_2, trained on drawn letters (this project)", "license": "MIT"}
    found = license_of(name) or known
    with contextlib.suppress(ModelError):                          # of a folder that is not what it was
        found = found or (describe(weights_in(Path(name))).license if is_weights_folder(name) else "")
    shown = name if published_name(name) else "/".join(Path(name).parts[-2:])        # not where it is on this machine
    if not found or FREE.match(found):
        return {"weights": shown} | ({"license": found} if found else {})
    return {"weights": shown, "license": found, "terms": LICENSE_TEXTS.get(found.lower(), "as its publisher says")}
