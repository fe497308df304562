"""The processes of one run, for tests: forked, so that none has to load PyTorch, and connected as by torchrun."""

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed import TCPStore

from utils import distributed, process

DEADLINE_S = 120     # after which a test fails instead of hanging


class Ranks:
    """`with Ranks(size, work, folder) as ranks:` runs work(ranks) in `size` processes; its results are in folder/RANK.pt.

    A process ends with code 0, with the exit code of an error that has one, or with 1 and a traceback; the error message is in
    folder/RANK.error. Processes that are still running at the end of the block are killed.
    """

    def __init__(self, size: int, work: Callable[[distributed.Ranks], object], folder: Path, timeout_s: int = 60,
                 nodes: bool = False):
        """nodes: each process is on its own node."""
        self.size, self.folder, self.nodes, self.codes = size, folder, nodes, {}
        self._keep_store()
        self.pids = [self._fork(rank, work, timeout_s) for rank in range(size)]

    def _keep_store(self) -> None:
        """Host the store in a separate process, like torchrun's agent: it outlives any rank, and its threads are not forked."""
        reader, writer = os.pipe()
        self._keeper = os.fork()
        if not self._keeper:
            process.die_with_parent()
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(writer, str(store.port).encode())
            signal.pause()
            os._exit(0)
        self._port = int(os.read(reader, 10))
        os.close(reader)
        os.close(writer)

    def _fork(self, rank: int, work, timeout_s: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            process.die_with_parent()
            for name in (signal.SIGINT, signal.SIGTERM):
                signal.signal(name, signal.SIG_DFL)
            torch.set_num_threads(1)
            place = {"RANK": rank, "WORLD_SIZE": self.size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": self.size}
            if self.nodes:
                place |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": rank, "TORCHELASTIC_RUN_ID": "attempt-1"}
            os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=str(self._port), TORCHELASTIC_USE_AGENT_STORE="True")
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            with distributed.init("cpu", timeout_s) as ranks:
                torch.save(work(ranks), self.folder / f"{rank}.pt")
            code = 0
        except BaseException as error:
            message, code = process.classify_error(error)
            (self.folder / f"{rank}.error").write_text(message or str(error))
            code = getattr(error, "code", None) or code
            if code == 1:
                traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self, ranks=None) -> list[int]:
        """-> the exit codes of `ranks` (default: all), -9 for a killed process"""
        deadline = time.monotonic() + DEADLINE_S
        ranks = list(range(self.size)) if ranks is None else ranks
        while set(ranks) - set(self.codes):
            for rank in set(ranks) - set(self.codes):
                pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                if pid:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline, "the ranks hang"
            time.sleep(0.02)
        return [self.codes[rank] for rank in ranks]

    def results(self) -> list:
        assert self.wait() == [0] * self.size, [path.read_text() for path in self.folder.glob("*.error")]
        return [torch.load(self.folder / f"{rank}.pt") for rank in range(self.size)]

    def error(self, rank: int) -> str:
        return (self.folder / f"{rank}.error").read_text()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_) -> None:
        for pid in [self._keeper, *(self.pids[rank] for rank in range(self.size) if rank not in self.codes)]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
