"""The images that show the effect of edits, their predictions, and the attention loss in the summary.
tests/system/test_teaching.py tests the picture."""

import numpy as np
import pytest
from building import ONE_RANK, build_objects

from utils.attention.edits import Edit
from utils.data.splits import ArrayImages
from utils.report.attention_effect import ATTENTION_FILE, attention_loss_line, choose_images, draw, predict_with_attention

EDIT = Edit("train/0", "sha256:", np.full((2, 2), 0.9, np.float32), np.eye(2, dtype=bool))


def split(targets) -> ArrayImages:
    return ArrayImages(np.zeros((len(targets), 8, 8), np.uint8), targets, "val")


def test_images_are_of_a_class_each_and_those_with_edits_come_first():
    """Data in folders are sorted by class: the first four edits were all of the first class."""
    sorted_by_class = split(np.repeat(np.arange(5), 20))
    shown = choose_images(sorted_by_class, dict.fromkeys(range(60), EDIT), sorted_by_class, "val", dict.fromkeys(range(30), EDIT))
    assert [(image.kind, image.index, image.edit is not None) for image in shown] == [
        ("taught", 0, True), ("taught", 1, True), ("taught", 20, True), ("taught", 40, True),
        ("val", 0, True), ("val", 20, True), ("val", 1, True), ("val", 21, True)]
    shown = choose_images(sorted_by_class, {3: EDIT}, sorted_by_class, "val", {99: EDIT})
    assert [image.index for image in shown] == [3, 99, 0, 20, 40], "one edit, and other classes"


def test_a_run_keeps_the_images_that_it_began_with():
    """Also a run of earlier code, which chose other images, unless one of these is missing or no longer has an edit to learn."""
    data = split(np.repeat(np.arange(2), 10))
    names = ["taught: val/7", "taught: val/8", "val: val/19", "val: val/2"]
    edits = dict.fromkeys(range(10), EDIT)
    shown = choose_images(data, edits, data, "val", {2: EDIT}, names)
    assert [(image.kind, image.index, image.edit is not None) for image in shown] == [
        ("taught", 7, True), ("taught", 8, True), ("val", 19, False), ("val", 2, True)]
    assert choose_images(data, edits, data, "val", {}, [*names, "val: val/20"]) == choose_images(data, edits, data, "val", {})


def test_without_the_images_of_the_start_there_is_no_picture(tmp_path, capsys):
    (tmp_path / ATTENTION_FILE).write_bytes(b"of an earlier session")
    for before in (None, {"names": ["taught: val/7"]}):
        draw(tmp_path, "title", None, 0.0, [], [], before, {"names": []})
        assert "no picture of before and after" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_the_attention_loss_before_and_after_are_of_different_steps():
    """A run of two steps used to report 0.2624 twice."""
    square = "mean square of attention - edit"
    assert attention_loss_line([0.3, 0.1], 20) == [f"attention loss 0.3000 in the first step, 0.1000 in the last: {square}"]
    assert attention_loss_line([4, 2, 9, 1, 1], 20) == [
        f"attention loss 3.0000 in the first 2 steps, 1.0000 in the last 2: {square}"]
    assert attention_loss_line([0.5], 20) == [f"attention loss 0.5000 in the one step: {square}"]
    assert attention_loss_line([], 20) == []


def test_a_prediction_leaves_the_model_in_its_mode():
    objects = build_objects("--sigmoid_attention", "all", "--precision", "fp32")
    data, model = objects.data, objects.model
    shown = choose_images(data.splits.train, {3: EDIT}, data.splits.test, "test", {})
    model.train()
    built, transform = objects.built, data.eval_transform
    found = predict_with_attention(shown, model, transform, built.normalize, built.precision, ONE_RANK.device)
    assert model.training and found["names"][:2] == ["taught: train/3", "test: test/0"]
    assert found["pixels"].shape == (5, 3, 8, 8) and found["attention"].shape == (5, 4, 4)
    assert found["probabilities"].sum(1).tolist() == pytest.approx([1] * 5)
