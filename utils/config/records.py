"""What the functions of this room take and return: plain, frozen records."""

import dataclasses
from typing import Any

from .types import ConfigError

FLAG, RECIPE, MODEL, START, CHECKPOINT, DEFAULT = "flag", "recipe", "model", "start", "checkpoint", "default"


@dataclasses.dataclass(frozen=True)
class Sources:
    """What has to be opened before the configuration can be completed: data, start weights, a teacher."""

    dataset: str
    data_dir: str
    val_fraction: float
    test_fraction: float
    split_seed: int
    class_order: str | None # None: the order of runs older than the flag
    exif: str               # this and the next two: how image files are read, by the flags or the checkpoint
    intensity_range: str | tuple[int, int]
    alpha: str
    head: str | None        # "keep": the start weights are for the same task, so their classes are those of the data
    eval_only: bool
    recipe: str             # a row of configs.RECIPES
    model_type: str         # a row of configs.MODELS
    start: str              # "none", "auto" (the model's own file), or the path or published name; "none" for a resumed run
    typed_model: bool = False       # whether a flag names model_type
    path_column: str | None = None
    label_column: str | None = None
    image_dir: str | None = None
    teacher: str | None = None      # None: no distillation
    num_heads: int | None = None    # of a teacher whose file does not say
    img_size: int | tuple[int, int] | None = None       # of a typed model: the images that a table of positions may be for


@dataclasses.dataclass(frozen=True)
class Machine:
    """What each process has; the least of several."""

    device_type: str = "cpu"                        # or "cuda", or "mps"
    memory: int = 0                                 # bytes of the device, or of the machine, for this process; 0: not known
    cores: int = 0                                  # of the processor, for this process; 0: not known


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about the data, the start weights and the machine."""

    train_images: int
    num_classes: int
    can_flip: bool = True                           # a mirrored image keeps its class
    test_is_val: bool = False                       # there is no other split to choose the best checkpoint on
    image_sizes: tuple[tuple[int, int], ...] = ()   # (height, width) of some training images, where the recipe is a function
    reading: dict | None = None                     # how image files are read, as found: exif, alpha, ...
    start_settings: dict | None = None              # configuration of the run of the start weights, if it is one of ours
    start_row: dict | None = None                   # settings read from weights of another program (utils/config/adopt.py)
    # The preprocessing that they were made with, where known: interpolation, eval_crop, img_size; `untaken`: what no flag can
    # express, in words by flag; `by`: whose statement it is; `unknown_mean`: whether mean and standard deviation are unknown
    # (utils/config/view.py).
    start_view: dict | None = None
    start_head_classes: int | None = None           # classes of the head in the start weights; 0 or None: no head
    start_path: str | None = None
    start_names_classes: bool = False               # without names, a head depends on the order of the classes
    class_orders: tuple[str, ...] = ()              # if they differ: the first classes in the order "number", and in "text"
    device_type: str = "cpu"                        # this and the next two as in Machine
    memory: int = 0
    cores: int = 0
    evaluated_images: int = 0                       # images of the largest split that is evaluated; 0: unknown
    cached_images: int = 0                          # bytes of training images that are kept on the device
    teacher_parameters: int = 0
    native_bf16: bool = False                       # the processor multiplies bfloat16 natively
    ranks: int = 1


@dataclasses.dataclass(frozen=True)
class Saved:
    """What the configuration needs of the checkpoint that a run is resumed from."""

    config: dict
    step: int
    train_images: int
    world_size: int
    path: str


def steps_in(epochs: float, images: int, batch_size: int) -> int:
    """Return the optimizer steps in so many passes over the training images. Raises ConfigError for more than --num_steps
    allows."""
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
        """Return the settings by name, as checkpoints store them."""
        return dict(self._values)

    def replace(self, **values: object) -> "Config":
        """Return a copy with other values and the same sources. Raises AttributeError for an unknown name."""
        for name in values:
            getattr(self, name)
        return Config(self._values | values, self._sources)


class Values(dict):
    """Settings by name while they are resolved, and the source of each. Those that depend on unknown data are missing."""

    def __init__(self, values: dict, source: str = DEFAULT):
        super().__init__(values)
        self.sources = dict.fromkeys(values, source)

    def put(self, source: str, values: dict) -> None:
        self.update(values)
        self.sources.update(dict.fromkeys(values, source))
