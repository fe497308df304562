"""Rollout and heat maps against plain numpy, and against vit-explain's formula (fixtures/rollout.npz)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from utils.attention_maps import attention_to_grid, rollout, upsample

ROLLOUT = Path(__file__).parent / "fixtures" / "rollout.npz"


def maps(layers=3, images=2, heads=4, tokens=7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(layers)
    return [torch.randn(images, heads, tokens, tokens, generator=generator).mul(2).softmax(-1) for _ in range(layers)]


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_rollout_against_numpy(layers):
    recorded = maps(layers)
    expected = np.tile(np.eye(7), (2, 1, 1))
    for layer in recorded:                             # the first layer stands rightmost in the product
        for number, heads in enumerate(layer.double().numpy()):
            mixed = (heads.sum(axis=0) / 4 + np.eye(7)) / 2
            expected[number] = mixed @ expected[number]
    np.testing.assert_allclose(rollout(recorded).numpy(), expected, rtol=0, atol=1e-6)


def test_rollout_against_the_reference():
    with np.load(ROLLOUT) as file:
        attention, expected = torch.from_numpy(file["attention"]), file["row_normalised_mean"]
    assert attention.shape == (4, 1, 3, 37, 37)
    np.testing.assert_allclose(rollout(list(attention))[0].numpy(), expected, rtol=0, atol=1e-6)
    # The order of the layers matters, so that the comparison can fail.
    assert np.abs(rollout(list(attention.flip(0)))[0].numpy() - expected).max() > 1e-4


def test_rows_sum_to_one():
    joint = rollout(maps(12, images=3, tokens=17))
    assert joint.shape == (3, 17, 17) and (joint >= 0).all()
    torch.testing.assert_close(joint.sum(-1), torch.ones(3, 17), rtol=0, atol=1e-5)


def test_images_do_not_mix():
    recorded = maps(3, images=4)
    joint = rollout(recorded)
    for number in range(4):
        torch.testing.assert_close(joint[number], rollout([layer[number:number + 1] for layer in recorded])[0])


def test_uniform_attention_spreads_and_none_stays():
    tokens = 5
    identity = torch.eye(tokens).expand(1, 2, tokens, tokens)
    torch.testing.assert_close(rollout([identity] * 3)[0], torch.eye(tokens))
    uniform = torch.full((1, 2, tokens, tokens), 1 / tokens)
    expected = torch.eye(tokens) / 8 + (1 - 1 / 8) / tokens
    torch.testing.assert_close(rollout([uniform] * 3)[0], expected)


def test_rollout_leaves_the_maps_alone():
    recorded = maps()
    copies = [layer.clone() for layer in recorded]
    rollout(recorded)
    assert all(torch.equal(a, b) for a, b in zip(recorded, copies))


def test_grid_with_a_cls_token_is_its_row():
    attention = torch.rand(2, 7, 7)
    heat = attention_to_grid(attention, (2, 3), 1)
    assert heat.shape == (2, 2, 3)
    assert heat[1].tolist() == [attention[1, 0, 1:4].tolist(), attention[1, 0, 4:7].tolist()]      # row by row


def test_grid_of_a_mean_pooled_model_is_the_average():
    attention = torch.rand(2, 6, 6)
    heat = attention_to_grid(attention, (3, 2), 0)
    assert heat.shape == (2, 3, 2)
    torch.testing.assert_close(heat[0, 2, 1], attention[0, :, 5].mean())
    torch.testing.assert_close(heat[1, 0, 1], attention[1, :, 1].mean())


def test_a_grid_that_does_not_fit_is_an_error():
    with pytest.raises(RuntimeError):
        attention_to_grid(torch.rand(1, 7, 7), (2, 2), 1)


@pytest.mark.parametrize("size", [(8, 12), (5, 7), (2, 3)])
def test_upsample(size):
    grids = torch.tensor([[[0.1, 0.2, 0.3], [0.4, 0.5, 0.9]], [[3.0, 2.0, 1.0], [0.0, 0.0, 0.0]]])
    large = upsample(grids, size)
    assert large.shape == (2, *size)
    assert large.amax(dim=(1, 2)).tolist() == [1, 1] and large.min() >= 0
    assert large[0, -1, -1] == 1 and large[1, 0, 0] == 1
    if size == (2, 3):
        torch.testing.assert_close(large[0], grids[0] / 0.9)


def test_upsampling_nothing_gives_nothing():
    assert torch.equal(upsample(torch.zeros(1, 2, 2), (4, 4)), torch.zeros(1, 4, 4))
