"""The baseline that the README names: 3 nearest neighbours on the raw pixels of the embedded digits.

    python assets/nearest_neighbours.py
"""

from pathlib import Path

import numpy as np

NEIGHBOURS = 3


def main() -> None:
    with np.load(Path(__file__).parent / "digits.npz") as file:
        images, labels = file["images"].reshape(-1, 64).astype(np.float64), file["labels"]
    train, test = slice(0, 1297), slice(1297, None)      # the training and validation blocks of utils/data/datasets.py; its test
    distances = ((images[test, None] - images[None, train]) ** 2).sum(axis=-1)
    nearest = labels[train][distances.argsort(axis=1, kind="stable")[:, :NEIGHBOURS]]
    predicted = [np.bincount(row, minlength=10).argmax() for row in nearest]
    print(f"{NEIGHBOURS}-nearest-neighbours: {np.mean(predicted == labels[test]):.1%} of {len(predicted)} test digits")


if __name__ == "__main__":
    main()
