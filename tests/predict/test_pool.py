"""Processes that predict: the order of the results, how far they run ahead, and what ends them."""

import io
import itertools
import os
import signal
import threading
import time

import pytest
from processes import is_gone, wait_until

from utils.data.splits import DataError
from utils.data.workers import WorkerError
from utils.predict import pool, sources
from utils.predict.pool import in_order


def squares(batches, number):
    """Return squares, more slowly in the first process, one batch behind as a loader is."""
    waiting = []
    for batch in batches:
        time.sleep(0.02 * (number == 0))
        waiting.append([key * key for key in batch])
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_are_in_the_order_of_the_batches(count):
    batches = [[number, number + 1] for number in range(25)]
    assert list(in_order(squares, iter(batches), count)) == [(batch, [key * key for key in batch]) for batch in batches]
    assert list(in_order(squares, iter([]), count)) == []


@pytest.mark.parametrize("count", [1, 2])
def test_an_endless_source_is_read_no_further_than_needed(count):
    taken = []
    batches = (taken.append(number) or [number] for number in itertools.count())
    answers = in_order(squares, batches, count)
    for number in range(100):
        assert next(answers) == ([number], [number * number])
        assert len(taken) - number <= pool.AHEAD * count + 3
    answers.close()


@pytest.mark.parametrize("count", [1, 2])
def test_results_are_returned_while_the_source_pauses(count, monkeypatch):
    """Including batches that loaders have prefetched, while standard input stays open without a further line."""
    reader, writer = os.pipe()
    monkeypatch.setattr(sources.sys, "stdin", io.TextIOWrapper(os.fdopen(reader, "rb")))
    os.write(writer, b"".join(b"%d\n" % number for number in range(10)))
    batches, got = sources.Batches((item and int(item.name) for item in sources.open_sources(["-"])), 4), []
    closing = threading.Timer(20, os.close, [writer])
    closing.start()
    answers = in_order(squares, batches, count)
    for batch, answer in answers:
        batches.answered(batch)
        got += answer
        if len(got) == 10:
            break
    assert closing.is_alive() and got == [number * number for number in range(10)]
    closing.cancel()
    answers.close()
    os.close(writer)


def test_an_error_of_a_process_is_raised_in_the_main_process_with_its_code():
    def fail(batches, number):
        yield next(batches)
        raise (DataError("x.png: gone") if number == 1 else error)

    error = DataError("x.png: gone")
    with pytest.raises(pool.ProcessError, match=r"^x\.png: gone$") as caught:
        list(in_order(fail, iter([[1]] * 9), 2))
    assert caught.value.exit_code == 2
    error = KeyError("bug")
    with pytest.raises(RuntimeError, match="KeyError: 'bug'"):
        for _ in in_order(lambda batches, number: fail(batches, 0), iter([[1]] * 9), 2):
            pass


def test_a_lost_process_is_reported_in_one_line_and_the_others_end():
    def die(batches, number):
        for batch in batches:
            if batch[0] == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            yield os.getpid()

    pids, answers = set(), in_order(die, iter([[number] for number in range(20)]), 2)
    with pytest.raises(WorkerError, match=r"one of those that predict, was killed by SIGKILL\. .*--nproc") as caught:
        for _, pid in answers:
            pids.add(pid)
    assert caught.value.exit_code == 5 and pids and wait_until(lambda: all(map(is_gone, pids)))


def test_an_early_stop_leaves_no_process_and_each_ends_in_order(tmp_path):
    """Loaders of a killed process might print errors about their pipes."""
    def work(batches, number):
        try:
            yield from (os.getpid() for _ in batches)
        finally:
            (tmp_path / str(number)).touch()

    answers = in_order(work, iter([[1]] * 50), 2)
    pids = {next(answers)[1] for _ in range(10)}
    answers.close()
    assert wait_until(lambda: all(map(is_gone, pids)))
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]
