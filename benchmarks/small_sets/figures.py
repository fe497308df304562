"""From the results of the runs to the page: means, paired differences, and what the runs took."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

ALL = "all"           # images a class
COSTS = (("wall", "wall (s)", ".1f"), ("cpu", "CPU (s)", ".1f"), ("memory", "memory (MiB)", ".0f"), ("steps", "steps", ".0f"),
         ("passes", "passes", ".0f"), ("moments", "evaluations", ".0f"))
READING = """A pair is the same set, draw and size. After ± stands the standard error of the mean; the sizes of one draw, which
share their held-out images, count as one for it. What is further from zero than twice that is bold. All draws are of the same
images: the errors are those of other splits of them, not of other photographs. "Above": by more than twice the error over all
pairs, and on no set below minus one point. The best evaluation is the best of at most 8, at the same moments of every run, chosen
on the images that it is measured on: it flatters whoever is evaluated more than once."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean over pairs (the same set, draw and size), in points of accuracy.

    error: its standard error, of the means over the sizes of each set and draw; None for a single such mean.
    """

    mean: float
    error: float | None
    pairs: int

    @property
    def is_clear(self) -> bool:
        """Above twice its standard error"""
        return self.error is not None and self.mean > 2 * self.error

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.mean:+.1f}"
        text = f"{self.mean:+.1f} ± {self.error:.1f}"
        return f"**{text}**" if abs(self.mean) > 2 * self.error else text


def pair_of(run: dict) -> tuple[str, int, str]:
    return run["set"], run["draw"], run["per_class"]


def difference(first: Sequence[dict], second: Sequence[dict], key: str,
               where: Callable[[dict], bool] = lambda run: True) -> Difference | None:
    """first minus second over the pairs that both have; None where there is none"""
    theirs = {pair_of(run): run[key] for run in second if where(run)}
    by_draw: dict[tuple[str, int], list[float]] = {}
    for run in first:
        if where(run) and pair_of(run) in theirs:
            by_draw.setdefault((run["set"], run["draw"]), []).append(run[key] - theirs[pair_of(run)])
    values = [value for own in by_draw.values() for value in own]
    if not values:
        return None
    means = [statistics.mean(own) for own in by_draw.values()]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return Difference(statistics.mean(values), error, len(values))


def is_above(overall: Difference | None, by_set: Sequence[Difference | None]) -> bool:
    """The rule: above twice the standard error in the mean, and on no set below minus one point"""
    return bool(overall and overall.is_clear and all(one is None or one.mean >= -1 for one in by_set))


def page(runs: Sequence[dict], sessions: Sequence[dict], contenders: Sequence[tuple[str, str]], base: str, *,
         gains: bool = False) -> str:
    """Markdown of all tables. contenders: (name, what it is); gains: show each minus the base, not the base minus each."""
    sizes = sorted({run["per_class"] for run in runs}, key=lambda size: math.inf if size == ALL else int(size))
    sets = list(dict.fromkeys(run["set"] for run in runs))
    runs_of = {name: [run for run in runs if run["contender"] == name] for name, _ in contenders}
    runs_of = {name: found for name, found in runs_of.items() if found}
    if not runs_of:
        return "No run has ended yet.\n"
    columns = [ALL + " images" if size == ALL else f"{size} a class" for size in sizes]
    lines = _head(runs, [sessions[number - 1] for number in sorted({run["session"] for run in runs})], sets, sizes)
    for key, title in (("last", "last step"), ("best", "best evaluation")):
        lines += ["", f"## Accuracy, {title} (%)", "", "Means over sets and draws.", "",
                  *_table(["contender", *columns, "all runs", "runs"],
                          [[name, *(_mean(found, key, size) for size in sizes), _mean(found, key), str(len(found))]
                           for name, found in runs_of.items()])]
        others = [name for name in runs_of if name != base]
        if base in runs_of and others:
            lines += ["", f"## {f'Each minus {base}' if gains else f'{base} minus each'}, {title} (points)", "",
                      *_table(["contender", "all pairs", *columns, *sets, "pairs", "above"],
                              [[name, *_differences(runs_of[name], runs_of[base], key, sizes, sets, gains)] for name in others])]
    lines += ["", "## Accuracy by set, last step (%)", "",
              *_table(["contender", *(f"{name}, {size}" for name in sets for size in sizes)],
                      [[name, *(_mean([run for run in found if run["set"] == each], "last", size) for each in sets
                                for size in sizes)] for name, found in runs_of.items()]),
              "", "## What a run takes", "", "Medians over all runs.", "",
              *_table(["contender", *(title for _, title, _ in COSTS)],
                      [[name, *(f"{statistics.median(run[key] for run in found):{form}}" for key, _, form in COSTS)]
                       for name, found in runs_of.items()]),
              "", "## Who took part", "",
              f"`MODEL` stands for `{sessions[-1]['model']}`, `START` for {sessions[-1]['start']}.", ""]
    for name, what in contenders:
        if name in runs_of:
            lines += [f"- **{name}**: {what}. Its last command:", "", f"  `{runs_of[name][-1]['command']}`"]
    return "\n".join(lines) + "\n"


def _head(runs: Sequence[dict], sessions: Sequence[dict], sets: Sequence[str], sizes: Sequence[str]) -> list[str]:
    described = []
    for name in sets:
        one = {run["per_class"]: run for run in runs if run["set"] == name}
        some = next(iter(one.values()))
        trained = " / ".join(str(one[size]["train"]) for size in sizes if size in one)
        described.append(f"{name} ({some['classes']} classes, {trained} to train on, {some['held_out']} held out)")
    dates = sorted({run["date"] for run in runs})
    machines = dict.fromkeys(f"{each['machine']['cpu']}, {each['machine']['cores']} cores, {each['threads']} of them a run"
                             for each in sessions)
    versions = [f"{name} " + " and ".join(dict.fromkeys(each["versions"].get(name, "absent") for each in sessions))
                for name in dict.fromkeys(name for each in sessions for name in each["versions"])]
    return ["# Fine-tuning on small sets of photographs, beside other programs", "",
            *(f"`{command}`  " for command in dict.fromkeys(each["command"] for each in sessions)),
            f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {'; '.join(machines)}; {', '.join(versions)}", "",
            f"Draws {', '.join(map(str, sorted({run['draw'] for run in runs})))} of these sets, train and val drawn from all "
            f"their images: {'; '.join(described)}. benchmarks/README.md says how it is measured.", "", READING]


def _differences(theirs: Sequence[dict], of_base: Sequence[dict], key: str, sizes: Sequence[str], sets: Sequence[str],
                 gains: bool) -> list[str]:
    pair = (theirs, of_base) if gains else (of_base, theirs)
    overall = difference(*pair, key)
    by_size = [difference(*pair, key, lambda run, size=size: run["per_class"] == size) for size in sizes]
    by_set = [difference(*pair, key, lambda run, each=each: run["set"] == each) for each in sets]
    return [*("" if one is None else str(one) for one in (overall, *by_size, *by_set)), str(overall.pairs if overall else 0),
            "yes" if is_above(overall, by_set) else "no"]


def _mean(runs: Sequence[dict], key: str, size: str | None = None) -> str:
    values = [run[key] for run in runs if size in (None, run["per_class"])]
    return f"{statistics.mean(values):.1f}" if values else ""


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in [head, ["---"] + ["---:"] * (len(head) - 1), *rows]]
