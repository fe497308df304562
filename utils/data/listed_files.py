"""Finds the files that a list names: by path or name, with or without an extension, in a given or a likely folder."""

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence

from utils.files import image_folder, no_image_folder

from .image_files import IMAGE_EXTENSIONS, shown
from .splits import DataError

FEW = 32                # files of a folder that are checked one by one; for more, its listing is read
SAMPLE = 50             # names that are tried to find a folder
MAX_FOLDERS = 500       # folders that are searched
IS_URL = "is a URL. Download the images and write their paths into the list"


class FileFinder:
    """Finds files by name in one or several folders. For many names in a folder it reads the folder's listing: checking each of
    100,000 names takes minutes on a network drive.

    data_dir: the folder of the data set. image_dir: --image_dir, the folder that names are relative to; it is itself relative
    to data_dir or, if it does not exist there, to the current folder. Raises DataError if there is no such folder.
    """

    def __init__(self, data_dir: str, image_dir: str | None = None):
        self.data_dir, self.given = data_dir, image_dir and image_folder(image_dir, data_dir)
        if image_dir and self.given is None:
            raise DataError(no_image_folder(image_dir, data_dir))
        self._checked: dict[str, int] = {}
        self._names: dict[str, set[str]] = {}
        self._stems: dict[str, dict[str, list[str]]] = {}

    def find(self, name: str, folders: Sequence[str]) -> str | None:
        """Return the file's path, or None. Raises DataError if the name means two files."""
        found = [path for folder in folders for path in self._candidates(name, folder)]
        if len(found) > 1:
            (place, one), (other, two) = map(split_path, found[:2])
            if place == other:
                raise DataError(f"{shown(os.path.splitext(one)[0])} may be {shown(one)} or {shown(two)} in {place}. Write the "
                                "names with their extensions, or remove one of the files")
            raise DataError(f"{shown(name)} may be {shown(found[0])} or {shown(found[1])}. Set --image_dir to one of the folders")
        return found[0] if found else None

    def folders_of(self, names: Sequence[str], part: str, everywhere: bool = True) -> list[str]:
        """Return the folders that the names of a list are relative to, [] if no folder has any of the files.

        That is DATA_DIR if it has any of them. Otherwise, if `everywhere`, it is the folder inside or around it that has all of
        them, or else those that have some. part: "train", "val" or "test". Raises DataError if several folders have all of them
        and the name of the part does not decide.
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
                raise DataError(f"{self.data_dir}: the images of the list may be in {' or in '.join(map(shown, whole[:4]))}. Add "
                                "--image_dir with the right folder")
            if whole:
                return named if len(whole) > 1 else whole
            if hits:
                return list(hits)
        return []

    def _candidates(self, name: str, folder: str) -> list[str]:
        """Return the files in the folder that the name may mean; several only for a name without an extension."""
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
        """Return a file in the folder whose name differs only in upper and lower case."""
        folder, name = split_path(join_path(folder, name.replace("\\", "/")))
        return next((join_path(folder, other) for other in self._listing(folder) if other.lower() == name.lower()), None)

    def _is_file(self, path: str) -> bool:
        folder, name = split_path(path)
        if folder in self._names:
            return name in self._names[folder]
        checked = self._checked[folder] = self._checked.get(folder, 0) + 1
        return os.path.isfile(path) if checked <= FEW else name in self._listing(folder)

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
    """Yield the name, then how other systems may write it: with slashes for backslashes, without the first parts of a path that
    is absolute on another machine (the longest rest first), in the other Unicode form."""
    yield name
    slashes = name.replace("\\", "/")
    parts = slashes.split("/")[1:] if is_absolute(name) else []
    for text in (slashes, *("/".join(parts[start:]) for start in range(len(parts)))):
        if text != name:
            yield text
        if not text.isascii():
            yield from {unicodedata.normalize(form, text) for form in ("NFC", "NFD")} - {text}


def is_absolute(name: str) -> bool:
    """Whether the path is absolute on Linux or Windows."""
    return name[:1] in ("/", "\\") or name[1:3] in (":/", ":\\")


def is_url(name: str) -> bool:
    return bool(re.match("[A-Za-z][A-Za-z0-9+.-]+://", name))


# These do the same as os.path.join and os.path.split, in a third of the time.


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
