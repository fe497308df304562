"""Labels images: writes a row for each, with its likeliest classes and their probabilities.

The rows are written as they are ready, in the order of the input. An image that cannot be read is a row without a label, and its
column `error` says why.

Exit codes: 0 done; 2 bad input, or no image that can be read; 143 stopped, and the rows so far are complete.

Imports are deferred to the functions that need them, so that a bad flag fails before PyTorch loads.
"""

import argparse
import contextlib
import itertools
import os
import shlex
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from utils import process

with process.imports("predict.py"):
    from models import ModelError
    from models.checkpoints import hub
    from models.checkpoints.first_look import not_a_run, require_weights
    from models.checkpoints.published import published_name, published_names
    from utils.config import FLAGS, OF_OTHERS, ConfigError, Parser, add_flags_of_others, check_new_file, check_opened
    from utils.config.types import positive_int, user_path
    from utils.files import is_stream, where_looked

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from utils.build import Opened
    from utils.predict.predictor import Work
    from utils.predict.rows import Output, Table
    from utils.predict.sources import Batches, Remarks

BATCH, GPU_BATCH = 32, 64       # images; DeiT-Ti/16 takes 12 to 22 % less CPU time an image than with 64 (AMD EPYC, 1 thread)
PEEKED = 256                    # images that decide how files are read, where the model does not say
DEFAULT_TOP_K = 2                       # classes of a row
LISTS = ".csv", ".tsv"
EXAMPLES = (
    ("predict.py output/flowers photos/ > labels.csv", "labels every image below the folder photos"),
    ("predict.py output/flowers --split val --sort loss", "lists the run's worst mistakes on its held-out images first"),
    ("predict.py timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k a.jpg b.jpg", "labels two images with a published model"))
# Title of a group: its flags.
ARGUMENTS = {
    "": {
        "model": {"metavar": "MODEL", "type": user_path, "help": "a run folder (its best.pt, or else its newest checkpoint), a "
                  "checkpoint file, a folder written by export.py, any other file or folder of weights with a head, or a "
                  "published name"},
        "inputs": {"metavar": "INPUT", "type": user_path, "nargs": "*", "help": "an image, a folder of images, a list of paths "
                   "(.txt, a path on each line; .csv, see docs/csv.md), or - to read paths from standard input"}},
    "images": {
        "--split": {"choices": ("val", "test", "train"), "help": "in place of INPUT: these images of the run's own data set, "
                    "with the true class and the loss in each row (default: none)"},
        "--path_column": {"metavar": "COLUMN", "help": "csv: column of the paths, a name or a number from 1 (default: found)"},
        "--image_dir": {"type": user_path, "metavar": "DIR", "help": "csv: folder that the paths are relative to (default: the "
                        "folder of the list, or the one that has the images)"}},
    "output": {
        "--output": {"type": user_path, "metavar": "FILE", "help": "a new file; its folder is made if necessary. Until it is "
                     "complete it is called FILE.partial; -: standard output (default: standard output)"},
        "--format": {"choices": ("csv", "json", "jsonl"), "default": "csv", "help": "jsonl: an object on each line; json: one "
                     "list (default: csv)"},
        "--top_k": {"type": positive_int, "metavar": "N", "help": f"classes of a row (default: {DEFAULT_TOP_K}; with --split 1)"},
        "--sort": {"choices": ("loss",), "help": "with --split: sort the rows, the largest loss first (default: the order of the "
                   "data set)"}},
    "computation": {
        "--device": {"choices": FLAGS["device"].type, "default": "auto", "help": f"{FLAGS['device'].help} (default: auto)"},
        "--nproc": {"type": positive_int, "metavar": "N", "help": "processes; also the variable NPROC (default: the number of "
                    "GPUs, or 1 without any)"},
        "--batch_size": {"type": positive_int, "metavar": "N", "help": "images of a batch, which changes no label (default: "
                         f"{BATCH}, on a GPU {GPU_BATCH}; with --split the run's --eval_batch_size)"},
        "--precision": {"choices": FLAGS["precision"].type, "help": f"{FLAGS['precision'].help} (default: fp32; with --split the "
                        "run's)"},
        "--tta": {"choices": FLAGS["tta"].type, "help": "flip: the mean of the probabilities of an image and its mirror image, "
                  "which takes twice the time (default: the run's, else none)"}},
}


class Images(NamedTuple):
    """The images to label, in batches of keys, and the split that they are of, if any."""

    batches: "Batches"
    remarks: "Remarks"
    split: "Dataset | None" = None
    total: int | None = None

    def names(self, batch: Sequence) -> list[str]:
        return [item.name for item in batch] if self.split is None else [self.split.name(index) for index in batch]

    def true(self, batch: Sequence) -> list[int]:
        return [] if self.split is None else [int(self.split.targets[index]) for index in batch]


def make_parser() -> Parser:
    parser = Parser(prog="predict.py", description=__doc__.rpartition("\n\n")[0], examples=EXAMPLES)
    for title, flags in ARGUMENTS.items():
        group = parser.add_argument_group(title) if title else parser
        for name, settings in flags.items():
            group.add_argument(name, **settings)
    add_flags_of_others(parser)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Read and check the arguments. Raises ConfigError."""
    options = make_parser().parse_args(argv)
    if bool(options.inputs) == bool(options.split):
        raise ConfigError("INPUT and --split exclude each other. Omit one" if options.split else
                          "INPUT is missing: give images, a folder, a list or - (paths from standard input), or add --split val "
                          "for the images that the run held out")
    if options.sort and not options.split:
        raise ConfigError("--sort loss only has an effect with --split: without the true classes there is no loss")
    for flag in ("path_column", "image_dir"):
        if getattr(options, flag) and not any(given.lower().endswith(LISTS) for given in options.inputs):
            raise ConfigError(f"--{flag} only has an effect with a list as INPUT ({', '.join(LISTS)})")
    if options.output == "-":
        options.output = None
    if options.output and not is_stream(options.output):
        check_new_file("--output", options.output)
    if options.inputs.count("-") > 1:
        raise ConfigError("INPUT has - more than once, and standard input can be read only once")
    for given in options.inputs:
        if given != "-" and not os.path.exists(given):
            raise ConfigError(f"{given}: no such file or folder{where_looked(given)}")
    check_order(options.model, options.inputs)
    options.model_type = check_opened(vars(options), hub, published_name, published_names(), "MODEL", require_weights)
    if options.nproc is None and (variable := os.environ.get("NPROC")):
        if not variable.isdecimal() or not int(variable):
            raise ConfigError(f"NPROC must be a whole number, 1 or more, got {variable!r}")
        options.nproc = int(variable)
    return options


def check_order(model: str, inputs: Sequence[str]) -> None:
    """Raise ConfigError where MODEL is none, which most often means that it was typed after the images."""
    try:
        require_weights(model)
    except ModelError as error:
        what = not_a_run(model) if os.path.isdir(model) else error
        for given in inputs:
            with contextlib.suppress(ModelError):
                require_weights(given)
                raise ConfigError(f"MODEL: {what}; MODEL comes first, then the images: {given} {model}") from error


def main(argv: list[str]) -> int:
    with process.program("predict.py") as program:
        program.stop.kept = "stopped: nothing was written"
        options = parse(argv)
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")              # as train.py; before PyTorch is loaded
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")    # as train.py
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # GPUs are counted without being used: processes are forked
        import torch

        from utils.build import open_model
        from utils.predict import rows

        gpus = torch.cuda.device_count() if options.device in ("auto", "cuda") else 0
        processes = options.nproc or gpus or 1
        if processes > 1:
            torch.set_num_threads(1)             # a process forked after work in several threads would wait for them forever
        opened = open_model(options.model, flag="MODEL", **{name: getattr(options, name) for name in OF_OTHERS})
        check(options, opened)
        images, work = prepare(options, opened, processes, GPU_BATCH if gpus else BATCH)
        table, output = rows.Table(opened.classes, work.top_k, bool(options.split)), rows.Output(options.output)
        if not options.sort:
            where = f"in {output.partial}" if output.partial else "written"
            program.stop.kept = f"stopped: the rows so far are {where}, and each is complete"
        process.collect_garbage()
        try:
            print(describe(opened, work, options), file=sys.stderr, flush=True)
            program.exit_code = write(options, images, work, table, output)
        except Exception as error:
            message, code = process.classify_error(error)
            if not (kept := output.leave()) or message is None:
                raise
            raise rows.Unfinished(f"{message}; {kept}", code) from error
    return program.exit_code


def check(options: argparse.Namespace, opened: "Opened") -> None:
    """Raise ConfigError for arguments that the model cannot fulfill."""
    if not opened.has_head:
        raise ConfigError(f"MODEL {options.model} has no head, and so no classes. Fine-tune it first (PRETRAINED_DIR="
                          f"{shlex.quote(options.model)} bash train.sh), and give the run folder")
    if (options.top_k or 1) > len(opened.classes):
        raise ConfigError(f"--top_k must be at most {len(opened.classes)}, the model's number of classes, got {options.top_k}")
    if options.split and not opened.has_data:
        raise ConfigError(f"--split {options.split} needs a run as MODEL, which names its data set, and {options.model} is none. "
                          "Give images in place of --split")


def prepare(options: argparse.Namespace, opened: "Opened", processes: int, batch: int) -> "tuple[Images, Work]":
    """Return (the images to label, what each process does). batch: images of a batch by default.

    Raises DataError or ConfigError.
    """
    from utils.data.splits import DataError
    from utils.data.survey import faint_images, loose_files
    from utils.predict.predictor import Work
    from utils.predict.sources import Batches, Remarks, first_of, open_sources

    run, split, reading, remarks = opened.settings, None, opened.reading, Remarks()
    size = options.batch_size or (run["eval_batch_size"] if options.split else batch)
    if options.split:
        _, split, classes = opened.split(options.split)
        if classes != opened.classes:
            raise DataError(f"--split {options.split}: the classes of the data are not those of the model")
        keys, size = range(len(split)), min(size, len(split))         # as the run evaluated them
    else:
        keys = open_sources(options.inputs, options.path_column, options.image_dir, remarks)
        # How files are read is decided by the same number of images, however slowly they arrive.
        first, all_are_there = first_of(keys, max(size * processes, PEEKED * bool(reading.unknown)), not reading.unknown)
        if not first:
            raise DataError(f"INPUT {', '.join(options.inputs)}: no paths of images")
        keys = itertools.chain(first, keys)
        sample = loose_files([(item.path, 0) for item in first[:PEEKED]], ".", reading)
        reading = sample.reading
        if warning := faint_images(sample):
            print(process.printable(warning), file=sys.stderr, flush=True)
        if all_are_there:                                         # divide few images among the processes
            size = min(size, -(-len(first) // processes))
    images = Images(Batches(keys, size), remarks, split, len(split) if options.split else None)
    settings = {name: run[name] for name in ("precision", "fp16_opt_level", "dataset")} if options.split else {}
    if options.precision:
        settings["precision"] = options.precision
    top_k = options.top_k or (1 if options.split else min(DEFAULT_TOP_K, len(opened.classes)))
    return images, Work(
        opened.model, opened.transform, reading, top_k, size, split, flipped=(options.tta or run["tta"]) == "flip",
        device=options.device, processes=processes, **settings)


def describe(opened: "Opened", work: "Work", options: argparse.Namespace) -> str:
    """Return a line about the model and how it is used."""
    from utils.device import choose_device
    from utils.training.precision import choose

    precision = work.precision
    if precision == "auto":
        device = choose_device(work.device, 0, 1)
        # A process that forks others uses no GPU.
        precision += (f": {choose('auto', '', device)[0].name}" if device.type == "cpu" or work.processes == 1 else
                      ": bf16 where the GPU multiplies it, else fp32")
    precision += (" (the run's own)" if options.split and not options.precision else "")
    flipped = ", with mirror images" * work.flipped
    taken = "taken to be ImageNet's" if len(opened.classes) == 1000 else "numbered"
    unnamed = "" if opened.named else f"; the file does not name its classes, which are {taken}"
    processes = f"{work.processes} process{'es' * (work.processes > 1)}"
    return f"model: {opened.title}{opened.note}; {precision}{flipped}, {processes}{unnamed}"


def write(options: argparse.Namespace, images: Images, work: "Work", table: "Table", output: "Output") -> int:
    """Write all rows. Return the exit code: 0, or 2 where no image could be read."""
    from tqdm import tqdm

    from utils.predict.pool import in_order

    started, done, bad, reason, kept, kind = time.monotonic(), 0, 0, "", [], options.format
    bar = tqdm(total=images.total, unit="image", file=sys.stderr, **process.bar_size(),
               disable=not sys.stderr.isatty() or (options.output is None and sys.stdout.isatty()))
    with bar:
        for batch, answers in in_order(work, images.batches, work.processes):
            images.batches.answered(batch)
            if not batch:
                continue
            found = list(table.rows(images.names(batch), answers, images.true(batch)))
            if options.sort:
                kept += found
            else:
                output.write(table.texts(found, kind, first=not done))
            done, bad = done + len(batch), bad + len(answers.bad)
            reason = reason or next((f"{found[position][0]}: {why}" for position, why in answers.bad), "")
            bar.update(len(batch))
            if output.closed:
                break
    if images.batches.error is not None:
        raise images.batches.error
    if options.sort:
        kept.sort(key=lambda row: (row[-2] is None, -(row[-2] or 0.0)))         # images that cannot be read come last
        output.write(table.texts(kept, kind, first=True))
    output.write([table.end(kind)])
    output.finish()
    seconds = time.monotonic() - started
    skipped = images.remarks.skipped
    for line in (*images.remarks.lists, *(line for line in skipped if line.startswith("warning: "))):
        print(process.printable(line), file=sys.stderr)
    ends = "".join(f"; {line}" for line in skipped if not line.startswith("warning: "))
    unreadable = f"; {bad:,} cannot be read (column error), such as {reason}" if bad else ""
    print(process.printable(f"{done:,} image{'s' * (done != 1)}, {seconds:.1f} s, {done / max(seconds, 1e-9):.1f} images/s"
                            f"{ends}{unreadable}"), file=sys.stderr, flush=True)
    return process.EXIT_BAD_INPUT if bad == done else 0


if __name__ == "__main__":
    process.run(main)
