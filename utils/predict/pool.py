"""Processes that predict. Each requests a batch when it has room for one; the answers are in the order of the batches.

They are forked, so they have the model without loading it: the parent must not have used a GPU, nor have computed in several
threads. None of them waits for a file forever, since each has loader processes, which have a time limit.
"""

import collections
import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait

from utils import process
from utils.data.workers import WorkerError, ending

GRACE_S = 2.0        # seconds for processes to end by themselves
AHEAD = 8            # batches for each process that may be computed before the oldest is done
MORE, ANSWER, FAILED = "more", "answer", "failed"
Work = Callable[[Iterable[Sequence], int], Iterator[object]]         # (batches, number of the process) -> answers in order


class ProcessError(ValueError):
    """Raised for an error that a process has reported; `exit_code` is that of the error."""

    exit_code = process.EXIT_BAD_INPUT


class _Child:
    def __init__(self, context: multiprocessing.context.BaseContext, work: Work, number: int, others: Sequence["_Child"]):
        self.pipe, theirs = context.Pipe()
        self.numbers: list[int] = []        # of its batches, in order
        self.process = context.Process(target=_live, args=(work, number, theirs, [self.pipe, *(each.pipe for each in others)]))
        self.process.start()
        theirs.close()                      # so that its death closes the pipe

    def send(self, batch: Sequence | None) -> None:
        try:
            self.pipe.send(batch)
        except OSError:
            raise self.worker_lost_error() from None

    def receive(self) -> tuple:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            raise self.worker_lost_error() from None

    def worker_lost_error(self) -> WorkerError:
        self.process.join(5)
        return WorkerError(f"process {self.process.pid}, one of those that predict, {ending(self.process.exitcode)}. If memory "
                           "is short, fewer processes (--nproc) or smaller batches (--batch_size) need less")

    def end(self, deadline: float) -> None:
        """Wait for its end; kill it after the deadline. Its pipe must be closed: then it ends its loaders and itself."""
        self.process.join(max(0.0, deadline - time.monotonic()))
        self.process.kill()
        self.process.join()


def in_order(work: Work, batches: Iterator[Sequence], count: int) -> Iterator[tuple[Sequence, object]]:
    """Yield (batch, answer) for every batch in order, computed by `count` processes, or by this one if that is 1.

    Raises WorkerError where a process is lost, and ProcessError for what a process raises.
    """
    if count == 1:
        under_way = collections.deque()
        yield from ((under_way.popleft(), answer) for answer in work(_remembered(batches, under_way), 0))
        return
    context, children = multiprocessing.get_context("fork"), []
    try:
        with process.signals_blocked():             # until the children ignore them
            for number in range(count):
                children.append(_Child(context, work, number, children))
        yield from _exchange(children, batches)
    finally:
        for child in children:
            child.pipe.close()
        deadline = time.monotonic() + GRACE_S
        for child in children:
            child.end(deadline)


def _remembered(batches: Iterable[Sequence], under_way: collections.deque) -> Iterator[Sequence]:
    for batch in batches:
        under_way.append(batch)
        yield batch


def _exchange(children: Sequence[_Child], batches: Iterator[Sequence]) -> Iterator[tuple[Sequence, object]]:
    requesting, under_way, answers = [], {}, {}
    sent = done = 0
    ended = False
    by_pipe = {child.pipe: child for child in children}
    while not (ended and done == sent):
        # The process with the oldest batch always gets another one: its loader may only then return the oldest.
        while child := next((child for child in requesting if ended or sent - done < AHEAD * len(children)
                             or child.numbers[:1] == [done]), None):
            batch = None if ended else next(batches, None)
            ended = batch is None
            requesting.remove(child)
            if not ended:
                under_way[sent] = batch
                child.numbers.append(sent)
                sent += 1
            child.send(batch)
        for pipe in wait(list(by_pipe)) if not ended or done < sent else ():
            child = by_pipe[pipe]
            kind, content = child.receive()
            if kind == MORE:
                requesting.append(child)
            elif kind == ANSWER:
                answers[child.numbers.pop(0)] = content
            else:
                _raise(*content)
        while done in answers:
            yield under_way.pop(done), answers.pop(done)
            done += 1


def _raise(message: str | None, code: int, trace: str) -> None:
    if message is None:
        raise RuntimeError(f"a process that predicts failed:\n{trace}")
    error = ProcessError(message)
    error.exit_code = code
    raise error


def _live(work: Work, number: int, pipe: Connection, others: Sequence[Connection]) -> None:
    """Run a child, which ends with its parent."""
    process.die_with_parent()
    process.ignore_signals()
    for other in others:
        other.close()
    with contextlib.suppress(OSError):              # the parent is gone
        try:
            for answer in work(_requested(pipe), number):
                pipe.send((ANSWER, answer))
            pipe.recv()                             # waits for the end
        except EOFError:
            pass
        except Exception as error:
            pipe.send((FAILED, (*process.classify_error(error), traceback.format_exc())))


def _requested(pipe: Connection) -> Iterator[Sequence]:
    while True:
        pipe.send((MORE, None))
        batch = pipe.recv()
        if batch is None:
            return
        yield batch
