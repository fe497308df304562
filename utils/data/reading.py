"""How an image file becomes RGB where its format leaves a choice: one rule for all images of a data set.

survey.py finds the rule from a sample when a data set is opened. Checkpoints keep it, so that whoever reads an image for a model
shows it what it was trained on.
"""

import dataclasses
import sys
from collections.abc import Mapping

import numpy as np
from PIL import Image
from torch import Tensor

AUTO = "auto"
FULL_RANGE = (0, 65535)
STRIP_PIXELS = 1 << 22            # converted at a time
ORIENTATION = 0x0112              # the tag of EXIF
UPRIGHT = 1
# EXIF's orientations that make a difference: are rows and columns exchanged, then rows reversed, then columns reversed?
TURNS = {2: (False, False, True), 3: (False, True, True), 4: (False, True, False), 5: (True, False, False),
         6: (True, False, True), 7: (True, True, True), 8: (True, True, False)}
METHODS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}
_EXIF_KEYS = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}


@dataclasses.dataclass(frozen=True)
class Reading:
    """The flags of the same names; each may be "auto": to be found. The defaults are how runs without these flags read.

    exif: "follow": images are turned upright as their EXIF orientation says; "off": they stay as they are stored. (A TIFF has
    an orientation of its own, which Pillow always follows.)
    intensity_range: the values of 16-bit images that become black and white; what is beyond them is clipped.
    alpha: transparent parts are put on "white" or "black"; "mask": the alpha channel itself is the picture, as a gray image;
    "ignore": the colors alone.
    """

    exif: str = "off"
    intensity_range: tuple[int, int] | str = FULL_RANGE
    alpha: str = "white"

    @classmethod
    def of(cls, settings: Mapping) -> "Reading":
        """From the settings of a run by name, which may come from JSON."""
        found = {field.name: settings[field.name] for field in dataclasses.fields(cls)}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})

    @property
    def unknown(self) -> set[str]:
        """The fields that are still to be found."""
        return {name for name, value in vars(self).items() if value == AUTO}

    def replace(self, **values: object) -> "Reading":
        return dataclasses.replace(self, **values)


def to_text(value: str | tuple[int, int]) -> str:
    """A field as its flag is typed."""
    return value if isinstance(value, str) else ",".join(map(str, value))


AS_STORED = Reading()
FIND = Reading(AUTO, AUTO, AUTO)


def to_rgb(image: Image.Image, reading: Reading = AS_STORED) -> Image.Image:
    """RGB, 8 bits. Raises ValueError for pixels of no known range (32-bit integers, floats, values below 0), which Pillow would
    clip to white or black."""
    turn = orientation(image) if reading.exif == "follow" else UPRIGHT
    return upright(stored_rgb(image, reading), turn)


def stored_rgb(image: Image.Image, reading: Reading = AS_STORED) -> Image.Image:
    """As to_rgb, but turned as it is stored."""
    gray = is_gray16(image)
    if image.mode in ("I", "F") and not gray:
        raise ValueError("32 bits a pixel, of no known range: save it with 8 or 16 bits")
    transparent = image.has_transparency_data and not gray
    low = _low_bytes(image) if reading.intensity_range != FULL_RANGE and is_color16(image) else None
    if not (gray or transparent or low):
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")       # which would copy
    rgb = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):        # in strips: the steps between take several times the memory
        box = (0, top, image.width, min(top + rows, image.height))
        strip = image.crop(box)
        alpha = strip.convert("RGBA").getchannel("A") if transparent and low else None
        if gray:                                    # Pillow would clip 16 bits to 8
            strip = Image.fromarray(to_bytes(np.asarray(strip), reading.intensity_range))
        elif low:
            values = (np.asarray(strip)[..., :3].astype(np.int32) << 8) + np.asarray(low.crop(box))[..., :3]
            strip = Image.fromarray(to_bytes(values, reading.intensity_range))
        if alpha:
            strip.putalpha(alpha)
        strip = flatten(strip, reading.alpha) if transparent else strip
        rgb.paste(strip.convert("RGB"), (0, top))
    return rgb


def flatten(image: Image.Image, alpha: str) -> Image.Image:
    """Of an image with transparent parts: without them, as Reading.alpha says; RGB, RGBA that is opaque, or gray."""
    image = image.convert("RGBA")
    if alpha == "mask":
        return image.getchannel("A")
    return image.convert("RGB") if alpha == "ignore" else Image.alpha_composite(Image.new("RGBA", image.size, alpha), image)


# -------------------------------------------------------------------------------------------------------- 16 bits


def is_gray16(image: Image.Image) -> bool:
    """One channel of 16 bits. (Of 32 are mode I's other images; a PPM's or a PNG's are 16, and so is signed TIFF.)"""
    signed = image.format == "TIFF" and image.mode == "I" and image.tag_v2.get(258) == (16,)
    return image.mode.startswith("I;16") or (image.mode == "I" and (image.format in ("PPM", "PNG") or signed))


def is_color16(image: Image.Image) -> bool:
    """Three or four channels of 16 bits, of which Pillow keeps the upper 8. Asks before the image is loaded."""
    tiles = getattr(image, "tile", ())             # what is no file has none
    return image.mode in ("RGB", "RGBA") and any(_raw_mode(tile).startswith(("RGB;16", "RGBA;16")) for tile in tiles)


def values16(image: Image.Image) -> np.ndarray:
    """The values of an image for which is_gray16 or is_color16 holds -> integers (height, width[, channels])"""
    if is_gray16(image):
        return np.asarray(image)
    low = _low_bytes(image)
    return (np.asarray(image)[..., :3].astype(np.int32) << 8) + np.asarray(low)[..., :3]


def to_bytes(values: np.ndarray, intensity_range: tuple[int, int]) -> np.ndarray:
    """16-bit values -> uint8 of the same shape. Raises ValueError for values below 0 where the range begins at 0 or above."""
    if values.dtype.kind == "i" and intensity_range[0] >= 0 and values.min() < 0:
        raise ValueError(f"16-bit values below 0, down to {values.min():,}: say which values become black and white, such as "
                         "--intensity_range=-1024,3071")
    if intensity_range == FULL_RANGE:
        return (values >> 8).astype(np.uint8)
    low, high = intensity_range
    return ((values.astype(np.int32).clip(low, high) - low) * 256 // (high + 1 - low)).astype(np.uint8)


def _raw_mode(tile: tuple) -> str:
    return tile.args if isinstance(tile.args, str) else str((tile.args or ("",))[0])


def _low_bytes(image: Image.Image) -> Image.Image:
    """The lower 8 bits of a color image of 16, as an image; `image` is loaded first. Pillow's readers of one byte order take the
    upper bytes of theirs, which are the lower bytes of the other."""
    stream = image.fp
    image.load()
    stream.seek(0)
    low = Image.open(stream, formats=(image.format,))
    other = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
    for number, tile in enumerate(low.tile):
        raw = _raw_mode(tile)
        raw = raw[:-1] + other[raw[-1]]
        low.tile[number] = tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))
    low.load()
    return low


# ---------------------------------------------------------------------------------------------------- orientation


def orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8, of an image whose header is read; 1 where there is none that makes sense, and where Pillow has followed
    it. Decodes nothing: what a PNG has behind its pixels is not found."""
    if image.format == "TIFF" or not _EXIF_KEYS & image.info.keys():
        return UPRIGHT
    try:
        found = Image.Image.getexif(image).get(ORIENTATION)         # a PNG's own method would load the image
        return int(found) if found in TURNS else UPRIGHT
    except Exception:                   # of damaged EXIF Pillow lets out many kinds
        return UPRIGHT


def tiff_orientation(image: Image.Image) -> int:
    """That of a TIFF whose header is read, as `orientation`; 1 for other formats."""
    found = image.tag_v2.get(ORIENTATION) if image.format == "TIFF" else UPRIGHT
    return found if found in TURNS else UPRIGHT


def upright(image: Image.Image | Tensor, turn: int) -> Image.Image | Tensor:
    """PIL or a tensor (..., height, width) as it is stored -> as its orientation `turn` demands"""
    if turn == UPRIGHT:
        return image
    if isinstance(image, Image.Image):
        return image.transpose(METHODS[turn])
    exchanged, rows, columns = TURNS[turn]
    image = image.transpose(-2, -1) if exchanged else image
    return image.flip([-2] * rows + [-1] * columns)


def turned_size(size: tuple[int, int], turn: int) -> tuple[int, int]:
    """Two sides as stored -> upright, and back."""
    return size[::-1] if turn != UPRIGHT and TURNS[turn][0] else size


def stored_box(box: tuple[int, int, int, int], size: tuple[int, int], turn: int) -> tuple[int, int, int, int]:
    """A box (top, left, height, width) of an upright image of `size` (height, width) -> the same box as it is stored"""
    if turn == UPRIGHT:
        return box
    (top, left, height, width), (exchanged, rows, columns) = box, TURNS[turn]
    top = size[0] - top - height if rows else top
    left = size[1] - left - width if columns else left
    return (left, top, width, height) if exchanged else (top, left, height, width)
