"""Draws what a model attends to, and what a run did: PNG, PDF or SVG files.

python visualize.py lists the pictures. Without --checkpoint it shows the embedded model of letters, on the embedded digits. The
notebook uses the same functions: load and examples, and those of utils/report/views.py.

Exit codes: 0 done (a warning names each image that cannot be read); 2 bad input, or no picture could be made. A traceback is a
bug of this program.

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
    from models.checkpoints import hub
    from models.checkpoints.first_look import require_weights
    from models.checkpoints.published import published_name, published_names
    from utils.config import ConfigError, Parser, add_flags_of_others, check_opened, check_writable, parse_command
    from utils.config import overview as describe_pictures
    from utils.config.types import fraction, new_path, positive_int, user_path
    from utils.files import make_parents, where_looked

if TYPE_CHECKING:
    from utils.build import Opened
    from utils.report.views import Example

FEW, SOME = 4, 64                                    # images of the data set: to draw, to average over
SUFFIXES = (".png", ".pdf", ".svg")
PURPOSE = __doc__.partition("\n")[0]
RUN, PHOTO = "--checkpoint output/flowers", "--image photo.jpg"
# picture: what it shows, an example of its flags, and the groups of its flags (OPTIONS)
PICTURES = {
    "attention": ("every layer, and every head of one layer, over the image", f"{RUN} {PHOTO}", "image", "layer", "head"),
    "rollout": ("joint attention of all layers", f"{RUN} {PHOTO}", "image", "fusion", "drop"),
    "grad-rollout": ("joint attention, weighted by the gradient of a class", f"{RUN} {PHOTO} --target rose", "image", "target",
                     "drop"),
    "class-attention": ("the class-attention layers of CaiT", f"--checkpoint output/cait {PHOTO}", "image"),
    "distance": ("how far each head attends, as a mean over images", RUN, "image"),
    "position": ("similarity of the position embeddings", RUN, "model"),
    "filters": ("principal components of the patch embedding", RUN, "model"),
    "curves": ("loss, accuracy and learning rate of one run or several", f"{RUN} output/flowers-2", "runs"),
    "confusion": ("confusion matrix and worst mistakes of a run", RUN, "data"),
}
COMMANDS = [(name, shows, f"{name} {example}") for name, (shows, example, *_) in PICTURES.items()]
OF_RUNS = {"curves": "one run folder or several", "confusion": "one of your runs"}          # the embedded model has none
# Flags of OF_OTHERS: those that describe the model, and those that say how it sees images.
MODEL_OF_OTHERS = ("model_type", "img_size", "num_heads")
VIEW_OF_OTHERS = ("classifier", "interpolation", "eval_crop", "mean", "std")
MODEL = {"checkpoint": {"type": user_path, "metavar": "PATH", "help": "a run folder (its best.pt, or else its newest "
                        "checkpoint), a checkpoint file, any other file or folder of weights, or a published name (default: the "
                        "embedded model; confusion: none)"}}
DATA = {"split": {"choices": ("train", "val", "test"), "help": "images of the run's data set to use (default: those that the run "
                  "was tested on)"},
        "images": {"type": positive_int, "metavar": "N", "help": "how many images of the split, evenly spaced (default: "
                   f"{FEW}; distance: {SOME}; confusion: all)"}}
OPTIONS = {
    "model": MODEL,
    "data": MODEL | DATA,
    "image": MODEL | {"image": {"type": user_path, "nargs": "+", "metavar": "FILE", "help": "images, or folders of images "
                                "(default: images of the run's data set)"}} | DATA,
    "runs": {"checkpoint": {"type": user_path, "nargs": "+", "metavar": "RUN", "help": "one run folder or more (default: none)"}},
    "layer": {"layer": {"type": positive_int, "metavar": "N", "help": "layer whose heads are shown, from 1 (default: the last)"}},
    "head": {"head": {"type": positive_int, "metavar": "N", "help": "show this head, from 1 (default: the mean of the heads)"}},
    "fusion": {"fusion": {"choices": ("mean", "max", "min"), "default": "mean", "help": "how to combine heads (default: mean)"}},
    "drop": {"drop": {"type": fraction, "metavar": "0..1", "default": 0.0, "help": "set this lowest fraction of each layer's "
                      "entries to 0, except the columns of cls, dist and registers (default: 0)"}},
    "target": {"target": {"metavar": "CLASS", "help": "class, by name or number from 0 (default: the predicted one)"}},
}


def make_parser(picture: str) -> Parser:
    shows, example, *groups = PICTURES[picture]
    parser = Parser(prog=f"visualize.py {picture}", description=f"Draws {shows}.",
                    examples=[(f"visualize.py {picture} {example}",
                               "written to output/" if picture == "curves" else "written to the run folder")])
    for group in groups:
        for name, settings in OPTIONS[group].items():
            parser.add_argument(f"--{name}", **settings)
    parser.add_argument("--output", type=new_path, metavar="PATH", help=f"a file ({', '.join(SUFFIXES)}) or a folder, which is "
                        "made if necessary. An earlier picture of the same name is replaced, but no other file (default: the "
                        "run folder, or output/pictures)")
    if picture != "curves":
        add_flags_of_others(parser, MODEL_OF_OTHERS + VIEW_OF_OTHERS * ("image" in groups))
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the arguments, and check what can be known without PyTorch. Raises ConfigError."""
    picture = parse_command(argv, PURPOSE, "pictures", COMMANDS, "visualize.py")
    options = make_parser(picture).parse_args(argv[1:])
    options.verb = picture
    if getattr(options, "image", None) and (options.split or options.images):
        raise ConfigError("--split and --images choose from the run's data set, and --image names other images. Omit one")
    for path in getattr(options, "image", None) or ():
        check_image(path)
    if picture in OF_RUNS and not options.checkpoint:
        raise ConfigError(f"--checkpoint is missing: {picture} needs {OF_RUNS[picture]}, such as output/flowers")
    if picture != "curves":
        options.model_type = check_opened(vars(options), hub, published_name, published_names(), "checkpoint",
                                          require_weights)
    if options.output is not None:
        check_output(Path(options.output))
    return options


def check_image(path: str | Path) -> None:
    """Raise ConfigError where nothing is there."""
    if not os.path.exists(path):
        raise ConfigError(f"--image {path}: no such file or folder{where_looked(path)}")


def check_output(path: Path) -> None:
    """Raise ConfigError where no picture can be written at the path, a file or a folder."""
    if path.is_dir() or not (path.suffix or path.exists()):
        check_writable("--output", path)
        return
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--output {path}: a picture is written as {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    check_writable("--output", path.parent)
    check_replaceable(path)


def check_replaceable(path: Path) -> None:
    """Raise ConfigError where the path is a file with contents that Matplotlib did not write: a photograph, for example."""
    if path.is_file() and (contents := path.read_bytes()) and b"matplotlib" not in contents.lower():
        raise ConfigError(f"--output {path} exists and was not drawn by this program, so it is not replaced. Give another name")


def main(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(describe_pictures(PURPOSE, "pictures", COMMANDS, "visualize.py"))
        return 0
    with process.program("visualize.py", signals=False) as program:
        options = parse(argv)
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")      # as train.py; before PyTorch is loaded
        from utils.report import plots

        folder, drawings = draw(options)
        process.collect_garbage()
        paths = plots.output_paths(options.output, folder, [name for name, _ in drawings])
        for path in paths:
            check_replaceable(path)
        drawn = 0
        for path, (_, figure) in zip(paths, drawings):
            with skip_unreadable() if len(drawings) > 1 else contextlib.nullcontext():
                picture = figure()
                with make_parents(path):
                    plots.save(picture, path)
                print(f"wrote {path}", flush=True)
                drawn += 1
        if not drawn:
            raise ConfigError("no picture could be made: the warnings above say why")
    return program.exit_code


@contextlib.contextmanager
def skip_unreadable():
    """Print a warning about an image that cannot be read, or whose name is too long, and continue."""
    from utils.data.splits import ImageError
    from utils.files import StorageError

    try:
        yield
    except (ImageError, OSError, StorageError) as error:
        cause = error.__cause__ if isinstance(error, StorageError) else error
        if isinstance(cause, OSError) and cause.errno != errno.ENAMETOOLONG:
            raise
        message, _ = process.classify_error(error)
        print(f"warning: {process.printable(message)}; skipped", file=sys.stderr, flush=True)


def draw(options: argparse.Namespace) -> tuple[Path, list[tuple[str, Callable]]]:
    """Return (the folder for the pictures if --output is not given, [(name of the file, a function that makes its figure)])."""
    from utils.report import views

    verb = options.verb
    if verb == "curves":
        from utils.build import title_of_run

        folder = views.picture_folder(options.checkpoint[0])
        return folder.parent if len(options.checkpoint) > 1 else folder, [
            (verb, lambda: views.draw_curves(options.checkpoint, title_of_run(folder)))]
    typed = {name: getattr(options, name, None) for name in MODEL_OF_OTHERS + VIEW_OF_OTHERS}
    subject = load(options.checkpoint, **typed)
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
                with skip_unreadable():
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
         mean: tuple | None = None, std: tuple | None = None, classifier: str | None = None) -> "Opened":
    """Open a run folder, a checkpoint file, any other file or folder of weights, a published name, or None, the embedded model.

    Raises ConfigError, ModelError or CheckpointError.
    """
    import torch

    from utils.build import open_model

    subject = open_model(checkpoint, model_type=model_type, img_size=img_size, num_heads=num_heads, classifier=classifier,
                         interpolation=interpolation, eval_crop=eval_crop, mean=mean, std=std)
    subject.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return subject


def split_of(subject: "Opened", name: str | None = None, count: int | None = None) -> tuple:
    """Return (the split's name, `count` of its images, evenly spaced, or all, the names of its classes).

    name: None for the split that the run was tested on. Raises ConfigError or DataError.
    """
    from utils.data.splits import Subset

    if not subject.has_data:
        raise ConfigError("--checkpoint is not one of your runs, which name their data set. Add --image, with images or folders")
    name, split, classes = subject.split(name)
    count = min(count or len(split), len(split))
    return name, Subset(split, [number * len(split) // count for number in range(count)]), classes


def examples(subject: "Opened", images: list[str] | None = None, split: str | None = None, count: int = FEW) -> "list[Example]":
    """Return a views.Example for each file in `images` and each image in its folders, or for `count` images of a split.

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
        check_image(path)
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
