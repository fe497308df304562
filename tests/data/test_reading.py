"""Conversion of image files to RGB: 16 bits, transparent parts, orientation."""

import io
import itertools

import numpy as np
import pytest
import torch
from deep_images import png16, tiff16
from PIL import Image, ImageOps

from utils.data import reading as reading_module
from utils.data.decode import opened_image
from utils.data.reading import AS_STORED, ORIENTATION, Reading, orientation, stored_box, to_rgb, turned_size, upright

RANDOM = np.random.default_rng(0)


def read(content: bytes, reading: Reading = AS_STORED) -> np.ndarray:
    return np.asarray(to_rgb(opened_image(io.BytesIO(content)), reading))


def stored(image: Image.Image, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


# -------------------------------------------------------------------------------------------------------- 16 bits

WRITERS = {"png": png16, "tiff": tiff16, "big-endian tiff": lambda values: tiff16(values, ">")}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_16_bit_images_show_the_bits_they_use(writer, channels, bits, monkeypatch):
    monkeypatch.setattr(reading_module, "STRIP_PIXELS", 20)          # several strips
    values = RANDOM.integers(0, 1 << bits, (9, 7, channels), dtype=np.uint16)
    if channels == 4:
        values[..., 3] = 65535
    expected = np.broadcast_to((values >> bits - 8)[..., :3], (9, 7, 3))
    content = WRITERS[writer](values)
    assert (read(content, Reading(intensity_range=(0, (1 << bits) - 1))) == expected).all()
    assert (read(content) == (values >> 8)[..., :3]).all(), "as in runs without the flag"


def test_compressed_tiff_and_pgm_with_16_bits():
    values = RANDOM.integers(0, 1024, (9, 7), dtype=np.uint16)
    expected = np.repeat((values >> 2)[..., None], 3, axis=2)
    for form, options in (("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {}), ("PNG", {})):
        assert (read(stored(Image.fromarray(values), form, **options), Reading(intensity_range=(0, 1023))) == expected).all()
    pgm = b"P5 7 9 65535\n" + values.astype(">u2").tobytes()
    assert (read(pgm, Reading(intensity_range=(0, 1023))) == expected).all()


def test_8_bit_image_in_memory_is_not_changed_by_a_16_bit_range():
    assert to_rgb(Image.new("RGB", (2, 1), (7, 8, 9)), Reading(intensity_range=(0, 4095))).getpixel((0, 0)) == (7, 8, 9)


def test_values_beyond_the_range_are_clipped():
    values = np.array([[0, 99, 100, 227, 355, 356, 65535]], np.uint16)[..., None]
    assert read(png16(values), Reading(intensity_range=(100, 355)))[0, :, 0].tolist() == [0, 0, 0, 127, 255, 255, 255]


@pytest.mark.parametrize("order", "<>")
def test_signed_tiff_needs_a_range_for_negative_values(order):
    values = np.array([[-1024, -1, 0, 1023, 3071]], np.int16)[..., None]
    assert read(tiff16(values, order), Reading(intensity_range=(-1024, 3071)))[0, :, 0].tolist() == [0, 63, 64, 127, 255]
    for reading in (AS_STORED, Reading(intensity_range=(0, 4095))):
        with pytest.raises(ValueError, match=r"16-bit values below 0, down to -1,024: set which .* --intensity_range=-1024,3071"):
            read(tiff16(values, order), reading)
    assert read(tiff16(values.clip(0), order))[0, :, 0].tolist() == [0, 0, 0, 3, 11], "without negative values as any other image"


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_an_error(mode):
    with pytest.raises(ValueError, match="32 bits per pixel without a known range: save it with 8 or 16 bits"):
        read(stored(Image.new(mode, (4, 4)), "TIFF"), Reading(intensity_range=(0, 1023)))


# ------------------------------------------------------------------------------------------------ transparent parts


@pytest.mark.parametrize("form", ["RGBA", "LA", "P"])
def test_alpha_rules(form):
    """The image has two columns of gray 200, the second of which is transparent."""
    image = Image.new("RGBA", (2, 4), (200, 200, 200, 255))
    image.paste((200, 200, 200, 0), (1, 0, 2, 4))
    if form == "P":
        palette = Image.new("P", (2, 4), 0)
        palette.putpalette([200, 200, 200] * 2)
        palette.paste(1, (1, 0, 2, 4))
        content = stored(palette, transparency=1)
    else:
        content = stored(image.convert(form))
    shown = {alpha: read(content, Reading(alpha=alpha))[0, :, 0].tolist() for alpha in ("white", "black", "mask", "ignore")}
    assert shown == {"white": [200, 255], "black": [200, 0], "mask": [255, 0], "ignore": [200, 200]}


def test_alpha_rules_with_16_bits():
    values = np.full((2, 2, 4), 512, np.uint16)
    values[0, :, 3], values[1, :, 3] = 65535, 0
    shown = {alpha: read(png16(values), Reading("off", (0, 1023), alpha))[:, 0, 0].tolist()
             for alpha in ("white", "black", "mask", "ignore")}
    assert shown == {"white": [128, 255], "black": [128, 0], "mask": [255, 0], "ignore": [128, 128]}


# ------------------------------------------------------------------------------------------------------ orientation

PIXELS = Image.fromarray(RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8))


def with_orientation(value: object, form: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return stored(PIXELS, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_is_followed(form, turn):
    content = with_orientation(turn, form)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(read(content, Reading("follow")), expected)
    off = read(content)
    assert np.array_equal(off, expected if form == "TIFF" else read(stored(PIXELS, form, **(
        {"lossless": True} if form == "WEBP" else {})))), "Pillow always follows a TIFF's own orientation"


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_invalid_orientation_is_ignored(value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    assert orientation(opened_image(io.BytesIO(stored(PIXELS, "JPEG", exif=exif.tobytes())))) == 1


def test_damaged_exif_is_ignored():
    content = stored(PIXELS, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert orientation(opened_image(io.BytesIO(content))) == 1


@pytest.mark.parametrize("turn", range(1, 9))
def test_boxes_and_tensors_turn_as_images_do(turn):
    whole = np.asarray(upright(PIXELS, turn))
    tensor = torch.from_numpy(np.array(PIXELS)).permute(2, 0, 1)
    assert np.array_equal(upright(tensor, turn).permute(1, 2, 0), whole) and turned_size((5, 7), turn) == whole.shape[:2]
    for top, left, height, width in itertools.product((0, 2), (0, 1), (1, 3), (2, 3)):
        y, x, h, w = stored_box((top, left, height, width), whole.shape[:2], turn)
        part = upright(tensor[:, y:y + h, x:x + w], turn)
        assert np.array_equal(part.permute(1, 2, 0), whole[top:top + height, left:left + width])


def test_reading_of_a_runs_settings():
    settings = {"exif": "follow", "intensity_range": [0, 1023], "alpha": "auto", "seed": 1}          # a list, as JSON has it
    assert Reading.of(settings) == Reading("follow", (0, 1023), "auto") and Reading.of(settings).unknown == {"alpha"}
