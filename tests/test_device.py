"""From the host to a device."""

import pytest
import torch

from utils.device import on_device


def test_a_tensor_arrives():
    tensor = torch.arange(5)
    assert on_device(tensor, torch.device("cpu")) is tensor
    assert on_device(tensor, torch.device("meta")).is_meta


@pytest.mark.gpu
def test_the_host_does_not_wait_for_a_gpu():
    device, load = torch.device("cuda"), torch.zeros(8192, 8192, device="cuda")
    on_device(torch.arange(5), device)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    for _ in range(50):
        load = load @ load
    done.record()
    there = on_device(torch.arange(5), device)
    assert not done.query()                             # the copy is queued, and the products are still at work
    assert there.tolist() == [0, 1, 2, 3, 4]
