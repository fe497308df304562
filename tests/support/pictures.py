"""Pictures for the tests of transforms."""

import numpy as np
from PIL import Image


def picture(height: int = 40, width: int = 60) -> Image.Image:
    """Return a smooth image that is different in every corner."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [rows * 255 / (height - 1), columns * 255 / (width - 1), (rows + columns) * 255 / (height + width - 2)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def plain(*color: int, size: int = 24) -> Image.Image:
    return Image.new("RGB", (size, size), color if len(color) == 3 else color * 3)
