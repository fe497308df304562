"""Kernels for a CPU: as exact as PyTorch's own, and not used if a module is hooked, replaced or wrapped."""

import contextlib
import copy

import families
import filling
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

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
    "dino": TINY | families.DINO | {"gelu": "erf", "classifier": "token_mean", "mlp_norm": True},
    "pool": TINY | {"gelu": "quick", "classifier": "attention", "pool_heads": 2, "class_token": False, "rope": "eva",
                    "rope_grid": 2, "qk_norm": True, "norm": "rms", "attention_norm": True, "pre_norm": True,
                    "patch_norm": "after"},
}
PRECISIONS = [torch.float32, torch.bfloat16]


def random_model(family: str, std: float = 0.7) -> nn.Module:
    return filling.random_model(architecture(**FAMILIES[family]), 3, (8, 12), std=std).eval()


def predict(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    images = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model(images)


# ---------------------------------------------------------------------------- weights are used by calling their module


def bend(x: torch.Tensor) -> torch.Tensor:
    """Change the values in a way that no later norm removes."""
    return x + x.square()


class Wrapped(nn.Module):
    """Like an adapter: contains the layer."""

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


def parametrize(model, name):
    module = model.get_submodule(name)
    nn.utils.parametrize.register_parametrization(module, next(iter(module._parameters)), Wrapped(nn.Identity()))


def replace_forward(model, name):
    module = model.get_submodule(name)
    module.forward = lambda *inputs, forward=module.forward: bend(forward(*inputs))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("change", [hook, hook_inputs, wrap, parametrize, replace_forward])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_of_any_module_with_weights_acts(family, change, dtype):
    model = random_model(family)
    plain, names = predict(model, dtype), [name for name, module in model.named_modules() if name and module._parameters]
    assert len(names) > 10 and (family != "cait" or "blocks.0.attn.proj_l" in names)
    for name in names:
        changed = copy.deepcopy(model)
        change(changed, name)
        assert not torch.equal(predict(changed, dtype), plain), name


class Adapted(nn.Module):
    """Like peft's LoRA: the layer, and two of its own class with a small width between them; no parameter is called `weight`."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int = 2):
        super().__init__()
        self.layer, kind = layer.requires_grad_(False), nn.Linear if isinstance(layer, nn.Linear) else type(layer)
        if isinstance(layer, nn.Linear):
            self.down, self.up = kind(layer.in_features, rank, bias=False), kind(rank, layer.out_features, bias=False)
        else:
            self.down = kind(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False)
            self.up = kind(rank, layer.out_channels, (1, 1), (1, 1), groups=1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_all_layers_learn(family, dtype):
    """At first they change nothing, and their second layers have gradients; a small step changes little."""
    model = random_model(family, 0.2)
    plain = predict(model)
    for name in [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]:
        model.set_submodule(name, Adapted(model.get_submodule(name)))
    adapters = [module for module in model.modules() if isinstance(module, Adapted)]
    assert torch.equal(predict(model), plain) and len(adapters) > 8

    def learn(layer: str) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(torch.ones(2, 3, 8, 12)).float().square().sum().backward()
        assert all(getattr(adapter, layer).weight.grad.abs().max() > 0 for adapter in adapters)

    learn("up")
    for adapter in adapters:
        adapter.up.weight.data -= 1e-4 * adapter.up.weight.grad.sign()
    assert 0 < (predict(model) - plain).norm() < 0.05 * plain.norm()
    learn("down")


@pytest.mark.reference
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_of_peft_learns_in_all_layers(family, dtype):
    peft = pytest.importorskip("peft")
    model = random_model(family)
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(torch.ones(2, 3, 8, 12)).float().square().sum().backward()
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert len(adapters) == 2 * len(names) and all(parameter.grad.abs().max() > 0 for parameter in adapters)


class Int8(torch.Tensor):
    """Like torchao's weights: integers with a scale for each row, which only a linear layer can use."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.used = 0
        self.numbers = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, bias = args
            weight.used += 1
            with torch._C.DisableTorchFunctionSubclass():
                return F.linear(x, (weight.numbers * weight.scale).to(x.dtype), bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} of a weight in int8")


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_another_kind_of_tensor(family, dtype):
    model = random_model(family, 0.2)
    plain = predict(model, dtype)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        layer.weight = nn.Parameter(Int8(layer.weight.detach()), requires_grad=False)
    assert (predict(model, dtype) - plain).norm() < 0.02 * plain.norm()
    assert all(layer.weight.used == 1 for layer in layers)


@pytest.mark.reference
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_weights_of_torchao(family, kind, dtype):
    torchao = pytest.importorskip("torchao.quantization")
    model = random_model(family, 0.2)
    plain = predict(model, dtype)
    torchao.quantize_(model, getattr(torchao, kind)())
    assert all(type(module.weight) is not nn.Parameter for module in model.modules() if isinstance(module, nn.Linear))
    assert (predict(model, dtype) - plain).norm() < 0.02 * plain.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_quantization(family):
    """It replaces every linear layer by a module whose weight is not a tensor."""
    quantization = pytest.importorskip("torch.ao.quantization")
    model = random_model(family, 0.2)
    plain, quantized = predict(model), quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    assert 0 < (predict(quantized) - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_of_all_modules_see_each_of_them(family, dtype):
    model, seen = random_model(family), set()
    with contextlib.ExitStack() as stack:
        for register in (module_hooks.register_module_forward_hook, module_hooks.register_module_forward_pre_hook):
            stack.callback(register(lambda module, *_: seen.add(module)).remove)
            predict(model, dtype)
            assert {*model.modules()} - seen == {module for module in model.modules() if isinstance(module, nn.ModuleList)}
            seen.clear()


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_counted(family, dtype):
    """In both layers of an MLP, also without PyTorch's counter, whose hooks would disable the kernels."""
    model, products = random_model(family), []
    with FlopCounterMode(display=False) as counter:
        predict(model, dtype)
    counts = {name.partition(".")[2]: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    assert counts["blocks.1.mlp.fc1"] == (1 + (family == "dino")) * counts["blocks.1.mlp.fc2"] > 0       # a gate and a value

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            products.extend([function] * (function in (torch.ops.aten.addmm.default, torch.ops.aten.linear.default)))
            return function(*args, **(kwargs or {}))

    with Products(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        model.blocks[0].mlp(torch.zeros(1, 3, 12))
    assert len(products) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_forward_derivatives(dtype):
    """Those of an MLP without gradients agree with a finite difference."""
    torch.manual_seed(0)
    mlp, x, direction = Mlp(8, 16, "tanh"), torch.randn(2, 8), torch.randn(2, 8)
    expected = (mlp(x + 1e-2 * direction) - mlp(x - 1e-2 * direction)).detach() / 2e-2
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        _, derivative = torch.func.jvp(mlp, (x,), (direction,))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(mlp(forward_ad.make_dual(x, direction))).tangent
    for each in (derivative, dual):
        assert (each.float() - expected).norm() < 0.03 * expected.norm()


def test_backward_hooks_on_talking_heads_are_called():
    model, called = random_model("cait"), []
    for name in ("proj_l", "proj_w"):
        model.blocks[1].attn.get_submodule(name).register_full_backward_hook(lambda *_: called.append(1))
    model(torch.randn(2, 3, 8, 12)).sum().backward()
    assert len(called) == 2


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_maps_of_wrapped_talking_heads_are_recorded_in_float32(dtype):
    """Also in a model with weights in half precision."""
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


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["dino", "pool"])
@pytest.mark.filterwarnings("error")
def test_half_precision_learns_what_float32_does(family, how):
    """Logits and gradients, under autocast and (O3) with half weights; RMSNorm causes no warning about mixed types."""
    model, images = random_model(family, 0.2), torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    half, dtype = copy.deepcopy(model), torch.float16 if how == "float16" else torch.bfloat16
    half = half if how == "autocast" else half.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"):
        found = half(images if how == "autocast" else images.to(dtype))
    expected = model(images)
    for logits in (found, expected):
        logits.float().square().sum().backward()
    assert (found.float() - expected).norm() < 0.05 * expected.norm()
    for (name, one), other in zip(half.named_parameters(), model.parameters()):
        assert one.grad.dtype == one.dtype and (one.grad.float() - other.grad).norm() < 0.2 * other.grad.norm() + 0.1, name


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_switch_turns_all_kernels_off(family, dtype, monkeypatch):
    """The results are the same up to rounding."""
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
    """Output and gradients, up to the rounding of bfloat16 (8 bits), against float32; no worse than torch's own kernel."""
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


def test_bfloat16_on_a_cpu_drops_weights_only_in_training():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 200, 8).bfloat16() for _ in range(2))
    attend, ones = Attend(0.25), torch.ones(1, 1, 200, 8).bfloat16()
    kept = attend(q, k, ones)                                    # rows sum to 1 where nothing is dropped
    assert kept.std() > 0.05 and kept.mean().item() == pytest.approx(1, abs=0.03)
    assert attend.eval()(q, k, ones).float().sub(1).abs().max() < 0.01


def test_bfloat16_on_a_cpu_does_not_store_the_weights_of_long_sequences(monkeypatch):
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
    """Against float64: the fused product and GELU, which round once, and the two separately, as in training."""
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
