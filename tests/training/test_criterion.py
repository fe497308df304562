"""Losses compared with plain numpy."""

import itertools

import numpy as np
import pytest
import torch

from utils.training.criterion import (
    Criterion,
    attention_loss,
    balanced_weights,
    classification_loss,
    distillation_loss,
    guess_loss,
)

IMAGES, CLASSES = 12, 5


def scores(seed=0) -> torch.Tensor:
    return torch.randn(IMAGES, CLASSES, generator=torch.Generator().manual_seed(seed)) * 3


def labels() -> torch.Tensor:
    return torch.randint(CLASSES, (IMAGES,), generator=torch.Generator().manual_seed(9))


def log_softmax(logits: torch.Tensor) -> np.ndarray:
    x = logits.double().numpy()
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def probabilities() -> torch.Tensor:
    return torch.softmax(scores(5), dim=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0, 0.0, 3.0]])
@pytest.mark.parametrize("soft", [False, True])
def test_classification_loss(soft, weights, smoothing):
    logits, targets = scores(), probabilities() if soft else labels()
    one_hot = targets.double().numpy() if soft else np.eye(CLASSES)[targets.numpy()]
    smooth = (1 - smoothing) * one_hot + smoothing / CLASSES
    expected = -(smooth * np.array(weights or [1.0] * CLASSES) * log_softmax(logits)).sum()
    class_weights = torch.tensor(weights) if weights else None
    got = classification_loss(logits, targets, label_smoothing=smoothing, class_weights=class_weights)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0, 0.0, 3.0]])
def test_the_loss_of_a_guess_is_the_lowest_of_a_constant_prediction(smoothing, weights):
    """Compared with an optimizer. It is ln C if all classes are equally frequent, and finite if a class has no image."""
    targets, class_weights = torch.tensor([0] * 5 + [1] * 3 + [2] * 2 + [4]), torch.tensor(weights) if weights else None
    logits = torch.zeros(1, CLASSES, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        mean = classification_loss(logits.expand(11, -1), targets, label_smoothing=smoothing, class_weights=class_weights) / 11
        mean.backward()
        return mean

    optimizer.step(loss)
    guess = guess_loss(torch.bincount(targets, minlength=CLASSES), smoothing, class_weights)
    assert guess == pytest.approx(loss().item(), rel=1e-3)
    assert guess_loss(torch.full((8,), 32)) == pytest.approx(np.log(8))


LOSSES = {"classes": lambda logits: classification_loss(logits, labels()),
          "mixed": lambda logits: classification_loss(logits, probabilities()),
          "hard": lambda logits: distillation_loss("hard", logits, logits.flip(0), 3.0),
          "soft": lambda logits: distillation_loss("soft", logits, logits.flip(0), 3.0),
          "attention": lambda logits: attention_loss(logits[:, None, None], torch.ones(IMAGES, 2, 1, CLASSES))}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_computed_in_float32_under_autocast_too(name, dtype):
    logits, loss = scores().to(dtype), LOSSES[name]
    expected = loss(logits.float())
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            got = loss(logits)
        assert got.dtype == torch.float32 and got.item() == expected.item()


def test_balanced_weights():
    """scikit-learn's "balanced": images / (classes * images of the class)"""
    counts = np.array([6, 1, 3, 2])
    images = torch.from_numpy(np.repeat(np.arange(4), counts))
    weights = balanced_weights(images, 4)
    assert weights.dtype == torch.float32 and weights.tolist() == pytest.approx((12 / (4 * counts)).tolist(), rel=1e-6)
    assert weights[images].mean().item() == pytest.approx(1, rel=1e-6)
    assert balanced_weights(torch.tensor([0, 0, 0, 2]), 4).tolist() == pytest.approx([2 / 3, 0, 2, 0], rel=1e-6)


def test_hard_distillation():
    student, teacher = scores(), scores(1)
    expected = -log_softmax(student)[np.arange(IMAGES), teacher.numpy().argmax(axis=1)].sum()
    for temperature in (1.0, 5.0):
        assert distillation_loss("hard", student, teacher, temperature).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_distillation(temperature):
    """Its gradient is T (softmax(student / T) - softmax(teacher / T))."""
    student, teacher = scores().requires_grad_(), scores(1)
    loss = distillation_loss("soft", student, teacher, temperature)
    loss.backward()
    student, gradient = student.detach(), student.grad
    ours, theirs = log_softmax(student / temperature), log_softmax(teacher / temperature)
    expected = temperature ** 2 * (np.exp(theirs) * (theirs - ours)).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient, temperature * (np.exp(ours) - np.exp(theirs)), rtol=0, atol=1e-5)
    assert distillation_loss("soft", teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-5)
    reverse = temperature ** 2 * (np.exp(ours) * (ours - theirs)).sum()
    assert abs(reverse - expected) > 0.5        # the two directions differ, so the test sees a wrong one


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_criterion_weighs_labels_and_teacher(kind, heads):
    criterion = Criterion(label_smoothing=0.1, class_weights=torch.arange(1.0, CLASSES + 1), distillation=kind,
                          teacher=lambda images: scores(1), alpha=0.3, temperature=2.0)
    own, distilled = scores(), scores(7) if heads == 2 else scores()
    expected = (0.7 * classification_loss(own, labels(), label_smoothing=0.1, class_weights=torch.arange(1.0, CLASSES + 1))
                + 0.3 * distillation_loss(kind, distilled, scores(1), 2.0))
    logits = (own, distilled) if heads == 2 else own
    assert criterion.loss(logits, labels(), torch.zeros(0)).item() == pytest.approx(expected.item(), rel=1e-6)
    assert criterion.count_correct(logits, labels()) == ((own + distilled).argmax(1) == labels()).sum()


# ----------------------------------------------------------------------------------------------- edited attention


def edited_attention(garbage=0.0, rows=2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and edits of 4 images, 3 heads and a grid of 2 x 5. The third image has no edit. `garbage` is the value where
    nothing is edited."""
    generator = torch.Generator().manual_seed(1)
    edits = torch.rand(4, 2, 2, 5, generator=generator)
    edits[:, 1] = (edits[:, 1] < 0.5).float()
    edits[2, 1] = 0
    logits, free = torch.randn(4, 3, rows, 10, generator=generator) * 4, edits[:, 1] == 0
    edits[:, 0][free] = garbage
    logits += torch.where(free.view(4, 1, 1, 10), garbage, 0.0)
    assert len(set(edits[:, 1].sum(dim=(1, 2)).tolist())) > 2
    return logits, edits


def attention_by_hand(logits, edits) -> tuple[float, np.ndarray]:
    """Return the loss and its gradient, computed entry by entry."""
    logits, edits = logits.double().numpy(), edits.double().flatten(2).numpy()
    total, gradient = 0.0, np.zeros_like(logits)
    for image, head, row, patch in np.ndindex(*logits.shape):
        if edits[image, 1, patch] == 1:
            s = 1 / (1 + np.exp(-logits[image, head, row, patch]))
            count = edits[image, 1].sum() * logits.shape[1] * logits.shape[2]
            total += (s - edits[image, 0, patch]) ** 2 / count
            gradient[image, head, row, patch] = 2 * (s - edits[image, 0, patch]) * s * (1 - s) / count
    return total, gradient


@pytest.mark.parametrize(("garbage", "rows"), [(0.0, 1), (7.0, 10), (1e30, 2), (float("inf"), 2), (float("nan"), 2)])
def test_attention_loss_and_gradient(garbage, rows):
    logits, edits = edited_attention(garbage, rows)
    expected, gradient = attention_by_hand(logits, edits)
    logits.requires_grad_()
    got = attention_loss(logits, edits)
    got.backward()
    assert got.dtype == torch.float32 and got.item() == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(logits.grad, gradient, rtol=1e-5, atol=1e-7)


def test_attention_loss_of_partly_edited_patches():
    """A patch is weighted by its ratio; the loss of an image with less than one edited patch is smaller accordingly."""
    logits = torch.zeros(1, 1, 1, 3)                                             # sigmoid 0.5
    for ratios, expected in (((1, 0.5, 0), (0.16 + 0.5 * 0.09) / 1.5), ((0.25, 0, 0), 0.25 * 0.16), ((1, 1, 0), 0.125)):
        edits = torch.tensor([[0.9, 0.2, 7.0], ratios]).view(1, 2, 1, 3)
        assert attention_loss(logits, edits).item() == pytest.approx(expected, rel=1e-6)


def test_attention_loss_of_saturated_logits_is_finite():
    for logit, value in itertools.product((-1e4, -60.0, 1e4, float("inf")), (0.0, 1.0)):
        logits = torch.full((1, 1, 1, 1), logit, requires_grad=True)
        loss = attention_loss(logits, torch.tensor([value, 1.0]).view(1, 2, 1, 1))
        loss.backward()
        assert loss.item() == pytest.approx(float((logit > 0) != (value == 1)), abs=1e-6)
        assert logits.grad.isfinite().all()
