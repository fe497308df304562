"""A stand-in for an Apple GPU: tensors in the CPU's memory that say they are on "mps", and refuse what MPS refuses.

    with apple_gpu() as gpu:
        train.main([..., "--device", "mps"])

Refused are float64 on the device, operations on tensors of both devices (numbers of 0 dimensions may be mixed, as on any GPU),
copies that do not wait, pinned memory, and fused optimizers. It cannot show which operations PyTorch lacks on MPS, nor the
numbers that Apple's kernels compute.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

MPS, CPU = torch.device("mps"), torch.device("cpu")
MIXES = {"__get__", "__set__", "__delete__", "copy_", "is_same_size", "_has_compatible_shallow_copy_type", "backward"}


class AppleTensor(torch.Tensor):
    device, is_mps = property(lambda tensor: MPS), property(lambda tensor: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = self.detach().clone().as_subclass(AppleTensor)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        return memo[id(self)]


class AppleGPU(TorchFunctionMode):
    """`moved`: the number of tensors that were copied to it; `seeds`: how often it was seeded."""

    def __init__(self):
        super().__init__()
        self.moved, self.seeds = 0, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), dict(kwargs or {})
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, AppleTensor)]
        assert name != "pin_memory", "pinned memory"
        assert not (here and name.startswith("_fused_")), f"{name} ignores grad_scale and found_inf on MPS"
        args, kwargs, target = _on_cpu(name, args, kwargs)
        if target is None:
            target = MPS if here and name not in ("cpu", "numpy") else CPU
            assert not here or name in MIXES or all(isinstance(tensor, AppleTensor) or not tensor.dim() for tensor in tensors), (
                f"{name}: tensors on two devices")
        crosses = (name in ("to", "cpu") and (target == MPS) != bool(here)) or (name == "copy_" and 0 < len(here) < len(tensors))
        assert not (crosses and kwargs.get("non_blocking")), "a copy that does not wait"
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
            if crosses and name != "copy_":
                self.moved += target == MPS
                result = result.clone()
        return tree_map(lambda value: _placed(value, target), result)


def _on_cpu(name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict, torch.device | None]:
    """-> the arguments with the CPU in place of the device that they name, and that device"""
    found = kwargs.get("device")
    place = next((number for number, value in enumerate(args) if isinstance(value, torch.device)), None) if name == "to" else None
    found = args[place] if place is not None else found
    if found is None or torch.device(found).type not in ("mps", "cpu"):
        return args, kwargs, None
    if place is not None:
        return (*args[:place], CPU, *args[place + 1:]), kwargs, torch.device(found)
    return args, kwargs | {"device": CPU}, torch.device(found)


def _placed(value: object, target: torch.device) -> object:
    if type(value) not in (torch.Tensor, AppleTensor):                # such as the tensors without numbers that count FLOPs
        return value
    if target != MPS:
        return value.as_subclass(torch.Tensor) if isinstance(value, AppleTensor) else value
    if value.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    return value if isinstance(value, AppleTensor) else value.as_subclass(AppleTensor)


@contextlib.contextmanager
def apple_gpu() -> Iterator[AppleGPU]:
    gpu = AppleGPU()

    def seed(number: int) -> None:
        gpu.seeds += 1

    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with (mock.patch("torch.backends.mps.is_available", lambda: True), mock.patch("torch.mps.manual_seed", seed),
              mock.patch("torch.mps.synchronize", lambda: None), gpu):
            yield gpu
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
