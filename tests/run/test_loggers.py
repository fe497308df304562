"""The events of log.jsonl, and how the writers show them."""

import dataclasses
import errno
import itertools
import json
import sys
import threading
from types import SimpleNamespace

import pytest
from rig import files_no_larger_than
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

from utils.run.loggers import PLAIN_LINES, BadImages, LoggerError, RunLogger, check_wandb
from utils.training.evaluation import EvalMetrics
from utils.training.trainer import StepMetrics


def step_metrics(step, loss=0.5, skipped=False, scale=None, norm=2.0, attention=None, images=50, waited=0.0) -> StepMetrics:
    return StepMetrics(step, loss, 0.625, 0.001 * step, norm, scale, skipped, images, 0.5, waited, attention)


def eval_metrics(accuracy=0.75, loss=0.25) -> EvalMetrics:
    return EvalMetrics(200, loss, accuracy, 0.8, 0.875, 0.9, 0.99, 0.6875, 0.0625)


def events(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def log_steps(folder, *steps: StepMetrics, tensorboard=None, total=1000, first=0, evaluation=None) -> None:
    """Log a session of these steps, then the evaluation."""
    logger = RunLogger(folder, tensorboard, first, total)
    for metrics in steps:
        logger.log_step(metrics)
    if evaluation is not None:
        logger.log_evaluation(steps[-1].step, "val", evaluation)
    logger.close()


def session(folder, tensorboard=None, first=0, last=4, total=4, accuracy=0.75) -> None:
    logger = RunLogger(folder, tensorboard, first, total)
    logger.log_session("resume" if first else "start", first, world_size=2)
    for step in range(first + 1, last + 1):
        logger.log_step(step_metrics(step))
    logger.log_evaluation(last, "val", eval_metrics(accuracy))
    logger.log_session("end", last, seconds=1.5)
    logger.close()


# ---------------------------------------------------------------------------------------------------------- log


def test_events(tmp_path):
    session(tmp_path, last=1)
    start, train, evaluation, end = events(tmp_path)
    assert start.pop("time") > 1.7e9 and end.pop("time") > 1.7e9
    assert start == {"event": "start", "step": 0, "world_size": 2}
    assert train == {"event": "train", "step": 1, "loss": 0.5, "accuracy": 0.625, "lr": 0.001, "grad_norm": 2.0,
                     "loss_scale": None, "skipped": False, "images_per_second": 100.0, "seconds": 0.5, "data_wait": 0.0}
    assert evaluation.items() >= {
        "event": "eval", "step": 1, "split": "val", "images": 200, "loss": 0.25, "accuracy": 0.75, "top2": 0.8, "top3": 0.875,
        "top4": 0.9, "top5": 0.99, "true_probability": 0.6875, "calibration_error": 0.0625}.items()
    assert end == {"event": "end", "step": 1, "seconds": 1.5}


@pytest.fixture(autouse=True)
def one_second_a_session(monkeypatch):
    """Give each session another second: TensorBoard sorts event files by their names, which begin with the second."""
    seconds = itertools.count(1_000_000_000)
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: next(seconds)))


def test_nan_and_infinity_are_logged_as_text(tmp_path):
    log_steps(tmp_path, step_metrics(1, loss=float("nan"), norm=float("inf")), tensorboard=tmp_path / "tensorboard",
              evaluation=eval_metrics(loss=float("-inf")))
    train, evaluation = (json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").open())
    assert (train["loss"], train["grad_norm"], evaluation["loss"]) == ("nan", "inf", "-inf")


def test_other_ranks_log_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = RunLogger(None, tmp_path / "tensorboard", 0, 1)
    logger.log_session("start", 0)
    logger.log_step(step_metrics(1))
    logger.log_evaluation(1, "val", eval_metrics())
    logger.log("of another rank")
    logger.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------ console


@pytest.mark.parametrize(("total", "lines"), [(4, 4), (30, 30), (100, PLAIN_LINES + 1), (10_000, PLAIN_LINES + 1), (107, 23)])
def test_plain_lines_are_printed_without_a_terminal(tmp_path, capsys, total, lines):
    """And a line with the time left after 20 steps of half a second, unless it is less than 10 s."""
    log_steps(tmp_path, *map(step_metrics, range(1, total + 1)), total=total)
    printed, errors = capsys.readouterr()
    printed = printed.splitlines()
    assert len(printed) == lines and errors == "" and "\r" not in "".join(printed)
    assert printed[-1] == f"step {total}/{total}: loss 0.5000, lr {0.001 * total:.2e}, 100 images/s"


def test_lines_of_evaluations_and_skipped_updates(tmp_path, capsys):
    log_steps(tmp_path, step_metrics(1, skipped=True, scale=65536.0), step_metrics(2), evaluation=eval_metrics())
    assert capsys.readouterr().out.splitlines() == [
        "step 1: gradients overflowed float16, update skipped (loss scale 65536)",
        "step 2: val accuracy 75.00%, top-5 99.00%, loss 0.2500 (200 images)"]


def test_speed_is_a_mean_and_long_waits_are_shown(tmp_path, capsys):
    """The mean of the last steps, since the first step of a session waits for the loader to start."""
    log_steps(tmp_path, step_metrics(1, images=150, waited=0.5), step_metrics(2, waited=0.05),
              tensorboard=tmp_path / "tensorboard", total=2)
    assert [line.split(", ", 2)[2] for line in capsys.readouterr().out.splitlines()] == [
        "300 images/s, 100% waiting for data", "200 images/s, 55% waiting for data"]
    assert [event["data_wait"] for event in events(tmp_path)] == [1.0, 0.1]
    assert curves(tmp_path / "tensorboard")["train/data_wait"] == [(1, 1.0), (2, pytest.approx(0.1))]


@pytest.mark.parametrize("first", [0, 1000])
def test_the_time_left_is_printed(tmp_path, capsys, first):
    """In a separate line after 20 steps of this session, then in each line. A step takes half a second."""
    log_steps(tmp_path, *map(step_metrics, range(first + 1, first + 101)), total=first + 200, first=first)
    about, *others = [line for line in capsys.readouterr().out.splitlines() if line.endswith((" left", "a step)"))]
    assert about == "about 1 min 30 s left (0.5 s a step)"
    assert others[0].endswith(", 1 min 25 s left" if first == 0 else ", 1 min 0 s left") and "100 images/s" in others[0], others


def test_warnings_of_a_run_that_goes_badly_are_printed_once(tmp_path, capsys):
    health = SimpleNamespace(follow=lambda event: ["warning: bad"] * (event["event"] == "eval"))
    logger = RunLogger(tmp_path, None, 0, 4, health=health)
    logger.log_step(step_metrics(1))
    logger.log_evaluation(1, "val", eval_metrics())
    logger.close()
    assert capsys.readouterr().out.splitlines()[-1] == "warning: bad"
    RunLogger(None, None, 0, 4, health=health).log_evaluation(1, "val", eval_metrics())
    assert capsys.readouterr().out == ""


def test_a_bar_is_shown_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logger = RunLogger(tmp_path, None, 3, 5)
    logger.log("a warning")
    logger.log_step(step_metrics(4, skipped=True, scale=8.0))
    logger.log_evaluation(4, "val", eval_metrics())
    logger.log_step(step_metrics(5, loss=0.125))
    logger.end_progress()
    printed, bar = capsys.readouterr()
    assert bar.endswith("\n")                        # the last line of a stopped run has a line of its own
    logger.close()
    assert "val accuracy 75.00%" in printed and "(loss scale 8)" in printed and "a warning\n" in printed
    assert "5/5" in bar and "loss 0.1250" in bar and "100 images/s" in bar and "3/5" in bar


@pytest.mark.parametrize(("classes", "top5"), [(5, ""), (6, "top-5 99.00%, ")])
def test_top_5_of_five_classes_is_not_printed(tmp_path, capsys, classes, top5):
    logger = RunLogger(tmp_path, None, 0, 4, num_classes=classes)
    logger.log_evaluation(1, "val", dataclasses.replace(eval_metrics(), images=1))
    logger.close()
    assert capsys.readouterr().out == f"step 1: val accuracy 75.00%, {top5}loss 0.2500 (1 image)\n"


# -------------------------------------------------------------------------------------------------- TensorBoard


def curves(folder) -> dict[str, list[tuple[int, float]]]:
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(point.step, point.value) for point in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_curves(tmp_path):
    logger = RunLogger(tmp_path, tmp_path / "tensorboard", 0, 2)
    logger.log_evaluation(0, "test", eval_metrics(0.125))
    logger.log_step(step_metrics(1, scale=1024.0))
    logger.log_step(step_metrics(2, scale=512.0))
    logger.log_evaluation(2, "val", eval_metrics(0.5))
    logger.close()
    found = curves(tmp_path / "tensorboard")
    figures = ("accuracy", "top5", "loss", "true_probability", "calibration_error")
    assert set(found) >= {"train/loss", "train/accuracy", "train/lr", "train/grad_norm", "train/loss_scale",
                          "train/images_per_second", "train/data_wait",
                          *(f"{split}/{name}" for split in ("test", "val") for name in figures)}
    assert found["train/accuracy"] == [(1, 0.625), (2, 0.625)]
    assert found["val/true_probability"] == [(2, 0.6875)] and found["test/calibration_error"] == [(0, 0.0625)]
    assert found["train/loss"] == [(1, 0.5), (2, 0.5)] and found["train/loss_scale"] == [(1, 1024.0), (2, 512.0)]
    assert found["train/lr"] == [(1, pytest.approx(0.001)), (2, pytest.approx(0.002))]
    assert found["test/accuracy"] == [(0, 0.125)] and found["val/accuracy"] == [(2, 0.5)]


def test_tensorboard_draws_an_accuracy_under_its_alias_too(tmp_path):
    logger = RunLogger(tmp_path, tmp_path / "tensorboard", 0, 2, aliases={"val/accuracy": "test/accuracy"})
    logger.log_evaluation(2, "val", eval_metrics(0.5))
    logger.close()
    found = curves(tmp_path / "tensorboard")
    assert found["val/accuracy"] == found["test/accuracy"] == [(2, 0.5)] and "test/loss" not in found
    assert [event["split"] for event in events(tmp_path)] == ["val"]


def test_the_attention_loss_is_logged_where_there_is_one(tmp_path, capsys):
    """A step whose images have no edits has no attention loss."""
    steps = [step_metrics(step, attention=attention) for step, attention in enumerate((0.25, None, 0.125), 1)]
    log_steps(tmp_path, *steps, tensorboard=tmp_path / "tensorboard", total=3)
    assert [event.get("attention_loss", "none") for event in events(tmp_path)] == [0.25, "none", 0.125]
    assert curves(tmp_path / "tensorboard")["train/attention_loss"] == [(1, 0.25), (3, 0.125)]
    lines = capsys.readouterr().out.splitlines()
    assert "loss 0.5000 (attention 0.2500), lr" in lines[0] and "loss 0.5000, lr" in lines[1]


def test_a_resumed_run_has_every_step_once(tmp_path):
    """The second session continues to step 6 after its last checkpoint, that of step 3."""
    session(tmp_path, tmp_path / "tensorboard", last=3, total=8, accuracy=0.25)
    session(tmp_path, tmp_path / "tensorboard", first=3, last=6, total=8, accuracy=0.375)
    session(tmp_path, tmp_path / "tensorboard", first=3, last=8, total=8, accuracy=0.5)
    found = curves(tmp_path / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == list(range(1, 9))
    assert found["val/accuracy"] == [(3, 0.25), (8, 0.5)] and "train/loss_scale" not in found
    session(tmp_path, tmp_path / "tensorboard", last=2)            # a new run in the old folder
    assert [step for step, _ in curves(tmp_path / "tensorboard")["train/loss"]] == [1, 2]


# ------------------------------------------------------------------------------------------------------------ errors


def test_a_full_disk_costs_lines_and_curves(tmp_path, capsys):
    """TensorBoard writes its files in a thread, whose error is raised with the next event."""
    hook = threading.excepthook
    logger = RunLogger(tmp_path, tmp_path / "tensorboard", 0, 1000)
    logger.log_step(step_metrics(1))
    worker = logger._writers[1]._writer._get_file_writer().event_writer._async_writer._worker
    with files_no_larger_than(10):
        worker._next_flush_time = 0                    # otherwise it buffers two minutes of events
        for step in range(2, 6):
            logger.log_step(step_metrics(step))
            worker.join(1)                             # it ends with its error
        assert not worker.is_alive() and len(logger._writers) == 1
    logger.log_step(step_metrics(6))
    logger.close()
    assert [event["step"] for event in events(tmp_path)] == [1, 6] and threading.excepthook is hook
    printed, errors = capsys.readouterr()
    warnings = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2 and errors == "", (printed, errors)
    assert "log.jsonl (File too large)" in warnings[0]
    place = tmp_path / "tensorboard"
    assert warnings[1].startswith(f"warning: TensorBoard in {place} failed (")
    assert "is turned off; training continues" in warnings[1]


def test_a_disk_that_is_full_at_the_end_stops_nothing(tmp_path, capsys, monkeypatch):
    def close(writer, real=SummaryWriter.close):
        real(writer)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "close", close)
    log_steps(tmp_path, step_metrics(1), tensorboard=tmp_path / "tensorboard")
    assert f"warning: TensorBoard in {tmp_path / 'tensorboard'} failed (No space left on device)" in capsys.readouterr().out


def test_a_closed_terminal_stops_nothing(tmp_path, monkeypatch):
    class Closed:
        def write(self, text=""):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        flush = write

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        log_steps(tmp_path, *map(step_metrics, (1, 2, 3)), total=3)
    assert len(events(tmp_path)) == 3


# --------------------------------------------------------------------------------------------------- bad_images.txt


def test_bad_images_are_listed_once(tmp_path):
    file = tmp_path / "bad_images.txt"
    bad = BadImages(tmp_path, pytest.fail)
    assert bad.add(set()) == ([], 0) and not file.exists()
    assert bad.add({"c", "a"}) == (["a", "c"], 2) and file.read_text() == "a\nc\n"
    resumed = BadImages(tmp_path, pytest.fail)
    assert resumed.add({"c", "b"}) == (["b"], 3) and file.read_text() == "a\nb\nc\n"


def test_bad_images_on_a_full_disk_are_a_warning(tmp_path):
    lines, file = [], tmp_path / "bad_images.txt"
    file.write_text("a\n")
    bad = BadImages(tmp_path, lines.append)
    with files_no_larger_than(1):
        assert bad.add({"b"}) == (["b"], 2)
    assert len(lines) == 1 and lines[0].startswith(f"warning: cannot write {file} (") and file.read_text() == "a\n"
    assert bad.add({"b", "c"}) == (["c"], 3) and file.read_text() == "a\nb\nc\n"


# ---------------------------------------------------------------------------------------------------------------- W&B


def test_wandb_that_cannot_be_used_is_reported(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("utils.run.loggers.find_spec", lambda name: None)
    with pytest.raises(LoggerError, match=r"--wandb: the package is not installed.*omit --wandb"):
        check_wandb()
    monkeypatch.setattr("utils.run.loggers.find_spec", lambda name: True)
    with pytest.raises(LoggerError, match="--wandb needs the key"):
        check_wandb()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb()
