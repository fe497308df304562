"""Fixtures for all tests: the `gpu` marker, the contract's counts and figures, and running train.py or the scripts."""

import contextlib
import dataclasses
import gc
import os
import platform
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import figures
import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")      # as in train.py; before PyTorch is loaded

import torch

import train
from benchmarks.memory import resident
from utils.data import datasets
from utils.data.splits import Splits, Subset
from utils.report import plots

# The models of the tests are tiny: more threads gain nothing, and on a busy machine they wait for each other.
torch.set_num_threads(1)
# These signals are ignored if the tests run in the background of a script or under nohup, and programs inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
FIGURES: dict[str, list[dict]] = {}      # by test: the counts of what it tried for the contract


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "slow" not in item.keywords)      # otherwise the longest might run last, by themselves
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()         # otherwise every collection would check a million permanent objects, for a quarter of a second


@pytest.fixture
def offline(monkeypatch):
    """Make every download fail."""
    def fail(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", fail)


# ------------------------------------------------------------------------------- the contract of docs/promises.md


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="docs/promises.md at full counts (half an hour on 2 cores)")
    parser.addoption("--figures", metavar="FILE", help="write the counts of the contract's tests into this JSON file")


@pytest.fixture
def tries(request):
    """tries(small, full) -> the number of tries: `full` with --full, else `small`"""
    return lambda small, full: full if request.config.getoption("--full") else small


@pytest.fixture
def figure(request, record_property):
    """figure(what, tried, lost=0) records a row of docs/promises.md, for a test marked contract("P1", promise).

    Further arguments are stored in the row: `nodes` for the table of several nodes.
    """
    started = time.monotonic()

    def record(what: str, tried: int, lost: int = 0, **more) -> None:
        assert not lost, f"{what}: {lost} of {tried}"
        promise = request.node.get_closest_marker("contract").args[0]
        record_property("contract", {
            "promise": promise, "what": what, "tried": int(tried), "lost": int(lost),
            "seconds": round(time.monotonic() - started, 1), "torch": str(torch.__version__),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores"} | more)

    return record


def pytest_runtest_logreport(report):
    rows = [value for name, value in report.user_properties if name == "contract"]
    if rows and report.when == "call" and report.passed and "PYTEST_XDIST_WORKER" not in os.environ:
        FIGURES[report.nodeid.removeprefix("tests/")] = rows


def pytest_sessionfinish(session):
    gc.unfreeze()       # otherwise packages that check for their objects at the exit report leaks
    if FIGURES and (file := session.config.getoption("--figures")):
        figures.add(Path(file), FIGURES)


# ------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(autouse=True)
def one_thread():
    """Set one thread after each test. A resumed run uses as many threads as before; forked runs would inherit a larger number,
    but not the threads."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def memory_below():
    """with memory_below(n): fails if its block needs n bytes more than this process has now. Measured only on Linux."""
    @contextlib.contextmanager
    def block(limit: int):
        try:
            before = resident("VmRSS", forget=True)
        except OSError:                                 # another system, or a kernel without this
            yield
            return
        yield
        assert resident("VmHWM") - before < limit

    return block


@pytest.fixture
def run_train(tmp_path, monkeypatch):
    """run_train("--flag", value, ...) -> exit code of train.py in an empty folder: from scratch, on the CPU, with few steps, and
    digits with 40 images to validate and 60 to test on. Its picture is an empty file, since drawing would be half of the time.

    The flags override these defaults, because the last one counts.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(datasets.DATASETS, "digits", small_digits)
    monkeypatch.setattr(plots, "save", lambda figure, path: Path(path).touch())

    def run(*flags) -> int:
        argv = [str(flag) for flag in flags]
        if "--resume_path" not in argv:
            length = [] if "--num_epochs" in argv else ["--num_steps", "4"]
            argv = ["--pretrained_dir", "none", *length, "--eval_every", "4", "--train_batch_size", "16", *argv]
        return train.main(["--device", "cpu", *argv])

    return run


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """uninterrupted(*flags, ranks) -> (the hash of the run's end, its folder); each run is done once"""
    import rig

    kept = {}

    def end(*flags, ranks=1):
        if (flags, ranks) not in kept:
            folder = tmp_path_factory.mktemp("whole")
            kept[flags, ranks] = rig.run(folder, *flags, ranks=ranks), folder
        return kept[flags, ranks]

    return end


def small_digits(data_dir: str) -> Splits:
    splits = datasets.digits(data_dir)
    return dataclasses.replace(splits, val=Subset(splits.val, range(40)), test=Subset(splits.test, range(60)))


@pytest.fixture
def run_script(tmp_path):
    """run_script("train.sh", "--flag", "value", VARIABLE="x") -> the finished process; results are written below tmp_path."""

    def run(script: str, *flags: str, cwd: Path = ROOT, timeout: int = 600, **variables: str) -> subprocess.CompletedProcess:
        clean = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
        environment = clean | {"PYTHON": sys.executable} | variables
        if variables.get("DRY_RUN") != "1" and script != "test.sh":
            flags = ("--output_dir", str(tmp_path / "output"), "--log_dir", str(tmp_path / "logs"), *flags)
        return subprocess.run(["bash", str(cwd / script), *flags], capture_output=True, text=True, env=environment,
                              timeout=timeout, stdin=subprocess.DEVNULL)

    return run
