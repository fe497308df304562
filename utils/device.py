"""Which device a process works on, copies to it, and its memory."""

import contextlib
import ctypes
import os
import re
from pathlib import Path

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3      # malloc.h
# What CUDA_VISIBLE_DEVICES names: a number, or (the beginning of) an identifier. Slurm writes NoDevFiles where there is none.
NAMES_GPUS = re.compile(r"\d|GPU-|MIG-")
LARGEST = 2 ** 31 - 1                            # mallopt takes an int
LARGEST_BEFORE = 32 << 20                        # of M_MMAP_THRESHOLD, before glibc 2.35

# What to do when memory is used up, by what needed it.
SMALLER_STEP = "lower --train_batch_size, or raise --gradient_accumulation_steps (GRAD_STEPS): the same steps in smaller pieces"
SMALLER_EVALUATION = "lower --eval_batch_size"
SMALLER_MODEL = ("what a run holds whatever its batch is (model, start weights, data) does not fit. Choose a smaller "
                 "--model_type or --img_size, or end what else uses this memory")
SMALLER_SAVE = ("a checkpoint is copied before it is written, and the copy does not fit. Choose a smaller --model_type, or end "
                "what else uses this memory")


class DeviceError(ValueError):
    """Raised when the requested device is not available."""

    exit_code = 2


class OutOfMemory(ValueError):
    """Raised when the memory of the device or the machine is used up."""

    exit_code = 6


def choose_device(name: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """The device of process `local_rank` of the `local_size` processes of this machine. name: auto, cpu or cuda.

    Raises DeviceError if a GPU is asked for and there is none for this process.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    why = "" if torch.version.cuda or torch.version.hip else (f" (this PyTorch, {torch.__version__}, is built for CPUs alone: "
                                                              "where train.sh has made .venv, remove that and start it again)")
    if name == "cuda" and not gpus:
        raise DeviceError(f"--device cuda: PyTorch sees no GPU here{why}. Check nvidia-smi and torch.cuda.is_available()")
    if name == "auto" and not gpus and NAMES_GPUS.match(visible):
        raise DeviceError(f"GPUS={visible} (CUDA_VISIBLE_DEVICES) asks for GPUs, but PyTorch sees none{why}. GPUS=cpu trains on "
                          "the CPU")
    if not gpus or name == "cpu":
        return torch.device("cpu")
    if local_size > gpus:
        of_them = f"of CUDA_VISIBLE_DEVICES={visible} PyTorch sees {gpus}" if visible else f"PyTorch sees {gpus} GPUs"
        raise DeviceError(f"NPROC: {local_size} processes on this node, but {of_them}. Set NPROC={gpus}, or GPUS to devices "
                          "that nvidia-smi -L lists")
    return torch.device("cuda", local_rank)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of the host to the device; the host does not wait for what the device is doing, as it would for memory that
    is not pinned."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def keep_memory() -> bool:
    """Makes glibc's malloc keep the memory that it has got from the system, in this process and what it forks.

    By default it maps every large block of its own and returns it when it is freed: each training step on a CPU then waits for
    the kernel to clear tens of thousands of pages. What is kept is no more than the process has had in use at once, give or
    take gaps between blocks. GPUs have PyTorch's own caching allocator. -> whether the C library can
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):     # macOS, musl, Windows
        return False
    mapped = mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_THRESHOLD, LARGEST_BEFORE)
    return bool(mallopt(M_TRIM_THRESHOLD, LARGEST) and mapped)


def core_count() -> int:
    """The cores of the processor that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory(device: torch.device, local_size: int = 1) -> int:
    """Bytes that a process may plan with: the GPU's, or its part of what the machine, or its container, has; 0: not known.

    What others use at the moment does not count: a run's results must not depend on its neighbours.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):     # Windows
        return 0
    return min([machine, *_container_limits()]) // local_size


def _container_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """The memory limits of the control groups (versions 1 and 2) that this process is in."""
    limits = []
    with contextlib.suppress(OSError):
        for line in own.read_text(encoding="utf-8", errors="replace").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                top, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
                folder = top / path.lstrip("/")
                for place in [folder, *folder.parents]:       # in a container the path may be that outside: the top counts then
                    with contextlib.suppress(OSError, ValueError):                        # no limit: "max"
                        limits.append(int((place / name).read_text(encoding="utf-8")))
                    if place == top:
                        break
    return limits


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it means that memory is used up: the GPU's or, as far as the system reports that, the machine's."""
    # Plain RuntimeErrors: of the CPU's allocator ("DefaultCPUAllocator: can't allocate memory" or "not enough memory"), and of
    # CUDA and its libraries, where a GPU that others have filled has no room for their own tables.
    words = r"can't allocate memory|not enough memory|CUDA error: out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and re.search(words, str(error)) is not None)


def out_of_memory_error(device: torch.device, where: str, remedy: str = SMALLER_STEP) -> OutOfMemory:
    """where: what was done just then, such as "step 13"; remedy: one of the above. Names the peak on a GPU."""
    figures = ""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):             # there was no room to initialize CUDA
            sizes = [torch.cuda.max_memory_allocated(device), *torch.cuda.mem_get_info(device)]
            peak, free, total = (size / 2 ** 30 for size in sizes)
            figures = f" of the GPU ({peak:.1f} GiB in use at the peak, {free:.1f} of {total:.1f} GiB free now)"
    return OutOfMemory(f"{where}: out of memory{figures}; {remedy}")
