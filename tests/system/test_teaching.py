"""Step 2 as a user runs it: from step 1's checkpoint, with edits. Exact resume, the picture, and bad input."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import differences, events_of, mark, state_of

from models import load_model, record_patch_logits
from utils.attention import edits
from utils.data import datasets
from utils.report import pictures, plots
from utils.report.attention_effect import choose_images
from utils.run import checkpoint

STEP_2 = ("--pretrained_dir", "output/one", "--attention_edits", "edits", "--attention_loss_weight", 20, "--precision", "fp32")


KEPT: list[Path] = []            # the folder of `step_1`, which is made once


@pytest.fixture
def step_1(run_train, tmp_path_factory):
    """Make the run output/one and edits of a third of the training digits."""
    if not KEPT:
        assert run_train("--name", "one", "--learning_rate", 3e-3, "--num_steps", 8, "--eval_every", 8) == 0
        mark(Path("edits"))
        KEPT.append(shutil.copytree(".", tmp_path_factory.mktemp("step_1") / "kept"))
    else:
        shutil.copytree(KEPT[0], ".", dirs_exist_ok=True)


@pytest.fixture
def drawn(monkeypatch) -> list:
    """Return a list that receives the rows of each picture that a run draws."""
    rows = []
    monkeypatch.setattr(pictures, "before_and_after", lambda shown, title: rows.append(shown))
    return rows


def test_what_a_step_2_logs_and_writes(run_train, step_1, drawn, capsys):
    mark(Path("edits"), [7])
    test = datasets.DATASETS["digits"]("").test
    name = test.name(5)
    edits.write(edits.path_of(Path("edits"), name), edits.Edit(
        name, edits.checksum(test, 5), np.full((2, 2), 0.5, np.float32), np.eye(2, dtype=bool)))
    capsys.readouterr()
    assert run_train(*STEP_2, "--name", "two", "--num_steps", 12, "--eval_every", 12, "--learning_rate", 3e-3) == 0
    printed = capsys.readouterr().out
    assert "edits of 367 of 1097 training images supervise layer 4 of 4, weight 20" in printed
    assert "before" in printed and "annotate.py --checkpoint output/two" in printed
    assert "with --attention_loss_weight 0" in printed and "in the first " in printed
    before, after = ([event for event in events_of(f"output/{run}", ("eval",)) if event["split"] == "test"]
                     for run in ("one", "two"))
    assert after[0]["accuracy"] == before[-1]["accuracy"]                 # step 1's head and weights, unchanged
    losses = [event["attention_loss"] for event in events_of("output/two", ("train",))]
    assert losses[-1] < 0.7 * losses[0]
    event = events_of("output/two", ("train",))[0]
    assert event["loss"] > 20 * event["attention_loss"]

    rows, = drawn
    assert [row.kind for row in rows] == ["taught"] * 4 + ["test"] * 4
    assert np.isnan(rows[0].edit[2:]).all() and rows[0].edit[0, 0] == pytest.approx(0.9)
    coarse = np.kron(np.eye(2), np.ones((2, 2)))                          # shown on the patches of the model
    assert np.array_equal(np.isnan(rows[4].edit), coarse == 0) and rows[5].edit is None
    split, model = datasets.DATASETS["digits"]("").train, load_model(checkpoint.step_files(Path("output/two"))[0])
    taught = sorted(edits.find("edits", split))
    image, label = split[choose_images(split, dict.fromkeys(taught), test, "test", {})[1].index]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad(), record_patch_logits(model) as logits:
        probabilities = model(pixels).softmax(-1)[0]
    heat, predicted, probability = rows[1].after
    np.testing.assert_allclose(heat, logits[0].sigmoid().mean((0, 1, 2)).view(4, 4).numpy(), atol=1e-5)
    assert predicted == str(int(probabilities.argmax())) and probability == pytest.approx(float(probabilities[label]), abs=1e-5)
    assert rows[1].truth == str(label) and np.abs(heat - rows[1].before[0]).max() > 0.02


def test_a_resumed_step_2_is_exact(run_train, step_1, drawn):
    """The picture too: its attention before is that of the start, read from the checkpoint, also in another folder."""
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


def test_edits_must_not_change_before_a_resume(run_train, step_1, capsys):
    """Edits of training images belong to the run. Those of held-out images are only shown, and may change."""
    assert run_train(*STEP_2, "--name", "two", "--num_steps", 4) == 0
    edit_file = Path("edits/train/0.json")
    before = edit_file.read_text()
    edit_file.write_text(before.replace("0.9", "0.8", 1))
    capsys.readouterr()
    assert run_train("--resume_path", "output/two", "--num_steps", 6) == 2
    assert "are not the edits that the run began with" in capsys.readouterr().err
    edit_file.unlink()
    assert run_train("--resume_path", "output/two", "--num_steps", 6) == 2
    edit_file.write_text(before.replace('"who": ""', '"who": "me"'))          # the same edit
    shutil.move("edits", "moved")
    assert run_train("--resume_path", "output/two", "--attention_edits", "moved", "--num_steps", 6) == 0
    assert Path("output/two/attention.png").exists()
    test = datasets.DATASETS["digits"]("").test
    edits.write(edits.path_of("moved", test.name(5)), edits.Edit(
        test.name(5), edits.checksum(test, 5), np.full((4, 4), 0.5, np.float32), np.ones((4, 4), bool)))
    capsys.readouterr()
    assert run_train("--resume_path", "output/two", "--attention_edits", "moved", "--num_steps", 8) == 0
    printed = capsys.readouterr().out
    assert "attention.png" in printed and Path("output/two/attention.png").exists(), "of the images that the run began with"


def test_repeating_the_architecture_keeps_the_model_that_was_edited(run_train, capsys):
    """train.sh has the variables MODEL_TYPE and IMG_SIZE, and users who set them again mean the same model."""
    view = ("--eval_crop", 0.75, "--interpolation", "bicubic", "--img_size", 12)
    assert run_train("--name", "one", "--sigmoid_attention", "all", "--num_layers", 3, "--mlp_dim", 100, *view) == 0
    mark(Path("edits"))
    assert run_train(*STEP_2, "--name", "two", "--model_type", "ViT-Nano_2", "--num_layers", 3) == 0
    assert "supervise layer 1, 2, 3 of 3" in capsys.readouterr().out
    assert run_train(*STEP_2, "--name", "other", "--num_layers", 4) == 2 and "--num_layers" not in STEP_2
    config = state_of("output/two").config
    assert config["eval_crop"] == 0.75 and config["interpolation"] == "bicubic" and config["img_size"] == 12
    before = [event for event in events_of("output/one", ("eval",)) if event["split"] == "test"][-1]
    assert before["accuracy"] == events_of("output/two", ("eval",))[0]["accuracy"]
    assert run_train(*STEP_2, "--name", "three", "--eval_crop", 0.5) == 0 and state_of("output/three").config["eval_crop"] == 0.5


def test_an_edit_is_drawn_where_it_was_made(run_train, step_1, drawn):
    """On the middle of the image, in a run that sees the whole image."""
    split = datasets.DATASETS["digits"]("").train
    edits.write(edits.path_of("edits", split.name(0)), edits.Edit(
        split.name(0), edits.checksum(split, 0), np.full((2, 2), 0.9, np.float32), np.ones((2, 2), bool),
        (0.25, 0.25, 0.75, 0.75)))
    assert run_train(*STEP_2, "--name", "two") == 0
    expected = np.full((4, 4), np.nan)
    expected[1:3, 1:3] = 0.9
    np.testing.assert_allclose(drawn[0][0].edit, expected, rtol=1e-6)


def test_edits_that_no_trained_weight_can_follow_are_refused(run_train, step_1, capsys):
    for flags in (("--train_layers", "head"), ("--freeze", "patch_embed*,cls*,pos*,blocks.[012].*,*.qkv.*,*norm1*")):
        assert run_train(*STEP_2, "--name", "two", *flags) == 2
        assert "nothing that the attention of layer 4 depends on is trained" in capsys.readouterr().err
    assert run_train(*STEP_2, "--name", "two", "--train_layers", 1) == 0


def test_the_averaged_weights_are_shown(run_train, step_1, drawn, capsys):
    """Edits of held-out images are not used for training."""
    assert run_train(*STEP_2, "--name", "two", "--test_fraction", 0.5, "--ema_decay", 0.999, "--learning_rate", 0.05) == 0
    assert 100 < int(capsys.readouterr().out.split("attention: edits of ")[1].split()[0]) < 300
    state, model = state_of("output/two"), load_model("output/two/step-00000004.pt")
    assert differences(state.model, state.ema)
    row = drawn[0][0]
    pixels = torch.from_numpy(np.array(row.image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        assert row.after[2] == pytest.approx(float(model(pixels).softmax(-1)[0, int(row.truth)]), abs=1e-5)


SPOILT = {
    "no folder": (lambda: shutil.rmtree("edits"), "edits"),
    "none": (lambda: [path.unlink() for path in Path("edits").rglob("*.json")], "annotate.py"),
    "under other names": (lambda: Path("edits/train").rename("edits/other"), "none of its 366 files, such as other/"),
    "half a file": (lambda: Path("edits/train/3.json").write_text('{"format": "attention-edit-1", "ima'), "3.json"),
    "of another image": (lambda: shutil.copy("edits/train/0.json", "edits/train/3.json"), "3.json"),
    "damaged, of a held-out image": (lambda: shutil.copytree("half", "edits/test"), "test/3.json")}


def test_unusable_edits_are_reported_in_one_line(run_train, step_1, capsys):
    """Before the run folder is created, and on every process: if only one stopped, the others would wait for it."""
    shutil.copytree("edits", "good")
    Path("half").mkdir()
    Path("half/3.json").write_text("{")
    for case, (spoil, words) in SPOILT.items():
        shutil.rmtree("edits", ignore_errors=True)
        shutil.copytree("good", "edits")
        spoil()
        capsys.readouterr()
        assert run_train(*STEP_2, "--name", "two") == 2, case
        printed = capsys.readouterr().err
        assert printed.startswith("train.py: error: ") and printed.count("\n") == 1 and words in printed, (case, printed)
        assert not Path("output/two").exists()


def test_the_picture_before_and_after(tmp_path):
    image, heat = np.zeros((8, 12, 3), np.uint8), np.linspace(0, 1, 6).reshape(2, 3)
    edit = np.array([[np.nan, 0.5, 1.0], [np.nan, np.nan, 0.0]])
    rows = [pictures.BeforeAfter("taught", image, "cat", (heat, "dog", 0.125), (heat / 2, "cat", 0.75), edit),
            pictures.BeforeAfter("test", image[..., :1], "dog", (heat, "dog", 0.5), (heat, "dog", 0.625), None)]
    figure = pictures.before_and_after(rows, "two: attention")
    axes = np.array(figure.axes[:8]).reshape(2, 4)
    for panel, expected in ((axes[0, 1], heat), (axes[0, 3], heat / 2)):
        np.testing.assert_array_equal(panel.images[-1].get_array(), expected)
        assert panel.images[0].get_array().shape == image.shape, "over the image"
    np.testing.assert_array_equal(np.ma.filled(axes[0, 2].images[-1].get_array().astype(float), np.nan), edit)
    assert axes[0, 1].get_xlabel() == "predicted: dog\ntrue class: 12.5%" and axes[0, 1].xaxis.label.get_color() == "tab:red"
    assert axes[0, 3].get_xlabel() == "predicted: cat\ntrue class: 75.0%" and axes[0, 3].xaxis.label.get_color() == "tab:green"
    assert not axes[1, 2].images and all(axis.images[-1].get_clim() == (0, 1) for axis in axes[:, 1::2].flat)
    assert figure.get_suptitle() == "two: attention" and "sigmoid" in figure.axes[8].get_xlabel()
    plots.save(figure, tmp_path / "picture.png")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
