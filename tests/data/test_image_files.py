"""Images in files: decoding."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.data.image_files import FileImages
from utils.data.splits import ImageError


def read(path: Path) -> Image.Image:
    image, label = FileImages([(str(path), 3)])[0]
    assert image.mode == "RGB" and label == 3
    return image


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF"])
def test_formats_are_read_and_truncated_files_are_errors(tmp_path, form):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    picture.save(tmp_path / "whole", form)
    with Image.open(tmp_path / "whole") as expected:
        assert np.array_equal(read(tmp_path / "whole"), expected.convert("RGB"))
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(content[:len(content) // 2])
    with pytest.raises(ImageError, match=f"{tmp_path / 'cut'}: cannot be read as an image"):
        read(tmp_path / "cut")


def test_sixteen_bit_images_keep_their_range(tmp_path):
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    Image.fromarray(ramp).save(tmp_path / "ramp.tif")
    (tmp_path / "ramp.pgm").write_bytes(b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes())
    for name in ("ramp.png", "ramp.tif", "ramp.pgm"):
        assert np.asarray(read(tmp_path / name))[..., 0].ravel().tolist() == list(range(256)), name


def quadrants(mode="RGB") -> Image.Image:
    """Return an image with another color in each corner, so that any turn is visible; wider than high"""
    pixels = np.full((16, 32, 3), 255, dtype=np.uint8)
    pixels[:8, :16], pixels[:8, 16:], pixels[8:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return Image.fromarray(pixels).convert(mode)


def test_exif_orientation_is_not_followed_by_default(tmp_path):
    """The same as in torchvision and timm, with which published checkpoints were trained."""
    exif = Image.Exif()
    exif[0x0112] = 6
    quadrants().save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(read(tmp_path / "photo.png"), quadrants())


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_modes_become_rgb(tmp_path, mode):
    name = tmp_path / ("photo.jpg" if mode in ("CMYK", "YCbCr") else "photo.png")
    quadrants(mode).save(name)
    with Image.open(name) as stored:
        assert np.array_equal(read(name), stored.convert("RGB"))
    if mode not in ("1", "L"):
        assert np.abs(np.asarray(read(name)).astype(int) - np.asarray(quadrants())).mean() < 12


@pytest.mark.parametrize("form", ["RGBA", "LA", "P", "RGB", "GIF"])
def test_transparent_parts_become_white(tmp_path, form):
    """The transparent half is black, which convert("RGB") would show."""
    gray, alpha = np.full((4, 4), 60, dtype=np.uint8), np.full((4, 4), 255, dtype=np.uint8)
    gray[:, 2:], alpha[:, 2:] = 0, 0
    file = tmp_path / f"part.{'gif' if form == 'GIF' else 'png'}"
    if form in ("RGBA", "LA"):
        Image.merge("LA", (Image.fromarray(gray), Image.fromarray(alpha))).convert(form).save(file)
    elif form == "RGB":
        Image.fromarray(gray).convert("RGB").save(file, transparency=(0, 0, 0))
    else:
        image = Image.fromarray((gray > 0).astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 60, 60, 60])
        image.save(file, transparency=0)
    assert np.asarray(read(file))[..., 1].tolist() == [[60, 60, 255, 255]] * 4
    if form == "RGBA":
        Image.new("RGBA", (2, 2), (100, 0, 200, 51)).save(file)
        assert read(file).getpixel((0, 0)) == tuple(round(255 - 0.2 * (255 - value)) for value in (100, 0, 200))
