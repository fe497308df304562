"""Writes digits.npz, the embedded data set: scikit-learn's copy of the 8 x 8 handwritten digits, in the same order.

The 1,797 images are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak,
1998, UCI Machine Learning Repository, CC BY 4.0). Needs scikit-learn, which nothing else here does:

    python assets/make_digits.py
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits


def main() -> None:
    parser = argparse.ArgumentParser(description="Write scikit-learn's 8 x 8 digits as an .npz file.")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("digits.npz"))
    output = parser.parse_args().output

    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    # The values are floats; astype would silently change a value that is not an integer from 0 to 16.
    if images.shape != (1797, 8, 8) or not np.array_equal(images, digits.images) or images.max() != 16:
        raise SystemExit("scikit-learn's digits are not 1,797 images of 8 x 8 counts from 0 to 16")
    np.savez_compressed(output, images=images, labels=labels)
    print(f"{output}: {len(images)} images, SHA-256 {hashlib.sha256(output.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
