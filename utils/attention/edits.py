"""What a person wants a model to attend to in an image: one small JSON file for each image, suited to git.

    FOLDER/train/ant/3.png.json
    {"format": "attention-edit-1", "image": "train/ant/3.png", "checksum": "sha256:...", "grid": [h, w],
     "region": [top, left, bottom, right], "values": [[null, 0.9, ...], ...], "who": "", "when": "", "note": ""}

`values` are what sigmoid attention should be, 0..1; null is not edited. The grid covers the region of the stored image
that it was drawn on. A file may come from a stranger, so everything in it is checked; it is written whole or not at all.
"""

import dataclasses
import hashlib
import json
import os
import re
import stat
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from utils.files import StorageError, atomic_write, fsync_path

FORMAT = "attention-edit-1"
MAX_BYTES = 4_000_000             # a grid of 256 x 256 takes up to one million
MAX_SIDE = 256
WHOLE = (0.0, 0.0, 1.0, 1.0)
REQUIRED, OPTIONAL = {"format", "image", "checksum", "grid", "values"}, {"region", "who", "when", "note"}
ADVICE = "restore the file, or delete it and edit the image again"


class EditError(ValueError):
    """Raised for edits that are missing, damaged or of another image; the message is one line with the path."""

    exit_code = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """The edit of one image. The value of a patch that is not edited is 0 and has no meaning."""

    image: str                      # split.name(index)
    checksum: str                   # of the stored bytes: checksum(split, index)
    values: np.ndarray              # (h, w) float32 in 0..1
    edited: np.ndarray              # (h, w) bool
    region: tuple[float, float, float, float] = WHOLE        # top, left, bottom, right of the grid, as ratios of the image
    who: str = ""
    when: str = ""
    note: str = ""


def path_of(folder: str | Path, name: str) -> Path:
    """Return FOLDER/NAME.json, unique for every name. Raises EditError for a name that leads out of the folder."""
    if not is_safe(name):
        raise EditError(f"{shown(name)} cannot name an edit in {shown(folder)}: it must be a path below the folder")
    path, parent = Path(f"{os.path.join(folder, *name.split('/'))}.json"), Path(folder)
    for part in name.split("/")[:-1]:
        parent = parent / part
        if parent.is_symlink():
            raise EditError(f"{shown(parent)} is a link, which may lead out of {shown(folder)}. Replace it with a folder")
    return path


def is_safe(name: str) -> bool:
    """Return whether it is a relative path, in its only spelling, that stays below its folder and outside .git."""
    try:
        return b"\0" not in os.fsencode(name) and not {part.lower() for part in name.split("/")} & {"", ".", "..", ".git"}
    except UnicodeEncodeError:          # half of a surrogate pair
        return False


def shown(path: object) -> str:
    """Return the path on one line of at most 1,000 characters, whatever is in it."""
    text = str(path)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 1000 else f"{text[:1000]}..."


def checksum(split: Dataset, index: int) -> str:
    """Return the checksum of an image's stored bytes. Raises ImageError if it cannot be read."""
    return "sha256:" + hashlib.sha256(split.content(index)).hexdigest()


def find(folder: str | Path, split: Dataset) -> dict[int, Edit]:
    """Return the edits of the split's images, by index. Files of other images and empty edits are skipped.

    Raises EditError if the folder is missing, a file is damaged, or an image has changed since it was edited.
    """
    names, found = _files(Path(folder)), {}
    if not names:
        return found
    read_already: dict[str, Edit] = {}          # a list may name an image twice
    for index in range(len(split)):
        name = split.name(index)
        if name not in names:
            continue
        if name not in read_already:
            read_already[name] = edit = read(names[name])
            if edit.image != name:
                raise EditError(f"{shown(names[name])} is of another image, {shown(edit.image)}. Move it back to its folder")
            if edit.checksum != checksum(split, index):
                raise EditError(f"{shown(names[name])}: the image has changed since it was edited (its checksum differs). "
                                "Restore the image, or delete this file and edit the image again")
        if read_already[name].edited.any():
            found[index] = read_already[name]
    return found


def _files(folder: Path) -> dict[str, Path]:
    """Return the edit files by image name, from the names of the files only."""
    if not folder.is_dir():
        raise EditError(f"{shown(folder)}: no such folder of edits")

    def refuse(error: OSError) -> None:
        raise EditError(f"{shown(error.filename)}: cannot be read ({error.strerror}). Allow it or move it away") from error

    found = {}
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name.lower() != ".git"]
        for name in folders:
            if os.path.islink(os.path.join(root, name)):
                raise EditError(f"{shown(os.path.join(root, name))} is a link. Replace it with the folder itself, or remove it")
        below = os.path.relpath(root, folder)
        for name in names:
            if name.endswith(".json"):
                image = name.removesuffix(".json") if below == "." else f"{below}/{name.removesuffix('.json')}"
                found[image] = Path(root, name)
    return found


# ---------------------------------------------------------------------------------------------------- reading


def read(path: str | Path) -> Edit:
    """Read an edit. Raises EditError unless the file is regular, complete and an edit."""
    try:
        # A link could lead anywhere; reading a pipe would block.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise EditError(f"{shown(path)}: not a regular file. Remove it")
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        reason = "a link, not a file" if os.path.islink(path) else error.strerror
        raise EditError(f"{shown(path)}: cannot be read ({reason}); {ADVICE}") from error
    return _parsed(content, path)


def _parsed(content: bytes, path: str | Path) -> Edit:
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes, so not an edit")
        return _edit(json.loads(content.decode(), object_pairs_hook=_object))
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text ({error.reason} at byte {error.start + 1})"
    except json.JSONDecodeError as error:
        reason = f"damaged or cut off (line {error.lineno}, {error.msg})"
    except RecursionError:
        reason = "lists nested too deep: not an edit"
    except ValueError as error:
        reason = shown(error)
    raise EditError(f"{shown(path)}: {reason}; {ADVICE}")


def _object(pairs: list) -> dict:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field occurs twice")
    return fields


def _edit(fields: object) -> Edit:
    """Raise ValueError with the reason."""
    if not isinstance(fields, dict) or "format" not in fields:
        raise ValueError("not an edit of an image")
    if fields["format"] != FORMAT:
        raise ValueError(f"its format is {_brief(fields['format'])}, not {FORMAT}")
    if missing := REQUIRED - fields.keys():
        raise ValueError(f"without {', '.join(sorted(missing))}")
    if unknown := fields.keys() - REQUIRED - OPTIONAL:
        raise ValueError(f"the field {_brief(min(unknown))} is unknown")
    for name in ("image", "checksum", *sorted(OPTIONAL - {"region"})):
        if not isinstance(fields.get(name, ""), str):
            raise ValueError(f"{name} must be text, not {_brief(fields[name])}")
    if not is_safe(fields["image"]):
        raise ValueError(f"{_brief(fields['image'])} cannot be the name of an image")
    if not re.fullmatch("sha256:[0-9a-f]{64}", fields["checksum"]):
        raise ValueError("its checksum is not sha256: and 64 hexadecimal digits")
    grid = fields["grid"]
    if not _are_numbers(grid, 2) or not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in grid):
        raise ValueError(f"the grid must be [rows, columns] of 1 to {MAX_SIDE} patches, not {_brief(grid)}")
    region = fields.get("region", list(WHOLE))
    if not _are_numbers(region, 4) or not (0 <= region[0] < region[2] <= 1 and 0 <= region[1] < region[3] <= 1):
        raise ValueError(f"the region must be [top, left, bottom, right] within 0..1, not {_brief(region)}")
    values, edited = parse_values(fields["values"], *grid)
    texts = {name: fields[name] for name in ("who", "when", "note") if name in fields}
    return Edit(fields["image"], fields["checksum"], values, edited, tuple(float(side) for side in region), **texts)


def _are_numbers(values: object, count: int) -> bool:
    """Return whether it is a list of `count` numbers; true and false are not numbers."""
    return isinstance(values, list) and len(values) == count and all(type(value) in (int, float) for value in values)


def parse_values(rows: object, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Parse rows of numbers in 0..1, or null -> values (h, w) float32, edited (h, w) bool. Raises ValueError with the reason."""
    if not isinstance(rows, list) or len(rows) != height:
        raise ValueError(f"values must be {height} rows, as many as in the grid")
    values, edited = np.zeros((height, width), np.float32), np.zeros((height, width), bool)
    for number, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != width:
            raise ValueError(f"row {number + 1} of the values must be a list of {width}, as many as in the grid")
        for column, value in enumerate(row):
            if value is None:
                continue
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise ValueError(f"row {number + 1} of the values has {_brief(value)}: expected null or a number in 0..1")
            values[number, column], edited[number, column] = value, True
    return values, edited


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------------------------------------------- writing


def write(path: str | Path, edit: Edit) -> None:
    """Write an edit. The previous file, or none, stays until the new one is complete on the disk.

    Makes missing folders. Raises EditError if it cannot be written, or if `read` would refuse it.
    """
    path, content = Path(path), _text(edit).encode()
    _parsed(content, path)
    try:
        missing = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: file.write_bytes(content))
        for parent in missing:
            fsync_path(parent.parent)
    except (OSError, StorageError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        raise EditError(f"{shown(path)}: cannot be written ({cause.strerror}). Choose another folder or make room") from error


def digest(edits: dict[int, Edit]) -> str:
    """Hash the content of the edits, without who made them and when; any other change changes it."""
    texts = sorted(_text(dataclasses.replace(edit, who="", when="", note="")) for edit in edits.values())
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def rows_of(edit: Edit) -> list[list[float | None]]:
    """Return the values as they are stored: str of a float32 is the shortest text that is read as the same number."""
    return [[float(str(value)) if here else None for value, here in zip(*row)]
            for row in zip(edit.values.astype(np.float32), edit.edited)]


def _text(edit: Edit) -> str:
    """Return JSON with one line for each row of the grid, which git compares line by line; in ASCII, since a file name need not
    be UTF-8."""
    assert edit.values.ndim == 2 and edit.values.shape == edit.edited.shape, (edit.values.shape, edit.edited.shape)
    fields = {"format": FORMAT, "image": edit.image, "checksum": edit.checksum, "grid": list(edit.values.shape),
              "region": [float(side) for side in edit.region]}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
    lines.append(' "values": [\n  ' + ",\n  ".join(map(json.dumps, rows_of(edit))) + "\n ]")
    lines += [f" {json.dumps(name)}: {json.dumps(getattr(edit, name))}" for name in ("who", "when", "note")]
    return "{\n" + ",\n".join(lines) + "\n}\n"
