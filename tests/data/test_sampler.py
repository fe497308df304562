"""The images of each step."""

import pickle

import pytest

from utils.data.sampler import SampleIndex, StepSampler


def keys(images=50, batch_size=16, micro=4, rank=0, world=1, seed=3, start=0, stop=12) -> list[list[SampleIndex]]:
    order = StepSampler(images, batch_size, micro, rank, world, seed, start, stop)
    batches = list(order)
    assert len(batches) == len(order)
    return batches


def steps(batches: list[list[SampleIndex]]) -> dict[int, list[tuple[int, int]]]:
    """Return {step: its samples as (epoch, index), in the order of the micro-batches}"""
    found = {}
    for batch in batches:
        assert len({(key.step, key.micro) for key in batch}) == 1
        found.setdefault(batch[0].step, []).extend((key.epoch, key.index) for key in batch)
    return found


@pytest.mark.parametrize("images", [7, 16, 50])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 4)])
def test_samples_of_a_step_do_not_depend_on_ranks_and_micro_batches(images, world, accumulation):
    whole = steps(keys(images, micro=1))
    parts = [keys(images, micro=world * accumulation, rank=rank, world=world) for rank in range(world)]
    for rank, batches in enumerate(parts):
        assert len(batches) == 12 * accumulation
        # Contiguous blocks: rank 0 has the first micro-batches of every step.
        assert [(batch[0].step, batch[0].micro) for batch in batches] == [
            (step, rank * accumulation + micro) for step in range(12) for micro in range(accumulation)]
        assert {len(batch) for batch in batches} == {16 // (world * accumulation)}
    own = [steps(batches) for batches in parts]
    joined = {step: [sample for found in own for sample in found[step]] for step in whole}
    assert joined == whole


@pytest.mark.parametrize("images", [7, 50])
def test_restart_at_any_step_continues(images):
    for start in range(12):
        assert keys(images, start=start) == [batch for batch in keys(images) if batch[0].step >= start]


@pytest.mark.parametrize("images", [7, 50])
def test_micro_batches_can_be_indexed_in_any_order(images):
    order, batches = StepSampler(images, 16, 4, 1, 2, 3, 2, 12), keys(images, rank=1, world=2, start=2)
    for number in (19, 0, 7, 8, 3, 18):
        assert order[number] == batches[number]
    for number in (20, -1):
        with pytest.raises(IndexError):
            order[number]


@pytest.mark.parametrize("images", [5, 16, 50])
def test_every_epoch_is_a_permutation(images):
    seen = [(key.epoch, key.index) for batch in keys(images, stop=25) for key in batch]
    assert len(seen) == 400
    epochs = {}
    for epoch, index in seen:
        epochs.setdefault(epoch, []).append(index)
    assert list(epochs) == list(range(-(-400 // images)))      # consecutive
    orders = list(epochs.values())
    for order in orders[:-1]:
        assert sorted(order) == list(range(images))
    assert len(set(orders[-1])) == len(orders[-1])              # the unfinished epoch
    assert len(set(map(tuple, orders[:-1]))) > len(orders[:-1]) / 2      # the orders differ


def test_seeds_give_other_orders():
    orders = [[list(batch) for batch in keys(seed=seed)] for seed in (0, 1, 2, 0)]
    assert orders[0] == orders[3] and orders[0] != orders[1] != orders[2] != orders[0]


def test_sample_indices_are_a_sequence():
    own = StepSampler(50, 16, 4, 0, 1, 3, 0, 12)[17]
    listed = list(own)
    assert listed == [own[number] for number in range(4)] and len(own) == 4 and own == listed and own != listed[:3]
    assert all(type(value) is int for key in listed for value in key)
    assert pickle.loads(pickle.dumps(own)) == own


def test_samples_of_a_step_are_those_of_all_ranks():
    orders = [StepSampler(50, 12, 4, rank, 2, 0, 3, 5) for rank in range(2)]
    expected = [key for order in orders for batch in list(order)[:2] for key in batch]
    assert orders[1].samples_of(3) == expected
