"""Reads what timm and transformers write next to their weights: config.json, in the folders that hold both.

Only plain values of these JSON files are used: what the model is (config_of_timm.py, config_of_transformers.py), how its images
are resized, and what its classes are called.
"""

import contextlib
import json
import re
from pathlib import Path

from models.errors import WeightsError

from . import config_of_timm, config_of_transformers
from .description import COMPUTED, HALF, IMAGENET, OWN_ENTRY, PLAIN_EPS, Description  # noqa: F401
from .zip_archive import one_line, shown

WEIGHTS = ("model.safetensors", "pytorch_model.bin")       # the first that exists is read
CONFIG, PREPROCESSOR, ADAPTER = "config.json", "preprocessor_config.json", "adapter_config.json"
ROW_ENTRY = "vit_row"                                       # the model's row in our own exports (export.py)
MAX_JSON = 1 << 24                                          # bytes; the names of 21,843 classes take 1 MB
# timm's name of published weights or of an architecture, which a file or its folder may have: ARCHITECTURE.TAG.
PUBLISHED = re.compile(r"([a-z0-9_]+)(?:\.([a-z0-9_]+))?")


def is_weights_folder(path: str | Path) -> bool:
    """Whether a folder is one that timm, transformers or peft save to."""
    return any((Path(path) / name).exists() for name in (*WEIGHTS, *(f"{name}.index.json" for name in WEIGHTS), ADAPTER))


def weights_in(folder: Path) -> Path:
    """Return the file of weights in such a folder. Raises WeightsError for an adapter, and for weights in several files."""
    if (folder / ADAPTER).exists():
        base = _read_json(folder / ADAPTER).get("base_model_name_or_path")
        raise WeightsError(f"{folder}: a LoRA adapter (adapter_config.json), which holds only changes to the weights of "
                           f"{shown(base) if base else 'another model'}. Merge them with peft (merge_and_unload), save the "
                           "result, and use that")
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"{folder}: its weights are in several files (*.index.json); save them in one (save_pretrained with a "
                       "larger max_shard_size)")


def describe(weights: Path) -> Description:
    """Describe a file of weights by the config.json of timm or transformers next to it.

    Without one, use the name of the file or its folder, if timm publishes weights of that name. Raises WeightsError for a
    config.json of another kind.
    """
    config = weights.parent / CONFIG
    if weights.name not in WEIGHTS or not config.is_file():
        return _describe_by_name(weights)
    values = _read_json(config)
    try:
        if "pretrained_cfg" in values or "architecture" in values:
            return config_of_timm.describe(values)
        preprocessor = weights.parent / PREPROCESSOR
        return config_of_transformers.describe(values, _read_json(preprocessor) if preprocessor.is_file() else {})
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        if isinstance(error, WeightsError):
            raise WeightsError(f"{config}: {error}") from error
        ours = type(error) is ValueError
        why = one_line(error) if ours else "a value in it has another type than theirs"
        raise WeightsError(f"{config}: not a config.json of timm or transformers ({why})") from error


def _describe_by_name(weights: Path) -> Description:
    for name in (weights.name.removesuffix(weights.suffix), weights.parent.name):
        if match := PUBLISHED.fullmatch(name):
            with contextlib.suppress(WeightsError):         # a name is no reason to refuse a file
                found = config_of_timm.describe({"architecture": match[1], "pretrained_cfg": {"tag": match[2] or ""}})
                found.by_name = True
                if not found.base:                          # its arrays show the rest
                    found.row = {"gelu": found.row["gelu"]}
                if found.base or found.row["gelu"] == "tanh":
                    return found
    return Description()


def _read_json(path: Path) -> dict:
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path.stat().st_size} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: is not a JSON object ({{...}})")
    return values
