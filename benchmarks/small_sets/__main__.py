"""How accurate is a fine-tuning run on a small set of photographs, here and with other programs?

.venv-reference/bin/python -m benchmarks.small_sets --data DIR --start FILE --timm_train timm/train.py --page docs/small_sets.md

Draws new splits of every set, runs all contenders on the same splits, and compares them in pairs. Each run is its own process and
a line of the results file. What is in that file is not run again.
"""

import argparse
import functools
import json
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from .. import machine
from . import figures, start
from .comparison import Comparison, Results
from .contenders import CONTENDERS, Contender, Job, candidate
from .measured import ROOT
from .splits import class_names

SETS = "flowers8,hymenoptera,tiny_imagenet10"
# The ViT from which the runs of docs/measured.md on small real images start
MODEL = "--model_type ViT-Ti_16 --img_size 32 --patch_size 4 --hidden_size 128 --num_layers 6 --num_heads 4 --mlp_dim 256"
RESULTS = ROOT / "benchmarks" / "results" / "small_sets.jsonl"
PACKAGES = ("scikit-learn", "accelerate")


def numbers(text: str) -> list[int]:
    """Parse "1-3,7" to [1, 2, 3, 7]."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def sizes(text: str) -> list[str]:
    """Parse "5,20,all". Raises ValueError for fewer than two images, which cross-validation needs."""
    for part in text.split(","):
        if part != figures.ALL and int(part) < 2:
            raise ValueError(text)
    return text.split(",")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.small_sets", description=__doc__.partition("\n")[0])
    made.add_argument("--data", type=Path, required=True, help="folder with the sets: SET/train/CLASS, SET/val/CLASS")
    made.add_argument("--sets", default=SETS, help="default %(default)s")
    made.add_argument("--start", type=Path, required=True, help="start weights, a file that train.py reads")
    made.add_argument("--model", default=MODEL, help="flags of train.py that describe their model; default %(default)s")
    made.add_argument("--timm_train", type=Path, help="timm's train.py (it is not in its package); without it timm is left out")
    made.add_argument("--draws", type=numbers, default="1-5", help="seeds of splits and runs, such as 1-5; default %(default)s")
    made.add_argument("--per_class", type=sizes, default="5,20,all", help="training images per class; default %(default)s")
    made.add_argument("--contenders", default="", help="names, separated by commas; default: all of "
                      + ", ".join(one.name for one in CONTENDERS))
    made.add_argument("--candidates", type=Path, help="JSON file: name -> flags of train.py, or -> {images per class: flags}; "
                      "run instead of the contenders (--contenders chooses from both)")
    made.add_argument("--base", default="auto", help="the contender that is compared with all others; default %(default)s")
    made.add_argument("--jobs", type=int, default=2, help="runs at the same time, which share the cores; default %(default)s")
    made.add_argument("--json", type=Path, default=RESULTS, help="results file; default benchmarks/results/small_sets.jsonl")
    made.add_argument("--page", type=Path, help="Markdown file to write the page to; it is printed too")
    return made


def choose_contenders(options: argparse.Namespace) -> list[Contender]:
    """Return the contenders that take part, the base first. Raises ValueError for an unknown name."""
    known = {one.name: one for one in CONTENDERS}
    wanted = [one.name for one in CONTENDERS if options.timm_train or not one.needs_timm_train]
    if options.candidates:
        entries = json.loads(options.candidates.read_text(encoding="utf-8"))
        known |= {name: candidate(name, flags, options.per_class) for name, flags in entries.items()}
        wanted = list(entries)
    if options.contenders:
        wanted = options.contenders.split(",")
    for name in (options.base, *wanted):
        if name not in known:
            raise ValueError(f"--contenders: unknown name {name}. Choose from {', '.join(known)}")
        if known[name].needs_timm_train and not options.timm_train:
            raise ValueError(f"--contenders: {name} needs --timm_train. Add it or leave {name} out")
    return [known[name] for name in dict.fromkeys([options.base, *wanted])]


def check(options: argparse.Namespace, contenders: list[Contender], results: Results) -> None:
    """Raise ValueError for data, a model, files or results that do not fit."""
    for name in options.sets.split(","):
        class_names(options.data / name)
    start.row_of(options.model)
    for file in filter(None, (options.start, options.timm_train)):
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
    flags = {one.name: one.flags for one in contenders}
    for run in results.runs:
        if flags.get(run["contender"], run["flags"]) != run["flags"]:
            raise ValueError(f"--json: {options.json} has runs of {run['contender']} with other flags ({run['flags']}). Choose "
                             "another name or another file")


def page(results: Results, contenders: list[Contender], pairs: list, gains: bool, name: str = "") -> str:
    """Return the page of these contenders and pairs; the results may contain others. name: of the page's file."""
    names, asked = {one.name for one in contenders}, set(pairs)
    runs = [run for run in results.runs if run["contender"] in names and figures.pair_of(run) in asked]
    return figures.page(runs, results.sessions, [(one.name, one.what) for one in contenders], contenders[0].name, gains=gains,
                        purpose=figures.PURPOSES.get(name, ""))


def main(argv: list[str] | None = None) -> int:
    options = (parsed := parser()).parse_args(argv)
    try:
        contenders, results = choose_contenders(options), Results(options.json)
        check(options, contenders, results)
    except (ValueError, OSError) as error:
        parsed.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    pairs = [(name, draw, size) for draw in options.draws for name in options.sets.split(",") for size in options.per_class]
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run([sys.executable, "-m", "benchmarks.small_sets.start", "--start", str(options.start.resolve()),
                               "--model", options.model, "--out", folder], cwd=ROOT)
        if made.returncode:
            return 2
        facts, asked = machine.facts(), [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
        threads = max(1, facts["cores"] // options.jobs)
        results.begin({"machine": facts, "versions": machine.versions(PACKAGES), "threads": threads,
                       "model": options.model, "start": options.start.name,
                       "command": f"python -m benchmarks.small_sets {shlex.join(asked)}"})
        comparison = Comparison(contenders, results, options.data.resolve(), Path(folder), functools.partial(
            Job, start=options.start.resolve(), model=options.model, row=start.row_of(options.model),
            timm_start=Path(folder, start.TIMM_FILE), timm_train=options.timm_train and options.timm_train.resolve()), threads)
        comparison.run(pairs, options.jobs)
    text = page(results, contenders, pairs, bool(options.candidates), options.page.stem if options.page else "")
    print(f"\n{text}")
    if options.page:
        options.page.write_text(text, encoding="utf-8")
    for line in comparison.failed:
        print(f"failed: {line.splitlines()[0]}", file=sys.stderr)
    return int(bool(comparison.failed))


if __name__ == "__main__":
    sys.exit(main())
