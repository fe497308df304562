"""Batches are fetched ahead of a GPU, and nowhere else."""

import pytest
import torch

from utils.data.loader import Batch
from utils.data.prefetch import ahead
from utils.data.splits import ImageError


def test_without_a_gpu_nothing_is_fetched_ahead():
    batches = iter(range(3))
    passed = ahead(batches, torch.device("cpu"))
    assert next(passed) == 0 and next(batches) == 1 and list(passed) == [2]


@pytest.mark.gpu
def test_batches_arrive_whole_in_their_order_and_errors_in_their_turn():
    device, given = torch.device("cuda"), []

    def batches():
        for number in range(5):
            given.append(number)
            yield Batch(torch.full((4, 3, 32, 32), number, dtype=torch.uint8).pin_memory(), torch.tensor([number] * 4), ())
        raise ImageError("cannot be read")

    seen, load = [], torch.zeros(4096, 4096, device=device)
    with pytest.raises(ImageError):
        for batch in ahead(batches(), device):
            assert batch.images.is_cuda and len(given) == min(5, len(seen) + 2)
            for _ in range(20):                     # the batch is read long after it is let go here
                load = load @ load
            seen.append(batch.images.float().mean() + load[0, 0])
            del batch
    assert [number.item() for number in seen] == [0, 1, 2, 3, 4]
