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


def chosen(run: dict, name: str = "val", path="output/r/best.pt", step=4, data_dir="tree", **fractions):
    config = run["config"] | {"data_dir": data_dir} | fractions
    drawn = {key: config[key] for key in ("val_fraction", "test_fraction", "split_seed")}
    return chosen_on(Path(path), run, step, config, open_splits("folder", data_dir, **drawn), name)


def test_images_that_best_pt_was_chosen_on_are_recognized(trained):
    run = trained(val_fraction=0.1)
    assert chosen(run) == 4 and chosen(run, "test") == chosen(run, path="step-00000004.pt") == chosen(run, "train") == 0
    assert chosen(run, step=run["config"]["num_steps"]) == 0, "the last step would have been reported anyway"
    assert chosen(run, val_fraction=0.5) + chosen(run, val_fraction=0.5, split_seed=1) > 4, "some are the same images"
    splits = open_splits("folder", "tree")
    assert chosen_on(Path("output/r/best.pt"), None, None, run["config"], splits, "val") == 0, "a file of another program"


def test_images_that_best_pt_was_chosen_on_are_recognized_in_another_split(trained):
    """A run chose on the folder val/, which is the test set once a val is drawn from train."""
    run = trained()
    assert chosen(run, "test", val_fraction=0.25) == 40 and chosen(run, "val", val_fraction=0.25) == 0
    shutil.copytree("tree", "moved")
    assert chosen(run, "test", data_dir="moved", val_fraction=0.25) == 40
    make_tree(Path("wood"), images=10)
    assert chosen(run, "test", data_dir="wood", val_fraction=0.25) == 0
    shutil.copy("tree/train/ant/0.png", "tree/train/ant/new.png")
    assert chosen(run, "test", val_fraction=0.25) is None, "the data have changed"


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
