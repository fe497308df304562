"""Edits what a model attends to, on a local web page: the edits teach it in the next training (train.py --attention_edits).

python annotate.py --checkpoint output/NAME starts it. This file introduces the model (models), the images (utils) and
the page (utils.editor, which alone needs requirements-annotate.txt) to each other.
Exit codes: 0 ended by Ctrl-C; 2 bad input, told in one line. A traceback is a bug of this program.
"""

import argparse
import contextlib
import functools
import os
import sys
import threading
from pathlib import Path

try:
    from utils.config import FLAGS, ConfigError
except ModuleNotFoundError as error:
    sys.exit(f"annotate.py: error: this Python lacks {error.name}: run .venv/bin/python annotate.py (bash train.sh makes it), "
             "or install requirements.txt")

RUNS = Path("output")
# What a published data set is called below --data.
PUBLISHED = {"cub200": "CUB_200_2011", "flowers102": "flowers-102", "oxford_pets": "oxford-iiit-pet", "mnist": "MNIST",
             "fashion_mnist": "FashionMNIST", "cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def main(argv: list[str]) -> int:
    with contextlib.suppress(KeyboardInterrupt):
        try:
            annotate(parse(argv))
        except ValueError as error:
            if type(error).__module__.partition(".")[0] not in ("configs", "models", "utils"):
                raise
            return tell(str(error))
        except OSError as error:               # the system's word on a file: no such folder, no permission, disk full
            if error.filename is None:
                raise
            return tell(f"{error.filename}: {error.strerror}")
    return 0


def tell(message: str) -> int:
    print(f"annotate.py: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ConfigError(f"{message} (python annotate.py --help lists the flags)")


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises ConfigError."""
    parser = Parser(prog="annotate.py", allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", help="a run folder (its best.pt, or else its newest checkpoint) or a checkpoint file "
                                             f"of a run (default: the newest run below {RUNS})")
    parser.add_argument("--data", help="a folder: train/ and val/ with class folders, class folders, or images without labels; "
                                       "or where the data set of the run lies now (default: the data set of the run)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="train",
                        help="which images: edits of those of train teach (default: %(default)s)")
    parser.add_argument("--edits", help="the folder that the edits are kept in (default: the one that the run learnt from "
                                        "(--attention_edits), or else edits in the run folder)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to serve at (default: %(default)s, this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free (default: %(default)s)")
    parser.add_argument("--who", default="", help="free text about who edits, kept with every edit")
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port}: must be 0 to 65535")
    if not args.host:
        raise ConfigError("--host is empty: 127.0.0.1 is this machine alone, 0.0.0.0 every address of it")
    return args


def annotate(args: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")      # as train.py; before PyTorch is loaded
    try:
        from utils.attention.editor import server
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise ConfigError(f"the editor needs {error.name}: pip install -r requirements-annotate.txt") from error
    path = find_checkpoint(args.checkpoint)
    settings = settings_of(path)
    taught = settings["attention_edits"]
    folder = Path(args.edits or (taught if taught and Path(taught).is_dir() else path.parent / "edits"))
    with server.listen(args.host, args.port) as listening:
        gallery = open_gallery(args, path, settings)
        folder.mkdir(parents=True, exist_ok=True)
        session = server.Session(gallery, folder, args.who)
        others = f" (with {session.others:,} file{'s' * (session.others > 1)} of other images)" if session.others else ""
        print(f"{server.announce(listening)}  {len(gallery.labels):,} images, {session.edited.sum():,} edited; "
              f"edits go to {folder}{others}; Ctrl-C stops", flush=True)
        server.serve(session, listening, args.host)


def find_checkpoint(given: str | None) -> Path:
    """The checkpoint file that is meant. Raises ConfigError or CheckpointError."""
    from utils.run import checkpoint
    from utils.run import folder as run_folder

    if given is None:
        runs = [folder for folder in RUNS.iterdir() if folder.is_dir()] if RUNS.is_dir() else []
        files = [file for folder in runs for file in (folder / checkpoint.BEST_FILE, *checkpoint.step_files(folder))
                 if file.is_file()]
        if not files:
            raise ConfigError(f"no run below {RUNS}: give --checkpoint, or train first (bash train.sh)")
        given = max(files, key=lambda file: file.stat().st_mtime).parent
    return Path(run_folder.weights_of(given))


def settings_of(path: Path) -> dict:
    import models

    settings = models.run_settings(path)
    if settings is None:
        raise ConfigError(f"{path} is no checkpoint of a run of train.py, whose classes and settings the editor needs: "
                                  "fine-tune it first, and give the run's folder")
    return {row.name: row.before for row in FLAGS.values()} | settings


def open_gallery(args: argparse.Namespace, path: Path, settings: dict):
    """-> editing.Gallery of the model at `path` and the images that are asked for."""
    import numpy as np

    import models
    from utils.attention import edits
    from utils.attention.editor import session as editing
    from utils.data import transforms

    model = models.load_model(path)
    if not model.sigmoid_layers:
        models.use_sigmoid_attention(model, "last")
        print(f"the model has softmax attention: layer {model.sigmoid_layers[-1]}, the last, shows sigmoid attention here, "
              "which without edits is the same; train.py --attention_edits does so too (a run with --sigmoid_attention all takes "
              "edits in every layer, which teaches more in deep models: MODEL_ZOO.md has figures)")
    split, classes, where = find_images(args.data, args.split, settings)
    if not len(split):
        raise ConfigError(f"--split {args.split}: {where} has no such images")
    if args.data is not None:
        warn_of_names(split, where, args.split, settings)
    place = {name: label for label, name in enumerate(model.classes)}
    table = np.array([place.get(name, editing.UNKNOWN) for name in classes] + [editing.UNKNOWN])      # -1: of no class
    labels = table[split.labels]
    if classes and not (labels >= 0).any():
        print(f"none of the classes of {where} is one of the model's: its images are shown without labels")
    transform = transforms.eval_transform(model.img_size, channels=model.config.in_channels,
                                       interpolation=settings["interpolation"], crop=settings["eval_crop"])
    viewer = Viewer(model, split, transform, functools.partial(
        transforms.eval_region, img_size=model.img_size, crop=settings["eval_crop"]))
    facts = [f"{settings['model_type']} of {path}", f"{args.split} images of {where}",
             f"edits act in layer {', '.join(map(str, model.sigmoid_layers))}; shown: layer {model.sigmoid_layers[-1]}, "
             "mean over heads"]
    return editing.Gallery(
        title=path.resolve().parent.name, facts=facts, classes=model.classes, labels=labels, grid=model.grid,
        img_size=model.img_size, name=split.name, checksum=functools.partial(edits.checksum, split),
        region=viewer.region, pixels=viewer.pixels, look=viewer.look, predict=viewer.predict)


def find_images(data: str | None, part: str, settings: dict):
    """-> (the split, names of its classes by label (none: without labels), what to call the data). Raises DataError."""
    from utils.data import datasets, image_files, prepared

    kind, folder = settings["dataset"], Path(settings["data_dir"])
    if data is not None:
        kind, folder = layout_of(Path(data), kind), Path(data)
    shares = {name: settings[name] for name in ("val_fraction", "test_fraction", "split_seed")}
    if kind != settings["dataset"]:
        shares |= {"val_fraction": 0.0, "test_fraction": 0.0}         # drawn from the run's own images, not from others
    if kind == "images":
        files = [(str(file), -1) for file in sorted(folder.iterdir()) if file.suffix.lower() in image_files.IMAGE_EXTENSIONS]
        return only_train(image_files.FileImages(files, folder), part), (), str(folder)
    if kind == "folder" and not (shares["test_fraction"] or any((folder / x).exists() for x in ("train", "val", prepared.FILE))):
        splits = image_files.folder(str(folder))
        return only_train(splits.train, part), splits.classes, str(folder)
    splits = datasets.load_splits(kind, str(folder), **shares)
    return getattr(splits, part), splits.classes, kind if kind == "digits" else f"{kind} in {folder}"


def warn_of_names(split, where: str, part: str, settings: dict) -> None:
    """Warns if no image has the name of one of the run's own data set, where that is at hand."""
    kind, folder = settings["dataset"], settings["data_dir"]
    if kind in PUBLISHED and not Path(folder, PUBLISHED[kind]).is_dir():
        return                                          # or it would be downloaded
    with contextlib.suppress(ValueError, OSError):
        own, _, place = find_images(None, part, settings)
        names = {own.name(index) for index in range(len(own))}
        if names and not any(split.name(index) in names for index in range(len(split))):
            print(f"warning: train.py finds edits by the image's name in the data set it trains on, and no image here "
                  f"({where}: {split.name(0)}) is called as one of the run's own ({place}: {own.name(0)})", file=sys.stderr)


def layout_of(folder: Path, own: str) -> str:
    """How to read a folder: as the data set of the run (`own`), "csv", "images" (without labels) or "folder"."""
    from utils.data import image_files

    if not folder.is_dir():
        raise ConfigError(f"no such folder: --data {folder}")
    if own in PUBLISHED and (folder / PUBLISHED[own]).is_dir():
        return own
    if (folder / "train.csv").is_file():
        return "csv"
    return "images" if any(file.suffix.lower() in image_files.IMAGE_EXTENSIONS for file in folder.iterdir()) else "folder"


def only_train(split, part: str):
    """Images that are not divided into splits are all to train on. Raises ConfigError if others are asked for."""
    if part != "train":
        raise ConfigError(f"--split {part}: the images are not divided into train/ and val/: leave --split out")
    return split


class Viewer:
    """What the model sees of the images, and makes of them. Used by several threads, which take turns at the model.

    An edit acts from the first layer of sigmoid attention on, mostly the last of all: what comes into it is kept, and the
    layers before it run once an image.
    """

    def __init__(self, model, split, transform, region_of):
        import torch

        from models import model_end
        from utils.data import transforms

        device, config = torch.device("cuda" if torch.cuda.is_available() else "cpu"), model.config
        self.model, self.split, self.transform, self.region_of = model.to(device), split, transform, region_of
        self._input = lambda pixels: transforms.normalise(torch.stack(pixels).to(device), config.mean, config.std)
        self.turn = threading.Lock()                   # hooks and edits hang on the model while it looks
        self.first = min(model.sigmoid_layers[0] - 1, len(model.blocks))
        self.rest = model_end.cut(self.model, self.first)
        self.seen, self.tokens, self.own = self._kept(64, self._seen), self._kept(32, self._tokens), self._kept(128, self._look)

    def _kept(self, count: int, make):
        """`make`(index), remembered until the file of the image is another."""
        from utils.attention import edits

        remembered = functools.lru_cache(count)(lambda index, checksum: make(index))
        return lambda index: remembered(index, edits.checksum(self.split, index))

    def _seen(self, index: int):
        """-> (uint8 tensor (C, height, width), region of the stored image). Raises ImageError."""
        image, _ = self.split[index]
        return self.transform(image), self.region_of((image.height, image.width))

    def region(self, index: int) -> tuple[float, float, float, float]:
        return self.seen(index)[1]

    def pixels(self, index: int):
        """-> uint8 array (height, width, 3), or (height, width) of a model of one channel"""
        return self.seen(index)[0].permute(1, 2, 0).squeeze(-1).numpy()

    def _tokens(self, index: int):
        from models import model_end

        images = self._input([self.seen(index)[0]])
        with self.turn:
            return model_end.tokens_before(self.model, self.first, images)

    def look(self, index: int, values=None, edited=None):
        """-> editing.Look, of the model by itself or under an edit, arrays (h, w). Raises ImageError."""
        return self.own(index) if edited is None else self._look(index, values, edited)

    def _look(self, index: int, values=None, edited=None):
        import torch

        import models
        from utils.attention.editor import session as editing
        from utils.data import splits

        model, tokens = self.rest, self.tokens(index)
        with self.turn, torch.inference_mode(), contextlib.ExitStack() as stack:
            logits = stack.enter_context(models.record_patch_logits(model))
            maps = stack.enter_context(models.record_attention(model))
            if edited is not None:
                stack.enter_context(models.edit_attention(model, torch.from_numpy(values)[None], torch.from_numpy(edited)[None]))
            probabilities = model(tokens)[0].float().softmax(dim=-1)
        if not torch.isfinite(probabilities).all():
            raise splits.ImageError(f"{self.split.name(index)}: what the model says of it is not a number; has its run diverged?")
        weights = maps[model.sigmoid_layers[-1] - 1 - self.first][0, :, model.query_rows, -logits[-1].shape[-1]:]
        parts = (probabilities, logits[-1][0].sigmoid().mean(dim=(0, 1)).view(model.grid),
                 weights.mean(dim=(0, 1)).view(model.grid))
        return editing.Look(*(part.cpu().numpy() for part in parts))

    def predict(self, indices: list[int]) -> list[int]:
        """-> labels; editing.UNREADABLE for an image that cannot be read"""
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
    sys.exit(main(sys.argv[1:]))
