"""The head of a new run, where it is neither zeros nor the file's: fitted to the features that the start weights compute."""

import time

import numpy as np
import torch

from utils import distributed
from utils.config import Config
from utils.data.loader import Loader, eval_loader, prefetch
from utils.data.splits import Subset
from utils.distributed import Ranks
from utils.training import logistic

from .data import Data, loader_settings
from .find import SavedRun
from .model import Built
from .trainer import class_weights

MAX_IMAGES, MIN_OF_CLASS = 2000, 5       # the head is fitted to so many images at most, or to so many of each class


def start_head(config: Config, saved: SavedRun | None, ranks: Ranks, built: Built, data: Data) -> None:
    """Fills the head of a new run with --head logistic, on all ranks. Raises ImageError on every rank.

    Rank 0 computes it alone, so that the number of ranks changes no bit.
    """
    if saved is not None or config.head != "logistic":
        return
    began = time.monotonic()
    chosen = spread(np.asarray(data.splits.train.targets), max(MAX_IMAGES, MIN_OF_CLASS * len(data.splits.classes)), config.seed)
    with distributed.watch(ranks, lambda: "fitting the head"):
        parameters = distributed.broadcast_from_main(ranks, lambda: _fit(config, ranks, built, data, chosen))
    for name, values in parameters.items():
        built.model.get_parameter(name).data.copy_(torch.from_numpy(values))
    if ranks.is_main:
        print(f"head: starts from a logistic regression on the features of {len(chosen)} training images, "
              f"{time.monotonic() - began:.1f} s", flush=True)


def spread(targets: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Returns the indices of `number` images, or of all, drawn so that classes have equally many as far as they have images."""
    order = np.random.default_rng(seed).permutation(len(targets))
    turn = np.empty(len(targets), dtype=np.int64)                # the how-manieth of its class an image is drawn
    for target in np.unique(targets):
        own = order[targets[order] == target]
        turn[own] = np.arange(len(own))
    return np.sort(order[np.argsort(turn[order], kind="stable")[:number]])


def _fit(config: Config, ranks: Ranks, built: Built, data: Data, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the parameters of the heads by name."""
    loader = eval_loader(Subset(data.splits.train, chosen), transform=data.eval_transform, batch_size=config.eval_batch_size,
                         rank=0, world_size=1, bad_images=config.bad_images, **loader_settings(config, ranks))
    features, targets = extract(built, loader, ranks.device, config.augmentation.endswith("_flip") and data.splits.can_flip)
    weights = class_weights(config, data, torch.device("cpu"))
    weights = None if weights is None else weights.numpy()[targets]
    parameters = {}
    for head, inputs in features.items():
        weight, bias = logistic.fit(inputs, targets, len(data.splits.classes), weights)
        parameters |= {f"{head}.weight": weight, f"{head}.bias": bias}
    return parameters


@torch.inference_mode()
def extract(built: Built, loader: Loader, device: torch.device, mirrored: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns what enters each head, (N, D) float64 by the head's name, and the targets (N,).

    mirrored: every image comes twice, as it is and mirrored.
    """
    model, inputs, targets = built.model, {}, []
    heads = dict.fromkeys(name.rpartition(".")[0] for name in model.head_names())
    hooks = [model.get_submodule(head).register_forward_pre_hook(
        lambda _, given, head=head: inputs.setdefault(head, []).append(given[0].cpu().double())) for head in heads]
    model.eval()
    try:
        for batch in prefetch(loader, device):
            images = built.normalize(batch.images.to(device, non_blocking=True))
            for view in (images, images.flip(-1)) if mirrored else (images,):
                with built.precision.autocast(device):
                    model.forward(view)                  # model(view) of a compiled model calls no hooks
                targets.append(batch.targets.cpu())
    finally:
        for hook in hooks:
            hook.remove()
    return {head: torch.cat(parts).numpy() for head, parts in inputs.items()}, torch.cat(targets).numpy()
