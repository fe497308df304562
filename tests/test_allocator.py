"""Memory that a step gives back is there for the next one, without the kernel."""

import subprocess
import sys

import pytest

from utils import allocator

STEPS = """
import resource, sys
from utils import allocator
if sys.argv[1] == "keep" and not allocator.keep_memory():
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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_no_page_is_asked_for_twice():
    """In processes of their own: what is set stays for a process's life."""
    faults = {}
    for mode in ("keep", "leave"):
        told = subprocess.run([sys.executable, "-c", STEPS, mode], capture_output=True, text=True, check=False)
        if "cannot" in told.stderr:
            pytest.skip("not glibc")
        assert told.returncode == 0, told.stderr
        faults[mode] = int(told.stdout)
    assert faults["keep"] < 100 < faults["leave"], faults


def test_elsewhere_nothing_happens(monkeypatch):
    for error in (OSError, TypeError):
        monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name, error=error: (_ for _ in ()).throw(error()))
        assert not allocator.keep_memory()
