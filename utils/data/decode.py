"""From an opened image file to pixels: any file in full, a JPEG at no more than what a crop of it needs.

libjpeg makes an image of 1/2, 1/4 or 1/8 of the size straight from the lower frequencies of each block of 8 x 8 pixels:
close to the mean over the pixels that fall together, for a fraction of the work. What is decoded in full comes from
torchvision's decoder, whose pixels are Pillow's bit for bit, without Pillow's copies.
"""

import functools
import io
import os
from collections.abc import Callable
from typing import BinaryIO

import torch
from PIL import Image
from torch import Tensor

from .reading import AS_STORED, UPRIGHT, Reading, orientation, stored_rgb, to_rgb, turned_size

# What a data set holds; Pillow reads stranger things. Some of the Oxford pets are GIFs called .jpg.
IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
MAX_PIXELS = 64_000_000
MAX_HELD_BYTES = 1 << 26          # of a JPEG in memory; a larger file is decoded as it is read
JPEG_BEGIN, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
REDUCTIONS = (8, 4, 2)            # of libjpeg
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
INSTALL_HEIF = "pip install pillow-heif"


def opened_image(stream: BinaryIO) -> Image.Image:
    """Its header is read, not its pixels. Raises ValueError for more than MAX_PIXELS, and what Pillow raises."""
    start, formats = stream.read(12), IMAGE_FORMATS
    stream.seek(0)
    if start[4:8] == b"ftyp" and start[8:] in HEIF_BRANDS:          # whatever its ending
        if not can_read_heif():
            raise ValueError(f"a HEIC image, which takes {INSTALL_HEIF}")
        formats = ("HEIF",)
    image = Image.open(stream, formats=formats)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width:,} x {height:,} px, more than {MAX_PIXELS:,}: make it smaller")
    return image


@functools.cache
def can_read_heif() -> bool:
    """Whether pillow-heif is installed, which Pillow then reads HEIC with. It turns images upright itself."""
    try:
        from pillow_heif import register_heif_opener  # deferred: optional, and few data sets need it
    except ImportError:
        return False
    register_heif_opener()
    return True


class Undecoded(Image.Image):
    """A JPEG of colours or greys as `decoded` wants it: its header read, its bytes in memory, so that the file can be closed.

    Its size is that of the upright image, which its pixels become by reading.upright(pixels, turn). failed: what makes an error
    to raise of one that decoding raises.
    """

    def __init__(self, file: Image.Image, turn: int, failed: Callable[[Exception], Exception]):
        super().__init__()
        self.file, self.turn, self.failed = file, turn, failed

    @property
    def size(self) -> tuple[int, int]:
        return turned_size(self.file.size, self.turn)


def undecoded(stream: BinaryIO, failed: Callable[[Exception], Exception], reading: Reading = AS_STORED) -> Image.Image:
    """An Undecoded, or any other image in RGB."""
    if stream.peek(3)[:3] == JPEG_BEGIN and os.fstat(stream.fileno()).st_size <= MAX_HELD_BYTES:
        stream = io.BytesIO(stream.read())
    image = opened_image(stream)
    # MPO is what Pillow calls a JPEG with further images behind it, as many telephones write.
    if not isinstance(stream, io.BytesIO) or image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return to_rgb(image, reading)
    return Undecoded(image, orientation(image) if reading.exif == "follow" else UPRIGHT, failed)


def decoded(image: Undecoded, crop: tuple[int, int], size: tuple[int, int], margin: float) -> tuple[Image.Image | Tensor, int]:
    """An image, of which a crop (height, width) shall be resized to `size` (height, width), both as it is stored -> RGB, uint8
    (3, height, width) or PIL, as it is stored, and by how much its sides are divided: the most that leaves the crop `margin`
    times the size in both.

    Of margin 1 (never fewer pixels than asked for) what is resized then differs from what the whole decoded image gives by
    1.5 grey levels in the mean over photographs full of detail, by 2.6 over the worst crop; of margin 2 by 0.5 and 0.6.
    Single pixels at sharp edges differ by up to 45. The mean over a crop stays within 0.2.
    """
    reduction = next((number for number in REDUCTIONS
                      if all(old >= number * margin * new for old, new in zip(crop, size))), 1)
    try:
        if reduction == 1 and (pixels := _whole(image.file.fp.getbuffer())) is not None:
            return pixels, 1
        image.file.draft("RGB", (image.file.width // reduction, image.file.height // reduction))
        return stored_rgb(image.file), reduction
    except Exception as error:              # of a damaged file Pillow lets out many kinds
        raise image.failed(error) from error


def _whole(content: memoryview) -> Tensor | None:
    """None: let Pillow have it, which has the last word on damaged files, and knows of some how to read them."""
    if content[-2:] != JPEG_END:            # cut short, most likely: libjpeg would write of it to stderr, Pillow keeps quiet
        return None
    try:
        from torchvision.io import ImageReadMode, decode_jpeg  # deferred: who only names images need not wait for torchvision

        return decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), ImageReadMode.RGB)
    except (ImportError, RuntimeError):     # torchvision announces since 0.29 that its decoders will go
        return None
