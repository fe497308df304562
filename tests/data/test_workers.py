"""Data workers that die, hang or find no memory end the run with one line, and leave nothing behind."""

import contextlib
import gc
import hashlib
import multiprocessing
import os
import re
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
from processes import AnotherProcess, is_gone, wait_until
from torchvision.transforms import v2

from utils.data import loader as data
from utils.data import workers as data_workers
from utils.data.sampler import StepSampler
from utils.data.splits import ArrayImages
from utils.data.workers import WorkerError
from utils.process import REQUESTS

COUNT, STEPS, MICRO_SIZE = 20, 12, 4
KEPT = []            # iterations that the process of a test does not close
CROPPED = v2.Compose([v2.RandomResizedCrop((16, 16)), v2.PILToTensor()])


@pytest.fixture(autouse=True)
def short_poll_interval(monkeypatch):
    monkeypatch.setattr(data_workers, "POLL_S", 0.1)


def pictures() -> ArrayImages:
    random = np.random.default_rng(1)
    return ArrayImages(random.integers(0, 256, (COUNT, 20, 24, 3), dtype=np.uint8), random.integers(0, 3, COUNT))


class Fateful(ArrayImages):
    """Calls `what` in the process that reads the image `index`."""

    def __init__(self, what, index: int = 7):
        whole = pictures()
        super().__init__(whole.images, whole.targets)
        self.what, self.index = what, index

    def __getitem__(self, index):
        if index == self.index:
            self.what()
        return super().__getitem__(index)


def loader(split=None, workers=2, timeout_s=60.0, steps=STEPS, start=0) -> data.Loader:
    order = StepSampler(COUNT, MICRO_SIZE, 1, 0, 1, 3, start, steps)
    return data.train_loader(split or pictures(), order, transform=CROPPED, seed=5, num_workers=workers, pin_memory=False,
                             timeout_s=timeout_s)


def digest(batches) -> str:
    found = hashlib.sha256()
    for batch in batches:
        found.update(batch.images.numpy().tobytes() + batch.targets.numpy().tobytes() + repr(list(batch.keys)).encode())
    return found.hexdigest()


@pytest.fixture(scope="module")
def expected() -> str:
    return digest(loader(workers=0))


def workers_of(running: data.Loader) -> list[multiprocessing.Process]:
    return next(iter(running._running)).processes


def fails(running, named=("df -h /dev/shm", "--num_workers")) -> str:
    """Return the error message with which the loader fails"""
    with pytest.raises(WorkerError) as caught:
        list(running)
    line = str(caught.value)
    assert caught.value.exit_code == 5 and "\n" not in line and not multiprocessing.active_children()
    assert all(words in line for words in named)
    return line


@pytest.mark.contract("P12", "a loader process that dies ends the run with one line and exit code 5")
def test_worker_killed_at_any_instant_ends_the_run(expected, tries, figure):
    random, wanted, ended = np.random.default_rng(0), tries(4, 100), 0
    for _ in range(wanted):
        running = loader()
        at, kind = random.integers(0, STEPS - 6), (signal.SIGKILL, signal.SIGBUS)[random.integers(2)]
        batches = []
        try:
            for number, batch in enumerate(running):
                batches.append(batch)
                if number == at:
                    time.sleep(random.uniform(0, 0.02))
                    os.kill(workers_of(running)[random.integers(2)].pid, kind)
        except WorkerError as error:
            assert f"was killed by {kind.name}" in str(error) and "\n" not in str(error)
            ended += 1
        else:                                       # all batches were loaded before
            assert digest(batches) == expected
    assert ended >= wanted // 2
    figure("SIGKILL or SIGBUS of a loader process at any instant", wanted)


FATES = {
    "SIGBUS": (lambda: os.kill(os.getpid(), signal.SIGBUS), "was killed by SIGBUS"),
    "exit": (lambda: os._exit(3), "ended with exit code 3"),
    "hangs": (lambda: time.sleep(1000), "returned no batch for 0.5 s"),
    "stopped": (lambda: os.kill(os.getpid(), signal.SIGSTOP), "returned no batch for 0.5 s"),
    "no room": (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)), "found no room in shared memory"),
}


@pytest.mark.contract("P12", "a loader process that dies, hangs or finds no shared memory ends the run with exit code 5")
@pytest.mark.parametrize("fate", FATES)
def test_fates_within_an_image_end_the_run(fate, figure):
    what, words = FATES[fate]
    timeout_s = 0.5 if "no batch" in words else 60.0
    assert words in fails(loader(Fateful(what), timeout_s=timeout_s))
    common = {"transform": v2.PILToTensor(), "batch_size": 3, "rank": 0, "world_size": 1, "pin_memory": False}
    assert words in fails(data.eval_loader(Fateful(what), num_workers=2, timeout_s=timeout_s, **common))
    figure(f"a loader process: {fate}", 2)


def test_worker_stopped_while_its_batch_is_sent_is_reported():
    """The worker itself hands over the memory of the batch, so the main process would wait forever for a stopped one."""
    running, seen = loader(timeout_s=0.5), []
    with pytest.raises(WorkerError, match=r"returned no batch for 0\.5 s"):
        for batch in running:
            seen.append(batch)
            if len(seen) == 2:
                time.sleep(0.3)                      # until the next ones are loaded
                for worker in workers_of(running):
                    os.kill(worker.pid, signal.SIGSTOP)


@pytest.mark.parametrize("hang", [False, True])
def test_stream_waits_for_its_source_but_not_for_a_hanging_worker(tmp_path, hang):
    """The source may be standard input, or the turn of a process of predict.py."""
    def batches():
        for number in range(4):
            time.sleep(1.2 * (number == 3))
            yield [str(number)]

    loaded = data.stream_loader(batches(), transform=None, num_workers=1, pin_memory=False, timeout_s=0.5)
    loaded.dataset = Slow("2" if hang else "")
    if hang:
        assert "returned no batch for 0.5 s and were killed" in fails(loaded)
    else:
        assert [batch.keys for batch in loaded] == [["0"], ["1"], ["2"], ["3"]]


class Slow:
    """The files of a stream, of which one hangs."""

    def __init__(self, hanging: str):
        self.hanging = hanging

    def __getitem__(self, path: str) -> tuple:
        time.sleep(60 * (path == self.hanging))
        return torch.zeros(1), -1, None


def test_workers_ignore_signals(expected, monkeypatch):
    """Also those that arrive before a worker ignores them, or while workers are started."""
    worker_init = data_workers._worker_init

    def late(*arguments) -> None:
        signal_all([os.getpid()])
        time.sleep(0.1)
        worker_init(*arguments)

    def signal_all(pids) -> None:
        for pid in pids:
            for kind in REQUESTS:
                os.kill(pid, kind)

    monkeypatch.setattr(data_workers, "_worker_init", late)
    running, batches = loader(), []
    for batch in running:
        batches.append(batch)
        signal_all(worker.pid for worker in workers_of(running))
    assert digest(batches) == expected


def test_bug_is_not_reported_as_a_lost_worker():
    def fail():
        raise OSError("a defect")

    with pytest.raises(OSError, match="a defect"):
        list(loader(Fateful(fail)))
    assert not multiprocessing.active_children()


def test_worker_of_a_killed_process_prints_no_pipe_errors(capfd):
    """Its sending thread finds the pipes closed a moment before the worker is killed too."""
    class InAThread:
        def __getitem__(self, key: int) -> tuple:
            threading.Thread(target=sys.excepthook, args=(EOFError, EOFError("closed"), None), daemon=True).start()
            return (torch.zeros(1),)

    running = iter(data_workers.WorkerPool(InAThread(), [[0]], 1, lambda samples: samples[0], pin_memory=False))
    next(running)
    running.close()
    assert capfd.readouterr().err == ""


# ------------------------------------------------------------------------------------------------ resources


def resources() -> tuple[int, int, int]:
    """Return the numbers of open files, threads and processes"""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(multiprocessing.active_children())


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_nothing_is_left_behind(tries):
    list(loader())
    time.sleep(0.5)                                  # the threads of queues end a little later
    before, pids = resources(), set()
    for number in range(tries(3, 20)):
        running = loader(Fateful(FATES["SIGBUS"][0]) if number % 2 else None)
        batches = iter(running)
        with contextlib.suppress(WorkerError):
            for _ in range(5):
                pids |= {worker.pid for worker in workers_of(running)} if running._running else set()
                next(batches)
        batches.close() if number % 3 else running.close()
    del batches, running
    assert wait_until(lambda: all(now <= then for now, then in zip(resources(), before)), 20), (before, resources())
    assert not [name for name in os.listdir("/dev/shm") if name.split("_")[:1] == ["torch"] and int(name.split("_")[1]) in pids]


def test_hanging_workers_do_not_delay_a_request_to_stop(monkeypatch):
    monkeypatch.setattr(data_workers, "STOP_TIMEOUT_S", 0.5)
    requested_at = time.monotonic() + 0.2
    monkeypatch.setattr(data_workers.process, "requested_at", lambda: requested_at)
    assert re.search(r"returned no batch for [01]\.?\d* s and were killed", fails(loader(Fateful(FATES["hangs"][0]))))


def test_close_ends_hanging_workers(monkeypatch):
    monkeypatch.setattr(data_workers, "GRACE_S", 0.3)
    later = StepSampler(COUNT, MICRO_SIZE, 1, 0, 1, 3, 0, STEPS)[2][0].index
    running = loader(Fateful(FATES["hangs"][0], later))
    batches = iter(running)
    next(batches)
    pids = [worker.pid for worker in workers_of(running)]
    running.close()
    running.close()
    assert all(is_gone(pid) for pid in pids)


def test_abandoned_iteration_does_not_end_the_next(expected):
    running = loader()
    first = iter(running)
    next(first)
    second = iter(running)
    one = next(second)
    first.close()
    assert digest([one, *second]) == expected


def test_loading_keeps_signal_handlers_and_random_state():
    def handler(number, frame):
        pass

    torch.manual_seed(1)
    wanted = torch.rand(2)
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        torch.manual_seed(1)
        list(loader())
        assert signal.getsignal(signal.SIGCHLD) is handler
        assert torch.equal(torch.rand(2), wanted) and not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_workers_die_with_their_parent(tmp_path):
    def start():
        running = loader()
        KEPT.append(iter(running))
        next(KEPT[0])
        (tmp_path / "pids").write_text(" ".join(str(worker.pid) for worker in workers_of(running)))

    with AnotherProcess(start):
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2 and wait_until(lambda: all(is_gone(pid) for pid in pids))


@pytest.mark.slow
def test_exit_without_close_does_not_hang():
    code = ("import test_workers as t\n"
            "batches = iter(t.loader()); next(batches)\n"
            "raise SystemExit(3)")
    here, root = Path(__file__).parent, Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=root,
                            env={**os.environ, "PYTHONPATH": f"{root}:{root}/tests/support:{here}"})
    assert (result.returncode, result.stderr) == (3, "")


def test_long_tmpdir_is_not_used_for_sockets(expected, monkeypatch, tmp_path):
    """A batch goes through a socket, whose path has a maximum length; an error in the sending thread would be lost."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert digest(loader()) == expected and not list(long.iterdir())
    monkeypatch.setattr(data_workers.temporary, "SHORT", ())
    for folder in (long, tmp_path / "gone"):
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        fails(loader(), ["cannot make a socket in a folder for temporary files", "TMPDIR"])


@pytest.mark.parametrize("hanging", [1, 2])
def test_worker_that_hangs_at_its_start_is_restarted(expected, monkeypatch, tmp_path, hanging):
    """A forked child may wait for a lock of its parent's other threads."""
    def begin():
        for number in range(hanging):
            with contextlib.suppress(FileExistsError):
                (tmp_path / str(number)).touch(exist_ok=False)
                time.sleep(1000)

    monkeypatch.setattr(data_workers, "START_LIMITS_S", (0.5, 20.0))
    monkeypatch.setattr(data_workers.process, "die_with_parent", begin)
    assert digest(loader()) == expected and len(list(tmp_path.iterdir())) == hanging
    assert not multiprocessing.active_children()
