"""Self-attention, and recording its weights.

The forward pass is torch's fused `scaled_dot_product_attention`, which never holds the (N, N) weights. They are
computed from the same q and k only while `record_attention` is active: it hangs hooks on the submodule `attend`
of every layer and takes them away at the end, so that there is one forward pass and not two variants of it.

Shapes: B images, N tokens, D width, H heads, d = D / H.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attend(nn.Module):
    """softmax(q k^T / sqrt(d)) v. Law: weights(q, k) @ v == forward(q, k, v), dropout aside."""

    def __init__(self, dropout_rate: float = 0.0):
        super().__init__()
        self.dropout_rate = dropout_rate

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: (B, H, N, d) -> (B, H, N, d)"""
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_rate if self.training else 0.0)

    @staticmethod
    def weights(q: Tensor, k: Tensor) -> Tensor:
        """q, k: (B, H, N, d) -> (B, H, N, N) in float32 or wider, rows sum to 1."""
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            return (q.to(wide) * q.shape[-1] ** -0.5 @ k.to(wide).transpose(-2, -1)).softmax(dim=-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention. The state dict has timm's names: qkv (3D, D) in the order q, k, v; proj (D, D)."""

    def __init__(self, dim: int, num_heads: int, dropout_rate: float = 0.0, attention_dropout_rate: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attend = Attend(attention_dropout_rate)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        b, n, dim = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.attend(q, k, v)                                     # (B, H, N, d)
        return self.drop(self.proj(x.transpose(1, 2).reshape(b, n, dim)))


@contextlib.contextmanager
def record_attention(model: nn.Module, differentiable: bool = False) -> Iterator[list[Tensor]]:
    """with record_attention(model) as maps: model(images)  ->  maps[layer]: (B, H, N, N), float32.

    The model's output is bitwise what it is without recording. A second forward pass inside the block replaces
    the maps of the first. With `differentiable`, the output is computed from the recorded weights (equal up to
    rounding), so that gradients reach them.

    Raises RuntimeError at the end of the block if a layer did not report. That happens to models that were
    already compiled: their graph has no place for hooks; record on the plain module instead.
    """
    layers = [module for module in model.modules() if isinstance(module, Attend)]
    if not layers:
        raise RuntimeError("record_attention: this model has no attention layer that can be recorded")
    maps: list[Tensor | None] = [None] * len(layers)

    def hook(index: int):
        def record(attend: Attend, qkv: tuple[Tensor, Tensor, Tensor], output: Tensor) -> Tensor | None:
            q, k, v = qkv
            if differentiable:
                maps[index] = attend.weights(q, k)
                return (maps[index].to(v.dtype) @ v)
            with torch.no_grad():
                maps[index] = attend.weights(q, k)
            return None
        return record

    handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
    silent = [index for index, recorded in enumerate(maps) if recorded is None]
    if silent:
        raise RuntimeError(
            f"record_attention: layers {silent} of {len(layers)} recorded nothing. Run the model inside the block; "
            "if it is compiled, record on the module from before torch.compile")
