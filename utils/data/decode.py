"""Decodes an opened image file: a JPEG only at the resolution that its crop needs, any other file in full.

libjpeg makes an image of 1/2, 1/4 or 1/8 of the size directly from the lower frequencies of each block of 8 x 8 pixels:
close to the mean over the pixels that are merged, for a fraction of the work. JPEGs at full size are decoded by torchvision,
whose pixels equal Pillow's bit for bit, without Pillow's copies.
"""

import functools
import io
import os
from collections.abc import Callable
from typing import BinaryIO

import torch
from PIL import Image
from torch import Tensor

from utils import launch

from .reading import AS_STORED, UPRIGHT, Reading, orientation, stored_rgb, to_rgb, turned_size

# The formats that data sets use; Pillow reads many more. Some of the Oxford pets are GIFs called .jpg.
IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
MAX_PIXELS = 64_000_000
MAX_HELD_BYTES = 1 << 26          # of a JPEG that is kept in memory; a larger file is decoded while it is read
JPEG_BEGIN, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
REDUCTIONS = (8, 4, 2)            # of libjpeg
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
INSTALL_HEIF = launch.command_to_install("pillow-heif")


def opened_image(stream: BinaryIO) -> Image.Image:
    """Open an image: read its header, not its pixels. Raises ValueError for more than MAX_PIXELS, and what Pillow raises."""
    start, formats = stream.read(12), IMAGE_FORMATS
    stream.seek(0)
    if start[4:8] == b"ftyp" and start[8:] in HEIF_BRANDS:          # whatever its extension
        if not can_read_heif():
            raise ValueError(f"a HEIC image, which needs {INSTALL_HEIF}")
        formats = ("HEIF",)
    image = Image.open(stream, formats=formats)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width:,} x {height:,} px, more than {MAX_PIXELS:,}: make it smaller")
    return image


@functools.cache
def can_read_heif() -> bool:
    """Whether pillow-heif is installed; if so, register it with Pillow to read HEIC. It turns images upright itself."""
    try:
        from pillow_heif import register_heif_opener  # deferred: optional, and few data sets need it
    except ImportError:
        return False
    register_heif_opener()
    return True


class Undecoded(Image.Image):
    """A color or gray JPEG that `decoded` will decode: its header is read and its bytes are in memory, so the file can be closed.

    Its size is that of the upright image, which reading.upright(pixels, turn) makes of the stored pixels. failed: converts an
    error of the decoder into the error to raise.
    """

    def __init__(self, file: Image.Image, turn: int, failed: Callable[[Exception], Exception]):
        super().__init__()
        self.file, self.turn, self.failed = file, turn, failed

    @property
    def size(self) -> tuple[int, int]:
        return turned_size(self.file.size, self.turn)


def undecoded(stream: BinaryIO, failed: Callable[[Exception], Exception], reading: Reading = AS_STORED) -> Image.Image:
    """Return a JPEG as Undecoded, and any other image decoded to RGB."""
    if stream.peek(3)[:3] == JPEG_BEGIN and os.fstat(stream.fileno()).st_size <= MAX_HELD_BYTES:
        stream = io.BytesIO(stream.read())
    image = opened_image(stream)
    # MPO is Pillow's name for a JPEG file with more than one image, as many phones write.
    if not isinstance(stream, io.BytesIO) or image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return to_rgb(image, reading)
    return Undecoded(image, orientation(image) if reading.exif == "follow" else UPRIGHT, failed)


def decoded(image: Undecoded, crop: tuple[int, int], size: tuple[int, int], margin: float) -> tuple[Image.Image | Tensor, int]:
    """Decode an image, of which a crop (height, width) will be resized to `size` (height, width). Both, and the result, are
    oriented as the file stores them -> (RGB as uint8 (3, height, width) or PIL, the divisor of its sides). The divisor is the
    largest that leaves the crop at least `margin` times the size in both directions.

    With margin 1 (never fewer pixels than the size) the resized crop differs from that of the fully decoded image by 1.5 gray
    levels in the mean over photographs full of detail, by 2.6 over the worst crop; with margin 2 by 0.5 and 0.6. Single pixels
    at sharp edges differ by up to 45. The mean over a crop stays within 0.2.
    """
    reduction = next((number for number in REDUCTIONS
                      if all(old >= number * margin * new for old, new in zip(crop, size))), 1)
    try:
        if reduction == 1 and (pixels := _whole(image.file.fp.getbuffer())) is not None:
            return pixels, 1
        image.file.draft("RGB", (image.file.width // reduction, image.file.height // reduction))
        return stored_rgb(image.file), reduction
    except Exception as error:              # for damaged files Pillow raises many kinds
        raise image.failed(error) from error


def _whole(content: memoryview) -> Tensor | None:
    """Decode a whole JPEG with torchvision -> uint8 (3, height, width); None if Pillow should do it, which can read some damaged
    files and reports the others."""
    if content[-2:] != JPEG_END:            # probably truncated: libjpeg would print a warning to stderr, Pillow does not
        return None
    try:
        from torchvision.io import ImageReadMode, decode_jpeg  # deferred: listing images does not need to load torchvision

        return decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), ImageReadMode.RGB)
    except (ImportError, RuntimeError):     # since 0.29 torchvision announces that its decoders will be removed
        return None
