"""Config -> the splits that are evaluated, the transforms and the loaders."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.utils.data import Dataset

from models.base import ImageTransformer
from utils import distributed, launch
from utils.attention import edits
from utils.attention.edit_transform import transform_with_edits
from utils.attention.edits import Edit
from utils.config import Config, ConfigError
from utils.data import transforms
from utils.data.loader import Batch, Loader, default_workers, eval_loader, prefetch, train_loader
from utils.data.sampler import StepSampler
from utils.data.splits import Splits
from utils.distributed import Ranks
from utils.run.checkpoint import CheckpointError

from .find import Found, SavedRun
from .model import Built
from .opened import eval_transform, model_and_data


@dataclasses.dataclass(frozen=True, eq=False)
class NamedSplit:
    """A split, with its name in the log."""

    name: str
    images: Dataset


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    title: str                              # of the model and its data set, for pictures
    splits: Splits
    sampler: StepSampler
    loader: Loader                          # of the training images
    batches: Iterator[Batch]                # of that loader, prefetched for a GPU
    eval_loader: Callable[[Dataset], Loader]
    eval_transform: Callable
    train: NamedSplit
    watched: NamedSplit | None              # is evaluated during training
    final: NamedSplit                       # is evaluated at the end
    evaluated_before: NamedSplit | None     # is evaluated before step 1 of a new run
    edits: dict[int, Edit]                  # of training images, by index; {} without --attention_edits
    held_out_edits: dict[int, Edit]         # of `final`
    on_compiled: Callable[[int, float], None] | None = None      # for evaluate()


def build_data(config: Config, found: Found, saved: SavedRun | None, ranks: Ranks, built: Built) -> Data:
    """Raise ConfigError, EditError or CheckpointError on every rank."""
    model, splits, began_at = built.model, found.splits, saved.state.step if saved else 0
    val = NamedSplit(splits.val_name, splits.val)
    test = val if splits.test is splits.val else NamedSplit("test", splits.test)        # one object is evaluated once
    final = val if config.test == "never" else test
    watched = None if splits.val_is_test and config.test != "always" else val
    found_edits, held_out_edits = {}, {}
    if config.attention_edits:
        found_edits, held_out_edits = _find_edits(config, splits, final, saved, ranks)
    shared = _loader_settings(config, ranks)
    cached = saved.state.cached if saved else None          # a resumed run trains on the same pixels as before
    sampler = StepSampler(len(splits.train), config.train_batch_size, ranks.size * config.gradient_accumulation_steps, ranks.rank,
                          ranks.size, config.seed, began_at, config.num_steps)
    loader = train_loader(splits.train, sampler, transform=build_train_transform(config, model, splits), seed=config.seed,
                          bad_images=config.bad_images,
                          edit_transform=functools.partial(transform_with_edits, found_edits, model.grid)
                          if config.attention_edits else None, cached=cached, **shared)
    if ranks.is_main:
        print(describe_loading(loader, ranks))
    title = model_and_data(config.to_dict(), model.config)
    return Data(
        title=title, splits=splits, sampler=sampler, loader=loader, batches=prefetch(loader, ranks.device),
        eval_loader=build_eval_loader(config, model, ranks),
        eval_transform=eval_transform(model, config.to_dict()), train=NamedSplit("train", splits.train), watched=watched,
        final=final, evaluated_before=test if config.test == "always" else watched,
        edits=found_edits, held_out_edits=held_out_edits,
        on_compiled=print_compile_time(ranks) if config.compile else None)


def describe_loading(loader: Loader, ranks: Ranks) -> str:
    """Return a line on how training images are loaded."""
    if not loader.not_cached:
        return f"loading: all images stay in the memory of the {'GPU' if ranks.device.type == 'cuda' else 'CPU'}"
    count = loader.num_workers
    who = f"{count} loader process{'es' * (count > 1)}" if count else "the training process"
    return (f"loading: images are read during training, by {who}{' on each GPU' * (count > 0 and ranks.size > 1)}"
            f" ({loader.not_cached})")


def build_train_transform(config: Config, model: ImageTransformer, splits: Splits) -> Callable:
    """-> PIL image -> uint8 (C, height, width)"""
    return transforms.train_transform(
        config.augmentation, model.img_size, flip=splits.can_flip, crop_scale=config.crop_scale, crop_padding=config.crop_padding,
        rotation=config.rotation, color_jitter=config.color_jitter, randaugment_ops=config.randaugment_ops,
        randaugment_magnitude=config.randaugment_magnitude, random_erasing=config.random_erasing,
        channels=model.config.in_channels, interpolation=config.interpolation)


def build_eval_loader(config: Config, model: ImageTransformer, ranks: Ranks) -> Callable[[Dataset], Loader]:
    """-> a function: split -> the loader of this rank's part of it"""
    transform, shared = eval_transform(model, config.to_dict()), _loader_settings(config, ranks)
    return lambda images: eval_loader(images, transform=transform, batch_size=config.eval_batch_size, rank=ranks.rank,
                                      world_size=ranks.size, **shared)


def _loader_settings(config: Config, ranks: Ranks) -> dict:
    """Return the settings that the training and evaluation loaders share."""
    workers = config.num_workers
    if workers is None:
        workers = default_workers(config.dataset, ranks.local_size, ranks.device.type)
    return {"num_workers": workers, "pin_memory": ranks.device.type == "cuda", "device": ranks.device,
            "cached_workers": 0 if config.num_workers is None else None}      # drawing boxes takes no time


def print_compile_time(ranks: Ranks) -> Callable[[int, float], None]:
    """-> a function that prints the seconds that compiling took, once for each size of evaluation batches"""
    sizes: set[int] = set()

    def on_compiled(images: int, seconds: float) -> None:
        if ranks.is_main and images not in sizes:
            print(f"compiled in {seconds:.0f} s, for {images} images an evaluation batch", flush=True)
        sizes.add(images)

    return on_compiled


def _find_edits(config: Config, splits: Splits, final: NamedSplit, saved: SavedRun | None,
                ranks: Ranks) -> tuple[dict[int, Edit], dict[int, Edit]]:
    """-> (edits of training images, edits of images that are evaluated at the end), by index"""
    folder = Path(config.attention_edits)
    found, others = distributed.local_main_first(
        ranks, lambda: (edits.find(folder, splits.train), edits.find(folder, final.images)))
    if not found:
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json"))
        names = f", such as {files[0]}," if files else ""
        count = f"{len(files)} file{'s' * (len(files) != 1)}"
        raise ConfigError(f"--attention_edits {folder}: none of its {count}{names} is an edit of an image that this run trains "
                          f"on, such as {splits.train.name(0)}. Make edits with: {launch.command('annotate.py')} --checkpoint "
                          "output/NAME")
    if saved and saved.state.first.get("edits") not in (None, edits.digest(found)):
        raise CheckpointError(f"--attention_edits {folder}: these are not the edits that the run began with. Restore them, or "
                              "start a new run with --pretrained_dir in place of --resume_path")
    return found, others
