"""Sigmoid attention: nothing changes without an edit; with one, the weights are the softmax of edited logits; every family."""

import families
import filling
import numpy as np
import pytest
import torch
from scipy.special import logit, softmax
from torch import nn

from configs import MODELS, architecture
from models import ModelError, edit_attention, load_model, record_attention, record_patch_logits, use_sigmoid_attention
from models.attention import Attend
from models.sigmoid_attention import AttendSigmoid, edit_logits

SIZE = {"hidden_size": 24, "mlp_dim": 32, "num_heads": 3, "num_layers": 3, "patch_size": 4}
GRID = (2, 3)
FAMILIES = {                             # row: the queries that the head reads, counted over prefix tokens and patches
    "ViT-Ti_16": [0], "DeiT-Ti_16-distilled": [0, 1], "MAE-B_16": range(1, 7), "gap": range(6), "CaiT-XXS24": [0],
    "dino": [0], "dino_mean": [0, 3, 4, 5, 6, 7, 8], "mean": range(2, 8), "siglip": [0], "pe": [0]}
LATER_FAMILIES = {name: row for name, (_, row, _) in families.LATER_FAMILIES.items()} | {"gap": {"classifier": "gap"}}


def random_model(family="ViT-Ti_16", sigmoid="last"):
    row = dict(MODELS["ViT-Ti_16" if family in LATER_FAMILIES else family]) | SIZE | LATER_FAMILIES.get(family, {})
    return filling.random_model(architecture(**row), 5, (8, 12), std=0.3, sigmoid_attention=sigmoid).eval()


def images_of(count=3):
    return torch.randn(count, 3, 8, 12, generator=torch.Generator().manual_seed(1))


def edits_of(count=3, every=0.5):
    generator = torch.Generator().manual_seed(2)
    return torch.rand(count, *GRID, generator=generator), torch.rand(count, *GRID, generator=generator) < every


def wide_logits(dtype):
    """Return logits up to 1e4, where log(s / (1 - s)) is not a number."""
    values = torch.cat([torch.linspace(-1e4, 1e4, 41), torch.linspace(-30, 30, 61), torch.tensor([8.5, 16.8, -16.8, 0.0])])
    return torch.stack([values, values.flip(0), values.roll(7)]).to(dtype)


# --------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_attention_without_an_edit_is_bitwise_the_plain_one(dtype, scale):
    """For logits up to about 1e4 * scale / 200: without edits, with empty edits, and with edits of other images."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 16).mul(scale ** 0.5).to(dtype) for _ in range(3))
    plain, attend = Attend()(q, k, v), AttendSigmoid(0.0, slice(0, 1), 1)
    assert torch.equal(attend(q, k, v), plain)
    attend.edits = torch.full((2, 1, 1, 6), 0.9), torch.zeros(2, 1, 1, 6, dtype=torch.bool)
    assert torch.equal(attend(q, k, v), plain)
    torch.testing.assert_close(attend.weights(q, k), Attend.weights(q, k), rtol=0, atol=1e-6)
    attend.edits[1][1] = True
    changed = attend(q, k, v)
    assert torch.equal(changed[0], plain[0]) and torch.equal(changed[:, :, 1:], plain[:, :, 1:])
    assert not torch.equal(changed[1, :, 0], plain[1, :, 0]) and changed.isfinite().all()


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 2), slice(2, None)])
def test_edited_attention_is_numpy_s(rows):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 8, 4, dtype=torch.float64) for _ in range(3))
    values, edited = torch.rand(2, 1, 1, 6), torch.rand(2, 1, 1, 6) < 0.5
    attend = AttendSigmoid(0.0, rows, 2)
    attend.edits = values, edited
    logits = np.einsum("bhqd,bhkd->bhqk", q.numpy(), k.numpy()) / 2
    for query in range(8)[rows]:
        for image in range(2):
            for patch in np.flatnonzero(edited[image]):
                logits[image, :, query, 2 + patch] = logit(float(values[image, 0, 0, patch]))
    expected = softmax(logits, axis=-1)
    np.testing.assert_allclose(attend.weights(q, k).numpy(), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(attend(q, k, v).numpy(), expected @ v.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(attend.weights(q, k).sum(-1).numpy(), 1, rtol=0, atol=1e-6)


def test_an_edit_moves_the_weight_the_right_way():
    """Up if e is more than the sigmoid shown, down if it is less; never the other way at 0 and 1, however large l is."""
    logits = wide_logits(torch.float32)
    shown = logits.sigmoid()
    before = logits.double().softmax(-1)
    for value in (0.0, 1e-9, 0.02, 0.5, 0.9, 1 - 1e-6, 1.0):
        for column in range(logits.shape[1]):
            edited = torch.zeros_like(logits, dtype=torch.bool)
            edited[:, column] = True
            after = edit_logits(logits, torch.full_like(logits, value), edited).double().softmax(-1)
            change = (after - before)[:, column]
            assert ((change >= 0) | (value < shown[:, column])).all(), (value, column)
            assert ((change <= 0) | (value > shown[:, column])).all(), (value, column)
            assert after.isfinite().all()


def test_gradients_are_finite_and_do_not_pass_an_edit():
    for logits in (wide_logits(torch.float32), torch.linspace(-3, 3, 30).expand(2, -1).clone()):
        logits.requires_grad_()
        edited = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)) < 0.3
        weights = edit_logits(logits, torch.full(logits.shape, 0.7), edited).softmax(-1)
        (weights * torch.arange(logits.shape[1])).sum().backward()
        assert logits.grad.isfinite().all() and not logits.grad[edited].any()
    assert logits.grad[~edited].all()


# ---------------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_converted_model_is_the_same_model(family):
    """Bit for bit, for any layers, and after converting back."""
    plain, images = random_model(family, ""), images_of()
    expected, names = plain(images), list(plain.state_dict())
    for layers in ("last", "all", str(plain.attention_layers), ""):
        use_sigmoid_attention(plain, layers)
        assert torch.equal(plain(images), expected) and list(plain.state_dict()) == names
        assert bool(plain.sigmoid_layers) == bool(layers) and plain.config.sigmoid_attention == layers
    for layers in ("last", "all"):
        built = random_model(family, layers)
        assert torch.equal(built(images), expected) and built.sigmoid_layers


def test_which_layers():
    model = random_model(sigmoid="3,1")
    assert model.sigmoid_layers == (1, 3)
    assert [isinstance(block.attn.attend, AttendSigmoid) for block in model.blocks] == [True, False, True]
    assert random_model("CaiT-XXS24", "all").sigmoid_layers == (4, 5) and random_model("CaiT-XXS24").sigmoid_layers == (5,)
    pooled = random_model("siglip")                                    # 3 blocks: the pooling is the fourth layer, and the last
    assert pooled.sigmoid_layers == (4,) and isinstance(pooled.attn_pool.attend, AttendSigmoid)
    assert random_model("siglip", "all").sigmoid_layers == (1, 2, 3, 4) and random_model("pe", "3").sigmoid_layers == (3,)


@pytest.mark.parametrize("family, layers, word", [
    ("ViT-Ti_16", "4", "has 3 layers"), ("ViT-Ti_16", "0", "must be last, all"), ("ViT-Ti_16", "first", "must be last, all"),
    ("CaiT-XXS24", "2,4", "talking heads"), ("siglip", "5", "has 4 layers"), ("ViT-Ti_16", "1,,2", "must be last, all")])
def test_layers_that_cannot_be_edited_are_refused(family, layers, word):
    with pytest.raises(ModelError, match=word):
        random_model(family, layers)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_edits_of_a_model(family):
    """The rows that the head reads change in images with edits; all rows sum to 1; afterwards the model is as before."""
    model, images = random_model(family), images_of()
    values, edited = edits_of()
    edited[1] = False
    before = model(images)
    with record_attention(model) as own:
        model(images)
    with record_patch_logits(model) as logits, edit_attention(model, values, edited), record_attention(model) as maps:
        after = model(images)
    assert torch.equal(model(images), before)
    assert torch.equal(after[1], before[1]) and (after - before).abs().amax(1)[[0, 2]].min() > 1e-4
    rows = list(FAMILIES[family])
    changed = (maps[-1] - own[-1]).abs().amax(dim=(0, 1, 3)) > 1e-5
    assert changed.nonzero().flatten().tolist() == rows
    assert all(torch.equal(one, two) for one, two in zip(maps[:-1], own[:-1]))
    torch.testing.assert_close(maps[-1].sum(-1), torch.ones(maps[-1].shape[:-1]))
    assert logits[0].shape == (3, own[-1].shape[1], len(rows), 6)
    patches = own[-1][:, :, rows, -6:].log()                                   # the logits but for a number for each row
    torch.testing.assert_close(logits[0] - logits[0][..., :1], patches - patches[..., :1], rtol=0, atol=1e-3)


@torch.no_grad()
def test_one_edit_for_all_images_and_several_layers():
    model, images = random_model(sigmoid="all"), images_of()
    values, edited = edits_of(1, every=1.1)
    with edit_attention(model, values, edited), record_attention(model) as maps, record_patch_logits(model) as logits:
        shared = model(images)
    with edit_attention(model, values.expand(3, -1, -1), edited.expand(3, -1, -1)):
        assert torch.equal(model(images), shared)
    assert len(logits) == 3
    for layer in maps:                                   # all patches are set: their weights relate as e / (1 - e)
        odds = (values / (1 - values)).flatten()
        seen = layer[:, :, 0, 1:]
        torch.testing.assert_close(seen / seen.sum(-1, keepdim=True), (odds / odds.sum()).expand_as(seen))


def test_recorded_logits_keep_their_graph_in_training():
    model, images = random_model().train(), images_of()
    wrapped = nn.Sequential(model)
    with record_patch_logits(model) as logits:
        wrapped(images)
    logits[0].sigmoid().square().mean().backward()
    assert model.blocks[-1].attn.qkv.weight.grad.abs().sum() > 0 and model.head.weight.grad is None
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_under_autocast_logits_and_weights_are_float32(dtype):
    model, images = random_model(), images_of()
    values, edited = edits_of()
    with torch.autocast("cpu", dtype), record_patch_logits(model) as logits, edit_attention(model, values, edited), \
            record_attention(model) as maps:
        assert model(images).isfinite().all()
    assert logits[0].dtype == maps[-1].dtype == torch.float32
    torch.testing.assert_close(maps[-1].sum(-1), torch.ones(maps[-1].shape[:-1]))


@torch.no_grad()
def test_a_compiled_model_is_edited_too(reset_compiler):
    model, images = random_model(), images_of()
    values, edited = edits_of()
    compiled = torch.compile(model, backend="eager")
    before = compiled(images)
    with edit_attention(model, values, edited):
        after, expected = compiled(images), model(images)
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(compiled(images), before)


def test_edits_that_do_not_fit():
    model = random_model()
    values, edited = edits_of()
    for bad in ((values[:, :1], edited[:, :1]), (values, edited[:1]), (values, edited.float()), (values[0], edited[0]),
                (values + 1, edited), (values * float("nan"), edited)):
        with pytest.raises(ModelError, match="edits"), edit_attention(model, *bad):
            pass
    with edit_attention(model, values + edited.logical_not() * 5, edited):         # values that are not edited do not count
        assert model(images_of()).isfinite().all()
    plain = random_model(sigmoid="")
    for context in (lambda: edit_attention(plain, values, edited), lambda: record_patch_logits(plain)):
        with pytest.raises(ModelError, match="no sigmoid attention"), context():
            pass
    with pytest.raises(RuntimeError, match="recorded nothing"), record_patch_logits(model):
        pass


def test_an_error_inside_leaves_the_model_as_it_was():
    model, images = random_model(), images_of()
    before = model(images)
    with pytest.raises(KeyError), edit_attention(model, *edits_of()), record_patch_logits(model):
        raise KeyError
    assert torch.equal(model(images), before) and model.blocks[-1].attn.attend.edits is None


def test_a_run_keeps_its_layers(run_train):
    """--sigmoid_attention builds the model; its checkpoint restores it; a run that starts from that checkpoint has it too."""
    assert run_train("--sigmoid_attention", "2,4", "--name", "one") == 0
    assert load_model("output/one/best.pt").sigmoid_layers == (2, 4)
    assert run_train("--pretrained_dir", "output/one", "--name", "two", "--num_steps", 2) == 0
    assert load_model("output/two/best.pt").sigmoid_layers == (2, 4)
    assert run_train("--sigmoid_attention", "5") == 2
