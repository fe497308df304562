"""The table of precisions, the choice, and the loss scaler."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from utils.training import precision
from utils.training.optimizer import build_optimizer, update
from utils.training.precision import (
    BF16,
    FP32,
    INITIAL_SCALE,
    LEVELS,
    TF32,
    LossScaler,
    apply_matmul_precision,
    choose,
    native_support,
)

CPU = torch.device("cpu")
HALF, FULL, BRAIN = torch.float16, torch.float32, torch.bfloat16


@pytest.mark.parametrize(("row", "compute", "weights", "scales_loss", "half_gradients"), [
    (LEVELS["O0"], FULL, FULL, False, False),
    (LEVELS["O1"], HALF, FULL, True, False),
    (LEVELS["O2"], HALF, FULL, True, True),
    (LEVELS["O3"], HALF, HALF, False, False),
    (FP32, FULL, FULL, False, False),
    (TF32, FULL, FULL, False, False),
    (BF16, BRAIN, FULL, False, False)], ids=[*LEVELS, "fp32", "tf32", "bf16"])
def test_products_are_computed_in_the_type_of_the_table(row, compute, weights, scales_loss, half_gradients):
    assert (row.compute, row.weights, row.scales_loss, row.half_gradients) == (compute, weights, scales_loss, half_gradients)
    layer, x = nn.Linear(8, 8).to(row.weights), torch.randn(2, 8, dtype=row.weights)
    with row.autocast(CPU):
        y = layer(x)
    assert y.dtype == compute and layer.weight.dtype == weights
    y.float().sum().backward()
    assert layer.weight.grad.dtype == weights


def test_only_tf32_rounds_float32_products():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for row, matmul, allow_tf32 in ((TF32, "high", True), (BF16, "high", True), (FP32, "highest", False)):
            apply_matmul_precision(row)                  # bf16 has no float32 products and leaves the settings alone
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (matmul, allow_tf32)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """Return processor("avx2 amx_bf16"), which sets the flags in /proc/cpuinfo. None: the file does not exist."""
    def pretend(flags):
        if flags is not None:
            (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags}\n")
        monkeypatch.setattr(precision, "Path", {"/proc/cpuinfo": tmp_path / "cpuinfo"}.__getitem__)

    return pretend


@pytest.fixture
def gpu(monkeypatch):
    """Return gpu(8, 0), which simulates a GPU of this compute capability."""
    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Model X")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return torch.device("cuda", 0)

    return pretend


EMULATED = "requested; this processor only emulates it: slower than fp32"


@pytest.mark.parametrize(("name", "level", "row", "without_units", "with_units"), [
    ("fp32", "O2", FP32, "requested", "requested"),
    ("tf32", "O2", TF32, "requested", "requested"),
    ("bf16", "O2", BF16, EMULATED, "requested"),
    ("fp16", "O0", LEVELS["O0"], "requested", "requested"),
    ("fp16", "O1", LEVELS["O1"], EMULATED, "requested"),
    ("fp16", "O3", LEVELS["O3"], f"{EMULATED}; may diverge: compare with O1", "requested; may diverge: compare with O1")])
def test_a_requested_precision_is_chosen(processor, name, level, row, without_units, with_units):
    for flags, reason in (("avx2", without_units), ("amx_bf16 avx512_fp16", with_units)):
        processor(flags)
        assert choose(name, level, CPU) == (row, reason)


@pytest.mark.parametrize(("flags", "native", "reason"), [
    ("amx_bf16 amx_tile", True, "CPU with amx_bf16"), ("avx512_bf16 amx_fp16", True, "CPU with avx512_bf16"),
    ("avx512_fp16", False, "CPU without amx_bf16 or avx512_bf16"), (None, False, "CPU without amx_bf16 or avx512_bf16")])
def test_auto_on_a_cpu(processor, flags, native, reason):
    processor(flags)
    assert choose("auto", "O2", CPU) == (BF16 if native else FP32, reason) and native_support(BRAIN, CPU)[0] == native
    assert native_support(HALF, CPU)[0] == ("fp16" in (flags or ""))


@pytest.mark.parametrize(("capability", "half", "native", "words"), [
    ((6, 1), False, False, "below 8.0"), ((7, 5), True, False, "below 8.0"), ((8, 0), True, True, "compute capability 8.0"),
    ((10, 3), True, True, "compute capability 10.3")])
def test_auto_on_a_gpu(gpu, capability, half, native, words):
    device = gpu(*capability)
    chosen, reason = choose("auto", "O2", device)
    assert chosen is (BF16 if native else FP32) and words in reason and "Model X" in reason
    assert (native_support(HALF, device)[0], native_support(BRAIN, device)[0]) == (half, native)


@pytest.mark.parametrize(("name", "level", "row", "reason"), [
    ("auto", "O2", FP32, "Apple GPU; --precision fp16 and bf16 are not tested here"), ("fp32", "O2", FP32, "requested"),
    ("tf32", "O2", FP32, "tf32 was requested, which Apple GPUs do not have"),
    ("bf16", "O2", BF16, "requested; not tested on Apple GPUs"),
    ("fp16", "O1", LEVELS["O1"], "requested; not tested on Apple GPUs"),
    ("fp16", "O3", LEVELS["O3"], "requested; not tested on Apple GPUs; may diverge: compare with O1")])
def test_precision_on_an_apple_gpu(name, level, row, reason):
    assert choose(name, level, torch.device("mps")) == (row, reason)
    assert row.autocast(torch.device("mps")).__class__ is (torch.autocast if row.compute != row.weights else nullcontext)


# ----------------------------------------------------------------------------------------------- loss scaler


class Toy:
    """One weight with a given gradient, which the loss scale multiplies."""

    def __init__(self, row=LEVELS["O1"], fixed=0.0):
        self.weight = nn.Parameter(torch.zeros(1))
        self.optimizer = build_optimizer("sgd", [self.weight], 1.0, momentum=0.0)
        self.scaler = LossScaler(row, CPU, fixed)

    def step(self, gradient: float) -> float:
        """Return by how much the weight decreases."""
        before = self.weight.item()
        self.optimizer.zero_grad()
        self.scaler.backward((self.weight * gradient).sum())
        self.scaled = self.weight.grad.item()
        norm = self.weight.grad.abs().sum()
        update(self.optimizer, norm, ~norm.isfinite(), self.scaler.scale, 0.0)
        self.scaler.update(~norm.isfinite())
        return before - self.weight.item()


def test_the_dynamic_scale_is_that_of_torch_s_grad_scaler(monkeypatch):
    """It halves after an overflow, which changes nothing else, and doubles after a while."""
    assert precision.GROWTH_INTERVAL == 2000 and INITIAL_SCALE == 65536
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 3)
    toy, theirs = Toy(), torch.amp.GradScaler("cpu", init_scale=INITIAL_SCALE, growth_interval=3)
    weight, scales = nn.Parameter(torch.zeros(1)), []
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for gradient in (1, 2, 3, float("inf"), 1, float("nan"), *range(1, 12), float("inf"), 0.25):
        toy.step(gradient)
        optimizer.zero_grad()
        theirs.scale((weight * gradient).sum()).backward()
        theirs.step(optimizer)
        theirs.update()
        scales.append(toy.scaler.scale / INITIAL_SCALE)
        assert toy.scaler.scale == theirs.get_scale() and toy.weight.item() == weight.item()
    assert scales[:9] == [1, 1, 2, 1, 1, 0.5, 0.5, 0.5, 1] and toy.scaled == 0.25 * toy.scaler.scale
    assert toy.scaler.state_dict() == theirs.state_dict()
    other = LossScaler(LEVELS["O1"], CPU)
    other.load_state_dict(theirs.state_dict())                    # from old runs, which used GradScaler
    assert other.scale == theirs.get_scale()


def test_the_scaler_is_off_where_the_loss_is_not_scaled():
    toy = Toy(BF16)
    assert toy.scaler.state_dict() == {} and toy.step(1) == 1 and toy.scaled == 1
    toy.scaler.load_state_dict({})


@pytest.mark.parametrize("fixed", [0.0, 128.0])
def test_state_survives_a_round_trip(monkeypatch, fixed):
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 3)
    toy, again = Toy(fixed=fixed), Toy(fixed=fixed)
    assert toy.scaler.state_dict()["scale"] == (fixed or INITIAL_SCALE) and toy.scaler.state_dict()["_growth_tracker"] == 0
    for gradient in (1, float("inf"), 1, 1):
        scale = toy.scaler.scale.item()
        assert toy.step(gradient) == (0 if gradient == float("inf") else gradient) and toy.scaled == gradient * scale
    again.scaler.load_state_dict(toy.scaler.state_dict())
    assert again.scaler.scale == toy.scaler.scale == (fixed or 32768)
    again.step(1)                                                 # the third good step in a row: time to grow
    assert again.scaler.scale == (fixed or 65536)
