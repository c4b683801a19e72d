"""Whitening, transforms and quantiser agree with torch, SciPy and float64 NumPy."""

import numpy as np
import pytest
import scipy.fft
import torch
from codec.codec_samples import random_fit

from dtcache.codec import FeatureDecoder, FeatureEncoder, FittedTap, HostDecoder
from dtcache.codec.fit import quantised_fit, tap_statistics
from dtcache.codec.pca_dct import Decoder, Encoder, dct_matrix, quantise
from dtcache.payloads import pack
from dtcache.whitening import WHITEN_EPS, whiten


def features(count: int, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Return random maps with correlated channels of unequal variance."""
    rng = np.random.default_rng(seed)
    channels = shape[0]
    mixing = rng.normal(size=(channels, channels)) * 2.0 ** (-np.arange(channels) / 2)
    x = np.einsum("bchw,dc->bdhw", rng.normal(size=(count, *shape)), mixing)
    x += rng.normal(size=(count, channels, 1, 1))
    return x.astype(np.float32)


def fitted_tap(shape: tuple[int, int, int], step: float, seed: int = 0) -> FittedTap:
    """Fit a codec on random features under two noise draws."""
    x = features(40, shape, seed)
    other = x + 0.2 * features(40, shape, seed + 1)
    draws = np.stack([whiten(torch.from_numpy(d))[0].numpy() for d in (x, other)])
    return quantised_fit(tap_statistics(draws.astype(np.float16)), step)


def decode_float64(values_BN: np.ndarray, fitted: FittedTap) -> np.ndarray:
    """Decode in float64 with SciPy's inverse DCT."""
    components, height, width = fitted.classes.shape
    flat = fitted.classes.reshape(-1)
    order = [place for _, place in sorted((int(c), i) for i, c in enumerate(flat) if c != 255)]
    dense = np.zeros((len(values_BN), flat.size))
    scale = (
        (fitted.class_step.astype(np.float64) * fitted.class_gain)[flat[order]]
        if order
        else np.zeros(0)
    )
    dense[:, order] = values_BN * scale
    maps = scipy.fft.idctn(dense.reshape(-1, components, height, width), axes=(2, 3), norm="ortho")
    return (
        np.einsum("bkhw,ck->bchw", maps, fitted.basis.astype(np.float64))
        + fitted.mean.astype(np.float64)[:, None, None]
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 32])
def test_dct_matrix_is_scipys_and_orthonormal(size: int) -> None:
    """The matrix is SciPy's orthonormal DCT-II, and its transpose undoes it."""
    matrix = dct_matrix(size).numpy()
    np.testing.assert_allclose(
        matrix, scipy.fft.dct(np.eye(size), axis=0, norm="ortho"), atol=1e-13
    )
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whiten_is_layer_norm(dtype: torch.dtype) -> None:
    """Whitening is non-affine LayerNorm over (C, H, W) in fp32, and its two scalars invert it."""
    raw = torch.from_numpy(features(5, (6, 4, 8), 0) * 7 + 30).to(dtype)
    found, mu, sigma = whiten(raw)
    wanted = torch.nn.functional.layer_norm(raw.float(), (6, 4, 8), eps=WHITEN_EPS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    shape = (-1, 1, 1, 1)
    torch.testing.assert_close(
        found * sigma.view(shape) + mu.view(shape), raw.float(), rtol=1e-5, atol=1e-4
    )


def test_whiten_of_a_constant_map_is_zero() -> None:
    """Whitening a constant map gives zeros, never NaN."""
    found, mu, _ = whiten(torch.full((2, 3, 4, 4), 5.0))
    assert not found.any()
    assert mu.tolist() == [5.0, 5.0]


def test_quantise_is_odd_and_clamped() -> None:
    """The quantiser rounds with offset 0.42 towards zero, is odd, and clamps to +-32767."""
    x = torch.tensor([0.0, 0.57, 0.59, 1.57, 1.59, 1e9])
    assert quantise(x, torch.tensor(1.0)).tolist() == [0, 0, 1, 1, 2, 32767]
    assert quantise(-x, torch.tensor(1.0)).tolist() == [0, 0, -1, -1, -2, -32767]
    assert quantise(2 * x, torch.tensor(2.0)).tolist() == [0, 0, 1, 1, 2, 32767]


@pytest.mark.parametrize("shape", [(6, 4, 4), (5, 8, 4), (3, 1, 1)])
@pytest.mark.parametrize("step", [0.3, 1.0])
def test_decoder_is_the_float64_computation(shape: tuple[int, int, int], step: float) -> None:
    """The decoder equals SciPy's inverse DCT and the PCA expansion in float64."""
    fitted = fitted_tap(shape, step)
    values = np.random.default_rng(0).integers(-40, 41, (7, len(fitted.live))).astype(np.int16)
    found = Decoder(fitted)(torch.from_numpy(values))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), decode_float64(values, fitted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", [0.05, 0.3, 1.0, 3.0])
def test_encoder_reports_the_decoders_error(step: float) -> None:
    """The reported error is the decoded map's within 1e-3 at D > 0.1 and 5e-4 of the energy.

    The error is computed on coefficients, as if the basis were orthonormal. In fp16 the basis is
    orthonormal to 2^-11.
    """
    fitted = fitted_tap((6, 8, 8), step)
    x = whiten(torch.from_numpy(features(12, (6, 8, 8), 5)))[0]
    values, error, energy = Encoder(fitted)(x)
    assert values.dtype == torch.int16
    met = np.square(decode_float64(values.numpy(), fitted) - x.numpy().astype(np.float64)).sum(
        (1, 2, 3)
    )
    coarse = met > 0.1 * energy.numpy()
    assert coarse.all() or step < 3
    np.testing.assert_allclose(error.numpy()[coarse], met[coarse], rtol=1e-3)
    assert (np.abs(error.numpy() - met) < 5e-4 * energy.numpy()).all()
    centred = x.numpy().astype(np.float64) - fitted.mean.astype(np.float64)[:, None, None]
    np.testing.assert_allclose(energy.numpy(), np.square(centred).sum((1, 2, 3)), rtol=1e-3)


def test_decoder_is_fp32_under_autocast() -> None:
    """Autocast to bfloat16 changes no bit of the targets, and no gradient flows into them."""
    fitted = fitted_tap((6, 4, 4), 0.3)
    values = torch.from_numpy(
        np.random.default_rng(1).integers(-9, 10, (3, len(fitted.live))).astype(np.int16)
    )
    decoder = Decoder(fitted)
    plain = decoder(values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decoder(values)
    assert found.dtype == torch.float32
    assert torch.equal(found, plain)
    assert not found.requires_grad


def test_a_tap_without_live_coefficients_decodes_to_its_mean() -> None:
    """A tap whose bands are all dropped decodes to its channel means."""
    fitted = fitted_tap((4, 4, 4), 64.0)
    assert len(fitted.live) == 0
    raw = torch.from_numpy(features(3, (4, 4, 4), 2))
    fit = {"t1/stride4": fitted}
    encoded = FeatureEncoder(fit, torch.device("cpu")).encode("t1/stride4", raw)
    values, _ = HostDecoder(fit).decode("t1/stride4", pack([view.section for view in encoded]))
    found = FeatureDecoder(fit)({"t1/stride4": values})["t1/stride4"]
    np.testing.assert_array_equal(
        found.numpy(), np.broadcast_to(fitted.mean.astype(np.float32)[:, None, None], (3, 4, 4, 4))
    )


def test_feature_encoder_to_feature_decoder() -> None:
    """Raw features of two taps decode from payloads within the error that the encoder reports."""
    fit = {
        "t1/stride2": fitted_tap((4, 8, 8), 0.2),
        "t1/stride4": fitted_tap((6, 4, 4), 0.2, seed=3),
    }
    raw = {"t1/stride2": features(5, (4, 8, 8), 8) * 3 + 2, "t1/stride4": features(5, (6, 4, 4), 9)}
    encoder = FeatureEncoder(fit, torch.device("cpu"))
    host = HostDecoder(fit)
    decoder = FeatureDecoder(fit)
    for name, x in raw.items():
        encoded = encoder.encode(name, torch.from_numpy(x))
        values, scalars = host.decode(name, pack([view.section for view in encoded]))
        whitened = decoder({name: values})[name].numpy().astype(np.float64)
        sigma, mu = scalars.numpy().T[:, :, None, None, None]
        met = np.square((whitened * sigma + mu - x) / sigma).sum((1, 2, 3))
        errors, energies = np.array([(v.squared_error, v.energy) for v in encoded]).T
        assert (np.abs(errors - met) < 5e-4 * energies).all()
        assert errors.sum() < 0.1 * energies.sum()
        assert all(v.finite for v in encoded)


def test_several_draws_are_coded_as_their_mean() -> None:
    """Several draws give the payload of their mean whitened map and the means of their scalars."""
    fit = {"t1/stride4": fitted_tap((6, 4, 4), 0.1)}
    encoder = FeatureEncoder(fit, torch.device("cpu"))
    host = HostDecoder(fit)
    decoder = FeatureDecoder(fit)
    draws = [torch.from_numpy(features(3, (6, 4, 4), seed) * seed) for seed in (5, 6, 7)]
    encoded = encoder.encode("t1/stride4", *draws)
    values, scalars = host.decode("t1/stride4", pack([view.section for view in encoded]))
    maps = np.stack([x.numpy().astype(np.float64) for x in draws])
    mu = maps.mean((2, 3, 4))
    sigma = np.sqrt(maps.var((2, 3, 4)) + 1e-6)
    mean = ((maps - mu[..., None, None, None]) / sigma[..., None, None, None]).mean(0)
    np.testing.assert_allclose(scalars.numpy(), np.stack([sigma.mean(0), mu.mean(0)], 1), rtol=1e-5)
    met = np.square(decoder({"t1/stride4": values})["t1/stride4"].numpy() - mean).sum((1, 2, 3))
    np.testing.assert_allclose(met, [v.squared_error for v in encoded], rtol=0.02, atol=0.02)
    assert met.sum() < 0.2 * np.square(mean).sum()


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_map_that_is_not_finite_has_no_payload(wrong: float) -> None:
    """A non-finite value empties its own sample's payload and changes no other payload."""
    fit = {"t1/stride4": fitted_tap((6, 4, 4), 0.3)}
    encoder = FeatureEncoder(fit, torch.device("cpu"))
    raw = torch.from_numpy(features(3, (6, 4, 4), 4))
    before = [v.section for v in encoder.encode("t1/stride4", raw)]
    raw[1, 2, 3, 0] = wrong
    found = encoder.encode("t1/stride4", raw)
    assert [v.finite for v in found] == [True, False, True]
    assert [v.section for v in found] == [before[0], b"", before[2]]


def test_live_is_class_order() -> None:
    """Coefficients are coded by rising class, then by position; dropped ones are not coded."""
    fitted = random_fit(30, 0)
    classes = fitted.classes.copy()
    classes[0, 0, [4, 17]] = 255
    holed = FittedTap(**{**fitted.arrays(), "classes": classes})
    wanted = [p for c in range(3) for p in range(30) if classes[0, 0, p] == c]
    assert holed.live.tolist() == wanted
