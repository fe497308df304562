"""Tensor functions of recorded attention (models.record_attention), positions and patch kernels: what the pictures show.

Rollout: Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (arXiv 2005.00928). Other ways to fuse the heads,
dropping, and gradients as weights: J. Gildenblat's code vit-explain and Chefer et al. (arXiv 2103.15679). Distance,
positions and filters: Dosovitskiy et al. (arXiv 2010.11929), figure 7. Class attention: Touvron et al. (arXiv 2103.17239).

Differences from vit-explain: rows are normalized (its sums are broadcast along the wrong axis); each layer is weighted by its
own gradient (it pairs layers and gradients in reverse); dropping keeps the columns of cls, not a single entry; negative weights
are set to 0 before the mean over the heads, not after it; gradients are those of the attention, not of the softmax's input.

Shapes: B images, H heads, N tokens, Q queries, K keys, (h, w) grid. maps: a list over layers of (B, H, N, N); of a CaiT
(B, H, h * w, h * w) of its talking-heads layers, then (B, H, 1, 1 + h * w) of its class-attention layers; with pooling by
attention (B, H, 1, N) last. The patches are the last h * w keys; those before them (cls, dist, registers) have no position.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# (B, H, Q, K) -> (B, Q, K)
FUSIONS = {"mean": lambda heads: heads.mean(dim=1), "max": lambda heads: heads.amax(dim=1),
           "min": lambda heads: heads.amin(dim=1)}


def rollout(maps: Sequence[Tensor], fusion: str = "mean", drop: float = 0.0, prefix_tokens: int = 1) -> Tensor:
    """Compute joint attention over all layers -> (B, N, N), rows sum to 1. CaiT: (B, 1 + h * w, 1 + h * w), cls first. With
    pooling by attention (B, 1, N): what its query takes from the tokens, through all layers; it has no residual connection.

    The heads of a layer are fused, the residual connection counts as the identity, rows are normalized, layers multiplied.
    drop: this ratio of a layer's fused entries, the lowest ones, is set to 0, except in the columns of the `prefix_tokens`
    tokens before the patches (cls, dist, registers; 0: the model has none).

    CaiT: weights of talking heads can be negative and their rows need not sum to 1, so negative ones are set to 0 and the fused
    rows normalized. They only act on the patches; a class-attention layer only changes the row of cls.
    """
    layers, cait = [], has_one_query(maps[-1]) and not is_pooled(maps)
    for layer in maps:
        fused = FUSIONS[fusion](layer.clamp_min(0))
        if cait and not has_one_query(layer):
            fused = fused / fused.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        layers.append(fused)
    return _product(layers, drop, prefix_tokens)


def gradient_rollout(maps: Sequence[Tensor], gradients: Sequence[Tensor], drop: float = 0.0,
                     prefix_tokens: int = 1) -> Tensor:
    """Compute joint attention for one class -> (B, N, N) or (B, 1, N): `rollout` of the weights that raise the class's logit.

    gradients: of the class's logit with respect to the maps, layer by layer in the same order. A layer counts as the mean
    over heads of relu(gradient * map).
    """
    assert len(maps) == len(gradients)
    layers = [(gradient * layer).clamp_min(0).mean(dim=1) for layer, gradient in zip(maps, gradients)]
    return _product(layers, drop, prefix_tokens)


def has_one_query(layer: Tensor) -> bool:
    """Return whether (..., Q, K) is of class attention or of pooling by attention."""
    return layer.shape[-2] == 1 < layer.shape[-1]


def is_pooled(maps: Sequence[Tensor]) -> bool:
    """Return whether the last map is of pooling by attention, whose query is not a token. (In a CaiT the cls token joins the
    patches in the class-attention layers, which therefore have one key more than the others.)"""
    return has_one_query(maps[-1]) and maps[0].shape[-2] == maps[-1].shape[-1]


def _product(layers: list[Tensor], drop: float, prefix_tokens: int) -> Tensor:
    """Multiply the layers: fused maps (B, Q, K), not negative -> (B, N, N), or (B, 1, N) with pooling by attention."""
    tokens = layers[-1].shape[-1]
    identity = torch.eye(tokens, dtype=layers[0].dtype, device=layers[0].device)
    joint = identity.expand(len(layers[0]), -1, -1)
    layers, pool = (layers[:-1], layers[-1]) if is_pooled(layers) else (layers, None)
    for layer in layers:
        # The talking-heads layers of a CaiT have no columns before the patches.
        kept = prefix_tokens if layer.shape[-1] == tokens else 0
        layer = _all_tokens(_without_lowest(layer, drop, kept), tokens) + identity
        joint = layer / layer.sum(dim=-1, keepdim=True) @ joint
    if pool is None:
        return joint
    pool = _without_lowest(pool, drop, prefix_tokens)
    return pool / pool.sum(dim=-1, keepdim=True).clamp_min(1e-12) @ joint


def _without_lowest(layer: Tensor, ratio: float, kept_columns: int) -> Tensor:
    flat = layer.flatten(1)
    lowest = flat.topk(int(flat.shape[1] * ratio), largest=False).indices
    dropped = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, lowest, True).view_as(layer)
    dropped[..., :kept_columns] = False
    return layer.masked_fill(dropped, 0)


def _all_tokens(layer: Tensor, tokens: int) -> Tensor:
    """Pad (B, Q, K) of any layer to (B, tokens, tokens), with zeros in the rows of the tokens that it does not change."""
    missing = tokens - layer.shape[-2]
    if has_one_query(layer):
        return F.pad(layer, (0, 0, 0, missing))
    return F.pad(layer, (missing, 0, missing, 0))


def read_rows(attention: Tensor, rows: slice | list[int], grid: tuple[int, int]) -> Tensor:
    """Return what each of the R queries `rows` (model.query_rows) takes from each patch: (..., Q, K) -> (..., R, h, w)."""
    height, width = grid
    return attention[..., rows, -height * width:].unflatten(-1, (height, width))


def class_attention(maps: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Return what CaiT's cls token takes from each patch, mean over the heads: (layers of class attention, B, h, w)."""
    return torch.stack([read_rows(layer.mean(dim=1), slice(0, 1), grid)[:, 0] for layer in maps if has_one_query(layer)])


def upsample(grids: Tensor, size: tuple[int, int], smooth: bool = True) -> Tensor:
    """Enlarge (..., h, w) to (..., height, width), bilinear; a pixel at the center of a patch has the patch's value.

    smooth False: all pixels of a patch have its value.
    """
    flat = grids.reshape(-1, 1, *grids.shape[-2:])
    how = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest-exact"}
    return F.interpolate(flat, size=size, **how).view(*grids.shape[:-2], *size)


def attention_distance(maps: Sequence[Tensor], grid: tuple[int, int], img_size: tuple[int, int]) -> Tensor:
    """Compute how far the heads attend, in pixels of the model's input -> (layers, H), mean over queries and images.

    The paper's definition: the average distance from the query to all others, weighted by attention, between the centers of the
    patches. It is divided by the sum of the weights of the patches, since cls, dist and registers have no position. Class
    attention and pooling by attention, whose query has no position either, are skipped; negative weights count as 0, and a
    head without positive ones is NaN.
    """
    height, width = grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centers = torch.stack([rows.flatten() * (img_size[0] / height), columns.flatten() * (img_size[1] / width)], dim=1)
    apart = (centers[:, None] - centers).norm(dim=-1).to(maps[0])                 # (h * w, h * w)
    found = []
    for layer in maps:
        if not has_one_query(layer):
            weights = layer[..., -height * width:, -height * width:].clamp_min(0)
            found.append(((weights * apart).sum(dim=-1) / weights.sum(dim=-1)).nanmean(dim=(0, 2)))
    return torch.stack(found)


def position_similarity(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Compute the cosine of each patch's position with all others: table (1, prefix + h * w, D) -> (h, w, h, w)."""
    height, width = grid
    unit = F.normalize(positions[0, -height * width:].float(), dim=-1)
    return (unit @ unit.T).view(height, width, height, width)


def patch_filters(kernel: Tensor, count: int = 28) -> tuple[Tensor, Tensor]:
    """Compute the first principal components of the D filters, centered: patch kernel (D, 3 or 1, P, P) -> (RGB (k, P, P, 3) in
    0..1, share of the variance (k,)), k at most `count`.

    Zero is mid-grey, and the largest value of each component has full contrast; the sign of a component is arbitrary, here its
    largest value is positive.
    """
    filters = kernel.float().flatten(1)
    _, values, components = torch.linalg.svd(filters - filters.mean(dim=0), full_matrices=False)
    count = min(count, len(filters) - 1, filters.shape[1])
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    colors = (0.5 + 0.5 * components / largest)[:count].view(count, *kernel.shape[1:]).permute(0, 2, 3, 1)
    return colors.expand(-1, -1, -1, 3), (values ** 2 / (values ** 2).sum().clamp_min(1e-12))[:count]
