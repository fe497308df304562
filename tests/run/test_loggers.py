"""Events in log.jsonl, and what its readers show."""

import errno
import json
import resource
import sys
import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.run.loggers import PLAIN_LINES, BadImages, Report
from utils.training.evaluation import EvalMetrics
from utils.training.trainer import StepMetrics


def step_report(step, loss=0.5, skipped=False, scale=None, norm=2.0, attention=None, images=50, waited=0.0) -> StepMetrics:
    return StepMetrics(step, loss, 0.625, 0.001 * step, norm, scale, skipped, images, 0.5, waited, attention)


def eval_report(accuracy=0.75, loss=0.25) -> EvalMetrics:
    return EvalMetrics(200, loss, accuracy, 0.8, 0.875, 0.9, 0.99, 0.6875, 0.0625)


def events(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def session(folder, tensorboard=None, first=0, last=4, total=4, accuracy=0.75) -> None:
    report = Report(folder, tensorboard, first, total)
    report.session("resume" if first else "start", first, world_size=2)
    for step in range(first + 1, last + 1):
        report.train(step_report(step))
    report.evaluation(last, "val", eval_report(accuracy))
    report.session("end", last, seconds=1.5)
    report.close()


# ---------------------------------------------------------------------------------------------------------- log


def test_events(tmp_path):
    session(tmp_path, last=1)
    start, train, evaluation, end = events(tmp_path)
    assert start.pop("time") > 1.7e9 and end.pop("time") > 1.7e9
    assert start == {"event": "start", "step": 0, "world_size": 2}
    assert train == {"event": "train", "step": 1, "loss": 0.5, "accuracy": 0.625, "lr": 0.001, "grad_norm": 2.0,
                     "loss_scale": None, "skipped": False, "images_per_second": 100.0, "seconds": 0.5, "data_wait": 0.0}
    assert evaluation == {"event": "eval", "step": 1, "split": "val", "images": 200, "loss": 0.25, "accuracy": 0.75, "top2": 0.8,
                          "top3": 0.875, "top4": 0.9, "top5": 0.99, "true_probability": 0.6875, "calibration_error": 0.0625}
    assert end == {"event": "end", "step": 1, "seconds": 1.5}


def test_a_later_session_appends(tmp_path):
    session(tmp_path, last=2)
    before = (tmp_path / "log.jsonl").read_text()
    session(tmp_path, first=2)
    assert (tmp_path / "log.jsonl").read_text().startswith(before)
    assert [event["step"] for event in events(tmp_path) if event["event"] == "train"] == [1, 2, 3, 4]


def test_events_are_written_at_once(tmp_path):
    report = Report(tmp_path, None, 0, 4)
    report.train(step_report(1))
    assert len(events(tmp_path)) == 1
    report.close()


def test_numbers_that_json_does_not_have_are_words(tmp_path):
    report = Report(tmp_path, tmp_path / "tensorboard", 0, 1)
    report.train(step_report(1, loss=float("nan"), norm=float("inf")))
    report.evaluation(1, "val", eval_report(loss=float("-inf")))
    report.close()
    train, evaluation = (json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").open())
    assert (train["loss"], train["grad_norm"], evaluation["loss"]) == ("nan", "inf", "-inf")
    assert [float(train["loss"]) != float(train["loss"]), float(train["grad_norm"])] == [True, float("inf")]


def test_other_ranks_write_and_say_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = Report(None, tmp_path / "tensorboard", 0, 1)
    report.session("start", 0)
    report.train(step_report(1))
    report.evaluation(1, "val", eval_report())
    report.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------ console


@pytest.mark.parametrize(("total", "lines"), [(4, 4), (100, PLAIN_LINES), (10_000, PLAIN_LINES), (107, 22)])
def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys, total, lines):
    report = Report(tmp_path, None, 0, total)
    for step in range(1, total + 1):
        report.train(step_report(step))
    report.close()
    said, complaints = capsys.readouterr()
    said = said.splitlines()
    assert len(said) == lines and complaints == "" and "\r" not in "".join(said)
    assert said[-1] == f"step {total}/{total}: loss 0.5000, lr {0.001 * total:.2e}, 100 images/s, 0:00:00 left"


def test_what_is_said_of_evaluations_and_skips(tmp_path, capsys):
    report = Report(tmp_path, None, 0, 1000)
    report.train(step_report(1, skipped=True, scale=65536.0))
    report.train(step_report(2))
    report.evaluation(2, "val", eval_report())
    report.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 1: gradients overflowed float16, update skipped (loss scale 65536)",
        "step 2: val accuracy 75.00%, top-5 99.00%, loss 0.2500 (200 images)"]


def test_speed_is_a_mean_and_waiting_is_told_where_it_is_long(tmp_path, capsys):
    """Of the last steps: the first of a session waits for the loader to start. Reports may come late, in their order."""
    report = Report(tmp_path, tmp_path / "tensorboard", 0, 2)
    report.train(step_report(1, images=150, waited=0.5))
    report.train(step_report(2, waited=0.05))
    report.close()
    assert [line.split(", ", 2)[2] for line in capsys.readouterr().out.splitlines()] == [
        "300 images/s, 100% waiting for data, 0:00:01 left", "200 images/s, 55% waiting for data, 0:00:00 left"]
    assert [event["data_wait"] for event in events(tmp_path)] == [1.0, 0.1]
    assert curves(tmp_path / "tensorboard")["train/data_wait"] == [(1, 1.0), (2, pytest.approx(0.1))]


@pytest.mark.parametrize("first", [0, 10])
def test_the_time_that_is_left(tmp_path, capsys, monkeypatch, first):
    """Of this session: 100 s for 10 steps, so 3 h 20 min for 1,200 more."""
    clock = iter([1000.5, 1100.0])                        # the first step took 0.5 s
    monkeypatch.setattr("utils.run.loggers.time.monotonic", lambda: next(clock))
    report = Report(tmp_path, None, first, 1210 + first)
    monkeypatch.setattr(report._readers[0], "_every", first + 10)
    report.train(step_report(first + 1))
    report.train(step_report(first + 10))
    assert "3:20:00 left" in capsys.readouterr().out


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    report = Report(tmp_path, None, 3, 5)
    report.train(step_report(4, skipped=True, scale=8.0))
    report.evaluation(4, "val", eval_report())
    report.train(step_report(5, loss=0.125))
    report.close()
    said, bar = capsys.readouterr()
    assert "val accuracy 75.00%" in said and "(loss scale 8)" in said
    assert "5/5" in bar and "loss 0.1250" in bar and "100 images/s" in bar and "3/5" in bar


# -------------------------------------------------------------------------------------------------- TensorBoard


def curves(folder) -> dict[str, list[tuple[int, float]]]:
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(point.step, point.value) for point in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_curves(tmp_path):
    report = Report(tmp_path, tmp_path / "tensorboard", 0, 2)
    report.evaluation(0, "test", eval_report(0.125))
    report.train(step_report(1, scale=1024.0))
    report.train(step_report(2, scale=512.0))
    report.evaluation(2, "val", eval_report(0.5))
    report.close()
    found = curves(tmp_path / "tensorboard")
    figures = ("accuracy", "top5", "loss", "true_probability", "calibration_error")
    assert set(found) == {"train/loss", "train/accuracy", "train/lr", "train/grad_norm", "train/loss_scale",
                          "train/images_per_second", "train/data_wait",
                          *(f"{split}/{name}" for split in ("test", "val") for name in figures)}
    assert found["train/accuracy"] == [(1, 0.625), (2, 0.625)]
    assert found["val/true_probability"] == [(2, 0.6875)] and found["test/calibration_error"] == [(0, 0.0625)]
    assert found["train/loss"] == [(1, 0.5), (2, 0.5)] and found["train/loss_scale"] == [(1, 1024.0), (2, 512.0)]
    assert found["train/lr"] == [(1, pytest.approx(0.001)), (2, pytest.approx(0.002))]
    assert found["test/accuracy"] == [(0, 0.125)] and found["val/accuracy"] == [(2, 0.5)]


def test_no_loss_scale_no_curve(tmp_path):
    session(tmp_path, tmp_path / "tensorboard")
    assert "train/loss_scale" not in curves(tmp_path / "tensorboard")


def test_the_loss_of_edited_attention_is_shown_where_there_is_one(tmp_path, capsys):
    """A step whose images have no edit has none."""
    report = Report(tmp_path, tmp_path / "tensorboard", 0, 3)
    for step, attention in enumerate((0.25, None, 0.125), 1):
        report.train(step_report(step, attention=attention))
    report.close()
    assert [event.get("attention_loss", "none") for event in events(tmp_path)] == [0.25, "none", 0.125]
    assert curves(tmp_path / "tensorboard")["train/attention_loss"] == [(1, 0.25), (3, 0.125)]
    lines = capsys.readouterr().out.splitlines()
    assert "loss 0.5000 (attention 0.2500), lr" in lines[0] and "loss 0.5000, lr" in lines[1]


def test_a_resumed_run_has_every_step_once(tmp_path):
    """The first session went on to step 6 after its last checkpoint, that of step 3."""
    session(tmp_path, tmp_path / "tensorboard", last=3, total=8, accuracy=0.25)
    session(tmp_path, tmp_path / "tensorboard", first=3, last=6, total=8, accuracy=0.375)
    session(tmp_path, tmp_path / "tensorboard", first=3, last=8, total=8, accuracy=0.5)
    found = curves(tmp_path / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == list(range(1, 9))
    assert found["val/accuracy"] == [(3, 0.25), (8, 0.5)]


def test_a_folder_that_is_taken_over_shows_the_new_run_alone(tmp_path):
    session(tmp_path, tmp_path / "tensorboard", last=6)
    session(tmp_path, tmp_path / "tensorboard", last=2)
    assert [step for step, _ in curves(tmp_path / "tensorboard")["train/loss"]] == [1, 2]


# ----------------------------------------------------------------------------------------------------------- trouble


@pytest.mark.contract("P8", "a full disk costs warnings and not the run, its checkpoints or its log")
def test_a_full_disk_costs_curves_and_no_line_of_the_log(tmp_path, capsys, figure):
    """TensorBoard's files are written by a thread of its own, whose error comes with the next event."""
    hook = threading.excepthook
    report = Report(tmp_path, tmp_path / "tensorboard", 0, 1000)
    report.train(step_report(1))
    worker = report._readers[1]._writer._get_file_writer().event_writer._async_writer._worker
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        worker._next_flush_time = 0                    # it else keeps two minutes of events
        for step in range(2, 6):
            report.train(step_report(step))
            worker.join(1)                             # of its own error
        assert not worker.is_alive() and len(report._readers) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    report.train(step_report(6))
    report.evaluation(6, "val", eval_report())
    report.close()
    assert [event["step"] for event in events(tmp_path)] == [1, 2, 3, 4, 5, 6, 6] and threading.excepthook is hook
    said, complaints = capsys.readouterr()
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2 and complaints == "", (said, complaints)
    assert "log.jsonl (File too large); its lines wait in memory" in warnings[0]
    assert warnings[1].startswith("warning: TensorBoard fails (") and "off from here on; training goes on" in warnings[1]
    figure("events while nothing can be written", 4)


@pytest.mark.parametrize("at", ["read", "close"])
def test_a_reader_that_fails_is_off(tmp_path, capsys, monkeypatch, at):
    report = Report(tmp_path, tmp_path / "tensorboard", 0, 1000)
    reader, asked = report._readers[1], []

    def fails(*_):
        asked.append(at)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(reader, at, fails)
    for step in (1, 2, 3):
        report.train(step_report(step))
    report.close()
    said = capsys.readouterr().out.splitlines()
    assert said == ["warning: TensorBoard fails (Input/output error) and is off from here on; training goes on"]
    assert len(asked) == (1 if at == "read" else 2) and len(events(tmp_path)) == 3


def test_a_terminal_that_is_closed_stops_nothing(tmp_path, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def flush(self):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    report = Report(tmp_path, None, 0, 3)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        for step in (1, 2, 3):
            report.train(step_report(step))
        report.say("anything")
        report.close()
    assert len(events(tmp_path)) == 3


def test_lines_of_others_stand_above_the_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    report = Report(tmp_path, None, 0, 5)
    report.say("a warning")
    report.close()
    Report(None, None, 0, 5).say("of another rank")
    assert capsys.readouterr().out == "a warning\n"


# --------------------------------------------------------------------------------------------------- bad_images.txt


def test_bad_images_are_listed_once(tmp_path):
    said, file = [], tmp_path / "bad_images.txt"
    bad = BadImages(tmp_path, said.append)
    assert bad.add(set()) == ([], 0) and not file.exists()
    assert bad.add({"c", "a"}) == (["a", "c"], 2) and file.read_text() == "a\nc\n"
    resumed = BadImages(tmp_path, said.append)
    assert resumed.add({"c", "b"}) == (["b"], 3) and file.read_text() == "a\nb\nc\n"
    resumed.close()
    assert said == []


def test_bad_images_wait_for_a_disk_that_is_full(tmp_path):
    said, file = [], tmp_path / "bad_images.txt"
    file.write_text("a\n")
    bad = BadImages(tmp_path, said.append)
    (tmp_path / "bad_images.txt.tmp").mkdir()                    # for root too
    assert bad.add({"b"}) == (["b"], 2) and bad.add({"b", "c"}) == (["c"], 3)
    assert len(said) == 1 and said[0].startswith(f"warning: cannot write {file} (") and file.read_text() == "a\n"
    bad.close()
    assert len(said) == 2 and "lacks lines of the 3 bad images" in said[1]
    (tmp_path / "bad_images.txt.tmp").rmdir()
    assert bad.add(set()) == ([], 3) and file.read_text() == "a\nb\nc\n" and "written again" in said[2]


def test_bad_images_that_cannot_be_read_are_not_written_over(tmp_path):
    said, file = [], tmp_path / "bad_images.txt"
    file.mkdir()
    bad = BadImages(tmp_path, said.append)
    assert bad.add({"b"}) == (["b"], 1) and len(said) == 1 and "Is a directory" in said[0]
    file.rmdir()
    file.write_text("a\n")
    bad.close()
    assert file.read_text() == "a\nb\n" and len(said) == 2
