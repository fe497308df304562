"""Pictures of what a model attends to and of what a run did: PNG, PDF or SVG files.

    python visualize.py attention --checkpoint output/NAME --image photo.jpg

`python visualize.py --help` lists the pictures. Without --checkpoint it is the embedded model of letters, on the embedded
digits. The notebook uses the same functions: load and examples, and those of utils/report/views.py.
Exit codes: 0 done; 2 bad input, reported in one line. A traceback is a bug of this program.

Imports are deferred to the functions that need them, so that a bad flag fails before PyTorch loads.
"""

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from utils import process

with process.imports("visualize.py"):
    from models.checkpoints.hub import model_of
    from models.checkpoints.published import published_name, published_names
    from utils.config import OF_OTHERS, ConfigError, Parser, check_opened
    from utils.config.types import fraction, positive_int, user_path
    from utils.files import where_looked

if TYPE_CHECKING:
    from utils.build import Opened
    from utils.report.views import Example

FEW, SOME = 4, 64                                    # images of the data set: to draw, to average over

# picture: what it shows, and its options beside --output
VERBS = {
    "attention": ("every layer, and every head of one, over the image", "image", "layer", "head"),
    "rollout": ("joint attention of all layers", "image", "fusion", "drop"),
    "grad-rollout": ("joint attention, weighted by the gradient of a class", "image", "target", "drop"),
    "class-attention": ("CaiT: its class-attention layers", "image"),
    "distance": ("how far each head attends, mean over images", "image"),
    "position": ("similarity of the position embeddings", "model"),
    "filters": ("principal components of the patch embedding", "model"),
    "curves": ("loss, accuracy and learning rate of one run or several", "runs"),
    "confusion": ("a run evaluated: confusion matrix and worst mistakes", "data"),
}
MODEL = {"checkpoint": {"type": user_path, "help": "run folder (its best.pt, or else its newest), checkpoint file of a run, or "
                        "any other file or folder or published name (default: the embedded model)"},
         **{name: OF_OTHERS[name] for name in ("model_type", "img_size", "num_heads")}}
RESIZE = {name: OF_OTHERS[name] for name in ("interpolation", "eval_crop", "mean", "std")}
DATA = {"split": {"choices": ("train", "val", "test"), "help": "of the run's data set (default: what it was tested on)"},
        "images": {"type": positive_int, "metavar": "N", "help": "how many images of the split, evenly spaced (default: "
                   f"{FEW}; distance: {SOME}; confusion: all)"}}
OPTIONS = {
    "model": MODEL,
    "data": MODEL | DATA,
    "image": MODEL | RESIZE | {"image": {"type": user_path, "nargs": "+", "metavar": "FILE", "help": "pictures, or folders of "
                                         "them (default: images of the data set)"}} | DATA,
    "runs": {"checkpoint": {"type": user_path, "nargs": "+", "metavar": "RUN", "help": "run folders"}},
    "layer": {"layer": {"type": positive_int, "help": "whose heads are shown, from 1 (default: the last)"}},
    "head": {"head": {"type": positive_int, "help": "this head, from 1, in place of the mean of the heads"}},
    "fusion": {"fusion": {"choices": ("mean", "max", "min"), "default": "mean", "help": "of the heads (default: mean)"}},
    "drop": {"drop": {"type": fraction, "default": 0.0, "help": "set the lowest fraction of each layer's entries to 0, but "
                                                              "for the columns of cls, dist and registers (default: 0)"}},
    "target": {"target": {"help": "the class, by name or number (default: the predicted one)"}},
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises ConfigError."""
    parser = Parser(prog="visualize.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="PICTURE")
    for verb, (shows, *groups) in VERBS.items():
        own = verbs.add_parser(verb, help=shows, description=shows, allow_abbrev=False)
        for group in groups:
            for name, settings in OPTIONS[group].items():
                own.add_argument(f"--{name}", **settings)
        own.add_argument("--output", type=user_path,
                         help="file (.png, .pdf, .svg), or a folder (default: the run's, or output/pictures)")
    options = parser.parse_args(argv)
    if getattr(options, "image", None) and (options.split or options.images):
        raise ConfigError("--split and --images choose from the data set. Omit them or --image")
    if options.verb == "curves" and not options.checkpoint:
        raise ConfigError("curves needs --checkpoint, folders of runs such as output/NAME, after bash train.sh")
    if options.verb != "curves":
        options.model_type = check_opened(vars(options), model_of, published_name, published_names(), "checkpoint")
    return options


def main(argv: list[str]) -> int:
    skipped = []
    with process.program("visualize.py", signals=False) as program:
        options = parse(argv)
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")      # as train.py; before PyTorch is loaded
        from utils.report import plots

        folder, drawings = draw(options, skipped)
        process.collect_garbage()
        for path, (_, figure) in zip(plots.output_paths(options.output, folder, [name for name, _ in drawings]), drawings):
            with skip_unreadable(skipped):
                drawn = figure()
                path.parent.mkdir(parents=True, exist_ok=True)
                plots.save(drawn, path)
                print(f"wrote {path}", flush=True)
        program.exit_code = max(skipped, default=0)
    return program.exit_code


@contextlib.contextmanager
def skip_unreadable(skipped: list[int]):
    """Continues after an image that cannot be read, or whose name is too long: its exit code goes to `skipped`."""
    from utils.data.splits import ImageError
    from utils.files import StorageError

    try:
        yield
    except (ImageError, OSError, StorageError) as error:
        cause = error.__cause__ if isinstance(error, StorageError) else error
        if isinstance(cause, OSError) and cause.errno != errno.ENAMETOOLONG:
            raise
        message, _ = process.classify_error(error)
        skipped.append(process.report_error("visualize.py", message, process.EXIT_BAD_INPUT))


def draw(options: argparse.Namespace, skipped: list[int]) -> tuple[Path, list[tuple[str, Callable]]]:
    """-> (the folder for the pictures where none is given, [(name of the file, what makes its figure)])"""
    from utils.report import views

    verb = options.verb
    if verb == "curves":
        folder = views.picture_folder(options.checkpoint[0])
        return folder.parent if len(options.checkpoint) > 1 else folder, [(verb, lambda: views.draw_curves(options.checkpoint))]
    resize = {name: getattr(options, name, None) for name in RESIZE}
    subject = load(options.checkpoint, options.model_type, options.img_size, num_heads=options.num_heads, **resize)
    folder = views.picture_folder(options.checkpoint)
    if verb in ("position", "filters"):
        figure = views.draw_positions if verb == "position" else views.draw_filters
        return folder, [(verb, lambda: figure(subject))]
    if verb == "confusion":
        name, data, classes = split_of(subject, options.split, options.images)
        return folder, [(verb, lambda: views.draw_confusion(subject, data, name, classes))]
    found = examples(subject, options.image, options.split, options.images or (SOME if verb == "distance" else FEW))
    if verb == "distance":
        def readable():
            for example in found:
                with skip_unreadable(skipped):
                    yield views.predict_with_attention(subject, example)

        return folder, [(verb, lambda: views.draw_distance(readable()))]
    figure = {"attention": lambda view: views.draw_attention(view, options.layer, options.head),
              "rollout": lambda view: views.draw_rollout(view, options.fusion, options.drop),
              "grad-rollout": lambda view: views.draw_gradient_rollout(view, options.target, options.drop),
              "class-attention": views.draw_class_attention}[verb]
    return folder, [(f"{verb}-{Path(example.name).with_suffix('').as_posix().replace('/', '-')}",
                     lambda example=example: figure(views.predict_with_attention(subject, example))) for example in found]


# ------------------------------------------------------------------------------------------ models and images


def load(checkpoint: str | None = None, model_type: str | None = None, img_size: int | tuple[int, int] | None = None,
         interpolation: str | None = None, eval_crop: float | None = None, num_heads: int | None = None,
         mean: tuple | None = None, std: tuple | None = None) -> "Opened":
    """A run folder, a checkpoint file of a run, any other file, folder or published name; None: the embedded model.

    Raises ConfigError, ModelError or CheckpointError.
    """
    import torch

    from utils.build import open_model

    subject = open_model(checkpoint, model_type=model_type, img_size=img_size, num_heads=num_heads, interpolation=interpolation,
                         eval_crop=eval_crop, mean=mean, std=std)
    subject.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return subject


def split_of(subject: "Opened", name: str | None = None, count: int | None = None) -> tuple:
    """-> (the split's name, `count` of its images, evenly spaced, or all, names of its classes).

    name None: what the run was tested on. Raises ConfigError or DataError.
    """
    from utils.data.splits import Subset

    if not subject.has_data:
        raise ConfigError("the checkpoint is of no run, which would name its data: add --image, pictures or a folder")
    name, split, classes = subject.split(name)
    count = min(count or len(split), len(split))
    return name, Subset(split, [number * len(split) // count for number in range(count)]), classes


def examples(subject: "Opened", images: list[str] | None = None, split: str | None = None, count: int = FEW) -> "list[Example]":
    """Files, and the pictures in folders; or `count` images of a split, evenly spaced -> views.Example each.

    Raises ConfigError or DataError.
    """
    from utils.data.class_folders import picture_files
    from utils.data.image_files import IMAGE_EXTENSIONS
    from utils.data.survey import faint_images, loose_files
    from utils.report.views import Example

    if images is None:
        _, data, classes = split_of(subject, split, count)
        return [Example(data.name(index), data, index, classes[data.targets[index]]) for index in range(len(data))]
    found = []
    for path in map(Path, images):
        if not path.exists():
            raise ConfigError(f"--image {path}: no such file or folder{where_looked(path)}")
        below = picture_files(path) if path.is_dir() else []
        if path.is_dir() and not below:
            raise ConfigError(f"--image {path}: no images ({', '.join(IMAGE_EXTENSIONS)}) in this folder")
        found += [(file, os.path.relpath(file, path)) for file in below] or [(str(path), path.name)]
    data = loose_files([(path, 0) for path, _ in found], ".", subject.reading)
    if warning := faint_images(data):
        print(process.printable(warning), file=sys.stderr)
    return [Example(name, data, index) for index, (_, name) in enumerate(found)]


if __name__ == "__main__":
    process.run(main)
