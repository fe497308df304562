"""log.jsonl: no line is lost or torn while the run lives, whatever happens to the disk; and what is read of one that is."""

import json
import os
import random
import shutil

import pytest
from rig import files_no_larger_than

from utils.report import views
from utils.run import log as run_log
from utils.run.log import Log, LogError, events_until, read_log, scan_log, sync_log, write_log


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def log(tmp_path, said, monkeypatch):
    monkeypatch.setattr(run_log, "RETRY_SECONDS", 0.0)
    (tmp_path / "r").mkdir()
    return Log(tmp_path / "r", said.append)


def event(step: int) -> dict:
    return {"event": "train", "step": step, "loss": 1 / step}


def write(log, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.write(event(step))


def steps(folder) -> list[int]:
    """Of the plain lines of the file"""
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------- appending


def test_lines_are_in_the_file_at_once(log, tmp_path, said):
    write(log, 1, 3)
    assert read_log(tmp_path / "r") == [event(step) for step in (1, 2, 3)] and said == []
    log.close()
    Log(tmp_path / "r", said.append).write(event(4))
    assert steps(tmp_path / "r") == [1, 2, 3, 4]


@pytest.mark.contract("P8", "a full disk costs warnings and not the run, its checkpoints or its log")
def test_a_full_disk_leaves_no_gap_and_no_half_line(log, tmp_path, said, tries, figure):
    folder, chance, step, count = tmp_path / "r", random.Random(0), 0, tries(40, 200)
    for _ in range(count):
        write(log, step + 1, step + 3)
        size, whole = (folder / "log.jsonl").stat().st_size, step + 3
        with files_no_larger_than(size + chance.randrange(150)):
            write(log, step + 4, step + 8)
            found = steps(folder)                                   # whole lines, as many as there was room for
            assert found == list(range(1, len(found) + 1)) and whole <= len(found) < step + 8
        warning = [line for line in said if "No space" in line or "too large" in line]
        assert len(warning) == 1 and "wait in memory, training goes on" in said[0] and "\n" not in said[0]
        step += 9
        log.write(event(step))
        assert steps(folder) == list(range(1, step + 1)) and "is written again" in said[-1] and len(said) == 2
        said.clear()
    log.close()
    assert scan_log(folder)[1] == 0 and said == []
    figure("times without room, at any byte of a line of the log", count)


def test_what_waits_at_the_end_is_told(log, tmp_path, said):
    write(log, 1, 2)
    with files_no_larger_than((tmp_path / "r/log.jsonl").stat().st_size):
        write(log, 3, 5)
        log.close()
    assert steps(tmp_path / "r") == [1, 2] and len(said) == 2 and said[1].startswith("warning: 3 events are not in ")


def test_a_failing_disk_is_not_tried_at_every_step(log, tmp_path, said, monkeypatch):
    clock, tried = [100.0], []
    monkeypatch.setattr(run_log, "RETRY_SECONDS", 1.0)
    monkeypatch.setattr(run_log.time, "monotonic", lambda: clock[0])
    with files_no_larger_than(0):
        real = log._append
        monkeypatch.setattr(log, "_append", lambda lines: tried.append(len(lines)) or real(lines))
        for tenth in range(25):
            clock[0] = 100 + tenth / 10
            log.write(event(tenth + 1))
    assert len(tried) == 3
    clock[0] = 200.0
    log.write(event(26))
    assert steps(tmp_path / "r") == list(range(1, 27)) and len(said) == 2


@pytest.mark.parametrize("lost", ["folder", "file"])
def test_a_log_that_is_deleted_comes_back_whole(log, tmp_path, said, lost):
    folder = tmp_path / "r"
    write(log, 1, 3)
    if lost == "folder":
        shutil.rmtree(folder)
        write(log, 4, 6)
        assert not folder.exists() and len(said) == 1 and "No such file" in said[0]
        folder.mkdir()
    else:
        (folder / "log.jsonl").unlink()
    write(log, 7, 8)
    log.close()
    assert steps(folder) == ([*range(1, 9)] if lost == "folder" else [1, 2, 3, 7, 8])


def test_a_log_that_is_put_in_its_place_is_gone_on_with(log, tmp_path, said):
    write(log, 1, 3)
    write_log(tmp_path / "r", [event(2)])
    log.write(event(4))
    assert steps(tmp_path / "r") == [2, 4] and said == []


def test_a_folder_that_becomes_a_file(log, tmp_path, said):
    write(log, 1, 1)
    (tmp_path / "r").rename(tmp_path / "moved")
    (tmp_path / "r").touch()
    write(log, 2, 3)
    assert len(said) == 1 and "Not a directory" in said[0]
    (tmp_path / "r").unlink()
    (tmp_path / "moved").rename(tmp_path / "r")
    log.close()
    assert steps(tmp_path / "r") == [1, 2, 3]


def test_a_place_that_cannot_be_had_is_an_error_at_the_start(tmp_path):
    with pytest.raises(OSError):
        Log(tmp_path / "none", print)


def test_lines_reach_the_disk_when_asked(log, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(run_log.os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    sync_log(tmp_path / "r")
    sync_log(tmp_path)                                              # no log, nothing to do
    assert synced == [str(tmp_path / "r/log.jsonl")]


# ------------------------------------------------------------------------------------------------------- reading


TWO = [{"event": "train", "step": 1}, {"event": "train", "step": 2}]


@pytest.mark.parametrize(("tail", "unreadable"), [
    ('{"event": "train", "st', 0), ('{"event": "train", "step": 3', 0), ("\0\0\0\0", 0), ('{"a"\n', 1), ("7\n\n[1]\n", 2)])
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, tail, unreadable):
    write_log(tmp_path, TWO)
    with open(tmp_path / "log.jsonl", "a") as stream:
        stream.write(tail)
    assert read_log(tmp_path) == TWO and scan_log(tmp_path) == (TWO, unreadable)


def test_a_bad_line_in_the_middle_costs_no_other(tmp_path):
    lines = [json.dumps(event(step)) for step in range(1, 7)]
    lines[1], lines[3] = lines[1][:9] + "\0" + lines[1][9:], "\xff\xfe"
    (tmp_path / "log.jsonl").write_bytes(("\n".join(lines) + "\n").encode("latin-1"))
    events, unreadable = scan_log(tmp_path)
    assert [each["step"] for each in events] == [1, 3, 5, 6] and unreadable == 2


def test_curves_say_what_they_are_drawn_without(tmp_path):
    for name, spoilt in (("whole", False), ("spoilt", True), ("a/spoilt", True)):
        lines = [json.dumps(event(step) | {"lr": 0.1}) for step in range(1, 7)]
        lines[2:4] = ["{", "}"] if spoilt else lines[2:4]
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "log.jsonl").write_text("\n".join(lines) + "\n")
    assert views.draw_curves([str(tmp_path / "whole")]).get_suptitle() == "whole"
    assert "spoilt (without 2 unreadable line(s)" in views.draw_curves([str(tmp_path / "spoilt")]).get_suptitle()
    figure = views.draw_curves([str(tmp_path / name) for name in ("whole", "spoilt", "a/spoilt")])
    assert "3 runs" in figure.get_suptitle()


def test_a_missing_log_is_empty_and_writing_leaves_no_scraps(tmp_path):
    assert read_log(tmp_path) == []
    write_log(tmp_path, [{"step": 1}])
    write_log(tmp_path, [{"step": 2, "loss": "nan"}])
    assert read_log(tmp_path) == [{"step": 2, "loss": "nan"}] and os.listdir(tmp_path) == ["log.jsonl"]


def test_what_a_run_goes_on_after(tmp_path):
    """Each step of training once and in order; of another step or without one: nothing."""
    ends = [{"event": "eval", "step": 2, "split": split} for split in ("val", "test")]
    doubled = [*TWO, *ends, *TWO, {"event": "train"}, {"event": "train", "step": "3"}, {"event": "resume", "step": 2}, event(3)]
    write_log(tmp_path, [*doubled, event(4)])
    assert events_until(tmp_path, 3) == [*TWO, *ends, {"event": "resume", "step": 2}, event(3)]
    (tmp_path / "log.jsonl").write_text('{"step": ' + "9" * 5000 + "}\n")
    with pytest.raises(LogError, match="take the damaged line out"):
        events_until(tmp_path, 3)
