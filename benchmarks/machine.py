"""The machine and the versions of a measurement, without importing torch."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "asimd", "bf16")
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "timm", "transformers", "vit-pytorch")


def facts() -> dict:
    """Return cpu, its flags for matrix products, cores that this process may use, memory in GiB, gpu ("" without one)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {"cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
            "flags": [flag for flag in FLAGS if flag in (_cpuinfo("flags") or _cpuinfo("Features")).split()],
            "cores": cores, "memory": round(memory / 2**30), "gpu": _gpu()}


def name() -> str:
    """Return a name for files: amd-epyc-2-cores, nvidia-h200."""
    found = facts()
    words = found["gpu"].partition(",")[0] or f"{found['cpu']} {found['cores']} cores"
    return "-".join("".join(letter if letter.isalnum() else " " for letter in words.lower()).split())


def versions(more: tuple[str, ...] = ()) -> dict:
    """Return the versions of this program (its commit, with a + if files differ from it), Python and packages.

    more: names of further packages.
    """
    found = {"commit": _commit(), "python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    here = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit, changed = (subprocess.run([*here, *words], capture_output=True, text=True, timeout=30, check=True).stdout.strip()
                           for words in (["rev-parse", "--short", "HEAD"],
                                         ["diff", "HEAD", "--name-only", "--", ":/", ":(top,exclude)benchmarks/results",
                                          ":(top,exclude)benchmarks/RESULTS.md"]))
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + "+" * bool(changed)


def _cpuinfo(key: str) -> str:
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.partition(":")[0].strip() == key:
            return line.partition(":")[2].strip()
    return ""


def _gpu() -> str:
    """Return name and driver of the first GPU."""
    try:
        said = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.strip().splitlines()[0] if said.strip() else ""
