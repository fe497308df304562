"""Writes a trained model as files that other programs open.

Of a run with averaged weights (--ema_decay), the average is written. docs/export.md has the details.

Exit codes: 0 done; 2 bad input, and nothing is written; 143 stopped, and nothing is written.
"""

import argparse
import os
import signal
from pathlib import Path

from utils import process

with process.imports("export.py"):
    from models.checkpoints import hub
    from models.checkpoints.first_look import require_weights
    from models.checkpoints.published import published_name, published_names
    from utils.config import OF_OTHERS, ConfigError, Parser, add_flags_of_others, check_new_file, check_opened, check_packages
    from utils.config.types import new_path, positive_int, user_path
    from utils.files import make_parents, where_looked

FORMATS = {"folder": "model.safetensors, config.json and a model card, for timm, transformers and train.py",
           "onnx": "one ONNX file, which needs requirements-export.txt",
           "torch": "one file of torch.export, which runs without this project", "npz": "the layout of Google's checkpoints"}
EXAMPLES = (
    ("export.py output/flowers --to folder --output flowers-model", "a folder that timm and transformers open, and train.py"),
    ("export.py output/flowers --to onnx --output flowers.onnx", "a file for ONNX Runtime and others"))


def make_parser() -> Parser:
    parser = Parser(prog="export.py", description=__doc__, examples=EXAMPLES)
    parser.add_argument("model", type=user_path, metavar="MODEL", help="a run folder (its best.pt, or else its newest "
                        "checkpoint), a checkpoint file, a folder written by export.py, any other file or folder of weights "
                        "with a head, or a published name")
    group = parser.add_argument_group("output")
    group.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT",
                       help="; ".join(f"{name}: {what}" for name, what in FORMATS.items()))
    group.add_argument("--output", required=True, type=new_path, metavar="PATH", help="a new file or, with --to folder, a new "
                       "folder. The folder that it is in is made if necessary")
    group.add_argument("--opset", type=positive_int, metavar="N", help="with --to onnx: version of ONNX's operators, 18 or more "
                       "(default: PyTorch's)")
    group.add_argument("--class_names", type=user_path, metavar="FILE", help="for a model that does not name its classes: a text "
                       "file with a name on each line, in the order of the outputs (default: the model's names)")
    add_flags_of_others(parser)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the arguments, and check what can be known without PyTorch. Raises ConfigError."""
    options = make_parser().parse_args(argv)
    if options.opset and options.to != "onnx":
        raise ConfigError("--opset only has an effect with --to onnx. Omit it")
    check_new_file("--output", options.output, "folder" if options.to == "folder" else "file")
    if options.to == "onnx":
        check_packages("--to onnx", ("onnx", "onnxscript"), "requirements-export.txt")
    if options.class_names and not os.path.isfile(options.class_names):
        raise ConfigError(f"--class_names {options.class_names}: no such file{where_looked(options.class_names)}")
    options.model_type = check_opened(vars(options), hub, published_name, published_names(), "MODEL", require_weights)
    return options


def main(argv: list[str]) -> int:
    with process.program("export.py", signals=False) as program:
        try:
            write(parse(argv))
        except KeyboardInterrupt:
            program.exit_code = process.report_error("export.py", "stopped: nothing was written", process.EXIT_PREEMPTED)
    return program.exit_code


def write(options: argparse.Namespace) -> None:
    """Open the model and write it. Raises ConfigError."""
    from utils.build import export, open_model
    from utils.report import model_card

    opened = open_model(options.model, **{name: getattr(options, name) for name in OF_OTHERS}, flag="MODEL")
    process.collect_garbage()
    classes = export.class_names(opened, options.class_names)
    print(f"{opened.title}{opened.note}: {len(classes)} classes, {opened.parameters:,} parameters", flush=True)
    with make_parents(options.output):
        notes = export.export(opened, classes, options.to, Path(options.output), opset=options.opset, card=model_card.text)
    print("\n".join([*notes, f"wrote {options.output}"]))


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:                       # of nohup
            signal.signal(number, signal.default_int_handler)                # as Ctrl-C: half-written files are removed
    process.run(main)
