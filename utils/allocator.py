"""Keeps the memory that glibc's malloc has got from the system, for the next step.

By default glibc maps every large block anew and gives it back when it is freed: each training step on a CPU then waits for
the kernel to clear tens of thousands of pages. What is kept is no more than the process has had in use at once, give or
take gaps between blocks. GPUs have PyTorch's own caching allocator.
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3      # malloc.h
LARGEST = 2 ** 31 - 1                            # mallopt takes an int
LARGEST_BEFORE = 32 << 20                        # of M_MMAP_THRESHOLD, before glibc 2.35


def keep_memory() -> bool:
    """For this process and what it forks, from now on -> whether the C library can."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):     # macOS, musl, Windows
        return False
    mapped = mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_THRESHOLD, LARGEST_BEFORE)
    return bool(mallopt(M_TRIM_THRESHOLD, LARGEST) and mapped)
