"""Reads the variables of a launcher (torchrun, train.sh), and exchanges files with train.sh.

RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT identify this process among those of a run. Job
systems set some of them for other purposes, so inconsistent values are an error.

train.sh makes a folder for every launch, named by VIT_LAUNCH:

  pid-R      the process number of rank R, which train.sh signals directly
  alive-R    touched while rank R writes a checkpoint after a failure, so that train.sh does not kill it
  asked      made by train.sh when it is asked to stop, for processes that start later
  code-000   the exit code of the launch (code-001 after torchrun's first restart, ...), by the first process that knows it
  folder     the folder of the run, which the processes resume after a restart

Before torchrun, train.sh runs train.py once with VIT_CHECK=NxL, which only checks the flags for N processes, L per node.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EXIT_BAD_INPUT = 2
RANKS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}       # variables and their defaults
MASTER = ("MASTER_ADDR", "MASTER_PORT")


class LaunchError(ValueError):
    """Raised when the launcher's variables are inconsistent, or a restarted run cannot be found."""

    exit_code = EXIT_BAD_INPUT


class Place(NamedTuple):
    """The rank of this process and the number of processes, in the run and on its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def place() -> Place:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. Raises LaunchError if they are inconsistent."""
    if checked := os.environ.get("VIT_CHECK"):
        size, _, local_size = checked.partition("x")
        return Place(0, int(size), 0, int(local_size or size))
    found = [os.environ.get(name, "") or str(default) for name, default in RANKS.items()]
    rank, size, local_rank, local_size = numbers = [int(word) if word.isascii() and word.isdigit() else -1 for word in found]
    if min(numbers) < 0 or not (rank < size and local_rank < local_size <= size):
        raise _inconsistent("is not a valid rank of a run")
    if size > 1 and (missing := [name for name in ("RANK", *MASTER) if not os.environ.get(name)]):
        raise _inconsistent(f"means {size} processes, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set")
    if size > 1 and not (os.environ["MASTER_PORT"].isdigit() and 0 < int(os.environ["MASTER_PORT"]) < 65536):
        raise _inconsistent("has no valid port")
    return Place(*numbers)


def _inconsistent(what: str) -> LaunchError:
    found = {name: os.environ[name] for name in (*RANKS, *MASTER) if name in os.environ}
    return LaunchError(f"the environment has {' '.join(f'{name}={value}' for name, value in found.items())}, which {what}. To "
                       f"train with one process: {without_variables()} python train.py ... For several processes start train.sh "
                       "(NPROC, NNODES), which sets these variables.")


def without_variables() -> str:
    """Return the `env` command that unsets those of the launcher's variables that are set."""
    return " ".join(["env", *(f"-u {name}" for name in (*RANKS, *MASTER) if name in os.environ)])


def drop_place() -> None:
    """Remove the launcher's variables, for a program that is always one process."""
    for name in (*RANKS, "TORCHELASTIC_RUN_ID", "VIT_LAUNCH", "VIT_CHECK"):
        os.environ.pop(name, None)


def below_launcher() -> bool:
    """Whether torchrun has started this process. Other programs set LOCAL_RANK too."""
    return "LOCAL_RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ


def one_node() -> bool:
    """Whether all processes of the run are on this machine."""
    _, size, _, local_size = place()
    return size == local_size


def node() -> int:
    """Return the number of this machine among those of the run."""
    rank, _, _, local_size = place()
    return int(os.environ.get("GROUP_RANK") or rank // local_size)


def is_first_of_node() -> bool:
    return os.environ.get("LOCAL_RANK", "0") in ("", "0")


def in_sweep() -> bool:
    """Whether sweep.py started this run: the command of the sweep resumes it."""
    return bool(os.environ.get("VIT_TRIAL"))


def is_trial() -> bool:
    """Whether this run is a trial of a sweep, not its final run: the sweep prints what to do next."""
    return os.environ.get("VIT_TRIAL") == "1"


def only_checks() -> bool:
    """Whether train.sh has started this process only to check the flags."""
    return bool(os.environ.get("VIT_CHECK"))


def launch_file(name: str) -> Path | None:
    """Return a file in the folder of this launch; None without train.sh."""
    return Path(folder, name) if (folder := os.environ.get("VIT_LAUNCH")) else None


def is_asked_to_stop() -> bool:
    """Whether train.sh was asked to stop."""
    return (file := launch_file("asked")) is not None and file.exists()


def show_life() -> None:
    """Signal train.sh, which kills remaining processes after a failure, that this one is still working. Call it every second."""
    if (file := launch_file(f"alive-{os.environ.get('RANK', 0)}")) is not None:
        with contextlib.suppress(OSError):
            file.touch()


def restarts() -> int:
    """Return how often torchrun has restarted the processes of this launch. Nodes may count differently."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def attempt() -> str:
    """Return the name of this attempt to run, the same on all its processes (utils/distributed/nodes.py)."""
    return attempt_name(restarts()) if one_node() else os.environ.get("TORCHELASTIC_RUN_ID") or attempt_name(0)


def attempt_name(number: int) -> str:
    return f"attempt-{number}"


def post_exit_code(code: int) -> bool | None:
    """Post the exit code of the launch for train.sh -> whether this process is the first; None without train.sh"""
    file = launch_file(f"code-{restarts():03d}")
    if file is None:
        return None
    try:
        with open(file, "x", encoding="utf-8") as stream:
            stream.write(str(code))
    except FileExistsError:
        return False
    except OSError:                                # the folder was removed: train.sh does not wait for the code any more
        return None
    return True


def posted_exit_code() -> int | None:
    """Return the exit code that the first process has posted; None if there is none."""
    file = launch_file(f"code-{restarts():03d}")
    try:
        return int(file.read_text(encoding="utf-8")) if file else None
    except (OSError, ValueError):                  # not there, or not written yet
        return None


def command(script: str, variables: str = "") -> str:
    """Return the beginning of a command to copy into the user's shell: with `variables` in front of a script in bash.

    Relative paths count from the current folder. For train.sh that is the project's, wherever it was called from; for python
    /path/to/train.py it is the user's.
    """
    here = os.path.realpath(os.getcwd())
    away = here == str(ROOT) != os.path.realpath(os.environ.get("VIT_CALLED_FROM") or here)
    if here != str(ROOT) and script.endswith((".py", ".sh")):
        script = shlex.quote(str(ROOT / script))
    program = "bash" if script.endswith(".sh") else python_command()
    return " ".join(filter(None, [f"cd {shlex.quote(here)} &&" if away else "", variables, program, script]))


def command_to_resume(folder: Path, num_steps: int | None = None) -> str:
    """Return the command that resumes a run: with train.sh in the project's folder, else with train.py, since the run's paths
    are relative to the current folder. It repeats the variables of train.sh that no checkpoint holds, such as NPROC."""
    if os.path.realpath(os.getcwd()) == str(ROOT):
        variables = [os.environ.get("VIT_TYPED", "").strip(), f"RESUME_PATH={shlex.quote(str(folder))}",
                     f"NUM_STEPS={num_steps}" if num_steps else ""]
        return command("train.sh", " ".join(filter(None, variables)))
    more = f" --num_steps {num_steps}" if num_steps else ""
    return f"{command('train.py')} --resume_path {shlex.quote(str(folder))}{more}"


def python_command() -> str:
    """Return this Python as the user would type it: `python` where the shell finds it by that name, else its path, so that a
    command to copy has the packages of a .venv that is not active."""
    here = sys.executable
    for name in ("python", "python3"):
        found = shutil.which(name)
        # A virtual environment links to the Python it was made from: the same file, with other packages.
        if found and os.path.samefile(found, here) and _environment(found) == _environment(here):
            return name
    return shlex.quote(os.path.relpath(here) if Path.cwd() in Path(here).parents[1:] else here)


def command_to_install(requirements: str) -> str:
    """Return the command that installs what a file of requirements lists, for this Python."""
    here = os.path.realpath(os.getcwd()) == str(ROOT)
    return f"{python_command()} -m pip install -r {shlex.quote(requirements if here else str(ROOT / requirements))}"


def _environment(python: str) -> str:
    """Return the folder of the virtual environment that the Python is in; "" if it is in none."""
    folder = Path(python).parent.parent
    return os.path.realpath(folder) if (folder / "pyvenv.cfg").exists() else ""


RESUME_FLAGS = ("resume_path", "output_dir", "name")


def resume_flags(flags: dict, output_dir: str = "output") -> dict:
    """Return the values of RESUME_FLAGS with which process 0 starts or continues the run: as typed, or, after torchrun has
    restarted the processes (MAX_RESTARTS), those that continue the same run.

    output_dir: the default of the flag. Raises LaunchError.
    """
    typed = {name: flags[name] for name in RESUME_FLAGS if name in flags}
    if not restarts() or flags.get("eval_only"):
        return typed
    if (file := launch_file("folder")) is not None:
        if not file.exists():
            return typed                           # a process was lost before the run had a folder
        folder = Path(os.fsdecode(file.read_bytes()))
    elif "name" in flags:
        folder = Path(flags.get("output_dir", output_dir), flags["name"])
    else:
        raise LaunchError("--name: a run that torchrun may restart needs a name to be found again. Add --name, or start it with "
                          "train.sh")
    here = typed | {"output_dir": str(folder.parent), "name": folder.name}
    return here | {"resume_path": "auto"} if any(folder.glob("step-*.pt")) or "resume_path" not in flags else here


def machine_here(device: str) -> tuple:
    """Return (type of the device, its memory in bytes, cores) for runs on this machine; () if that cannot be found out.

    device: auto, cpu or cuda. Another process finds it out, so that a caller that outlives the runs does not occupy a GPU.
    """
    device = "cpu" if os.environ.get("GPUS") == "cpu" else device
    code = (f"from utils.device import choose_device, core_count, total_memory; device = choose_device({device!r}); "
            "print(device.type, total_memory(device), core_count())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, errors="replace")
    found = done.stdout.split()
    return (found[0], int(found[1]), int(found[2])) if done.returncode == 0 and len(found) == 3 else ()
