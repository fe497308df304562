"""Run all pairs (a set, a draw, a number of images per class), and keep their results in a file."""

import dataclasses
import datetime
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import measured
from .contenders import Contender, Job, displayed
from .figures import ALL, pair_of
from .measured import Outcome, RunFailed
from .splits import Split, draw_split

Pair = tuple[str, int, str]


class Results:
    """The results file: one JSON object per line, appended when a run ends.

    A line with "machine" is a session: it describes the command that wrote the runs after it. The "session" of a run is its
    number, counted from 1.
    """

    def __init__(self, path: Path):
        """Read the file if it exists, and remove a last line that was cut off. Raises ValueError for a file of another kind."""
        self.path, self.sessions, self.runs, self._lock = path, [], [], threading.Lock()
        if not path.exists():
            return
        *lines, last = path.read_text(encoding="utf-8").split("\n")
        if last:
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        for line in lines:
            try:
                entry = json.loads(line)
                (self.sessions if "machine" in entry else self.runs).append(entry)
            except (ValueError, TypeError) as error:
                raise ValueError(f"--json: {path} is not a results file of this command ({error})") from error

    def find(self, pair: Pair, contender: str) -> dict | None:
        """Return the run of a contender on a pair, if there is one."""
        return next((run for run in self.runs if pair_of(run) == pair and run["contender"] == contender), None)

    def begin(self, session: dict) -> None:
        """Append a session, to which the following runs belong."""
        self._append(session)
        self.sessions.append(session)

    def add(self, run: dict) -> None:
        """Append a run."""
        with self._lock:
            run["session"] = len(self.sessions)
            self._append(run)
            self.runs.append(run)

    def _append(self, entry: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


@dataclasses.dataclass
class Comparison:
    """The runs of all contenders on all pairs.

    contenders: the base first; the others run as long as it did. job: makes a Job of a split, a draw and a folder.
    """

    contenders: Sequence[Contender]
    results: Results
    data: Path
    work: Path
    job: Callable[..., Job]
    threads: int
    failed: list[str] = dataclasses.field(default_factory=list)
    _stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    _begun: float = dataclasses.field(default_factory=time.monotonic)

    def run(self, pairs: Sequence[Pair], jobs: int) -> None:
        """Run what is not in the results yet. An exception in this thread (Ctrl-C, a signal) ends the runs too."""
        before = len(self.results.runs)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for _ in pool.map(lambda pair: self._run_pair(pair, before), pairs):
                    pass
            except BaseException:
                self._stop.set()
                measured.terminate_all()
                raise

    def _run_pair(self, pair: Pair, before: int) -> None:
        missing = [one for one in self.contenders if not self.results.find(pair, one.name)]
        if not missing or self._stop.is_set():
            return
        name, draw, size = pair
        base = self.results.find(pair, self.contenders[0].name)
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            split = draw_split(self.data / name, Path(folder, "split"), draw, None if size == ALL else int(size))
            for contender in missing:
                if self._stop.is_set():
                    return
                job = self.job(split=split, draw=draw, size=size, out=Path(folder, contender.name),
                               images_seen=base["images_seen"] if base else 0)
                try:
                    run = {"set": name, "draw": draw, "per_class": size} | record(contender, job, self.threads)
                except RunFailed as error:
                    if not self._stop.is_set():
                        self.failed.append(f"{name}, draw {draw}, {size}: {contender.name} {error}")
                        print(f"failed: {self.failed[-1]}", file=sys.stderr, flush=True)
                    if base is None:
                        return                             # the length of the others is not known
                    continue
                self.results.add(run)
                base = base or run
                print(f"{name}, draw {draw}, {size}: {contender.name} {run['last']:.1f} %, best {run['best']:.1f}; "
                      f"{run['wall']:.0f} s ({len(self.results.runs) - before} runs in "
                      f"{(time.monotonic() - self._begun) / 60:.0f} minutes)", flush=True)


def record(contender: Contender, job: Job, threads: int) -> dict:
    """Run one contender and return its results. Raises RunFailed."""
    command = contender.command(job)
    usage = measured.run(command, job.out, threads)
    outcome = contender.read(job)
    check_held_out(outcome, job.split)
    return {
        "contender": contender.name, "flags": contender.flags, "last": round(outcome.last, 3), "best": round(outcome.best, 3),
        "evaluations": [(round(position, 4), round(accuracy, 3)) for position, accuracy in outcome.evaluations],
        "moments": len(measured.at_moments(outcome.evaluations)), "held_out": job.split.held_out, "train": job.split.train,
        "classes": job.split.classes, "steps": outcome.steps, "images_seen": outcome.images_seen,
        "passes": round(outcome.images_seen / job.split.train, 2), "wall": round(usage.wall, 1), "cpu": round(usage.cpu, 1),
        "memory": round(usage.memory), "command": displayed(command, job), "date": datetime.date.today().isoformat(),
        **({"more": outcome.more} if outcome.more else {})}


def check_held_out(outcome: Outcome, split: Split) -> None:
    """Raise RunFailed for an accuracy that is no whole number of the held-out images: it was measured on other images."""
    for _, accuracy in outcome.evaluations:
        right = accuracy * split.held_out / 100
        if abs(right - round(right)) > 0.02:
            raise RunFailed(f"{accuracy} % is no whole number of {split.held_out} images")
