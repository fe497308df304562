"""The contenders: the command of each, and how its accuracies are read."""

import csv
import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .measured import MOMENTS, Outcome
from .splits import Split
from .start import TIMM_MODEL, timm_kwargs

BATCH, RATE, WARMUP = 32, 0.03, 0.1          # of "our recipe" below; the warm-up is a fraction of the run


@dataclasses.dataclass(frozen=True)
class Job:
    """What a command is made from. images_seen: by the base's run on this split; the others see as many."""

    split: Split
    draw: int
    out: Path                     # a folder for what the run writes
    start: Path
    model: str                    # flags of ours
    row: dict                     # of the model (start.row_of)
    timm_start: Path
    timm_train: Path | None
    images_seen: int = 0
    size: str = "all"

    @property
    def passes(self) -> float:
        return self.images_seen / self.split.train


@dataclasses.dataclass(frozen=True)
class Contender:
    name: str
    what: str                                       # for the page; it begins with a short name, up to a colon or a semicolon
    command: Callable[[Job], list[str]]
    read: Callable[[Job], Outcome]                  # from what the run wrote to job.out
    flags: str = ""                                 # of a candidate: other flags make another contender
    needs_timm_train: bool = False


def displayed(command: Sequence[str], job: Job) -> str:
    """Return the command without the folders of this machine."""
    words = {job.split.folder: "SPLIT", job.out: "OUT", job.start: "START", job.timm_start: "START.safetensors",
             job.timm_train: "timm/train.py", sys.executable: "python", shlex.quote(job.model): "MODEL", job.model: "MODEL"}
    text = shlex.join(command)
    for place in sorted(words, key=lambda one: -len(str(one))):
        text = text.replace(str(place), words[place])
    return text


# --------------------------------------------------------------------------------------------------------- ours


def train_py(job: Job, *flags: str) -> list[str]:
    return [sys.executable, "train.py", "--dataset", "folder", "--data_dir", str(job.split.folder), *shlex.split(job.model),
            "--pretrained_dir", str(job.start), *flags, "--seed", str(job.draw), "--name", "run", "--output_dir", str(job.out),
            "--log_dir", str(job.out / "logs")]


def vit_paper(job: Job) -> list[str]:
    steps = max(1, round(job.images_seen / BATCH))
    return train_py(job, "--recipe", "vit-paper", "--train_batch_size", str(BATCH), "--num_steps", str(steps), "--warmup_steps",
                    str(round(steps * WARMUP)), "--learning_rate", str(RATE), "--crop_scale", "0.5", "--eval_every",
                    str(math.ceil(steps / MOMENTS)))


def candidate(name: str, flags: str | dict[str, str], sizes: Sequence[str]) -> Contender:
    """Return a contender that runs train.py with these flags.

    flags: one text, or one for each number of images per class ("5", "20", "all"). Raises ValueError if some are missing.
    """
    if isinstance(flags, dict) and not set(flags) >= set(sizes):
        raise ValueError(f"candidate {name}: no flags for {', '.join(size for size in sizes if size not in flags)}")

    def command(job: Job) -> list[str]:
        words = shlex.split(flags if isinstance(flags, str) else flags[job.size])
        if "--num_steps" in words and "--eval_every" not in words:
            words += ["--eval_every", str(math.ceil(int(words[words.index("--num_steps") + 1]) / MOMENTS))]
        return train_py(job, *words)

    text = flags if isinstance(flags, str) else json.dumps(flags)
    return Contender(name, f"train.py with `{text}`" if text else "train.py; nothing else is set", command, read_ours, text)


def read_ours(job: Job) -> Outcome:
    """Read log.jsonl and config.json of the run."""
    config = json.loads((job.out / "run" / "config.json").read_text(encoding="utf-8"))["config"]
    lines = (job.out / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return outcome_of_ours(config, [json.loads(line) for line in lines])


def outcome_of_ours(config: dict, events: list[dict]) -> Outcome:
    found = {event["step"]: event["accuracy"] for event in events
             if event["event"] == "eval" and event["split"] != "train" and event["step"]}
    steps = config["num_steps"]
    return Outcome(tuple((step / steps, 100 * accuracy) for step, accuracy in sorted(found.items())), steps,
                   steps * config["train_batch_size"])


# --------------------------------------------------------------------------------------------------------- timm


@dataclasses.dataclass(frozen=True)
class TimmLength:
    """The length of a run of timm, which drops the last incomplete batch of an epoch: more epochs make up for that."""

    batch: int
    steps_per_epoch: int
    epochs: int

    @classmethod
    def of(cls, job: Job) -> "TimmLength":
        batch = min(BATCH, job.split.train)
        steps = job.split.train // batch
        return cls(batch, steps, max(2, round(job.images_seen / (steps * batch))))


def timm_command(job: Job, *flags: str) -> list[str]:
    length = TimmLength.of(job)
    kwargs = [f"{name}={value}" for name, value in timm_kwargs(job.row).items()]
    return [sys.executable, str(job.timm_train), "--data-dir", str(job.split.folder), "--val-split", "val", "--model", TIMM_MODEL,
            "--model-kwargs", *kwargs, "--img-size", str(job.row["img_size"]), "--num-classes", str(job.split.classes),
            "--mean", *map(str, job.row["mean"]), "--std", *map(str, job.row["std"]),
            "--pretrained", "--pretrained-path", str(job.timm_start), "-b", str(length.batch), "-vb", "64",
            "--val-interval", str(max(1, length.epochs // MOMENTS)), "--device", "cpu", "--workers", "1", "--no-prefetcher",
            "--seed", str(job.draw), "--output", str(job.out), "--experiment", "run", *flags]


def timm_same(job: Job) -> list[str]:
    epochs = TimmLength.of(job).epochs
    warmup = max(1, round(epochs * WARMUP))
    return timm_command(
        job, "--head-init-scale", "0", "--opt", "momentum", "--momentum", "0.9", "--lr", str(RATE), "--weight-decay", "0",
        "--clip-grad", "1", "--sched", "cosine", "--sched-on-updates", "--epochs", str(epochs - warmup), "--warmup-epochs",
        str(warmup), "--warmup-prefix", "--warmup-lr", "0", "--scale", "0.5", "1.0", "--color-jitter", "0", "--smoothing", "0",
        "--train-interpolation", "bilinear", "--interpolation", "bilinear", "--crop-pct", "1.0")


def timm_own(job: Job) -> list[str]:
    epochs = TimmLength.of(job).epochs
    return timm_command(job, "--epochs", str(epochs), *(["--warmup-epochs", str(epochs // 4)] if epochs < 20 else []))


def read_timm(job: Job) -> Outcome:
    length = TimmLength.of(job)
    with open(job.out / "run" / "summary.csv", encoding="utf-8", newline="") as stream:
        return outcome_of_timm(list(csv.DictReader(stream)), length)


def outcome_of_timm(rows: list[dict[str, str]], length: TimmLength) -> Outcome:
    """Return the outcome. rows: of its summary.csv, which counts epochs from 0."""
    steps = length.epochs * length.steps_per_epoch
    return Outcome(tuple(((int(row["epoch"]) + 1) / length.epochs, float(row["eval_top1"])) for row in rows), steps,
                   steps * length.batch)


# ------------------------------------------------------------------------------------- transformers, scikit-learn


def module_command(job: Job, module: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.small_sets.{module}", "--data", str(job.split.folder), "--start", str(job.start),
            "--model", job.model, "--seed", str(job.draw), "--json", str(job.out / "result.json"), *flags]


def trainer_command(settings: str) -> Callable[[Job], list[str]]:
    return lambda job: module_command(job, "trainer", "--settings", settings, "--passes", f"{job.passes:.4g}", "--out",
                                  str(job.out / "run"))


def read_json(job: Job) -> dict:
    return json.loads((job.out / "result.json").read_text(encoding="utf-8"))


def outcome_of_trainer(result: dict, images: int) -> Outcome:
    steps = result["steps"]
    return Outcome(tuple((step / steps, 100 * accuracy) for step, accuracy in result["evaluations"]), steps,
                   round(result["passes"] * images))


def outcome_of_logistic(result: dict) -> Outcome:
    return Outcome(((1.0, 100 * result["views"][result["view"]]["accuracy"]),), 0, 0, result)


CONTENDERS = (
    Contender("auto", "train.py with data, start weights and model; nothing else is set", train_py, read_ours),
    Contender("auto-one-pass", "`auto` with `--tta none`: evaluation without mirror images, as in the programs below",
              lambda job: train_py(job, "--tta", "none"), read_ours, "--tta none"),
    Contender("vit-paper", "train.py with the recipe `vit-paper` at batch 32: SGD 0.03, warm-up a tenth, crops of half the area "
              "and more; evaluation on the whole image, squeezed to a square", vit_paper, read_ours),
    Contender("timm", "timm's train.py with the settings of `vit-paper`; evaluation with the shape kept (it cannot squeeze)",
              timm_same, read_timm, needs_timm_train=True),
    Contender("timm-own", "timm's train.py with its own defaults: those of its flags and of the model's pretrained_cfg, SGD with "
              "Nesterov momentum, 0.1 x batch / 256, weight decay 2e-5, 5 epochs of warm-up, crops of 0.08 of the area and more, "
              "color jitter "
              "0.4, smoothing 0.1, bicubic, evaluation crop 0.9", timm_own, read_timm, needs_timm_train=True),
    Contender("transformers", "transformers' Trainer with the settings of `vit-paper`; evaluation with the shape kept",
              trainer_command("same"), lambda job: outcome_of_trainer(read_json(job), job.split.train)),
    Contender("transformers-own", "transformers' Trainer with its own defaults: the transforms of its image-classification "
              "example, AdamW 5e-5, linear decay, batch 8, crops of 0.08 of the area and more; evaluation with the shape kept",
              trainer_command("own"), lambda job: outcome_of_trainer(read_json(job), job.split.train)),
    Contender("logistic", "scikit-learn's logistic regression on frozen features: of images and mirror images, in evaluation "
              "too; cross-validation on the training images chooses C, and whether all images are squeezed or seen with their "
              "shape kept and a crop of 0.875, bicubic",
              lambda job: module_command(job, "logistic"), lambda job: outcome_of_logistic(read_json(job))),
)
