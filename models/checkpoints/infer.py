"""Names and shapes of a file -> keys of a model's row, and the rows of configs.MODELS that it may be of.

The contract, for models/create.py (match_row) and whoever builds from a file:

`OpenedCheckpoint.row`: keys of configs.architecture. Always there: the sizes (patch_size, hidden_size, num_layers, in_channels), what
arrays are in the file (ARRAYS: class_token, registers, positions, layer_scale, mlp, norm, ...; distilled, class_layers,
resnet_layers, resnet_width) and `classifier`. There where they are known: mlp_dim, num_heads, img_size, pool_mlp_dim. layer_scale is
0.0 or 1e-5, whatever the file's numbers once began with: compare it as a truth value. Never there: what no array holds (rope,
rope_grid, pool_heads, gelu, eps, images): these are the row's in MODELS.

`OpenedCheckpoint.candidates`: the names of those rows of configs.MODELS that have these arrays and all of these sizes; if there are
none, `candidates(row, sizes=False)` are those of other sizes. One: the file is of it. Several, that differ in what no array holds:
config.json or --model_type must say which, and the file is refused with them otherwise. None: a model of its own.

`OpenedCheckpoint.computed`: those of COMPUTED (gelu, norm_eps, ...) that the program says, whatever the row: timm's exact GELU and eps
1e-6 for the plain encoder (ViT, DeiT, MAE, SigLIP, I-JEPA), nothing for files of the other families, whose rows say it.

All but the number of heads can be read off, which a matrix of D x D hides: Google's files, CaiT's and a config.json tell it, and the
row of a published size.
"""

import math

from models.errors import WeightsError

from .layouts import Layout, abbreviate

# The first kernel of a hybrid, and the first of a unit of its ResNet: in timm's names, in Google's and ViT-pytorch's, which count
# from 1. Google's kernels are HWIO.
TIMM = "patch_embed.backbone.stem.conv.weight", lambda s, u: f"patch_embed.backbone.stages.{s}.blocks.{u}.conv1.weight"
VIT_PYTORCH = ("transformer.embeddings.hybrid_model.root.conv.weight",
               lambda s, u: f"transformer.embeddings.hybrid_model.body.block{s + 1}.unit{u + 1}.conv1.weight")
GOOGLE = "conv_root/kernel", lambda s, u: f"block{s + 1}/unit{u + 1}/conv1/kernel"
MAX_UNITS = 1000


def infer_row(layout: Layout) -> dict:
    """Keys of configs.architecture. `num_heads` and `img_size` are missing where nothing tells them; `classifier` is the one that
    the file cannot do without. Raises WeightsError for a file without a patch embedding."""
    width, channels, patch = layout.kernel()
    row = {"patch_size": patch, "hidden_size": width, "in_channels": channels, "distilled": layout.has("dist_token"),
           "num_layers": layout.count("blocks.{i}.norm1.weight"),
           "class_layers": layout.count("blocks_token_only.{i}.norm1.weight"), "resnet_layers": None, "resnet_width": 64}
    if not row["num_layers"]:
        raise WeightsError(f"{layout.file.path}: not a Vision Transformer in a known layout: it has a patch embedding, and no "
                           f"blocks (its arrays: {abbreviate(layout.all)})")
    fc1 = layout.row("blocks.0.mlp.fc1.bias").sources[0]
    if fc1 in layout.all:
        row["mlp_dim"], = layout.shape(fc1) or (0,)
    row |= _heads(layout) | _resnet(layout)
    if not layout.has("cls_token"):
        row["classifier"] = "gap"
    elif layout.has("fc_norm.weight") and not layout.has("norm.weight"):
        row["classifier"] = "patch_mean"
    return row | _image_size(layout, row)


def _heads(layout: Layout) -> dict:
    for name, axis in (("blocks.0.attn.proj_l.weight", 0), ("blocks.0.attn.qkv.weight", 1)):      # CaiT's; Google's (D, H, d)
        source = layout.row(name).sources[0]
        if source in layout.all and (axis == 0 or len(layout.shape(source)) == 3):
            return {"num_heads": layout.shape(source)[axis]}
    return {}


def _resnet(layout: Layout) -> dict:
    """The stages of a hybrid in timm's names or in Google's."""
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


def _image_size(layout: Layout, row: dict) -> dict:
    """From the number of positions, which belong to a square unless they are said not to."""
    source = layout.row("pos_embed").sources[0]
    shape = layout.shape(source) if source in layout.all else ()
    if len(shape) != 3:
        return {}
    prefix = 0 if row["class_layers"] or layout.bare_positions else layout.has("cls_token") + layout.has("dist_token")
    side = math.isqrt(max(shape[1] - prefix, 0))
    if side == 0 or side * side != shape[1] - prefix:
        return {}
    stride = row["patch_size"]
    if row["resnet_layers"] is not None:
        stride *= 4 * 2 ** max(len(row["resnet_layers"]) - 1, 0)
    return {"img_size": side * stride}
