"""The run's events: an append-only log.jsonl, and its readers (progress bar or plain lines, TensorBoard, W&B).

An event is a flat dict with "event" and "step"; what is not in it is not shown anywhere. Only rank 0 reports.
A disk that is full or gone, or a terminal that is closed, costs lines or curves and never the run.
"""

import contextlib
import os
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from utils.training.evaluation import EvalMetrics
from utils.training.trainer import StepMetrics

from .checkpoint import StorageError, replace
from .folder import BAD_IMAGES_FILE
from .log import Log
from .profiling import pace

PLAIN_LINES = 20      # progress lines over a run where there is no terminal for a bar
PACE_STEPS = 20       # over which the speed is a mean: a single step may have waited for a loader that all others did not


class ReportError(ValueError):
    """A place to report to that cannot be had: one line."""


def check_wandb() -> None:
    """Raises ReportError unless W&B can be logged to: before time is spent, and on every process alike."""
    if find_spec("wandb") is None:
        raise ReportError("--wandb: the package is not installed: pip install wandb, or leave --wandb out")
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if not offline and not os.environ.get("WANDB_API_KEY"):
        raise ReportError("--wandb needs the key in the environment: export WANDB_API_KEY=... (or WANDB_MODE=offline)")


class Report:
    """`folder` None: report nothing (the other ranks)."""

    def __init__(self, folder: Path | None, tensorboard_dir: Path | None, first_step: int, total_steps: int,
                 wandb_project: str | None = None, config: dict | None = None):
        """`config` is what W&B shows beside the run; ask `check_wandb` first."""
        self._readers, self._log, self._console = [], None, None
        if folder is None:
            return
        self._log = Log(folder, self.say)
        self._console = (_Bar if sys.stderr.isatty() else _Lines)(first_step, total_steps)
        self._readers = [self._console]
        if tensorboard_dir is not None:
            self._readers.append(_TensorBoard(tensorboard_dir, first_step))
        if wandb_project is not None:
            self._readers.append(_WandB(wandb_project, folder, config or {}, first_step))

    def say(self, line: str) -> None:
        """Prints a line above the progress bar, where there is one; other ranks say nothing."""
        if self._console is not None:
            with contextlib.suppress(OSError):          # a terminal that is gone
                self._console.say(line)

    def train(self, report: StepMetrics) -> None:
        self._write({"event": "train", **report.as_dict()})

    def evaluation(self, step: int, split: str, report: EvalMetrics) -> None:
        self._write({"event": "eval", "step": step, "split": split, **report.as_dict()})

    def session(self, kind: str, step: int, **details) -> None:
        """"start", "resume" or "end" of a session, with what should be remembered of it."""
        self._write({"event": kind, "step": step, "time": round(time.time(), 3), **details})

    def _write(self, event: dict) -> None:
        if self._log is None:
            return
        # JSON has no NaN and no infinity.
        plain = {key: str(value) if isinstance(value, float) and not abs(value) < float("inf") else value
                 for key, value in event.items()}
        self._log.write(plain)
        for reader in list(self._readers):
            try:
                reader.read(event)
            except OSError as error:
                self._drop(reader, error)

    def _drop(self, reader, error: OSError) -> None:
        self._readers.remove(reader)
        self.say(f"warning: {reader.name} fails ({error.strerror or error}) and is off from here on; training goes on")
        with contextlib.suppress(OSError):
            reader.close()

    def close(self) -> None:
        for reader in list(self._readers):
            try:
                reader.close()
            except OSError as error:
                self._drop(reader, error)
        if self._log is not None:
            self._log.close()


class BadImages:
    """bad_images.txt of the run in `folder`: each line once, in alphabetical order. Only rank 0 has one.

    It is read once. Trouble with the disk is one line to `say`, and no error: what is not written yet is with the next
    `add`, and at last with `close`. A file that cannot be read is not written over.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self._path, self._say = folder / BAD_IMAGES_FILE, say
        self._lines: set[str] = set()
        self._is_read, self._waiting, self._failing = False, False, False
        self._put()

    def add(self, lines: set[str]) -> tuple[list[str], int]:
        """-> (those that were not known, in alphabetical order; how many there are now)"""
        new = sorted(lines - self._lines)
        self._lines |= lines
        self._waiting |= bool(new)
        self._put()
        return new, len(self._lines)

    def close(self) -> None:
        self._put()
        if self._waiting:
            self._say(f"warning: {self._path} lacks lines of the {len(self._lines)} bad images: it cannot be written")

    def _put(self) -> None:
        try:
            if not self._is_read:
                with contextlib.suppress(FileNotFoundError):
                    self._lines |= set(self._path.read_text(errors="replace").splitlines())
                self._is_read = True
            if self._waiting:
                text = "".join(f"{line}\n" for line in sorted(self._lines))
                replace(self._path, lambda unfinished: unfinished.write_text(text, errors="backslashreplace"))
                self._waiting = False
        except (OSError, StorageError) as error:
            if not self._failing:
                self._say(f"warning: {error}: the list of bad images waits in memory, training goes on")
            self._failing = True
            return
        if self._failing:
            self._say(f"{self._path} is written again")
        self._failing = False


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


class _Bar:
    """A tqdm bar on the terminal: loss, learning rate, images/s, remaining time."""

    name = "the terminal"

    def __init__(self, first_step: int, total_steps: int):
        from tqdm import tqdm

        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, desc="training")
        self._steps: deque[dict] = deque(maxlen=PACE_STEPS)

    def say(self, text: str) -> None:
        self._bar.write(text, file=sys.stdout)

    def read(self, event: dict) -> None:
        if event["event"] == "train":
            self._steps.append(event)
            self._bar.set_postfix_str(f"{_losses(event)}, lr {event['lr']:.2e}, {pace(self._steps)}", refresh=False)
            self._bar.update(event["step"] - self._bar.n)
            if event["skipped"]:
                self.say(_skip_line(event))
        elif event["event"] == "eval":
            self.say(_evaluation_line(event))

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """Plain lines, about PLAIN_LINES of them over the run, where there is no terminal."""

    name = "the output"

    def __init__(self, first_step: int, total_steps: int):
        self._first, self._total, self._started = first_step, total_steps, 0.0     # at the first step: what is before comes once
        self._every = max(1, total_steps // PLAIN_LINES)
        self._steps: deque[dict] = deque(maxlen=PACE_STEPS)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def read(self, event: dict) -> None:
        step = event["step"]
        if event["event"] == "train":
            self._steps.append(event)
            self._started = self._started or time.monotonic() - event["seconds"]
            if event["skipped"]:
                self.say(_skip_line(event))
            if step % self._every == 0 or step == self._total:
                left = (time.monotonic() - self._started) / (step - self._first) * (self._total - step)
                self.say(f"step {step}/{self._total}: {_losses(event)}, lr {event['lr']:.2e}, "
                         f"{pace(self._steps)}, {_clock(left)} left")
        elif event["event"] == "eval":
            self.say(_evaluation_line(event))

    def close(self) -> None:
        pass


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


# The names that users of the ViT-pytorch scripts know, where they have one; those of an evaluation stand below its split.
TAGS = {"train": {"loss": "train/loss", "accuracy": "train/accuracy", "lr": "train/lr", "grad_norm": "train/grad_norm",
                  "loss_scale": "train/loss_scale", "images_per_second": "train/images_per_second",
                  "data_wait": "train/data_wait", "attention_loss": "train/attention_loss"},
        "eval": {"accuracy": "accuracy", "top5": "top5", "loss": "loss", "true_probability": "true_probability",
                 "calibration_error": "calibration_error"}}


def scalars(event: dict) -> dict[str, float]:
    """The figures of an event, by their tags."""
    prefix = f"{event['split']}/" if event["event"] == "eval" else ""
    return {prefix + tag: event[field] for field, tag in TAGS.get(event["event"], {}).items() if event.get(field) is not None}


class _TensorBoard:
    """Its writer has a thread, whose error is raised by the next call; the thread's own traceback is left out."""

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

    def read(self, event: dict) -> None:
        for tag, value in scalars(event).items():
            self._writer.add_scalar(tag, value, event["step"])

    def close(self) -> None:
        threading.excepthook = self._hook
        self._writer.close()


class _WandB:
    """Weights & Biases. A resumed run goes on in the same place: its name there is kept in the run's folder.

    The key is read by the wandb package from WANDB_API_KEY, and by nothing else here: it stands in no file of the run.
    """

    name = "W&B"

    def __init__(self, project: str, folder: Path, config: dict, first_step: int):
        import wandb

        place = folder / "wandb-id.txt"
        if first_step == 0 or not place.exists():
            place.write_text(secrets.token_hex(8))
        self._run = wandb.init(project=project, name=folder.name, id=place.read_text(), resume="allow", dir=str(folder),
                               config=config)

    def read(self, event: dict) -> None:
        if figures := scalars(event):
            self._run.log(figures, step=event["step"])

    def close(self) -> None:
        self._run.finish()
