"""Data sets in their published layouts, with a few tiny images."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from torchvision import datasets


def png(cut=None, side=20) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()[:cut]


def tree(root: Path, layout: dict[str, int]) -> str:
    """Make folders with images: {"train/ant": 3, ...}, each of another color"""
    number = 0
    for place, count in layout.items():
        (root / place).mkdir(parents=True)
        for name in range(count):
            number += 1
            Image.new("RGB", (10, 12), (number, 2 * number, 100)).save(root / place / f"{name}.png")
    return str(root)


GOOD_TREE = {"train/ant": 3, "train/bee": 2, "val/ant": 1, "val/bee": 2}


def imagenet(root: Path) -> str:
    content = png(side=2)
    for split in ("train", "val"):
        for number in range(1000):
            place = root / split / f"n{number:08d}"
            place.mkdir(parents=True)
            (place / "0.png").write_bytes(content)
    return str(root)


def csv_files(root: Path, **texts: str | bytes) -> str:
    """Write the lists train="...", val="...", and the images a.png to f.png, each of another gray"""
    root.mkdir(exist_ok=True, parents=True)
    for number, name in enumerate("abcdef"):
        Image.new("L", (4, 3), 10 * number).save(root / f"{name}.png")
    for split, text in texts.items():
        (root / f"{split}.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(root)


def pixel_table(file: Path, images: np.ndarray, labels: np.ndarray | None, header: bool = True) -> None:
    """Write Kaggle's csv of MNIST: label,pixel0,...,pixel783"""
    rows = images.reshape(len(images), -1) if labels is None else np.column_stack([labels, images.reshape(len(images), -1)])
    names = ["label"] * (labels is not None) + [f"pixel{number}" for number in range(784)]
    file.write_text("\n".join(",".join(map(str, row)) for row in [*[names] * header, *rows.tolist()]) + "\n")


def write_idx(file: Path, array: np.ndarray) -> None:
    content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def mnist(place: Path, ending: str = "") -> str:
    """Write 30 training and 20 test images, 3 and 2 of every class, into `place` itself"""
    random = np.random.default_rng(0)
    place.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 30), ("t10k", 20)):
        write_idx(place / f"{part}-images-idx3-ubyte{ending}", random.integers(0, 256, (count, 7, 5), dtype=np.uint8))
        write_idx(place / f"{part}-labels-idx1-ubyte{ending}", random.permutation(count).astype(np.uint8) % 10)
    return str(place)


def cifar(kind: type[datasets.CIFAR10], archive: Path, monkeypatch) -> Path:
    """Write an archive in CIFAR's format, with two training images and one test image per class, that torchvision accepts"""
    random, sums = np.random.default_rng(0), {}
    names, key = kind.meta["filename"], kind.meta["key"]
    count = 100 if key == "fine_label_names" else 10
    classes = CIFAR_CLASSES if count == 10 else [f"class {number}" for number in range(100)]
    parts = [name for name, _ in kind.train_list + kind.test_list]
    train = np.array_split(random.permutation(2 * count) % count, len(parts) - 1)
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name, labels in [*zip(parts, [*train, np.arange(count)]), (names, None)]:
            content = {key: classes} if name == names else {
                "data": random.integers(0, 256, (len(labels), 3072), dtype=np.uint8),
                key.removesuffix("_names") + "s" if count == 100 else "labels": labels.tolist()}
            raw = pickle.dumps(content)
            sums[name] = hashlib.md5(raw).hexdigest()
            info = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name in parts[:-1]])
    monkeypatch.setattr(kind, "test_list", [[name, sums[name]] for name in parts[-1:]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums[names]})
    return archive


def cifar_binary(name: str, place: Path) -> dict[str, int]:
    """Write the files of the binary version, each with one image per class -> {file: images}, to replace cifar_files.BINARY's"""
    count, names = (10, "batches.meta.txt") if name == "CIFAR10" else (100, "fine_label_names.txt")
    files = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    files = files if count == 10 else ["train.bin", "test.bin"]
    place.mkdir(parents=True, exist_ok=True)
    (place / names).write_text("\n".join(f"class_{number}" for number in range(count)) + "\n\n")
    for number, file in enumerate(files):
        rows = np.random.default_rng(number).integers(0, 256, (count, 3072 + (1 if count == 10 else 2)), dtype=np.uint8)
        rows[:, -3073] = np.random.default_rng(number).permutation(count)
        (place / file).write_bytes(rows.tobytes())
    return dict.fromkeys(files, count)


CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cub(root: Path) -> str:
    """Write CUB_200_2011 with three images per species, numbered from 1, of which the middle one is for testing"""
    place, content = root / "CUB_200_2011", png(side=2)
    lists = {"images": [], "image_class_labels": [], "train_test_split": [], "classes": []}
    for species in range(1, 201):
        name = f"{species:03d}.Grey-headed_Bird_{species}"
        (place / "images" / name).mkdir(parents=True)
        lists["classes"].append(f"{species} {name}")
        for image in range(3):
            number = 3 * (species - 1) + image + 1
            (place / "images" / name / f"Bird_{number}.jpg").write_bytes(content)
            lists["images"].append(f"{number} {name}/Bird_{number}.jpg")
            lists["image_class_labels"].append(f"{number} {species}")
            lists["train_test_split"].append(f"{number} {int(image != 1)}")
    for name, lines in lists.items():
        (place / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return str(root)


def flowers(root: Path) -> str:
    """Write flowers-102 with one training, one validation and two test images of every class, in random order"""
    place, content = root / "flowers-102", png(side=2)
    (place / "jpg").mkdir(parents=True)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(1, 103), 4))
    numbers = np.argsort(labels, kind="stable").reshape(102, 4) + 1
    for number in range(1, len(labels) + 1):
        (place / "jpg" / f"image_{number:05d}.jpg").write_bytes(content)
    savemat(place / "imagelabels.mat", {"labels": labels.astype(np.uint8)[None]}, do_compression=True)
    savemat(place / "setid.mat", {"trnid": numbers[None, :, 0].astype(np.uint16), "valid": numbers[None, :, 1].astype(np.uint16),
                                  "tstid": numbers[:, 2:].reshape(1, -1).astype(np.uint16)})
    return str(root)


def pets(root: Path) -> str:
    """Write oxford-iiit-pet with two training images and one test image of every breed"""
    place, content = root / "oxford-iiit-pet", png(side=2)
    for folder in ("images", "annotations"):
        (place / folder).mkdir(parents=True)
    lines = {"trainval": [], "test": []}
    for breed in range(1, 38):
        for image in range(1, 4):
            name = f"{'Long_haired_cat' if breed % 3 else 'dog'}-{breed}_{image}"
            (place / "images" / f"{name}.jpg").write_bytes(content)
            lines["test" if image == 2 else "trainval"].append(f"{name} {breed} 1 {breed}")
    for part, rows in lines.items():
        (place / "annotations" / f"{part}.txt").write_text("\n".join(rows) + "\n")
    return str(root)
