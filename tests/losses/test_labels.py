"""The losses of label distillation equal NumPy formulas written per pixel."""

import math

import numpy as np
import pytest
import torch

from dtcache.losses.labels import (
    cross_entropy,
    dice_loss,
    entropy,
    interpreter_loss,
    label_loss,
    total_variation,
)

IGNORE = 255


def softmax(z: np.ndarray) -> np.ndarray:
    """Return the softmax of one pixel's logits."""
    e = np.exp(z - z.max())
    return e / e.sum()


@pytest.fixture
def logits() -> np.ndarray:
    """Logits of two images of 3 classes on 4x5 pixels."""
    return np.random.default_rng(0).normal(size=(2, 3, 4, 5)) * 3


@pytest.fixture
def truth() -> np.ndarray:
    """Classes 0 and 2 with some ignored pixels; class 1 never occurs."""
    mask = np.random.default_rng(1).choice([0, 2, IGNORE], size=(2, 4, 5), p=[0.5, 0.3, 0.2])
    return mask.astype(np.uint8)


def pixels(logits: np.ndarray, truth: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Return the probabilities and the class of every pixel that is not ignored."""
    return [
        (softmax(logits[b, :, h, w]), int(truth[b, h, w]))
        for b, h, w in np.ndindex(truth.shape)
        if truth[b, h, w] != IGNORE
    ]


def expected_cross_entropy(logits: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean of -log p of the true class over the pixels that are not ignored."""
    return float(np.mean([-math.log(p[c]) for p, c in pixels(logits, truth)]))


def expected_dice(logits: np.ndarray, truth: np.ndarray) -> float:
    """Return 1 - the mean Dice coefficient over all classes, absent ones included."""
    found = pixels(logits, truth)
    coefficients = []
    for k in range(3):
        p = np.array([p[k] for p, _ in found])
        y = np.array([c == k for _, c in found])
        coefficients.append((2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1))
    return 1 - float(np.mean(coefficients))


def test_cross_entropy_and_dice_match_their_formulas(logits: np.ndarray, truth: np.ndarray) -> None:
    """Both losses skip ignored pixels, and their sum weights Dice by the paper's 3."""
    z = torch.from_numpy(logits)
    y = torch.from_numpy(truth)
    assert float(cross_entropy(z, y, IGNORE)) == pytest.approx(
        expected_cross_entropy(logits, truth), rel=1e-5
    )
    assert float(dice_loss(z, y, IGNORE)) == pytest.approx(expected_dice(logits, truth), rel=1e-5)
    whole = expected_cross_entropy(logits, truth) + 3.0 * expected_dice(logits, truth)
    assert float(interpreter_loss(z, y, IGNORE)) == pytest.approx(whole, rel=1e-5)


def test_the_value_to_ignore_may_be_a_class_number(logits: np.ndarray) -> None:
    """If the ignore index is 0, pixels of class 0 are skipped although a logit 0 exists."""
    mask = np.random.default_rng(2).integers(0, 3, (2, 4, 5)).astype(np.uint8)
    renamed = np.where(mask == 0, IGNORE, mask).astype(np.uint8)
    given = float(interpreter_loss(torch.from_numpy(logits), torch.from_numpy(mask), 0))
    assert given == pytest.approx(
        float(interpreter_loss(torch.from_numpy(logits), torch.from_numpy(renamed), IGNORE))
    )


def test_a_batch_without_a_pixel_that_counts_has_a_finite_loss(logits: np.ndarray) -> None:
    """A batch of ignored pixels alone has loss zero and gradient zero, not NaN."""
    z = torch.from_numpy(logits).requires_grad_()
    loss = interpreter_loss(z, torch.full((2, 4, 5), IGNORE, dtype=torch.uint8), IGNORE)
    (gradient,) = torch.autograd.grad(loss, z)
    assert float(loss.detach()) == 0.0
    assert bool((gradient == 0).all())


def test_the_label_loss_is_the_cross_entropy_of_softmaxes_at_temperature_four(
    logits: np.ndarray,
) -> None:
    """The label loss is H(P_g, P_r) at temperature 4 without tau^2, averaged over pixels."""
    other = np.random.default_rng(3).normal(size=logits.shape)
    places = [(b, h, w) for b in range(2) for h in range(4) for w in range(5)]
    wanted = np.mean(
        [
            -(softmax(logits[b, :, h, w] / 4) * np.log(softmax(other[b, :, h, w] / 4))).sum()
            for b, h, w in places
        ]
    )
    g = torch.from_numpy(logits)
    r = torch.from_numpy(other)
    assert float(label_loss(r, g)) == pytest.approx(float(wanted), rel=1e-5)
    assert float(label_loss(g, g)) < float(label_loss(r, g))


def test_total_variation_and_entropy_match_their_formulas(logits: np.ndarray) -> None:
    """TV is half the absolute difference at temperature 4; entropy is in bits at temperature 1."""
    other = logits + np.random.default_rng(4).normal(size=logits.shape)
    tv = total_variation(torch.from_numpy(logits), torch.from_numpy(other)).numpy()
    bits = entropy(torch.from_numpy(logits)).numpy()
    for b, h, w in np.ndindex(tv.shape):
        p = softmax(logits[b, :, h, w] / 4)
        q = softmax(other[b, :, h, w] / 4)
        assert tv[b, h, w] == pytest.approx(np.abs(p - q).sum() / 2, abs=1e-6)
        full = softmax(logits[b, :, h, w])
        assert bits[b, h, w] == pytest.approx(-(full * np.log2(full)).sum(), abs=1e-5)
    assert entropy(torch.zeros(1, 8, 1, 1)).item() == pytest.approx(3.0)
