"""`python -m models FILE` describes a file of weights: its model, its images, its head, and what to type to use it.

FILE is a file of weights, a folder of timm, transformers or a run, or a published name. Only headers are read, so a large file
takes no longer, and nothing is downloaded.
"""

import argparse
import math
import os
import re
import shlex
import sys
import textwrap
from pathlib import Path

from configs import MODELS, architecture

from .checkpoints.fit import check_pooling, may_read_either
from .checkpoints.hub import FREE, PublishedFile, did_you_mean, page_of, published_file
from .checkpoints.opened import OpenedCheckpoint
from .checkpoints.published import find_checkpoint, license_of, published_name
from .create import check_weights, resolve_row
from .errors import ModelError, WeightsError
from .match import SIZES, describe_row, match_row

BEST = "best.pt"                                   # of a run folder
READS = {"": "the cls token or the mean over the patches: nothing says which (--classifier)",
         "token": "the cls token", "gap": "the mean over the tokens", "patch_mean": "the mean over the patches, then a norm",
         "mean": "the mean over the patches", "token_mean": "the cls token and the mean over the patches",
         "attention": "what one learned query reads of the tokens"}
MAX_SHOWN = 3                                          # names of classes
COMMAND = "python -m models"
EXAMPLES = (f"{COMMAND} output/flowers", f"{COMMAND} vit_base.safetensors", f"{COMMAND} facebook/dinov2-small")


class Parser(argparse.ArgumentParser):
    """Raises ModelError, one line, where argparse prints the usage."""

    def error(self, message: str):
        words = re.sub("the following arguments are required: (.*)", r"\1 is missing", message)
        raise ModelError(f"{words}. For example: {EXAMPLES[0]} ({COMMAND} --help)")


def main(arguments: list[str]) -> int:
    """Print the description. Return the exit code: 2, after one line, for a file that is no model of this program."""
    parser = Parser(COMMAND, usage=f"{COMMAND} FILE", formatter_class=argparse.RawDescriptionHelpFormatter,
                    description="\n".join([*textwrap.wrap(__doc__.partition("\n")[0], 78), "", "examples:",
                                           *(f"  {example}" for example in EXAMPLES)]))
    parser.add_argument("file", metavar="FILE", help="a file or folder of weights, a run folder, or a published name")
    try:
        print("\n".join(describe(parser.parse_args(arguments).file)))
    except ModelError as error:
        print(f"{COMMAND}: error: {error}", file=sys.stderr)
        return ModelError.exit_code
    except BrokenPipeError:                        # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def describe(what: str) -> list[str]:
    """Return lines about a file, a folder or a published name. Raises ModelError, also for a file that does not fit its model."""
    if not Path(what).exists():
        return _of_name(what)
    path = Path(what) / BEST if (Path(what) / BEST).is_file() else Path(what)
    with OpenedCheckpoint(find_checkpoint(path)) as file:
        lines = _of_run(file) if file.settings is not None else _of_file(file, what)
        return [f"file: {file.path}, {_bytes(file.path.stat().st_size)}, {_count(file)} numbers in its arrays", *lines]


def _of_name(what: str) -> list[str]:
    """Return lines about a published file, which need not be on this machine."""
    known = published_file(what)
    name = published_name(what)
    if known is None or not known.model:
        if known is None and name:
            raise WeightsError(f"{what}: a repository that MODEL_ZOO.md does not list, so nothing is known of it before it is "
                               f"here.{did_you_mean(what)} To try it: {_command(what)}")
        raise WeightsError(f"{what}: no such file or folder, and no published name of a model here.{did_you_mean(what)} "
                           "MODEL_ZOO.md lists the names")
    license_text = license_of(what) or known.license or "not stated"
    return [f"published: {name or known.name}, {known.parameters:g} million parameters without the head, "
            f"{f'{known.classes} outputs' if known.classes else 'no head'}",
            f"model: {describe_row(known.model, {}, known.pixels)} (MODEL_TYPE={known.model})",
            f"licence: {license_text}", *_access(known),
            f"to use it: {_command(what)}"]


def _command(what: str) -> str:
    """Return the command that trains from the weights on photographs."""
    return f"DATASET=folder DATA_DIR=PHOTOS PRETRAINED_DIR={shlex.quote(what)} bash train.sh"


def _access(known: PublishedFile) -> list[str]:
    """Return a line about a repository that may ask for an account: those with terms of their own."""
    if not known.repository or not known.license or FREE.match(known.license):
        return []
    return [f"access: the publisher may ask you to accept the terms at {page_of(known.place)}; then set HF_TOKEN to a token of "
            "your account"]


def _of_run(file: OpenedCheckpoint) -> list[str]:
    settings, row = file.settings, architecture(**file.file.run["architecture"])
    name = settings["model_type"]
    size = settings.get("img_size") or row.img_size
    own_sizes = {key: row[key] for key in (*SIZES, "num_heads") if name in MODELS and row[key] != MODELS[name][key]}
    title = describe_row(name, own_sizes, size) if name in MODELS else name
    other = ", with other sizes" * bool(own_sizes)
    names = list(file.file.run["classes"])
    used = file.path.parent if file.path.name == BEST else file.path
    return [f"model: {title} (MODEL_TYPE={name}{other}), of a run of train.py, step {file.step}", *_of_row(row, size),
            f"head: {len(names)} classes ({_some(names)}), which reads {READS[row.classifier]}",
            f"to use it: {shlex.quote(sys.orig_argv[0])} predict.py {shlex.quote(str(used))} IMAGES"]


def _of_file(file: OpenedCheckpoint, what: str) -> list[str]:
    name, keys = match_row(file)
    needs_heads = "hidden_size" in keys and "num_heads" not in keys
    row = resolve_row(name, keys | file.computed)
    check_pooling(file, row, keep=file.layout.has("head.weight"))
    size = file.row.get("img_size", row.img_size)
    if not needs_heads:
        check_weights(file, row, size)
    described = file.file.described
    own = ", with the sizes of the file" * ("hidden_size" in keys)
    lines = [f"model: {describe_row(name, keys, size)} (MODEL_TYPE={name}{own})",
             *_of_row(row, size, needs_heads), _of_images(file, row)]
    lines.append(_of_head(file, "" if may_read_either(file, row) else row.classifier))
    lines += [f"note: {note}" for note in described.notes]
    lines += [f"licence: {described.license}"] * bool(described.license)
    more = " --num_heads N" * needs_heads
    return [*lines, f"to use it: {_command(what)}{more}"]


def _of_row(row: object, size: int | tuple[int, int], needs_heads: bool = False) -> list[str]:
    heads = "number of heads unknown" if needs_heads else f"{row.num_heads} heads"
    sides = (size, size) if isinstance(size, int) else tuple(size)
    blocks = f"{row.num_layers} block{'s' * (row.num_layers > 1)}"
    return [f"sizes: width {row.hidden_size}, MLP {row.mlp_dim}, {heads}, {blocks}, patches of {row.patch_size} px, images of "
            f"{sides[0]} x {sides[1]} px in {row.in_channels} channel{'s' * (row.in_channels > 1)}",
            f"computes: {'SwiGLU' if row.mlp == 'swiglu' else f'{row.gelu} GELU'}, eps {row.norm_eps:g}"
            + f", rotary positions ({row.rope})" * bool(row.rope)]


def _of_images(file: OpenedCheckpoint, row: object) -> str:
    view = {key: row[key] for key in ("interpolation", "eval_crop")} | file.view
    numbers = [" ".join(f"{number:g}" for number in row[key]) for key in ("mean", "std")]
    crop = view["eval_crop"]
    cut = ("the whole image, its shape not kept" if not crop else "shape kept, as much of the middle as fits" if crop == 1 else
           f"the middle {100 * crop:g} % of the shorter side")
    guessed = "" if "mean" in file.computed or file.tells_mean else ", from the model's row: the file does not say"
    return f"images: mean {numbers[0]}, std {numbers[1]}{guessed}; evaluated {view['interpolation']}, {cut}"


def _of_head(file: OpenedCheckpoint, classifier: str) -> str:
    try:
        classes = file.head_classes
    except WeightsError:
        return "head: none"
    names = file.class_names
    return (f"head: {classes} outputs{f' ({_some(names)})' if names else ', without names'}, which reads {READS[classifier]}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:MAX_SHOWN]) + (", ..." if len(names) > MAX_SHOWN else "")


def _count(file: OpenedCheckpoint) -> str:
    return f"{sum(math.prod(file.file.shape(name)) for name in file.file.names):,}"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size} bytes"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
