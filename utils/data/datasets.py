"""The table of data sets, each as it was published. To add one, name it in configs.DATASETS, and add a function and its row in
DATASETS here.

Sources: CUB-200-2011 (Wah et al., Caltech CNS-TR-2011-001), Oxford 102 Flowers (Nilsback and Zisserman 2008), Oxford-IIIT Pets
(Parkhi et al. 2012); cifar_files.py and idx_files.py have theirs. torchvision downloads; the files are read here, and no size
or count in them is trusted.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from utils import launch

from . import classes, overlap, prepared
from .cifar_files import cifar
from .class_folders import check_layout, folder
from .classes import ClassRule
from .csv_lists import csv_lists, lists_in
from .csv_tables import text_lines
from .downloads import download, torchvision_dataset
from .idx_files import mnist
from .image_files import existing_images, shown
from .layouts import ANYTHING, BY_DEFAULT, HELD_OUT, HOLD_OUT, TRAIN, Request
from .reading import FIND, Reading
from .splits import ArrayImages, DataError, Splits, Strata, abbreviate, by_class, check, draw_test, hold_out
from .survey import read_as

DIGITS_FILE = Path(__file__).parents[2] / "assets" / "digits.npz"
MAX_MAT_BYTES = 1 << 20          # the flowers' are 15 kB and less
CUB_SOURCE = "https://data.caltech.edu/records/65de6-vp158"
FLOWERS_SOURCE = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
PETS_SOURCE = "https://www.robots.ox.ac.uk/~vgg/data/pets/"


def digits(data_dir: str) -> Splits:
    """1,797 digits of 8 x 8 px shipped with the code (assets/README.md). Split by order, which keeps writers apart."""
    with np.load(DIGITS_FILE, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    images = np.round(images * (255 / 16)).astype(np.uint8)       # stored as 0..16
    train, val, test = (ArrayImages(images[part], labels[part], name) for name, part in (
        ("train", slice(0, 1097)), ("val", slice(1097, 1297)), ("test", slice(1297, None))))
    return Splits(train, val, test, "val", tuple("0123456789"), can_flip=False)


# ------------------------------------------------------------------------------------------- images and lists


def _find_folder(data_dir: str, name: str, *contents: str) -> Path | None:
    """Return DATA_DIR/NAME or DATA_DIR, whichever holds all the contents; or None."""
    places = (Path(data_dir) / name, Path(data_dir))
    return next((place for place in places if all((place / content).exists() for content in contents)), None)


def _find_or_download(kind: type, data_dir: str, name: str, contents: tuple[str, ...], files: str,
                      archives: tuple[str, ...]) -> Path:
    """Return the folder of the contents; if there is none, torchvision's data set `kind` is downloaded there. files: the archives
    and where they are published; archives: their names."""
    root = _find_folder(data_dir, name, *contents)
    if root is None:
        root = Path(data_dir) / name
        download(kind, data_dir, f"fetch {files}, and unpack into {root}", [root / archive for archive in archives])
    return root


def cub200(data_dir: str) -> Splits:
    """CUB-200-2011: 11,788 photographs of 200 bird species, with its own split (5,994 and 5,794)."""
    lists = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    root = _find_folder(data_dir, "CUB_200_2011", "images", *lists)
    if root is None:
        archive = Path(data_dir) / "CUB_200_2011.tgz"
        if archive.is_file():
            raise DataError(f"CUB-200-2011 is packed in {archive}: unpack it there (tar xzf {archive} -C {data_dir})")
        raise DataError(f"CUB-200-2011 is not in {data_dir}: fetch CUB_200_2011.tgz from {CUB_SOURCE} and unpack it there, "
                        f"so that {Path(data_dir) / 'CUB_200_2011'} holds images/, {', '.join(lists)}")
    paths, labels, in_train, names = (_numbered_lines(root / name, name in lists[1:3]) for name in lists)
    for name, values in zip(lists[1:3], (labels, in_train)):
        if paths.keys() != values.keys():
            raise DataError(f"{root / name} lists other images than {lists[0]}: the files are damaged")
    for number, value in in_train.items():
        if value not in ("0", "1"):
            raise DataError(f"{root / lists[2]}: image {number} has {value}, not 0 or 1: the file is damaged")
    if sorted(names) != list(range(1, 201)):
        raise DataError(f"{root / 'classes.txt'} does not hold the classes 1 to 200: the file is damaged")
    images = []
    for wanted in (1, 0):
        chosen = [number for number in paths if int(in_train[number]) == wanted]
        samples = [(str(root / "images" / paths[number]), int(labels[number]) - 1) for number in chosen]
        images.append(existing_images(samples, root, lambda position: str(root / lists[0])))
    birds = tuple(names[number].partition(".")[2].replace("_", " ") for number in sorted(names))      # 001.Black_footed_...
    return Splits(images[0], images[1], images[1], "test", birds)


def _numbered_lines(file: Path, of_numbers: bool) -> dict[int, str]:
    """Read the lines 'number value' of a file, by number. of_numbers: the values are numbers too."""
    found = {}
    for number, line in text_lines(file):
        key, _, value = line.partition(" ")
        if not _is_number(key) or int(key) in found or not (_is_number(value.strip()) if of_numbers else value.strip()):
            raise DataError(f"{file}:{number}: not a new number and a {'number' if of_numbers else 'value'}: the file is damaged")
        found[int(key)] = value.strip()
    return found


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10           # int() refuses thousands of digits, and labels are 64 bits


def flowers102(data_dir: str) -> Splits:
    """Oxford 102 Flowers as the ViT paper uses it: the published training and validation images (1,020 each) to train on."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError("flowers102: its lists are MATLAB files, which need scipy. Install it: "
                        f"{launch.command_to_install('scipy')}") from error
    contents = ("jpg", "setid.mat", "imagelabels.mat")
    kind = torchvision_dataset("Flowers102")
    root = _find_or_download(kind, data_dir, "flowers-102", contents,
                             f"102flowers.tgz, {contents[1]} and {contents[2]} from {FLOWERS_SOURCE}", ("102flowers.tgz",))
    labels = _numbers(loadmat, root / contents[2], "labels") - 1
    published = [_numbers(loadmat, root / contents[1], name) for name in ("trnid", "valid", "tstid")]
    every = np.concatenate(published)
    if every.max() > len(labels) or len(np.unique(every)) != len(every):
        raise DataError(f"{root / contents[1]}: an image is listed twice or has no label in {contents[2]}: damaged")
    train, test = (
        existing_images([(str(root / "jpg" / f"image_{number:05d}.jpg"), int(labels[number - 1])) for number in numbers.tolist()],
                        root, lambda position: str(root / contents[1]))
        for numbers in (np.concatenate(published[:2]), published[2]))
    return Splits(train, test, test, "test", tuple(kind.classes))


def _numbers(loadmat: Callable, file: Path, variable: str) -> np.ndarray:
    """Read a variable of a MATLAB file: whole numbers from 1, as int64 (n,)."""
    if file.stat().st_size > MAX_MAT_BYTES:
        raise DataError(f"{file}: {file.stat().st_size:,} bytes, more than the published file has: fetch it again")
    try:
        values = np.asarray(loadmat(file, variable_names=[variable])[variable]).ravel()
    except Exception as error:              # scipy raises many kinds for a damaged file
        raise DataError(f"{file}: cannot be read ({' '.join(str(error).split())}); fetch it again") from error
    if values.dtype.kind not in "iuf" or not len(values) or not (values == values.round()).all() or values.min() < 1:
        raise DataError(f"{file}: {variable} should hold whole numbers from 1; fetch it again")
    return values.astype(np.int64)


def oxford_pets(data_dir: str) -> Splits:
    """Oxford-IIIT Pets: 37 breeds; 3,680 images to train on (trainval) and 3,669 to test."""
    lists = [os.path.join("annotations", name) for name in ("trainval.txt", "test.txt")]
    root = _find_or_download(torchvision_dataset("OxfordIIITPet"), data_dir, "oxford-iiit-pet", ("images", *lists),
                             f"images.tar.gz and annotations.tar.gz from {PETS_SOURCE}", ("images.tar.gz", "annotations.tar.gz"))
    names, images = {}, []
    for file in (root / name for name in lists):
        samples = []
        for number, line in text_lines(file):
            image, _, rest = line.partition(" ")
            label = rest.partition(" ")[0]
            if not _is_number(label) or not 1 <= int(label) <= 37:
                raise DataError(f"{file}:{number}: not an image's name and its class (1 to 37): the file is damaged")
            breed = image.rpartition("_")[0].replace("_", " ")
            if names.setdefault(int(label), breed) != breed:
                raise DataError(f"{file}:{number}: class {label} is {names[int(label)]} elsewhere: the file is damaged")
            samples.append((str(root / "images" / f"{image}.jpg"), int(label) - 1))
        images.append(existing_images(samples, root, lambda position, file=file: str(file)))
    if len(names) != 37:
        raise DataError(f"{root / 'annotations'}: {len(names)} breeds, not 37: the files are damaged")
    return Splits(images[0], images[1], images[1], "test", tuple(names[label] for label in sorted(names)))


# --------------------------------------------------------------------------------------------------- the table

# configs.DATASETS has the same names. Those of OWN_CLASSES, whose classes the user names, also take a Request.
OWN_CLASSES = ("imagenet", "folder", "csv")
DATASETS: dict[str, Callable[..., Splits]] = {
    "digits": digits,
    "cifar10": lambda data_dir: cifar("CIFAR10", data_dir),
    "cifar100": lambda data_dir: cifar("CIFAR100", data_dir),
    "mnist": lambda data_dir: mnist("MNIST", data_dir, can_flip=False),
    "fashion_mnist": lambda data_dir: mnist("FashionMNIST", data_dir, can_flip=True),
    "imagenet": lambda data_dir, request: folder(data_dir, request, synsets=1000),
    "cub200": cub200,
    "flowers102": flowers102,
    "oxford_pets": oxford_pets,
    "folder": folder,
    "csv": csv_lists,
}
NAMED_BY_FOLDER = ("folder", "csv")
PUBLISHED_FILES = ("imagenet", "cub200", "flowers102", "oxford_pets")


def data_name(dataset: str, data_dir: str) -> str:
    """Return the name of a published data set, or of the folder that holds images of the user's own."""
    own = os.path.basename(os.path.abspath(data_dir)) if dataset in NAMED_BY_FOLDER else ""
    return shown(own) or dataset


def run_stem(dataset: str, data_dir: str) -> str:
    """Return data_name in the letters that a run's name may have: the first run without a name is called so, the next ...-2."""
    letters = unicodedata.normalize("NFKD", data_name(dataset, data_dir)).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._+]+", "-", letters).strip("-.")[:60] or dataset


def columns_of(settings: Mapping) -> dict:
    """Return the settings of a run that say how a list is read, as open_splits and layouts.Request take them."""
    return {name: settings.get(name) for name in ("path_column", "label_column", "image_dir")}


def own_splits(dataset: str, data_dir: str, request: Request = BY_DEFAULT, reading: Reading = FIND) -> Splits:
    """Open the data set's own splits: as published, or prepared from those (prepared.py). Raises DataError.

    reading: how its files are read. EXIF "auto" follows it, except in published sets: their published results come from readers
    (torchvision, timm) that do not.
    """
    own_classes = dataset in OWN_CLASSES
    if dataset != "digits" and prepared.is_prepared(data_dir):
        splits = prepared.load(data_dir, dataset, reading)
    else:
        splits = DATASETS[dataset](data_dir, request) if own_classes else DATASETS[dataset](data_dir)
        splits = read_as(splits, reading, follow_exif=dataset not in PUBLISHED_FILES)
        if own_classes:
            return splits
    return classes.apply(request.classes, splits, _location(dataset, data_dir), sort=own_classes)


def _location(dataset: str, data_dir: str) -> str:
    return f"{dataset} in {data_dir}" if data_dir and dataset != "digits" else dataset


def open_splits(dataset: str, data_dir: str, *, val_fraction: float = 0.0, test_fraction: float = 0.0,
                split_seed: int = 0, strata: Strata = by_class, rule: ClassRule = classes.BY_DEFAULT,
                need: str = TRAIN, reading: Reading = FIND, **columns: str | None) -> Splits:
    """Open the data set's own splits, or draw shares of them by `split_seed`, evenly over the strata (those of a task).

    test_fraction: this share of all images together becomes the test set. val_fraction: this share of the training images
    becomes the validation set. Neither has an effect on data without training images (need=layouts.HELD_OUT: to evaluate on).
    columns: see columns_of. `reading` as in own_splits; the result has the `reading` that was found, and `notes` about it.
    Raises DataError if the data are missing or do not fit together.
    """
    splits = own_splits(dataset, data_dir, Request(rule, val_fraction, test_fraction, need, **columns), reading)
    location = _location(dataset, data_dir)
    if not len(splits.train) and need == HELD_OUT:
        check(splits, location, trains=False)
        drawn = ["all images are evaluated: there is no train to draw a fraction from"]
        return splits.replace(*drawn * bool(val_fraction or test_fraction), *without_images(splits, need))
    unclear = {}
    if (test_fraction or val_fraction) and dataset in OWN_CLASSES and rule.order is not None:       # None: a run from before
        splits, unclear = overlap.each_file_once(splits, bool(test_fraction), "rows" if dataset == "csv" else "images")
    if test_fraction:
        splits = draw_test(splits, test_fraction, split_seed, strata)
    if val_fraction:
        splits = hold_out(splits, val_fraction, split_seed, strata)
    splits = splits.replace(*overlap.drawn_from_trained(splits, unclear))
    if not len(splits.test) and need != ANYTHING:
        seen = f" of its {len(splits.train):,} images ({'; '.join(splits.notes)})" if splits.notes else ""
        raise DataError(f"{location}: nothing is held out{seen}. Add {HOLD_OUT}")
    check(splits, location, trains=need == TRAIN, kept=bool(rule.wanted))
    return splits.replace(*without_images(splits, need))


def check_own_layout(settings: Mapping, need: str = TRAIN) -> None:
    """Raise DataError if the folder of a data set of the user's own lacks what open_splits needs, as far as the names in it show.
    Opens no file."""
    dataset, data_dir = settings["dataset"], settings["data_dir"]
    if dataset not in OWN_CLASSES or prepared.is_prepared(data_dir):
        return
    if dataset == "csv":
        lists_in(data_dir, need)
    else:
        rule, shares = ClassRule(settings["class_order"]), (settings["val_fraction"], settings["test_fraction"])
        check_layout(data_dir, Request(rule, *shares, need))


def splits_of(settings: Mapping, **others) -> Splits:
    """Call open_splits with the settings of a run; `others` are arguments that replace them."""
    named = {name: settings[name] for name in ("dataset", "data_dir", "val_fraction", "test_fraction", "split_seed")}
    return open_splits(**{**named, "rule": ClassRule(settings["class_order"]), "reading": Reading.of(settings),
                          **columns_of(settings), **others})


def without_images(splits: Splits, need: str) -> Iterator[str]:
    """Yield a warning for each held-out split that lacks images of some classes."""
    for name, split in splits.held_out.items():
        missing = np.flatnonzero(np.bincount(split.targets, minlength=len(splits.classes)) == 0)
        if len(missing) and (need == TRAIN or split is splits.test):
            yield (f"warning: {name} has no images of {len(missing):,} of the {len(splits.classes):,} classes: "
                   f"{abbreviate(splits.classes[label] for label in missing)}")


def imagenet_names() -> tuple[str, ...]:
    """Return the names of ImageNet's 1000 classes (ILSVRC 2012) as torchvision spells them, in the order of published heads.

    A few occur twice, such as "crane", the bird and the machine.
    """
    from torchvision.models import ViT_B_16_Weights

    return tuple(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"])
