"""Finds the row of configs.MODELS for a file: by its arrays, by the config.json next to it, and by a name if several rows fit."""

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

# Keys that change what a model computes and that no array reveals.
HIDDEN = ("gelu", "norm_eps", "rope", "rope_grid", "pool_heads", "mean", "std")
GOOGLE = {"gelu": "tanh", "norm_eps": 1e-6, **HALF}
POOLS = {"token": "token", "map": "attention"}               # timm's global_pool


class AmbiguousError(WeightsError):
    """Raised when the arrays of a file fit several models that compute different things; `names`: their rows."""

    def __init__(self, file: OpenedCheckpoint, names: list[str], sizes: dict):
        *others, last = names
        typed = f"MODEL_TYPE={' or '.join(names)} (--model_type, or the first argument of create_model)" + "".join(
            f" and --{key} {value}" for key, value in sizes.items())
        super().__init__(f"{file.path}: its arrays fit {', '.join(others)} and {last}, which compute or see images differently, "
                         f"and the file does not say which it is. Add {typed}, or use a folder with the file and "
                         "its config.json")
        self.names = names


def match_row(file: OpenedCheckpoint, preferred: str = "", num_heads: int | None = None) -> tuple[str, dict]:
    """Return (the name of the file's row, the keys in which the file differs from it), from names, shapes and config.json.

    If the name of the file or its folder contradicts its arrays, that name is discarded from the file's description first.

    preferred: rows whose names begin with it win over others with the same arrays.
    num_heads: for a file that does not say it; the keys lack it if it is unknown and no row has the file's sizes.
    Raises AmbiguousError if rows with the same arrays compute different things and none is preferred, and WeightsError for a
    family without a row.
    """
    if file.own_row:
        return _match_own(file)
    discard_contradicted_name(file)
    found, described = read_keys(file), file.file.described
    found |= {"num_heads": num_heads} if num_heads else {}
    if described.base:
        name = described.base
    elif rows := candidates(found, MODELS) or candidates(_unpooled(found), MODELS):
        name = _best(file, found, rows, preferred, HIDDEN)
    elif rows := candidates(found, MODELS, sizes=False) or candidates(_unpooled(found), MODELS, sizes=False):
        # No row has its sizes, so that different means and stds do not make it ambiguous.
        name = _best(file, found, rows, preferred, HIDDEN[:-2])
    else:
        name = _nearest(file, found, preferred)
    _check_registers(file, found, name)
    return name, _differences(found, MODELS[name])


def _unpooled(found: dict) -> dict:
    """Return the keys without pooling by attention, which fine-tuning may have added to a row without it."""
    return {key: value for key, value in found.items() if key != "classifier" or value != "attention"}


def _check_registers(file: OpenedCheckpoint, found: dict, name: str) -> None:
    """Raise WeightsError if a file of a published size has another number of registers and no config.json confirms it.

    A lost register costs little accuracy and would go unnoticed.
    """
    row = MODELS[name]
    if all(found.get(key) == row[key] for key in SIZES) and found["registers"] != row["registers"] > 0 and (
            "registers" not in file.file.described.row):
        raise WeightsError(f"{file.path}: it has {found['registers']} registers, but {name}, which has its sizes, has "
                           f"{row['registers']}. If that is intended, use a folder with the file and its config.json")


def _match_own(file: OpenedCheckpoint) -> tuple[str, dict]:
    """Return match_row for one of our exports, which lists all keys.

    The row is the one in its model card, or the one that shares the most keys.
    """
    stated = {key: value for key, value in file.own_row.items() if key not in (*COMPUTED, "img_size")}
    if unknown := set(stated) - set(KEYS) - {*SIZES, "num_heads"}:
        raise ModelError(f"{file.path}: its model has {brief(min(unknown))}, which this version does not know. Use the newer "
                         "version that wrote the file")

    def differences(name: str) -> dict:
        return {key: value for key, value in stated.items() if value != MODELS[name][key]}

    card = (file.file.described.card or {}).get("model", {}).get("architecture")
    name = card if card in MODELS else min(MODELS, key=lambda name: len(differences(name)))
    keys, sizes = differences(name), (*SIZES, "num_heads")
    return name, keys | ({key: stated[key] for key in sizes if key in stated} if keys.keys() & set(sizes) else {})


def discard_contradicted_name(file: OpenedCheckpoint) -> None:
    """Remove from the file's description what its own or its folder's name says, if its arrays are those of another model."""
    described = file.file.described
    if described.by_name and described.base and described.base not in candidates(file.row, MODELS):
        if described.base not in candidates(file.row, MODELS, sizes=False):
            described.pool = ""
        described.base = ""
        described.row.clear(), described.notes.clear()


def read_keys(file: OpenedCheckpoint) -> dict:
    """Return the keys of a row that the arrays and the description (config.json, name of file or folder) of a file determine.

    Raises WeightsError if its config.json contradicts the arrays.
    """
    found, described = dict(file.row), file.file.described
    claims = dict(described.row)
    if described.base:
        if described.base not in MODELS:
            raise WeightsError(f"{file.path}: it is timm's {described.model}, but configs.py has no row {described.base}")
        claims = {key: MODELS[described.base][key] for key in (*SIZES, *ARRAYS, "num_heads") if key != "mlp_dim"} | claims
    _check_claims(file, found, claims)
    if "num_heads" in claims:
        found["num_heads"] = claims["num_heads"]
    if classifier := _classifier(file, found):
        found["classifier"] = classifier
    return found


def _classifier(file: OpenedCheckpoint, found: dict) -> str:
    """Return what the head of the file reads, "" if unknown. Without a head, it is what the arrays need."""
    described, has_head = file.file.described, file.layout.has("head.weight")
    if "classifier" in described.row:
        return described.row["classifier"]
    if has_head and described.pool in POOLS:
        return POOLS[described.pool]
    if has_head and described.pool == "avg" and found["class_token"]:
        return found.get("classifier", "mean")
    return file.layout.program_row.get("classifier") or found.get("classifier", "")


def _check_claims(file: OpenedCheckpoint, found: dict, claims: dict) -> None:
    """Raise WeightsError if the description of the file contradicts its arrays."""
    says = CONFIG if (file.path.parent / CONFIG).is_file() else "its name"
    prefixed = found["class_token"] or found["registers"] or found["distilled"]
    for key in (*SIZES, *ARRAYS):
        unread = key == "final_norm" and "norm" in file.layout.unread
        if key not in claims or key not in found or unread or (key == "positions" and not prefixed):
            continue
        claim, has = (bool(value) if key == "layer_scale" else value for value in (claims[key], found[key]))
        if claim != has:
            raise WeightsError(f"{file.path}: {says} says {key} {claim}, but its arrays have {key} {has}: they do not belong "
                               "together")
    heads = claims.get("num_heads", 1)
    if heads < 1 or found["hidden_size"] % heads:
        raise WeightsError(f"{file.path}: {says} says num_heads {heads}, which does not divide the width {found['hidden_size']} "
                           "of its arrays")
    outputs = file.file.described.outputs
    if outputs and file.layout.has("head.bias") and file.head_classes != outputs:
        raise WeightsError(f"{file.path}: {says} says {outputs} classes, but its head has {file.head_classes}: they do not "
                           "belong together")


def _computed(file: OpenedCheckpoint) -> dict:
    """Return what is known of the hidden keys; Google's files all compute the same, without saying so."""
    return (GOOGLE if file.is_google and not file.file.described.own else {}) | file.computed


def _effective(file: OpenedCheckpoint, name: str) -> dict:
    """Return the hidden keys of a model of this row with this file: its program and its config.json win over the row."""
    row, computed = MODELS[name], _computed(file)
    return {key: computed.get(key, tuple(row[key]) if key in ("mean", "std") else row[key]) for key in HIDDEN}


def _best(file: OpenedCheckpoint, found: dict, names: list[str], preferred: str, decisive: tuple[str, ...]) -> str:
    """Return the best of the rows that have the file's arrays.

    decisive: the keys of HIDDEN in which the equally good rows may not differ. Raises AmbiguousError if they do.
    """
    def rank(name: str) -> tuple:
        row, computed = MODELS[name], _computed(file)
        differs = [key for key in HIDDEN if key in computed and key != "mean" and computed[key] != row[key]]
        plain = row["norm_eps"] == 1e-6 and not row["layer_scale"] and not row["rope"]           # GELU is the program's
        return (row.classifier != found.get("classifier", row.classifier), row.rope != computed.get("rope", row.rope),
                row.mean != computed.get("mean", row.mean), 0 if plain else len(differs))

    def width_ratio(name: str) -> float:
        return abs(math.log(MODELS[name].hidden_size / found["hidden_size"]))

    # A file without pooling by attention is a Perception Encoder only if timm trained it with another head and wrote no more.
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
        nearest = [min(rows, key=lambda name: (len(own[name]), width_ratio(name))) for rows in kinds.values()]
        alike = nearest if any(own.values()) else [name for rows in kinds.values() for name in rows]
        raise AmbiguousError(file, alike, own[nearest[0]])
    return min(chosen or names, key=lambda name: (MODELS[name].classifier != "token", width_ratio(name)))


def _of_family(file: OpenedCheckpoint, names: list[str]) -> list[str]:
    """Return the rows of the family that the file's config.json names, or all."""
    family = file.file.described.family
    return [name for name in names if family and name.startswith(family)] or names


def _nearest(file: OpenedCheckpoint, found: dict, preferred: str) -> str:
    """Return the row that shares the most parts with the file, for a combination of parts that no row has.

    Raises WeightsError if the file does not say how these parts are computed.
    """
    keys = file.file.described.row                             # it has norm_eps for a plain name of timm too
    complete = file.layout.program_row is not TIMM_ROW or {"hidden_size", "norm_eps"} & keys.keys()
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
    """Say that no row has all parts of a file, which row has most of them, and how the two differ."""
    def differing(name: str, keys: Iterable[str]) -> list[str]:
        row = MODELS[name]
        return [key for key in keys if found.get(key) != row[key]
                and (key != "layer_scale" or bool(found[key]) != bool(row[key]))]

    parts = (*ARRAYS, "resnet_layers")
    nearest = min(MODELS, key=lambda name: (
        len(differing(name, parts)) + bool(differing(name, SIZES)), len(differing(name, SIZES)),
        not (preferred and name.startswith(preferred))))
    pools = found.get("classifier") == "attention" != MODELS[nearest].classifier
    differs = ["pooling by attention"] * pools + [
        f"{key} {_in_words(key, found.get(key))}, not {_in_words(key, MODELS[nearest][key])}"
        for key in differing(nearest, (*parts, *SIZES))]
    shape = found["positions"] != MODELS[nearest]["positions"]         # they were read as of square images
    return (f"no model of configs.py has all of its parts, and it does not say how it computes. The nearest is {nearest}; the "
            f"file has {'; '.join(differs)}. If that is intended, use a folder with the file and its config.json"
            + ", or, if its images are not square, add --model_type and --img_size" * shape)


def _in_words(key: str, value: object) -> object:
    return bool(value) if key == "layer_scale" else value


def _differences(found: dict, row: object) -> dict:
    """Return the keys in which a file differs from its row."""
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
    """Describe a model in words, such as 'DINOv2 ViT-S/14, 4 registers, 518 px'."""
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
