"""The summary at the end of a run."""

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
from utils.training.certainty import Result
from utils.training.evaluation import EvalMetrics

RESULT = EvalMetrics(200, 0.5, 0.8, 0.9, 0.95, 0.97, 0.99, 0.7, 0.0312)


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """printed(first, best, events, *flags, ...) -> the lines that are printed of a run in the folder `r s`

    logged: (accuracy, loss) of 24 images, by (step, split); one_split: val is test; final: the split that is evaluated last.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIT_CALLED_FROM", raising=False)
    monkeypatch.setattr(launch, "ROOT", tmp_path.resolve())
    monkeypatch.setattr(plots, "save", lambda figure, path: Path(path).touch())
    Path("r s").mkdir()

    def run(first: dict, best: dict, events=(), *flags, failed=None, logged=(), one_split=False, final="test",
            accuracy=RESULT.accuracy) -> list[str]:
        write_log(Path("r s"), list(events))
        run = types.SimpleNamespace(
            config=resolve(parse(["--pretrained_dir", "none", "--name", "r", *flags]), Facts(1097, 10)), seconds=7.0,
            history=History(first=first, result=dataclasses.replace(RESULT, accuracy=accuracy, confusion=torch.eye(10)),
                            logged={at: Result(*figures, 24) for at, figures in dict(logged).items()}),
            outputs=types.SimpleNamespace(
                folder=Path("r s"), log_folder=Path("logs/r"), saver=types.SimpleNamespace(best=best)))
        val, test = (types.SimpleNamespace(targets=[0, 1, 1, 2], name=name) for name in ("val", "test"))
        splits = types.SimpleNamespace(classes=tuple("0123456789"), val_name="val", val=val, test=val if one_split else test,
                                       held_out={"val": val} if one_split else {"val": val, "test": test}, train=[0] * 1097)
        summary.print_summary(run, splits, final, ["10/s", "of 20"], [] if failed is None else failed, "model on data")
        return capsys.readouterr().out.splitlines()

    return run


def test_results_and_where_they_are(printed):
    Path("r s/bad_images.txt").write_text("a.png: cut off\nb.png: cut off\n")
    Path("r s/batch.png").touch()           # of any step: that of a run from before this file existed is drawn when it resumes
    lines = printed({"accuracy": 0.1, "split": "test"}, {"accuracy": 0.85, "step": 40})
    for line in ("Done: step 100 of 100, 7 s.",
                 "  test accuracy  80.00% after the last step (200 images; 95% interval 73.9% to 85.0%); before training 10.00%",
                 "  top-1 to top-5 80.00% 90.00% 95.00% 97.00% 99.00%", "  speed          10/s", "                 of 20",
                 "  best           85.00% on val after step 40: r s/best.pt", "  checkpoint     r s/best.pt",
                 "  bad images     2 training images were replaced: r s/bad_images.txt", "  curves         r s/curves.png",
                 "  batches        r s/batch.png: what the model saw at the step in its heading, with labels"):
        assert line in lines, line
    assert not any("calibration" in line for line in lines), "it is in log.jsonl"
    assert Path("r s/curves.png").exists() and summary.metric_lines(RESULT, 3)[0] == "top-1 to top-2 80.00% 90.00%"
    assert summary.metric_lines(RESULT, 2)[0].startswith("probability"), "of two classes top-1 is all there is"


@pytest.mark.parametrize(("flags", "one_split", "words"), [
    ((), False, ["train.py --eval_only --resume_path 'r s/best.pt'",
                 "DATASET=folder DATA_DIR=PHOTOS VAL_FRACTION=0.2 bash train.sh",
                 "predict.py 'r s' PHOTOS > predictions.csv", "export.py 'r s' --to folder --output 'r s-model'",
                 "visualize.py attention --checkpoint 'r s'"]),
    (("--dataset", "folder"), True, ["predict.py", "export.py", "visualize.py"])], ids=["digits", "own photographs"])
def test_commands_that_come_next(printed, flags, one_split, words):
    """Not more steps, which make the digits worse. best.pt is evaluated on test if there is a separate test set."""
    lines = printed({}, {"accuracy": 0.85, "step": 40}, (), *flags, one_split=one_split, final="val" if one_split else "test")
    commands = lines[lines.index("Next:") + 1:]
    assert len(commands) == len(words) and all(word in line for word, line in zip(words, commands)), commands
    assert not any("NUM_STEPS" in line or "RESUME_PATH" in line for line in commands)


def test_an_accuracy_of_guessing_is_reported(printed):
    """Half of the held-out images are of one class."""
    assert not any("not clearly above" in line for line in printed({}, {}))
    lines = printed({}, {}, accuracy=0.56)
    at = next(number for number, line in enumerate(lines) if line.startswith("  test accuracy  56.00%"))
    assert lines[at + 1] == "                 not clearly above 50.00%, the accuracy of always guessing the largest class"


LOOKS = {(0, "val"): (1.0, 0.0), (20, "val"): (18 / 24, 0.5), (40, "val"): (19 / 24, 0.9), (100, "val"): (15 / 24, 1.1),
         (100, "test"): (1.0, 0.1)}
ON_NEW_IMAGES = ("                 predict.py and export.py use best.pt. It was chosen on these images, so on new ones it is "
                 "probably a little less accurate: ")


@pytest.mark.parametrize(("how", "expected"), [
    ({}, ["  val accuracy   62.50% after the last step (24 images, one is 4.2%; 95% interval 42.7% to 78.8%)",
          "  best           75.00% on val after step 20, the best of 3 evaluations (24 images, one is 4.2%; 95% interval 55.1% "
          "to 88.0%): r s/best.pt",
          "                 79.17% was the highest, by one image at most, and with a higher loss",
          ON_NEW_IMAGES + "the first command below prints its test accuracy (that of the last step is above)"]),
    ({"final": "val", "one_split": True}, [
        "  best           75.00% on val after step 20, the best of 3 evaluations (24 images, one is 4.2%; 95% interval 55.1% to "
        "88.0%): r s/best.pt",
        "                 79.17% was the highest, by one image at most, and with a higher loss",
        ON_NEW_IMAGES + "for an exact figure, hold out a test set (--test_fraction 0.2)"]),
    ({"final": "val"}, [ON_NEW_IMAGES + "for an exact figure, run the first command below with --test once, after all "
                        "decisions"])],
    ids=["a test split", "one held-out split", "test never"])
def test_the_last_step_and_the_best_and_what_to_expect_of_it(printed, how, expected):
    lines = printed({}, {"accuracy": 0.75, "step": 20}, logged=LOOKS, **how)
    at = lines.index(expected[0])
    assert lines[at:at + len(expected)] == expected


def test_a_highest_accuracy_that_was_not_saved_is_reported(printed):
    """Its save failed, or it was later than the checkpoint that was resumed."""
    for accuracy, loss in ((20 / 24, 0.9), (19 / 24, 0.4)):
        lines = printed({}, {"accuracy": 0.75, "step": 20}, logged=LOOKS | {(60, "val"): (accuracy, loss)})
        assert f"                 {accuracy:.2%} was the highest, and was not saved" in lines


def test_a_best_that_is_the_last_step_has_one_line(printed):
    for how in ({"one_split": True, "final": "val"}, {}):
        lines = printed({}, {"accuracy": 0.625, "step": 100}, logged={(100, "val"): (15 / 24, 1.1)}, **how)
        assert any(line.startswith("  best           62.50% on val after step 100, the last (") for line in lines)
        assert not any("less accurate" in line or "highest" in line or line.startswith("  val accuracy   62") for line in lines)


def test_trials_of_a_sweep_print_no_commands(printed, monkeypatch):
    monkeypatch.setenv("VIT_TRIAL", "1")
    lines = printed({}, {"accuracy": 0.75, "step": 20}, logged=LOOKS)
    assert any(line.startswith("  best  ") for line in lines)
    assert not any("less accurate" in line or line == "Next:" for line in lines)


def test_an_evaluation_has_an_interval(capsys):
    summary.print_evaluation("val", RESULT, 6, chosen=200)
    for chosen in (0, 3, None):
        summary.print_evaluation("test", RESULT, 5, chosen)
    summary.print_evaluation("train", RESULT, 5)
    test = "test accuracy 80.00%, loss 0.5000 (200 images; 95% interval 73.9% to 85.0%)"
    assert capsys.readouterr().out.splitlines() == [
        "val accuracy 80.00%, top-5 99.00%, loss 0.5000 (200 images; 95% interval 73.9% to 85.0%)",
        "best.pt was chosen on these images, so on new ones it is probably a little less accurate",
        *[test] * 2, "best.pt was chosen on 3 of these images, so on new ones it is probably a little less accurate",
        test, "warning: the data have changed since best.pt was saved, so it may have been chosen on some of these images",
        "train accuracy 80.00%, loss 0.5000 (200 images)"]


def test_means_over_the_last_steps_and_another_split_before(printed):
    steps = [{"event": "train", "step": n, "accuracy": n / 100, "attention_loss": 1 / n} for n in range(1, 41)]
    steps.insert(3, {"event": "train", "step": 4, "accuracy": 0.5, "attention_loss": "nan"})          # it was skipped
    whole = {"event": "eval", "split": "train", "step": 40, "accuracy": 0.5, "images": 1097}
    lines = printed({"accuracy": 0.1, "split": "val"}, {}, [*steps, whole], "--eval_train", "--eval_every", "4")
    first, last = (sum(1 / number for number in some) / 20 for some in (range(1, 21), range(21, 41)))
    assert not any("before training" in line for line in lines), "val has no line that it would belong to"
    for line in ("  test accuracy  80.00% after the last step (200 images; 95% interval 73.9% to 85.0%)",
                 "  train accuracy 30.50% on the images of the last 20 steps, as they were fed",
                 "                 50.00% on all 1097 training images, without augmentation",
                 f"  attention loss {first:.4f} in the first 20 steps, {last:.4f} in the last 20: mean square of attention - "
                 "edit"):
        assert line in lines, line
    assert not any(" best " in line for line in lines)
    lines = printed({}, {}, steps, "--eval_train")                  # a full disk lost the evaluation
    assert any("as they were fed" in line for line in lines) and not any("without augmentation" in line for line in lines)


def test_a_full_disk_does_not_lose_the_summary(printed, monkeypatch):
    def refuse(path, *_):
        raise StorageError(f"cannot write {path} (no room)")

    failed = []
    monkeypatch.setattr(plots, "save", lambda figure, path: refuse(path))
    monkeypatch.setattr(evaluation, "atomic_write", refuse)
    lines = printed({}, {}, [], "--confusion_matrix", failed=failed)
    assert lines[1] == "Done: step 100 of 100, 7 s." and "Next:" in lines and not any("curves.png" in line for line in lines)
    assert failed == ["cannot write r s/curves.png (no room)", "cannot write r s/confusion.csv (no room)"]
