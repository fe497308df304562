"""What a program writes beside its weights: the config.json of timm and transformers, and the folders that hold both.

A folder is taken for what it plainly is. Of its JSON files only plain values are used: how the model computes (GELU, eps),
how it sees images (mean, standard deviation, size), and what its classes are called.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

from models.errors import WeightsError
from models.kinds import NAME, TEXT, Each, Kind, Record, is_number, is_whole, one_of

from .zip_archive import one_line, shown

WEIGHTS = ("model.safetensors", "pytorch_model.bin")       # in this order
CONFIG, PREPROCESSOR, ADAPTER = "config.json", "preprocessor_config.json", "adapter_config.json"
# Keys of a model's row that belong to the weights, whatever the row says: no parameter has another shape, only other logits.
COMPUTED = ("gelu", "norm_eps", "mean", "std", "resnet_style", "position_resize")
# What our own exports say of their model (export.py): all keys of its row but these. Older ones say COMPUTED alone.
ROW_ENTRY = "vit_row"
UNSAID = ("dropout_rate", "attention_dropout_rate", "drop_path_rate", "channel_mean", "channel_std", "sigmoid_attention", "img_size",
          "representation_size")
# What config.json has beside that in a folder of ours: how a run read image files and evaluated them (flags), and what its model
# card says of it, values by name in sections.
OWN_ENTRY = "vit_run"
_RANGE = Kind("two whole numbers, the lower first", lambda value: isinstance(value, list) and len(value) == 2
              and all(map(is_whole, value)) and -32768 <= value[0] < value[1] <= 65535)
_VALUE = Kind("text or a number", lambda value: TEXT.holds(value) or is_number(value))
OWN = Record({"reading": Record({"exif": one_of("follow", "off"), "intensity_range": _RANGE,
                                 "alpha": one_of("white", "black", "mask", "ignore")}),
              "tta": one_of("none", "flip"), "card": Each(Each(_VALUE, keys=NAME), keys=NAME)}, optional=("reading", "tta"))
PLAIN_EPS = 1e-6                                            # of the norms of timm and of Google
MAX_SIDE = 1 << 14                                          # pixels
SMALLEST_CROP = 0.1                                         # that --eval_crop takes
MAX_JSON = 1 << 24                                          # bytes; the names of 21,843 classes take 1 MB

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# GELU by the names that the two programs have for it.
GELU = {"gelu": "erf", "gelu_python": "erf", "gelu_erf": "erf", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_tanh": "tanh",
        "gelu_pytorch_tanh": "tanh"}
RESAMPLE = {2: "bilinear", 3: "bicubic"}                    # Pillow's numbers
# Google's weights that timm publishes under these tags were trained with the tanh form, which timm does not compute.
TANH_TAGS = re.compile(r"augreg_")
TANH_MODELS = re.compile(r"siglip")


# timm's sizes by their names: (width, heads)
TIMM_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16), "huge": (1280, 16)}


@dataclasses.dataclass
class Description:
    """`row`: keys of a model's row; `classes`: names by label; `view`: how images are resized and evaluated (flags); `untaken`:
    what is said of that and no flag can say, in words by flag; `model`: what timm calls the model, such as vit_tiny_patch16_224;
    `license`: of the weights; `card`: of a folder of ours, what its model card says."""

    row: dict = dataclasses.field(default_factory=dict)
    classes: list[str] | None = None
    view: dict = dataclasses.field(default_factory=dict)
    untaken: dict[str, str] = dataclasses.field(default_factory=dict)
    model: str = ""
    card: dict | None = None
    license: str = ""
    own: bool = False               # whether an export of ours says how the model computes

    def take_own(self, said: object) -> None:
        """What an export of ours says of its model (ROW_ENTRY); of what it does not say nothing."""
        if isinstance(said, dict):
            self.row |= {key: tuple(value) if isinstance(value, list) else value for key, value in said.items() if key not in UNSAID}
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

    def heads(self, width: int) -> int | None:
        """Of a model of this width, where it is said, or timm's name of the size means it."""
        named = re.match(r"(?:vit|deit3?)_(\w+?)_", self.model)
        usual, heads = TIMM_SIZES.get(named[1] if named else "", (0, 0))
        return self.row.get("num_heads", heads if width == usual else None)


def is_weights_folder(path: str | Path) -> bool:
    """Whether a folder is one that timm, transformers or peft save to."""
    return any((Path(path) / name).exists() for name in (*WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS), ADAPTER))


def weights_in(folder: Path) -> Path:
    """The file of weights in such a folder. Raises WeightsError for one of an adapter, or of several files."""
    if (folder / ADAPTER).exists():
        base = _read_json(folder / ADAPTER).get("base_model_name_or_path")
        raise WeightsError(f"{folder}: a LoRA adapter (adapter_config.json), which holds changes to the weights of "
                           f"{shown(base) if base else 'another model'} and no model of its own; merge them with peft "
                           "(merge_and_unload), save the result, and give that")
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"{folder}: its weights are in several files (*.index.json); save them in one (save_pretrained with a "
                       "larger max_shard_size)")


def describe(weights: Path) -> Description:
    """What stands beside a file of weights; nothing unless it is one that timm or transformers write, with its config.json."""
    config = weights.parent / CONFIG
    if weights.name not in WEIGHTS or not config.is_file():
        return Description()
    values = _read_json(config)
    try:
        if "pretrained_cfg" in values or "architecture" in values:
            return _of_timm(values)
        preprocessor = weights.parent / PREPROCESSOR
        return _of_transformers(values, _read_json(preprocessor) if preprocessor.is_file() else {})
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        if isinstance(error, WeightsError):
            raise WeightsError(f"{config}: {error}") from error
        raise WeightsError(f"{config}: not a config.json of timm or transformers ({one_line(error)})") from error


def _read_json(path: Path) -> dict:
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path.stat().st_size} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: holds no settings by name")
    return values


def _of_timm(values: dict) -> Description:
    published, arguments = values.get("pretrained_cfg") or {}, values.get("model_args") or {}
    names = values.get("label_names") or values.get("labels") or published.get("label_names")
    found = Description(classes=_own_names(names) if OWN_ENTRY in values else _names(names))
    act, tag, name = arguments.get("act_layer"), str(published.get("tag") or ""), str(values.get("architecture") or "")
    tanh = TANH_TAGS.match(tag) or TANH_MODELS.search(name)
    found.model, found.license = name, shown(published.get("license") or "")
    found.row["gelu"] = _gelu(act) if act else "tanh" if tanh else "erf"
    for key in ("mean", "std"):
        if published.get(key):
            found.row[key] = _numbers(published[key])
    if published.get("input_size"):
        found.row["img_size"] = _size(published["input_size"][1:])
    if arguments.get("img_size"):
        found.row["img_size"] = _size(arguments["img_size"])
    if arguments.get("num_heads"):
        found.row["num_heads"] = int(arguments["num_heads"])
    found.take_view(published.get("interpolation"), published.get("crop_pct"), published.get("crop_mode"))
    if OWN_ENTRY in values:
        own = values[OWN_ENTRY]
        if fault := OWN.fault(OWN_ENTRY, own):
            raise WeightsError(fault)
        found.view |= {name: tuple(value) if isinstance(value, list) else value
                       for name, value in own.get("reading", {}).items()} | {name: own[name] for name in ("tta",) if name in own}
        found.card = own["card"]
    return found


def _of_transformers(values: dict, preprocessor: dict) -> Description:
    found = Description()
    if values.get("hidden_act"):
        found.row["gelu"] = _gelu(values["hidden_act"])
    if values.get("layer_norm_eps"):
        found.row["norm_eps"] = float(values["layer_norm_eps"])
    if values.get("image_size"):
        found.row["img_size"] = _size(values["image_size"])
    if values.get("num_attention_heads"):
        found.row["num_heads"] = int(values["num_attention_heads"])
    labels = values.get("id2label") or {number: name for name, number in (values.get("label2id") or {}).items()}
    if labels:
        names = _names(labels)
        found.classes = None if names is None or names == [f"LABEL_{number}" for number in range(len(names))] else names
    numbers = {key: preprocessor.get(f"image_{key}") for key in ("mean", "std")}
    if not preprocessor.get("do_normalize", True):
        numbers = {"mean": [0] * 3, "std": [1] * 3}
    scale = 255 * float(preprocessor.get("rescale_factor") or 1 / 255) if preprocessor.get("do_rescale", True) else 255.0
    scale = 1.0 if math.isclose(scale, 1) else scale                # the largest value of a pixel before it is normalized
    found.row |= {key: tuple(number / scale for number in _numbers(value)) for key, value in numbers.items() if value}
    resample = preprocessor.get("resample")
    found.take_view(None if resample is None else RESAMPLE.get(resample, f"resample {resample}"), *_cut(preprocessor))
    return found


def _cut(preprocessor: dict) -> tuple[object, str | None]:
    """How transformers resizes images and cuts out their middle, in timm's words: (crop_pct, crop_mode); another crop_mode says
    what timm has no word for."""
    size, crop = preprocessor.get("size"), preprocessor.get("crop_size") if preprocessor.get("do_center_crop") else None
    if "crop_pct" in preprocessor or size is None:
        return preprocessor.get("crop_pct"), None
    squeezed = not (isinstance(size, dict) and "shortest_edge" in size)        # a number is both sides
    if crop is None and squeezed:
        return 1, "squash"
    sides, crop = ({value} if is_number(value) else {value.get(name) for name in ("shortest_edge", "height", "width")} - {None}
                   for value in (size, crop or {}))
    if len(sides) == len(crop) == 1 and max(crop) <= max(sides):
        return max(crop) / max(sides), "squash" if squeezed else "center"
    return None, f"size {shown(size)}, crop_size {shown(preprocessor.get('crop_size'))}"


def _gelu(name: object) -> str:
    if name not in GELU:
        raise WeightsError(f"its activation is {shown(name)}, and models here compute GELU")
    return GELU[name]


def _numbers(values: list) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) not in (1, 3):
        raise ValueError(f"{len(numbers)} channels")
    return numbers


def _size(value: int | list | dict) -> int | tuple[int, int]:
    """A side in pixels, or (height, width) where they differ."""
    height, width = (value, value) if isinstance(value, int) else map(int, value)
    if not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise ValueError(f"images of {height} x {width}")
    return height if height == width else (height, width)


def _names(names: list | dict | None) -> list[str] | None:
    """By label: of a list, or of names by number without a gap."""
    if isinstance(names, dict):
        numbers = {int(key): name for key, name in names.items()}
        names = [numbers[number] for number in range(len(numbers))] if set(numbers) == set(range(len(numbers))) else None
    return [shown(name) for name in names] if isinstance(names, list) else None


def _own_names(names: object) -> list[str]:
    """As a run of ours has them."""
    if not isinstance(names, list) or not names or not all(map(TEXT.holds, names)):
        raise ValueError("its label_names are no names")
    return names
