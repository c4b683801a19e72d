"""The feature losses equal independent NumPy formulas of the paper."""

import numpy as np
import pytest
import torch

from dtcache.losses.features import at_loss, attention_map, mse_loss
from dtcache.whitening import unwhiten, whiten_positions

RNG = np.random.default_rng(0)
P, T = (RNG.standard_normal((3, 5, 4, 6)) for _ in range(2))


def tensor(x: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor."""
    return torch.from_numpy(x).to(dtype)


def reference_at(predicted: np.ndarray, raw: np.ndarray) -> float:
    """Return (1/J) sum_j || Q_r/|Q_r| - Q_g/|Q_g| ||, Q = vec(sum_c |A_c|^2), in float64."""
    distances = []
    for a, b in zip(predicted, raw, strict=True):
        qa, qb = (np.square(x).sum(0).ravel() for x in (a, b))
        distances.append(np.linalg.norm(qa / np.linalg.norm(qa) - qb / np.linalg.norm(qb)))
    return float(np.mean(distances))


def test_mse_is_the_mean_over_elements() -> None:
    """MSE is the mean squared difference over all elements."""
    assert float(mse_loss(tensor(P), tensor(T))) == pytest.approx(np.square(P - T).mean(), rel=1e-5)


def test_at_is_the_papers_formula() -> None:
    """AT is the mean over samples of the distance between unit attention maps."""
    assert float(at_loss(tensor(P), tensor(T))) == pytest.approx(reference_at(P, T), rel=1e-5)


def test_attention_maps_have_unit_length_and_ignore_scale() -> None:
    """An attention map is a unit vector of H x W entries that does not depend on the scale."""
    maps = attention_map(tensor(P))
    assert maps.shape == (3, 24)
    torch.testing.assert_close(maps.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(maps, attention_map(tensor(7 * P)))


@pytest.mark.parametrize("loss", [mse_loss, at_loss])
def test_losses_are_fp32_under_autocast(loss: object) -> None:
    """Half-precision predictions are compared in fp32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(tensor(P, torch.bfloat16), tensor(T)).dtype == torch.float32


def test_gradients_are_finite_where_maps_agree_or_vanish() -> None:
    """The gradient is finite where maps are equal or zero."""
    for predicted, raw in ((P, P), (0 * P, T), (P, 0 * T)):
        x = tensor(predicted).requires_grad_()
        at_loss(x, tensor(raw)).backward()
        assert torch.isfinite(x.grad).all()


def test_at_has_the_gradient_of_its_formula() -> None:
    """Autograd agrees with central differences of the reference in float64."""
    x = tensor(P).requires_grad_()
    at_loss(x, tensor(T)).backward()
    for place in ((0, 0, 0, 0), (1, 3, 2, 5), (2, 4, 3, 1)):
        up = P.copy()
        down = P.copy()
        up[place] += 1e-5
        down[place] -= 1e-5
        slope = (reference_at(up, T) - reference_at(down, T)) / 2e-5
        assert float(x.grad[place]) == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_unwhiten_inverts_layer_norm() -> None:
    """raw = whitened * sigma + mu, with the scalars that whitening returns."""
    from dtcache.whitening import whiten

    raw = tensor(3 * T + 2)
    whitened, mu, sigma = whiten(raw)
    torch.testing.assert_close(
        unwhiten(whitened, torch.stack([sigma, mu], 1)), raw, rtol=1e-5, atol=1e-5
    )


def test_position_whitening_is_layer_norm_over_channels() -> None:
    """Position whitening equals torch's non-affine LayerNorm over C at every position."""
    raw = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0)) * 7 + 2
    wanted = torch.nn.functional.layer_norm(raw.permute(0, 2, 3, 1), (5,), eps=1e-6).permute(
        0, 3, 1, 2
    )
    torch.testing.assert_close(whiten_positions(raw), wanted)
