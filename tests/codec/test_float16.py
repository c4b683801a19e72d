"""The float16 codec is exact to float16, and payloads that it cannot have written are refused."""

import numpy as np
import pytest
import torch

from dtcache.codec import FeatureDecoder, FeatureEncoder, HalfTap, HostDecoder, sha256_fit
from dtcache.codec.float16 import HalfCoder
from dtcache.errors import CodecError, PayloadError
from dtcache.payloads import pack
from dtcache.whitening import whiten

SHAPE = (3, 4, 6)
TAP = "t1/stride4"


def fit() -> dict[str, HalfTap]:
    """Return the fit of one small tap."""
    return {
        TAP: HalfTap(mean=np.array([0.5, 0.0, -0.25], np.float16), grid=np.array([4, 6], np.int32))
    }


def raw_maps(count: int, seed: int) -> torch.Tensor:
    """Return raw features with arbitrary scale."""
    return torch.from_numpy(
        np.random.default_rng(seed).normal(3, 7, (count, *SHAPE)).astype(np.float32)
    )


def test_features_come_back_as_float16_of_the_whitened_map() -> None:
    """Decoding returns NumPy's float16 of the whitened feature and the exact scalars."""
    raw = raw_maps(5, 0)
    encoded = FeatureEncoder(fit(), torch.device("cpu")).encode(TAP, raw)
    values, scalars = HostDecoder(fit()).decode(TAP, pack([v.section for v in encoded]))
    found = FeatureDecoder(fit())({TAP: values})[TAP]
    whitened, mu, sigma = whiten(raw)
    np.testing.assert_array_equal(
        found.numpy(), whitened.numpy().astype(np.float16).astype(np.float32)
    )
    np.testing.assert_array_equal(scalars.numpy(), np.stack([sigma.numpy(), mu.numpy()], 1))


def test_the_payload_is_scalars_low_bytes_high_bytes() -> None:
    """The payload's bytes are those of docs/format.md, written here with NumPy alone."""
    values = np.arange(-3, 69).astype(np.float16)
    low = values.view(np.uint16) & 255
    high = values.view(np.uint16) >> 8
    wanted = (
        np.array([2.5, -1.5], "<f4").tobytes()
        + low.astype(np.uint8).tobytes()
        + high.astype(np.uint8).tobytes()
    )
    assert HalfCoder(count=len(values)).pack(values, mu=-1.5, sigma=2.5) == wanted


def test_error_and_energy_are_numpys() -> None:
    """The reported error is the rounding error; the energy is taken about the channel means."""
    raw = raw_maps(4, 1)
    encoded = FeatureEncoder(fit(), torch.device("cpu")).encode(TAP, raw)
    x = whiten(raw)[0].numpy().astype(np.float64)
    mean = fit()[TAP].mean.astype(np.float64)[:, None, None]
    np.testing.assert_allclose(
        [v.energy for v in encoded], np.square(x - mean).sum((1, 2, 3)), rtol=1e-5
    )
    error = np.square(x - x.astype(np.float16)).sum((1, 2, 3))
    np.testing.assert_allclose([v.squared_error for v in encoded], error, rtol=1e-2)


def test_short_payloads_are_refused() -> None:
    """A payload too short for its values raises CodecError before anything is read."""
    with pytest.raises(
        PayloadError, match="a section has 40 bytes, too short for 72 float16 values"
    ) as caught:
        HalfCoder(count=72).unpack(pack([bytes(160), bytes(40)]))
    assert caught.value.index == 1


def test_a_grid_that_contradicts_itself_is_refused() -> None:
    """An empty grid, a mean that is not a vector and arrays of other types are refused."""
    with pytest.raises(CodecError, match="arrays contradict each other"):
        HalfTap(mean=np.zeros(3, np.float16), grid=np.array([4, 0], np.int32))
    with pytest.raises(CodecError, match="arrays contradict each other"):
        HalfTap(mean=np.zeros((3, 1), np.float16), grid=np.array([4, 6], np.int32))
    for mean, grid in ((np.float32, np.int32), (np.float16, np.int64), (np.float16, np.float16)):
        with pytest.raises(CodecError, match="arrays contradict each other"):
            HalfTap(mean=np.zeros(3, mean), grid=np.array([4, 6], grid))


def test_the_hash_covers_mean_and_grid() -> None:
    """The fit's hash changes with the mean and with another grid of equally many positions."""
    mean = np.zeros(3, np.float16)
    grid = np.array([4, 6], np.int32)
    taps = [
        HalfTap(mean=mean, grid=grid),
        HalfTap(mean=mean + 1, grid=grid),
        HalfTap(mean=mean, grid=grid[::-1].copy()),
    ]
    assert len({sha256_fit({TAP: tap}) for tap in taps}) == 3
