"""The shell scripts as a user runs them, in processes of their own."""

import itertools
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from rig import command_of, until
from runs import VARIABLES, load_state, make_tree

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
@pytest.mark.parametrize(("script", "variables"), [
    ("train.sh", {"PYTHONIOENCODING": "ascii"}),
    ("sweep.sh", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LEARNING_RATES": "0.01"})])
def test_names_that_the_output_cannot_show(run_script, tmp_path, script, variables):
    data, output = make_tree(tmp_path / "b\xe4ume", ("\xfcnf", "\u72ac")), tmp_path / "\xf6"
    done = run_script(script, "--dataset", "folder", "--data_dir", str(data), "--recipe", "digits", "--model_type", "ViT-Nano_2",
                      "--pretrained_dir", "none", "--num_steps", "1", "--train_batch_size", "4", "--output_dir", str(output),
                      "--name", "r", "--confusion_matrix", "--device", "cpu", **variables)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"run folder: \S+\\(xf6|udcc3\\udcb6)/r", done.stdout) and (output / "r").is_dir()


@pytest.mark.slow
def test_a_journey_on_two_processes(tmp_path, capsys):
    """The first command of the README, in a folder whose name needs care; what its last lines propose; a mistake; a signal."""
    place = tmp_path / "a folder"
    clean = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}

    def start(*flags: str, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "train.sh", "--output_dir", str(place), "--log_dir", str(tmp_path / "logs"), *flags], cwd=ROOT, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=clean | {"PYTHON": sys.executable, "NPROC": "2", **variables})

    def end(*flags: str, **variables: str) -> tuple[int, str, str]:
        process = start(*flags, **variables)
        printed, errors = process.communicate(timeout=600)
        assert "Traceback" not in errors and "leaked" not in errors
        return process.returncode, printed, errors

    code, printed, errors = end()
    assert code == 0, errors
    before, after = map(float, re.search(r"([\d.]+)% before, ([\d.]+)% after \(500 images\)", printed).groups())
    assert before < 20 and after > 90, (before, after)
    folder = place / "digits"
    assert (folder / "best.pt").exists() and (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "logs" / "digits").iterdir())
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "train"] == list(range(1, 101))
    assert next(event for event in events if event["event"] == "start")["world_size"] == 2

    code, _, errors = end("--num_steps", "101", RESUME_PATH=str(checkpoint.step_files(folder)[0]))
    assert code == 0 and load_state(checkpoint.step_files(folder)[0]).step == 101, errors
    assert train.main(["--device", "cpu", "--eval_only", "--resume_path", str(folder / "best.pt")]) == 0
    assert re.search(r"test accuracy 9\d\.\d\d%", capsys.readouterr().out)

    code, _, errors = end("--train_batch_size", "33")
    line, = (line for line in errors.splitlines() if "error" in line.lower())
    assert code == 2 and "take 32 or 34" in line, errors

    process = start("--num_steps", "100000", "--warmup_steps", "1", "--eval_every", "5", "--train_batch_size", "16", NAME="r")
    try:
        until(lambda: (place / "r").exists() and checkpoint.step_files(place / "r"), 300, "a checkpoint")
        process.terminate()
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143 and "Traceback" not in errors, errors
    assert not [path for path in Path("/proc").glob("[0-9]*") if str(place) in command_of(int(path.name))]
    assert not checkpoint.open_newest(place / "r").skipped


@pytest.mark.parametrize("given", [{}, {"FP16_OPT_LEVEL": "O3"}])
def test_train_fp16_sh_asks_for_half_precision(run_script, given):
    """What the levels then do: tests/system/test_resuming.py and tests/training/test_precision.py."""
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
    ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29501", "NPROC": "8"},
     "--nnodes 2 --node_rank 1 --master_addr node0 --master_port 29501 --nproc_per_node 8")])
def test_processes_and_nodes(run_script, variables, words):
    """And what is not set is not passed on."""
    command = command_words(run_script("train.sh", DRY_RUN="1", **variables))
    words = words.split()
    assert set(zip(words[::2], words[1::2])) <= set(itertools.pairwise(command))
    assert ("--standalone" in command) == ("NNODES" not in variables) and flags_after(command) == {}
    assert "GPUS" not in variables or f"CUDA_VISIBLE_DEVICES={variables['GPUS']}" in command


def test_the_printed_command_can_be_pasted(tmp_path):
    """Bash reads from it the words that the script itself passes on: those that a Python which only notes them is given."""
    python = tmp_path / "python3"
    python.write_text(f"""#!/usr/bin/env bash
[ "$1" != - ] || exec "{sys.executable}" "$@"
printf '%s\\0' "$OMP_NUM_THREADS" "$CUDA_VISIBLE_DEVICES" "$@" > "$NOTES"
""")
    python.chmod(0o755)
    odd = ["--output_dir", str(tmp_path / "a b"), "--name", "it's $HOME *", "--pretrained_dir", 'x"\\;&(', "--log_dir", "\n"]
    environment = os.environ | {"PYTHON": str(python), "GPUS": "0,1", "DATA_DIR": "my data\t'", "NOTES": str(tmp_path / "run")}
    done = subprocess.run(["bash", "train.sh", *odd], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = os.environ | {"NOTES": str(tmp_path / "pasted")}
    assert subprocess.run(["bash", "-c", done.stdout], cwd=ROOT, env=environment).returncode == 0
    ran, pasted = ((tmp_path / name).read_bytes().split(b"\0")[:-1] for name in ("run", "pasted"))
    assert ran == pasted and ran[1] == b"0,1" and ran[-len(odd):] == [word.encode() for word in odd]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_code_of_a_run_is_the_scripts_when_its_watcher_ended_first(run_script, tmp_path):
    python = tmp_path / "python3"
    python.write_text(f"""#!/usr/bin/env bash
[ "$1" != - ] || exec "{sys.executable}" "$@"
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
    ({"NPROC": "0"}, "NPROC=0")])
def test_bad_variables_are_reported_at_once(run_script, variables, words):
    done = run_script("train.sh", DRY_RUN="1", **variables)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------- setting itself up

STUB = """#!/usr/bin/env bash
# A Python without PyTorch: notes what it is asked, and makes an environment whose Python is another stub.
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
    """A copy of the scripts beside a Python that lacks everything; `pip install` makes the modules appear."""
    project, log = tmp_path / "pro ject", tmp_path / "calls"
    (project / "utils").mkdir(parents=True)
    for name in ("train.sh", "train_fp16.sh", "sweep.sh", "test.sh", "utils/python.sh", "requirements.txt", "requirements.lock",
                 "requirements-test.txt", "requirements-test.lock", "requirements-reference.txt"):
        shutil.copy(ROOT / name, project / name)

    def stub(name: str, pip: str, modules: str) -> Path:
        path = tmp_path / name
        path.write_text(STUB.format(log=log, inner=tmp_path / "inner", real=sys.executable, pip=pip, modules=modules))
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        return path

    stub("inner", 'touch "$(dirname "$0")/../installed"', '[ -e "$(dirname "$0")/../installed" ]')
    return project, log, stub("python3", "exit 1", "exit 1")


def test_first_use_makes_the_environment_once(run_script, bare_machine):
    """An installation that was interrupted is completed, in the same environment."""
    project, log, python = bare_machine
    done = run_script("train.sh", cwd=project, PYTHON=str(python))
    assert done.returncode == 0 and done.stdout.count("First use: installing") == 1, done.stderr
    assert "-m pip install --disable-pip-version-check --quiet -r requirements.txt" in log.read_text()
    assert ".venv/bin/python -m torch.distributed.run" in done.stdout
    for interrupted in (False, True):
        log.unlink()
        if interrupted:
            (project / ".venv" / "installed").unlink()
        done = run_script("train.sh", cwd=project, PYTHON=str(python))
        assert done.returncode == 0 and ("installing" in done.stdout) == ("pip install" in log.read_text()) == interrupted
        assert "-m venv" not in log.read_text()


def test_locked_installs_the_lock_with_hashes_into_a_folder_of_its_own(run_script, bare_machine):
    """Whatever Python there is; once, and again when the lock is another, or an installation was not finished."""
    project, log, python = bare_machine
    assert command_words(run_script("train.sh", cwd=project, PYTHON=sys.executable, LOCKED="1", DRY_RUN="1"))[2] == (
        ".venv-locked/bin/python") and not (project / ".venv-locked").exists()
    done = run_script("train.sh", cwd=project, PYTHON=str(python), LOCKED="1")
    assert done.returncode == 0 and ".venv-locked/bin/python -m torch.distributed.run" in done.stdout, done.stderr
    install = "-m pip install --disable-pip-version-check --quiet --require-hashes --only-binary :all: -r requirements"
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
    """A Python without its venv package leaves such an environment behind."""
    project, log, python = bare_machine
    broken = project / ".venv" / "bin" / "python"
    broken.parent.mkdir(parents=True)
    broken.write_text("#!/usr/bin/env bash\nexit 1\n")
    broken.chmod(0o755)
    done = run_script("train.sh", cwd=project, PYTHON=str(python))
    assert done.returncode == 0 and ".venv/bin/python -m torch.distributed.run" in done.stdout, done.stderr
    assert "-m venv --clear .venv" in log.read_text()


def test_dry_run_installs_nothing_and_a_missing_python_is_reported(run_script, bare_machine):
    project, _, python = bare_machine
    done = run_script("train.sh", cwd=project, PYTHON=str(python), DRY_RUN="1")
    assert command_words(done)[2] == ".venv/bin/python" and not (project / ".venv").exists()
    done = run_script("train.sh", cwd=project, PYTHON="/no/such/python")
    assert done.returncode == 2 and "Python 3.10 or newer" in done.stderr and done.stderr.count("\n") == 1


def test_test_sh_sets_itself_up_and_passes_arguments_to_pytest(run_script, bare_machine):
    """The comparisons with other implementations have an environment of their own."""
    project, log, python = bare_machine
    assert run_script("test.sh", "--reference", "-x", cwd=project, PYTHON=str(python), LOCKED="1").returncode == 0
    calls = log.read_text()
    assert "-m venv --clear .venv-reference" in calls and "-r requirements-reference.txt" in calls
    assert "--dist worksteal -m reference -x" in calls and not (project / ".venv").exists()
    assert run_script("test.sh", "-m", "not slow", cwd=project, PYTHON=str(python)).returncode == 0
    calls = log.read_text()
    assert "-r requirements-test.txt" in calls and "python -m ruff check ." in calls and "--dist worksteal -m not slow" in calls


def test_sweep_sh_sets_itself_up_and_passes_its_rates(run_script, bare_machine):
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
