"""Which device a process uses, copies to it, and its memory.

Apple GPUs ("mps" in PyTorch, only by --device mps) have no float64, and PyTorch's asynchronous copies to and from them may read
memory that has been freed (pytorch/pytorch issues 139550 and 189690): sums in float64 are made on the CPU, and copies wait.
"""

import contextlib
import ctypes
import os
import re
from pathlib import Path

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3      # malloc.h
# What CUDA_VISIBLE_DEVICES names: a number, or (the beginning of) an identifier. Slurm writes NoDevFiles if there is no GPU.
NAMES_GPUS = re.compile(r"\d|GPU-|MIG-")
LARGEST = 2 ** 31 - 1                            # mallopt takes an int
LARGEST_BEFORE = 32 << 20                        # limit of M_MMAP_THRESHOLD before glibc 2.35

# What to do when memory is used up, by what needed it.
SMALLER_STEP = ("lower --train_batch_size, or raise --gradient_accumulation_steps (GRAD_STEPS) to compute the same steps in "
                "smaller pieces")
SMALLER_EVALUATION = "lower --eval_batch_size"
SMALLER_MODEL = ("what a run needs with any batch size (model, start weights, data) does not fit. Choose a smaller "
                 "--model_type or --img_size, or stop other programs that use this memory")
SMALLER_SAVE = ("a checkpoint is copied before it is written, and the copy does not fit. Choose a smaller --model_type, or stop "
                "other programs that use this memory")


class DeviceError(ValueError):
    """Raised when the requested device is not available."""

    exit_code = 2


class OutOfMemory(ValueError):
    """Raised when the memory of the device or the machine is used up."""

    exit_code = 6


def choose_device(name: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """Return the device of process `local_rank` of the `local_size` processes of this machine. name: auto, cpu, cuda or mps.

    auto: a GPU of CUDA or ROCm where there is one, otherwise the CPU. Raises DeviceError if the requested device is not
    available to this process.
    """
    if name == "mps":
        return _apple_gpu(local_size)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    why = "" if torch.version.cuda or torch.version.hip else (f" (this PyTorch, {torch.__version__}, is built for CPUs only; if "
                                                              "train.sh made .venv, remove that folder and start train.sh again)")
    if name == "cuda" and not gpus:
        raise DeviceError(f"--device cuda: PyTorch finds no GPU here{why}. Check nvidia-smi and torch.cuda.is_available()")
    if name == "auto" and not gpus and NAMES_GPUS.match(visible):
        raise DeviceError(f"GPUS={visible} (CUDA_VISIBLE_DEVICES): PyTorch finds no GPU here{why}. To train on the CPU, set "
                          "GPUS=cpu")
    if not gpus or name == "cpu":
        return torch.device("cpu")
    if local_size > gpus:
        of_them = f"PyTorch finds {gpus} GPU{'s' * (gpus != 1)}" + (visible and f" (CUDA_VISIBLE_DEVICES={visible})")
        raise DeviceError(f"NPROC: {local_size} processes on this node, but {of_them}. Set NPROC={gpus}, or set GPUS to devices "
                          "that nvidia-smi -L lists")
    return torch.device("cuda", local_rank)


def _apple_gpu(local_size: int) -> torch.device:
    """Raise DeviceError."""
    if not torch.backends.mps.is_available():
        why = "macOS is too old for it, or this Mac has none" if torch.backends.mps.is_built() else (
            f"this PyTorch, {torch.__version__}, is built without MPS, which only macOS has")
        raise DeviceError(f"--device mps: PyTorch finds no Apple GPU here ({why}). Omit --device to use another device")
    if local_size > 1:
        raise DeviceError(f"--device mps: one process uses the Apple GPU, and there are {local_size}. Set NPROC=1, or --nproc 1")
    return torch.device("mps")


def describe_device(device: torch.device) -> str:
    """Return the device's name for the log."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU (MPS; not tested by this project)"
    threads = torch.get_num_threads()
    hint = " (--device mps uses the Apple GPU instead; not tested by this project)" * torch.backends.mps.is_available()
    return f"CPU with {threads} thread{'s' * (threads > 1)}{hint}"


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to the device. The host does not wait for a CUDA device, as it would if the memory were not
    pinned."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def batch_on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of a batch, which the loader has pinned for CUDA, to the device."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def float64_device(device: torch.device) -> torch.device:
    """Return the device that computes in float64 for what `device` has computed: itself, or the CPU for an Apple GPU."""
    return torch.device("cpu") if device.type == "mps" else device


def as_float64(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, on its `float64_device`."""
    return tensor.to(float64_device(tensor.device)).double()


def keep_memory() -> bool:
    """Make glibc's malloc keep the memory that it gets from the system, in this process and those that it forks.

    By default malloc maps each large block separately and returns it when it is freed: each training step on a CPU then waits
    for the kernel to clear tens of thousands of pages. What is kept is at most what the process has used at once, plus gaps
    between blocks. GPUs have PyTorch's caching allocator. Returns whether the C library can do this.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):     # macOS, musl, Windows
        return False
    mapped = mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_THRESHOLD, LARGEST_BEFORE)
    return bool(mallopt(M_TRIM_THRESHOLD, LARGEST) and mapped)


def core_count() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory(device: torch.device, local_size: int = 1) -> int:
    """Return the bytes that a process may plan with: a CUDA device's, otherwise its part of the machine's or the container's; 0:
    not known. An Apple GPU uses the machine's memory.

    What other programs use at the moment is not subtracted: a run's results must not depend on its neighbors.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):     # Windows
        return 0
    return min([machine, *_container_limits()]) // local_size


def _container_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Return the memory limits of the control groups (versions 1 and 2) that this process is in."""
    limits = []
    with contextlib.suppress(OSError):
        for line in own.read_text(encoding="utf-8", errors="replace").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                top, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
                folder = top / path.lstrip("/")
                for place in [folder, *folder.parents]:       # in a container the path may be the host's: then the top counts
                    with contextlib.suppress(OSError, ValueError):                        # no limit: "max"
                        limits.append(int((place / name).read_text(encoding="utf-8")))
                    if place == top:
                        break
    return limits


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means that the memory of the GPU or, if the system reports that, of the machine is used up."""
    # Plain RuntimeErrors: of the CPU's allocator ("DefaultCPUAllocator: can't allocate memory" or "not enough memory"), of MPS,
    # and of CUDA and its libraries, when other programs have filled the GPU and their tables do not fit.
    words = (r"can't allocate memory|not enough memory|CUDA error: out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
             r"|MPS backend out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and re.search(words, str(error)) is not None)


def out_of_memory_error(device: torch.device, where: str, remedy: str = SMALLER_STEP) -> OutOfMemory:
    """Return the error to raise, with the peak on a CUDA device. where: such as "step 13"; remedy: one of the above."""
    figures = ""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):             # CUDA itself did not fit
            sizes = [torch.cuda.max_memory_allocated(device), *torch.cuda.mem_get_info(device)]
            peak, free, total = (size / 2 ** 30 for size in sizes)
            figures = f" of the GPU ({peak:.1f} GiB in use at the peak, {free:.1f} of {total:.1f} GiB free now)"
    return OutOfMemory(f"{where}: out of memory{figures}; {remedy}")
