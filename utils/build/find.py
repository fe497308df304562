"""Finds what decides the configuration: the checkpoint to resume, the data, the start weights, the machine."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

import configs
from models import ModelError, WeightsError
from models.checkpoints.download import DownloadError
from models.checkpoints.load import check_finite
from models.checkpoints.opened import OpenedCheckpoint
from models.checkpoints.published import (
    check_published_reachable,
    find_checkpoint,
    license_of,
    published_name,
    published_view,
)
from models.match import match_row
from utils import distributed, launch
from utils.config import FLAGS, Facts, Machine, Saved, Sources, before
from utils.config.saved import check_settings
from utils.data.classes import ClassRule, two_orders
from utils.data.datasets import OWN_CLASSES, check_own_layout, splits_of
from utils.data.device_cache import cached_bytes
from utils.data.layouts import HELD_OUT, TRAIN
from utils.data.reading import Reading
from utils.data.splits import DataError, ImageError, Splits, fingerprint
from utils.device import core_count, total_memory
from utils.distributed import Ranks
from utils.run import checkpoint, folder
from utils.run.checkpoint import CheckpointError, RunCheckpoint, RunState
from utils.training.precision import native_support
from utils.training.task import SINGLE_LABEL

from .leakage import warning_of_seen
from .opened import EMBEDDED, EMBEDDED_MODEL, ROOT, Opened, find_weights, given_by, open_checkpoint, open_model, preferred_row

SIZE_SAMPLE = 16                      # images whose sizes a recipe may depend on


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A checkpoint of a run of this program that is resumed or branched from, opened once."""

    opened: RunCheckpoint
    state: RunState                   # build_trainer releases its tensors after copying them

    @property
    def facts(self) -> Saved:
        return Saved(self.state.config, self.state.step, self.state.train_images, self.state.world_size, str(self.opened.path))


def _checked_state(opened: RunCheckpoint) -> RunState:
    check_settings(opened.header.config, opened.path)
    return opened.state()


@dataclasses.dataclass(frozen=True)
class Found:
    """`facts` are plain values; the objects that were opened for them go to the builders, so that nothing is read twice."""

    facts: Facts
    splits: Splits
    start: OpenedCheckpoint | None    # the file of --pretrained_dir; None: from scratch, or a resumed run
    fingerprint: str                  # of the training images: their names and targets
    seen: str = ""                    # the warning that the start weights were trained on held-out images
    teacher: Opened | None = None     # of --teacher
    license: str = ""                 # of the start weights, or those of the resumed run; "": not known


def decide_resume(flags: dict, ranks: Ranks) -> dict:
    """Return the flags with which all processes start or resume the run. Rank 0 decides: another node may have been started
    again, or count the restarts differently. Raises LaunchError on every rank."""
    others = {name: value for name, value in flags.items() if name not in launch.RESUME_FLAGS}
    return others | distributed.broadcast_from_main(ranks, lambda: launch.resume_flags(flags))


def saved_run(flags: dict, ranks: Ranks) -> SavedRun | None:
    """Open the checkpoint of --resume_path; None without one, or if `auto` finds no run yet.

    Rank 0 decides which file it is. Raises ConfigError, or FolderError if the run cannot have its folder, on every rank, before
    the data are opened.
    """
    output_dir, name = flags.get("output_dir", FLAGS["output_dir"].default), flags.get("name")
    if "resume_path" not in flags:
        if name and not flags.get("eval_only"):
            distributed.broadcast_from_main(ranks, lambda: folder.check_free(output_dir, name))
        return None
    opened: RunCheckpoint | None = None

    def find_checkpoint_file() -> Path | None:
        nonlocal opened
        with given_by("--resume_path"):
            opened = folder.find_run_checkpoint(flags["resume_path"], output_dir, name)
        return opened and opened.path

    path = distributed.broadcast_from_main(ranks, find_checkpoint_file)
    if path is None:
        if ranks.is_main:
            print(f"no run to resume in {Path(output_dir, name)} yet: starting a new one")
        return None
    with given_by("--resume_path"):
        opened = distributed.local_main_first(ranks, lambda: opened or _open_as_rank_0(path))
        state = distributed.local_main_first(ranks, lambda: _checked_state(opened))
    if not flags.get("eval_only"):
        distributed.broadcast_from_main(ranks, lambda: folder.check_resume(path, flags.get("output_dir"), name))
    return SavedRun(opened, state)


def _open_as_rank_0(path: Path) -> RunCheckpoint:
    try:
        return checkpoint.open_run_checkpoint(path)
    except CheckpointError as error:
        error.args = (f"{error}. Process 0 resumes this checkpoint, and every node must be able to read it from a shared disk",)
        raise


def machine(ranks: Ranks) -> Machine:
    """Return the least memory and cores that any rank has, so that all ranks have the same figures."""
    cores = max(1, core_count() // ranks.local_size)
    known = distributed.all_gather_objects(ranks, (total_memory(ranks.device, ranks.local_size), cores))
    return Machine(ranks.device.type, *map(min, zip(*known)))


def find(sources: Sources, saved: SavedRun | None, ranks: Ranks) -> Found:
    """Open the teacher, the data and the start weights. Raises DataError or ConfigError on every rank: first for a data folder
    that lacks its splits, then for a download that fails, before images are read.

    The class names of a resumed checkpoint decide the order of the classes, and its run how images are read. So do start weights
    whose head is kept, which are therefore opened first.
    """
    teacher = start = head_classes = None
    if saved is None and sources.head != "keep":               # a head that is kept may name the folders that are classes
        distributed.local_main_first(ranks, lambda: check_own_layout(vars(sources), _need(sources)))
    if saved is None:
        distributed.broadcast_from_main(ranks, lambda: check_start(sources.start, sources.model_type))
    if sources.teacher:
        teacher = distributed.local_main_first(ranks, lambda: open_model(sources.teacher, flag="--teacher",
                                                                         heads_if_unknown=sources.num_heads))
    if saved is None and sources.head == "keep":
        start = distributed.local_main_first(ranks, lambda: open_start(sources.start, sources.model_type))
    splits = distributed.local_main_first(ranks, lambda: open_data(sources, saved, start))
    print_of_train = fingerprint(splits.train)
    opened = (splits.classes, len(splits.train), len(splits.val), len(splits.test), print_of_train, splits.reading)
    if any(other != opened for other in distributed.all_gather_objects(ranks, opened)):
        raise DataError(f"--data_dir {sources.data_dir}: the nodes have different data (other classes, numbers of images, or "
                        "kinds of image files)")
    if saved is None and start is None:
        start = distributed.local_main_first(ranks, lambda: open_start(sources.start, sources.model_type))
    with contextlib.suppress(ModelError):                  # of a file without a head
        head_classes = start and start.head_classes
    with given_by("--pretrained_dir", start):
        start_row = start and start.settings is None and read_row(start, sources)
        if sources.head == "keep" and start and head_classes != len(splits.classes):
            check_finite(start)                            # this error comes before one about its head
    facts = Facts(
        train_images=len(splits.train), num_classes=len(splits.classes),
        can_flip=splits.can_flip,
        test_is_val=splits.val_is_test,
        reading=vars(splits.reading),
        image_sizes=sample_sizes(splits.train) if saved is None and "function" in configs.RECIPES[sources.recipe] else (),
        start_settings=start and start.settings, start_row=start_row or None, start_view=start and view_of(start),
        start_head_classes=head_classes,
        start_path=start and str(start.path), start_names_classes=bool(start and start.class_names),
        class_orders=two_orders(splits.classes) if sources.dataset in OWN_CLASSES else (),
        **vars(machine(ranks)),
        evaluated_images=max(len(splits.val), len(splits.test)), cached_images=cached_bytes(splits.train),
        teacher_parameters=teacher.parameters if teacher else 0,
        native_bf16=native_support(torch.bfloat16, ranks.device)[0], ranks=ranks.size)
    seen = warning_of_seen(start.file.run, start.path, sources, splits) if ranks.is_main and start and start.file.run else ""
    return Found(facts, splits, start, print_of_train, seen, teacher, saved.state.license if saved else license_of_start(start))


def open_data(sources: Sources, saved: SavedRun | None, start: OpenedCheckpoint | None = None) -> Splits:
    """The splits, with the class names of the checkpoint or of the start whose head is kept. Raises DataError.

    Runs of earlier versions called the only held-out split "test", whatever the data called it, and keep that name.
    """
    splits = _open_data(sources, saved, start)
    if saved and saved.state.rules < 4 and splits.val_is_test and len(splits.train):
        splits = splits.replace(val_name="test")
    return splits


def _open_data(sources: Sources, saved: SavedRun | None, start: OpenedCheckpoint | None) -> Splits:
    """Fractions that a run drew from its own images are not drawn when it is evaluated on others."""
    names = saved.state.classes if saved else (start and start.class_names) or ()
    rule = ClassRule(sources.class_order, tuple(names), partly=sources.eval_only)
    shares = {"val_fraction": sources.val_fraction, "test_fraction": sources.test_fraction}
    opened = functools.partial(splits_of, vars(sources), strata=SINGLE_LABEL.strata, rule=rule,
                               need=_need(sources), reading=reading_of(sources, start))
    splits = opened()
    if not (sources.eval_only and saved and any(shares.values()) and len(splits.train)):
        return splits
    own = {name: saved.state.config.get(name, 0.0) for name in ("data_dir", *shares)}
    if own == {"data_dir": sources.data_dir} | shares or shares != {name: own[name] for name in shares} or (
            saved.state.data in ("", fingerprint(splits.train))):
        return splits
    with contextlib.suppress(DataError):                 # where nothing else is held out
        splits = opened(val_fraction=0.0, test_fraction=0.0).replace(
            "these are not the images of the run, so that no fraction of them is drawn (--val_fraction, --test_fraction)")
    return splits


def _need(sources: Sources) -> str:
    return HELD_OUT if sources.eval_only else TRAIN


def reading_of(sources: Sources, start: OpenedCheckpoint | None) -> Reading:
    """Return how images are read, as far as that is known. With a head that is kept: as its run read them, which an exported
    folder says too."""
    reading = Reading.of(vars(sources))
    if start is not None and sources.head == "keep":
        of_run = Reading.of(vars(sources) | (start.view if start.settings is None else before() | start.settings))
        reading = reading.replace(**{name: getattr(of_run, name) for name in reading.unknown})
    return reading


def sample_sizes(images: Dataset) -> tuple[tuple[int, int], ...]:
    """Return (height, width) of some images, evenly spaced, without those that cannot be read."""
    sizes, count = [], min(SIZE_SAMPLE, len(images))
    for number in range(count):
        with contextlib.suppress(ImageError):
            image, _ = images.source(number * len(images) // count)
            sizes.append(tuple(image.shape[-2:]) if isinstance(image, Tensor) else image.size[::-1])
    return tuple(sizes)


def open_start(start: str, model_type: str) -> OpenedCheckpoint | None:
    """Open --pretrained_dir: a path, a published name, `auto` (the model's own published file) or `none`. Raises ConfigError."""
    if start == "none":
        return None
    with given_by("--pretrained_dir"), suggest_local_file():
        return open_checkpoint(find_weights(start)) if start != "auto" else OpenedCheckpoint(find_checkpoint(file_of(model_type)))


def check_start(start: str, model_type: str) -> None:
    """Raise ConfigError, before images are read, for a published file that is not here and cannot be downloaded."""
    name = file_of(model_type) if start == "auto" else start
    if not Path(name).exists() and (name := published_name(name)):
        with given_by("--pretrained_dir"), suggest_local_file():
            check_published_reachable(name)


def file_of(model_type: str) -> str:
    """Return the path or published name that `auto` means."""
    return os.path.relpath(ROOT / EMBEDDED) if model_type == EMBEDDED_MODEL else published_name(model_type) or model_type


@contextlib.contextmanager
def suggest_local_file() -> Iterator[None]:
    """Add to the error of a failed download that a run can start from any local file."""
    try:
        yield
    except DownloadError as error:
        raise WeightsError(f"{error}. Or start from a local file of any model (--pretrained_dir FILE, PRETRAINED_DIR)") from error


def license_of_start(start: OpenedCheckpoint | None) -> str:
    """Return the license of the weights: as published, or from the config.json next to them; for a run that of its start
    weights."""
    if start is None:
        return ""
    if start.settings is not None:
        began, model = start.settings["pretrained_dir"], start.settings["model_type"]
        return start.file.run.get("license") or license_of(file_of(model) if began == "auto" else began)
    described = start.file.described
    return license_of(start.path) or described.license or (described.card or {}).get("start", {}).get("license", "")


def view_of(start: OpenedCheckpoint) -> dict:
    """Return how the start weights saw their images, from their run, the config.json next to them or the page that publishes
    them; see Facts.start_view."""
    if start.settings is not None:
        of_run = before() | start.settings
        size = of_run["img_size"]                       # of a checkpoint: a list where it has two sides
        return {name: of_run[name] for name in ("interpolation", "eval_crop")} | {
            "img_size": tuple(size) if isinstance(size, list) else size, "by": "their run"}
    published = published_view(start.path)
    view = start.view or published
    size = {"img_size": start.row["img_size"]} if "img_size" in start.row else {}
    untaken = {"untaken": start.untaken} if start.untaken else {}
    return view | size | untaken | {"by": "their config.json" if start.view or untaken else "their publisher",
                                    "unknown_mean": not (start.tells_mean or published)}


def read_row(start: OpenedCheckpoint, sources: Sources) -> dict:
    """Return the settings of the model in another program's file, by name; `names_img_size`: its config.json has the image size.

    Raises ModelError.
    """
    if sources.typed_model and sources.model_type in configs.MODELS and sources.img_size:
        start.expect(sources.img_size, configs.MODELS[sources.model_type].positions)
    name, keys = match_row(start, preferred_row(sources.start) or (sources.model_type if sources.typed_model else ""))
    read = {key: start.row[key] for key in ("classifier", "img_size") if key in start.row}
    return {"model_type": name, **read, **keys, **start.view, "names_img_size": "img_size" in start.file.described.row}
