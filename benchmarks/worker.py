"""A contender's process: build and run steps on request. Messages are lines of JSON.

["build", "module:function", {...}]  -> ["ready", null] or ["absent", "which package to install"]
["run", n]                           -> ["cost", seconds a step, or the mean of what the steps returned, by name if they did]
["drop"]                             -> ["dropped", null]
"""

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable

OUR_MODULES = ("benchmarks", "configs", "models", "train", "utils")


class Absent(RuntimeError):
    """Raised when a package that a contender needs is not installed."""


class Bench:
    """Build a step and run it, here or in another process."""

    def __init__(self):
        self._step: Callable[[], float | None] | None = None

    def answer(self, what: str, *given) -> object:
        return {"build": self._build, "run": self._run, "drop": self._drop}[what](*given)

    def _build(self, place: str, given: dict) -> None:
        self._drop()
        module, function = place.split(":")
        try:
            self._step = getattr(importlib.import_module(module), function)(**given)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in OUR_MODULES:
                raise
            raise Absent(f"package {error.name} is not installed: pip install -r benchmarks/requirements.txt") from error

    def _run(self, times: int) -> float | dict[str, float]:
        cuda = _cuda()
        if cuda:
            self._step()                     # takes back the memory that the previous turn gave back
            cuda.synchronize()
        started = time.perf_counter()
        values = [self._step() for _ in range(times)]
        if cuda:
            cuda.synchronize()
        elapsed = time.perf_counter() - started
        if cuda:
            cuda.empty_cache()               # the next contender may need all the memory
        if isinstance(values[0], dict):
            return {name: sum(value[name] for value in values) / times for name in values[0]}
        return elapsed / times if values[0] is None else sum(values) / times

    def _drop(self) -> None:
        self._step = None
        gc.collect()


def _cuda():
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                            # libraries print to standard error, not among the replies
    bench, kinds = Bench(), {"build": "ready", "run": "cost", "drop": "dropped"}
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        what, *given = json.loads(line)
        try:
            reply = kinds[what], bench.answer(what, *given)
        except Absent as error:
            reply = "absent", str(error)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
