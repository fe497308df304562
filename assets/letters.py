"""Draws 8 x 8 letters, the pre-training data of ViT-Nano_2-letters.npz, without digits and without fonts.

A letter is a few strokes on a 9 x 9 grid. Each drawing moves the points of its strokes, slants and turns the letter, fits
it to the box that the UCI digits fill, draws it with a pen of random width at 32 x 32 pixels and counts the pixels that
are on in blocks of 4 x 4, as the digits were made: values 0..16.

    images, labels = draw_letters(count=1000, seed=0)
"""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

# One or more ways to write each letter, upper and lower case. A way consists of strokes separated by commas; a stroke
# consists of points of two digits, column and row, each 0..8, row 0 at the top; "~" draws a smooth curve through its
# points instead of straight lines.
SHAPES: dict[str, tuple[str, ...]] = {
    "A": ("08 40 88, 25 65", "~72 40 13 05 37 75, 70 78", "~12 40 72 78, ~74 34 06 38 76"),
    "B": ("00 08, ~00 50 72 54 04, ~04 64 86 68 08", "00 08, ~05 43 75 77 48 07"),
    "C": ("~82 60 21 04 27 68 86",),
    "D": ("00 08, ~00 41 84 47 08", "80 88, ~85 43 15 17 48 87"),
    "E": ("80 00 08 88, 04 64", "~05 45 83 50 12 05 28 68 87"),
    "F": ("80 00 08, 04 64", "~81 50 33 38, 04 74"),
    "G": ("~82 50 11 05 28 67 85, 45 85", "~71 30 02 35 72, ~70 74 77 48 07"),
    "H": ("00 08, 80 88, 04 84", "00 08, ~05 33 74 88"),
    "I": ("40 48, 20 60, 28 68", "43 48, 40 41"),
    "J": ("~60 64 57 28 06, 20 80", "~63 67 38 07, 60 61"),
    "K": ("00 08, 80 04, 24 88", "00 08, 73 05, 35 88"),
    "L": ("00 08 88", "~30 36 58 78"),
    "M": ("08 10 45 70 88", "02 08, ~04 22 44 48, ~44 62 84 88"),
    "N": ("08 00 88 80", "00 08, ~04 31 74 88"),
    "O": ("~40 11 04 17 48 77 84 71 40",),
    "P": ("00 08, ~00 60 82 64 04",),
    "Q": ("~40 11 04 17 48 77 84 71 40, 55 88", "80 88, ~81 40 03 35 84"),
    "R": ("00 08, ~00 60 82 64 04, 34 88", "10 18, ~14 41 82"),
    "S": ("~71 40 12 44 76 48 07",),
    "T": ("00 80, 40 48", "~30 36 58 87, 03 73"),
    "U": ("~00 05 28 68 85 80", "~00 05 38 76 80, 80 88"),
    "V": ("00 48 80",),
    "W": ("00 28 42 68 80", "~00 17 38 43 58 77 80"),
    "X": ("00 88, 80 08",),
    "Y": ("00 44, 80 44 48", "00 45, 80 18", "~00 14 44 70, ~70 75 48 17"),
    "Z": ("00 80 08 88", "00 80 08 88, 24 64"),
}

SIDE, BLOCK = 32, 4                      # pixels of a drawing, pixels of a counted block
CURVE_STEPS = 3                          # straight pieces between two points of a smooth stroke
CHUNK = 256                              # letters drawn at a time, so that the distance maps fit into the cache

POINT_JITTER = 0.9                       # standard deviation, in cells of the 9 x 9 grid
TURN, SLANT = 0.15, 0.25                 # half widths of the uniform range: radians, shear
WIDTH, HEIGHT = (15.0, 25.0), (29.0, 33.0)    # pixels of the box, pen included: narrow and full height
STRETCH = 1.7                            # the most that the width is stretched relative to the height: an I stays narrow
PEN = (1.6, 3.2)                         # radius of the pen in pixels
SHIFT = 1.0                              # pixels, half width


def stroke_matrix(points: int, smooth: bool) -> FloatArray:
    """Return (pieces + 1, points): a stroke's vertices as weighted sums of its points (Catmull-Rom if smooth)."""
    if not smooth:
        return np.eye(points, dtype=np.float32)
    t = np.arange(CURVE_STEPS, dtype=np.float32) / CURVE_STEPS
    weights = np.stack(
        [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2], axis=1) / 2
    matrix = np.zeros(((points - 1) * CURVE_STEPS + 1, points), np.float32)
    for piece in range(points - 1):
        rows = slice(piece * CURVE_STEPS, (piece + 1) * CURVE_STEPS)
        for k in range(4):
            matrix[rows, np.clip(piece + k - 1, 0, points - 1)] += weights[:, k]
    matrix[-1, -1] = 1
    return matrix


def parse(shape: str) -> list[tuple[FloatArray, FloatArray]]:
    """Return the points (P, 2), x and y, and the `stroke_matrix` of each stroke of one way to write a letter."""
    strokes = []
    for stroke in shape.split(","):
        stroke = stroke.strip()
        points = np.array([[int(x), int(y)] for x, y in stroke.lstrip("~").split()], np.float32)
        strokes.append((points, stroke_matrix(len(points), stroke.startswith("~"))))
    return strokes


def uniform(rng: np.random.Generator, low: float, high: float, count: int) -> FloatArray:
    return rng.uniform(low, high, (count, 1)).astype(np.float32)


def place(strokes: list[FloatArray], pen: FloatArray, rng: np.random.Generator) -> list[FloatArray]:
    """Turn and slant the strokes, each (n, V, 2), and fit each letter to a box like the digits'."""
    n = len(pen)
    turn, slant = uniform(rng, -TURN, TURN, n), uniform(rng, -SLANT, SLANT, n)
    strokes = [stroke - 4 for stroke in strokes]
    strokes = [np.stack([s[..., 0] + (turn - slant) * s[..., 1], s[..., 1] - turn * s[..., 0]], axis=2)
               for s in strokes]

    vertices = np.concatenate(strokes, axis=1)
    low, high = vertices.min(axis=1), vertices.max(axis=1)                            # (n, 2)
    box = np.concatenate([uniform(rng, *WIDTH, n), uniform(rng, *HEIGHT, n)], axis=1) - 2 * pen
    scale = box / np.maximum(high - low, 1e-3)
    scale[:, 0] = np.minimum(scale[:, 0], STRETCH * scale[:, 1])
    centre = SIDE / 2 + np.concatenate([uniform(rng, -SHIFT, SHIFT, n) for _ in range(2)], axis=1)
    return [(s - ((low + high) / 2)[:, None]) * scale[:, None] + centre[:, None] for s in strokes]


def rasterise(strokes: list[FloatArray], pen: FloatArray) -> NDArray[np.uint8]:
    """Return (n, 8, 8): how many pixels of each 4 x 4 block are within `pen` of a stroke. Strokes are in pixels."""
    n = len(pen)
    centres = np.arange(SIDE, dtype=np.float32) + 0.5
    nearest = np.full((n, SIDE, SIDE), np.inf, np.float32)                            # squared distance
    for stroke in strokes:
        for start, end in zip(stroke[:, :-1].transpose(1, 0, 2), stroke[:, 1:].transpose(1, 0, 2)):
            along = end - start                                                       # (n, 2)
            length2 = np.maximum((along**2).sum(axis=1), 1e-6)[:, None, None]
            from_start = centres[None, None] - start[:, :, None]                      # (n, 2, 32): x and y
            projection = along[:, :, None] * from_start
            projection = projection[:, 1, :, None] + projection[:, 0, None, :]        # (n, rows, columns)
            t = np.clip(projection / length2, 0, 1)
            # |pixel - start - t * along|^2, expanded so that the squares stay one-dimensional
            distance = t * (t * length2 - 2 * projection)
            distance += (from_start[:, 1] ** 2)[:, :, None]
            distance += (from_start[:, 0] ** 2)[:, None, :]
            np.minimum(nearest, distance, out=nearest)
    on = nearest <= pen[:, :, None] ** 2
    return on.reshape(n, SIDE // BLOCK, BLOCK, SIDE // BLOCK, BLOCK).sum(axis=(2, 4)).astype(np.uint8)


def draw_shape(shape: str, count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return `count` drawings of one way to write a letter, (count, 8, 8)."""
    strokes = []
    for points, matrix in parse(shape):
        moved = points + POINT_JITTER * rng.standard_normal((count, *points.shape), np.float32)
        strokes.append(matrix @ moved)
    pen = uniform(rng, *PEN, count)
    return rasterise(place(strokes, pen, rng), pen)


def draw_letters(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images (count, 8, 8), 0..16, and labels (count,), 0 for A to 25 for Z. Equal seeds give equal letters."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(SHAPES), size=count)
    ways = rng.random(count)
    images = np.zeros((count, SIDE // BLOCK, SIDE // BLOCK), np.uint8)
    for label, shapes in enumerate(SHAPES.values()):
        for way, shape in enumerate(shapes):
            rows = np.flatnonzero((labels == label) & ((ways * len(shapes)).astype(int) == way))
            for part in range(0, len(rows), CHUNK):
                chosen = rows[part:part + CHUNK]
                images[chosen] = draw_shape(shape, len(chosen), rng)
    return images, labels
