"""A prepared data set: the pixels are those that torchvision makes, however the build went; damage is reported."""

import json
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import GOOD_TREE, tree
from PIL import Image
from torchvision.transforms import v2

from utils.data import check, prepare, transforms
from utils.data.classes import ClassRule
from utils.data.datasets import open_splits, own_splits
from utils.data.loader import train_loader
from utils.data.prepared import FILE, describe
from utils.data.reading import AS_STORED, FIND, ORIENTATION, Reading
from utils.data.sampler import StepSampler
from utils.data.splits import DataError, ImageError, Subset, fingerprint
from utils.data.workers import WorkerError
from utils.files import FileLock, InUseError, StorageError

SIZE = 32
SIDES = [(90, 70), (64, 64), (45, 130), (20, 50), (32, 33), (200, 61), (9, 7)]        # the short side below, at and above SIZE
PLACES = [f"train/{name}/{number}" for name in ("ant", "bee") for number in range(20)] + [
    f"{part}/{name}/{number}" for part in ("val", "test") for name in ("ant", "bee") for number in range(3)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """52 smooth pictures, every third a PNG."""
    root = tmp_path_factory.mktemp("files")
    draw = np.random.default_rng(0)
    for number, place in enumerate(PLACES):
        image = Image.fromarray(draw.integers(0, 256, (6, 5, 3), np.uint8)).resize(SIDES[number % len(SIDES)], Image.BICUBIC)
        path = root / f"{place}.{'jpg' if number % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return root


def make(source: Path, target: Path, workers: int = 1, skip: float = 0.0, size: int = SIZE, dataset: str = "folder") -> list[str]:
    logged = []
    prepare.build(own_splits(dataset, str(source)), dataset, target, size, workers, logged.append, skip)
    return logged


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("prepared") / "set"
    make(files, target)
    return target


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_pixels_are_those_of_torchvision(files, whole):
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


def test_the_bytes_do_not_depend_on_the_processes(files, whole, tmp_path):
    logged = make(files, tmp_path / "three", workers=3)
    assert contents(tmp_path / "three") == contents(whole) and not (tmp_path / "three.building").exists()
    assert "52 images" in logged[0] and str(tmp_path / "three") in logged[-1]
    assert contents(whole).keys() - {FILE} == {
        f"{part}.{kind}" for part in ("train", "val", "test") for kind in ("index", "pixels")}


@pytest.mark.parametrize("dataset", ["folder", "csv"])
def test_a_run_reads_it_in_place_of_the_files(files, whole, tmp_path, dataset):
    """Drawn shares are the same images; but the run is another, which its fingerprint shows."""
    source, target = files / "train", tmp_path / "set"
    if dataset == "csv":
        (source := tmp_path / "lists").mkdir()
        for part in ("train", "val"):
            rows = [f"{path},{path.parent.name}\n" for path in sorted((files / part).glob("*/*"))]
            (source / f"{part}.csv").write_text("".join(rows))
    make(source, target, dataset=dataset)
    shares = {"test_fraction": 0.3, "val_fraction": 0.2, "split_seed": 3}
    read, made = (open_splits(dataset, str(place), **shares) for place in (source, target))
    for part in ("train", "val", "test"):
        pairs = [[(split.targets[index], split.name(index)) for index in range(len(split))]
                 for split in (getattr(read, part), getattr(made, part))]
        assert pairs[1] == [(label, f"prepared-{SIZE}/{name}") for label, name in pairs[0]]
    assert fingerprint(read.train) != fingerprint(made.train)
    assert open_splits("folder", str(target), test_fraction=0.3).classes == made.classes
    with pytest.raises(DataError, match=f"prepared from {dataset}"):
        open_splits("imagenet", str(target))
    if dataset == "folder":
        with pytest.raises(DataError, match="nothing is held out"):
            open_splits(dataset, str(target))


def test_training_and_evaluation_read_it(files, whole):
    made = open_splits("folder", str(whole))
    transform = transforms.train_transform("crop_flip", (24, 24))
    batches = []
    for workers in (0, 2):
        order = StepSampler(len(made.train), 8, 2, 0, 1, 0, 0, 3)
        loader = train_loader(Subset(made.train, range(len(made.train))), order, transform=transform, seed=0, num_workers=workers,
                              pin_memory=False)
        batches.append([batch.images for batch in loader])
    assert len(batches[0]) == 6 and batches[0][0].shape == (4, 3, 24, 24) and batches[0][0].dtype == torch.uint8
    assert all(map(torch.equal, *batches))
    as_image = pickle.loads(pickle.dumps(made.train))[0][0]          # as a process that is not forked gets it
    torch.manual_seed(5)
    one = transform(made.train.source(0)[0])
    torch.manual_seed(5)
    assert (one.int() - transform(as_image).int()).abs().max() <= 1          # torch's resize against Pillow's


# ------------------------------------------------------------------------------------------------- interruptions


def make_until(source: Path, target: Path, owner: object, function: str, call: int) -> None:
    """Is killed when the function is called for the so-manieth time, in this process or in one that it has started."""
    own, real, calls = os.getpid(), getattr(owner, function), iter(range(1, call))

    def die_or_run(*arguments):
        if next(calls, None) is None:
            os.kill(own, 9)
            time.sleep(60)              # until it dies with its parent
        return real(*arguments)

    setattr(owner, function, die_or_run)
    make(source, target)


def test_killed_at_any_point_it_continues(files, whole, tmp_path):
    """Nothing counts as whole that is not, and the end is the same as without an interruption."""
    target = tmp_path / "set"
    for step in ((prepare, "_allocate_files", 1), (Image.Image, "resize", 1), (Image.Image, "resize", 20),
                 (Image.Image, "resize", 20), (prepare, "_write_index", 1), (prepare, "_write_index", 3)):
        process = multiprocessing.get_context("fork").Process(target=make_until, args=(files, target, *step))
        process.start()
        process.join()
        assert process.exitcode == -9
        with pytest.raises(DataError):
            open_splits("folder", str(target))
    assert "52 are done already" in make(files, target)[0] and contents(target) == contents(whole)


def test_a_full_disk_keeps_what_is_done(files, whole, tmp_path, monkeypatch):
    target, building = tmp_path / "set", tmp_path / "set.building"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", full)                   # in the processes, which are forked
        with pytest.raises(StorageError, match=r"No space left on device.*continues"):
            make(files, target)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_write_index", full)
        with pytest.raises(StorageError, match=r"No space left on device.*continues"):
            make(files, target)
    assert not target.exists()
    with open(building / "train.pixels", "r+b") as stream:           # as a loss of power may leave it
        stream.seek(5000)
        stream.write(bytes(3000))
    assert "52 are done already" in make(files, target)[0]
    assert contents(target) == contents(whole)


def test_a_changed_source_starts_from_the_beginning(files, whole, tmp_path, monkeypatch):
    source, target = Path(shutil.copytree(files, tmp_path / "files")), tmp_path / "set"
    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr(prepare, "_write_index", lambda *_: os.rename("/nonexistent/a", "/nonexistent/b"))
        make(source, target)
    with Image.open(source / "train/ant/1.jpg") as image:
        other = image.transpose(Image.Transpose.ROTATE_180)
    other.save(source / "train/ant/1.jpg")
    assert "already" not in make(source, target)[0]
    assert contents(target).keys() == contents(whole).keys() and contents(target) != contents(whole)


def test_files_are_read_by_their_rule_which_the_folder_keeps(tmp_path):
    """Turned photographs and 16-bit images, upright and light in the prepared set; a run on it keeps the rule."""
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
    with pytest.raises(DataError, match=r"set was prepared with --exif=follow, not off: omit --exif, or prepare .* --exif=off"):
        open_splits("folder", str(tmp_path / "set"), reading=FIND.replace(exif="off"))
    with pytest.raises(DataError, match=r"prepared with --intensity_range=0,1023, not 0,65535"):
        open_splits("folder", str(tmp_path / "set"), reading=read.reading.replace(intensity_range=(0, 65535)))


def test_a_folder_of_an_earlier_version_was_read_without_a_rule(copy):
    facts = json.loads((copy / FILE).read_text())
    assert facts.pop("reading") == {"exif": "follow", "intensity_range": [0, 65535], "alpha": "white"}
    (copy / FILE).write_text(describe({name: value for name, value in facts.items() if name != "sha256"}))
    assert open_splits("folder", str(copy)).reading == AS_STORED


def test_a_disk_without_room_is_reported_before_anything_is_written(files, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(StorageError, match="GB are free there") as raised:
        make(files, tmp_path / "set")
    assert raised.value.exit_code == 3 and not (tmp_path / "set").exists()
    assert not list(tmp_path.glob("*/*.pixels"))


def test_a_lost_process_ends_it_in_one_line(files, tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "resize", lambda *_: os.kill(os.getpid(), 9))
    with pytest.raises(WorkerError, match="a process that reads images was lost"):
        make(files, tmp_path / "set")


# ------------------------------------------------------------------------------------------- what is not prepared


def test_bad_images_are_listed_or_omitted(files, tmp_path):
    source, target = Path(shutil.copytree(files, tmp_path / "files")), tmp_path / "set"
    (source / "train/bee/2.jpg").write_bytes(b"<html>")
    cut = source / "train/ant/2.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    for skip, words in ((0.0, "1 images"), (0.025, "2 images")):      # the one that is no image is known before any is decoded
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


def test_refusals(files, whole, tmp_path):
    for dataset, source in (("digits", ""), ("folder", str(whole))):
        with pytest.raises(DataError, match="only images in files"):
            prepare.build(own_splits(dataset, source), dataset, tmp_path / "set", SIZE, 1, pytest.fail)
    for place, words in ((whole, "is prepared already"), (files.parent, "exists already")):
        with pytest.raises(DataError, match=words):
            make(files, place)
    with pytest.raises(DataError, match="is inside the data set"):
        make(files, files / "train" / "set")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"exists already|is a link"):
        make(files, tmp_path / "link")
    root = tree(tmp_path / "small", GOOD_TREE)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        make(Path(root), tmp_path / "file" / "set")
    (tmp_path / "set.building").mkdir()

    def refused_to_another_process() -> None:
        with pytest.raises(InUseError, match="in use"):
            make(Path(root), tmp_path / "set")

    (lock := FileLock(tmp_path / "set.building")).acquire()
    process = multiprocessing.get_context("fork").Process(target=refused_to_another_process)
    process.start()
    process.join()
    lock.release()
    assert process.exitcode == 0


# ------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", [FILE, "train.index", "test.index"])
def test_any_flipped_bit_beside_the_pixels_is_reported_at_the_start(copy, name):
    content = (copy / name).read_bytes()
    for place in np.random.default_rng(2).integers(0, len(content), 40):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(place) % 8
        (copy / name).write_bytes(damaged)
        try:
            with pytest.raises(DataError, match=r"set again|it again|prepared from") as raised:
                open_splits("folder", str(copy))
            assert str(copy) in str(raised.value) and "\n" not in str(raised.value)
        except pytest.fail.Exception:                                # white space between the values of the JSON
            assert name == FILE and json.loads(damaged) == json.loads(content)


def test_a_file_of_another_length_or_version_or_none_is_reported(copy):
    facts = json.loads((copy / FILE).read_text())
    for name, changed in (("train.index", b"x"), ("val.pixels", b"x"), ("val.pixels", None), ("train.index", None), (FILE, b"[]"),
                          (FILE, describe(facts | {"format": "vit-prepared-2"}).encode())):
        content = (copy / name).read_bytes()
        (copy / name).unlink() if changed is None else (copy / name).write_bytes(changed)
        with pytest.raises(DataError, match=r"again") as raised:
            open_splits("folder", str(copy))
        assert "\n" not in str(raised.value) and ("another version" in str(raised.value)) == (name == FILE)
        (copy / name).write_bytes(content)


def test_damaged_pixels_are_found_by_check(copy):
    splits = open_splits("folder", str(copy))
    place = int(splits.train.rows["place"][7])
    with open(copy / "train.pixels", "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 4]))
    splits = open_splits("folder", str(copy))                        # a start does not read them
    splits.train.source(7)
    findings = check.check(splits, 2, pytest.fail)
    assert [bad[:3] for bad in findings.bad] == [("train", 7, splits.train.name(7))] and "SHA-256" in findings.bad[0][3]
    os.truncate(copy / "train.pixels", place)                        # under a run
    for read in (splits.train.source, splits.train.__getitem__, splits.train.content):
        with pytest.raises(ImageError, match="cut off; delete the folder and prepare"):
            read(7)
    splits.train.source(6)


def test_prepared_images_follow_the_order_and_names_that_are_asked_for(tmp_path):
    root = tree(tmp_path / "files", {f"{split}/{name}": count for split in ("train", "val") for name, count in
                                     (("10", 3), ("2", 1), ("9", 2))})
    make(Path(root), tmp_path / "set")
    for rule in (ClassRule(), ClassRule("text"), ClassRule(None, ("9", "10", "2"))):
        files, prepared = (open_splits("folder", str(place), rule=rule) for place in (root, tmp_path / "set"))
        assert files.classes == prepared.classes and prepared.prepared == SIZE
        names = [{split.name(index).removeprefix(f"prepared-{SIZE}/"): (int(split.targets[index]), split[index][1])
                  for index in range(len(split))} for split in (files.train, prepared.train)]
        assert names[0] == names[1]
