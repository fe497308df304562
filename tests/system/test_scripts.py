"""The shell scripts as a user runs them, each in a process."""

import functools
import glob
import http.server
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from rig import command_of, until
from runs import VARIABLES, load_state

import train
from utils.config import parse
from utils.run import checkpoint

ROOT = Path(__file__).resolve().parents[2]


def command_words(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.strip().splitlines()[-1])


def flags_after(words: list[str]) -> dict:
    return parse(words[words.index("train.py") + 1:])


# ---------------------------------------------------------------------------------------------------- the runs


@pytest.mark.slow
def test_first_command_of_the_readme_on_two_processes(tmp_path, capsys):
    """In a folder whose name needs quotes: a wrong flag, then a signal, then the command that the run prints to resume."""
    place, folder = tmp_path / "a folder", tmp_path / "a folder" / "digits"
    clean = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}

    def start(*flags: str, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "train.sh", "--output_dir", str(place), "--log_dir", str(tmp_path / "logs"), *flags], cwd=ROOT, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=clean | {"PYTHON": sys.executable, "NPROC": "2", **variables})

    def end(process: subprocess.Popen) -> tuple[int, str, str]:
        printed, errors = process.communicate(timeout=600)
        assert "Traceback" not in errors and "leaked" not in errors, errors
        return process.returncode, printed, errors

    code, _, errors = end(start("--train_batch_size", "33"))
    line, = (line for line in errors.splitlines() if "error" in line.lower())
    assert code == 2 and "use 32 or 34" in line and not place.exists(), errors

    process = start("--save_every", "10")
    try:
        until(lambda: folder.exists() and checkpoint.step_files(folder), 300, "a checkpoint")
        process.terminate()
        code, printed, errors = end(process)
    finally:
        process.kill()
    assert code == 143, errors
    hint = shlex.split(printed.rpartition("Resume with: ")[2])
    assert {"NPROC=2", f"RESUME_PATH={folder}"} <= set(hint) and hint[-2:] == ["bash", "train.sh"], hint
    assert not [path for path in Path("/proc").glob("[0-9]*") if str(place) in command_of(int(path.name))]
    stopped, = (load_state(file).step for file in checkpoint.step_files(folder)[:1])
    assert 10 <= stopped < 100 and not checkpoint.open_newest(folder).skipped

    code, printed, errors = end(start(RESUME_PATH=str(folder)))
    assert code == 0, errors
    after, before = map(float, re.search(r"([\d.]+)% after the last step \(500 .*before training ([\d.]+)%", printed).groups())
    assert before < 20 and after > 90, (before, after)
    assert load_state(checkpoint.step_files(folder)[0]).step == 100
    assert (folder / "best.pt").exists() and (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "logs" / "digits").iterdir())
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "train"] == list(range(1, 101))
    assert [event["world_size"] for event in events if event["event"] in ("start", "resume")] == [2, 2]
    assert train.main(["--device", "cpu", "--eval_only", "--resume_path", str(folder / "best.pt")]) == 0
    assert re.search(r"test accuracy 9\d\.\d\d%", capsys.readouterr().out)


@pytest.mark.parametrize("given", [{}, {"FP16_OPT_LEVEL": "O3"}])
def test_train_fp16_sh_sets_half_precision(run_script, given):
    """tests/system/test_resuming.py and tests/training/test_precision.py test the levels themselves."""
    flags = flags_after(command_words(run_script("train_fp16.sh", DRY_RUN="1", **given)))
    assert flags == {"precision": "fp16", "fp16_opt_level": given.get("FP16_OPT_LEVEL", "O2")}


# ------------------------------------------------------------------------------------------------ the variables

LAUNCH = {"MAX_RESTARTS", "GPUS", "NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}


def test_every_variable_of_the_script_is_tested():
    named = set(re.findall(r"^([A-Z0-9_]+)=\$\{\1:-", (ROOT / "train.sh").read_text(), re.MULTILINE))
    assert named == set(VARIABLES) | LAUNCH


@pytest.mark.parametrize(("variables", "words"), [
    ({}, "--nproc_per_node 1"), ({"GPUS": "0,1"}, "--nproc_per_node 2"), ({"GPUS": "3"}, "--nproc_per_node 1"),
    ({"NPROC": "4"}, "--nproc_per_node 4"), ({"CUDA_VISIBLE_DEVICES": "0,2,5"}, "--nproc_per_node 3"),
    ({"GPUS": "0,1", "NPROC": "1"}, "--nproc_per_node 1"),
    ({"GPUS": "MIG-GPU-8932f937/1/0"}, "--nproc_per_node 1"), ({"GPUS": "GPU-8932f937,GPU-5f1d"}, "--nproc_per_node 2"),
    ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29501", "NPROC": "8"},
     "--nnodes 2 --rdzv_backend nodes --rdzv_endpoint node0:29501 --rdzv_conf rank=1 --nproc_per_node 8")])
def test_processes_and_nodes(run_script, variables, words):
    """Variables that are not set are not passed on."""
    command = command_words(run_script("train.sh", DRY_RUN="1", **variables))
    words = words.split()
    assert set(zip(words[::2], words[1::2])) <= set(itertools.pairwise(command))
    assert ("--standalone" in command) == ("NNODES" not in variables) and flags_after(command) == {}
    assert "GPUS" not in variables or f"CUDA_VISIBLE_DEVICES={variables['GPUS']}" in command


@pytest.mark.parametrize(("gpus", "visible", "processes"), [
    ("cuda:0,cuda:1", "0,1", 2), ("0, 1", "0,1", 2), ("0 1,", "0,1", 2), ("all", "0,1", 2), ("", "0,1", 2), ("cpu", "", 1),
    ("none", "", 1), ("-1", "", 1)])
def test_devices_can_be_named_in_several_ways(run_script, two_gpus, gpus, visible, processes):
    """GPUs of the machine are passed on one by one, so that train.py can refuse a PyTorch that cannot use them."""
    words = command_words(run_script("train.sh", DRY_RUN="1", GPUS=gpus, PATH=two_gpus))
    assert f"CUDA_VISIBLE_DEVICES={visible}" in words and words[words.index("--nproc_per_node") + 1] == str(processes)


def test_all_means_the_gpus_that_a_batch_system_assigned(run_script, two_gpus):
    words = command_words(run_script("train.sh", DRY_RUN="1", GPUS="all", PATH=two_gpus, CUDA_VISIBLE_DEVICES="4,5,6"))
    assert words[words.index("--nproc_per_node") + 1] == "3" and not any("CUDA_VISIBLE" in word for word in words)


@pytest.fixture
def two_gpus(tmp_path):
    """Return a PATH whose nvidia-smi lists two GPUs, one of them with a MIG partition."""
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\necho '  MIG 1g.18gb Device 0: (UUID: MIG-2)'\n"
                   "echo 'GPU 1: NVIDIA H200 (UUID: GPU-3)'\n")
    smi.chmod(0o755)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


@pytest.mark.parametrize(("gpus", "words"), [
    ("2", "there is no GPU 2. nvidia-smi lists 2, numbered from 0"), ("0,0", "names 0 twice"), ("two", "'two' is not a device"),
    ("0;1", "'0;1' is not a device"), ("cuda", "'cuda' is not a device"),
    ("mps", "bash train.sh --device mps")])
def test_invalid_devices_are_refused(run_script, two_gpus, gpus, words):
    done = run_script("train.sh", GPUS=gpus, PATH=two_gpus)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_all_without_a_gpu_is_refused(run_script, tmp_path):
    python = tmp_path / "python3"
    python.write_text(f"""#!/usr/bin/env bash
[ "$1" != - ] || exec "{sys.executable}" "$@"
echo 0
""")
    python.chmod(0o755)
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    smi.chmod(0o755)
    done = run_script("train.sh", DRY_RUN="1", GPUS="all", PYTHON=str(python), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2 and re.search("neither nvidia-smi nor PyTorch finds a GPU|is no GPU here", done.stderr)
    done = run_script("train.sh", DRY_RUN="1", GPUS="all", CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 2 and "CUDA_VISIBLE_DEVICES=-1 hides every GPU" in done.stderr


@pytest.mark.skipif(bool(glob.glob("/dev/nvidia[0-9]*") or shutil.which("nvidia-modprobe")), reason="where there is no GPU")
@pytest.mark.parametrize(("name", "value"), [("GPUS", "0"), ("GPUS", "GPU-89"), ("GPUS", "all"), ("CUDA_VISIBLE_DEVICES", "7")])
def test_gpus_where_there_is_none_are_refused_without_pytorch(run_script, tmp_path, name, value):
    python = tmp_path / "python3"
    python.write_text(f"""#!/usr/bin/env bash
[ "$1" != - ] || exec "{sys.executable}" "$@"
touch "{tmp_path}/started"
""")
    python.chmod(0o755)
    done = run_script("train.sh", PYTHON=str(python), **{name: value})
    assert done.returncode == 2 and re.search(f"{name}={value}: there is no GPU here", done.stderr), done.stderr
    assert not (tmp_path / "started").exists()


def test_variables_of_other_launchers_do_not_reach_a_run_of_one_node(run_script, tmp_path):
    """Kubeflow sets all of these. torchrun obeys PET_NNODES and would wait for other nodes."""
    python = tmp_path / "python3"
    python.write_text(f"""#!/usr/bin/env bash
[ "$1" != - ] || exec "{sys.executable}" "$@"
env > "{tmp_path}/environment"
""")
    python.chmod(0o755)
    done = run_script("train.sh", PYTHON=str(python), RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="nohost",
                      MASTER_PORT="tcp://10.0.0.1:80", PET_NNODES="4", PET_NODE_RANK="1")
    assert done.returncode == 0 and "this run has one node" in done.stderr, done.stderr
    names = {line.partition("=")[0] for line in (tmp_path / "environment").read_text().splitlines()}
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "PET_NNODES", "PET_NODE_RANK"} & names
    assert "-u PET_NNODES" in done.stdout and "--standalone" in done.stdout


@pytest.mark.slow
def test_a_request_to_stop_ends_a_node_even_if_torchrun_hangs(tmp_path):
    """torchrun may wait for a store on a machine that is gone."""
    python = tmp_path / "python3"
    python.write_text(f"""#!/usr/bin/env bash
[ "$1" != - ] || exec "{sys.executable}" "$@"
[ "$1" = -m ] || exit 0
trap '' TERM
echo waiting
for second in {{1..60}}; do sleep 1; done
""")
    python.chmod(0o755)
    waiting = subprocess.Popen(
        ["bash", "train.sh"], cwd=ROOT, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHON": str(python), "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29501"})
    assert waiting.stdout.readline() and waiting.stdout.readline() == "waiting\n"
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(40) == 143
    waiting.stdout.close()


def test_name_is_ignored_if_it_is_the_computers(run_script):
    """WSL sets NAME to the name of the computer."""
    host = os.uname().nodename
    done = run_script("train.sh", DRY_RUN="1", NAME=host.upper(), WSL_DISTRO_NAME="Ubuntu")
    assert flags_after(command_words(done)) == {} and f"NAME={host.upper()} is ignored, because" in done.stderr
    done = run_script("train.sh", DRY_RUN="1", NAME="own", WSL_DISTRO_NAME="Ubuntu")
    assert flags_after(command_words(done)) == {"name": "own"}


def test_the_printed_command_can_be_pasted(tmp_path, two_gpus):
    """Bash reads the same words from it that the script itself passes on. A stand-in for Python records them."""
    python = tmp_path / "python3"
    python.write_text(f"""#!/usr/bin/env bash
[ "$1" != - ] || exec "{sys.executable}" "$@"
printf '%s\\0' "$OMP_NUM_THREADS" "$CUDA_VISIBLE_DEVICES" "$@" > "$NOTES"
""")
    python.chmod(0o755)
    odd = ["--output_dir", str(tmp_path / "a b"), "--name", "it's $HOME *", "--pretrained_dir", 'x"\\;&(', "--log_dir", "\n"]
    environment = os.environ | {"PYTHON": str(python), "GPUS": "0,1", "DATA_DIR": "my data\t'", "NOTES": str(tmp_path / "run"),
                                "PATH": two_gpus}
    done = subprocess.run(["bash", "train.sh", *odd], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = os.environ | {"NOTES": str(tmp_path / "pasted")}
    assert subprocess.run(["bash", "-c", done.stdout], cwd=ROOT, env=environment).returncode == 0
    ran, pasted = ((tmp_path / name).read_bytes().split(b"\0")[:-1] for name in ("run", "pasted"))
    assert ran == pasted and ran[1] == b"0,1" and ran[-len(odd):] == [word.encode() for word in odd]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_script_returns_the_exit_code_of_the_run_when_its_watcher_ended_first(run_script, tmp_path):
    python = tmp_path / "python3"
    python.write_text(f"""#!/usr/bin/env bash
[ "$1" != - ] || exec "{sys.executable}" "$@"
[ "$1" = -m ] || exit 0
while watcher=$(tr " " "\n" < /proc/$PPID/task/$PPID/children | grep -vx $$); [ -z "$watcher" ]; do :; done
kill -KILL $watcher
echo 4 > "$VIT_LAUNCH/code-000"
echo "$VIT_LAUNCH"
""")
    python.chmod(0o755)
    done = run_script("train.sh", PYTHON=str(python), timeout=60)
    assert done.returncode == 4 and not Path(done.stdout.splitlines()[-1]).exists(), done.stderr


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("variables", "words"), [
    ({"NNODES": "2"}, "MASTER_ADDR"), ({"NPROC": "two"}, "NPROC=two"), ({"NNODES": "many"}, "NNODES=many"),
    ({"NPROC": "0"}, "NPROC=0"), ({"NODE_RANK": "1"}, "Set NNODES"), ({"TMPDIR": "/no/such"}, "TMPDIR=/no/such: cannot write"),
    ({"NNODES": "2", "MASTER_ADDR": "a", "MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT=tcp")])
def test_bad_variables_are_reported_before_the_start(run_script, variables, words):
    done = run_script("train.sh", DRY_RUN="1", **variables)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("variables", "flags", "words"), [
    ({"RESUME_PATH": "run"}, [], "nothing to resume at run (searched in "),
    ({"NPROC": "3"}, [], "--train_batch_size 64 is not divisible by 3 processes"),
    ({}, ["--distillation", "hard", "--teacher", "docs"], "--teacher: docs holds no intact checkpoint: it is not a run folder")])
def test_what_needs_no_pytorch_is_refused_before_torchrun(run_script, tmp_path, variables, flags, words):
    """Within a second on an idle machine. tests/system/test_train.py has more such errors."""
    python = tmp_path / "python3"
    python.write_text(f"""#!/usr/bin/env bash
[ "$1" != -m ] || {{ echo launched; exit 9; }}
exec "{sys.executable}" -X importtime "$@"
""")
    python.chmod(0o755)
    done = run_script("train.sh", *flags, PYTHON=str(python), **variables)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(errors) == 1 and words in errors[0], done.stderr[-3000:]
    assert "torchrun" not in done.stdout.splitlines() and not re.search(r"\| +(torch|numpy)$", done.stderr, re.MULTILINE)


def test_a_relative_path_in_the_callers_folder_is_named_in_the_error(tmp_path):
    (tmp_path / "run").mkdir()
    done = subprocess.run(["bash", str(ROOT / "train.sh"), "--resume_path", "run"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 2 and f"searched in {ROOT}" in done.stderr and f"{tmp_path / 'run'} exists" in done.stderr


def test_help_needs_no_torchrun(run_script):
    done = run_script("train.sh", "--help")
    assert done.returncode == 0 and done.stdout.count("usage: train.py") == 1


# ------------------------------------------------------------------------------------- other shells and systems


@pytest.mark.parametrize("script", ["train.sh", "train_fp16.sh"])
@pytest.mark.parametrize("shell", ["sh", "dash", "bash --posix", ""])
def test_the_scripts_run_in_bash_from_any_shell(script, shell):
    """Also as ./train.sh."""
    words = [*shell.split(), f"./{script}"]
    if shell and not shutil.which(words[0]):
        pytest.skip(f"no {words[0]} here")
    done = subprocess.run([*words, "--data_dir", "a b"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHON": sys.executable, "DRY_RUN": "1"})
    assert flags_after(command_words(done))["data_dir"] == "a b" and not done.stderr


@pytest.mark.parametrize("program", ["train.py", "dataset.py", "sweep.py", "visualize.py", "annotate.py", "export.py"])
def test_windows_is_reported_in_one_line(program):
    code = (f"import sys, runpy, signal, pathlib, subprocess; sys.platform = 'win32'; sys.argv = ['{program}']; "
            f"sys.path.insert(0, ''); runpy.run_path('{program}', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == (f"{program}: error: Windows itself is not supported. Use WSL 2 (wsl "
                                                    "--install) and start the program there.\n")


def test_a_clone_on_windows_has_the_same_files(tmp_path):
    """git changes the line endings there, unless .gitattributes says otherwise."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    project = tmp_path / "project"
    for name in (".gitattributes", "train.sh", "utils/python.sh", "configs.py", "assets/ViT-Nano_2-letters.npz"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=true", "-c", "core.safecrlf=false"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"], ["rm", "-q", "-r", "--cached", "."],
                  ["clone", "-q", "-c", "core.autocrlf=true", ".", str(tmp_path / "clone")]):
        subprocess.run([*git, *words], cwd=project, check=True)
    for path in project.rglob("*"):
        if path.is_file() and ".git" not in path.relative_to(project).parts:
            assert (tmp_path / "clone" / path.relative_to(project)).read_bytes() == path.read_bytes(), path
    assert os.access(tmp_path / "clone" / "train.sh", os.X_OK)


# ------------------------------------------------------------------------------------- the environment

STUB = """#!/usr/bin/env bash
# A Python without PyTorch: records its arguments, and makes an environment whose Python is another stub.
echo "$(basename "$0") $*" >> "{log}"
case "$*" in
    "-m venv --clear .venv"*) rm -rf "$4"; mkdir -p "$4/bin"; cp "{inner}" "$4/bin/python" ;;
    *" -m pip install"*|"-m pip install"*) {pip} ;;
    "-m pip --version") [ -e "$(dirname "$0")/../.." ] ;;
    "--version") echo "Python 3.12.0" ;;
    -c*) exec "{real}" "$@" ;;
    *) {modules} ;;
esac
"""


@pytest.fixture
def bare_machine(tmp_path, monkeypatch):
    """Return a copy of the scripts, a log of calls, and a Python without any packages, whose `pip install` adds the modules."""
    project, log = tmp_path / "pro ject", tmp_path / "calls"
    (project / "utils").mkdir(parents=True)
    monkeypatch.setenv("VIT_TORCH_CPU_INDEX", "")
    monkeypatch.delenv("VENV", raising=False)
    names = [f"requirements{kind}" for kind in (".txt", ".lock", "-test.txt", "-test.lock", "-reference.txt")]
    for name in ("train.sh", "train_fp16.sh", "sweep.sh", "test.sh", "utils/python.sh", "utils/machine.sh", *names):
        shutil.copy(ROOT / name, project / name)

    def stub(name: str, pip: str, modules: str) -> Path:
        path = tmp_path / name
        path.write_text(STUB.format(log=log, inner=tmp_path / "inner", real=sys.executable, pip=pip, modules=modules))
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        return path

    stub("inner", 'touch "$(dirname "$0")/../installed"', '[ -e "$(dirname "$0")/../installed" ]')
    return project, log, stub("python3", "exit 1", "exit 1")


def test_first_use_makes_the_environment_once(run_script, bare_machine):
    """An interrupted installation is completed in the same environment."""
    project, log, python = bare_machine
    done = run_script("train.sh", cwd=project, PYTHON=str(python))
    assert done.returncode == 0 and done.stdout.count("First use: installing") == 1, done.stderr
    assert "-m pip install --disable-pip-version-check -r requirements.txt" in log.read_text()
    assert ".venv/bin/python -m utils.distributed.torchrun" in done.stdout
    for interrupted in (False, True):
        log.unlink()
        if interrupted:
            (project / ".venv" / "installed").unlink()
        done = run_script("train.sh", cwd=project, PYTHON=str(python))
        assert done.returncode == 0 and ("installing" in done.stdout) == ("pip install" in log.read_text()) == interrupted
        assert "-m venv" not in log.read_text()


def test_locked_installs_the_lock_with_hashes_into_a_separate_folder(run_script, bare_machine):
    """With any Python. It installs once, and again when the lock changes or an installation was not finished."""
    project, log, python = bare_machine
    assert command_words(run_script("train.sh", cwd=project, PYTHON=sys.executable, LOCKED="1", DRY_RUN="1"))[2] == (
        ".venv-locked/bin/python") and not (project / ".venv-locked").exists()
    done = run_script("train.sh", cwd=project, PYTHON=str(python), LOCKED="1")
    assert done.returncode == 0 and ".venv-locked/bin/python -m utils.distributed.torchrun" in done.stdout, done.stderr
    install = "-m pip install --disable-pip-version-check --require-hashes --only-binary :all: -r requirements"
    assert f"{install}.lock" in log.read_text() and not (project / ".venv").exists()
    assert run_script("train.sh", cwd=project, PYTHON=str(python), LOCKED="1").returncode == 0
    assert log.read_text().count(install) == 1
    (project / "requirements.lock").write_text("tqdm==1.0\n")
    assert run_script("train.sh", cwd=project, PYTHON=str(python), LOCKED="1").returncode == 0
    (project / ".venv-locked/requirements.lock").unlink()
    assert run_script("train.sh", cwd=project, PYTHON=str(python), LOCKED="1").returncode == 0
    assert run_script("test.sh", cwd=project, PYTHON=str(python), LOCKED="1").returncode == 0
    calls = log.read_text()
    assert calls.count(install) == 4 and f"{install}-test.lock" in calls and calls.count("-m venv") == 1


def test_an_environment_without_pip_is_recreated(run_script, bare_machine):
    """A Python without the venv package leaves such an environment behind."""
    project, log, python = bare_machine
    broken = project / ".venv" / "bin" / "python"
    broken.parent.mkdir(parents=True)
    broken.write_text("#!/usr/bin/env bash\nexit 1\n")
    broken.chmod(0o755)
    done = run_script("train.sh", cwd=project, PYTHON=str(python))
    assert done.returncode == 0 and ".venv/bin/python -m utils.distributed.torchrun" in done.stdout, done.stderr
    assert "-m venv --clear .venv" in log.read_text()


def test_dry_run_installs_nothing_and_a_missing_python_is_reported(run_script, bare_machine):
    project, _, python = bare_machine
    done = run_script("train.sh", cwd=project, PYTHON=str(python), DRY_RUN="1")
    assert command_words(done)[2] == ".venv/bin/python" and not (project / ".venv").exists()
    done = run_script("train.sh", cwd=project, PYTHON="/no/such/python")
    assert done.returncode == 2 and "Python 3.10 or newer" in done.stderr and done.stderr.count("\n") == 1


def test_a_python_with_pytorch_that_lacks_a_small_package_is_named(run_script, bare_machine, tmp_path):
    """Instead of installing PyTorch a second time, unless VENV is set. An unfinished installation is completed."""
    project, log, bare = bare_machine
    python = tmp_path / "almost"
    python.write_text(f"""#!/usr/bin/env bash
[ "$1" != - ] || {{ echo ml_collections safetensors; exit; }}
exec "{bare}" "$@"
""")
    python.chmod(0o755)
    done = run_script("train.sh", cwd=project, PYTHON=str(python))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (project / ".venv").exists()
    assert "has PyTorch but lacks ml_collections safetensors" in done.stderr and "VENV=.venv bash" in done.stderr
    assert f"{python} -m pip install -r requirements.txt" in done.stderr
    assert run_script("train.sh", cwd=project, PYTHON=str(python), VENV=".venv").returncode == 0
    (project / ".venv" / "installed").unlink()
    assert run_script("train.sh", cwd=project, PYTHON=str(python)).returncode == 0
    assert log.read_text().count("pip install") == 2


def test_an_unwritable_folder_is_named(run_script, bare_machine):
    project, log, python = bare_machine
    done = run_script("train.sh", cwd=project, PYTHON=str(python), VENV="requirements.txt/venv")
    assert done.returncode == 2 and "cannot write to the folder requirements.txt/venv" in done.stderr
    assert "python3-venv" not in done.stderr
    assert done.stderr.count("\n") == 1 and "-m venv" not in log.read_text()


def make_wheel(folder: Path, name: str, version: str, module: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or any(Path("/dev").glob("nvidia[0-9]*")), reason="for Linux without a GPU")
def test_the_first_installation_takes_the_build_for_cpus_where_no_gpu_is(tmp_path, bare_machine):
    """With pip and tiny packages. The CPU build is on a separate index; if that is not reachable, the other build is used."""
    base = Path(sys.executable).resolve()
    if not subprocess.run([base, "-c", "import torch"], capture_output=True).returncode:
        pytest.skip("this Python has PyTorch already")
    project, _, _ = bare_machine
    make_wheel(tmp_path / "pypi", "tqdm", "1.0", "tqdm")
    for name, version in (("torch", "2.15.0"), ("torchvision", "0.30.0")):
        make_wheel(tmp_path / "pypi", name, version, name)
        make_wheel(tmp_path / "cpu" / name, name, f"{version}+cpu", name)
    (project / "requirements.txt").write_text("torch>=2.11\ntorchvision>=0.26\ntqdm\n")
    (project / "use.sh").write_text("source utils/python.sh\nuse_python requirements.txt torch torchvision tqdm\n")
    (project / "ask.sh").write_text("source utils/python.sh\nactive=$PYTHON\ncpu_index\n")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "cpu"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    index = f"http://127.0.0.1:{server.server_port}"
    environment = {name: value for name, value in os.environ.items() if "PIP_" not in name and "proxy" not in name.lower()} | {
        "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(tmp_path / "pypi"), "PIP_INDEX_URL": f"{index}/nothing",
        "PATH": "/usr/bin:/bin", "PYTHON": str(base), "VIT_TORCH_CPU_INDEX": index}

    def run(script: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", "-euo", "pipefail", script], cwd=project, capture_output=True, text=True, timeout=300,
                              env=environment | variables)

    done = run("use.sh")
    assert done.returncode == 0 and "with the CPU build of PyTorch" in done.stdout, done.stdout + done.stderr
    assert "Downloading" in done.stdout and "torch-2.15.0" in done.stdout                # it shows its progress
    packages = (project / ".venv").glob("lib/python*/site-packages/torch*.dist-info")
    assert {path.name for path in packages} == {"torch-2.15.0+cpu.dist-info", "torchvision-0.30.0+cpu.dist-info"}
    assert run("ask.sh").stdout == f"{index}\n"
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n")
    smi.chmod(0o755)
    for variables in ({"PATH": f"{tmp_path}:/usr/bin:/bin"}, {"VIT_TORCH_CPU_INDEX": ""}, {"LOCKED": "1"}):
        assert run("ask.sh", **variables).returncode == 1
    server.shutdown()
    server.server_close()
    assert run("ask.sh").returncode == 1


def test_test_sh_installs_its_packages_and_passes_arguments_to_pytest(run_script, bare_machine):
    """The comparisons with other implementations have a separate environment."""
    project, log, python = bare_machine
    assert run_script("test.sh", "--reference", "-x", cwd=project, PYTHON=str(python), LOCKED="1").returncode == 0
    calls = log.read_text()
    assert "-m venv --clear .venv-reference" in calls and "-r requirements-reference.txt" in calls
    assert "--dist worksteal -m reference -x" in calls and not (project / ".venv").exists()
    assert run_script("test.sh", "-m", "not slow", cwd=project, PYTHON=str(python)).returncode == 0
    calls = log.read_text()
    assert "-r requirements-test.txt" in calls and "python -m ruff check ." in calls and "--dist worksteal -m not slow" in calls


def test_sweep_sh_installs_its_packages_and_passes_its_rates(run_script, bare_machine):
    project, log, python = bare_machine
    done = run_script("sweep.sh", "--num_steps", "5", cwd=project, PYTHON=str(python), LEARNING_RATES="0.1,0.2")
    assert done.returncode == 0 and done.stdout.count("First use: installing") == 1, done.stderr
    assert "-r requirements.txt" in log.read_text()
    last = log.read_text().splitlines()[-1]
    assert last.startswith("python sweep.py --learning_rates=0.1,0.2 --output_dir ") and last.endswith(" --num_steps 5")
    for variables, flags in (({"ATTENTION_LOSS_WEIGHTS": "-1,0"}, "--attention_loss_weights=-1,0 "), ({}, "")):
        log.unlink()
        done = run_script("sweep.sh", cwd=project, PYTHON=str(python), **variables)
        assert done.returncode == 0 and "installing" not in done.stdout and "pip" not in log.read_text()
        assert f"python sweep.py {flags}--output_dir" in log.read_text()


def test_the_script_may_be_called_through_a_link_and_from_elsewhere(run_script, tmp_path):
    (tmp_path / "link.sh").symlink_to(ROOT / "train.sh")
    done = subprocess.run(["bash", str(tmp_path / "link.sh")], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"DRY_RUN": "1", "PYTHON": sys.executable, "CDPATH": str(tmp_path)})
    assert done.returncode == 0 and "train.py" in done.stdout, done.stderr
