"""torchrun as train.sh starts it: a process that was killed is one line, in place of a report of forty.

    python -m utils.distributed.torchrun --standalone --nproc_per_node 2 train.py ...
"""

import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

# train.sh kills what has not ended 10 s after another process failed, torchrun itself after 30 s. Timestamps are whole seconds.
OWN_KILLS_AFTER_S = 5


def main(argv: list[str]) -> int:
    try:
        run.main(argv)
    except ChildFailedError as error:
        # Another process that lost it may have ended before torchrun looked; a later kill is train.sh's or torchrun's own.
        _, first = error.get_first_failure()
        killed = [(rank, failure) for rank, failure in error.failures.items()
                  if failure.exitcode == -signal.SIGKILL and failure.timestamp <= first.timestamp + OWN_KILLS_AFTER_S]
        if not killed:
            raise
        print(f"train.sh: error: {describe(*killed[0])}", file=sys.stderr, flush=True)
        return 1
    return 0


def describe(rank: int, failure: ProcessFailure) -> str:
    return (f"process {rank} (pid {failure.pid}) was killed by signal 9, probably because the machine is out of memory (dmesg "
            "tells): raise GRAD_STEPS, which keeps the steps as they are, or lower EVAL_BATCH_SIZE or --num_workers; RESUME_PATH "
            "continues from the last checkpoint, if there is one")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
