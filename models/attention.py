"""Self-attention, CaiT's talking heads and class attention, and recording their weights.

The forward pass is torch's fused `scaled_dot_product_attention`, which never holds the (N, N) weights; but on a CPU in
bfloat16 the two products are faster (see Attend). The weights that are looked at are computed from the same q and k only
while `record_attention` is active: it hangs hooks on the submodule `attend`
of every layer and takes them away at the end, so that there is one forward pass and not two variants of it.
Talking heads (Shazeer et al., arXiv 2003.02436) mix the weights of the heads, which no fused kernel does: their
forward pass holds the weights.

Shapes: B images, N tokens, D width, H heads, d = D / H.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WRITTEN_OUT = 1024


class Attend(nn.Module):
    """softmax(q k^T / sqrt(d)) v. Law: weights(q, k) @ v == forward(q, k, v), dropout aside.

    The fused kernel of CPUs takes longer in bfloat16 than the products written out, at 197 tokens and at 577, and in
    float32 less (benchmarks/RESULTS.md). Beyond WRITTEN_OUT tokens the weights would take too much memory.
    """

    def __init__(self, dropout_rate: float = 0.0):
        super().__init__()
        self.dropout_rate = dropout_rate

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: (B, H, N, d) -> (B, H, N, d)"""
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= WRITTEN_OUT:
            return self._written_out(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_rate if self.training else 0.0)

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Autocast would keep the softmax in float32 for the backward pass: three times the memory of its bfloat16 values,
        # which are all that the product with v reads.
        with torch.autocast(q.device.type, enabled=False):
            rows, columns, values = (part.flatten(0, 1) for part in (q, k.transpose(-2, -1), v))
            logits = torch.baddbmm(q.new_empty(()), rows, columns, beta=0, alpha=q.shape[-1] ** -0.5)
            weights = F.dropout(logits.softmax(dim=-1), self.dropout_rate, self.training)
            return (weights @ values).unflatten(0, q.shape[:2])

    @staticmethod
    def weights(q: Tensor, k: Tensor) -> Tensor:
        """q, k: (B, H, N, d) -> (B, H, N, N) in float32 or wider, rows sum to 1."""
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            return (q.to(wide) * q.shape[-1] ** -0.5 @ k.to(wide).transpose(-2, -1)).softmax(dim=-1)


class AttendTalking(Attend):
    """Attention whose heads are mixed before the softmax by `proj_l` and after it by `proj_w`, linear layers over H.

    The law of `Attend` holds for the weights after `proj_w`. Their rows need not sum to 1.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, proj_l: nn.Linear, proj_w: nn.Linear) -> Tensor:
        """q, k, v: (B, H, N, d) -> (B, H, N, d)"""
        return F.dropout(_talk(q, k, proj_l, proj_w), self.dropout_rate, self.training) @ v

    @staticmethod
    def weights(q: Tensor, k: Tensor, proj_l: nn.Linear, proj_w: nn.Linear) -> Tensor:
        """q, k: (B, H, N, d) -> (B, H, N, N) in float32 or wider."""
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            return _talk(q.to(wide), k.to(wide), proj_l, proj_w)


def _talk(q: Tensor, k: Tensor, proj_l: nn.Linear, proj_w: nn.Linear) -> Tensor:
    return _mix_heads(_mix_heads(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1), proj_l).softmax(dim=-1), proj_w)


def _mix_heads(maps: Tensor, proj: nn.Linear) -> Tensor:
    """(B, H, N, N) -> (B, H, N, N). A product with (H, H) from the left: as `proj` over the last axis, without its copies."""
    weight, bias = proj.weight.to(maps.dtype), proj.bias.to(maps.dtype)
    return torch.baddbmm(bias.view(1, -1, 1), weight.expand(len(maps), -1, -1), maps.flatten(2)).view_as(maps)


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
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.drop(self.proj(join_heads(self.attend(q, k, v))))


class TalkingHeadsAttention(SelfAttention):
    """Self-attention with talking heads, under CaiT's names: `proj_l` and `proj_w` (H, H) beside qkv and proj."""

    def __init__(self, dim: int, num_heads: int, dropout_rate: float = 0.0, attention_dropout_rate: float = 0.0):
        super().__init__(dim, num_heads, dropout_rate, attention_dropout_rate)
        self.attend = AttendTalking(attention_dropout_rate)
        self.proj_l, self.proj_w = nn.Linear(num_heads, num_heads), nn.Linear(num_heads, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.drop(self.proj(join_heads(self.attend(q, k, v, self.proj_l, self.proj_w))))


class ClassAttention(nn.Module):
    """Attention of the first token alone (Touvron et al., arXiv 2103.17239): one query, keys and values of all tokens."""

    def __init__(self, dim: int, num_heads: int, dropout_rate: float = 0.0, attention_dropout_rate: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.attend = Attend(attention_dropout_rate)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 + N, D) -> (B, 1, D)"""
        q, k, v = (split_heads(part, self.num_heads) for part in (self.q(x[:, :1]), self.k(x), self.v(x)))
        return self.drop(self.proj(join_heads(self.attend(q, k, v))))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, D) -> (B, H, N, d)"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, D)"""
    return x.transpose(1, 2).flatten(2)


@contextlib.contextmanager
def record_attention(model: nn.Module, differentiable: bool = False) -> Iterator[list[Tensor]]:
    """with record_attention(model) as maps: model(images)  ->  maps[layer]: (B, H, N, N), float32.

    CaiT: the maps of its talking-heads layers, after `proj_w`, then (B, H, 1, 1 + N) of its class-attention layers.
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
        def record(attend: Attend, inputs: tuple, output: Tensor) -> Tensor | None:
            q, k, v, *projections = inputs
            if differentiable:
                maps[index] = attend.weights(q, k, *projections)
                return (maps[index].to(v.dtype) @ v)
            with torch.no_grad():
                maps[index] = attend.weights(q, k, *projections)
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
