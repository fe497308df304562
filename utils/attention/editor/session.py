"""The images of an editing session: the model's predictions, the edits on the disk, the search for misclassified images.

It imports neither the model, which annotate.py passes as the functions of a `Gallery`, nor the server (server.py). The only state
is the folder of edits, so that two pages, two sessions, `git pull` and a restart all see the same. A revision is a digest of the
file: saving over a revision that is not the current one is a conflict and writes nothing.

Shapes: C classes, (h, w) grid.
"""

import contextlib
import dataclasses
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from PIL import Image

from utils.attention import edits
from utils.data.splits import ImageError

FILTERS = ("all", "misclassified", "edited", "unedited")
UNKNOWN, UNREADABLE = -1, -2             # instead of a label
TOP = 5
IDLE_S = 0.3                              # seconds without a request before the search continues
LARGEST_BATCH, BATCH_SECONDS = 64, 0.1


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The model's output for one image."""

    probabilities: np.ndarray       # (C,)
    sigmoid: np.ndarray             # (h, w) in 0..1, mean over heads and query rows, before the edit
    weights: np.ndarray             # (h, w) softmax weights, mean over heads and query rows, under the edit


@dataclasses.dataclass(frozen=True)
class Gallery:
    """The images and the model, as functions of an image's index; all but `name` and `checksum` may raise ImageError."""

    title: str
    facts: Sequence[str]                                    # lines about model and data for the page
    classes: Sequence[str]
    labels: np.ndarray                                      # (n,) int64, UNKNOWN where there is none
    grid: tuple[int, int]
    img_size: tuple[int, int]                               # (height, width) in pixels
    name: Callable[[int], str]
    checksum: Callable[[int], str]
    region: Callable[[int], tuple[float, float, float, float]]
    picture: Callable[[int], Image.Image]                   # what the model sees, in the image's own pixels
    predict_with_attention: Callable[..., Prediction]       # (index), or (index, values (h, w), edited (h, w) bool)
    predict: Callable[[list[int]], list[int]]               # labels; UNREADABLE for an image that cannot be read


@dataclasses.dataclass(frozen=True)
class Stored:
    """The file of an image in the folder of edits."""

    revision: str                   # "" if there is no file
    edit: edits.Edit | None
    problem: str = ""               # one line, if the file is not an edit of this image


class Session:
    """The methods may be called from several threads."""

    def __init__(self, gallery: Gallery, folder: Path, who: str = ""):
        self.gallery, self.folder, self.who = gallery, Path(folder), who
        self.predicted = np.full(len(gallery.labels), UNKNOWN, dtype=np.int64)
        self.edited = np.zeros(len(gallery.labels), dtype=bool)
        present = {path.relative_to(folder).as_posix() for path in self.folder.rglob("*.json")}
        names = [f"{gallery.name(index)}.json" for index in range(len(self.edited))] if present else []
        self.edited[:len(names)] = [name in present for name in names]
        self.others = len(present.difference(names))          # files of no image here
        self._saving = threading.Lock()
        self._busy, self._last, self._count = 0, 0.0, threading.Lock()

    # ------------------------------------------------------------------------------------------------ requests

    def state(self) -> dict:
        gallery = self.gallery
        identity = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16]
        return {"title": gallery.title, "facts": list(gallery.facts), "grid": list(gallery.grid),
                "size": list(gallery.img_size), "identity": identity, "counts": self.counts()}

    def counts(self) -> dict:
        """Return the numbers of images: all, edited, predicted, unreadable, misclassified."""
        return {"images": len(self.predicted), "edited": int(self.edited.sum()),
                "looked_at": int((self.predicted != UNKNOWN).sum()), "unreadable": int((self.predicted == UNREADABLE).sum()),
                "misclassified": int(self._members("misclassified").sum()), "labelled": bool((self.gallery.labels >= 0).any())}

    def _members(self, kind: str) -> np.ndarray:
        if kind == "misclassified":
            return (self.predicted >= 0) & (self.gallery.labels >= 0) & (self.predicted != self.gallery.labels)
        return {"all": np.ones_like(self.edited), "edited": self.edited, "unedited": ~self.edited}[kind]

    def find(self, kind: str, start: int, step: int) -> dict:
        """Find the next (step 1) or previous (-1) image of a filter from `start`; step 0: `start` itself, or else the next, or
        else the last.

        Returns {"index": the image or None, "position": its position in the filter, from 0, "total": the images of the filter}.
        """
        members = np.flatnonzero(self._members(kind))
        place = int(np.searchsorted(members, start, "right" if step > 0 else "left")) - (step < 0)
        if step == 0:
            place = min(place, len(members) - 1)
        found = int(members[place]) if 0 <= place < len(members) else None
        return {"index": found, "position": place, "total": len(members)}

    def image(self, index: int) -> dict:
        """Return all that the page shows of an image; "unreadable" and "problem": what is wrong with it or with its edit."""
        gallery, stored = self.gallery, self._stored(index)
        answer = {"index": index, "name": gallery.name(index), "label": self._class(gallery.labels[index]), "note": "",
                  "revision": stored.revision, "problem": stored.problem, "values": None, "who": "", "when": ""}
        if stored.edit is None:
            return answer | self.outcome(index)
        answer |= {"values": edits.rows_of(stored.edit), "who": stored.edit.who, "when": stored.edit.when}
        try:
            edit = fitted(stored.edit, gallery.grid, gallery.region(index))
        except ImageError as error:
            return answer | {"unreadable": str(error), "counts": self.counts()}
        if edit is not stored.edit:
            shape = " x ".join(map(str, stored.edit.values.shape))
            answer |= {"values": edits.rows_of(edit), "note": f"this edit was made on {shape} patches, or on another crop. "
                                                      "It is shown, and will be saved, on the patches of this model"}
        return answer | self.outcome(index, edit.values, edit.edited)

    def outcome(self, index: int, values: np.ndarray | None = None, edited: np.ndarray | None = None) -> dict:
        """Return the model's output for an image without an edit ("own") and with an edit ("now")."""
        try:
            with self._request():
                own = self.gallery.predict_with_attention(index)
                now = own if edited is None or not edited.any() else self.gallery.predict_with_attention(index, values, edited)
        except ImageError as error:
            return {"unreadable": str(error), "counts": self.counts()}
        self.predicted[index] = own.probabilities.argmax()
        return {"unreadable": "", "counts": self.counts(), **self._results(index, own, now)}

    def _class(self, label: int) -> str | None:
        return None if label < 0 else str(self.gallery.classes[label])

    def _results(self, index: int, own: Prediction, now: Prediction) -> dict:
        before, after, label = own.probabilities, now.probabilities, int(self.gallery.labels[index])
        shown = np.argsort(-after, kind="stable")[:TOP].tolist()
        shown += [number for number in dict.fromkeys((label, int(before.argmax()))) if number >= 0 and number not in shown]
        return {"own": {"sigmoid": _numbers(own.sigmoid), "weights": _numbers(own.weights)},
                "now": {"sigmoid": _numbers(now.sigmoid), "weights": _numbers(now.weights)},
                "top": [[self._class(i), _number(before[i]), _number(after[i])] for i in shown],
                "predicted": [self._class(p.argmax()) for p in (before, after)],
                "right": [None if label < 0 else bool(p.argmax() == label) for p in (before, after)]}

    # --------------------------------------------------------------------------------------------------- saving

    def _stored(self, index: int) -> Stored:
        path = edits.path_of(self.folder, self.gallery.name(index))
        self.edited[index] = os.path.lexists(path)
        if not self.edited[index]:
            return Stored("", None)
        revision = "unreadable"
        try:
            if path.is_file() and not path.is_symlink():
                with open(path, "rb") as stream:
                    revision = hashlib.sha256(stream.read(edits.MAX_BYTES + 1)).hexdigest()[:16]
            edit, checksum = edits.read(path), self.gallery.checksum(index)
        except OSError as error:
            return Stored(revision, None, f"{path}: {error.strerror}")
        except (edits.EditError, ImageError) as error:
            return Stored(revision, None, str(error))
        if edit.checksum != checksum or edit.image != self.gallery.name(index):
            return Stored(revision, None, f"{path}: the edit is of another image: the image has changed, or the file was moved")
        return Stored(revision, edit)

    def save(self, index: int, revision: str, values: np.ndarray, edited: np.ndarray) -> dict | None:
        """Save an edit to the disk and return {"revision"}. Returns None and writes nothing if the file's revision is not
        `revision` any more.

        Without an edited patch the file is removed. A file that is not an edit of this image is kept as NAME.json.damaged.
        Raises ImageError, and EditError or OSError for errors of the disk.
        """
        path = edits.path_of(self.folder, self.gallery.name(index))
        region, checksum = self.gallery.region(index), self.gallery.checksum(index)
        with self._request(), self._saving:
            stored = self._stored(index)
            if stored.revision != revision:
                return None
            if stored.problem:
                _set_aside(path)
            if edited.any():
                when = datetime.now().astimezone().isoformat(timespec="seconds")
                note = stored.edit.note if stored.edit else ""
                edits.write(path, edits.Edit(self.gallery.name(index), checksum, values, edited, region, self.who, when, note))
            else:
                path.unlink(missing_ok=True)
            return {"revision": self._stored(index).revision}

    # --------------------------------------------------------------------------------------------------- search

    @contextlib.contextmanager
    def _request(self) -> Iterator[None]:
        """Pause the search during the block and shortly after."""
        with self._count:
            self._busy += 1
        try:
            yield
        finally:
            with self._count:
                self._busy -= 1
            self._last = time.monotonic()

    def search(self, stop: threading.Event) -> None:
        """Predict every image, in batches of about a tenth of a second, and only while there are no requests."""
        size, index = 1, 0
        while index < len(self.predicted):
            while self._busy or time.monotonic() - self._last < IDLE_S:
                if stop.wait(0.02):
                    return
            if stop.is_set():
                return
            batch = list(range(index, min(index + size, len(self.predicted))))
            started = time.monotonic()
            self.predicted[batch] = self.gallery.predict(batch)
            index += size
            size = int(size * BATCH_SECONDS / max(time.monotonic() - started, 1e-3))
            size = min(max(size, 1), LARGEST_BATCH)


def fitted(edit: edits.Edit, grid: tuple[int, int], region: tuple[float, float, float, float]) -> edits.Edit:
    """Resample the edit to the patches of `grid` over `region`: each gets the edit's value at its center."""
    if edit.values.shape == grid and np.allclose(edit.region, region, atol=1e-3):
        return edit
    places, inside = [], []
    for dim, count in enumerate(grid):
        (first, last), (edge, end), theirs = region[dim::2], edit.region[dim::2], edit.values.shape[dim]
        middles = first + (np.arange(count) + 0.5) / count * (last - first)
        place = np.floor((middles - edge) / (end - edge) * theirs).astype(int)
        places.append(place.clip(0, theirs - 1))
        inside.append((place >= 0) & (place < theirs))
    chosen = np.ix_(*places)
    edited = edit.edited[chosen] & inside[0][:, None] & inside[1][None]
    values = np.where(edited, edit.values[chosen], 0).astype(np.float32)
    return dataclasses.replace(edit, values=values, edited=edited, region=tuple(region))


def _set_aside(path: Path) -> None:
    names = [f"{path.name}.damaged", *(f"{path.name}.damaged-{number}" for number in range(2, 1000))]
    path.rename(next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name))))


def _numbers(values: np.ndarray) -> list[list[float]]:
    return [[_number(value) for value in row] for row in values]


def _number(value: float) -> float:
    return float(f"{value:.5g}")
