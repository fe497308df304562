"""Which files a run folder has, and whether a new run may have the folder. Needs no PyTorch, so that a taken name fails early."""

import re
from pathlib import Path

from models.checkpoints.first_look import is_sweep
from utils import launch
from utils.files import FileLock

STEP_FILE = re.compile(r"step-(\d{8,})\.pt")
BEST_FILE = "best.pt"


class FolderError(ValueError):
    """Raised when a run folder cannot be used."""

    exit_code = 2


def lock(folder: Path) -> FileLock:
    return FileLock(folder, "Wait for it, stop it, or choose another --name.")


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def step_files(folder: Path) -> list[Path]:
    """Return the step checkpoints, newest first."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := STEP_FILE.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def checkpoint_files(folder: Path) -> list[Path]:
    """Return all checkpoints, newest first; best.pt last: it serves a run that ended between its first evaluation and its first
    step checkpoint."""
    best = folder / BEST_FILE
    return [*step_files(folder), *([best] if best.exists() else [])]


def check_free(output_dir: str, name: str) -> None:
    """Raise FolderError if OUTPUT_DIR/NAME holds a run or a sweep, InUseError if it is in use. Creates and locks nothing."""
    folder = Path(output_dir) / name
    if is_sweep(folder):
        raise FolderError(f"{folder} already holds a sweep, of several runs. Choose another --name.")
    lock(folder).check()
    if folder.is_dir() and checkpoint_files(folder):
        raise FolderError(f"{folder} already holds a run. Resume it ({launch.command_to_resume(folder)}), or choose another "
                          "--name.")
