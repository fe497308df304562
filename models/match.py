"""Which row of configs.MODELS a file is of: by its arrays, by the config.json beside it, and by a name where several remain."""

import math
import re
from collections.abc import Iterable, Mapping

from configs import MODELS

from .checkpoints.described import CONFIG
from .checkpoints.description import COMPUTED, HALF
from .checkpoints.infer import ARRAYS, SIZES, candidates
from .checkpoints.layouts import TIMM_ROW
from .checkpoints.opened import OpenedCheckpoint
from .errors import ModelError, WeightsError
from .families import KEYS
from .kinds import brief

# What no array holds and another value of which computes other numbers.
NUMBERS = ("gelu", "norm_eps", "rope", "rope_grid", "pool_heads", "mean", "std")
GOOGLE = {"gelu": "tanh", "norm_eps": 1e-6, **HALF}
POOLS = {"token": "token", "map": "attention"}               # timm's global_pool


class AmbiguousError(WeightsError):
    """Raised for a file whose arrays are those of several models that compute otherwise; `names`: their rows."""

    def __init__(self, file: OpenedCheckpoint, names: list[str], sizes: dict):
        *others, last = names
        typed = f"(MODEL_TYPE={' or '.join(names)})" + "".join(f" and --{key} {value}" for key, value in sizes.items())
        super().__init__(f"{file.path}: its arrays are those of {', '.join(others)} and {last}, which compute or see images "
                         f"otherwise, and nothing says which it is. Add --model_type {typed}, or give a folder with the file "
                         "and its config.json")
        self.names = names


def match_row(file: OpenedCheckpoint, preferred: str = "", num_heads: int | None = None) -> tuple[str, dict]:
    """-> (the name of the row that the file is of, the keys that it sets otherwise), from its names, shapes and config.json.

    preferred: rows whose names begin so come before others of the same arrays. num_heads: where the file does not say it; it is
    missing in the keys where nothing says it and no row is of the file's sizes. Raises AmbiguousError where rows of the same
    arrays compute otherwise and none is preferred, and WeightsError for a family that has no row.
    """
    if file.own_row:
        return _match_own(file)
    found, said = read_keys(file), file.file.described       # in this order: the first corrects the second
    found |= {"num_heads": num_heads} if num_heads else {}
    if said.base:
        name = said.base
    elif rows := candidates(found, MODELS) or candidates(_unpooled(found), MODELS):
        name = _best(file, found, rows, preferred, NUMBERS)
    elif rows := candidates(found, MODELS, sizes=False) or candidates(_unpooled(found), MODELS, sizes=False):
        # Of sizes of its own: a name would bring others.
        name = _best(file, found, rows, preferred, NUMBERS[:-2])
    else:
        name = _nearest(file, found, preferred)
    _check_registers(file, found, name)
    return name, _otherwise(found, MODELS[name])


def _unpooled(found: dict) -> dict:
    """Without pooling by attention: of a model that was fine-tuned with one, which its row does not have."""
    return {key: value for key, value in found.items() if key != "classifier" or value != "attention"}


def _check_registers(file: OpenedCheckpoint, found: dict, name: str) -> None:
    """Raises WeightsError where a file of a published size has other registers than it and no config.json says so: a lost one
    costs little accuracy, and is not noticed."""
    row = MODELS[name]
    if all(found.get(key) == row[key] for key in SIZES) and found["registers"] != row["registers"] > 0 and (
            "registers" not in file.file.described.row):
        raise WeightsError(f"{file.path}: it has {found['registers']} registers, and {name}, of its sizes, has "
                           f"{row['registers']}. If that is no mistake, give the folder of it and its config.json")


def _match_own(file: OpenedCheckpoint) -> tuple[str, dict]:
    """match_row of an export of ours, which says all: the row that it was made of, as its card says, or the one that has the most
    of its keys."""
    said = {key: value for key, value in file.own_row.items() if key not in (*COMPUTED, "img_size")}
    if unknown := set(said) - set(KEYS) - {*SIZES, "num_heads"}:
        raise ModelError(f"{file.path}: its model has {brief(min(unknown))}, which this version does not know; a newer one wrote "
                         "it")

    def others(name: str) -> dict:
        return {key: value for key, value in said.items() if value != MODELS[name][key]}

    card = (file.file.described.card or {}).get("model", {}).get("architecture")
    name = card if card in MODELS else min(MODELS, key=lambda name: len(others(name)))
    keys = others(name)
    return name, keys | ({"num_heads": said["num_heads"]} if "hidden_size" in keys and "num_heads" in said else {})


def read_keys(file: OpenedCheckpoint) -> dict:
    """Keys of a row, by the file's arrays and its description: its config.json, or the name of the file or its folder.

    A name that the arrays contradict is removed from the description; a config.json that they contradict raises WeightsError.
    """
    found, said = dict(file.row), file.file.described
    claims = dict(said.row)
    if said.by_name and said.base and said.base not in candidates(found, MODELS):
        if said.base not in candidates(found, MODELS, sizes=False):
            said.pool = ""
        said.base = ""                                       # the arrays decide, not a name
        said.row.clear(), said.notes.clear()
    if said.base:
        if said.base not in MODELS:
            raise WeightsError(f"{file.path}: it is a {said.model} of timm, and configs.py has no row {said.base}")
        claims = {key: MODELS[said.base][key] for key in (*SIZES, *ARRAYS, "num_heads") if key != "mlp_dim"} | claims
    _check(file, found, claims)
    if "num_heads" in claims:
        found["num_heads"] = claims["num_heads"]
    if classifier := _classifier(file, found):
        found["classifier"] = classifier
    return found


def _classifier(file: OpenedCheckpoint, found: dict) -> str:
    """What the head of the file reads, "" where nothing says it; without a head it is what the row says, or the arrays need."""
    said, has_head = file.file.described, file.layout.has("head.weight")
    if "classifier" in said.row:
        return said.row["classifier"]
    if has_head and said.pool in POOLS:
        return POOLS[said.pool]
    if has_head and said.pool == "avg" and found["class_token"]:
        return found.get("classifier", "mean")
    return file.layout.program_row.get("classifier") or found.get("classifier", "")


def _check(file: OpenedCheckpoint, found: dict, claims: dict) -> None:
    """Raises WeightsError where the description of the file says something else than its arrays."""
    says = CONFIG if (file.path.parent / CONFIG).is_file() else "its name"
    prefixed = found["class_token"] or found["registers"] or found["distilled"]
    for key in (*SIZES, *ARRAYS):
        unread = key == "final_norm" and "norm" in file.layout.unread
        if key not in claims or key not in found or unread or (key == "positions" and not prefixed):
            continue
        claim, has = (bool(value) if key == "layer_scale" else value for value in (claims[key], found[key]))
        if claim != has:
            raise WeightsError(f"{file.path}: {says} says {key} {claim}, and its arrays have {key} {has}: they do not belong "
                               "together")
    heads = claims.get("num_heads", 1)
    if heads < 1 or found["hidden_size"] % heads:
        raise WeightsError(f"{file.path}: {says} says num_heads {heads}, which does not divide the width {found['hidden_size']} "
                           "of its arrays")
    outputs = file.file.described.outputs
    if outputs and file.layout.has("head.bias") and file.head_classes != outputs:
        raise WeightsError(f"{file.path}: {says} says {outputs} classes, and the head of its arrays has {file.head_classes}: "
                           "they do not belong together")


def _computed(file: OpenedCheckpoint) -> dict:
    """What is known of that; Google's files say nothing, and are all alike."""
    return (GOOGLE if file.is_google and not file.file.described.own else {}) | file.computed


def _effective(file: OpenedCheckpoint, name: str) -> dict:
    """What a model of this row would compute with the file: its program or its config.json win."""
    row, computed = MODELS[name], _computed(file)
    return {key: computed.get(key, tuple(row[key]) if key in ("mean", "std") else row[key]) for key in NUMBERS}


def _best(file: OpenedCheckpoint, found: dict, names: list[str], preferred: str, decisive: tuple[str, ...]) -> str:
    """Of rows that have the arrays. decisive: those of NUMBERS in which the rest may not differ."""
    def rank(name: str) -> tuple:
        row, computed = MODELS[name], _computed(file)
        differs = [key for key in NUMBERS if key in computed and key != "mean" and computed[key] != row[key]]
        plain = row["norm_eps"] == 1e-6 and not row["layer_scale"] and not row["rope"]           # GELU is its program's
        return (row.classifier != found.get("classifier", row.classifier), row.rope != computed.get("rope", row.rope),
                row.mean != computed.get("mean", row.mean), 0 if plain else len(differs))

    # Without its pooling it is no Perception Encoder, but where timm trained one with another, and nothing says more.
    in_timm = file.layout.program_row is TIMM_ROW and not file.file.described.row
    pools = found.get("classifier") == "attention" or in_timm
    names = [name for name in _of_family(file, names) if pools or MODELS[name].classifier != "attention"
             or not MODELS[name].class_token] or names
    best = min(map(rank, names))
    names = [name for name in names if rank(name) == best]
    chosen = [name for name in names if name == preferred] or [name for name in names if preferred and name.startswith(preferred)]
    kinds: dict[tuple, list[str]] = {}
    for name in sorted(names, key=lambda name: MODELS[name].class_token != found["class_token"]):
        effective = _effective(file, name)
        kinds.setdefault(tuple(effective[key] for key in decisive), []).append(name)
    if not chosen and len(kinds) > 1:
        own = {name: {key: found[key] for key in SIZES if found.get(key) != MODELS[name][key]} for name in names}
        nearest = [min(rows, key=lambda name: len(own[name])) for rows in kinds.values()]
        alike = nearest if any(own.values()) else [name for rows in kinds.values() for name in rows]
        raise AmbiguousError(file, alike, own[nearest[0]])
    return min(chosen or names, key=lambda name: (
        MODELS[name].classifier != "token", abs(math.log(MODELS[name].hidden_size / found["hidden_size"]))))


def _of_family(file: OpenedCheckpoint, names: list[str]) -> list[str]:
    """Those of the family that the file's config.json names, or all."""
    family = file.file.described.family
    return [name for name in names if family and name.startswith(family)] or names


def _nearest(file: OpenedCheckpoint, found: dict, preferred: str) -> str:
    """Of parts that no row has together: the row that has the most of them, if the file says how it computes them."""
    said = file.file.described.row                             # of a plain name of timm the eps says that it is known
    complete = file.layout.program_row is not TIMM_ROW or {"hidden_size", "norm_eps"} & said.keys()
    gated = found["mlp"] == "swiglu" and found.get("classifier") != "attention"
    needed = {"norm_eps"} if gated else {"gelu", "norm_eps"}
    if not complete or not needed <= file.computed.keys() or found["resnet_layers"] is not None:
        raise WeightsError(f"{file.path}: {_describe_misfit(found, preferred)}")

    def rank(name: str) -> tuple:
        row = MODELS[name]
        return (row["resnet_layers"] is not None, sum(found[key] != row[key] for key in ARRAYS if key != "layer_scale"),
                bool(found["layer_scale"]) != bool(row["layer_scale"]), sum(found.get(key) != row[key] for key in SIZES),
                row.mean != file.computed.get("mean", row.mean), not (preferred and name.startswith(preferred)))

    return min(_of_family(file, list(MODELS)), key=rank)


def _describe_misfit(found: dict, preferred: str) -> str:
    """That no row has the parts of a file, the row that has most of them, and how the two differ."""
    def others(name: str, keys: Iterable[str]) -> list[str]:
        row = MODELS[name]
        return [key for key in keys if found.get(key) != row[key]
                and (key != "layer_scale" or bool(found[key]) != bool(row[key]))]

    parts = (*ARRAYS, "resnet_layers")
    nearest = min(MODELS, key=lambda name: (len(others(name, parts)) + bool(others(name, SIZES)), len(others(name, SIZES)),
                                            not (preferred and name.startswith(preferred))))
    pools = found.get("classifier") == "attention" != MODELS[nearest].classifier
    differs = ["a pooling by attention"] * pools + [
        f"{key} {_in_words(key, found.get(key))}, not {_in_words(key, MODELS[nearest][key])}"
        for key in others(nearest, (*parts, *SIZES))]
    shape = found["positions"] != MODELS[nearest]["positions"]         # which is read as if the images were square
    return (f"no model of configs.py has its parts together, and nothing says how it computes. The nearest is {nearest}; of the "
            f"file are {'; '.join(differs)}. If that is no mistake, give the folder of it and its config.json"
            + ", or --model_type and the --img_size of its images, if they are not square" * shape)


def _in_words(key: str, value: object) -> object:
    return bool(value) if key == "layer_scale" else value


def _otherwise(found: dict, row: object) -> dict:
    """The keys that a file sets otherwise than its row."""
    keys = {key: found[key] for key in ("in_channels", "classifier") if key in found}
    if keys.get("classifier") == "gap" and (not row["class_token"] or found["registers"]):
        keys["classifier"] = "mean"
    if any(found.get(key) != row[key] for key in SIZES) or found.get("num_heads") not in (None, row["num_heads"]):
        keys |= {key: found[key] for key in (*SIZES, "num_heads") if key in found}
    no_prefix = not (found["class_token"] or found["registers"] or found["distilled"])
    for key in ARRAYS:
        same = bool(found[key]) == bool(row[key]) if key == "layer_scale" else found[key] == row[key]
        needless = {"positions": no_prefix, "class_token": keys.get("classifier") == "gap", "layer_scale": found["class_layers"],
                    "final_norm": row["classifier"] == "patch_mean"}
        if not same and not needless.get(key):
            keys[key] = found[key]
    if "pool_mlp_dim" in found:
        keys["pool_mlp_dim"] = found["pool_mlp_dim"]
    sizes = (*SIZES, "num_heads", "in_channels") if "hidden_size" in keys else ()
    return {key: value for key, value in keys.items() if value != row[key] or key in sizes}


def model_name(name: str, row: Mapping) -> str:
    """Return what to call a model that was made from the row `name` with the keys of `row`.

    'ViT-B_16'; 'ViT-B_16 with 6 heads'; of another width, depth or patch than the row's 'ViT (width 40, 1 block, patch 4)'.
    """
    if name not in MODELS:                                     # of a checkpoint whose row has gone
        return name
    known = MODELS[name]
    if all(row[key] == known[key] for key in ("hidden_size", "num_layers", "patch_size")):
        others = [f"{row[key]} {words}" for key, words in (("num_heads", "heads"), ("mlp_dim", "MLP units"))
                  if row[key] != known[key]]
        return f"{name} with {' and '.join(others)}" if others else name
    family = re.sub(r"-[^-]+_\d+|-[A-Z]+\d+$", "", name)       # without the size
    blocks = f"{row['num_layers']} block{'s' * (row['num_layers'] != 1)}"
    return f"{family} (width {row['hidden_size']}, {blocks}, patch {row['patch_size']})"


def describe_row(name: str, keys: dict, img_size: int | tuple[int, int] | None = None) -> str:
    """'DINOv2 ViT-S/14, 4 registers, 518 px'"""
    row = MODELS[name].to_dict() | keys
    size = img_size or row["img_size"]
    match = re.fullmatch(r"(.+?)-?([^-_]+)_(\d+)(-.*)?", name)
    family, letter = (match[1], match[2]) if match else (name, "")
    title = "ViT" if family == "ViT" else f"{family} ViT" if match else family
    title += f"-{letter}/{row['patch_size']}" if letter else ""
    called = model_name(name, row)
    parts = [called.replace(name, title)]
    parts += [f"{row['registers']} register{'s' * (row['registers'] > 1)}"] * bool(row["registers"])
    parts += ["SwiGLU"] * (row["mlp"] == "swiglu")
    parts += {"attention": ["pooling by attention"], "mean": ["mean of the patches"], "patch_mean": ["mean of the patches"],
              "gap": ["mean of the patches"], "token_mean": ["cls token and mean of the patches"]}.get(row["classifier"], [])
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return ", ".join([*parts, f"{sides[0]} px" if sides[0] == sides[1] else f"{sides[0]} x {sides[1]} px"])
