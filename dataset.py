"""Checks a data set, or prepares it for faster training.

    python dataset.py check --dataset folder --data_dir flowers               reads every image once and reports problems
    python dataset.py prepare flowers-256 --dataset folder --data_dir flowers decodes all images once, into flowers-256

Exit codes: 0 done; 2 bad input, or images that cannot be read.
"""

import argparse
import gc
import os
import sys
from pathlib import Path

from utils import config
from utils.config.retired import CHECK_FLAGS, PREPARE_FLAGS
from utils.config.types import positive_int

VERBS = {"check": CHECK_FLAGS, "prepare": PREPARE_FLAGS}


def main(argv: list[str]) -> int:
    from utils import process

    with process.Stop() as stop:
        stop.kept = "stopped: what was prepared is kept. The same command continues."
        try:
            verb = argv[0] if argv else "--help"
            if verb in ("-h", "--help"):
                print(__doc__)
                return 0
            if verb not in VERBS:
                raise config.ConfigError(f"{verb}: must be check or prepare")
            flags = config.parse(argv[1:], f"dataset.py {verb}", VERBS[verb], __doc__.partition("\n")[0],
                                 _add_target if verb == "prepare" else None)
            config.check({name: value for name, value in flags.items() if name in config.FLAGS})
            return check(flags) if verb == "check" else prepare(flags)
        except (ValueError, OSError) as error:
            code = getattr(error, "exit_code", getattr(error, "code", None))
            ours = code is not None or type(error).__module__.partition(".")[0] == "utils"
            if not ours and getattr(error, "filename", None) is None:
                raise
            return exit_with_error(str(error) if ours else f"{error.filename}: {error.strerror}", code or 2)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="where the prepared images go; it then serves as --data_dir")
    parser.add_argument("--size", type=positive_int, default=256, metavar="N",
                        help="shorter side of a stored image, in pixels; smaller images stay as they are (default: 256)")


def exit_with_error(message: str, code: int) -> int:
    print(f"dataset.py: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def check(flags: dict) -> int:
    """Reads every image of every split; prints what cannot be used and lists it in OUTPUT_DIR/bad_images.txt."""
    from utils.data import check as checking
    from utils.data import datasets

    sources = config.choose(flags)
    splits = datasets.load_splits(sources.dataset, sources.data_dir, val_fraction=sources.val_fraction,
                                  test_fraction=sources.test_fraction, split_seed=sources.split_seed)
    findings = checking.check(splits, _workers(flags), say=lambda line: print(line, file=sys.stderr))
    print("\n".join(findings.lines))
    if sources.dataset == "folder" and (line := checking.left_out_line(sources.data_dir)):
        print(line)
    if not findings.bad:
        print("every image can be read")
        return 0
    listed = Path(flags.get("output_dir", config.FLAGS["output_dir"].default)) / "bad_images.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text("".join(f"{why}\n" for *_, why in findings.bad))
    return exit_with_error(f"{len(findings.bad):,} images cannot be read: {listed} lists them. Replace or remove them, or train "
                           "with --bad_images skip (held-out images must be readable).", 2)


def prepare(flags: dict) -> int:
    """Decodes the images of every split, makes them smaller and stores them."""
    from utils.data import datasets
    from utils.data import prepare as preparing

    sources = config.choose({name: value for name, value in flags.items() if name in config.FLAGS})
    skipped = flags.get("max_bad_images", config.FLAGS["max_bad_images"].default) if flags.get("bad_images") == "skip" else 0.0
    preparing.build(datasets.own_splits(sources.dataset, sources.data_dir), sources.dataset, flags["folder"], flags["size"],
                    _workers(flags), print, skip=skipped)
    return 0


def _workers(flags: dict) -> int:
    """Also lets the garbage collector run, which the start had switched off."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    return flags.get("num_workers", os.cpu_count() or 1)


if __name__ == "__main__":
    gc.disable()                # imports make a million objects that stay
    sys.exit(main(sys.argv[1:]))
