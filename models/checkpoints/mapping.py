"""Maps a file into memory, so that its arrays are views of its pages, which can be freed after use."""

import mmap
from typing import BinaryIO

import torch
from torch import Tensor


class MappedFile:
    """The pages of a file, which must not change. A write to a view changes only the view."""

    def __init__(self, stream: BinaryIO):
        self._pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)

    def bytes_at(self, start: int, size: int) -> Tensor:
        """Return a view (size) of uint8."""
        return torch.frombuffer(self._pages, dtype=torch.uint8, count=size, offset=start) if size else torch.empty(
            0, dtype=torch.uint8)

    def memory_at(self, start: int, size: int) -> memoryview:
        return memoryview(self._pages)[start:start + size]

    def release(self, start: int, size: int) -> None:
        """Free the memory of these bytes until they are read again; a changed view loses its changes."""
        if hasattr(mmap, "MADV_DONTNEED") and size:
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._pages.madvise(mmap.MADV_DONTNEED, first, start + size - first)

    def release_view(self, view: Tensor) -> None:
        """Free the memory of a view; does nothing for a tensor in other memory."""
        storage = view.untyped_storage()
        start = storage.data_ptr() - torch.frombuffer(self._pages, dtype=torch.uint8).data_ptr()
        if 0 <= start < len(self._pages):
            self.release(start, min(storage.nbytes(), len(self._pages) - start))
