"""Patch embedding, MLP, encoder block and resizing position tables, against formulas, published code and scipy."""

import math

import numpy as np
import pytest
import reference
import torch
from torch.nn import functional as F
from torchvision import ops

import configs
from models import create_model
from models.layers import RESIZE_RULES, Block, Mlp, PatchEmbed, RMSNorm, StochasticDepth, SwiGlu, resize_positions


def test_patches_are_in_row_order_and_projected_one_by_one():
    embed, images = PatchEmbed(4, 3, 6), torch.randn(2, 3, 8, 12)
    tokens = embed(images)
    assert tokens.shape == (2, 2 * 3, 6)
    for row in range(2):
        for column in range(3):
            patch = images[:, :, 4 * row: 4 * row + 4, 4 * column: 4 * column + 4].flatten(1)
            want = patch @ embed.proj.weight.flatten(1).t() + embed.proj.bias
            torch.testing.assert_close(tokens[:, 3 * row + column], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gelu, formula", [
    ("tanh", lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))),
    ("erf", lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    ("quick", lambda x: x / (1 + torch.exp(-1.702 * x))),
])
def test_gelu(gelu, formula):
    """The two forms differ by up to 5e-4, far more than the tolerance."""
    mlp = Mlp(4, 64, gelu).double()
    x = torch.linspace(-4, 4, 40, dtype=torch.float64).view(2, 5, 4)
    want = formula(x @ mlp.fc1.weight.t() + mlp.fc1.bias) @ mlp.fc2.weight.t() + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), want, atol=1e-12, rtol=0)


def test_swiglu_multiplies_the_gate_with_the_value():
    mlp, x = SwiGlu(4, 6, norm=torch.nn.LayerNorm(6)).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    torch.nn.init.normal_(mlp.norm.weight)
    gate, value = (x @ mlp.fc1.weight[rows].t() + mlp.fc1.bias[rows] for rows in (slice(0, 6), slice(6, 12)))
    want = mlp.norm(gate / (1 + torch.exp(-gate)) * value) @ mlp.fc2.weight.t() + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), want, atol=1e-12, rtol=0)


def test_norms_around_the_patches_see_rows_then_columns_then_channels():
    embed, images = PatchEmbed(4, 3, 6, norms="around").double(), torch.randn(2, 3, 8, 12, dtype=torch.float64)
    torch.nn.init.normal_(embed.norm_in.weight)
    torch.nn.init.normal_(embed.norm.bias)
    patch = images[:, :, 4:8, 8:12]                                                            # in row 1, column 2
    numbers = embed.norm_in(patch.permute(0, 2, 3, 1).flatten(1))
    weight = embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
    want = embed.norm(numbers @ weight.t() + embed.proj.bias)
    torch.testing.assert_close(embed(images)[:, 3 + 2], want, atol=1e-12, rtol=0)


def test_a_branch_has_a_factor_for_each_channel():
    torch.manual_seed(0)
    block, x = Block(8, 2, 16, "erf", layer_scale=0.1), torch.randn(2, 5, 8)
    assert torch.equal(block.ls1.gamma, torch.full((8,), 0.1))
    for scale in (block.ls1, block.ls2):
        torch.nn.init.normal_(scale.gamma)
    middle = x + block.ls1.gamma * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), middle + block.ls2.gamma * block.mlp(block.norm2(middle)))


def test_dropout_follows_both_layers_of_the_mlp():
    mlp, places = Mlp(4, 64, "tanh", dropout_rate=0.5), []
    mlp.drop.register_forward_hook(lambda _, args, output: places.append((args[0].shape, output)))
    result = mlp(torch.randn(2, 5, 4))
    assert [shape for shape, _ in places] == [(2, 5, 64), (2, 5, 4)] and places[1][1] is result
    assert 0.3 < (places[0][1] == 0).float().mean() < 0.7


def test_block_is_pre_norm_with_two_shortcuts():
    torch.manual_seed(0)
    block, x = Block(8, 2, 16, "tanh"), torch.randn(2, 5, 8)
    for norm in (block.norm1, block.norm2):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)

    def norm(module, value):
        return F.layer_norm(value, (8,), module.weight, module.bias, eps=1e-6)

    middle = x + block.attn(norm(block.norm1, x))
    assert torch.equal(block(x), middle + block.mlp(norm(block.norm2, middle)))


def test_all_norms_of_a_block_are_those_of_the_row():
    row = configs.architecture(4, 16, 24, 2, 1, norm="rms", norm_eps=0.1, qk_norm=True, attention_norm=True, mlp_norm=True)
    block = create_model(row, 3, 8).blocks[0]
    norms = [block.norm1, block.norm2, block.attn.q_norm, block.attn.k_norm, block.attn.norm, block.mlp.norm]
    assert [(type(norm), norm.eps) for norm in norms] == [(RMSNorm, 0.1)] * 6


def test_stochastic_depth_drops_both_branches_only_in_training():
    block, x = Block(8, 2, 16, "erf", drop_path_rate=1.0), torch.randn(3, 5, 8)
    assert torch.equal(block.train()(x), x) and not torch.allclose(block.eval()(x), x)
    without, state = Block(8, 2, 16, "erf"), torch.get_rng_state()
    without.load_state_dict(block.state_dict())
    assert torch.equal(without.train()(x), block(x)) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rate", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stochastic_depth_is_torchvision_s(rate, dtype):
    """It draws the same random numbers and computes the same."""
    branch = torch.randn(16, 5, 8).to(dtype)
    torch.manual_seed(1)
    own = StochasticDepth(rate).train()(branch)
    torch.manual_seed(1)
    assert torch.equal(own, ops.stochastic_depth(branch, rate, "row"))


POSEMB = reference.arrays(reference.FIXTURES / "posemb.npz")
PUBLISHED = sorted(name for name in POSEMB if "/google" in name or name.endswith("/deit_mae_bicubic"))


def grids(case: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """'14to12x20' -> (14, 14), (12, 20); 'distilled7to12' -> (7, 7), (12, 12)"""
    old, new = case.removeprefix("distilled").split("to")
    height, _, width = new.partition("x")
    return (int(old), int(old)), (int(height), int(width or height))


@pytest.mark.parametrize("name", PUBLISHED)
def test_positions_are_resized_as_the_published_code_does(name):
    case, rule = name.split("/")[0], "bilinear" if "/google" in name else "bicubic"
    resized = resize_positions(torch.from_numpy(POSEMB[f"{case}/in"]), *grids(case), rule)
    assert (resized - torch.from_numpy(POSEMB[name])).abs().max() < 2e-5


def test_the_published_cases_distinguish_rules_and_grids():
    ends = [name.split("/")[1] for name in PUBLISHED]
    assert [ends.count(end) for end in ("google", "google_zoom_nonsquare", "deit_mae_bicubic")] == [5, 4, 10]
    table = torch.from_numpy(POSEMB["14to24x24/in"])
    bilinear, bicubic = (resize_positions(table, (14, 14), (24, 24), rule) for rule in ("bilinear", "bicubic"))
    assert (bilinear - bicubic).abs().max() > 0.1 and torch.equal(bilinear, resize_positions(table, (14, 14), (24, 24)))
    with pytest.raises(KeyError):
        resize_positions(table, (14, 14), (24, 24), "nearest")


# Only some pairs of sizes: some versions of scipy zero the last row and column, for example for 24 -> 22.
@pytest.mark.parametrize("old, new", [((7, 7), (12, 12)), ((12, 12), (7, 7)), ((6, 9), (8, 5))])
def test_positions_are_resized_as_scipy_does(old, new):
    ndimage = pytest.importorskip("scipy.ndimage")
    grid = np.random.default_rng(0).standard_normal((*old, 6)).astype(np.float32)
    zoomed = ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)
    resized = resize_positions(torch.from_numpy(grid).view(1, -1, 6), old, new)
    assert (resized - torch.from_numpy(zoomed).view(1, -1, 6)).abs().max() < 2e-5


UNALIGNED = lambda i, new: (i + 0.5) * 16 / new - 0.5                                  # noqa: E731


@pytest.mark.parametrize("rule, new, where", [
    ("bilinear", (12, 12), lambda i, new: i * 15 / (new - 1)), ("bilinear_unaligned", (12, 20), UNALIGNED),
    ("bilinear_antialias", (20, 12), UNALIGNED), ("bicubic", (20, 12), UNALIGNED), ("bicubic_antialias", (20, 24), UNALIGNED),
    ("bicubic_offset", (12, 20), lambda i, new: UNALIGNED(i, new + 0.1)),
    ("bilinear_cropped", (8, 12), lambda i, new: UNALIGNED(i, 12))])
def test_where_a_rule_reads_a_table(rule, new, where):
    """A table of its own coordinates shows it: all rules keep a line straight, away from the edges and on average."""
    table = torch.stack(torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij"), dim=-1).view(1, 256, 2)
    resized = resize_positions(table, (16, 16), new, rule).view(*new, 2)
    rows, columns = (torch.tensor([where(i, side) for i in range(side)]) for side in new)
    inner = slice(3, 8 if rule == "bilinear_cropped" else -3)
    for error in ((resized[:, 5, 0] - rows)[inner], (resized[5, :, 1] - columns)[3:-3]):
        assert error.mean().abs() < 0.01


def test_only_one_bicubic_rule_smooths_when_the_grid_shrinks():
    table = (torch.arange(64) % 2).float().view(1, 64, 1)                      # stripes, which vanish in the mean
    plain, smooth = (resize_positions(table, (8, 8), (8, 4), rule) for rule in ("bicubic", "bicubic_antialias"))
    assert (smooth - 0.5).abs().max() < 0.1 and not torch.allclose(plain, smooth)


@pytest.mark.parametrize("rule", RESIZE_RULES)
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_positions_before_the_grid_and_of_the_same_grid_are_kept(prefix, rule):
    """No prefix for mean pooling and CaiT, one for the cls token, two with a distillation token."""
    table = torch.randn(1, prefix + 16, 5)
    resized = resize_positions(table, (4, 4), (6, 3), rule)
    assert resized.shape == (1, prefix + 18, 5)
    assert torch.equal(resized[:, :prefix], table[:, :prefix])
    assert torch.equal(resized[:, prefix:], resize_positions(table[:, prefix:], (4, 4), (6, 3), rule))
    assert torch.equal(resize_positions(table, (4, 4), (4, 4), rule), table)


def test_the_same_number_of_positions_in_another_grid_is_resampled():
    rows = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1)               # each position holds its row
    flat = resize_positions(rows, (4, 4), (2, 8))
    torch.testing.assert_close(flat.view(2, 8), torch.tensor([[0.0] * 8, [3.0] * 8]))


def test_a_table_smaller_than_its_grid_is_refused():
    with pytest.raises(ValueError, match="15 positions cannot hold a 4 x 4 grid"):
        resize_positions(torch.zeros(1, 15, 5), (4, 4), (6, 6))
