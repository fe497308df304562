"""Images in files. class_folders.py and csv_lists.py are the two ways to name them.

A file may hold anything: whatever is wrong with it raises an ImageError, before memory is allocated for its pixels.
"""

import contextlib
import copy
import functools
import hashlib
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from utils.files import dead_link, located, no_folder

from .decode import IMAGE_FORMATS, MAX_PIXELS, opened_image, undecoded
from .reading import AS_STORED, UPRIGHT, Reading, orientation, to_rgb, turned_size
from .splits import DataError, ImageError, Splits

FIRST_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")     # of runs from before others
HEIF_EXTENSIONS = (".heic", ".heif", ".hif")
# As Pillow knows the formats of decode.py, and browsers save JPEG.
IMAGE_EXTENSIONS = (*FIRST_EXTENSIONS, ".jfif", ".jpe", ".jif", ".pjpeg", ".pjp", ".gif", ".apng", ".pbm", ".pnm",
                    *HEIF_EXTENSIONS)
MAX_IMAGE_BYTES = 8 * MAX_PIXELS  # what 16 bits and four channels take unpacked
MAX_REASON = 200                  # characters of Pillow's complaint

# Pillow warns of what is reported here anyway (large images) or does not matter (damaged EXIF).
warnings.filterwarnings("ignore", module=r"PIL\.")


class FileImages(Dataset):
    """Images in files, decoded when they are asked for. Their names are paths from `root`, the folder of the data set.

    reading: how a file becomes RGB; nothing in it is "auto".
    """

    def __init__(self, samples: list[tuple[str, int]], root: str | Path = ".", reading: Reading = AS_STORED):
        assert not reading.unknown, reading
        self.samples, self.root, self.reading = samples, Path(root), reading
        self.targets = np.array([label for _, label in samples], dtype=np.int64)
        self.files: list[str] | None = None         # the paths beyond all links, where overlap.py has asked for them

    def read_as(self, reading: Reading) -> "FileImages":
        images = copy.copy(self)
        images.reading = reading
        return images

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with self.opened(index) as image:
            return to_rgb(image, self.reading), self.samples[index][1]

    @contextlib.contextmanager
    def opened(self, index: int) -> Iterator[Image.Image]:
        """The image as Pillow has it, its header read. Every error while the file is open becomes an ImageError."""
        with _reading(self.samples[index][0]) as stream:
            yield opened_image(stream)

    def source(self, index: int) -> tuple[Image.Image, int]:
        """As [index], but a JPEG is opened and not decoded (decode.py): transforms.py decodes what a crop needs. A failure
        there raises the same ImageError."""
        path, label = self.samples[index]
        return image_source(path, self.reading), label

    def dimensions(self, index: int) -> tuple[int, int]:
        """Width and height of the image as it is read, from the header. Raises ImageError."""
        with self.opened(index) as image:
            return turned_size(image.size, orientation(image) if self.reading.exif == "follow" else UPRIGHT)

    def name(self, index: int) -> str:
        path = Path(self.samples[index][0])
        try:
            path = path.relative_to(self.root)
        except ValueError:
            if ".." not in path.parts:          # a list may name files by absolute paths
                path = Path(os.path.relpath(path, self.root))
        if ".." in path.parts or path.is_absolute():
            # Outside, or beyond a link that only the file system can follow: the path's digest keeps it apart.
            return f"outside/{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}/{path.name}"
        return path.as_posix()

    def content(self, index: int) -> bytes:
        with _reading(self.samples[index][0], "cannot be read") as stream:
            return stream.read()


def image_source(path: str, reading: Reading = AS_STORED) -> Image.Image:
    """As FileImages.source, of one file. Raises ImageError, and so may the transform that decodes it."""
    with _reading(path) as stream:
        return undecoded(stream, functools.partial(_image_error, path), reading)


@contextlib.contextmanager
def _reading(path: str, what: str = "cannot be read as an image") -> Iterator[BinaryIO]:
    """Open the file. Every error while it is read becomes an ImageError: of a damaged file Pillow lets out many kinds."""
    try:
        with _opened(path) as stream:
            yield stream
    except Exception as error:
        raise _image_error(path, error, what) from error


def _image_error(path: str, error: Exception, what: str = "cannot be read as an image") -> ImageError:
    advice = "make it readable" if isinstance(error, PermissionError) else "remove or replace it"
    return ImageError(f"{shown(path)}: {what} ({_reason(error)})", advice)


def _opened(path: str) -> BinaryIO:
    """Open a regular file of a reasonable size. Raises ValueError for others, such as a pipe, which would block."""
    stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY))
    status = os.fstat(stream.fileno())
    regular, size = stat.S_ISREG(status.st_mode), status.st_size
    if regular and 0 < size <= MAX_IMAGE_BYTES:
        return stream
    stream.close()
    raise ValueError("it is no regular file" if not regular else f"{size:,} bytes, more than {MAX_IMAGE_BYTES:,}" if size
                     else "it is empty")


def _reason(error: Exception) -> str:
    """The reason of an error in one line, without the path and cut to MAX_REASON characters."""
    known = {FileNotFoundError: "no such file", Image.DecompressionBombError: f"more than {MAX_PIXELS:,} px",
             UnidentifiedImageError: f"of none of the formats {', '.join(IMAGE_FORMATS)}, or damaged from its beginning"}
    text = known.get(type(error)) or (error.strerror if isinstance(error, OSError) else None) or str(error)
    text = re.sub("^[A-Z](?=[a-z])", lambda first: first[0].lower(), text)              # but not of SOI, PNG
    return shown(text or type(error).__name__)[:MAX_REASON]


def entries(folder: str | Path) -> list[os.DirEntry]:
    """Raises DataError."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError as error:
        if isinstance(error, NotADirectoryError) and Path(folder).exists():
            raise DataError(f"{folder} is {no_folder(folder)}") from error
        reason = "no such folder" if isinstance(error, FileNotFoundError) else error.strerror
        raise DataError(f"{reason}: {located(folder)}") from error


def links_gone(paths: Sequence[str]) -> str:
    """The message for links that lead nowhere."""
    if len(paths) == 1:
        return f"{shown(dead_link(paths[0]))}. Restore what it names, or remove the link"
    return (f"{shown(dead_link(paths[0]))}, and {len(paths) - 1:,} more links lead nowhere. Restore what they name, or remove "
            "them")


def shown(text: str) -> str:
    """Escape what a terminal cannot show: names of files may hold line breaks, control characters, undecodable bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def splits_in_files(images: Mapping[str, FileImages], root: str | Path, classes: Sequence[str], notes: Iterable[str]) -> Splits:
    """images: by part, "train", "val" and "test", as far as they are there. Without val, test is also chosen on."""
    none = FileImages([], root)
    val = images.get("val", images.get("test", none))
    val_name = "val" if "val" in images else "test"
    return Splits(images.get("train", none), val, images.get("test", val), val_name, tuple(classes), notes=tuple(notes))


def existing_images(samples: list[tuple[str, int]], root: str | Path, named_by: Callable[[int], str]) -> FileImages:
    """Raise DataError if a file does not exist; named_by(position of the sample) is the place that names it."""
    absent = [position for position, (path, _) in enumerate(samples) if not os.path.isfile(path)]
    if absent:
        others = f", nor {len(absent) - 1} more" if len(absent) > 1 else ""
        raise DataError(f"{named_by(absent[0])}: the image {samples[absent[0]][0]} does not exist{others}")
    return FileImages(samples, root)
