"""Finds the files that a list names: by path or name, with or without an ending, in a folder that is given or guessed."""

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence

from utils.files import image_folder, no_image_folder

from .image_files import IMAGE_EXTENSIONS, shown
from .splits import DataError

FEW = 32                # files of a folder that are asked for one by one; for more its listing is read
SAMPLE = 50             # names that a folder is guessed by
MAX_FOLDERS = 500       # that are looked into
IS_URL = "is a URL: download the images; paths of files are needed"


class FileFinder:
    """Finds files by name in one or several folders. It reads the listing of a folder that many names are in: asking the file
    system for each of 100,000 names takes minutes on a network drive.

    data_dir: the folder of the data set; image_dir: the folder that names count from, where the user has named it (seen from
    data_dir or, if there is none, from the current folder). Raises DataError if there is no such folder.
    """

    def __init__(self, data_dir: str, image_dir: str | None = None):
        self.data_dir, self.given = data_dir, image_dir and image_folder(image_dir, data_dir)
        if image_dir and self.given is None:
            raise DataError(no_image_folder(image_dir, data_dir))
        self._asked: dict[str, int] = {}
        self._names: dict[str, set[str]] = {}
        self._stems: dict[str, dict[str, list[str]]] = {}

    def find(self, name: str, folders: Sequence[str]) -> str | None:
        """The file's path, or None. Raises DataError where the name means two files."""
        found = [path for folder in folders for path in self._candidates(name, folder)]
        if len(found) > 1:
            (place, one), (other, two) = map(split_path, found[:2])
            if place == other:
                raise DataError(f"{shown(os.path.splitext(one)[0])} is {shown(one)} and {shown(two)} in {place}: write the names "
                                "with their endings, or remove one")
            raise DataError(f"{shown(name)} is {shown(found[0])} and {shown(found[1])}: name one of the folders with --image_dir")
        return found[0] if found else None

    def folders_of(self, names: Sequence[str], part: str, everywhere: bool = True) -> list[str]:
        """The folders that the names of a list count from, [] if none has any of them.

        It is DATA_DIR where that has any; else (`everywhere`) the folder inside or around it that has them all, or those that
        have them all together. part: "train", "val" or "test". Raises DataError where several folders have them all, and
        none is called as the part.
        """
        names = list(dict.fromkeys(filter(None, names)))
        sample = [names[number * len(names) // SAMPLE] for number in range(SAMPLE)] if len(names) > SAMPLE else names
        near = self.given or self.data_dir
        if any(self._candidates(name, near) for name in sample):
            return [near]
        for level in _levels(self.data_dir) if everywhere and not self.given else ():
            hits = {folder: {name for name in sample if self._candidates(name, folder)} for folder in level}
            hits = {folder: found for folder, found in hits.items() if found}
            whole = [folder for folder, found in hits.items() if len(found) == len(sample)]
            named = [folder for folder in whole if os.path.basename(folder).lower().startswith(part)]
            if len(whole) > 1 and len(named) != 1:
                raise DataError(f"{self.data_dir}: the images may be those of {' or of '.join(map(shown, whole[:4]))}: add "
                                "--image_dir with the right one")
            if whole:
                return named if len(whole) > 1 else whole
            if hits:
                return list(hits)
        return []

    def _candidates(self, name: str, folder: str) -> list[str]:
        """The files that the name means there; without an ending it may be several."""
        for spelling in _spellings(name):
            path = join_path(folder, spelling)
            if self._is_file(path):
                return [path]
            if not spelling.lower().endswith(IMAGE_EXTENSIONS):
                place, stem = split_path(path)
                if names := self._by_stem(place).get(stem):
                    return [join_path(place, each) for each in names]
        return []

    def other_case(self, name: str, folder: str) -> str | None:
        """A file there whose name differs in upper and lower case alone."""
        folder, name = split_path(join_path(folder, name.replace("\\", "/")))
        return next((join_path(folder, other) for other in self._listing(folder) if other.lower() == name.lower()), None)

    def _is_file(self, path: str) -> bool:
        folder, name = split_path(path)
        if folder in self._names:
            return name in self._names[folder]
        asked = self._asked[folder] = self._asked.get(folder, 0) + 1
        return os.path.isfile(path) if asked <= FEW else name in self._listing(folder)

    def _listing(self, folder: str) -> set[str]:
        if folder not in self._names:
            try:
                with os.scandir(folder or ".") as entries:
                    self._names[folder] = {entry.name for entry in entries if entry.is_file()}
            except OSError:
                self._names[folder] = set()
        return self._names[folder]

    def _by_stem(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._stems:
            stems = self._stems[folder] = {}
            for name in sorted(self._listing(folder)):
                if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith("."):
                    stems.setdefault(os.path.splitext(name)[0], []).append(name)
        return self._stems[folder]


def _spellings(name: str) -> Iterator[str]:
    """The name, then as other systems write it: with backslashes, absolute on another machine (its ends, the longest first), in
    the other Unicode form."""
    yield name
    slashes = name.replace("\\", "/")
    parts = slashes.split("/")[1:] if is_absolute(name) else []
    for text in (slashes, *("/".join(parts[start:]) for start in range(len(parts)))):
        if text != name:
            yield text
        if not text.isascii():
            yield from {unicodedata.normalize(form, text) for form in ("NFC", "NFD")} - {text}


def is_absolute(name: str) -> bool:
    """On Linux or on Windows."""
    return name[:1] in ("/", "\\") or name[1:3] in (":/", ":\\")


def is_url(name: str) -> bool:
    return bool(re.match("[A-Za-z][A-Za-z0-9+.-]+://", name))


# As os.path.join and os.path.split, in a third of their time.


def join_path(folder: str, name: str) -> str:
    return name if name.startswith("/") or not folder else folder + name if folder.endswith("/") else f"{folder}/{name}"


def split_path(path: str) -> tuple[str, str]:
    end = path.rfind("/") + 1
    return path[:end - 1 or end] if end else "", path[end:]


def _levels(data_dir: str) -> Iterator[list[str]]:
    below = _folders_in(data_dir)
    yield below
    yield [inner for folder in below for inner in _folders_in(folder)][:MAX_FOLDERS]
    outside = {os.path.realpath(folder): folder for folder in (os.path.dirname(os.path.abspath(data_dir)), os.curdir)}
    yield [folder for real, folder in outside.items() if real != os.path.realpath(data_dir)]


def _folders_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__")))
    except OSError:
        return []
    return [os.path.join(folder, name) for name in names[:MAX_FOLDERS]]
