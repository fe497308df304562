"""Checks a data set, or prepares it for faster training.

python dataset.py lists its commands. A prepared folder serves as --data_dir of train.py; the same command continues a prepare
that was interrupted. Exit codes: 0 done; 2 bad input, or images that cannot be read; 143 stopped.
"""

import argparse
import os
import sys
from pathlib import Path

from utils import process
from utils.files import atomic_write

with process.imports("dataset.py"):
    from utils import config
    from utils.config.retired import DATASET_FLAGS
    from utils.config.types import new_path, positive_int

PURPOSE = __doc__.partition("\n")[0]
COMMANDS = (
    ("check", "reads every image once, and reports problems", "check --dataset folder --data_dir flowers --val_fraction 0.2"),
    ("prepare", "decodes every image once, into a folder for --data_dir",
     "prepare flowers-256 --dataset folder --data_dir flowers"))
# Texts of the help that differ from those of train.py.
TEXTS = {"dataset": "the data set; folder or csv for your own images (default: the recipe's, else the embedded digits)",
         "num_workers": "processes that read images (default: one for each core)",
         "recipe": "row of configs.py, whose data set counts where --dataset is not given",
         "output_dir": "folder that bad_images.txt is written to, if there are any; it is made if necessary",
         "val_fraction": "show the split that training with this fraction draws from the training images",
         "test_fraction": "show the split that training with this fraction draws from all images",
         "bad_images": "what to do with an unreadable training image. stop: end; skip: omit it, and list it in bad_images.txt",
         "max_bad_images": "largest fraction of training images that may be omitted"}


def main(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(config.overview(PURPOSE, "commands", COMMANDS, "dataset.py"))
        return 0
    with process.program("dataset.py") as program:
        command, flags = parse(argv)
        process.collect_garbage()
        if command == "check":
            program.stop.kept = "stopped: the same command starts again at the first image"
            check(flags)
        else:
            program.stop.kept = "stopped: what is prepared is kept, the same command continues"
            prepare(flags)
    return program.exit_code


def parse(argv: list[str]) -> tuple[str, dict]:
    """Return (check or prepare, its flags). Raises ConfigError for what can be known without PyTorch."""
    command = config.parse_command(argv, PURPOSE, "commands", COMMANDS, "dataset.py")
    (_, does, example), = (row for row in COMMANDS if row[0] == command)
    flags = config.parse(argv[1:], f"dataset.py {command}", {name: TEXTS.get(name, "") for name in DATASET_FLAGS[command]},
                         f"{does[0].upper()}{does[1:]}.", _add_target if command == "prepare" else None,
                         [(f"dataset.py {example}", "photographs in flowers, which has a folder for each class")])
    config.check({name: value for name, value in flags.items() if name in config.FLAGS}, written=())
    for flag, name in (("--output_dir", "output_dir"), ("FOLDER", "folder")):
        if name in flags:
            config.check_writable(flag, Path(flags[name]))
    return command, {"num_workers": os.cpu_count() or 1} | flags


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=new_path, metavar="FOLDER", help="a new folder for the prepared images")
    parser.add_argument("--size", type=positive_int, default=256, metavar="N",
                        help="shorter side of a stored image, in pixels; smaller images keep their size (default: 256)")


def check(flags: dict) -> None:
    """Read every image of every split, and print what was found. Raises DataError if an image cannot be read."""
    from utils.data import check as checking
    from utils.data import datasets
    from utils.data.splits import flags_to_skip

    splits = datasets.splits_of(vars(config.choose(flags)))
    print("".join(f"{note}\n" for note in splits.notes), end="", flush=True)
    findings = checking.check(splits, flags["num_workers"], log=lambda line: print(line, file=sys.stderr))
    print("\n".join(findings.lines))
    if not findings.bad:
        print("every image can be read")
        return
    listed = Path(flags.get("output_dir", config.FLAGS["output_dir"].default)) / "bad_images.txt"
    try:
        config.check_writable("--output_dir", listed.parent)
    except config.ConfigError:
        print("\n".join(why for *_, why in findings.bad))            # finding them took long
        raise
    listed.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(listed, lambda file: file.write_text("".join(f"{why}\n" for *_, why in findings.bad), encoding="utf-8",
                                                     errors="backslashreplace"))
    bad = sum(split == "train" for split, *_ in findings.bad)
    skip = f", or train with {flags_to_skip(bad, len(splits.train))} (validation and test images must be readable)" if bad else ""
    raise datasets.DataError(f"{len(findings.bad):,} image{'s' * (len(findings.bad) > 1)} cannot be read: {listed} lists "
                             f"them. Replace or remove them{skip}")


def prepare(flags: dict) -> None:
    """Decode the images of every split and resize them into a new folder. Raises what prepare.build raises."""
    from utils.data import datasets
    from utils.data import prepare as preparing
    from utils.data.classes import ClassRule
    from utils.data.layouts import Request
    from utils.data.reading import Reading

    sources = config.choose({name: value for name, value in flags.items() if name in config.FLAGS})
    skip = flags.get("max_bad_images", config.FLAGS["max_bad_images"].default) if flags.get("bad_images") == "skip" else 0.0
    request = Request(ClassRule(sources.class_order), **datasets.columns_of(vars(sources)))
    splits = datasets.own_splits(sources.dataset, sources.data_dir, request, Reading.of(vars(sources)))
    print("".join(f"{note}\n" for note in splits.notes), end="", flush=True)
    preparing.build(splits, sources.dataset, flags["folder"], flags["size"], flags["num_workers"], print, skip=skip)


if __name__ == "__main__":
    process.run(main)
