"""What the functions of this room take and return: plain, frozen records."""

import dataclasses
from typing import Any

from .types import ConfigError

FLAG, RECIPE, MODEL, START, CHECKPOINT, DEFAULT = "flag", "recipe", "model", "start", "checkpoint", "default"


@dataclasses.dataclass(frozen=True)
class Sources:
    """What has to be opened before the configuration can be completed."""

    dataset: str
    data_dir: str
    val_fraction: float
    test_fraction: float
    split_seed: int
    class_order: str | None # None: as a run from before the flag names its classes
    exif: str               # how image files are read, as the next two: the flags, or the checkpoint's settings
    intensity_range: str | tuple[int, int]
    alpha: str
    head: str | None        # "keep": the start weights are for the same task, so that their classes are those of the data
    eval_only: bool
    recipe: str             # a row of configs.RECIPES
    model_type: str         # a row of configs.MODELS
    start: str              # "none", "auto" (the model's own file), or the path or published name; "none" for a resumed run
    typed_model: bool = False       # whether a flag names model_type
    path_column: str | None = None
    label_column: str | None = None
    image_dir: str | None = None
    teacher: str | None = None      # of a run that learns from one
    num_heads: int | None = None    # for a teacher of which nothing tells them
    img_size: int | tuple[int, int] | None = None       # of a typed model: which images a table of positions may be of


@dataclasses.dataclass(frozen=True)
class Machine:
    """What each process has; of several the least."""

    device_type: str = "cpu"                        # or "cuda", or "mps"
    memory: int = 0                                 # bytes of the device, or of the machine, for this process; 0: not known
    cores: int = 0                                  # of the processor, for this process; 0: not known


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the data, the start weights and the machine are like."""

    train_images: int
    num_classes: int
    can_flip: bool = True                           # mirrored, an image keeps its class
    test_is_val: bool = False                       # no split but test is left to choose on
    image_sizes: tuple[tuple[int, int], ...] = ()   # (height, width) of some training images, where the recipe is a function
    reading: dict | None = None                     # settings of how image files are read, as they were found: exif, alpha, ...
    start_settings: dict | None = None              # configuration of the run that the start weights come from, if one of ours
    start_row: dict | None = None                   # what they tell of their model, if another program's (utils/config/adopt.py)
    # How they saw their images, as far as it is known: interpolation, eval_crop, img_size; `untaken`: what no flag can say, in
    # words by flag; `by`: who says so; `unknown_mean`: whether nobody says by which mean and standard deviation they were
    # normalized (utils/config/view.py).
    start_view: dict | None = None
    start_head_classes: int | None = None           # classes of the head in the start weights; 0 or None: no head
    start_path: str | None = None
    start_names_classes: bool = False               # a head without names depends on the order of the classes
    class_orders: tuple[str, ...] = ()              # where they differ: what the first classes are by number, and as text
    device_type: str = "cpu"                        # this and the next two as in Machine
    memory: int = 0
    cores: int = 0
    evaluated_images: int = 0                       # of the largest split that is evaluated; 0: not known
    cached_images: int = 0                          # bytes of training images that the device keeps
    teacher_parameters: int = 0
    native_bf16: bool = False                       # the processor multiplies bfloat16 by itself
    ranks: int = 1


@dataclasses.dataclass(frozen=True)
class Saved:
    """The checkpoint that a run is resumed from, as far as the configuration depends on it."""

    config: dict
    step: int
    train_images: int
    world_size: int
    path: str


def steps_in(epochs: float, images: int, batch_size: int) -> int:
    """Optimizer steps in so many passes over the training images. Raises ConfigError for more than --num_steps takes."""
    steps = max(1, round(epochs * images / batch_size)) if epochs else 0
    if steps >= 2 ** 63:
        raise ConfigError(f"--num_epochs or --warmup_epochs {epochs:g}: these are 2 ** 63 steps or more. Give fewer")
    return steps


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run, one attribute a flag. Read-only; `source(name)` is where a value came from, such as FLAG."""

    _values: dict
    _sources: dict = dataclasses.field(compare=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"no setting is called {name!r}")
        return self._values[name]

    def source(self, name: str) -> str:
        return self._sources[name]

    def to_dict(self) -> dict:
        """The settings by name, as checkpoints keep them."""
        return dict(self._values)

    def replace(self, **values: object) -> "Config":
        """A copy with other values, which keep their source. Raises AttributeError for an unknown name."""
        for name in values:
            getattr(self, name)
        return Config(self._values | values, self._sources)


class Values(dict):
    """Settings by name while they are resolved, and where each came from. Those that depend on unknown data are missing."""

    def __init__(self, values: dict, source: str = DEFAULT):
        super().__init__(values)
        self.sources = dict.fromkeys(values, source)

    def put(self, source: str, values: dict) -> None:
        self.update(values)
        self.sources.update(dict.fromkeys(values, source))
