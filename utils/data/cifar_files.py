"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in their published forms: the archive, its files (pickles), the binary version."""

import hashlib
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np

from .downloads import download, torchvision_dataset
from .splits import ArrayImages, DataError, Splits, abbreviate

# The binary version: (folder, archive, labels per row, of which the last is used, file of class names, images in each file).
BINARY = {
    "CIFAR10": ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", 1, "batches.meta.txt",
                {**{f"data_batch_{number}.bin": 10_000 for number in range(1, 6)}, "test_batch.bin": 10_000}),
    "CIFAR100": ("cifar-100-binary", "cifar-100-binary.tar.gz", 2, "fine_label_names.txt",
                 {"train.bin": 50_000, "test.bin": 10_000}),
}
PIXELS = 3 * 32 * 32


def cifar(name: str, data_dir: str) -> Splits:
    """Load the data set from the published files of the Python or the binary version, which may be in DATA_DIR, in their own
    folder there or one level deeper. Without them, unpack the archive; without that, download it. Pickles are only opened if
    they have the published MD5.

    Raises DataError.
    """
    kind, root = torchvision_dataset(name), Path(data_dir)
    archive, again = root / kind.filename, f"to have {name} downloaded again, or download {kind.url} on another machine"
    pickles = [file for file, _ in [*kind.train_list, *kind.test_list]] + [kind.meta["filename"]]
    folder, there = _most_complete(_folders(root, kind.base_folder), pickles)
    if len(there) == len(pickles):
        return _from_pickles(kind, folder, again)
    packed = root / BINARY[name][1]
    binary_folder, binary_there = _most_complete(_folders(root, BINARY[name][0]), [*BINARY[name][4], BINARY[name][3]])
    if not archive.is_file() and (binary_there or packed.is_file()):
        return _from_binary(name, binary_folder if binary_there else packed)
    if archive.is_file() and _md5(archive) != kind.tgz_md5:
        raise DataError(f"{archive}: damaged or incomplete (its MD5 is not that of the published file). Delete it {again} and "
                        "copy it there")
    if there and not archive.is_file():
        raise DataError(f"{folder}: {abbreviate(set(pickles) - set(there))} missing. Delete the other files of {name} {again} "
                        f"and copy it to {archive}")
    download(kind, data_dir, f"download {kind.url} on another machine and copy it to {archive}", train=True)
    return _from_pickles(kind, root / kind.base_folder, again)


def _folders(root: Path, own: str) -> list[Path]:
    """List where the files may be: programs that unpack archives may add a folder around them."""
    inner = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    return [root / own, root, root / own / own, *(path / own for path in inner)]


def _most_complete(folders: list[Path], names: list[str]) -> tuple[Path, list[str]]:
    """-> (the folder that holds most of the files, the names of those it holds)"""
    found = [(folder, [name for name in names if (folder / name).is_file()]) for folder in folders]
    return max(found, key=lambda pair: len(pair[1]))


def _md5(file: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _from_pickles(kind: type, folder: Path, again: str) -> Splits:
    sums = dict([*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])])
    if damaged := [str(folder / name) for name, md5 in sums.items() if _md5(folder / name) != md5]:
        raise DataError(f"{abbreviate(damaged)}: damaged or incomplete (the MD5 is not that of the published file). Delete "
                        f"{folder} {again}")
    local = type(kind.__name__, (kind,), {"base_folder": os.curdir})           # the folder may have another name
    train, test = (local(folder, train=part) for part in (True, False))
    arrays = [ArrayImages(split.data, split.targets, part) for part, split in (("train", train), ("test", test))]
    return Splits(arrays[0], arrays[1], arrays[1], "test", tuple(train.classes))


def _from_binary(name: str, place: Path) -> Splits:
    """Read the binary version from `place`, its folder or its archive. A row has one label or two (coarse, fine), then the
    pixels."""
    _, _, per_row, names_file, images = BINARY[name]
    files = _unpacked(place, [*images, names_file]) if place.is_file() else {
        file: (place / file).read_bytes() for file in [*images, names_file] if (place / file).is_file()}
    if lacking := {*images, names_file} - files.keys():
        raise DataError(f"{place}: {abbreviate(lacking)} missing. Download the binary version of {name} again "
                        "(https://www.cs.toronto.edu/~kriz/cifar.html)")
    classes = tuple(files[names_file].decode("ascii", "replace").split())
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for file, count in images.items():
        rows = np.frombuffer(files[file], np.uint8)
        if len(rows) != count * (per_row + PIXELS):
            raise DataError(f"{place / file}: damaged or incomplete ({len(rows):,} bytes, not {count * (per_row + PIXELS):,}). "
                            f"Download the binary version of {name} again (https://www.cs.toronto.edu/~kriz/cifar.html)")
        parts["test" if file.startswith("test") else "train"].append(rows.reshape(count, -1))
    arrays = []
    for part, rows in ((part, np.concatenate(rows)) for part, rows in parts.items()):
        pixels = rows[:, per_row:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        arrays.append(ArrayImages(np.ascontiguousarray(pixels), rows[:, per_row - 1], part))
    return Splits(arrays[0], arrays[1], arrays[1], "test", classes)


def _unpacked(archive: Path, names: list[str]) -> dict[str, bytes]:
    """Return the content of the files in the archive that have these names, cut just above their longest possible length."""
    found, limit = {}, (1 + max(max(row[4].values()) for row in BINARY.values())) * (2 + PIXELS)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = os.path.basename(member.name)
                if name in names and member.isfile():
                    found[name] = tar.extractfile(member).read(limit)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{archive}: damaged or incomplete ({' '.join(str(error).split())}). Delete it and download it again "
                        "(https://www.cs.toronto.edu/~kriz/cifar.html)") from error
    return found
