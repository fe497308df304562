"""From the host to a device."""

import pytest
import torch

from utils.devices import on_device


def test_a_tensor_arrives():
    tensor = torch.arange(5)
    assert on_device(tensor, torch.device("cpu")) is tensor
    assert on_device(tensor, torch.device("meta")).is_meta


@pytest.mark.gpu
def test_the_host_does_not_wait_for_a_gpu():
    device = torch.device("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = on_device(torch.arange(5), device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert there.tolist() == [0, 1, 2, 3, 4]
