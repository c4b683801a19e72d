"""Squared errors weighted per band equal the same transform computed with scipy."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.fft import dctn

from dtcache.codec import FittedTap
from dtcache.codec.fit import quantised_fit, tap_statistics
from dtcache.codec.pca_dct import DEAD
from dtcache.losses.band_weighting import DeterminedBands

STEP = 0.4


@pytest.fixture(scope="module")
def fitted() -> FittedTap:
    """A fit whose noise grows with frequency, with several step levels and dropped bands."""
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((64, 6, 5, 4)) + 2 * rng.standard_normal((64, 6, 1, 1))
    signal *= np.array([1, 1, 0.5, 0.5, 0.25, 0.001])[:, None, None]
    noise = 0.5 * (np.arange(6) < 5)[:, None, None]
    draws = [signal + rng.standard_normal(signal.shape) * noise for _ in range(2)]
    return quantised_fit(tap_statistics(np.stack(draws).astype(np.float16)), STEP)


def reference(error_BCHW: NDArray[np.float64], fitted: FittedTap) -> float:
    """Return the mean of w_n c_n^2 in a full orthonormal basis, with weight 1 if not coded."""
    basis = fitted.basis.astype(np.float64)
    full = np.concatenate(
        [basis, np.linalg.svd(basis, full_matrices=True)[0][:, basis.shape[1] :]], 1
    )
    coefficients = dctn(np.einsum("bchw,ck->bkhw", error_BCHW, full), axes=(2, 3), norm="ortho")
    weights = np.ones(coefficients.shape[1:])
    for k, i, j in np.ndindex(*fitted.classes.shape):
        if fitted.classes[k, i, j] != DEAD:
            weights[k, i, j] = STEP / fitted.class_step[fitted.classes[k, i, j]]
    return float((weights * np.square(coefficients)).mean())


def test_bands_weigh_by_the_share_that_the_image_determines(fitted: FittedTap) -> None:
    """The weighted square equals scipy's for errors in all components and in one alone."""
    levels = {round(2 * float(np.log2(step / STEP))) for step in fitted.class_step}
    assert len(levels) > 2 and fitted.basis.shape[1] < 6 and (fitted.classes == DEAD).any()
    bands = DeterminedBands(fitted.bands(), STEP)
    rng = np.random.default_rng(1)
    spread = rng.standard_normal((3, 6, 5, 4))
    for error in (
        spread,
        np.einsum("bhw,c->bchw", spread[:, 0], fitted.basis[:, 0].astype(np.float64)),
    ):
        found = float(bands(torch.from_numpy(error).float()))
        assert found == pytest.approx(reference(error, fitted), rel=2e-3)
        assert found < np.square(error).mean()


def test_its_gradient_is_that_of_the_weighed_square(fitted: FittedTap) -> None:
    """Autograd agrees with finite differences of the reference."""
    error = np.random.default_rng(2).standard_normal((2, 6, 5, 4))
    x = torch.from_numpy(error).float().requires_grad_()
    DeterminedBands(fitted.bands(), STEP)(x).backward()
    for place in ((0, 0, 0, 0), (1, 5, 4, 3), (0, 2, 1, 1)):
        moved = [error.copy(), error.copy()]
        moved[0][place] += 1e-4
        moved[1][place] -= 1e-4
        slope = (reference(moved[0], fitted) - reference(moved[1], fitted)) / 2e-4
        assert float(x.grad[place]) == pytest.approx(slope, rel=1e-2, abs=1e-5)


def test_without_noise_it_is_the_mean_square(fitted: FittedTap) -> None:
    """If every band has the finest step, the weighted square is the mean square, in fp32."""
    error = torch.randn(2, 6, 5, 4)
    flat = DeterminedBands(fitted.bands(), float(fitted.class_step.max()))
    torch.testing.assert_close(flat(error), error.square().mean())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flat(error.bfloat16()).dtype == torch.float32
