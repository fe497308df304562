"""A prepared data set: the pixels are those that torchvision makes, however the build went; damage is told, not trained on."""

import hashlib
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

from utils.attention.edits import Edit
from utils.data import check, prepare, transforms
from utils.data.datasets import load_splits, own_splits
from utils.data.loader import StepOrder, train_loader
from utils.data.prepared import FILE, ROW, describe
from utils.data.splits import DataError, ImageError, Part, fingerprint
from utils.data.workers import WorkerError
from utils.files import InUseError, StorageError
from utils.randomness import seeded

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


def make(source: Path, target: Path, workers: int = 1, skip: float = 0.0, size: int = SIZE) -> list[str]:
    said = []
    prepare.build(own_splits("folder", str(source)), "folder", target, size, workers, said.append, skip)
    return said


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
    read, made = load_splits("folder", str(files)), load_splits("folder", str(whole))
    assert (made.classes, made.can_flip, made.val_name) == (read.classes, read.can_flip, read.val_name)
    assert made.val is not made.test
    for split, other in ((read.train, made.train), (read.val, made.val), (read.test, made.test)):
        assert np.array_equal(split.labels, other.labels) and len(split) == len(other)
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
    said = make(files, tmp_path / "three", workers=3)
    assert contents(tmp_path / "three") == contents(whole) and not (tmp_path / "three.building").exists()
    assert "52 images" in said[0] and str(tmp_path / "three") in said[-1]
    assert contents(whole).keys() - {FILE} == {
        f"{part}.{kind}" for part in ("train", "val", "test") for kind in ("index", "pixels")}


@pytest.mark.parametrize("dataset", ["folder", "csv"])
def test_a_run_takes_it_in_place_of_the_files(files, whole, tmp_path, dataset):
    """Drawn shares are the same images; but the run is another, which its fingerprint tells."""
    source, target = str(files / "train"), tmp_path / "set"
    if dataset == "csv":
        for part in ("train", "val"):
            rows = [f"{path},{path.parent.name}\n" for path in sorted((files / part).glob("*/*"))]
            (tmp_path / f"{part}.csv").write_text("".join(rows))
        source = str(tmp_path)
        target = files.parent / "csv-set"
    prepare.build(own_splits(dataset, source), dataset, target, SIZE, 1, lambda line: None)
    shares = {"test_fraction": 0.3, "val_fraction": 0.2, "split_seed": 3}
    read, made = (load_splits(dataset, place, **shares) for place in (source, str(target)))
    for part in ("train", "val", "test"):
        pairs = [[(split.labels[index], split.name(index)) for index in range(len(split))]
                 for split in (getattr(read, part), getattr(made, part))]
        assert pairs[1] == [(label, f"prepared-{SIZE}/{name}") for label, name in pairs[0]]
    assert fingerprint(read.train) != fingerprint(made.train)
    assert load_splits("folder", str(target), test_fraction=0.3).classes == made.classes
    with pytest.raises(DataError, match=f"prepared from {dataset}"):
        load_splits("imagenet", str(target))
    if dataset == "folder":
        with pytest.raises(DataError, match="no train/ and val/"):
            load_splits(dataset, str(target))


def test_training_and_evaluation_read_it(files, whole):
    made = load_splits("folder", str(whole))
    transform = transforms.train_transform("crop_flip", (24, 24))
    batches = []
    for workers in (0, 2):
        order = StepOrder(len(made.train), 8, 2, 0, 1, 0, 0, 3)
        loader = train_loader(Part(made.train, range(len(made.train))), order, transform=transform, seed=0, num_workers=workers,
                              pin_memory=False)
        batches.append([batch.images for batch in loader])
    assert len(batches[0]) == 6 and batches[0][0].shape == (4, 3, 24, 24) and batches[0][0].dtype == torch.uint8
    assert all(map(torch.equal, *batches))
    as_image = pickle.loads(pickle.dumps(made.train))[0][0]          # as a process that is not forked gets it
    torch.manual_seed(5)
    one = transform(made.train.source(0)[0])
    torch.manual_seed(5)
    assert (one.int() - transform(as_image).int()).abs().max() <= 1          # torch's resize against Pillow's
    show = transforms.eval_transform((28, 28), crop=0.875)
    read = load_splits("folder", str(files))
    for index in (0, 1, 2, 5):
        assert torch.equal(show(made.val[index][0]), show(read.val[index][0]))


# ------------------------------------------------------------------------------------------------- interruptions


def test_killed_at_any_point_it_goes_on(tmp_path):
    """Nothing looks whole that is not, and the end is the same as without an interruption."""
    source = tmp_path / "files"
    draw = np.random.default_rng(1)
    for number in range(64):
        path = source / ("train" if number < 50 else "val") / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (200, 300, 3), np.uint8)).save(path)
    make(source, tmp_path / "whole")
    target, kills = tmp_path / "set", 0
    context = multiprocessing.get_context("fork")
    while not target.exists():
        process = context.Process(target=make, args=(source, target))
        process.start()
        process.join(0.04 * (1 + kills))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        assert kills < 50
        if not target.exists():
            with pytest.raises(DataError):
                load_splits("folder", str(target))
    assert kills >= 2 and contents(target).items() >= contents(tmp_path / "whole").items()


def test_a_full_disk_keeps_what_is_done(files, whole, tmp_path, monkeypatch):
    target, building = tmp_path / "set", tmp_path / "set.building"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", full)                   # in the processes, which are forked
        with pytest.raises(StorageError, match=r"No space left on device.*goes on"):
            make(files, target)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_finish", full)
        with pytest.raises(StorageError, match=r"No space left on device.*goes on"):
            make(files, target)
    assert not target.exists()
    with open(building / "train.pixels", "r+b") as stream:           # as a loss of power may leave it
        stream.seek(5000)
        stream.write(bytes(3000))
    assert "52 are there already" in make(files, target)[0]
    assert contents(target) == contents(whole)


def test_a_changed_source_starts_anew(files, whole, tmp_path, monkeypatch):
    source, target = Path(shutil.copytree(files, tmp_path / "files")), tmp_path / "set"
    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr(prepare, "_finish", lambda *_: os.rename("/nonexistent/a", "/nonexistent/b"))
        make(source, target)
    with Image.open(source / "train/ant/1.jpg") as image:
        other = image.transpose(Image.Transpose.ROTATE_180)
    other.save(source / "train/ant/1.jpg")
    assert "already" not in make(source, target)[0]
    assert contents(target).keys() == contents(whole).keys() and contents(target) != contents(whole)
    made = load_splits("folder", str(target)).train
    place = next(index for index in range(len(made)) if made.name(index).endswith("train/ant/1.jpg"))
    read = load_splits("folder", str(source)).train[place][0]
    assert np.array_equal(made[place][0], v2.functional.resize(read, [SIZE]))


def test_room_is_looked_for_first(files, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(StorageError, match="GB are free there") as told:
        make(files, tmp_path / "set")
    assert told.value.exit_code == 3 and not (tmp_path / "set").exists()
    assert not list(tmp_path.glob("*/*.pixels"))


def test_a_lost_process_ends_it_in_one_line(files, tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "resize", lambda *_: os.kill(os.getpid(), 9))
    with pytest.raises(WorkerError, match="a process that reads images was lost"):
        make(files, tmp_path / "set")


# ------------------------------------------------------------------------------------------- what is not prepared


def test_bad_images_are_listed_or_left_out(files, tmp_path):
    source, target = Path(shutil.copytree(files, tmp_path / "files")), tmp_path / "set"
    (source / "train/bee/2.jpg").write_bytes(b"<html>")
    cut = source / "train/ant/2.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    for skip, told in ((0.0, "1 images"), (0.025, "2 images")):      # the one that is no image is known before any is decoded
        with pytest.raises(DataError, match=f"{told} cannot be read: .*bad_images.txt lists them"):
            make(source, target, skip=skip)
        assert not target.exists()
    assert str(cut) in (tmp_path / "set.building/bad_images.txt").read_text()
    said = make(source, target, skip=0.05)
    assert "2 left out" in said[-1] and len((target / "bad_images.txt").read_text().splitlines()) == 2
    made, read = load_splits("folder", str(target)), load_splits("folder", str(files))
    names = {f"prepared-{SIZE}/{read.train.name(index)}": read.train[index][0] for index in range(40)}
    left = names.keys() - {made.train.name(index) for index in range(len(made.train))}
    assert len(made.train) == 38 and left == {f"prepared-{SIZE}/train/{name}" for name in ("bee/2.jpg", "ant/2.jpg")}
    for index in range(38):
        image = names[made.train.name(index)]
        assert np.array_equal(made.train[index][0], v2.functional.resize(image, [SIZE]) if min(image.size) > SIZE else image)
    assert check.check(made, 1, pytest.fail).bad == []
    next((source / "val").glob("bee/*")).write_bytes(b"")
    with pytest.raises(DataError, match="those held out have to be readable"):
        make(source, tmp_path / "other", skip=0.5)


def test_refusals(files, whole, tmp_path):
    for dataset, source in (("digits", ""), ("folder", str(whole))):
        with pytest.raises(DataError, match="only images in files"):
            prepare.build(own_splits(dataset, source), dataset, tmp_path / "set", SIZE, 1, pytest.fail)
    for place, told in ((whole, "is prepared already"), (files.parent, "exists already")):
        with pytest.raises(DataError, match=told):
            make(files, place)
    with pytest.raises(DataError, match="lies inside the data set"):
        make(files, files / "train" / "set")
    root = tree(tmp_path / "small", GOOD_TREE)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        make(Path(root), tmp_path / "file" / "set")
    building = tmp_path / "set.building"
    building.mkdir()
    holder = multiprocessing.get_context("fork").Process(target=_hold, args=(building,))
    holder.start()
    while not (building / "held").exists():
        time.sleep(0.01)
    with pytest.raises(InUseError, match="in use"):
        make(Path(root), tmp_path / "set")
    holder.kill()
    holder.join()


def test_a_link_or_a_pipe_in_the_way(files, whole, tmp_path, copy):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(DataError, match="is a link"):
        make(files, tmp_path / "link")
    (copy / "train.index").unlink()
    os.mkfifo(copy / "train.index")
    with pytest.raises(DataError, match="no such file"):
        load_splits("folder", str(copy))


def test_edits_of_attention_go_with_prepared_images(files, whole):
    """They come to lie where they lie of the files."""
    edit = Edit("", "", np.ones((2, 2), np.float32), np.eye(2, dtype=bool))
    transform, found = transforms.train_transform("none", (16, 16)), []
    for split in (load_splits("folder", str(whole)).train, load_splits("folder", str(files)).train):
        image, _ = split.source(0)
        with seeded(1):
            found.append(transforms.with_edit(transform, image, edit, (2, 2)))
    (image, edits), (expected, expected_edits) = found
    assert (image.float() - expected.float()).abs().mean() < 3
    assert edits.equal(expected_edits) and edits[1].tolist() == [[1, 0], [0, 1]]


def _hold(building: Path) -> None:
    with prepare._alone(building):
        (building / "held").touch()
        time.sleep(60)


# ------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", [FILE, "train.index", "test.index"])
def test_any_flipped_bit_beside_the_pixels_is_told_at_the_start(copy, name):
    content = (copy / name).read_bytes()
    for place in np.random.default_rng(2).integers(0, len(content), 40):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(place) % 8
        (copy / name).write_bytes(damaged)
        try:
            with pytest.raises(DataError, match=r"set again|it again|prepared from") as told:
                load_splits("folder", str(copy))
            assert str(copy) in str(told.value) and "\n" not in str(told.value)
        except pytest.fail.Exception:                                # white space between the values of the JSON
            assert name == FILE and json.loads(damaged) == json.loads(content)


@pytest.mark.parametrize("name", [FILE, "train.index", "val.pixels"])
@pytest.mark.parametrize("change", ["cut", "longer", "gone", "folder"])
def test_a_file_of_another_length(copy, name, change):
    file, content = copy / name, (copy / name).read_bytes()
    file.unlink()
    if change == "folder":
        file.mkdir()
    elif change != "gone":
        file.write_bytes(content[:-1] if change == "cut" else content + b"x")
    if name == FILE and change == "cut":                             # its line break
        file.write_bytes(content[:-2])
    with pytest.raises(DataError) as told:
        load_splits("folder", str(copy))
    assert "\n" not in str(told.value)


def test_damaged_pixels_are_found_by_check_data(copy):
    splits = load_splits("folder", str(copy))
    place = int(splits.train.rows["place"][7])
    with open(copy / "train.pixels", "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 4]))
    splits = load_splits("folder", str(copy))                        # a start does not read them
    splits.train.source(7)
    findings = check.check(splits, 2, pytest.fail)
    assert [bad[:3] for bad in findings.bad] == [("train", 7, splits.train.name(7))] and "SHA-256" in findings.bad[0][3]
    os.truncate(copy / "train.pixels", place)                        # under a run
    for read in (splits.train.source, splits.train.__getitem__, splits.train.content):
        with pytest.raises(ImageError, match="cut off; delete the folder and prepare"):
            read(7)
    splits.train.source(6)


def sealed(folder: Path, change) -> None:
    """What a forger would do: change(facts, rows) with all digests made anew."""
    facts = json.loads((folder / FILE).read_text())
    del facts["sha256"]
    count = facts["splits"]["train"]["images"]
    content = (folder / "train.index").read_bytes()
    rows, names = np.frombuffer(content, ROW, count).copy(), content[count * ROW.itemsize:]
    names = change(facts, rows) or names
    content = rows.tobytes() + names
    if facts.get("splits") and "train" in facts["splits"]:
        facts["splits"]["train"]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "train.index").write_bytes(content)
    (folder / FILE).write_text(describe(facts))


def put(name: str, index: int, value: int):
    def change(facts, rows):
        rows[name][index] = value
    return change


FORGED = {
    "another version": lambda facts, rows: facts.update(format="vit-prepared-2"),
    "another program": lambda facts, rows: facts.update(format=["vit"]),
    "no splits": lambda facts, rows: facts.update(splits={}),
    "no test": lambda facts, rows: facts["splits"].pop("test") and None,
    "one more": lambda facts, rows: facts.update(more=1),
    "no text": lambda facts, rows: facts.update(classes=[1, 2]),
    "fewer images": lambda facts, rows: facts["splits"]["train"].update(images=39),
    "many images": lambda facts, rows: facts["splits"]["train"].update(images=1 << 60),
    "minus one": lambda facts, rows: facts["splits"]["train"].update(images=-1),
    "other bytes": lambda facts, rows: facts["splits"]["train"].update(bytes=10),
    "two in one place": put("place", 5, 0), "far away": put("place", 39, (1 << 64) - 1), "huge": put("height", 3, (1 << 32) - 1),
    "empty": put("width", 3, 0), "no such class": put("label", 3, 2),
    "names run together": lambda facts, rows: b"a" * 99 + b"\0", "a name without end": lambda facts, rows: b"a\0" * 39 + b"a",
}


@pytest.mark.parametrize("forgery", FORGED)
def test_forged_files_cost_one_line(copy, memory_below, forgery):
    sealed(copy, lambda facts, rows: None)
    load_splits("folder", str(copy))
    sealed(copy, FORGED[forgery])
    with memory_below(48 << 20), pytest.raises(DataError) as told:
        load_splits("folder", str(copy))
    assert "\n" not in str(told.value) and len(str(told.value)) < 500
    if forgery == "another version":
        assert "another version" in str(told.value) and "set again" in str(told.value)
