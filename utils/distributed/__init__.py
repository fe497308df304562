"""The processes of one run. Only this package uses torch.distributed. A single process is a group of size 1."""

from .collectives import all_gather, all_gather_objects, all_reduce_sum, broadcast_from_main, broadcast_weights, local_main_first
from .ddp import no_sync, unwrap, wrap
from .ranks import PeerLost, Ranks, before_end, init, to_host, wait_for, watch
