"""Detects which layout a file has, and reads its arrays under the names of that layout's key map.

Prefixes of wrappers and of train states, other spellings and stacked blocks are resolved here, so that a table of
key_maps.py needs one name for a thing.
"""

import itertools
import threading
from collections.abc import Callable, Iterable

from torch import Tensor

from models.base import ImageTransformer
from models.errors import WeightsError

from . import key_maps
from .conversions import Row, google_rows, timm_rows, transformers_rows
from .formats import WeightFile

MAX_BLOCKS = 1000


class Layout:
    """The arrays of a file under the names of one key map: `all` of them, `shape`, `read_view`, and the `rows` for a model."""

    def __init__(self, file: WeightFile, sources: dict[str, str], fixed_rows: tuple, block: str,
                 rows: Callable[[ImageTransformer], list[Row]], left_out: tuple[str, ...] = ()):
        self.file, self.rows, self.block = file, rows, block       # block: the name of a parameter that each block has once
        self.bare_positions = False                                # the position table may lack the rows before the patches
        self.beside: list[str] = []                                # arrays of a train state, which hold no weights
        self._sources, self._fixed_rows = sources, fixed_rows
        self._stacks: dict[str, Tensor] = {}                       # stacked arrays that were read
        self._stacks_lock = threading.Lock()
        self._layers: dict[str, int] = {}                          # name: which layer of a stacked array
        self.pre_training = sorted(name for name in sources if name.startswith(left_out)) if left_out else []

    @property
    def all(self) -> set[str]:
        """Without what belongs to the pre-training alone."""
        return set(self._sources) - set(self.pre_training)

    def unstack(self) -> None:
        """Arrays with the block as first dimension -> one name for each block."""
        for name in [name for name in self._sources if name.startswith(key_maps.STACKED_BLOCKS)]:
            source = self._sources.pop(name)
            rest, (blocks, *_) = name.removeprefix(key_maps.STACKED_BLOCKS), self.file.shape(source) or (0,)
            if blocks > MAX_BLOCKS:
                raise WeightsError(f"{self.file.path}: {source} claims {blocks} blocks, more than any model has")
            for i in range(blocks):
                one = key_maps.BLOCK_OF_STACK.format(i=i) + rest
                self._sources[one], self._layers[one] = source, i

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.file.shape(self._sources[name])
        return shape[1:] if name in self._layers else shape

    def read_view(self, name: str) -> Tensor:
        source = self._sources[name]
        if name not in self._layers:
            return self.file.read_view(source)
        with self._stacks_lock:
            if source not in self._stacks:
                self._stacks[source] = self.file.read(source)
        return self._stacks[source][self._layers[name]]

    def row(self, ours: str) -> Row:
        """The row of a parameter that a model has once. timm's names are ours."""
        return next((Row(*row) for row in self._fixed_rows if row[0] == ours), Row(ours, (ours,), "copy"))

    def has(self, ours: str) -> bool:
        return self.row(ours).sources[0] in self._sources

    def outputs(self, layer: str) -> int:
        """Width of a dense layer, if its weight and bias agree about it."""
        _, (weight,), conversion = self.row(f"{layer}.weight")
        (bias,) = self.row(f"{layer}.bias").sources
        sizes = self.shape(weight) if weight in self.all else ()
        width = self.shape(bias) if bias in self.all else ()
        if len(sizes) != 2 or width != (sizes[1:] if conversion == "dense" else sizes[:1]):
            raise WeightsError(f"{self.file.path}: {weight} {sizes} does not fit {bias} {width}")
        return width[0]

    def heads(self) -> set[str]:
        """Names of what belongs to the old task: heads and `pre_logits`."""
        return {source for layer in ("head", "head_dist", "pre_logits.fc") for kind in ("weight", "bias")
                for source in self.row(f"{layer}.{kind}").sources}

    def kernel(self) -> tuple[int, int, int]:
        """(width, channels, patch side) of the patch embedding."""
        _, (name,), conversion = self.row("patch_embed.proj.weight")
        sizes = self.shape(name) if name in self.all else ()
        if len(sizes) != 4:
            raise WeightsError(f"{self.file.path}: holds no patch embedding ({name} {sizes})")
        return (sizes[3], sizes[2], sizes[0]) if conversion == "conv" else sizes[:3]

    def describe(self) -> str:
        """'width 384, 12 blocks, patch 16'"""
        width, _, patch = self.kernel()
        blocks = next(i for i in itertools.count() if self.block.format(i=i) not in self._sources)
        return f"width {width}, {blocks} blocks, patch {patch}"


def detect_layout(file: WeightFile) -> Layout:
    """Raises WeightsError for a file that is no Vision Transformer in a known layout."""
    names = _renamed(file, {name: name for name in file.names}, _without_wrappers)
    if any("encoderblock" in name for name in names):
        return _google(file, names)
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names):
        return _transformers(file, names)
    if "patch_embed.proj.weight" in names:
        names = _renamed(file, names, lambda name: spelled(name, key_maps.TIMM_STEM_ALONE))
        return Layout(file, names, (), "blocks.{i}.norm1.weight", timm_rows, key_maps.TIMM_LEFT_OUT)
    raise WeightsError(f"{file.path}: not a Vision Transformer in a known layout (its arrays: {abbreviate(names)})")


def _renamed(file: WeightFile, names: dict[str, str], rename: Callable[[str], str]) -> dict[str, str]:
    """-> {new name: name in the file}. Raises WeightsError where two arrays would get one name."""
    renamed: dict[str, str] = {}
    for name, source in names.items():
        new = rename(name)
        if new in renamed:
            raise WeightsError(f"{file.path}: both {renamed[new]} and {source} are {new}; use a file with one of them")
        renamed[new] = source
    return renamed


def _without_wrappers(name: str) -> str:
    while prefix := next((prefix for prefix in key_maps.WRAPPER_PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def spelled(name: str, spellings: dict[str, str]) -> str:
    """With the other beginning, where the name begins as one of `spellings`."""
    old = next((old for old in spellings if name.startswith(old)), "")
    return spellings[old] + name.removeprefix(old) if old else name


def _google(file: WeightFile, names: dict[str, str]) -> Layout:
    prefix, siblings = next(((prefix, siblings) for prefix, siblings in key_maps.GOOGLE_PREFIXES
                             if any(name.startswith(prefix) for name in names)), ("", ()))
    beside = sorted(name for name in names if not name.startswith(prefix))
    foreign = [name for name in beside if not name.startswith(siblings)]
    if foreign:
        raise WeightsError(f"{file.path}: unknown members beside the weights under {prefix}: {abbreviate(foreign)}")
    names = {name.removeprefix(prefix): source for name, source in names.items() if name.startswith(prefix)}
    if any(name.startswith(key_maps.ATTENTION_POOLING) for name in names):
        raise WeightsError(f"{file.path}: pools by attention ({key_maps.ATTENTION_POOLING[0]}), which no model here does; use a "
                           "file with a cls token or with mean pooling")
    bare = any(name in names for name in key_maps.BIG_VISION_POSITIONS)
    names = _renamed(file, names, lambda name: _POSITIONS if name in key_maps.BIG_VISION_POSITIONS else name)
    blocks = _block_rows(file, names, key_maps.GOOGLE_BLOCKS, "/", "Google's layout")
    layout = Layout(file, names, key_maps.GOOGLE_EMBEDDING + key_maps.GOOGLE_HEAD, blocks[0][1][0],
                    lambda model: google_rows(model, blocks))
    layout.bare_positions, layout.beside = bare, beside
    layout.unstack()
    return layout


_POSITIONS, = next(sources for ours, sources, _ in key_maps.GOOGLE_EMBEDDING if ours == "pos_embed")


def _transformers(file: WeightFile, names: dict[str, str]) -> Layout:
    no_prefix = dict.fromkeys(key_maps.TRANSFORMERS_PREFIXES, "")
    short = _renamed(file, names, lambda name: spelled(spelled(name, no_prefix), key_maps.TRANSFORMERS_SPELLINGS))
    blocks = _block_rows(file, short, key_maps.TRANSFORMERS_BLOCKS, ".", "the layout of transformers")
    return Layout(file, short, key_maps.TRANSFORMERS_EMBEDDING + key_maps.TRANSFORMERS_HEAD, blocks[0][1][0],
                  lambda model: transformers_rows(model, blocks), key_maps.TRANSFORMERS_LEFT_OUT)


def _block_rows(file: WeightFile, names: Iterable[str], variants: dict[str, tuple], separator: str, title: str) -> tuple:
    """The rows of the encoder block in the variant that the file has; the first is a parameter that each block has once."""
    for mark, rows in variants.items():
        if any(f"{separator}{mark}{separator}" in name for name in names):
            return rows
    raise WeightsError(f"{file.path}: not a Vision Transformer in {title} (its arrays: {abbreviate(names)})")


def abbreviate(names: Iterable[str]) -> str:
    """The first four of them, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
