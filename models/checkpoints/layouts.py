"""Detects which layout a file has, and names its arrays as in that layout's key map.

Prefixes of wrappers and train states, other spellings and stacked blocks are resolved here, so that the tables of key_maps.py
need only one name for each array.
"""

import functools
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from models.errors import WeightsError

from . import key_maps
from .conversions import GOOGLE_OUTSIDE, google_rows, of_version, resnet_rows, rows_of, transformers_rows, with_linear_patches
from .described import HALF, IMAGENET
from .first_look import again
from .formats import WeightFile
from .layout import Layout, abbreviate, spelled
from .timm_names import resolve
from .towers import TOWERS, Tower


class Program(NamedTuple):
    """A program that writes files of weights, and how its files are recognized."""

    anchor: str                                # a name that each of its files has once, perhaps after a prefix
    companion: str                             # a part of names that distinguishes it from other programs
    roots: tuple[str, ...]                     # the first words of its names
    layout: Callable[[WeightFile, dict[str, str]], Layout]
    row: dict                                  # keys of a model's row that the program fixes
    inner: tuple[str, ...] = ()                # prefixes that belong to some of its own names


def detect_layout(file: WeightFile) -> Layout:
    """Return the layout of a file. Raises WeightsError if it is not a Vision Transformer in a known layout."""
    _refuse_unsupported(file)
    if any("encoderblock" in name for name in file.names):
        return _google(file, _renamed(file, {name: name for name in file.names}, _without_wrappers))
    for program in PROGRAMS:
        if prefixes := _prefixes(file, program):
            prefix, notes = _choose_prefix(file, prefixes)
            names, others = _without_prefix(file, prefix, program)
            layout = program.layout(file, names)
            layout.program_row = program.row | layout.program_row if layout.program_row else program.row
            layout.others, layout.notes = layout.others + others, [*notes, *layout.notes]
            return layout
    for pattern, what in key_maps.TEXT:
        if any(re.search(pattern, name) for name in file.names):
            raise WeightsError(f"{file.path}: it is {what}")
    names = map(_without_wrappers, file.names)
    raise WeightsError(f"{file.path}: not a Vision Transformer in a known layout (its arrays: {abbreviate(names)})")


def _refuse_unsupported(file: WeightFile) -> None:
    """Raise WeightsError for a known kind of file that no model here supports, saying what it is."""
    for pattern, what in key_maps.UNSUPPORTED:
        if any(re.search(pattern, name) for name in file.names):
            raise WeightsError(f"{file.path}: it is {what}")
    if set(file.names) == {"weight", "bias"}:
        shape = file.shape("weight")
        raise WeightsError(f"{file.path}: it is one linear layer {shape}, such as the linear heads of DINOv2 and DINOv3, not a "
                           "model. Save it in one file with the arrays of its backbone, as linear_head.weight and "
                           "linear_head.bias, or train a new head (--train_layers head)")


def _prefixes(file: WeightFile, program: Program) -> list[str]:
    """Return the prefixes of the program's names in this file; [] if another program wrote it."""
    found = set()
    for name in file.names:
        if name == program.anchor or name.endswith(f".{program.anchor}"):
            prefix = name.removesuffix(program.anchor)
            inner = next((inner for inner in program.inner if f".{prefix}".endswith(f".{inner}")), "")
            found.add(prefix.removesuffix(inner) if inner else prefix)
    return [prefix for prefix in sorted(found)
            if any(name.startswith(prefix) and program.companion in name for name in file.names)]


def _choose_prefix(file: WeightFile, prefixes: list[str]) -> tuple[str, list[str]]:
    """Return (the prefix of the model's names, notes about it); for a student and its teacher, the teacher's."""
    teachers = [prefix for prefix in prefixes if "teacher" in prefix.split(".")]
    if len(prefixes) > 1 and len(teachers) != 1:
        raise WeightsError(f"{file.path}: holds several models, under {abbreviate(prefixes)}; save only the one that you want")
    prefix, = teachers if len(prefixes) > 1 else prefixes
    unknown = _without_wrappers(prefix)
    if len(prefixes) > 1:
        return prefix, [f"the weights under {prefix}, of {abbreviate(prefixes)}"]
    return prefix, [f"prefix {prefix} stripped"] if unknown else []


def _without_prefix(file: WeightFile, prefix: str, program: Program) -> tuple[dict[str, str], list[str]]:
    """Return ({name: name in the file}, names that do not belong to the model, but to a loss or another network)."""
    def inner(name: str) -> str:
        return name.removeprefix(prefix) if prefix and name.startswith(prefix) else _without_wrappers(name)

    def belongs(name: str) -> bool:
        return not prefix or name.startswith(prefix) or inner(name).partition(".")[0] in program.roots

    names = {name: name for name in file.names if belongs(name)}
    return _renamed(file, names, inner), sorted(set(file.names) - set(names))


def _timm(file: WeightFile, names: dict[str, str]) -> Layout:
    found = resolve(file.path, names, lambda names, rename: _renamed(file, names, rename), file.read)
    layout = Layout(file, found.names, found.fixed_rows, found.block_rows,
                    lambda model: [layout.row(name) for name in model.state_dict()], found.left_out)
    layout.folded, layout.flat = found.folded, found.flat
    if "rope_embed.periods" in found.left_out:
        layout.notes.append("rotary positions computed in float32, not from the bfloat16 periods of the file")
    if layout.kernel()[0] == EVA02_E and layout.has("blocks.0.attn.qkv.q_bias"):
        raise WeightsError(f"{file.path}: it is EVA-02 E, with norms after attention and MLP, which no model here supports")
    return layout


def _vit_pytorch(file: WeightFile, names: dict[str, str]) -> Layout:
    outside, block = key_maps.VIT_PYTORCH, key_maps.VIT_PYTORCH_BLOCK
    resnet = key_maps.VIT_PYTORCH_STEM, key_maps.VIT_PYTORCH_UNIT, key_maps.VIT_PYTORCH_PROJECTION
    return Layout(file, names, outside, block, lambda model: rows_of(model, outside, block) + resnet_rows(model, *resnet))


def _torchvision(file: WeightFile, names: dict[str, str]) -> Layout:
    def later(name: str) -> str:
        return next((name.replace(old, new) for old, new in key_maps.TORCHVISION_INSIDE.items() if old in name), name)

    return _by_tables(file, _renamed(file, names, later), key_maps.TORCHVISION, key_maps.TORCHVISION_BLOCK)


def _pretrained_vit(file: WeightFile, names: dict[str, str]) -> Layout:
    return _by_tables(file, names, key_maps.PRETRAINED_VIT, key_maps.PRETRAINED_VIT_BLOCK, key_maps.PRETRAINED_VIT_LEFT_OUT)


def _tower(tower: Tower, file: WeightFile, names: dict[str, str]) -> Layout:
    no_prefix = dict.fromkeys(tower.prefixes, "")
    short = _renamed(file, names, lambda name: spelled(spelled(name, no_prefix), tower.spellings))
    shapes = {name: file.shape(source) for name, source in short.items()}
    empty = [name for name in tower.flat if 0 in shapes.get(name, ())]          # a lucidrains model without a cls token has this
    short = {name: source for name, source in short.items() if name not in empty}
    outside = with_linear_patches(of_version(tower.outside, short), shapes)
    layout = _by_tables(file, short, outside, of_version(tower.block, short), tower.left_out)
    _require(layout, tower.needs, tower.title)
    layout.flat = [name for name in tower.flat if name in short and len(shapes[name]) < 3]
    layout.folded = tower.folded
    if layout.sizes("reg_token")[1:2] == (0,):                # transformers writes an empty array for a model without registers
        layout.pre_training += layout.row("reg_token").sources
    wide = layout.sizes("blocks.0.attn.qkv.weight")
    if len(wide) == 2 and wide[0] != 3 * wide[1]:
        raise WeightsError(f"{file.path}: its attention has width {wide[0] // 3} and its tokens have width {wide[1]}, which no "
                           "model here supports")
    linear = layout.row("patch_embed.proj.weight").conversion == "patches"
    layout.program_row = tower.linear_row if linear else {}
    if layout.has("head.weight"):
        layout.program_row, layout.unread = layout.program_row | tower.head_row, tower.unread
    layout.head_note = tower.token_note if layout.has("cls_token") else ""
    layout.others = empty
    return layout


def _require(layout: Layout, needs: Iterable[str], title: str) -> None:
    """Raise WeightsError if the file lacks an array that every such file has, even where some models have none."""
    lacks = [source for ours in needs for source in layout.row(ours).sources if source not in layout.all]
    if lacks:
        raise WeightsError(f"{layout.file.path}: lacks {abbreviate(lacks)}, which every file of {title} has; "
                           f"{again(layout.file.path)}")


def _by_tables(file: WeightFile, names: dict[str, str], outside: tuple, block: tuple, left_out: tuple[str, ...] = ()) -> Layout:
    return Layout(file, names, outside, block, lambda model: rows_of(model, outside, block), left_out)


def _renamed(file: WeightFile, names: dict[str, str], rename: Callable[[str], str]) -> dict[str, str]:
    """Return {new name: name in the file}. Raises WeightsError if two arrays would get the same name."""
    renamed: dict[str, str] = {}
    for name, source in names.items():
        new = rename(name)
        if new in renamed:
            raise WeightsError(f"{file.path}: both {renamed[new]} and {source} are {new}; use a file with only one of them")
        renamed[new] = source
    return renamed


def _without_wrappers(name: str) -> str:
    while prefix := next((prefix for prefix in key_maps.WRAPPER_PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def _google(file: WeightFile, names: dict[str, str]) -> Layout:
    prefix, siblings = next(((prefix, siblings) for prefix, siblings in key_maps.GOOGLE_PREFIXES
                             if any(name.startswith(prefix) for name in names)), ("", ()))
    others = sorted(name for name in names if not name.startswith(prefix))
    foreign = [name for name in others if not name.startswith(siblings)]
    if foreign:
        raise WeightsError(f"{file.path}: unknown members in addition to the weights under {prefix}: {abbreviate(foreign)}")
    names = {name.removeprefix(prefix): source for name, source in names.items() if name.startswith(prefix)}
    bare = any(name in names for name in key_maps.BIG_VISION_POSITIONS)
    names = _renamed(file, names, lambda name: _POSITIONS if name in key_maps.BIG_VISION_POSITIONS else spelled(
        name, key_maps.OLDER_POOLING))
    blocks = _block_rows(file, names, key_maps.GOOGLE_BLOCKS, "/", "Google's layout")
    shapes = {name: file.shape(source) for name, source in names.items()}
    outside = with_linear_patches(GOOGLE_OUTSIDE, shapes)
    layout = Layout(file, names, outside, blocks, lambda model: google_rows(model, blocks, outside))
    layout.bare_positions, layout.others = bare, others
    if len(table := shapes.get(_POSITIONS, ())) == 3 and table[0] > 1:         # (h, w, D), for images of any shape
        layout.flat = (_POSITIONS,)
    layout.unstack()
    _require(layout, ("patch_embed.proj.bias",), "Google's programs")
    return layout


_POSITIONS, = next(sources for ours, sources, _ in key_maps.GOOGLE_EMBEDDING if ours == "pos_embed")


def _transformers(file: WeightFile, names: dict[str, str]) -> Layout:
    no_prefix = dict.fromkeys(key_maps.TRANSFORMERS_PREFIXES, "")
    short = _renamed(file, names, lambda name: spelled(spelled(name, no_prefix), key_maps.TRANSFORMERS_SPELLINGS))
    blocks = _block_rows(file, short, key_maps.TRANSFORMERS_BLOCKS, ".", "the layout of transformers")
    one_head = "classifier.weight" in short and "distillation_classifier.weight" not in short
    outside = key_maps.transformers_outside(one_head)
    return Layout(file, short, outside, blocks, lambda model: transformers_rows(model, blocks, outside),
                  key_maps.TRANSFORMERS_LEFT_OUT)


def _block_rows(file: WeightFile, names: Iterable[str], variants: dict[str, tuple], separator: str, title: str) -> tuple:
    """Return the rows of the encoder block in the variant that the file has."""
    for mark, rows in variants.items():
        if any(f"{separator}{mark}{separator}" in name for name in names):
            return rows
    raise WeightsError(f"{file.path}: not a Vision Transformer in {title} (its arrays: {abbreviate(names)})")


EVA02_E = 1792                     # its width: only this distinguishes it from other models with its names
TIMM_ROW = {"gelu": "erf", "norm_eps": 1e-6, "resnet_style": "timm"}
# These programs compute the exact GELU, with eps 1e-6 except in transformers. Only a config.json
# says how timm and transformers normalized the training images.
PROGRAMS = (
    *(Program(tower.anchor, tower.companion, tower.roots, functools.partial(_tower, tower), tower.row, tower.prefixes)
      for tower in TOWERS),
    Program("transformer.embeddings.patch_embeddings.weight", "transformer.encoder.encoder_norm.", ("transformer", "head"),
            _vit_pytorch, {"gelu": "erf", "norm_eps": 1e-6, "resnet_style": "vit-pytorch", **HALF}),
    Program("embeddings.patch_embeddings.projection.weight", "", (
        "vit", "deit", "ijepa", "embeddings", "encoder", "layers", "layernorm", "pooler", "decoder", "classifier",
        "cls_classifier", "distillation_classifier"), _transformers, {"gelu": "erf", "norm_eps": 1e-12},
            key_maps.TRANSFORMERS_PREFIXES),
    Program("conv_proj.weight", "encoder.layers.encoder_layer_0.", ("class_token", "conv_proj", "encoder", "heads"),
            _torchvision, {"gelu": "erf", "norm_eps": 1e-6, **IMAGENET}),
    Program("patch_embedding.weight", "positional_embedding.pos_embedding", (
        "class_token", "patch_embedding", "positional_embedding", "transformer", "norm", "fc", "pre_logits"),
            _pretrained_vit, {"gelu": "erf", "norm_eps": 1e-6, **HALF}),
    Program("patch_embed.proj.weight", "", (
        "patch_embed", "cls_token", "dist_token", "reg_token", "register_tokens", "storage_tokens", "pos_embed", "norm_pre",
        "blocks", "blocks_token_only", "norm", "fc_norm", "attn_pool", "head", "head_dist", "linear_head", "mask_token",
        "decoder_embed", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred", "rope", "rope_embed", "lm_head",
        "local_cls_norm", "projectors"), _timm, TIMM_ROW),
    Program("preprocessor.patchifier.proj.weight", "trunk.blocks.", ("preprocessor", "trunk", "head"), _timm, TIMM_ROW),
    # Its names follow `visual.`; those of the text tower begin with the same words and do not belong to it.
    Program("conv1.weight", "transformer.resblocks.", ("conv1",), _timm, TIMM_ROW),
)
