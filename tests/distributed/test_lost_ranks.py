"""Processes that are killed, stopped, asleep, out of memory or in error: what the others say, and how soon they end."""

import os
import signal
import time

import pytest
import torch
from ranks import Ranks
from torch import nn

from utils import distributed
from utils.distributed import World, lost_ranks
from utils.distributed.lost_ranks import ENDED, FAILED_TOO, OutOfMemory, fate, lost, out_of_memory
from utils.training.precision import FP32, warm_up

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
TIMEOUT_S = 3


class BadImage(ValueError):
    code = 5


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(1000),
    "error": lambda: BadImage("bad.png: cut off"),
    "memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "allocator": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
}


def training(fault: str, victim: int, place: str, folder, half_gradients: bool = False):
    """Steps of a small model; in step 4 the victim has the fault before, in or after its backward pass.

    half_gradients: as train_fp16.sh sends them at its default level O2.
    """
    def work(world: World) -> None:
        torch.manual_seed(0)
        model, done = nn.Linear(8, 8), []
        wrapped = distributed.wrap(model, world, half_gradients)
        warm_up(wrapped, torch.zeros(1, 8), FP32)

        def fail_in(where: str) -> None:
            if len(done) == 3 and (world.rank, where) == (victim, place):
                (folder / "fault").write_text(str(time.time()))
                error = FAULTS[fault]()
                if error is not None:
                    raise error

        model.weight.register_hook(lambda gradient: fail_in("backward"))
        with distributed.watching(world, lambda: f"step {len(done) + 1}"):
            while len(done) < 6:
                fail_in("forward")
                wrapped(torch.ones(2, 8)).sum().backward()
                distributed.sum_over_ranks(torch.zeros(2, dtype=torch.float64))
                fail_in("step")
                done.append(0)

    return work


def is_in_time(ranks: Ranks, rank: int, seconds: float) -> bool:
    """From the fault to the error, on a machine that has a core for this test; another one may take longer."""
    slack = 0 if os.getloadavg()[0] < os.cpu_count() else 6
    return ranks.time_of_error(rank) - float((ranks.folder / "fault").read_text()) < seconds + slack


@pytest.mark.slow
@pytest.mark.contract("P10", "where a process dies or hangs, the others end within the timeout and 2 s, and name it")
def test_a_lost_process_is_named_in_time(tmp_path, tries, figure):
    cases = [("kill", 2, 0, False), ("stop", 3, 1, True), ("sleep", 2, 1, True), ("kill", 3, 2, True), ("stop", 2, 0, False),
             ("kill", 4, 1, False), ("sleep", 3, 0, False), ("stop", 4, 3, True), ("kill", 2, 1, True)][:tries(2, 9)]
    for fault, size, victim, half_gradients in cases:
        with Ranks(size, training(fault, victim, "forward", tmp_path, half_gradients), tmp_path, TIMEOUT_S) as ranks:
            others = [rank for rank in range(size) if rank != victim]
            assert ranks.wait(others) == [8] * len(others)
            assert all(is_in_time(ranks, rank, (0 if fault == "kill" else TIMEOUT_S) + 2) for rank in others)
            said = [ranks.error(rank) for rank in others]
            assert [quiet for quiet, _ in said] == [False] + [True] * (len(others) - 1)            # it is said once
            name = f"step 4: rank {victim} (pid {ranks.pids[victim]} on "
            word = {"kill": "has ended without a word", "stop": "is stopped: it did not come within 3 s",
                    "sleep": "hangs: it did not come within 3 s"}[fault]
            assert all(line.startswith(name) and word in line and "\n" not in line for _, line in said)
    figure("processes killed, stopped or asleep among 2 to 4", len(cases))


@pytest.mark.slow
@pytest.mark.contract("P16", "out of memory on one process ends all with its exit code and one line")
def test_an_error_of_one_process_ends_all_with_its_code(tmp_path, tries, figure):
    cases = [("memory", 2, 1, "backward"), ("error", 3, 0, "forward"), ("memory", 2, 0, "forward"), ("memory", 3, 1, "step"),
             ("allocator", 2, 1, "forward"), ("allocator", 3, 2, "backward"), ("error", 2, 1, "step")][:tries(2, 7)]
    for fault, size, victim, place in cases:
        with Ranks(size, training(fault, victim, place, tmp_path), tmp_path) as ranks:
            code = 5 if fault == "error" else 6
            assert ranks.wait() == [code] * size
            assert all(is_in_time(ranks, rank, distributed.FAREWELL_S + 2) for rank in range(size))     # not the timeout's 60 s
            for rank in range(size):
                quiet, line = ranks.error(rank)
                assert quiet == (rank != victim) and "\n" not in line
                if rank == victim:
                    assert line == "bad.png: cut off" if code == 5 else line.startswith("step 4: out of memory; lower --train_b")
    figure("lack of memory or an error on one of 2 or 3 processes", len(cases))


@pytest.mark.slow
def test_an_error_that_all_have_needs_no_waiting(tmp_path):
    def work(world: World) -> None:
        with distributed.watching(world, lambda: "step 1"):
            (tmp_path / "fault").write_text(str(time.time()))
            raise BadImage("all of them")

    with Ranks(2, work, tmp_path) as ranks:
        assert ranks.wait() == [5, 5] and is_in_time(ranks, 0, 1) and is_in_time(ranks, 1, 1)
        assert [ranks.error(rank) for rank in (0, 1)] == [(False, "all of them")] * 2


# ------------------------------------------------------------------------------------------------- what is said


def told(monkeypatch, words: dict[int, int], fates: dict[int, str], own: int = 0):
    monkeypatch.setattr(lost_ranks, "fate", lambda pid, host: fates[pid - 100])
    size = 1 + max([*words, *fates, own])
    return lost(own, words, [(100 + rank, "here") for rank in range(size)], "step 13", 600, RuntimeError("gloo: a\nb"))


def test_who_is_named(monkeypatch):
    one = told(monkeypatch, {0: FAILED_TOO, 2: FAILED_TOO}, {1: ENDED})
    assert str(one).startswith("step 13: rank 1 (pid 101 on here) has ended without a word: killed") and one.code == 8
    assert not one.quiet and told(monkeypatch, {0: FAILED_TOO, 2: FAILED_TOO}, {1: ENDED}, own=2).quiet
    busy = told(monkeypatch, {0: FAILED_TOO}, {1: "hangs", 2: ENDED})            # 1 may only be behind
    assert "rank 2" in str(busy) and "rank 1" not in str(busy)
    both = told(monkeypatch, {0: FAILED_TOO}, {1: "ended or hangs", 2: "hangs"})
    assert ("rank 1 (pid 101 on here) ended or hangs, rank 2 (pid 102 on here) hangs: it did not come within 600 s "
            "(--rank_timeout)") in str(both)
    nobody = told(monkeypatch, {0: FAILED_TOO, 1: FAILED_TOO}, {})
    assert str(nobody).startswith("step 13: the processes lost each other: gloo: a; --resume_path") and nobody.code == 8


def test_a_word_of_another_is_enough(monkeypatch):
    one = told(monkeypatch, {0: FAILED_TOO, 1: 6}, {2: "hangs"})
    assert one.quiet and one.code == 6
    assert not told(monkeypatch, {0: FAILED_TOO, 1: 6}, {2: ENDED}).quiet            # a death is told in any case


def test_fates():
    pid = os.fork()
    if not pid:
        signal.pause()
    try:
        host = os.uname().nodename
        assert fate(pid, host) == "hangs" and fate(pid, "elsewhere") == "ended or hangs"
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        assert fate(pid, host) == "is stopped"
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert fate(pid, host) == ENDED                     # nobody has collected it yet
    finally:
        os.waitpid(pid, 0)
    assert fate(pid, host) == ENDED


@pytest.mark.parametrize(("error", "expected"), [
    (torch.OutOfMemoryError("CUDA out of memory"), True), (MemoryError(), True), (FAULTS["allocator"](), True),
    (RuntimeError("[...] not enough memory: you tried to allocate 9 bytes"), True), (RuntimeError("Connection closed"), False),
    (ValueError("can't allocate memory"), False)])
def test_out_of_memory(error, expected):
    assert out_of_memory(error) == expected


def test_a_lack_of_memory_of_one_process_alone():
    with pytest.raises(OutOfMemory, match="step 7: out of memory; lower --train_batch_size, or raise --gradient_acc") as one, \
            distributed.watching(ALONE, lambda: "step 7"):
        raise MemoryError
    assert one.value.code == 6
    with pytest.raises(KeyError), distributed.watching(ALONE, lambda: "step 7"):
        raise KeyError


def test_figures_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 70 * 2 ** 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 ** 29, 80 * 2 ** 30))
    line = str(lost_ranks.used_up(torch.device("cuda", 0), "step 2"))
    assert "step 2: out of memory of the GPU (70.0 GiB in use at the peak, 0.5 of 80.0 GiB free now); lower" in line
