"""The table of precisions, the choice, and the loss scaler."""

import pytest
import torch
from torch import nn

from utils.training import precision
from utils.training.optimizer import build_optimizer, update
from utils.training.precision import BF16, FP32, INITIAL_SCALE, LEVELS, LossScaler, choose, has_units_for

CPU = torch.device("cpu")
HALF, FULL, BRAIN = torch.float16, torch.float32, torch.bfloat16


@pytest.mark.parametrize(("row", "compute", "weights", "scales_loss", "half_gradients"), [
    (LEVELS["O0"], FULL, FULL, False, False),
    (LEVELS["O1"], HALF, FULL, True, False),
    (LEVELS["O2"], HALF, FULL, True, True),
    (LEVELS["O3"], HALF, HALF, False, False),
    (FP32, FULL, FULL, False, False),
    (BF16, BRAIN, FULL, False, False)], ids=[*LEVELS, "fp32", "bf16"])
def test_table(row, compute, weights, scales_loss, half_gradients):
    assert (row.compute, row.weights, row.scales_loss, row.half_gradients) == (compute, weights, scales_loss, half_gradients)


@pytest.mark.parametrize(("row", "product"), [
    (LEVELS["O0"], FULL), (LEVELS["O1"], HALF), (LEVELS["O2"], HALF), (LEVELS["O3"], HALF), (FP32, FULL), (BF16, BRAIN)],
    ids=[*LEVELS, "fp32", "bf16"])
def test_products_are_really_computed_in_the_type(row, product):
    layer, x = nn.Linear(8, 8).to(row.weights), torch.randn(2, 8, dtype=row.weights)
    with row.autocast(CPU):
        y = layer(x)
    assert y.dtype == product and layer.weight.dtype == row.weights
    y.float().sum().backward()
    assert layer.weight.grad.dtype == row.weights


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """processor("avx2 amx_bf16"): what /proc/cpuinfo says; None: there is no such file"""
    def pretend(flags):
        if flags is not None:
            (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags}\n")
        places = {"/proc/cpuinfo": tmp_path / "cpuinfo"}
        monkeypatch.setattr(precision, "Path", places.__getitem__)

    return pretend


@pytest.fixture
def gpu(monkeypatch):
    """gpu(8, 0): a GPU of this compute capability"""
    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Model X")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


EMULATED = "asked for; this processor only emulates it: slower than fp32"


@pytest.mark.parametrize(("asked", "level", "row", "without_units", "with_units"), [
    ("fp32", "O2", FP32, "asked for", "asked for"),
    ("bf16", "O2", BF16, EMULATED, "asked for"),
    ("fp16", "O0", LEVELS["O0"], "asked for", "asked for"),
    ("fp16", "O1", LEVELS["O1"], EMULATED, "asked for"),
    ("fp16", "O2", LEVELS["O2"], EMULATED, "asked for"),
    ("fp16", "O3", LEVELS["O3"], f"{EMULATED}; may diverge: compare with O1", "asked for; may diverge: compare with O1")],
    ids=["fp32", "bf16", *LEVELS])
def test_what_is_asked_for_is_chosen(processor, asked, level, row, without_units, with_units):
    for flags, why in (("avx2", without_units), ("amx_bf16 avx512_fp16", with_units)):
        processor(flags)
        chosen, told = choose(asked, level, CPU)
        assert chosen is row and told == why


@pytest.mark.parametrize(("flags", "row", "why"), [
    ("avx512f amx_bf16 amx_tile", BF16, "CPU with amx_bf16"), ("avx512f avx512_bf16", BF16, "CPU with avx512_bf16"),
    ("avx512f", FP32, "CPU without amx_bf16 or avx512_bf16"), (None, FP32, "CPU without amx_bf16 or avx512_bf16")])
def test_auto_on_a_cpu(processor, flags, row, why):
    processor(flags)
    assert choose("auto", "O2", CPU) == (row, why)


@pytest.mark.parametrize(("capability", "row", "words"), [
    ((7, 5), FP32, "below 8.0"), ((8, 0), BF16, "compute capability 8.0"), ((9, 0), BF16, "compute capability 9.0"),
    ((10, 3), BF16, "compute capability 10.3")])
def test_auto_on_a_gpu(gpu, capability, row, words):
    gpu(*capability)
    chosen, why = choose("auto", "O2", torch.device("cuda", 0))
    assert chosen is row and words in why and "Model X" in why


@pytest.mark.parametrize(("capability", "half", "brain"), [((6, 1), False, False), ((7, 0), True, False), ((8, 0), True, True)])
def test_units_of_a_gpu(gpu, capability, half, brain):
    gpu(*capability)
    device = torch.device("cuda", 0)
    assert (has_units_for(HALF, device)[0], has_units_for(BRAIN, device)[0]) == (half, brain)


@pytest.mark.parametrize(("flags", "half", "brain"), [
    ("avx512f", False, False), ("amx_bf16", False, True), ("avx512_fp16", True, False), ("amx_fp16 amx_bf16", True, True)])
def test_units_of_a_cpu(processor, flags, half, brain):
    processor(flags)
    assert (has_units_for(HALF, CPU)[0], has_units_for(BRAIN, CPU)[0]) == (half, brain)


# ----------------------------------------------------------------------------------------------- loss scaler


class Toy:
    """One weight; the gradient of `go` is what is asked for, times the scale."""

    def __init__(self, row=LEVELS["O1"], fixed=0.0):
        self.weight = nn.Parameter(torch.zeros(1))
        self.optimizer = build_optimizer("sgd", [self.weight], 1.0, momentum=0.0)
        self.scaler = LossScaler(row, CPU, fixed)

    def go(self, gradient: float) -> float:
        """-> by how much the weight falls"""
        before = self.weight.item()
        self.optimizer.zero_grad()
        self.scaler.backward((self.weight * gradient).sum())
        self.scaled = self.weight.grad.item()
        norm = self.weight.grad.abs().sum()
        update(self.optimizer, norm, ~norm.isfinite(), self.scaler.scale, 0.0)
        self.scaler.update(~norm.isfinite())
        return before - self.weight.item()


def test_dynamic_scale_halves_after_an_overflow_and_grows_after_a_while(monkeypatch):
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 3)
    toy = Toy()
    assert toy.scaler.enabled and toy.scaler.scale == INITIAL_SCALE == 65536
    scales = []
    for gradient in (1, 1, 1, float("inf"), 1, float("nan"), 1, 1, 1, 1):
        toy.go(gradient)
        scales.append(toy.scaler.scale / INITIAL_SCALE)
    assert scales == [1, 1, 2, 1, 1, 0.5, 0.5, 0.5, 1, 1]
    assert toy.weight.item() == -8                                # the two overflows changed nothing


def test_gradients_are_scaled_and_unscaled():
    toy = Toy()
    assert toy.go(0.25) == 0.25 and toy.scaled == 0.25 * 65536


def test_growth_interval_is_2000_steps():
    assert precision.GROWTH_INTERVAL == 2000
    assert Toy().scaler.state_dict()["growth_interval"] == 2000


def test_dynamic_scale_is_that_of_torch_s_grad_scaler(monkeypatch):
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 3)
    toy, theirs = Toy(), torch.amp.GradScaler("cpu", init_scale=INITIAL_SCALE, growth_interval=3)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for gradient in (1, 2, 3, float("inf"), 1, float("nan"), *range(1, 12), float("inf"), 5):
        toy.go(gradient)
        optimizer.zero_grad()
        theirs.scale((weight * gradient).sum()).backward()
        theirs.step(optimizer)
        theirs.update()
        assert toy.scaler.scale == theirs.get_scale() and toy.weight.item() == weight.item()
    assert toy.scaler.state_dict() == theirs.state_dict()
    other = LossScaler(LEVELS["O1"], CPU)
    other.load_state_dict(theirs.state_dict())                    # of runs saved before the scaler was our own
    assert other.scale == theirs.get_scale()


def test_fixed_scale_stays():
    toy = Toy(fixed=128.0)
    assert toy.go(1) == 1 and toy.scaled == 128
    toy.go(float("inf"))
    assert toy.scaler.scale == 128 and toy.weight.item() == -1
    assert toy.go(2) == 2 and toy.scaled == 256 and toy.scaler.scale == 128 and toy.weight.item() == -3


@pytest.mark.parametrize("row", [FP32, BF16, LEVELS["O0"], LEVELS["O3"]], ids=lambda row: row.name)
def test_off_where_the_loss_is_not_scaled(row):
    toy = Toy(row)
    assert not toy.scaler.enabled and toy.scaler.state_dict() == {}
    assert toy.go(1) == 1 and toy.scaled == 1 and toy.weight.item() == -1
    toy.scaler.load_state_dict({})


@pytest.mark.parametrize("fixed", [0.0, 128.0])
def test_state_survives_a_round_trip(monkeypatch, fixed):
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 3)
    gradients = (1, float("inf"), 1, 1)
    toy, again = Toy(fixed=fixed), Toy(fixed=fixed)
    for gradient in gradients:
        toy.go(gradient)
    again.scaler.load_state_dict(toy.scaler.state_dict())
    assert again.scaler.scale == toy.scaler.scale == (fixed or 32768)
    again.go(1)                                                   # the third good step in a row: time to grow
    assert again.scaler.scale == (fixed or 65536)


def test_state_before_the_first_step_is_complete():
    state = LossScaler(LEVELS["O1"], CPU).state_dict()
    assert state["scale"] == INITIAL_SCALE and state["_growth_tracker"] == 0
