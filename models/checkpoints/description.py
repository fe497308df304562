"""What stands beside a file of weights, as a record, and the values that the files of several programs share."""

import dataclasses
import re

from models.errors import WeightsError
from models.kinds import is_number, is_whole

from .zip_archive import shown

# Keys of a model's row that belong to the weights, whatever the row says: no parameter has another shape, only other logits.
COMPUTED = ("gelu", "norm_eps", "mean", "std", "resnet_style", "position_resize", "rope", "rope_grid", "pool_heads", "final_norm")
# What our own exports say of their model: all keys of its row but these. Older ones say only COMPUTED.
UNSAID = ("dropout_rate", "attention_dropout_rate", "drop_path_rate", "channel_mean", "channel_std", "sigmoid_attention",
          "img_size", "representation_size", "interpolation", "eval_crop")
PLAIN_EPS = 1e-6                                            # of the norms of timm and of Google
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# What config.json has beside that in a folder of ours: how a run read image files and evaluated them (flags), and what its model
# card says of it, values by name in sections.
OWN_ENTRY = "vit_run"
RESAMPLE = {2: "bilinear", 3: "bicubic"}                    # Pillow's numbers
# GELU by the names that timm and transformers have for it.
GELU = {"gelu": "erf", "gelu_python": "erf", "gelu_erf": "erf", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_tanh": "tanh",
        "gelu_pytorch_tanh": "tanh", "quick_gelu": "quick", "quickgelu": "quick"}
SILU = ("silu", "swish")                                    # of the gate of SwiGLU
SMALLEST_CROP = 0.1                                         # that --eval_crop takes
MAX_SIDE = 1 << 14                                          # pixels
# timm's sizes by their names: (width, heads)
TIMM_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16), "huge": (1280, 16)}


@dataclasses.dataclass
class Description:
    """`row`: keys of a model's row; `classes`: names by label; `view`: how images are resized and evaluated (flags); `untaken`:
    what is said of that and no flag can say, in words by flag; `model`: what timm calls the model, such as vit_tiny_patch16_224;
    `base`: the row of configs.MODELS that it is built by, whose other keys hold too; `family`: how the names of the rows begin
    that may be its own, where arrays are those of others too; `card`: of a folder of ours, what its model card says; `license`:
    of the weights; `outputs`: how many classes its head has, where that is said; `pool`: timm's global_pool; `pool_prefix`:
    whether that takes the tokens before the patches too; `notes`: lines."""

    row: dict = dataclasses.field(default_factory=dict)
    classes: list[str] | None = None
    view: dict = dataclasses.field(default_factory=dict)
    untaken: dict[str, str] = dataclasses.field(default_factory=dict)
    model: str = ""
    base: str = ""
    family: str = ""
    card: dict | None = None
    license: str = ""
    by_name: bool = False           # whether the name of the file alone says it, which its arrays may contradict
    own: bool = False               # whether an export of ours says how the model computes
    outputs: int | None = None
    pool: str = ""
    pool_prefix: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)

    def take_own(self, said: object) -> None:
        """What an export of ours says of its model (ROW_ENTRY); of what it does not say nothing."""
        if isinstance(said, dict):
            self.row |= {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()
                         if key not in UNSAID}
            self.own = True

    def take_view(self, interpolation: object, crop: object, mode: object) -> None:
        """timm's interpolation, crop_pct and crop_mode. "squash" makes the whole image square before the crop."""
        if interpolation in RESAMPLE.values():
            self.view["interpolation"] = interpolation
        elif interpolation is not None:
            self.untaken["interpolation"] = f"interpolation {shown(interpolation)}"
        if mode in (None, "center", "squash") and is_number(crop) and SMALLEST_CROP <= crop <= 1:
            self.view["eval_crop"] = 0.0 if mode == "squash" and crop == 1 else float(crop)
            if mode == "squash" and crop < 1:
                self.untaken["eval_crop"] = f"images are made square before {crop:g} of them is cut out"
        elif crop is not None or mode not in (None, "center", "squash"):
            self.untaken["eval_crop"] = "crop: " + ", ".join(shown(value) for value in (mode, crop) if value is not None)

    def take_size(self, size: int | tuple[int, int], patch: int | None) -> None:
        """The image size: in whole patches, as a convolution without padding leaves out the rest."""
        sides = [size] * 2 if isinstance(size, int) else list(size)
        whole = [side - side % patch if patch and side > patch else side for side in sides]
        if whole != sides:
            self.notes.append(f"its images of {sides[0]} x {sides[1]} px are read at {whole[0]} x {whole[1]}, in whole patches "
                              f"of {patch}: its program leaves out the rest")
        self.row["img_size"] = whole[0] if whole[0] == whole[1] else tuple(whole)

    def heads(self, width: int) -> int | None:
        """Of a model of this width, where it is said, or timm's name of the size means it."""
        named = re.match(r"(?:vit|deit3?)_(\w+?)_", self.model)
        usual, heads = TIMM_SIZES.get(named[1] if named else "", (0, 0))
        return self.row.get("num_heads", heads if width == usual else None)


def number_of(name: str, value: object, kind: type = int) -> int | float | bool:
    """A setting by its name as another program wrote it. Raises WeightsError where it is no number."""
    if not is_number(value) and not isinstance(value, bool):
        raise WeightsError(f"its {name} is {shown(value)}, and no number")
    return kind(value)


def settings_of(values: dict, name: str) -> dict:
    """A part of the file that holds settings by name; {} without it."""
    part = values.get(name)
    if part is not None and not isinstance(part, dict):
        raise WeightsError(f"its {name} are {shown(part)}, and no settings by name")
    return part or {}


def gelu_of(name: object) -> str:
    if not isinstance(name, str) or name not in GELU:
        raise WeightsError(f"its activation is {shown(name)}, and models here compute GELU")
    return GELU[name]


def numbers_of(values: list) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or not all(map(is_number, values)) or len(values) not in (1, 3):
        raise WeightsError(f"its mean and standard deviation of the images must be 1 or 3 numbers each, not {shown(values)}")
    numbers = tuple(float(value) for value in values)
    return numbers


def size_of(value: int | list | dict) -> int | tuple[int, int]:
    """A side in pixels, or (height, width) where they differ."""
    sides = [value, value] if is_whole(value) else value
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(map(is_whole, sides)):
        raise WeightsError(f"its images are {shown(value)}, and no side or (height, width) in pixels")
    height, width = sides
    if not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise WeightsError(f"its images are {height} x {width} px, and models here take 1 to {MAX_SIDE}")
    return height if height == width else (height, width)


def side_of(value: int | list) -> int:
    """Of a square patch."""
    sides = {value} if is_whole(value) else set(value) if isinstance(value, (list, tuple)) else set()
    if len(sides) != 1 or not all(map(is_whole, sides)):
        raise WeightsError(f"its patches are {shown(value)}, and models here have square ones")
    return sides.pop()


def names_of(names: list | dict | None) -> list[str] | None:
    """By label: of a list, or of names by number without a gap."""
    if isinstance(names, dict):
        numbers = {int(key): name for key, name in names.items()}
        names = [numbers[number] for number in range(len(numbers))] if set(numbers) == set(range(len(numbers))) else None
    return [shown(name) for name in names] if isinstance(names, list) else None
