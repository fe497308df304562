"""Measure contenders in turns, A B C A B C ...: paired ratios, one table, one JSON record.

Each contender has its own process (worker.py), because some settings belong to the process: those of the allocator, the kernels
that matrix products may use. One works while the others sleep. What slows one round down (a neighbor, the clock) slows all
contenders of that round. So ratios are computed within a round; their median and quartiles over the rounds are reported.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import machine
from .worker import Absent, Bench

ROOT = Path(__file__).resolve().parent.parent
TURN_S = 0.3          # a turn repeats its step until it takes about so long: in shorter turns the process is still waking up
OURS = "ours"
ASIDE = ", data wait"      # end of the name of a row that is no contender, but part of the cost of one


class Failed(RuntimeError):
    """Raised when a contender cannot be built or run; the message has the last lines of its process."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One program, or one way to do something, that is measured.

    build: "module:function"; function(**given) returns step(), whose cost is its duration, or the number that it returns. A step
        that returns {"stall": seconds, "total": seconds} makes two rows of the table, "ours, stall" and "ours, total".
    kind: "peer", "ours", or "limit" (what the machine could do).
    """

    name: str
    build: str
    given: dict
    kind: str = "peer"
    environment: dict = dataclasses.field(default_factory=dict)


class Worker:
    """A contender's process. It is kept for the next question, because importing torch takes longer than most measurements."""

    def __init__(self, environment: dict, module: str = ""):
        """Start the process. module: imported at once, while other processes import theirs."""
        self._errors = tempfile.TemporaryFile("w+")
        # OpenMP's threads must not spin while the next contender works.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *filter(None, [module])], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, text=True, env=os.environ | {"GOMP_SPINCOUNT": "1000"} | environment)

    def ask(self, *message) -> object:
        """Send a message and return the reply. Raises Absent (a package is missing), Failed."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            said = self._errors.read().strip() or f"ended with code {self._process.wait()}"
            raise Failed("\n".join(said.splitlines()[-30:]))
        what, value = json.loads(line)
        if what == "absent":
            raise Absent(value)
        return value

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):          # the process has ended already, for example out of memory
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


class Inline:
    """The same in this process, for --quick; its figures mean nothing."""

    def __init__(self, environment: dict, module: str = ""):
        self._bench = Bench()

    def ask(self, *message) -> object:
        return self._bench.answer(*message)

    def close(self) -> None:
        pass


class WorkerPool:
    """The workers of one command, by contender."""

    def __init__(self, quick: bool = False):
        self._kind, self._workers = Inline if quick else Worker, {}
        self.turn_s = 0.0 if quick else TURN_S

    def worker(self, contender: Contender) -> Worker | Inline:
        """Return the worker of a contender; start it if there is none."""
        if contender.name not in self._workers:
            self._workers[contender.name] = self._kind(contender.environment, contender.build.partition(":")[0])
        return self._workers[contender.name]

    def discard(self, contender: Contender) -> None:
        """End the worker of a contender."""
        if contender.name in self._workers:
            self._workers.pop(contender.name).close()

    def close(self) -> None:
        while self._workers:
            self._workers.popitem()[1].close()


@contextlib.contextmanager
def worker_pool(quick: bool) -> Iterator[WorkerPool]:
    """Open a pool of workers, and close it at the end."""
    opened = WorkerPool(quick)
    try:
        yield opened
    finally:
        opened.close()


def measure(contenders: Sequence[Contender], pool: WorkerPool, *, rounds: int, fresh: bool = False) -> dict[str, list[float]]:
    """Return the cost of each contender in each round. Missing peers are skipped, with one line.

    Every contender is built and runs once before the first round. fresh: it is built in a new process for every turn instead.
    Raises Failed if a contender of ours cannot run.
    """
    costs, repeats, taking_part = {}, {}, list(contenders)
    if not fresh:
        for contender in contenders:
            pool.worker(contender)
    for number in range(rounds if fresh else rounds + 1):
        for contender in list(taking_part):
            try:
                cost = _turn(contender, pool, repeats, number == 0 or fresh)
            except (Absent, Failed) as error:
                if isinstance(error, Failed) and (contender.kind != "peer" or "out of memory" in str(error).lower()):
                    raise Failed(f"{contender.name}:\n{error}") from None
                print(f"{contender.name}: skipped: {str(error).splitlines()[-1]}", flush=True)
                pool.discard(contender)
                taking_part.remove(contender)
                continue
            if fresh:
                pool.discard(contender)
            rows = {f"{contender.name}, {key}": value for key, value in cost.items()} if isinstance(cost, dict) else {
                contender.name: cost}
            if fresh or number:
                for name, value in rows.items():
                    costs.setdefault(name, []).append(value)
            else:
                repeats[contender.name] = math.ceil(max(1, min(1000, pool.turn_s / max(*rows.values(), 1e-9))))
    if not costs:
        sys.exit("no contender could run")
    for contender in taking_part:
        if not fresh:
            pool.worker(contender).ask("drop")
    return costs


def _turn(contender: Contender, pool: WorkerPool, repeats: dict[str, int], build: bool) -> float | dict[str, float]:
    worker = pool.worker(contender)
    if build:
        worker.ask("build", contender.build, contender.given)
    return worker.ask("run", repeats.get(contender.name, 1))


# ------------------------------------------------------------------------------------------------------ arithmetic


def paired(baseline: Sequence[float], costs: Sequence[float]) -> tuple[float, float, float]:
    """Return baseline / cost: the median over the rounds, and the lower and upper quartile."""
    return spread([before / after for before, after in zip(baseline, costs, strict=True)])


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median, lower and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return middle, lower, upper


def best_peer(record: dict) -> str | None:
    """Return the peer with the largest median ratio to the baseline; None if there is none."""
    peers = [name for name, kind in record["kinds"].items() if kind == "peer"]
    return max(peers, key=lambda name: paired(record["costs"][record["baseline"]], record["costs"][name])[0], default=None)


# ----------------------------------------------------------------------------------------------------- tables and records


def record(title: str, contenders: Sequence[Contender], costs: dict[str, list[float]], *, baseline: str, unit: str,
           settings: dict, work: dict | None = None) -> dict:
    """Return what is kept of a question: raw costs, and everything that is needed to measure again.

    work: by contender, the floating-point operations (or whatever the limit counts) of one cost.
    """
    kinds = {name: contender.kind for contender in contenders for name in costs
             if name == contender.name or name.startswith(f"{contender.name}, ")}
    kinds |= {name: "aside" for name in costs if name.endswith(ASIDE)}
    if baseline not in costs:                            # missing, or not chosen
        baseline = next(iter(costs))
    command = [Path(sys.argv[0]).stem, *sys.argv[1:]]
    if "--json" in command:                              # the file of the record does not belong to the question
        place = command.index("--json")
        del command[place:place + 2]
    return {"title": title, "baseline": baseline, "unit": unit, "kinds": kinds, "costs": costs, "settings": settings,
            "work": work or {}, "command": f"python -m benchmarks.{shlex.join(command)}",
            "date": datetime.date.today().isoformat(), "machine": machine.facts(), "versions": machine.versions()}


def table(record: dict) -> list[str]:
    """Return a table, aligned for the terminal too: contender, median cost, ratio to the baseline, fraction of the limit."""
    costs, base, work = record["costs"], record["baseline"], record["work"]
    limits = [name for name, kind in record["kinds"].items() if kind == "limit" and name in work]
    lines = [["contender", record["unit"], f"ratio to {base}", "quartiles"] + (["fraction of the limit"] if limits else [])]
    for name, each in costs.items():
        row = [name, f"{statistics.median(each):.4g}", *_ratio(costs[base], each)]
        if record["kinds"][name] == "aside":
            row[2:] = ["", ""]
        if name in limits:
            row[2:] = ["", "", f"{work[name] / statistics.median(each) / 1e9:.0f} GFLOP/s"]
        elif limits:
            row.append(f"{fraction_of_limit(record, name):.0%}" if name in work else "")
        lines.append(row)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, [("-" * (width - 1) + ":") if column else "-" * width for column, width in enumerate(widths)])
    return ["| " + " | ".join(cell.ljust(width) if not column else cell.rjust(width)
                              for column, (cell, width) in enumerate(zip(line, widths))) + " |" for line in lines]


def _ratio(baseline: list[float], costs: list[float]) -> tuple[str, str]:
    middle, lower, upper = paired(baseline, costs)
    return f"{middle:.2f}", f"{lower:.2f} - {upper:.2f}"


def fraction_of_limit(record: dict, name: str) -> float:
    """Return the work per second of a contender, divided by that of the record's limit, paired."""
    limit = next(other for other, kind in record["kinds"].items() if kind == "limit" and other in record["work"])
    scale = record["work"][name] / record["work"][limit]
    return spread([scale * top / cost for top, cost in zip(record["costs"][limit], record["costs"][name], strict=True)])[0]


def report(record: dict, file: Path | None) -> None:
    """Print the table. With a file, write the record into it; it replaces an older one with the same title."""
    print(f"\n{record['title']}  ({', '.join(f'{key} {value}' for key, value in record['settings'].items())})")
    print("\n".join(table(record)), flush=True)
    if file is not None:
        kept = json.loads(file.read_text()) if file.exists() else {}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept | {record["title"]: record}, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------- options

OPTIONS = {
    "models": ("names of models, separated by commas", str), "batch": ("images a step; `fill`: as many as fit (GPU)", str),
    "size": ("side of the images", int), "precision": ("fp32, bf16, fp32_bf16_matmul; on a GPU also tf32, fp16", str),
    "device": ("cpu or cuda", str), "threads": ("threads of a contender; 0: one per core", int),
    "contenders": ("names, separated by commas; default all", str), "data_dir": ("real JPEGs instead of generated ones", Path),
    "counts": ("numbers of photographs, separated by commas", str),
    "timm_inference": ("timm's inference.py (it is not in its package); without it timm is left out", Path),
    "steps": ("training steps of a run", int), "files": ("also train on so many generated JPEG files", int)}


def options(description: str, argv: Sequence[str] | None, *, flags: Sequence[str] = (), **defaults) -> argparse.Namespace:
    """Parse the command line. defaults: the options of OPTIONS that the question has; all have --rounds, --json and --quick."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=defaults.pop("rounds"), help="default %(default)s")
    for name, default in defaults.items():
        text, kind = OPTIONS[name]
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text}; default {default}")
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--json", type=Path, help="file to write the record into")
    parser.add_argument("--quick", action="store_true", help="a tiny model in one process; only shows that it runs")
    given = parser.parse_args(argv)
    if given.quick:
        given.rounds = 2
    return given


def choose_contenders(contenders: Sequence[Contender], names: str) -> list[Contender]:
    """Return the contenders with these names (all of them for '') and the limits. Exits for an unknown name."""
    wanted = names.split(",") if names else [contender.name for contender in contenders]
    known = [contender.name for contender in contenders]
    # Some of ours take part only at one precision.
    if unknown := {name for name in wanted if name not in known and not name.startswith(f"{OURS} (")}:
        sys.exit(f"--contenders: unknown name {', '.join(sorted(unknown))}. Choose from {', '.join(known)}")
    return [contender for contender in contenders if contender.name in wanted or contender.kind == "limit"]
