"""MixUp and CutMix: equal to torchvision's for one pair, and independent of ranks and micro-batches."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from utils.data.mixup import Mixer

CLASSES, IMAGES, SIZE = 7, 32, (12, 18)
BOTH = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}


def batch(images=IMAGES, size=SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(images, 3, *size, generator=generator), torch.randint(CLASSES, (images,), generator=generator)


def mixer(images=IMAGES, seed=3, stop_at=100, **options) -> Mixer:
    return Mixer(CLASSES, images, seed, stop_at=stop_at, **options)


def one_hot(targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(targets, CLASSES).float()


def theirs(transform, images: torch.Tensor, targets: torch.Tensor, **params) -> tuple[torch.Tensor, torch.Tensor]:
    """Return torchvision's transform of one pair, in which the left neighbor is the partner, with these draws."""
    params |= {"labels": targets, "batch_size": 2}
    return transform.transform(images, params), transform.transform(targets, params)


def test_mixup_of_a_pair_equals_torchvisions():
    images, targets = batch()
    ours = mixer(mixup_alpha=0.4)
    got = ours(images, targets, 5, 0)
    lams = ours.draw(5).lam
    assert len(set(lams)) == IMAGES // 2
    for pair, lam in enumerate(lams):
        own = slice(2 * pair, 2 * pair + 2)
        for mine, expected in zip(got, theirs(v2.MixUp(num_classes=CLASSES), images[own], targets[own], lam=float(lam))):
            torch.testing.assert_close(mine[own], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(12, 18), (7, 5), (1, 30), (224, 8)])
def test_cutmix_of_a_pair_equals_torchvisions(size):
    images, targets = batch(64, size)
    ours = mixer(64, cutmix_alpha=1.0)
    got = ours(images, targets, 5, 0)
    draws, boxes = ours.draw(5), set()
    assert draws.cutmix.all()
    for pair in range(32):
        # Section 3.1 of the paper, pair by pair in plain numbers.
        height, width = size
        reach = 0.5 * (1 - draws.lam[pair]) ** 0.5
        y, x = int(draws.center[0, pair] * height), int(draws.center[1, pair] * width)
        top, bottom = max(y - int(reach * height), 0), min(y + int(reach * height), height)
        left, right = max(x - int(reach * width), 0), min(x + int(reach * width), width)
        area = (bottom - top) * (right - left) / (height * width)
        own = slice(2 * pair, 2 * pair + 2)
        expected = theirs(v2.CutMix(num_classes=CLASSES), images[own], targets[own], box=(left, top, right, bottom),
                          lam_adjusted=1 - area)
        assert torch.equal(got[0][own], expected[0])
        torch.testing.assert_close(got[1][own], expected[1], rtol=0, atol=1e-6)
        boxes.add((top, bottom, left, right))
    assert len(boxes) > (20 if min(size) > 1 else 0)


@pytest.mark.parametrize("options", [{"mixup_alpha": 0.3}, {"cutmix_alpha": 1.0}, BOTH, BOTH | {"probability": 0.5}])
def test_targets_are_mixed_like_the_images(options):
    """The images are filled with their class number, so the mean over an image's pixels is the mean over its target."""
    _, targets = batch()
    images = targets.float()[:, None, None, None].expand(-1, 1, *SIZE)
    mixed, soft = mixer(**options)(images, targets, 9, 0)
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), soft @ torch.arange(CLASSES).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(IMAGES), rtol=0, atol=1e-6)
    assert (soft >= 0).all() and not torch.equal(soft, one_hot(targets))


@pytest.mark.parametrize("cuts", [[8, 16, 24], [2, 12, 14], list(range(2, IMAGES, 2))])
def test_result_does_not_depend_on_ranks_and_micro_batches(cuts):
    images, targets = batch()
    whole = mixer(**BOTH)(images, targets, 4, 0)
    parts = [mixer(**BOTH)(images[first:last], targets[first:last], 4, first)
             for first, last in zip([0, *cuts], [*cuts, IMAGES])]
    assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))
    assert torch.equal(whole[1], torch.cat([part[1] for part in parts]))


def test_draws_are_a_function_of_seed_and_step():
    def lams(seed, step):
        return tuple(mixer(seed=seed, **BOTH).draw(step).lam)

    assert lams(3, 7) == lams(3, 7)
    assert len({lams(seed, step) for seed in range(3) for step in range(4)}) == 12
    used = mixer(**BOTH)
    used(*batch(), 0, 0)
    assert tuple(used.draw(7).lam) == lams(3, 7)         # a resumed run draws the same as one that was never stopped


@pytest.mark.parametrize(("mixup_alpha", "cutmix_alpha"), [(0.1, 4.0), (1.0, 0.8)])
def test_lambdas_are_beta_distributed(mixup_alpha, cutmix_alpha):
    draws = mixer(80_000, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha).draw(0)
    for lams, alpha in ((draws.lam[~draws.cutmix], mixup_alpha), (draws.lam[draws.cutmix], cutmix_alpha)):
        variance = 1 / (4 * (2 * alpha + 1))
        assert lams.mean() == pytest.approx(0.5, abs=4 * (variance / 20_000) ** 0.5)
        assert lams.var() == pytest.approx(variance, rel=0.05)
        assert abs(np.corrcoef(lams[:-1], lams[1:])[0, 1]) < 0.03


@pytest.mark.parametrize(("options", "mixed", "cut"), [
    (BOTH, 1, 0.5), (BOTH | {"switch_probability": 0.2}, 1, 0.2), (BOTH | {"probability": 0.3}, 0.3, 0.15),
    ({"mixup_alpha": 0.8, "switch_probability": 0.9}, 1, 0), ({"cutmix_alpha": 1.0, "switch_probability": 0.1}, 1, 1),
    (BOTH | {"probability": 0.0}, 0, 0), ({}, 0, 0)])
def test_probabilities(options, mixed, cut):
    draws = mixer(20_000, **options).draw(1)
    assert (draws.lam < 1).mean() == pytest.approx(mixed, abs=0.02)
    assert draws.cutmix.mean() == pytest.approx(cut, abs=0.02)
    assert (draws.lam[draws.cutmix] < 1).all()
    images, targets = batch()
    changed = (mixer(**options)(images, targets, 1, 0)[0] != images).any()
    assert changed == (mixed > 0)


@pytest.mark.parametrize("step", [9, 10, 11])
def test_mixing_ends_at_stop_at(step):
    images, targets = batch()
    got, soft = mixer(stop_at=10, **BOTH)(images, targets, step, 0)
    assert torch.equal(got, images) == torch.equal(soft, one_hot(targets)) == (step >= 10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2), (torch.float64, 1e-6)])
def test_images_keep_their_type(dtype, tolerance):
    images, targets = batch()
    before = images.clone()
    (got, soft), (expected, same) = (mixer(**BOTH)(x, targets, 2, 0) for x in (images.to(dtype), images))
    assert got.dtype == dtype and soft.dtype == torch.float32
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=tolerance)
    assert torch.equal(soft, same) and torch.equal(images, before)


@pytest.mark.gpu
def test_host_does_not_wait_for_the_gpu():
    images, targets = batch()
    expected = mixer(**BOTH)(images, targets, 4, 0)
    images, targets = images.cuda(), targets.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = mixer(**BOTH)(images, targets, 4, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mine, theirs_ in zip(got, expected):
        torch.testing.assert_close(mine.cpu(), theirs_, rtol=0, atol=1e-6)
