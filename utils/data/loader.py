"""The loaders of training and evaluation, from a split to batches on the device.

A transform is a function of one image: what split.source returns (splits.py) -> uint8 (C, height, width). It draws from
torch's global CPU generator, which is seeded here by (seed, epoch, image), so the images of a step do not depend on ranks,
workers or restarts. Small data sets are cached on the device (device_cache.py): the loader then sends only the random draws,
and the batch is made on the device.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from utils.device import core_count
from utils.randomness import derive_seed, seeded

from .device_cache import CachedImages, Geometry, cache_on_device
from .image_files import image_source
from .reading import AS_STORED, Reading
from .sampler import SampleIndex, SampleIndices, StepSampler
from .splits import ImageError
from .workers import TIMEOUT_S, Stream, WorkerError, WorkerPool

UNKNOWN = -1                # the target of an image without a label
REPLACEMENTS = 100          # images after an unreadable one that are tried in its place

Transform = Callable[[Image.Image | Tensor], Tensor]
# (transform, image, its index in the split) -> transform(image), and the edit (2, h, w) under the same crop and flip
EditTransform = Callable[[Transform, Image.Image | Tensor, int], tuple[Tensor, Tensor]]


class Batch(NamedTuple):
    images: Tensor                  # (B, C, height, width) uint8; already on the device if the data set is cached
    targets: Tensor                 # (B,) int64
    keys: Sequence[SampleIndex]
    edits: Tensor | None = None     # (B, 2, h, w) float32: values and edited ratios; only from a loader with edits
    bad: tuple[tuple[int, str], ...] = ()     # (index, reason) of images that were replaced; `keys` keep their index


# ------------------------------------------------------------------------------------------------ one image at a time


class _Samples(Dataset):
    """SampleIndex -> (uint8 image, target, (index, reason) of the unreadable image that it replaces or None[, edit]).

    An error is returned, not raised, so that the main process can raise it without the traceback of a worker.
    """

    def __init__(self, split: Dataset, transform: Transform, seed: int | None, edit_transform: EditTransform | None = None,
                 skip: bool = False):
        self.split, self.transform, self.seed, self.edit_transform = split, transform, seed, edit_transform
        self.tries = 1 + REPLACEMENTS if skip else 1

    def __getitem__(self, sample: SampleIndex) -> tuple | ImageError:
        first = None
        for ahead in range(min(self.tries, len(self.split))):
            index = (sample.index + ahead) % len(self.split)
            bad = first and (sample.index, first.plain)
            try:
                image, target = self.split.source(index)
                with contextlib.nullcontext() if self.seed is None else seeded(self.seed, "augment", sample.epoch, index):
                    image, *edit = ((self.transform(image),) if self.edit_transform is None else
                                    self.edit_transform(self.transform, image, index))
                return image, target, bad, *edit
            except ImageError as error:              # of the transform too, which decodes JPEGs
                first = first or error
        ways = "dataset.py check lists all such images"
        ways += ", --bad_images skip trains without them" if self.seed is not None and self.tries == 1 else ""
        return ImageError(first.plain, ". ".join(filter(None, [first.advice, ways])))


class _Files(Dataset):
    """Image files by path, with the same results as _Samples: any number of files, without targets."""

    edit_transform = None

    def __init__(self, reading: Reading, transform: Transform):
        self.reading, self.transform = reading, transform

    def __getitem__(self, path: str) -> tuple | ImageError:
        try:
            return self.transform(image_source(path, self.reading)), UNKNOWN, None
        except ImageError as error:
            return error


def _collate(samples: list | Batch) -> Batch | ImageError:
    """-> Batch without keys. The main process knows them; without them a message is so small that a killed worker has sent either
    all of it or nothing. The samples of a cached data set are a Batch already.
    """
    if isinstance(samples, Batch):
        return samples
    for sample in samples:
        if isinstance(sample, ImageError):
            return sample
    images, targets, bad, *edits = zip(*samples)
    return Batch(torch.stack(images), torch.tensor(targets), (), torch.stack(edits[0]) if edits else None,
                 tuple(filter(None, bad)))


def _collate_readable(samples: list | Batch) -> Batch:
    """-> Batch without keys and without the images that cannot be read: `bad` has (position, reason) of those."""
    if isinstance(samples, Batch):
        return samples
    bad = tuple((position, sample.plain) for position, sample in enumerate(samples) if isinstance(sample, ImageError))
    readable = [sample for sample in samples if not isinstance(sample, ImageError)]
    if not readable:
        return Batch(torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), (), None, bad)
    return _collate(readable)._replace(bad=bad)


# ------------------------------------------------------------------------------------------------ a cached data set


class _Draws(Dataset):
    """SampleIndices of a cached split -> Batch whose `images` are what Geometry.draw returns."""

    def __init__(self, targets: np.ndarray, rows: np.ndarray, geometry: Geometry, seed: int | None):
        self.targets, self.rows, self.geometry, self.seed = targets, rows, geometry, seed

    def __getitems__(self, samples: SampleIndices) -> Batch:
        seeds = None if self.seed is None else [
            derive_seed(self.seed, "augment", *of) for of in zip(samples.epochs.tolist(), samples.indices.tolist())]
        draws = self.geometry.draw(self.rows[samples.indices], seeds)
        return Batch(draws, torch.from_numpy(self.targets[samples.indices]), ())


# --------------------------------------------------------------------------------------------------- loaders


class Loader(WorkerPool):
    """Iterates over Batches. Raises ImageError for an image that cannot be read, WorkerError if a worker dies or returns no batch
    for `timeout_s` seconds.

    device: where the images may be cached; `cached_workers`, unless it is None, then replaces `num_workers`. cached: whether to
    cache them if the transform allows it; None: only if they are small enough.
    """

    def __init__(self, dataset: _Samples | _Files, batches: Sequence[SampleIndices] | Stream, *, num_workers: int,
                 pin_memory: bool, timeout_s: float = TIMEOUT_S, device: torch.device | None = None, cached: bool | None = None,
                 cached_workers: int | None = None, collate: Callable = _collate):
        cache = _cache(dataset, device, cached)
        self.not_cached = cache if isinstance(cache, str) else ""        # the reason; "" if the images are cached
        self._cache = None if self.not_cached else cache
        if self._cache:
            num_workers = num_workers if cached_workers is None else cached_workers
            dataset = _Draws(dataset.split.targets, cache.rows, cache.geometry, dataset.seed)
        super().__init__(dataset, batches, num_workers, collate, pin_memory, timeout_s)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        with contextlib.closing(super().__iter__()) as batches:
            for number, batch in enumerate(batches):
                if isinstance(batch, ImageError):
                    raise batch
                images = self._cache.make(batch.images) if self._cache else batch.images
                keys = self.batches.taken.popleft() if isinstance(self.batches, Stream) else self.batches[number]
                yield batch._replace(images=images, keys=keys)


def _cache(dataset: _Samples, device: torch.device | None, cached: bool | None) -> CachedImages | str:
    """Return the cached images, or the reason why they are not cached."""
    if dataset.edit_transform is not None:
        return "attention edits are used"
    if cached is False:
        return "as when the run started"
    if device is None:
        return "no device was set"
    return cache_on_device(dataset.split, dataset.transform, device, any_size=cached is True)


def train_loader(split: Dataset, sampler: StepSampler, *, transform: Transform, seed: int,
                 edit_transform: EditTransform | None = None, bad_images: str = "stop", **loading: object) -> Loader:
    """Return one loader for the whole run, over the micro-batches of `sampler`. `transform` draws by (seed, epoch, image).

    edit_transform: adds edits to every Batch, cropped and mirrored like its images; the images do not depend on it.

    bad_images "skip": an image that cannot be read is replaced by the next readable one of the split (after the last image comes
    the first; ImageError after REPLACEMENTS tries), with its own target, edit and draws; Batch.bad names the unreadable image.
    "stop": it raises ImageError.

    loading: arguments of Loader.
    """
    return Loader(_Samples(split, transform, seed, edit_transform, bad_images == "skip"), sampler, **loading)


def eval_loader(split: Dataset, *, transform: Transform, batch_size: int, rank: int, world_size: int,
                **loading: object) -> Loader:
    """Return a loader of this rank's part of the split in batches of `batch_size`. All ranks together load every image once.

    loading: arguments of Loader.
    """
    own = np.arange(rank, len(split), world_size)
    batches = [SampleIndices(0, 0, np.zeros_like(part), part)
               for part in (own[first:first + batch_size] for first in range(0, len(own), batch_size))]
    return Loader(_Samples(split, transform, None), batches, **loading)


def stream_loader(batches: Iterable[Sequence], *, transform: Transform, split: Dataset | None = None,
                  reading: Reading = AS_STORED, **loading: object) -> Loader:
    """Return a loader of `batches`, which are read on demand: lists of the paths of image files or, with a split, SampleIndices.
    These are the Batch.keys.

    An image that cannot be read is missing in its Batch, and `bad` has (its position among the keys, reason). loading: arguments
    of Loader.
    """
    samples = _Files(reading, transform) if split is None else _Samples(split, transform, None)
    return Loader(samples, Stream(batches), collate=_collate_readable, **loading)


def default_workers(dataset: str, local_world_size: int, device_type: str = "cpu") -> int:
    """Return the number of workers of this process. With a GPU that is all its cores but one, up to 16: a GPU processes thousands
    of images per second, a core decodes hundreds. On a CPU it is a quarter of the cores, 1 to 4, which load while the others
    train. It is 0 on a single core, for digits, which need no decoding, and with an Apple GPU: a process that uses one should not
    fork."""
    if dataset == "digits" or device_type == "mps":
        return 0
    own = core_count() // local_world_size
    return max(0, min(16, own - 1) if device_type == "cuda" else min(4, max(1, own // 4), own - 1))


# -------------------------------------------------------------------------------------------- on the way to a GPU


def prefetch(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on a GPU, each copied while the previous one is used. On other devices, yield them unchanged.

    The copy of a batch is queued on a separate stream before the previous batch is yielded. An error is raised in the place of
    its batch, so no earlier step is lost.
    """
    if device.type != "cuda":
        yield from batches
        return
    batches, side, waiting = iter(batches), _side_stream(device), None
    side.wait_stream(torch.cuda.current_stream(device))          # which has copied cached images to the device
    while True:
        try:
            with torch.cuda.stream(side):
                batch = next(batches, None)
                moved = batch and batch._replace(**{name: value.to(device, non_blocking=True) for name, value
                                                    in batch._asdict().items() if isinstance(value, Tensor)})
                coming = moved, side.record_event()
        except (ImageError, WorkerError) as error:
            coming = error, None
        if waiting is not None:
            yield _arrived(*waiting)
        if coming[0] is None:
            return
        waiting = coming


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the same stream for all loaders, since the allocator keeps separate memory for each stream."""
    return torch.cuda.Stream(device)


def _arrived(batch: Batch | ValueError, copied: torch.cuda.Event | None) -> Batch:
    """Make the current stream wait for the copy, and return the batch. Raises the error that came in its place."""
    if isinstance(batch, ValueError):
        raise batch
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)
    for value in batch:
        if isinstance(value, Tensor):
            value.record_stream(stream)         # or its memory could be reused while the step still reads it
    return batch
