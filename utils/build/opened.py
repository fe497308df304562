"""Opens a trained model: of a run, a checkpoint, any other file with its architecture, or a published name."""

import contextlib
import copy
import dataclasses
import functools
import json
import string
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch.utils.data import Dataset

from configs import MODELS
from models import ModelError, WeightsError, create_model
from models.base import ImageTransformer
from models.checkpoints import hub
from models.checkpoints.described import is_weights_folder
from models.checkpoints.load import check_finite
from models.checkpoints.opened import OpenedCheckpoint
from models.checkpoints.published import find_checkpoint, published_name, published_view, require_published
from models.create import check_weights_of_run, load_run_model
from models.match import match_row, model_name
from utils.config import ConfigError, before, model_named
from utils.config.adopt import VIEW
from utils.config.saved import SettingsError, check_settings
from utils.data import transforms
from utils.data.classes import ClassRule
from utils.data.datasets import data_name, imagenet_names, splits_of
from utils.data.layouts import HELD_OUT
from utils.data.loader import default_workers, eval_loader
from utils.data.reading import FIND, Reading
from utils.distributed import Ranks
from utils.files import where_looked
from utils.run.checkpoint import BEST_FILE, CheckpointError
from utils.run.folder import CONFIG_FILE, resolve_checkpoint
from utils.training.evaluation import EvalMetrics, evaluate
from utils.training.precision import apply_matmul_precision, choose

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED_MODEL, EMBEDDED = "ViT-Nano_2", "assets/ViT-Nano_2-letters.npz"
NO_RUN = before() | vars(FIND)         # settings of a model that no run has trained


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model in eval mode, with how it sees images and what its outputs mean."""

    model: ImageTransformer
    classes: tuple[str, ...]
    settings: dict                    # of its run, or the defaults
    title: str
    has_data: bool                    # the settings name the data set of a run
    path: Path | None = None          # None: the embedded model
    named: bool = True                # the names of the classes come from the file, and are not numbers or ImageNet's
    has_head: bool = True             # else the model has one class without a meaning
    note: str = ""                    # behind the title: which file of a run folder was taken, where that is not best.pt

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @functools.cached_property
    def transform(self) -> Callable:
        """PIL image -> uint8 (C, height, width), as the model was evaluated"""
        return eval_transform(self.model, self.settings)

    @property
    def reading(self) -> Reading:
        """Return how an image file is read for the model; fields are "auto" if no run set them."""
        return Reading.of(self.settings)

    def split(self, name: str | None = None) -> tuple[str, Dataset, tuple[str, ...]]:
        """-> (the split's name, its images, the names of their classes) of the data set of its run.

        name: train, val or test; None: what the run was tested on. Where one split is both val and test, either name gives it,
        under the name that the data have for it, and a note says so. Raises ConfigError or DataError.
        """
        run = self.settings
        rule = ClassRule(run["class_order"], tuple(self.classes) if self.path else (), partly=True)
        splits = splits_of(run, rule=rule, need=HELD_OUT)
        no_test = splits.val is splits.test and not (splits.val_is_test and len(splits.train))
        if no_test and name == "test":
            raise ConfigError("--split test: the run's data have no test set, and best.pt was chosen on val: --split val")
        asked, name = name, name or ("val" if no_test or run["test"] == "never" else "test")
        if name != "train" and splits.val is splits.test:
            name = splits.val_name                  # the only held-out split, which older runs called "test" in any case
        if asked not in (None, name):
            print(f"note: this run's only held-out split is called {name}: --split {asked} means it", file=sys.stderr)
        images = {"train": splits.train, "val": splits.val, "test": splits.test}[name]
        if not len(images):
            raise ConfigError(f"--split {name}: the run's data have no {name} images now")
        return name, images, tuple(splits.classes)

    def evaluate(self, images: Dataset) -> EvalMetrics:
        """Evaluate the images as the run does, in its precision and with its mirror images; with `confusion` and `answers`.

        Runs on the device of the model, in this process only. Raises ImageError.
        """
        run, device = self.settings, next(self.model.parameters()).device
        precision, _ = choose(run["precision"], run["fp16_opt_level"], device)
        apply_matmul_precision(precision)
        loader = eval_loader(images, transform=self.transform, batch_size=run["eval_batch_size"], rank=0, world_size=1,
                             pin_memory=device.type == "cuda", num_workers=default_workers(run["dataset"], 1, device.type),
                             device=device, cached_workers=0)
        normalize = functools.partial(transforms.normalize, mean=self.model.config.mean, std=self.model.config.std,
                                      dtype=precision.weights)
        model = self.model
        if next(model.parameters()).dtype != precision.weights:
            model = copy.deepcopy(model).to(precision.weights)            # self.model keeps its unrounded weights
        return evaluate(model, loader, normalize, precision, Ranks(0, 1, 0, 1, device), len(self.classes), confusion=True,
                        flipped=run["tta"] == "flip", filled=True, answers=True)

    @property
    def region(self) -> Callable[[tuple[int, int]], tuple[float, float, float, float]]:
        """(height, width) of an image -> the part of it that the transform shows to the model"""
        return functools.partial(transforms.eval_region, img_size=self.model.img_size, crop=self.settings["eval_crop"])


def eval_transform(model: ImageTransformer, settings: dict) -> Callable:
    return transforms.eval_transform(model.img_size, channels=model.config.in_channels, interpolation=settings["interpolation"],
                                     crop=settings["eval_crop"])


@contextlib.contextmanager
def given_by(flag: str, file: OpenedCheckpoint | None = None) -> Iterator[None]:
    """Raise ConfigError, "FLAG: ...", if the weights of that flag cannot be used. If numbers of the open file are not finite,
    the message says that, whatever else is wrong."""
    try:
        yield
    except (ModelError, CheckpointError, SettingsError) as error:
        cause = error
        if file is not None:
            try:
                check_finite(file)
            except ModelError as worse:
                cause = worse
        raise ConfigError(f"{flag}: {cause}") from cause


def find_weights(what: str | Path) -> Path:
    """Return the file of a path or published name: of a run folder its best checkpoint, of a folder of timm or transformers its
    weights. Raises WeightsError or CheckpointError."""
    if not Path(what).exists():
        try:
            require_published(what)
        except WeightsError as error:
            raise WeightsError(f"{error}{where_looked(what)}") from error
    return find_checkpoint(what if is_weights_folder(what) else resolve_checkpoint(what))


def open_checkpoint(path: Path) -> OpenedCheckpoint:
    """Open the file; of a run of this program its settings and the shapes of its weights are checked.

    Raises WeightsError or ConfigError.
    """
    opened = OpenedCheckpoint(path)
    if opened.settings is not None:
        with contextlib.ExitStack() as stack:
            stack.callback(opened.close)
            check_settings(opened.settings, path)
            check_weights_of_run(opened)
            stack.pop_all()
    return opened


def preferred_row(what: str) -> str:
    """Return the beginning of the row's name that a published name means, for files whose shapes fit several rows."""
    if Path(what).exists():
        return ""
    folder = (published_name(what) or "").partition("/")[0]
    return {"deit": "DeiT-", "mae": "MAE-"}.get(folder) or hub.model_of(published_name(what) or "") or ""


def open_model(what: str | Path | None, *, model_type: str | None = None, img_size: int | tuple[int, int] | None = None,
               num_heads: int | None = None, classifier: str | None = None, interpolation: str | None = None,
               eval_crop: float | None = None, mean: tuple | None = None, std: tuple | None = None,
               heads_if_unknown: int | None = None, flag: str = "--checkpoint") -> Opened:
    """Open a run folder, a checkpoint file of a run, any other file, folder or published name; None: the embedded model.

    model_type, and img_size to std: for a file that is not of a run, in place of what it says.
    heads_if_unknown: num_heads where the file does not say. flag: the flag or argument that named the model, for messages.
    Raises ConfigError.
    """
    view = {name: value for name, value in (("interpolation", interpolation), ("eval_crop", eval_crop)) if value is not None}
    typed = {name: value for name, value in (("model_type", model_named(model_type, hub)), ("img_size", img_size), (
        "num_heads", num_heads), ("classifier", classifier), ("mean", mean), ("std", std)) if value is not None}
    with contextlib.ExitStack() as stack:
        file = None
        if what is not None:
            with given_by(flag):
                file = stack.enter_context(open_checkpoint(find_weights(what)))
        if (typed or view) and (file is None or file.settings is not None):
            raise ConfigError("--model_type, --img_size, --num_heads, --classifier, --interpolation, --eval_crop, --mean and "
                              f"--std only have an effect with a {flag} that is not one of your runs: a run has its own. "
                              "Omit them")
        if file is None:
            title = "embedded ViT-Nano_2, which was trained on letters and has never seen a digit"
            model = create_model(EMBEDDED_MODEL, pretrained=ROOT / EMBEDDED, head="keep").eval()
            return Opened(model, tuple(string.ascii_uppercase), NO_RUN | {"dataset": "digits"}, title, True)
        with given_by(flag, file):
            return (of_run(file, Path(what).is_dir()) if file.settings is not None else
                    _of_other(file, str(what), typed, view, heads_if_unknown, flag))


def model_and_data(run: Mapping, row: Mapping) -> str:
    """Return "MODEL on DATA" of a run's settings and its model's row."""
    return f"{model_name(run['model_type'], row)} on {data_name(run['dataset'], run['data_dir'])}"


def title_of_run(folder: Path) -> str:
    """Return model_and_data of the run in the folder, by its config.json; "" if that is missing or damaged."""
    try:
        said = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return model_and_data(said["config"], said["architecture"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def of_run(file: OpenedCheckpoint, by_folder: bool = False) -> Opened:
    """Open the model of a run. by_folder: the run folder was given, not the file."""
    model, run = load_run_model(file), file.settings
    name, step = run.get("name") or file.path.parent.name, file.file.run["step"]
    title = f"{model_and_data(run, model.config)}, run {name}, step {step}"
    note = f" (its newest checkpoint: it has no {BEST_FILE})" if by_folder and file.path.name != BEST_FILE else ""
    return Opened(model, tuple(model.classes), before() | run, title, True, file.path, note=note)


def _of_other(file: OpenedCheckpoint, what: str, typed: dict, view: dict, heads_if_unknown: int | None, flag: str) -> Opened:
    """Open the model of the file, or the one that is typed; with one class if the file has no head."""
    name, keys = typed.get("model_type"), {"num_heads": typed["num_heads"]} if "num_heads" in typed else {}
    size = typed.get("img_size", file.row.get("img_size") if name is None else None)
    if name is None:
        name, keys = match_row(file, preferred_row(what), typed.get("num_heads"))
        if "hidden_size" in keys and "num_heads" not in keys:
            if heads_if_unknown is None:
                other = (" (of the student, and of such a teacher), or fine-tune it first, and give the run's folder"
                         if flag == "--teacher" else "")
                raise ConfigError(f"{flag} {what}: its sizes ({file.layout.describe()}) are those of no known model, and it "
                                  f"does not say how many attention heads it has. Add --num_heads{other}")
            keys["num_heads"] = heads_if_unknown
    keys |= {key: typed[key] for key in ("classifier", "mean", "std") if key in typed}
    has_head = file.layout.has("head.weight")
    model = create_model(name, None if has_head else 1, size, file, "keep" if has_head else "zero", **keys).eval()
    names = file.class_names
    model.classes = names or (imagenet_names() if model.num_classes == 1000 else
                              [f"class {number}" for number in range(model.num_classes)] if has_head else ["no head"])
    of_ours = (file.file.described.card or {}).get("model", {}).get("architecture")             # shapes may be those of others
    title = f"{model_name(of_ours if of_ours in MODELS and 'model_type' not in typed else name, model.config)}, {what}"
    own = {"model_type": name} | {key: MODELS[name][key] for key in VIEW}
    settings = NO_RUN | own | published_view(file.path) | file.view | view
    for key, words in file.untaken.items():
        if key not in view and flag != "--teacher":                  # a teacher sees the student's images
            print(f"warning: {what}: its config.json describes images as no flag can ({words}): here --{key} is {settings[key]}",
                  file=sys.stderr)
    return Opened(model, tuple(model.classes), settings, title, False, file.path, names is not None, has_head)
