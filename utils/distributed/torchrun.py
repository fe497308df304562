"""Runs torchrun for train.sh, with the rendezvous of nodes.py. A killed process or a lost node is reported in one line, not in
torchrun's forty.

    python -m utils.distributed.torchrun --standalone --nproc_per_node 2 train.py ...
"""

import signal
import sys

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from utils import launch
from utils.process import EXIT_PEER_LOST, EXIT_PREEMPTED

from . import nodes

# train.sh kills processes that have not ended 10 s after another one failed, torchrun after 30 s. Timestamps are whole seconds.
OWN_KILLS_AFTER_S = 5


def main(argv: list[str]) -> int:
    nodes.register()
    try:
        run.main(argv)
        nodes.leave()
    except launch.LaunchError as error:
        return fail(str(error), error.exit_code)
    except DistError as error:
        return fail(f"another node is lost or did not connect: {error}".partition("\n")[0], EXIT_PEER_LOST)
    except SignalException:
        if not launch.is_asked_to_stop():
            raise
        return EXIT_PREEMPTED
    except ChildFailedError as error:
        # Processes that lost the killed one may have ended before torchrun checked. Later kills are by train.sh or torchrun.
        _, first = error.get_first_failure()
        killed = [(rank, failure) for rank, failure in error.failures.items()
                  if failure.exitcode == -signal.SIGKILL and failure.timestamp <= first.timestamp + OWN_KILLS_AFTER_S]
        if killed:
            return fail(describe(*killed[0]), 1)
        if any(failure.exitcode != EXIT_PEER_LOST for failure in error.failures.values()):
            raise
        return EXIT_PEER_LOST           # the processes have reported it; what they lost was on another node
    return 0


def fail(message: str, code: int) -> int:
    print(f"train.sh: error: {message}", file=sys.stderr, flush=True)
    return code


def describe(rank: int, failure: ProcessFailure) -> str:
    return (f"process {rank} (pid {failure.pid}) was killed by signal 9, probably because the machine is out of memory (see "
            "dmesg). Raise GRAD_STEPS, which keeps the steps the same, or lower EVAL_BATCH_SIZE or --num_workers. RESUME_PATH "
            "continues from the last checkpoint, if there is one")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
