"""Make the sheets in docs/pictures: train small models of six families on images drawn here, and draw all their pictures.

    python assets/make_pictures.py FOLDER        # for images, runs and pictures; what it has already is kept

The images are shapes on textured ground, of 10 and of 100 classes; two images of val have a wrong label. The sheets show what a
picture is like, not how good a model can be: each is trained for a minute or less, and for 100 classes continues from 10.
"""

import contextlib
import hashlib
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")               # before PyTorch is loaded: such small models gain nothing from more

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
import visualize  # noqa: E402
from utils.attention import edits  # noqa: E402

SIDE, GRID = 256, (8, 8)                                    # of an image in pixels, of its edit in patches
COLORS = {"red": (214, 58, 46), "orange": (240, 148, 44), "yellow": (238, 214, 70), "green": (64, 148, 74),
          "cyan": (74, 190, 200), "blue": (50, 90, 190), "violet": (130, 80, 180), "pink": (236, 130, 170),
          "white": (240, 238, 230), "black": (34, 32, 36)}
CORNERS = {"triangle": (3, (1,)), "square": (4, (1,)), "pentagon": (5, (1,)), "star": (10, (1, 0.45)), "cross": (12, (1, 1, 0.4))}
SHAPES = (*CORNERS, "disk", "ring", "crescent", "bar", "dots")
SMALL = "--patch_size 8 --hidden_size 48 --mlp_dim 96 --pretrained_dir none"
FAMILIES = {                                                # the flags of train.py
    "ViT": f"--model_type ViT-Ti_16 {SMALL} --num_heads 3 --num_layers 6 --img_size 64",
    "DeiT-distilled": f"--model_type DeiT-Ti_16-distilled {SMALL} --num_heads 3 --num_layers 12 --img_size 64",
    "CaiT": f"--model_type CaiT-XXS24 {SMALL} --num_heads 4 --num_layers 12 --img_size 64",
    "DINOv2-registers": f"--model_type DINOv2-S_14-reg {SMALL} --num_heads 4 --num_layers 6 --img_size 64",
    "SigLIP": f"--model_type SigLIP-B_16 {SMALL} --num_heads 4 --num_layers 6 --img_size 64",
    "not-square": f"--model_type ViT-Ti_16 {SMALL} --num_heads 3 --num_layers 6 --img_size 48x96"}
SLOW = ("CaiT", "DINOv2-registers")                         # their blocks begin with an output near 0: more steps, a higher rate
WRONG = (2, 7)                                              # classes whose last image of val shows the next class
TRAINING = "--train_batch_size 64 --warmup_steps 20 --num_workers 0"
EDITS = "--sigmoid_attention last --attention_loss_weight 20 --train_batch_size 64 --num_workers 0"
# verb: its options
PICTURES = {"attention": "--images 1", "rollout": "--images 1", "grad-rollout": "--images 1", "class-attention": "--images 1",
            "distance": "--images 8", "position": "", "filters": "", "curves": "", "confusion": ""}
TAUGHT = ("ViT", "not-square")                              # families that learn edits too
# sheet: its columns; pictures: the families
SHEETS = {"attention": (3, {"attention": FAMILIES}),
          "joint-attention": (3, {"rollout": FAMILIES, "grad-rollout": FAMILIES, "class-attention": ("CaiT",)}),
          "weights": (4, {"position": FAMILIES, "distance": FAMILIES}), "filters": (3, {"filters": FAMILIES}),
          "runs": (2, {"curves": ("ViT", "DeiT-distilled", "CaiT", "DINOv2-registers", "SigLIP", "all six")}),
          "mistakes": (2, {"confusion": ("DINOv2-registers", "not-square")}),
          "batches-and-edits": (2, {"edits": TAUGHT, "batch": TAUGHT})}


def draw_image(shape: str, color: str, generator: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """-> (a shape at a random place, size and angle on textured ground, its mask), of SIDE pixels"""
    rough = generator.integers(60, 190, (6, 6, 3), dtype=np.uint8)
    grain = Image.fromarray(generator.integers(90, 165, (SIDE, SIDE, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1))
    ground = Image.blend(Image.fromarray(rough).resize((SIDE, SIDE), Image.Resampling.BICUBIC), grain, 0.3)
    size, turn = generator.uniform(0.16, 0.3) * SIDE, generator.uniform(0, 2 * math.pi)
    x, y = generator.uniform(1.2 * size, SIDE - 1.2 * size, 2)
    mask = Image.new("L", (SIDE, SIDE))
    pen = ImageDraw.Draw(mask)

    def at(distance: float, angle: float) -> tuple[float, float]:
        return x + distance * size * math.cos(turn + angle), y + distance * size * math.sin(turn + angle)

    def disk(center: tuple[float, float], radius: float, fill: int = 255) -> None:
        pen.ellipse([side + sign * radius * size for sign in (-1, 1) for side in center], fill=fill)

    if shape in CORNERS:
        count, radii = CORNERS[shape]
        pen.polygon([at(radii[number % len(radii)], 2 * math.pi * number / count) for number in range(count)], fill=255)
    elif shape == "bar":
        pen.line((*at(1, 0), *at(-1, 0)), fill=255, width=int(0.5 * size))
    elif shape == "dots":
        for number in range(3):
            disk(at(0.6, 2 * math.pi * number / 3), 0.35)
    else:
        disk((x, y), 1)
        if shape != "disk":
            disk(at(0.5 * (shape == "crescent"), 0), 0.8 if shape == "crescent" else 0.55, fill=0)
    light = (np.linspace(1.15, 0.7, SIDE)[:, None, None] * np.array(COLORS[color])).clip(0, 255).repeat(SIDE, axis=1)
    ground.paste(Image.fromarray(light.astype(np.uint8)), mask=mask.filter(ImageFilter.GaussianBlur(0.8)))
    return ground, mask


def draw_images(folder: Path, classes: int, counts: dict[str, int]) -> None:
    """Draw class folders in train and val: 10 classes of another color and shape each, or all 100 pairs; write edits of every
    class's first image to folder/edits, which mark the shape."""
    if (folder / "edits").exists():
        return
    generator = np.random.default_rng(classes)
    pairs = list(zip(COLORS, SHAPES)) if classes == 10 else [(color, shape) for color in COLORS for shape in SHAPES]
    for part, count in counts.items():
        for index, pair in enumerate(pairs):
            for number in range(count):
                name = f"{part}/{' '.join(pair)}/{number:03}.jpg"
                file = folder / name
                file.parent.mkdir(parents=True, exist_ok=True)
                wrong = part == "val" and index in WRONG and number == count - 1
                color, shape = pairs[index + 1] if wrong else pair
                image, mask = draw_image(shape, color, generator)
                if not file.exists():
                    image.save(file, quality=88)
                if number == 0:
                    marked = np.asarray(mask.resize(GRID, Image.Resampling.BOX)) > 60
                    checksum = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
                    edits.write(edits.path_of(folder / "edits", name), edits.Edit(
                        name, checksum, np.where(marked, 0.9, 0.1).astype(np.float32), np.ones(GRID, bool)))


def run(folder: Path, name: str, flags: str) -> Path:
    """Train, unless the run has a checkpoint already -> its folder"""
    if not (folder / name / "best.pt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{name}.txt", "w", encoding="utf-8") as printed, contextlib.redirect_stdout(printed):
            assert train.main([*flags.split(), "--name", name, "--output_dir", str(folder), "--log_dir", f"{folder}/logs"]) == 0
    return folder / name


def make_sheet(pictures: list[tuple[str, Path]], columns: int, file: Path) -> None:
    """Paste pictures with their names, reduced to one width, each into the shortest column, into a file of less than 400 kB."""
    width, font = 1560 // columns, ImageFont.load_default(14)
    sheet, ends = Image.new("RGB", (width * columns, 9999), "white"), [0] * columns
    for name, path in pictures:
        tile, column = Image.open(path).convert("RGB"), ends.index(min(ends))
        tile = tile.resize((width, tile.height * width // tile.width), Image.Resampling.LANCZOS)
        ImageDraw.Draw(sheet).text((column * width + 6, ends[column] + 4), name, "black", font)
        sheet.paste(tile, (column * width, ends[column] + 22))
        ends[column] += 30 + tile.height
    sheet = sheet.crop((0, 0, sheet.width, max(ends)))
    enough = sheet.width * sheet.height // 100              # pixels that still change their color when the search ends
    for colors in (256, 128, 64):                           # MAXCOVERAGE keeps rare colors: the ends of scales
        reduced = sheet.quantize(colors, Image.Quantize.MAXCOVERAGE, kmeans=enough, dither=Image.Dither.NONE)
        reduced.save(file, optimize=True)
        if file.stat().st_size < 400_000:
            break


def draw(verb: str, options: str, file: Path, *checkpoints: Path) -> None:
    """Draw a picture with visualize.py, unless it is there."""
    if not file.exists():
        assert visualize.main([verb, "--checkpoint", *map(str, checkpoints), *options.split(), "--output", str(file)]) == 0


def train_and_draw(folder: Path, classes: int, counts: dict[str, int], length: int) -> Path:
    """Train every family, for about `length` steps, and draw its pictures -> the folder of the runs"""
    data, runs = folder / f"shapes{classes}", folder / f"runs{classes}"
    draw_images(data, classes, counts)
    source = f"--dataset folder --data_dir {data}"
    for name, flags in FAMILIES.items():
        steps, rate = (length * 3 // 2, 4e-3) if name in SLOW and classes == 10 else (length, 2e-3)
        if classes == 100:
            flags = flags.replace("--pretrained_dir none", f"--pretrained_dir {folder / 'runs10' / name}")
        run(runs, name, f"{source} {flags} {TRAINING} --learning_rate {rate} --num_steps {steps} --eval_every {steps // 8}")
        for verb, options in PICTURES.items():
            if verb != "class-attention" or name == "CaiT":
                draw(verb, options, runs / name / f"{verb}.png", runs / name)
    for name in TAUGHT:
        flags = FAMILIES[name].replace("--pretrained_dir none", f"--pretrained_dir {runs / name}")
        flags += f" {EDITS} --num_steps {min(length, 100)} --attention_edits {data / 'edits'}"
        taught = run(runs, f"{name}-edits", f"{source} {flags}")
        (runs / name / "edits.png").write_bytes((taught / "attention.png").read_bytes())
    draw("curves", "", runs / "all six" / "curves.png", *(runs / name for name in FAMILIES))
    return runs


def main(folder: Path) -> None:
    for classes, counts, length in ((10, {"train": 60, "val": 12}, 160), (100, {"train": 12, "val": 4}, 40)):
        runs = train_and_draw(folder, classes, counts, length)
        for sheet, (columns, drawn) in SHEETS.items():
            files = [(f"{name}: {verb}", runs / name / f"{verb}.png") for verb, names in drawn.items() for name in names]
            make_sheet(files, columns, ROOT / f"docs/pictures/{sheet}-{classes}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
