"""Kernels for the operations that PyTorch's own take too long for, mostly in bfloat16 on a CPU. `enabled` switches all off.

Everywhere else weights are used by calling their module. Here some are read, so each such kernel steps aside when the
module that holds them is replaced, wrapped or hooked: adapters, quantized layers and hooks act as on any other model. So do
counters and transforms of operations.
A kernel that steps aside returns None. The figures are in benchmarks/TRIED.md.

Shapes: B images, N tokens, H heads, d = D / H.
"""

import functools

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks

enabled = True
MAX_TOKENS = 1024        # for which attention is written out: the weights of more would take too much memory


def attention(q: Tensor, k: Tensor, v: Tensor, dropout_rate: float) -> Tensor | None:
    """q, k, v: (B, H, N, d) -> (B, H, N, d). softmax(q k^T / sqrt(d)) v as two products, in bfloat16 on a CPU.

    The fused kernel of CPUs takes longer in bfloat16, at 197 tokens and at 577, and less in float32.
    """
    if not enabled or q.device.type != "cpu" or q.dtype != torch.bfloat16 or k.shape[-2] > MAX_TOKENS:
        return None
    # Autocast would keep the softmax in float32 for the backward pass: three times the memory of its bfloat16 values,
    # which are all that the product with v reads.
    with torch.autocast(q.device.type, enabled=False):
        rows, columns, values = (part.flatten(0, 1) for part in (q, k.transpose(-2, -1), v))
        logits = torch.baddbmm(q.new_empty(()), rows, columns, beta=0, alpha=q.shape[-1] ** -0.5)
        weights = F.dropout(logits.softmax(dim=-1), dropout_rate)
        return (weights @ values).unflatten(0, q.shape[:2])


def linear_gelu(x: Tensor, linear: nn.Module, gelu: nn.Module) -> Tensor | None:
    """gelu(linear(x)) as one product of oneDNN, for evaluation in bfloat16 on a CPU.

    PyTorch's own kernel of the tanh form is the slow one of the two. The backward pass would need what is before GELU.
    """
    if (not enabled or torch.is_grad_enabled() or not _autocasts_to_bfloat16(x.device) or not _has_linear_gelu()
            or not _is_plain(linear, nn.Linear) or not _is_plain(gelu, nn.GELU) or linear.bias is None
            or linear.weight.dtype != torch.float32
            or _operations_are_followed()):
        return None
    x, weight, bias = (tensor.to(torch.bfloat16) for tensor in (x, linear.weight, linear.bias))
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], gelu.approximate)


def mix_heads(maps: Tensor, linear: nn.Module) -> Tensor | None:
    """(B, H, N, N) -> (B, H, N, N). `linear` over the axis of the heads as a product with its (H, H) from the left.

    The one kernel here for every device and type. Calling `linear` needs the heads on the last axis, which copies the maps
    twice: on a CPU talking heads take 2 to 8 times as long (196 tokens, 4 and 8 heads, one thread, with and without backward).
    """
    if not enabled or not _is_plain(linear, nn.Linear):
        return None
    weight, bias = linear.weight.to(maps.dtype), linear.bias.to(maps.dtype)
    return torch.baddbmm(bias.view(1, -1, 1), weight.expand(maps.shape[0], -1, -1), maps.flatten(2)).view_as(maps)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module computes what its class computes of its own weights, and nobody listens to it."""
    return (type(module) is kind and "forward" not in vars(module)
            and all(type(parameter) in (nn.Parameter, Tensor) for parameter in module._parameters.values())
            and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
            and not module_hooks._has_any_global_hook())


def _operations_are_followed() -> bool:
    """Whether somebody counts or transforms operations (a dispatch mode, torch.func, forward derivatives), who knows PyTorch's
    own and not oneDNN's: a derivative would be 0 without a word."""
    return (torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.maybe_current_level() is not None
            or forward_ad._current_level >= 0)


def _autocasts_to_bfloat16(device: torch.device) -> bool:
    return (device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and not torch.compiler.is_compiling() and not torch.jit.is_tracing() and torch.backends.mkldnn.enabled)


@functools.cache
def _has_linear_gelu() -> bool:
    own = torch.ops.mkldnn                 # what torch.compile makes of a linear layer and GELU, on processors that have it
    return torch.backends.mkldnn.is_available() and hasattr(own, "_linear_pointwise") and own._is_mkldnn_bf16_supported()
