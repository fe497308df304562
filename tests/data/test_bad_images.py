"""Image files that are damaged or hostile: each is reported in one line, with bounded time and memory, and replaced without
changing the other images."""

import errno
import importlib
import io
import os
import resource
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from miniatures import png
from mutations import mutated
from PIL import Image, PngImagePlugin
from torchvision.transforms import v2

from utils.data import image_files
from utils.data import loader as data
from utils.data.image_files import MAX_IMAGE_BYTES, MAX_PIXELS, FileImages
from utils.data.sampler import SampleIndex, StepSampler
from utils.data.splits import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF")
PATIENCE_S, MEMORY = 3.0, 600 << 20


def stored(form: str, size=(32, 16), mode="RGB", **options) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(stream, form, **options)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, content: bytes = b"", *more: bytes) -> bytes:
    """Return an 8-bit gray PNG whose header claims these sides, whatever its content"""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    packed = zlib.compress(bytes(80 << 20), 9)
    return png_of(4, 4, bytes(20), chunk(b"zTXt", b"note\0\0" + packed))


def tiff_of(width: int, height: int, offset: int = 8) -> bytes:
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
               (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 0xFFFFFFFF)]
    return b"II*\0" + struct.pack("<I", offset) + struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", *entry) for entry in entries) + bytes(4)


def file(content: bytes):
    return lambda path: path.write_bytes(content)


def hole(path: Path) -> None:
    with open(path, "wb") as stream:
        stream.write(png(cut=40))
        stream.truncate(1 << 40)


# name: how the file is made; all must be refused
HOSTILE = {
    "empty.jpg": file(b""),
    "page.jpg": file(b"<html><body>404 not found</body></html>"),
    "cut_short.jpg": file(stored("JPEG")[:-30]),
    "cut_short.png": file(stored("PNG")[:-60]),
    "header.png": file(png(cut=20)),
    "wrong_checksum.png": file(stored("PNG")[:29] + b"\0\0\0\0" + stored("PNG")[33:]),
    "script.jpg": file(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"),
    "icon.png": file(stored("ICO", (16, 16))),
    "header.jpg": file(stored("JPEG")[:40]),
    "document.jpg": file(stored("PDF")),
    "archive.png": file(b"PK\x03\x04" + bytes(200)),
    "zeros.png": file(bytes(5000)),
    "vector.png": file(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
    "noise.bmp": file(np.random.default_rng(3).bytes(5000)),
    "pipe.png": lambda path: os.mkfifo(path),
    "folder.png": lambda path: path.mkdir(),
    "link_to_itself.png": lambda path: path.symlink_to(path),
    "link_to_nothing.png": lambda path: path.symlink_to("nowhere.png"),
    "device.png": lambda path: path.symlink_to("/dev/zero"),
    "gone.png": lambda path: None,
    "hole_of_a_terabyte.png": hole,
    "large_header.png": file(png_of(60_000, 60_000)),
    "warned_of.png": file(png_of(10_000, 10_000, bytes(100))),
    "no_pixels.png": file(png_of(0, 10)),
    "text_bomb.png": file(text_bomb()),
    "large.tif": file(tiff_of(0x7FFFFFFF, 0x7FFFFFFF)),
    "strip_of_4_gb.tif": file(tiff_of(7_000, 7_000)),
    "circle.tif": file(b"II*\0\x08\0\0\0\0\0\x08\0\0\0"),
    "float.tif": file(stored("TIFF", mode="F")),
    "integers.tif": file(stored("TIFF", mode="I")),
    "negative.ppm": file(b"P6 -5 5 255\n" + bytes(75)),
    "long_number.pgm": file(b"P5 " + b"9" * 5000 + b" 1 255\n"),
    "line\nbreak\x1b[31m.png": file(b"?"),
    "bytes_\udcff.png": file(b"?"),
}
# Readable images: frames, damaged EXIF, profiles and texts do not matter.
HARMLESS = {
    "frames.webp": file(stored("WEBP", save_all=True, append_images=[Image.new("RGB", (32, 16))])),
    "frames.png": file(stored("PNG", save_all=True, append_images=[Image.new("RGB", (32, 16))])),
    "alpha.webp": file(stored("WEBP", mode="RGBA")),
    "bad_exif.jpg": file(stored("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")),
    "bad_profile.png": file(stored("PNG", icc_profile=b"\0" * 99)),
    "much_text.png": file(stored("PNG", pnginfo=PngImagePlugin.PngInfo())),
    "tail.jpg": file(stored("JPEG") + b"<?php ?>" * 100),
}


def outcome(path: Path) -> str | None:
    """Return why the image was refused; None if it was read"""
    try:
        image, label = FileImages([(str(path), 3)])[0]
    except ImageError as error:
        return str(error)
    assert image.mode == "RGB" and label == 3 and 0 < image.width * image.height <= MAX_PIXELS
    image.load()
    return None


def guarded(task) -> None:
    """Run the task in a forked process that is killed if it hangs, with at most MEMORY more memory."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            here = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (here + MEMORY, here + MEMORY))
            warnings.resetwarnings()
            importlib.reload(image_files)               # restores its warning filter, which pytest has removed
            task()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(code)
    until = time.monotonic() + 200
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.kill(child, 9)
        time.sleep(0.005)
    assert done[1] == 0, f"status {done[1]}"


@pytest.mark.contract("P13", "a hostile image is refused in one line that names it, in 3 s and 600 MB")
def test_hostile_images(tmp_path, figure, capfd):
    for make, name in [(HOSTILE[name], name) for name in HOSTILE]:
        make(tmp_path / name)

    def read_them():
        for name in HOSTILE:
            began = time.monotonic()
            text = outcome(tmp_path / name)
            assert text is not None, name
            assert image_files.shown(str(tmp_path / name)) in text and text.isprintable() and len(text) < 500, text
            assert time.monotonic() - began < PATIENCE_S, name

    guarded(read_them)
    assert capfd.readouterr() == ("", "")              # no warning of Pillow or of the libraries below it
    figure("hostile kinds of image files", len(HOSTILE))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_harmless_images_are_read(tmp_path):
    for name, make in HARMLESS.items():
        make(tmp_path / name)
        assert outcome(tmp_path / name) is None, name


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_messages_have_reason_and_advice(tmp_path):
    reasons = {"gone.png": "no such file", "pipe.png": "not a regular file", "warned_of.png": "10,000 x 10,000 px, more than",
               "large_header.png": "more than 64,000,000 px", "float.tif": "32 bits", "page.jpg": "none of the formats",
               "script.jpg": "none of the formats",
               "empty.jpg": "(the file is empty); remove or replace it", "folder.png": "(is a directory)",
               "link_to_itself.png": "(too many levels",
               "hole_of_a_terabyte.png": f"more than {MAX_IMAGE_BYTES:,}"}
    for name, words in reasons.items():
        HOSTILE[name](tmp_path / name)
        assert words in outcome(tmp_path / name)
    with pytest.raises(ImageError, match="more than"):
        FileImages([(str(tmp_path / "hole_of_a_terabyte.png"), 0)]).content(0)


def test_unreadable_permissions_have_their_own_advice(tmp_path, monkeypatch):
    def forbidden(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(image_files.os, "open", forbidden)
    assert outcome(tmp_path / "a.png") == (
        f"{tmp_path}/a.png: cannot be read as an image (permission denied); change its permissions")


@pytest.mark.contract("P13", "a mutated image is read or refused; nothing else comes out")
def test_mutated_images(tmp_path, tries, figure, capfd):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "hello"
    originals = [stored(form, **({"exif": exif} if form in ("JPEG", "PNG", "TIFF", "WEBP") else {})) for form in FORMATS]
    originals += [stored("PNG", mode="P"), stored("TIFF", compression="tiff_lzw"), stored("TIFF", compression="jpeg"),
                  stored("JPEG", progressive=True), stored("WEBP", lossless=True), stored("PNG", mode="I;16")]
    count = tries(260, 10_000)

    def read_them():
        refused = 0
        for seed in range(count):
            (tmp_path / "image").write_bytes(mutated(originals[seed % len(originals)], seed))
            began = time.monotonic()
            text = outcome(tmp_path / "image")
            assert time.monotonic() - began < PATIENCE_S, seed
            assert text is None or text.isprintable(), seed
            refused += text is not None
        assert count / 10 < refused < count * 0.95

    guarded(read_them)
    out, warned = capfd.readouterr()
    # libtiff writes to stderr itself; Python writes no warning and no traceback.
    assert out == "" and not any(word in warned for word in ("Warning", "Traceback", "PIL"))
    figure("mutated JPEG, PNG, WebP, TIFF, BMP, PPM, GIF", count)


LARGEST = {"gray.png": ("PNG", "L", {"compress_level": 1}), "photo.jpg": ("JPEG", "RGB", {}),
           "progressive.jpg": ("JPEG", "RGB", {"progressive": True}), "alpha.png": ("PNG", "RGBA", {"compress_level": 1}),
           "palette.gif": ("GIF", "P", {}), "sixteen.png": ("PNG", "I;16", {"compress_level": 1}), "raw.ppm": ("PPM", "RGB", {})}


@pytest.mark.slow
@pytest.mark.contract("P13", "an image of 64 megapixels takes at most 600 MB")
def test_the_largest_images(tmp_path, tries, figure):
    cases = list(LARGEST)[:tries(1, len(LARGEST))]
    for name in cases:
        form, mode, options = LARGEST[name]
        Image.new(mode, (8000, 8000)).save(tmp_path / name, form, **options)
        guarded(lambda name=name: None if outcome(tmp_path / name) is None else 1 / 0)
        (tmp_path / name).unlink()
    figure("images of 64 megapixels", len(cases))


# ------------------------------------------------------------------------------------------------- replacements

CROPPED = v2.Compose([v2.RandomResizedCrop((8, 8)), v2.RandomHorizontalFlip(), v2.PILToTensor()])
COUNT = 17


def samples(folder: Path, bad: set[int] = frozenset()) -> FileImages:
    folder.mkdir(exist_ok=True)
    for index in range(COUNT):
        pixels = np.random.default_rng(index).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        if index in bad:
            (folder / f"{index}.png").write_bytes(b"")
    return FileImages([(str(folder / f"{index}.png"), index % 3) for index in range(COUNT)], folder)


def loaded(split: FileImages, workers: int = 0, world: int = 1, micro: int = 2) -> dict:
    """Load all images -> {(step, epoch, index): (image, label, why another image replaces it)}"""
    found = {}
    for rank in range(world):
        order = StepSampler(COUNT, 8, micro, rank, world, 3, 0, 6)
        loader = data.train_loader(split, order, transform=CROPPED, seed=5, num_workers=workers, pin_memory=False,
                                   bad_images="skip")
        for batch, keys in zip(loader, order, strict=True):
            assert batch.keys == keys and isinstance(batch.bad, tuple)
            why = dict(batch.bad)
            for key, image, label in zip(keys, batch.images, batch.targets.tolist()):
                found[key.step, key.epoch, key.index] = (image.numpy().tobytes(), label, why.get(key.index))
    return found


@pytest.mark.contract("P13", "bad images are replaced in the same way for any number of workers and processes")
def test_replacements(tmp_path, figure):
    bad = {3, 4, 16}                                        # 5 replaces 3 and 4, 0 replaces 16
    whole, broken = samples(tmp_path / "whole"), samples(tmp_path / "broken", bad)
    expected, found = loaded(whole), loaded(broken)
    assert found.keys() == expected.keys()
    for (step, epoch, index), (image, label, why) in found.items():
        used = {3: 5, 4: 5, 16: 0}.get(index, index)
        assert label == used % 3
        if index in bad:
            assert why.endswith(f"{index}.png: cannot be read as an image (the file is empty)")         # no advice
            twin = next((sample for (_, e, i), sample in expected.items() if (e, i) == (epoch, used)), None)
            assert twin is None or image == twin[0]          # with the random draws of the replacing image
        else:
            assert (image, label, why) == expected[step, epoch, index]
    assert {index for (_, _, index), sample in found.items() if sample[2]} == bad
    for change in ({"workers": 2}, {"world": 2}, {"world": 4, "micro": 4}, {"micro": 8}):
        assert loaded(broken, **change) == found, change
    figure("worker and process counts with bad images", 4)


def test_first_bad_image_is_reported_if_no_replacement_is_readable(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "REPLACEMENTS", 5)
    broken = samples(tmp_path, set(range(6, 12)))
    keyed = data._Samples(broken, CROPPED, 5, skip=True)
    assert isinstance(keyed[SampleIndex(0, 0, 0, 7)], tuple)         # image 12 is readable
    error = keyed[SampleIndex(0, 0, 0, 6)]
    assert isinstance(error, ImageError) and "6.png" in str(error)
    everything = data._Samples(samples(tmp_path / "all", set(range(COUNT))), CROPPED, 5, skip=True)
    assert "3.png" in str(everything[SampleIndex(0, 0, 0, 3)])
