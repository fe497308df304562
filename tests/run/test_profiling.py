"""Speed and memory of a run compared with formulas, and the profile of some steps."""

import gzip
import json
import os

import pytest
import torch
from torch import nn

from models import create_model
from utils.run import profiling
from utils.run.profiling import MEASURED_FROM, Pace, Profile, flops_per_image, pace, pace_of_session, summary

CPU = torch.device("cpu")


def step(number: int, rate: float = 100.0, seconds: float = 2.0, wait: float = 0.25) -> dict:
    return {"event": "train", "step": number, "images_per_second": rate, "seconds": seconds, "data_wait": wait}


# ------------------------------------------------------------------------------------------------------------- pace


def test_pace_weights_steps_by_their_time():
    found = pace([step(1, 100.0, 1.0, 0.5), step(2, 10.0, 3.0, 0.0), {"event": "eval"}])
    assert (found.images, found.seconds, found.waiting) == (130.0, 4.0, 0.125) and found.images_per_second == 32.5
    assert str(found) == "32 images/s, 12% waiting for data" and str(Pace(100, 1, 0.04)) == "100 images/s"
    assert pace([]) is None and pace([{"event": "train", "step": 1, "images_per_second": 9.0}]) is None     # from an older log


def test_only_the_last_session_counts_and_not_its_first_steps():
    slow = [step(number, 1.0) for number in range(1, 9)]
    warming = [step(number, 1.0) for number in range(9, 12)]
    events = [{"event": "start"}, *slow, {"event": "resume"}, *warming, step(12), step(13), {"event": "eval"}, step(14)]
    assert pace_of_session(events).images_per_second == 100.0
    short = [{"event": "start"}, *slow, {"event": "resume"}, step(9, 10.0), step(10, 30.0)]
    assert pace_of_session(short).images_per_second == 20.0        # too few to leave any out
    assert pace_of_session([{"event": "start"}]) is None


# ------------------------------------------------------------------------------------------------------------ FLOPs


def of_vit(tokens: int, width: int, depth: int, classes: int, patch: int, trained: bool = True) -> int:
    """Return 2 x multiply-adds of qkv, output and MLP (12 D^2 a token), both products of attention, patches and head. The
    backward pass costs twice as much, except for patches, whose input needs no gradient."""
    blocks = depth * (2 * tokens * 12 * width ** 2 + 4 * tokens ** 2 * width)
    head, patches = 2 * width * classes, 2 * (tokens - 1) * width * 3 * patch ** 2
    return 3 * (blocks + head) + 2 * patches if trained else blocks + patches + 2 * head


@pytest.mark.parametrize("trained", [True, False], ids=["all", "only head"])
def test_flops_of_a_step_follow_the_formula(trained):
    model = create_model("ViT-Ti_16", 10, 64, num_layers=2)
    model.requires_grad_(trained)
    model.head.requires_grad_(True)
    assert flops_per_image(model, (3, 64, 64)) == of_vit(17, 192, 2, 10, 16, trained)
    assert next(model.parameters()).device == CPU and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["DeiT-Ti_16-distilled", "CaiT-XXS24", "R-ViT-Ti_16"])
def test_flops_of_other_families(name):
    """More than with as many plain blocks. A distilled student uses two heads in training, and both count."""
    model = create_model(name, 10, 64, num_layers=2)
    found, least = flops_per_image(model, (3, 64, 64)), of_vit(5, 192, 2, 10, 16)
    assert found > least
    if name.startswith("DeiT"):
        model.distilling = True
        assert flops_per_image(model, (3, 64, 64)) == found


def test_counting_flops_does_not_change_the_model():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 36, 3)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    # The convolution's own input needs no gradient.
    assert flops_per_image(model, (1, 8, 8)) == 2 * (2 * 36 * 4 * 9) + 3 * (2 * 4 * 36 * 3)
    assert not model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert flops_per_image(model.requires_grad_(False), (1, 8, 8)) == 2 * 36 * 4 * 9 + 2 * 4 * 36 * 3


# ---------------------------------------------------------------------------------------------------------- machine


def test_the_rate_of_the_machine_is_plausible(monkeypatch):
    monkeypatch.setitem(profiling.SIDE, "cpu", 256)
    monkeypatch.setattr(profiling, "CEILING_SECONDS", 0.02)
    assert 1e8 < profiling.matmul_ceiling(CPU, torch.float32) < 1e14


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset")
def test_peak_memory_counts_freed_memory(memory_below):
    with memory_below(1 << 40):                 # resets the peak
        before = profiling.peak_memory(CPU)
        block = torch.ones(100_000_000)
        del block
        assert profiling.peak_memory(CPU) > before + 350_000_000
        assert before > 1 << 20


GPU, MEMORY = torch.device("cuda"), "peak memory 1,412 MiB"


@pytest.mark.parametrize(("device", "processes", "lines"), [
    (CPU, 2, [f"2,500 images/s; 1.2% of the time waiting for data; {MEMORY} a process"]),
    (GPU, 1, [f"2,500 images/s; 1.2% of the time waiting for data; {MEMORY}",
              "20% of the rate that this GPU reaches in large bf16 matrix products (50 GFLOP/s, measured)"]),
    (GPU, 2, [f"2,500 images/s; 1.2% of the time waiting for data; {MEMORY} a process",
              "10% of the rate that these 2 GPUs reach in large bf16 matrix products (100 GFLOP/s, measured)"])])
def test_the_limit_of_the_machine_is_printed_on_gpus_only(monkeypatch, device, processes, lines):
    """On a CPU it would mean nothing, because it depends on the other programs that run there."""
    monkeypatch.setattr(profiling, "matmul_ceiling", lambda *_: 50e9)
    monkeypatch.setattr(profiling, "peak_memory", lambda _: 1412 * 2 ** 20)
    model = nn.Linear(1000, 1000, bias=False)                     # 4 MFLOP an image: its input needs no gradient
    events = [{"event": "start"}, *(step(number, 2500.0, 4.0, 0.012) for number in range(1, 20))]
    assert summary(events, model, (1000,), torch.bfloat16, device, processes) == lines
    brief = [{"event": "start"}, step(1, 7.25, MEASURED_FROM / 2, 0.0)]
    assert summary(brief, model, (1000,), torch.bfloat16, device) == [
        f"7.2 images/s; 0.0% of the time waiting for data; {MEMORY}"]
    assert summary([{"event": "start"}], model, (1000,), torch.float32, device) == []


# ---------------------------------------------------------------------------------------------------------- profile


def profiled(folder, count: int) -> list[str]:
    lines, layer = [], nn.Linear(8, 8)
    profile = Profile(folder, CPU, lines.append, first=3, steps=2)
    for _ in range(count):
        layer(torch.randn(4, 8)).sum().backward()
        profile.step()
    profile.close()
    profile.close()
    return lines


@pytest.mark.parametrize(("count", "last"), [(9, 4), (4, 4), (3, 3)])
def test_a_profile_of_some_steps_is_written(tmp_path, count, last, capfd):
    lines = profiled(tmp_path, count)
    assert len(lines) == 1 and lines[0].startswith(f"profile of steps 3 to {last} of this session: {tmp_path / 'trace.json.gz'}")
    with gzip.open(tmp_path / "trace.json.gz") as stream:
        names = {event["name"] for event in json.load(stream)["traceEvents"]}
    steps = {name for name in names if name.startswith("ProfilerStep")}                # from 0
    begun = {f"ProfilerStep#{last}"} if count < 4 else set()                           # started but not finished
    assert steps == {f"ProfilerStep#{number}" for number in range(2, last)} | begun
    assert "aten::linear" in names
    assert "aten::" in (tmp_path / "profile.txt").read_text() and len((tmp_path / "profile.txt").read_text().splitlines()) < 40
    assert capfd.readouterr() == ("", "")


def test_a_session_too_short_for_a_profile_is_reported(tmp_path):
    assert profiled(tmp_path, 2) == ["profile: nothing to write, the session ended before its step 3"]
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "trace.json.gz").mkdir()
    for folder in (tmp_path / "gone", tmp_path):
        lines = profiled(folder, 6)
        assert len(lines) == 1 and "\n" not in lines[0]
        assert lines[0].startswith(f"warning: the profile cannot be written to {folder} (")
