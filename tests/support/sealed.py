"""Well-formed checkpoints with wrong values: the content of a real one, changed in one place, with a new digest.

A place is the path of keys to a value. Its new value is of another kind or out of range; or, with `plausible`, another value of
the same kind, which a user can only notice in what the run prints.
"""

import copy
import random
from collections.abc import Iterator
from pathlib import Path

import torch

from utils.run import checkpoint

ESCAPE = "\x1b[31mred\x1b]0;title\x07\n\t=1+1"
DEEP = 60                # lists within lists
OFTEN = {"config": 6, "optimizer": 6, "architecture": 4, "model": 2, "ema": 2, "scaler": 2}        # fields with many places
OTHER = {"optimizer": ("sgd", "adam", "adamw"), "decay_type": ("linear", "constant"), "augmentation": ("crop", "pad", "none"),
         "gelu": ("erf", "tanh"), "precision": ("fp32", "bf16"), "interpolation": ("bicubic", "bilinear"), "classifier": ("gap",)}
# Values that no field has: of another type, out of every range, or too long to be shown.
VALUES = (None, True, -1, -2 ** 70, 2 ** 70, 1.5, float("nan"), float("inf"), -float("inf"), 1e300, "", "x" * 100_000, ESCAPE,
          "a\0b", b"bytes", [], {}, (), [[]], {"a": {}}, {1: 2}, (1, "2", None))
TENSORS = (lambda: torch.tensor([]), lambda: torch.tensor(3.0), lambda: torch.tensor(float("nan")), lambda: torch.ones(2, 3),
           lambda: torch.ones(3, dtype=torch.complex64), lambda: torch.ones(1).expand(2, 1 << 20),
           lambda: torch.tensor([True, False]), lambda: torch.tensor(7))
KEYS = ("another", ESCAPE, "x" * 100_000, 3, -1, "", None, (1, 2), 1.5)


def places(content: object, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value, including containers."""
    if path:
        yield path
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, (list, tuple)) else ()
    for key, value in inner:
        yield from places(value, (*path, key))


def changed(content: dict, seed: int, plausible: bool = False) -> tuple[dict, str]:
    """Change one place -> (the changed copy, a description of the change)"""
    dice = random.Random(seed)
    paths = list(places(content))
    # Chosen by field, because most of the values are weights, and the rest would hardly be tried.
    field = dice.choice([name for name in content for _ in range(OFTEN.get(name, 1))])
    path = dice.choice([path for path in paths if path[0] == field])
    new, old = _copied(content), _at(content, path)
    parent, key = _at(new, path[:-1]), path[-1]
    ways = [*(["remove"] if isinstance(parent, (dict, list)) else []), *["replace"] * 3]
    ways += ["add"] * isinstance(old, dict) + ["rename"] * isinstance(parent, dict) + ["longer"] * isinstance(old, list)
    ways += ["other"] * (plausible and (isinstance(old, (bool, int, float)) or key in OTHER)) * 3
    ways += ["tensor"] * 5 * isinstance(old, torch.Tensor) + ["wrapped"] + ["nested"]
    way, value = dice.choice(ways), None
    if way == "remove":
        del parent[key]
        return new, f"{_name(path)} removed"
    if way == "rename":
        other = dice.choice(KEYS)
        parent[other] = parent.pop(key)
        return new, f"{_name(path)} renamed {_short(other)}"
    if way == "add":
        other = dice.choice(KEYS)
        _at(new, path)[other] = value = _value(dice)
        return new, f"{_name(path)}: {_short(other)} added, {_short(value)}"
    if way == "longer":
        _at(new, path).append(value := _value(dice))
        return new, f"{_name(path)}: {_short(value)} appended"
    if way == "tensor":
        value, what = _other_tensor(old, dice)
        return _put(new, path, value), f"{_name(path)} {what}"
    if way == "other":
        number = (not old,) if isinstance(old, bool) or old is None else (old + 1, old * 2) if key not in OTHER else ()
        value = dice.choice(OTHER.get(key) or number)
    elif way == "wrapped":
        value = dice.choice(([old], {"a": old}, (old, old)))
    elif way == "nested":
        value = old
        for _ in range(DEEP):
            value = [value]
    else:
        value = _value(dice)
        while type(value) is type(old) and not isinstance(value, torch.Tensor) and repr(value) == repr(old):
            value = _value(dice)
    return _put(new, path, value), f"{_name(path)} -> {_short(value)}"


def _value(dice: random.Random) -> object:
    return dice.choice(TENSORS)() if dice.random() < 0.25 else copy.deepcopy(dice.choice(VALUES))


def _other_tensor(old: torch.Tensor, dice: random.Random) -> tuple[object, str]:
    """Return the same numbers in another shape or type, or with one that is not finite."""
    kinds = ["one number", "one more axis", "float64", "int64", "as a list"]
    kinds += ["one fewer", "transposed", "twice as long", "flat"] if old.dim() and old.numel() > 1 else []
    kinds += ["nan", "inf"] if old.is_floating_point() and old.numel() else []
    # For a square or a single axis, these would be other numbers of the right kind.
    kinds = [kind for kind in kinds if not (kind == "transposed" and (old.dim() < 2 or old.shape[-1] == old.shape[-2]))
             and not (kind == "flat" and old.dim() < 2)]
    kind = dice.choice(kinds)
    flat = old.flatten()
    if kind in ("nan", "inf"):
        new = old.clone()
        new.view(-1)[dice.randrange(new.numel())] = float(kind)
        return new, f"with {kind}"
    return {"one number": lambda: flat[:1].clone() if old.dim() != 1 or old.numel() != 1 else old.new_zeros(2),
            "one more axis": lambda: old[None].clone(), "float64": lambda: old.double() + 0.0,
            "int64": lambda: old.nan_to_num().long(), "as a list": lambda: old.tolist(), "one fewer": lambda: flat[1:].clone(),
            "transposed": lambda: old.transpose(-1, -2).contiguous(), "twice as long": lambda: torch.cat([old, old]),
            "flat": flat.clone}[kind](), kind


def seal(path: Path, content: object) -> Path:
    """Write the content with its digest."""
    checkpoint._write(path, content)
    return path


def _copied(value: object) -> object:
    """Copy containers, but share tensors."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, (list, tuple)) else value


def _at(content: object, path: tuple) -> object:
    for key in path:
        content = content[key]
    return content


def _put(content: dict, path: tuple, value: object) -> dict:
    """Set the value at a path; tuples are replaced by new ones."""
    parent = _at(content, path[:-1])
    if isinstance(parent, tuple):
        return _put(content, path[:-1], (*parent[:path[-1]], value, *parent[path[-1] + 1:]))
    parent[path[-1]] = value
    return content


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def _short(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    text = ascii(value)
    return text if len(text) < 60 else f"{text[:50]}... ({len(text)})"
