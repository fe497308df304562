"""Opens a checkpoint of a run in all possible ways, each in a forked child -> the result, and what the user saw.

    resume, eval (--eval_only --resume_path), start (--pretrained_dir), eval_start, python (load_model, open_model), picture
    (visualize.py), annotate (annotate.py)
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import annotate
import train
import visualize
from models import create, load_model
from utils import build, process
from utils.data import datasets
from utils.data.splits import Subset
from utils.report import plots
from utils.run import checkpoint

STEPS, AT = 4, 2         # steps of the run, and of the checkpoint that is changed
SECONDS = 60
BASES = {
    "adamw": ("--optimizer", "adamw", "--weight_decay", "0.05", "--ema_decay", "0.9", "--layer_decay", "0.8"),
    "fp16": ("--precision", "fp16", "--optimizer", "sgd", "--sigmoid_attention", "last"),
    "adam": ("--optimizer", "adam"),
} | ({"lamb": ("--optimizer", "lamb", "--weight_decay", "0.05")} if importlib.util.find_spec("timm") else {})
TINY = ["--patch_size", "4", "--hidden_size", "8", "--mlp_dim", "8", "--num_heads", "2", "--num_layers", "1", "--img_size", "8",
        "--train_batch_size", "16"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    code: int                # negative: the signal that ended the child
    output: str              # stdout and stderr
    result: str              # hash of the result; "" if there is none
    printed: tuple[str, ...]          # the lines before the first step

    @property
    def error(self) -> str:
        """The last line of the output."""
        return (self.output.rstrip("\n").splitlines() or [""])[-1]


def train_base(folder: Path, name: str) -> Path:
    """Train the run in a child -> its folder, whose newest checkpoint is the one to change"""
    folder.mkdir(parents=True, exist_ok=True)
    argv = ["--device", "cpu", "--pretrained_dir", "none", "--num_steps", str(STEPS), "--save_every", str(AT), "--eval_every",
            str(AT), "--name", "r", *TINY, *BASES[name]]
    outcome = in_child(folder, lambda: train.main(argv), _end_of_run)
    assert outcome.code == 0, outcome.output
    run = folder / "output" / "r"
    for file in (*checkpoint.step_files(run)[:1], run / "best.pt", run / "curves.png"):
        file.unlink(missing_ok=True)
    return run


def ended(run: Path) -> str:
    """Return the result of an uninterrupted run."""
    return (run.parents[1] / "result").read_text()


def through(door: str, folder: Path, run: Path, make: Callable[[Path], object], flags: Sequence[str] = ()) -> Outcome:
    """Open a checkpoint that make(path) writes in place of the run's own. flags: more flags for `resume`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(run, folder / "output" / "r", ignore=shutil.ignore_patterns("*.pt", ".lock"))
    make(checkpoint.step_path(folder / "output" / "r", AT))
    call = DOORS[door] if not flags else lambda: train.main([*RESUME, *flags])
    return in_child(folder, call, RESULTS.get(door, lambda: ""))


def in_child(folder: Path, call: Callable[[], object], result: Callable[[], str] = lambda: "") -> Outcome:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _live(folder, call, result)
    status = os.waitpid(child, 0)[1]
    output = (folder / "out.txt").read_bytes().decode(errors="replace")
    kept = folder / "result"
    return Outcome(os.waitstatus_to_exitcode(status), output, kept.read_text() if kept.exists() else "", _before_steps(output))


def _live(folder: Path, call: Callable, result: Callable) -> None:
    """Run in the child; never return."""
    code = 1
    try:
        os.chdir(folder)
        output = os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        streams = [open(number, "w", buffering=1, closefd=False, encoding="utf-8") for number in (1, 2)]
        sys.stdout, sys.stderr = map(process.ResilientStream, streams)
        signal.alarm(SECONDS)
        plots.save = lambda figure, path: Path(path).touch()
        splits, few = datasets.digits(""), lambda split, count: Subset(split, range(count))
        datasets.DATASETS["digits"] = lambda _: dataclasses.replace(
            splits, train=few(splits.train, 64), val=few(splits.val, 40), test=few(splits.test, 40))
        code = call()
        if code == 0:
            Path("result").write_text(result())
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code or 0)


def _before_steps(output: str) -> tuple[str, ...]:
    """Return the lines that a run prints before its first step."""
    lines = []
    for line in output.splitlines():
        if re.match(r"step \d|Done:|\w+ accuracy", line):
            break
        lines.append(line)
    return tuple(lines)


def _digest(*values: object) -> str:
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.detach().float().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                add(key)
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for inner in value:
                add(inner)
        else:
            digest.update(repr(value).encode())

    add(values)
    return digest.hexdigest()


def _end_of_run() -> str:
    """Return the hash of everything that further training depends on."""
    newest, = (file for file in Path("output").glob("*/step-*.pt") if file.name == f"step-{STEPS:08d}.pt")
    state = checkpoint.open_run_checkpoint(newest).state()
    groups = [{key: value for key, value in group.items() if key != "lr"} for group in state.optimizer["param_groups"]]
    return _digest(state.model, state.ema, state.optimizer["state"], groups, state.scaler, state.step, state.updates)


def _evaluated() -> str:
    """Return the hash of the printed evaluation."""
    return _digest([line for line in Path("out.txt").read_text().splitlines() if re.match(r"\w+ accuracy|  top-1|  prob", line)])


FILE = f"output/r/step-{AT:08d}.pt"


def _python() -> int:
    """Open the checkpoint as a Python program does, which prints the text of errors itself."""
    from utils.run.checkpoint import CheckpointError

    try:
        model, opened = load_model(FILE), build.open_model(FILE)
    except ValueError as error:
        if getattr(error, "exit_code", None) is None:
            raise
        assert isinstance(error, (create.ModelError, CheckpointError, ValueError))
        print(f"error: {error}")
        return error.exit_code
    images = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)
    split = datasets.digits("").test
    seen = opened.transform(split[0][0])
    same = model.state_dict(), model.classes, model(images), opened.model(images), seen, opened.classes
    Path("values").write_text(_digest(*same))
    return 0


def _annotate() -> int:
    with process.program("annotate.py", signals=False) as program:
        args = annotate.parse(["--checkpoint", FILE])
        opened = build.open_model(args.checkpoint)
        gallery = annotate.open_gallery(args, opened)
        seen = gallery.predict_with_attention(0)
        Path("values").write_text(_digest(*map(torch.from_numpy, vars(seen).values())))
    return program.exit_code


START = (f"--device cpu --pretrained_dir {FILE} --num_steps {STEPS} --save_every {STEPS} --eval_every {STEPS} "
         "--train_batch_size 16 --name s").split()
RESUME = ["--device", "cpu", "--resume_path", FILE]
DOORS: dict[str, Callable[[], int]] = {
    "resume": lambda: train.main(RESUME),
    "eval": lambda: train.main(["--device", "cpu", "--eval_only", "--resume_path", FILE]),
    "start": lambda: train.main(START),
    "eval_start": lambda: train.main(["--device", "cpu", "--eval_only", "--pretrained_dir", FILE]),
    "python": _python,
    "picture": lambda: visualize.main(["attention", "--checkpoint", FILE, "--images", "1", "--output", "pictures"]),
    "annotate": _annotate,
}
RESULTS = {"resume": _end_of_run, "start": _end_of_run, "eval": _evaluated, "eval_start": _evaluated,
           "python": lambda: Path("values").read_text(), "annotate": lambda: Path("values").read_text(),
           "picture": lambda: json.dumps(sorted(path.name for path in Path("pictures").iterdir()))}
