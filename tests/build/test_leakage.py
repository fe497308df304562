"""Detection of held-out images that the start weights were trained on."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import make_tree

from utils.build.leakage import advise, chosen_on, seen_images, start_run, warning_of_seen
from utils.config import before
from utils.data.datasets import open_splits
from utils.data.splits import fingerprint
from utils.run.checkpoint import CheckpointError


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Return trained(**fractions) -> the header of a checkpoint of a run on `tree`, 2 classes of 20 images."""
    monkeypatch.chdir(tmp_path)
    make_tree(Path("tree"), images=20)

    def header(**fractions) -> dict:
        splits = open_splits("folder", "tree", **fractions)
        config = before() | {"dataset": "folder", "data_dir": "tree"} | fractions
        return {"config": config, "classes": list(splits.classes), "train_images": len(splits.train),
                "data": fingerprint(splits.train)}

    return header


def seen(start: dict, data_dir="tree", **fractions):
    return seen_images(start, "folder", data_dir, open_splits("folder", data_dir, **fractions))


def test_images_that_best_pt_was_chosen_on_are_recognized():
    """They are the same split of the same data as in the run."""
    run = before() | {"dataset": "folder", "data_dir": "tree", "val_fraction": 0.1}
    splits, best = SimpleNamespace(val_name="val"), Path("output/r/best.pt")
    assert chosen_on(best, run, 4, run, splits, "val")
    assert not chosen_on(best, run, 4, run, splits, "test")
    assert not chosen_on(Path("step-00000004.pt"), run, 4, run, splits, "val")
    assert not chosen_on(best, run, run["num_steps"], run, splits, "val"), "the last step would have been reported anyway"
    for name, value in (("data_dir", "study"), ("val_fraction", 0.2), ("split_seed", 1)):
        assert not chosen_on(best, run, 4, run | {name: value}, splits, "val")
    assert not chosen_on(best, None, None, run, splits, "val"), "a file of another program with that name"


def test_held_out_images_that_were_trained_on_are_counted(trained):
    whole, part = trained(), trained(val_fraction=0.1)
    assert seen(whole) == seen(part) == seen(part, val_fraction=0.1) == seen(part, val_fraction=0.05) == {}
    assert seen(whole, val_fraction=0.1) == {"val": 4} and seen(part, val_fraction=0.2) == {"val": 4}
    assert seen(part, val_fraction=0.1, split_seed=4)["val"] > 0
    assert 0 < seen(whole, test_fraction=0.25)["test"] < 20    # some of its 20 are from val/, not trained on
    assert seen(trained(test_fraction=0.25), val_fraction=0.5)["val"] > 0


def test_only_images_of_the_same_data_are_counted(trained):
    """The same images in another folder count, another data set does not."""
    start = trained()
    shutil.copytree("tree", "moved")
    assert seen(start, "moved", val_fraction=0.1) == {"val": 4}
    make_tree(Path("wood"), images=10)
    assert seen(start, "wood", val_fraction=0.1) == {}
    assert seen_images(start, "digits", "", open_splits("digits", "", test_fraction=0.1)) == {}
    older = start | {"data": ""}                                   # without a fingerprint
    assert seen(older, val_fraction=0.1) == {"val": 4}


def test_changed_data_are_reported_instead_of_a_count(trained):
    start, whole = trained(val_fraction=0.1), trained()
    for name in ("ant", "bee"):
        shutil.copy(f"tree/train/{name}/0.png", f"tree/train/{name}/new.png")
    assert seen(start, val_fraction=0.1) is None and seen(whole) == {}
    sources = SimpleNamespace(dataset="folder", data_dir="tree", val_fraction=0.1, test_fraction=0.0, split_seed=0)
    text = warning_of_seen(start, "output/r/best.pt", sources, open_splits("folder", "tree", val_fraction=0.1))
    assert text.startswith("warning: the images in tree are not those that output/r/best.pt was trained on")


def test_the_warning_says_what_to_set(trained):
    drawn = {"val_fraction": 0.2, "test_fraction": 0.0, "split_seed": 0}
    sources, splits = SimpleNamespace(dataset="folder", data_dir="tree", **drawn), open_splits("folder", "tree", val_fraction=0.2)
    start = trained(val_fraction=0.1)
    assert warning_of_seen(start, "output/r/best.pt", sources, splits) == (
        "warning: output/r/best.pt was trained on 4 of 8 val images, so their accuracy means little. Hold out the same "
        "images as that run: --val_fraction 0.1 --split_seed 0")
    assert advise(trained(), drawn) == (
        "Train that run again, with the same images held out: --val_fraction 0.2 --split_seed 0")
    assert warning_of_seen(start, "p", sources, open_splits("folder", "tree", val_fraction=0.1)) == ""


def test_only_a_run_has_seen_images(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"")
    assert start_run("auto") is start_run("ViT-B_16") is start_run(str(tmp_path / "weights.pth")) is None
    with pytest.raises(CheckpointError):
        start_run(str(tmp_path))
