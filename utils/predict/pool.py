"""Processes that predict. Each asks for a batch when it has room for one; their answers come in the order of the batches.

They are forked, and so have the model without loading it: the process that calls this has neither used a GPU nor computed with
several threads before. None of them waits without end for a file, since each has loader processes, which have a time limit.
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

GRACE_S = 2.0        # for processes to end by themselves
AHEAD = 8            # batches for each process that may be under way or done before the oldest is
MORE, ANSWER, FAILED = "more", "answer", "failed"
Work = Callable[[Iterable[Sequence], int], Iterator[object]]         # (batches, number of the process) -> their answers, in order


class ProcessError(ValueError):
    """One that a process has reported; `exit_code` is that of its error."""

    exit_code = process.EXIT_BAD_INPUT


class _Child:
    def __init__(self, context: multiprocessing.context.BaseContext, work: Work, number: int, others: Sequence["_Child"]):
        self.pipe, theirs = context.Pipe()
        self.numbers: list[int] = []        # of the batches that it has, in order
        self.process = context.Process(target=_live, args=(work, number, theirs, [self.pipe, *(each.pipe for each in others)]))
        self.process.start()
        theirs.close()                      # so that its death closes the pipe

    def send(self, batch: Sequence | None) -> None:
        try:
            self.pipe.send(batch)
        except OSError:
            raise self.lost() from None

    def receive(self) -> tuple:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            raise self.lost() from None

    def lost(self) -> WorkerError:
        self.process.join(5)
        return WorkerError(f"process {self.process.pid}, one of those that predict, {ending(self.process.exitcode)}: is memory "
                           "short? Fewer processes (--nproc) or smaller batches (--batch_size) take less")

    def end(self, deadline: float) -> None:
        """After its pipe is closed: then it ends by itself, its loaders before it. After the deadline it is killed."""
        self.process.join(max(0.0, deadline - time.monotonic()))
        self.process.kill()
        self.process.join()


def in_order(work: Work, batches: Iterator[Sequence], count: int) -> Iterator[tuple[Sequence, object]]:
    """(batch, answer) of every batch in order, by `count` processes; by this one alone if that is 1.

    Raises WorkerError where a process is lost, and ProcessError for what a process raises.
    """
    if count == 1:
        under_way = collections.deque()
        yield from ((under_way.popleft(), answer) for answer in work(_remembered(batches, under_way), 0))
        return
    context, children = multiprocessing.get_context("fork"), []
    try:
        with process.signals_blocked():             # until they ignore them
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
    asking, under_way, answers = [], {}, {}
    given = done = 0
    ended = False
    by_pipe = {child.pipe: child for child in children}
    while not (ended and done == given):
        # The process that has the oldest batch always gets another one: its loader may hand the oldest out only then.
        while child := next((child for child in asking if ended or given - done < AHEAD * len(children)
                             or child.numbers[:1] == [done]), None):
            batch = None if ended else next(batches, None)
            ended = batch is None
            asking.remove(child)
            if not ended:
                under_way[given] = batch
                child.numbers.append(given)
                given += 1
            child.send(batch)
        for pipe in wait(list(by_pipe)) if not ended or done < given else ():
            child = by_pipe[pipe]
            kind, content = child.receive()
            if kind == MORE:
                asking.append(child)
            elif kind == ANSWER:
                answers[child.numbers.pop(0)] = content
            else:
                _raise(*content)
        while done in answers:
            yield under_way.pop(done), answers.pop(done)
            done += 1


def _raise(message: str | None, code: int, trace: str) -> None:
    if message is None:
        raise RuntimeError(f"a process that predicts has failed:\n{trace}")
    error = ProcessError(message)
    error.exit_code = code
    raise error


def _live(work: Work, number: int, pipe: Connection, others: Sequence[Connection]) -> None:
    """A child. It ends with the one that started it."""
    process.die_with_parent()
    process.ignore_signals()
    for other in others:
        other.close()
    with contextlib.suppress(OSError):              # the other one is gone
        try:
            for answer in work(_asked(pipe), number):
                pipe.send((ANSWER, answer))
            pipe.recv()                             # until it is ended
        except EOFError:
            pass
        except Exception as error:
            pipe.send((FAILED, (*process.classify_error(error), traceback.format_exc())))


def _asked(pipe: Connection) -> Iterator[Sequence]:
    while True:
        pipe.send((MORE, None))
        batch = pipe.recv()
        if batch is None:
            return
        yield batch
