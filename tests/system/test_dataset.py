"""python dataset.py: check and prepare."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from miniatures import GOOD_TREE, csv_files, tree
from PIL import Image

import dataset
from utils import config
from utils.data import datasets

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ["--dataset", "folder", "--data_dir", "tree"]


@pytest.fixture(autouse=True)
def small_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree(Path("tree"), GOOD_TREE)


def test_check_lists_images_that_cannot_be_read(capsys):
    assert dataset.main(["check", *FOLDER]) == 0
    printed = capsys.readouterr()
    assert "train: 5 images of 2 classes" in printed.out and "every image can be read" in printed.out and not printed.err
    Path("tree/train/bee/1.png").write_bytes(b"not an image")
    Path("tree/train/bee/1.avif").touch()
    assert dataset.main(["check", *FOLDER, "--num_workers", "0"]) == 2
    printed = capsys.readouterr()
    assert "tree/train/bee/1.png" in printed.out and "warning: skipped because of their extension: 1 .avif" in printed.out
    assert printed.err == (
        "dataset.py: error: 1 image cannot be read: output/bad_images.txt lists them. Replace or remove them, or train with "
        "--bad_images skip --max_bad_images 0.2 (validation and test images must be readable)\n")
    assert "tree/train/bee/1.png" in Path("output/bad_images.txt").read_text() and len(os.listdir("output")) == 1
    assert dataset.main(["check", *FOLDER, "--output_dir", "other", "--val_fraction", "0.5", "--split_seed", "3"]) == 2
    assert "val: " in capsys.readouterr().out and Path("other/bad_images.txt").exists()


def test_the_output_folder_is_checked_only_when_something_is_written(capsys):
    """logs and output, the folders of a run, are files here."""
    Path("logs").touch()
    Path("output").touch()
    assert dataset.main(["check", *FOLDER]) == 0 and dataset.main(["prepare", "whole", *FOLDER]) == 0
    Path("tree/train/bee/1.png").write_bytes(b"not an image")
    capsys.readouterr()
    assert dataset.main(["check", *FOLDER]) == 2
    printed = capsys.readouterr()
    assert printed.err == "dataset.py: error: --output_dir output: output is a file, not a folder\n"
    assert "tree/train/bee/1.png" in printed.out


def test_prepared_images_replace_the_files(capsys):
    assert dataset.main(["prepare", "whole", *FOLDER]) == 0
    assert capsys.readouterr().out.endswith("whole: 8 images. Train on them with --data_dir " + os.path.abspath("whole") + "\n")
    assert dataset.main(["prepare", "small", "--size", "5", *FOLDER, "--num_workers", "2"]) == 0
    sides = [min(datasets.open_splits("folder", name).train[0][0].size) for name in ("tree", "whole", "small")]
    assert sides[0] == sides[1] > sides[2] == 5
    shutil.rmtree("tree")
    assert dataset.main(["check", "--dataset", "folder", "--data_dir", "small"]) == 0


def test_lists_are_read_as_in_training(capsys):
    csv_files(Path("lists/images"))
    Path("lists/legend.csv").write_text("user.id,image,age,mood\n" + "".join(f"7,{name},3,{name > 'c'}\n" for name in "abcdef"))
    lists = ["--dataset", "csv", "--data_dir", "lists", "--label_column", "mood", "--image_dir", "images"]
    assert dataset.main(["check", *lists, "--val_fraction", "0.34"]) == 0
    columns = "legend.csv: paths from column image, labels from column mood; images in lists/images\n"
    printed = capsys.readouterr().out
    assert columns in printed and "val: 2 images of 2 classes" in printed
    assert dataset.main(["prepare", "small", *lists, "--path_column", "image"]) == 0 and columns in capsys.readouterr().out
    assert datasets.open_splits("csv", "small", val_fraction=0.34).classes == ("False", "True")
    assert dataset.main(["check", *lists[:4], "--val_fraction", "0.34"]) == 2
    assert "Add --label_column" in capsys.readouterr().err


def test_prepare_skips_bad_images_with_the_flags_that_it_names(capsys):
    """An unreadable held-out image cannot be skipped, so no flags are named."""
    Path("tree/train/bee/1.png").write_bytes(b"not an image")
    assert dataset.main(["prepare", "out", *FOLDER]) == 2
    printed, skip = capsys.readouterr().err, ["--bad_images", "skip", "--max_bad_images", "0.2"]
    assert "bad_images.txt lists them" in printed and f"or skip them with {' '.join(skip)} (validation" in printed
    held_out = next(Path("tree/val").rglob("*.png"))
    content = held_out.read_bytes()
    held_out.write_bytes(b"not an image")
    Path("tree/train/bee/1.png").rename("kept.png")
    assert dataset.main(["check", *FOLDER]) == 2 and capsys.readouterr().err.endswith("Replace or remove them\n")
    held_out.write_bytes(content)
    Path("kept.png").rename("tree/train/bee/1.png")
    assert dataset.main(["prepare", "out", *FOLDER, *skip]) == 0 and "7 images, 1 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "words"), [
    (["train"], "COMMAND must be check or prepare, got 'train'."), (["prepare"], "FOLDER is missing"),
    (["prepare", "out", "--size", "0"], "--size must be 1 or more, got 0"),
    (["prepare", "out", *FOLDER, "--val_fraction", "0.1"], "--val_fraction"),
    (["check", "--num_steps", "1"], "--num_steps"),
    (["check", "--data_dir", "tree"], "--data_dir only has an effect with --dataset folder (DATASET=folder) for your"),
    (["check", *FOLDER, "--split_seed", "1"], "--split_seed only has an effect with --val_fraction or --test_fraction."),
    (["prepare", "out", *FOLDER, "--max_bad_images", "1"], "--max_bad_images only has an effect with --bad_images skip."),
    (["check", "--dataset", "folder", "--data_dir", "gone"], "--data_dir gone: no such folder"),
    (["prepare", "tree/out", *FOLDER], "is inside the data set")])
def test_a_bad_command_line_is_reported_in_one_line(argv, words, capsys):
    assert dataset.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("dataset.py: error: ") and words in printed.err
    assert printed.err.count("\n") == 1 and not printed.out
    assert sorted(os.listdir()) in (["tree"], ["out.building", "tree"])


def test_the_data_set_follows_from_the_recipe(capsys):
    assert dataset.main(["check"]) == 0 and "train: 1,097 images" in capsys.readouterr().out           # the digits
    flags = config.parse(["--recipe", "bit-hyperrule", "--dataset", "csv"], "dataset.py check", dataset.DATASET_FLAGS["check"])
    assert config.choose(flags).dataset == "csv"


@pytest.mark.parametrize("variables", ["RANK=1", "WORLD_SIZE=3", "LOCAL_RANK=1", "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1"])
def test_variables_of_a_launcher_are_ignored(variables, monkeypatch, capsys):
    """Job systems set these for other programs. dataset.py runs in one process, and errors keep their line and exit code."""
    for word in variables.split():
        monkeypatch.setenv(*word.split("="))
    assert dataset.main(["check"]) == 0 and "train: 1,097 images" in capsys.readouterr().out
    for word in variables.split():
        monkeypatch.setenv(*word.split("="))
    Path("tree/train/bee/1.png").write_bytes(b"not an image")
    assert dataset.main(["check", *FOLDER]) == 2 and "1 image cannot be read" in capsys.readouterr().err


def test_a_tilde_in_a_flag_is_expanded(monkeypatch, capsys, tmp_path):
    """The shell does not expand it in --data_dir=~/tree."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dataset.main(["check", "--dataset=folder", "--data_dir=~/tree"]) == 0
    assert dataset.main(["prepare", "~/out", "--dataset=folder", "--data_dir=~/tree"]) == 0 and (tmp_path / "out").is_dir()


def test_ctrl_c_keeps_what_is_prepared():
    draw = np.random.default_rng(1)
    for number in range(300):
        image = Image.fromarray(draw.integers(0, 256, (200, 300, 3), np.uint8))
        path = Path("large", "train" if number < 290 else "val", "ab"[number % 2], f"{number}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    command = ["prepare", "out", "--dataset", "folder", "--data_dir", "large", "--size", "64", "--num_workers", "1"]
    process = subprocess.Popen([sys.executable, ROOT / "dataset.py", *command], stderr=subprocess.PIPE, text=True)
    digests, deadline = Path("out.building/train.digests"), time.monotonic() + 100
    while not (digests.exists() and any(digests.read_bytes())) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].endswith("stopped: what is prepared is kept, the same command continues\n")
    assert process.returncode == 143 and not Path("out").exists()
    assert dataset.main(command) == 0 and not Path("out.building").exists()
    assert dataset.main(["prepare", "again", *command[2:]]) == 0
    first, again = ({file.name: file.read_bytes() for file in Path(name).iterdir()} for name in ("out", "again"))
    assert first == again
