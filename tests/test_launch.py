"""The variables of a launcher, and the folder of a launch."""

import os
from pathlib import Path

import pytest

from utils import launch, process

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VIT_CHECK", "TORCHELASTIC_RUN_ID",
         "TORCHELASTIC_RESTART_COUNT", "GROUP_RANK")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_LAUNCH", str(tmp_path))
    return tmp_path


def setenv(monkeypatch, words: str) -> None:
    for word in words.split():
        monkeypatch.setenv(*word.partition("=")[::2])


@pytest.mark.parametrize(("words", "place"), [
    ("", (0, 1, 0, 1)), ("RANK=0 WORLD_SIZE=1", (0, 1, 0, 1)), ("RANK= WORLD_SIZE=", (0, 1, 0, 1)),
    ("MASTER_PORT=tcp://10.0.0.1:80", (0, 1, 0, 1)),
    ("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", (3, 4, 1, 2)),
    ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", (1, 2, 0, 1)), ("RANK=1 VIT_CHECK=8x4", (0, 8, 0, 4))])
def test_place_is_read_from_the_environment(monkeypatch, words, place):
    setenv(monkeypatch, words)
    assert launch.place() == place


@pytest.mark.parametrize(("words", "why"), [
    ("RANK=1", "is not a valid rank"), ("RANK=x", "is not a valid rank"), ("RANK=-1 WORLD_SIZE=2", "is not a valid rank"),
    ("LOCAL_RANK=1", "is not a valid rank"), ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "is not a valid rank"),
    ("WORLD_SIZE=2", "means 2 processes, but RANK, MASTER_ADDR, MASTER_PORT are not set"),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a", "but MASTER_PORT is not set"),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=tcp://10.0.0.1:80", "has no valid port")])
def test_inconsistent_variables_are_reported_with_advice(monkeypatch, words, why):
    setenv(monkeypatch, words)
    with pytest.raises(launch.LaunchError, match=why) as caught:
        launch.place()
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    line = str(caught.value)
    assert all(word in line and f"-u {word.partition('=')[0]}" in line for word in words.split())


def test_inconsistent_variables_end_only_programs_of_several_processes(monkeypatch, capfd):
    setenv(monkeypatch, "RANK=1 LOCAL_RANK=1")
    with pytest.raises(SystemExit) as end, process.program("x.py", single_process=False):
        raise AssertionError("not reached")
    assert end.value.code == 2
    assert capfd.readouterr().err.startswith("x.py: error: the environment has RANK=1 LOCAL_RANK=1, which")
    with process.program("x.py"):
        assert launch.place() == (0, 1, 0, 1) and launch.is_first_of_node() and "RANK" not in os.environ


def test_only_torchrun_counts_as_launcher(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not launch.below_launcher()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert launch.below_launcher()


@pytest.mark.parametrize(("words", "one", "node", "attempt"), [
    ("", True, 0, "attempt-0"), ("VIT_CHECK=8x8", True, 0, "attempt-0"), ("VIT_CHECK=8x4", False, 0, "attempt-0"),
    ("RANK=1 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 TORCHELASTIC_RESTART_COUNT=3 TORCHELASTIC_RUN_ID=x", True, 0, "attempt-3"),
    ("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 TORCHELASTIC_RUN_ID=attempt-7", False, 1, "attempt-7"),
    ("RANK=3 WORLD_SIZE=4 LOCAL_WORLD_SIZE=1 GROUP_RANK=2 TORCHELASTIC_RESTART_COUNT=3", False, 2, "attempt-0")])
def test_attempt_is_named_by_the_rendezvous_on_several_nodes(monkeypatch, words, one, node, attempt):
    """A node that is started again counts its restarts from 0."""
    setenv(monkeypatch, "MASTER_ADDR=a MASTER_PORT=1 " + words)
    assert (launch.one_node(), launch.node(), launch.attempt()) == (one, node, attempt)


def test_first_exit_code_counts_and_each_restart_has_its_own(folder, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with process.StopSignal():
        assert (folder / "pid-3").read_text() == f"{os.getpid()}\n"          # train.sh reads them all at once
    (folder / "pid-3").unlink()
    assert launch.posted_exit_code() is None
    assert launch.post_exit_code(6) is True and launch.post_exit_code(8) is False and launch.posted_exit_code() == 6
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert launch.restarts() == 2 and launch.post_exit_code(0) is True
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"code-000": "6", "code-002": "0"}
    monkeypatch.setenv("VIT_LAUNCH", str(folder / "gone"))
    assert launch.post_exit_code(2) is None
    monkeypatch.delenv("VIT_LAUNCH")
    assert launch.post_exit_code(2) is None and launch.launch_file("folder") is None


def test_process_0_resumes_the_same_run_after_a_restart(folder, monkeypatch, tmp_path):
    flags = {"resume_path": "output/a", "num_steps": 5}
    typed = {"resume_path": "output/a"}
    assert launch.resume_flags(flags) == typed
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert launch.resume_flags(flags) == typed                     # a process was lost before there was a folder
    run = tmp_path / "runs\udcf6" / "b"                            # a name of any bytes
    run.mkdir(parents=True)
    (folder / "folder").write_bytes(os.fsencode(run))
    here = typed | {"output_dir": str(run.parent), "name": "b"}
    assert launch.resume_flags(flags) == here
    (run / "step-000003.pt").touch()
    assert launch.resume_flags(flags) == here | {"resume_path": "auto"}
    assert launch.resume_flags(flags | {"eval_only": True}) == typed
    monkeypatch.delenv("VIT_LAUNCH")
    with pytest.raises(launch.LaunchError, match="--name"):
        launch.resume_flags(flags)
    assert launch.resume_flags({"name": "c"}) == {"output_dir": "output", "name": "c", "resume_path": "auto"}


def test_commands_to_copy_work_in_the_users_folder(tmp_path, monkeypatch):
    """In the project's folder; in another from which train.sh was called, which changes to the project's; and in another with
    python /path/to/train.py, where paths may be relative."""
    monkeypatch.delenv("VIT_CALLED_FROM", raising=False)
    monkeypatch.delenv("VIT_TYPED", raising=False)
    monkeypatch.setattr(launch, "python_command", lambda: "python")
    monkeypatch.chdir(launch.ROOT)
    assert launch.command("train.py") == "python train.py" and launch.command("train.sh", "A=1") == "A=1 bash train.sh"
    assert launch.command_to_resume(Path("output/r s"), 6) == "RESUME_PATH='output/r s' NUM_STEPS=6 bash train.sh"
    with monkeypatch.context() as patch:
        patch.setenv("VIT_TYPED", "GPUS=0 NPROC=2 ")
        assert launch.command_to_resume(Path("output/r")) == "GPUS=0 NPROC=2 RESUME_PATH=output/r bash train.sh"
    monkeypatch.setenv("VIT_CALLED_FROM", str(tmp_path))
    assert launch.command_to_resume(Path("output/r")) == f"cd {launch.ROOT} && RESUME_PATH=output/r bash train.sh"
    assert launch.command("-m tensorboard.main") == f"cd {launch.ROOT} && python -m tensorboard.main"
    monkeypatch.delenv("VIT_CALLED_FROM")
    monkeypatch.chdir(tmp_path)
    assert launch.command_to_resume(Path("output/r"), 6) == (
        f"python {launch.ROOT}/train.py --resume_path output/r --num_steps 6")
    assert launch.command("train.sh", "A=1") == f"A=1 bash {launch.ROOT}/train.sh"
    assert launch.command("-m tensorboard.main") == "python -m tensorboard.main"


def test_the_python_of_a_hint_has_the_packages(tmp_path, monkeypatch):
    """That of a .venv which is not active links to the system's, which is `python` in the shell and lacks the packages."""
    for folder in ("usr/bin", "project/.venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    system, own = tmp_path / "usr/bin/python", tmp_path / "project/.venv/bin/python"
    system.write_text("#!/bin/sh\n")
    system.chmod(0o755)
    own.symlink_to(system)
    (tmp_path / "project/.venv/pyvenv.cfg").touch()
    monkeypatch.setattr(launch.sys, "executable", str(own))
    monkeypatch.setenv("PATH", str(system.parent))
    monkeypatch.chdir(tmp_path)
    assert launch.python_command() == "project/.venv/bin/python"
    monkeypatch.chdir(system.parent)
    assert launch.python_command() == str(own)
    monkeypatch.setenv("PATH", f"{own.parent}:{system.parent}")
    assert launch.python_command() == "python"                     # active
    monkeypatch.setattr(launch.sys, "executable", str(system))
    assert launch.python_command() == str(system)
    monkeypatch.setenv("PATH", str(system.parent))
    assert launch.python_command() == "python"
    assert launch.command_to_install("a.txt") == f"python -m pip install -r {launch.ROOT}/a.txt"
    monkeypatch.chdir(launch.ROOT)
    assert launch.command_to_install("a.txt") == "python -m pip install -r a.txt"
    assert launch.command_to_install("timm") == "python -m pip install timm"


def test_machine_is_measured_in_another_process(monkeypatch):
    device, memory, cores = launch.machine_here("cpu")
    assert device == "cpu" and memory > 1 << 28 and cores >= 1
    assert launch.machine_here("cuda") == () or launch.machine_here("cuda")[0] == "cuda"
