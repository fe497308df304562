"""python dataset.py check and prepare, as a user types them."""

import shutil
from pathlib import Path

import pytest
from runs import make_tree

import dataset
from utils.data import datasets

DATA = ["--dataset", "folder", "--data_dir", "tree"]


def test_check_lists_images_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bad = make_tree(Path("tree")) / "train" / "bee" / "2.png"
    bad.write_bytes(b"not an image")
    assert dataset.main(["check", *DATA]) == 2
    printed = capsys.readouterr()
    assert "tree/train/bee/2.png" in printed.out and "1 images cannot be read: output/bad_images.txt" in printed.err
    assert [path.name for path in Path("output").iterdir()] == ["bad_images.txt"]
    bad.unlink()
    assert dataset.main(["check", *DATA]) == 0 and "every image can be read" in capsys.readouterr().out


def test_prepared_images_replace_their_files(run_train, capsys):
    """tests/data/test_prepared.py tests what is stored."""
    make_tree(Path("tree"))
    assert dataset.main(["prepare", "small", *DATA, "--size", "5"]) == 0 and "small" in capsys.readouterr().out
    assert dataset.main(["prepare", "large", *DATA]) == 0
    sides = [min(datasets.load_splits("folder", name).train[0][0].size) for name in ("small", "large")]
    assert sides[0] == 5 < sides[1]
    shutil.rmtree("tree")
    assert dataset.main(["check", "--dataset", "folder", "--data_dir", "small"]) == 0
    flags = ["--name", "r", *DATA[:2], "--model_type", "ViT-Nano_2", "--recipe", "digits"]
    assert run_train(*flags, "--data_dir", "small") == 0             # its model takes 8 x 8
    assert "they are enlarged; prepare them with python dataset.py prepare --size 9" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "words"), [
    (["clean"], "clean: must be check or prepare"), (["prepare"], "FOLDER"), (["check", "--seed", "1"], "--seed"),
    (["prepare", "small", "--size", "0"], "--size: must be 1 or more"),
    (["check", "--dataset", "folder", "--data_dir", "no/such"], "no/such"),
    (["check", "--split_seed", "3"], "--split_seed only has an effect with"),
    (["prepare", "small", "--max_bad_images", "0.1"], "--max_bad_images only has an effect with")], ids=str)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    assert dataset.main(argv) == 2
    text = capsys.readouterr().err
    assert text.startswith("dataset.py: error: ") and text.count("\n") == 1 and words in text
