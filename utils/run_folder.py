"""The folder of a run: claimed by one process group at a time, never written over.

    OUTPUT_DIR/NAME/
      config.json            the resolved configuration, versions, git commit
      log.jsonl              append-only events (report.py)
      step-00000100.pt ...   RunStates (checkpoint.py), the newest few
      best.pt                the RunState of the best evaluation
      curves.png
"""

import fcntl
import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from .checkpoint import BEST_FILE, STEP_FILE, CheckpointError, newest_intact, step_files, verify

LOG_FILE, CONFIG_FILE, LOCK_FILE = "log.jsonl", "config.json", ".lock"


class FolderError(ValueError):
    """A run folder that cannot be used: one line."""


class InUseError(FolderError):
    """Another process is at work in it."""


def create(output_dir: str, name: str | None, stem: str) -> Path:
    """Makes the folder of a new run: OUTPUT_DIR/NAME, or the first free one of STEM, STEM-2, STEM-3, ...

    Raises FolderError if NAME already holds a run or is in use, or the place cannot be written.
    """
    candidates = [name] if name else [stem if number == 1 else f"{stem}-{number}" for number in range(1, 10_000)]
    for candidate in candidates:
        folder = Path(output_dir) / candidate
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise FolderError(f"{folder} is a file, not a folder: give another --name or --output_dir") from None
        except OSError as error:
            raise FolderError(f"cannot write {folder}: {error.strerror}; give another --output_dir") from error
        try:
            descriptor = _lock(folder)
        except InUseError:
            if name:
                raise
            continue
        if not _holds_run(folder):
            _set_log_aside(folder)
            write_log(folder, [])
            return folder
        os.close(descriptor)
        if name:
            check_free(output_dir, name)
    raise FolderError(f"{output_dir} holds {len(candidates)} runs called {stem}: give a NAME (--name)")


def _lock(folder: Path) -> int:
    """Keeps other processes out until this one ends, however it ends, or closes the descriptor.

    A POSIX record lock, which forked loader workers do not inherit. Raises InUseError if another process holds it.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise FolderError(f"cannot write {folder}: {error.strerror}") from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        owner = (folder / LOCK_FILE).read_text().strip() or "another process"
        raise InUseError(f"{folder} is in use by {owner}: wait for it or stop it") from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
    return descriptor


def find_checkpoint(resume_path: str) -> tuple[Path, list[str]]:
    """A checkpoint file as it is, or a run folder's newest intact one -> (file, complaints about newer ones).

    Raises CheckpointError: a run is never silently started from scratch.
    """
    path = Path(resume_path)
    if path.is_dir():
        return newest_intact(path)
    if not path.is_file():
        raise CheckpointError(f"nothing to resume at {path}: give a run folder (output/NAME) or a checkpoint file")
    return path, []


def _set_log_aside(folder: Path) -> None:
    """Keeps the log of a start that left no checkpoint, or whose checkpoints were deleted, as log-1.jsonl, log-2.jsonl, ..."""
    if read_log(folder):
        number = next(number for number in range(1, 10_000) if not (folder / f"log-{number}.jsonl").exists())
        (folder / LOG_FILE).rename(folder / f"log-{number}.jsonl")


def weights_of(path: str | Path) -> str | Path:
    """A run folder's best checkpoint, or else its newest; any other path or name as it is. Raises CheckpointError."""
    if not Path(path).is_dir():
        return path
    best = Path(path) / BEST_FILE
    return str(best if best.exists() else newest_intact(Path(path))[0])


def check_free(output_dir: str, name: str) -> None:
    """Raises FolderError if OUTPUT_DIR/NAME already holds a run: what `create` would say, before time is spent."""
    folder = Path(output_dir) / name
    if folder.is_dir() and _holds_run(folder):
        raise FolderError(f"{folder} already holds a run: go on with it by RESUME_PATH={folder}, or give another NAME (--name)")


def _holds_run(folder: Path) -> bool:
    """A start that ended before its first checkpoint left nothing to go on from: its folder is free."""
    return bool(step_files(folder)) or (folder / BEST_FILE).exists()


def resume(checkpoint: Path, step: int, output_dir: str | None, name: str | None) -> Path:
    """The folder in which a run goes on: its own, or a new one if NAME or OUTPUT_DIR say so (its log is copied).

    Going on in its own folder from anything but its newest checkpoint would leave files of two histories there:
    FolderError says how to branch off instead. So it does for a checkpoint that lies outside a run folder.
    """
    home = checkpoint.parent if checkpoint.parent.name not in ("", "..") else checkpoint.parent.resolve()
    at_home = (home / CONFIG_FILE).exists()
    if not at_home and not name:
        raise FolderError(f"{checkpoint} lies outside its run folder: give a NAME (--name) for the folder to go on in")
    target = Path(output_dir or (home.parent if at_home else "output")) / (name or home.name)
    if target.resolve() != home.resolve():
        folder = create(str(target.parent), target.name, target.name)
        if at_home:
            write_log(folder, [event for event in read_log(home) if event["step"] <= step])
            if (home / BEST_FILE).exists():
                shutil.copyfile(home / BEST_FILE, folder / BEST_FILE)
        return folder
    _lock(home)
    newer, damaged = [], []
    for path in step_files(home):
        if int(STEP_FILE.fullmatch(path.name)[1]) > step:
            (newer if _is_intact(path) else damaged).append(path.name)
    if newer:
        raise FolderError(f"{checkpoint} is at step {step}, but {home} goes on to {newer[0]}: resume the folder, "
                          f"or give a new NAME (--name) to branch off from step {step}")
    for unfinished in home.glob("*.tmp"):      # of a process that was killed while it wrote
        unfinished.unlink()
    for name in damaged:      # out of the way, or they would count among the newest when old checkpoints are deleted
        (home / name).rename(home / f"{name}.damaged")
    write_log(home, [event for event in read_log(home) if event["step"] <= step])
    return home


def _is_intact(path: Path) -> bool:
    try:
        verify(path)
        return True
    except CheckpointError:
        return False


def read_log(folder: Path) -> list[dict]:
    """Events of log.jsonl; a last line that was cut off by a crash is left out."""
    events = []
    try:
        lines = (folder / LOG_FILE).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(event, dict):
            break
        events.append(event)
    return events


def write_log(folder: Path, events: list[dict]) -> None:
    """Replaces log.jsonl in one go."""
    unfinished = folder / f"{LOG_FILE}.tmp"
    unfinished.write_text("".join(json.dumps(event) + "\n" for event in events))
    os.replace(unfinished, folder / LOG_FILE)


def write_config(folder: Path, config: dict, architecture: dict, world_size: int) -> None:
    """config.json: what was run, with versions and the git commit, for people and scripts; nothing reads it back."""
    content = {
        "config": config,
        "architecture": architecture,
        "world_size": world_size,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchvision": version("torchvision")},
        "commit": _commit(),
    }
    unfinished = folder / f"{CONFIG_FILE}.tmp"
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(unfinished, folder / CONFIG_FILE)


def _commit() -> str | None:
    """Of this program, with '+' if files differ from it; None outside a git checkout."""
    root = Path(__file__).parent.parent
    try:
        answer = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
                                capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None

