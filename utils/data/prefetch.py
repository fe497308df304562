"""Batches on their way to a GPU while it works on the one before."""

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .loader import Batch
from .splits import ImageError
from .workers import WorkerError


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device. On a GPU each is copied, or made (held.py), while the one before it is worked on.

    The work for it is queued on a stream of its own before the batch before it is handed out; an error in it is raised
    when its turn comes, so that no step is lost to a later one. Elsewhere the batches pass as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    batches, side, waiting = iter(batches), _side_stream(device), None
    side.wait_stream(torch.cuda.current_stream(device))          # which put held images there
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
    """One for all loaders: the allocator keeps memory for each stream apart."""
    return torch.cuda.Stream(device)


def _arrived(batch: Batch | ValueError, copied: torch.cuda.Event | None) -> Batch:
    """On the current stream, which waits for it there and then."""
    if isinstance(batch, ValueError):
        raise batch
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)
    for value in batch:
        if isinstance(value, Tensor):
            value.record_stream(stream)         # or its memory could be another batch's while the step still reads it
    return batch
