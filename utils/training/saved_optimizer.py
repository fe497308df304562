"""Checks the optimizer state in a checkpoint against the optimizer that will load it.

torch's load_state_dict compares neither shapes nor settings: a fused kernel then reads and writes past the end of an average that
is too short, and an average or a setting that is not the run's own is used without a message.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from models.kinds import brief, is_number, named

from .optimizer import OptimizerError

# By the optimizer's class: what it keeps of every parameter. `step` counts its updates; all else has the parameter's shape.
SLOTS = {"SGD": ("momentum_buffer",), "Adam": ("step", "exp_avg", "exp_avg_sq"), "AdamW": ("step", "exp_avg", "exp_avg_sq"),
         "Lamb": ("exp_avg", "exp_avg_sq")}
# Settings of a group that a session sets itself: which kernel, and the learning rate.
OF_A_SESSION = {"params", "lr", "lr_scale", "fused", "max_lr_snapshot"}
# Those that every version of PyTorch and timm has written. Of all others a run here has their defaults.
WRITTEN = {"params", "lr", "betas", "eps", "weight_decay", "momentum"}
EPS = (1e-8, 1e-6, 1e-4)        # of Adam, of LAMB, and with float16 weights, which --override may change


def checked_state(optimizer: torch.optim.Optimizer, state: dict, updates: int, names: Mapping[Tensor, str],
                  groups: Sequence[dict] | None = None) -> dict:
    """The state, its tensors contiguous as the kernels take them and its groups with the settings that this version of PyTorch or
    timm knows, of a run after so many updates.

    names: of the parameters, for messages. groups: of the parameters in the file, where they are not the optimizer's. Raises
    OptimizerError where anything in it is not what this optimizer writes.
    """
    groups = [optimizer.defaults | group for group in groups or optimizer.param_groups]
    if fault := next(_faults(optimizer, groups, state, updates, names), ""):
        raise OptimizerError(f"optimizer state: {fault}. Use an earlier checkpoint")
    slots = {index: {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in kept.items()}
             for index, kept in state["state"].items()}
    known = optimizer.param_groups[0].keys() | {"step"}
    settings = [{key: value for key, value in group.items() if key in known} for group in state["param_groups"]]
    return {**state, "state": slots, "param_groups": settings}


def _faults(optimizer: torch.optim.Optimizer, own: list[dict], state: dict, updates: int,
            names: Mapping[Tensor, str]) -> Iterator[str]:
    if missing := {"state", "param_groups"} - state.keys():
        yield f"it lacks {min(missing)}"
    groups = state["param_groups"]
    parameters = [parameter for group in own for parameter in group["params"]]
    if len(groups) != len(own):
        yield f"{len(groups)} groups of parameters in place of {len(own)}"
    first = 0
    for group, current in zip(groups, own):
        indices, first = list(range(first, first + len(current["params"]))), first + len(current["params"])
        if group.get("params") != indices:
            yield f"a group's parameters are {brief(group.get('params'))}, not {indices[0]} to {indices[-1]}"
        yield from _setting_faults(group, current)
        if type(optimizer).__name__ == "Lamb":                                          # which counts its updates in the groups
            yield from _count_faults(group, updates)
        elif "step" in group:
            yield from _other_version("step", group["step"])
    kept = state["state"]
    if unknown := kept.keys() - set(range(len(parameters))):
        yield f"it has a parameter {brief(min(unknown))}, of {len(parameters)}"
    for index, parameter in enumerate(parameters):
        yield from _slot_faults(optimizer, kept.get(index, {}), parameter, updates, names[parameter])
    arrays = [value for slots in kept.values() for value in slots.values() if isinstance(value, Tensor) and value.numel()]
    memory = [value.data_ptr() for value in arrays]
    if len(set(memory)) < len(memory):
        yield "two of its arrays are the same memory"


def _setting_faults(group: dict, current: dict) -> Iterator[str]:
    for key in sorted((current.keys() - group.keys()) & WRITTEN):
        yield f"a group lacks {key}"
    for key, value in group.items():
        if key == "eps":
            if not is_number(value) or value not in EPS:
                yield f"eps {brief(value)}"
        elif key == "step":
            continue
        elif key not in current:
            yield from _other_version(key, value)
        elif key not in OF_A_SESSION and not _same(value, current[key]):
            yield f"{key} {brief(value)} in place of {brief(current[key])}"


def _other_version(key: str, value: object) -> Iterator[str]:
    """Yield a fault for a setting that this optimizer does not have, unless it is off and so has no effect."""
    if value is not None and value is not False:
        yield f"{named(key)} {brief(value)} of a group, written by another version of timm or PyTorch"


def _count_faults(group: dict, updates: int) -> Iterator[str]:
    count = group.get("step", 0 if updates == 0 else None)
    count = count.item() if isinstance(count, Tensor) and count.dim() == 0 else count
    if count is None:
        yield f"a group lacks step, after {updates} updates"
    elif not is_number(count) or count != updates:
        yield f"step {brief(count)} after {updates} updates"


def _same(value: object, own: object) -> bool:
    if isinstance(own, tuple):
        return isinstance(value, (tuple, list)) and len(value) == len(own) and all(map(_same, value, own))
    if isinstance(value, Tensor):
        return False                                        # of several numbers `==` has no truth
    return value == own and isinstance(value, bool) == isinstance(own, bool)


def _slot_faults(optimizer: torch.optim.Optimizer, kept: dict, parameter: Tensor, updates: int, name: str) -> Iterator[str]:
    kind = type(optimizer).__name__
    expected = () if kind == "SGD" and not optimizer.defaults["momentum"] else SLOTS[kind]
    kept = {slot: value for slot, value in kept.items() if value is not None}
    if unknown := kept.keys() - set(expected):
        yield f"{named(min(unknown))} of {name}, which {kind} does not keep"
    if missing := set(expected) - kept.keys():
        if kept or updates:
            yield f"it lacks {min(missing)} of {name}"
        return
    for slot in expected:
        value = kept[slot]
        if slot == "step":
            steps = value.item() if isinstance(value, Tensor) and value.numel() == 1 and value.dim() == 0 else value
            if not is_number(steps) or steps != updates:
                yield f"step {brief(steps)} of {name} after {updates} updates"
        elif not isinstance(value, Tensor) or value.shape != parameter.shape:
            yield f"{slot} of {name} is {brief(value)}, not of shape {brief(tuple(parameter.shape))}"
        elif value.dtype not in (torch.float32, torch.float16):
            yield f"{slot} of {name} is of {str(value.dtype).removeprefix('torch.')}"
        else:
            yield from _number_faults(slot, value, name)


def _number_faults(slot: str, value: Tensor, name: str) -> Iterator[str]:
    """Yield a fault for NaN, and for infinity in an average of gradients; that of their squares may overflow but is never below
    0."""
    if not value.numel():
        return
    low, high = (end.item() for end in torch.aminmax(value.detach()))
    if slot == "exp_avg_sq":
        if not low >= 0:
            yield f"{slot} of {name} has numbers below 0, or NaN"
    elif not (is_number(low) and is_number(high)):
        yield f"{slot} of {name} is not finite"
