"""How processes end when another is killed, stopped, asleep, out of memory or has an error."""

import errno
import os
import signal
import time

import pytest
import torch
from ranks import Ranks
from torch import nn

from utils import distributed
from utils.device import SMALLER_EVALUATION, OutOfMemory
from utils.distributed import PeerLost
from utils.training.precision import FP32, warm_up

ONE_RANK = distributed.Ranks(0, 1, 0, 1, torch.device("cpu"))
TIMEOUT_S = 3           # other collectives wait for hours


class BadImage(ValueError):
    exit_code = 5


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(1000),
    "error": lambda: BadImage("bad.png: cut off"),
    "disk": lambda: OSError(errno.EIO, "Input/output error", "/data/x"),
    "memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
}


def training(fault: str, victim: int, place: str, half_gradients: bool = False):
    """Return a function that trains a small model; in step 4 the victim has the fault before, in or after its backward pass.

    half_gradients: as with train_fp16.sh at its default level O2.
    """
    def work(ranks: distributed.Ranks) -> None:
        torch.manual_seed(0)
        model, done = nn.Linear(8, 8), []
        wrapped = distributed.wrap(model, ranks, half_gradients)
        warm_up(wrapped, torch.zeros(1, 8), FP32)

        def fail_in(where: str) -> None:
            if len(done) == 3 and (ranks.rank, where) == (victim, place) and (error := FAULTS[fault]()):
                raise error

        model.weight.register_hook(lambda gradient: fail_in("backward"))
        with distributed.watch(ranks, lambda: f"step {len(done) + 1}"):
            while len(done) < 6:
                fail_in("forward")
                wrapped(torch.ones(2, 8)).sum().backward()
                distributed.all_reduce_sum(torch.zeros(2, dtype=torch.float64))
                fail_in("step")
                done.append(0)

    return work


@pytest.mark.slow
@pytest.mark.contract("P10", "where a process dies or hangs, the others end with code 8 and one line, within the timeout")
def test_lost_process_ends_the_others(tmp_path, tries, figure):
    cases = [("kill", 2, 0, False), ("stop", 3, 1, True), ("sleep", 2, 1, True), ("kill", 3, 2, True), ("stop", 2, 0, False),
             ("kill", 4, 1, False), ("sleep", 3, 0, False), ("stop", 4, 3, True), ("kill", 2, 1, True)][:tries(2, 9)]
    for fault, size, victim, half_gradients in cases:
        with Ranks(size, training(fault, victim, "forward", half_gradients), tmp_path, TIMEOUT_S) as ranks:
            others = [rank for rank in range(size) if rank != victim]
            assert ranks.wait(others) == [8] * len(others)
            lines = [ranks.error(rank) for rank in others]
            words = "has ended (" if fault == "kill" else f"did not answer within {TIMEOUT_S} s (--rank_timeout)"
            assert any(words in line for line in lines)         # the rest may report the first one that ended because of this
            assert all(line.startswith("step 4: another process of the run ") and "\n" not in line for line in lines)
    figure("processes killed, stopped or asleep among 2 to 4", len(cases))


@pytest.mark.slow
@pytest.mark.contract("P16", "out of memory on one process is one line with its exit code, and ends all")
def test_error_of_one_process_ends_all(tmp_path, tries, figure):
    cases = [("memory", 2, 1, "backward"), ("error", 3, 0, "forward"), ("memory", 2, 0, "forward"), ("memory", 3, 1, "step"),
             ("error", 2, 1, "step")][:tries(2, 5)]
    for fault, size, victim, place in cases:
        with Ranks(size, training(fault, victim, place), tmp_path) as ranks:
            code = 5 if fault == "error" else 6
            assert ranks.wait() == [code if rank == victim else 8 for rank in range(size)]
            line = ranks.error(victim)
            assert line == "bad.png: cut off" if code == 5 else line.startswith("step 4: out of memory; lower --train_batch_size")
    figure("lack of memory or an error on one of 2 or 3 processes", len(cases))


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "code", "line"),
                         [("error", 5, "bad.png: cut off"), ("disk", 2, "/data/x: Input/output error")])
def test_all_nodes_end_with_the_code_of_the_error(tmp_path, fault, code, line):
    """Not with the code of a loss, after which torchrun would restart their processes."""
    with Ranks(2, training(fault, 1, "forward"), tmp_path, nodes=True) as ranks:
        assert ranks.wait() == [code, code] and ranks.error(1) == line
        assert ranks.error(0) == f"a process on another node has ended the run with exit code {code}; its output says why"


@pytest.mark.slow
def test_process_lost_while_the_run_is_set_up_or_ends(tmp_path):
    def work(ranks: distributed.Ranks) -> None:
        if ranks.rank == 1:
            FAULTS["kill"]()
        if in_setup:
            distributed.all_gather_objects(ranks, 1)

    for in_setup in (True, False):
        with Ranks(2, work, tmp_path, TIMEOUT_S) as ranks:
            assert ranks.wait([0]) == [8]
            assert ranks.error(0).startswith("setting up: " if in_setup else "at the end of the run: ")


@pytest.mark.parametrize("words", [
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation to complete",
    "Application timeout caused pair closure",      # an earlier error in a thread of gloo
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1. This is typically"])
def test_failed_collective_is_recognized(words):
    line = r"^step 7: another process of the run (did not answer|has ended \(Connection cl)"
    with pytest.raises(PeerLost, match=line) as caught, distributed.watch(ONE_RANK, lambda: "step 7"):
        raise RuntimeError(words)
    assert caught.value.exit_code == 8
    with pytest.raises(RuntimeError, match="shape"), distributed.watch(ONE_RANK, lambda: "step 7"):
        raise RuntimeError("shape '[2]' is invalid")


def test_out_of_memory_is_reported_with_the_right_advice():
    with pytest.raises(OutOfMemory, match="step 7: out of memory; lower --train_batch_size, or raise --gradient_acc") as one, \
            distributed.watch(ONE_RANK, lambda: "step 7"):
        raise MemoryError
    assert one.value.exit_code == 6
    with pytest.raises(OutOfMemory, match="setting up: out of memory; what a run needs"), distributed.init("cpu"):
        raise MemoryError
    with pytest.raises(OutOfMemory, match=r"evaluation: out of memory; lower --eval_batch_size$"), \
            distributed.watch(ONE_RANK, lambda: "step 7"), distributed.watch(ONE_RANK, lambda: "evaluation", SMALLER_EVALUATION):
        raise MemoryError
    with pytest.raises(KeyError), distributed.watch(ONE_RANK, lambda: "step 7"):
        raise KeyError


def test_process_on_a_cpu_keeps_the_memory_of_its_steps(monkeypatch):
    kept = []
    monkeypatch.setattr("utils.distributed.ranks.keep_memory", lambda: kept.append(True))
    with distributed.init("cpu"):
        assert kept == [True]
