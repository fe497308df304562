"""Edits what a model attends to, on a local web page. The next training learns the edits (train.py --attention_edits).

The page needs requirements-annotate.txt. Exit codes: 0 stopped by Ctrl-C; 2 bad input, reported in one line. A traceback is a
bug of this program.

Imports are deferred to the functions that need them, so that a bad flag fails before PyTorch loads.
"""

import argparse
import contextlib
import functools
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from utils import process

with process.imports("annotate.py"):
    from models.checkpoints import hub
    from models.checkpoints.first_look import require_weights
    from models.checkpoints.published import published_name, published_names
    from utils.config import OF_OTHERS, ConfigError, Parser, add_flags_of_others, check_opened, check_packages, check_writable
    from utils.config.types import METAVARS, new_path, port, user_path
    from utils.files import no_folder

if TYPE_CHECKING:
    from PIL import Image

    from utils.attention.editor.session import Gallery
    from utils.build import Opened
    from utils.data.reading import Reading

RUNS = Path("output")
NO_RUN = f"--checkpoint is missing, and there is no run in {RUNS}. Add it, or train first (bash train.sh)"
EXAMPLES = (("annotate.py --checkpoint output/flowers", "edits on the training images of a run"),
            ("annotate.py --checkpoint facebook/dinov2-small --data photos", "edits on other images, with a published model"))
LARGEST = 1024              # pixels of the longer side of a picture on the page
# The folder of a published data set below --data.
PUBLISHED = {"cub200": "CUB_200_2011", "flowers102": "flowers-102", "oxford_pets": "oxford-iiit-pet", "mnist": "MNIST",
             "fashion_mnist": "FashionMNIST", "cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def main(argv: list[str]) -> int:
    with contextlib.suppress(KeyboardInterrupt), process.program("annotate.py", signals=False) as program:
        annotate(parse(argv))
    return program.exit_code


def make_parser() -> Parser:
    parser = Parser(prog="annotate.py", description=__doc__.rpartition("\n\n")[0], examples=EXAMPLES)
    group = parser.add_argument_group("model and images")
    group.add_argument("--checkpoint", type=user_path, metavar="PATH",
                       help="a run folder (its best.pt, or else its newest checkpoint), a checkpoint file, or, with --data, any "
                       f"other file or folder of weights, or a published name (default: the newest run in {RUNS})")
    group.add_argument("--data", type=user_path, metavar="DIR",
                       help="a folder of images without labels, of class folders, or of train/ and val/ with class folders; or "
                       "where the run's data set is now (default: the run's data set)")
    group.add_argument("--split", choices=("train", "val", "test"), default="train",
                       help="images to show; training learns only from edits of train (default: train)")
    group = parser.add_argument_group("edits and page")
    group.add_argument("--edits", type=new_path, metavar="DIR",
                       help="folder of the edits; it is made if necessary (default: that of the run's --attention_edits, or "
                       "else the folder edits next to the checkpoint)")
    group.add_argument("--who", metavar="TEXT", default="", help="who edits, which is saved with every edit (default: nothing)")
    group.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="where to serve (default: 127.0.0.1, this machine)")
    group.add_argument("--port", type=port, metavar=METAVARS[port], default=8000, help="0: any free one (default: 8000)")
    add_flags_of_others(parser)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the arguments, and check what can be known without PyTorch. Raises ConfigError."""
    args = make_parser().parse_args(argv)
    args.model_type = check_opened(vars(args), hub, published_name, published_names(), "checkpoint", require_weights)
    if not args.host:
        raise ConfigError("--host is empty. 127.0.0.1 is only this machine, 0.0.0.0 all of its addresses")
    check_packages("the editor", ("starlette", "uvicorn"), "requirements-annotate.txt")
    if args.data is not None and not os.path.isdir(args.data):
        raise ConfigError(f"--data {args.data}: {no_folder(args.data)}")
    if args.edits is not None:
        check_writable("--edits", Path(args.edits))
    if args.checkpoint is None and not any(RUNS.glob("*/*.pt")):
        raise ConfigError(NO_RUN)
    return args


def annotate(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C. Raises ConfigError, DataError or ServerError."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")      # as train.py; before PyTorch is loaded
    from utils.attention.editor import server
    from utils.build import open_model

    checkpoint = args.checkpoint or newest_run()
    opened = open_model(checkpoint, **{name: getattr(args, name) for name in OF_OTHERS})
    if not opened.has_data and args.data is None:
        raise ConfigError(f"--checkpoint {checkpoint} is not one of your runs, which name their data set. Add --data, a "
                          "folder of images")
    folder = Path(args.edits or default_edits(opened))
    with server.listen(args.host, args.port) as listening:
        gallery = open_gallery(args, opened)
        folder.mkdir(parents=True, exist_ok=True)
        session = server.Session(gallery, folder, args.who)
        count = len(gallery.labels)
        others = f", which also has {session.others:,} of other images" if session.others else ""
        print(f"{server.announce(listening)}  {count:,} image{'s' * (count > 1)}; {session.edited.sum():,} of them edited, in "
              f"{folder}{others}. Stop with Ctrl-C", flush=True)
        process.collect_garbage()
        server.serve(session, listening, args.host)


def default_edits(opened: "Opened") -> Path:
    """Return the folder from which the run learned, if it is there, or else edits in the run folder; output/edits for a model
    that belongs to no run."""
    learned = opened.settings["attention_edits"]
    if learned and Path(learned).is_dir():
        return Path(learned)
    return (opened.path.parent if opened.has_data else RUNS) / "edits"


def newest_run() -> Path:
    """Return the run in RUNS with the newest checkpoint. Raises ConfigError."""
    from utils.run import checkpoint

    runs = [folder for folder in RUNS.iterdir() if folder.is_dir()] if RUNS.is_dir() else []
    files = [file for folder in runs for file in checkpoint.checkpoint_files(folder)]
    if not files:
        raise ConfigError(NO_RUN)
    return max(files, key=lambda file: file.stat().st_mtime).parent


def open_gallery(args: argparse.Namespace, opened: "Opened") -> "Gallery":
    """Return the model and the requested images. Raises ConfigError or DataError."""
    import numpy as np

    import models
    from utils.attention import edits
    from utils.attention.editor import session as editing

    model, settings, path = opened.model, opened.settings, opened.path
    if not model.sigmoid_layers:
        models.use_sigmoid_attention(model, "last")
        print(f"The model has softmax attention. Here its last layer, {model.sigmoid_layers[-1]}, uses sigmoid attention, whose "
              "output without edits is the same; train.py --attention_edits does this too. (A run with --sigmoid_attention all "
              "takes edits in every layer, from which a deep model learns more: see docs/measured.md.)")
    split, classes, where = find_images(args.data, args.split, settings, opened.reading)
    if not len(split):
        raise ConfigError(f"--split {args.split}: {where} has no such images")
    if args.data is not None and opened.has_data:
        warn_of_names(split, where, args.split, settings, opened.reading)
    index = {name: label for label, name in enumerate(model.classes)}
    table = np.array([index.get(name, editing.UNKNOWN) for name in classes] + [editing.UNKNOWN])      # -1: without a class
    labels = table[split.targets]
    if classes and not (labels >= 0).any():
        print(f"The model has none of the classes of {where}: the images are shown without labels.")
    viewer = Viewer(model, split, opened.transform, opened.region)
    layers, (height, width) = model.sigmoid_layers, model.img_size
    acts = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}, of which {layers[-1]} is shown"
    facts = [opened.title, f"{args.split} images of {where}",
             f"the model sees {height} x {width} px; edits act in {acts}; values are means over heads"
             + "; probabilities are of each image only; the run also averages its mirror image" * (settings["tta"] == "flip")]
    title = path.resolve().parent.name if opened.has_data else Path(args.checkpoint).name
    return editing.Gallery(
        title=title, facts=facts, classes=model.classes, labels=labels, grid=model.grid,
        img_size=model.img_size, name=split.name, checksum=functools.partial(edits.checksum, split), region=viewer.region,
        picture=viewer.picture, predict_with_attention=viewer.predict_with_attention,
        predict=viewer.predict)


def find_images(data: str | None, part: str, settings: dict, reading: "Reading"):
    """Return the split, the names of its classes by label (none: without labels), and what to call the data.

    Raises ConfigError or DataError.
    """
    from utils.data import datasets, survey
    from utils.data.classes import BY_DEFAULT, ClassRule
    from utils.data.layouts import ANYTHING, Request

    kind, folder = settings["dataset"], Path(settings["data_dir"])
    if data is not None:
        kind, folder = layout_of(Path(data), kind), Path(data)
    fractions = {name: settings[name] for name in ("val_fraction", "test_fraction", "split_seed")}
    if kind != settings["dataset"]:
        fractions |= {"val_fraction": 0.0, "test_fraction": 0.0}         # drawn from the run's own images, not from others
    rule = ClassRule(settings["class_order"] if kind == settings["dataset"] else BY_DEFAULT.order)
    if kind == "folder" and not (fractions["val_fraction"] or fractions["test_fraction"]):
        splits = datasets.own_splits(kind, str(folder), Request(rule, need=ANYTHING), reading)      # any part of it can be shown
        split = getattr(splits, part)
        if not len(split) and part != "train" and not len(splits.val):
            raise ConfigError(f"--split {part}: the images are not divided into train/ and val/. Omit --split")
        return split, splits.classes, str(folder)
    if kind != "images":
        splits = datasets.splits_of(settings | fractions, dataset=kind, data_dir=str(folder), rule=rule, reading=reading)
        where = kind if kind == "digits" else str(folder) if kind in ("folder", "csv") else f"{kind} in {folder}"
        return getattr(splits, part), splits.classes, where
    if part != "train":
        raise ConfigError(f"--split {part}: the images are not divided into train/ and val/. Omit --split")
    files = [(str(file), -1) for file in pictures_in(folder)]
    return survey.loose_files(files, folder, reading), (), str(folder)


def pictures_in(folder: Path) -> list[Path]:
    """Return the image files of a folder, without hidden ones such as macOS's ._NAME.jpg."""
    from utils.data.class_folders import Scan
    from utils.data.image_files import IMAGE_EXTENSIONS

    return [folder / name for name in Scan(IMAGE_EXTENSIONS).listing(folder).images]


def warn_of_names(split, where: str, part: str, settings: dict, reading: "Reading") -> None:
    """Warn if no image has the name of an image of the run's own data set, if that is on this machine."""
    kind, folder = settings["dataset"], settings["data_dir"]
    if kind in PUBLISHED and not Path(folder, PUBLISHED[kind]).is_dir():
        return                                          # it would be downloaded
    with contextlib.suppress(ValueError, OSError):
        own, _, where_own = find_images(None, part, settings, reading)
        names = {own.name(index) for index in range(len(own))}
        if names and not any(split.name(index) in names for index in range(len(split))):
            print(f"warning: --data {where}: train.py finds edits by the names of images in its data set, and no image here (the "
                  f"first is {split.name(0)}) has the name of one of the run's ({where_own}: {own.name(0)})", file=sys.stderr)


def layout_of(folder: Path, own: str) -> str:
    """Return how to read a folder: as the data set of the run (`own`), "csv", "images" (without labels) or "folder".

    Raises ConfigError.
    """
    from utils.data.csv_lists import ENDINGS
    from utils.data.layouts import split_names

    if not folder.is_dir():
        raise ConfigError(f"--data {folder}: {no_folder(folder)}")
    if own in PUBLISHED and (folder / PUBLISHED[own]).is_dir():
        return own
    listed = any(file.suffix.lower() in ENDINGS for file in folder.iterdir())
    if (folder / "train.csv").is_file() or (own == "csv" and listed):
        return "csv"
    return "images" if pictures_in(folder) and not split_names([place.name for place in folder.iterdir()]) else "folder"


class Viewer:
    """Shows the images to the model and to the person. Several threads use it, and take turns at the model.

    An edit acts from the first layer of sigmoid attention on, which is mostly the last layer. The input of that layer is cached,
    so that the layers before it run once for each image.
    """

    def __init__(self, model, split, transform, region_of):
        import torch

        from utils.data import transforms

        device, config = torch.device("cuda" if torch.cuda.is_available() else "cpu"), model.config
        self.model, self.split, self.transform, self.region_of = model.to(device), split, transform, region_of
        self._input = lambda pixels: transforms.normalize(torch.stack(pixels).to(device), config.mean, config.std)
        self.turn = threading.Lock()                   # a prediction puts hooks and edits on the model
        self.first = min(model.sigmoid_layers[0] - 1, len(model.blocks))
        self.seen, self.tokens = self._cached(64, self._seen), self._cached(32, self._tokens)
        self.own = self._cached(128, self._predict_with_attention)

    def _cached(self, count: int, make):
        """Return a function that computes `make`(index) and caches it until the file of the image changes."""
        from utils.attention import edits

        remembered = functools.lru_cache(count)(lambda index, checksum: make(index))
        return lambda index: remembered(index, edits.checksum(self.split, index))

    def _seen(self, index: int):
        """Return the model's view, uint8 (C, height, width), and its region of the stored image. Raises ImageError."""
        image, _ = self.split[index]
        return self.transform(image), self.region_of((image.height, image.width))

    def region(self, index: int) -> tuple[float, float, float, float]:
        return self.seen(index)[1]

    def picture(self, index: int) -> "Image.Image":
        """Return the part of the image that the model sees, in the image's own pixels (at most LARGEST on a side), in grey for a
        model of one channel. People recognize more in it than in the 32 px that a model may see. Raises ImageError."""
        from PIL import Image

        image, _ = self.split[index]
        (top, left, bottom, right), (width, height) = self.region_of((image.height, image.width)), image.size
        box = left * width, top * height, right * width, bottom * height
        sides = box[2] - box[0], box[3] - box[1]
        size = tuple(max(1, round(side * min(1, LARGEST / max(sides)))) for side in sides)
        part = image if (*size, *box) == (*image.size, 0, 0, *image.size) else image.resize(size, Image.Resampling.BICUBIC, box)
        return part.convert("L") if self.model.config.in_channels == 1 else part

    def _tokens(self, index: int):
        import torch

        images = self._input([self.seen(index)[0]])
        with self.turn, torch.inference_mode():
            return self.model.forward_to(images, self.first)

    def predict_with_attention(self, index: int, values=None, edited=None):
        """Return an editing.Prediction of the model without or with an edit, arrays (h, w). Raises ImageError."""
        return self.own(index) if edited is None else self._predict_with_attention(index, values, edited)

    def _predict_with_attention(self, index: int, values=None, edited=None):
        import torch

        from utils.attention.editor import session as editing
        from utils.data import splits

        model, tokens = self.model, self.tokens(index)
        with self.turn, torch.inference_mode(), contextlib.ExitStack() as stack:
            logits = stack.enter_context(model.recording_patch_logits())
            maps = stack.enter_context(model.recording(self.first))
            if edited is not None:
                stack.enter_context(model.editing(torch.from_numpy(values)[None], torch.from_numpy(edited)[None]))
            probabilities = model.forward_from(tokens, self.first)[0].float().softmax(dim=-1)
        if not torch.isfinite(probabilities).all():
            raise splits.ImageError(f"{self.split.name(index)}: its prediction is not a number; the run may have diverged")
        weights = maps[model.sigmoid_layers[-1] - 1 - self.first][0, :, model.query_rows, -logits[-1].shape[-1]:]
        parts = (probabilities, logits[-1][0].sigmoid().mean(dim=(0, 1)).view(model.grid),
                 weights.mean(dim=(0, 1)).view(model.grid))
        return editing.Prediction(*(part.cpu().numpy() for part in parts))

    def predict(self, indices: list[int]) -> list[int]:
        """Return labels; editing.UNREADABLE for an image that cannot be read."""
        import torch

        from utils.attention.editor import session as editing
        from utils.data import splits

        pixels, labels = {}, dict.fromkeys(indices, editing.UNREADABLE)
        for index in indices:
            with contextlib.suppress(splits.ImageError):
                pixels[index] = self._seen(index)[0]
        if pixels:
            images = self._input(list(pixels.values()))
            with self.turn, torch.inference_mode():
                labels.update(zip(pixels, self.model(images).argmax(dim=-1).tolist()))
        return list(labels.values())


if __name__ == "__main__":
    process.run(main)
