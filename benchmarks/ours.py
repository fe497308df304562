"""Our contenders: the objects that train.py makes, in the same order. The only file of benchmarks that imports them."""

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import configs
from models import create_model
from models.attention import Attend
from utils import device as devices
from utils import distributed
from utils.data import datasets, prepare, splits, transforms
from utils.data import loader as data
from utils.data.sampler import SampleIndices, StepSampler
from utils.run import checkpoint, profiling
from utils.run import saver as saving
from utils.training import criterion
from utils.training import evaluation as metrics
from utils.training import optimizer as optim
from utils.training import precision as precisions
from utils.training import trainer as engine

from .conditions import MATMUL, arrange, images
from .input import arrays
from .peers import CLASSES


def row_of(name: str, size: int | None) -> dict:
    """Return the sizes of a row of configs.MODELS as plain values for the peers. size: of the images; None: the row's."""
    row = configs.MODELS[name].copy_and_resolve_references()
    keys = ("patch_size", "hidden_size", "mlp_dim", "num_heads", "num_layers")
    return {key: row[key] for key in keys} | {"name": name, "size": size or row.img_size}


def _precision(name: str, device: torch.device) -> precisions.Precision:
    """Return the precision of this name; "default" is the default of train.py."""
    if name in MATMUL:
        name = "fp32"
    return precisions.choose("auto" if name == "default" else name, "O2", device)[0]


def _build(row: dict, name: str, device: str, threads: int, compiled: bool) -> tuple:
    """Return (ranks, model, precision, normalize)."""
    arrange(device, threads, name)
    if device == "cpu":
        devices.keep_memory()
    ranks = distributed.Ranks(0, 1, 0, 1, torch.device(device))
    precision = _precision(name, ranks.device)
    # Without the dropout that some rows ask for: the peers have none.
    model = create_model(row["name"], CLASSES, row["size"], dropout_rate=0.0).to(ranks.device, precision.weights)
    mean, std = model.config.mean, model.config.std
    if compiled:
        model.compile(dynamic=False)
    return ranks, model, precision, lambda pixels: transforms.normalize(pixels, mean, std, precision.weights)


def _batches(pixels: torch.Tensor) -> Iterator[data.Batch]:
    """Yield the same images again and again, as the training loader would."""
    targets, indices = torch.arange(len(pixels)) % CLASSES, np.arange(len(pixels))
    nothing = np.zeros_like(indices)
    for step in itertools.count():
        yield data.Batch(pixels, targets, SampleIndices(step, 0, nothing, indices))


def training_step(row: dict, batch: int, precision: str, device: str, threads: int, compiled: bool) -> Callable[[], None]:
    """Return a step: Trainer.train_step with the optimizer, scaler and precision of the recipe vit-paper."""
    ranks, model, kind, normalize = _build(row, precision, device, threads, compiled)
    groups = optim.parameter_groups(model.named_parameters(), weight_decay=0.0)
    trainer = engine.Trainer(
        model, optim.build_optimizer("sgd", groups, 1e-3), criterion.Criterion(), precisions.LossScaler(kind, ranks.device),
        kind, ranks, normalize, engine.StepSettings(batch_size=batch, micro_steps=1, max_grad_norm=1.0, seed=0,
                                                    schedule=lambda update: 1e-3))
    pixels = images(batch, row["size"])
    batches = _batches(pixels.pin_memory() if device == "cuda" else pixels)

    def step() -> None:
        trainer.train_step(batches, flush=False)

    return step


class _OneBatch:
    """A loader with one batch."""

    def __init__(self, batch: data.Batch):
        self._batch = batch

    def __iter__(self) -> Iterator[data.Batch]:
        yield self._batch


def evaluation(row: dict, batch: int, precision: str, device: str, threads: int, compiled: bool) -> Callable[[], None]:
    """Return a step: metrics.evaluate of one batch, with its metrics."""
    ranks, model, kind, normalize = _build(row, precision, device, threads, compiled)
    pixels = images(batch, row["size"])
    loader = _OneBatch(next(_batches(pixels.pin_memory() if device == "cuda" else pixels)))

    def step() -> None:
        metrics.evaluate(model, loader, normalize, kind, ranks, CLASSES)

    return step


def flops(row: dict) -> int:
    """Return the operations of a training step for one image, as train.py counts them."""
    return profiling.flops_per_image(create_model(row["name"], CLASSES, row["size"]), (3, row["size"], row["size"]))


keep_memory = devices.keep_memory


def attention() -> torch.nn.Module:
    """Return the module that computes attention in our models."""
    return Attend()


def shapes(name: str) -> list[tuple[int, ...]]:
    """Return the shapes of a model's parameters."""
    with torch.device("meta"):
        return [tuple(parameter.shape) for parameter in create_model(name, CLASSES).parameters()]


def optimizer_step(parameters: list[torch.nn.Parameter]) -> Callable[[], None]:
    """Return a step: what Trainer does with the gradients, their norm and the one pass that clips and changes the weights."""
    optimizer = optim.build_optimizer("sgd", parameters, 1e-3)
    one = torch.ones(())

    def step() -> None:
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        optim.update(optimizer, norm, ~norm.isfinite(), one, 1.0)

    return step


# ------------------------------------------------------------------------------------------------------------ input


PREPARED = 256          # pixels of the shorter side of a prepared image


def _input(split, batch: int, size: int) -> Callable[[], None]:
    """Return a step: a batch of train.py's loader without workers, normalized as in a training step."""
    torch.set_num_threads(1)
    devices.keep_memory()             # as in train.py on a CPU
    config = configs.MODELS["ViT-B_16"]
    transform = transforms.train_transform("crop_flip", (size, size), crop_scale=0.08)      # torchvision's scale
    order = StepSampler(len(split), batch, 1, 0, 1, 0, 0, 10**6)
    batches = iter(data.train_loader(split, order, transform=transform, seed=0, num_workers=0, pin_memory=False,
                                     device=torch.device("cpu")))

    def step() -> None:
        transforms.normalize(next(batches).images, config.mean, config.std)

    return step


def folder_input(root: str, batch: int, size: int) -> Callable[[], None]:
    """Return a step: a batch from class folders."""
    return _input(datasets.open_splits("folder", root).train, batch, size)


def prepared_input(root: str, cache: str, batch: int, size: int) -> Callable[[], None]:
    """Prepare the class folders into `cache`, and return a step: a batch from there."""
    prepare.build(datasets.open_splits("folder", root), "folder", cache, PREPARED, 1, lambda line: None)
    return folder_input(cache, batch, size)


def cached_input(images: int, batch: int, size: int) -> Callable[[], None]:
    """Return a step: a batch from arrays in memory."""
    return _input(splits.ArrayImages(arrays(images), [index % 10 for index in range(images)]), batch, size)


# ---------------------------------------------------------------------------------------------------- load and save


def load(row: dict, path: str) -> Callable[[], None]:
    """Return a step: construct a model with the weights of a file."""
    devices.keep_memory()             # as in train.py on a CPU

    def step() -> None:
        create_model(row["name"], CLASSES, pretrained=path)

    return step


def trained(row: dict) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return a model and the optimizer of vit-paper, with momentum."""
    model = create_model(row["name"], CLASSES)
    optimizer = optim.build_optimizer("sgd", model.parameters(), 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def save(row: dict, folder: str) -> Callable[[], dict[str, float]]:
    """Return a step that saves and returns seconds: "stall" until training continues, "total" until the file is on the disk."""
    model, optimizer = trained(row)
    place = Path(folder, "ours")
    place.mkdir()
    saver, steps = saving.Saver(place, keep=1), itertools.count(1)

    def step() -> dict[str, float]:
        number, started = next(steps), time.perf_counter()
        state = checkpoint.RunState(number, number, 0, model.state_dict(), optimizer.state_dict(), {}, {}, {}, {}, {}, [], 0, 0.0)
        saver.save([checkpoint.step_path(place, number)], state)
        stalled = time.perf_counter() - started
        saver.wait()
        return {"stall": stalled, "total": time.perf_counter() - started}

    return step
