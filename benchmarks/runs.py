"""Whole runs of train.py as a user starts them; figures are read from their logs."""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import pictures
from .harness import ROOT

SETTLING = 3            # first steps, which are not counted
_numbers = itertools.count(1)


def start(command: Sequence[str], folder: str, environment: dict) -> tuple[subprocess.Popen, Path]:
    """Start a run. Return its process, and its log, which exists from its beginning."""
    name = f"{os.getpid()}-{next(_numbers)}"
    flags = ["--name", name, "--output_dir", folder, "--log_dir", f"{folder}/logs"]
    clean = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}      # train.py sets its own
    process = subprocess.Popen([*command, *flags], cwd=ROOT, env=clean | environment, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return process, Path(folder, name, "log.jsonl")


def finish(process: subprocess.Popen) -> None:
    """Wait for the end of a run. Raises RuntimeError if it fails."""
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(process.args)} ended with code {process.returncode}: {said[-2000:]}")


def first_step(command: list[str]) -> Callable[[], float]:
    """Return a step that returns the seconds until the log has a training step. The rest of the run is not counted."""
    folder = tempfile.TemporaryDirectory()

    def step(keep=folder) -> float:
        started = time.perf_counter()
        process, log = start(command, keep.name, {"PYTHON": sys.executable})
        while process.poll() is None and not (log.exists() and '"event": "train"' in log.read_text()):
            time.sleep(0.005)
        elapsed = time.perf_counter() - started
        finish(process)
        return elapsed

    return step


def bare(command: list[str]) -> Callable[[], None]:
    """Return a step that runs a command."""
    def step() -> None:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    return step


def arrays(folder: str) -> list[str]:
    """Return the flags of a data set of gray images of 28 px, which train.py keeps in memory."""
    root = Path(folder, "mnist")
    if not root.exists():
        pictures.mnist(root, train=2000, test=8)
    return ["--dataset", "fashion_mnist", "--data_dir", str(root)]


def files(folder: str, images: int) -> dict[str, list[str]]:
    """Return the flags of so many JPEG files of ImageNet's size: "files", and "prepared"."""
    root, prepared = Path(folder, "files"), Path(folder, "prepared")
    found = {name: ["--dataset", "folder", "--data_dir", str(place)] for name, place in (("files", root), ("prepared", prepared))}
    if not root.exists():
        pictures.folder(root, images, 500, 375)
        subprocess.run([sys.executable, "dataset.py", "prepare", str(prepared), *found["files"]], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL)
    return found


def flags(options, model: str, data: list[str]) -> list[str]:
    """Return the flags of a run with random crops and mirror images at the size of the model, and hardly any evaluation."""
    steps = str(options.steps + SETTLING)
    return [*data, "--recipe", "vit-paper", "--model_type", model,
            "--pretrained_dir", "none", "--img_size", str(options.size), "--train_batch_size", options.batch,
            "--num_steps", steps, "--warmup_steps", "1", "--eval_every", steps, "--test", "once", "--device", options.device,
            "--precision", options.precision]


def shrink_if_quick(options) -> None:
    """With --quick: take a tiny model and few steps."""
    if options.quick:
        options.models, options.size, options.batch, options.steps, options.rounds = "ViT-Nano_2", 8, "16", 2, 1


def training(flags: list[str], processes: int, threads: int) -> Callable[[], dict[str, float]]:
    """Return a step: a run of train.py on so many processes with so many threads each (0: one per core).

    The step returns means over all but the first training steps: "step", in seconds, and "data wait", the part that waits.
    """
    folder = tempfile.TemporaryDirectory()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}

    def step(keep=folder) -> dict[str, float]:
        process, log = start([sys.executable, *launcher, "train.py", *flags], keep.name, environment)
        finish(process)
        events = [json.loads(line) for line in log.read_text().splitlines()]
        steps = [event for event in events if event["event"] == "train"][SETTLING:]
        return {"step": statistics.mean(event["seconds"] for event in steps),
                "data wait": statistics.mean(event["seconds"] * event["data_wait"] for event in steps)}

    return step
