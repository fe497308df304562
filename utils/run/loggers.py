"""Logs a run: log.jsonl, and writers that show the same events (progress bar or plain lines, TensorBoard, W&B).

An event is a flat dict with "event" and "step", made of all fields of StepMetrics and EvalMetrics: a new field appears
everywhere. A full disk or a closed terminal costs lines or curves and never the run.
"""

import contextlib
import dataclasses
import os
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from utils.files import StorageError, atomic_write
from utils.training.evaluation import EvalReport
from utils.training.trainer import StepReport

from .folder import BAD_IMAGES_FILE
from .log import Log
from .profiling import pace

PLAIN_LINES = 20      # progress lines over a run where there is no terminal for a bar
PACE_STEPS = 20       # over which the displayed speed is a mean: a single step may have waited for a loader that others did not
# What is in the log alone; all other numbers of an event are drawn.
NOT_DRAWN = {"step", "seconds", "skipped", "images", "top2", "top3", "top4"}


class LoggerError(ValueError):
    """A logger cannot be used."""

    exit_code = 2


def check_wandb() -> None:
    """Raises LoggerError unless W&B can be used: before time is spent, and on every process alike."""
    if find_spec("wandb") is None:
        raise LoggerError("--wandb: the package is not installed. Run pip install wandb, or omit --wandb.")
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if not offline and not os.environ.get("WANDB_API_KEY"):
        raise LoggerError("--wandb needs the key in the environment: export WANDB_API_KEY=... (or WANDB_MODE=offline)")


def scalars(event: dict) -> dict[str, float]:
    """The figures of a "train" or "eval" event that are drawn, by their tags: train/loss, val/accuracy, ..."""
    if event["event"] not in ("train", "eval"):
        return {}
    return {f"{event.get('split', 'train')}/{key}": value for key, value in event.items()
            if key not in NOT_DRAWN and isinstance(value, (int, float))}


def _numbers_of(record: StepReport | EvalReport) -> dict[str, float | None]:
    """Its fields that are one number each; those that default to None are omitted where they are None."""
    values = {field.name: (getattr(record, field.name), field.default) for field in dataclasses.fields(record)}
    return {name: value for name, (value, default) in values.items()
            if isinstance(value, (int, float)) or (value is None and default is not None)}


class RunLogger:
    """`folder` None: log nothing (all ranks but 0)."""

    def __init__(self, folder: Path | None, tensorboard_dir: Path | None, first_step: int, total_steps: int,
                 wandb_project: str | None = None, config: dict | None = None):
        """`config` is what W&B shows beside the run; call `check_wandb` before."""
        self._writers, self._file, self._console = [], None, None
        if folder is None:
            return
        self._file = Log(folder, self.log)
        self._console = (_ProgressBar if sys.stderr.isatty() else _PlainLines)(first_step, total_steps)
        self._writers = [self._console]
        if tensorboard_dir is not None:
            self._writers.append(_TensorBoard(tensorboard_dir, first_step))
        if wandb_project is not None:
            self._writers.append(_WandB(wandb_project, folder, config or {}, first_step))

    def log(self, line: str) -> None:
        """Prints a line, above the progress bar where there is one."""
        if self._console is not None:
            with contextlib.suppress(OSError):          # a closed terminal
                self._console.print(line)

    def log_step(self, metrics: StepReport) -> None:
        event = {"event": "train", **_numbers_of(metrics), "images_per_second": metrics.images_per_second,
                 "data_wait": metrics.data_seconds / metrics.seconds}
        event["lr"] = event.pop("learning_rate")
        del event["images"], event["data_seconds"]
        self._write(event)

    def log_evaluation(self, step: int, split: str, metrics: EvalReport) -> None:
        self._write({"event": "eval", "step": step, "split": split, **_numbers_of(metrics), "accuracy": metrics.top1,
                     **{f"top{k}": metrics.top[k - 1] for k in range(2, 6)}})

    def log_session(self, kind: str, step: int, **details) -> None:
        """"start", "resume", "end", ... of a session, with what should be remembered of it."""
        self._write({"event": kind, "step": step, "time": round(time.time(), 3), **details})

    def _write(self, event: dict) -> None:
        if self._file is None:
            return
        # JSON has no NaN and no infinity.
        self._file.write({key: str(value) if isinstance(value, float) and not abs(value) < float("inf") else value
                          for key, value in event.items()})
        for writer in list(self._writers):
            try:
                writer.write(event)
            except OSError as error:
                self._drop(writer, error)

    def _drop(self, writer, error: OSError) -> None:
        self._writers.remove(writer)
        self.log(f"warning: {writer.name} fails ({error.strerror or error}) and is off from now on; training continues")
        with contextlib.suppress(OSError):
            writer.close()

    def close(self) -> None:
        for writer in list(self._writers):
            try:
                writer.close()
            except OSError as error:
                self._drop(writer, error)
        if self._file is not None:
            self._file.close()


class BadImages:
    """bad_images.txt of the run in `folder`: each line once, in alphabetical order. For rank 0.

    A write that fails is a warning; the next one brings all lines.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]):
        """Reads the file of an earlier session. Raises OSError."""
        self._path, self._warn, self._lines = folder / BAD_IMAGES_FILE, warn, set()
        with contextlib.suppress(FileNotFoundError):
            self._lines |= set(self._path.read_text(errors="replace").splitlines())

    def add(self, lines: set[str]) -> tuple[list[str], int]:
        """-> (those that are new, in alphabetical order; how many there are now)"""
        new = sorted(lines - self._lines)
        self._lines |= lines
        if new:
            text = "".join(f"{line}\n" for line in sorted(self._lines))
            try:
                atomic_write(self._path, lambda unfinished: unfinished.write_text(text, errors="backslashreplace"))
            except StorageError as error:
                self._warn(f"warning: {error}; the list of bad images is incomplete, training continues")
        return new, len(self._lines)


# ------------------------------------------------------------------------------------------------------------- writers


def _evaluation_line(event: dict) -> str:
    return (f"step {event['step']}: {event['split']} accuracy {event['accuracy']:.2%}, top-5 {event['top5']:.2%}, "
            f"loss {event['loss']:.4f} ({event['images']} images)")


def _losses(event: dict) -> str:
    attention = f" (attention {event['attention_loss']:.4f})" if "attention_loss" in event else ""
    return f"loss {event['loss']:.4f}{attention}"


def _skip_line(event: dict) -> str:
    if event["loss_scale"] is None:
        return f"step {event['step']}: loss {event['loss']:g}, gradient norm {event['grad_norm']:g}: update skipped"
    return f"step {event['step']}: gradients overflowed float16, update skipped (loss scale {event['loss_scale']:g})"


class _ProgressBar:
    """A tqdm bar on the terminal: loss, learning rate, images/s, remaining time."""

    name = "the terminal"

    def __init__(self, first_step: int, total_steps: int):
        from tqdm import tqdm

        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, desc="training")
        self._steps: deque[dict] = deque(maxlen=PACE_STEPS)

    def print(self, text: str) -> None:
        self._bar.write(text, file=sys.stdout)

    def write(self, event: dict) -> None:
        if event["event"] == "train":
            self._steps.append(event)
            self._bar.set_postfix_str(f"{_losses(event)}, lr {event['lr']:.2e}, {pace(self._steps)}", refresh=False)
            self._bar.update(event["step"] - self._bar.n)
            if event["skipped"]:
                self.print(_skip_line(event))
        elif event["event"] == "eval":
            self.print(_evaluation_line(event))

    def close(self) -> None:
        self._bar.close()


class _PlainLines:
    """About PLAIN_LINES plain lines over the run, where there is no terminal."""

    name = "the output"

    def __init__(self, first_step: int, total_steps: int):
        self._first, self._total = first_step, total_steps
        self._started = 0.0                             # of the first step: what is before it happens once
        self._every = max(1, total_steps // PLAIN_LINES)
        self._steps: deque[dict] = deque(maxlen=PACE_STEPS)

    def print(self, text: str) -> None:
        print(text, flush=True)

    def write(self, event: dict) -> None:
        step = event["step"]
        if event["event"] == "train":
            self._steps.append(event)
            self._started = self._started or time.monotonic() - event["seconds"]
            if event["skipped"]:
                self.print(_skip_line(event))
            if step % self._every == 0 or step == self._total:
                left = (time.monotonic() - self._started) / (step - self._first) * (self._total - step)
                self.print(f"step {step}/{self._total}: {_losses(event)}, lr {event['lr']:.2e}, "
                           f"{pace(self._steps)}, {_clock(left)} left")
        elif event["event"] == "eval":
            self.print(_evaluation_line(event))

    def close(self) -> None:
        pass


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class _TensorBoard:
    """Its library writes in a thread, whose error is raised by the next call; the thread's own traceback is suppressed."""

    name = "TensorBoard"

    def __init__(self, folder: Path, first_step: int):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")      # quiet, should TensorFlow be installed
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier session wrote after the checkpoint is void: its steps come again.
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0)
        self._hook, threading.excepthook = threading.excepthook, self._thread_ended

    def _thread_ended(self, what: threading.ExceptHookArgs) -> None:
        if not (isinstance(what.exc_value, OSError) and type(what.thread).__module__.startswith("tensorboard.")):
            self._hook(what)

    def write(self, event: dict) -> None:
        for tag, value in scalars(event).items():
            self._writer.add_scalar(tag, value, event["step"])

    def close(self) -> None:
        threading.excepthook = self._hook
        self._writer.close()


class _WandB:
    """Weights & Biases. A resumed run continues its run there, whose id is kept in the run's folder.

    The wandb package reads the key from WANDB_API_KEY; nothing here does, and no file of the run holds it.
    """

    name = "W&B"

    def __init__(self, project: str, folder: Path, config: dict, first_step: int):
        import wandb

        file = folder / "wandb-id.txt"
        if first_step == 0 or not file.exists():
            file.write_text(secrets.token_hex(8))
        self._run = wandb.init(project=project, name=folder.name, id=file.read_text(), resume="allow", dir=str(folder),
                               config=config)

    def write(self, event: dict) -> None:
        if figures := scalars(event):
            self._run.log(figures, step=event["step"])

    def close(self) -> None:
        self._run.finish()
