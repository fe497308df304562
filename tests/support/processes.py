"""Another process, for tests of what two of them do to each other."""

import multiprocessing
import time
from collections.abc import Callable

FORK = multiprocessing.get_context("fork")


class AnotherProcess:
    """with AnotherProcess(function): the function has been called in another process, which is still alive."""

    def __init__(self, function: Callable[[], object]):
        self.ready = FORK.Event()
        self.process = FORK.Process(target=self.work, args=(function,))

    def work(self, function: Callable[[], object]) -> None:
        function()
        self.ready.set()
        time.sleep(60)

    def __enter__(self) -> multiprocessing.Process:
        self.process.start()
        assert self.ready.wait(20)
        return self.process

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.join()
