"""Infers the keys of a model's row from the names and shapes of a file, and finds the rows of configs.MODELS that fit.

What models/match.py and other callers get:

`OpenedCheckpoint.row`: keys of configs.architecture. It always has the sizes (patch_size, hidden_size, num_layers, in_channels)
and the keys that arrays determine (ARRAYS, resnet_layers, resnet_width). It has mlp_dim, num_heads, img_size and pool_mlp_dim if
they are known, and `classifier` if the file needs this one. layer_scale is 0.0 or 1e-5, whatever its initial value was: compare
it as a truth value. It never has what no array shows (rope, rope_grid, pool_heads, gelu, norm_eps, mean and std): those come from
the row of MODELS.

`candidates(found, rows)`: the names of those `rows` (configs.MODELS) that have the file's arrays and sizes. With one candidate,
the file is that model. If several differ in what no array shows, config.json or --model_type must decide. Without any, the sizes
are in no row, and candidates(found, rows, sizes=False) are the rows of its kind.

`OpenedCheckpoint.computed`: the keys of COMPUTED that are certain for the program that wrote the file, whatever the row: timm's
exact GELU and eps 1e-6 for a plain encoder (ViT, DeiT, MAE, SigLIP, I-JEPA). For any other kind, timm's files do not determine
them, and the row does.

Shapes show everything but the number of heads, because a D x D matrix is the same for any. Google's and CaiT's files, a
config.json and the row of a published size give it.
"""

import math
from collections.abc import Mapping

from models.errors import WeightsError

from .layout import Layout, abbreviate

# The first kernel of a hybrid, and the first of a unit of its ResNet, in the names of timm, ViT-pytorch and Google. The last two
# count from 1; Google's kernels are HWIO.
TIMM = "patch_embed.backbone.stem.conv.weight", lambda s, u: f"patch_embed.backbone.stages.{s}.blocks.{u}.conv1.weight"
VIT_PYTORCH = ("transformer.embeddings.hybrid_model.root.conv.weight",
               lambda s, u: f"transformer.embeddings.hybrid_model.body.block{s + 1}.unit{u + 1}.conv1.weight")
GOOGLE = "conv_root/kernel", lambda s, u: f"block{s + 1}/unit{u + 1}/conv1/kernel"
MAX_UNITS = 1000
INITIAL_SCALE = 1e-5                    # layer_scale of a row whose factors come from the file
SIZES = ("patch_size", "hidden_size", "mlp_dim", "num_layers")
# The keys that the arrays of a file determine besides the sizes, with their values for a plain encoder (Google's, DeiT's).
ARRAYS = {"distilled": False, "class_layers": 0, "class_token": True, "registers": 0, "positions": "all", "layer_scale": 0.0,
          "mlp": "plain", "norm": "layer", "pre_norm": False, "patch_norm": "none", "final_norm": True, "attention_norm": False,
          "mlp_norm": False, "qk_norm": False, "qkv_bias": "all", "proj_bias": True, "mlp_bias": True, "patch_bias": True}


def infer_row(layout: Layout, size: int | tuple[int, int] = 0, positions: str = "") -> dict:
    """Return keys of configs.architecture, as described above.

    size: of the images, if it is known; positions: the only kind of positions for which it is. Raises WeightsError for a file
    without a patch embedding or blocks.
    """
    width, channels, patch = layout.kernel()
    row = {"patch_size": patch, "hidden_size": width, "in_channels": channels, "distilled": layout.has("dist_token"),
           "num_layers": layout.count("blocks.{i}.norm1.weight"),
           "class_layers": layout.count("blocks_token_only.{i}.norm1.weight"), "resnet_layers": None, "resnet_width": 64}
    if not row["num_layers"]:
        raise WeightsError(f"{layout.file.path}: not a Vision Transformer in a known layout: it has a patch embedding, but no "
                           f"blocks (its arrays: {abbreviate(layout.all)})")
    row |= _mlp(layout) | _parts(layout) | _heads(layout) | _resnet(layout)
    row |= _classifier(layout, row) | _positions(layout, row, size, positions)
    if row.get("classifier") == "attention" and layout.has("attn_pool.mlp.fc1.weight"):
        pool, *_ = layout.sizes("attn_pool.mlp.fc1.weight") or (0,)
        row["pool_mlp_dim"] = pool if pool != row.get("mlp_dim") else 0
    return row


def _mlp(layout: Layout) -> dict:
    """Return the keys of the MLP. In "swiglu", the first layer is twice as wide as the input of the second."""
    hidden, read = layout.sizes("blocks.0.mlp.fc1.weight"), layout.sizes("blocks.0.mlp.fc2.weight")
    if len(hidden) != 2 or len(read) != 2:
        return {"mlp": "plain"} | ({"mlp_dim": hidden[0]} if hidden else {})
    gated = hidden[0] == 2 * read[1]
    return {"mlp": "swiglu", "mlp_dim": read[1]} if gated else {"mlp": "plain", "mlp_dim": hidden[0]}


def _parts(layout: Layout) -> dict:
    """Return the keys of the parts of the blocks and the embedding."""
    has = layout.has
    block = "blocks.0."
    return {
        "class_token": has("cls_token"), "registers": (*layout.sizes("reg_token"), 0, 0)[1],
        "layer_scale": INITIAL_SCALE if has(f"{block}ls1.gamma") or has(f"{block}gamma_1") else 0.0,
        "norm": "layer" if has(f"{block}norm1.bias") else "rms", "pre_norm": has("norm_pre.weight"),
        "patch_norm": "around" if has("patch_embed.norm_in.weight") else "after" if has("patch_embed.norm.weight") else "none",
        "final_norm": has("norm.weight") or has("fc_norm.weight"), "attention_norm": has(f"{block}attn.norm.weight"),
        "mlp_norm": has(f"{block}mlp.norm.weight"), "qk_norm": has(f"{block}attn.q_norm.weight"),
        "qkv_bias": "qv" if has(f"{block}attn.qkv.q_bias") else "all" if has(f"{block}attn.qkv.bias") else "none",
        "proj_bias": has(f"{block}attn.proj.bias"), "mlp_bias": has(f"{block}mlp.fc1.bias"),
        "patch_bias": has("patch_embed.proj.bias")}


def _classifier(layout: Layout, row: dict) -> dict:
    """Return what the head of the file reads. A cls token and a norm after the blocks allow several, and give {}."""
    if "classifier" in layout.program_row:
        return {"classifier": layout.program_row["classifier"]}
    if layout.has("attn_pool.latent"):
        return {"classifier": "attention"}
    if layout.has("fc_norm.weight") and not layout.has("norm.weight"):
        return {"classifier": "patch_mean"}
    if not row["class_token"]:
        return {"classifier": "gap" if is_plain(row | {"positions": "all"}) else "mean"}          # Google's name for the mean
    head = layout.sizes("head.weight")
    return {"classifier": "token_mean"} if len(head) == 2 and head[1] == 2 * row["hidden_size"] else {}


def _heads(layout: Layout) -> dict:
    for name, axis in (("blocks.0.attn.proj_l.weight", 0), ("blocks.0.attn.qkv.weight", 1)):      # CaiT; Google (D, H, d)
        source = layout.row(name).sources[0]
        if source in layout.all and (axis == 0 or len(layout.shape(source)) == 3):
            return {"num_heads": layout.shape(source)[axis]}
    return {}


def _resnet(layout: Layout) -> dict:
    """Return the stages of a hybrid's ResNet, its width and its input channels; {} without one."""
    names = layout.all
    for stem, unit in (TIMM, VIT_PYTORCH, GOOGLE):
        shape = layout.shape(stem) if stem in names else ()
        if len(shape) != 4:
            continue
        stages = []
        while unit(len(stages), 0) in names:
            stages.append(next(u for u in range(1, MAX_UNITS) if unit(len(stages), u) not in names))
        width, channels = (shape[3], shape[2]) if stem == GOOGLE[0] else (shape[0], shape[1])
        return {"resnet_layers": tuple(stages), "resnet_width": width, "in_channels": channels}
    return {}


def _positions(layout: Layout, row: dict, size: int | tuple[int, int], only: str) -> dict:
    """Return which tokens have positions, and the size of the images, from the number of rows of the table.

    They must fit the known size, or else a square.
    """
    if not layout.has("pos_embed"):
        return {"positions": "none"}
    tokens = row["class_token"] + row["distilled"] + row["registers"]
    prefix = {"all": tokens, "patches": 0}
    if row["class_layers"] or layout.bare_positions:
        prefix = {"all": 0}
    rows, stride = layout.table(), row["patch_size"]
    if row["resnet_layers"] is not None:
        stride *= 4 * 2 ** max(len(row["resnet_layers"]) - 1, 0)
    height, width = (size, size) if isinstance(size, int) else size
    patches = (height // stride) * (width // stride)
    for kind, before in prefix.items():
        if patches and rows == before + patches and only in ("", kind):
            return {"positions": kind, "img_size": size}
    sides = {kind: math.isqrt(max(rows - before, 0)) for kind, before in prefix.items()}
    kind = next((kind for kind, side in sides.items() if side and side * side == rows - prefix[kind]), "")
    if not kind:
        return {"positions": "patches" if layout.folded else "all"}
    if height != width and not only:
        raise WeightsError(f"{layout.file.path}: its config.json says images of {height} x {width} px, but its table has {rows} "
                           "positions, which do not fit them: they do not belong together")
    return {"positions": kind, "img_size": sides[kind] * stride}


# ------------------------------------------------------------------------------------------------------ rows that fit


def is_plain(found: dict) -> bool:
    """Whether the blocks are those of Google's and DeiT's encoder, which each program computes in only one way."""
    others = [key for key in ARRAYS if key not in ("distilled", "class_layers", "class_token")]
    return bool(found["class_layers"]) or all(found[key] == ARRAYS[key] for key in others)


def candidates(found: dict, rows: Mapping[str, Mapping], sizes: bool = True) -> list[str]:
    """Return the names of the `rows` that have the arrays of a file (infer_row) and, unless sizes=False, its sizes."""
    def has_sizes(row: Mapping) -> bool:
        return all(found.get(key) == row[key] for key in SIZES) and found.get("num_heads") in (None, row["num_heads"])

    return [name for name, row in rows.items() if _has_arrays(found, row) and (not sizes or has_sizes(row))]


def _has_arrays(found: dict, row: Mapping) -> bool:
    theirs = {key: row[key] for key in (*ARRAYS, "resnet_layers", "resnet_width")}
    if row["classifier"] == "gap" or (not found["class_token"] and is_plain(found) and is_plain(theirs)):
        theirs["class_token"] = False                                    # Google's rows are those of its files with a mean too
    if not theirs["class_token"] and not theirs["registers"] and theirs["positions"] == "patches":
        theirs["positions"] = "all"
    if theirs["resnet_layers"] is not None:
        theirs["resnet_layers"] = tuple(theirs["resnet_layers"])
    pools = found.get("classifier") == "attention"
    return (not pools or row["classifier"] == "attention") and all(
        bool(found[key]) == bool(value) if key == "layer_scale" else found[key] == value for key, value in theirs.items())
