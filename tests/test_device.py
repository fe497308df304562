"""The choice of a device, copies to it, and its memory."""

import os
import re
import subprocess
import sys

import pytest
import torch

from utils import device as devices
from utils import distributed
from utils.device import (
    DeviceError,
    OutOfMemory,
    as_float64,
    batch_on_device,
    choose_device,
    describe_device,
    float64_device,
    is_out_of_memory,
    on_device,
    out_of_memory_error,
    total_memory,
)
from utils.distributed import ranks

CPU, MPS = torch.device("cpu"), torch.device("mps")
STEPS = """
import resource, sys
from utils import device
if sys.argv[1] == "keep" and not device.keep_memory():
    sys.exit("the C library cannot")

def step():
    blocks = [b"x" * (number << 24) for number in range(1, 5)]          # more than glibc keeps by itself

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(("name", "visible", "words"), [
    ("cuda", None, "--device cuda"), ("cuda", "0", "--device cuda"), ("auto", "1,2", "GPUS=1,2 .CUDA_VISIBLE_DEVICES.: "),
    ("auto", "GPU-8932f937", "GPUS=GPU-8932f937 "), ("auto", "MIG-GPU-8932f937/1/0", "GPUS=MIG-GPU-8932f937/1/0 ")])
def test_missing_gpu_is_reported(monkeypatch, no_gpu, name, visible, words):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(DeviceError, match=words) as caught:
        choose_device(name)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_cpu_is_chosen_if_no_gpu_is_requested(monkeypatch, no_gpu):
    assert choose_device("auto") == CPU
    for name, visible in (("auto", ""), ("auto", "-1"), ("auto", "NoDevFiles"), ("cpu", "0")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert choose_device(name) == CPU


def test_each_process_gets_its_gpu(monkeypatch, no_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1, 2) == torch.device("cuda", 1) and choose_device("cuda") == torch.device("cuda", 0)
    assert choose_device("cpu") == CPU
    with pytest.raises(DeviceError, match=r"3 processes on this node, but PyTorch finds 2 GPUs\. Set"):
        choose_device("auto", 0, 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,7")
    with pytest.raises(DeviceError, match=r"PyTorch finds 2 GPUs \(CUDA_VISIBLE_DEVICES=0,1,7\)"):
        choose_device("auto", 0, 3)


def test_pytorch_for_cpus_only_is_reported(monkeypatch, no_gpu):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for name in ("auto", "cuda"):
        with pytest.raises(DeviceError, match="is built for CPUs only"):
            choose_device(name)


@pytest.fixture
def apple(monkeypatch, no_gpu):
    """apple(built, available): what PyTorch says of Apple's GPU"""
    def pretend(built: bool, available: bool) -> None:
        monkeypatch.setattr(torch.backends.mps, "is_built", lambda: built)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available)

    return pretend


@pytest.mark.parametrize(("built", "words"), [(False, "is built without MPS, which only macOS has"), (True, "macOS is too old")])
def test_missing_apple_gpu_is_reported(apple, built, words):
    apple(built, False)
    with pytest.raises(DeviceError, match=rf"^--device mps: PyTorch finds no Apple GPU here .*{words}.*Omit --device") as caught:
        choose_device("mps")
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_apple_gpu_is_used_only_on_request_and_by_one_process(apple):
    apple(True, True)
    assert choose_device("auto") == choose_device("cpu") == CPU and choose_device("mps") == MPS
    with pytest.raises(DeviceError, match=r"one process uses the Apple GPU, and there are 2\. Set NPROC=1"):
        choose_device("mps", 1, 2)
    assert "not tested" in describe_device(MPS) and "--device mps uses the Apple GPU instead" in describe_device(CPU)
    apple(False, False)
    assert re.fullmatch("CPU with [0-9]+ threads?", describe_device(CPU))


def test_apple_gpu_gets_no_float64_and_no_copy_that_does_not_wait():
    class Recorder:
        device, moves = MPS, []

        def to(self, *arguments, **keywords):
            self.moves.append((arguments, keywords))
            return torch.ones(2, dtype=torch.float16)

    number = Recorder()
    assert as_float64(number).dtype == torch.float64 and number.moves == [((CPU,), {})]
    batch_on_device(number, MPS)
    batch_on_device(number, torch.device("cuda", 0))
    on_device(number, MPS)
    assert number.moves[1:] == [((MPS,), {"non_blocking": False}), ((torch.device("cuda", 0),), {"non_blocking": True}),
                                ((MPS,), {})]
    assert float64_device(CPU) == float64_device(MPS) == CPU and float64_device(torch.device("cuda", 1)).index == 1
    assert total_memory(MPS) == total_memory(CPU)


def test_the_cores_of_a_process(monkeypatch):
    """Those it may use; all, if the system does not report them."""
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert devices.core_count() == 3
    monkeypatch.delattr(devices.os, "sched_getaffinity")
    monkeypatch.setattr(devices.os, "cpu_count", lambda: None)
    assert devices.core_count() == 1


def test_tensor_is_copied():
    tensor = torch.arange(5)
    assert on_device(tensor, CPU) is tensor
    assert on_device(tensor, torch.device("meta")).is_meta


@pytest.mark.gpu
def test_host_does_not_wait_for_the_gpu():
    device, load = torch.device("cuda"), torch.zeros(8192, 8192, device="cuda")
    on_device(torch.arange(5), device)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    for _ in range(50):
        load = load @ load
    done.record()
    there = on_device(torch.arange(5), device)
    assert not done.query()                             # the copy is queued, and the products are still being computed
    assert there.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_is_kept_for_the_next_step():
    """In other processes, because the setting is permanent."""
    faults = {}
    for mode in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", STEPS, mode], capture_output=True, text=True, check=False)
        if "cannot" in done.stderr:
            pytest.skip("not glibc")
        assert done.returncode == 0, done.stderr
        faults[mode] = int(done.stdout)
    assert faults["keep"] < 100 < faults["leave"], faults


def test_other_c_libraries_are_not_changed(monkeypatch):
    for error in (OSError, TypeError):
        monkeypatch.setattr(devices.ctypes, "CDLL", lambda name, error=error: (_ for _ in ()).throw(error()))
        assert not devices.keep_memory()


@pytest.mark.parametrize(("error", "expected"), [
    (torch.OutOfMemoryError("CUDA out of memory"), True), (MemoryError(), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("[...] not enough memory: you tried to allocate 9 bytes"), True), (RuntimeError("Connection closed"), False),
    (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("MPS backend out of memory (MPS allocated: 2.44 GB, max allowed: 6.77 GB). Tried to allocate 10 MB"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    (ValueError("can't allocate memory"), False)])
def test_out_of_memory_is_recognized(error, expected):
    assert is_out_of_memory(error) == expected


def test_out_of_memory_error_has_the_peak_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 70 * 2 ** 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 ** 29, 80 * 2 ** 30))
    error = out_of_memory_error(torch.device("cuda", 0), "step 2")
    assert isinstance(error, OutOfMemory) and error.exit_code == 6
    assert "step 2: out of memory of the GPU (70.0 GiB in use at the peak, 0.5 of 80.0 GiB free now); lower" in str(error)


def test_gpu_without_room_for_cuda_is_reported(monkeypatch):
    """Other programs have filled it, so there are no figures, and no batch to make smaller."""
    def fail(device):
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    monkeypatch.setattr(torch.cuda, "set_device", fail)
    monkeypatch.setattr(ranks, "choose_device", lambda *_: torch.device("cuda", 0))
    with pytest.raises(OutOfMemory, match=r"^setting up: out of memory; what a run needs [^-]*--model_type or --img_size"), \
            distributed.init("cuda"):
        pass


def test_total_memory_is_that_of_the_machine_or_its_container(tmp_path, monkeypatch):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < devices.total_memory(CPU) <= machine
    assert devices.total_memory(CPU, 4) == devices.total_memory(CPU) // 4
    own, second, first = tmp_path / "cgroup", tmp_path / "jobs/one", tmp_path / "memory/job"
    for folder in (second, first):
        folder.mkdir(parents=True)
    own.write_text("4:memory:/job\n3:cpu:/other\n0::/jobs/one/inside\n")
    assert devices._container_limits(tmp_path, own) == []
    (second / "memory.max").write_text("max\n")
    (tmp_path / "jobs/memory.max").write_text("3000\n")
    (first / "memory.limit_in_bytes").write_text("2000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert sorted(devices._container_limits(tmp_path, own)) == [2000, 3000, 5000]
    assert devices._container_limits(tmp_path, tmp_path / "absent") == []
    monkeypatch.setattr(devices, "_container_limits", lambda: [1 << 30])
    assert devices.total_memory(CPU, 2) == 1 << 29
