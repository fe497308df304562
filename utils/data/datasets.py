"""The table of data sets, each as it was published: to add one, name it in configs.DATASETS, and write a function with its row of
DATASETS here.

Sources: CIFAR (Krizhevsky 2009), MNIST (LeCun et al.), Fashion-MNIST (arXiv 1708.07747), CUB-200-2011 (Wah et al.,
Caltech CNS-TR-2011-001), Oxford 102 Flowers (Nilsback and Zisserman 2008), Oxford-IIIT Pets (Parkhi et al. 2012).
torchvision downloads; the files are read here, and no size or count in them is trusted.
"""

import gzip
import http.client
import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import prepared
from .class_folders import folder
from .csv_lists import csv_lists, text_lines
from .image_files import existing_images
from .reading import FIND, Reading
from .splits import ArrayImages, DataError, Splits, Strata, abbreviate, by_class, check, draw_test, hold_out
from .survey import read_as

DIGITS_FILE = Path(__file__).parents[2] / "assets" / "digits.npz"
MAX_IDX_BYTES = 1 << 30          # unpacked; the largest of the MNIST family is half of it
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


def _torchvision(name: str) -> type:
    """torchvision's data set of this name. Imported here: torchvision takes longer to import than PyTorch."""
    from torchvision import datasets

    return getattr(datasets, name)


def cifar(name: str, data_dir: str) -> Splits:
    kind = _torchvision(name)
    place = Path(data_dir) / kind.filename
    train, test = (_download(kind, data_dir, f"fetch {kind.url} on another machine and put it at {place}", train=part)
                   for part in (True, False))
    arrays = [ArrayImages(split.data, split.targets, part) for part, split in (("train", train), ("test", test))]
    return Splits(arrays[0], arrays[1], arrays[1], "test", tuple(train.classes))


def _download(kind: type, data_dir: str, advice: str, **arguments):
    """torchvision's data set, downloaded unless it is present. Raises DataError, which ends with the advice."""
    try:
        return kind(data_dir, download=True, **arguments)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise DataError(f"{kind.__name__} is not in {data_dir} and cannot be downloaded ({reason}); {advice}") from error


# ------------------------------------------------------------------------------------------------ MNIST family


IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def mnist(name: str, data_dir: str, can_flip: bool) -> Splits:
    """The four published idx files, packed or not, in DATA_DIR/MNIST/raw (as torchvision; or FashionMNIST) or in DATA_DIR."""
    kind = _torchvision(name)
    places = (Path(data_dir) / kind.__name__ / "raw", Path(data_dir))
    files = _idx_files(places[0]) or _idx_files(places[1])
    if not files:
        names = ", ".join(name for name, _ in kind.resources)
        _download(kind, data_dir, f"fetch {names} from {kind.mirrors[0]} on another machine and put them into {places[0]}")
        files = _idx_files(places[0])
    arrays = []
    for part, (images_file, labels_file) in (("train", files[:2]), ("test", files[2:])):
        images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
        if len(images) != len(labels):
            raise DataError(f"{images_file} has {len(images)} images, {labels_file} {len(labels)} labels: not of one data set")
        arrays.append(ArrayImages(images, labels, part))
    classes = tuple(name.partition(" - ")[0] for name in kind.classes)                # "7 - seven" of MNIST
    return Splits(arrays[0], arrays[1], arrays[1], "test", classes, can_flip)


def _idx_files(place: Path) -> list[Path]:
    """Images and labels to train, images and labels to test on; [] if there are none. Packed files first: they alone have a
    checksum. Raises DataError if some are missing."""
    found = {name: file for name in IDX_FILES for file in (place / name, place / f"{name}.gz") if file.is_file()}
    if found and len(found) < 4:
        raise DataError(f"{place} lacks {abbreviate(set(IDX_FILES) - set(found))} (.gz or unpacked): put them there too")
    return list(found.values())


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Read an idx file (LeCun's format: 0, 0, type, dimensions, big-endian sides, data) -> uint8 array. Raises DataError.

    No more is read or unpacked than the header claims, and that must fit the file.
    """
    size, header = file.stat().st_size, 4 + 4 * dimensions
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            start = stream.read(header)
            if len(start) < header or start[:4] != bytes((0, 0, 8, dimensions)):
                raise DataError(f"{file}: not an idx file of bytes in {dimensions} dimensions")
            shape = struct.unpack(f">{dimensions}I", start[4:])
            count = math.prod(shape)
            # Deflate packs to no less than 1/1032 (zlib's documentation).
            possible = count <= size * 1032 if file.suffix == ".gz" else header + count == size
            claim = f"{file}: its header claims {' x '.join(map(str, shape))} bytes"
            if not 0 < count <= MAX_IDX_BYTES or not possible:
                raise DataError(f"{claim}, which does not fit its {size:,} bytes; delete it to have it downloaded again")
            data = stream.read(count + 1)         # one more, so that gzip compares its checksum at the end
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: damaged or cut off ({error}); delete it to have it downloaded again") from error
    if len(data) != count:
        raise DataError(f"{claim}, but it holds {'more' if len(data) > count else 'fewer'}; delete it to have it "
                        "downloaded again")
    return np.frombuffer(data, np.uint8).reshape(shape)


# ------------------------------------------------------------------------------------------- images and lists


def _find_folder(data_dir: str, name: str, *contents: str) -> Path | None:
    """DATA_DIR/NAME or DATA_DIR itself, whichever holds all the contents; or None."""
    places = (Path(data_dir) / name, Path(data_dir))
    return next((place for place in places if all((place / content).exists() for content in contents)), None)


def _find_or_download(kind: type, data_dir: str, name: str, contents: tuple[str, ...], files: str) -> Path:
    """The folder of the contents; torchvision's data set `kind` is downloaded there if there is none. files: its packed ones."""
    root = _find_folder(data_dir, name, *contents)
    if root is None:
        root = Path(data_dir) / name
        _download(kind, data_dir, f"fetch {files}, and unpack into {root}")
    return root


def cub200(data_dir: str) -> Splits:
    """CUB-200-2011: 11,788 photographs of 200 bird species, with its own split (5,994 and 5,794)."""
    lists = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    root = _find_folder(data_dir, "CUB_200_2011", "images", *lists)
    if root is None:
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
    classes = tuple(names[number].partition(".")[2].replace("_", " ") for number in sorted(names))    # 001.Black_footed_...
    return Splits(images[0], images[1], images[1], "test", classes)


def _numbered_lines(file: Path, of_numbers: bool) -> dict[int, str]:
    """The lines 'number value' of a file, by number. of_numbers: the values are numbers too."""
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
        raise DataError("flowers102: its lists are MATLAB files, which takes scipy to read: pip install scipy") from error
    contents = ("jpg", "setid.mat", "imagelabels.mat")
    kind = _torchvision("Flowers102")
    root = _find_or_download(kind, data_dir, "flowers-102", contents,
                             f"102flowers.tgz, {contents[1]} and {contents[2]} from {FLOWERS_SOURCE}")
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
        raise DataError(f"{file}: {file.stat().st_size:,} bytes are more than it should have: fetch it again")
    try:
        values = np.asarray(loadmat(file, variable_names=[variable])[variable]).ravel()
    except Exception as error:              # scipy lets many kinds out of a damaged file
        raise DataError(f"{file}: cannot be read ({' '.join(str(error).split())}); fetch it again") from error
    if values.dtype.kind not in "iuf" or not len(values) or not (values == values.round()).all() or values.min() < 1:
        raise DataError(f"{file}: {variable} should hold whole numbers from 1; fetch it again")
    return values.astype(np.int64)


def oxford_pets(data_dir: str) -> Splits:
    """Oxford-IIIT Pets: 37 breeds; 3,680 images to train on (trainval) and 3,669 to test."""
    lists = [os.path.join("annotations", name) for name in ("trainval.txt", "test.txt")]
    root = _find_or_download(_torchvision("OxfordIIITPet"), data_dir, "oxford-iiit-pet", ("images", *lists),
                             f"images.tar.gz and annotations.tar.gz from {PETS_SOURCE}")
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

# configs.DATASETS has the same names.
DATASETS: dict[str, Callable[[str], Splits]] = {
    "digits": digits,
    "cifar10": lambda data_dir: cifar("CIFAR10", data_dir),
    "cifar100": lambda data_dir: cifar("CIFAR100", data_dir),
    "mnist": lambda data_dir: mnist("MNIST", data_dir, can_flip=False),
    "fashion_mnist": lambda data_dir: mnist("FashionMNIST", data_dir, can_flip=True),
    "imagenet": lambda data_dir: folder(data_dir, classes_wanted=1000),
    "cub200": cub200,
    "flowers102": flowers102,
    "oxford_pets": oxford_pets,
    "folder": folder,
    "csv": csv_lists,
}
PUBLISHED_FILES = ("imagenet", "cub200", "flowers102", "oxford_pets")


def own_splits(dataset: str, data_dir: str, reading: Reading = FIND) -> Splits:
    """Open the data set's own splits: as published, or prepared from those (prepared.py). Raises DataError.

    reading: how its files are read. Where EXIF is "auto", it is followed but in published sets, whose published results come from
    readers (torchvision, timm) that do not follow it.
    """
    if dataset != "digits" and prepared.is_prepared(data_dir):
        return prepared.load(data_dir, dataset, reading)
    return read_as(DATASETS[dataset](data_dir), reading, follow_exif=dataset not in PUBLISHED_FILES)


def open_splits(dataset: str, data_dir: str, *, val_fraction: float = 0.0, test_fraction: float = 0.0,
                split_seed: int = 0, strata: Strata = by_class, reading: Reading = FIND) -> Splits:
    """Open the data set's own splits, or draw shares of them by `split_seed`, evenly over the strata (those of a task).

    `reading` as in own_splits; what was found is the result's `reading`, and its `notes` tell about it.

    test_fraction: this share of all images together becomes the test set. val_fraction: this share of the training images
    becomes the validation set. Raises DataError if the data are missing or do not fit together.
    """
    splits = own_splits(dataset, data_dir, reading)
    if test_fraction:
        splits = draw_test(splits, test_fraction, split_seed, strata)
    elif not len(splits.test):
        raise DataError(f"{data_dir} holds {len(splits.classes)} folders but no train/ and val/: if the folders are classes, "
                        "--test_fraction 0.2 draws a test set from them; else give the folder that holds train/ and val/")
    if val_fraction:
        splits = hold_out(splits, val_fraction, split_seed, strata)
    check(splits, f"{dataset} in {data_dir}" if data_dir and dataset != "digits" else dataset)
    return splits


def imagenet_names() -> tuple[str, ...]:
    """The names of ImageNet's 1000 classes (ILSVRC 2012) as torchvision spells them, in the order of published heads.

    A few occur twice, such as "crane", the bird and the machine.
    """
    from torchvision.models import ViT_B_16_Weights

    return tuple(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"])
