"""TMPDIR: an error if it cannot be used, and a short folder for sockets."""

import pytest

from utils import process, temporary


def test_unusable_tmpdir_is_reported(monkeypatch, capfd, tmp_path):
    for folder in (tmp_path / "gone", tmp_path / "file"):
        (tmp_path / "file").touch()
        monkeypatch.setenv("TMPDIR", str(folder))
        with pytest.raises(SystemExit) as end, process.program("x.py"):
            raise AssertionError("not reached")
        line = capfd.readouterr().err
        assert end.value.code == 2 and line.startswith(f"x.py: error: TMPDIR={folder}: cannot") and line.count("\n") == 1
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    temporary.check()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_sockets_get_a_short_folder(monkeypatch, tmp_path):
    short, long = tmp_path / "s", tmp_path / ("x" * 100)
    short.mkdir()
    long.mkdir()
    for folder, expected in ((short, short), (long, "/tmp")):
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        assert temporary.socket_folder() == str(expected)
    monkeypatch.setattr(temporary, "SHORT", (str(tmp_path / "gone"),))
    with pytest.raises(OSError, match="is longer than"):
        temporary.socket_folder()
