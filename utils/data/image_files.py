"""Images in files. class_folders.py and csv_lists.py find the files and their labels.

A file may contain anything: whatever is wrong with it raises an ImageError, before memory is allocated for its pixels.
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

FIRST_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")     # of runs of older versions
HEIF_EXTENSIONS = (".heic", ".heif", ".hif")
# Pillow's extensions for the formats of decode.py, and those that browsers give JPEG files.
IMAGE_EXTENSIONS = (*FIRST_EXTENSIONS, ".jfif", ".jpe", ".jif", ".pjpeg", ".pjp", ".gif", ".apng", ".pbm", ".pnm",
                    *HEIF_EXTENSIONS)
MAX_IMAGE_BYTES = 8 * MAX_PIXELS  # the size of 4 channels of 16 bits without compression
MAX_REASON = 200                  # characters of an error message of Pillow

# Pillow warns about what is reported here anyway (large images) or does not matter (damaged EXIF).
warnings.filterwarnings("ignore", module=r"PIL\.")


class FileImages(Dataset):
    """Images in files, decoded on access. Their names are paths relative to `root`, the folder of the data set.

    reading: how a file becomes RGB; nothing in it is "auto".
    """

    def __init__(self, samples: list[tuple[str, int]], root: str | Path = ".", reading: Reading = AS_STORED):
        assert not reading.unknown, reading
        self.samples, self.root, self.reading = samples, Path(root), reading
        self.targets = np.array([label for _, label in samples], dtype=np.int64)
        self.files: list[str] | None = None         # the real paths, once overlap.py has resolved the links

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
        """Open the image with Pillow, which reads its header. Every error while the file is open becomes an ImageError."""
        with _reading(self.samples[index][0]) as stream:
            yield opened_image(stream)

    def source(self, index: int) -> tuple[Image.Image, int]:
        """Like [index], but a JPEG is only opened (decode.py): transforms.py decodes as much as its crop needs. A failure there
        raises the same ImageError."""
        path, label = self.samples[index]
        return image_source(path, self.reading), label

    def dimensions(self, index: int) -> tuple[int, int]:
        """Return width and height of the image as [index] returns it, from the header. Raises ImageError."""
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
            # Outside `root`, or perhaps (only the file system can follow links): the digest of the path makes the name unique.
            return f"outside/{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}/{path.name}"
        return path.as_posix()

    def content(self, index: int) -> bytes:
        with _reading(self.samples[index][0], "cannot be read") as stream:
            return stream.read()


def image_source(path: str, reading: Reading = AS_STORED) -> Image.Image:
    """Open a single file as FileImages.source does. Raises ImageError, and so may the transform that decodes it."""
    with _reading(path) as stream:
        return undecoded(stream, functools.partial(_image_error, path), reading)


@contextlib.contextmanager
def _reading(path: str, what: str = "cannot be read as an image") -> Iterator[BinaryIO]:
    """Open the file. Every error while it is read becomes an ImageError, because Pillow raises many kinds for damaged files."""
    try:
        with _opened(path) as stream:
            yield stream
    except Exception as error:
        raise _image_error(path, error, what) from error


def _image_error(path: str, error: Exception, what: str = "cannot be read as an image") -> ImageError:
    advice = "change its permissions" if isinstance(error, PermissionError) else "remove or replace it"
    return ImageError(f"{shown(path)}: {what} ({_reason(error)})", advice)


def _opened(path: str) -> BinaryIO:
    """Open a regular file of a plausible size. Raises ValueError for others, such as a pipe, which would block."""
    stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY))
    status = os.fstat(stream.fileno())
    regular, size = stat.S_ISREG(status.st_mode), status.st_size
    if regular and 0 < size <= MAX_IMAGE_BYTES:
        return stream
    stream.close()
    raise ValueError("not a regular file" if not regular else f"{size:,} bytes, more than {MAX_IMAGE_BYTES:,}" if size
                     else "the file is empty")


def _reason(error: Exception) -> str:
    """Return the reason of an error in one line, without the path, cut to MAX_REASON characters."""
    known = {FileNotFoundError: "no such file", Image.DecompressionBombError: f"more than {MAX_PIXELS:,} px",
             UnidentifiedImageError: f"none of the formats {', '.join(IMAGE_FORMATS)}, or damaged at its beginning"}
    text = known.get(type(error)) or (error.strerror if isinstance(error, OSError) else None) or str(error)
    text = re.sub("^[A-Z](?=[a-z])", lambda first: first[0].lower(), text)              # but not in abbreviations: SOI, PNG
    return shown(text or type(error).__name__)[:MAX_REASON]


def entries(folder: str | Path) -> list[os.DirEntry]:
    """List a folder. Raises DataError."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError as error:
        if isinstance(error, NotADirectoryError) and Path(folder).exists():
            raise DataError(f"{folder} is {no_folder(folder)}") from error
        reason = "no such folder" if isinstance(error, FileNotFoundError) else error.strerror
        raise DataError(f"{reason}: {located(folder)}") from error


def describe_broken_links(paths: Sequence[str]) -> str:
    """Return the message for broken links."""
    if len(paths) == 1:
        return f"{shown(dead_link(paths[0]))}. Restore that file or folder, or remove the link"
    return (f"{shown(dead_link(paths[0]))} ({len(paths):,} broken links in all). Restore the files or folders, or remove the "
            "links")


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 image", "2,000 images"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def shown(text: str) -> str:
    """Escape what a terminal cannot show: file names may contain line breaks, control characters, undecodable bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def splits_in_files(images: Mapping[str, FileImages], root: str | Path, classes: Sequence[str], notes: Iterable[str]) -> Splits:
    """Return the Splits of the parts "train", "val" and "test" that exist. Without "val", "test" chooses the best checkpoint."""
    none = FileImages([], root)
    val = images.get("val", images.get("test", none))
    val_name = "val" if "val" in images else "test"
    return Splits(images.get("train", none), val, images.get("test", val), val_name, tuple(classes), notes=tuple(notes))


def existing_images(samples: list[tuple[str, int]], root: str | Path, named_by: Callable[[int], str]) -> FileImages:
    """Return the images. Raises DataError if a file does not exist; named_by(position of the sample) is where it is listed."""
    absent = [position for position, (path, _) in enumerate(samples) if not os.path.isfile(path)]
    if absent:
        others = f" ({len(absent)} missing in all)" if len(absent) > 1 else ""
        raise DataError(f"{named_by(absent[0])}: the image {samples[absent[0]][0]} does not exist{others}")
    return FileImages(samples, root)
