"""Which images show what edits did, and what is predicted of them (the picture: tests/system/test_teaching.py)."""

import numpy as np
import pytest
from building import ALONE, build_objects

from utils.attention.edits import Edit
from utils.report.attention_effect import choose_images, predict_with_attention

EDIT = Edit("train/0", "sha256:", np.full((2, 2), 0.9, np.float32), np.eye(2, dtype=bool))


@pytest.fixture
def objects():
    return build_objects("--sigmoid_attention", "all", "--precision", "fp32")


def test_images_are_spread_evenly_and_those_with_edits_come_first(objects):
    train, test = objects.data.splits.train, objects.data.splits.test
    shown = choose_images(train, dict.fromkeys(range(0, 80, 10), EDIT), test, "test", {499: EDIT})
    assert [(image.kind, image.index, image.edit is not None) for image in shown] == [
        *(("taught", index, True) for index in (0, 20, 40, 60)), ("test", 499, True),
        *(("test", index, False) for index in (0, 125, 250))]


def test_a_prediction_leaves_the_model_in_its_mode():
    objects = build_objects("--sigmoid_attention", "all", "--precision", "fp32")
    data, model = objects.data, objects.model
    shown = choose_images(data.splits.train, {3: EDIT}, data.splits.test, "test", {})
    model.train()
    built, transform = objects.built, data.eval_transform
    found = predict_with_attention(shown, model, transform, built.normalize, built.precision, ALONE.device)
    assert model.training and found["names"][:2] == ["taught: train/3", "test: test/0"]
    assert found["pixels"].shape == (5, 3, 8, 8) and found["attention"].shape == (5, 4, 4)
    assert found["probabilities"].sum(1).tolist() == pytest.approx([1] * 5)
