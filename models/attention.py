"""Self-attention, CaiT's talking heads and class attention, and recording their weights.

The forward pass is torch's fused `scaled_dot_product_attention`, which never stores the (N, N) weights (on a CPU in bfloat16, two
products; see cpu_bfloat16.py). The recorded weights are computed from the same q and k, only while `record_attention` is active:
it registers hooks on the submodule `attend` of every layer and removes them at the end, so there is only one variant of the
forward pass. Talking heads (Shazeer et al., arXiv 2003.02436) mix the weights of the heads, which no fused kernel does: their
forward pass computes the weights.

Shapes: B images, N tokens, D width, H heads, d = D / H.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import cpu_bfloat16


class Attend(nn.Module):
    """softmax(q k^T / sqrt(d)) v. Invariant without dropout: weights(q, k) @ v == forward(q, k, v)."""

    def __init__(self, dropout_rate: float = 0.0):
        super().__init__()
        self.dropout_rate = dropout_rate

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: (B, H, N, d) -> (B, H, N, d)"""
        dropout_rate = self.dropout_rate if self.training else 0.0
        output = cpu_bfloat16.attention(q, k, v, dropout_rate)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_rate) if output is None else output

    @staticmethod
    def weights(q: Tensor, k: Tensor) -> Tensor:
        """q, k: (B, H, N, d) -> (B, H, N, N) in float32 or wider, rows sum to 1."""
        return wide_logits(q, k).softmax(dim=-1)


class AttendTalking(Attend):
    """Attention whose heads are mixed before the softmax by `proj_l` and after it by `proj_w`, linear layers over H.

    The invariant of `Attend` holds for the weights after `proj_w`. Their rows need not sum to 1.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, proj_l: nn.Module, proj_w: nn.Module) -> Tensor:
        """q, k, v: (B, H, N, d) -> (B, H, N, d)"""
        weights = _mixed_weights(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1), proj_l, proj_w)
        return F.dropout(weights, self.dropout_rate, self.training) @ v

    @staticmethod
    def weights(q: Tensor, k: Tensor, proj_l: nn.Module, proj_w: nn.Module) -> Tensor:
        """q, k: (B, H, N, d) -> (B, H, N, N) in float32 or wider."""
        with torch.autocast(q.device.type, enabled=False):
            return _mixed_weights(wide_logits(q, k), proj_l, proj_w)


def _mixed_weights(logits: Tensor, proj_l: nn.Module, proj_w: nn.Module) -> Tensor:
    return mix_heads(mix_heads(logits, proj_l).softmax(dim=-1), proj_w)


def mix_heads(maps: Tensor, proj: nn.Module) -> Tensor:
    """(B, H, N, N) -> (B, H, N, N): apply `proj`, a linear layer over H, to every entry of the maps"""
    mixed = cpu_bfloat16.mix_heads(maps, proj)
    if mixed is not None:
        return mixed
    weight, dtype = next(proj.parameters(), maps), maps.dtype
    if weight.is_floating_point() and not torch.is_autocast_enabled(maps.device.type):
        dtype = weight.dtype                                # recorded maps are wider than the weights in half precision
    return proj(maps.permute(0, 2, 3, 1).to(dtype)).permute(0, 3, 1, 2).to(maps.dtype)


class QueryValueLinear(nn.Linear):
    """D -> queries, keys and values (3 D); the keys have no bias (BEiT, arXiv 2106.08254)."""

    def __init__(self, dim: int):
        super().__init__(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., 3 D)"""
        return F.linear(x, self.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))


class SelfAttention(nn.Module):
    """Multi-head self-attention. The state dict has timm's names: qkv (3D, D) in the order q, k, v; proj (D, D).

    qkv_bias: "all", "qv" (the keys have none) or "none". norm: creates a norm for a width; it is used before `proj` if `scaled`,
    and for queries and keys if `qk_norm`. rope: rotates queries and keys.
    """

    def __init__(self, dim: int, num_heads: int, dropout_rate: float = 0.0, attention_dropout_rate: float = 0.0, *,
                 qkv_bias: str = "all", proj_bias: bool = True, qk_norm: bool = False, scaled: bool = False,
                 norm: Callable[[int], nn.Module] = nn.LayerNorm, rope: nn.Module | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = QueryValueLinear(dim) if qkv_bias == "qv" else nn.Linear(dim, 3 * dim, bias=qkv_bias == "all")
        self.q_norm, self.k_norm = (norm(dim // num_heads) if qk_norm else None for _ in range(2))
        self.rope = rope
        self.attend = Attend(attention_dropout_rate)
        self.norm = norm(dim) if scaled else None
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.drop = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        if self.q_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        x = join_heads(self.attend(q, k, v))
        return self.drop(self.proj(x if self.norm is None else self.norm(x)))


class TalkingHeadsAttention(SelfAttention):
    """Self-attention with talking heads, with CaiT's names: `proj_l` and `proj_w` (H, H) in addition to qkv and proj."""

    def __init__(self, dim: int, num_heads: int, dropout_rate: float = 0.0, attention_dropout_rate: float = 0.0):
        super().__init__(dim, num_heads, dropout_rate, attention_dropout_rate)
        self.attend = AttendTalking(attention_dropout_rate)
        self.proj_l, self.proj_w = nn.Linear(num_heads, num_heads), nn.Linear(num_heads, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.drop(self.proj(join_heads(self.attend(q, k, v, self.proj_l, self.proj_w))))


class ClassAttention(nn.Module):
    """Attention of the first token only (Touvron et al., arXiv 2103.17239): one query, keys and values of all tokens."""

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


def wide_logits(q: Tensor, k: Tensor) -> Tensor:
    """q, k: (B, H, N, d) -> q k^T / sqrt(d), (B, H, N, N) in float32 or wider"""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        return q.to(wide) * q.shape[-1] ** -0.5 @ k.to(wide).transpose(-2, -1)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, D) -> (B, H, N, d)"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, D)"""
    return x.transpose(1, 2).flatten(2)


@contextlib.contextmanager
def record_attention(model: nn.Module, differentiable: bool = False) -> Iterator[list[Tensor]]:
    """Record the attention weights of all layers.

    with record_attention(model) as maps: model(images)  ->  maps[layer]: (B, H, N, N), float32.

    CaiT: the maps of its talking-heads layers, after `proj_w`, then (B, H, 1, 1 + N) of its class-attention layers.
    Pooling by attention: its map (B, H, 1, N) is the last, with its own number of heads.
    Recording does not change the model's output, bit for bit. A second forward pass inside the block replaces the maps of the
    first. With `differentiable`, the output is computed from the recorded weights (equal up to rounding), so that gradients
    reach them.

    Raises RuntimeError at the end of the block if a layer recorded nothing, as in compiled models: their graph ignores new
    hooks; record on the plain module instead.
    """
    layers = [module for module in model.modules() if isinstance(module, Attend)]
    if not layers:
        raise RuntimeError("record_attention: this model has no attention layer that can be recorded")
    maps: list[Tensor | None] = [None] * len(layers)

    def record(index: int, attend: Attend, q: Tensor, k: Tensor, v: Tensor, *projections: nn.Module) -> Tensor | None:
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            maps[index] = attend.weights(q, k, *projections)
        return maps[index].to(v.dtype) @ v if differentiable else None

    with run_recorded("record_attention", layers, maps, record):
        yield maps


@contextlib.contextmanager
def run_recorded(name: str, layers: list[Attend], recorded: list[Tensor | None],
                 record: Callable[..., Tensor | None]) -> Iterator[None]:
    """Call record(index, layer, q, k, v, ...) after each forward pass of a layer; a Tensor that it returns replaces the output.

    Raises RuntimeError at the end of the block if an entry of `recorded` is still None; the message begins with `name`.
    """
    handles = [layer.register_forward_hook(lambda layer, inputs, output, index=index: record(index, layer, *inputs))
               for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    missing = [index for index, value in enumerate(recorded) if value is None]
    if missing:
        raise RuntimeError(
            f"{name}: layers {missing} of {len(layers)} recorded nothing. Run the model inside the block; "
            "if it is compiled, record on the module from before torch.compile")
