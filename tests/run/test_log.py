"""log.jsonl: lines are written completely and immediately, and logs with damaged lines can be read."""

import json
import os
import random

import pytest
from rig import files_no_larger_than

from utils.report import views
from utils.run import log as run_log
from utils.run.log import Log, events_until, read_log, scan_log, sync_log, write_log


def event(step: int) -> dict:
    return {"event": "train", "step": step, "loss": 1 / step}


def steps(folder) -> list[int]:
    """Return the steps in the lines of the file."""
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------- appending


def test_lines_are_in_the_file_immediately(tmp_path):
    warnings = []
    for first in (1, 4):
        log = Log(tmp_path, warnings.append)
        for step in range(first, first + 3):
            log.write(event(step))
            assert read_log(tmp_path)[-1] == event(step)
        log.close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6] and warnings == []


@pytest.mark.contract("P8", "a full disk costs warnings and not the run or its checkpoints")
def test_a_full_disk_leaves_no_half_line(tmp_path, tries, figure):
    """At any byte of a line: lines that do not fit are lost, with one warning."""
    warnings, chance, count, written = [], random.Random(0), tries(40, 200), []
    log = Log(tmp_path, warnings.append)
    for number in range(count):
        size = (tmp_path / "log.jsonl").stat().st_size
        with files_no_larger_than(size + chance.randrange(150)):
            for step in range(10 * number + 1, 10 * number + 6):
                log.write(event(step))
            written = steps(tmp_path)                              # as many whole lines as fit
        log.write(event(10 * number + 6))
        assert steps(tmp_path) == [*written, 10 * number + 6]
    log.close()
    line, = warnings
    assert "cannot write" in line and line.endswith("training continues") and "\n" not in line
    assert scan_log(tmp_path)[1] == 0
    figure("times without room, at any byte of a line of the log", count)


def test_sync_log_writes_lines_to_the_disk(tmp_path, monkeypatch):
    Log(tmp_path, print).close()
    synced = []
    monkeypatch.setattr(run_log.os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    sync_log(tmp_path)
    sync_log(tmp_path / "none")                                     # without a log it does nothing
    assert synced == [str(tmp_path / "log.jsonl")]


# ------------------------------------------------------------------------------------------------------- reading


TWO = [{"event": "train", "step": 1}, {"event": "train", "step": 2}]


@pytest.mark.parametrize(("tail", "unreadable"), [
    ('{"event": "train", "st', 0), ('{"event": "train", "step": 3', 0), ("\0\0\0\0", 0), ('{"a"\n', 1), ("7\n\n[1]\n", 2),
    ('{"event": "eval", "step": 2}\n{"event": 3}\n', 2)])
def test_a_truncated_last_line_is_skipped(tmp_path, tail, unreadable):
    write_log(tmp_path, TWO)
    with open(tmp_path / "log.jsonl", "a") as stream:
        stream.write(tail)
    assert read_log(tmp_path) == TWO and scan_log(tmp_path) == (TWO, unreadable)


def test_a_bad_line_in_the_middle_does_not_affect_others(tmp_path):
    lines = [json.dumps(event(step)) for step in range(1, 7)]
    lines[1], lines[3] = lines[1][:9] + "\0" + lines[1][9:], "\xff\xfe"
    lines += ['{"step": ' + "9" * 5000 + "}", "[" * 100_000]                # more than Python can read
    (tmp_path / "log.jsonl").write_bytes(("\n".join(lines) + "\n").encode("latin-1"))
    events, unreadable = scan_log(tmp_path)
    assert [each["step"] for each in events] == [1, 3, 5, 6] and unreadable == 4


def test_curves_report_unreadable_lines(tmp_path):
    folder = tmp_path / "spoilt"
    folder.mkdir()
    (folder / "log.jsonl").write_text(json.dumps(event(1) | {"lr": 0.1}) + "\n{\n}\n")
    assert "spoilt (without 2 unreadable lines of its log)" in views.draw_curves([str(folder)]).get_suptitle()


def test_a_missing_log_is_empty_and_writing_leaves_no_temporary_files(tmp_path):
    assert read_log(tmp_path) == []
    write_log(tmp_path, [event(1)])
    write_log(tmp_path, [event(2) | {"loss": "nan"}])
    assert read_log(tmp_path) == [event(2) | {"loss": "nan"}] and os.listdir(tmp_path) == ["log.jsonl"]


def test_the_events_that_a_resumed_run_keeps(tmp_path):
    """Each training step once and in order. Events of later steps or without a step are dropped."""
    ends = [{"event": "eval", "step": 2, "split": split} for split in ("val", "test")]
    doubled = [*TWO, *ends, *TWO, {"event": "train"}, {"event": "train", "step": "3"}, {"event": "resume", "step": 2}, event(3)]
    write_log(tmp_path, [*doubled, event(4)])
    assert events_until(tmp_path, 3) == [*TWO, *ends, {"event": "resume", "step": 2}, event(3)]
