"""How an image file becomes RGB where its format leaves a choice: one rule for all images of a data set.

survey.py finds the rule from a sample when a data set is opened. Checkpoints store it, so that a model always gets images that
were read as in training.
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
ORIENTATION = 0x0112              # the EXIF tag
UPRIGHT = 1
# EXIF orientations other than UPRIGHT: whether rows and columns are exchanged, then rows reversed, then columns reversed.
TURNS = {2: (False, False, True), 3: (False, True, True), 4: (False, True, False), 5: (True, False, False),
         6: (True, False, True), 7: (True, True, True), 8: (True, True, False)}
METHODS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}
_EXIF_KEYS = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}


@dataclasses.dataclass(frozen=True)
class Reading:
    """The flags of the same names. Each may be "auto", to be found from the images. The defaults are those of runs that have
    none of these flags.

    exif: "follow": images are turned upright by their EXIF orientation; "off": they stay as stored. (A TIFF has its own
    orientation, which Pillow always follows.)
    intensity_range: the values of 16-bit images that become black and white; values beyond them are clipped.
    alpha: transparent parts are put on "white" or "black"; "mask": the alpha channel itself is used as a gray image; "ignore":
    only the colors are used.
    """

    exif: str = "off"
    intensity_range: tuple[int, int] | str = FULL_RANGE
    alpha: str = "white"

    @classmethod
    def of(cls, settings: Mapping) -> "Reading":
        """Return the Reading of a run's settings, by name; they may come from JSON."""
        found = {field.name: settings[field.name] for field in dataclasses.fields(cls)}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})

    @property
    def unknown(self) -> set[str]:
        """The names of the fields that are "auto"."""
        return {name for name, value in vars(self).items() if value == AUTO}

    def replace(self, **values: object) -> "Reading":
        return dataclasses.replace(self, **values)


def to_text(value: str | tuple[int, int]) -> str:
    """Return a field in the form in which its flag is typed."""
    return value if isinstance(value, str) else ",".join(map(str, value))


AS_STORED = Reading()
FIND = Reading(AUTO, AUTO, AUTO)


def to_rgb(image: Image.Image, reading: Reading = AS_STORED) -> Image.Image:
    """Convert to RGB, 8 bits. Raises ValueError for pixels without a known range (32-bit integers, floats, values below 0), which
    Pillow would clip to white or black."""
    turn = orientation(image) if reading.exif == "follow" else UPRIGHT
    return upright(stored_rgb(image, reading), turn)


def stored_rgb(image: Image.Image, reading: Reading = AS_STORED) -> Image.Image:
    """Convert as to_rgb does, but keep the stored orientation."""
    gray = is_gray16(image)
    if image.mode in ("I", "F") and not gray:
        raise ValueError("32 bits per pixel without a known range: save it with 8 or 16 bits")
    transparent = image.has_transparency_data and not gray
    low = _low_bytes(image) if reading.intensity_range != FULL_RANGE and is_color16(image) else None
    if not (gray or transparent or low):
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")       # convert would copy an RGB image
    rgb = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):        # in strips, because the conversion needs several times the memory
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
    """Remove the transparent parts of an image as Reading.alpha says -> RGB, opaque RGBA, or gray"""
    image = image.convert("RGBA")
    if alpha == "mask":
        return image.getchannel("A")
    return image.convert("RGB") if alpha == "ignore" else Image.alpha_composite(Image.new("RGBA", image.size, alpha), image)


# -------------------------------------------------------------------------------------------------------- 16 bits


def is_gray16(image: Image.Image) -> bool:
    """Whether the image has one channel of 16 bits. (Mode I has 32 bits, except from PPM, PNG and signed TIFF, with 16.)"""
    signed = image.format == "TIFF" and image.mode == "I" and image.tag_v2.get(258) == (16,)
    return image.mode.startswith("I;16") or (image.mode == "I" and (image.format in ("PPM", "PNG") or signed))


def is_color16(image: Image.Image) -> bool:
    """Whether the image has three or four channels of 16 bits, of which Pillow keeps the upper 8. Call it before the image is
    loaded."""
    tiles = getattr(image, "tile", ())             # an image that is not from a file has none
    return image.mode in ("RGB", "RGBA") and any(_raw_mode(tile).startswith(("RGB;16", "RGBA;16")) for tile in tiles)


def values16(image: Image.Image) -> np.ndarray:
    """Return the values of an image of is_gray16 or is_color16 -> integers (height, width[, channels])"""
    if is_gray16(image):
        return np.asarray(image)
    low = _low_bytes(image)
    return (np.asarray(image)[..., :3].astype(np.int32) << 8) + np.asarray(low)[..., :3]


def to_bytes(values: np.ndarray, intensity_range: tuple[int, int]) -> np.ndarray:
    """Convert 16-bit values to uint8 of the same shape. Raises ValueError for values below 0 if the range has none."""
    if values.dtype.kind == "i" and intensity_range[0] >= 0 and values.min() < 0:
        raise ValueError(f"16-bit values below 0, down to {values.min():,}: set which values become black and white, for example "
                         "--intensity_range=-1024,3071")
    if intensity_range == FULL_RANGE:
        return (values >> 8).astype(np.uint8)
    low, high = intensity_range
    return ((values.astype(np.int32).clip(low, high) - low) * 256 // (high + 1 - low)).astype(np.uint8)


def _raw_mode(tile: tuple) -> str:
    return tile.args if isinstance(tile.args, str) else str((tile.args or ("",))[0])


def _low_bytes(image: Image.Image) -> Image.Image:
    """Return the lower 8 bits of a 16-bit color image, as an image; `image` is loaded first. Pillow only reads the upper bytes;
    with the other byte order, these are the lower ones."""
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
    """Return the EXIF orientation, 1 to 8, of an image whose header is read; 1 if there is no valid one, or Pillow has applied it
    already. Decodes nothing, so it does not find EXIF data after the pixels of a PNG."""
    if image.format == "TIFF" or not _EXIF_KEYS & image.info.keys():
        return UPRIGHT
    try:
        found = Image.Image.getexif(image).get(ORIENTATION)         # a PNG's own method would load the image
        return int(found) if found in TURNS else UPRIGHT
    except Exception:                   # for damaged EXIF Pillow raises many kinds
        return UPRIGHT


def tiff_orientation(image: Image.Image) -> int:
    """Return the orientation, 1 to 8, of a TIFF whose header is read; 1 for other formats."""
    found = image.tag_v2.get(ORIENTATION) if image.format == "TIFF" else UPRIGHT
    return found if found in TURNS else UPRIGHT


def upright(image: Image.Image | Tensor, turn: int) -> Image.Image | Tensor:
    """Turn a stored image, PIL or a tensor (..., height, width), upright by its orientation `turn`."""
    if turn == UPRIGHT:
        return image
    if isinstance(image, Image.Image):
        return image.transpose(METHODS[turn])
    exchanged, rows, columns = TURNS[turn]
    image = image.transpose(-2, -1) if exchanged else image
    return image.flip([-2] * rows + [-1] * columns)


def turned_size(size: tuple[int, int], turn: int) -> tuple[int, int]:
    """Convert the two sides of a stored image to those of the upright one, or back."""
    return size[::-1] if turn != UPRIGHT and TURNS[turn][0] else size


def stored_box(box: tuple[int, int, int, int], size: tuple[int, int], turn: int) -> tuple[int, int, int, int]:
    """Convert a box (top, left, height, width) of an upright image of `size` (height, width) to a box of the stored image."""
    if turn == UPRIGHT:
        return box
    (top, left, height, width), (exchanged, rows, columns) = box, TURNS[turn]
    top = size[0] - top - height if rows else top
    left = size[1] - left - width if columns else left
    return (left, top, width, height) if exchanged else (top, left, height, width)
