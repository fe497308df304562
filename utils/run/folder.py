"""The folder of a run: used by one process group at a time, never overwritten.

TensorBoard files are in LOG_DIR/NAME, which runs of one name in different output folders share.

    OUTPUT_DIR/NAME/
      config.json            the resolved configuration, versions, git commit
      log.jsonl              append-only events (log.py)
      step-00000100.pt ...   RunStates (checkpoint.py), the newest few
      best.pt                the RunState of the best evaluation
      mistakes.csv           the images that it got wrong in that evaluation, the worst first
      curves.png
"""

import contextlib
import json
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from models.checkpoints.first_look import is_sweep
from utils.files import FileLock, InUseError, atomic_write

from . import checkpoint as checkpoints
from .checkpoint import BEST_FILE, CheckpointError, RunCheckpoint, RunState
from .log import LOG_FILE, events_until, read_log, write_log
from .names import FolderError, check_free, lock

CONFIG_FILE, BAD_IMAGES_FILE, MISTAKES_FILE = "config.json", "bad_images.txt", "mistakes.csv"
AUTO = "auto"             # as RESUME_PATH: resume if there is a run to resume


# -------------------------------------------------------------------------------------------------------------- create


def create(output_dir: str, name: str | None, stem: str) -> Path:
    """Create and lock the folder of a new run: OUTPUT_DIR/NAME, or the first free one of STEM, STEM-2, STEM-3, ...

    Raises FolderError if NAME already holds a run or a sweep or the folder cannot be written, InUseError if it is in use.
    """
    candidates = [name] if name else [stem if number == 1 else f"{stem}-{number}" for number in range(1, 10_000)]
    for candidate in candidates:
        folder = Path(output_dir) / candidate
        if is_sweep(folder):
            if name:
                check_free(output_dir, name)
            continue
        try:
            claim = _claim(folder)
        except InUseError:
            if name:
                raise
            continue
        if not checkpoints.checkpoint_files(folder):      # an earlier start left no checkpoint, so there is nothing to resume
            _remove_unfinished(folder)
            if read_log(folder):                          # is kept as log-1.jsonl, log-2.jsonl, ...
                number = next(number for number in range(1, 10_000) if not (folder / f"log-{number}.jsonl").exists())
                (folder / LOG_FILE).rename(folder / f"log-{number}.jsonl")
            write_log(folder, [])
            return folder
        claim.release()
        if name:
            check_free(output_dir, name)
    raise FolderError(f"{output_dir} holds {len(candidates)} runs called {stem}. Choose a --name.")


def _claim(folder: Path) -> FileLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (claim := lock(folder)).acquire()
        return claim
    except FileExistsError:
        raise FolderError(f"{folder} is a file, not a folder. Choose another --name or --output_dir.") from None
    except OSError as error:
        raise FolderError(f"cannot write or lock {folder} ({error.strerror}). Choose another --output_dir.") from error


def _remove_unfinished(folder: Path) -> None:
    """Remove temporary files of a process that was killed while writing. Call it with the folder locked."""
    for unfinished in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            unfinished.unlink()


# ---------------------------------------------------------------------------------------------------------------- find


def find_run_checkpoint(resume_path: str, output_dir: str = "", name: str | None = None) -> RunCheckpoint | None:
    """Open a checkpoint file, or the newest intact one of a run folder. Raises CheckpointError.

    "auto" means the folder OUTPUT_DIR/NAME; if it holds no checkpoint yet, returns None: the run has to be started. In all
    other cases a run is never silently started from scratch. Raises FolderError for "auto" without a name.
    """
    if resume_path == AUTO:
        if not name:
            raise FolderError("RESUME_PATH=auto needs NAME (--name): it resumes OUTPUT_DIR/NAME if that holds a run")
        path = Path(output_dir) / name
        if not (path.is_dir() and checkpoints.checkpoint_files(path)):
            check_free(output_dir, name)
            return None
    else:
        path = Path(resume_path)
    if path.is_dir():
        return checkpoints.open_newest(path)
    if not path.is_file():
        raise CheckpointError(f"nothing to resume at {path}: give a run folder (output/NAME) or a checkpoint file")
    return checkpoints.open_run_checkpoint(path)


def resolve_checkpoint(path: str | Path) -> str | Path:
    """Return the best checkpoint of a run folder, or else its newest readable one; any other path or name unchanged.

    The file is not verified. Raises CheckpointError.
    """
    if not Path(path).is_dir():
        return path
    best = Path(path) / BEST_FILE
    return str(best if best.exists() else checkpoints.open_newest(Path(path), verify=False).path)


# -------------------------------------------------------------------------------------------------------------- resume


def resume(checkpoint: RunCheckpoint, output_dir: str | None, name: str | None) -> tuple[Path, dict]:
    """Lock the folder in which a run continues: the same, or a new one if NAME or OUTPUT_DIR differ (a branch).

    -> (the folder, {"step", "accuracy"} of its best.pt or {})

    Events after the checkpoint's step are removed from the log; a branch gets a copy of the log and of best.pt. Raises
    FolderError for a checkpoint outside a run folder without NAME, and for one that is not the newest of its folder:
    resumed there, it would leave files of two histories. Raises InUseError.
    """
    home, target = _folders(checkpoint.path, output_dir, name)
    if target != home:
        return _branch(checkpoint, home, target)
    _claim(home)
    newer = [path for path in checkpoints.step_files(home)
             if int(checkpoints.STEP_FILE.fullmatch(path.name)[1]) > checkpoint.header.step]
    for path in newer:
        if path not in checkpoint.skipped and _header(path):
            raise FolderError(f"{checkpoint.path} is at step {checkpoint.header.step}, but {home} continues to {path.name}. "
                              f"Resume the folder, or choose a new --name to branch off from step {checkpoint.header.step}.")
    _remove_unfinished(home)
    for path in newer:        # damaged ones would count among the newest when old checkpoints are deleted
        path.rename(path.with_name(f"{path.name}.damaged"))
    write_log(home, events_until(home, checkpoint.header.step))
    return home, _best(checkpoint, home)


def check_resume(checkpoint: Path, output_dir: str | None, name: str | None) -> None:
    """Raise the error of `resume` if the folder is in use, or that of a branch holds a run. Creates and locks nothing."""
    home, target = _folders(checkpoint, output_dir, name)
    if target == home:
        lock(home).check()
    else:
        check_free(str(target.parent), target.name)


def _branch(checkpoint: RunCheckpoint, home: Path, target: Path) -> tuple[Path, dict]:
    folder, best = create(str(target.parent), target.name, target.name), {}
    if (home / CONFIG_FILE).exists():
        write_log(folder, events_until(home, checkpoint.header.step))
        if best := _best(checkpoint, home):
            atomic_write(folder / BEST_FILE, lambda unfinished: shutil.copyfile(home / BEST_FILE, unfinished))
    return folder, best


def _best(checkpoint: RunCheckpoint, home: Path) -> dict:
    """Return the evaluation of best.pt; {} if it is missing, damaged, or later than the checkpoint: then it is made again."""
    path = home / BEST_FILE
    header = checkpoint.header if checkpoint.path == path else _header(path)
    return header.best if header and header.step <= checkpoint.header.step else {}


def _folders(checkpoint: Path, output_dir: str | None, name: str | None) -> tuple[Path, Path]:
    """-> (the folder of the checkpoint, the folder in which its run continues: the same, or that of a branch)"""
    home = checkpoint.parent if checkpoint.parent.name not in ("", "..") else checkpoint.parent.resolve()
    at_home = (home / CONFIG_FILE).exists()
    if not at_home and not name:
        raise FolderError(f"{checkpoint} is outside its run folder. Add a NAME (--name) for the folder to continue in.")
    target = Path(output_dir or (home.parent if at_home else "output")) / (name or home.name)
    return home, home if target.resolve() == home.resolve() else target


def _header(path: Path) -> RunState | None:
    """Return None for a file that is missing or damaged."""
    with contextlib.suppress(CheckpointError):
        return checkpoints.open_run_checkpoint(path).header
    return None


# -------------------------------------------------------------------------------------------------------- config.json


def write_config(folder: Path, config: dict, architecture: dict, world_size: int) -> None:
    """Write config.json: the settings, versions and git commit, for people and scripts; no run reads it."""
    content = {
        "config": config,
        "architecture": architecture,
        "world_size": world_size,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchvision": version("torchvision")},
        "commit": _commit(),
    }
    atomic_write(folder / CONFIG_FILE, lambda unfinished: unfinished.write_text(json.dumps(content, indent=2) + "\n",
                                                                              encoding="utf-8"))


def _commit() -> str | None:
    """Return the commit of this program, with '+' if files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parents[2]), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    return None
