"""Sigmoid attention: people can edit what a layer attends to, as one value between 0 and 1 for each patch.

A logit l = q k^T / sqrt(d) is shown as s = sigmoid(l). If a person sets e instead, softmax gets logit(e); everywhere else it gets
l itself. So without an edit the layer computes the same softmax attention as before, bit for bit (log(s / (1 - s)), which would
also invert the sigmoid, is not a number from l = 17 in float32 and 9 in float16). Rows sum to 1 with edits too.

An edit applies to all heads, in the rows of the queries that the head of the model reads: those of the cls token, of the cls and
distillation tokens, or of all patches if the head reads their mean. Pooling by attention counts as the last layer, with one
query; in the layers before it, all tokens are read.

Shapes: B images, H heads, N tokens, R query rows, (h, w) grid of patches, the last h * w of the keys.
"""

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attend, ClassAttention, SelfAttention, TalkingHeadsAttention, run_recorded, wide_logits
from .errors import ModelError
from .pooling import AttentionPool

EPS = 2.0 ** -24        # 1 - EPS is the largest float32 number below 1


class AttendSigmoid(Attend):
    """`Attend` with logits that can be edited, of the queries `rows` and the keys from `first_patch` on."""

    def __init__(self, dropout_rate: float, rows: slice | list[int], first_patch: int):
        super().__init__(dropout_rate)
        self.rows, self.first_patch = rows, first_patch
        self.edits: tuple[Tensor, Tensor] | None = None          # values and which are edited, (B or 1, 1, 1, h * w) each

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: (B, H, N, d) -> (B, H, N, d)"""
        output = super().forward(q, k, v)
        if self.edits is None:
            return output
        if self.edits[0].shape[0] not in (1, q.shape[0]):
            raise ModelError(f"edits of {self.edits[0].shape[0]} images do not fit a batch of {q.shape[0]}")
        weights = F.dropout(self._edited(q[:, :, self.rows], k), self.dropout_rate, self.training)
        wide = (weights @ v.to(weights.dtype)).to(v.dtype)
        has_edit = self.edits[1].any(dim=-1, keepdim=True)        # (B or 1, 1, 1, 1): other images do not change by a bit
        output = output.clone()
        output[:, :, self.rows] = torch.where(has_edit, wide, output[:, :, self.rows])
        return output

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """q, k: (B, H, N, d) -> (B, H, N, N) in float32 or wider, as edited; rows sum to 1."""
        weights = super().weights(q, k)
        if self.edits is not None:
            weights = weights.clone()
            weights[:, :, self.rows] = self._edited(q[:, :, self.rows], k)
        return weights

    def patch_logits(self, q: Tensor, k: Tensor) -> Tensor:
        """q, k: (B, H, N, d) -> (B, H, R, h * w) in float32 or wider, before any edit"""
        return wide_logits(q[:, :, self.rows], k[:, :, self.first_patch:])

    def _edited(self, q: Tensor, k: Tensor) -> Tensor:
        logits = wide_logits(q, k)
        patches = edit_logits(logits[..., self.first_patch:], *self.edits)
        return torch.cat([logits[..., :self.first_patch], patches], dim=-1).softmax(dim=-1)


def edit_logits(logits: Tensor, values: Tensor, edited: Tensor) -> Tensor:
    """Return logit(values) where edited, the logits elsewhere. All broadcast to one shape; logits in float32 or wider.

    0 and 1 mean "at most" and "at least": they are replaced by EPS and 1 - EPS (logits of -16.6 and 16.6), unless the
    logit is already beyond that.
    """
    wide = (values.cpu() if values.device.type == "mps" else values).double()             # Apple GPUs have no float64
    target = wide.clamp(EPS, 1 - EPS).logit().to(logits.device, logits.dtype)
    target = torch.where(values >= 1, torch.maximum(logits, target), target)
    target = torch.where(values <= 0, torch.minimum(logits, target), target)
    return torch.where(edited, target, logits)


def use_sigmoid_attention(model: nn.Module, layers: str) -> None:
    """Switch these layers to sigmoid attention, and the others to plain: "last", "all", numbers from 1 such as "3,7", or "".

    Layers are counted as in record_attention. In CaiT only class-attention layers can be edited, and "all" means these: talking
    heads would mix the edited values. Parameters do not change, nor do outputs without edits. Raises ModelError for layers that
    do not exist or cannot be edited.
    """
    attentions = [module for module in model.modules() if isinstance(module, (SelfAttention, ClassAttention, AttentionPool))]
    editable = [number for number, attention in enumerate(attentions, start=1)
                if not isinstance(attention, TalkingHeadsAttention)]
    numbers = parse_layers(layers, editable, len(attentions))
    for number in editable:
        attention = attentions[number - 1]
        rate = attention.attend.dropout_rate
        first_patch = 1 if isinstance(attention, ClassAttention) else model.num_prefix_tokens
        attention.attend = AttendSigmoid(rate, model.query_rows, first_patch) if number in numbers else Attend(rate)
    model.config.sigmoid_attention, model.sigmoid_layers = layers, tuple(numbers)


def parse_layers(layers: str, editable: list[int], count: int) -> list[int]:
    """Return the layers that "last", "all", "3,7" or "" mean, of `count` layers. Raises ModelError."""
    if layers in ("", "all", "last"):
        return {"": [], "all": editable, "last": editable[-1:]}[layers]
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", layers):
        raise ModelError(f"sigmoid_attention {layers!r}: must be last, all, or layers counted from 1 such as 3,7")
    numbers = sorted({int(number) for number in layers.split(",")})
    for number in numbers:
        if number not in editable:
            why = f"the model has {count} layers" if number > count else "its talking heads mix what an edit would set"
            raise ModelError(f"sigmoid_attention {layers}: not possible in layer {number}, {why}. "
                             f"Use last, all, or some of {editable[0]} to {editable[-1]}")
    return numbers


@contextlib.contextmanager
def edit_attention(model: nn.Module, values: Tensor, edited: Tensor) -> Iterator[None]:
    """Edit every layer with sigmoid attention: with edit_attention(model, values, edited): model(images).

    values: (B, h, w), or (1, h, w) for all images, in 0..1; edited: of that shape, bool. record_attention inside records the
    edited weights. Raises ModelError if the model has no such layer, or another grid.
    """
    layers = _sigmoid_layers(model)
    if values.dim() != 3 or tuple(values.shape[1:]) != model.grid or values.shape != edited.shape or edited.dtype != torch.bool:
        raise ModelError(f"edits of shape {tuple(values.shape)} and {tuple(edited.shape)} ({edited.dtype}): must be (B, "
                         f"{model.grid[0]}, {model.grid[1]}), the model's grid, for values and a bool mask")
    if not ((values >= 0) & (values <= 1) | ~edited).all():
        raise ModelError("edits must be between 0 and 1")
    edits = tuple(part.to(model.patch_embed.proj.weight.device).flatten(1)[:, None, None] for part in (values, edited))
    try:
        for layer in layers:
            layer.edits = edits
        yield
    finally:
        for layer in layers:
            layer.edits = None


@contextlib.contextmanager
def record_patch_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record the logits that edits replace.

    with record_patch_logits(model) as logits: model(images)  ->  logits[i]: (B, H, R, h * w) of the i-th sigmoid layer.

    They are in float32 or wider, before any edit, with their graph; an edit replaces sigmoid(logits). `model` is the plain
    module, even if it is wrapped for training. Raises ModelError if it has no such layer, and RuntimeError at the end of the
    block if a layer did not run (or was compiled before).
    """
    layers = _sigmoid_layers(model)
    logits: list[Tensor | None] = [None] * len(layers)

    def record(index: int, attend: AttendSigmoid, q: Tensor, k: Tensor, v: Tensor) -> None:
        logits[index] = attend.patch_logits(q, k)

    with run_recorded("record_patch_logits", layers, logits, record):
        yield logits


def _sigmoid_layers(model: nn.Module) -> list[AttendSigmoid]:
    layers = [module for module in model.modules() if isinstance(module, AttendSigmoid)]
    if not layers:
        raise ModelError("the model has no sigmoid attention: use_sigmoid_attention(model, 'last') adds it")
    return layers
