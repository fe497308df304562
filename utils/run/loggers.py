"""Logs a run: log.jsonl, and writers that show the same events (progress bar or plain lines, TensorBoard, W&B).

An event is a flat dict with "event" and "step", made of all fields of StepMetrics and EvalMetrics: a new field appears
everywhere. A full disk or a closed terminal loses lines or curves, but does not end the run.
"""

import contextlib
import os
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from utils import launch, process
from utils.files import StorageError, atomic_write, naming, write_file
from utils.training.evaluation import TOP, EvalMetrics
from utils.training.trainer import StepMetrics

from .folder import BAD_IMAGES_FILE
from .health import Health
from .log import Log
from .profiling import pace
from .time_left import TimeLeft, in_words

PLAIN_LINES = 20      # progress lines over a run where there is no terminal for a bar
LEFT_SHOWN = 10.0     # seconds: the time left is not printed for a shorter run
PACE_STEPS = 20       # over which the displayed speed is a mean: a single step may have waited for a loader that others did not
# Only in the log; all other numbers of an event are drawn.
NOT_DRAWN = {"step", "seconds", "skipped", "images", "top2", "top3", "top4", "predicted_class", "predicted_share"}


class LoggerError(ValueError):
    """Raised when a logger cannot be used."""

    exit_code = 2


def check_wandb() -> None:
    """Raise LoggerError unless W&B can be used: before time is spent, and on every process alike."""
    if find_spec("wandb") is None:
        raise LoggerError(f"--wandb: the package is not installed. Run {launch.command_to_install('wandb')}, or omit --wandb.")
    if os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun") and not os.environ.get("WANDB_API_KEY"):
        raise LoggerError("--wandb needs the key in the environment: export WANDB_API_KEY=... (or WANDB_MODE=offline)")


def scalars(event: dict) -> dict[str, float]:
    """Return the drawn figures of a "train" or "eval" event by tag: train/loss, val/accuracy, ..."""
    if event["event"] not in ("train", "eval"):
        return {}
    return {f"{event.get('split', 'train')}/{key}": value for key, value in event.items()
            if key not in NOT_DRAWN and isinstance(value, (int, float))}


class RunLogger:
    """Writes the events of a run. With `folder` None (all ranks but 0) it logs nothing."""

    def __init__(self, folder: Path | None, tensorboard_dir: Path | None, first_step: int, total_steps: int,
                 wandb_project: str | None = None, config: dict | None = None, eval_every: int | None = None,
                 health: Health | None = None, num_classes: int | None = None, aliases: Mapping[str, str] | None = None):
        """`config`: the settings that W&B shows with the run; call `check_wandb` before. eval_every: steps between evaluations.
        The warnings of `health` are printed. num_classes: top-5 is not printed for five or fewer. aliases: a tag of TensorBoard
        -> a second tag for the same values."""
        self._writers, self._file, self._console, self._health = [], None, None, health
        if folder is None:
            return
        self._file = Log(folder, self.log)
        self._console = (_ProgressBar(first_step, total_steps) if sys.stderr.isatty() else
                         _PlainLines(total_steps, TimeLeft(first_step, total_steps, eval_every)))
        self._console.shows_top5 = num_classes is None or num_classes > TOP
        self._writers.append(self._console)
        if tensorboard_dir is not None:
            self._writers.append(_TensorBoard(tensorboard_dir, first_step, aliases or {}))
        if wandb_project is not None:
            self._writers.append(_WandB(wandb_project, folder, config or {}, first_step))

    def log(self, line: str) -> None:
        """Print a line, above the progress bar where there is one."""
        if self._console is not None:
            with contextlib.suppress(OSError):          # a closed terminal
                self._console.print(line)

    def end_progress(self) -> None:
        """End the line of the progress bar, so that what is printed next is on a line of its own."""
        if self._console is not None:
            with contextlib.suppress(OSError):
                self._console.close()

    def log_step(self, metrics: StepMetrics) -> None:
        self._write({"event": "train", **metrics.as_dict()})

    def log_evaluation(self, step: int, split: str, metrics: EvalMetrics) -> None:
        self._write({"event": "eval", "step": step, "split": split, **metrics.as_dict()})

    def log_session(self, kind: str, step: int, **details) -> None:
        """Log an event of a session ("start", "resume", "end", ...) with its details."""
        self._write({"event": kind, "step": step, "time": round(time.time(), 3), **details})

    def _write(self, event: dict) -> None:
        if self._file is None:
            return
        # JSON has no NaN and no infinity.
        self._file.write({key: str(value) if isinstance(value, float) and not abs(value) < float("inf") else value
                          for key, value in event.items()})
        self._each_writer(lambda writer: writer.write(event))
        for warning in self._health.follow(event) if self._health else ():
            self.log(warning)

    def _each_writer(self, call: Callable) -> None:
        """Turn off a writer that fails."""
        for writer in list(self._writers):
            try:
                call(writer)
            except OSError as error:
                self._writers.remove(writer)
                place = error.filename or writer.place
                where = f" in {place}" if place else ""
                reason = error.strerror or error
                self.log(f"warning: {writer.name}{where} failed ({reason}) and is turned off; training continues")
                with contextlib.suppress(OSError):
                    writer.close()

    def close(self) -> None:
        self._each_writer(lambda writer: writer.close())
        if self._file is not None:
            self._file.close()


class BadImages:
    """Writes bad_images.txt of the run in `folder`: each line once, in alphabetical order. For rank 0.

    A write that fails causes a warning; the next one writes all lines.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]):
        """Read the file of an earlier session. Raises OSError."""
        self._path, self._warn, self._lines = folder / BAD_IMAGES_FILE, warn, set()
        with contextlib.suppress(FileNotFoundError), naming(self._path):
            self._lines |= set(self._path.read_text(encoding="utf-8", errors="replace").splitlines())

    def add(self, lines: set[str]) -> tuple[list[str], int]:
        """-> (those that are new, in alphabetical order; how many there are now)"""
        new = sorted(lines - self._lines)
        self._lines |= lines
        if new:
            text = "".join(f"{line}\n" for line in sorted(self._lines))
            try:
                atomic_write(self._path, lambda unfinished: unfinished.write_text(text, encoding="utf-8",
                                                                               errors="backslashreplace"))
            except StorageError as error:
                self._warn(f"warning: {error}; the list of bad images is incomplete, training continues")
        return new, len(self._lines)


# ------------------------------------------------------------------------------------------------------------- writers


class _Console:
    """Shows steps and evaluations; subclasses `print` a line and `_show` a step's progress."""

    place = None            # of the files that a writer makes
    shows_top5 = True

    def __init__(self):
        self._steps: deque[dict] = deque(maxlen=PACE_STEPS)

    def write(self, event: dict) -> None:
        if event["event"] == "train":
            self._steps.append(event)
            if event["skipped"]:
                self.print(_skip_line(event))
            attention = f" (attention {event['attention_loss']:.4f})" if "attention_loss" in event else ""
            self._show(event, f"loss {event['loss']:.4f}{attention}, lr {event['lr']:.2e}, {pace(self._steps)}")
        elif event["event"] == "eval":
            top5 = f"top-5 {event['top5']:.2%}, " if self.shows_top5 else ""
            self.print(f"step {event['step']}: {event['split']} accuracy {event['accuracy']:.2%}, {top5}loss {event['loss']:.4f} "
                       f"({event['images']} image{'s' * (event['images'] != 1)})")

    def close(self) -> None:
        pass


def _skip_line(event: dict) -> str:
    if event["loss_scale"] is None:
        return f"step {event['step']}: loss {event['loss']:g}, gradient norm {event['grad_norm']:g}: update skipped"
    return f"step {event['step']}: gradients overflowed float16, update skipped (loss scale {event['loss_scale']:g})"


class _ProgressBar(_Console):
    """A tqdm bar on the terminal, with the remaining time."""

    name = "the terminal"

    def __init__(self, first_step: int, total_steps: int):
        from tqdm import tqdm

        super().__init__()
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", desc="training", **process.bar_size())

    def print(self, text: str) -> None:
        self._bar.write(text, file=sys.stdout)

    def _show(self, event: dict, figures: str) -> None:
        self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update(event["step"] - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _PlainLines(_Console):
    """Prints about PLAIN_LINES lines over the run, where there is no terminal, and one on how long the run will take."""

    name = "the output"

    def __init__(self, total_steps: int, left: TimeLeft):
        super().__init__()
        self._total, self._every = total_steps, max(1, total_steps // PLAIN_LINES)
        self._left, self._showed_left = left, False

    def print(self, text: str) -> None:
        print(text, flush=True)

    def write(self, event: dict) -> None:
        self._left.follow(event)
        super().write(event)

    def _show(self, event: dict, figures: str) -> None:
        step, left = event["step"], self._left
        known = left.known and step < self._total
        if step % self._every == 0 or step == self._total:
            remaining = f", {in_words(left.seconds)} left" if known and self._showed_left else ""
            self.print(f"step {step}/{self._total}: {figures}{remaining}")
        if known and not self._showed_left:
            self._showed_left = True
            if left.seconds >= LEFT_SHOWN:
                self.print(f"about {in_words(left.seconds)} left ({left.a_step:.2g} s a step)")


class _TensorBoard:
    """Writes event files. The library writes in a thread, whose error the next call raises; the thread's own traceback is
    suppressed."""

    name = "TensorBoard"

    def __init__(self, folder: Path, first_step: int, aliases: Mapping[str, str]):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")      # quiet, should TensorFlow be installed
        from torch.utils.tensorboard import SummaryWriter

        self.place, self._aliases = folder, aliases
        # Hides what an earlier session wrote after the checkpoint: its steps are repeated.
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0)
        self._hook, threading.excepthook = threading.excepthook, self._thread_ended

    def _thread_ended(self, what: threading.ExceptHookArgs) -> None:
        if not (isinstance(what.exc_value, OSError) and type(what.thread).__module__.startswith("tensorboard.")):
            self._hook(what)

    def write(self, event: dict) -> None:
        for tag, value in scalars(event).items():
            for each in filter(None, (tag, self._aliases.get(tag))):
                self._writer.add_scalar(each, value, event["step"])

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

        self.place, file = folder, folder / "wandb-id.txt"
        if first_step == 0 or not file.exists():
            write_file(file, secrets.token_hex(8))
        self._run = wandb.init(project=project, name=folder.name, id=file.read_text(encoding="utf-8"), resume="allow",
                               dir=str(folder), config=config)

    def write(self, event: dict) -> None:
        if figures := scalars(event):
            self._run.log(figures, step=event["step"])

    def close(self) -> None:
        self._run.finish()
