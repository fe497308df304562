"""Step 2 as a user runs it: from step 1's checkpoint, with edits; exact resume; the picture; what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import differences, events_of, mark, state_of

from models import load_model, record_patch_logits
from utils import checkpoint, datasets, edits, pictures, plots

STEP_2 = ("--pretrained_dir", "output/one", "--attention_edits", "edits", "--attention_loss_weight", 20)


@pytest.fixture
def step_1(run_train):
    """The run output/one, and edits of a third of the training digits"""
    assert run_train("--name", "one", "--learning_rate", 3e-3, "--num_steps", 8, "--eval_every", 8) == 0
    mark(Path("edits"))


def test_what_a_step_2_says_and_leaves(run_train, step_1, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "before_and_after", lambda rows, title: drawn.append((rows, title)))
    mark(Path("edits"), [7])
    test = datasets.DATASETS["digits"]("").test
    name = test.name(5)
    edits.write(edits.path_of(Path("edits"), name), edits.Edit(
        name, edits.checksum(test, 5), np.full((2, 2), 0.5, np.float32), np.eye(2, dtype=bool)))
    capsys.readouterr()
    assert run_train(*STEP_2, "--name", "two", "--num_steps", 12, "--eval_every", 12, "--learning_rate", 3e-3) == 0
    said = capsys.readouterr().out
    assert "edits of 367 of 1097 training images teach layer 4 of 4, weight 20" in said
    assert "before" in said and "annotate.py --checkpoint output/two" in said
    before, after = ([event for event in events_of(f"output/{run}", ("eval",)) if event["split"] == "test"]
                     for run in ("one", "two"))
    assert after[0]["accuracy"] == before[-1]["accuracy"]                 # step 1's head and weights, as they were
    losses = [event["attention_loss"] for event in events_of("output/two", ("train",))]
    assert losses[-1] < 0.7 * losses[0]
    event = events_of("output/two", ("train",))[0]
    assert event["loss"] > 20 * event["attention_loss"]

    (rows, title), = drawn
    assert "two" in title and [row.kind for row in rows] == ["taught"] * 4 + ["test"] * 4
    assert np.isnan(rows[0].edit[2:]).all() and rows[0].edit[0, 0] == pytest.approx(0.9)
    assert np.isnan(rows[4].edit).tolist() == [[False, True], [True, False]] and rows[5].edit is None
    split, model = datasets.DATASETS["digits"]("").train, load_model(checkpoint.step_files(Path("output/two"))[0])
    image, label = split[sorted(edits.find("edits", split))[1]]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad(), record_patch_logits(model) as logits:
        probabilities = model(pixels).softmax(-1)[0]
    heat, predicted, probability = rows[1].after
    np.testing.assert_allclose(heat, logits[0].sigmoid().mean((0, 1, 2)).view(4, 4).numpy(), atol=1e-5)
    assert predicted == str(int(probabilities.argmax())) and probability == pytest.approx(float(probabilities[label]), abs=1e-5)
    assert rows[1].truth == str(label) and np.abs(heat - rows[1].before[0]).max() > 0.02


def test_a_step_2_that_goes_on_is_exact(run_train, step_1, monkeypatch):
    """Also the picture: attention before is that of the start, from the checkpoint, in another folder too."""
    drawn = []
    monkeypatch.setattr(pictures, "before_and_after", lambda rows, title: drawn.append(rows))
    flags = (*STEP_2, "--augmentation", "pad_flip", "--save_every", 4, "--eval_every", 4, "--sigmoid_attention", "all")
    assert run_train(*flags, "--name", "whole", "--num_steps", 8) == 0
    shutil.copytree("output/whole", "output/part")
    for file in ("step-00000008.pt", "best.pt", "attention.png"):
        Path("output/part", file).unlink()
    assert run_train("--resume_path", "output/part", "--name", "branch") == 0
    whole, part = state_of("output/whole"), state_of("output/branch")
    assert not differences(whole.model, part.model) and not differences(whole.optimizer, part.optimizer)
    assert events_of("output/whole") == events_of("output/branch")
    for one, two in zip(*drawn):
        assert np.array_equal(one.before[0], two.before[0]) and np.array_equal(one.after[0], two.after[0])
    assert Path("output/branch/attention.png").exists()


def test_edits_that_change_on_the_way_leave_no_picture(run_train, step_1, capsys):
    assert run_train(*STEP_2, "--name", "two") == 0
    Path("output/two/attention.png").unlink()
    Path("edits/train/0.json").unlink()
    assert run_train("--resume_path", "output/two", "--num_steps", 6) == 0
    assert "no picture" in capsys.readouterr().out and not Path("output/two/attention.png").exists()


def test_micro_steps_change_nothing(run_train, step_1):
    for name, parts in (("whole", 1), ("cut", 4)):
        assert run_train(*STEP_2, "--name", name, "--gradient_accumulation_steps", parts, "--optimizer", "sgd") == 0
    for one, two in zip(events_of("output/whole", ("train",)), events_of("output/cut", ("train",))):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["attention_loss"] == pytest.approx(two["attention_loss"], rel=1e-5)


def test_with_held_out_images_and_an_average(run_train, step_1, capsys):
    """Edits of images that are held out do not teach."""
    assert run_train(*STEP_2, "--name", "two", "--test_fraction", 0.5, "--ema_decay", 0.9) == 0
    said = capsys.readouterr().out
    taught = int(said.split("edits of ")[1].split()[0])
    assert 100 < taught < 300 and Path("output/two/attention.png").exists()


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda: shutil.rmtree("edits"), "edits"),
    (lambda: [path.unlink() for path in Path("edits").rglob("*.json")], "annotate.py"),
    (lambda: Path("edits/train/3.json").write_text('{"format": "attention-edit-1", "ima'), "3.json"),
    (lambda: Path("edits/train/3.json").write_text(Path("edits/train/0.json").read_text()), "3.json")],
    ids=["no folder", "none", "half a file", "of another image"])
def test_edits_that_cannot_teach_are_one_line(run_train, step_1, capsys, spoil, words):
    spoil()
    capsys.readouterr()
    assert run_train(*STEP_2, "--name", "two") == 2
    said = capsys.readouterr().err
    assert said.startswith("train.py: error: ") and said.count("\n") == 1 and words in said
    assert not list(Path("output").glob("two/*.pt"))


def test_classes_of_another_task_are_refused(run_train, step_1, capsys):
    state = state_of("output/one")
    state.classes = list("abcdefghij")
    checkpoint.save(Path("output/one/best.pt"), state)
    assert run_train(*STEP_2) == 2 and "other classes" in capsys.readouterr().err


def test_the_picture(tmp_path):
    image, heat = np.zeros((8, 12, 3), np.uint8), np.linspace(0, 1, 6).reshape(2, 3)
    edit = np.array([[np.nan, 0.5, 1.0], [np.nan, np.nan, 0.0]])
    rows = [pictures.Taught("taught", image, "cat", (heat, "dog", 0.125), (heat / 2, "cat", 0.75), edit),
            pictures.Taught("test", image[..., :1], "dog", (heat, "dog", 0.5), (heat, "dog", 0.625), None)]
    figure = pictures.before_and_after(rows, "two: attention")
    axes = np.array(figure.axes[:8]).reshape(2, 4)
    np.testing.assert_array_equal(axes[0, 1].images[0].get_array(), heat)
    np.testing.assert_array_equal(axes[0, 3].images[0].get_array(), heat / 2)
    np.testing.assert_array_equal(np.ma.filled(axes[0, 2].images[0].get_array().astype(float), np.nan), edit)
    assert axes[0, 1].get_xlabel() == "says dog; true class 12.5%" and axes[0, 1].xaxis.label.get_color() == "tab:red"
    assert axes[0, 3].get_xlabel() == "says cat; true class 75.0%" and axes[0, 3].xaxis.label.get_color() == "tab:green"
    assert not axes[1, 2].images and all(axis.images[0].get_clim() == (0, 1) for axis in axes[:, 1::2].flat)
    assert figure.get_suptitle() == "two: attention" and "sigmoid" in figure.axes[8].get_ylabel()
    plots.save(figure, tmp_path / "picture.png")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
