"""The goals, and which of them are met.

A goal belongs to the records whose titles begin and end as it says. Its figure is computed from the raw costs, paired by round.
"""

import dataclasses
import statistics
from collections.abc import Callable

from . import harness
from .harness import OURS

LATER_FAMILIES = ("DINOv2", "DINOv3", "EVA02", "SigLIP")
DEFAULT, FLAG = f"{OURS} (default)", f"{OURS} (bf16 in matmuls)"


@dataclasses.dataclass(frozen=True)
class Goal:
    """`figure`(record) returns what is compared with `bound`, or None if a contender that it needs was absent."""

    what: str
    titles: tuple[str, ...]
    ends: str
    figure: Callable[[dict], float | None]
    bound: float
    below: bool = False             # the figure has to be at most `bound`; else at least
    unit: str = ""                  # "s", "%"; "" for a ratio
    gpu: bool = False


def against(peer: str | None, own: str = OURS) -> Callable[[dict], float | None]:
    """Return a function of a record: the paired ratio of ours to a peer (None: to the fastest of them)."""
    def figure(record: dict) -> float | None:
        name, costs = peer or harness.best_peer(record), record["costs"]
        return harness.paired(costs[name], costs[own])[0] if name in costs and own in costs else None
    return figure


def of_limit(record: dict) -> float | None:
    """Return the fraction of the machine's limit that ours reaches."""
    return harness.fraction_of_limit(record, OURS) if OURS in record["costs"] else None


def cost(name: str) -> Callable[[dict], float | None]:
    """Return a function of a record: the median cost of a contender."""
    return lambda record: statistics.median(record["costs"][name]) if name in record["costs"] else None


def beyond(base: str, own: str) -> Callable[[dict], float | None]:
    """Return a function of a record: the median paired difference of two costs."""
    def figure(record: dict) -> float | None:
        costs = record["costs"]
        if base not in costs or own not in costs:
            return None
        return statistics.median(after - before for before, after in zip(costs[base], costs[own], strict=True))
    return figure


def waiting(own: str = OURS) -> Callable[[dict], float | None]:
    """Return a function of a record: the fraction of a step that waits for data."""
    def figure(record: dict) -> float | None:
        waits, steps = (record["costs"].get(f"{own}, {what}") for what in ("data wait", "step"))
        return statistics.median(wait / step for wait, step in zip(waits, steps, strict=True)) if steps else None
    return figure


STEP_TITLES = tuple(f"step ViT-{size}_16 224 " for size in ("Ti", "S", "B", "L"))
EVALUATION_TITLES = ("evaluation ViT", "evaluation DeiT")
LATER_TITLES = tuple(f"{question} {name}" for question in ("step", "evaluation") for name in LATER_FAMILIES)
LARGER_TITLES = ("step ViT-L_16 224 bf16 ", "step ViT-B_16 384 bf16 ", "step ViT-L_16 384 bf16 ")
PREPARED, INFERENCE = f"{OURS} (prepared)", "timm's inference.py"
GOALS = (
    Goal("training step in bf16, compared with timm", STEP_TITLES, "bf16 cpu", against("timm"), 1.45),
    Goal("training step in bf16, compared with the fastest peer", STEP_TITLES, "bf16 cpu", against(None), 1.15),
    Goal("training step in fp32, compared with the fastest peer", STEP_TITLES, "fp32 cpu", against(None), 1.03),
    Goal("training step in fp32, fraction of the limit", STEP_TITLES, "fp32 cpu", of_limit, 0.88, unit="%"),
    Goal("training step with bf16 in matmuls, compared with the fastest peer in fp32", STEP_TITLES, "fp32 cpu",
         against(None, FLAG), 1.65),
    Goal("training step by default, compared with the fastest peer's default (fp32)", STEP_TITLES, "fp32 cpu",
         against(None, DEFAULT), 3.0),
    Goal("training step of ViT-B/16 in bf16, fraction of the limit", ("step ViT-B_16 224 ",), "bf16 cpu", of_limit, 0.5,
         unit="%"),
    Goal("evaluation in bf16, compared with the fastest peer", EVALUATION_TITLES, "bf16 cpu", against(None), 1.25),
    Goal("evaluation in fp32, compared with the fastest peer", EVALUATION_TITLES, "fp32 cpu", against(None), 1.05),
    Goal("DINOv2, DINOv3, EVA-02 and SigLIP, step and evaluation, compared with timm", LATER_TITLES, " cpu", against("timm"),
         1.0),
    Goal("reading JPEGs of 500 x 375 px, compared with torchvision", ("input JPEG 500x375",), "", against("torchvision"), 1.7),
    Goal("reading JPEGs of 2000 x 1500 px, compared with torchvision", ("input JPEG 2000x1500",), "", against("torchvision"),
         3.0),
    Goal("reading prepared JPEGs, compared with torchvision", ("input JPEG ",), "", against("torchvision", PREPARED), 8.0),
    Goal("reading small arrays at 224 px, compared with torchvision", ("input arrays ",), "", against("torchvision"), 10.0),
    Goal("peak memory of a step, compared with the leanest peer", ("memory ",), "", against(None), 1.0),
    Goal("from npz to a model, compared with timm", ("load ViT-B_16",), "", against("timm"), 5.0),
    Goal("train.py to its first step, beyond importing torch", ("startup",), "",
         beyond("import torch", f"{OURS} (train.py)"), 1.5, below=True, unit="s"),
    Goal("labels for 2,000 photographs, compared with timm's inference.py",
         ("predict DeiT-Ti_16 2000 ", "predict small 2000 "), "", against(INFERENCE), 1.5),
    Goal("labels for 20 photographs, compared with timm's inference.py", ("predict DeiT-Ti_16 20 ", "predict small 20 "), "",
         against(INFERENCE), 1.5),
    Goal("checkpoint: training waits", ("checkpoint ViT-B_16",), "", cost(f"{OURS}, stall"), 0.2, below=True, unit="s"),
    Goal("checkpoint: total, compared with torch.save", ("checkpoint ViT-B_16",), "", against("torch.save", f"{OURS}, total"),
         3.0),
    Goal("2 processes of 1 thread, compared with 1 of 2", ("ddp ",), "cpu",
         against("1 process x 2 threads, step", "2 processes x 1 thread, step"), 0.95),
    Goal("training step of ViT-B/16 in bf16, fraction of the limit", ("step ViT-B_16 224 bf16 ",), "", of_limit, 0.55, unit="%",
         gpu=True),
    Goal("training step of ViT-B/16 in bf16, compared with timm", ("step ViT-B_16 224 bf16 ",), "", against("timm"), 1.15,
         gpu=True),
    Goal("training step of larger models in bf16, fraction of the limit", LARGER_TITLES, "", of_limit, 0.6, unit="%", gpu=True),
    Goal("images cached on the device: waiting for data", ("end to end ",), "", waiting(), 0.01, below=True, unit="%", gpu=True),
    Goal("JPEG files: waiting for data", ("end to end ",), "", waiting(f"{OURS} (files)"), 0.02, below=True, unit="%", gpu=True),
    Goal("prepared files: waiting for data", ("end to end ",), "", waiting(PREPARED), 0.02, below=True, unit="%", gpu=True),
)


def evaluate_goals(records: dict[str, dict], on_gpu: bool) -> list[tuple[Goal, str, float, bool]]:
    """Return (goal, title of the record, figure, whether the goal is met) for each goal and each of its records."""
    found = []
    for goal in GOALS:
        if goal.gpu != on_gpu and (goal.gpu or (on_gpu and goal.ends.endswith("cpu"))):
            continue
        for title, record in records.items():
            if title.startswith(goal.titles) and title.endswith(goal.ends) and (figure := goal.figure(record)) is not None:
                found.append((goal, title, figure, figure <= goal.bound if goal.below else figure >= goal.bound))
    return found


def summary(records: dict[str, dict], on_gpu: bool) -> list[str]:
    """Return a table with one row for each goal: the range of its figures, and in how many tables it is met."""
    rows: dict[Goal, list[tuple[float, bool]]] = {}
    for goal, _, figure, met in evaluate_goals(records, on_gpu):
        rows.setdefault(goal, []).append((figure, met))
    lines = []
    for goal, found in rows.items():
        figures, met = [figure for figure, _ in found], sum(met for _, met in found)
        reached = " to ".join(dict.fromkeys(_reached(goal, figure) for figure in (min(figures), max(figures))))
        verdict = "met" if met == len(found) else "missed" if not met else f"met in {met} of {len(found)}"
        lines.append(f"| {goal.what} | {_wanted(goal)} | {reached} | {verdict} |")
    lines.sort(key=lambda line: ("| missed" in line, "| met in" in line))
    return ["| goal | wanted | measured | |", "|---|---:|---:|---|", *lines]


def table(records: dict[str, dict], on_gpu: bool) -> list[str]:
    """Return a table with one row for each goal and each of its records."""
    lines = ["| goal | measured in | wanted | figure | met |", "|---|---|---:|---:|---|"]
    return lines + [f"| {goal.what} | {title} | {_wanted(goal)} | {_reached(goal, figure)} | {'yes' if met else 'no'} |"
                    for goal, title, figure, met in evaluate_goals(records, on_gpu)]


def _wanted(goal: Goal) -> str:
    return f"{'<=' if goal.below else '>='} {_shown(goal.bound, goal.unit)}"


def _reached(goal: Goal, figure: float) -> str:
    """Return the figure with two decimals, or with three if it would look like the bound although it is not."""
    text = _shown(figure, goal.unit)
    return text if text != _shown(goal.bound, goal.unit) or figure == goal.bound else f"{figure:.3f} {goal.unit}".strip()


def _shown(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "%" else f"{value:.2f} {unit}".strip()
