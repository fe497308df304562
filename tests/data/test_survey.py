"""How a sample of a data set decides the way its images are read, and the warnings about it."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from deep_images import png16, tiff16
from PIL import Image

from utils.data import decode, survey
from utils.data.datasets import open_splits
from utils.data.reading import FIND, ORIENTATION, Reading
from utils.data.splits import DataError

RANDOM = np.random.default_rng(0)


def data_set(root: Path, write, count: int = 6, ending: str = "png") -> str:
    """Make `count` images for each of two classes in train and val with write(path, class number, image number)"""
    for number in range(2 * 2 * count):
        path = root / ("train", "val")[number % 2] / "ab"[number // 2 % 2] / f"{number:02}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, number // 2 % 2, number)
    return str(root)


def deep(high: int, low: int = 0, form=png16, kind=np.uint16):
    return lambda path, *_: path.write_bytes(form(RANDOM.integers(low, high + 1, (20, 20, 1)).astype(kind)))


# ---------------------------------------------------------------------------------------------------------- 16 bits


@pytest.mark.parametrize(("highest", "white"), [(200, 255), (699, 1023), (3500, 4095), (16000, 16383), (44823, 65535)])
def test_16_bit_range_ends_with_the_bits_that_are_used(tmp_path, highest, white):
    splits = open_splits("folder", data_set(tmp_path, deep(highest, highest // 3)))
    assert splits.train.reading == splits.val.reading == splits.reading == Reading("follow", (0, white), "white")
    assert splits.notes == (f"images: of 24 sampled, 24 with 16 bits per channel, 0 to {white:,} read as black to white",)
    assert np.asarray(splits.train[0][0]).std() > 20, "the image is not one color"


def test_16_bit_color_images_are_recognized(tmp_path):
    data_set(tmp_path, lambda path, *_: path.write_bytes(png16(RANDOM.integers(0, 1024, (9, 9, 3)).astype(np.uint16))))
    splits = open_splits("folder", str(tmp_path))
    assert splits.reading.intensity_range == (0, 1023) and np.asarray(splits.val[3][0]).std() > 50


def test_dead_pixels_do_not_change_the_range(tmp_path):
    def write(path, *_):
        values = RANDOM.integers(300, 700, (50, 50, 1)).astype(np.uint16)
        values[3, 4] = 65535
        path.write_bytes(png16(values))

    assert open_splits("folder", data_set(tmp_path, write)).reading.intensity_range == (0, 1023)


def test_images_that_do_not_fit_the_range_are_reported(tmp_path):
    """10 bits in one class, 16 in the other."""
    data_set(tmp_path, lambda path, label, number: deep(699 if label else 44823)(path))
    splits = open_splits("folder", str(tmp_path))
    assert splits.reading.intensity_range == (0, 65535)
    warning, = (note for note in splits.notes if note.startswith("warning: "))
    assert "12 of 24 decoded 16-bit images become nearly one color (" in warning and "/b/" in warning
    assert "do not fit the range of the others (--intensity_range)" in warning


def test_offset_is_reported_with_a_better_range(tmp_path):
    splits = open_splits("folder", data_set(tmp_path, deep(33791, 32768)))
    warning, = (note for note in splits.notes if note.startswith("warning: "))
    assert "24 of 24 decoded" in warning and "--intensity_range=32768,33791 spreads their values" in warning
    again = open_splits("folder", str(tmp_path), reading=FIND.replace(intensity_range=(32768, 33791)))
    assert np.asarray(again.train[0][0]).std() > 50 and not any("warning" in note for note in again.notes)


def test_values_below_0_are_reported_with_advice(tmp_path):
    root = data_set(tmp_path, deep(3071, -1024, tiff16, np.int16), ending="tif")
    with pytest.raises(DataError, match=r"train/\w/\d+.tif: 16-bit values below 0 \(-1,024 to .*--intensity_range=-1024,"):
        open_splits("folder", root)
    splits = open_splits("folder", root, reading=FIND.replace(intensity_range=(-1024, 3071)))
    assert np.asarray(splits.train[0][0]).std() > 50
    shutil.rmtree(root)
    assert open_splits("folder", data_set(tmp_path, deep(30000, 0, tiff16, np.int16), ending="tif")).reading.intensity_range == (
        0, 32767)


# -------------------------------------------------------------------------------------------------- transparent parts


def icon(path: Path, color: tuple, tall: bool) -> None:
    """Draw a bar in the alpha channel; the whole image has one color."""
    image = Image.new("RGBA", (16, 16), (*color, 0))
    image.paste((*color, 255), (6, 0, 10, 16) if tall else (0, 6, 16, 10))
    image.save(path)


WHITE, BLACK, RED = (255,) * 3, (0,) * 3, (200, 30, 30)
ICONS = {"black": ([BLACK], "white"), "red": ([RED], "white"), "white": ([WHITE], "black"),
         "nearly white": ([(250,) * 3], "black"), "white and black": ([WHITE, WHITE, BLACK, BLACK], "mask")}


@pytest.mark.parametrize("colors", ICONS)
def test_alpha_rule_shows_shapes_in_the_alpha_channel(tmp_path, colors):
    colors, expected = ICONS[colors]
    data_set(tmp_path, lambda path, label, number: icon(path, colors[number // 4 % len(colors)], bool(label)))
    splits = open_splits("folder", str(tmp_path))
    assert splits.reading.alpha == expected and len(splits.notes) == 1
    for split in (splits.train, splits.val):
        assert all(np.ptp(np.asarray(split[index][0])) > 100 for index in range(len(split)))


def test_alpha_channel_of_zeros_is_ignored(tmp_path):
    def write(path, *_):
        image = Image.fromarray(RANDOM.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        image.putalpha(0)
        image.save(path)

    splits = open_splits("folder", data_set(tmp_path, write))
    assert splits.reading.alpha == "ignore" and np.asarray(splits.train[0][0]).std() > 50
    assert splits.notes == ("images: of 24 sampled, 24 with an alpha channel, which is ignored",)


def test_single_white_image_does_not_change_the_rule_but_is_reported(tmp_path):
    data_set(tmp_path, lambda path, label, number: icon(path, WHITE if number == 4 else RED, bool(label)))
    splits = open_splits("folder", str(tmp_path))
    assert splits.reading.alpha == "white" and "train/a/04.png" in splits.notes[1]
    assert splits.notes[1].startswith("warning: 1 of 24 decoded images with an alpha channel become nearly one color")


# ------------------------------------------------------------------------------------------------------- orientation


def turned(path: Path, label: int, number: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6 if number < 8 else 1
    Image.new("RGB", (8, 4), (number, 0, 0)).save(path, exif=exif)


def test_orientation_of_tiff_is_always_followed_and_reported(tmp_path):
    note = "images: of 24 sampled, 8 TIFF with an orientation, which is always followed"
    data_set(tmp_path, turned, ending="tif")
    for exif in ("off", "follow"):
        splits = open_splits("folder", str(tmp_path), reading=FIND.replace(exif=exif))
        assert splits.train[0][0].size == (4, 8) and splits.notes == (note,)


def test_orientations_are_followed_except_in_published_sets(tmp_path, monkeypatch):
    splits = open_splits("folder", data_set(tmp_path, turned, ending="jpg"))
    assert splits.train[0][0].size == (4, 8) and splits.train.dimensions(0) == (4, 8)
    assert splits.notes == ("images: of 24 sampled, 8 with an EXIF orientation, which is followed",)
    off = open_splits("folder", str(tmp_path), reading=FIND.replace(exif="off"))
    assert off.train[0][0].size == (8, 4) and off.notes[0].endswith("which is not followed (--exif follow)")
    from utils.data import datasets

    monkeypatch.setitem(datasets.DATASETS, "imagenet", datasets.folder)
    assert open_splits("imagenet", str(tmp_path)).reading.exif == "off"


# ------------------------------------------------------------------------------------------------------- the sample


def test_known_rule_opens_no_file_and_a_sample_opens_few(tmp_path, monkeypatch):
    data_set(tmp_path, lambda path, *_: path.write_bytes(b""), count=200)
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda name, *more, **options: opened.append(str(name)) or real(name, *more, **options))
    open_splits("folder", str(tmp_path), reading=Reading("follow"))
    assert not opened
    splits = open_splits("folder", str(tmp_path))
    assert len(set(opened)) == len(opened) == survey.SAMPLE and splits.notes == ()      # none can be read
    assert {Path(name).relative_to(tmp_path).parts[:2] for name in opened} == {
        (split, label) for split in ("train", "val") for label in "ab"}
    numbers = [int(Path(name).stem) for name in opened]
    assert min(numbers) < 40 and max(numbers) > 760


def test_no_more_is_decoded_than_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "MAX_DECODED", 3 * 400)
    files = open_splits("folder", data_set(tmp_path, deep(699)), reading=Reading()).train
    first = survey.take([files])
    assert (first.images, first.deep, len(first.ranges)) == (12, 12, 3)
    again = survey.take([files])
    assert first == again, "the same sample every time"


# ------------------------------------------------------------------------------------------------------------ HEIC


@pytest.fixture
def without_plugin(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    decode.can_read_heif.cache_clear()
    yield
    decode.can_read_heif.cache_clear()


def test_heic_images_without_plugin_are_counted_and_skipped(tmp_path, without_plugin):
    root = data_set(tmp_path, turned, ending="jpg")
    for number, name in enumerate(("train/a/x.heic", "train/b/x.HEIC", "val/a/y.heif")):
        (tmp_path / name).write_bytes(bytes([number]))
    splits = open_splits("folder", root, reading=Reading("follow"))
    assert (len(splits.train), len(splits.val), splits.val is splits.test) == (12, 12, True)
    assert splits.notes == (f"warning: 2 .heic and 1 .heif images are skipped. To read HEIC: {decode.INSTALL_HEIF}",)
    (tmp_path / "train/c").mkdir()
    (tmp_path / "train/c/z.heic").write_bytes(b"z")
    with pytest.raises(DataError, match=r"the images of class c are all .heic and .heif files.*: .*pip install pillow-heif"):
        open_splits("folder", root)


def test_heic_images_of_a_list_are_skipped(tmp_path, without_plugin):
    for name in ("a.jpg", "b.jpg", "c.heic"):
        turned(tmp_path / name, 0, 0) if name.endswith("jpg") else (tmp_path / name).write_bytes(b"c")
    (tmp_path / "val.csv").write_text("a.jpg,x\nb.jpg,y\n")
    for rows, words in (("", "1 .heic image is skipped"), ("c.heic,x\n", "2 .heic images are skipped")):
        (tmp_path / "train.csv").write_text("a.jpg,x\nb.jpg,y\nc.heic,x\n" + rows)
        splits = open_splits("csv", str(tmp_path))
        assert len(splits.train) == 2 and f"warning: {words}. To read HEIC: {decode.INSTALL_HEIF}" in splits.notes
    assert sum(".heic" in note for note in splits.notes) == 1
    assert splits.reading.exif == "follow"
