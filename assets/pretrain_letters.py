"""Writes ViT-Nano_2-letters.npz, the embedded checkpoint: ViT-Nano_2 trained to classify drawn letters.

Each batch is newly drawn (letters.py), and none of the images is a digit. It takes minutes on a 2-core CPU:

    python assets/pretrain_letters.py
"""

import argparse
import hashlib
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))     # the project is used from its folder, not installed

from letters import SHAPES, draw_letters  # noqa: E402

from models import create_model, save_npz  # noqa: E402

BATCH, DRAWN_BATCHES = 128, 50           # letters are drawn for many batches at a time, which is faster
LEARNING_RATE, WEIGHT_DECAY, WARMUP, CLIP = 2e-3, 0.05, 0.05, 1.0
TEST_LETTERS = 5000


def letters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (count, 3, 8, 8) in -1..1, as the model gets the digits, and labels (count,)."""
    images, labels = draw_letters(count, seed)
    pixels = np.round(images * np.float32(255 / 16)) / np.float32(127.5) - 1
    return torch.from_numpy(pixels)[:, None].expand(-1, 3, -1, -1), torch.from_numpy(labels)


def learning_rate(step: int, steps: int) -> float:
    """Return the learning rate: linear warm-up, then a cosine to zero."""
    warmup = max(round(WARMUP * steps), 1)
    if step < warmup:
        return LEARNING_RATE * (step + 1) / warmup
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def train(model: nn.Module, steps: int, seeds: np.random.Generator) -> None:
    """Train with AdamW; each letter is used once."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    model.train()
    for step in range(steps):
        part = step % DRAWN_BATCHES
        if part == 0:
            images, labels = letters(DRAWN_BATCHES * BATCH, int(seeds.integers(2**31)))
        rows = slice(part * BATCH, (part + 1) * BATCH)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return (model(images).argmax(dim=1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train ViT-Nano_2 on procedurally drawn letters.")
    parser.add_argument("--output", type=Path, default=HERE / "ViT-Nano_2-letters.npz", help="where to write")
    parser.add_argument("--steps", type=int, default=1000, help=f"optimizer steps of {BATCH} letters")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the letters")
    args = parser.parse_args()

    started = time.perf_counter()
    torch.manual_seed(args.seed)
    seeds = np.random.default_rng(args.seed)
    model = create_model("ViT-Nano_2", num_classes=len(SHAPES), img_size=8)
    train(model, args.steps, seeds)
    save_npz(model, args.output)
    fresh = accuracy(model, *letters(TEST_LETTERS, int(seeds.integers(2**31))))
    print(f"{args.output}: {args.output.stat().st_size} bytes, "
          f"SHA-256 {hashlib.sha256(args.output.read_bytes()).hexdigest()}")
    print(f"accuracy on {TEST_LETTERS} fresh letters {fresh:.4f}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
