"""An edit of attention follows its image through a training transform: the same crop, the same flip."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from .edits import Edit


def transform_with_edits(edits: dict[int, Edit], grid: tuple[int, int], transform: Callable, image: Image.Image | Tensor,
                         index: int) -> tuple[Tensor, Tensor]:
    """Transform an image of a split together with its edit. With its first two arguments bound it is the `edit_transform` of
    train_loader.

    edits: by index of the image in the split. grid: (h, w) of the model.
    Returns transform(image), the same as without an edit, and the edit (2, h, w) float32, zeros for an image without one.
    """
    if index not in edits:
        return transform(image), torch.zeros(2, *grid)
    return transform_with_edit(transform, image, edits[index], grid)


def transform_with_edit(transform: v2.Compose, image: Image.Image | Tensor, edit: Edit,
                        grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Transform an image and its edit -> transform(image), and the edit under the same crop and flip: (2, h, w) float32.

    transform: train_transform's, without RandAugment, whose shears and shifts do not move masks. The edit has, for each
    patch, the mean value over its edited pixels, 0 if there are none, and the ratio of its pixels that are edited, 0..1.
    Padding, corners that a rotation leaves empty and erased pixels are not edited.
    """
    assert not any(isinstance(step, v2.RandAugment) for step in transform.transforms), "RandAugment does not move the edit"
    planes = np.stack([np.where(edit.edited, edit.values, 0), edit.edited]).astype(np.float32)
    stored = torch.from_numpy(planes).as_subclass(_StoredEdit)
    stored.region, stored.image_size = edit.region, tuple(v2.functional.get_size(image))
    image, mask = transform((image, stored))
    assert isinstance(mask, tv_tensors.Mask) and mask.shape[1:] == image.shape[1:], (type(mask), mask.shape)
    # In float64 the mean of equal values is that value.
    values, edited = F.adaptive_avg_pool2d(mask.as_subclass(Tensor).double(), grid)
    return image, torch.stack([values / edited.clamp(min=1e-9), edited]).float()


class _StoredEdit(tv_tensors.TVTensor):
    """An edit at the start of a transform: (2, h, w), values and what is edited, as stored.

    The first step of every training transform resizes an image or a crop; it turns the edit into a Mask of the pixels that it
    makes. Every other step moves a Mask as it moves pixels. (A mask of the stored image's pixels would be blurred for small
    images, and slow for large ones.)
    """

    region: tuple[float, float, float, float]       # what the grid covers: top, left, bottom, right, as ratios of the image
    image_size: tuple[int, int]                     # height, width

    def render(self, top: int, left: int, height: int, width: int, size: tuple[int, int]) -> tv_tensors.Mask:
        """Return the crop (in pixels of the stored image), resized: (2, *size) float32, [value where edited, edited]."""
        grid = self.as_subclass(Tensor)
        for dim, (start, length) in enumerate(((top, height), (left, width))):
            # The center of each new pixel as a ratio of the image, then in patches; beyond the region: the border of 0.
            centers = (start + (torch.arange(size[dim], dtype=torch.float64) + 0.5) / size[dim] * length) / self.image_size[dim]
            first, last = self.region[dim], self.region[dim + 2]
            count = grid.shape[dim + 1]
            patches = ((centers - first) / (last - first) * count).floor().clamp(-1, count).long()
            grid = F.pad(grid, (0, 0, 1, 1) if dim == 0 else (1, 1)).index_select(dim + 1, patches + 1)
        return tv_tensors.Mask(grid)


@v2.functional.register_kernel(v2.functional.resize, _StoredEdit)
def _resize(edit: _StoredEdit, size: tuple[int, int], **_) -> tv_tensors.Mask:
    return edit.render(0, 0, *edit.image_size, size)


@v2.functional.register_kernel(v2.functional.resized_crop, _StoredEdit)
def _resized_crop(edit: _StoredEdit, top: int, left: int, height: int, width: int, size: tuple[int, int],
                  **_) -> tv_tensors.Mask:
    return edit.render(top, left, height, width, size)
