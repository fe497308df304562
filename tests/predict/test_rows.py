"""Rows as text, and their writing: completely or not at all."""

import csv
import json
import os
import select
import threading
from pathlib import Path

import numpy as np
import pytest
from rig import files_no_larger_than

from utils import process
from utils.files import InUseError, read_csv_table
from utils.predict.predictor import Answers
from utils.predict.rows import PIECE, Output, Table

ANSWERS = Answers(np.array([[1, 0], [0, 1]]), np.array([[0.75, 0.25], [0.6123456, 0.3876544]], np.float32),
                  np.array([1.386294, 0.49], np.float32), ((1, "cut off, maybe"),))
NAMES = ["a b.png", "=bad.png", os.fsdecode(b"caf\xe9.png")]


def test_csv_of_images_without_and_with_true_classes():
    table = Table(("cat", "dog"), 2, False)
    texts = table.texts(table.rows(NAMES, ANSWERS), "csv", first=True)
    text = "".join(texts)
    assert text.splitlines()[:3] == ["path,label,probability,top2,probability2,error", "a b.png,dog,0.750000,cat,0.250000,",
                                     '\'=bad.png,,,,,"cut off, maybe"']
    assert read_csv_table(text)[3] == [NAMES[2], "cat", "0.612346", "dog", "0.387654", ""] and "\r" not in text
    assert table.texts(table.rows(NAMES, ANSWERS), "csv", first=False) == texts[1:] and len(texts) == 4
    one = Answers(ANSWERS.labels[:, :1], ANSWERS.probabilities[:, :1], *ANSWERS[2:])
    true = Table(("cat", "dog"), 1, True)
    rows = list(csv.DictReader(true.texts(true.rows(NAMES, one, [0, 0, 0]), "csv", first=True)))
    assert list(rows[0].items()) == [("path", "a b.png"), ("true", "cat"), ("predicted", "dog"), ("probability", "0.750000"),
                                     ("loss", "1.386294"), ("error", "")]
    assert [rows[1][name] for name in ("true", "predicted", "probability", "loss")] == ["cat", "", "", ""]


def test_json_is_one_array_and_jsonl_has_an_object_on_each_line():
    table = Table(("cat", "dog"), 2, False)
    parts = [list(table.rows(NAMES, ANSWERS)), list(table.rows(NAMES, ANSWERS))]
    whole = "".join(text for number, rows in enumerate(parts) for text in table.texts(rows, "json", first=not number))
    whole += table.end("json")
    lines = [json.loads(line) for line in table.texts(parts[0], "jsonl", first=True)]
    assert json.loads(whole) == lines * 2 and table.end("csv") == table.end("jsonl") == ""
    assert lines[0] == {"path": "a b.png", "label": "dog", "probability": 0.75, "top2": "cat", "probability2": 0.25,
                        "error": None}
    assert lines[1]["label"] is lines[1]["probability2"] is None and lines[1]["error"] == "cut off, maybe"
    assert lines[2]["path"] == NAMES[2]


def test_a_file_gets_its_name_when_it_is_complete(tmp_path):
    output = Output(tmp_path / "new" / "x.csv")
    output.write(["path\n", NAMES[2] + "\n"])
    assert os.listdir(tmp_path / "new") == ["x.csv.partial"]
    output.finish()
    assert os.listdir(tmp_path / "new") == ["x.csv"] and (tmp_path / "new/x.csv").read_bytes() == b"path\ncaf\xe9.png\n"
    other = Output(tmp_path / "a/b/y.csv")
    assert other.leave() == "" and os.listdir(tmp_path) == ["new"]              # an error before the first row leaves no file
    kept = Output(tmp_path / "y.csv")
    kept.write(["path\n"])
    assert kept.leave() == f"the rows so far are in {tmp_path / 'y.csv.partial'}, and each is complete"
    assert (tmp_path / "y.csv.partial").read_bytes() == b"path\n"


def test_two_processes_do_not_write_the_same_file_and_a_file_made_meanwhile_is_kept(tmp_path):
    """The other process is a fork: the same process could lock the file again."""
    output = Output(tmp_path / "x.csv")
    output.write(["path\n"])

    def another() -> int:
        if (pid := os.fork()) == 0:
            code = 1
            try:
                Output(tmp_path / "x.csv")
            except InUseError as error:
                code = 7 if "x.csv.partial is in use: another process writes" in str(error) else 1
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert another() == 7 and (tmp_path / "x.csv.partial").read_bytes() == b"path\n"
    (tmp_path / "x.csv").write_text("of somebody else")
    with pytest.raises(OSError) as error:
        output.finish()
    assert process.classify_error(error.value) == (f"{tmp_path / 'x.csv'}: File exists", 2)
    assert (tmp_path / "x.csv").read_text() == "of somebody else" and "x.csv.partial" in output.leave()


def test_a_device_and_a_pipe_with_a_name_are_written_directly(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for file in (tmp_path / "pipe", "/dev/null"):
        output = Output(file)
        output.write(["path\n"])
        output.finish()
        assert output.leave() == "" and not Path(f"{file}.partial").exists()
    assert os.read(reader, 99) == b"path\n"
    os.close(reader)


@pytest.fixture
def standard_output(monkeypatch):
    """Return standard_output(descriptor), which makes an Output that writes there instead of to descriptor 1."""
    def make(descriptor: int) -> Output:
        output = Output(None)
        output._descriptor, output._shown = descriptor, False
        return output

    return make


def test_a_full_disk_keeps_complete_rows_and_is_reported_in_one_line(tmp_path, standard_output):
    output = Output(tmp_path / "x.csv")
    with files_no_larger_than(5000), pytest.raises(OSError) as error:
        output.write(["0123456\n"] * 900)
    message, code = process.classify_error(error.value)
    assert message == f"{tmp_path / 'x.csv'}: File too large" and code == 2
    assert output.leave() and Path(output.partial).read_text() == "0123456\n" * (PIECE // 8)
    descriptor = os.open(tmp_path / "redirected", os.O_WRONLY | os.O_CREAT)
    redirected = standard_output(descriptor)
    with files_no_larger_than(1003), pytest.raises(OSError, match="standard output"):
        for _ in range(3):
            redirected.write(["0123456\n"] * 100)
    assert Path(tmp_path / "redirected").read_text() == "0123456\n" * 100


def test_a_long_row_or_one_with_line_breaks_is_written_completely_or_not_at_all(tmp_path):
    """Names of files and classes may contain line breaks."""
    output, row, long = Output(tmp_path / "x.csv"), '"a\n' + "b" * 96 + '"\n', "c\n" + "d" * PIECE + "\n"
    with files_no_larger_than(PIECE + 50), pytest.raises(OSError):
        output.write([row] * 90)
    assert Path(output.partial).read_text() == row * (PIECE // len(row)) and PIECE % len(row)
    with files_no_larger_than(2 * PIECE - 50), pytest.raises(OSError):
        output.write([row, long])
    assert Path(output.partial).read_text() == row * (PIECE // len(row) + 1)


def test_a_closed_pipe_is_not_an_error_and_contains_complete_rows(standard_output):
    reader, writer = os.pipe()
    output = standard_output(writer)
    row, got = "x" * 99 + "\n", []
    thread = threading.Thread(target=output.write, args=([row] * 5000,))
    thread.start()
    while len(b"".join(got)) < 200_000:
        got.append(os.read(reader, 1000))
    assert select.select([reader], [], [], 20)[0]
    os.set_blocking(reader, False)
    left = os.read(reader, 1 << 20)                # the content of the pipe at some moment, as if the writer was killed
    assert (b"".join(got) + left).endswith(b"\n") and len(b"".join(got) + left) % 100 == 0 and PIECE % 100
    os.close(reader)
    thread.join(20)
    assert output.closed and not thread.is_alive()
    output.write(["more\n"])
    os.close(writer)
