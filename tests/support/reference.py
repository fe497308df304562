"""The outputs of the published code for small random checkpoints (see fixtures/README.md).

A case is a checkpoint, images, and the outputs for them. ROWS are the architectures of the checkpoints in Google's layout;
FINE_TUNED are such checkpoints loaded for another image size, with another head. TORCH_ROWS are the architectures of the
checkpoints in PyTorch's formats (DeiT, CaiT, MAE, timm).
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs import META, architecture

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOOGLE, TORCH = FIXTURES / "google", FIXTURES / "torch_formats"

ROWS = {
    "g_p16_pre": architecture(16, 48, 80, 3, 3, img_size=64),
    "g_p16_224": architecture(16, 32, 64, 4, 2, img_size=224),
    "g_p14": architecture(14, 64, 96, 2, 2, img_size=56),
    "g_p32": architecture(32, 32, 48, 2, 4, img_size=96),
    "g_p16_lneps": architecture(16, 32, 64, 2, 2, img_size=64),
    "g_p16_gap": architecture(16, 48, 64, 3, 2, img_size=64, classifier="gap"),
    "g_r50b": architecture(1, 48, 96, 3, 2, img_size=64, resnet_layers=(2, 1, 1), resnet_width=32),
    "g_r50b_ft": architecture(1, 48, 96, 3, 2, img_size=96, resnet_layers=(1, 2, 1), resnet_width=32),
    "g_r26s32": architecture(1, 32, 64, 2, 2, img_size=96, resnet_layers=(1, 1, 1, 1), resnet_width=32),
    "g_rti16": architecture(8, 48, 64, 3, 2, img_size=64, resnet_layers=()),
}


HYBRIDS = {name for name, row in ROWS.items() if row.resnet_layers is not None}

# name: (the checkpoint's case, side of the new images)
FINE_TUNED = {
    "g_p16_pre_to96": ("g_p16_pre", 96),
    "g_p16_224_to384": ("g_p16_224", 384),
    "g_p16_224_to160": ("g_p16_224", 160),
    "g_r50b_to96": ("g_r50b", 96),
    "g_p16_gap_to96": ("g_p16_gap", 96),
}

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
TORCH_ROWS = {
    "deit": architecture(16, 24, 96, 3, 3, img_size=48, **META),
    "deit_dist": architecture(16, 24, 96, 3, 3, img_size=48, distilled=True, **META),
    "cait": architecture(16, 32, 128, 4, 3, img_size=64, class_layers=2, layer_scale=1e-5, **META),
    "mae_gp1": architecture(16, 24, 96, 3, 3, img_size=64, classifier="patch_mean", **META),
    "mae_gp0": architecture(16, 24, 96, 3, 3, img_size=64, **META),
    "timm_vit": architecture(16, 24, 96, 3, 3, img_size=48, **META | HALF),
}
TORCH_FILES = {
    "deit": "deit_tiny.pth", "deit_dist": "deit_tiny_distilled.pth", "cait": "cait_xxs_tiny.pth",
    "mae_gp1": "mae_finetuned_gp1.pth", "mae_gp0": "mae_finetuned_gp0.pth", "timm_vit": "timm_vit_tiny.safetensors"}


def weights(case: str) -> Path:
    """Return the checkpoint of a case of ROWS."""
    return GOOGLE / f"{case}.npz"


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of an .npz file with numpy."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def expected(case: str) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays(GOOGLE / f"{case}_expected.npz").items()}


def images(side: int) -> Tensor:
    """Return the images of the cases of this size (B, 3, side, side) in [-1, 1]."""
    with np.load(GOOGLE / "images.npz") as file:
        name, = (name for name in file.files if name.startswith(f"img_{side}_"))
        return normalize(file[name])


def normalize(pixels: np.ndarray) -> Tensor:
    """Convert (B, h, w, 3) uint8 to (B, 3, h, w) in [-1, 1]"""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def torch_state(case: str) -> dict[str, Tensor]:
    """Return the weights of a case of TORCH_ROWS, read without our loader, with names without the wrapper's "module."."""
    path = TORCH / TORCH_FILES[case]
    if path.suffix == ".pth":
        state = torch.load(path, weights_only=True)["model"]
        return {name.removeprefix("module."): value for name, value in state.items()}
    content = path.read_bytes()                # safetensors: the length of a JSON header, the header, the arrays
    start = 8 + int.from_bytes(content[:8], "little")
    state = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            assert entry["dtype"] == "F32"
            first, last = entry["data_offsets"]
            array = np.frombuffer(content[start + first: start + last], dtype="<f4")
            state[name] = torch.tensor(array).view(entry["shape"])
    return state


def torch_images(case: str) -> Tensor:
    """Return the images (B, 3, side, side), normalized as the row of the case says."""
    row = TORCH_ROWS[case]
    pixels = arrays(TORCH / "expected.npz")["mae/img"] if case.startswith("mae") else (
        arrays(TORCH / "images.npz")[f"img_{row.img_size}"])
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (row.mean, row.std))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


def torch_expected(prefix: str) -> dict[str, Tensor]:
    """Return the arrays of a prefix, for "deit" deit/..., by the rest of their names."""
    found = {name.removeprefix(f"{prefix}/"): torch.from_numpy(array) for name, array in arrays(TORCH / "expected.npz").items()
             if name.startswith(f"{prefix}/") and array.dtype == np.float32}
    assert found
    return found


def tolerance(case: str) -> float:
    """Return the largest difference of a logit that is due to float32."""
    return 3e-5 if case in HYBRIDS or FINE_TUNED.get(case, ("",))[0] in HYBRIDS else 1e-5


def published_layouts() -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the names and shapes of the file of every published model at 224 px with 1000 classes, with `pre_logits`."""
    layouts = {}
    for model, layout in json.loads((GOOGLE / "published_layouts.json").read_text()).items():
        shapes = dict(layout["other"])
        for i in range(layout["layers"]):
            shapes |= {f"Transformer/encoderblock_{i}/{name}": shape for name, shape in layout["encoderblock_i"].items()}
        layouts[model] = {name: tuple(shape) for name, shape in shapes.items()}
    return layouts
