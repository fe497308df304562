"""What timm and transformers computed for small models of many families (tests/fixtures/families.npz): a folder with such a
model, as the program saves it, gives the same logits, tokens and maps here, at three sizes.
"""

import json

import numpy as np
import pytest
import torch
from family_numbers import (
    CASES,
    CLASSES,
    GRIDS,
    contents,
    described,
    expected,
    has_head,
    images_of,
    kept_of,
    pixels,
    program_of,
    recorded,
    write_folder,
)

from models import create_model, record_attention

TOLERANCE = 1e-5                                    # of the largest number


def opened(case: str, folder: object, size: str, **keys) -> torch.nn.Module:
    """Open a folder with only the size given, and the program's resizing of positions if its family has another."""
    keys = ({"position_resize": CASES[case].resize} if CASES[case].resize else {}) | keys
    head = {"head": "keep"} if has_head(case) else {"num_classes": CLASSES}
    return create_model(pretrained=folder, img_size=pixels(case, size), **head, **keys).eval()


@torch.inference_mode()
def computed(case: str, model: torch.nn.Module) -> dict[str, np.ndarray]:
    images = images_of(*model.img_size)
    with record_attention(model) as maps:
        tokens = model.forward_features(images)
        output = model.forward_head(tokens) if has_head(case) else model.pool(tokens)
    if has_head(case):
        assert torch.equal(model(images), output)
    return kept_of(output, tokens, maps)


def difference(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Return the largest difference, relative to the largest number of each array. The map of a pooling may be missing."""
    assert {*found, "pool_map"} == {*wanted, "pool_map"}
    return max(float(np.abs(found[name] - wanted[name]).max() / np.abs(wanted[name]).max()) for name in wanted)


@pytest.mark.parametrize("case", CASES)
def test_a_folder_gives_the_numbers_of_its_program(tmp_path, case):
    folder = write_folder(tmp_path / "x", case)
    for size in GRIDS:
        assert difference(computed(case, opened(case, folder, size)), expected(case, size)) < TOLERANCE, size


@pytest.mark.parametrize("case, size, keys", [
    ("timm/siglip", "native", {"gelu": "tanh"}), ("timm/clip", "native", {"gelu": "erf"}),
    ("timm/pe", "native", {"gelu": "quick"}), ("transformers/tipsv2", "wide", {"position_resize": "bilinear_unaligned"}),
    ("timm/dinov2", "native", {"norm_eps": 1e-5}), ("timm/dinov3", "native", {"norm_eps": 1e-6}),
    ("transformers/ijepa", "native", {"norm_eps": 1e-12}), ("timm/aimv2", "native", {"norm_eps": 1e-6}),
    ("timm/dinov3", "native", {"rope": "eva", "rope_grid": 16}), ("timm/eva02", "native", {"rope": "pe"}),
    ("timm/pe", "native", {"rope": "eva"}), ("timm/eva02", "native", {"rope_grid": 14}), ("timm/pe", "native", {"pool_heads": 1}),
    ("timm/dinov2_reg", "larger", {"position_resize": "bicubic"}),
    ("transformers/dinov2", "wide", {"position_resize": "bicubic_offset"})])
def test_what_no_array_shows_changes_the_numbers(tmp_path, case, size, keys):
    model = opened(case, write_folder(tmp_path / "x", case), size, **keys)
    assert difference(computed(case, model), expected(case, size)) > 3 * TOLERANCE


@pytest.mark.reference
@pytest.mark.parametrize("case", CASES)
def test_the_programs_compute_these_numbers_today(case):
    """They also write these names, shapes and settings. If not: tests/support/family_numbers.py says how to write the file
    again."""
    pytest.importorskip(program_of(case))
    found, stored = recorded(case), described(case)
    now = json.loads(str(found.pop(case)))
    for each in (now, stored):
        each["config"].pop("transformers_version", None)
    assert now == stored
    wanted = {name: value for name, value in contents().items() if name.startswith(f"{case}/")}
    assert found.keys() == wanted.keys() and difference(found, wanted) < TOLERANCE
