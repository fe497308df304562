"""What is said where a process of several is lost, or memory is used up: one line each, and the exit code."""

import re
import socket
from collections.abc import Sequence
from pathlib import Path

import torch

FAILED_TOO = -1      # the word of a process that has an error only because it lost another one
ENDED = "has ended"


class OutOfMemory(ValueError):
    """Memory of the device or the machine is used up: one line with what was done, and the peak on a GPU."""

    code = 6


class LostProcessError(ValueError):
    """Another process of the run has ended, hangs, or left with an error: one line that names it.

    `code` is the exit code: 8, or that of the error with which the other left. `quiet`: nothing is left to say, because
    the other has told its own error, or another survivor tells this one.
    """

    code = 8

    def __init__(self, message: str, code: int = 8, quiet: bool = False):
        super().__init__(message)
        self.code, self.quiet = code, quiet


def out_of_memory(error: BaseException) -> bool:
    """Whether it means that memory is used up: the GPU's or, as far as the system tells that, the machine's."""
    # The CPU's allocator raises a plain RuntimeError: "DefaultCPUAllocator: can't allocate memory" or "not enough memory".
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and re.search(r"can't allocate memory|not enough memory", str(error)) is not None)


def used_up(device: torch.device, where: str) -> OutOfMemory:
    """`where`: what was done just then, such as "step 13"."""
    figures = ""
    if device.type == "cuda":
        sizes = [torch.cuda.max_memory_allocated(device), *torch.cuda.mem_get_info(device)]
        peak, free, total = (size / 2 ** 30 for size in sizes)
        figures = f" of the GPU ({peak:.1f} GiB in use at the peak, {free:.1f} of {total:.1f} GiB free now)"
    return OutOfMemory(f"{where}: out of memory{figures}; lower --train_batch_size, or raise --gradient_accumulation_steps "
                       "(GRAD_STEPS): the same steps in smaller pieces")


def lost(own: int, words: dict[int, int], places: Sequence[tuple[int, str]], where: str, timeout_s: int,
         error: BaseException) -> LostProcessError:
    """What the survivor `own` of a failed collective makes of it.

    `words`, by rank: the exit code of a process that has said why it ends, or FAILED_TOO; `places`: of each rank (pid, host).
    """
    fates = {rank: fate(*places[rank]) for rank in range(len(places)) if rank not in words and rank != own}
    codes = [code for _, code in sorted(words.items()) if code != FAILED_TOO]
    if codes and ENDED not in fates.values():
        return LostProcessError(f"{where}: another process ended with exit code {codes[0]}", codes[0], quiet=True)
    # Whoever is alive may just not have come to the collective that failed.
    named = [rank for rank in fates if fates[rank] == ENDED] or list(fates)
    told = ", ".join("rank {} (pid {} on {}) {}".format(rank, *places[rank], fates[rank]) for rank in named)
    if not named:
        told = f"the processes lost each other: {str(error).splitlines()[0]}"
    elif fates[named[0]] == ENDED:
        told += " without a word: killed, for want of memory perhaps (dmesg tells)"
    else:
        told += f": it did not come within {timeout_s} s (--rank_timeout)"
    return LostProcessError(f"{where}: {told}; --resume_path goes on from the last checkpoint",
                            quiet=min([*words, own]) != own)


def fate(pid: int, host: str) -> str:
    """What has become of a process that does not answer, as far as this machine knows."""
    if host != socket.gethostname() or not Path("/proc/self/stat").exists():
        return "ended or hangs"
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ENDED
    return {"Z": ENDED, "X": ENDED, "T": "is stopped"}.get(state, "hangs")
