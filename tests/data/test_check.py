"""dataset.py check reads every image once and reports what is wrong, even if an image kills the process that reads it."""

import os
import signal
import time

import numpy as np
import pytest
from miniatures import GOOD_TREE, png, tree
from PIL import Image

from utils.data import check as check_data
from utils.data.check import check, oddities
from utils.data.datasets import open_splits
from utils.data.reading import AS_STORED
from utils.data.splits import ArrayImages, Splits
from utils.data.workers import WorkerError

LAYOUT = GOOD_TREE | {"train/cat": 4, "test/ant": 2, "test/bee": 1}


def silent(line: str) -> None:
    pytest.fail(f"nothing should be logged: {line}")


def in_lines(findings: check_data.Findings, *words: str) -> bool:
    return any(all(word in line for word in words) for line in findings.lines)


@pytest.mark.parametrize("workers", [0, 3])
def test_good_data_set_has_no_findings(tmp_path, workers):
    findings = check(open_splits("folder", tree(tmp_path, LAYOUT)), workers, silent)
    assert findings.bad == [] and len(findings.lines) == 4
    assert in_lines(findings, "15 with one color everywhere, which show nothing, for example train: train/ant/0.png")
    assert in_lines(findings, "train: 9 images of 3 classes, from 2 (bee) to 4 (cat) per class")
    assert in_lines(findings, "val: 3 images of 2 classes") and in_lines(findings, "test: 3 images")


def test_numbers_of_one_have_a_singular(tmp_path):
    findings = check(open_splits("folder", tree(tmp_path, {"train/ant": 1, "train/bee": 1, "val/ant": 1})), 1, silent)
    assert in_lines(findings, "val: 1 image of 1 class, ")


def test_shared_split_is_read_once_and_without_terminal_has_no_progress_bar(tmp_path, capfd):
    findings = check(open_splits("folder", tree(tmp_path, GOOD_TREE)), 1, silent)
    assert [line.partition(":")[0] for line in findings.lines[:-1]] == ["train", "val"] and capfd.readouterr().err == ""


@pytest.mark.contract("P13", "dataset.py check names every image that cannot be read, for any number of processes")
@pytest.mark.parametrize("workers", [1, 3])
def test_unreadable_images_are_named(tmp_path, workers, figure):
    splits = open_splits("folder", tree(tmp_path, LAYOUT))
    for place in ("train/ant/1.png", "train/cat/3.png", "test/bee/0.png"):
        (tmp_path / place).write_bytes(png(cut=600))
    (tmp_path / "val" / "bee" / "0.png").unlink()
    os.mkfifo(tmp_path / "val" / "bee" / "0.png")
    findings = check(splits, workers, silent)
    assert [(split, index, name) for split, index, name, _ in findings.bad] == [
        ("train", 1, "train/ant/1.png"), ("train", 8, "train/cat/3.png"), ("val", 1, "val/bee/0.png"),
        ("test", 2, "test/bee/0.png")]
    assert in_lines(findings, "train: 9 images", "2 cannot be read")
    assert in_lines(findings, "val: ", str(tmp_path / "val/bee/0.png"), "not a regular file")
    assert all("\n" not in line for line in findings.lines)
    figure("unreadable images", 4)


def test_long_list_of_bad_images_is_abbreviated(tmp_path):
    splits = open_splits("folder", tree(tmp_path, GOOD_TREE | {"train/cat": 30}))
    for number in range(30):
        (tmp_path / "train" / "cat" / f"{number}.png").write_bytes(b"")
    findings = check(splits, 1, silent)
    assert len(findings.bad) == 30 and findings.lines[-2] == "and 10 more that cannot be read"


def test_held_out_images_that_are_trained_on_are_reported(tmp_path):
    root = tree(tmp_path, LAYOUT)
    for place in ("val/bee/0.png", "test/ant/1.png"):
        (tmp_path / place).write_bytes((tmp_path / "train/cat/2.png").read_bytes())
    (tmp_path / "train/cat/1.png").write_bytes((tmp_path / "train/cat/0.png").read_bytes())        # within train: allowed
    findings = check(open_splits("folder", root), 2, silent)
    for place in ("val: val/bee/0.png", "test: test/ant/1.png"):
        begin = f"1 of the 3 {place[:place.index(':')]} images is also in train (byte by byte): for example {place} "
        assert in_lines(findings, begin + "is train: train/cat/2.png")


def test_oddities_are_counted(tmp_path):
    root = tree(tmp_path, LAYOUT)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    image.save(tmp_path / "train/ant/turned.jpg", exif=exif)
    image.convert("CMYK").save(tmp_path / "train/ant/inks.jpg")
    image.convert("P").save(tmp_path / "train/ant/few.png")
    image.convert("P").save(tmp_path / "val/ant/few.png")
    image.convert("I;16").save(tmp_path / "train/ant/deep.png")
    image.convert("RGBA").save(tmp_path / "train/ant/glass.png")
    image.save(tmp_path / "train/ant/film.webp", save_all=True, append_images=[Image.new("RGB", (20, 20))])
    Image.new("L", (5000, 4000)).save(tmp_path / "train/ant/wide.png")
    findings = check(open_splits("folder", root), 2, silent)
    assert findings.bad == []
    for words, example in (("1 with an EXIF orientation, which is followed", "turned.jpg"), ("1 with CMYK colors", "inks.jpg"),
                           ("2 with palette colors", "few.png"), ("1 with 16 bits per channel, 0 to 255 read as", "deep.png"),
                           ("1 with transparent parts, put on white", "glass.png"), ("1 with several frames", "film.webp"),
                           ("1 with more than 16 megapixels", "wide.png")):
        assert in_lines(findings, words, f"for example train: train/ant/{example}")
    assert len(findings.lines) == 3 + 8 + 1             # with one color everywhere; few.png is in two splits
    assert oddities(b"\0" * 64, AS_STORED) == () and oddities(b"", AS_STORED) == ()           # not an image file
    content = (tmp_path / "train/ant/turned.jpg").read_bytes()
    assert oddities(content, AS_STORED) == ("an EXIF orientation, which is not followed",)
    image.save(tmp_path / "turned.tif", tiffinfo={0x0112: 6})
    content = (tmp_path / "turned.tif").read_bytes()
    assert oddities(content, AS_STORED) == ("a TIFF's orientation, which is always followed",)


class Deadly(ArrayImages):
    """Calls `what` in the process that reads certain images; with the folder `once` only the first time."""

    def __init__(self, what, indices, count=30, once=None):
        random = np.random.default_rng(0)
        super().__init__(random.integers(0, 256, (count, 4, 4), dtype=np.uint8), np.zeros(count))
        self.what, self.indices, self.once = what, indices, once

    def __getitem__(self, index):
        if index in self.indices and not (self.once and (self.once / str(index)).exists()):
            if self.once:
                (self.once / str(index)).touch()
            self.what()
        return super().__getitem__(index)


def one_split(train) -> Splits:
    return Splits(train, Deadly(None, (), 1), Deadly(None, ()), "val", ("a",))


def killed(kind):
    return lambda: os.kill(os.getpid(), kind)


@pytest.mark.contract("P13", "dataset.py check outlives an image that kills its reader, and names it")
@pytest.mark.parametrize("workers", [1, 3])
def test_an_image_that_kills_its_reader_is_named(workers, figure):
    logged = []
    findings = check(one_split(Deadly(killed(signal.SIGKILL), (0, 7, 29))), workers, logged.append)
    assert [(split, index) for split, index, _, _ in findings.bad] == [("train", 0), ("train", 7), ("train", 29)]
    assert all("images/" in why and "SIGKILL" in why for *_, why in findings.bad)
    assert len(logged) == 3 and "train: images/0 killed the process that read it" in " ".join(logged)
    figure("images that kill their reader", 3)


def test_reader_that_dies_for_another_reason_is_replaced(tmp_path):
    findings = check(one_split(Deadly(killed(signal.SIGKILL), (3, 4, 12), once=tmp_path)), 2, silent)
    assert findings.bad == [] and in_lines(
        findings, "all 30 test images are also in train (byte by byte)")       # both have the same arrays: all were read


def test_image_that_takes_too_long_is_reported(monkeypatch):
    monkeypatch.setattr(check_data, "LATE_S", 1.0)
    monkeypatch.setattr(check_data, "POLL_S", 0.2)
    logged = []
    findings = check(one_split(Deadly(lambda: time.sleep(1000), (7,))), 2, logged.append)
    assert [(split, index) for split, index, _, _ in findings.bad] == [("train", 7)]
    assert "took more than 1 s to read" in findings.bad[0][3] and len(logged) == 1


def test_too_many_dead_readers_end_the_check(monkeypatch):
    monkeypatch.setattr(check_data, "MAX_DEATHS", 5)
    with pytest.raises(WorkerError, match=r"6 processes .* SIGKILL.*df -h /dev/shm"):
        check(one_split(Deadly(killed(signal.SIGKILL), range(30))), 2, lambda line: None)
