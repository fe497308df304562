"""Data workers that die, hang or find no memory: the batches stay the same ones."""

import gc
import hashlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from utils.data import loader as data
from utils.data import workers as loader_workers
from utils.data.splits import ArrayImages
from utils.data.workers import WorkerError

COUNT, STEPS, MICRO_SIZE = 20, 12, 4
CROPPED = v2.Compose([v2.RandomResizedCrop((16, 16)), v2.PILToTensor()])


@pytest.fixture(autouse=True)
def short_looks(monkeypatch):
    monkeypatch.setattr(loader_workers, "POLL_S", 0.1)


def pictures() -> ArrayImages:
    random = np.random.default_rng(1)
    return ArrayImages(random.integers(0, 256, (COUNT, 20, 24, 3), dtype=np.uint8), random.integers(0, 3, COUNT))


class Fateful(ArrayImages):
    """An image of which something happens to who reads it: as often as there are files `fate-N` in the folder."""

    def __init__(self, folder: Path, what, index: int = 7, times: int = 1):
        whole = pictures()
        super().__init__(whole.images, whole.labels)
        self.folder, self.what, self.index = folder, what, index
        for number in range(times):
            (folder / f"fate-{number}").touch()

    def __getitem__(self, index):
        if index == self.index:
            for file in self.folder.glob("fate-*"):
                file.unlink()
                self.what()
                break
        return super().__getitem__(index)


def loader(split=None, workers=2, say=None, timeout_s=60.0, steps=STEPS, start=0) -> data.Loader:
    order = data.StepOrder(COUNT, MICRO_SIZE, 1, 0, 1, 3, start, steps)
    return data.train_loader(split or pictures(), order, transform=CROPPED, seed=5, num_workers=workers, pin_memory=False,
                             timeout_s=timeout_s, say=say or (lambda line: pytest.fail(f"nothing should be told: {line}")))


def digest(batches) -> str:
    found = hashlib.sha256()
    for batch in batches:
        found.update(batch.images.numpy().tobytes() + batch.targets.numpy().tobytes() + repr(batch.keys).encode())
    return found.hexdigest()


@pytest.fixture(scope="module")
def expected() -> str:
    return digest(loader(workers=0))


def workers_of(running: data.Loader) -> list[multiprocessing.Process]:
    return next(iter(running._loading._running)).processes


def wait_until(condition, seconds=5.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def is_gone(pid: int) -> bool:
    """or a zombie, that nobody waits for here"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.contract("P12", "a data worker that dies costs no batch")
def test_killed_at_any_instant(expected, tries, figure):
    random, killed = np.random.default_rng(0), 0
    for _ in range(tries(8, 300)):
        said = []
        running = loader(say=said.append)
        at = random.integers(0, STEPS - 6)           # the last batches are prefetched already
        kind = (signal.SIGKILL, signal.SIGBUS)[random.integers(2)]
        batches = []
        for number, batch in enumerate(running):
            batches.append(batch)
            if number == at:
                time.sleep(random.uniform(0, 0.02))
                victim = workers_of(running)[random.integers(2)]
                os.kill(victim.pid, kind)
        assert digest(batches) == expected, (at, kind)
        assert all(f"was killed by {kind.name}" in line and "(1 of 20)" in line and "\n" not in line for line in said)
        killed += 1
        assert len(said) <= 1
    figure("SIGKILL or SIGBUS of a worker at any instant", killed)


FATES = {
    "SIGKILL": (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL"),
    "SIGBUS": (lambda: os.kill(os.getpid(), signal.SIGBUS), "was killed by SIGBUS"),
    "exit": (lambda: os._exit(3), "ended with exit code 3"),
    "hangs": (lambda: time.sleep(1000), "gave no batch in time"),
    "stopped": (lambda: os.kill(os.getpid(), signal.SIGSTOP), "gave no batch in time"),
    "no room": (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)), "found no room in shared memory"),
}


@pytest.mark.contract("P12", "a data worker that dies, hangs or finds no shared memory costs no batch")
@pytest.mark.parametrize("fate", FATES)
def test_fates_within_an_image(tmp_path, expected, fate, tries, figure):
    what, words = FATES[fate]
    times = tries(1, 10)
    said = []
    running = loader(Fateful(tmp_path, what, times=times), say=said.append, timeout_s=2.0)
    assert digest(running) == expected
    while list(tmp_path.glob("fate-*")):
        assert digest(running) == expected
    met = [line for line in said if words in line]           # on a busy machine the start itself may take too long
    assert len(met) >= times and all("\n" not in line for line in said), said
    assert len(said) == times or words == "gave no batch in time"
    assert f"({len(said)} of 20)" in said[-1]
    figure(f"a worker's fate: {fate}", times)


def test_a_worker_that_is_stopped_while_its_batch_is_on_the_way(expected):
    """The batch's memory is handed over by the worker itself: who asks a stopped one would wait for ever."""
    said, batches = [], []
    running = loader(say=said.append, timeout_s=2.0)
    for batch in running:
        batches.append(batch)
        if len(batches) == 2:
            time.sleep(0.3)                          # the next ones are loaded
            for worker in workers_of(running):
                os.kill(worker.pid, signal.SIGSTOP)
    assert digest(batches) == expected
    assert said and all("gave no batch in time" in line for line in said)


def test_the_signals_of_a_stop_leave_workers_alone(expected):
    running, batches = loader(), []
    for batch in running:
        batches.append(batch)
        for worker in workers_of(running):
            for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                os.kill(worker.pid, kind)
    assert digest(batches) == expected


@pytest.mark.contract("P12", "workers that die again and again end the run with advice (exit code 5)")
def test_too_many_deaths(tmp_path, monkeypatch, tries, figure):
    limit = tries(3, 20)
    monkeypatch.setattr(loader_workers, "MAX_REBUILDS", limit)
    said = []
    running = loader(Fateful(tmp_path, lambda: os.kill(os.getpid(), signal.SIGBUS), times=100), say=said.append)
    with pytest.raises(WorkerError) as told:
        list(running)
    assert told.value.code == 5 and "\n" not in str(told.value) and len(said) == limit
    for words in (f"lost {limit + 1} times", "SIGBUS", "df -h /dev/shm", "--num_workers", "--check_data"):
        assert words in str(told.value)
    assert not multiprocessing.active_children()
    figure("runs whose workers always die", 1)


def test_evaluation_goes_on_too(tmp_path):
    common = {"transform": v2.PILToTensor(), "batch_size": 3, "rank": 0, "world_size": 1, "pin_memory": False}
    said = []
    running = data.eval_loader(Fateful(tmp_path, FATES["SIGKILL"][0]), num_workers=2, say=said.append, **common)
    assert digest(running) == digest(data.eval_loader(pictures(), num_workers=0, **common)) and len(said) == 1


@pytest.mark.parametrize("kind", [RuntimeError, OSError, KeyError])
def test_an_error_of_the_code_is_no_workers_death(tmp_path, kind):
    def fail():
        raise kind("a defect")

    with pytest.raises(kind, match="a defect"):
        list(loader(Fateful(tmp_path, fail)))
    assert not multiprocessing.active_children()


# ------------------------------------------------------------------------------------------------ what is left behind


def held() -> tuple[int, int, int]:
    """files, threads, processes"""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(multiprocessing.active_children())


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_nothing_is_left_behind(tmp_path, tries):
    list(loader())
    time.sleep(0.5)                                  # threads of queues end a little later
    before, pids = held(), set()
    for number in range(tries(2, 20)):
        running = loader(Fateful(tmp_path, FATES["SIGKILL"][0], times=1), say=lambda line: None)
        batches = iter(running)
        for _ in range(STEPS if number % 2 else 5):
            next(batches)
            pids |= {worker.pid for worker in workers_of(running)}
        batches.close() if number % 3 else running.close()
    del batches, running
    assert wait_until(lambda: all(now <= then for now, then in zip(held(), before))), (before, held())
    assert not [name for name in os.listdir("/dev/shm") if name.split("_")[:1] == ["torch"] and int(name.split("_")[1]) in pids]


def test_close_is_quick_even_if_a_worker_hangs(tmp_path):
    later = data.StepOrder(COUNT, MICRO_SIZE, 1, 0, 1, 3, 0, STEPS)[2][0].index
    running = loader(Fateful(tmp_path, FATES["hangs"][0], later), timeout_s=0)
    batches = iter(running)
    next(batches)
    pids = [worker.pid for worker in workers_of(running)]
    began = time.monotonic()
    running.close()
    running.close()
    assert time.monotonic() - began < 5
    assert all(is_gone(pid) for pid in pids)


def test_an_iteration_that_was_left_does_not_end_the_next(expected):
    running = loader()
    first = iter(running)
    next(first)
    second = iter(running)
    one = next(second)
    first.close()
    assert digest([one, *second]) == expected


def test_the_process_stays_as_it_was(tmp_path):
    def handler(number, frame):
        pass

    torch.manual_seed(1)
    wanted = torch.rand(2)
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        torch.manual_seed(1)
        list(loader(Fateful(tmp_path, FATES["SIGKILL"][0]), say=lambda line: None))
        assert signal.getsignal(signal.SIGCHLD) is handler
        assert torch.equal(torch.rand(2), wanted)
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_workers_die_with_their_parent(tmp_path):
    child = os.fork()
    if child == 0:
        try:
            running = loader()
            next(iter(running))
            batches = iter(running)
            next(batches)
            (tmp_path / "pids").write_text(" ".join(str(worker.pid) for worker in workers_of(running)))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2 and wait_until(lambda: all(is_gone(pid) for pid in pids))


@pytest.mark.slow
def test_an_exit_without_close_does_not_hang():
    code = ("import sys, time; sys.path.insert(0, 'tests/data')\n"
            "import test_workers as t\n"
            "batches = iter(t.loader()); next(batches); began = time.monotonic()\n"
            "import atexit; raise SystemExit(3)")
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                            cwd=Path(__file__).resolve().parents[2], env={**os.environ, "PYTHONPATH": "."})
    assert result.returncode == 3 and result.stderr == "" and time.monotonic() - began < 25
