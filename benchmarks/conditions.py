"""What is the same for all contenders of a question: threads, precision, images, and the matrix product that is the limit."""

from collections.abc import Callable

import torch

from utils.run import profiling

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
MATMUL = {"fp32_bf16_matmul": "medium", "tf32": "high"}


def arrange(device: str, threads: int, precision: str) -> None:
    """Set the threads of this process (0: one per core), and what float32 matrix products may use inside."""
    if threads:
        torch.set_num_threads(threads)
    if torch.get_float32_matmul_precision() != MATMUL.get(precision, "highest"):
        torch.set_float32_matmul_precision(MATMUL.get(precision, "highest"))
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.manual_seed(0)


def images(batch: int, size: int, channels: int = 3) -> torch.Tensor:
    """Return noise, uint8 (batch, channels, size, size), the same for every contender."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, channels, size, size), dtype=torch.uint8, generator=generator)


def matmul(device: str, threads: int, precision: str, side: int) -> Callable[[], None]:
    """Return a step: a product of two square matrices in the type in which this precision multiplies."""
    arrange(device, threads, precision)
    multiply = profiling.product(torch.device(device), AUTOCAST.get(precision, torch.float32), side)

    def step() -> None:
        multiply()

    return step
