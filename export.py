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
    from utils.config import FLAGS, ConfigError, Parser, check_published, check_writable, model_named
    from utils.config.types import image_size, positive_int, user_path
    from utils.files import where_looked

FORMATS = {"folder": "model.safetensors, config.json and a model card, for timm and transformers", "onnx": "one ONNX file",
           "torch": "one file of torch.export", "npz": "Google's layout"}
OF_OTHERS = {"model_type": {"help": "the architecture of a MODEL that is no run, such as ViT-B_16 (default: what it tells)"},
             "img_size": {"type": image_size, "help": "for such a file: side, or height x width (default: the model's)"},
             "num_heads": {"type": positive_int, "help": "for such a file: its attention heads, where nothing tells them"},
             "interpolation": {"choices": FLAGS["interpolation"].type, "help": "for such a file: how images are resized "
                               "(default: as its config.json, its publisher or its model's says)"},
             "eval_crop": {"type": FLAGS["eval_crop"].type, "help": "for such a file: this fraction of the image's side, its "
                           "middle (default: as that says, else 0, the whole image)"},
             "mean": {"type": FLAGS["mean"].type, "metavar": "R,G,B", "help": "for such a file: of its channels, from 0 to 1"},
             "std": {"type": FLAGS["std"].type, "metavar": "R,G,B", "help": "for such a file: their standard deviation"},
             "class_names": {"type": user_path, "metavar": "FILE", "help": "for such a file: a text file that names a class a "
                             "line, in the order of its outputs, where nothing names them"}}


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
    options = parser.parse_args(argv)
    if options.opset and options.to != "onnx":
        raise ConfigError("--opset only has an effect with --to onnx. Omit it")
    options.model_type = model_named(options.model_type, model_of)
    try:
        check_published(vars(options), published_name, published_names(), "model")
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("--model ")) from error
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

    typed = {name: getattr(options, name) for name in OF_OTHERS if name != "class_names"}
    opened = open_model(options.model, **typed, flag="MODEL")
    process.collect_garbage()
    classes = export.class_names(opened, options.class_names)
    print(f"{opened.title}: {len(classes)} classes, {opened.parameters:,} parameters", flush=True)
    notes = export.export(opened, classes, options.to, Path(options.output), opset=options.opset, card=model_card.text)
    print("\n".join([*notes, f"wrote {options.output}"]))


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:                       # of nohup
            signal.signal(number, signal.default_int_handler)                # as Ctrl-C: what is half written is removed
    process.run(main)
