"""The last words of a run."""

import dataclasses
import types
from pathlib import Path

import pytest
import torch

from utils import launch
from utils.config import Facts, parse, resolve
from utils.files import StorageError
from utils.report import plots, summary
from utils.run.log import write_log
from utils.run.run import History
from utils.training import evaluation
from utils.training.evaluation import EvalMetrics

RESULT = EvalMetrics(200, 0.5, 0.8, 0.9, 0.95, 0.97, 0.99, 0.7, 0.0312)


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """printed(first, best, events, *flags, failed) -> the lines that are printed of a run in the folder `r s`"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIT_CALLED_FROM", raising=False)
    monkeypatch.setattr(launch, "ROOT", tmp_path.resolve())
    monkeypatch.setattr(plots, "save", lambda figure, path: Path(path).touch())
    Path("r s").mkdir()

    def run(first: dict, best: dict, events=(), *flags, failed=None) -> list[str]:
        write_log(Path("r s"), list(events))
        run = types.SimpleNamespace(
            config=resolve(parse(["--pretrained_dir", "none", "--name", "r", *flags]), Facts(1097, 10)), seconds=7.0,
            history=History(first=first, result=dataclasses.replace(RESULT, confusion=torch.eye(10))),
            outputs=types.SimpleNamespace(
                folder=Path("r s"), log_folder=Path("logs/r"), saver=types.SimpleNamespace(best=best)))
        splits = types.SimpleNamespace(classes=tuple("0123456789"), val_name="val")
        summary.print_summary(run, splits, "test", ["10/s", "of 20"], [] if failed is None else failed)
        return capsys.readouterr().out.splitlines()

    return run


def test_results_and_where_they_are(printed):
    Path("r s/bad_images.txt").write_text("a.png: cut off\nb.png: cut off\n")
    lines = printed({"accuracy": 0.1, "split": "test"}, {"accuracy": 0.85, "step": 40})
    for line in ("Done: step 100 of 100, 7 s.", "  test accuracy  10.00% before, 80.00% after (200 images)",
                 "  top-1 to top-5 80.00% 90.00% 95.00% 97.00% 99.00%", "  speed          10/s", "                 of 20",
                 "  probability    0.7000 of the true class on average; calibration error 0.0312",
                 "  best           85.00% on val at step 40: r s/best.pt", "  checkpoint     r s/best.pt",
                 "  bad images     2 of the training images were replaced: r s/bad_images.txt", "  curves         r s/curves.png",
                 "  RESUME_PATH='r s' NUM_STEPS=200 bash train.sh"):
        assert line in lines, line
    assert any(line.endswith("train.py --eval_only --resume_path 'r s/best.pt'") for line in lines)
    assert Path("r s/curves.png").exists() and summary.metric_lines(RESULT, 3)[0] == "top-1 to top-2 80.00% 90.00%"


def test_means_over_the_last_steps_and_another_split_before(printed):
    steps = [{"event": "train", "step": n, "accuracy": n / 100, "attention_loss": 1 / n} for n in range(1, 41)]
    steps.insert(3, {"event": "train", "step": 4, "accuracy": 0.5, "attention_loss": "nan"})          # it was skipped
    whole = {"event": "eval", "split": "train", "step": 40, "accuracy": 0.5, "images": 1097}
    lines = printed({"accuracy": 0.1, "split": "val"}, {}, [*steps, whole], "--eval_train", "--eval_every", "4")
    first, last = (sum(1 / number for number in some) / 20 for some in (range(1, 21), range(21, 41)))
    for line in ("  val accuracy   10.00% before", "  test accuracy  80.00% after (200 images)",
                 "  train accuracy 30.50% on the images of the last 20 steps, as they were fed",
                 "                 50.00% on all 1097 training images, without augmentation",
                 f"  attention loss {first:.4f} in the first steps, {last:.4f} in the last: mean square of attention - edit"):
        assert line in lines, line
    assert not any(" best " in line for line in lines)
    lines = printed({}, {}, steps, "--eval_train")                  # a full disk lost the evaluation
    assert any("as they were fed" in line for line in lines) and not any("without augmentation" in line for line in lines)


def test_disk_without_room_does_not_cost_the_last_words(printed, monkeypatch):
    def refuse(path, *_):
        raise StorageError(f"cannot write {path} (no room)")

    failed = []
    monkeypatch.setattr(plots, "save", lambda figure, path: refuse(path))
    monkeypatch.setattr(evaluation, "atomic_write", refuse)
    lines = printed({}, {}, [], "--confusion_matrix", failed=failed)
    assert lines[1] == "Done: step 100 of 100, 7 s." and "Next:" in lines and not any("curves.png" in line for line in lines)
    assert failed == ["cannot write r s/curves.png (no room)", "cannot write r s/confusion.csv (no room)"]
