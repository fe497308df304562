"""Preparing a data set: the pixels are those of torchvision, even after an interruption; and the errors."""

import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import GOOD_TREE, tree
from PIL import Image
from prepared_sets import SIZE, make
from torchvision.transforms import v2

from utils.data import check, prepare
from utils.data.datasets import open_splits, own_splits
from utils.data.prepared import FILE
from utils.data.reading import FIND, ORIENTATION, Reading
from utils.data.splits import DataError
from utils.data.workers import WorkerError
from utils.files import FileLock, InUseError, StorageError


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_pixels_equal_those_of_torchvision(files, whole):
    read, made = open_splits("folder", str(files)), open_splits("folder", str(whole))
    assert (made.classes, made.can_flip, made.val_name) == (read.classes, read.can_flip, read.val_name)
    assert made.val is not made.test
    for split, other in ((read.train, made.train), (read.val, made.val), (read.test, made.test)):
        assert np.array_equal(split.targets, other.targets) and len(split) == len(other)
        for index in range(len(split)):
            image, label = split[index]
            expected = v2.functional.resize(image, [SIZE]) if min(image.size) > SIZE else image
            got, again = other[index], other.source(index)
            assert got[1] == again[1] == label and got[0].mode == "RGB"
            assert np.array_equal(got[0], expected) and torch.equal(again[0], v2.functional.pil_to_tensor(expected))
            assert other.content(index) == expected.tobytes()
            assert other.name(index) == f"prepared-{SIZE}/{split.name(index)}"
    assert again[0].stride()[0] == 1                                 # channels last, which torch resizes fastest


def test_bytes_do_not_depend_on_the_number_of_processes(files, whole, tmp_path):
    logged = make(files, tmp_path / "three", workers=3)
    assert contents(tmp_path / "three") == contents(whole) and not (tmp_path / "three.building").exists()
    assert "52 images" in logged[0] and str(tmp_path / "three") in logged[-1]
    assert contents(whole).keys() - {FILE} == {
        f"{part}.{kind}" for part in ("train", "val", "test") for kind in ("index", "pixels")}


def make_until(source: Path, target: Path, owner: object, function: str, call: int) -> None:
    """Prepare, but kill this process at the given call of the function, here or in a process that it has started."""
    own, real, calls = os.getpid(), getattr(owner, function), iter(range(1, call))

    def die_or_run(*arguments):
        if next(calls, None) is None:
            os.kill(own, 9)
            time.sleep(60)              # dies with its parent meanwhile
        return real(*arguments)

    setattr(owner, function, die_or_run)
    make(source, target)


def test_build_killed_at_any_point_continues(files, whole, tmp_path):
    """An unfinished build is never read, and the finished one is the same as without an interruption."""
    target = tmp_path / "set"
    for step in ((prepare, "_allocate_files", 1), (Image.Image, "resize", 1), (Image.Image, "resize", 20),
                 (Image.Image, "resize", 20), (prepare, "_write_index", 1), (prepare, "_write_index", 3)):
        process = multiprocessing.get_context("fork").Process(target=make_until, args=(files, target, *step))
        process.start()
        process.join()
        assert process.exitcode == -9
        with pytest.raises(DataError):
            open_splits("folder", str(target))
    assert "52 already done" in make(files, target)[0] and contents(target) == contents(whole)


def test_finished_images_are_kept_if_the_disk_is_full(files, whole, tmp_path, monkeypatch):
    target, building = tmp_path / "set", tmp_path / "set.building"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", full)                   # in the processes, which are forked
        with pytest.raises(StorageError, match=r"No space left on device.*to continue"):
            make(files, target)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_write_index", full)
        with pytest.raises(StorageError, match=r"No space left on device.*to continue"):
            make(files, target)
    assert not target.exists()
    with open(building / "train.pixels", "r+b") as stream:           # as a power failure may leave it
        stream.seek(5000)
        stream.write(bytes(3000))
    assert "52 already done" in make(files, target)[0]
    assert contents(target) == contents(whole)


def test_changed_source_restarts_the_build(files, whole, tmp_path, monkeypatch):
    source, target = Path(shutil.copytree(files, tmp_path / "files")), tmp_path / "set"
    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr(prepare, "_write_index", lambda *_: os.rename("/nonexistent/a", "/nonexistent/b"))
        make(source, target)
    with Image.open(source / "train/ant/1.jpg") as image:
        other = image.transpose(Image.Transpose.ROTATE_180)
    other.save(source / "train/ant/1.jpg")
    assert "already" not in make(source, target)[0]
    assert contents(target).keys() == contents(whole).keys() and contents(target) != contents(whole)


def test_reading_rule_is_applied_and_stored(tmp_path):
    """Turned photographs are upright and 16-bit images are bright in the prepared set; a run on it keeps the rule."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    draw = np.random.default_rng(0)
    for place in GOOD_TREE:
        (tmp_path / "files" / place).mkdir(parents=True)
        photo = Image.fromarray(draw.integers(0, 256, (6, 5, 3), np.uint8)).resize((90, 70), Image.BICUBIC)
        photo.save(tmp_path / "files" / place / "turned.jpg", exif=exif)
        Image.fromarray(draw.integers(0, 1024, (40, 50), np.uint16)).save(tmp_path / "files" / place / "deep.png")
    make(tmp_path / "files", tmp_path / "set")
    read, made = open_splits("folder", str(tmp_path / "files")), open_splits("folder", str(tmp_path / "set"))
    assert made.reading == read.reading == Reading("follow", (0, 1023), "white") and made.notes == ()
    for index, size in ((0, (40, SIZE)), (1, (SIZE, 41))):
        image = read.train[index][0].resize(size, Image.BILINEAR)
        assert made.train[index][0].size == size and np.array_equal(made.train[index][0], image)
    with pytest.raises(DataError, match=r"set was prepared with --exif=follow, not off\. Omit --exif, or prepare .* --exif=off"):
        open_splits("folder", str(tmp_path / "set"), reading=FIND.replace(exif="off"))
    with pytest.raises(DataError, match=r"prepared with --intensity_range=0,1023, not 0,65535"):
        open_splits("folder", str(tmp_path / "set"), reading=read.reading.replace(intensity_range=(0, 65535)))


def test_too_small_disk_is_reported_before_anything_is_written(files, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(StorageError, match="GB are free there") as raised:
        make(files, tmp_path / "set")
    assert raised.value.exit_code == 3 and not (tmp_path / "set").exists()
    assert not list(tmp_path.glob("*/*.pixels"))


def test_lost_process_is_reported(files, tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "resize", lambda *_: os.kill(os.getpid(), 9))
    with pytest.raises(WorkerError, match="a process that reads images was killed"):
        make(files, tmp_path / "set")


def test_bad_images_are_listed_or_skipped(files, tmp_path):
    source, target = Path(shutil.copytree(files, tmp_path / "files")), tmp_path / "set"
    (source / "train/bee/2.jpg").write_bytes(b"<html>")
    cut = source / "train/ant/2.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    for skip, words in ((0.0, "1 image"), (0.025, "2 images")):      # one is found by its header, before any is decoded
        with pytest.raises(DataError, match=f"{words} cannot be read: .*bad_images.txt lists them"):
            make(source, target, skip=skip)
        assert not target.exists()
    assert str(cut) in (tmp_path / "set.building/bad_images.txt").read_text()
    logged = make(source, target, skip=0.05)
    assert "2 skipped" in logged[-1] and len((target / "bad_images.txt").read_text().splitlines()) == 2
    made, read = open_splits("folder", str(target)), open_splits("folder", str(files))
    names = {f"prepared-{SIZE}/{read.train.name(index)}": read.train[index][0] for index in range(40)}
    left = names.keys() - {made.train.name(index) for index in range(len(made.train))}
    assert len(made.train) == 38 and left == {f"prepared-{SIZE}/train/{name}" for name in ("bee/2.jpg", "ant/2.jpg")}
    for index in range(38):
        image = names[made.train.name(index)]
        assert np.array_equal(made.train[index][0], v2.functional.resize(image, [SIZE]) if min(image.size) > SIZE else image)
    assert check.check(made, 1, pytest.fail).bad == []
    next((source / "val").glob("bee/*")).write_bytes(b"")
    with pytest.raises(DataError, match="validation and test images must be readable"):
        make(source, tmp_path / "other", skip=0.5)


def test_unsuitable_sources_and_targets_are_reported(files, whole, tmp_path):
    for dataset, source in (("digits", ""), ("folder", str(whole))):
        with pytest.raises(DataError, match="only images in files"):
            prepare.build(own_splits(dataset, source), dataset, tmp_path / "set", SIZE, 1, pytest.fail)
    for place, words in ((whole, "is already prepared"), (files.parent, "already exists")):
        with pytest.raises(DataError, match=words):
            make(files, place)
    with pytest.raises(DataError, match="is inside the data set"):
        make(files, files / "train" / "set")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"already exists|is a link"):
        make(files, tmp_path / "link")
    root = tree(tmp_path / "small", GOOD_TREE)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        make(Path(root), tmp_path / "file" / "set")
    (tmp_path / "set.building").mkdir()

    def fails_in_another_process() -> None:
        with pytest.raises(InUseError, match="in use"):
            make(Path(root), tmp_path / "set")

    (lock := FileLock(tmp_path / "set.building")).acquire()
    process = multiprocessing.get_context("fork").Process(target=fails_in_another_process)
    process.start()
    process.join()
    lock.release()
    assert process.exitcode == 0
