"""Write RESULTS.md from results/*.json and results/small_sets.jsonl: python -m benchmarks.report"""

import json
import statistics
from pathlib import Path

from . import goals, harness
from .harness import OURS
from .small_sets import figures

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results", HERE / "RESULTS.md"
SMALL_SETS = RESULTS / "small_sets.jsonl"
HEAD = """# How fast is it, compared with other programs?

`python -m benchmarks.report` writes this page from results/*.json. [README.md](README.md) says how to measure, and
[TRIED.md](TRIED.md) why goals are missed.
"""
COMPARED = """
## Compared with what you may use today

How many times as fast as the other program is this one? At 2 it needs half the time; below 1 it is slower. (For memory: how many
times less it needs.) Medians of rounds in which the programs take turns; **bold** if the lower quartile is above 1 too; "-" means
not measured. The default precision is bfloat16 here, on processors that multiply it natively, and float32 in the other programs.
In equal precision no program can be much faster than another, since they spend most of the time in the same matrix products.
"""
GOALS = """
## Goals, met and missed

A goal is measured in one table or more, for example one for each model; then the smallest and the largest figure are shown.
[Why goals are missed](TRIED.md).
"""
# Columns of the overview: (heading, the contender's name in most tables).
PEERS = (("timm", "timm"), ("transformers", "transformers"), ("torchvision", "torchvision"),
         ("vit-pytorch (lucidrains)", "vit-pytorch"), ("ViT-pytorch scripts", "ViT-pytorch formulation"))
# Rows of the overview: (what is done, title of its table on a CPU, our contender, {column: the other contender}).
TASKS = (
    ("whole run, images in memory, ViT-Ti/16, batch 16, defaults of both", "end to end ViT-Ti_16 224 cpu", f"{OURS}, step",
     {"timm": "timm, tutorial loop"}),
    ("training step, ViT-B/16, each in its default precision", "step ViT-B_16 224 fp32 cpu", goals.DEFAULT, {}),
    ("training step, ViT-B/16, all in bfloat16", "step ViT-B_16 224 bf16 cpu", OURS, {}),
    ("training step, ViT-B/16, all in float32", "step ViT-B_16 224 fp32 cpu", OURS, {}),
    ("evaluation, ViT-B/16, each in its default precision", "evaluation ViT-B_16 224 fp32 cpu", goals.DEFAULT, {}),
    ("evaluation, ViT-B/16, all in bfloat16", "evaluation ViT-B_16 224 bf16 cpu", OURS, {}),
    ("evaluation, ViT-B/16, all in float32", "evaluation ViT-B_16 224 fp32 cpu", OURS, {}),
    ("memory of a training step, ViT-B/16, all in bfloat16", "memory ViT-B_16 224 bf16 cpu", OURS, {}),
    ("memory of a training step, ViT-B/16, all in float32", "memory ViT-B_16 224 fp32 cpu", OURS, {}),
    ("reading JPEG photographs of 500 x 375 px", "input JPEG 500x375", OURS, {}),
    ("reading JPEG photographs of 2000 x 1500 px", "input JPEG 2000x1500", OURS, {}),
    ("reading prepared photographs of 2000 x 1500 px", "input JPEG 2000x1500", f"{OURS} (prepared)", {}),
    ("labels for 20 photographs, DeiT-Ti/16 (timm's inference.py)", "predict DeiT-Ti_16 20 photographs", OURS,
     {"timm": "timm's inference.py"}),
    ("labels for 2,000 photographs, small model (timm's inference.py)", "predict small 2000 photographs", OURS,
     {"timm": "timm's inference.py"}),
    ("loading ViT-B/16 from Google's .npz file", "load ViT-B_16", OURS, {}),
)
# Beginning of a table's title: (heading of its group, how to read its tables).
GROUPS = {
    "step": ("Training step", "Seconds of one step: forward, backward, clipping, SGD with momentum. \"matmul\" is the limit: a "
             "bare matrix product."),
    "evaluation": ("Evaluation", "Seconds to classify one batch without gradients, on one thread; ours counts its metrics too."),
    "memory": ("Memory", "Peak memory of a training step in MiB; a ratio above 1 means less memory."),
    "end to end": ("Whole runs", "Seconds a step of whole runs. \"Data wait\" is the part of a step that waits for images."),
    "ddp": ("Two processes", "Seconds a step of the same global batch on two processes and on one."),
    "input": ("Reading images", "Seconds to read, crop and flip one batch of training images, on one core."),
    "predict": ("Labels for photographs", "Seconds from the command to the last label, start included."),
    "load": ("Loading weights", "Seconds from Google's .npz file to a model that is ready to train."),
    "startup": ("Start", "Seconds from the command to the first training step; `import torch` is a part of them."),
    "checkpoint": ("Checkpoints", "Seconds of a save. Training waits only for the \"stall\"; a thread does the rest."),
    "attention": ("Attention", "Seconds of attention only, forward and backward: three ways to compute it."),
    "optimizer": ("Optimizer", "Seconds to clip the gradients and change the weights, in several ways; \"bare copy\" copies as "
                  "many values."),
}


def write() -> None:
    machines = {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}
    PAGE.write_text(page(machines, small_sets()))


def small_sets() -> list[dict]:
    """Return the runs of benchmarks.small_sets."""
    entries = [json.loads(line) for line in SMALL_SETS.read_text(encoding="utf-8").splitlines()] if SMALL_SETS.exists() else []
    return [entry for entry in entries if "contender" in entry]


def page(machines: dict[str, dict[str, dict]], runs: list[dict]) -> str:
    """Return the text of RESULTS.md.

    machines: the records of each machine, by title; runs: those of benchmarks.small_sets.
    """
    if not machines:
        return HEAD + "\nNothing has been measured yet.\n"
    lines = [HEAD + ("" if any(map(_on_gpu, machines.values())) else "\nNo GPU has been measured yet.\n") + COMPARED]
    for records in machines.values():
        lines += [_machine(records), "", *overview(records), ""]
    lines += [*accuracy(runs), GOALS]
    for records in machines.values():
        lines += [_machine(records), "", *goals.summary(records, _on_gpu(records)), ""]
    for records in machines.values():
        lines += tables(records)
    return "\n".join(lines) + "\n"


def overview(records: dict[str, dict]) -> list[str]:
    """Return a table of how many times as fast as each other program ours is."""
    lines = ["| task | " + " | ".join(heading for heading, _ in PEERS) + " |", "|---|" + "---:|" * len(PEERS)]
    for task, title, own, others in TASKS:
        record = records.get(title.replace(" cpu", " cuda") if _on_gpu(records) else title)
        if record and own in record["costs"]:
            lines.append(f"| {task} | " + " | ".join(
                _times(record, others.get(heading, name), own) for heading, name in PEERS) + " |")
    return lines


def _times(record: dict, peer: str, own: str) -> str:
    if peer not in record["costs"]:
        return "-"
    middle, lower, _ = harness.paired(record["costs"][peer], record["costs"][own])
    return f"**{middle:.2f}**" if lower > 1 else f"{middle:.2f}"


def accuracy(runs: list[dict]) -> list[str]:
    """Return a sentence that compares accuracy and CPU time on small sets with the defaults of timm and of transformers."""
    runs_of = {name: [run for run in runs if run["contender"] == name] for name in ("auto", "timm-own", "transformers-own")}
    if not all(runs_of.values()):
        return []
    sets, splits = len({run["set"] for run in runs}), len(runs_of["auto"])
    lines = [f"Whole fine-tuning commands on {sets} small photo sets, {splits} splits, each program with its defaults ([all "
             "figures](../docs/small_sets.md)):", ""]
    for name, words in (("timm-own", "timm's train.py"), ("transformers-own", "transformers' Trainer")):
        cpu = {figures.pair_of(run): run["cpu"] for run in runs_of[name]}
        times = statistics.median(cpu[pair] / run["cpu"] for run in runs_of["auto"] if (pair := figures.pair_of(run)) in cpu)
        points = str(figures.difference(runs_of["auto"], runs_of[name], "last"))
        lines.append(f"- compared with {words}: {points.strip('*')} points of accuracy (± standard error), {times:.2f} times as "
                     "fast in CPU time")
    return lines


def tables(records: dict[str, dict]) -> list[str]:
    """Return all tables of one machine: the goals, then a group for each question."""
    lines = [f"## All figures: {_name(records)}", "", _machine(records), "", "### Goals, table by table", "",
             *goals.table(records, _on_gpu(records))]
    rest = dict(records)
    for beginning, (heading, reading) in GROUPS.items():
        group = [title for title in rest if title.startswith(beginning)]
        if group:
            lines += ["", f"### {heading}", "", reading]
        for title in group:
            lines += _table(title, rest.pop(title))
    for title, record in rest.items():
        lines += _table(title, record)
    return lines


def _table(title: str, record: dict) -> list[str]:
    settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return ["", f"#### {title}", "", *harness.table(record), "",
            f"`{record['command']}` ({settings}; {record['date']})  ", versions]


def _facts(records: dict[str, dict]) -> dict:
    return list(records.values())[-1]["machine"]


def _on_gpu(records: dict[str, dict]) -> bool:
    return bool(_facts(records)["gpu"])


def _name(records: dict[str, dict]) -> str:
    facts = _facts(records)
    return f"{facts['gpu'] or facts['cpu']}, {facts['cores']} cores"


def _machine(records: dict[str, dict]) -> str:
    facts = _facts(records)
    flags = f" ({', '.join(facts['flags'])})" if facts["flags"] else ""
    gpu = f"{facts['gpu']}; " if facts["gpu"] else ""
    return f"{gpu}{facts['cpu']}{flags}, {facts['cores']} cores, {facts['memory']} GiB."


if __name__ == "__main__":
    write()
