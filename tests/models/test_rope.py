"""Rotary positions, compared with the published formulas for one pair of numbers at a time."""

import copy
import math

import pytest
import torch

from configs import architecture
from models import create_model
from models.rope import Rope

GRID, WIDTH = (3, 5), 8
ROW, SIZE = architecture(4, 16, 32, 2, 2, rope="dinov3", positions="none", registers=2), (12, 20)


def rotated(kind: str, x: list[float], row: int, column: int, reference: int, offset: int) -> list[float]:
    """Rotate one head of one patch, number by number."""
    h, w = GRID
    quarter = WIDTH // 4
    if kind == "dinov3":
        y, x_ = 2 * (row + 0.5) / h - 1, 2 * (column + 0.5) / w - 1
        angles = [2 * math.pi * place * 100 ** (-4 * j / WIDTH) for place in (y, x_) for j in range(quarter)]
        pairs = [(i, i + WIDTH // 2, angle) for i, angle in enumerate(angles)]
    else:
        y, x_ = (row + offset) * reference / h, (column + offset) * reference / w
        places = (x_, y) if kind == "pe" else (y, x_)
        angles = [place * 10_000 ** (-4 * j / WIDTH) for place in places for j in range(quarter)]
        pairs = [(2 * i, 2 * i + 1, angle) for i, angle in enumerate(angles)]
    out = list(x)
    for a, b, angle in pairs:
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
    return out


@pytest.mark.parametrize("kind, has_cls", [("dinov3", True), ("eva", True), ("pe", True), ("pe", False)])
def test_only_patches_are_rotated_by_the_published_angles(kind, has_cls):
    x = torch.randn(2, 3, 2 + 15, WIDTH, dtype=torch.float64)
    out = Rope(kind, WIDTH, GRID, 2, 4, has_cls).double()(x)
    assert torch.equal(out[:, :, :2], x[:, :, :2])
    for row, column in ((0, 0), (0, 4), (2, 0), (1, 3)):
        place = 2 + row * GRID[1] + column
        want = rotated(kind, x[1, 2, place].tolist(), row, column, 4, int(kind == "pe" and has_cls))
        torch.testing.assert_close(out[1, 2, place], torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("change", [
    lambda model: model.half().float(), lambda model: model.to_empty(device="cpu"), copy.deepcopy,
    lambda model: model.bfloat16(), lambda model: model.to("meta").to_empty(device="cpu")])
def test_tables_stay_in_float32_when_the_weights_change_type(change):
    model = create_model(ROW, 3, SIZE)
    wanted = model.blocks[0].attn.rope.cos.clone(), model.blocks[0].attn.rope.sin.clone()
    found = change(model).blocks[1].attn.rope
    assert found.cos.dtype == torch.float32 and torch.equal(found.cos, wanted[0]) and torch.equal(found.sin, wanted[1])
    assert not any("rope" in name for name in model.state_dict())


def test_a_model_built_on_the_meta_device_has_its_tables():
    with torch.device("meta"):
        empty = create_model(ROW, 3, SIZE)
    model, images = create_model(ROW, 3, SIZE).eval(), torch.randn(1, 3, 12, 20)
    torch.nn.init.normal_(model.head.weight)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty.eval()(images), model(images))


def test_half_precision_is_rotated_in_float32():
    x, rope = torch.randn(1, 1, 15, WIDTH).bfloat16(), Rope("eva", WIDTH, GRID, 0, 16, True)
    assert torch.equal(rope(x), rope(x.float()).bfloat16())
