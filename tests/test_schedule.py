"""The learning rate against the values that the ViT-pytorch scripts produce (fixtures/train)."""

from pathlib import Path

import numpy as np
import pytest

from utils.schedule import factor, is_time

FIXTURES = Path(__file__).parent / "fixtures" / "train"
TAGS = [(decay, *rest) for decay in ("cosine", "linear") for rest in ((500, 10_000, 0.03), (10, 100, 0.03), (0, 50, 0.01))]


@pytest.mark.parametrize(("decay", "warmup", "total", "peak"), TAGS)
def test_every_update_has_the_rate_of_the_reference(decay, warmup, total, peak):
    with np.load(FIXTURES / "train.npz") as file:
        updates, expected = (file[f"lr/jeon_{decay}_w{warmup}_T{total}/{part}"] for part in ("update", "lr"))
    assert updates[0] == 1 and updates[-1] == total
    got = [peak * factor(int(update), warmup, total, decay) for update in updates]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (5, 5), (3, 10)])
def test_peak_and_end(decay, warmup, total):
    rates = [factor(update, warmup, total, decay) for update in range(1, total + 1)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[-1] == (1 if warmup == total else 0)
    if warmup:
        assert max(rates) == rates[warmup - 1] == 1
        assert rates[:warmup] == pytest.approx([update / warmup for update in range(1, warmup + 1)])


def test_unknown_decay():
    with pytest.raises(ValueError, match="cosine or linear"):
        factor(3, 0, 5, "exponential")


@pytest.mark.parametrize(("every", "total", "expected"), [
    (3, 10, [3, 6, 9, 10]), (5, 10, [5, 10]), (1, 3, [1, 2, 3]), (100, 4, [4]), (4, 4, [4])])
def test_is_time(every, total, expected):
    assert [step for step in range(1, total + 1) if is_time(step, every, total)] == expected
