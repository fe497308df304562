"""Shared by all tests: the `gpu` marker, the contract's counts and figures, and running train.py or the scripts."""

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

os.environ.setdefault("GOMP_SPINCOUNT", "1000")      # as train.py; before PyTorch is loaded

import torch

import train
from benchmarks.memory import resident
from utils.data import datasets
from utils.data.splits import Splits, Subset
from utils.report import plots

# The models of the tests are tiny: more threads gain nothing, and on a busy machine they wait for each other.
torch.set_num_threads(1)
# Ignored where the tests run in the background of a script or under nohup, and then by every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
FIGURES: dict[str, list[dict]] = {}      # by test: what it tried for the contract


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "slow" not in item.keywords)      # the longest would otherwise run last, alone
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()         # a million objects that stay: every collection would look through all of them, for a quarter second


@pytest.fixture
def offline(monkeypatch):
    """Every download fails."""
    def refuse(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


# ------------------------------------------------------------------------------- the contract of docs/promises.md


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="docs/promises.md at full counts (half an hour on 2 cores)")
    parser.addoption("--figures", metavar="FILE", help="put what the contract's tests tried into this JSON file")


@pytest.fixture
def tries(request):
    """tries(small, full) -> how often to try: `full` with --full"""
    return lambda small, full: full if request.config.getoption("--full") else small


@pytest.fixture
def figure(request, record_property):
    """figure(what, tried, lost=0): a row of docs/promises.md, for a test marked contract("P1", promise).

    More by name is kept in the row: `nodes` for the table of several nodes.
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
    gc.unfreeze()       # or packages whose objects are looked for at the exit report leaks
    if FIGURES and (file := session.config.getoption("--figures")):
        figures.add(Path(file), FIGURES)


# ------------------------------------------------------------------------------------------------------- running it


@pytest.fixture(autouse=True)
def one_thread():
    """A resumed run computes on as many threads as before. More than one here would be inherited by forked runs, in which
    the threads themselves are missing."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def memory_below():
    """with memory_below(n): never holds n bytes more than this process has now. Known on Linux alone; elsewhere anything goes."""
    @contextlib.contextmanager
    def block(limit: int):
        try:
            before = resident("VmRSS", forget=True)
        except OSError:                                 # another system, or a kernel that does not tell
            yield
            return
        yield
        assert resident("VmHWM") - before < limit

    return block


@pytest.fixture
def run_train(tmp_path, monkeypatch):
    """run_train("--flag", value, ...) -> exit code of train.py in an empty folder: from scratch, on the CPU, few steps,
    digits with 40 images to validate and 60 to test on. Its picture is an empty file: drawing would be half of the time.

    Flags given win over these, because the last one counts.
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
    """uninterrupted(*flags, ranks) -> (the hash of its end, its folder); each is run once"""
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
    """run_script("train.sh", "--flag", "value", VARIABLE="x") -> the finished process; results go below tmp_path."""

    def run(script: str, *flags: str, cwd: Path = ROOT, timeout: int = 600, **variables: str) -> subprocess.CompletedProcess:
        clean = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
        environment = clean | {"PYTHON": sys.executable} | variables
        if variables.get("DRY_RUN") != "1" and script != "test.sh":
            flags = ("--output_dir", str(tmp_path / "output"), "--log_dir", str(tmp_path / "logs"), *flags)
        return subprocess.run(["bash", str(cwd / script), *flags], capture_output=True, text=True, env=environment,
                              timeout=timeout, stdin=subprocess.DEVNULL)

    return run
