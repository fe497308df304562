"""Runs another process next to the test, and returns the message of an expected error."""

import multiprocessing
import time
from pathlib import Path

import pytest

FORK = multiprocessing.get_context("fork")


class AnotherProcess:
    """In the block of `with AnotherProcess(function)`, another process has called the function and is still running."""

    def __init__(self, function):
        self.ready = FORK.Event()
        self.process = FORK.Process(target=self.work, args=(function,))

    def work(self, function):
        function()
        self.ready.set()
        time.sleep(60)

    def __enter__(self):
        self.process.start()
        assert self.ready.wait(20)
        return self.process

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()


def error_of(error_type: type[Exception], function, *args) -> str:
    """Return the message of the error that function(*args) raises, which must be one line."""
    with pytest.raises(error_type) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def is_gone(pid: int) -> bool:
    """Whether the process has ended; a zombie, which its parent has not waited for, counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition, seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()
