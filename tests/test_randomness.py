"""Seeds are hashes of their purpose, and using one does not change the global generator."""

import pytest
import torch

from utils.randomness import derive_seed, seed_device, seeded

# If these values change, every resumed run gets other data without an error: they are part of the checkpoint format.
GOLDEN = {(0,): 2631537505891389924, (42, "order", 0): 1608622093565479053,
          (42, "augment", 3, 17): 822557914734944892, (42, "model", 10, 2): 4889567556722831404}


@pytest.mark.parametrize("parts", GOLDEN)
def test_seeds_are_stable(parts):
    assert derive_seed(*parts) == GOLDEN[parts]


def test_seeds_differ_and_fit_in_63_bits():
    parts = [(seed, purpose, a, b) for seed in range(3) for purpose in ("order", "augment") for a in range(8) for b in range(8)]
    parts += [("1", 2), (1, 2), (12,), (1, "2")]        # parts are not just joined, and numbers differ from text
    seeds = [derive_seed(*each) for each in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2 ** 63 for seed in seeds)
    # CPU generators only use the low 32 bits: these must differ, too.
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(parts)


def test_seeded_draws_are_a_function_of_the_parts():
    with seeded(1, "a", 5):
        first = torch.rand(4)
    torch.rand(3)
    with seeded(1, "a", 5):
        assert torch.equal(torch.rand(4), first)
    with seeded(1, "a", 6):
        assert not torch.equal(torch.rand(4), first)


def test_seeded_restores_the_generator_even_after_an_error():
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    got = [torch.rand(2)]
    with seeded(1):
        torch.rand(100)
    with pytest.raises(KeyError), seeded(2):
        torch.rand(7)
        raise KeyError
    assert torch.equal(torch.cat([*got, torch.rand(3)]), expected)


def test_seed_device_seeds_dropout():
    ones = torch.ones(1000)
    seed_device(torch.device("cpu"), 42, "model", 3, 0)
    first = torch.dropout(ones, 0.5, True)
    seed_device(torch.device("cpu"), 42, "model", 3, 0)
    assert torch.equal(torch.dropout(ones, 0.5, True), first)
    seed_device(torch.device("cpu"), 42, "model", 3, 1)
    assert not torch.equal(torch.dropout(ones, 0.5, True), first)
