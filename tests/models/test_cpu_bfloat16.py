"""Kernels for a CPU: as exact as PyTorch's own, and out of the way where a module is hooked, replaced or wrapped."""

import copy

import filling
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from configs import META, architecture
from models import cpu_bfloat16, record_attention
from models.attention import Attend
from models.layers import Mlp

TINY = {"patch_size": 4, "hidden_size": 12, "mlp_dim": 16, "num_heads": 3, "num_layers": 2}
FAMILIES = {
    "vit": TINY | {"representation_size": 8},
    "mae": TINY | META | {"classifier": "patch_mean"},
    "deit": TINY | META | {"distilled": True},
    "cait": TINY | META | {"class_layers": 1, "layer_scale": 0.1},
    "hybrid": TINY | {"patch_size": 1, "resnet_layers": (1,), "resnet_width": 32},
}
PRECISIONS = [torch.float32, torch.bfloat16]


def random_model(family: str) -> nn.Module:
    return filling.random_model(architecture(**FAMILIES[family]), 3, (8, 12), std=0.7).eval()


def predict(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    images = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model(images)


# ---------------------------------------------------------------------------- weights are used by calling their module


def bend(x: torch.Tensor) -> torch.Tensor:
    """A change that no norm behind it takes out again."""
    return x + x.square()


class Wrapped(nn.Module):
    """As an adapter: the layer is inside."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs):
        return bend(self.inner(*inputs))


def hook(model, name):
    model.get_submodule(name).register_forward_hook(lambda module, inputs, output: bend(output))


def hook_inputs(model, name):
    model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: tuple(map(bend, inputs)))


def wrap(model, name):
    model.set_submodule(name, Wrapped(model.get_submodule(name)))


def replace_forward(model, name):
    module = model.get_submodule(name)
    module.forward = lambda *inputs, forward=module.forward: bend(forward(*inputs))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("change", [hook, hook_inputs, wrap, replace_forward])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_of_any_module_with_weights_acts(family, change, dtype):
    model = random_model(family)
    plain, names = predict(model, dtype), [name for name, module in model.named_modules() if name and module._parameters]
    assert len(names) > 10 and (family != "cait" or "blocks.0.attn.proj_l" in names)
    for name in names:
        changed = copy.deepcopy(model)
        change(changed, name)
        assert not torch.equal(predict(changed, dtype), plain), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_quantization(family):
    """Every linear layer is replaced by a module whose weight is no tensor."""
    quantization = pytest.importorskip("torch.ao.quantization")
    model = random_model(family)
    plain, quantized = predict(model), quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    assert 0 < (predict(quantized) - plain).norm() < 0.2 * plain.norm()


def test_backward_hooks_on_talking_heads_are_called():
    model, called = random_model("cait"), []
    for name in ("proj_l", "proj_w"):
        model.blocks[1].attn.get_submodule(name).register_full_backward_hook(lambda *_: called.append(1))
    model(torch.randn(2, 3, 8, 12)).sum().backward()
    assert len(called) == 2


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_maps_of_wrapped_talking_heads_are_recorded_in_float32(dtype):
    """Also in a model whose weights are half precision."""
    model, images = random_model("cait").to(dtype), torch.randn(2, 3, 8, 12).to(dtype)
    with torch.no_grad(), record_attention(model) as plain:
        model(images)
    for name in ("proj_l", "proj_w"):
        layer = model.blocks[0].attn
        layer.set_submodule(name, nn.Sequential(layer.get_submodule(name)))
    with torch.no_grad(), record_attention(model) as maps:
        model(images)
    assert maps[0].dtype == torch.float32
    torch.testing.assert_close(maps[0], plain[0], **({"atol": 0.05, "rtol": 0.05} if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_switch_turns_all_kernels_off(family, dtype, monkeypatch):
    """The results are the same to rounding."""
    model = random_model(family)
    with_kernels = predict(model, dtype)
    monkeypatch.setattr(cpu_bfloat16, "enabled", False)
    q = torch.randn(1, 2, 5, 8, dtype=torch.bfloat16)
    assert cpu_bfloat16.attention(q, q, q, 0.0) is None and cpu_bfloat16.mix_heads(q, nn.Linear(2, 2)) is None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert cpu_bfloat16.linear_gelu(q, nn.Linear(8, 8), nn.GELU()) is None
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert (predict(model, dtype) - with_kernels).norm() < tolerance * with_kernels.norm()


# ---------------------------------------------------------------------------------------------- attention, written out


@pytest.mark.parametrize("tokens", [5, 197])
def test_bfloat16_on_a_cpu_is_the_fused_kernel(tokens):
    """Output and gradients, to the rounding of bfloat16 (8 bits), against float32; no worse than torch's own kernel."""
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, tokens, 16, requires_grad=True) for _ in range(3)]
    expected = F.scaled_dot_product_attention(*exact)
    seed = torch.randn_like(expected)
    expected = [expected, *torch.autograd.grad(expected, exact, seed)]
    errors = []
    for attend in (Attend(), F.scaled_dot_product_attention):
        inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
        output = attend(*inputs)
        got = [output, *torch.autograd.grad(output, inputs, seed.bfloat16())]
        assert all(tensor.dtype == torch.bfloat16 for tensor in got)
        errors.append([((one.float() - other).norm() / other.norm()).item() for one, other in zip(got, expected)])
    assert max(errors[0]) < 0.01 and all(ours < 2 * theirs for ours, theirs in zip(*errors)), errors


def test_bfloat16_on_a_cpu_drops_weights_in_training_alone():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 200, 8).bfloat16() for _ in range(2))
    attend, ones = Attend(0.25), torch.ones(1, 1, 200, 8).bfloat16()
    kept = attend(q, k, ones)                                    # rows sum to 1 where nothing is dropped
    assert kept.std() > 0.05 and kept.mean().item() == pytest.approx(1, abs=0.03)
    assert attend.eval()(q, k, ones).float().sub(1).abs().max() < 0.01


def test_bfloat16_on_a_cpu_does_not_hold_the_weights_of_long_sequences(monkeypatch):
    monkeypatch.setattr("models.cpu_bfloat16.MAX_TOKENS", 6)
    called, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **more: called.append(len(k[0, 0])) or fused(q, k, v))
    for tokens in (6, 7):
        Attend()(*(torch.zeros(1, 1, tokens, 8, dtype=torch.bfloat16) for _ in range(3)))
    assert called == [7]


def test_bfloat16_on_a_cpu_keeps_no_float32_weights_for_the_backward_pass():
    q, k, v = (torch.randn(1, 1, 50, 8).bfloat16().requires_grad_() for _ in range(3))
    kept = []
    with (torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
          torch.autocast("cpu", dtype=torch.bfloat16)):
        Attend()(q, k, v)
    maps = [tensor for tensor in kept if tensor.shape[-2:] == (50, 50)]
    assert maps and {tensor.dtype for tensor in maps} == {torch.bfloat16}


# -------------------------------------------------------------------------------------------- linear layer and GELU


@pytest.mark.skipif(not cpu_bfloat16._has_linear_gelu(), reason="a processor or a PyTorch without oneDNN's bfloat16")
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_evaluation_in_bfloat16_is_rounded_no_worse(gelu, monkeypatch):
    """Against float64: the product with GELU behind it, which rounds once, and the two apart, as in training."""
    torch.manual_seed(0)
    mlp, x, errors = Mlp(64, 256, gelu), torch.randn(4, 50, 64), []
    exact = copy.deepcopy(mlp).double()(x.double())
    used, product = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *given: used.append(given[3:]) or product(*given))
    for training in (True, False):
        with torch.set_grad_enabled(training), torch.autocast("cpu", dtype=torch.bfloat16):
            made = mlp(x)
        assert made.dtype == torch.bfloat16
        errors.append(((made.double() - exact).norm() / exact.norm()).item())
    assert len(used) == 1 and errors[1] < 1.1 * errors[0] < 0.02, errors
    with torch.no_grad():
        assert mlp(x).dtype == torch.float32 and len(used) == 1
