"""Training works on unusual images: 16 bits of which few are used, photographs of phones, shapes in the alpha channel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from deep_images import tiff16
from PIL import Image
from runs import state_of

from utils.data.reading import Reading

FLAGS = ["--dataset", "folder", "--data_dir", "tree", "--recipe", "digits", "--model_type", "ViT-Nano_2",
         "--pretrained_dir", "none", "--img_size", 16, "--patch_size", 4, "--hidden_size", 32, "--num_heads", 2,
         "--num_layers", 1, "--mlp_dim", 64, "--augmentation", "none", "--num_steps", 60, "--train_batch_size", 16,
         "--learning_rate", "3e-3", "--eval_every", 60, "--num_workers", 0, "--name", "r"]


def striped(label: int, random, low: int, high: int) -> np.ndarray:
    """Return (16, 16) values around `low`, for class 1 with stripes up to `high`."""
    values = random.integers(low, low + (high - low) // 4, (16, 16))
    values[::4] += label * (high - low) * 3 // 4
    return values


def ten_bits(path: Path, label: int, number: int, random) -> None:
    Image.fromarray(striped(label, random, 300, 700).astype(np.uint16)).save(path.with_suffix(".png"))


def twelve_bits_signed(path: Path, label: int, number: int, random) -> None:
    path.with_suffix(".tif").write_bytes(tiff16(striped(label, random, 0, 3000).astype(np.int16)[..., None]))


def phone(path: Path, label: int, number: int, random) -> None:
    """Write an image that is light at the bottom or on the right. Every second one is stored rotated."""
    pixels = random.integers(0, 100, (16, 16, 3)).astype(np.uint8)
    side = pixels if label else pixels.swapaxes(0, 1)
    side[10:] += 150
    exif = Image.Exif()
    if number % 2:
        exif[0x0112], pixels = 8, np.rot90(pixels, -1)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path.with_suffix(".jpg"), exif=exif, quality=95)


def white_icons(path: Path, label: int, number: int, random) -> None:
    image = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    place = int(random.integers(0, 12))
    image.paste((255,) * 4, (place, 0, place + 4, 16) if label else (0, place, 16, place + 4))
    image.save(path.with_suffix(".png"))


KINDS = {
    "10 bits": (ten_bits, "images: of 48 sampled, 48 with 16 bits per channel, 0 to 1,023 read as black to white",
                Reading("follow", (0, 1023))),
    "12 bits, signed": (twelve_bits_signed, "48 with 16 bits per channel, 0 to 4,095 read as black to white",
                        Reading("follow", (0, 4095))),
    "phone": (phone, "images: of 48 sampled, 24 with an EXIF orientation, which is followed", Reading("follow")),
    "white icons": (white_icons, "images: of 48 sampled, 48 with an alpha channel, put on black",
                    Reading("follow", alpha="black"))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_from_them_and_keeps_the_way_to_read_them(kind, run_train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write, line, rule = KINDS[kind]
    random = np.random.default_rng(0)
    for number in range(48):
        path = Path("tree", ("train", "train", "val")[number % 3], "ab"[number // 3 % 2], f"{number}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, number // 3 % 2, number // 6, random)
    assert run_train(*FLAGS) == 0
    printed = capsys.readouterr().out
    assert line in printed and "warning" not in printed
    state = state_of("output/r")
    assert state.best["accuracy"] == 1.0 and Reading.of(state.config) == rule
    assert run_train("--eval_only", "--resume_path", "output/r") == 0
    assert "100.00%" in capsys.readouterr().out
    assert run_train("--resume_path", "output/r", "--exif", "off") == 2
    assert "--exif off: the checkpoint was made with follow, and a resumed run keeps it" in capsys.readouterr().err
    assert run_train("--resume_path", "output/r", "--num_steps", 61, "--exif", "auto") == 0
    assert Reading.of(torch.load("output/r/best.pt", weights_only=True)["config"]) == rule
