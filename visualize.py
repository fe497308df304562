"""Pictures of what a model looks at and of what a run did: PNG, PDF or SVG files.

    python visualize.py attention --checkpoint output/NAME --image photo.jpg

`python visualize.py --help` lists the pictures. Without --checkpoint it is the embedded model of letters, on the embedded
digits. The notebook uses the same functions: load, examples, look, the draw_ functions here and those of utils/report/views.py.
Exit codes: 0 done; 2 bad input, told in one line. A traceback is a bug of this program.

Imports stand in the functions that need them: a wrong flag is told at once, not after PyTorch has been loaded.
"""

import argparse
import contextlib
import errno
import os
import string
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent
try:
    from utils.config import FLAGS, ConfigError
    from utils.config.types import fraction, image_size, positive_int
except ModuleNotFoundError as error:
    sys.exit(f"visualize.py: error: this Python lacks {error.name}: run .venv/bin/python visualize.py (bash train.sh makes it), "
             "or install requirements.txt")

FEW, SOME = 4, 64                                    # images of the data set: to draw, to average over

# picture: what it shows, and its options beside --output
VERBS = {
    "attention": ("every layer, and every head of one, over the image", "image", "layer", "head"),
    "rollout": ("joint attention of all layers", "image", "fusion", "drop", "as_vit_explain"),
    "grad-rollout": ("joint attention, weighted by the gradient of a class", "image", "target", "drop", "as_vit_explain"),
    "class-attention": ("CaiT: its class-attention layers", "image"),
    "distance": ("how far each head looks, mean over images", "image"),
    "position": ("similarity of the position embeddings", "model"),
    "filters": ("principal components of the patch embedding", "model"),
    "curves": ("loss, accuracy and learning rate of one run or several", "runs"),
    "confusion": ("a run evaluated: confusion matrix and worst mistakes", "data"),
}
MODEL = {"checkpoint": {"help": "run folder (its best.pt, or else its newest), checkpoint file of a run, or any other file or "
                                "published name with --model_type (default: the embedded model)"},
         "model_type": {"help": "the architecture of a --checkpoint that is no run, such as ViT-B_16"},
         "img_size": {"type": image_size, "help": "for such a file: side, or height x width (default: the model's)"}}
RESIZE = {"interpolation": {"choices": FLAGS["interpolation"].type, "help": "for such a file: how images are resized "
                            "(default: bilinear; DeiT, CaiT and MAE take bicubic)"},
          "eval_crop": {"type": FLAGS["eval_crop"].type, "help": "for such a file: this share of the image's side, its "
                        "middle (default: 0, the whole image; DeiT and MAE take 0.875, CaiT 1)"}}
DATA = {"split": {"choices": ("train", "val", "test"), "help": "of the run's data set (default: what it was tested on)"},
        "images": {"type": positive_int, "metavar": "N", "help": "how many images of the split, evenly spaced (default: "
                   f"{FEW}; distance: {SOME}; confusion: all)"}}
OPTIONS = {
    "model": MODEL,
    "data": MODEL | DATA,
    "image": MODEL | RESIZE | {"image": {"nargs": "+", "metavar": "FILE", "help": "pictures, or folders of them (default: "
                                         "images of the data set)"}} | DATA,
    "runs": {"checkpoint": {"nargs": "+", "metavar": "RUN", "help": "run folders"}},
    "layer": {"layer": {"type": positive_int, "help": "whose heads are shown, from 1 (default: the last)"}},
    "head": {"head": {"type": positive_int, "help": "this head, from 1, in place of the mean of the heads"}},
    "fusion": {"fusion": {"choices": ("mean", "max", "min"), "default": "mean", "help": "of the heads (default: mean)"}},
    "drop": {"drop": {"type": fraction, "default": 0.0, "help": "set the lowest share of each layer's entries to 0, but "
                                                                        "for the columns of cls and dist (default: 0)"}},
    "target": {"target": {"help": "the class, by name or number (default: the predicted one)"}},
    "as_vit_explain": {"as_vit_explain": {"action": "store_true", "help": "with that code's choices: dropping spares one entry, "
                                          "and gradients are of the softmax's input, cut after the mean"}},
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ConfigError(f"{message} (python {self.prog} --help lists the flags)")


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises ConfigError."""
    parser = Parser(prog="visualize.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="PICTURE")
    for verb, (shows, *groups) in VERBS.items():
        own = verbs.add_parser(verb, help=shows, description=shows, allow_abbrev=False)
        for group in groups:
            for name, settings in OPTIONS[group].items():
                own.add_argument(f"--{name}", **settings)
        own.add_argument("--output", help="file (.png, .pdf, .svg), or a folder (default: the run's, or output/pictures)")
    options = parser.parse_args(argv)
    if getattr(options, "image", None) and (options.split or options.images):
        raise ConfigError("--split and --images choose from the data set: leave them or --image out")
    if options.verb == "curves" and not options.checkpoint:
        raise ConfigError("curves needs --checkpoint, folders of runs such as output/NAME, after bash train.sh")
    return options


def main(argv: list[str]) -> int:
    skipped = []
    sys.stdout.reconfigure(errors="backslashreplace")        # names of files can be any bytes
    try:
        options = parse(argv)
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")      # as train.py; before PyTorch is loaded
        from utils.report import plots

        folder, drawings = draw(options, skipped)
        for path, (_, figure) in zip(plots.places(options.output, folder, [name for name, _ in drawings]), drawings):
            with go_on(skipped):
                drawn = figure()
                path.parent.mkdir(parents=True, exist_ok=True)
                plots.save(drawn, path)
                print(f"wrote {path}", flush=True)
        return max(skipped, default=0)
    except (ValueError, OSError) as error:
        ours = type(error).__module__.partition(".")[0] in ("configs", "models", "utils")
        if not ours and getattr(error, "filename", None) is None:      # a bug, and not the system's word on a file
            raise
        return tell(error)


def tell(error: Exception) -> int:
    message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    print(f"visualize.py: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2


@contextlib.contextmanager
def go_on(skipped: list[int]):
    """After an image that cannot be read, or whose name is too long: its exit code goes to `skipped`."""
    from utils.data.splits import ImageError

    try:
        yield
    except (ImageError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            raise
        skipped.append(tell(error))


def draw(options: argparse.Namespace, skipped: list[int]) -> tuple[Path, list[tuple[str, Callable]]]:
    """-> (the folder for the pictures where none is given, [(name of the file, what makes its figure)])"""
    from utils.report import views

    verb = options.verb
    if verb == "curves":
        folder = views.folder_of(options.checkpoint[0])
        return folder.parent if len(options.checkpoint) > 1 else folder, [(verb, lambda: views.draw_curves(options.checkpoint))]
    resize = {name: getattr(options, name, None) for name in RESIZE}
    subject = load(options.checkpoint, options.model_type, options.img_size, **resize)
    folder = views.folder_of(options.checkpoint)
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
                with go_on(skipped):
                    yield look(subject, example)

        return folder, [(verb, lambda: views.draw_distance(readable()))]
    figure = {"attention": lambda view: views.draw_attention(view, options.layer, options.head),
              "rollout": lambda view: views.draw_rollout(view, options.fusion, options.drop, options.as_vit_explain),
              "grad-rollout": lambda view: draw_gradient_rollout(view, options.target, options.drop, options.as_vit_explain),
              "class-attention": views.draw_class_attention}[verb]
    return folder, [(f"{verb}-{Path(example.name).with_suffix('').as_posix().replace('/', '-')}",
                     lambda example=example: figure(look(subject, example))) for example in found]


# ------------------------------------------------------------------------------------------ models and images


def load(checkpoint: str | None = None, model_type: str | None = None, img_size=None, interpolation: str | None = None,
         eval_crop: float | None = None):
    """A run folder, a checkpoint file of a run, any other file or published name with its model_type; None: the embedded one.

    A run tells the rest; None: as flags of train.py. -> views.Subject. Raises ConfigError, ModelError or CheckpointError.
    """
    import torch

    from models import create_model, find_checkpoint, load_model, run_settings
    from utils.data.class_names import imagenet_names
    from utils.report.views import Subject
    from utils.run import checkpoint as checkpoints
    from utils.run import folder as run_folder

    settings = {row.name: row.before for row in FLAGS.values()}
    path, run = None, None
    if checkpoint is not None:
        path = find_checkpoint(run_folder.weights_of(checkpoint))
        run = run_settings(path)
    given = {name: value for name, value in (("interpolation", interpolation), ("eval_crop", eval_crop)) if value is not None}
    if (model_type or img_size or given) and (path is None or run is not None):
        raise ConfigError("--model_type, --img_size, --interpolation and --eval_crop act with a --checkpoint that is no "
                                  "run: a run tells its own")
    if path is None:
        model = create_model("ViT-Nano_2", pretrained=ROOT / "assets/ViT-Nano_2-letters.npz", head="keep")
        title = "embedded ViT-Nano_2, which was trained on letters and has never seen a digit"
        subject = Subject(model, tuple(string.ascii_uppercase), title, settings | {"dataset": "digits"}, True)
    elif run is not None:
        state, model = checkpoints.load(path), load_model(path)
        title = f"{run['model_type']} on {run['dataset']}, run {run.get('name') or path.parent.name}, step {state.step}"
        subject = Subject(model, tuple(model.classes), title, settings | run, True)
    elif model_type is None:
        raise ConfigError(f"{path} is of no run, which would tell its model: add --model_type, such as ViT-B_16")
    else:
        model = create_model(model_type, img_size=img_size, pretrained=path, head="keep")
        names = imagenet_names() if model.num_classes == 1000 else map("class {}".format, range(model.num_classes))
        subject = Subject(model, tuple(names), f"{model_type}, {checkpoint}", settings | given, False)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return subject


def split_of(subject, name: str | None = None, count: int | None = None) -> tuple:
    """-> (the split's name, `count` of its images, evenly spaced, or all, names of its classes).

    name None: what the run was tested on. Raises ConfigError or DataError.
    """
    from utils.data import datasets
    from utils.data.splits import Part

    if not subject.has_data:
        raise ConfigError("the checkpoint is of no run, which would name its data: add --image, pictures or a folder")
    run = subject.settings
    splits = datasets.load_splits(run["dataset"], run["data_dir"], val_fraction=run["val_fraction"],
                                  test_fraction=run["test_fraction"], split_seed=run["split_seed"])
    name = name or ("val" if run["test"] == "never" else "test")
    split = {"train": splits.train, "val": splits.val, "test": splits.test}[name]
    count = min(count or len(split), len(split))
    return name, Part(split, [number * len(split) // count for number in range(count)]), tuple(splits.classes)


def examples(subject, images: list[str] | None = None, split: str | None = None, count: int = FEW) -> list:
    """Files, and the pictures in folders; or `count` images of a split, evenly spaced -> views.Example each.

    Raises ConfigError or DataError.
    """
    from utils.data.image_files import IMAGE_EXTENSIONS, FileImages
    from utils.report.views import Example

    if images is None:
        _, data, classes = split_of(subject, split, count)
        return [Example(data.name(index), data, index, classes[data.labels[index]]) for index in range(len(data))]
    found = []
    for place in map(Path, images):
        if not place.exists():
            raise ConfigError(f"--image {place}: no such file or folder")
        below = sorted(file for file in place.rglob("*") if file.suffix.lower() in IMAGE_EXTENSIONS and file.is_file())
        if place.is_dir() and not below:
            raise ConfigError(f"--image {place}: no images ({', '.join(IMAGE_EXTENSIONS)}) in this folder")
        found += [(str(file), str(file.relative_to(place))) for file in below] or [(str(place), place.name)]
    data = FileImages([(path, 0) for path, _ in found])
    return [Example(name, data, index) for index, (_, name) in enumerate(found)]


def look(subject, example):
    """Shows the image to the model and records its attention -> views.View. Raises ImageError."""
    import torch

    from models import record_attention
    from utils.data.transforms import normalise
    from utils.report.views import View

    model = subject.model
    image, _ = example.split[example.index]
    pixels = subject.transform()(image)[None]
    inputs = normalise(pixels, model.config.mean, model.config.std).to(model.pos_embed.device)
    with torch.no_grad(), record_attention(model) as maps:
        logits = model(inputs)
    probabilities = logits[0].float().softmax(dim=-1).cpu().numpy()
    return View(subject, example, pixels[0].permute(1, 2, 0).expand(-1, -1, 3).numpy(), inputs, probabilities,
                [layer.cpu() for layer in maps])


def joint_for(view, target: int, drop: float = 0.0, as_vit_explain: bool = False):
    """Gradient rollout of class number `target` -> (1, N, N)"""
    import torch

    from models import record_attention
    from utils.attention.maps import gradient_rollout
    from utils.report.views import protected

    model = view.subject.model
    with record_attention(model, differentiable=True) as maps:
        logits = model(view.inputs)
    gradients = torch.autograd.grad(logits[0, target], maps)
    maps = [layer.detach() for layer in maps]
    return gradient_rollout(maps, gradients, drop, protected(model, as_vit_explain), as_vit_explain).cpu()


def draw_gradient_rollout(view, target: str | None = None, drop: float = 0.0, as_vit_explain: bool = False):
    """target: a class by name or number; None: the predicted one -> Figure"""
    from utils.report import views

    classes = view.subject.classes
    number = int(view.probabilities.argmax()) if target is None else views.class_number(target, classes)
    how = views.spoken(f"for {classes[number]}", drop, as_vit_explain)
    return views.draw_joint(view, joint_for(view, number, drop, as_vit_explain), f"gradient rollout {how}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
