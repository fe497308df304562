"""The end of a model gives what the whole model gives, from every block on."""

import pytest
import torch

import configs
import models
from models import model_end


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("row", [{}, {"classifier": "gap"}, {"class_layers": 1, "layer_scale": 0.1, "gelu": "erf"}], ids=str)
def test_the_end_of_a_model_gives_what_the_whole_gives(row, first):
    torch.manual_seed(0)
    tiny = configs.architecture(patch_size=4, hidden_size=12, mlp_dim=16, num_heads=3, num_layers=2, **row)
    model, images = models.create_model(tiny, 3, (8, 12)).eval(), torch.randn(1, 3, 8, 12)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    tokens, rest = model_end.tokens_before(model, first, images), model_end.cut(model, first)
    with torch.inference_mode():
        whole = model(images)
        assert torch.allclose(rest(tokens), whole, atol=1e-5) and torch.allclose(rest(tokens), whole, atol=1e-5)
        assert not torch.allclose(rest(tokens + 1e-1 * torch.randn_like(tokens)), whole, atol=1e-5)
    assert len(model.blocks) == 2 and len(rest.blocks) == 2 - first
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
