"""The averaged weights, compared with a plain numpy loop."""

import numpy as np
import pytest
import torch
from torch import nn

from utils.training.ema import Ema


def network(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(0.5), nn.Linear(4, 2)).to(dtype)


def change(model: nn.Module, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def arrays(model: nn.Module) -> list[np.ndarray]:
    return [parameter.detach().numpy().copy() for parameter in model.parameters()]


@pytest.mark.parametrize(("decay", "updates"), [(0.9999, 40), (0.5, 40), (0.9, 120), (0.0, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_average_equals_a_numpy_loop(decay, updates, dtype, tolerance):
    """Frozen weights stay exactly the same."""
    model = network(dtype)
    model[0].bias.requires_grad_(False)
    frozen = model[0].bias.clone()
    ema, expected = Ema(model, decay), arrays(model)
    for number in range(1, updates + 1):
        change(model, number)
        ema.update(model, number)
        keep = min(decay, (1 + number) / (10 + number))
        expected = [keep * mean + (1 - keep) * weight for mean, weight in zip(expected, arrays(model))]
        for got, mean in zip(arrays(ema.model), expected):
            np.testing.assert_allclose(got, mean, rtol=0, atol=tolerance)
    assert (np.abs(arrays(ema.model)[0] - arrays(model)[0]).max() > 0.1) == (decay > 0)
    assert torch.equal(ema.model[0].bias, frozen)
    resumed = Ema(model, decay)
    resumed.model.load_state_dict(ema.model.state_dict())
    assert list(ema.model.state_dict()) == list(model.state_dict())
    assert all(map(np.array_equal, arrays(resumed.model), arrays(ema.model)))


def test_the_average_is_a_separate_module_for_evaluation():
    model = network()
    before, ema = arrays(model), Ema(model, 0.9)
    change(model, 1)
    assert all(map(np.array_equal, arrays(ema.model), before))         # no memory in common
    assert type(ema.model) is nn.Sequential and not ema.model.training and model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
