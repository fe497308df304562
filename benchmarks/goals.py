"""What was to be reached, and whether it was: a row for each goal and each record that it speaks of.

A goal finds its records by how their titles begin. What it compares is worked out from the raw costs, pairwise.
"""

import dataclasses
import statistics
from collections.abc import Callable

from . import harness
from .harness import OURS

LATER = ("DINOv2", "DINOv3", "EVA02", "SigLIP")
DEFAULT, FLAG = f"{OURS} (default)", f"{OURS} (bf16 in matmuls)"


@dataclasses.dataclass(frozen=True)
class Goal:
    """`figure`(record) -> what is compared with `bound`, or None where a contender that it needs was absent."""

    what: str
    titles: tuple[str, ...]
    ends: str
    figure: Callable[[dict], float | None]
    bound: float
    below: bool = False             # the figure has to be at most `bound`; else at least
    unit: str = ""                  # "s", "%"; "" for a ratio
    gpu: bool = False


def against(peer: str | None, own: str = OURS) -> Callable[[dict], float | None]:
    """Paired ratio of ours to a peer; None: to the fastest of them."""
    def figure(record: dict) -> float | None:
        name, costs = peer or harness.best_peer(record), record["costs"]
        return harness.paired(costs[name], costs[own])[0] if name in costs and own in costs else None
    return figure


def of_limit(record: dict) -> float | None:
    return harness.share(record, OURS) if OURS in record["costs"] else None


def cost(name: str) -> Callable[[dict], float | None]:
    return lambda record: statistics.median(record["costs"][name]) if name in record["costs"] else None


def beyond(base: str, own: str) -> Callable[[dict], float | None]:
    """Paired difference of costs"""
    def figure(record: dict) -> float | None:
        costs = record["costs"]
        if base not in costs or own not in costs:
            return None
        return statistics.median(after - before for before, after in zip(costs[base], costs[own], strict=True))
    return figure


def waiting(own: str = OURS) -> Callable[[dict], float | None]:
    """Share of a step"""
    def figure(record: dict) -> float | None:
        waits, steps = (record["costs"].get(f"{own}, {what}") for what in ("data wait", "step"))
        return statistics.median(wait / step for wait, step in zip(waits, steps, strict=True)) if steps else None
    return figure


VITS = tuple(f"step ViT-{size}_16 224 " for size in ("Ti", "S", "B", "L"))
GOALS = (
    Goal("training step, bf16, against timm", VITS, "bf16 cpu", against("timm"), 1.45),
    Goal("training step, bf16, against the fastest peer", VITS, "bf16 cpu", against(None), 1.15),
    Goal("training step, fp32, against the fastest peer", VITS, "fp32 cpu", against(None), 1.03),
    Goal("training step, fp32, share of the matmul limit", VITS, "fp32 cpu", of_limit, 0.88, unit="%"),
    Goal("training step, bf16 in matmuls, against the fastest peer in fp32", VITS, "fp32 cpu", against(None, FLAG), 1.65),
    Goal("training step, default against the fastest peer's default (fp32)", VITS, "fp32 cpu", against(None, DEFAULT), 3.0),
    Goal("training step, ViT-B/16, share of the bf16 matmul limit", ("step ViT-B_16 224 ",), "bf16 cpu", of_limit, 0.5, unit="%"),
    Goal("evaluation, bf16, against the fastest peer", ("evaluation ViT", "evaluation DeiT"), "bf16 cpu", against(None), 1.25),
    Goal("evaluation, fp32, against the fastest peer", ("evaluation ViT", "evaluation DeiT"), "fp32 cpu", against(None), 1.05),
    Goal("rotary positions, SwiGLU, factors, pooling, against timm",
         tuple(f"{question} {name}" for question in ("step", "evaluation") for name in LATER), " cpu", against("timm"), 1.0),
    Goal("JPEG input, no preparation", ("input JPEG 500x375",), "", against("torchvision"), 1.7),
    Goal("JPEG input, no preparation", ("input JPEG 2000x1500",), "", against("torchvision"), 3.0),
    Goal("JPEG input, prepared", ("input JPEG ",), "", against("torchvision", f"{OURS} (prepared)"), 8.0),
    Goal("input of small arrays at 224 px", ("input arrays ",), "", against("torchvision"), 10.0),
    Goal("peak memory of a step, against the leanest peer", ("memory ",), "", against(None), 1.0),
    Goal("from npz to a model, against timm", ("load ViT-B_16",), "", against("timm"), 5.0),
    Goal("train.py to its first step, beyond importing torch", ("startup",), "",
         beyond("import torch", f"{OURS} (train.py)"), 1.5, below=True, unit="s"),
    Goal("2,000 photographs labelled, against timm's inference.py", ("predict DeiT-Ti_16 2000 ", "predict small 2000 "), "",
         against("timm's inference.py"), 1.5),
    Goal("20 photographs labelled, against timm's inference.py", ("predict DeiT-Ti_16 20 ", "predict small 20 "), "",
         against("timm's inference.py"), 1.0),
    Goal("checkpoint: training stands still", ("checkpoint ViT-B_16",), "", cost(f"{OURS}, stall"), 0.2, below=True, unit="s"),
    Goal("checkpoint: total, against torch.save", ("checkpoint ViT-B_16",), "", against("torch.save", f"{OURS}, total"), 3.0),
    Goal("2 processes of 1 thread, against 1 of 2", ("ddp ",), "cpu",
         against("1 process x 2 threads, step", "2 processes x 1 thread, step"), 0.95),
    Goal("training step, ViT-B/16, bf16, share of the matmul rate", ("step ViT-B_16 224 bf16 ",), "", of_limit, 0.55, unit="%",
         gpu=True),
    Goal("training step, ViT-B/16, bf16, against timm", ("step ViT-B_16 224 bf16 ",), "", against("timm"), 1.15, gpu=True),
    Goal("training step, larger, bf16, share of the matmul rate",
         ("step ViT-L_16 224 bf16 ", "step ViT-B_16 384 bf16 ", "step ViT-L_16 384 bf16 "), "", of_limit, 0.6, unit="%",
         gpu=True),
    Goal("a set cached on the device: waiting for data", ("end to end ",), "", waiting(), 0.01, below=True, unit="%", gpu=True),
    Goal("JPEG files: waiting for data", ("end to end ",), "", waiting(f"{OURS} (files)"), 0.02, below=True, unit="%", gpu=True),
    Goal("prepared files: waiting for data", ("end to end ",), "", waiting(f"{OURS} (prepared)"), 0.02, below=True, unit="%",
         gpu=True),
)


def table(records: dict[str, dict], on_gpu: bool) -> list[str]:
    lines = ["| goal | measured in | wanted | figure | met |", "|---|---|---:|---:|---|"]
    for goal in GOALS:
        if goal.gpu != on_gpu and (goal.gpu or (on_gpu and goal.ends.endswith("cpu"))):
            continue
        for title, record in records.items():
            if not title.startswith(goal.titles) or not title.endswith(goal.ends):
                continue
            figure = goal.figure(record)
            if figure is None:
                continue
            met = figure <= goal.bound if goal.below else figure >= goal.bound
            lines.append(f"| {goal.what} | {title} | {'<=' if goal.below else '>='} {_shown(goal.bound, goal.unit)} | "
                         f"{_shown(figure, goal.unit)} | {'yes' if met else '**no**'} |")
    return lines


def _shown(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "%" else f"{value:.2f} {unit}".strip()
