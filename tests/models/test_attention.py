"""Self-, talking-heads and class attention, and recording their weights without touching the forward pass."""

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

from configs import architecture
from models import create_model, record_attention
from models.attention import Attend, ClassAttention, SelfAttention, TalkingHeadsAttention

SMALL = architecture(4, 32, 64, 2, 3, img_size=16)
GAP = architecture(4, 32, 64, 2, 3, img_size=16, classifier="gap")
HYBRID = architecture(1, 32, 64, 2, 2, img_size=32, resnet_layers=(1,), resnet_width=32)


def random_model(row=SMALL, img_size=None, **overrides):
    """With a head that is not zero, so that logits say something."""
    torch.manual_seed(0)
    model = create_model(row, 5, img_size, **overrides).eval()
    nn.init.normal_(model.head.weight)
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
    """The law of `attend`, also with one query."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, queries, 8, dtype=dtype, generator=generator)
    k, v = (torch.randn(2, 3, 9, 8, dtype=dtype, generator=generator) for _ in range(2))
    attend = Attend().eval()
    weights = attend.weights(q, k)
    assert weights.dtype == dtype and weights.shape == (2, 3, queries, 9)
    assert (weights @ v - attend(q, k, v)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_float32(dtype):
    q, k = (torch.randn(2, 3, 9, 8).to(dtype) for _ in range(2))
    weights = Attend.weights(q, k)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, Attend.weights(q.float(), k.float()))


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


@pytest.mark.parametrize("row, img_size, tokens", [
    (SMALL, None, 17), (SMALL, (8, 20), 11), (GAP, None, 16), (GAP, (20, 8), 10), (HYBRID, (32, 48), 97)])
def test_recording_changes_nothing(row, img_size, tokens):
    """Logits bitwise the same, one map a layer, rows that sum to 1, no hook left."""
    model = random_model(row, img_size)
    images = images_of(model)
    with torch.no_grad():
        before = model(images)
        with record_attention(model) as maps:
            during = model(images)
        assert torch.equal(before, during) and torch.equal(before, model(images))
    assert hooks(model) == 0
    assert [map.shape for map in maps] == [(2, 2, tokens, tokens)] * row.num_layers
    for map in maps:
        assert map.dtype == torch.float32 and not map.requires_grad and (map >= 0).all()
        torch.testing.assert_close(map.sum(-1), torch.ones(2, 2, tokens))


def test_recording_in_training_keeps_gradients_and_random_numbers():
    """Also with dropout: the same numbers are drawn, the same gradients come out."""
    model = random_model(dropout_rate=0.2, attention_dropout_rate=0.2).train()
    images, results = images_of(model), []
    for recording in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        if recording:
            with record_attention(model) as maps:
                logits = model(images)
        else:
            logits = model(images)
        logits.square().sum().backward()
        results.append([logits.detach()] + [parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 2, 17))           # the weights before dropout
    assert not any(map.requires_grad for map in maps)                           # no graph is held for them


def test_maps_are_in_the_order_of_the_layers():
    model = random_model()
    images = images_of(model)
    with torch.no_grad(), record_attention(model) as maps:
        model(images)
    x = model.pos_drop(torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(images)], 1) + model.pos_embed)
    for block, map in zip(model.blocks, maps):
        q, k, _ = block.attn.qkv(block.norm1(x)).view(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
        torch.testing.assert_close(map, Attend.weights(q, k))
        x = block(x)


def test_a_second_forward_pass_replaces_the_maps():
    model = random_model()
    first, second = images_of(model).unsqueeze(1)
    with torch.no_grad(), record_attention(model) as maps:
        model(first)
        model(second)
    with torch.no_grad(), record_attention(model) as alone:
        model(second)
    assert len(maps) == 3 and all(torch.equal(a, b) for a, b in zip(maps, alone))


def test_no_hook_is_left_after_an_exception():
    """And the exception is the caller's own, not one about layers that did not report."""
    model = random_model()
    with pytest.raises(KeyError, match="mine"), record_attention(model):
        raise KeyError("mine")
    assert hooks(model) == 0


def test_other_hooks_stay():
    model = random_model()
    model.blocks[0].attn.attend.register_forward_hook(lambda *_: None)
    with record_attention(model):
        model(images_of(model))
    assert hooks(model) == 1


def test_differentiable_lets_gradients_reach_the_maps():
    model = random_model()
    images = images_of(model)
    with record_attention(model, differentiable=True) as maps:
        logits = model(images)
    assert (logits - model(images)).abs().max() < 1e-5
    gradients = torch.autograd.grad(logits[:, 2].sum(), maps)
    assert [gradient.shape for gradient in gradients] == [(2, 2, 17, 17)] * 3
    assert all(gradient.abs().sum() > 0 for gradient in gradients[:-1])
    assert gradients[-1][:, :, 0].any() and not gradients[-1][:, :, 1:].any()   # only the cls row reaches the head


def test_gradient_of_a_map_is_the_slope_of_the_logit():
    """Against a finite difference: the last map's cls row is changed by hand."""
    model = random_model().double()
    images = images_of(model).double()
    with record_attention(model, differentiable=True) as maps:
        logits = model(images)
    slope, = torch.autograd.grad(logits[0, 2], maps[-1])
    changed = maps[-1].detach().clone()
    changed[0, 1, 0, 5] += 1e-6
    handle = model.blocks[-1].attn.attend.register_forward_hook(lambda attend, qkv, output: changed @ qkv[2])
    measured = (model(images)[0, 2] - logits[0, 2]) / 1e-6
    handle.remove()
    torch.testing.assert_close(measured, slope[0, 1, 0, 5], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("differentiable", [False, True])
def test_under_autocast(differentiable):
    model = random_model()
    images = images_of(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(images)
        with record_attention(model, differentiable) as maps:
            during = model(images)
    assert before.dtype == during.dtype == torch.bfloat16
    torch.testing.assert_close(during, before, **({"atol": 0.1, "rtol": 0.1} if differentiable else {"atol": 0, "rtol": 0}))
    for map in maps:
        assert map.dtype == torch.float32
        torch.testing.assert_close(map.sum(-1), torch.ones(2, 2, 17))


def test_error_when_nothing_ran():
    model = random_model()
    with pytest.raises(RuntimeError, match=r"layers \[0, 1, 2\] of 3 recorded nothing"), record_attention(model):
        pass
    assert hooks(model) == 0


def test_error_when_one_layer_did_not_run():
    model = random_model()
    with pytest.raises(RuntimeError, match=r"layers \[1\] of 3 recorded nothing"), record_attention(model):
        x = torch.randn(2, 17, 32)
        model.blocks[2](model.blocks[0](x))


def test_error_for_a_model_without_attention():
    with pytest.raises(RuntimeError, match="no attention layer"), record_attention(nn.Linear(3, 3)):
        pytest.fail("the block must not be entered")


@pytest.mark.parametrize("warm", [True, False])
def test_a_compiled_model_records_or_raises(warm):
    """Never maps that are missing, or the maps of other images. And recording leaves no trace in later results."""
    model = random_model()
    images = images_of(model)
    torch.compiler.reset()
    try:
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            if warm:
                compiled(images)
            for _ in range(2):                     # the second time, what the first has compiled is there
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
            with record_attention(model) as maps:  # the plain module still records
                model(images)
    finally:
        torch.compiler.reset()


def test_forward_does_not_hold_the_weights(monkeypatch):
    """Without recording, nothing computes them."""
    monkeypatch.setattr(Attend, "weights", lambda *_: pytest.fail("weights were computed"))
    calls = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **more: calls.append(1) or attention(*args, **more))
    model = random_model()
    model(images_of(model))
    assert len(calls) == 3
