"""Checks a data set, or prepares it for faster training.

    python dataset.py check --dataset folder --data_dir flowers               reads every image once and reports problems
    python dataset.py prepare flowers-256 --dataset folder --data_dir flowers decodes all images once, into flowers-256

A prepared folder serves as --data_dir of train.py. The same command continues an interrupted prepare.
Exit codes: 0 done; 2 bad input, or images that cannot be read.
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
    from utils.config.types import positive_int, user_path


def main(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\npython dataset.py check --help and prepare --help list their flags.")
        return 0
    with process.program("dataset.py") as program:
        command = argv[0] if argv else ""
        if command not in DATASET_FLAGS:
            raise config.ConfigError("the first word must be check or prepare (python dataset.py --help)."
                                     + config.did_you_mean(command, DATASET_FLAGS))
        flags = config.parse(argv[1:], f"dataset.py {command}", DATASET_FLAGS[command], __doc__.partition("\n")[0],
                             _add_target if command == "prepare" else None)
        config.check({name: value for name, value in flags.items() if name in config.FLAGS}, written=())
        flags.setdefault("num_workers", os.cpu_count() or 1)
        process.collect_garbage()
        if command == "check":
            program.stop.kept = "stopped: the same command starts again at the first image"
            check(flags)
        else:
            program.stop.kept = "stopped: what is prepared is kept, the same command continues"
            prepare(flags)
    return program.exit_code


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=user_path, metavar="FOLDER", help="where the prepared images go, a new folder")
    parser.add_argument("--size", type=positive_int, default=256, metavar="N",
                        help="shorter side of a stored image, in pixels; smaller images stay as they are (default: 256)")


def check(flags: dict) -> None:
    """Reads every image of every split and prints what was found. Raises DataError if one cannot be read."""
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
        print("\n".join(why for *_, why in findings.bad))            # which took long to find
        raise
    listed.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(listed, lambda file: file.write_text("".join(f"{why}\n" for *_, why in findings.bad), encoding="utf-8",
                                                     errors="backslashreplace"))
    bad = sum(split == "train" for split, *_ in findings.bad)
    skip = f", or train with {flags_to_skip(bad, len(splits.train))} (validation and test images must be readable)" if bad else ""
    raise datasets.DataError(f"{len(findings.bad):,} images cannot be read: {listed} lists them. Replace or "
                             f"remove them{skip}")


def prepare(flags: dict) -> None:
    """Decodes the images of every split and makes them smaller, into a new folder. Raises what prepare.build raises."""
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
