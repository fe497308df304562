"""Writes a trained model as files that other programs open.

    python export.py output/flowers --to folder --output flowers-model      timm and transformers open it, and train.py
    python export.py output/flowers --to onnx --output flowers.onnx         ONNX; needs requirements-export.txt
    python export.py output/flowers --to torch --output flowers.pt2         torch.export, which runs without this project
    python export.py output/flowers --to npz --output flowers.npz           the layout of Google's checkpoints

MODEL: a run folder (its best.pt, or else its newest), a checkpoint, an exported folder, any other file or folder with a head, or
a published name. Of a run with averaged weights (--ema_decay) these are written. docs/export.md has the details.
Exit codes: 0 done; 2 bad input, reported in one line, and nothing is written; 143 stopped, and nothing is written.
"""

import argparse
import os
import signal
from pathlib import Path

from utils import process

with process.imports("export.py"):
    from models.checkpoints.hub import model_of
    from models.checkpoints.published import published_name, published_names
    from utils.config import OF_OTHERS, ConfigError, Parser, check_opened, check_writable
    from utils.config.types import positive_int, user_path
    from utils.files import where_looked

FORMATS = {"folder": "model.safetensors, config.json and a model card, for timm and transformers", "onnx": "one ONNX file",
           "torch": "one file of torch.export", "npz": "Google's layout"}


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises ConfigError."""
    parser = Parser(prog="export.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=user_path, metavar="MODEL", help="what is written: a run folder, a checkpoint, ...")
    parser.add_argument("--to", required=True, choices=FORMATS, help="; ".join(f"{name}: {it}" for name, it in FORMATS.items()))
    parser.add_argument("--output", required=True, type=user_path, metavar="PATH", help="the new file or folder")
    parser.add_argument("--opset", type=positive_int, metavar="N", help="of ONNX, 18 or more (default: what PyTorch takes)")
    for name, settings in OF_OTHERS.items():
        parser.add_argument(f"--{name}", **settings)
    parser.add_argument("--class_names", type=user_path, metavar="FILE", help="of a model that does not name its classes: a text "
                        "file with a name a line, in the order of its outputs")
    options = parser.parse_args(argv)
    if options.opset and options.to != "onnx":
        raise ConfigError("--opset only has an effect with --to onnx. Omit it")
    options.model_type = check_opened(vars(options), model_of, published_name, published_names(), "MODEL")
    return options


def check_output(path: Path) -> None:
    """Raises ConfigError unless something new can be written there."""
    if os.path.lexists(path):
        raise ConfigError(f"--output {path} is there already, and nothing is written over it. Give another name, or remove it")
    if not path.parent.is_dir():
        what = "a file, not a folder" if path.parent.exists() else f"no such folder{where_looked(path.parent)}. Make it first"
        raise ConfigError(f"--output {path}: {path.parent}: {what}")
    check_writable("--output", path.parent)


def main(argv: list[str]) -> int:
    with process.program("export.py", signals=False) as program:
        try:
            options = parse(argv)
            check_output(Path(options.output))
            write(options)
        except KeyboardInterrupt:
            program.exit_code = process.report_error("export.py", "stopped: nothing is written", process.EXIT_PREEMPTED)
    return program.exit_code


def write(options: argparse.Namespace) -> None:
    """Raises ConfigError."""
    from utils.build import export, open_model
    from utils.report import model_card

    opened = open_model(options.model, **{name: getattr(options, name) for name in OF_OTHERS}, flag="MODEL")
    process.collect_garbage()
    classes = export.class_names(opened, options.class_names)
    print(f"{opened.title}{opened.note}: {len(classes)} classes, {opened.parameters:,} parameters", flush=True)
    notes = export.export(opened, classes, options.to, Path(options.output), opset=options.opset, card=model_card.text)
    print("\n".join([*notes, f"wrote {options.output}"]))


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:                       # of nohup
            signal.signal(number, signal.default_int_handler)                # as Ctrl-C: what is half written is removed
    process.run(main)
