"""A model with each mechanism of today's families, from a folder of timm or transformers to the end: fine-tuned without a model
name, stopped, resumed, evaluated, drawn, used for predictions and exported; then the export is used for predictions too.
"""

import csv
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from galleries import picture
from originals import HEADS
from PIL import Image
from rig import UNSET, until
from runs import comparable, differences, events_of, load_state, whole_and_killed
from start_folders import MECHANISMS, start_folder

import export
import predict
import train
import visualize
from models import load_model
from models.__main__ import describe
from utils.report import plots, summary
from utils.run import checkpoint

ROOT = Path(__file__).resolve().parents[2]
CLASSES, STEPS = ("blue", "green", "red"), 30
FLAGS = ("--optimizer", "adamw", "--learning_rate", "3e-3", "--randaugment_ops", "0", "--train_batch_size", "12",
         "--save_every", "5", "--eval_every", "10", "--layer_decay", "0.9", "--ema_decay", "0.8", "--drop_path_rate", "0.1")


def discs(root: Path, counts: dict[str, int]) -> Path:
    """Write images of 44 x 40 pixels that show a disc on a gradient. The color of the disc is the class."""
    number = 0
    for split, count in counts.items():
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for image in range(count):
                number += 1
                pixels = picture(number, 40, 44)
                pixels[pixels[..., 0] == 250] = np.eye(3, dtype=np.uint8)[2 - label] * 200 + 30
                Image.fromarray(pixels).save(root / split / name / f"{image}.png")
    return root


def train_sh(folder: Path, *flags: object, **variables: object) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    return subprocess.Popen(
        ["bash", "train.sh", "--output_dir", str(folder), "--log_dir", str(folder.parent / "logs"), *map(str, flags)], cwd=ROOT,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=environment | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "GPUS": "cpu"}
        | {name: str(value) for name, value in variables.items()})


def end(process: subprocess.Popen, code: int = 0) -> str:
    """Wait for the end. Return what the process printed."""
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == code and "Traceback" not in printed, printed
    return printed


def call(program, capfd, *words: object) -> str:
    """Call the program. Return what it printed to standard output."""
    capfd.readouterr()
    code = program.main([str(word) for word in words])
    printed = capfd.readouterr()
    assert code == 0, printed.err
    return printed.out


def rows(printed: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(printed)))


def check_the_model(run: Path, folder: Path, name: str) -> None:
    """Assert that the folder is described correctly, and that the run has its sizes and its preprocessing."""
    start, model = MECHANISMS[name], load_model(run)
    assert describe(str(folder))[1].startswith(f"model: {start.said} (MODEL_TYPE={start.row}, with the sizes of the file)")
    assert model.config.classifier == start.reads and model.config.num_heads == HEADS and model.img_size == (32, 32)
    assert (model.config.mean, model.config.interpolation) == ((0.4, 0.5, 0.6), "bicubic")


def evaluated(monkeypatch, capfd, *flags: object) -> tuple[dict, str]:
    """Evaluate. Return (metrics by split, the printed lines about them)."""
    kept = {}
    with monkeypatch.context() as patch:
        real = summary.print_evaluation
        patch.setattr(summary, "print_evaluation", lambda split, metrics, *more: (
            kept.update({split: metrics}), real(split, metrics, *more)))
        printed = call(train, capfd, "--eval_only", "--device", "cpu", "--confusion_matrix", *flags)
    return kept, "\n".join(line for line in printed.splitlines() if "accuracy" in line)


def check_evaluation_and_predictions(run: Path, data: Path, folder: Path, monkeypatch, capfd) -> None:
    """Assert that predict.py counts what --eval_only counts, to the last image, and that the exported folder gives the results
    of the run in both."""
    figures, printed = evaluated(monkeypatch, capfd, "--resume_path", run / "best.pt")
    again, of_folder = evaluated(monkeypatch, capfd, "--pretrained_dir", folder, "--head", "keep", "--dataset", "folder",
                                 "--data_dir", data, "--precision", load_state(run / "best.pt").config["precision"])
    assert printed == of_folder != "" and figures.keys() == again.keys() != set()
    for split, metrics in figures.items():
        found = rows(call(predict, capfd, run, "--split", split, "--device", "cpu"))
        assert len(found) == metrics.images == 5 * len(CLASSES)
        counted = np.zeros((len(CLASSES),) * 2, int)
        for row in found:
            counted[CLASSES.index(row["true"]), CLASSES.index(row["predicted"])] += 1
        assert counted.tolist() == metrics.confusion.tolist() == again[split].confusion.tolist()
        assert np.mean([float(row["loss"]) for row in found]) == pytest.approx(metrics.loss, abs=1e-5)
    of_run, of_folder = (rows(call(predict, capfd, model, data / "test", "--device", "cpu")) for model in (run, folder))
    assert of_run == of_folder and len(of_run) == 5 * len(CLASSES) and {row["label"] for row in of_run} <= set(CLASSES)


def check_pictures(run: Path, image: Path, place: Path, monkeypatch, capfd) -> None:
    """Assert that the pictures show attention over the 8 x 8 patches that is not the same everywhere."""
    drawn, real = [], plots.save
    with monkeypatch.context() as patch:
        patch.setattr(plots, "save", lambda figure, path: (drawn.append(figure), real(figure, path)))
        for picture in ("attention", "rollout"):
            call(visualize, capfd, picture, "--checkpoint", run, "--image", image, "--output", place / f"{picture}.png")
            heat = np.asarray(drawn[-1].axes[1].images[0].get_array())
            assert heat.shape[0] % 8 == 0 and np.unique(heat.round(9)).size > 8
            if (file := place / f"{picture}.png").stat().st_size:         # run_train draws nothing
                assert np.asarray(Image.open(file).convert("L")).std() > 10


def check_the_rest(run: Path, name: str, data: Path, place: Path, monkeypatch, capfd) -> None:
    check_the_model(run, place / "start", name)
    exported = place / "exported"
    if MECHANISMS[name].reads == "token_mean":               # timm does not have it: docs/export.md
        call(export, capfd, run, "--to", "torch", "--output", f"{exported}.pt2")
        exported = run
    else:
        call(export, capfd, run, "--to", "folder", "--output", exported)
    check_evaluation_and_predictions(run, data, exported, monkeypatch, capfd)
    check_pictures(run, next((data / "test").rglob("*.png")), place, monkeypatch, capfd)


def test_one_mechanism_from_start_folder_to_export(tmp_path, run_train, monkeypatch, capfd):
    """In this process. The next test runs the scripts, for all mechanisms."""
    name, data = "DINOv2 with registers", discs(tmp_path / "data", {"train": 8, "val": 4, "test": 5})
    start = start_folder(tmp_path / "start", name)
    whole_and_killed(run_train, monkeypatch, "--dataset", "folder", "--data_dir", data, "--pretrained_dir", start, *FLAGS)
    check_the_rest(Path("whole/r").resolve(), name, data, tmp_path, monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_from_start_folder_to_export(name, tmp_path, tries, monkeypatch, capfd):
    if not tries(0, 1):
        pytest.skip("half a minute each: with --full")
    data, start = discs(tmp_path / "data", {"train": 20, "val": 4, "test": 5}), start_folder(tmp_path / "start", name)
    flags, wanted = (*FLAGS, *MECHANISMS[name].flags), {"DATASET": "folder", "DATA_DIR": data, "NAME": "r", "NUM_STEPS": STEPS}
    end(train_sh(tmp_path / "whole", *flags, **wanted, PRETRAINED_DIR=start))
    whole, parts = tmp_path / "whole" / "r", tmp_path / "parts" / "r"
    losses = [event["loss"] for event in events_of(whole, ("train",))]
    assert len(losses) == STEPS and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]), losses

    process = train_sh(tmp_path / "parts", *flags, **wanted, PRETRAINED_DIR=start)
    try:
        until(lambda: parts.exists() and checkpoint.step_files(parts), 300, "a checkpoint")
        os.kill(process.pid, signal.SIGTERM)
        end(process, 143)
    finally:
        process.kill()
    assert load_state(checkpoint.step_files(parts)[0]).step < STEPS
    end(train_sh(tmp_path / "parts", RESUME_PATH=parts))
    for file in (f"step-{STEPS:08d}.pt", "best.pt"):
        assert not differences(comparable(whole / file), comparable(parts / file))
    assert events_of(whole) == events_of(parts)
    check_the_rest(parts, name, data, tmp_path, monkeypatch, capfd)
