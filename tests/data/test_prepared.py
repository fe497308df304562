"""Prepared data sets: a run reads them in place of the files; damage is reported."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import tree
from prepared_sets import SIZE, make

from utils.data import check, transforms
from utils.data.classes import ClassRule
from utils.data.datasets import open_splits
from utils.data.loader import train_loader
from utils.data.prepared import FILE, describe
from utils.data.reading import AS_STORED
from utils.data.sampler import StepSampler
from utils.data.splits import DataError, ImageError, Subset, fingerprint


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.mark.parametrize("dataset", ["folder", "csv"])
def test_prepared_set_replaces_the_files(files, whole, tmp_path, dataset):
    """Drawn splits have the same images, but the fingerprint differs: it is another run."""
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


def test_training_reads_prepared_images(files, whole):
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
    as_image = pickle.loads(pickle.dumps(made.train))[0][0]          # as in a process that is not forked
    torch.manual_seed(5)
    one = transform(made.train.source(0)[0])
    torch.manual_seed(5)
    assert (one.int() - transform(as_image).int()).abs().max() <= 1          # torch's resize compared with Pillow's


def test_folder_of_an_older_version_has_the_default_rule(copy):
    facts = json.loads((copy / FILE).read_text())
    assert facts.pop("reading") == {"exif": "follow", "intensity_range": [0, 65535], "alpha": "white"}
    (copy / FILE).write_text(describe({name: value for name, value in facts.items() if name != "sha256"}))
    assert open_splits("folder", str(copy)).reading == AS_STORED


@pytest.mark.parametrize("name", [FILE, "train.index", "test.index"])
def test_flipped_bits_outside_the_pixels_are_reported_at_the_start(copy, name):
    content = (copy / name).read_bytes()
    for place in np.random.default_rng(2).integers(0, len(content), 40):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(place) % 8
        (copy / name).write_bytes(damaged)
        try:
            with pytest.raises(DataError, match=r"set again|it again|prepared from") as raised:
                open_splits("folder", str(copy))
            assert str(copy) in str(raised.value) and "\n" not in str(raised.value)
        except pytest.fail.Exception:                                # only white space in the JSON has changed
            assert name == FILE and json.loads(damaged) == json.loads(content)


def test_missing_or_wrong_files_are_reported(copy):
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
    splits = open_splits("folder", str(copy))                        # a start does not read the pixels
    splits.train.source(7)
    findings = check.check(splits, 2, pytest.fail)
    assert [bad[:3] for bad in findings.bad] == [("train", 7, splits.train.name(7))] and "SHA-256" in findings.bad[0][3]
    os.truncate(copy / "train.pixels", place)                        # during a run
    for read in (splits.train.source, splits.train.__getitem__, splits.train.content):
        with pytest.raises(ImageError, match="incomplete; delete the folder and prepare"):
            read(7)
    splits.train.source(6)


def test_prepared_images_have_the_requested_classes(tmp_path):
    root = tree(tmp_path / "files", {f"{split}/{name}": count for split in ("train", "val") for name, count in
                                     (("10", 3), ("2", 1), ("9", 2))})
    make(Path(root), tmp_path / "set")
    for rule in (ClassRule(), ClassRule("text"), ClassRule(None, ("9", "10", "2"))):
        files, prepared = (open_splits("folder", str(place), rule=rule) for place in (root, tmp_path / "set"))
        assert files.classes == prepared.classes and prepared.prepared == SIZE
        names = [{split.name(index).removeprefix(f"prepared-{SIZE}/"): (int(split.targets[index]), split[index][1])
                  for index in range(len(split))} for split in (files.train, prepared.train)]
        assert names[0] == names[1]
