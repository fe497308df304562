"""The speed of a run, on GPUs as a fraction of their limit, and a profile of some of its steps.

The limit is the rate that a GPU reaches in a large matrix product of the run's precision, measured after the run (PaLM, arXiv
2204.02311, appendix B, divides by the vendor's figure and calls the quotient utilization). The work of a step is that of its
matrix products, convolutions and attention, forward and backward, by PyTorch's own counter: 2 for a multiplication and
addition, 0 for gradients that are not computed because layers are frozen. On a CPU there is no such figure: on one machine
the measured rate lay between 76 and 649 GFLOP/s, as other processes, temperature and number type had it.
"""

import copy
import dataclasses
import functools
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.files import write_file

WARM_UP = 3              # first steps of a session that are not counted, if there are twice as many
MEASURED_FROM = 20.0     # seconds of steps: for less, measuring the machine would take too large a part of the time
WAIT_SHOWN = 0.05        # fraction of the time above which waiting for data is shown during a run
CEILING_SECONDS = 0.2
SIDE = {"cpu": 2048, "mps": 4096, "cuda": 8192}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TRACE_FILE, TABLE_FILE = "trace.json.gz", "profile.txt"


@dataclasses.dataclass(frozen=True)
class Pace:
    """Of some steps: the images of all ranks, the seconds, and the fraction of them in which rank 0 waited for its loader."""

    images: float
    seconds: float
    waiting: float

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    def __str__(self) -> str:
        waiting = f", {self.waiting:.0%} waiting for data" if self.waiting > WAIT_SHOWN else ""
        return f"{self.images_per_second:.0f} images/s{waiting}"


def pace(events: Iterable[dict]) -> Pace | None:
    """Return the pace over the "train" events of a log; None if no event has its time."""
    steps = [event for event in events if event["event"] == "train" and event.get("seconds")]
    seconds = sum(event["seconds"] for event in steps)
    if not steps:
        return None
    images = sum(event["images_per_second"] * event["seconds"] for event in steps)
    return Pace(images, seconds, sum(event["data_wait"] * event["seconds"] for event in steps) / seconds)


def pace_of_session(events: Sequence[dict]) -> Pace | None:
    """Return the pace of the last session in a log, without its first steps."""
    start = max((number for number, event in enumerate(events) if event["event"] in ("start", "resume")), default=0)
    steps = [event for event in events[start:] if event["event"] == "train"]
    return pace(steps[WARM_UP:] if len(steps) >= 2 * WARM_UP else steps)


def summary(events: Sequence[dict], model: nn.Module, size: Sequence[int], dtype: torch.dtype, device: torch.device,
            processes: int = 1) -> list[str]:
    """Return lines on the speed of a run, from its log; [] if it made no step.

    `model` as it was trained, not wrapped; `size` (C, height, width) of its images; `dtype` of the matrix products. For a run
    of at least MEASURED_FROM seconds on GPUs also the fraction of their limit, which takes a second to measure.
    """
    found = pace_of_session(events)
    if found is None:
        return []
    rate = found.images_per_second
    lines = [f"{rate:,.{0 if rate >= 100 else 1}f} images/s; {found.waiting:.1%} of the time waiting for data; peak memory "
             f"{peak_memory(device) / 2 ** 20:,.0f} MiB{' a process' if processes > 1 else ''}"]
    if found.seconds >= MEASURED_FROM and device.type == "cuda":
        ceiling = matmul_ceiling(device, dtype) * processes
        limit = f"{ceiling / 1e12:,.0f} TFLOP/s" if ceiling >= 1e13 else f"{ceiling / 1e9:,.0f} GFLOP/s"
        gpus = f"these {processes} GPUs reach" if processes > 1 else "this GPU reaches"
        lines.append(f"{flops_per_image(model, size) * rate / ceiling:.0%} of the rate that {gpus} in large {NAMES[dtype]} "
                     f"matrix products ({limit}, measured)")
    return lines


def flops_per_image(model: nn.Module, size: Sequence[int]) -> int:
    """Return the FLOPs of a training step, forward and backward, for an image of `size` (C, height, width).

    Nothing is computed: a copy of the model with shapes and without numbers is counted. Attention counts as its products,
    whichever kernel runs: some compute a part of them twice, and not every release of PyTorch counts them.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def shape_of(tensor: Tensor) -> Tensor:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    with FakeTensorMode(), torch.enable_grad():
        memo = {id(tensor): shape_of(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        shapes = copy.deepcopy(model, memo).train()
        weights = next(shapes.parameters())
        images = torch.empty(1, *size, device=weights.device, dtype=weights.dtype)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            logits = shapes(images)
            total = sum(part.sum() for part in (logits if isinstance(logits, tuple) else (logits,)))
            if total.requires_grad:
                total.backward()
    return counter.get_total_flops()


def product(device: torch.device, dtype: torch.dtype, side: int) -> Callable[[], Tensor]:
    """Return a function that multiplies two square matrices: 2 * side ** 3 operations."""
    left, right, result = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))
    return functools.partial(torch.mm, left, right, out=result)


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the best of several products of square matrices."""
    multiply = product(device, dtype, SIDE[device.type])

    def seconds() -> float:
        started = time.perf_counter()
        multiply()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - started

    seconds()                                         # selects the kernel, allocates memory
    best, ends = seconds(), time.perf_counter() + CEILING_SECONDS
    while time.perf_counter() < ends:
        best = min(best, seconds())
    return 2 * SIDE[device.type] ** 3 / best


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes so far: of the tensors on a GPU, otherwise of this process without its loader processes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Profile:
    """Records some steps of a session with torch.profiler, then writes trace.json.gz (for https://ui.perfetto.dev and
    chrome://tracing) and profile.txt, a table of the slowest operators. A failure to write is a warning."""

    def __init__(self, folder: Path, device: torch.device, log: Callable[[str], None], first: int = 4, steps: int = 5):
        """`first` counts the steps of this session, from 1; at least 2. `log` takes one line."""
        self._folder, self._on_gpu, self._log = folder, device.type == "cuda", log
        self._first, self._last, self._written = first, first + steps - 1, False
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")         # otherwise it prints every stage, and that there is no GPU
        kinds = torch.profiler.ProfilerActivity
        self._profiler: torch.profiler.profile | None = torch.profiler.profile(
            activities=[kinds.CPU, kinds.CUDA][:1 + self._on_gpu],
            schedule=torch.profiler.schedule(wait=first - 2, warmup=1, active=steps, repeat=1), on_trace_ready=self._write,
            acc_events=True)                          # else some releases warn at the end of the only cycle
        self._profiler.start()

    def step(self) -> None:
        """After every step of the session."""
        if self._profiler is not None:
            if self._on_gpu:
                torch.cuda.synchronize()              # all kernels of the step belong to it
            self._profiler.step()
            if self._written:
                self.close()

    def close(self) -> None:
        """Write what was recorded of a shorter session; a second call does nothing."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
            if not self._written:
                self._log(f"profile: nothing to write, the session ended before its step {self._first}")

    def _write(self, profiler: torch.profiler.profile) -> None:
        last = min(profiler.step_num, self._last)
        if last < self._first:
            return
        self._written = True
        trace, table = self._folder / TRACE_FILE, self._folder / TABLE_FILE
        try:
            order = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
            rows = profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
            write_file(table, f"Steps {self._first} to {last} of the session: operators by the time they take themselves; "
                              f"ProfilerStep is a whole step.\n{rows}")
            profiler.export_chrome_trace(str(trace))
            if not trace.stat().st_size:
                raise OSError(f"{trace} was not written")
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            self._log(f"warning: the profile cannot be written to {self._folder} ({reason}); training continues")
        else:
            self._log(f"profile of steps {self._first} to {last} of this session: {trace} (open it at https://ui.perfetto.dev; "
                      f"ProfilerStep counts from 0), {table}")
