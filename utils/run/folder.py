"""The folder of a run: claimed by one process group at a time, never written over.

Its TensorBoard files lie elsewhere, in LOG_DIR/NAME, which runs of that name in two output folders share.

    OUTPUT_DIR/NAME/
      config.json            the resolved configuration, versions, git commit
      log.jsonl              append-only events (run_log.py)
      step-00000100.pt ...   RunStates (checkpoint.py), the newest few
      best.pt                the RunState of the best evaluation
      curves.png
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

from .checkpoint import BEST_FILE, STEP_FILE, CheckpointError, newest_intact, replace, step_files, step_in, verify
from .log import LOG_FILE, events_until, read_log, write_log

CONFIG_FILE, LOCK_FILE, BAD_IMAGES_FILE = "config.json", ".lock", "bad_images.txt"
AUTO = "auto"             # as RESUME_PATH: go on if there is something to go on from
OWNER_SECONDS = 2.0       # for which the holder of a lock may take to write who it is

_held: dict[int, int] = {}          # descriptors of locks -> the process that locked them


class FolderError(ValueError):
    """A run folder that cannot be used: one line."""


class InUseError(FolderError):
    """Another process is at work in it."""

    code = 7


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
            _clear_scraps(folder)
            _set_log_aside(folder)
            write_log(folder, [])
            return folder
        del _held[descriptor]
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
        held = error.errno in (errno.EACCES, errno.EAGAIN)
        owner = _owner(descriptor) if held else ""
        os.close(descriptor)
        if not held:
            raise FolderError(f"{folder} cannot be kept from other runs, its file system has no locks ({error.strerror}): "
                              "give another --output_dir") from error
        raise _in_use(folder, owner) from error
    _held[descriptor] = os.getpid()
    owner = f"process {os.getpid()} on {platform.node()}".encode()
    with contextlib.suppress(OSError):             # a full disk: the lock holds all the same
        os.pwrite(descriptor, owner, 0)            # over what the holder before has left, so that it is never empty
        os.ftruncate(descriptor, len(owner))
    return descriptor


def _in_use(folder: Path, owner: str) -> InUseError:
    return InUseError(f"{folder} is in use by {owner}: wait for it, stop it, or give another NAME")


def check_unused(folder: Path) -> None:
    """Raises InUseError if another process is at work in the folder; claims and makes nothing."""
    path = folder / LOCK_FILE
    try:
        # To close any descriptor of a file drops the locks that this process has on it: its own are not looked at.
        if any(process == os.getpid() and os.path.samestat(os.fstat(held), os.stat(path)) for held, process in _held.items()):
            return
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return                                     # no lock, or none that can be seen: who claims the folder will be told
    try:
        os.lockf(descriptor, os.F_TEST, 0)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _in_use(folder, _owner(descriptor)) from error
    finally:
        os.close(descriptor)


def _owner(descriptor: int) -> str:
    """Who holds the lock, as it says itself; it may be about to, over the words of a process that has ended."""
    deadline = time.monotonic() + OWNER_SECONDS
    while time.monotonic() < deadline:
        said = os.pread(descriptor, 200, 0).decode(errors="replace")
        found = re.fullmatch(r"process (\d+) on (.*)", said)
        if found and (found[2] != platform.node() or _is_alive(int(found[1]))):
            return said
        time.sleep(0.02)
    return "another process"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass                                       # it belongs to another user
    return True


def make_anew(folder: Path) -> None:
    """Makes and claims the folder of a run that is at work, and whose folder has vanished.

    Raises OSError, or FolderError if another run has claimed the place meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _lock(folder)


def find_checkpoint(resume_path: str, output_dir: str = "", name: str | None = None) -> tuple[Path, list[str]] | None:
    """A checkpoint file as it is, or a run folder's newest intact one -> (file, complaints about newer ones).

    "auto" means the folder OUTPUT_DIR/NAME; None: it holds no checkpoint yet, the run is to be started. Otherwise a run is
    never silently started from scratch: CheckpointError, or FolderError if "auto" has no name to go by.
    """
    if resume_path == AUTO:
        if not name:
            raise FolderError("RESUME_PATH=auto needs NAME (--name): it goes on in OUTPUT_DIR/NAME if a run is there")
        path = Path(output_dir) / name
        return newest_intact(path) if path.is_dir() and _holds_run(path) else None
    path = Path(resume_path)
    if path.is_dir():
        return newest_intact(path)
    if not path.is_file():
        raise CheckpointError(f"nothing to resume at {path}: give a run folder (output/NAME) or a checkpoint file")
    return path, []


def _clear_scraps(folder: Path) -> None:
    """What a process left half-written that was killed. Call it with the folder locked."""
    for unfinished in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            unfinished.unlink()


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
    """Raises FolderError if OUTPUT_DIR/NAME is in use or holds a run: what `create` would say, before time is spent."""
    folder = Path(output_dir) / name
    check_unused(folder)
    if folder.is_dir() and _holds_run(folder):
        raise FolderError(f"{folder} already holds a run: go on with it by RESUME_PATH={folder}, or give another NAME (--name)")


def _holds_run(folder: Path) -> bool:
    """A start that ended before its first checkpoint left nothing to go on from: its folder is free."""
    return bool(step_files(folder)) or (folder / BEST_FILE).exists()


def check_resume(checkpoint: Path, output_dir: str | None, name: str | None) -> None:
    """What `resume` would say of the folder to go on in, before time is spent: FolderError, InUseError."""
    home, target = _places(checkpoint, output_dir, name)
    if target == home:
        check_unused(home)
    else:
        check_free(str(target.parent), target.name)


def _places(checkpoint: Path, output_dir: str | None, name: str | None) -> tuple[Path, Path]:
    """-> (where the checkpoint lies, where its run goes on: the same, or the folder of a branch)"""
    home = checkpoint.parent if checkpoint.parent.name not in ("", "..") else checkpoint.parent.resolve()
    at_home = (home / CONFIG_FILE).exists()
    if not at_home and not name:
        raise FolderError(f"{checkpoint} lies outside its run folder: give a NAME (--name) for the folder to go on in")
    target = Path(output_dir or (home.parent if at_home else "output")) / (name or home.name)
    return home, home if target.resolve() == home.resolve() else target


def resume(checkpoint: Path, step: int, output_dir: str | None, name: str | None) -> Path:
    """The folder in which a run goes on: its own, or a new one if NAME or OUTPUT_DIR say so (its log is copied).

    Going on in its own folder from anything but its newest checkpoint would leave files of two histories there:
    FolderError says how to branch off instead. So it does for a checkpoint that lies outside a run folder.
    """
    home, target = _places(checkpoint, output_dir, name)
    if target != home:
        folder = create(str(target.parent), target.name, target.name)
        if (home / CONFIG_FILE).exists():
            write_log(folder, events_until(home, step))
            best = step_in(home / BEST_FILE)
            if best is not None and best <= step:      # a later one is of another history
                replace(folder / BEST_FILE, lambda unfinished: shutil.copyfile(home / BEST_FILE, unfinished))
        return folder
    _lock(home)
    newer, damaged = [], []
    for path in step_files(home):
        if int(STEP_FILE.fullmatch(path.name)[1]) > step:
            (newer if _is_intact(path) else damaged).append(path.name)
    if newer:
        raise FolderError(f"{checkpoint} is at step {step}, but {home} goes on to {newer[0]}: resume the folder, "
                          f"or give a new NAME (--name) to branch off from step {step}")
    _clear_scraps(home)
    for name in damaged:      # out of the way, or they would count among the newest when old checkpoints are deleted
        (home / name).rename(home / f"{name}.damaged")
    write_log(home, events_until(home, step))
    return home


def _is_intact(path: Path) -> bool:
    try:
        verify(path)
        return True
    except CheckpointError:
        return False


def write_config(folder: Path, config: dict, architecture: dict, world_size: int) -> None:
    """config.json: what was run, with versions and the git commit, for people and scripts; nothing reads it back."""
    content = {
        "config": config,
        "architecture": architecture,
        "world_size": world_size,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchvision": version("torchvision")},
        "commit": _commit(),
    }
    replace(folder / CONFIG_FILE, lambda unfinished: unfinished.write_text(json.dumps(content, indent=2) + "\n"))


def _commit() -> str | None:
    """Of this program, with '+' if files differ from it; None outside a git checkout."""
    root = Path(__file__).parents[2]
    try:
        answer = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
                                capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None

