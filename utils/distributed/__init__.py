"""Several processes of one run: the only user of torch.distributed. One process is a group of size 1."""

from utils.device import DeviceError, OutOfMemory

from .collectives import first_on_node, gather, on_main, parts_of_ranks, share_weights, sum_over_ranks
from .ddp import without_sync, wrap
from .ranks import PeerLost, World, group, watching

__all__ = [
    "DeviceError", "OutOfMemory", "PeerLost", "World", "first_on_node", "gather", "group", "on_main", "parts_of_ranks",
    "share_weights", "sum_over_ranks", "watching", "without_sync", "wrap",
]
