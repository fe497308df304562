"""Faster kernels for operations that are slow in PyTorch, mostly in bfloat16 on a CPU. enabled = False disables all.

Everywhere else weights are used by calling their module. Some kernels here read them directly, so these return None, and the
caller calls the module, if it is replaced, wrapped or hooked: adapters, quantized layers and hooks work as on any other model. So
do counters and transforms of operations. The figures are in benchmarks/TRIED.md.

Shapes: B images, N tokens, H heads, d = D / H.
"""

import functools

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks

enabled = True
MAX_TOKENS = 1024        # with more tokens, the (N, N) weights would take too much memory


def attention(q: Tensor, k: Tensor, v: Tensor, dropout_rate: float) -> Tensor | None:
    """q, k, v: (B, H, N, d) -> (B, H, N, d). Compute softmax(q k^T / sqrt(d)) v as two products, in bfloat16 on a CPU.

    The fused kernel of CPUs is slower in bfloat16, at 197 and at 577 tokens, and faster in float32.
    """
    if not enabled or q.device.type != "cpu" or q.dtype != torch.bfloat16 or k.shape[-2] > MAX_TOKENS:
        return None
    # Autocast would also keep the softmax in float32 for the backward pass: three times the memory of the bfloat16 values, and
    # the product with v reads only those.
    with torch.autocast(q.device.type, enabled=False):
        rows, columns, values = (part.flatten(0, 1) for part in (q, k.transpose(-2, -1), v))
        logits = torch.baddbmm(q.new_empty(()), rows, columns, beta=0, alpha=q.shape[-1] ** -0.5)
        weights = F.dropout(logits.softmax(dim=-1), dropout_rate)
        return (weights @ values).unflatten(0, q.shape[:2])


def linear_gelu(x: Tensor, linear: nn.Module, gelu: nn.Module) -> Tensor | None:
    """Compute gelu(linear(x)) in one operation of oneDNN, for evaluation in bfloat16 on a CPU.

    It avoids PyTorch's slow kernel of the tanh form. It is for evaluation only, as a backward pass would need the input of GELU.
    """
    if (not enabled or torch.is_grad_enabled() or not _autocasts_to_bfloat16(x.device) or not _has_linear_gelu()
            or not _is_plain(linear, nn.Linear) or not _is_plain(gelu, nn.GELU) or linear.bias is None
            or linear.weight.dtype != torch.float32
            or _operations_are_followed()):
        return None
    x, weight, bias = (tensor.to(torch.bfloat16) for tensor in (x, linear.weight, linear.bias))
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], gelu.approximate)


def mix_heads(maps: Tensor, linear: nn.Module) -> Tensor | None:
    """(B, H, N, N) -> (B, H, N, N). Apply `linear` to the axis of the heads, as a product with its (H, H) from the left.

    This kernel is for every device and type. Calling `linear` needs the heads on the last axis, which copies the maps twice: on
    a CPU, talking heads then take 2 to 8 times as long (196 tokens, 4 and 8 heads, one thread, with and without backward).
    """
    if not enabled or not _is_plain(linear, nn.Linear):
        return None
    weight, bias = linear.weight.to(maps.dtype), linear.bias.to(maps.dtype)
    return torch.baddbmm(bias.view(1, -1, 1), weight.expand(maps.shape[0], -1, -1), maps.flatten(2)).view_as(maps)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module is exactly of this class, with plain parameters and without hooks."""
    return (type(module) is kind and "forward" not in vars(module)
            and all(type(parameter) in (nn.Parameter, Tensor) for parameter in module._parameters.values())
            and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
            and not module_hooks._has_any_global_hook())


def _operations_are_followed() -> bool:
    """Whether operations are counted or transformed (a dispatch mode, torch.func, forward-mode derivatives).

    Such tools do not know oneDNN's operations: a derivative would silently be 0.
    """
    return (torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.maybe_current_level() is not None
            or forward_ad._current_level >= 0)


def _autocasts_to_bfloat16(device: torch.device) -> bool:
    return (device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and not torch.compiler.is_compiling() and not torch.jit.is_tracing() and torch.backends.mkldnn.enabled)


@functools.cache
def _has_linear_gelu() -> bool:
    onednn = torch.ops.mkldnn              # torch.compile uses this operation too, on processors that support it
    return (torch.backends.mkldnn.is_available() and hasattr(onednn, "_linear_pointwise")
            and onednn._is_mkldnn_bf16_supported())
