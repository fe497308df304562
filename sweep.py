"""The paper's protocol in one command: try learning rates on a held-out split, train on all of train with the best, test once.

bash sweep.sh starts it. Dosovitskiy et al. (arXiv 2010.11929, appendix B.1.1) choose the learning rate on a part of the
training images that they hold out, then train on all of them and evaluate once on the test set. So is the weight of the attention
loss (--attention_edits) chosen. Each trial is a run of train.sh with its own folder: the same command resumes a sweep.

    OUTPUT_DIR/NAME/  lr-0.001/ lr-0.003/ ...  final/    run folders (weight-0.1/ ... for --attention_loss_weights)
                      sweep.json    the settings, which a resumed sweep must share
                      sweep.csv     one row for each run
                      sweep.png     accuracy over the values tried, with 95 % intervals
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from utils import launch, process
from utils.files import StorageError, atomic_write, csv_table

with process.imports("sweep.py"):
    from models.checkpoints import hub
    from models.checkpoints.first_look import SWEEP_FILE, is_sweep
    from models.checkpoints.published import published_name, published_names
    from utils.config import FLAGS, ConfigError, Parser, check_published, machine_of, name_model, preview, warn_of_variables
    from utils.config import parse as parse_flags
    from utils.config.flags import FREE
    from utils.config.recipes import PAPER_RATES, rates_to_try
    from utils.config.retired import RETIRED
    from utils.config.types import non_negative_float, positive_float
    from utils.report import sweeps
    from utils.run.names import check_free
    from utils.training.certainty import result_of

ROOT = Path(__file__).resolve().parent
NAME = "sweep"                                        # of a sweep without a name
SET_BY_SWEEP = ("test", "resume_path", "eval_only")            # flags that a sweep sets itself, as it does the one that it tries
# Flags that can be tried: (the type of the values, the beginning of the folders' names). The sweep's own flag is the plural.
SWEEPABLE = {"learning_rate": (positive_float, "lr"), "attention_loss_weight": (non_negative_float, "weight")}
# A recipe may choose these differently for the final run, which has more images; the learning rate was not chosen for that.
PINNED = ("train_batch_size", "randaugment_ops")
RESULTS = ("split", "images", "accuracy", "top5", "loss")
OF_RUN = ("output_dir", "log_dir", "name", "val_fraction", "test")            # set for each run, whatever was typed


def main(argv: list[str]) -> int:
    os.environ.setdefault("VIT_CALLED_FROM", os.getcwd())
    os.chdir(ROOT)                                    # as train.sh: relative paths count from there
    with process.program("sweep.py", signals=False) as program:
        if os.environ.pop("DRY_RUN", "") == "1":
            raise ConfigError("a sweep has no dry run. DRY_RUN=1 bash train.sh shows the command of one run")
        warn_of_variables(os.environ, "sweep.sh", "train.sh")
        tried, values, flags = parse(argv)
        flags_of_run = name_model(flags_of_script(flags), hub)
        check_folder(flags_of_run)
        values = values or rates_to_try(preview(flags_of_run, machine_of(flags_of_run)))
        for name in (tried, *SET_BY_SWEEP):
            if name in flags_of_run:
                raise ConfigError(f"--{name}: a sweep sets it itself. Omit it.")
        run = argparse.Namespace(**preview(flags_of_run | {tried: values[-1]}))
        check_published(flags_of_run, published_name, published_names())
        folder = Path(run.output_dir) / (run.name or NAME)
        held_out = fraction_to_hold_out(run)
        check_start(run, held_out, begun=any(folder.glob("*/log.jsonl")))
        # A resumed run has these in its checkpoint or does not need them; a new trial reads them again.
        may_change = {row.name for row in FLAGS.values() if row.on_resume == FREE} | {tried}
        may_change -= {"pretrained_dir", "teacher", "attention_edits"}
        settings = {name: value for name, value in vars(run).items() if name not in may_change}
        settings["edits"] = digest_of_edits(run.attention_edits)
        claim(folder, {f"{tried}s": values, **settings, "val_fraction": held_out})
        flags = without(flags, *OF_RUN)
        flags = flags if run.test_fraction else without(flags, "split_seed")           # the final run holds nothing out
        shared = [*flags, "--output_dir", str(folder), "--log_dir", str(Path(run.log_dir) / folder.name)]
        trial = ["--val_fraction", str(held_out), "--test", "never", *["--split_seed", str(run.split_seed)] * bool(held_out)]
        process.collect_garbage()
        rows = []
        for value in values:
            rows.append(finish(folder / f"{SWEEPABLE[tried][1]}-{value!r}", shared + trial, tried, value))
            write(folder, rows, tried)
        best = begun_with(folder / sweeps.FINAL, tried, rows) or sweeps.choose(rows)
        if best is None:
            raise ConfigError(f"all runs of {folder} diverged. Try lower learning rates")
        print(f"\nsweep: {sweeps.describe_choice(rows, best, tried)}", flush=True)
        final = [*shared, "--val_fraction", "0", "--test", "once"]
        final += pinned(folder / best["run"], flags_of_run)
        rows.append(finish(folder / sweeps.FINAL, final, tried, best[tried]))
        summarize(folder, rows, tried)
    return program.exit_code


class RunError(ValueError):
    """Raised when a run of the sweep fails, with the run's exit code."""

    def __init__(self, code: int):
        super().__init__(f"a run ended with exit code {code}; its error is above. Fix the cause and repeat the command to resume")
        self.exit_code = code


def parse(argv: list[str]) -> tuple[str, list[float], list[str]]:
    """Return (what is tried, its values, rising, [] for the default ones; flags for train.py)."""
    parser = Parser(
        prog="sweep.py", examples=[("DATASET=folder DATA_DIR=flowers sweep.sh --learning_rates 0.003,0.01", "tries two rates")],
        description="Tries learning rates, or weights of the attention loss, on held-out images, trains on all with the best, "
        f"and tests once.\n\nAll other flags go to each run: {launch.command('train.py')} --help lists them.")
    parser.add_argument("--learning_rates", metavar="FLOAT,...", help="rates to try (default: " + ",".join(map(str, PAPER_RATES))
                        + ", the paper's for CIFAR, Pets and Flowers; or four around the recipe's, where that is far from them)")
    parser.add_argument("--attention_loss_weights", metavar="FLOAT,...", help="with --attention_edits: 0,0.1,1 (default: none)")
    own, flags = parser.parse_known_args(argv)
    requested = {name: getattr(own, f"{name}s") for name in SWEEPABLE if getattr(own, f"{name}s") is not None}
    if not requested:
        return "learning_rate", [], flags
    if len(requested) > 1:
        raise ConfigError("--learning_rates and --attention_loss_weights: a sweep tries only one of them")
    (tried, text), = requested.items()
    try:
        values = [SWEEPABLE[tried][0](value) for value in re.split(r"[\s,;]+", text) if value]
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--{tried}s {text}: each {error}. Expected numbers such as 0.001,0.003") from error
    if not values:
        raise ConfigError(f"--{tried}s {text!r}: holds no number. Expected numbers such as 0.001,0.003")
    for value in sorted({value for value in values if values.count(value) > 1}):
        print(f"sweep: --{tried}s has {value:g} several times; it is tried once")
    return tried, sorted(set(values)), flags


def check_folder(flags: dict) -> None:
    """Raise FolderError if the folder of the sweep holds a run."""
    place = flags.get("output_dir", FLAGS["output_dir"].default), flags.get("name", NAME)
    if not is_sweep(Path(*place)):
        check_free(*place)


def flags_of_script(flags: list[str]) -> dict:
    """Return the flags of train.py that train.sh makes of its variables and of `flags`."""
    # In UTF-8 bash prints names unchanged; in other locales it escapes them.
    environment = os.environ | {"PYTHON": sys.executable, "DRY_RUN": "1", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["bash", "train.sh", *flags], env=environment, capture_output=True)
    if done.returncode:
        raise ConfigError(os.fsdecode(done.stderr).strip())
    words = shlex.split(os.fsdecode(done.stdout).splitlines()[-1])
    return parse_flags(words[words.index("train.py") + 1:])


def fraction_to_hold_out(run: argparse.Namespace) -> float:
    """Return the run's fraction, or a tenth; 0 if the data set has its own validation split next to a test set."""
    from utils.data import datasets

    splits = datasets.splits_of(vars(run))
    if splits.test is splits.val and not splits.val_is_test:
        raise ConfigError("a sweep tests its last run, and these data have no test set. Add --test_fraction 0.2 to draw one")
    if run.val_fraction:
        return run.val_fraction
    return 0.0 if splits.val is not splits.test else 0.1


def check_start(run: argparse.Namespace, held_out: float, begun: bool) -> None:
    """Raise ConfigError if the run that the sweep starts from was trained on images that the sweep chooses on. A sweep that an
    older version began is resumed with a warning."""
    from utils.build import leakage
    from utils.data import datasets

    if (found := leakage.start_run(run.pretrained_dir)) is None:
        return
    path, start = found
    splits = datasets.splits_of(vars(run), val_fraction=held_out)
    seen = leakage.seen_images(start, run.dataset, run.data_dir, splits)
    if seen is None:
        print(leakage.warning_of_seen(start, path, run, splits))
    elif count := seen.get(splits.val_name):
        drawn = {name: getattr(run, name) for name in leakage.DRAWN} | {"val_fraction": held_out}
        message = (f"--pretrained_dir {run.pretrained_dir}: that run was trained on {count} of the {len(splits.val)} images that "
                   f"the sweep chooses on: their accuracy means little. {leakage.advise(start, drawn)}")
        if not begun:
            raise ConfigError(message)
        print(f"warning: {message}")


def digest_of_edits(folder: str | None) -> str | None:
    """Return a digest that changes with any file in the folder; None without a folder."""
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*.json") if path.is_file()):
        digest.update(os.fsencode(path.relative_to(folder)) + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def without(flags: list[str], *names: str) -> list[str]:
    """Return the flags without these and their values."""
    parser = Parser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}")
    return parser.parse_known_args(flags)[1]


def claim(folder: Path, settings: dict) -> None:
    """Make the sweep's folder. Raises ConfigError if it holds another sweep."""
    file = folder / SWEEP_FILE
    if file.exists():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            before = {}
        settings = json.loads(json.dumps(settings))               # as they are read
        if isinstance(before, dict) and before:
            younger = {name: value_before(name, settings) for name in settings}
            before = {name: value for name, value in (younger | before).items()
                      if name not in (*RETIRED, "fp16")}          # an alias of precision
        else:
            before = {}
        changed = [name for name in settings | before if before.get(name) != settings.get(name)]
        if not changed:
            print(f"sweep: resuming {folder}")
            return
        if any(folder.glob("*/log.jsonl")):
            name = changed[0]
            or_else = f", or add --{name} {before[name]} to continue it" if name in FLAGS and before.get(name) is not None else ""
            raise ConfigError(f"{folder} is a sweep with {name} {before.get(name)}, not {settings.get(name)}. Choose another NAME"
                              f"{or_else}")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(file, lambda unfinished: unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8"))


def pinned(trial: Path, typed: dict) -> list[str]:
    """Return flags with the trial's values of PINNED, except those typed; [] if its config.json is lost."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        saved = json.loads((trial / "config.json").read_text(encoding="utf-8"))["config"]
        return [word for name in PINNED if name not in typed for word in (f"--{name}", str(saved[name]))]
    return []


def value_before(name: str, settings: dict) -> object:
    """Return the value that a sweep from before the flag had: the default of that time, or any where the flag has no effect."""
    if name not in FLAGS:
        return settings[name]
    try:
        acts = FLAGS[name].has_effect(settings)
    except KeyError:                                              # it depends on what may change
        acts = True
    return FLAGS[name].before if acts else settings[name]


def finish(folder: Path, flags: list[str], tried: str, value: float) -> dict:
    """Run or resume the trial, unless it has ended -> its row of the table"""
    from utils.run import checkpoint
    from utils.run import folder as run_folder

    def last(*kinds: str) -> dict | None:
        return next((event for event in reversed(run_folder.read_log(folder))
                     if event["event"] in kinds and event.get("split") != "train"), None)

    def result() -> dict | None:
        """Return its last evaluation; None if a full disk lost that line: a finished run that is resumed evaluates again."""
        end, evaluated = last("end"), last("eval")
        return evaluated if end is None or (evaluated or {}).get("step") == end.get("step") else None

    ended = last("start", "resume", "end", "diverged")
    if ended is None or ended["event"] not in ("end", "diverged") or (ended["event"] == "end" and result() is None):
        started = folder.is_dir() and (checkpoint.step_files(folder) or (folder / checkpoint.BEST_FILE).exists())
        print(f"\nsweep: {'resuming' if started else 'running'} {folder.name}", flush=True)
        typed = [] if started else [*flags, f"--{tried}", str(value), "--name", folder.name]
        code = start(folder if started else None, *typed, trial=folder.name != sweeps.FINAL)
        ended = last("start", "resume", "end", "diverged")
        if code and (ended is None or ended["event"] != "diverged"):
            raise RunError(code)
    row = {"run": folder.name, tried: value, "status": "done"}
    if ended is not None and ended["event"] == "diverged":
        return row | {"status": f"diverged at step {ended['step']}"}
    if (evaluated := result()) is None or result_of(evaluated) is None:
        raise StorageError(f"{folder / run_folder.LOG_FILE} has no evaluation of the finished run. Make room on the disk and "
                           "start the sweep again: it continues here")
    return row | {key: value for key, value in evaluated.items() if key in RESULTS}


def start(resume: Path | None, *flags: str, trial: bool) -> int:
    """Run train.sh -> its exit code. Variables of the script that the flags replace are removed: a resumed run's are all of
    them."""
    settings = re.findall(r'^add (\w+) "\$(\w+)"', Path("train.sh").read_text(encoding="utf-8"), re.MULTILINE)
    ours = {variable for name, variable in settings if resume is not None or name in OF_RUN}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PYTHON": sys.executable, "VIT_TRIAL": "1" if trial else "final"}
    environment |= {"RESUME_PATH": str(resume)} if resume is not None else {}
    child = subprocess.Popen(["bash", "train.sh", *flags], env=environment)
    stopped = []

    def stop(number, _):
        stopped.append(number)
        child.terminate()                             # train.sh stops its processes; they are waited for below

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}
    code = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if stopped:
        print("sweep: stopped; the same command resumes it", file=sys.stderr)
        sys.exit(128 + stopped[0])
    return code


def begun_with(final: Path, tried: str, rows: list[dict]) -> dict | None:
    """Return the row whose value the final run has, which an earlier version may have chosen; None if it has not begun."""
    from utils.run import checkpoint

    try:
        value = checkpoint.open_newest(final, verify=False).header.config.get(tried) if final.is_dir() else None
    except checkpoint.CheckpointError:
        return None
    return next((row for row in rows if row[tried] == value and row["status"] == "done"), None)


def write(folder: Path, rows: list[dict], tried: str) -> None:
    columns = ("run", tried, *RESULTS, "status")
    table = csv_table([columns, *([row.get(column, "") for column in columns] for row in rows)])
    atomic_write(folder / "sweep.csv", lambda unfinished: unfinished.write_bytes(table.encode()))


def summarize(folder: Path, rows: list[dict], tried: str) -> None:
    """Print the table, then write it and the picture. Raises StorageError."""
    from utils.report import plots

    print("\n" + "\n".join(sweeps.table(rows, tried)))
    print(f"model    {folder / sweeps.FINAL}", flush=True)
    write(folder, rows, tried)
    print(f"table    {folder / 'sweep.csv'}")
    plots.save(plots.sweep(rows, f"{sweeps.spoken(tried)}s: {folder.name}", tried), folder / "sweep.png")
    print(f"picture  {folder / 'sweep.png'}")


if __name__ == "__main__":
    process.run(main)
