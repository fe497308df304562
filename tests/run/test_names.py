"""The names of files in a run folder, and the refusal of a taken name before PyTorch loads."""

import subprocess
import sys

import pytest
from rig import ROOT

import sweep
from utils.config import FLAGS
from utils.run.names import FolderError, check_free, checkpoint_files, step_path


def test_checkpoints_come_newest_first_and_the_best_last(tmp_path):
    for file in ("best.pt", "step-00000020.pt", "step-00000100.pt", "step-5.pt", "notes.txt"):
        (tmp_path / file).touch()
    assert [path.name for path in checkpoint_files(tmp_path)] == ["step-00000100.pt", "step-00000020.pt", "best.pt"]
    assert step_path(tmp_path, 20) == tmp_path / "step-00000020.pt"


def test_a_taken_name_is_refused_before_pytorch_loads(tmp_path):
    """In train.py, which train.sh calls before torchrun, and in sweep.py."""
    (tmp_path / "output/r").mkdir(parents=True)
    (tmp_path / "output/r/step-00000020.pt").touch()
    check_free(str(tmp_path / "output"), "other")
    with pytest.raises(FolderError, match="already holds a run"):
        check_free(str(tmp_path / "output"), "r")
    code = "import sys, train; code = train.main(['--name', 'r']); assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
                          capture_output=True, text=True)
    assert done.returncode == 2 and "output/r already holds a run. Resume it (" in done.stderr, done.stderr


def test_a_sweep_continues_in_its_own_folder_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / FLAGS["output_dir"].default / sweep.NAME
    folder.mkdir(parents=True)
    sweep.check_folder({})
    (folder / "best.pt").touch()
    with pytest.raises(FolderError):
        sweep.check_folder({})
    (folder / "sweep.json").touch()
    sweep.check_folder({})
