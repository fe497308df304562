"""Self-, talking-heads and class attention, and recording their weights without changing the forward pass."""

import contextlib

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

from configs import META, architecture
from models import create_model, record_attention
from models.attention import Attend, ClassAttention, SelfAttention, TalkingHeadsAttention

SMALL = architecture(4, 32, 64, 2, 3, img_size=16)
GAP = architecture(4, 32, 64, 2, 3, img_size=16, classifier="gap")
DEIT = architecture(4, 32, 64, 2, 3, img_size=16, distilled=True, **META)
CAIT = architecture(4, 32, 64, 4, 3, img_size=16, class_layers=2, layer_scale=0.5, **META)
HYBRID = architecture(1, 32, 64, 2, 2, img_size=32, resnet_layers=(1,), resnet_width=32)


def random_model(row=SMALL, img_size=None, **overrides):
    """Return a model whose head is not zero."""
    torch.manual_seed(0)
    model = create_model(row, 5, img_size, **overrides).eval()
    for name in model.head_names():
        nn.init.normal_(model.get_parameter(name))
    return model


def images_of(model, count: int = 2):
    return torch.randn(count, 3, *model.img_size, generator=torch.Generator().manual_seed(1))


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# --------------------------------------------------------------------------------------------- the layer itself


def test_self_attention_is_the_formula():
    """Rows [0, D) of the qkv weight are the queries, [D, 2D) the keys, [2D, 3D) the values; each in H groups of d."""
    torch.manual_seed(0)
    layer, x = SelfAttention(12, 3).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = ((x @ weight.t() + bias) for weight, bias in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3)))
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 4 ** 0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, dim=-1)))


def test_keys_without_a_bias_are_as_with_a_zero_bias():
    """They compute the same as a layer whose key bias is zero."""
    layer, whole = SelfAttention(12, 3, qkv_bias="qv"), SelfAttention(12, 3)
    for bias in (layer.qkv.q_bias, layer.qkv.v_bias):
        nn.init.normal_(bias)
    state = {name: value for name, value in layer.state_dict().items() if "_bias" not in name}
    whole.load_state_dict(state | {"qkv.bias": torch.cat([layer.qkv.q_bias, torch.zeros(12), layer.qkv.v_bias])})
    x = torch.randn(2, 5, 12)
    assert torch.equal(layer(x), whole(x))
    assert SelfAttention(12, 3, qkv_bias="none").qkv.bias is None


def test_norms_of_queries_keys_and_output():
    torch.manual_seed(0)
    layer, x = SelfAttention(12, 3, qk_norm=True, scaled=True, proj_bias=False), torch.randn(2, 5, 12)
    for norm in (layer.q_norm, layer.k_norm, layer.norm):
        nn.init.normal_(norm.weight)
    q, k, v = layer.qkv(x).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    weights = (layer.q_norm(q) @ layer.k_norm(k).transpose(-2, -1) / 2).softmax(dim=-1)
    want = layer.norm((weights @ v).transpose(1, 2).flatten(2)) @ layer.proj.weight.t()
    torch.testing.assert_close(layer(x), want)


def test_talking_heads_attention_is_the_formula():
    """Shazeer et al., section 4: logits of all heads mixed before the softmax, weights of all heads after it."""
    torch.manual_seed(0)
    layer, x = TalkingHeadsAttention(12, 3).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (x @ layer.qkv.weight.t() + layer.qkv.bias).view(2, 5, 3, 3, 4).unbind(2)
    logits = torch.einsum("bnhd,bmhd->bnmh", q, k) / 4 ** 0.5
    weights = (logits @ layer.proj_l.weight.t() + layer.proj_l.bias).softmax(dim=2) @ layer.proj_w.weight.t() + layer.proj_w.bias
    torch.testing.assert_close(layer(x), layer.proj(torch.einsum("bnmh,bmhd->bnhd", weights, v).reshape(2, 5, 12)))


def test_class_attention_is_the_first_row_of_self_attention():
    torch.manual_seed(0)
    layer, whole, x = ClassAttention(12, 3), SelfAttention(12, 3), torch.randn(2, 5, 12)
    state = layer.state_dict()
    whole.load_state_dict({f"proj.{kind}": state[f"proj.{kind}"] for kind in ("weight", "bias")} | {
        f"qkv.{kind}": torch.cat([state[f"{part}.{kind}"] for part in "qkv"]) for kind in ("weight", "bias")})
    assert layer(x).shape == (2, 1, 12)
    torch.testing.assert_close(layer(x), whole(x)[:, :1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("queries", [9, 1])
def test_weights_times_values_is_the_forward_pass(queries, dtype):
    """Also with one query."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, queries, 8, dtype=dtype, generator=generator)
    k, v = (torch.randn(2, 3, 9, 8, dtype=dtype, generator=generator) for _ in range(2))
    attend = Attend().eval()
    weights = attend.weights(q, k)
    assert weights.dtype == dtype and weights.shape == (2, 3, queries, 9)
    assert (weights @ v - attend(q, k, v)).abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------- recording


@pytest.mark.parametrize("case", reference.ROWS)
@torch.inference_mode()
def test_weights_are_google_s(case):
    expected = reference.expected(case)
    model = create_model(reference.ROWS[case], pretrained=reference.weights(case), head="keep").eval()
    with record_attention(model) as maps:
        model(reference.images(reference.ROWS[case].img_size))
    maps = torch.stack(maps)                                                   # (L, B, H, N, N)
    if "attn" in expected:
        assert (maps - expected["attn"]).abs().max() < reference.tolerance(case)
    else:
        assert (maps[:, :, :, 0] - expected["attn_cls_rows"]).abs().max() < 1e-5
        assert (maps[-1, 0, 0] - expected["attn_last_img0_head0"]).abs().max() < 1e-5


# row, image size, shapes of the maps by head count and layer
RECORDED = {
    "vit": (SMALL, None, [(2, 17, 17)] * 3),
    "gap, not square": (GAP, (20, 8), [(2, 10, 10)] * 3),
    "hybrid": (HYBRID, (32, 48), [(2, 97, 97)] * 2),
    "deit": (DEIT, (8, 20), [(2, 12, 12)] * 3),
    "cait": (CAIT, (8, 20), [(4, 10, 10)] * 3 + [(4, 1, 11)] * 2),
}
DROPOUT = {"dropout_rate": 0.2, "attention_dropout_rate": 0.2, "drop_path_rate": 0.2}


def sums(maps: list[torch.Tensor], row) -> list[torch.Tensor]:
    """Return the sums of the rows, except for talking heads, where they can be anything."""
    return [map.sum(-1) for map in (maps[row.num_layers:] if row.class_layers else maps)]


@pytest.mark.parametrize("case", RECORDED)
@torch.no_grad()
def test_recording_changes_nothing(case):
    """Same logits bit for bit, one map per layer, rows that sum to 1, no hook left. A second forward pass replaces the maps."""
    row, img_size, shapes = RECORDED[case]
    model = random_model(row, img_size)
    images = images_of(model)
    before = model(images)
    with record_attention(model) as maps:
        model(images + 1)
        during = model(images)
    assert torch.equal(before, during) and torch.equal(before, model(images)) and hooks(model) == 0
    assert [map.shape for map in maps] == [(2, *shape) for shape in shapes]
    assert all(map.dtype == torch.float32 and not map.requires_grad for map in maps)
    assert all(torch.allclose(total, torch.ones(())) for total in sums(maps, row))
    with record_attention(model) as single_pass:
        model(images)
    assert all(torch.equal(a, b) for a, b in zip(maps, single_pass))


@pytest.mark.parametrize("row", [SMALL, CAIT], ids=["vit", "cait"])
def test_recording_in_training_keeps_gradients_and_random_numbers(row):
    """Also with dropout: the random numbers and the gradients are the same."""
    model = random_model(row, **DROPOUT).train()
    images, results = images_of(model), []
    for recording in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        with record_attention(model) if recording else contextlib.nullcontext() as maps:
            logits = model(images)
        logits.square().sum().backward()
        results.append([logits.detach()] + [parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert all(torch.allclose(total, torch.ones(())) for total in sums(maps, row))        # the weights before dropout
    assert not any(map.requires_grad for map in maps)                                     # no graph is kept for them


def test_an_exception_passes_through_and_other_hooks_stay():
    model = random_model()
    model.blocks[0].attn.attend.register_forward_hook(lambda *_: None)
    with pytest.raises(KeyError, match="mine"), record_attention(model):
        raise KeyError("mine")
    assert hooks(model) == 1


@pytest.mark.parametrize("row", [SMALL, CAIT], ids=["vit", "cait"])
def test_differentiable_lets_gradients_reach_the_maps(row):
    """Against a finite difference: an entry of the cls row of the last map, and of the second, is changed by hand."""
    model = random_model(row).double()
    images, layers = images_of(model).double(), [*model.blocks, *getattr(model, "blocks_token_only", ())]
    with record_attention(model, differentiable=True) as maps:
        logits = model(images)
    torch.testing.assert_close(logits, model(images))
    slopes = torch.autograd.grad(logits[0, 2], maps)
    assert all(slope[0].any() and not slope[1].any() for slope in slopes)
    for index in (1, len(maps) - 1):
        changed = maps[index].detach().clone()
        changed[0, 1, 0, 5] += 1e-6
        handle = layers[index].attn.attend.register_forward_hook(lambda attend, inputs, output, map=changed: map @ inputs[2])
        measured = (model(images)[0, 2] - logits[0, 2]) / 1e-6
        handle.remove()
        torch.testing.assert_close(measured, slopes[index][0, 1, 0, 5], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("row", [SMALL, CAIT], ids=["vit", "cait"])
@torch.no_grad()
def test_maps_under_autocast_are_float32(row, differentiable):
    model = random_model(row)
    images = images_of(model)
    with record_attention(model) as wide:
        model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(images)
        with record_attention(model, differentiable) as maps:
            during = model(images)
    assert before.dtype == during.dtype == torch.bfloat16
    torch.testing.assert_close(during, before, **({"atol": 0.1, "rtol": 0.1} if differentiable else {"atol": 0, "rtol": 0}))
    for map, want in zip(maps, wide):
        assert map.dtype == torch.float32
        torch.testing.assert_close(map, want, atol=0.02, rtol=0.05)
    assert all(torch.allclose(total, torch.ones(())) for total in sums(maps, row))


def test_a_layer_that_did_not_run_is_an_error():
    model = random_model()
    with pytest.raises(RuntimeError, match=r"layers \[1\] of 3 recorded nothing"), record_attention(model):
        model.blocks[2](model.blocks[0](torch.randn(2, 17, 32)))
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="no attention layer"), record_attention(nn.Linear(3, 3)):
        pytest.fail("the block must not be entered")


@pytest.mark.parametrize("row", [SMALL, CAIT], ids=["vit", "cait"])
@torch.no_grad()
def test_a_compiled_model_is_one_graph(row, reset_compiler):
    """Neither the support for recording nor the checks for hooks break the graph."""
    model = random_model(row)
    images = images_of(model)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), model(images))


@pytest.mark.parametrize("warm", [True, False])
@torch.no_grad()
def test_a_compiled_model_records_or_raises(warm, reset_compiler):
    """Maps are never missing or those of other images, and recording does not change later results."""
    model = random_model()
    images = images_of(model)
    compiled = torch.compile(model, backend="eager")
    if warm:
        compiled(images)
    for _ in range(2):                             # the second time, the compiled code of the first exists
        try:
            with record_attention(compiled) as maps:
                logits = compiled(images)
        except RuntimeError as error:
            assert "recorded nothing" in str(error)
        else:
            with record_attention(model) as want:
                assert torch.equal(model(images), logits)
            assert all(torch.equal(a, b) for a, b in zip(maps, want))
        assert hooks(model) == 0
    images = images + 1
    torch.testing.assert_close(compiled(images), model(images))
    with record_attention(model) as maps:          # the plain module still records
        model(images)


def test_forward_does_not_store_the_weights(monkeypatch):
    """Without recording, they are not computed."""
    monkeypatch.setattr(Attend, "weights", lambda *_: pytest.fail("weights were computed"))
    calls = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **more: calls.append(1) or attention(*args, **more))
    model = random_model()
    model(images_of(model))
    assert len(calls) == 3
