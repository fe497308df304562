"""From images to labels: what each process does with its batches, and `predict` of a loaded model.

Images are read, resized, cropped and normalized by the code of evaluation, and every batch is computed at one shape, so that the
result for an image does not depend on the other images of its batch.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from utils.data.image_files import image_source, shown
from utils.data.loader import UNKNOWN, Batch, default_workers, prefetch, stream_loader
from utils.data.reading import Reading, to_rgb
from utils.data.sampler import SampleIndices
from utils.data.splits import DataError, ImageError
from utils.data.survey import loose_files
from utils.data.transforms import normalize
from utils.device import choose_device, core_count, is_out_of_memory, keep_memory, out_of_memory_error
from utils.training.evaluation import logits_of, ranked
from utils.training.precision import FP32, Precision, apply_matmul_precision, choose
from utils.training.task import SINGLE_LABEL

KINDS = str, os.PathLike, Image.Image
PYTHON_BATCH = 64              # images of a batch of model.predict
SMALLER_BATCH = "lower --batch_size"


class Answers(NamedTuple):
    """The answers for a batch: arrays with a row for each image that can be read, and columns from the likeliest class on."""

    labels: np.ndarray                      # (n, k) int64
    probabilities: np.ndarray               # (n, k) float32
    losses: np.ndarray                      # (n,) float32; 0 for images without a true class
    bad: tuple[tuple[int, str], ...] = ()   # (position in the batch, reason) of images that cannot be read


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one image. `top` has (label, probability) of the likeliest classes; `label` and `probability` are the
    first of them. They are None where an image of a list cannot be read, and `error` is the reason."""

    label: str | None
    probability: float | None
    top: tuple[tuple[str, float], ...] = ()
    error: str = ""


@torch.inference_mode()
def answer(model: nn.Module, batch: Batch, precision: Precision, flipped: bool, top_k: int, size: int) -> Answers:
    """Return the answers for a batch, computed at the shape of `size` images however many there are."""
    bad = tuple((position, why) for position, why in batch.bad)
    if not len(batch.images):
        return Answers(np.empty((0, top_k), np.int64), np.empty((0, top_k), np.float32), np.empty(0, np.float32), bad)
    device = next(model.parameters()).device
    images = normalize(batch.images.to(device), model.config.mean, model.config.std, precision.weights)
    logits = logits_of(model, images, precision, flipped, size).float()
    labels, targets = ranked(logits, top_k), batch.targets.to(device)
    probabilities = SINGLE_LABEL.probabilities(logits).gather(1, labels)
    losses = F.cross_entropy(logits, targets, ignore_index=UNKNOWN, reduction="none")
    return Answers(labels.cpu().numpy(), probabilities.cpu().numpy(), losses.cpu().numpy(), bad)


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one of `processes` processes: work(batches, number of the process) -> the Answers of each batch, in order.

    A batch is a list of at most `size` sources.Item, or indices of `split`. precision, fp16_opt_level, device: as the flags.
    dataset: the name that decides how many processes load the images.
    """

    model: nn.Module
    transform: Callable
    reading: Reading
    top_k: int
    size: int
    split: Dataset | None = None
    dataset: str = "folder"
    precision: str = "fp32"
    fp16_opt_level: str = "O2"
    flipped: bool = False
    device: str = "auto"
    processes: int = 1
    workers: int | None = None

    def __call__(self, batches: Iterable[Sequence], number: int = 0) -> Iterator[Answers]:
        device = choose_device(self.device, number, self.processes)
        if self.processes > 1:
            torch.set_num_threads(max(1, core_count() // self.processes))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            keep_memory()
        try:
            yield from self._answers(batches, device)
        except Exception as error:
            if is_out_of_memory(error):
                raise out_of_memory_error(device, "predicting", SMALLER_BATCH) from error
            raise

    def _answers(self, batches: Iterable[Sequence], device: torch.device) -> Iterator[Answers]:
        precision, _ = choose(self.precision, self.fp16_opt_level, device)
        apply_matmul_precision(precision)
        model = self.model.to(device, precision.weights)
        workers = loading_processes(self.dataset, self.processes, device) if self.workers is None else self.workers
        loading = {"num_workers": workers, "pin_memory": device.type == "cuda"}
        if self.split is None:
            batches = ([item.path for item in batch] for batch in batches)
        else:
            batches = (SampleIndices(0, 0, np.zeros(len(batch), np.int64), np.asarray(batch, np.int64)) for batch in batches)
            loading |= {"device": device, "cached_workers": 0}              # as evaluation
        with contextlib.closing(stream_loader(batches, transform=self.transform, split=self.split, reading=self.reading,
                                              **loading)) as loader:
            for batch in prefetch(loader, device):
                if self.split is None:              # the row has the path
                    batch = batch._replace(bad=[(position, why.removeprefix(f"{shown(batch.keys[position])}: "))
                                                for position, why in batch.bad])
                yield answer(model, batch, precision, self.flipped, self.top_k, self.size)


def loading_processes(dataset: str, processes: int, device: torch.device) -> int:
    """Return how many loader processes each of `processes` processes has. They are more than in training: for a small model
    reading is most of the work, and with a large one they mostly wait. At least one, so that a file that blocks its reader is
    noticed; none for the digits, which are in memory."""
    if dataset == "digits" or device.type == "mps":            # as default_workers
        return 0
    return max(1, default_workers(dataset, processes, device.type) if device.type == "cuda" else
               min(4, core_count() // processes))


# ------------------------------------------------------------------------------------------------------- in Python


@dataclasses.dataclass(frozen=True)
class Predictor:
    """`predict` of a loaded model: predictor(model, images, top_k). The results are those of predict.py in float32."""

    classes: tuple[str, ...]
    transform: Callable
    reading: Reading
    flipped: bool

    def __call__(self, model: nn.Module, images: object, top_k: int = 1) -> Prediction | list[Prediction]:
        """Return the Prediction for an image, a path or a PIL image, or a list of Predictions for several.

        A single image that cannot be read raises ImageError, a ValueError. In a list its entry has `label` None and the reason in
        `error`, so that the other images are labelled. Raises TypeError for anything else.
        """
        is_single = isinstance(images, KINDS)
        many = [images] if is_single else list(images) if isinstance(images, Iterable) else [images]
        if isinstance(images, bytes) or not all(isinstance(image, KINDS) for image in many):
            other = next((image for image in many if not isinstance(image, KINDS)), images)
            raise TypeError(f"predict takes a path, a PIL image, or a list of them, not {type(images).__name__}"
                            + f" of {type(other).__name__}" * (other is not images))
        if not 1 <= top_k <= len(self.classes):
            raise DataError(f"top_k must be from 1 to {len(self.classes)}, the model's number of classes, got {top_k}")
        reading = found_reading(self.reading, [os.fspath(path) for path in map(_file_of, many) if path])
        predictions, was_training = [], model.training
        model.eval()
        try:
            with _exact_products():
                for start in range(0, len(many), PYTHON_BATCH):
                    predictions += self._predict(model, many[start:start + PYTHON_BATCH], reading, top_k,
                                                 min(PYTHON_BATCH, len(many)), is_single)
        finally:
            model.train(was_training)
        return predictions[0] if is_single else predictions

    def _predict(self, model: nn.Module, images: list, reading: Reading, top_k: int, size: int, raises: bool) -> list[Prediction]:
        tensors, bad = [], {}
        for position, image in enumerate(images):
            try:
                tensors.append(self.transform(read(image, reading)))
            except ImageError as error:
                if raises:
                    raise
                bad[position] = error.plain
        pixels = torch.stack(tensors) if tensors else torch.empty(0, dtype=torch.uint8)
        kind = next(model.parameters()).dtype            # the caller may have converted the model
        precision = FP32 if kind == torch.float32 else Precision("as the model", kind, kind)
        answers = answer(model, Batch(pixels, torch.full((len(tensors),), UNKNOWN), ()), precision, self.flipped, top_k, size)
        tops = iter([tuple((self.classes[label], round(float(probability), 6)) for label, probability in zip(*row))
                     for row in zip(answers.labels, answers.probabilities)])
        return [Prediction(None, None, error=bad[position]) if position in bad else Prediction(*top[0], top)
                for position in range(len(images)) for top in ([()] if position in bad else [next(tops)])]


def found_reading(wish: Reading, paths: Sequence[str]) -> Reading:
    """Return how files are read for a model that is not one of our runs: what is "auto" is found from these files."""
    return loose_files([(path, 0) for path in paths], ".", wish).reading


def read(image: str | os.PathLike | Image.Image, reading: Reading) -> Image.Image:
    """Read a path or an image. An image that Image.open has opened and not decoded is read from its file. Raises ImageError."""
    if path := _file_of(image):
        return image_source(os.fspath(path), reading)
    try:
        return to_rgb(image, reading)
    except Exception as error:                  # Pillow raises many kinds for a damaged file
        raise ImageError(f"an image of mode {image.mode} cannot be read ({error})") from error


def _file_of(image: str | os.PathLike | Image.Image) -> str | os.PathLike | None:
    if isinstance(image, (str, os.PathLike)):
        return image
    name = getattr(image, "filename", "")
    opened = getattr(image, "fp", None) is not None and image.tell() == 0         # a later frame is not the file
    return Path(name) if name and opened and os.path.isfile(name) else None


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Compute products of float32 numbers without rounding in the block, whatever the program sets."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    apply_matmul_precision(FP32)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
