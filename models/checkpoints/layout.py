"""The arrays of a file under the names of one key map; layouts.py chooses it."""

import itertools
import math
import re
import threading
from collections.abc import Callable, Collection, Iterable

from torch import Tensor

from models.base import ImageTransformer
from models.errors import WeightsError

from . import key_maps
from .conversions import Row, patch_sizes
from .formats import WeightFile

MAX_BLOCKS = 1000


class Stacks:
    """Arrays with the block as first dimension, each read once. `layers`: {name: index in its array}."""

    def __init__(self, file: WeightFile):
        self.layers: dict[str, int] = {}
        self._file, self._arrays, self._lock = file, {}, threading.Lock()

    def read(self, source: str) -> Tensor:
        with self._lock:
            if source not in self._arrays:
                self._arrays[source] = self._file.read(source)
        return self._arrays[source]


class Layout:
    """The arrays of a file under the names of one key map: `all`, `shape`, `read_view`, and the `rows` for a model."""

    unread: tuple[str, ...] = ()               # parts of the model that the head in the file does not use
    head_note: str = ""                        # an assumption about the head, reported when it is kept

    def __init__(self, file: WeightFile, sources: dict[str, str], fixed_rows: tuple, block_rows: tuple,
                 rows: Callable[[ImageTransformer], list[Row]], left_out: tuple[str, ...] = ()):
        self.file = file
        self.program_row: dict = {}                                # keys of a model's row that its program fixes, such as GELU
        self.bare_positions = False                                # the position table may lack the rows before the patches
        # Whether the first row of the table belongs to the cls token and registers have none (DINOv2 with registers). That row is
        # added to the token, and the model has positions of patches only.
        self.folded = False
        self.flat: Collection[str] = ()                            # tables and tokens that are not stored as (1, n, D)
        self.others: list[str] = []                                # arrays that are not weights of the model
        self.notes: list[str] = []
        self._sources, self._tables = sources, (fixed_rows, block_rows, rows)
        self._stacks = Stacks(file)
        self.pre_training = sorted(name for name in sources if name.startswith(left_out)) if left_out else []

    @property
    def all(self) -> set[str]:
        """The names of all arrays except those that only the pre-training uses."""
        return set(self._sources) - set(self.pre_training)

    def unstack(self) -> None:
        """Replace the name of each array with the block as first dimension by one name for each block."""
        for name in [name for name in self._sources if name.startswith(key_maps.STACKED_BLOCKS)]:
            source = self._sources.pop(name)
            rest, (blocks, *_) = name.removeprefix(key_maps.STACKED_BLOCKS), self.file.shape(source) or (0,)
            if blocks > MAX_BLOCKS:
                raise WeightsError(f"{self.file.path}: {source} claims {blocks} blocks, more than any model has")
            for i in range(blocks):
                one = key_maps.BLOCK_OF_STACK.format(i=i) + rest
                self._sources[one], self._stacks.layers[one] = source, i

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.file.shape(self._sources[name])
        if name in self.flat and shape:
            return 1, math.prod(shape[:-1]), shape[-1]
        return shape[1:] if name in self._stacks.layers else shape

    def read_view(self, name: str) -> Tensor:
        source = self._sources[name]
        if name not in self._stacks.layers:
            value = self.file.read_view(source)
            return value.reshape(1, -1, value.shape[-1]) if name in self.flat else value
        return self._stacks.read(source)[self._stacks.layers[name]]

    def release(self, name: str) -> None:
        """Free the memory of an array that was read, so that loading needs memory for only one copy of the weights."""
        if name not in self._stacks.layers:
            self.file.release(self._sources[name])

    def rows(self, model: ImageTransformer) -> list[Row]:
        """Return the rows of all parameters of the model that this layout has names for."""
        rows = self._tables[2](model)
        if not self.folded:
            return rows
        table = self.row("pos_embed").sources
        return [Row(row.parameter, row.sources + table, "fold") if row.parameter == "cls_token" else row for row in rows]

    def row(self, ours: str) -> Row:
        """Return the row of a parameter; a name without a row is the same in the file, as timm's."""
        fixed_rows, block_rows, _ = self._tables
        number = re.match(r"blocks\.(\d+)\.", ours)
        if number:
            numbered = ours.replace(number[0], "blocks.{i}.", 1)
            return next((Row(ours, tuple(source.format(i=number[1]) for source in sources), conversion)
                         for name, sources, conversion in block_rows if name == numbered), Row(ours, (ours,), "copy"))
        return next((Row(*row) for row in fixed_rows if row[0] == ours), Row(ours, (ours,), "copy"))

    def called(self, name: str) -> str:
        """Return the file's name of an array, without prefixes."""
        source = self._sources[name]
        return name if source.endswith(name) or name in self._stacks.layers else source

    def under(self, part: str) -> set[str]:
        """Return the arrays of one part of the model, such as "attn_pool"."""
        return {name for name in self.all if name.startswith(f"{part}.")} | {
            source for ours, sources, _ in self._tables[0] if ours.startswith(f"{part}.") for source in sources} & self.all

    def has(self, ours: str) -> bool:
        return all(source in self._sources for source in self.row(ours).sources)

    def sizes(self, ours: str) -> tuple[int, ...]:
        """Return the shape of a parameter, in our order of dimensions; () if the file lacks it."""
        _, sources, conversion = self.row(ours)
        if not sources or any(source not in self.all for source in sources):
            return ()
        shape = self.shape(sources[0])
        if conversion == "dense":
            return shape[::-1]
        return (shape[0] * len(sources), *shape[1:]) if shape else ()

    def table(self) -> int:
        """Return the number of rows of the position table that the model uses; 0 without a table."""
        shape = self.sizes("pos_embed")
        return shape[1] - self.folded if len(shape) == 3 else 0

    def outputs(self, layer: str) -> int:
        """Return the output width of a dense layer. Raises WeightsError if its weight and bias disagree."""
        _, (weight,), conversion = self.row(f"{layer}.weight")
        (bias,) = self.row(f"{layer}.bias").sources
        sizes = self.shape(weight) if weight in self.all else ()
        width = self.shape(bias) if bias in self.all else ()
        if len(sizes) != 2 or width != (sizes[1:] if conversion == "dense" else sizes[:1]):
            raise WeightsError(f"{self.file.path}: {weight} {sizes} does not fit {bias} {width}")
        return width[0]

    def heads(self) -> set[str]:
        """Return the names of the arrays of heads and `pre_logits`, which belong to the old task."""
        return {source for layer in ("head", "head_dist", "pre_logits.fc") for kind in ("weight", "bias")
                for source in self.row(f"{layer}.{kind}").sources}

    def kernel(self) -> tuple[int, int, int]:
        """Return (width, channels, patch side) of the patch embedding."""
        _, (name,), conversion = self.row("patch_embed.proj.weight")
        sizes = self.shape(name) if name in self.all else ()
        linear = {"patches": sizes, "patches_dense": sizes[::-1]}.get(conversion, ())
        if len(sizes) != (2 if linear else 4) or 0 in sizes:
            raise WeightsError(f"{self.file.path}: has no patch embedding ({name} {sizes})")
        if linear:
            return linear[0], *patch_sizes(linear[1])
        return (sizes[3], sizes[2], sizes[0]) if conversion == "conv" else sizes[:3]

    def count(self, name: str) -> int:
        """Count the numbered parts that have a parameter: "blocks.{i}.norm1.weight" counts the blocks."""
        return next(i for i in itertools.count() if not self.has(name.format(i=i)))

    def describe(self) -> str:
        """Describe the model in words, such as 'width 384, 12 blocks, patch 16, 4 registers'."""
        width, _, patch = self.kernel()
        registers = (*self.sizes("reg_token"), 0, 0)[1]
        more = {f"{registers} registers": registers, "LayerScale": self.has("blocks.0.ls1.gamma"),
                "no positions": not self.has("pos_embed"), "a norm before the blocks": self.has("norm_pre.weight"),
                "pooling by attention": self.has("attn_pool.latent")}
        return ", ".join([f"width {width}, {self.count('blocks.{i}.norm1.weight')} blocks, patch {patch}",
                          *(words for words, is_so in more.items() if is_so)])


def abbreviate(names: Iterable[str]) -> str:
    """Return the first four names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def spelled(name: str, spellings: dict[str, str]) -> str:
    """Replace the beginning of a name by that in `spellings`, if it is there."""
    old = next((old for old in spellings if name.startswith(old)), "")
    return spellings[old] + name.removeprefix(old) if old else name
