"""The record of what is written next to a file of weights, and the values that several programs write in the same way."""

import dataclasses
import re

from models.errors import WeightsError
from models.kinds import is_number, is_whole

from .zip_archive import shown

# Keys of a row that belong to the weights, so the file wins over the row. They change the logits, not the shape of a parameter.
COMPUTED = ("gelu", "norm_eps", "mean", "std", "resnet_style", "position_resize", "rope", "rope_grid", "pool_heads", "final_norm")
# Our own exports contain all keys of the model's row but these. Older ones contain only COMPUTED.
NOT_EXPORTED = ("dropout_rate", "attention_dropout_rate", "drop_path_rate", "channel_mean", "channel_std", "sigmoid_attention",
          "img_size", "representation_size", "interpolation", "eval_crop")
PLAIN_EPS = 1e-6                                            # of the norms of timm and of Google
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# The entry of a config.json of ours with how a run read and evaluated images (flags), and with the sections of its model card.
OWN_ENTRY = "vit_run"
RESAMPLE = {2: "bilinear", 3: "bicubic"}                    # Pillow's numbers
# timm's and transformers' names of the activation -> our name of its form.
GELU = {"gelu": "erf", "gelu_python": "erf", "gelu_erf": "erf", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_tanh": "tanh",
        "gelu_pytorch_tanh": "tanh", "quick_gelu": "quick", "quickgelu": "quick"}
SILU = ("silu", "swish")                                    # names of the activation in the gate of SwiGLU
SMALLEST_CROP = 0.1                                         # the smallest --eval_crop
MAX_SIDE = 1 << 14                                          # pixels
# timm's names of sizes: (width, heads)
TIMM_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16), "huge": (1280, 16)}


@dataclasses.dataclass
class Description:
    """What a config.json, an export of ours or a name says about a file of weights; values that are not stated are empty."""

    row: dict = dataclasses.field(default_factory=dict)                   # keys of a model's row
    classes: list[str] | None = None                                      # names by label
    view: dict = dataclasses.field(default_factory=dict)                  # how images are resized and evaluated (flags)
    untaken: dict[str, str] = dataclasses.field(default_factory=dict)     # by flag: what the flag cannot express, in words
    model: str = ""                 # timm's name of the model, such as vit_tiny_patch16_224
    base: str = ""                  # the row of configs.MODELS that the model is built from; `row` overrides its keys
    family: str = ""                # how the names of the possible rows begin, if rows of other families have the same arrays
    card: dict | None = None        # the sections of the model card, in a folder of ours
    license: str = ""               # of the weights
    by_name: bool = False           # whether only a name says it, which the arrays may contradict
    own: bool = False               # whether an export of ours says how the model computes
    outputs: int | None = None      # number of classes of the head
    pool: str = ""                  # timm's global_pool
    pool_prefix: bool = False       # whether pooling includes the tokens before the patches
    notes: list[str] = dataclasses.field(default_factory=list)            # lines for the user

    def take_own(self, stated: object) -> None:
        """Take over the row that an export of ours contains (ROW_ENTRY)."""
        if isinstance(stated, dict):
            self.row |= {key: tuple(value) if isinstance(value, list) else value for key, value in stated.items()
                         if key not in NOT_EXPORTED}
            self.own = True

    def take_view(self, interpolation: object, crop: object, mode: object) -> None:
        """Take over timm's interpolation, crop_pct and crop_mode. "squash" makes the whole image square before the crop."""
        if interpolation in RESAMPLE.values():
            self.view["interpolation"] = interpolation
        elif interpolation is not None:
            self.untaken["interpolation"] = f"interpolation {shown(interpolation)}"
        if mode in (None, "center", "squash") and is_number(crop) and SMALLEST_CROP <= crop <= 1:
            self.view["eval_crop"] = 0.0 if mode == "squash" and crop == 1 else float(crop)
            if mode == "squash" and crop < 1:
                self.untaken["eval_crop"] = f"images are made square before a crop of {crop:g}"
        elif crop is not None or mode not in (None, "center", "squash"):
            self.untaken["eval_crop"] = "crop: " + ", ".join(shown(value) for value in (mode, crop) if value is not None)

    def take_size(self, size: int | tuple[int, int], patch: int | None) -> None:
        """Take over the image size, rounded down to whole patches: a convolution without padding ignores the rest."""
        sides = [size] * 2 if isinstance(size, int) else list(size)
        whole = [side - side % patch if patch and side > patch else side for side in sides]
        if whole != sides:
            self.notes.append(f"images are read at {whole[0]} x {whole[1]} px, in whole patches of {patch}: its program reads "
                              f"them at {sides[0]} x {sides[1]} px and ignores the rest")
        self.row["img_size"] = whole[0] if whole[0] == whole[1] else tuple(whole)

    def heads(self, width: int) -> int | None:
        """Return the number of heads, if it is stated or timm's name of the size implies it for this width; else None."""
        named = re.match(r"(?:vit|deit3?)_(\w+?)_", self.model)
        usual, heads = TIMM_SIZES.get(named[1] if named else "", (0, 0))
        return self.row.get("num_heads", heads if width == usual else None)


def number_of(name: str, value: object, kind: type = int) -> int | float | bool:
    """Convert a setting that another program wrote. Raises WeightsError if it is not a number."""
    if not is_number(value) and not isinstance(value, bool):
        raise WeightsError(f"its {name} is {shown(value)}, not a number")
    return kind(value)


def settings_of(values: dict, name: str) -> dict:
    """Return a section of settings; {} if it is missing. Raises WeightsError if it is not a dictionary."""
    part = values.get(name)
    if part is not None and not isinstance(part, dict):
        raise WeightsError(f"its {name} is {shown(part)}, not a JSON object ({{...}})")
    return part or {}


def gelu_of(name: object) -> str:
    if not isinstance(name, str) or name not in GELU:
        raise WeightsError(f"its activation is {shown(name)}, but models here use GELU")
    return GELU[name]


def numbers_of(values: list) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or not all(map(is_number, values)) or len(values) not in (1, 3):
        raise WeightsError(f"its mean and standard deviation of the images must be 1 or 3 numbers each, not {shown(values)}")
    return tuple(float(value) for value in values)


def size_of(value: int | list | dict) -> int | tuple[int, int]:
    """Return the side in pixels, or (height, width) if they differ."""
    sides = [value, value] if is_whole(value) else value
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(map(is_whole, sides)):
        raise WeightsError(f"its image size is {shown(value)}, not a side or (height, width) in pixels")
    height, width = sides
    if not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise WeightsError(f"its images are {height} x {width} px, but models here take 1 to {MAX_SIDE}")
    return height if height == width else (height, width)


def side_of(value: int | list) -> int:
    """Return the side of a square patch. Raises WeightsError for any other patch."""
    sides = {value} if is_whole(value) else set(value) if isinstance(value, (list, tuple)) else set()
    if len(sides) != 1 or not all(map(is_whole, sides)):
        raise WeightsError(f"its patch size is {shown(value)}, but models here have square patches")
    return sides.pop()


def names_of(names: list | dict | None) -> list[str] | None:
    """Return class names in the order of their labels, from a list or a complete {number: name}; None for anything else."""
    if isinstance(names, dict):
        numbers = {int(key): name for key, name in names.items()}
        names = [numbers[number] for number in range(len(numbers))] if set(numbers) == set(range(len(numbers))) else None
    return [shown(name) for name in names] if isinstance(names, list) else None
