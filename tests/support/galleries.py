"""A gallery for the tests of the editor: a model in plain numpy, a few images, no checkpoint.

The model has one head: the logit of a patch rises with its brightness, a query attends to a class token (logit 0) and the
patches, and the logits of the classes are the attention-weighted mean of fixed values of the patches. As a program, this file
serves the gallery: python tests/support/galleries.py FOLDER PORT
"""

import contextlib
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.attention.editor import session as editing
from utils.data import splits

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def gallery(grid: tuple[int, int] = (4, 4), count: int = 12, patch: int = 8, unreadable: tuple[int, ...] = (),
            labelled: bool = True, region=(0.0, 0.0, 1.0, 1.0)) -> editing.Gallery:
    """Return a gallery. The label of an image is the model's prediction, except for every fourth image: it has the next class."""
    h, w = grid
    values = np.random.default_rng(0).normal(size=(h * w, len(CLASSES))) * 6
    images = [picture(i, h * patch, w * patch) for i in range(count)]

    def pixels(index: int) -> np.ndarray:
        if index in unreadable:
            raise splits.ImageError(f"images/{index}.png: cannot be read as an image (cut off)")
        return images[index]

    def predict_with_attention(index: int, edit=None, edited=None) -> editing.Prediction:
        bright = pixels(index).mean(axis=2).reshape(h, patch, w, patch).mean(axis=(1, 3)) / 255
        logits = 6 * bright - 3
        sigmoid = 1 / (1 + np.exp(-logits))
        if edited is not None:
            wanted = np.clip(np.asarray(edit, float), 2.0 ** -24, 1 - 2.0 ** -24)
            logits = np.where(edited, np.log(wanted / (1 - wanted)), logits)
        weights = np.exp(logits) / (1 + np.exp(logits).sum())
        scores = np.exp(weights.ravel() @ values)
        return editing.Prediction(scores / scores.sum(), sigmoid, weights)

    def predict(indices: list[int]) -> list[int]:
        return [editing.UNREADABLE if i in unreadable else int(predict_with_attention(i).probabilities.argmax()) for i in indices]

    labels = [0 if label < 0 else (label + (i % 4 == 3)) % len(CLASSES) for i, label in enumerate(predict(list(range(count))))]
    return editing.Gallery(
        title="fake", facts=("a model of numpy", f"{count} images"), classes=CLASSES, labels=np.array(labels if labelled
                                                                                                     else [-1] * count),
        grid=grid, img_size=(h * patch, w * patch), name=lambda index: f"train/{index}.png",
        checksum=lambda index: "sha256:" + hashlib.sha256(images[index].tobytes()).hexdigest(),
        region=lambda index: pixels(index) is not None and region, picture=lambda index: Image.fromarray(pixels(index)),
        predict_with_attention=predict_with_attention, predict=predict)


def picture(number: int, height: int, width: int) -> np.ndarray:
    """Return uint8 (height, width, 3): a bright disc on a gradient, at another position in each image"""
    y, x = np.mgrid[:height, :width]
    middle = np.random.default_rng(number).uniform(0.25, 0.75, 2) * (height, width)
    disc = np.hypot(y - middle[0], x - middle[1]) < min(height, width) / 4
    shade = (60 + 90 * x / width)[..., None] * (1.0, 0.8, 0.6)
    return np.where(disc[..., None], (250, 220, 120), shade).astype(np.uint8)


def values_of(path: Path) -> list[list[float | None]]:
    return json.loads(path.read_text())["values"]


@contextlib.contextmanager
def serving(session: editing.Session, port: int = 0, host: str = "127.0.0.1") -> Iterator[int]:
    """Serve in a thread of this process -> the port"""
    from utils.attention.editor import server as editor

    with editor.listen("127.0.0.1", port) as listening, editor.searching(session):
        server = editor.server(session, host)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)


def main(folder: str, port: str, sides: str = "4x4", images: str = "12") -> None:
    from utils.attention.editor import server as editor

    with editor.listen("127.0.0.1", int(port)) as listening:
        print(listening.getsockname()[1], flush=True)
        grid = tuple(map(int, sides.split("x")))
        editor.serve(editor.Session(gallery(grid, int(images)), Path(folder)), listening, "127.0.0.1")


if __name__ == "__main__":
    main(*sys.argv[1:])
