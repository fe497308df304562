"""Make a page of the results of the runs: what was found, means, paired differences, and what the runs took."""

import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Sequence

ALL = "all"           # images per class
COSTS = (("wall", "wall (s)", ".1f"), ("cpu", "CPU (s)", ".1f"), ("memory", "memory (MiB)", ".0f"), ("steps", "steps", ".0f"),
         ("passes", "passes", ".0f"), ("moments", "evaluations", ".0f"))
READING = """- Accuracies are means over sets and draws. A pair is two runs on the same set, draw and number of images.
- ± is the standard error of the mean difference. For it the sizes of one draw count as one, since they share held-out images.
  Differences of more than twice the error are bold.
- All draws are of the same images: the errors say what other splits would give, not other photographs.
- "Above" means: by more than twice the error over all pairs, and on no set below minus one point.
- The best evaluation is the best of at most 8, at the same moments of every run, on the images that it is measured on. That
  flatters every program that is evaluated more than once."""
# What a page is for, by the name of its file.
PURPOSES = {
    "small_sets": "How accurate is a fine-tuning run on few photographs, here and with other programs?",
    "small_sets_choice": "What does each part of the default bring? Each row leaves one part of it out.",
    "small_sets_new_draw": "One more split, looked at once after all settings had been chosen on the draws of "
                           "[the main page](small_sets.md). Nine pairs decide nothing by themselves.",
    "small_sets_others": "Two sets that do not count for [the main page](small_sets.md): CIFAR-10, which the start weights were "
                         "trained on, and MNIST, whose digits the default mirrors like photographs. Four pairs decide nothing by "
                         "themselves.",
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """A mean difference over pairs (the same set, draw and size), in points of accuracy.

    error: its standard error, over the means of each set and draw; None if there is only one such mean.
    """

    mean: float
    error: float | None
    pairs: int

    @property
    def is_clear(self) -> bool:
        """Whether the mean is above twice its standard error."""
        return self.error is not None and self.mean > 2 * self.error

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.mean:+.1f}"
        text = f"{self.mean:+.1f} ± {self.error:.1f}"
        return f"**{text}**" if abs(self.mean) > 2 * self.error else text


def pair_of(run: dict) -> tuple[str, int, str]:
    """Return (set, draw, images per class) of a run."""
    return run["set"], run["draw"], run["per_class"]


def difference(first: Sequence[dict], second: Sequence[dict], key: str,
               where: Callable[[dict], bool] = lambda run: True) -> Difference | None:
    """Return first minus second over the pairs that both have; None if there are none."""
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
    """Return whether the mean is above twice its standard error, and on no set below minus one point."""
    return bool(overall and overall.is_clear and all(one is None or one.mean >= -1 for one in by_set))


def page(runs: Sequence[dict], sessions: Sequence[dict], contenders: Sequence[tuple[str, str]], base: str, *,
         gains: bool = False, purpose: str = "") -> str:
    """Return the page in Markdown.

    contenders: (name, what it is); gains: show each minus the base, not the base minus each; purpose: what the page is for.
    """
    sizes = sorted({run["per_class"] for run in runs}, key=lambda size: math.inf if size == ALL else int(size))
    sets = list(dict.fromkeys(run["set"] for run in runs))
    runs_of = {name: [run for run in runs if run["contender"] == name] for name, _ in contenders}
    runs_of = {name: found for name, found in runs_of.items() if found}
    if not runs_of:
        return "No run has ended yet.\n"
    columns = [ALL + " images" if size == ALL else f"{size} a class" for size in sizes]
    used = [sessions[number - 1] for number in sorted({run["session"] for run in runs})]
    lines = ["# Fine-tuning on few photographs", "", *([purpose, ""] if purpose else []),
             *_found(runs_of, dict(contenders), base, sets), "", "## How to read the tables", "", READING]
    for key, title in (("last", "last step"), ("best", "best evaluation")):
        lines += ["", f"## Accuracy, {title} (%)", "",
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
              "", "## What a run takes (medians)", "",
              *_table(["contender", *(title for _, title, _ in COSTS)],
                      [[name, *(f"{statistics.median(run[key] for run in found):{form}}" for key, _, form in COSTS)]
                       for name, found in runs_of.items()]),
              "", "## Who took part", "",
              f"`MODEL` stands for `{sessions[-1]['model']}`, `START` for {sessions[-1]['start']}.", ""]
    for name, what in contenders:
        if name in runs_of:
            lines += [f"- **{name}**: {what}. Last command:", "", f"  `{runs_of[name][-1]['command']}`"]
    return "\n".join([*lines, "", *_measured(runs, used, sets, sizes)]) + "\n"


def _found(runs_of: dict[str, list[dict]], what: dict[str, str], base: str, sets: Sequence[str]) -> list[str]:
    """Return the result in words: the accuracy of the base at the last step, and how far each other is from it."""
    if base not in runs_of:
        return []
    words = {name: re.split("[:;]", what[name])[0] for name in runs_of}
    lines = [f"**What was found.** `{base}` ({words[base]}) reached {_mean(runs_of[base], 'last')} % on average over "
             f"{len(runs_of[base])} runs on {', '.join(sets)}. On the same splits:", ""]
    for name in runs_of:
        if name != base and (found := difference(runs_of[name], runs_of[base], "last")):
            size = f"{abs(found.mean):.1f}" + ("" if found.error is None else f" ± {found.error:.1f}")
            clear = found.error is not None and abs(found.mean) > 2 * found.error
            lines.append(f"- `{name}` ({words[name]}): {size} points {'higher' if found.mean > 0 else 'lower'}"
                         + ("" if clear else ", which is not clear with so few pairs"))
    return lines


def _measured(runs: Sequence[dict], sessions: Sequence[dict], sets: Sequence[str], sizes: Sequence[str]) -> list[str]:
    """Return the sets, the machine, the versions and the commands."""
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
    draws = ", ".join(map(str, sorted({run["draw"] for run in runs})))
    return ["## How it was measured", "",
            f"Draws {draws} of these sets, train and val drawn from all their images "
            f"([how](../benchmarks/README.md#how-accurate-on-small-sets)): {'; '.join(described)}.", "",
            f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {'; '.join(machines)}; {', '.join(versions)}", "",
            *(f"`{command}`  " for command in dict.fromkeys(each["command"] for each in sessions))]


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
