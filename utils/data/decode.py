"""From an opened image file to pixels: any file in full, a JPEG at no more than what a crop of it needs.

libjpeg makes an image of 1/2, 1/4 or 1/8 of the size straight from the lower frequencies of each block of 8 x 8 pixels:
close to the mean over the pixels that fall together, for a fraction of the work. What is decoded in full comes from
torchvision's decoder, whose pixels are Pillow's bit for bit, without Pillow's copies.
"""

import io
import os
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# What a data set holds; Pillow reads stranger things. Some of the Oxford pets are GIFs called .jpg.
IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
MAX_PIXELS = 64_000_000
STRIP_PIXELS = 1 << 22            # converted at a time
MAX_HELD_BYTES = 1 << 26          # of a JPEG in memory; a larger file is decoded as it is read
JPEG_BEGIN, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
REDUCTIONS = (8, 4, 2)            # of libjpeg


def opened_image(stream: BinaryIO) -> Image.Image:
    """Its header is read, not its pixels. Raises ValueError for more than MAX_PIXELS, and what Pillow raises."""
    image = Image.open(stream, formats=IMAGE_FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width:,} x {height:,} px, more than {MAX_PIXELS:,}: make it smaller")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits; what is transparent becomes white. As it is stored: an EXIF orientation is not followed, because the
    readers that published checkpoints were trained with (torchvision, timm) do not.

    Raises ValueError for pixels of no known range (32-bit integers, floats), which Pillow would clip to white or black.
    """
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if image.mode in ("I", "F") and not sixteen_bits:
        raise ValueError("32 bits a pixel, of no known range: save it with 8 or 16 bits")
    if not sixteen_bits and not image.has_transparency_data:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")       # which would copy
    rgb = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):        # in strips: the steps between take several times the memory
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if sixteen_bits:                            # Pillow would clip 16 bits to 8
            strip = Image.fromarray((np.asarray(strip) >> 8).astype(np.uint8))
        else:
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip.convert("RGBA"))
        rgb.paste(strip.convert("RGB"), (0, top))
    return rgb


def undecoded(stream: BinaryIO, failed: Callable[[Exception], Exception]) -> Image.Image:
    """A JPEG of colours or greys as `decoded` wants it: its header read, its bytes in memory, so that the file can be closed;
    as its attribute `failed`, what makes an error to raise of one that decoding raises. Any other image in RGB."""
    if stream.peek(3)[:3] == JPEG_BEGIN and os.fstat(stream.fileno()).st_size <= MAX_HELD_BYTES:
        stream = io.BytesIO(stream.read())
    image = opened_image(stream)
    # MPO is what Pillow calls a JPEG with further images behind it, as many telephones write.
    if not isinstance(stream, io.BytesIO) or image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return to_rgb(image)
    image.failed = failed
    return image


def is_undecoded(image: object) -> bool:
    return hasattr(image, "failed")


def decoded(image: Image.Image, crop: tuple[int, int], size: tuple[int, int], margin: float) -> tuple[Image.Image | Tensor, int]:
    """An undecoded image, of which a crop (height, width) shall be resized to `size` (height, width) -> RGB, uint8 (3, height,
    width) or PIL, and by how much its sides are divided: the most that leaves the crop `margin` times the size in both.

    Of margin 1 (never fewer pixels than asked for) what is resized then differs from what the whole decoded image gives by
    1.5 grey levels in the mean over photographs full of detail, by 2.6 over the worst crop; of margin 2 by 0.5 and 0.6.
    Single pixels at sharp edges differ by up to 45. The mean over a crop stays within 0.2.
    """
    reduction = next((number for number in REDUCTIONS
                      if all(old >= number * margin * new for old, new in zip(crop, size))), 1)
    try:
        if reduction == 1 and (pixels := _whole(image.fp.getbuffer())) is not None:
            return pixels, 1
        image.draft("RGB", (image.width // reduction, image.height // reduction))
        return to_rgb(image), reduction
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
