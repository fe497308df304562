"""Check a data set, or prepare it for faster training.

python dataset.py check --dataset folder --data_dir flowers            read every image, report what is wrong with them
python dataset.py prepare flowers-256 --dataset folder --data_dir flowers    decode all images once, into flowers-256

A prepared folder serves as --data_dir of train.py. An interrupted prepare is continued by the same command.
"""

import argparse
import os
import sys
from pathlib import Path

import configs

COMMANDS = {
    "check": ("dataset", "data_dir", "recipe", "val_fraction", "test_fraction", "split_seed", "num_workers", "output_dir"),
    "prepare": ("dataset", "data_dir", "recipe", "num_workers", "bad_images", "max_bad_images")}
BAD_IMAGES_FILE = "bad_images.txt"


def main(argv: list[str]) -> int:
    """-> exit code"""
    from utils import process

    with process.Stop() as stop:
        try:
            if not argv or argv[0] not in COMMANDS:
                if argv and argv[0] in ("-h", "--help"):
                    print(f"{__doc__.strip()}\n\npython dataset.py check --help and prepare --help list their flags.")
                    return 0
                raise configs.ConfigError("the first word must be check or prepare (python dataset.py --help)")
            flags = parse(argv[0], argv[1:])
            settings = settle(flags)
            if argv[0] == "check":
                stop.kept = "stopped: the same command starts again at the first image"
                check(settings)
            else:
                stop.kept = "stopped: what is prepared is kept, the same command continues"
                prepare(settings)
            return 0
        except (ValueError, OSError) as error:
            return report(error)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise configs.ConfigError(f"{message} (python {self.prog} --help lists the flags)")


def parse(command: str, argv: list[str]) -> dict:
    """The flags that were typed, by name. Raises ConfigError."""
    parser = _Parser(prog=f"dataset.py {command}", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    if command == "prepare":
        parser.add_argument("folder", metavar="FOLDER", help="where the prepared images are stored, a new folder")
        parser.add_argument("--size", type=configs.positive, metavar="N", help="shorter side of the images, in pixels; smaller "
                            "images stay as they are (default: 256)")
    for name in COMMANDS[command]:
        kind, default, text = configs.FLAGS[name]
        shown = text if default is None else f"{text} (default: {default})"
        choices = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument(f"--{name}", help=shown, **choices)
    return vars(parser.parse_args(argv))


def settle(flags: dict) -> argparse.Namespace:
    """Fill the flags that were not typed. Raises ConfigError for flags without effect."""
    settings = {name: configs.FLAGS[name][1] for names in COMMANDS.values() for name in names} | {"size": 256} | flags
    settings["dataset"] = flags.get("dataset") or configs.RECIPES.get(settings["recipe"], {}).get("dataset", "digits")
    settings["num_workers"] = flags.get("num_workers", os.cpu_count() or 1)
    if settings["dataset"] == "digits" and "data_dir" in flags:
        raise configs.ConfigError(f"--data_dir {flags['data_dir']} is not used by the embedded digits. Add --dataset, such as "
                                  "--dataset folder")
    if "split_seed" in flags and not (settings["val_fraction"] or settings["test_fraction"]):
        raise configs.ConfigError("--split_seed only has an effect with --val_fraction or --test_fraction. Add one of them, or "
                                  "omit --split_seed")
    if "max_bad_images" in flags and settings["bad_images"] != "skip":
        raise configs.ConfigError("--max_bad_images only has an effect with --bad_images skip. Add it or omit --max_bad_images")
    return argparse.Namespace(**settings)


def check(settings: argparse.Namespace) -> None:
    """Read every image of every split and print what was found. Raises DataError if one cannot be read."""
    from utils.data import check as checking
    from utils.data import datasets
    from utils.files import atomic_write

    splits = datasets.open_splits(settings.dataset, settings.data_dir, val_fraction=settings.val_fraction,
                                  test_fraction=settings.test_fraction, split_seed=settings.split_seed)
    findings = checking.check(splits, settings.num_workers, log=lambda line: print(line, file=sys.stderr))
    print("\n".join(findings.lines))
    if settings.dataset == "folder" and (line := checking.ignored_line(settings.data_dir)):
        print(line)
    if not findings.bad:
        print("every image can be read")
        return
    listed = Path(settings.output_dir) / BAD_IMAGES_FILE
    listed.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(listed, lambda file: file.write_text("".join(f"{why}\n" for *_, why in findings.bad)))
    raise datasets.DataError(f"{len(findings.bad):,} images cannot be read: {listed} lists them; replace or remove them, or "
                             "train with --bad_images skip (validation and test images must be readable)")


def prepare(settings: argparse.Namespace) -> None:
    """Decode the images of every split and make them smaller, into a new folder. Raises what prepare.build raises."""
    from utils.data import datasets, prepare

    splits = datasets.own_splits(settings.dataset, settings.data_dir)
    prepare.build(splits, settings.dataset, settings.folder, settings.size, settings.num_workers, print,
                  skip=settings.max_bad_images if settings.bad_images == "skip" else 0.0)


def report(error: ValueError | OSError) -> int:
    """Print a user's error as one line -> exit code. Raises any other error."""
    code = getattr(error, "exit_code", getattr(error, "code", 2 if isinstance(error, configs.ConfigError) else None))
    if isinstance(error, OSError) and error.filename is not None:
        error, code = f"{error.filename}: {error.strerror}", 2
    if code is None:
        raise error
    print(f"dataset.py: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
