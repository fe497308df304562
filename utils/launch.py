"""What a launcher (torchrun, train.sh) tells this process, and what the process leaves for train.sh.

RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT say which process of a run this one is. Job systems set
some of them for purposes of their own: what does not fit together is refused.

train.sh makes a folder for every launch, named by VIT_LAUNCH:

  pid-R      process R, which train.sh signals itself
  alive-R    touched while process R writes a checkpoint after a failure, so that it is not killed
  asked      made by train.sh when it was asked to stop, for processes that start later
  code-000   the exit code of the launch (code-001 after torchrun's first restart, ...): the first process that knows it writes it
  folder     the folder of the run, which the processes resume after a restart

Before torchrun it runs train.py with VIT_CHECK=NxL once, which checks the flags of N processes, L a node, and ends.
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
RANKS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}       # and what holds where one is not set
MASTER = ("MASTER_ADDR", "MASTER_PORT")


class LaunchError(ValueError):
    """Raised when the launcher's variables do not fit together, or a restarted run cannot be found again."""

    exit_code = EXIT_BAD_INPUT


class Place(NamedTuple):
    """Which process of how many this one is: of the run, and of its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def place() -> Place:
    """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. Raises LaunchError where they do not fit together."""
    if checked := os.environ.get("VIT_CHECK"):
        size, _, local_size = checked.partition("x")
        return Place(0, int(size), 0, int(local_size or size))
    found = [os.environ.get(name, "") or str(default) for name, default in RANKS.items()]
    rank, size, local_rank, local_size = numbers = [int(word) if word.isascii() and word.isdigit() else -1 for word in found]
    if min(numbers) < 0 or not (rank < size and local_rank < local_size <= size):
        raise _misfit("names no process of a run")
    if size > 1 and (missing := [name for name in ("RANK", *MASTER) if not os.environ.get(name)]):
        raise _misfit(f"asks for {size} processes, without {', '.join(missing)}")
    if size > 1 and not (os.environ["MASTER_PORT"].isdigit() and 0 < int(os.environ["MASTER_PORT"]) < 65536):
        raise _misfit("names no port")
    return Place(*numbers)


def _misfit(what: str) -> LaunchError:
    found = {name: os.environ[name] for name in (*RANKS, *MASTER) if name in os.environ}
    return LaunchError(f"the environment has {' '.join(f'{name}={value}' for name, value in found.items())}, which {what}. To "
                       f"train alone: {without_variables()} python train.py ... Several processes are started by train.sh "
                       "(NPROC, NNODES), which sets these variables.")


def without_variables() -> str:
    """The command `env` that removes the launcher's variables which are set."""
    return " ".join(["env", *(f"-u {name}" for name in (*RANKS, *MASTER) if name in os.environ)])


def drop_place() -> None:
    """For a program that is one process, whatever the environment says."""
    for name in (*RANKS, "TORCHELASTIC_RUN_ID", "VIT_LAUNCH", "VIT_CHECK"):
        os.environ.pop(name, None)


def below_launcher() -> bool:
    """Whether torchrun has started this process. Others set LOCAL_RANK too."""
    return "LOCAL_RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ


def one_node() -> bool:
    """Whether all processes of the run are on this machine."""
    _, size, _, local_size = place()
    return size == local_size


def node() -> int:
    """The number of this machine among those of the run."""
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
    """Whether train.sh wants only the check of the flags."""
    return bool(os.environ.get("VIT_CHECK"))


def launch_file(name: str) -> Path | None:
    """A file of this launch; None without train.sh."""
    return Path(folder, name) if (folder := os.environ.get("VIT_LAUNCH")) else None


def is_asked_to_stop() -> bool:
    """Whether train.sh was asked to stop."""
    return (file := launch_file("asked")) is not None and file.exists()


def show_life() -> None:
    """Tells train.sh, which kills what remains after a failure, that this process is still at work. Call it every second."""
    if (file := launch_file(f"alive-{os.environ.get('RANK', 0)}")) is not None:
        with contextlib.suppress(OSError):
            file.touch()


def restarts() -> int:
    """How often torchrun has restarted the processes of this launch. Nodes may count differently."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def attempt() -> str:
    """The name of this attempt to run, on all its processes the same (utils/distributed/nodes.py)."""
    return attempt_name(restarts()) if one_node() else os.environ.get("TORCHELASTIC_RUN_ID") or attempt_name(0)


def attempt_name(number: int) -> str:
    return f"attempt-{number}"


def post_exit_code(code: int) -> bool | None:
    """Posts the exit code of the launch for train.sh. -> whether this process is the first; None without train.sh"""
    file = launch_file(f"code-{restarts():03d}")
    if file is None:
        return None
    try:
        with open(file, "x", encoding="utf-8") as stream:
            stream.write(str(code))
    except FileExistsError:
        return False
    except OSError:                                # the folder is gone: nobody waits for the code any more
        return None
    return True


def posted_exit_code() -> int | None:
    """The exit code that the first process has posted, if one has."""
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
    """This Python as the user would type it: `python` where the shell finds it by that name, else its path, so that a command to
    copy has the packages of a .venv that is not active."""
    here = sys.executable
    for name in ("python", "python3"):
        found = shutil.which(name)
        # A virtual environment links to the Python it was made from: the same file, with other packages.
        if found and os.path.samefile(found, here) and _environment(found) == _environment(here):
            return name
    return shlex.quote(os.path.relpath(here) if Path.cwd() in Path(here).parents[1:] else here)


def command_to_install(requirements: str) -> str:
    """The command that installs what a file of requirements lists, for this Python."""
    here = os.path.realpath(os.getcwd()) == str(ROOT)
    return f"{python_command()} -m pip install -r {shlex.quote(requirements if here else str(ROOT / requirements))}"


def _environment(python: str) -> str:
    """The folder of the virtual environment that the Python is in; "" if it is in none."""
    folder = Path(python).parent.parent
    return os.path.realpath(folder) if (folder / "pyvenv.cfg").exists() else ""


RESUME_FLAGS = ("resume_path", "output_dir", "name")


def resume_flags(flags: dict, output_dir: str = "output") -> dict:
    """Those of RESUME_FLAGS with which process 0 starts or continues the run: as typed, but for the same run after torchrun has
    restarted the processes (MAX_RESTARTS).

    output_dir: where runs are if the flag was not given. Raises LaunchError.
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
        raise LaunchError("--name: a run that torchrun may restart needs one, to be found again. Add it, or start by train.sh")
    here = typed | {"output_dir": str(folder.parent), "name": folder.name}
    return here | {"resume_path": "auto"} if any(folder.glob("step-*.pt")) or "resume_path" not in flags else here


def machine_here(device: str) -> tuple:
    """(type of the device, its memory in bytes, cores) that runs on this machine get; () where that cannot be known.

    device: auto, cpu or cuda. Another process looks, for a caller that outlives the runs and shall hold no GPU.
    """
    device = "cpu" if os.environ.get("GPUS") == "cpu" else device
    look = (f"from utils.device import choose_device, core_count, total_memory; device = choose_device({device!r}); "
            "print(device.type, total_memory(device), core_count())")
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, errors="replace")
    found = done.stdout.split()
    return (found[0], int(found[1]), int(found[2])) if done.returncode == 0 and len(found) == 3 else ()
