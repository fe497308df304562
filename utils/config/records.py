"""What the functions of this room take and return: plain, frozen records."""

import dataclasses
from typing import Any

FLAG, RECIPE, MODEL, START, CHECKPOINT, DEFAULT = "flag", "recipe", "model", "start", "checkpoint", "default"


@dataclasses.dataclass(frozen=True)
class Sources:
    """What has to be opened before the configuration can be completed."""

    dataset: str
    data_dir: str
    val_fraction: float
    test_fraction: float
    split_seed: int
    recipe: str             # a row of configs.RECIPES
    model_type: str         # a row of configs.MODELS
    start: str              # "none", "auto" (configs.DEFAULT_WEIGHTS), or the path or published name; "none" for a resumed run


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the data, the start weights and the machine are like."""

    train_images: int
    num_classes: int
    class_names: tuple[str, ...] = ()
    test_is_val: bool = False                       # no split but test is left to choose on
    image_sizes: tuple[tuple[int, int], ...] = ()   # (height, width) of some training images
    start_settings: dict | None = None              # configuration of the run that the start weights come from, if one of ours
    start_head_classes: int | None = None           # classes of the head in the start weights; 0 or None: no head
    start_path: str | None = None
    device_type: str = "cpu"                        # or "cuda"
    native_bf16: bool = False                       # the processor multiplies bfloat16 by itself
    memory: int | None = None                       # bytes of the device
    ranks: int = 1
    local_ranks: int = 1


@dataclasses.dataclass(frozen=True)
class Saved:
    """The checkpoint that a run is resumed from, as far as the configuration depends on it."""

    config: dict
    step: int
    train_images: int
    world_size: int
    path: str


class Config:
    """The settings of a run, one attribute a flag. Read-only; `source(name)` says where a value came from."""

    __slots__ = ("_sources", "_values")

    def __init__(self, values: dict, sources: dict):
        object.__setattr__(self, "_values", dict(values))
        object.__setattr__(self, "_sources", dict(sources))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"no setting is called {name!r}")
        return self._values[name]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a configuration is read-only: use replace({name}=...)")

    def __reduce__(self):
        return Config, (self._values, self._sources)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self._values == other._values

    __hash__ = None

    def __repr__(self) -> str:
        return f"Config({self._values})"

    def source(self, name: str) -> str:
        """Where the value came from: "flag", "recipe", "model", "start", "checkpoint" or "default"."""
        return self._sources[name]

    def to_dict(self) -> dict:
        """The settings by name, as checkpoints keep them."""
        return dict(self._values)

    def replace(self, **values: object) -> "Config":
        """A copy with other values, which keep their source. Raises AttributeError for an unknown name."""
        for name in values:
            getattr(self, name)
        return Config(self._values | values, self._sources)
