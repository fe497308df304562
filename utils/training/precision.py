"""The number types of a run: fp32, tf32, bf16 and the fp16 levels as rows of one table.

The fp16 levels (FP16_OPT_LEVEL) are named as in NVIDIA's Apex. Here they mean torch's own automatic mixed precision:
  O0  float32
  O1  autocast to float16, dynamic loss scaling, float32 weights
  O2  as O1, and gradients cross the network as float16 (the weights are float32 in both: torch needs no master copy, because
      it does not convert them)
  O3  weights and everything else float16, no loss scaling: as fast as possible, and may diverge
"""

import contextlib
import dataclasses
from pathlib import Path

import torch

GROWTH_INTERVAL = 2000       # steps without overflow before the loss scale doubles
INITIAL_SCALE = 2.0 ** 16    # a larger start only wastes the first steps


@dataclasses.dataclass(frozen=True)
class Precision:
    name: str
    compute: torch.dtype                    # of matrix products
    weights: torch.dtype = torch.float32
    scales_loss: bool = False
    half_gradients: bool = False            # across the network
    matmul: str = "highest"                 # torch's float32 matmul precision; "high" rounds the factors to TF32

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self.compute == self.weights:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.compute)


LEVELS = {
    "O0": Precision("fp32 (O0)", torch.float32),
    "O1": Precision("fp16 autocast, loss scaling (O1)", torch.float16, scales_loss=True),
    "O2": Precision("fp16 autocast, loss scaling, fp16 gradient traffic (O2)", torch.float16, scales_loss=True,
                    half_gradients=True),
    "O3": Precision("all fp16 (O3)", torch.float16, weights=torch.float16),
}
FP32 = Precision("fp32", torch.float32)
TF32 = Precision("tf32", torch.float32, matmul="high")
BF16 = Precision("bf16 autocast", torch.bfloat16)


def choose(name: str, opt_level: str, device: torch.device) -> tuple[Precision, str]:
    """Return the precision of --precision auto, fp32, tf32, bf16 or fp16, and the reason for the log."""
    if name == "auto":
        if device.type == "mps":
            return FP32, "Apple GPU; --precision fp16 and bf16 are not tested here"
        native, processor = native_support(torch.bfloat16, device)
        return (BF16 if native else FP32), processor
    precision = {"fp32": FP32, "tf32": TF32, "bf16": BF16, "fp16": LEVELS[opt_level]}[name]
    reasons = ["requested"]
    if device.type == "mps":
        if precision is TF32:
            precision, reasons = FP32, ["tf32 was requested, which Apple GPUs do not have"]
        elif precision.compute != torch.float32:
            reasons.append("not tested on Apple GPUs")
    elif precision.compute != torch.float32 and not native_support(precision.compute, device)[0]:
        reasons.append("this processor only emulates it: slower than fp32")
    if precision.weights == torch.float16:
        reasons.append("may diverge: compare with O1")
    return precision, "; ".join(reasons)


def apply_matmul_precision(precision: Precision) -> None:
    """Set how much torch may round inside products of float32 numbers, for this process."""
    if precision.compute == torch.float32:
        torch.set_float32_matmul_precision(precision.matmul)
        torch.backends.cudnn.allow_tf32 = precision.matmul != "highest"      # cuDNN rounds convolutions to TF32 by default


def native_support(dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Return whether the device is known to multiply matrices of bfloat16 or float16 in hardware, and which processor it is."""
    if device.type == "mps":
        return False, "Apple GPU"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        needed = (8, 0) if dtype == torch.bfloat16 else (7, 0)
        name = f"{torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]}"
        return capability >= needed, name if capability >= needed else f"{name} (below {needed[0]}.{needed[1]})"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    wanted = ["amx_bf16", "avx512_bf16"] if dtype == torch.bfloat16 else ["amx_fp16", "avx512_fp16"]
    found = [flag for flag in wanted if flag in flags]
    return bool(found), f"CPU with {found[0]}" if found else f"CPU without {' or '.join(wanted)}"


class LossScaler:
    """The factor on the loss that keeps float16 gradients from vanishing; 1 if the loss is not scaled.

    It is dynamic, as torch's GradScaler: halved when gradients overflow, doubled after GROWTH_INTERVAL steps without overflow.
    Unlike GradScaler it never makes the host wait for the device. A `fixed` scale > 0 does not change. Checkpoints store the
    state under GradScaler's names; it is {} if the loss is not scaled.
    """

    def __init__(self, precision: Precision, device: torch.device, fixed: float = 0.0):
        self.enabled, self.fixed = precision.scales_loss, float(fixed)
        self.scale = torch.tensor((self.fixed or INITIAL_SCALE) if self.enabled else 1.0, device=device)      # float32, ()
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)                                  # in a row

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.scale if self.enabled else loss).backward()

    def update(self, overflowed: torch.Tensor) -> None:
        """Adapt the scale after a step. `overflowed`: bool, (), on the device."""
        if not self.enabled or self.fixed:
            return
        good = torch.where(overflowed, 0, self._good_steps + 1)
        grown = (good >= GROWTH_INTERVAL) & (self.scale * 2).isfinite()
        self.scale = torch.where(overflowed, self.scale / 2, torch.where(grown, self.scale * 2, self.scale))
        self._good_steps = torch.where(good >= GROWTH_INTERVAL, 0, good).int()

    def state_dict(self) -> dict:
        if not self.enabled:
            return {}
        return {"scale": self.scale.item(), "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": GROWTH_INTERVAL,
                "_growth_tracker": int(self._good_steps)}

    def load_state_dict(self, state: dict) -> None:
        if self.enabled:
            self.scale.fill_(self.fixed or state["scale"])
            self._good_steps.fill_(state["_growth_tracker"])


def warm_up(model: torch.nn.Module, images: torch.Tensor, precision: Precision) -> None:
    """Run forward and backward once and discard the gradients. images: an input of a micro-step, (B, C, height, width).

    This compiles a model that compiles on its first call. With three or more processes it also makes resumed runs exact bit for
    bit: DistributedDataParallel rearranges its buckets after the first backward pass of a process, and the position of a number
    in a bucket decides in which order the parts of the ranks are added.
    """
    was_training = model.training
    model.train()
    with precision.autocast(images.device):
        logits = model(images)
    sum(each.float().sum() for each in (logits if isinstance(logits, tuple) else (logits,))).backward()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
